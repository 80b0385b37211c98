"""A quantised weight: one node of a parameter tree, in the place of its array."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._quantized_array import QuantizedArray
from jlora.quantization.double_quantization import QuantizedScales, quantize_scales
from jlora.quantization.schemes import (
    SCHEMES,
    QuantizationScheme,
    merge_block_axes,
    pad_axis_to_multiple,
    split_axis_into_blocks,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["scheme", "axis", "axis_size", "dtype_name"],
)
@dataclasses.dataclass(frozen=True)
class QArray(QuantizedArray):
    """A weight as the codes of its numbers and a scale for every block of them.

    Attributes:
        codes: Laid out like the weight; along `axis` padded to whole blocks, and with as many codes
            in an entry as the scheme puts into a byte.
        scales: float32, or in 8 bits; one entry for a block along `axis`.
        scheme: What the codes mean.
        axis: That blocks run along, counted from the last.
        axis_size: Of that axis in the weight.
        dtype_name: The name of the type that the weight is computed with.
    """

    codes: Any
    scales: Any
    scheme: QuantizationScheme
    axis: int
    axis_size: int
    dtype_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = self.axis_size
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return jnp.dtype(self.dtype_name)

    @property
    def spec(self) -> dict[str, Any]:
        """All but the arrays, as JSON can hold it: what `quantize_like` takes."""
        scheme = dataclasses.asdict(self.scheme) | {"axis": self.axis}
        return {"scheme": self.scheme.name, "dtype_name": self.dtype_name, **scheme}

    def __str__(self) -> str:
        return self.scheme.name

    def dequantize(self) -> jax.Array:
        """The numbers, each a code's times its block's scale in float32, rounded once."""
        scales = (
            self.scales.dequantize() if isinstance(self.scales, QuantizedScales) else self.scales
        )
        blocks = split_axis_into_blocks(
            self.scheme.decode(self.codes, self.axis), self.axis, self.scheme.block_size
        )
        # The scales stand before the axis within blocks, which takes the number of the old one.
        whole = merge_block_axes(
            blocks * jnp.expand_dims(scales, blocks.ndim + self.axis), self.axis
        )
        return jax.lax.slice_in_dim(whole, 0, self.axis_size, axis=self.axis).astype(self.dtype)

    def transpose(self, permutation: Sequence[int]) -> QArray:
        """The transposed weight: the same codes in another order."""
        turned = jax.tree.map(lambda array: array.transpose(permutation), self)
        place = list(permutation).index(self.ndim + self.axis)
        return dataclasses.replace(turned, axis=place - self.ndim)

    def shard(self, num_shards: Sequence[int]) -> QArray | None:
        """None where a block, or a group of scales, would be cut."""
        for array in jax.tree.leaves(self):
            if any(n > 1 and n % parts for n, parts in zip(array.shape, num_shards, strict=True)):
                return None
        parts = num_shards[self.axis]
        if parts > 1 and self.axis_size % (parts * self.scheme.block_size):
            return None
        return dataclasses.replace(self, axis_size=self.axis_size // parts)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_array(array: jax.Array, scheme: QuantizationScheme, axis: int) -> QArray:
    """A weight in a scheme.

    What is not finite makes its block's scale so.

    Args:
        array: Floats of any shape.
        scheme: How.
        axis: Along which, counted from the last.
    """
    numbers = pad_axis_to_multiple(array.astype(jnp.float32), axis, scheme.block_size)
    blocks = split_axis_into_blocks(numbers, axis, scheme.block_size)
    largest = jnp.abs(blocks).max(axis, keepdims=True)
    # A block of zeros has no scale; its codes are those of zero.
    scaled = blocks / jnp.where(largest > 0, largest, 1) * scheme.max_value
    codes = scheme.encode(merge_block_axes(scaled, axis), axis)
    scales: Any = largest.squeeze(axis) / scheme.max_value
    if scheme.double_quantization:
        scales = quantize_scales(scales, axis)
    return QArray(codes, scales, scheme, axis, array.shape[axis], array.dtype.name)


def quantize_like(weight: Any, spec: Mapping[str, Any]) -> QArray | None:
    """A weight as another one was quantised; None where the description is of no known scheme."""
    facts = dict(spec)
    kind, found = facts.pop("dtype_name", None), SCHEMES.get(facts.pop("scheme", ""))
    try:
        if found is None:
            return None
        scheme = found(**facts)
        return quantize_array(jnp.asarray(weight).astype(kind), scheme, scheme.axis)
    except (TypeError, ValueError):
        return None
