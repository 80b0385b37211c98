"""How arrays are split over the devices of a mesh, where they may not divide evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding


def ways(entry: Any, mesh: Any) -> int:
    """Into how many parts the mesh axes of one entry of a spec split an axis."""
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names)


def fitting(where: Sharding, shape: Sequence[int]) -> Sharding:
    """The same place for an array of another shape: axes that do not divide are whole."""
    if not isinstance(where, NamedSharding):
        return where
    entries = zip(shape, [*where.spec, *[None] * len(shape)], strict=False)
    kept = [None if n % ways(entry, where.mesh) else entry for n, entry in entries]
    return NamedSharding(where.mesh, PartitionSpec(*kept))
