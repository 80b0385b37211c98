"""Puts batches on devices: local slices of a batch, and prefetching."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.training.data.batch_stream import (
    STREAM_START,
    BatchStream,
    ClassificationBatch,
    StreamBatch,
    StreamPosition,
)
from jlora.training.data.prefetch import PrefetchIterator, prefetch
from jlora.training.loop import DeviceBatch
from jlora.training.sharding import BATCH_AXES


def make_microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays (accumulation steps, batch, ...): split along the batch."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Returns the rows of a batch that the devices of this process hold."""
    indices = (
        make_microbatch_sharding(mesh).addressable_devices_indices_map((1, batch_size)).values()
    )
    parts = [part[1].indices(batch_size) for part in indices if part is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def prefetch_to_device(
    mesh: Mesh,
    stream: BatchStream,
    position: StreamPosition = STREAM_START,
    epochs: int | None = None,
) -> PrefetchIterator[DeviceBatch]:
    """Returns an iterator over the batches of a stream, which a thread puts on the devices.

    Args:
        mesh: Mesh of the devices.
        stream: Stream that yields the rows of `local_rows`.
        position: Position of the first batch.
        epochs: Number of epochs to iterate over; None: no end.
    """
    place = functools.partial(_place_batch_on_devices, mesh, stream)
    return prefetch(stream.batches(position, epochs=epochs), place)


def _place_batch_on_devices(
    mesh: Mesh, stream: BatchStream, positioned_batch: tuple[StreamPosition, StreamBatch]
) -> DeviceBatch:
    next_position, batch = positioned_batch
    first = stream.local_slice.indices(stream.config.batch_size)[0]
    sharding = make_microbatch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        # (accumulation steps, local batch, ...) is this process's part of the global shape.
        shape = (array.shape[0], stream.config.batch_size, *array.shape[2:])

        def get_shard(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return array[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, get_shard)

    arrays = batch.arrays
    is_token = (
        arrays.attention_mask if isinstance(arrays, ClassificationBatch) else arrays.segment_ids
    )
    return DeviceBatch(
        arrays=jax.tree.map(place, arrays),
        example_ids=batch.example_ids,
        next_position=(next_position.epoch, next_position.batch),
        ends_epoch=next_position.batch == 0,
        num_tokens=int(np.count_nonzero(is_token)),
    )
