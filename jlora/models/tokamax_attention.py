"""Attention on NVIDIA GPUs without an array of all pairs of tokens, by kernels of tokamax.

tokamax is OpenXLA's library of kernels. All that jlora uses of it is in this module, because the
masks and the kernels of attention are not in its public interface.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

TokamaxKernel = Literal["mosaic", "triton"]

_BLOCK_SIZE = 128  # A multiple of the sizes of the kernels' blocks.


def is_installed() -> bool:
    """Whether tokamax can be imported."""
    return importlib.util.find_spec("tokamax") is not None


def list_kernels(compute_capability: float) -> list[TokamaxKernel]:
    """Returns the kernels that tokamax has for GPUs of a compute capability, the fastest first.

    Mosaic GPU has gradients for Hopper (9.0) and datacenter Blackwell (10.0), Triton for Ampere
    (8.0) and later.
    """
    if 9 <= compute_capability < 11:
        return ["mosaic", "triton"]
    return ["triton"] if compute_capability >= 8 else []


def key_bounds(segment_ids: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Returns the first key that each query may attend to, and the one after the last.

    Those are the keys of the query's run, which is a sequence of adjacent tokens of one segment,
    within the window.

    Args:
        segment_ids: (batch, length), the text of each token.
        window: Number of keys before a query, or behind it, that it attends to, itself included.
            None: all of them.

    Returns:
        Two arrays of int32, (batch, length).

    Example:
        >>> import jax.numpy as jnp
        >>> starts, ends = key_bounds(jnp.array([[1, 1, 2, 2, 2, 0]]), None)
        >>> starts.tolist(), ends.tolist()
        ([[0, 0, 2, 2, 2, 5]], [[2, 2, 5, 5, 5, 6]])
    """
    length = segment_ids.shape[1]
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    is_first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    is_last = jnp.diff(segment_ids, axis=1, append=segment_ids[:, -1:] - 1) != 0
    starts = lax.cummax(jnp.where(is_first, slots, 0), axis=1)
    ends = lax.cummin(jnp.where(is_last, slots + 1, length), axis=1, reverse=True)
    if window is None:
        return starts, ends
    return jnp.maximum(starts, slots - window + 1), jnp.minimum(ends, slots + window)


def tokamax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    kernel: TokamaxKernel,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """Computes attention outputs (batch, length, heads, dim) on one device.

    Args:
        query: (batch, length, heads, dim), in bfloat16 or float16.
        key: (batch, length, kv_heads, dim).
        value: (batch, length, kv_heads, dim).
        segment_ids: (batch, length); the tokens of a segment are adjacent. None: all tokens are of
            one segment.
        kernel: Kernel of tokamax, one of those of `list_kernels`.
        scale: Factor on the scores.
        causal: Hides later keys.
        window: Number of keys that a query attends to, itself included. None: all of them.
        softcap: Bound on the scores, applied by a tanh. None: no bound.

    Raises:
        NotImplementedError: The kernel does not support the inputs or the device.
    """
    length = query.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones((1, length), jnp.int32)
    # Past the end of a row, the kernels read what memory holds, which may be NaN. -1 is no text.
    missing = -length % _BLOCK_SIZE
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=-1)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (query, key, value)
    )
    starts, ends = key_bounds(segment_ids, window)
    options = {"kernel": kernel, "scale": scale, "causal": causal, "softcap": softcap}
    return _call_op(query, key, value, starts, ends, **options)[:, :length]


# All layers of a model share one program, so that the kernels are lowered once and not for each.
@functools.partial(jax.jit, static_argnames=("kernel", "scale", "causal", "softcap"))
def _call_op(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    *,
    kernel: TokamaxKernel,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> jax.Array:
    mask_of = _import_attention("base").Mask
    # Blocks of keys outside the bounds are skipped. (batch or 1, 1 for all heads, length)
    bounds = {"k_start": starts[:, None]} | ({} if causal else {"k_end": ends[:, None]})
    return _make_op(kernel)(
        query,
        key,
        value,
        mask=mask_of(is_causal=causal, **bounds),
        logits_scale=scale,
        logits_soft_cap=softcap,
    )


@functools.cache
def _make_op(kernel: TokamaxKernel) -> Any:
    # The heuristics for shapes that tokamax has not tuned are within 2 % of the best on Hopper, and
    # a warning of each is no use to those who train.
    logging.getLogger("absl").addFilter(
        lambda record: not str(record.msg).startswith("Autotuning cache miss")
    )
    if kernel == "mosaic":
        return _import_attention("pallas_mosaic_gpu").PallasMosaicGpuFlashAttention()
    return _import_attention("pallas_triton").PallasTritonFlashAttention()


def _import_attention(name: str) -> Any:
    # At the first use: tokamax imports its benchmarking tools at once, which takes seconds.
    return importlib.import_module(f"tokamax._src.ops.attention.{name}")
