"""A quantised weight: one node of a parameter tree, in the place of its array."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.packed import Packed
from jlora.quantization.packing import joined, padded, split
from jlora.quantization.scales import SmallScales, small_scales
from jlora.quantization.schemes import SCHEMES, Scheme


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["scheme", "axis", "length", "kind"],
)
@dataclasses.dataclass(frozen=True)
class Quantized(Packed):
    """A weight as the codes of its numbers and a scale for every block of them.

    Attributes:
        codes: Laid out like the weight; along `axis` padded to whole blocks, and with as many codes
            in an entry as the scheme puts into a byte.
        scales: float32, or in 8 bits; one entry for a block along `axis`.
        scheme: What the codes mean.
        axis: That blocks run along, counted from the last.
        length: Of that axis in the weight.
        kind: The name of the type that the weight is computed with.
    """

    codes: Any
    scales: Any
    scheme: Scheme
    axis: int
    length: int
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return jnp.dtype(self.kind)

    @property
    def description(self) -> dict[str, Any]:
        """All but the arrays, as JSON can hold it: what `requantized` takes."""
        scheme = dataclasses.asdict(self.scheme) | {"axis": self.axis}
        return {"scheme": self.scheme.name, "kind": self.kind, **scheme}

    def __str__(self) -> str:
        return self.scheme.name

    def dense(self) -> jax.Array:
        """The numbers, each a code's times its block's scale in float32, rounded once."""
        scales = self.scales.dense() if isinstance(self.scales, SmallScales) else self.scales
        blocks = split(self.scheme.decode(self.codes, self.axis), self.axis, self.scheme.block_size)
        # The scales stand before the axis within blocks, which takes the number of the old one.
        whole = joined(blocks * jnp.expand_dims(scales, blocks.ndim + self.axis), self.axis)
        return jax.lax.slice_in_dim(whole, 0, self.length, axis=self.axis).astype(self.dtype)

    def transpose(self, order: Sequence[int]) -> Quantized:
        """The transposed weight: the same codes in another order."""
        turned = jax.tree.map(lambda array: array.transpose(order), self)
        place = list(order).index(self.ndim + self.axis)
        return dataclasses.replace(turned, axis=place - self.ndim)

    def shard(self, ways: Sequence[int]) -> Quantized | None:
        """None where a block, or a group of scales, would be cut."""
        for array in jax.tree.leaves(self):
            if any(n > 1 and n % parts for n, parts in zip(array.shape, ways, strict=True)):
                return None
        parts = ways[self.axis]
        if parts > 1 and self.length % (parts * self.scheme.block_size):
            return None
        return dataclasses.replace(self, length=self.length // parts)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(array: jax.Array, scheme: Scheme, axis: int) -> Quantized:
    """A weight in a scheme.

    What is not finite makes its block's scale so.

    Args:
        array: Floats of any shape.
        scheme: How.
        axis: Along which, counted from the last.
    """
    numbers = padded(array.astype(jnp.float32), axis, scheme.block_size)
    blocks = split(numbers, axis, scheme.block_size)
    largest = jnp.abs(blocks).max(axis, keepdims=True)
    # A block of zeros has no scale; its codes are those of zero.
    scaled = blocks / jnp.where(largest > 0, largest, 1) * scheme.largest
    codes = scheme.encode(joined(scaled, axis), axis)
    scales: Any = largest.squeeze(axis) / scheme.largest
    if scheme.double_quantization:
        scales = small_scales(scales, axis)
    return Quantized(codes, scales, scheme, axis, array.shape[axis], array.dtype.name)


def requantized(weight: Any, description: Mapping[str, Any]) -> Quantized | None:
    """A weight as another one was quantised; None where the description is of no known scheme."""
    facts = dict(description)
    kind, found = facts.pop("kind", None), SCHEMES.get(facts.pop("scheme", ""))
    try:
        if found is None:
            return None
        scheme = found(**facts)
        return quantized(jnp.asarray(weight).astype(kind), scheme, scheme.axis)
    except (TypeError, ValueError):
        return None
