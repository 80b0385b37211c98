"""Attention on TPUs without an array of all pairs of tokens, by JAX's splash kernel."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

SPLASH_BLOCK_SIZE = 128  # The kernel takes lengths that are multiples of it.


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention outputs (batch, length, heads, dim) on one device.

    Args:
        query: (batch, length, heads, dim); the length is a multiple of `SPLASH_BLOCK_SIZE`.
        key: (batch, length, kv_heads, dim).
        value: (batch, length, kv_heads, dim).
        segment_ids: (batch, length), the text of each token. None: all tokens are of one text.
        scale: Factor on the scores.
        window: Number of keys that a query attends to, itself included. None: all of them.
        softcap: Bound on the scores, applied by a tanh. None: no bound.
        interpret: Whether to run the kernel in Python, on any device.

    Raises:
        ValueError: The length is not a multiple of `SPLASH_BLOCK_SIZE`.
    """
    if query.shape[1] % SPLASH_BLOCK_SIZE:
        raise ValueError(
            f"implementation='splash' takes lengths that are multiples of {SPLASH_BLOCK_SIZE}, "
            f"got {query.shape[1]}. Pad the texts, or use 'xla'."
        )
    # Imported here: Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, length, heads, dim = query.shape
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    attention = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    # The lanes of a TPU are 128 wide; dimensions of zeros change no score.
    padded_dim = math.ceil(dim / 128) * 128
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, 0), (0, padded_dim - dim)))
    # (batch, heads, length, padded_dim)
    query, key, value = (jnp.swapaxes(pad(x), 1, 2) for x in (query * scale, key, value))
    result: Any
    if segment_ids is None:
        result = jax.vmap(attention)(query, key, value)
    else:
        ids = splash.SegmentIds(segment_ids, segment_ids)
        result = jax.vmap(attention)(query, key, value, segment_ids=ids)
    return jnp.swapaxes(result, 1, 2)[..., :dim].astype(value.dtype)
