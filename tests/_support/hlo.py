"""Searches compiled programs for products of the size of a weight."""

from __future__ import annotations

import itertools
import re


def weight_shaped_products(
    hlo: str, shapes: set[tuple[int, ...]], *, with_slices: bool = True
) -> list[str]:
    """Returns products and scatters whose result has the size of a weight.

    The axes of the result may be in any order and merged. For a stack of layers, the size of one
    layer counts too, because a scan would form the gradient of one layer at a time.

    Args:
        hlo: Text of the compiled program.
        shapes: Shapes of the weights.
        with_slices: Whether the size of one layer of a stack counts.
    """
    slices = [shape[1:] for shape in shapes if len(shape) > 2] if with_slices else []
    weight_dims = set().union(*(joined(shape) for shape in (*shapes, *slices)))
    products = []
    for line in hlo.splitlines():
        match = re.search(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        # The compiler may convert a scatter into a loop that updates the array row by row.
        updates = match and match[2] == "fusion" and "/scatter" in line
        if match and (updates or match[2] in ("dot", "convolution", "scatter", "custom-call")):
            dims = tuple(sorted(int(n) for n in match[1].split(",") if n and int(n) > 1))
            if dims in weight_dims:
                products.append(line.strip())
    return products


def joined(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Returns the sorted lengths of a shape, and of all shapes with two or more axes after merging.

    The compiler merges axes into those of matrices.
    """
    lengths = tuple(sorted(n for n in shape if n > 1))
    merged = {lengths}
    if len(lengths) > 2:
        for pair in itertools.combinations(range(len(lengths)), 2):
            rest = [n for axis, n in enumerate(lengths) if axis not in pair]
            merged |= joined((*rest, lengths[pair[0]] * lengths[pair[1]]))
    return merged
