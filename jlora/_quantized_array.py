"""Weights kept in fewer bits than the numbers that a model computes with."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jlora._sharding import fit_sharding


class QuantizedArray(abc.ABC):
    """A weight in another form than the array of its numbers.

    It stands in a parameter tree in the array's place, and is itself a node of arrays. Every one of
    these has as many axes as the weight, in the same order, and an axis that nothing is packed
    along is as long as the weight's. So what slices, stacks or shards the weight does the same to
    each of them, and what comes out is the packed form of the weight's slice, stack or shard.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of the weight's numbers when they are computed with."""

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """The weight's numbers."""

    @abc.abstractmethod
    def shard(self, num_shards: Sequence[int]) -> QuantizedArray | None:
        """What the arrays make up when each is split like the weight, axes of length one left
        whole: this node with its facts changed, whose arrays are to be replaced by their parts.

        Args:
            num_shards: Into how many parts each axis of the weight is split.

        Returns:
            None where they cannot be split so.
        """

    @abc.abstractmethod
    def transpose(self, permutation: Sequence[int]) -> QuantizedArray:
        """The transposed weight, packed."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """How many bits a number of the weight takes, scales and padding counted."""
        return 8 * self.nbytes / self.size


def is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


def maybe_dequantize(value: Any) -> Any:
    """The numbers of a weight, packed or not."""
    return value.dequantize() if isinstance(value, QuantizedArray) else value


def is_unpacked_along_first_axis(value: QuantizedArray) -> bool:
    """Whether nothing is packed along the first axis."""
    return all(array.shape[:1] == value.shape[:1] for array in jax.tree.leaves(value))


def abstract_with_sharding(abstract_array: Any, sharding: Sharding) -> Any:
    """A shape, of a packed weight or an array, that lies there."""

    def described(array: Any, place: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    return jax.tree.map(
        described,
        abstract_array,
        get_component_shardings(abstract_array, sharding)
        if is_quantized(abstract_array)
        else sharding,
    )


def get_component_shardings(value: QuantizedArray, sharding: Sharding) -> QuantizedArray:
    """Where the arrays of a packed weight lie, if the weight lay there: a node like it.

    What has too few entries along an axis to be split like the weight is whole there.
    """
    return jax.tree.map(lambda array: fit_sharding(sharding, array.shape), value)
