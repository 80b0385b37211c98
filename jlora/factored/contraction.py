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
class Atom:
    """One axis that is never torn further: equal only to itself.

    Attributes:
        size: Its length.
        root: The axis of the original weight that it is (a part of), if any.
        indexed: Whether it runs over looked-up rows of the root rather than over the root.
    """

    size: int
    root: int | None = None
    indexed: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["atoms"])
@dataclasses.dataclass(frozen=True)
class Operand:
    """An array whose axes are atoms."""

    array: Any
    atoms: tuple[Atom, ...]

    def map(self, fn: Callable[[Any], Any]) -> Operand:
        return Operand(fn(self.array), self.atoms)


def size(atoms: Sequence[Atom]) -> int:
    """The number of indices that the atoms make together."""
    return math.prod(atom.size for atom in atoms)


def contract(
    first: Operand,
    others: Sequence[Operand],
    out: Sequence[Atom],
    *,
    precision: Any = None,
    out_dtype: Any = None,
    cast: bool = True,
) -> Any:
    """The product of all operands, summed over every atom that is not in `out`.

    Starts at `first` (an activation) and absorbs one operand at a time, always the one that leaves
    the smallest result, so `x A B` goes through the rank and never forms `A B`. Operands are cast
    to `first`'s type unless `cast` is off; `out_dtype` is the type of the last product.
    """
    labels: dict[Atom, int] = {}

    def ids(atoms: Sequence[Atom]) -> list[int]:
        return [labels.setdefault(atom, len(labels)) for atom in atoms]

    # What is summed over, and what the operands bring: not what passes through.
    alone = set(first.atoms) ^ set(out)
    remaining = fused(others, alone, {*first.atoms, *out}, precision)
    order = absorption(first.atoms, [operand.atoms for operand in remaining], out)
    current = first
    for position, (number, kept) in enumerate(order, 1):
        last, following = position == len(order), remaining[number]
        if last:
            kept = [atom for atom in out if atom in kept]
        product = jnp.einsum(
            current.array,
            ids(current.atoms),
            following.array.astype(current.array.dtype) if cast else following.array,
            ids(following.atoms),
            ids(kept),
            precision=precision,
            preferred_element_type=out_dtype if last else None,
        )
        current = Operand(product, tuple(kept))
    if not others:
        present = [atom for atom in out if atom in current.atoms]
        array = jnp.einsum(current.array, ids(current.atoms), ids(present))
        current = Operand(array.astype(out_dtype or array.dtype), tuple(present))
    return _spread(current, out)


def fused(
    operands: Sequence[Operand],
    alone: Iterable[Atom],
    kept: Iterable[Atom],
    precision: Any = None,
) -> list[Operand]:
    """The operands, multiplied with one another until each of `alone` is in one of them only.

    Where several operands share an axis of the weight (a Hadamard product), an activation has to
    meet their product: with one after the other it would keep that axis between them, or make it
    before the last of them is absorbed. The pair with the smallest result goes first.

    Args:
        operands: Factors of one product.
        alone: Atoms that no two operands shall share.
        kept: Atoms that something else than these operands still needs.
        precision: Of the products.
    """
    alone, kept = set(alone), set(kept)
    remaining = list(operands)
    while any(sum(atom in operand.atoms for operand in remaining) > 1 for atom in alone):
        pairs = [
            (i, j)
            for j, second in enumerate(remaining)
            for i, first in enumerate(remaining[:j])
            if set(first.atoms) & set(second.atoms)
        ]

        def left(pair: tuple[int, int]) -> list[Atom]:
            first, second = (remaining[i].atoms for i in pair)  # noqa: B023
            rest = [o.atoms for i, o in enumerate(remaining) if i not in pair]  # noqa: B023
            return _kept(first, second, rest, [*alone, *kept])

        best = min(pairs, key=lambda pair: size(left(pair)))
        first, second = (remaining[i] for i in best)
        out = left(best)
        array = contract(first, [second], out, precision=precision, cast=False)
        remaining = [o for i, o in enumerate(remaining) if i not in best]
        remaining.append(Operand(array, tuple(out)))
    return remaining


def absorption(
    first: Sequence[Atom], operands: Sequence[Sequence[Atom]], out: Sequence[Atom]
) -> list[tuple[int, list[Atom]]]:
    """In which order to absorb operands, and the atoms that are left after each.

    Always next is what leaves the smallest result, but for an operand that shares no atom: with it
    the result would be an outer product.
    """
    order: list[tuple[int, list[Atom]]] = []
    current, remaining = list(first), list(range(len(operands)))
    while remaining:

        def left(number: int) -> list[Atom]:
            rest = [operands[other] for other in remaining if other != number]  # noqa: B023
            return _kept(current, operands[number], rest, out)  # noqa: B023

        best = min(remaining, key=lambda n: (not set(current) & set(operands[n]), size(left(n))))
        current, remaining = left(best), [number for number in remaining if number != best]
        order.append((best, current))
    return order


def _kept(
    a: Sequence[Atom], b: Sequence[Atom], rest: Sequence[Sequence[Atom]], out: Iterable[Atom]
) -> list[Atom]:
    """The atoms of a product of two that `rest` or the result still needs."""
    needed = {atom for atoms in rest for atom in atoms} | set(out)
    return [atom for atom in dict.fromkeys((*a, *b)) if atom in needed]


def _spread(operand: Operand, out: Sequence[Atom]) -> Any:
    """Repeats the operand, whose atoms are some of `out` in order, along those it lacks."""
    missing = [axis for axis, atom in enumerate(out) if atom not in operand.atoms]
    if not missing:
        return operand.array
    array = jnp.expand_dims(operand.array, missing)
    return jnp.broadcast_to(array, [atom.size for atom in out])
