"""Training weights whole: any that are chosen, or the biases."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.protocol import (
    About,
    AdapterConfig,
    AdapterLeaf,
    Expression,
    Given,
    Weight,
    array,
    family,
)
from jlora.factored.probe import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(AdapterConfig):
    """`W + delta`, every entry trained: for heads, norms and resized embeddings beside LoRA.

    What is trained is the difference, which starts at zero and has a type of its own, so small
    steps are not lost on a base in bfloat16, and decay pulls towards the base.

    Attributes:
        dtype: Of the difference.
    """

    about = About(
        name="Full",
        formula="W + delta",
        parameters="d * k",
        good_for="heads, norms, resized embeddings, beside another family",
        paper="full fine-tuning of chosen weights",
    )
    dtype: Any = jnp.float32

    def selects(self, weight: Weight) -> bool:
        """Whatever is there."""
        return True

    def refusal(self, weight: Weight) -> str | None:
        """None: any weight of floats will do."""
        return f"its shape {weight.shape} holds no numbers" if 0 in weight.shape else None

    def leaf(self, key: jax.Array, weight: Weight) -> FullLeaf:
        """No difference."""
        del key
        delta = jnp.zeros(weight.shape, self.dtype)
        return FullLeaf(delta=delta, shape=weight.shape, axes=weight.axes)


@family("full")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FullLeaf(AdapterLeaf):
    """The difference of one weight."""

    delta: jax.Array = array("full")
    shape: tuple[int, ...]
    axes: Axes
    whole = True

    def expression(self, given: Given) -> Expression:
        del given
        return Expression(terms=[[(self.delta, range(len(self.shape)))]])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"delta": self.shape}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"delta": tuple(range(len(self.shape)))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Full):
    """Only biases are trained: `b + delta`.

    As the rule for all weights it takes what is only added and is called a bias (its last key has
    "bias" in it, or is "b"); a rule that names anything else that is only added takes that too.

    Attributes:
        dtype: Of the difference.

    References:
        Ben Zaken et al., BitFit, arXiv:2106.10199, section 3.
    """

    about = About(
        name="BitFit",
        formula="b + delta, biases alone",
        parameters="k",
        good_for="small data; the least that can be trained",
        paper="Ben Zaken et al. 2106.10199",
    )
    kinds = frozenset({"bias"})

    def selects(self, weight: Weight) -> bool:
        """What is called a bias."""
        last = weight.path.rsplit("/", 1)[-1]
        return weight.kind == "bias" and ("bias" in last or last == "b")

    def refusal(self, weight: Weight) -> str | None:
        """Why it is no bias."""
        if weight.kind != "bias":
            by = ", ".join(weight.uses) or "nothing"
            return f"it is no bias, for it is not only added (it is used by: {by})"
        return super().refusal(weight)

    def leaf(self, key: jax.Array, weight: Weight) -> BiasLeaf:
        """No difference."""
        made = super().leaf(key, weight)
        return BiasLeaf(delta=made.delta, shape=made.shape, axes=made.axes)


@family("bias")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasLeaf(FullLeaf):
    """The difference of one bias."""

    delta: jax.Array = array("bias")
