"""The cross entropy of a language model's head, whose logits are never held all at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jlora.faithful import marked


def logits_of(hidden: jax.Array, head: jax.Array, softcap: float | None) -> jax.Array:
    """The logits (batch, length, vocabulary), in float32, of hidden states (batch, length, width)
    and a head (width, vocabulary).
    """
    head = head.astype(hidden.dtype)
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunks: int,
    softcap: float | None = None,
) -> jax.Array:
    """Cross entropies (batch, length), in nats and float32, without ever holding all logits.

    With a frozen head the gradient of a part's hidden states is made from the part's logits while
    they are there; what waits for the backward pass is as large as the hidden states. With one that
    is trained the logits are made again.

    Args:
        hidden: (batch, length, width).
        head: (width, vocabulary).
        targets: (batch, length) token numbers. One that is no token gives NaN.
        chunks: Into how many parts texts are cut, or as many as they have tokens.
        softcap: Bound that a tanh puts on the logits.

    References:
        Hsu et al., Liger Kernel, arXiv:2410.10989, section 3.2, on the gradient made beside the
        loss. Here losses stay apart, so that each keeps a factor of its own.
    """
    vocabulary = head.shape[1]
    size = -(-hidden.shape[1] // chunks)
    parts = [
        _losses(
            lax.slice_in_dim(hidden, start, min(start + size, hidden.shape[1]), axis=1),
            head,
            lax.slice_in_dim(targets, start, min(start + size, hidden.shape[1]), axis=1),
            softcap,
        )
        for start in range(0, hidden.shape[1], size)
    ]
    losses = jnp.concatenate(parts, axis=1)
    return jnp.where((targets >= 0) & (targets < vocabulary), losses, jnp.nan)


def _of_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    found = jnp.take_along_axis(logits, _inside(logits, targets)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - found


def _inside(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.clip(targets, 0, logits.shape[-1] - 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, softcap: float | None
) -> jax.Array:
    """The cross entropies of a part that is small enough for all of its logits."""
    return _again(marked(hidden), head, targets, softcap)


@functools.partial(jax.checkpoint, static_argnums=(3,))
def _again(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, softcap: float | None
) -> jax.Array:
    return _of_logits(logits_of(hidden, head, softcap), targets)


@functools.partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(softcap: float | None, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    hidden, head, targets = primals
    moved, turned, _ = tangents
    if not isinstance(turned, SymbolicZero):
        if isinstance(moved, SymbolicZero):
            moved = jnp.zeros_like(hidden)
        return jax.jvp(lambda x, w: _again(x, w, targets, softcap), (hidden, head), (moved, turned))
    logits = logits_of(hidden, head, softcap)
    losses = _of_logits(logits, targets)
    if isinstance(moved, SymbolicZero):
        return losses, jnp.zeros_like(losses)
    slope = jax.nn.softmax(logits) - jax.nn.one_hot(_inside(logits, targets), logits.shape[-1])
    if softcap is not None:
        slope *= 1 - (logits / softcap) ** 2
    return losses, _along(slope.astype(hidden.dtype) @ head.astype(hidden.dtype).T, moved)


# What waits for the backward pass is the slope in its own type, and not in float32.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _along(slope: jax.Array, moved: jax.Array) -> jax.Array:
    return (slope.astype(jnp.float32) * moved.astype(jnp.float32)).sum(axis=-1)
