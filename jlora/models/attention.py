"""Causal attention over packed or padded texts, with the kernel of the device where it has one."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.core.spmd import get_logical_axis_rules
from flax.linen import spmd
from jax.sharding import PartitionSpec

AttentionImplementation = Literal["xla", "cudnn", "splash"]

_SPLASH_BLOCK_SIZE = 128  # Lengths that the splash kernel takes are multiples of it.


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    query_slots: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """What every query gathers, (batch, queries, heads, dim).

    A query sees the keys of its own segment that stand no later than itself and, with a window,
    fewer than `window` slots before it. What a query of segment 0 (padding) gathers is finite and
    means nothing.

    Args:
        query: (batch, queries, heads, dim).
        key: (batch, keys, kv_heads, dim); every group of `heads / kv_heads` queries shares one.
        value: As `key`.
        scale: What scores are multiplied with.
        query_slots: (batch or 1, queries), where among the keys each query stands; its own number
            when left out, which needs as many keys as queries.
        query_segment_ids: (batch, queries), which text each token belongs to; 0 for padding. All are
            one text when left out.
        key_segment_ids: (batch, keys), those of the keys when they are not the queries' own.
        causal: Whether later keys are hidden.
        window: How many keys back a query sees, itself included.
        softcap: Scores are squashed into plus and minus this by a tanh.
        implementation: "xla" forms the scores of all pairs; "cudnn" does not, on NVIDIA GPUs, in
            half precision and without softcap, unless there are segments; "splash" does not, on
            TPUs. The fastest that applies when left out, on the devices of `jax.set_mesh`, which
            may be of another kind than those here, or on JAX's own.

    Raises:
        ValueError: The implementation does not do what is asked.
    """
    own = query_slots is None
    if own and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} queries and {key.shape[1]} keys need query_slots: which key each "
            f"query stands at."
        )
    if key_segment_ids is not None and query_segment_ids is None:
        raise ValueError(
            "key_segment_ids without query_segment_ids say nothing. Give both, or neither."
        )
    if implementation is None:
        implementation = _select_attention_kernel(
            query, is_full_sequence=own, has_segments=query_segment_ids is not None, softcap=softcap
        )
    if implementation == "splash":
        if not own or not causal:
            raise ValueError(
                "implementation='splash' is causal attention of a whole text to itself. Use 'xla' "
                "with a cache or without causality."
            )
        return _splash_attention(query, key, value, query_segment_ids, scale, window, softcap)
    if implementation == "cudnn" and softcap is not None:
        raise ValueError(
            f"implementation='cudnn' has no softcap={softcap}. Use 'xla', or leave it to jlora."
        )
    plain = own and query_segment_ids is None
    if softcap is None and plain:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
            implementation=implementation,
        )
    slots = jnp.arange(query.shape[1])[None] if query_slots is None else query_slots
    seen = _make_causal_mask(slots, key.shape[1], causal, window)
    if query_segment_ids is not None:
        keys = query_segment_ids if key_segment_ids is None else key_segment_ids
        seen &= (query_segment_ids[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
    if softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, mask=seen[:, None], implementation=implementation
        )
    return _softcapped_attention(query, key, value, seen, scale, softcap)


def _make_causal_mask(
    query_slots: jax.Array, num_keys: int, causal: bool, window: int | None
) -> jax.Array:
    """Which keys a query may see from its slot, (batch or 1, queries, keys)."""
    distance = query_slots[:, :, None] - jnp.arange(num_keys)
    seen = distance >= 0 if causal else jnp.ones_like(distance, bool)
    return seen if window is None else seen & (abs(distance) < window)


def _select_attention_kernel(
    query: jax.Array, *, is_full_sequence: bool, has_segments: bool, softcap: float | None
) -> AttentionImplementation:
    """The fastest implementation for the devices that JAX computes on, or compiles for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    _, length, _, dim = query.shape
    if platform == "tpu" and is_full_sequence and length % _SPLASH_BLOCK_SIZE == 0:
        return "splash"
    halved = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = is_full_sequence and not has_segments and dim % 8 == 0 and dim <= 128
    if platform == "gpu" and halved and fits and softcap is None:
        return "cudnn"
    return "xla"


def _softcapped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Attention whose scores go through a tanh, which `jax.nn` has not."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * scale / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)


def _splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, on every device's own texts and heads.

    The compiler cannot split a kernel. Where the models' names of axes are bound to a mesh, each
    device runs it on its part; heads are whole where they cannot be shared out.
    """
    if query.shape[1] % _SPLASH_BLOCK_SIZE:
        raise ValueError(
            f"implementation='splash' takes lengths that are multiples of {_SPLASH_BLOCK_SIZE}, not "
            f"{query.shape[1]}. Pad the texts, or use 'xla'."
        )
    kernel = functools.partial(
        _run_splash_kernel, scale=scale, window=window, softcap=softcap, interpret=interpret
    )
    mesh = jax.sharding.get_abstract_mesh()
    bound = spmd.logical_to_mesh_axes(("batch", "length", "heads", "head_dim"))
    if mesh.empty or bound is None or not get_logical_axis_rules():
        return kernel(query, key, value, segment_ids)
    texts = _mesh_axes_if_divisible(mesh, bound[0], query.shape[0])
    heads = _mesh_axes_if_divisible(mesh, bound[2], query.shape[2], key.shape[2])
    split = PartitionSpec(texts, None, heads, None)
    return jax.shard_map(
        kernel,
        in_specs=(split, split, split, None if segment_ids is None else PartitionSpec(texts)),
        out_specs=split,
        check_vma=False,  # What a kernel returns does not say over which axes it varies.
    )(query, key, value, segment_ids)


def _mesh_axes_if_divisible(mesh: Any, axis_names: Any, *dim_sizes: int) -> Any:
    """The mesh's axes, if they divide axes of these lengths; else None."""
    listed = (
        () if axis_names is None else (axis_names,) if isinstance(axis_names, str) else axis_names
    )
    parts = math.prod(mesh.shape[name] for name in listed)
    return None if any(length % parts for length in dim_sizes) else axis_names


def _run_splash_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """The kernel on one device, which forms no array of all pairs."""
    # Loaded here: Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, length, heads, dim = query.shape
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    attention = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    # The lanes of a TPU are 128 wide; dimensions of zeros change no score.
    padded = math.ceil(dim / 128) * 128
    widen = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, 0), (0, padded - dim)))
    query, key, value = (jnp.swapaxes(widen(x), 1, 2) for x in (query * scale, key, value))
    result: Any
    if segment_ids is None:
        result = jax.vmap(attention)(query, key, value)
    else:
        ids = kernel.SegmentIds(segment_ids, segment_ids)
        result = jax.vmap(attention)(query, key, value, segment_ids=ids)
    return jnp.swapaxes(result, 1, 2)[..., :dim].astype(value.dtype)
