"""An infinite, resumable stream of batches.

Batch i depends only on the data, the options, the seed and its position, so that a resumed run
continues exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jlora.training.data.packing import (
    BatchConfig,
    EpochPlan,
    ExampleId,
    PlannedBatch,
    plan_epoch,
    weights_as_fractions,
)
from jlora.training.data.tokenized_dataset import TokenizedDataset

DatasetKind = Literal["language", "preference", "classification"]


class StreamPosition(NamedTuple):
    """Position in a stream; all that a checkpoint has to store of it.

    Attributes:
        epoch: Epoch, from 0.
        batch: Number of the next batch in that epoch, from 0.

    Example:
        >>> from jlora.training import data
        >>> data.StreamPosition()
        StreamPosition(epoch=0, batch=0)
    """

    epoch: int = 0
    batch: int = 0


STREAM_START = StreamPosition()


class StreamBatch(NamedTuple):
    """Batch of one training step, as filled by one process.

    Attributes:
        arrays: Arrays with the leading axes (gradient accumulation steps, batch).
        example_ids: Source and number of the examples of every row, in the order of the rows. They
            trace a bad loss to its examples, and stay on the host.

    Example:
        >>> from jlora.training import data
        >>> from jlora.training.data import TokenizedDatasetBuilder, TokenSequence
        >>> tokenize = data.TokenizeConfig(max_seq_length=4)
        >>> builder = TokenizedDatasetBuilder(tokenize)
        >>> builder.add(0, TokenSequence([5, 6, 2], True))
        >>> config = data.BatchConfig(batch_size=1, seq_length=4)
        >>> _, batch = next(data.BatchStream([builder.build()], config).batches())
        >>> batch.example_ids
        (((0, 0),),)
    """

    arrays: LMBatch | ClassificationBatch
    example_ids: tuple[tuple[ExampleId, ...], ...]


class BatchStream:
    """Infinite batches, each a function of the data, the options, the seed and its position.

    A stream that starts at a position yields the same batches as one that arrived there. Every
    process builds the same plan and fills its own slice of the batch.

    Attributes:
        config: Shape of batches.
        local_slice: Rows of each batch that this process fills.
        fingerprint: Hash of everything that batches depend on, except the number of processes. A
            run that resumes with another one would see some examples twice and others never.

    Example:
        >>> from jlora.training import data
        >>> from jlora.training.data import TokenizedDatasetBuilder, TokenSequence
        >>> tokenize = data.TokenizeConfig(max_seq_length=4)
        >>> builder = TokenizedDatasetBuilder(tokenize)
        >>> for row in range(3):
        ...     builder.add(row, TokenSequence([5, 6 + row, 2], True))
        >>> config = data.BatchConfig(batch_size=2, seq_length=4, packing=False)
        >>> stream = data.BatchStream([builder.build()], config, seed=0)
        >>> position, batch = next(stream.batches())
        >>> position, batch.arrays.tokens.shape
        (StreamPosition(epoch=0, batch=1), (1, 2, 4))
    """

    def __init__(
        self,
        datasets: Sequence[TokenizedDataset],
        config: BatchConfig,
        *,
        kind: DatasetKind = "language",
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        pad_token_id: int = 0,
        local_slice: slice = slice(None),
    ) -> None:
        """Checks the data and plans the first epoch.

        Args:
            datasets: Sources, all of one kind.
            config: Shape of batches.
            kind: Task: "language" for next tokens, "preference" for pairs, "classification" for
                labels.
            seed: Random seed of all shuffles.
            weights: Passes through each source in an epoch; None: one.
            shuffle: True to shuffle; evaluation uses False.
            pad_token_id: Token id of padding.
            local_slice: Rows of each batch that this process fills; all by default.

        Raises:
            ValueError: If the data is not of that kind, an example is longer than a row, or the
                weights leave the first epoch without examples.
        """
        _check_dataset_kind(datasets, kind)
        if kind != "language":
            config = dataclasses.replace(config, packing=False)
        fractions = weights_as_fractions(weights, len(datasets))
        sizes = [dataset.num_examples for dataset in datasets]
        # A source with an example for the first epoch has one for every epoch.
        if all(weight * size < 1 for weight, size in zip(fractions, sizes, strict=True)):
            raise ValueError(
                f"weights={list(weights or ())} take none of the {sizes} examples of the sources "
                f"in the first epoch, which would have no batch. Increase one weight until weight "
                f"times examples is at least 1."
            )
        self.config = config
        self._datasets = datasets
        self._kind = kind
        self._pad_token_id = pad_token_id
        self.local_slice = local_slice
        lengths = [dataset.example_lengths() for dataset in datasets]
        # Two epochs: the next one is planned while batches of the previous one are still requested.
        self._cached_epoch_plan = functools.lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(
                lengths, config, seed=seed, epoch=epoch, weights=weights, shuffle=shuffle
            )
        )
        identity = [
            kind,
            config,
            seed,
            fractions,
            shuffle,
            pad_token_id,
            *(dataset.fingerprint for dataset in datasets),
        ]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._cached_epoch_plan(0)

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """Returns the assignment of examples to the batches of an epoch."""
        return self._cached_epoch_plan(epoch)

    def num_batches(self, epochs: int) -> int:
        """Returns the number of batches of the first `epochs` epochs."""
        return sum(len(self._cached_epoch_plan(epoch)) for epoch in range(epochs))

    def batches(
        self, position: StreamPosition = STREAM_START, *, epochs: int | None = None
    ) -> Iterator[tuple[StreamPosition, StreamBatch]]:
        """Yields the batches from a position on, each with the position after it.

        Args:
            position: Position of the first batch.
            epochs: Number of epochs, counted from the first one, after which the iterator ends;
                None: infinite.

        Raises:
            ValueError: If the position is outside its epoch.
        """
        epoch, first = position
        if epoch < 0 or not 0 <= first <= len(self._cached_epoch_plan(epoch)):
            num_batches = len(self._cached_epoch_plan(max(epoch, 0)))
            raise ValueError(
                f"{position} is outside of this data: its epoch has {num_batches} batches. Resume "
                f"with the data and options that the position comes from."
            )
        return self._iterate_from(epoch, first, epochs)

    def _iterate_from(
        self, epoch: int, first_batch: int, epochs: int | None
    ) -> Iterator[tuple[StreamPosition, StreamBatch]]:
        while epochs is None or epoch < epochs:
            plan = self._cached_epoch_plan(epoch)
            for number in range(first_batch, len(plan)):
                last = number + 1 == len(plan)
                after = StreamPosition(epoch + 1, 0) if last else StreamPosition(epoch, number + 1)
                yield after, self._build_batch(plan[number])
            epoch, first_batch = epoch + 1, 0

    def _build_batch(self, planned_batch: PlannedBatch) -> StreamBatch:
        """Returns this process's slice of a planned batch."""
        size = self.config.batch_size
        ids = tuple(
            row
            for start in range(0, len(planned_batch.example_ids), size)
            for row in planned_batch.example_ids[start : start + size][self.local_slice]
        )
        fill = build_classification_batch if self._kind == "classification" else build_lm_batch
        flat = fill(self._datasets, planned_batch.seq_length, ids, self._pad_token_id)
        shape = (self.config.gradient_accumulation_steps, -1)
        return StreamBatch(type(flat)(*(a.reshape(*shape, *a.shape[1:]) for a in flat)), ids)


