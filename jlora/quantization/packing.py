"""Blocks along an axis, and two codes in one byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack_nibbles(codes: jax.Array, axis: int) -> jax.Array:
    """Codes below 16 as bytes: of each two along the axis the first is the high half."""
    pairs = split(codes, axis, 2)
    first, second = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in range(2))
    return (first << 4) | second


def unpack_nibbles(packed: jax.Array, axis: int) -> jax.Array:
    """The inverse of `pack_nibbles`."""
    shifts = [1] * (packed.ndim + 1)
    shifts[axis] = 2
    halves = jnp.expand_dims(packed, packed.ndim + axis + 1)
    halves = halves >> jnp.array([4, 0], packed.dtype).reshape(shifts)
    return joined(halves & 15, axis)


def split(array: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis, counted from the last, as two: many of this size. The second takes its number."""
    place = array.ndim + axis
    shape = (*array.shape[:place], -1, size, *array.shape[place + 1 :])
    return array.reshape(shape)


def joined(array: jax.Array, axis: int) -> jax.Array:
    """The inverse of `split`: an axis, counted from the last, and the one before it as one."""
    place = array.ndim + axis
    return array.reshape(*array.shape[: place - 1], -1, *array.shape[place + 1 :])


def padded(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """The array with zeros after its end, so that the axis is a multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)
