"""IA3: a trainable factor on each output, or each input, of a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(AdapterConfig):
    """`W diag(l)`, or `diag(l) W`: scales a layer's outputs, or its inputs.

    The paper scales the outputs of keys and values, and the inputs of an MLP's last layer. A bias
    is not scaled with the outputs; the paper's models have none.

    Attributes:
        apply_to: "outputs" or "inputs" (for a convolution: its input channels).
        dtype: Data type of `l`, which starts at one.

    Raises:
        ValueError: `apply_to` is another value.
        TypeError: `dtype` is not a float.

    References:
        Liu et al., arXiv:2205.05638, section 3.3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.IA3(apply_to="inputs"))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((3, 5))}, jnp.ones((4, 3)))
        >>> adapter["w"].l
        Array([1., 1., 1.], dtype=float32)
    """

    info = MethodInfo(
        name="IA3",
        formula="W diag(l), or diag(l) W",
        num_params_formula="k",
        recommended_for="a handful of examples; mixing tasks in one batch",
        paper="Liu et al. 2205.05638",
    )
    supported_kinds = frozenset({"linear", "convolution"})

    apply_to: str = "outputs"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.apply_to not in ("outputs", "inputs"):
            raise ValueError(
                f"IA3.apply_to={self.apply_to!r} must be 'outputs' (keys, values) or 'inputs' (the "
                f"last layer of an MLP)."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> IA3Leaf:
        """Returns factors of one."""
        del key
        side = weight.axes.outputs if self.apply_to == "outputs" else weight.channel_axes
        scaled_axes = (*weight.axes.batch, *side)
        shape = tuple(weight.shape[axis] for axis in scaled_axes)
        return IA3Leaf(
            l=jnp.ones(shape, self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            scaled_axes=scaled_axes,
        )


@register_family("ia3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Leaf(AdapterLeaf):
    """Factors of one weight.

    Attributes:
        l: Factors, (*batch, *outputs) or (*batch, *inputs).
        scaled_axes: Axes of the weight that `l` runs along.
    """

    l: jax.Array = array_field("l")  # noqa: E741  The paper's name.
    shape: tuple[int, ...]
    axes: WeightAxes
    scaled_axes: tuple[int, ...]

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        del context
        return weight.multiply((self.l, self.scaled_axes))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"l": tuple(self.shape[axis] for axis in self.scaled_axes)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"l": tuple(self.scaled_axes)}
