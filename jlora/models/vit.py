"""A vision transformer in Flax Linen for the checkpoints of ViT.

`jlora.models.encoder_architectures` makes its config from a checkpoint's config.json. Dense kernels
are laid out (in, out), that of the patches (height, width, in, out).

References:
    Dosovitskiy et al., ViT, arXiv:2010.11929, section 3.1. The order of operations is that of
    `ViTModel` in transformers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd

from jlora.models.layers import (
    ACTIVATIONS,
    feed_forward,
    layer_norm,
    partitioned_init,
    self_attention,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The shape of one vision transformer.

    Attributes:
        image_size: Height and width of the images.
        patch_size: Height and width of a patch. What is left over of an image is not seen.
        num_channels: Of the images.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        intermediate_size: Width inside the feed-forward.
        num_layers: How many blocks.
        num_heads: Of attention.
        qkv_bias: Whether the query, key and value products have biases.
        activation: Inside the feed-forward, one of `ACTIVATIONS`.
        norm_eps: Added to the variance.
        dropout: After the embeddings, each attention and each feed-forward.
        attention_dropout: Of the attention weights.
        pooler_activation: The activation after a dense layer on the class token; there is none when None.
        pooler_output_size: That layer's width.
        num_labels: How many the head chooses between; there is no head when None.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    qkv_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pooler_activation: str | None = None
    pooler_output_size: int = 0
    num_labels: int | None = None

    @property
    def num_tokens(self) -> int:
        """How many patches an image has, and one for the class."""
        (height, width), (down, across) = self.image_size, self.patch_size
        return (height // down) * (width // across) + 1


class Embeddings(nn.Module):
    """Images to the first hidden states: the class token and the patches, with their positions."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        named = functools.partial(partitioned_init, init=nn.initializers.normal(0.02))
        token: Any = self.param("class", named(None, None, "embed"), (1, 1, c.hidden_size))
        shape = (1, c.num_tokens, c.hidden_size)
        positions: Any = self.param("position", named(None, "positions", "embed"), shape)
        dtype = self.dtype or token.dtype
        patches = nn.Conv(
            c.hidden_size,
            c.patch_size,
            strides=c.patch_size,
            padding="VALID",
            dtype=dtype,
            kernel_init=partitioned_init("patch_height", "patch_width", "channels", "embed"),
            name="patch",
        )(images)
        patches = patches.reshape(len(images), -1, c.hidden_size)
        token = jnp.broadcast_to(token.astype(dtype), (len(images), 1, c.hidden_size))
        hidden = jnp.concatenate([token, patches], axis=1) + positions.astype(dtype)
        return nn.Dropout(c.dropout)(hidden, deterministic)


class Attention(nn.Module):
    """Multi-head self-attention."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        return self_attention(
            hidden,
            None,
            num_heads=c.num_heads,
            use_bias=c.qkv_bias,
            dropout=c.attention_dropout,
            deterministic=deterministic,
            dtype=self.dtype,
        )


class Mlp(nn.Module):
    """The feed-forward."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        return feed_forward(
            hidden, intermediate_size=c.intermediate_size, activation=c.activation, dtype=self.dtype
        )


class Block(nn.Module):
    """One layer, whose norms come before what they are for."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        normed = layer_norm(c.norm_eps, self.dtype, "attention_norm")(hidden)
        out = Attention(c, self.dtype, name="attention")(normed, deterministic)
        hidden = hidden + nn.Dropout(c.dropout)(out, deterministic)
        normed = layer_norm(c.norm_eps, self.dtype, "mlp_norm")(hidden)
        out = Mlp(c, self.dtype, name="mlp")(normed)
        hidden = hidden + nn.Dropout(c.dropout)(out, deterministic)
        return spmd.with_logical_constraint(hidden, ("batch", "length", "embed"))


class ViT(nn.Module):
    """The vision transformer; `model.apply(params, images)` gives what its head does.

    Attributes:
        config: Its shape.
        dtype: Of the computation; that of the weights when None.
    """

    config: ViTConfig
    dtype: Any = None

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c, self.dtype)
        self.layer = [Block(c, self.dtype) for _ in range(c.num_layers)]
        self.norm = layer_norm(c.norm_eps, self.dtype)
        if c.pooler_activation is not None:
            init = partitioned_init("embed", "pooled")
            self.pooler = nn.Dense(c.pooler_output_size, dtype=self.dtype, kernel_init=init)
        if c.num_labels is not None:
            init = partitioned_init("embed", "labels")
            self.classifier = nn.Dense(c.num_labels, dtype=self.dtype, kernel_init=init)

    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Normalised hidden states (batch, tokens, width); with a head, logits (batch, labels).

        The first hidden state is the class token's; the patches follow row by row.

        Args:
            images: (batch, height, width, channels), scaled as the checkpoint's
                preprocessor_config.json says.
            deterministic: False turns dropout on and needs `rngs={"dropout": key}`.
        """
        c = self.config
        hidden = self.hidden_states(images, deterministic)
        if c.num_labels is None:
            if c.pooler_activation is not None and self.is_initializing():
                self._apply_pooler(hidden)  # It has weights, though they do nothing here.
            return hidden
        return self.classifier(hidden[:, 0])

    def hidden_states(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Normalised hidden states (batch, 1 + patches, width), whatever the head."""
        self._check_images(images)
        hidden = self.embeddings(images, deterministic)
        for layer in self.layer:
            hidden = layer(hidden, deterministic)
        return self.norm(hidden)

    def pooler_output(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """What the pooler makes of the class token, (batch, pooler_size).

        Raises:
            ValueError: There is no pooler.
        """
        if self.config.pooler_activation is None:
            raise ValueError(
                "This model has no pooler: its checkpoint came without one. Use the first hidden "
                "state, the class token's, or a checkpoint that has one."
            )
        return self._apply_pooler(self.hidden_states(images, deterministic))

    def _apply_pooler(self, hidden: jax.Array) -> jax.Array:
        assert self.config.pooler_activation is not None
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(hidden[:, 0]))

    def _check_images(self, images: Any) -> None:
        """Refuses images of another size, and those that are not scaled."""
        c = self.config
        size = (*c.image_size, c.num_channels)
        if images.ndim != 4 or images.shape[1:] != size:
            raise ValueError(
                f"images have shape {images.shape} instead of (batch, {', '.join(map(str, size))}),"
                f" which is (batch, height, width, channels). Resize them, and put the channels "
                f"last."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"images have dtype {images.dtype}, so they are not scaled yet. Scale them to "
                f"floating point as the checkpoint's preprocessor_config.json says."
            )
