"""Arrays whose axes carry labels (atoms), and products of several of them."""

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
    """One axis that is never torn further: equal only to itself.

    Attributes:
        size: Its length.
        weight_axis: The axis of the original weight that it is (a part of), if any.
        is_gathered: Whether it runs over looked-up rows of the root rather than over the root.
    """

    size: int
    weight_axis: int | None = None
    is_gathered: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Operand:
    """An array whose axes are atoms."""

    array: Any
    axes: tuple[Axis, ...]

    def map(self, fn: Callable[[Any], Any]) -> Operand:
        return Operand(fn(self.array), self.axes)


def flat_size(axes: Sequence[Axis]) -> int:
    """The number of indices that the atoms make together."""
    return math.prod(atom.size for atom in axes)


def contract(
    first: Operand,
    others: Sequence[Operand],
    out_axes: Sequence[Axis],
    *,
    precision: Any = None,
    out_dtype: Any = None,
    cast: bool = True,
) -> Any:
    """The product of all operands, summed over every atom that is not in `out_axes`.

    Starts at `first` (an activation) and absorbs one operand at a time, always the one that leaves
    the smallest result, so `x A B` goes through the rank and never forms `A B`. Operands are cast
    to `first`'s type unless `cast` is off; `out_dtype` is the type of the last product.
    """
    labels: dict[Axis, int] = {}

    def ids(atoms: Sequence[Axis]) -> list[int]:
        return [labels.setdefault(atom, len(labels)) for atom in atoms]

    # What is summed over, and what the operands bring: not what passes through.
    alone = set(first.axes) ^ set(out_axes)
    remaining = contract_shared(others, alone, {*first.axes, *out_axes}, precision)
    order = contraction_order(first.axes, [operand.axes for operand in remaining], out_axes)
    current = first
    for position, (number, kept) in enumerate(order, 1):
        last, following = position == len(order), remaining[number]
        if last:
            kept = [atom for atom in out_axes if atom in kept]
        product = jnp.einsum(
            current.array,
            ids(current.axes),
            following.array.astype(current.array.dtype) if cast else following.array,
            ids(following.axes),
            ids(kept),
            precision=precision,
            preferred_element_type=out_dtype if last else None,
        )
        current = Operand(product, tuple(kept))
    if not others:
        present = [atom for atom in out_axes if atom in current.axes]
        array = jnp.einsum(current.array, ids(current.axes), ids(present))
        current = Operand(array.astype(out_dtype or array.dtype), tuple(present))
    return _broadcast_to_axes(current, out_axes)


def contract_shared(
    operands: Sequence[Operand],
    unshared_axes: Iterable[Axis],
    needed_axes: Iterable[Axis],
    precision: Any = None,
) -> list[Operand]:
    """The operands, multiplied with one another until each of `unshared_axes` is in one of them only.

    Where several operands share an axis of the weight (a Hadamard product), an activation has to
    meet their product: with one after the other it would keep that axis between them, or make it
    before the last of them is absorbed. The pair with the smallest result goes first.

    Args:
        operands: Factors of one product.
        unshared_axes: Atoms that no two operands shall share.
        needed_axes: Atoms that something else than these operands still needs.
        precision: Of the products.
    """
    unshared_axes, needed_axes = set(unshared_axes), set(needed_axes)
    remaining = list(operands)
    while any(sum(atom in operand.axes for operand in remaining) > 1 for atom in unshared_axes):
        pairs = [
            (i, j)
            for j, second in enumerate(remaining)
            for i, first in enumerate(remaining[:j])
            if set(first.axes) & set(second.axes)
        ]

        def left(pair: tuple[int, int]) -> list[Axis]:
            first, second = (remaining[i].axes for i in pair)  # noqa: B023
            rest = [o.axes for i, o in enumerate(remaining) if i not in pair]  # noqa: B023
            return _select_remaining_axes(first, second, rest, [*unshared_axes, *needed_axes])

        best = min(pairs, key=lambda pair: flat_size(left(pair)))
        first, second = (remaining[i] for i in best)
        out = left(best)
        array = contract(first, [second], out, precision=precision, cast=False)
        remaining = [o for i, o in enumerate(remaining) if i not in best]
        remaining.append(Operand(array, tuple(out)))
    return remaining


def contraction_order(
    first_axes: Sequence[Axis], operand_axes: Sequence[Sequence[Axis]], out_axes: Sequence[Axis]
) -> list[tuple[int, list[Axis]]]:
    """In which order to absorb operands, and the atoms that are left after each.

    Always next is what leaves the smallest result, but for an operand that shares no atom: with it
    the result would be an outer product.
    """
    order: list[tuple[int, list[Axis]]] = []
    current, remaining = list(first_axes), list(range(len(operand_axes)))
    while remaining:

        def left(number: int) -> list[Axis]:
            rest = [operand_axes[other] for other in remaining if other != number]  # noqa: B023
            return _select_remaining_axes(current, operand_axes[number], rest, out_axes)  # noqa: B023

        best = min(
            remaining, key=lambda n: (not set(current) & set(operand_axes[n]), flat_size(left(n)))
        )
        current, remaining = left(best), [number for number in remaining if number != best]
        order.append((best, current))
    return order


def _select_remaining_axes(
    first_axes: Sequence[Axis],
    second_axes: Sequence[Axis],
    other_axes: Sequence[Sequence[Axis]],
    out_axes: Iterable[Axis],
) -> list[Axis]:
    """The atoms of a product of two that `other_axes` or the result still needs."""
    needed = {atom for atoms in other_axes for atom in atoms} | set(out_axes)
    return [atom for atom in dict.fromkeys((*first_axes, *second_axes)) if atom in needed]


def _broadcast_to_axes(operand: Operand, out_axes: Sequence[Axis]) -> Any:
    """Repeats the operand, whose atoms are some of `out_axes` in order, along those it lacks."""
    missing = [axis for axis, atom in enumerate(out_axes) if atom not in operand.axes]
    if not missing:
        return operand.array
    array = jnp.expand_dims(operand.array, missing)
    return jnp.broadcast_to(array, [atom.size for atom in out_axes])
