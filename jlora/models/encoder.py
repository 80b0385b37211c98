"""An encoder of texts in Flax Linen for the checkpoints of BERT, RoBERTa and DistilBERT.

What differs between them, and the head if there is one, is data in `EncoderConfig`;
`jlora.models.encoder_architectures` makes one from a checkpoint's config.json. Dense kernels are
laid out (in, out).

References:
    Devlin et al., BERT, arXiv:1810.04805, section 3. The order of operations is that of the models
    in transformers, but that embeddings of positions are added before those of types.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd

from jlora.models.layers import (
    ACTIVATIONS,
    feed_forward,
    layer_norm,
    mark_invalid_ids,
    partitioned_init,
    self_attention,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of one encoder of texts.

    Attributes:
        model_type: Whose names the tensors of its checkpoints have.
        vocab_size: How many tokens.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        intermediate_size: Width inside the feed-forward.
        num_layers: How many blocks.
        num_heads: Of attention.
        max_position_embeddings: How many the table has.
        type_vocab_size: How many token types there are; 0 for none.
        pad_token_id: The token that takes no position (RoBERTa): others count from the number after
            its own. Where it is None, each token counts, from 0.
        activation: Inside the feed-forward, one of `ACTIVATIONS`.
        norm_eps: Added to the variance.
        dropout: After the embeddings and each feed-forward.
        attention_dropout: Of the attention weights.
        output_dropout: Of what attention returns.
        pooler_activation: The activation after a dense layer on the first token; there is none when None.
        pooler_dropout: Before that layer.
        num_labels: How many the head chooses between; there is no head when None.
        is_token_classifier: Whether each token is labelled, rather than the text by what the pooler returns.
        classifier_dropout: Before the head.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    pad_token_id: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    output_dropout: float = 0.1
    pooler_activation: str | None = None
    pooler_dropout: float = 0.0
    num_labels: int | None = None
    is_token_classifier: bool = False
    classifier_dropout: float = 0.0

    @property
    def max_seq_length(self) -> int:
        """How many tokens a text may have."""
        return self.max_position_embeddings - (
            0 if self.pad_token_id is None else self.pad_token_id + 1
        )


class Embeddings(nn.Module):
    """Token ids to the first hidden states: word + position + type, normalised."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        c = self.config
        hidden = self._make_embed(c.vocab_size, "word", "vocab")(
            mark_invalid_ids(input_ids, c.vocab_size)
        )
        hidden += self._make_embed(c.max_position_embeddings, "position", "positions")(
            self._position_ids(input_ids)
        )
        if c.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            hidden += self._make_embed(c.type_vocab_size, "type", "types")(types)
            if c.type_vocab_size == 1:  # Flax looks nothing up in a table of one row.
                hidden = jnp.where(types[..., None] == 0, hidden, jnp.nan)
        hidden = layer_norm(c.norm_eps, self.dtype, "norm")(hidden)
        return nn.Dropout(c.dropout)(hidden, deterministic)

    def _make_embed(self, num_embeddings: int, name: str, logical_axis: str) -> nn.Embed:
        init = partitioned_init(logical_axis, "embed", init=nn.initializers.normal(0.02))
        width = self.config.hidden_size
        return nn.Embed(num_embeddings, width, dtype=self.dtype, embedding_init=init, name=name)

    def _position_ids(self, input_ids: jax.Array) -> jax.Array:
        """The rows of the table that the tokens take: (length,), or (batch, length)."""
        pad = self.config.pad_token_id
        if pad is None:
            return jnp.arange(input_ids.shape[1])
        real = (input_ids != pad).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + pad


