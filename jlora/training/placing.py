"""Batches on devices: which rows a process fills, and where they lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.training import mesh as meshes
from jlora.training.data.arrays import Classes
from jlora.training.data.batches import START, Batch, Position, Stream
from jlora.training.data.prefetching import Prefetch, prefetch
from jlora.training.loop import Placed, means_of
from jlora.training.setup import Setup

PyTree = Any


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches, whose axes are passes and rows first."""
    return NamedSharding(mesh, PartitionSpec(None, meshes.BATCH))


def rows_here(mesh: Mesh, rows: int) -> slice:
    """The rows of a batch that devices of this process hold."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, rows)).values()
    parts = [part[1].indices(rows) for part in indices if part is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def _placed(mesh: Mesh, stream: Stream, given: tuple[Position, Batch]) -> Placed:
    """A batch on the devices."""
    after, batch = given
    first = stream.mine.indices(stream.batching.rows)[0]
    sharding = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0], stream.batching.rows, *array.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return array[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    held = batch.arrays
    tokens = int(np.count_nonzero(held.mask if isinstance(held, Classes) else held.segments))
    arrays = jax.tree.map(put, held)
    return Placed(arrays, batch.ids, (after.epoch, after.batch), after.batch == 0, tokens)


def placed_ahead(
    mesh: Mesh, stream: Stream, position: Position = START, epochs: int | None = None
) -> Prefetch[Placed]:
    """The batches of a stream on the devices, made and sent ahead in a thread.

    Args:
        mesh: Of the devices.
        stream: Which fills the rows of `rows_here`.
        position: Where it goes on.
        epochs: Where it stops; never when None.
    """
    place = functools.partial(_placed, mesh, stream)
    return prefetch(stream.batches(position, epochs=epochs), place)


def evaluation(
    setup: Setup, stream: Stream
) -> Callable[[PyTree, Callable[[], bool]], dict[str, float] | None]:
    """A function from the trained arrays to the means over all examples of a stream.

    It asks what it is given between batches whether to give up, and then returns None.
    """

    def evaluate(trained: PyTree, is_over: Callable[[], bool]) -> dict[str, float] | None:
        sums = []
        with placed_ahead(setup.mesh, stream, epochs=1) as ahead:
            for batch in ahead:
                if is_over():
                    return None
                sums.append(setup.evaluate(trained, setup.frozen, batch.arrays))
                jax.block_until_ready(sums[-2:][0])  # No more than two batches are held at once.
        return means_of(sums)

    return evaluate


def test_of(setup: Setup, stream: Stream) -> Callable[[PyTree], dict[str, float]]:
    """The same for one that never gives up."""
    evaluate = evaluation(setup, stream)

    def test(trained: PyTree) -> dict[str, float]:
        means = evaluate(trained, lambda: False)
        assert means is not None
        return means

    return test
