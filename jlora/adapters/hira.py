"""HiRA: an update that is the weight times a low-rank matrix, entry by entry."""

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
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(AdapterConfig):
    """`W + W o (A B)`: an update of full rank from low-rank factors.

    The update has no scale. A step takes two products with arrays of the weight's size, and the
    gradient of the factors passes through one, so a step costs as much as one of full fine-tuning;
    only the optimizer state is smaller.

    Attributes:
        rank: Rank of `A B`.
        dropout: Probability of dropping an entry of the input of the update while training.
        init: One of `jlora.initializers` whose update starts at zero.
        dtype: Data type of `A` and `B`.

    Raises:
        ValueError: A value is out of range, or `init` does not start at zero.
        TypeError: A value is of another type.

    References:
        Huang et al., HiRA, ICLR 2025, section 3.2.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.HiRA(rank=2))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].is_weight_sized
        True
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
                f"HiRA.init={self.init!r} takes an update out of the base, but HiRA multiplies the "
                f"base. Use an initialization whose update starts at zero, such as "
                f"initializers.kaiming_uniform."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> HiRALeaf:
        """Returns factors from `init`."""
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
    """Factors of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
    """

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
        """Returns the base as one more operand; a sum in its type would round small updates off."""
        base = (maybe_dequantize(weight.base), range(len(self.shape)))
        return weight.add(base, *low_rank.label_factors(self, self.a, self.b))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return low_rank.factor_shapes(self.axis_sizes, self.rank)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return low_rank.factor_axes(self.axes)
