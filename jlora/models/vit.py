"""A vision transformer in Flax Linen for the checkpoints of ViT.

`jlora.models.hf.encoder_configs` reads its config from a checkpoint's config.json. Dense kernels
are laid out (in, out), that of the patch embedding (height, width, in, out).

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
    """Configuration of a `ViT`.

    `jlora.models.hf.encoder_configs` reads one from a checkpoint's config.json.

    Attributes:
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels. Rows and columns of pixels that fill no
            patch are ignored.
        num_channels: Number of channels of the images.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        intermediate_size: Width inside the feed-forward.
        num_layers: Number of layers.
        num_heads: Number of attention heads.
        qkv_bias: The query, key and value projections have biases.
        activation: Activation of the feed-forward, a key of `jlora.models.layers.ACTIVATIONS`.
        norm_eps: Epsilon that layer norms add to the variance.
        dropout: Dropout rate after the embeddings, each attention and each feed-forward.
        attention_dropout: Dropout rate of the attention weights.
        pooler_activation: Activation after a dense layer on the class token. None: no pooler.
        pooler_output_size: Width of the pooler.
        num_labels: Number of classes of the head. None: no head.

    Example:
        >>> from jlora import models
        >>> config = models.ViTConfig(
        ...     image_size=(8, 12),
        ...     patch_size=(4, 4),
        ...     num_channels=3,
        ...     hidden_size=8,
        ...     intermediate_size=16,
        ...     num_layers=1,
        ...     num_heads=2,
        ... )
        >>> config.num_tokens
        7
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
        """Number of patches of an image, plus one for the class token."""
        (height, width), (patch_height, patch_width) = self.image_size, self.patch_size
        return (height // patch_height) * (width // patch_width) + 1


class Embeddings(nn.Module):
    """Embeddings of images: the class token and the patches, plus their positions."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        init = functools.partial(partitioned_init, init=nn.initializers.normal(0.02))
        token: Any = self.param("class", init(None, None, "embed"), (1, 1, c.hidden_size))
        shape = (1, c.num_tokens, c.hidden_size)
        positions: Any = self.param("position", init(None, "positions", "embed"), shape)
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
    """Feed-forward."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        return feed_forward(
            hidden, intermediate_size=c.intermediate_size, activation=c.activation, dtype=self.dtype
        )


class Block(nn.Module):
    """A pre-norm layer: attention and feed-forward, each with its residual connection."""

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
    """A vision transformer; `model.apply(params, images)` returns its outputs.

    The outputs are logits with a head, and hidden states without one.

    Attributes:
        config: Sizes and architecture.
        dtype: dtype of the computation. None: that of the weights.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> config = models.ViTConfig(
        ...     image_size=(8, 12),
        ...     patch_size=(4, 4),
        ...     num_channels=3,
        ...     hidden_size=8,
        ...     intermediate_size=16,
        ...     num_layers=1,
        ...     num_heads=2,
        ... )
        >>> model = models.ViT(config)
        >>> images = jnp.zeros((1, 8, 12, 3))
        >>> params = jax.jit(model.init)(jax.random.key(0), images)
        >>> model.apply(params, images).shape
        (1, 7, 8)
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
        """Returns normalized hidden states (batch, tokens, width); with a head, logits.

        The first hidden state is that of the class token; the patches follow row by row. Logits
        are (batch, labels).

        Args:
            images: (batch, height, width, channels), scaled according to the checkpoint's
                preprocessor_config.json.
            deterministic: False turns dropout on and needs `rngs={"dropout": key}`.

        Raises:
            ValueError: The images have another size.
            TypeError: The images are not floating point, so they are not scaled.
        """
        c = self.config
        hidden = self.hidden_states(images, deterministic)
        if c.num_labels is None:
            if c.pooler_activation is not None and self.is_initializing():
                self._apply_pooler(hidden)  # Initializes its weights, which are not used here.
            return hidden
        return self.classifier(hidden[:, 0])

    def hidden_states(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns normalized hidden states (batch, 1 + patches, width), also with a head."""
        self._check_images(images)
        hidden = self.embeddings(images, deterministic)
        for layer in self.layer:
            hidden = layer(hidden, deterministic)
        return self.norm(hidden)

    def pooler_output(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns the pooler's output of the class token, (batch, pooler_output_size).

        Raises:
            ValueError: The model has no pooler.
        """
        if self.config.pooler_activation is None:
            raise ValueError(
                "This model has no pooler, because its checkpoint has none. Use the first hidden "
                "state, that of the class token, or a checkpoint with a pooler."
            )
        return self._apply_pooler(self.hidden_states(images, deterministic))

    def _apply_pooler(self, hidden: jax.Array) -> jax.Array:
        assert self.config.pooler_activation is not None
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(hidden[:, 0]))

    def _check_images(self, images: Any) -> None:
        """Raises an error for images of another size, and for images that are not scaled."""
        c = self.config
        size = (*c.image_size, c.num_channels)
        if images.ndim != 4 or images.shape[1:] != size:
            raise ValueError(
                f"images must have shape (batch, {', '.join(map(str, size))}), which is (batch, "
                f"height, width, channels), got {images.shape}. Resize them, and put the channels "
                f"last."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"images must be floating point, got dtype {images.dtype}, which is not scaled. "
                f"Scale them according to the checkpoint's preprocessor_config.json."
            )
