"""Base class of quantized weights, and functions on trees that may contain them."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jlora._mesh import fit_sharding


class QuantizedArray(abc.ABC):
    """A quantized weight.

    It replaces the array in a parameter tree and is itself a pytree of arrays, its components.
    Every component has the axes of the weight, in the same order, and the length of the weight
    along each axis without packing. So slicing, stacking or sharding every component gives the
    quantized form of the slice, stack or shard of the weight.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Type of the dequantized weight."""

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """Returns the weight as an array."""

    @abc.abstractmethod
    def shard(self, num_shards: Sequence[int]) -> QuantizedArray | None:
        """Returns the quantized form of one shard, whose components have yet to be sharded.

        Static fields are those of a shard. The caller replaces each component by its shard; axes of
        length one are not sharded.

        Args:
            num_shards: Number of shards along each axis of the weight.

        Returns:
            None if the components cannot be sharded like this.
        """

    @abc.abstractmethod
    def transpose(self, permutation: Sequence[int]) -> QuantizedArray:
        """Returns the transposed weight in quantized form."""

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of parameters of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits per parameter, including scales and padding."""
        return 8 * self.nbytes / self.size


def maybe_dequantize(value: Any) -> Any:
    """Returns a quantized weight as an array, and any other value unchanged."""
    return value.dequantize() if isinstance(value, QuantizedArray) else value


def is_unpacked_along_first_axis(value: QuantizedArray) -> bool:
    """Whether no component packs entries along the first axis."""
    return all(array.shape[:1] == value.shape[:1] for array in jax.tree.leaves(value))


def abstract_with_sharding(abstract_array: Any, sharding: Sharding) -> Any:
    """Adds a sharding to the abstract value of an array or of a quantized weight."""

    def with_sharding(component: Any, component_sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(component.shape, component.dtype, sharding=component_sharding)

    return jax.tree.map(
        with_sharding,
        abstract_array,
        get_component_shardings(abstract_array, sharding)
        if isinstance(abstract_array, QuantizedArray)
        else sharding,
    )


def get_component_shardings(value: QuantizedArray, sharding: Sharding) -> QuantizedArray:
    """Returns a tree of the shardings of the components of a quantized weight.

    A component that is too short along an axis to be sharded like the weight is not sharded there.

    Args:
        value: Quantized weight, or its abstract value.
        sharding: Sharding of the weight.
    """
    return jax.tree.map(lambda array: fit_sharding(sharding, array.shape), value)
