"""AdaLoRA: an update in the form of a singular value decomposition, its rank found in training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters import checks, pair
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
class AdaLoRA(AdapterConfig):
    """`W + (alpha / rank) * A diag(s) B`, the directions whose `s` matters least set to zero.

    Train it with `jlora.adalora_budget` around the optimizer, which decides what matters, and with
    `jlora.orthogonality` added to the loss, which keeps the directions apart. `jlora.prune` then
    leaves out what was set to zero.

    Attributes:
        rank: What training starts with; half as much again as is wanted in the end, say.
        alpha: Numerator of the scale put on the update; positive.
        dropout: Probability of dropping an entry of the input of `A` while training.
        dtype: Of `A`, `s` and `B`.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, section 3.1. The scale is that of its code; `A` and
        `B` here are the paper's `Q` and `P`, for x is on the left.
    """

    about = About(
        name="AdaLoRA",
        formula="W + (alpha / r) A diag(s) B, the least important s set to zero",
        parameters="r * (d + k + 1)",
        good_for="a given budget of ranks, spent where it matters",
        paper="Zhang et al. 2303.10512",
    )
    kinds = frozenset({"linear"})

    rank: int
    alpha: float
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def leaf(self, key: jax.Array, weight: Weight) -> AdaLoRALeaf:
        """`A` and `B` normal with a deviation of 0.02, `s` zero."""
        checks.warn_of_waste(self, self.rank, weight)
        key_a, key_b = jax.random.split(key)
        shapes = pair.shapes_of(weight.groups, self.rank)
        return AdaLoRALeaf(
            a=0.02 * jax.random.normal(key_a, shapes["a"], self.dtype),
            s=jnp.zeros((*weight.groups.batch, self.rank), self.dtype),
            b=0.02 * jax.random.normal(key_b, shapes["b"], self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            alpha=float(self.alpha),
            dropout=float(self.dropout),
        )


@family("adalora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRALeaf(AdapterLeaf):
    """The triplets of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        s: (*batch, rank).
        b: (*batch, rank, *outputs).
    """

    a: jax.Array = array("a")
    s: jax.Array = array("s")
    b: jax.Array = array("b")
    shape: tuple[int, ...]
    axes: Axes
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        return pair.scale_of(self.rank, self.alpha)

    def expression(self, given: Given) -> Expression:
        """`W + scale * A diag(s) B`; `s` is folded into `B`."""
        del given
        b = pair.gated(self, self.s * self.scale, self.b)
        return Expression(terms=[pair.labelled(self, self.a, b)])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, *_ = self.groups
        return {**pair.shapes_of(self.groups, self.rank), "s": (*batch, self.rank)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {**pair.axes_of(self.axes), "s": (*self.axes.batch, None)}
