"""Training weights whole: any that are chosen, or the biases."""

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
class FullDelta(AdapterConfig):
    """`W + delta`, every entry trained: for heads, norms and resized embeddings beside LoRA.

    What is trained is the difference, which starts at zero and has a type of its own, so small
    steps are not lost on a base in bfloat16, and decay pulls towards the base.

    Attributes:
        dtype: Of the difference.
    """

    info = MethodInfo(
        name="Full",
        formula="W + delta",
        num_params_formula="d * k",
        recommended_for="heads, norms, resized embeddings, beside another family",
        paper="full fine-tuning of chosen weights",
    )
    dtype: Any = jnp.float32

    def selects(self, weight: AdaptableWeight) -> bool:
        """Whatever is there."""
        return True

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """None: any weight of floats will do."""
        return f"its shape {weight.shape} holds no numbers" if 0 in weight.shape else None

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> FullDeltaLeaf:
        """No difference."""
        del key
        delta = jnp.zeros(weight.shape, self.dtype)
        return FullDeltaLeaf(delta=delta, shape=weight.shape, axes=weight.axes)


@register_family("full")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FullDeltaLeaf(AdapterLeaf):
    """The difference of one weight."""

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
    """Only biases are trained: `b + delta`.

    As the rule for all weights it takes what is only added and is called a bias (its last key has
    "bias" in it, or is "b"); a rule that names anything else that is only added takes that too.

    Attributes:
        dtype: Of the difference.

    References:
        Ben Zaken et al., BitFit, arXiv:2106.10199, section 3.
    """

    info = MethodInfo(
        name="BitFit",
        formula="b + delta, biases alone",
        num_params_formula="k",
        recommended_for="small data; the least that can be trained",
        paper="Ben Zaken et al. 2106.10199",
    )
    supported_kinds = frozenset({"bias"})

    def selects(self, weight: AdaptableWeight) -> bool:
        """What is called a bias."""
        last = weight.path.rsplit("/", 1)[-1]
        return weight.kind == "bias" and ("bias" in last or last == "b")

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Why it is no bias."""
        if weight.kind != "bias":
            by = ", ".join(weight.primitives) or "nothing"
            return f"it is no bias, for it is not only added (it is used by: {by})"
        return super().unsupported_reason(weight)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> BitFitLeaf:
        """No difference."""
        made = super().init_leaf(key, weight)
        return BitFitLeaf(delta=made.delta, shape=made.shape, axes=made.axes)


@register_family("bias")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitLeaf(FullDeltaLeaf):
    """The difference of one bias."""

    delta: jax.Array = array_field("bias")
