"""Causal attention over packed or padded texts, with the device's fused kernel where it has one."""

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

SPLASH_BLOCK_SIZE = 128  # The splash kernel takes lengths that are multiples of it.


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    query_slots: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """Computes attention outputs (batch, queries, heads, dim), like the queries.

    A query attends to the keys of its own segment that are no later than itself and, with a
    window, fewer than `window` tokens before it. The output of a query in segment 0 (padding) is
    finite and has no meaning.

    Args:
        query: (batch, queries, heads, dim).
        key: (batch, keys, kv_heads, dim); every group of `heads / kv_heads` queries shares one.
        value: (batch, keys, kv_heads, dim).
        scale: Factor on the attention scores.
        query_slots: (batch or 1, queries), the index among the keys of each query. None: query `i`
            is at key `i`, which needs as many keys as queries.
        query_segment_ids: (batch, queries), the text of each token; 0 for padding. None: all
            tokens are one text.
        key_segment_ids: (batch, keys), the text of each key. None: those of the queries.
        query_positions: (batch, queries), the position of each token in its text. A window reaches
            back over positions, so that padding between the tokens of a text does not count. None:
            there is none, and slots are positions.
        key_positions: (batch, keys), the position of each key in its text. None: as for
            `query_positions`.
        causal: Hides later keys.
        window: Number of keys that a query attends to, itself included. None: all of them.
        softcap: Bound on the scores, applied by a tanh. None: no bound.
        implementation: "xla" forms the scores of all pairs. "cudnn" and "splash" do not: "cudnn"
            runs on NVIDIA GPUs, in half precision and without softcap, and "splash" on TPUs. None:
            the fastest that applies (cuDNN only without segments) to the devices of
            `jax.set_mesh`, which may be of another kind than the local ones, or to JAX's default
            devices.

    Raises:
        ValueError: The inputs do not fit together, or the implementation does not support them.
    """
    is_full_sequence = query_slots is None
    if is_full_sequence and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} queries and {key.shape[1]} keys need query_slots: the index among "
            f"the keys of each query."
        )
    if key_segment_ids is not None and query_segment_ids is None:
        raise ValueError(
            "key_segment_ids without query_segment_ids have no effect. Pass both, or neither."
        )
    if implementation is None:
        implementation = _select_attention_kernel(
            query,
            is_full_sequence=is_full_sequence,
            has_segments=query_segment_ids is not None,
            softcap=softcap,
        )
    if implementation == "splash":
        if not is_full_sequence or not causal:
            raise ValueError(
                "implementation='splash' supports only causal self-attention over a full sequence. "
                "Use 'xla' with a cache or with causal=False."
            )
        return _splash_attention(query, key, value, query_segment_ids, scale, window, softcap)
    if implementation == "xla" and query.dtype == jnp.float16 and _get_platform() == "cpu":
        # XLA for CPUs does not sum products of float16 in float32.
        wide = (x.astype(jnp.float32) for x in (query, key, value))
        return attend(
            *wide,
            scale=scale,
            query_slots=query_slots,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            query_positions=query_positions,
            key_positions=key_positions,
            causal=causal,
            window=window,
            softcap=softcap,
            implementation="xla",
        ).astype(query.dtype)
    if implementation == "cudnn" and softcap is not None:
        raise ValueError(
            f"implementation='cudnn' does not support softcap={softcap}. Use 'xla', or None."
        )
    if softcap is None and is_full_sequence and query_segment_ids is None:
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
    mask = _make_causal_mask(slots, key.shape[1], causal)
    if window is not None:
        positions = slots if query_positions is None else query_positions
        keys = jnp.arange(key.shape[1])[None] if key_positions is None else key_positions
        mask &= abs(positions[:, :, None] - keys[:, None, :]) < window
    if query_segment_ids is not None:
        key_ids = query_segment_ids if key_segment_ids is None else key_segment_ids
        same_segment = (
            query_segment_ids[:, :, None] == key_ids[:, None, :]
        )  # (batch, queries, keys)
        mask &= same_segment & (key_ids[:, None, :] != 0)
    if softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, mask=mask[:, None], implementation=implementation
        )
    return _softcapped_attention(query, key, value, mask, scale, softcap)


def _make_causal_mask(query_slots: jax.Array, num_keys: int, causal: bool) -> jax.Array:
    """Returns (batch or 1, queries, keys), True where a query may attend to a key."""
    distance = query_slots[:, :, None] - jnp.arange(num_keys)
    return distance >= 0 if causal else jnp.ones_like(distance, bool)


def _get_platform() -> str:
    """Returns the platform of the devices that JAX computes on, or compiles for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _select_attention_kernel(
    query: jax.Array, *, is_full_sequence: bool, has_segments: bool, softcap: float | None
) -> AttentionImplementation:
    """Returns the fastest implementation for the devices that JAX computes on, or compiles for."""
    platform = _get_platform()
    _, length, _, dim = query.shape
    if platform == "tpu" and is_full_sequence and length % SPLASH_BLOCK_SIZE == 0:
        return "splash"
    is_half = query.dtype in (jnp.bfloat16, jnp.float16)
    is_supported = is_full_sequence and not has_segments and dim % 8 == 0 and dim <= 128
    if platform == "gpu" and is_half and is_supported and softcap is None:
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
    """Attention with a tanh on its scores, which `jax.nn` does not offer."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    # (batch, kv_heads, group, queries, keys)
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
    """Runs JAX's Pallas kernel for TPUs on every device's own texts and heads.

    The compiler cannot partition a kernel. If the models' logical axis names are bound to a mesh,
    each device runs the kernel on its shard; heads are replicated where the mesh does not divide
    them.
    """
    if query.shape[1] % SPLASH_BLOCK_SIZE:
        raise ValueError(
            f"implementation='splash' takes lengths that are multiples of {SPLASH_BLOCK_SIZE}, "
            f"got {query.shape[1]}. Pad the texts, or use 'xla'."
        )
    kernel = functools.partial(
        _run_splash_kernel, scale=scale, window=window, softcap=softcap, interpret=interpret
    )
    mesh = jax.sharding.get_abstract_mesh()
    mesh_axes = spmd.logical_to_mesh_axes(("batch", "length", "heads", "head_dim"))
    if mesh.empty or mesh_axes is None or not get_logical_axis_rules():
        return kernel(query, key, value, segment_ids)
    batch = _mesh_axes_if_divisible(mesh, mesh_axes[0], query.shape[0])
    heads = _mesh_axes_if_divisible(mesh, mesh_axes[2], query.shape[2], key.shape[2])
    spec = PartitionSpec(batch, None, heads, None)
    return jax.shard_map(
        kernel,
        in_specs=(spec, spec, spec, None if segment_ids is None else PartitionSpec(batch)),
        out_specs=spec,
        check_vma=False,  # A kernel does not declare the axes over which its result varies.
    )(query, key, value, segment_ids)


def _mesh_axes_if_divisible(mesh: Any, axis_names: Any, *dim_sizes: int) -> Any:
    """Returns the mesh axes if they divide dimensions of these sizes, else None."""
    names = (
        () if axis_names is None else (axis_names,) if isinstance(axis_names, str) else axis_names
    )
    num_shards = math.prod(mesh.shape[name] for name in names)
    return None if any(size % num_shards for size in dim_sizes) else axis_names


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
    """Runs the kernel on one device; it forms no array of all pairs."""
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
