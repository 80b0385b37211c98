"""Training some rows of an embedding: those of tokens that are new, or whose meaning is."""

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
class TrainableTokens(AdapterConfig):
    """`W + S delta`, with a row of `delta` for each of some tokens and `S` putting it there.

    Attributes:
        token_indices: The numbers of the tokens, each once.
        dtype: Of the differences, which start at zero.

    References:
        PEFT's trainable tokens, which keep the rows themselves instead of differences.
    """

    info = MethodInfo(
        name="Token rows",
        formula="W + S delta, rows of n tokens",
        num_params_formula="n * k",
        recommended_for="a few new tokens beside another family",
        paper="full fine-tuning of chosen rows",
    )
    supported_kinds = frozenset({"embedding"})

    token_indices: tuple[int, ...]
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        good = all(type(token) is int and token >= 0 for token in self.token_indices)
        if (
            not self.token_indices
            or not good
            or len(set(self.token_indices)) != len(self.token_indices)
        ):
            raise ValueError(
                f"TrainableTokens.tokens={self.token_indices!r} must be whole numbers of 0 or more, each once."
            )
        object.__setattr__(self, "token_indices", tuple(self.token_indices))

    def selects(self, weight: AdaptableWeight) -> bool:
        """Embeddings."""
        return weight.kind == "embedding"

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """As for any family, and where a token has no row."""
        reason = super().unsupported_reason(weight)
        if reason is None and max(self.token_indices) >= weight.fan_in:
            return f"the token {max(self.token_indices)} has no row among its {weight.fan_in}"
        return reason

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> TrainableTokensLeaf:
        """No differences."""
        del key
        batch, _, outputs = weight.axis_sizes
        return TrainableTokensLeaf(
            delta=jnp.zeros((*batch, len(self.token_indices), *outputs), self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            token_indices=self.token_indices,
        )


@register_family("trainable_tokens")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokensLeaf(AdapterLeaf):
    """The differences of some rows, (*batch, tokens, *outputs)."""

    delta: jax.Array = array_field("full")
    shape: tuple[int, ...]
    axes: WeightAxes
    token_indices: tuple[int, ...]

    def validate(self) -> None:
        super().validate()
        rows = self.axis_sizes.inputs[0]
        if any(token < 0 or token >= rows for token in self.token_indices):
            raise ValueError(f"tokens={self.token_indices} are not among the {rows} rows")

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Rows are looked up in `S` as they are in `W`."""
        del context
        batch, inputs, outputs = self.axes
        chosen = jax.nn.one_hot(jnp.array(self.token_indices), self.axis_sizes.inputs[0], axis=0)
        return weight.add((chosen, (*inputs, "token")), (self.delta, (*batch, "token", *outputs)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.axis_sizes
        return {"delta": (*batch, len(self.token_indices), *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {"delta": (*batch, None, *outputs)}
