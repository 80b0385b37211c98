"""A mix: several LoRAs of one weight, each under a weight of its own that can be changed."""

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
from jlora.interpreter.usage import WeightAxes


@register_family("weighted_sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedSumLeaf(AdapterLeaf):
    """`W + sum_i w_i A_i B_i` for one weight; `jlora.merging.mixed` makes it of trained adapters.

    The factors lie side by side along the rank and are frozen. Only the weights `w` are trained, or
    differ from row to row of a batch, and they stand in a product of their own: mapping over them
    repeats the few numbers of `x A` and nothing of the factors' size.

    Attributes:
        a: (*batch, *inputs, sum of ranks), in the order of `axes`.
        b: (*batch, sum of ranks, *outputs), each adapter's scale folded in.
        weights: (n,); (*batch, n) where they are `layered`.
        shape: The weight's shape.
        axes: What each of the weight's axes does.
        ranks: Of each adapter; 0 for one that does not adapt this weight.
        names: Of each adapter.
        layered: Whether each matrix of a stack has weights of its own.
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
        """Of all adapters together."""
        return sum(self.ranks)

    @property
    def rank_weights(self) -> jax.Array:
        """The weight of every rank: (rank,), or (*batch, rank)."""
        # Picked, not multiplied with zeros and ones, so that NaN in one weight stays there.
        return self.weights[..., np.repeat(np.arange(len(self.ranks)), self.ranks)]

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.layered, bool):
            raise TypeError(f"layered={self.layered!r} must be True or False")
        if not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names={self.names} are not all texts")
        if len(self.names) != len(self.ranks) or len(set(self.names)) != len(self.names):
            raise ValueError(f"names={self.names} do not tell {len(self.ranks)} adapters apart")
        if not all(isinstance(rank, numbers.Integral) and rank >= 0 for rank in self.ranks):
            raise ValueError(f"ranks={self.ranks} are not all counts")
        if not any(self.ranks):
            raise ValueError(f"ranks={self.ranks} leave no adapter for the weight")

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """The three factors apart; no gradient reaches `a` and `b`."""
        del context
        a, b = low_rank.label_factors(self, *jax.lax.stop_gradient((self.a, self.b)))
        batch = self.axes.batch if self.layered else ()
        return weight.add(a, (self.rank_weights, (*batch, "rank")), b)

    def fold_weights_into_b(self) -> jax.Array:
        """`b` under the weights: with `a`, a plain LoRA of the scale one."""
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
