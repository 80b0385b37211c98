"""Weights to be adapted: their kind, the roles of their axes, and their layout as matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jlora._quantized_array import maybe_dequantize
from jlora.interpreter.terms import AxisSizes, WeightAxes, widest_dtype

WeightKind = Literal["linear", "convolution", "embedding", "bias", "other"]

MATRIX_KINDS: frozenset[WeightKind] = frozenset({"linear", "convolution", "embedding"})


class AdaptableWeight(NamedTuple):
    """A weight to be adapted, and how its model uses it.

    Attributes:
        path: Path in the parameter tree.
        value: The array, or a `jax.ShapeDtypeStruct` if only the shape is known.
        axes: Roles of its axes.
        kind: "convolution" for the kernel of one, "embedding" for a table whose rows are looked up,
            "bias" for a weight that is only added, "linear" for any other weight in a product, or
            "other".
        multiplies_activations: Whether it is multiplied with values that depend on the inputs of
            the model.
        primitives: Names of the primitives that use it.
        window: Input axes that are the window of a convolution.
        dense_reasons: Reasons for which some uses materialize it.
        is_transposed: Whether some products contract other axes than `axes.inputs`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.rules import trace_weights
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((3, 6))
        >>> weight = trace_weights(lambda p, x: x @ p["w"], params, x)["w"]
        >>> weight.kind, weight.fan_in, weight.fan_out
        ('linear', 6, 5)
    """

    path: str
    value: Any
    axes: WeightAxes
    kind: WeightKind
    multiplies_activations: bool
    primitives: tuple[str, ...]
    window: tuple[int, ...] = ()
    dense_reasons: tuple[str, ...] = ()
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def axis_sizes(self) -> AxisSizes:
        return self.axes.sizes(self.shape)

    @property
    def fan_in(self) -> int:
        return math.prod(self.axis_sizes.inputs)

    @property
    def fan_out(self) -> int:
        return math.prod(self.axis_sizes.outputs)

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Input axes without those of the window."""
        return tuple(axis for axis in self.axes.inputs if axis not in self.window)

    def to_matrices(self, caller: str) -> jax.Array:
        """Returns the value as (batch, fan_in, fan_out) in float32 or wider.

        Args:
            caller: Name of the adapter or initializer, for the error.

        Raises:
            TypeError: If only the shape is known.
        """
        if isinstance(self.value, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{caller} needs the values of {self.path!r}, got only its shape. Call init with "
                f"the loaded parameters."
            )
        return promote_to_float32(weight_to_matrices(self.value, self.axes))


def weight_to_matrices(array: Any, axes: WeightAxes) -> jax.Array:
    """Returns an array with the layout of a weight as (batch, fan_in, fan_out)."""
    sizes = axes.sizes(array.shape)
    transposed = jnp.transpose(
        jnp.asarray(maybe_dequantize(array)), [axis for group in axes for axis in group]
    )
    return transposed.reshape([math.prod(group) for group in sizes])


def matrices_to_weight(matrices: jax.Array, shape: Sequence[int], axes: WeightAxes) -> jax.Array:
    """Returns matrices in the layout of a weight: the inverse of `weight_to_matrices`."""
    order = [axis for group in axes for axis in group]
    transposed = matrices.reshape([shape[axis] for axis in order])
    return jnp.transpose(transposed, [order.index(axis) for axis in range(len(shape))])


def promote_to_float32(array: Any) -> jax.Array:
    """Returns the array in float32, or in float64 if it is."""
    array = jnp.asarray(maybe_dequantize(array))
    return array.astype(widest_dtype(array.dtype, jnp.float32))


def divide_by_size(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns matrices divided by their largest entry, and that entry, (*batch, 1, 1).

    Decompositions square entries, which over- or underflow in very large and small weights.
    """
    size = as_divisor(jnp.abs(matrices).max((-2, -1), keepdims=True))
    return matrices / size, size


def as_divisor(sizes: jax.Array) -> jax.Array:
    """Returns sizes that can divide: one for zero, and none whose inverse is zero.

    Compilers divide by multiplying with the inverse, which is zero past 2^126 in float32.
    """
    return jnp.where(sizes > 0, jnp.clip(sizes, jnp.finfo(sizes.dtype).tiny, 2.0**125), 1)
