"""Trainable tokens: updates of the embedding rows of chosen tokens, such as new ones."""

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
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(AdapterConfig):
    """`W + S delta`, with a row of `delta` for each chosen token; `S` selects the tokens' rows.

    Attributes:
        token_indices: Indices of the trainable tokens, each once.
        dtype: Data type of the differences, which start at zero.

    Raises:
        ValueError: `token_indices` are not distinct indices.
        TypeError: `dtype` is not a float.

    References:
        PEFT's trainable tokens, which store the rows instead of differences.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.TrainableTokens(token_indices=(8, 9))
        >>> lora = jlora.lora_transform(lambda p, tokens: p["embedding"][tokens], config)
        >>> params = {"embedding": jnp.ones((10, 6))}
        >>> lora.init(jax.random.key(0), params, jnp.array([1, 9]))["embedding"].delta.shape
        (2, 6)
    """

    info = MethodInfo(
        name="Trainable tokens",
        formula="W + S delta, the rows of n tokens",
        num_params_formula="n * k",
        recommended_for="a few new tokens, beside another method",
        paper="full fine-tuning of chosen rows",
    )
    supported_kinds = frozenset({"embedding"})

    token_indices: tuple[int, ...]
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.token_indices
        valid = all(type(token) is int and token >= 0 for token in tokens)
        if not tokens or not valid or len(set(tokens)) != len(tokens):
            raise ValueError(
                f"TrainableTokens.token_indices={tokens!r} must be integers of 0 or more, each "
                f"once."
            )
        object.__setattr__(self, "token_indices", tuple(tokens))

    def selects(self, weight: AdaptableWeight) -> bool:
        """Whether the weight is an embedding."""
        return weight.kind == "embedding"

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns the reason of any method, or that a token has no row."""
        reason = super().unsupported_reason(weight)
        if reason is None and max(self.token_indices) >= weight.fan_in:
            return f"the token {max(self.token_indices)} is beyond its {weight.fan_in} rows"
        return reason

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> TrainableTokensLeaf:
        """Returns differences of zero."""
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
    """Differences of the rows of some tokens.

    Attributes:
        delta: (*batch, number of tokens, *outputs).
    """

    delta: jax.Array = array_field("full")
    shape: tuple[int, ...]
    axes: WeightAxes
    token_indices: tuple[int, ...]

    def validate(self) -> None:
        super().validate()
        rows = self.axis_sizes.inputs[0]
        if any(token < 0 or token >= rows for token in self.token_indices):
            raise ValueError(f"token_indices={self.token_indices} must be below the {rows} rows")

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `W + S delta`; a look-up reads `S` as it reads `W`."""
        del context
        batch, inputs, outputs = self.axes
        vocabulary = self.axis_sizes.inputs[0]
        selection = jax.nn.one_hot(jnp.array(self.token_indices), vocabulary, axis=0)
        return weight.add(
            (selection, (*inputs, "token")), (self.delta, (*batch, "token", *outputs))
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.axis_sizes
        return {"delta": (*batch, len(self.token_indices), *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {"delta": (*batch, None, *outputs)}
