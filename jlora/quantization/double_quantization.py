"""Double quantization: the scales of blocks, themselves quantized to 8 bits."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jlora._serialization import register_serialization

SCALES_PER_GROUP = 256  # Scales that share a scale of their own.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "absmax", "mean"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedScales:
    """Scales as 8-bit codes of their distance from the mean, relative to the largest in a group.

    Groups are tiles of 256 scales: as many full rows along the blocked axis as give 256, so that
    no axis before the last two is packed.

    Attributes:
        codes: uint8, laid out like the weight with one entry per block.
        absmax: float32, one entry per tile.
        mean: float32, one entry per matrix: the last two axes have length 1.

    References:
        Dettmers et al., QLoRA, arXiv:2305.14314, section 3, on double quantization.
    """

    codes: jax.Array
    absmax: jax.Array
    mean: jax.Array

    def dequantize(self) -> jax.Array:
        """Returns the scales in float32."""
        table = jnp.asarray(dynamic_map())
        relative = table.at[self.codes].get(mode="promise_in_bounds")
        return relative * _broadcast_groups(self.absmax, self.codes.shape) + self.mean


register_serialization(QuantizedScales, ["codes", "absmax", "mean"], [])


def quantize_scales(scales: jax.Array, axis: int) -> QuantizedScales:
    """Quantizes scales to 8 bits.

    Args:
        scales: Laid out like the weight, one entry per block.
        axis: Blocked axis, counted from the last.
    """
    matrix_axes = tuple(range(-min(2, scales.ndim), 0))
    mean = _order_independent_mean(scales, matrix_axes)
    centered = scales - mean
    absmax = jnp.abs(centered)
    for group_axis, size in _scale_group_shape(scales.shape, axis).items():
        count = absmax.shape[group_axis] // size
        index = absmax.ndim + group_axis
        shape = (*absmax.shape[:index], count, size, *absmax.shape[index + 1 :])
        absmax = absmax.reshape(shape).max(index + 1)
    divisor = _broadcast_groups(absmax, scales.shape)
    relative = jnp.where(divisor > 0, centered / jnp.where(divisor > 0, divisor, 1), 0)
    table = dynamic_map()
    codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), relative)
    return QuantizedScales(codes.astype(jnp.uint8), absmax, mean)


def _order_independent_mean(scales: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the mean over axes, which are kept with length one.

    The result is the same to the last bit for every sharding of the array, as the fingerprint of a
    weight must be: it is a sum of integers, which does not depend on the order, rounded once.
    """
    count = math.prod(scales.shape[axis] for axis in axes)
    step = 2 ** min(14, (2**30 // count).bit_length() - 1)  # No sum below passes 2**31.
    largest = scales.max(axes, keepdims=True)
    shares = scales / jnp.where(largest > 0, largest, 1) * step
    high_digit = jnp.floor(shares)
    digits = (high_digit, jnp.floor((shares - high_digit) * step))
    high, low = (x.astype(jnp.int32).sum(axes, keepdims=True) for x in digits)
    mean = (high // count) * step + ((high % count) * step + low) // count
    return largest * (mean.astype(jnp.float32) / step**2)


def _scale_group_shape(shape: tuple[int, ...], axis: int) -> dict[int, int]:
    """Returns the length of a group along each axis that it covers, counted from the last."""
    along = math.gcd(shape[axis], SCALES_PER_GROUP)
    if len(shape) == 1:
        return {axis: along}
    across = -2 if axis == -1 else -1
    return {axis: along, across: math.gcd(shape[across], SCALES_PER_GROUP // along)}


def _broadcast_groups(absmax: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats the entry of each tile for all of its scales."""
    for axis, (num_groups, length) in enumerate(zip(absmax.shape, shape, strict=True)):
        if num_groups != length:
            size = length // num_groups
            wide = (*absmax.shape[: axis + 1], size, *absmax.shape[axis + 1 :])
            repeated = jnp.broadcast_to(jnp.expand_dims(absmax, axis + 1), wide)
            absmax = repeated.reshape(*wide[:axis], length, *wide[axis + 2 :])
    return absmax


@functools.cache
def dynamic_map() -> np.ndarray:
    """Returns 256 ascending values from about -1 to 1, spaced wider at larger magnitudes.

    For each power of ten from -6 to 0, the interval from a tenth of it to itself is cut into 1, 2,
    4, ... 64 equal parts. The values are the midpoints of the parts with both signs, zero and one.

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.1
        and appendix F, on dynamic tree quantization.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        midpoints = 10.0 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*midpoints, *-midpoints]
    return np.sort(np.array(values, np.float32))
