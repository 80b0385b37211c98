"""The scales of blocks in 8 bits: double quantisation."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALES_PER_GROUP = 256  # Scales that share a scale of their own.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "absmax", "mean"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedScales:
    """Scales as 8-bit codes: their distance from the mean, over the largest one in a group.

    Groups are tiles of 256 scales: whole rows along the blocked axis, as many as make 256, so that
    no axis before the last two is packed.

    Attributes:
        codes: uint8, laid out like the weight with one entry for a block.
        absmax: float32, one entry for each tile.
        mean: float32, one for each matrix: the last two axes are 1.

    References:
        Dettmers et al., QLoRA, arXiv:2305.14314, section 3, on double quantisation.
    """

    codes: jax.Array
    absmax: jax.Array
    mean: jax.Array

    def dequantize(self) -> jax.Array:
        """The scales in float32."""
        table = jnp.asarray(dynamic_map())
        relative = table.at[self.codes].get(mode="promise_in_bounds")
        return relative * _broadcast_groups(self.absmax, self.codes.shape) + self.mean


def quantize_scales(scales: jax.Array, axis: int) -> QuantizedScales:
    """Quantises scales, laid out like the weight with one entry for a block."""
    ends = tuple(range(-min(2, scales.ndim), 0))
    mean = _order_independent_mean(scales, ends)
    centred = scales - mean
    tile = _scale_group_shape(scales.shape, axis)
    magnitudes = jnp.abs(centred)
    for place, size in tile.items():
        count = magnitudes.shape[place] // size
        at = magnitudes.ndim + place
        shape = (*magnitudes.shape[:at], count, size, *magnitudes.shape[at + 1 :])
        magnitudes = magnitudes.reshape(shape).max(at + 1)
    whole = _broadcast_groups(magnitudes, scales.shape)
    relative = jnp.where(whole > 0, centred / jnp.where(whole > 0, whole, 1), 0)
    table = dynamic_map()
    codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), relative)
    return QuantizedScales(codes.astype(jnp.uint8), magnitudes, mean)


def _order_independent_mean(scales: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over axes, which stay with length one.

    It is the same to the last bit however the array is split over devices, as the fingerprint of a
    weight must be: it is a sum of integers, which have no order, and is rounded once.
    """
    count = math.prod(scales.shape[axis] for axis in axes)
    step = 2 ** min(14, (2**30 // count).bit_length() - 1)  # No sum below passes 2**31.
    largest = scales.max(axes, keepdims=True)
    shares = scales / jnp.where(largest > 0, largest, 1) * step
    whole = jnp.floor(shares)
    digits = (whole, jnp.floor((shares - whole) * step))
    high, low = (x.astype(jnp.int32).sum(axes, keepdims=True) for x in digits)
    mean = (high // count) * step + ((high % count) * step + low) // count
    return largest * (mean.astype(jnp.float32) / step**2)


def _scale_group_shape(shape: tuple[int, ...], axis: int) -> dict[int, int]:
    """How long a group is along each of the axes that it covers, counted from the last."""
    along = math.gcd(shape[axis], SCALES_PER_GROUP)
    if len(shape) == 1:
        return {axis: along}
    across = -2 if axis == -1 else -1
    return {axis: along, across: math.gcd(shape[across], SCALES_PER_GROUP // along)}


def _broadcast_groups(absmax: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One entry for a tile as one for each of its scales."""
    for place, (few, many) in enumerate(zip(absmax.shape, shape, strict=True)):
        if few != many:
            wide = (*absmax.shape[: place + 1], many // few, *absmax.shape[place + 1 :])
            repeated = jnp.broadcast_to(jnp.expand_dims(absmax, place + 1), wide)
            absmax = repeated.reshape(*wide[:place], many, *wide[place + 2 :])
    return absmax


@functools.cache
def dynamic_map() -> np.ndarray:
    """256 numbers from about -1 to 1, ascending, whose spacing grows with their magnitude.

    For each power of ten from -6 to 0 the interval from a tenth of it to itself is cut into 1, 2,
    4, ... 64 equal parts, whose midpoints are taken with both signs; zero and one stand beside
    them.

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.1
        and appendix F, on dynamic tree quantisation.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))
