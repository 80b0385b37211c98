"""Arrays with labeled axes, and einsum contractions of several of them.

An `Axis` is a label. Code that also has positions of array axes calls the positions axes and an
`Axis` a label.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """Label of an array axis, equal only to itself.

    Attributes:
        size: Length of the axis.
        weight_axis: Axis of the original weight that it is, or is a part of. None: no weight axis,
            such as a rank.
        is_gathered: Whether it counts gathered rows of that weight axis instead of its indices.
    """

    size: int
    weight_axis: int | None = None
    is_gathered: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Operand:
    """An array with labeled axes.

    Attributes:
        array: The array.
        axes: One label per array axis.
    """

    array: Any
    axes: tuple[Axis, ...]

    def map(self, fn: Callable[[Any], Any]) -> Operand:
        """Applies a function that keeps the axes to the array."""
        return Operand(fn(self.array), self.axes)


def flat_size(axes: Sequence[Axis]) -> int:
    """Returns the product of the axis lengths."""
    return math.prod(axis.size for axis in axes)


def contract(
    first: Operand,
    others: Sequence[Operand],
    out_axes: Sequence[Axis],
    *,
    precision: Any = None,
    out_dtype: Any = None,
    cast: bool = True,
) -> Any:
    """Multiplies operands and sums over every axis that is not in `out_axes`.

    The contraction starts with `first` and takes one operand at a time, always the one that leaves
    the smallest result. So `x A B` goes through the rank and never forms `A B`.

    Args:
        first: Operand to start with, such as an activation.
        others: Other operands.
        out_axes: Axes of the result, in order.
        precision: Precision of the products.
        out_dtype: Type of the result. None: the type that the product has anyway.
        cast: Whether the other operands are cast to the type of `first`.

    Returns:
        An array with the axes `out_axes`, broadcast along those that no operand has.
    """
    einsum_ids: dict[Axis, int] = {}

    def get_ids(axes: Sequence[Axis]) -> list[int]:
        return [einsum_ids.setdefault(axis, len(einsum_ids)) for axis in axes]

    # Contracted axes, and axes that the operands add; axes that pass through are in both.
    unshared = set(first.axes) ^ set(out_axes)
    remaining = contract_shared(others, unshared, {*first.axes, *out_axes}, precision)
    order = contraction_order(first.axes, [operand.axes for operand in remaining], out_axes)
    current = first
    for position, (index, kept_axes) in enumerate(order, 1):
        is_last, operand = position == len(order), remaining[index]
        if is_last:
            kept_axes = [axis for axis in out_axes if axis in kept_axes]
        product = jnp.einsum(
            current.array,
            get_ids(current.axes),
            operand.array.astype(current.array.dtype) if cast else operand.array,
            get_ids(operand.axes),
            get_ids(kept_axes),
            precision=precision,
            preferred_element_type=out_dtype if is_last else None,
        )
        current = Operand(product, tuple(kept_axes))
    if not others:
        present = [axis for axis in out_axes if axis in current.axes]
        array = jnp.einsum(current.array, get_ids(current.axes), get_ids(present))
        current = Operand(array.astype(out_dtype or array.dtype), tuple(present))
    return _broadcast_to_axes(current, out_axes)


def contract_shared(
    operands: Sequence[Operand],
    unshared_axes: Iterable[Axis],
    needed_axes: Iterable[Axis],
    precision: Any = None,
) -> list[Operand]:
    """Multiplies operands with one another until each of `unshared_axes` is in only one of them.

    Where several operands share an axis of the weight (a Hadamard product), an activation must be
    multiplied with their product. With one after the other, the activation would keep that axis
    between them, or get it before the last operand. The pair with the smallest result goes first.

    Args:
        operands: Operands of one product.
        unshared_axes: Axes that no two of the returned operands share.
        needed_axes: Axes that are needed outside these operands, so they are not summed over.
        precision: Precision of the products.
    """
    unshared_axes, needed_axes = set(unshared_axes), set(needed_axes)
    remaining = list(operands)
    while any(sum(axis in operand.axes for operand in remaining) > 1 for axis in unshared_axes):
        pairs = [
            (i, j)
            for j, second in enumerate(remaining)
            for i, first in enumerate(remaining[:j])
            if set(first.axes) & set(second.axes)
        ]

        def remaining_axes(pair: tuple[int, int]) -> list[Axis]:
            first, second = (remaining[i].axes for i in pair)  # noqa: B023
            rest = [o.axes for i, o in enumerate(remaining) if i not in pair]  # noqa: B023
            return _select_remaining_axes(first, second, rest, [*unshared_axes, *needed_axes])

        best = min(pairs, key=lambda pair: flat_size(remaining_axes(pair)))
        first, second = (remaining[i] for i in best)
        out_axes = remaining_axes(best)
        array = contract(first, [second], out_axes, precision=precision, cast=False)
        remaining = [o for i, o in enumerate(remaining) if i not in best]
        remaining.append(Operand(array, tuple(out_axes)))
    return remaining


def contraction_order(
    first_axes: Sequence[Axis], operand_axes: Sequence[Sequence[Axis]], out_axes: Sequence[Axis]
) -> list[tuple[int, list[Axis]]]:
    """Returns the order in which to contract operands, and the axes left after each.

    The operand that leaves the smallest result comes next. Operands that share no axis, whose
    product would be an outer product, come last.
    """
    order: list[tuple[int, list[Axis]]] = []
    current, remaining = list(first_axes), list(range(len(operand_axes)))
    while remaining:

        def remaining_axes(index: int) -> list[Axis]:
            rest = [operand_axes[other] for other in remaining if other != index]  # noqa: B023
            return _select_remaining_axes(current, operand_axes[index], rest, out_axes)  # noqa: B023

        best = min(
            remaining,
            key=lambda n: (not set(current) & set(operand_axes[n]), flat_size(remaining_axes(n))),
        )
        current, remaining = remaining_axes(best), [index for index in remaining if index != best]
        order.append((best, current))
    return order


def _select_remaining_axes(
    first_axes: Sequence[Axis],
    second_axes: Sequence[Axis],
    other_axes: Sequence[Sequence[Axis]],
    out_axes: Iterable[Axis],
) -> list[Axis]:
    """Returns the axes of a product of two operands that other operands or the result need."""
    needed = {axis for axes in other_axes for axis in axes} | set(out_axes)
    return [axis for axis in dict.fromkeys((*first_axes, *second_axes)) if axis in needed]


def _broadcast_to_axes(operand: Operand, out_axes: Sequence[Axis]) -> Any:
    """Broadcasts an operand, whose axes are some of `out_axes` in order, to all of them."""
    missing = [axis for axis, label in enumerate(out_axes) if label not in operand.axes]
    if not missing:
        return operand.array
    array = jnp.expand_dims(operand.array, missing)
    return jnp.broadcast_to(array, [label.size for label in out_axes])
