"""HiRA: the weight itself, scaled entry by entry by a low-rank matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation, initializers
from jlora._quantized_array import maybe_dequantize
from jlora.adapters import low_rank
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
class HiRA(AdapterConfig):
    """`W + W o (A B)`: an update of full rank from low-rank factors.

    It has no scale of its own. A step multiplies twice with arrays of the weight's size, and the
    gradient of the factors passes through one: it costs what full fine-tuning costs, but for the
    optimizer's state.

    Attributes:
        rank: Of `A B`.
        dropout: Probability of dropping an entry of the input of the update while training.
        init: One of `jlora.initializers` that starts at zero.
        dtype: Of `A` and `B`.

    References:
        Huang et al., HiRA, ICLR 2025, section 3.2.
    """

    info = MethodInfo(
        name="HiRA",
        formula="W + W o (A B)",
        num_params_formula="r * (d + k)",
        recommended_for="updates of full rank, at the cost of full products",
        paper="Huang et al., ICLR 2025",
    )
    rank: int
    dropout: float = 0.0
    init: initializers.FactorInit = initializers.kaiming_uniform
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init.residual:
            raise ValueError(
                f"HiRA.init={self.init!r} is made of the weight's own factors, which say nothing "
                f"of what it should be multiplied by. Use one that starts at zero."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> HiRALeaf:
        """Factors as `init` makes them."""
        _validation.warn_excess_rank(self, self.rank, weight)
        return HiRALeaf(
            **low_rank.init_factors(key, weight, self.init, self.rank, 1.0, self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            dropout=float(self.dropout),
        )


@register_family("hira")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRALeaf(AdapterLeaf):
    """The factors of one weight: `a` (*batch, *inputs, rank), `b` (*batch, rank, *outputs)."""

    a: jax.Array = array_field("a")
    b: jax.Array = array_field("b")
    shape: tuple[int, ...]
    axes: WeightAxes
    rank: int
    dropout: float

    @property
    def is_weight_sized(self) -> bool:
        return True

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """The base as one more operand: a sum in its own type would round small updates off."""
        base = (maybe_dequantize(weight.base), range(len(self.shape)))
        return weight.add(base, *low_rank.label_factors(self, self.a, self.b))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return low_rank.factor_shapes(self.axis_sizes, self.rank)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return low_rank.factor_axes(self.axes)
