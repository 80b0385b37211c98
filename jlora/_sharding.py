"""Arrays whose parts several processes hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def num_shards(spec_entry: Any, mesh: Any) -> int:
    """Into how many parts the mesh axes of one entry of a spec split an axis."""
    names = (
        () if spec_entry is None else spec_entry if isinstance(spec_entry, tuple) else (spec_entry,)
    )
    return math.prod(mesh.shape[name] for name in names)


def fit_sharding(sharding: Sharding, shape: Sequence[int]) -> Sharding:
    """The same place for an array of another shape: axes that do not divide are whole."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = zip(shape, [*sharding.spec, *[None] * len(shape)], strict=False)
    kept = [None if n % num_shards(entry, sharding.mesh) else entry for n, entry in entries]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def fetch_global(array: Any) -> np.ndarray:
    """All of an array, whichever process holds its parts; all of them have to ask for it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array))
