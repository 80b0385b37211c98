"""IA3: a learned factor on each of a layer's outputs, or inputs."""

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
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(AdapterConfig):
    """`W diag(l)`, or `diag(l) W`: the outputs of keys and values, or the inputs of an MLP's last
    layer, scaled.

    A bias is not scaled with the outputs; the paper's models have none.

    Attributes:
        apply_to: "outputs" or "inputs" (for a convolution: its input channels).
        dtype: Of `l`, which starts at one.

    References:
        Liu et al., arXiv:2205.05638, section 3.3.
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
                f"IA3.on={self.apply_to!r} is no side of a weight. Use 'outputs' (keys, values) or "
                f"'inputs' (the last layer of an MLP)."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> IA3Leaf:
        """Ones."""
        del key
        side = weight.axes.outputs if self.apply_to == "outputs" else weight.channel_axes
        scaled = (*weight.axes.batch, *side)
        shape = tuple(weight.shape[axis] for axis in scaled)
        return IA3Leaf(
            l=jnp.ones(shape, self.dtype), shape=weight.shape, axes=weight.axes, scaled_axes=scaled
        )


@register_family("ia3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Leaf(AdapterLeaf):
    """The factors `l` of one weight, along its axes `scaled_axes`."""

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
