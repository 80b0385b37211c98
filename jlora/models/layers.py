"""Layers, activations and initializers that several models share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd
from jax import lax

from jlora.models.attention import attend, choose_kernel, make_case
from jlora.models.attention_kernels import TextLayout

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def remat_elementwise(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Rematerializes an element-wise function: its gradient stores only the array arguments.

    Intermediate values in float32 would otherwise be stored in float32, at twice the size, wherever
    the compiler cannot recompute them: between the two passes of a scan.

    Args:
        fn: Element-wise function. Arguments that are not arrays are static.
    """

    @functools.wraps(fn)
    def run(*args: Any) -> jax.Array:
        static = [index for index, arg in enumerate(args) if not hasattr(arg, "dtype")]
        remat: Any = jax.checkpoint(fn, prevent_cse=False, static_argnums=tuple(static))
        return remat(*args)

    return run


def partitioned_init(*axis_names: str | None, init: Callable[..., Any] | None = None) -> Any:
    """Returns an initializer with logical axis names; `init=None` is that of a kernel."""
    return spmd.with_logical_partitioning(init or nn.initializers.lecun_normal(), axis_names)


def mark_invalid_ids(ids: jax.Array, num_embeddings: int) -> jax.Array:
    """Replaces negative ids by one past the end of the table.

    A look-up past the end returns NaN; JAX would count a negative id from the end.
    """
    return jnp.where(ids < 0, num_embeddings, ids)


def layer_norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """Returns a layer norm over the last axis, computed in float32."""
    # E[x^2] - E[x]^2 loses the digits of a small variance, which an epsilon of 1e-12 does not hide.
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=partitioned_init("norm", init=nn.initializers.ones),
        name=name,
    )


def self_attention(
    hidden: jax.Array,
    attention_mask: jax.Array | None,
    *,
    num_heads: int,
    use_bias: bool,
    dropout: float,
    deterministic: bool,
    dtype: Any,
    text_layout: TextLayout = "any",
) -> jax.Array:
    """Computes multi-head self-attention outputs (batch, length, width) inside a module's call.

    The module gets the submodules `query`, `key`, `value` and `output`.

    Args:
        hidden: (batch, length, width).
        attention_mask: (batch, length), 0 or False where a key is hidden. None: no key is hidden.
        num_heads: Number of heads, which must divide the width.
        use_bias: The query, key and value projections have biases.
        dropout: Dropout rate of the attention weights.
        deterministic: Turns dropout off.
        dtype: dtype of the computation. None: that of the weights.
        text_layout: Order of tokens and padding, as in `jlora.models.attention.attend`.
    """
    width, head_shape = hidden.shape[-1], (*hidden.shape[:-1], num_heads, -1)
    init = partitioned_init("embed", "heads")
    query, key, value = (
        nn.Dense(width, use_bias, dtype, name=name, kernel_init=init)(hidden)
        for name in ("query", "key", "value")
    )
    query, key, value = (x.reshape(head_shape) for x in (query, key, value))
    has_dropout = dropout > 0 and not deterministic  # Of the weights, which kernels do not form.
    layout = None if attention_mask is None else text_layout
    case = make_case(query, key, text_layout=layout, causal=False, window=None, softcap=None)
    if not has_dropout and choose_kernel(case) != "xla":
        ids = None if attention_mask is None else attention_mask.astype(jnp.int32)
        scale = query.shape[-1] ** -0.5
        context = attend(
            query,
            key,
            value,
            scale=scale,
            query_segment_ids=ids,
            causal=False,
            text_layout=text_layout,
        ).reshape(hidden.shape)
    else:
        context = _masked_context(query, key, value, attention_mask, dropout, deterministic)
    init = partitioned_init("heads", "embed")
    return nn.Dense(width, dtype=dtype, name="output", kernel_init=init)(context)


def _masked_context(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attention_mask: jax.Array | None,
    dropout: float,
    deterministic: bool,
) -> jax.Array:
    """Returns attention outputs (batch, length, width) from the weights of all pairs."""
    # (batch, heads, queries, keys)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    # The softmax sums in float32 for every dtype of the hidden states.
    scores = scores.astype(jnp.float32)
    if attention_mask is not None:
        is_token = attention_mask.astype(bool)[:, None, None, :]
        scores = jnp.where(is_token, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    weights = nn.Dropout(dropout)(weights, deterministic)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*query.shape[:2], -1)


def has_layout(segment_ids: jax.Array, text_layout: TextLayout) -> jax.Array:
    """Returns whether each row (batch,) keeps the promise of a layout of `attend`.

    Texts are numbered in their order in the row; 0 is padding.

    Args:
        segment_ids: (batch, length), the text of each token.
        text_layout: Layout of the rows.

    Example:
        >>> import jax.numpy as jnp
        >>> has_layout(jnp.array([[1, 1, 2, 0], [1, 2, 1, 0], [0, 1, 0, 1]]), "packed").tolist()
        [True, False, False]
    """
    if text_layout == "any":
        return jnp.ones(segment_ids.shape[:1], bool)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    if text_layout == "padded":
        begins_again = (segment_ids != before) & (segment_ids != 0)
        return ~jnp.any(begins_again[:, 1:], axis=1)
    largest = lax.cummax(before, axis=1)
    is_first = (segment_ids != before) & (segment_ids != 0)
    return ~jnp.any(is_first & (segment_ids <= largest), axis=1)


def feed_forward(
    hidden: jax.Array, *, intermediate_size: int, activation: str, dtype: Any
) -> jax.Array:
    """Computes two dense layers with an activation between them inside a module's call.

    The module gets the submodules `up` and `down`.

    Args:
        hidden: (batch, length, width).
        intermediate_size: Width between the two layers.
        activation: Key of `ACTIVATIONS`.
        dtype: dtype of the computation. None: that of the weights.
    """
    init = partitioned_init("embed", "mlp")
    inner = nn.Dense(intermediate_size, dtype=dtype, name="up", kernel_init=init)(hidden)
    inner = ACTIVATIONS[activation](inner)
    inner = spmd.with_logical_constraint(inner, ("batch", "length", "mlp"))
    init = partitioned_init("mlp", "embed")
    return nn.Dense(hidden.shape[-1], dtype=dtype, name="down", kernel_init=init)(inner)