def _check_dataset_kind(datasets: Sequence[TokenizedDataset], kind: DatasetKind) -> None:
    if kind not in get_args(DatasetKind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(DatasetKind))}.")
    for number, dataset in enumerate(datasets):
        actual = "preference" if dataset.sequences_per_example == 2 else "language"
        actual = "classification" if dataset.labels is not None else actual
        if actual != kind:
            raise ValueError(
                f"kind={kind!r} must be the kind of all sources, but source {number} is for "
                f"{actual}. Tokenize it with another format, or use kind={actual!r}."
            )
    names = {dataset.label_names for dataset in datasets}
    if len(names) > 1:
        raise ValueError(
            f"The sources have different label names: {sorted(names, key=repr)}. Give all of them "
            f"the same label_names (classification.labels of a recipe)."
        )


class LMBatch(NamedTuple):
    """Batch for a language model: arrays of (..., batch, length), or (..., batch, 2, length).

    Preference data has the axis of 2: the chosen answer, then the rejected one.

    Attributes:
        tokens: int32 token ids; the pad token in padding.
        targets: int32 ids of the next token of the same example; 0 if there is none.
        loss_mask: float32, 1 where the target counts for the loss.
        segment_ids: int32 number of a token's example within its row, from 1; 0 for padding.
        positions: int32 positions, from 0 in every example.

    Example:
        >>> from jlora.training import data
        >>> from jlora.training.data import TokenizedDatasetBuilder, TokenSequence
        >>> tokenize = data.TokenizeConfig(max_seq_length=4)
        >>> builder = TokenizedDatasetBuilder(tokenize)
        >>> builder.add(0, TokenSequence([5, 6, 2], True))
        >>> config = data.BatchConfig(batch_size=1, seq_length=4)
        >>> _, batch = next(data.BatchStream([builder.build()], config).batches())
        >>> batch.arrays.targets.tolist(), batch.arrays.loss_mask.tolist()
        ([[[6, 2, 0, 0]]], [[[1.0, 1.0, 0.0, 0.0]]])
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class ClassificationBatch(NamedTuple):
    """Batch for a classifier.

    Attributes:
        tokens: int32 (..., batch, length) token ids.
        attention_mask: int32 (..., batch, length), 0 for padding.
        token_type_ids: int32 (..., batch, length), 1 in the second of a pair of texts.
        labels: int32 (..., batch) class ids.
        example_mask: float32 (..., batch), 0 for empty rows that complete the batch.

    Example:
        >>> from jlora.training import data
        >>> data.ClassificationBatch._fields
        ('tokens', 'attention_mask', 'token_type_ids', 'labels', 'example_mask')
    """

    tokens: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray
    example_mask: np.ndarray


def build_lm_batch(
    datasets: Sequence[TokenizedDataset],
    seq_length: int,
    example_ids: Sequence[Sequence[ExampleId]],
    pad_token_id: int,
) -> LMBatch:
    """Returns packed rows as arrays (batch, length), or (batch, 2, length) for preferences.

    Args:
        datasets: Sources.
        seq_length: Tokens of every row.
        example_ids: Source and number of the examples of each row.
        pad_token_id: Token id of padding.
    """
    pair = datasets[0].sequences_per_example
    shape = (len(example_ids) * pair, seq_length)  # (batch * sequences, length)
    batch = LMBatch(
        tokens=np.full(shape, pad_token_id, np.int32),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    positions = np.arange(seq_length, dtype=np.int32)
    for number, examples in enumerate(example_ids):
        for half in range(pair):
            row = LMBatch(*(array[number * pair + half] for array in batch))
            sequences = [datasets[source].get_sequence(i * pair + half) for source, i in examples]
            _write_packed_examples(row, sequences, positions)
    shape = (len(example_ids), seq_length) if pair == 1 else (len(example_ids), pair, seq_length)
    return LMBatch(*(array.reshape(shape) for array in batch))


def _write_packed_examples(
    out: LMBatch, sequences: Sequence[tuple[np.ndarray, np.ndarray]], positions: np.ndarray
) -> None:
    """Writes the sequences one after another into a row of (length,) arrays."""
    start = 0
    for segment, (tokens, loss_mask) in enumerate(sequences, start=1):
        end = start + len(tokens)
        out.tokens[start:end] = tokens
        out.targets[start : end - 1] = tokens[1:]
        out.loss_mask[start : end - 1] = loss_mask[1:]
        out.segment_ids[start:end] = segment
        out.positions[start:end] = positions[: len(tokens)]
        start = end


def build_classification_batch(
    datasets: Sequence[TokenizedDataset],
    seq_length: int,
    example_ids: Sequence[Sequence[ExampleId]],
    pad_token_id: int,
) -> ClassificationBatch:
    """Returns arrays of one labeled example per row. Arguments as in `build_lm_batch`."""
    shape = (len(example_ids), seq_length)
    batch = ClassificationBatch(
        tokens=np.full(shape, pad_token_id, np.int32),
        attention_mask=np.zeros(shape, np.int32),
        token_type_ids=np.zeros(shape, np.int32),
        labels=np.zeros(len(example_ids), np.int32),
        example_mask=np.zeros(len(example_ids), np.float32),
    )
    for row, examples in enumerate(example_ids):
        for source, example in examples:
            dataset = datasets[source]
            tokens, _ = dataset.get_sequence(example)
            size = len(tokens)
            batch.tokens[row, :size] = tokens
            batch.attention_mask[row, :size] = 1
            if dataset.token_type_ids is not None:
                start = dataset.offsets[example]
                batch.token_type_ids[row, :size] = dataset.token_type_ids[start : start + size]
            if dataset.labels is not None:
                batch.labels[row] = dataset.labels[example]
            batch.example_mask[row] = 1
    return batch
