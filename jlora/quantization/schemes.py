"""Quantization schemes: codes and scales of blocks along one axis, and packing of 4-bit codes."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationScheme(abc.ABC):
    """Configuration of quantization: blocks along one axis of a weight, each with a scale.

    Subclasses define `encode` and `decode`.

    Attributes:
        block_size: Number of elements that share a scale. An axis that is not a multiple is padded.
        axis: Blocked axis, counted from the last (-1, -2, ...). null: the first of -2 (the inputs
            of a Flax kernel), -1, -3, ... that is a multiple of `block_size`, or else the longest.

    Raises:
        ValueError: `block_size` is not an integer of 2 or more (or is odd where two codes share a
            byte), or `axis` is not negative.

    Example:
        >>> import jlora
        >>> isinstance(jlora.Int4(), jlora.quantization.QuantizationScheme)
        True
        >>> jlora.quantization.SCHEMES["int4"](block_size=32)
        Int4(block_size=32, axis=None)
    """

    block_size: int = 128
    axis: int | None = None

    name: ClassVar[str]
    # The largest magnitude that a code represents: a block is divided so that it gets there.
    max_value: ClassVar[float]
    codes_per_byte: ClassVar[int] = 1
    double_quantization = False

    def __post_init__(self) -> None:
        cls_name = type(self).__name__
        size, multiple = self.block_size, self.codes_per_byte
        if not isinstance(size, int) or isinstance(size, bool) or size < 2 or size % multiple:
            expected = "an even integer" if multiple == 2 else "an integer"
            raise ValueError(
                f"{cls_name}.block_size must be {expected} of 2 or more, got {size!r}. Use, for "
                f"example, 64."
            )
        if self.axis is not None and (not isinstance(self.axis, int) or self.axis >= 0):
            raise ValueError(
                f"{cls_name}.axis must be a negative integer, got {self.axis!r}. Count from the "
                f"last axis, which is -1, so that it is the same for a layer and for a stack of "
                f"layers."
            )

    @abc.abstractmethod
    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Returns the codes of float32 values up to `max_value`, packed along an axis."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the float32 values of codes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(QuantizationScheme):
    """4-bit NormalFloat: 16 values that fit normally distributed weights.

    Attributes:
        block_size: Number of elements that share a scale, which is their largest magnitude.
        double_quantization: Quantization of the scales to 8 bits, with a float32 for every 256 of
            them: 4.127 bits per parameter instead of 4.5.

    References:
        Dettmers et al., QLoRA, arXiv:2305.14314, section 3.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.ones((64, 3))}, {"w": jlora.NF4()})
        >>> base["w"].codes.shape  # Two codes per byte.
        (32, 3)
    """

    block_size: int = 64
    double_quantization: bool = True

    name: ClassVar[str] = "nf4"
    max_value: ClassVar[float] = 1.0
    codes_per_byte: ClassVar[int] = 2

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Returns two codes per byte, the first in the high half."""
        table = np.array(_NF4_VALUES)
        midpoints = ((table[1:] + table[:-1]) / 2).astype(np.float32)
        # A code is the number of midpoints below the value. No other lookup is as fast on a TPU.
        below = [(values > midpoint).astype(jnp.uint8) for midpoint in midpoints]
        return pack_nibbles(functools.reduce(jnp.add, below), axis)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the value of each code."""
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
    """Symmetric integers: the largest magnitude of a block maps to the largest integer."""

    def _round_to_int8(self, values: jax.Array) -> jax.Array:
        return jnp.round(values).astype(jnp.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(_IntegerScheme):
    """8-bit integers, symmetric: `round(w / s)` with `s = max|w| / 127` for each block.

    Attributes:
        block_size: Number of elements that share a scale.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.array([1.0, -0.5])}, {"w": jlora.Int8(block_size=2)})
        >>> base["w"].codes.tolist()
        [127, -64]
    """

    name: ClassVar[str] = "int8"
    max_value: ClassVar[float] = 127.0

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Returns the integers as int8."""
        del axis
        return self._round_to_int8(values)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the integers in float32."""
        del axis
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(_IntegerScheme):
    """4-bit integers, symmetric: `round(w / s)` with `s = max|w| / 7` for each block.

    Attributes:
        block_size: Number of elements that share a scale.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.array([7.0, -2.0])}, {"w": jlora.Int4(block_size=2)})
        >>> base["w"].codes.tolist()  # (7 + 8) * 16 + (-2 + 8)
        [246]
    """

    block_size: int = 64

    name: ClassVar[str] = "int4"
    max_value: ClassVar[float] = 7.0
    codes_per_byte: ClassVar[int] = 2

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Returns two integers per byte, each plus eight, the first in the high half."""
        return pack_nibbles((self._round_to_int8(values) + 8).astype(jnp.uint8), axis)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the integers in float32."""
        return unpack_nibbles(codes, axis).astype(jnp.float32) - 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(QuantizationScheme):
    """8-bit floats with 4 bits of exponent and 3 of mantissa (e4m3), scaled block by block.

    Attributes:
        block_size: Number of elements that share a scale, which maps their largest magnitude to
            448.

    References:
        Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433, section 3.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.array([2.0, 1.0])}, {"w": jlora.FP8(block_size=2)})
        >>> base["w"].codes.dtype.name, base["w"].codes.astype(float).tolist()
        ('float8_e4m3fn', [448.0, 224.0])
    """

    name: ClassVar[str] = "fp8"
    max_value: ClassVar[float] = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)

    def encode(self, values: jax.Array, axis: int) -> jax.Array:
        """Returns the values as float8."""
        del axis
        return values.astype(jnp.float8_e4m3fn)

    def decode(self, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the floats in float32."""
        del axis
        return codes.astype(jnp.float32)


# The schemes by name.
SCHEMES: dict[str, type[Any]] = {cls.name: cls for cls in (NF4, Int8, Int4, FP8)}


def split_axis_into_blocks(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into blocks of a size: (..., n, ...) to (..., n / size, size, ...).

    Args:
        array: Array whose axis is a multiple of `size`.
        axis: Axis to split, counted from the last. It is the number of the second new axis.
        size: Length of a block.
    """
    index = array.ndim + axis
    shape = (*array.shape[:index], -1, size, *array.shape[index + 1 :])
    return array.reshape(shape)


def merge_block_axes(array: jax.Array, axis: int) -> jax.Array:
    """Inverse of `split_axis_into_blocks`: merges an axis with the one before it."""
    index = array.ndim + axis
    return array.reshape(*array.shape[: index - 1], -1, *array.shape[index + 1 :])


def pad_axis_to_multiple(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pads the end of an axis with zeros to a multiple of a length."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def pack_nibbles(codes: jax.Array, axis: int) -> jax.Array:
    """Packs codes below 16 into bytes: the first of each two along the axis is the high half."""
    pairs = split_axis_into_blocks(codes, axis, 2)
    first, second = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in range(2))
    return (first << 4) | second


def unpack_nibbles(packed: jax.Array, axis: int) -> jax.Array:
    """Inverse of `pack_nibbles`."""
    shifts = [1] * (packed.ndim + 1)
    shifts[axis] = 2
    halves = jnp.expand_dims(packed, packed.ndim + axis + 1)
    halves = halves >> jnp.array([4, 0], packed.dtype).reshape(shifts)
    return merge_block_axes(halves & 15, axis)
