"""Attention over packed or padded texts, with the device's fused kernel where it has one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.core.spmd import get_logical_axis_rules
from flax.linen import spmd
from jax.sharding import PartitionSpec

from jlora.models.attention_kernels import (
    AttentionCase,
    AttentionKernel,
    TextLayout,
    select_gpu_kernel,
)
from jlora.models.splash_attention import SPLASH_BLOCK_SIZE, splash_attention
from jlora.models.tokamax_attention import tokamax_attention

AttentionImplementation = Literal["xla", "cudnn", "splash", "tokamax"]


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
    text_layout: TextLayout = "any",
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
        text_layout: Order of the texts of a full sequence, which the caller promises: kernels that
            do not form the scores of all pairs need it. "packed": the tokens of a text are
            adjacent. "padded": each row is one text, with padding behind it. "any": no promise.
        implementation: "xla" forms the scores of all pairs. The others do not, and take only full
            sequences: "cudnn" (with segments of the layout "any" or "packed", it reads a mask of
            all pairs) and "tokamax" run on NVIDIA GPUs in half precision, and "splash" runs on
            TPUs. "cudnn" takes no softcap, and "tokamax" no segments of the layout "any". None: the
            fastest that applies to the devices of `jax.set_mesh`, which may be of another kind than
            the local ones, or to JAX's default devices.

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
    if implementation == "cudnn" and softcap is not None:
        raise ValueError(
            f"implementation='cudnn' does not support softcap={softcap}. Use 'xla', or None."
        )
    # A cache has keys of its own, and slots and positions that differ.
    if is_full_sequence and query_positions is None and key_segment_ids is None:
        case = make_case(
            query,
            key,
            text_layout=None if query_segment_ids is None else text_layout,
            causal=causal,
            window=window,
            softcap=softcap,
        )
        kernel = _choose_kernel(case, implementation)
        run = functools.partial(_run_kernel, kernel=kernel, case=case, scale=scale)
        if kernel in ("splash", "mosaic", "triton"):  # The compiler cannot partition them.
            return _run_on_shards(run, query, key, value, query_segment_ids)
        return run(query, key, value, query_segment_ids)
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(
            f"implementation={implementation!r} supports only self-attention over a full sequence. "
            f"Use 'xla' with a cache."
        )
    slots = jnp.arange(query.shape[1])[None] if query_slots is None else query_slots
    mask = _make_mask(
        slots,
        jnp.arange(key.shape[1])[None],
        slots if query_positions is None else query_positions,
        key_positions,
        query_segment_ids,
        key_segment_ids,
        causal=causal,
        window=window,
    )
    attend_masked = functools.partial(
        _masked_attention,
        mask=mask,
        implementation=implementation or "xla",
        scale=scale,
        softcap=softcap,
    )
    return _run_wide_on_cpu(attend_masked, query, key, value)


def _run_wide_on_cpu(
    attend_fn: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """Computes attention in float32 where a CPU has arrays of float16.

    XLA for CPUs does not sum products of float16 in float32.
    """
    if query.dtype != jnp.float16 or _get_platform() != "cpu":
        return attend_fn(query, key, value)
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    return attend_fn(wide[0], wide[1], wide[2]).astype(query.dtype)


def make_case(
    query: Any,
    key: Any,
    *,
    text_layout: TextLayout | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> AttentionCase:
    """Returns the case of a self-attention over whole rows.

    Args:
        query: Array or shape (batch, length, heads, dim).
        key: Array or shape (batch, length, kv_heads, dim).
        text_layout: As for `attend`; None without segments.
        causal: As for `attend`.
        window: As for `attend`.
        softcap: As for `attend`.
    """
    return AttentionCase(
        dtype=jnp.dtype(query.dtype).name,
        length=query.shape[1],
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        text_layout=text_layout,
        causal=causal,
        window=window,
        softcap=softcap,
    )


def choose_kernel(case: AttentionCase) -> AttentionKernel:
    """Returns the kernel that `attend` chooses for the devices that JAX compiles for.

    Args:
        case: Case of the attention.
    """
    platform = _get_platform()
    if not isinstance(case.length, int):  # Exported for any length.
        return "xla"
    if platform == "tpu":
        fits = case.causal and case.length % SPLASH_BLOCK_SIZE == 0
        return "splash" if fits else "xla"
    return select_gpu_kernel(case, _run_kernel) if platform == "gpu" else "xla"


def _get_platform() -> str:
    """Returns the platform of the devices that JAX computes on, or compiles for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _choose_kernel(
    case: AttentionCase, implementation: AttentionImplementation | None
) -> AttentionKernel:
    """Returns the kernel of an implementation, checked to support a case."""
    if implementation is None:
        return choose_kernel(case)
    if implementation == "splash" and not case.causal:
        raise ValueError(
            "implementation='splash' supports only causal self-attention over a full sequence. "
            "Use 'xla' with causal=False."
        )
    if implementation != "tokamax":
        return implementation
    if case.text_layout == "any":
        raise ValueError(
            "implementation='tokamax' needs rows in which the tokens of a text are adjacent. Pass "
            "text_layout='packed' or 'padded' if they are, or use None."
        )
    is_gpu = _get_platform() == "gpu"
    kernel = select_gpu_kernel(case, _run_kernel, only_tokamax=True) if is_gpu else "xla"
    if kernel == "xla":
        raise ValueError(
            f"implementation='tokamax' needs the library, an NVIDIA GPU of compute capability 8.0 "
            f"or more, and bfloat16 or float16, and this is {case.dtype} on "
            f"{jax.devices()[0].device_kind}. Use None, for the best one that there is."
        )
    return kernel


