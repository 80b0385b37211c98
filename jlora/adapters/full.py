"""Full fine-tuning of chosen weights, and BitFit, which trains the biases alone."""

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
class FullDelta(AdapterConfig):
    """`W + delta` with every entry trainable: for heads, norms and resized embeddings beside LoRA.

    The trainable difference starts at zero and has its own data type, so that small steps are not
    lost on a base in bfloat16, and weight decay pulls towards the base.

    Attributes:
        dtype: Data type of the difference.

    Raises:
        TypeError: `dtype` is not a float.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x * p["scale"], {"scale": jlora.FullDelta()})
        >>> adapter = lora.init(jax.random.key(0), {"scale": jnp.ones(3)}, jnp.ones(3))
        >>> adapter["scale"].delta
        Array([0., 0., 0.], dtype=float32)
    """

    info = MethodInfo(
        name="Full delta",
        formula="W + delta",
        num_params_formula="d * k",
        recommended_for="heads, norms, resized embeddings, beside another method",
        paper="full fine-tuning of chosen weights",
    )
    dtype: Any = jnp.float32

    def selects(self, weight: AdaptableWeight) -> bool:
        """True: the config selects every weight."""
        return True

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns None for every weight of floats that has elements."""
        return f"its shape {weight.shape} has no elements" if 0 in weight.shape else None

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> FullDeltaLeaf:
        """Returns a difference of zero."""
        del key
        delta = jnp.zeros(weight.shape, self.dtype)
        return FullDeltaLeaf(delta=delta, shape=weight.shape, axes=weight.axes)


@register_family("full")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FullDeltaLeaf(AdapterLeaf):
    """Difference of one weight from its base."""

    delta: jax.Array = array_field("full")
    shape: tuple[int, ...]
    axes: WeightAxes
    is_full = True

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        del context
        return weight.add((self.delta, range(len(self.shape))))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"delta": self.shape}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"delta": tuple(range(len(self.shape)))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(FullDelta):
    """`b + delta` for the biases alone.

    As the only rule it selects weights that are only added and are named a bias (the last key
    contains "bias", or is "b"). A rule whose pattern names any other weight that is only added
    adapts that weight too.

    Attributes:
        dtype: Data type of the difference.

    Raises:
        TypeError: `dtype` is not a float.

    References:
        Ben Zaken et al., BitFit, arXiv:2106.10199, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"] + p["bias"], jlora.BitFit())
        >>> params = {"w": jnp.ones((6, 5)), "bias": jnp.ones(5)}
        >>> list(lora.init(jax.random.key(0), params, jnp.ones((4, 6))))
        ['bias']
    """

    info = MethodInfo(
        name="BitFit",
        formula="b + delta, biases only",
        num_params_formula="k",
        recommended_for="small data and the fewest parameters",
        paper="Ben Zaken et al. 2106.10199",
    )
    supported_kinds = frozenset({"bias"})

    def selects(self, weight: AdaptableWeight) -> bool:
        """Whether the weight is only added, and named a bias."""
        last = weight.path.rsplit("/", 1)[-1]
        return weight.kind == "bias" and ("bias" in last or last == "b")

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns why the weight is not a bias; None when it is one."""
        if weight.kind != "bias":
            by = ", ".join(weight.primitives) or "nothing"
            return f"it is not a bias: it is not only added (it is used by: {by})"
        return super().unsupported_reason(weight)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> BitFitLeaf:
        """Returns a difference of zero."""
        full = super().init_leaf(key, weight)
        return BitFitLeaf(delta=full.delta, shape=full.shape, axes=full.axes)


@register_family("bias")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitLeaf(FullDeltaLeaf):
    """Difference of one bias from its base."""

    delta: jax.Array = array_field("bias")
