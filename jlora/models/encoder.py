"""A text encoder in Flax Linen for the checkpoints of BERT, RoBERTa and DistilBERT.

`EncoderConfig` holds the differences between architectures, and the head if there is one;
`jlora.models.hf.encoder_configs` reads one from a checkpoint's config.json. Dense kernels are laid
out (in, out).

References:
    Devlin et al., BERT, arXiv:1810.04805, section 3. The order of operations is that of the models
    in transformers, except that position embeddings are added before token type embeddings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd

from jlora.models.attention import make_case
from jlora.models.attention_kernels import AttentionCase, TextLayout
from jlora.models.layers import (
    ACTIVATIONS,
    feed_forward,
    has_layout,
    layer_norm,
    mark_invalid_ids,
    partitioned_init,
    self_attention,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Configuration of an `Encoder`.

    `jlora.models.hf.encoder_configs` reads one from a checkpoint's config.json.

    Attributes:
        model_type: `model_type` of transformers, which decides the tensor names of checkpoints.
        vocab_size: Number of tokens in the vocabulary.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        intermediate_size: Width inside the feed-forward.
        num_layers: Number of layers.
        num_heads: Number of attention heads.
        max_position_embeddings: Number of rows in the table of positions.
        type_vocab_size: Number of token types; 0 for none.
        pad_token_id: Token that takes no position (RoBERTa); positions of the other tokens start
            at `pad_token_id + 1`. None: every token takes a position, from 0.
        activation: Activation of the feed-forward, a key of `jlora.models.layers.ACTIVATIONS`.
        norm_eps: Epsilon that layer norms add to the variance.
        dropout: Dropout rate after the embeddings and each feed-forward.
        attention_dropout: Dropout rate of the attention weights.
        output_dropout: Dropout rate of the attention outputs.
        pooler_activation: Activation after a dense layer on the first token. None: no pooler.
        pooler_dropout: Dropout rate before the pooler.
        num_labels: Number of classes of the head. None: no head.
        is_token_classifier: The head classifies each token. False: it classifies the text, from
            the output of the pooler.
        classifier_dropout: Dropout rate before the head.

    Example:
        >>> from jlora import models
        >>> config = models.EncoderConfig(
        ...     model_type="bert",
        ...     vocab_size=32,
        ...     hidden_size=8,
        ...     intermediate_size=16,
        ...     num_layers=1,
        ...     num_heads=2,
        ...     max_position_embeddings=16,
        ... )
        >>> config.max_seq_length
        16
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
        """Maximum number of tokens in a text."""
        first_position = 0 if self.pad_token_id is None else self.pad_token_id + 1
        return self.max_position_embeddings - first_position


class Embeddings(nn.Module):
    """Embeddings of token ids: word + position + token type, normalized."""

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
            if c.type_vocab_size == 1:  # Flax does no look-up in a table of one row.
                hidden = jnp.where(types[..., None] == 0, hidden, jnp.nan)
        hidden = layer_norm(c.norm_eps, self.dtype, "norm")(hidden)
        return nn.Dropout(c.dropout)(hidden, deterministic)

    def _make_embed(self, num_embeddings: int, name: str, logical_axis: str) -> nn.Embed:
        init = partitioned_init(logical_axis, "embed", init=nn.initializers.normal(0.02))
        width = self.config.hidden_size
        return nn.Embed(num_embeddings, width, dtype=self.dtype, embedding_init=init, name=name)

    def _position_ids(self, input_ids: jax.Array) -> jax.Array:
        """Returns the positions of the tokens: (length,), or (batch, length)."""
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None:
            return jnp.arange(input_ids.shape[1])
        is_token = (input_ids != pad_token_id).astype(jnp.int32)
        return jnp.cumsum(is_token, axis=1) * is_token + pad_token_id


class Attention(nn.Module):
    """Multi-head self-attention with its residual connection and norm."""

    config: EncoderConfig
    dtype: Any
    text_layout: TextLayout

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
            text_layout=self.text_layout,
        )
        out = nn.Dropout(c.output_dropout)(out, deterministic)
        return layer_norm(c.norm_eps, self.dtype, "norm")(hidden + out)


class Mlp(nn.Module):
    """Feed-forward with its residual connection and norm."""

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
    """A post-norm layer: attention, then feed-forward."""

    config: EncoderConfig
    dtype: Any
    text_layout: TextLayout

    def setup(self) -> None:
        self.attention = Attention(self.config, self.dtype, self.text_layout)
        self.mlp = Mlp(self.config, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        hidden = self.mlp(self.attention(hidden, mask, deterministic), deterministic)
        return spmd.with_logical_constraint(hidden, ("batch", "length", "embed"))


class Encoder(nn.Module):
    """A text encoder; `model.apply(params, input_ids, attention_mask)` returns its outputs.

    The outputs are logits with a head, and hidden states without one.

    Attributes:
        config: Sizes and architecture.
        dtype: dtype of the computation. None: that of the weights.
        text_layout: "padded" promises that padding is behind the tokens of a row, which a GPU's
            kernels need; the outputs of another row are NaN. "any": padding may be anywhere.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> config = models.EncoderConfig(
        ...     model_type="bert",
        ...     vocab_size=32,
        ...     hidden_size=8,
        ...     intermediate_size=16,
        ...     num_layers=1,
        ...     num_heads=2,
        ...     max_position_embeddings=16,
        ... )
        >>> model = models.Encoder(config)
        >>> input_ids, mask = jnp.array([[3, 5, 2, 0]]), jnp.array([[1, 1, 1, 0]])
        >>> params = jax.jit(model.init)(jax.random.key(0), input_ids, mask)
        >>> model.apply(params, input_ids, mask).shape
        (1, 4, 8)
    """

    config: EncoderConfig
    dtype: Any = None
    text_layout: TextLayout = "any"

    def attention_cases(self, length: int, dtype: Any) -> list[AttentionCase]:
        """Returns the case of attention of the layers, in a list.

        Args:
            length: Number of tokens of a row.
            dtype: dtype of the queries.
        """
        c = self.config
        head_dim = c.hidden_size // c.num_heads
        query = jax.ShapeDtypeStruct((1, length, c.num_heads, head_dim), dtype)
        layout = self.text_layout
        return [
            make_case(query, query, text_layout=layout, causal=False, window=None, softcap=None)
        ]

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c, self.dtype)
        self.layer = [Block(c, self.dtype, self.text_layout) for _ in range(c.num_layers)]
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
        """Returns hidden states (batch, length, width); with a head, logits (batch, labels).

        The logits of a token classifier are (batch, length, labels).

        Args:
            input_ids: (batch, length) token ids. An id outside the vocabulary makes its text NaN.
            attention_mask: (batch, length), 1 or True for tokens, 0 or False for padding. Tokens do
                not attend to padding; padding has hidden states too.
            token_type_ids: (batch, length) segment ids. An id outside the table makes its text NaN.
                None: all 0.
            deterministic: False turns dropout on and needs `rngs={"dropout": key}`.

        Raises:
            ValueError: The shapes do not fit together or the texts are too long.
        """
        c = self.config
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids, deterministic)
        if c.num_labels is None:
            if c.pooler_activation is not None and self.is_initializing():
                # Initializes the pooler's weights, which are not used here.
                self._apply_pooler(hidden, deterministic)
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
        """Returns hidden states (batch, length, width), also with a head; arguments as above."""
        self._check_inputs(input_ids, attention_mask, token_type_ids)
        is_token = attention_mask.astype(bool)
        # Padding may be any id.
        input_ids = jnp.where(is_token, input_ids, self.config.pad_token_id or 0)
        if token_type_ids is not None:
            token_type_ids = jnp.where(is_token, token_type_ids, 0)
        is_right = has_layout(is_token.astype(jnp.int32), self.text_layout)
        input_ids = jnp.where(is_right[:, None], input_ids, -1)  # An invalid id makes NaN.
        hidden = self.embeddings(input_ids, token_type_ids, deterministic)
        for layer in self.layer:
            hidden = layer(hidden, is_token, deterministic)
        return hidden

    def pooler_output(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns the pooler's output of the first token (batch, width); arguments as in a call.

        Raises:
            ValueError: The model has no pooler.
        """
        if self.config.pooler_activation is None:
            raise ValueError(
                "This encoder has no pooler, because its checkpoint has none. Use `mean_pool` on "
                "the hidden states, or a checkpoint with a pooler."
            )
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids, deterministic)
        return self._apply_pooler(hidden, deterministic)

    def _apply_pooler(self, hidden: jax.Array, deterministic: bool) -> jax.Array:
        assert self.config.pooler_activation is not None
        first = self.pooler_dropout(hidden[:, 0], deterministic)
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(first))

    def _check_inputs(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> None:
        """Raises an error unless the inputs have one shape and fit the tables of embeddings."""
        c, shape = self.config, input_ids.shape
        if len(shape) != 2:
            raise ValueError(
                f"input_ids must have shape (batch, length), got {shape}. Pass a single text as "
                f"input_ids[None]."
            )
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {attention_mask.shape}, input_ids {shape}. Pass one "
                f"mask entry per token."
            )
        if token_type_ids is not None and not c.type_vocab_size:
            raise ValueError(
                "token_type_ids must be None: this encoder has no token types. Leave it out."
            )
        if token_type_ids is not None and token_type_ids.shape != shape:
            raise ValueError(
                f"token_type_ids has shape {token_type_ids.shape}, input_ids {shape}. Pass one "
                f"type per token."
            )
        # JAX would clamp a position past the table to the last one.
        if shape[1] > c.max_seq_length:
            raise ValueError(
                f"input_ids must have at most {c.max_seq_length} tokens per text, the positions of "
                f"this encoder, got length {shape[1]}. Truncate the texts when tokenizing."
            )


def mean_pool(hidden_states: jax.Array, attention_mask: jax.typing.ArrayLike) -> jax.Array:
    """Returns the mean hidden state of each text's tokens (batch, width), in float32.

    A text of padding alone has a mean of zeros.

    Args:
        hidden_states: (batch, length, width).
        attention_mask: (batch, length), 1 or True for tokens, 0 or False for padding.

    References:
        Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084, section 3 (mean pooling).

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> hidden = jnp.array([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> models.mean_pool(hidden, jnp.array([[1, 1, 0]])).tolist()
        [[2.0, 3.0]]
    """
    weights = jnp.asarray(attention_mask, jnp.float32)  # bfloat16 cannot count past 256.
    total = jnp.einsum("blw,bl->bw", hidden_states, weights)  # (batch, width)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
