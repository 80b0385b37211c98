"""A weighted sum of several LoRAs of one weight, with trainable mixing weights."""

from __future__ import annotations

import dataclasses
import numbers

import jax
import numpy as np

from jlora.adapters import low_rank
from jlora.adapters.base import (
    FROZEN,
    AdapterLeaf,
    LeafContext,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import WeightAxes


@register_family("weighted_sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedSumLeaf(AdapterLeaf):
    """`W + sum_i w_i A_i B_i` for one weight, from trained adapters.

    The factors are concatenated along the rank and frozen. Only the mixing weights `w` are
    trainable, or differ between the rows of a batch. They are a factor of their own, so `jax.vmap`
    over them repeats the small array `x A` and nothing of the factors' size.

    Attributes:
        a: (*batch, *inputs, sum of ranks), in the order of `axes`.
        b: (*batch, sum of ranks, *outputs), with each adapter's scale folded in.
        weights: Mixing weights: (n,), or (*batch, n) where `layered`.
        shape: Shape of the weight.
        axes: Roles of the weight's axes.
        ranks: Rank of each adapter; 0 for one that does not adapt this weight.
        names: Name of each adapter.
        layered: Whether each matrix of a stack has its own mixing weights.
    """

    a: jax.Array = array_field(FROZEN)
    b: jax.Array = array_field(FROZEN)
    weights: jax.Array = array_field("mixing_weights")
    shape: tuple[int, ...]
    axes: WeightAxes
    ranks: tuple[int, ...]
    names: tuple[str, ...]
    layered: bool = False

    @property
    def rank(self) -> int:
        """Sum of the adapters' ranks."""
        return sum(self.ranks)

    @property
    def rank_weights(self) -> jax.Array:
        """Mixing weight of every rank: (rank,), or (*batch, rank)."""
        # Indexed, not multiplied with zeros and ones, so that NaN in one weight does not spread.
        return self.weights[..., np.repeat(np.arange(len(self.ranks)), self.ranks)]

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.layered, bool):
            raise TypeError(f"layered={self.layered!r} must be True or False")
        if not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names={self.names} must be strings")
        if len(self.names) != len(self.ranks) or len(set(self.names)) != len(self.names):
            raise ValueError(f"names={self.names} must be {len(self.ranks)} different names")
        if not all(isinstance(rank, numbers.Integral) and rank >= 0 for rank in self.ranks):
            raise ValueError(f"ranks={self.ranks} must be integers of 0 or more")
        if not any(self.ranks):
            raise ValueError(f"ranks={self.ranks} leave no adapter for the weight")

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns the three factors as one term; `a` and `b` have no gradient."""
        del context
        a, b = low_rank.label_factors(self, *jax.lax.stop_gradient((self.a, self.b)))
        batch = self.axes.batch if self.layered else ()
        return weight.add(a, (self.rank_weights, (*batch, "rank")), b)

    def fold_weights_into_b(self) -> jax.Array:
        """Returns `b` times the mixing weights; with `a` it is a plain LoRA of scale one."""
        batch = self.axis_sizes.batch if self.layered else (1,) * len(self.axes.batch)
        return low_rank.apply_rank_gates(self, self.rank_weights.reshape(*batch, self.rank), self.b)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch = self.axis_sizes.batch if self.layered else ()
        return {
            **low_rank.factor_shapes(self.axis_sizes, self.rank),
            "weights": (*batch, len(self.ranks)),
        }

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        factors = low_rank.factor_axes(self.axes)
        return {**factors, "weights": (*self.axes.batch, None)} if self.layered else factors
