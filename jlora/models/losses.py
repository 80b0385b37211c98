"""Chunked cross entropy of a language-model head: all logits are never in memory at once."""

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
    """Computes logits (batch, length, vocabulary), in float32.

    Args:
        hidden: (batch, length, width).
        head: (width, vocabulary).
        softcap: Bound on the logits, applied by a tanh. None: no bound.
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
    """Computes cross entropies (batch, length), in nats and float32, chunk by chunk.

    With a frozen head, the gradient of a chunk's hidden states is computed together with its loss,
    from the same logits; the residuals of the backward pass are as large as the hidden states. With
    a trainable head, the backward pass recomputes the logits.

    Args:
        hidden: (batch, length, width).
        head: (width, vocabulary).
        targets: (batch, length) token ids. One outside the vocabulary has the loss NaN.
        chunks: Number of chunks that texts are split into; at most one per token.
        softcap: Bound on the logits, applied by a tanh. None: no bound.

    References:
        Hsu et al., Liger Kernel, arXiv:2410.10989, section 3.2, on the gradient computed with the
        loss. Losses are not reduced here, so that each token keeps a separate factor.
    """
    chunk_size = max(1, -(-hidden.shape[1] // chunks))
    losses = _chunked_losses(hidden, head, targets, chunk_size, softcap)
    return jnp.where((targets >= 0) & (targets < head.shape[1]), losses, jnp.nan)


def _cross_entropy_from_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    indices = _clip_targets(logits, targets)[..., None]
    target_logits = jnp.take_along_axis(logits, indices, axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def _clip_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.clip(targets, 0, logits.shape[-1] - 1)


def _map_chunks(
    fn: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    targets: jax.Array,
    chunk_size: int,
) -> Any:
    """Applies `fn` to `chunk_size` tokens of every text at a time, and joins the results."""
    batch, length = targets.shape
    num_chunks = length // chunk_size
    even_length = num_chunks * chunk_size  # The tokens of chunks of full size.

    def split(array: jax.Array) -> jax.Array:  # (chunks, batch, chunk_size, ...)
        chunks = array[:, :even_length].reshape(batch, num_chunks, chunk_size, *array.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    def join(chunks: jax.Array) -> jax.Array:  # (batch, even_length, ...)
        return jnp.moveaxis(chunks, 0, 1).reshape(batch, even_length, *chunks.shape[3:])

    # A loop, because a compiler that may reorder the chunks keeps several in memory at once.
    out = lax.map(lambda chunk: fn(*chunk), (split(hidden), split(targets)))
    out = jax.tree.map(join, out)
    if even_length == length:
        return out
    rest = fn(hidden[:, even_length:], targets[:, even_length:])
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), out, rest)


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
    """Computes the cross entropies; their derivative recomputes the logits."""

    @jax.checkpoint
    def losses(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return _cross_entropy_from_logits(compute_logits(hidden, head, softcap), targets)

    return _map_chunks(losses, hidden, targets, chunk_size)


@functools.partial(_chunked_losses.defjvp, symbolic_zeros=True)
def _chunked_losses_jvp(
    chunk_size: int, softcap: float | None, primals: Any, tangents: Any
) -> tuple[jax.Array, Any]:
    hidden, head, targets = primals
    hidden_tangent, head_tangent, _ = tangents
    if isinstance(hidden_tangent, SymbolicZero):
        hidden_tangent = jnp.zeros_like(hidden)
    if not isinstance(head_tangent, SymbolicZero):
        losses = functools.partial(
            _rematerialized_losses, targets=targets, chunk_size=chunk_size, softcap=softcap
        )
        return jax.jvp(losses, (hidden, head), (hidden_tangent, head_tangent))
    head = head.astype(hidden.dtype)

    def losses_and_gradients(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = compute_logits(hidden, head, softcap)
        one_hot = jax.nn.one_hot(_clip_targets(logits, targets), head.shape[1])
        gradient = jax.nn.softmax(logits) - one_hot  # (batch, chunk_size, vocabulary)
        if softcap is not None:
            gradient *= 1 - (logits / softcap) ** 2
        return _cross_entropy_from_logits(logits, targets), gradient.astype(hidden.dtype) @ head.T

    losses, gradients = _map_chunks(losses_and_gradients, hidden, targets, chunk_size)
    return losses, _contract_with_tangent(gradients, hidden_tangent)


# Rematerialized, so that the backward pass stores the gradient in its dtype and not in float32.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _contract_with_tangent(gradient: jax.Array, tangent: jax.Array) -> jax.Array:
    return (gradient.astype(jnp.float32) * tangent.astype(jnp.float32)).sum(axis=-1)
