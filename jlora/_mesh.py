"""Shardings of arrays: shard counts, shardings for other shapes, and gathering over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def num_shards(spec_entry: Any, mesh: Any) -> int:
    """Returns the number of shards that one entry of a partition spec makes of an axis.

    Args:
        spec_entry: Mesh axis, tuple of mesh axes, or None for an axis that is not sharded.
        mesh: Mesh that has these axes.
    """
    axis_names = (
        () if spec_entry is None else spec_entry if isinstance(spec_entry, tuple) else (spec_entry,)
    )
    return math.prod(mesh.shape[name] for name in axis_names)


def fit_sharding(sharding: Sharding, shape: Sequence[int]) -> Sharding:
    """Returns a sharding for an array of another shape.

    Axes whose length is not divisible by the number of shards are not sharded.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = zip(shape, [*sharding.spec, *[None] * len(shape)], strict=False)
    spec = [
        None if length % num_shards(entry, sharding.mesh) else entry for length, entry in entries
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def fetch_global(array: Any) -> np.ndarray:
    """Gathers an array from all processes to this host.

    Every process must call it.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array))