class Attention(nn.Module):
    """Multi-head self-attention with its residual sum and norm."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        out = self_attention(
            hidden,
            mask,
            num_heads=c.num_heads,
            use_bias=True,
            dropout=c.attention_dropout,
            deterministic=deterministic,
            dtype=self.dtype,
        )
        out = nn.Dropout(c.output_dropout)(out, deterministic)
        return layer_norm(c.norm_eps, self.dtype, "norm")(hidden + out)


class Mlp(nn.Module):
    """The feed-forward with its residual sum and norm."""

    config: EncoderConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, hidden: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        out = feed_forward(
            hidden, intermediate_size=c.intermediate_size, activation=c.activation, dtype=self.dtype
        )
        out = nn.Dropout(c.dropout)(out, deterministic)
        return layer_norm(c.norm_eps, self.dtype, "norm")(hidden + out)


class Block(nn.Module):
    """One layer."""

    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = Attention(self.config, self.dtype)
        self.mlp = Mlp(self.config, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        hidden = self.mlp(self.attention(hidden, mask, deterministic), deterministic)
        return spmd.with_logical_constraint(hidden, ("batch", "length", "embed"))


class Encoder(nn.Module):
    """The encoder; `model.apply(params, input_ids, attention_mask)` gives what its head does.

    Attributes:
        config: Its shape.
        dtype: Of the computation; that of the weights when None.
    """

    config: EncoderConfig
    dtype: Any = None

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c, self.dtype)
        self.layer = [Block(c, self.dtype) for _ in range(c.num_layers)]
        if c.pooler_activation is not None:
            init = partitioned_init("embed", "pooled")
            self.pooler = nn.Dense(c.hidden_size, dtype=self.dtype, kernel_init=init)
        if c.num_labels is not None:
            init = partitioned_init("embed", "labels")
            self.classifier = nn.Dense(c.num_labels, dtype=self.dtype, kernel_init=init)
        self.pooler_dropout = nn.Dropout(c.pooler_dropout)
        self.classifier_dropout = nn.Dropout(c.classifier_dropout)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states (batch, length, width); with a head, logits (batch, labels).

        A head that labels each token gives (batch, length, labels).

        Args:
            input_ids: (batch, length) token numbers; one that is no token makes its text NaN.
            attention_mask: (batch, length), 1 or True for tokens, 0 or False for padding. Padding
                is not seen by the other positions, but gets a hidden state of its own.
            token_type_ids: (batch, length) segment numbers; all 0 when left out. One that the model
                has not makes its text NaN.
            deterministic: False turns dropout on and needs `rngs={"dropout": key}`.
        """
        c = self.config
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids, deterministic)
        if c.num_labels is None:
            if c.pooler_activation is not None and self.is_initializing():
                self._apply_pooler(
                    hidden, deterministic
                )  # It has weights, though they do nothing here.
            return hidden
        features = hidden if c.is_token_classifier else self._apply_pooler(hidden, deterministic)
        return self.classifier(self.classifier_dropout(features, deterministic))

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states (batch, length, width), whatever the head; arguments as in a call."""
        self._check_inputs(input_ids, attention_mask, token_type_ids)
        mask = attention_mask.astype(bool)[:, None, None, :]  # (batch, heads, query, key)
        hidden = self.embeddings(input_ids, token_type_ids, deterministic)
        for layer in self.layer:
            hidden = layer(hidden, mask, deterministic)
        return hidden

    def pooler_output(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """What the pooler makes of the first token, (batch, width); arguments as in a call.

        Raises:
            ValueError: There is no pooler.
        """
        if self.config.pooler_activation is None:
            raise ValueError(
                "This encoder has no pooler: its checkpoint came without one. Use `mean_pool` on "
                "the hidden states, or a checkpoint that has one."
            )
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids, deterministic)
        return self._apply_pooler(hidden, deterministic)

    def _apply_pooler(self, hidden: jax.Array, deterministic: bool) -> jax.Array:
        assert self.config.pooler_activation is not None
        first = self.pooler_dropout(hidden[:, 0], deterministic)
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(first))

    def _check_inputs(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> None:
        """Refuses inputs that are not of one shape, or that the tables have no rows for."""
        c, shape = self.config, input_ids.shape
        if len(shape) != 2:
            raise ValueError(
                f"input_ids has shape {shape} instead of (batch, length). Give one text as "
                f"input_ids[None]."
            )
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {attention_mask.shape}, input_ids {shape}. Give one "
                f"mask entry per token."
            )
        if token_type_ids is not None and not c.type_vocab_size:
            raise ValueError(
                "token_type_ids is given, and this encoder has no token types. Leave it out."
            )
        if token_type_ids is not None and token_type_ids.shape != shape:
            raise ValueError(
                f"token_type_ids has shape {token_type_ids.shape}, input_ids {shape}. Give one "
                f"type per token."
            )
        # JAX would clamp a position past the table and go on with the last one.
        if shape[1] > c.max_seq_length:
            raise ValueError(
                f"input_ids of length {shape[1]} run past the {c.max_seq_length} tokens that this "
                f"encoder has positions for. Truncate the texts when tokenising."
            )


def mean_pool(hidden_states: jax.Array, attention_mask: jax.typing.ArrayLike) -> jax.Array:
    """The mean hidden state of each text's tokens, (batch, width); zeros where all is padding.

    Args:
        hidden_states: (batch, length, width).
        attention_mask: (batch, length), 1 or True for tokens, 0 or False for padding.
    """
    weight = jnp.asarray(attention_mask, jnp.float32)  # A narrower type does not count past 256.
    total = jnp.einsum("blw,bl->bw", hidden_states, weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
