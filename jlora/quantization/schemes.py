"""Blocks along an axis, and two codes in one byte."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


def pack_nibbles(codes: jax.Array, axis: int) -> jax.Array:
    """Codes below 16 as bytes: of each two along the axis the first is the high half."""
    pairs = split_axis_into_blocks(codes, axis, 2)
    first, second = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in range(2))
    return (first << 4) | second


def unpack_nibbles(packed: jax.Array, axis: int) -> jax.Array:
    """The inverse of `pack_nibbles`."""
    shifts = [1] * (packed.ndim + 1)
    shifts[axis] = 2
    halves = jnp.expand_dims(packed, packed.ndim + axis + 1)
    halves = halves >> jnp.array([4, 0], packed.dtype).reshape(shifts)
    return merge_block_axes(halves & 15, axis)


def split_axis_into_blocks(array: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis, counted from the last, as two: many of this size. The second takes its number."""
    place = array.ndim + axis
    shape = (*array.shape[:place], -1, size, *array.shape[place + 1 :])
    return array.reshape(shape)


def merge_block_axes(array: jax.Array, axis: int) -> jax.Array:
    """The inverse of `split_axis_into_blocks`: an axis, counted from the last, and the one before it as one."""
    place = array.ndim + axis
    return array.reshape(*array.shape[: place - 1], -1, *array.shape[place + 1 :])


def pad_axis_to_multiple(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """The array with zeros after its end, so that the axis is a multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationScheme(abc.ABC):
    """A way to quantise a weight: blocks of it along one axis, each with a scale.

    Attributes:
        block_size: How many numbers share a scale. An axis that is no multiple is padded.
        axis: Which axis blocks run along, counted from the last (-1, -2, ...). When left out, the
            first of -2 (the inputs of a Flax kernel), -1, -3, ... that is a multiple of
            `block_size`, or else the longest.
    """

    block_size: int = 128
    axis: int | None = None

    name: ClassVar[str]
    # The largest magnitude that a code stands for: a block is divided so that it gets there.
    max_value: ClassVar[float]
    codes_per_byte: ClassVar[int] = 1
    double_quantization = False

    def __post_init__(self) -> None:
        who = type(self).__name__
        size, multiple = self.block_size, self.codes_per_byte
        if not isinstance(size, int) or isinstance(size, bool) or size < 2 or size % multiple:
            wanted = "an even number, 2" if multiple == 2 else "a whole number, 2"
            raise ValueError(f"{who}: block_size={size!r} must be {wanted} or more, such as 64.")
        if self.axis is not None and (not isinstance(self.axis, int) or self.axis >= 0):
            raise ValueError(
                f"{who}: axis={self.axis!r} must be counted from the last axis, which is -1: so it "
                f"is the same for a layer and for a stack of layers."
            )

    @abc.abstractmethod
    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """The codes of numbers in float32, none beyond `max_value`, packed along an axis."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """What the codes stand for, in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(QuantizationScheme):
    """4-bit NormalFloat: the 16 numbers that fit normally distributed weights.

    Attributes:
        block_size: How many numbers share their largest magnitude, which scales them.
        double_quantization: Whether these magnitudes are kept in 8 bits, with a float32 for every
            256 of them: 4.127 bits per weight instead of 4.5.

    References:
        Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
    """

    block_size: int = 64
    double_quantization: bool = True

    name: ClassVar[str] = "nf4"
    max_value: ClassVar[float] = 1.0
    codes_per_byte: ClassVar[int] = 2

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Two codes a byte, the first in the high half."""
        table = np.array(_NF4_VALUES)
        between = ((table[1:] + table[:-1]) / 2).astype(np.float32)
        # As many as lie below it; there is no other way to look them up that a TPU likes as well.
        below = [(values > limit).astype(jnp.uint8) for limit in between]
        return pack_nibbles(functools.reduce(jnp.add, below), axis)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """The number of each code."""
        table = jnp.array(_NF4_VALUES, jnp.float32)
        return table.at[unpack_nibbles(codes, axis)].get(mode="promise_in_bounds")


# Eight quantiles of a normal distribution above its median and seven below, and zero, divided by
# the largest: QLoRA, appendix E, to the digit, because codes of other libraries mean these.
_NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class _IntegerScheme(QuantizationScheme):
    """Symmetric integers: the largest magnitude of a block is the largest integer."""

    def _round_to_int8(self, values: jax.Array) -> jax.Array:
        return jnp.round(values).astype(jnp.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(_IntegerScheme):
    """8-bit integers, symmetric: `round(w / s)` with `s = max|w| / 127` for each block.

    Attributes:
        block_size: How many numbers share a scale.
    """

    name: ClassVar[str] = "int8"
    max_value: ClassVar[float] = 127.0

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """The integers themselves."""
        del axis
        return self._round_to_int8(values)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """The integers in float32."""
        del axis
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(_IntegerScheme):
    """4-bit integers, symmetric: `round(w / s)` with `s = max|w| / 7` for each block.

    Attributes:
        block_size: How many numbers share a scale.
    """

    block_size: int = 64

    name: ClassVar[str] = "int4"
    max_value: ClassVar[float] = 7.0
    codes_per_byte: ClassVar[int] = 2

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Two integers a byte, each plus eight, the first in the high half."""
        return pack_nibbles((self._round_to_int8(values) + 8).astype(jnp.uint8), axis)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """The integers in float32."""
        return unpack_nibbles(codes, axis).astype(jnp.float32) - 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(QuantizationScheme):
    """8-bit floats with 4 bits of exponent and 3 of mantissa (e4m3), scaled block by block.

    Attributes:
        block_size: How many numbers share a scale, which takes their largest magnitude to 448.

    References:
        Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433, section 3.
    """

    name: ClassVar[str] = "fp8"
    max_value: ClassVar[float] = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """The floats themselves."""
        del axis
        return values.astype(jnp.float8_e4m3fn)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """The floats in float32."""
        del axis
        return codes.astype(jnp.float32)


SCHEMES: dict[str, type[Any]] = {cls.name: cls for cls in (NF4, Int8, Int4, FP8)}
