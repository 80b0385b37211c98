"""Arrays of an adapter as PEFT lays them out, in both directions, each as a pair of short texts.

A text names the axes of an array in their order:

    i  the weight's inputs, as the leaf orders them      r, q, x, y, v, n  axes of the array's own
    c  its inputs but a convolution's window             u  an axis of length one
    w  the window's axes                                 1  as many of those as the window has
    o  its outputs                                       *  between axes that are flattened into one
    e  stacked weights that one tensor holds: experts

`c`, `o` and `e` are one axis of a tensor of torch, however many axes the Flax weight has for them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.factored.probe import Axes


class Layout(NamedTuple):
    """One array of a leaf.

    Attributes:
        leaf: Its axes there, without those of stacks that have a tensor for each entry.
        file: Those of the tensor.
    """

    leaf: str
    file: str


class Facts(NamedTuple):
    """The weight that an array belongs to.

    Attributes:
        shape: The weight's.
        axes: What each of its axes does.
        window: Those that a convolution slides over.
        inside: Those of the stacked axes that one tensor holds.
    """

    shape: tuple[int, ...]
    axes: Axes
    window: tuple[int, ...]
    inside: tuple[int, ...]


def to_leaf(tensor: np.ndarray, layout: Layout, facts: Facts) -> np.ndarray:
    """The tensor as the leaf lays it out.

    Raises:
        ValueError: Its shape is not one that the layout can have.
    """
    groups = _file_groups(layout.file, facts)
    sizes = _sizes(tensor.shape, groups, facts)
    parts = tensor.reshape([sizes[atom] for group in groups for atom in group])
    order = [atom for group in groups for atom in group]
    wanted = _leaf_atoms(layout.leaf, facts)
    kept = parts.reshape([sizes[atom] for atom in order if atom in wanted])
    order = [atom for atom in order if atom in wanted]
    return kept.transpose([order.index(atom) for atom in wanted])


def to_file(array: np.ndarray, layout: Layout, facts: Facts) -> np.ndarray:
    """The inverse of `to_leaf`."""
    atoms = _leaf_atoms(layout.leaf, facts)
    sizes = dict(zip(atoms, array.shape, strict=True))
    groups = _file_groups(layout.file, facts)
    order = [atom for group in groups for atom in group if atom in sizes]
    turned = array.transpose([atoms.index(atom) for atom in order])
    return turned.reshape([math.prod(sizes.get(atom, 1) for atom in group) for group in groups])


def _atoms(token: str, facts: Facts) -> list[Hashable]:
    """What one letter stands for: numbers of the weight's axes, or names."""
    inputs = facts.axes.inputs
    known: dict[str, Sequence[Hashable]] = {
        "i": inputs,
        "c": [axis for axis in inputs if axis not in facts.window],
        "w": facts.window,
        "o": facts.axes.outputs,
        "e": facts.inside,
        "1": [("one", axis) for axis in facts.window],
        "u": [("one", "u")],
    }
    return list(known.get(token, [token]))


def _leaf_atoms(text: str, facts: Facts) -> list[Hashable]:
    return [atom for token in text.split() for atom in _atoms(token, facts)]


def _file_groups(text: str, facts: Facts) -> list[list[Hashable]]:
    """The axes of a tensor, each as what it holds, slowest first."""
    groups: list[list[Hashable]] = []
    for token in text.split():
        if token in ("w", "1"):
            groups += [[atom] for atom in _atoms(token, facts)]
        else:
            groups.append([atom for part in token.split("*") for atom in _atoms(part, facts)])
    return groups


def _sizes(
    shape: tuple[int, ...], groups: list[list[Hashable]], facts: Facts
) -> dict[Hashable, int]:
    """The length of every part of a tensor of this shape.

    Raises:
        ValueError: It is not one.
    """
    sizes: dict[Hashable, int] = {}

    def length(atom: Hashable) -> int | None:
        if isinstance(atom, int):
            return facts.shape[atom]
        return 1 if isinstance(atom, tuple) else sizes.get(atom)

    expected: list[Any] = []
    for size, group in zip(shape, groups, strict=False):
        unknown = [atom for atom in group if length(atom) is None]
        known = math.prod(length(atom) or 1 for atom in group)
        if len(unknown) == 1 and size and size % known == 0:
            sizes[unknown[0]] = size // known
        expected.append(known if not unknown else f"a multiple of {known}" if known > 1 else "any")
    expected += ["any"] * (len(groups) - len(shape))
    found = [math.prod(length(atom) or 0 for atom in group) for group in groups]
    if len(shape) != len(groups) or list(shape) != found:
        turned = len(shape) == 2 and expected == ["any", shape[0]]
        hint = " It looks transposed" if turned or list(shape[::-1]) == found else ""
        wanted = f"({', '.join(map(str, expected))})"
        raise ValueError(f"has shape {shape} instead of {wanted}.{hint}".rstrip("."))
    return {atom: length(atom) or 1 for group in groups for atom in group}
