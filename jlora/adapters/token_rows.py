"""Training some rows of an embedding: those of tokens that are new, or whose meaning is."""

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
class TokenRows(AdapterConfig):
    """`W + S delta`, with a row of `delta` for each of some tokens and `S` putting it there.

    Attributes:
        tokens: The numbers of the tokens, each once.
        dtype: Of the differences, which start at zero.

    References:
        PEFT's trainable tokens, which keep the rows themselves instead of differences.
    """

    about = About(
        name="Token rows",
        formula="W + S delta, rows of n tokens",
        parameters="n * k",
        good_for="a few new tokens beside another family",
        paper="full fine-tuning of chosen rows",
    )
    kinds = frozenset({"embedding"})

    tokens: tuple[int, ...]
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        good = all(type(token) is int and token >= 0 for token in self.tokens)
        if not self.tokens or not good or len(set(self.tokens)) != len(self.tokens):
            raise ValueError(
                f"TokenRows.tokens={self.tokens!r} must be whole numbers of 0 or more, each once."
            )
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def selects(self, weight: Weight) -> bool:
        """Embeddings."""
        return weight.kind == "embedding"

    def refusal(self, weight: Weight) -> str | None:
        """As for any family, and where a token has no row."""
        reason = super().refusal(weight)
        if reason is None and max(self.tokens) >= weight.fan_in:
            return f"the token {max(self.tokens)} has no row among its {weight.fan_in}"
        return reason

    def leaf(self, key: jax.Array, weight: Weight) -> TokenRowsLeaf:
        """No differences."""
        del key
        batch, _, outputs = weight.groups
        return TokenRowsLeaf(
            delta=jnp.zeros((*batch, len(self.tokens), *outputs), self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            tokens=self.tokens,
        )


@family("token_rows")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRowsLeaf(AdapterLeaf):
    """The differences of some rows, (*batch, tokens, *outputs)."""

    delta: jax.Array = array("full")
    shape: tuple[int, ...]
    axes: Axes
    tokens: tuple[int, ...]

    def check(self) -> None:
        super().check()
        rows = self.groups.inputs[0]
        if any(token < 0 or token >= rows for token in self.tokens):
            raise ValueError(f"tokens={self.tokens} are not among the {rows} rows")

    def expression(self, given: Given) -> Expression:
        """Rows are looked up in `S` as they are in `W`."""
        del given
        batch, inputs, outputs = self.axes
        chosen = jax.nn.one_hot(jnp.array(self.tokens), self.groups.inputs[0], axis=0)
        return Expression(
            terms=[[(chosen, (*inputs, "token")), (self.delta, (*batch, "token", *outputs))]]
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.groups
        return {"delta": (*batch, len(self.tokens), *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {"delta": (*batch, None, *outputs)}
