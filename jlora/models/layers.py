"""What several models are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def remat_elementwise(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Element-wise work, of which nothing but its array arguments is kept for its gradient.

    What it does in float32 inside would be kept in float32 otherwise, at twice the size, wherever
    the compiler cannot make it anew: between the two passes of a scan.

    Args:
        fn: Arguments that are no arrays are static.
    """

    @functools.wraps(fn)
    def run(*args: Any) -> jax.Array:
        static = [n for n, arg in enumerate(args) if not hasattr(arg, "dtype")]
        again: Any = jax.checkpoint(fn, prevent_cse=False, static_argnums=tuple(static))
        return again(*args)

    return run


def partitioned_init(*axis_names: str | None, init: Callable[..., Any] | None = None) -> Any:
    """An initialiser whose array's axes have logical names; that of a kernel when left out."""
    return spmd.with_logical_partitioning(init or nn.initializers.lecun_normal(), axis_names)


def mark_invalid_ids(ids: jax.Array, num_embeddings: int) -> jax.Array:
    """The rows of a table that ids take: a negative one takes none, as one past the last does.

    Looking up what has no row gives NaN; JAX would count a negative number from the end.
    """
    return jnp.where(ids < 0, num_embeddings, ids)


def layer_norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """A layer norm over the last axis, in float32."""
    # E[x^2] - E[x]^2 loses the digits of a small variance; an epsilon of 1e-12 does not hide it.
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=partitioned_init("norm", init=nn.initializers.ones),
        name=name,
    )


def self_attention(
    hidden: jax.Array,
    mask: jax.Array | None,
    *,
    num_heads: int,
    use_bias: bool,
    dropout: float,
    deterministic: bool,
    dtype: Any,
) -> jax.Array:
    """What every position gathers from all, (batch, length, width), inside a module's own call.

    The module gets `query`, `key`, `value` and `output`.

    Args:
        hidden: (batch, length, width).
        mask: Broadcast to (batch, heads, queries, keys), False where a key is hidden.
        num_heads: How many; they divide the width.
        use_bias: Whether query, key and value have biases.
        dropout: The share of the weights that is left out.
        deterministic: Whether none is.
        dtype: Of the computation; that of the weights when None.
    """
    width, by_head = hidden.shape[-1], (*hidden.shape[:-1], num_heads, -1)
    query, key, value = (
        nn.Dense(width, use_bias, dtype, name=name, kernel_init=partitioned_init("embed", "heads"))(
            hidden
        )
        for name in ("query", "key", "value")
    )
    query, key, value = (x.reshape(by_head) for x in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    # The softmax sums in float32, whatever the dtype of the hidden states.
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    weights = nn.Dropout(dropout)(weights, deterministic)
    context = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(hidden.shape)
    init = partitioned_init("heads", "embed")
    return nn.Dense(width, dtype=dtype, name="output", kernel_init=init)(context)


def feed_forward(
    hidden: jax.Array, *, intermediate_size: int, activation: str, dtype: Any
) -> jax.Array:
    """Two dense layers and an activation between them, inside a module's own call.

    The module gets `up` and `down`.

    Args:
        hidden: (batch, length, width).
        intermediate_size: The width inside.
        activation: One of `ACTIVATIONS`.
        dtype: Of the computation; that of the weights when None.
    """
    inner = nn.Dense(
        intermediate_size, dtype=dtype, name="up", kernel_init=partitioned_init("embed", "mlp")
    )(hidden)
    inner = ACTIVATIONS[activation](inner)
    inner = spmd.with_logical_constraint(inner, ("batch", "length", "mlp"))
    width = hidden.shape[-1]
    return nn.Dense(width, dtype=dtype, name="down", kernel_init=partitioned_init("mlp", "embed"))(
        inner
    )
