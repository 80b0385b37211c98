"""The cross entropy of a language model's head, whose logits are never held all at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jlora.interpreter.custom_derivatives import mark_derivative_of_body


def compute_logits(hidden: jax.Array, head: jax.Array, softcap: float | None) -> jax.Array:
    """The logits (batch, length, vocabulary), in float32, of hidden states (batch, length, width)
    and a head (width, vocabulary).
    """
    head = head.astype(hidden.dtype)
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def chunked_cross_entropy(
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
    size = max(1, -(-hidden.shape[1] // chunks))
    losses = _chunked_losses(hidden, head, targets, size, softcap)
    return jnp.where((targets >= 0) & (targets < head.shape[1]), losses, jnp.nan)


def _cross_entropy_from_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    found = jnp.take_along_axis(logits, _clip_targets(logits, targets)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - found


def _clip_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.clip(targets, 0, logits.shape[-1] - 1)


def _map_chunks(
    fn: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    targets: jax.Array,
    chunk_size: int,
) -> Any:
    """What `fn` makes of `chunk_size` tokens of every text at a time."""
    batch, length = targets.shape
    whole = length - length % chunk_size

    def cut(array: jax.Array) -> jax.Array:
        parts = array[:, :whole].reshape(batch, whole // chunk_size, chunk_size, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    def joined(parts: jax.Array) -> jax.Array:
        return jnp.moveaxis(parts, 0, 1).reshape(batch, whole, *parts.shape[3:])

    # A loop: of parts that it may make in any order, a compiler holds several at once.
    out = lax.map(lambda part: fn(*part), (cut(hidden), cut(targets)))
    out = jax.tree.map(joined, out)
    if whole == length:
        return out
    last = fn(hidden[:, whole:], targets[:, whole:])
    return jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), out, last)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _chunked_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk_size: int, softcap: float | None
) -> jax.Array:
    return _rematerialized_losses(
        mark_derivative_of_body(hidden), head, targets, chunk_size, softcap
    )


def _rematerialized_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk_size: int, softcap: float | None
) -> jax.Array:
    """The cross entropies, whose derivative makes the logits again."""

    @jax.checkpoint
    def losses(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return _cross_entropy_from_logits(compute_logits(hidden, head, softcap), targets)

    return _map_chunks(losses, hidden, targets, chunk_size)


@functools.partial(_chunked_losses.defjvp, symbolic_zeros=True)
def _chunked_losses_jvp(
    chunk_size: int, softcap: float | None, primals: Any, tangents: Any
) -> tuple[jax.Array, Any]:
    hidden, head, targets = primals
    moved, turned, _ = tangents
    if isinstance(moved, SymbolicZero):
        moved = jnp.zeros_like(hidden)
    if not isinstance(turned, SymbolicZero):
        run = functools.partial(
            _rematerialized_losses, targets=targets, chunk_size=chunk_size, softcap=softcap
        )
        return jax.jvp(run, (hidden, head), (moved, turned))
    head = head.astype(hidden.dtype)

    def with_slope(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = compute_logits(hidden, head, softcap)
        slope = jax.nn.softmax(logits) - jax.nn.one_hot(
            _clip_targets(logits, targets), head.shape[1]
        )
        if softcap is not None:
            slope *= 1 - (logits / softcap) ** 2
        return _cross_entropy_from_logits(logits, targets), slope.astype(hidden.dtype) @ head.T

    losses, slope = _map_chunks(with_slope, hidden, targets, chunk_size)
    return losses, _contract_with_tangent(slope, moved)


# What waits for the backward pass is the slope in its own type, and not in float32.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _contract_with_tangent(gradient: jax.Array, tangent: jax.Array) -> jax.Array:
    return (gradient.astype(jnp.float32) * tangent.astype(jnp.float32)).sum(axis=-1)
