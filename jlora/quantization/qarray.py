"""Quantized weights: one node of a parameter tree, in place of the weight's array."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._quantized_array import QuantizedArray
from jlora._serialization import register_serialization
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
    """Quantized weight: codes of its elements, and a scale for every block of them.

    Attributes:
        codes: Laid out like the weight. `axis` is padded to full blocks, and an entry packs as many
            codes as the scheme puts into a byte.
        scales: One entry per block along `axis`, in float32 or double-quantized to 8 bits.
        scheme: Meaning of the codes.
        axis: Blocked axis, counted from the last.
        axis_size: Length of the blocked axis in the weight.
        dtype_name: Name of the dtype that the weight is dequantized to.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> weight = jlora.quantize({"w": jnp.ones((64, 3))}, {"w": jlora.Int8(block_size=32)})["w"]
        >>> weight.shape, weight.codes.dtype.name, weight.scales.shape
        ((64, 3), 'int8', (2, 3))
        >>> weight.dequantize().dtype.name
        'float32'
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
        """Everything but the arrays, as JSON values: the `spec` of `quantize_like`."""
        scheme = dataclasses.asdict(self.scheme) | {"axis": self.axis}
        return {"scheme": self.scheme.name, "dtype_name": self.dtype_name, **scheme}

    def __str__(self) -> str:
        return self.scheme.name

    def dequantize(self) -> jax.Array:
        """Returns the weight: code times block scale in float32, rounded once to `dtype`."""
        scales = (
            self.scales.dequantize() if isinstance(self.scales, QuantizedScales) else self.scales
        )
        blocks = split_axis_into_blocks(
            self.scheme.decode(self.codes, self.axis), self.axis, self.scheme.block_size
        )
        # The axis of blocks comes before the axis within blocks, which has the blocked axis's
        # number.
        padded = merge_block_axes(
            blocks * jnp.expand_dims(scales, blocks.ndim + self.axis), self.axis
        )
        return jax.lax.slice_in_dim(padded, 0, self.axis_size, axis=self.axis).astype(self.dtype)

    def transpose(self, permutation: Sequence[int]) -> QArray:
        """Returns the transposed weight: the same codes in another order."""
        transposed = jax.tree.map(lambda array: array.transpose(permutation), self)
        axis = list(permutation).index(self.ndim + self.axis)
        return dataclasses.replace(transposed, axis=axis - self.ndim)

    def shard(self, num_shards: Sequence[int]) -> QArray | None:
        """Returns the node of one shard, or None where a block or a group of scales would be cut.

        Args:
            num_shards: Number of parts along each axis of the weight.
        """
        for array in jax.tree.leaves(self):
            if any(n > 1 and n % parts for n, parts in zip(array.shape, num_shards, strict=True)):
                return None
        parts = num_shards[self.axis]
        if parts > 1 and self.axis_size % (parts * self.scheme.block_size):
            return None
        return dataclasses.replace(self, axis_size=self.axis_size // parts)


def _decode_scheme(fields: Mapping[str, Any]) -> QuantizationScheme:
    options = dict(fields)
    return SCHEMES[options.pop("name")](**options)


register_serialization(
    QArray,
    ["codes", "scales"],
    ["scheme", "axis", "axis_size", "dtype_name"],
    encoders={"scheme": lambda scheme: {"name": scheme.name, **dataclasses.asdict(scheme)}},
    decoders={"scheme": _decode_scheme},
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_array(array: jax.Array, scheme: QuantizationScheme, axis: int) -> QArray:
    """Quantizes an array.

    A block that holds NaN or Inf gets a scale that is not finite.

    Args:
        array: Floats of any shape.
        scheme: Quantization scheme.
        axis: Blocked axis, counted from the last.
    """
    padded = pad_axis_to_multiple(array.astype(jnp.float32), axis, scheme.block_size)
    blocks = split_axis_into_blocks(padded, axis, scheme.block_size)
    absmax = jnp.abs(blocks).max(axis, keepdims=True)
    # A block of zeros has no scale; its codes are those of zero.
    scaled = blocks / jnp.where(absmax > 0, absmax, 1) * scheme.max_value
    codes = scheme.encode(merge_block_axes(scaled, axis), axis)
    scales: Any = absmax.squeeze(axis) / scheme.max_value
    if scheme.double_quantization:
        scales = quantize_scales(scales, axis)
    return QArray(codes, scales, scheme, axis, array.shape[axis], array.dtype.name)


def quantize_like(weight: Any, spec: Mapping[str, Any]) -> QArray | None:
    """Quantizes a weight as another one was.

    Args:
        weight: Array of floats.
        spec: `QArray.spec` of the other weight.

    Returns:
        The quantized weight, or None where the spec is not that of a known scheme.
    """
    options = dict(spec)
    dtype_name = options.pop("dtype_name", None)
    scheme_cls = SCHEMES.get(options.pop("scheme", ""))
    try:
        if scheme_cls is None:
            return None
        scheme = scheme_cls(**options)
        return quantize_array(jnp.asarray(weight).astype(dtype_name), scheme, scheme.axis)
    except (TypeError, ValueError):
        return None
