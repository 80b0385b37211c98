"""Searches compiled programs for products as large as a weight."""

from __future__ import annotations

import itertools
import re


def weight_shaped_products(
    hlo: str, shapes: set[tuple[int, ...]], *, with_slices: bool = True
) -> list[str]:
    """Products and scatters of a program whose result is as large as a weight (or one layer of a
    stack of them), however its axes are ordered and joined."""
    # Under a scan, the gradient of one layer is what would be formed.
    slices = [shape[1:] for shape in shapes if len(shape) > 2] if with_slices else []
    wanted = set().union(*(joined(shape) for shape in (*shapes, *slices)))
    found = []
    for line in hlo.splitlines():
        match = re.search(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        # The compiler may make a loop of a scatter, whose body updates the array row by row.
        updates = match and match[2] == "fusion" and "/scatter" in line
        if match and (updates or match[2] in ("dot", "convolution", "scatter", "custom-call")):
            dims = tuple(sorted(int(n) for n in match[1].split(",") if n and int(n) > 1))
            if dims in wanted:
                found.append(line.strip())
    return found


def joined(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """A shape's sorted lengths, and those of the shapes of two axes or more that come of joining
    its axes: the compiler multiplies matrices."""
    lengths = tuple(sorted(n for n in shape if n > 1))
    found = {lengths}
    if len(lengths) > 2:
        for pair in itertools.combinations(range(len(lengths)), 2):
            rest = [n for axis, n in enumerate(lengths) if axis not in pair]
            found |= joined((*rest, lengths[pair[0]] * lengths[pair[1]]))
    return found
