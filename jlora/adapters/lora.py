"""LoRA: a low-rank update beside a frozen weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters import checks, inits, pair
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
class LoRA(AdapterConfig):
    """Low-rank adaptation: `W + (alpha / rank) * A B`, with x on the left.

    Attributes:
        rank: Width of the bottleneck; a positive count.
        alpha: Numerator of the scale put on the update; positive.
        dropout: Probability of dropping an entry of the input of `A` while training. It acts only
            where `apply` is given a `dropout_key`.
        rank_stabilized: Scale by `alpha / sqrt(rank)` instead, which keeps the update's size as
            the rank grows (rsLoRA).
        init: One of `jlora.inits`. By default `A` is uniform and `B` zero; embeddings are the other
            way about, `A` zero and `B` normal, as in the reference.
        dtype: Of `A` and `B`. They are cast to the activation's type at each product.

    Raises:
        ValueError: For a value out of its range.
        TypeError: For one of another type.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
        Kalajdzievski, rsLoRA, arXiv:2312.03732, section 4.
    """

    about = About(
        name="LoRA, rsLoRA",
        formula="W + (alpha / r) A B; rsLoRA: alpha / sqrt(r)",
        parameters="r * (d + k)",
        good_for="the default; everything else is measured against it",
        paper="Hu et al. 2106.09685; Kalajdzievski 2312.03732",
    )

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: inits.Initialization = inits.uniform
    dtype: Any = jnp.float32

    def leaf(self, key: jax.Array, weight: Weight) -> LoRALeaf:
        """Factors as `init` makes them."""
        checks.warn_of_waste(self, self.rank, weight)
        scale = pair.scale_of(self.rank, self.alpha, self.rank_stabilized)
        return LoRALeaf(
            **pair.draw(key, weight, self.init, self.rank, scale, self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            alpha=float(self.alpha),
            rank_stabilized=self.rank_stabilized,
            dropout=float(self.dropout),
            residual=self.init.residual,
        )


@family("lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRALeaf(AdapterLeaf):
    """The factors of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        shape: The weight's shape.
        axes: What each of the weight's axes does.
        residual: Whether it belongs on a base that `jlora.residual_base` or `jlora.loftq` made.
    """

    a: jax.Array = array("a")
    b: jax.Array = array("b")
    shape: tuple[int, ...]
    axes: Axes
    rank: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0
    residual: bool = False

    @property
    def scale(self) -> float:
        return pair.scale_of(self.rank, self.alpha, self.rank_stabilized)

    def expression(self, given: Given) -> Expression:
        """`W + scale * A B`; the scale is folded into `B`, which is far smaller than a result."""
        del given
        return Expression(terms=[pair.labelled(self, self.a, self.b * self.scale)])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return pair.shapes_of(self.groups, self.rank)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return pair.axes_of(self.axes)