def _run_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    kernel: AttentionKernel,
    case: AttentionCase,
    scale: float,
) -> jax.Array:
    """Computes self-attention over whole rows with a kernel that supports the case.

    The kernels of `_run_on_shards` run on one device.
    """
    options = {"scale": scale, "window": case.window, "softcap": case.softcap}
    if kernel == "splash":
        return splash_attention(query, key, value, segment_ids, **options)
    if kernel in ("mosaic", "triton"):
        return tokamax_attention(
            query, key, value, segment_ids, kernel=kernel, causal=case.causal, **options
        )
    return _run_wide_on_cpu(
        functools.partial(
            _run_xla_or_cudnn, segment_ids=segment_ids, kernel=kernel, case=case, scale=scale
        ),
        query,
        key,
        value,
    )


def _run_xla_or_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None,
    kernel: Any,
    case: AttentionCase,
    scale: float,
) -> jax.Array:
    """Computes self-attention over whole rows by `jax.nn`, with lengths or a mask."""
    has_lengths = kernel == "cudnn" and case.text_layout == "padded"
    if case.softcap is None and (segment_ids is None or has_lengths):
        lengths = None if segment_ids is None else jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32)
        reach = None if case.window is None else case.window - 1
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=case.causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if reach is None else (reach, 0 if case.causal else reach),
            implementation=kernel,
        )
    slots = jnp.arange(query.shape[1])[None]
    mask = _make_mask(
        slots, slots, slots, None, segment_ids, None, causal=case.causal, window=case.window
    )
    return _masked_attention(query, key, value, mask, kernel, scale, case.softcap)


def _make_mask(
    query_slots: jax.Array,
    key_slots: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array | None,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
) -> jax.Array:
    """Returns (batch or 1, queries, keys), True where a query may attend to a key."""
    distance = query_slots[:, :, None] - key_slots[:, None, :]
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        keys = key_slots if key_positions is None else key_positions
        mask &= abs(query_positions[:, :, None] - keys[:, None, :]) < window
    if query_segment_ids is not None:
        keys = query_segment_ids if key_segment_ids is None else key_segment_ids
        mask &= (query_segment_ids[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
    return mask


def _masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    implementation: Any,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Attention with a mask of (batch or 1, queries, keys)."""
    if softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, mask=mask[:, None], implementation=implementation
        )
    return _softcapped_attention(query, key, value, mask, scale, softcap)


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


def _run_on_shards(
    kernel: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Runs a kernel on every device's own texts and heads.

    The compiler cannot partition a kernel. If the models' logical axis names are bound to a mesh,
    each device runs the kernel on its shard; heads are replicated where the mesh does not divide
    them.
    """
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
