"""jlora.interpreter.weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jlora._quantized_array import maybe_dequantize
from jlora.interpreter.usage import WeightAxes

WeightKind = Literal["linear", "convolution", "embedding", "bias", "other"]

MATRIX_KINDS: frozenset[WeightKind] = frozenset({"linear", "convolution", "embedding"})


class AxisSizes(NamedTuple):
    """The lengths of a weight's axes, by what they do."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def get_axis_sizes(shape: Sequence[int], axes: WeightAxes) -> AxisSizes:
    """The lengths of the axes of each group, in the order of `axes`."""
    return AxisSizes(*(tuple(shape[axis] for axis in group) for group in axes))


class AdaptableWeight(NamedTuple):
    """A weight to be adapted, and how its model uses it.

    Attributes:
        path: Where it is in the parameter tree.
        value: The array, or a `jax.ShapeDtypeStruct` where only shapes are known.
        axes: What each of its axes does.
        kind: A convolution's kernel, an embedding (rows of it are looked up), a bias (it is only
            added), any other that feeds a product ("linear"), or none of these.
        multiplies_activations: Whether it is multiplied with what depends on the model's inputs.
        primitives: The primitives that use it.
        window: Those of its input axes that a convolution slides over.
        dense_reasons: Why, at some uses, its dense sum will be formed.
    """

    path: str
    value: Any
    axes: WeightAxes
    kind: WeightKind
    multiplies_activations: bool
    primitives: tuple[str, ...]
    window: tuple[int, ...] = ()
    dense_reasons: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def axis_sizes(self) -> AxisSizes:
        return get_axis_sizes(self.shape, self.axes)

    @property
    def fan_in(self) -> int:
        return math.prod(self.axis_sizes.inputs)

    @property
    def fan_out(self) -> int:
        return math.prod(self.axis_sizes.outputs)

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Its input axes but the window's."""
        return tuple(axis for axis in self.axes.inputs if axis not in self.window)

    def to_matrices(self, caller: str) -> jax.Array:
        """The value as (batch, fan_in, fan_out) in float32 or wider: one matrix for each index.

        Args:
            caller: What needs the numbers, for the error.

        Raises:
            TypeError: When only the shape is known.
        """
        if isinstance(self.value, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{caller} needs the numbers of {self.path!r}, of which only the shape was given. "
                f"Call init with the loaded parameters."
            )
        return promote_to_float32(weight_to_matrices(self.value, self.axes))


def weight_to_matrices(array: Any, axes: WeightAxes) -> jax.Array:
    """An array laid out like a weight, as (batch, fan_in, fan_out)."""
    sizes = get_axis_sizes(array.shape, axes)
    moved = jnp.transpose(
        jnp.asarray(maybe_dequantize(array)), [axis for group in axes for axis in group]
    )
    return moved.reshape([math.prod(group) for group in sizes])


def matrices_to_weight(matrices: jax.Array, shape: Sequence[int], axes: WeightAxes) -> jax.Array:
    """The inverse of `weight_to_matrices`, for a weight of this shape."""
    order = [axis for group in axes for axis in group]
    moved = matrices.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(shape))])


def promote_to_float32(array: Any) -> jax.Array:
    """The array in float32, or float64 where it is."""
    array = jnp.asarray(maybe_dequantize(array))
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
