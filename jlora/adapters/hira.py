"""HiRA: the weight itself, scaled entry by entry by a low-rank matrix."""

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
from jlora.packed import dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(AdapterConfig):
    """`W + W o (A B)`: an update of full rank from low-rank factors.

    It has no scale of its own. A step multiplies twice with arrays of the weight's size, and the
    gradient of the factors passes through one: it costs what full fine-tuning costs, but for the
    optimizer's state.

    Attributes:
        rank: Of `A B`.
        dropout: Probability of dropping an entry of the input of the update while training.
        init: One of `jlora.inits` that starts at zero.
        dtype: Of `A` and `B`.

    References:
        Huang et al., HiRA, ICLR 2025, section 3.2.
    """

    about = About(
        name="HiRA",
        formula="W + W o (A B)",
        parameters="r * (d + k)",
        good_for="updates of full rank, at the cost of full products",
        paper="Huang et al., ICLR 2025",
    )
    rank: int
    dropout: float = 0.0
    init: inits.Initialization = inits.uniform
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init.residual:
            raise ValueError(
                f"HiRA.init={self.init!r} is made of the weight's own factors, which say nothing "
                f"of what it should be multiplied by. Use one that starts at zero."
            )

    def leaf(self, key: jax.Array, weight: Weight) -> HiRALeaf:
        """Factors as `init` makes them."""
        checks.warn_of_waste(self, self.rank, weight)
        return HiRALeaf(
            **pair.draw(key, weight, self.init, self.rank, 1.0, self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            dropout=float(self.dropout),
        )


@family("hira")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRALeaf(AdapterLeaf):
    """The factors of one weight: `a` (*batch, *inputs, rank), `b` (*batch, rank, *outputs)."""

    a: jax.Array = array("a")
    b: jax.Array = array("b")
    shape: tuple[int, ...]
    axes: Axes
    rank: int
    dropout: float

    @property
    def weight_sized(self) -> bool:
        return True

    def expression(self, given: Given) -> Expression:
        """The base as one more operand: a sum in its own type would round small updates off."""
        base = (dense(given.base), range(len(self.shape)))
        return Expression(terms=[[base, *pair.labelled(self, self.a, self.b)]])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return pair.shapes_of(self.groups, self.rank)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return pair.axes_of(self.axes)
