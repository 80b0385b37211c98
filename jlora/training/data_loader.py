"""Batches on devices: which rows a process fills, and where they lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._tree import PyTree
from jlora.training.data.batch_stream import (
    STREAM_START,
    BatchStream,
    ClassificationBatch,
    StreamBatch,
    StreamPosition,
)
from jlora.training.data.prefetch import PrefetchIterator, prefetch
from jlora.training.loop import DeviceBatch, average_loss_sums
from jlora.training.setup import Setup
from jlora.training.sharding import BATCH_AXES


def make_microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches, whose axes are passes and rows first."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch that devices of this process hold."""
    indices = (
        make_microbatch_sharding(mesh).addressable_devices_indices_map((1, batch_size)).values()
    )
    parts = [part[1].indices(batch_size) for part in indices if part is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def _place_batch_on_devices(
    mesh: Mesh, stream: BatchStream, positioned_batch: tuple[StreamPosition, StreamBatch]
) -> DeviceBatch:
    """A batch on the devices."""
    after, batch = positioned_batch
    first = stream.local_slice.indices(stream.config.batch_size)[0]
    sharding = make_microbatch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0], stream.config.batch_size, *array.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return array[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    held = batch.arrays
    tokens = int(
        np.count_nonzero(
            held.attention_mask if isinstance(held, ClassificationBatch) else held.segment_ids
        )
    )
    arrays = jax.tree.map(put, held)
    return DeviceBatch(
        arrays, batch.example_ids, (after.epoch, after.batch), after.batch == 0, tokens
    )


def prefetch_to_device(
    mesh: Mesh,
    stream: BatchStream,
    position: StreamPosition = STREAM_START,
    epochs: int | None = None,
) -> PrefetchIterator[DeviceBatch]:
    """The batches of a stream on the devices, made and sent ahead in a thread.

    Args:
        mesh: Of the devices.
        stream: Which fills the rows of `local_rows`.
        position: Where it goes on.
        epochs: Where it stops; never when None.
    """
    place = functools.partial(_place_batch_on_devices, mesh, stream)
    return prefetch(stream.batches(position, epochs=epochs), place)


def make_eval_fn(
    setup: Setup, stream: BatchStream
) -> Callable[[PyTree, Callable[[], bool]], dict[str, float] | None]:
    """A function from the trained arrays to the means over all examples of a stream.

    It asks what it is given between batches whether to give up, and then returns None.
    """

    def evaluate(trainable: PyTree, is_over: Callable[[], bool]) -> dict[str, float] | None:
        sums = []
        with prefetch_to_device(setup.mesh, stream, epochs=1) as ahead:
            for batch in ahead:
                if is_over():
                    return None
                sums.append(setup.eval_step(trainable, setup.frozen, batch.arrays))
                jax.block_until_ready(sums[-2:][0])  # No more than two batches are held at once.
        return average_loss_sums(sums)

    return evaluate


def make_test_fn(setup: Setup, stream: BatchStream) -> Callable[[PyTree], dict[str, float]]:
    """The same for one that never gives up."""
    evaluate = make_eval_fn(setup, stream)

    def test(trainable: PyTree) -> dict[str, float]:
        means = evaluate(trainable, lambda: False)
        assert means is not None
        return means

    return test
