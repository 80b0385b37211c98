"""The arrays of a batch, filled from the examples that were planned for its rows."""

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
    """How far a stream went: all that a checkpoint has to keep of it.

    Attributes:
        epoch: Which it is in, from 0.
        batch: The number of its next batch in it.
    """

    epoch: int = 0
    batch: int = 0


STREAM_START = StreamPosition()


class StreamBatch(NamedTuple):
    """The rows of one step, of one process.

    Attributes:
        arrays: With the leading axes (accumulate, rows).
        example_ids: For every row, in the same order, the source and number of its examples. They tell
            where a bad loss came from, and are not for devices.
    """

    arrays: LMBatch | ClassificationBatch
    example_ids: tuple[tuple[ExampleId, ...], ...]


class BatchStream:
    """Batches without end, each a function of the data, the options, the seed and its position.

    A stream that starts at any position gives what one that came there gives. Every process makes
    the same plan and fills its own rows of it.

    Attributes:
        fingerprint: Of everything that batches depend on, the number of processes aside. A run
            that goes on with another one would see some examples twice and others never.
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
        """Looks at the data and plans the first epoch.

        Args:
            datasets: The sources, all of one kind.
            config: The shape of batches.
            kind: What is learnt: to write, to prefer, or to tell labels.
            seed: Of all shuffles.
            weights: How often each source is gone through in an epoch; once when left out.
            shuffle: Whether to. Evaluation goes without.
            pad_token_id: The token of places without one.
            local_slice: Which of the rows this process fills; all when left out.

        Raises:
            ValueError: The data is not of that kind, an example is longer than a row, the weights
                leave no example for an epoch.
        """
        _check_dataset_kind(datasets, kind)
        if kind != "language":
            config = dataclasses.replace(config, packing=False)
        exact = weights_as_fractions(weights, len(datasets))
        sizes = [corpus.num_examples for corpus in datasets]
        # Where no source has an example for the first epoch, that has no batch; where one has, it
        # has one for every epoch.
        if all(weight * size < 1 for weight, size in zip(exact, sizes, strict=True)):
            raise ValueError(
                f"The sources' weights={list(weights or ())} take none of their {sizes} examples "
                f"in the first epoch, which has no batch then. Give one source a greater weight: "
                f"times its examples it has to be 1 or more."
            )
        self.config = config
        self._datasets = datasets
        self._kind = kind
        self._pad_token_id = pad_token_id
        self.local_slice = local_slice
        lengths = [corpus.example_lengths() for corpus in datasets]
        # An epoch is planned ahead while the one before is still asked for.
        self._cached_epoch_plan = functools.lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(
                lengths, config, seed=seed, epoch=epoch, weights=weights, shuffle=shuffle
            )
        )
        what = [
            kind,
            config,
            seed,
            exact,
            shuffle,
            pad_token_id,
            *(c.fingerprint for c in datasets),
        ]
        self.fingerprint = hashlib.sha256(repr(what).encode()).hexdigest()
        self._cached_epoch_plan(0)

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """Which examples make which batch of an epoch."""
        return self._cached_epoch_plan(epoch)

    def num_batches(self, epochs: int) -> int:
        """How many batches so many epochs have."""
        return sum(len(self._cached_epoch_plan(epoch)) for epoch in range(epochs))

    def batches(
        self, position: StreamPosition = STREAM_START, *, epochs: int | None = None
    ) -> Iterator[tuple[StreamPosition, StreamBatch]]:
        """The batches from a position on, each with the position after it.

        Args:
            position: Where to go on.
            epochs: Where to stop: after so many epochs from the first; never when None.

        Raises:
            ValueError: There is no such position.
        """
        epoch, first = position
        if epoch < 0 or not 0 <= first <= len(self._cached_epoch_plan(epoch)):
            raise ValueError(
                f"{position} is none of this data: its epoch has {len(self._cached_epoch_plan(max(epoch, 0)))} "
                f"batches. Go on with the data and options that it comes from."
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
        """The batch planned, in so far as it is this process's."""
        size = self.config.batch_size
        ids = tuple(
            row
            for start in range(0, len(planned_batch.example_ids), size)
            for row in planned_batch.example_ids[start : start + size][self.local_slice]
        )
        fill = build_classification_batch if self._kind == "classification" else build_lm_batch
        made = fill(self._datasets, planned_batch.seq_length, ids, self._pad_token_id)
        shape = (self.config.gradient_accumulation_steps, -1)
        return StreamBatch(type(made)(*(a.reshape(*shape, *a.shape[1:]) for a in made)), ids)


def _check_dataset_kind(datasets: Sequence[TokenizedDataset], kind: DatasetKind) -> None:
    if kind not in get_args(DatasetKind):
        raise ValueError(
            f"kind={kind!r} is none of {', '.join(get_args(DatasetKind))}. Choose one."
        )
    for number, corpus in enumerate(datasets):
        found = "preference" if corpus.sequences_per_example == 2 else "language"
        found = "classification" if corpus.labels is not None else found
        if found != kind:
            raise ValueError(
                f"kind={kind!r}, and source {number} is for {found}. Read it in another format, or "
                f"say kind={found!r}."
            )
    names = {corpus.label_names for corpus in datasets}
    if len(names) > 1:
        raise ValueError(
            f"The sources call their labels differently: {sorted(names, key=repr)}. Name them for "
            f"all: label_names, in a recipe classification.labels."
        )


class LMBatch(NamedTuple):
    """What a language model learns from, each (..., rows, length), or (..., rows, 2, length).

    The axis of 2 is there for preferences: the chosen, then the rejected.

    Attributes:
        tokens: int32, 0 (or the pad token) where there is none.
        targets: int32, the next token of the same example; 0 where there is none.
        loss_mask: float32, 1 where the loss counts how well the target is predicted.
        segment_ids: int32, which of the row's examples a token is of, from 1; 0 for padding.
        positions: int32, from 0 in every example.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class ClassificationBatch(NamedTuple):
    """What a classifier learns from.

    Attributes:
        tokens: int32 (..., rows, length).
        attention_mask: int32 (..., rows, length), 0 for padding.
        token_type_ids: int32 (..., rows, length), 1 in the second of a pair of texts.
        labels: int32 (..., rows).
        example_mask: float32 (..., rows), 0 for rows that fill the batch up.
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
    """The arrays of rows of examples, (rows, length), or (rows, 2, length) for preferences.

    Args:
        datasets: The sources.
        seq_length: Of every row.
        example_ids: The source and number of the examples of each.
        pad_token_id: The token of places without one.
    """
    pair = datasets[0].sequences_per_example
    made = LMBatch(
        tokens=np.full((len(example_ids) * pair, seq_length), pad_token_id, np.int32),
        targets=np.zeros((len(example_ids) * pair, seq_length), np.int32),
        loss_mask=np.zeros((len(example_ids) * pair, seq_length), np.float32),
        segment_ids=np.zeros((len(example_ids) * pair, seq_length), np.int32),
        positions=np.zeros((len(example_ids) * pair, seq_length), np.int32),
    )
    counted = np.arange(seq_length, dtype=np.int32)
    for number, examples in enumerate(example_ids):
        for half in range(pair):
            row = LMBatch(*(array[number * pair + half] for array in made))
            sequences = [datasets[source].get_sequence(i * pair + half) for source, i in examples]
            _write_packed_examples(row, sequences, counted)
    shape = (len(example_ids), seq_length) if pair == 1 else (len(example_ids), pair, seq_length)
    return LMBatch(*(array.reshape(shape) for array in made))


def _write_packed_examples(
    out: LMBatch, sequences: Sequence[tuple[np.ndarray, np.ndarray]], positions: np.ndarray
) -> None:
    start = 0
    for segment, (tokens, learn) in enumerate(sequences, start=1):
        end = start + len(tokens)
        out.tokens[start:end] = tokens
        out.targets[start : end - 1] = tokens[1:]
        out.loss_mask[start : end - 1] = learn[1:]
        out.segment_ids[start:end] = segment
        out.positions[start:end] = positions[: len(tokens)]
        start = end


def build_classification_batch(
    datasets: Sequence[TokenizedDataset],
    seq_length: int,
    example_ids: Sequence[Sequence[ExampleId]],
    pad_token_id: int,
) -> ClassificationBatch:
    """The arrays of rows of one labelled example each. Arguments as of `build_lm_batch`."""
    made = ClassificationBatch(
        tokens=np.full((len(example_ids), seq_length), pad_token_id, np.int32),
        attention_mask=np.zeros((len(example_ids), seq_length), np.int32),
        token_type_ids=np.zeros((len(example_ids), seq_length), np.int32),
        labels=np.zeros(len(example_ids), np.int32),
        example_mask=np.zeros(len(example_ids), np.float32),
    )
    for row, examples in enumerate(example_ids):
        for source, example in examples:
            corpus = datasets[source]
            tokens, _ = corpus.get_sequence(example)
            made.tokens[row, : len(tokens)] = tokens
            made.attention_mask[row, : len(tokens)] = 1
            if corpus.token_type_ids is not None:
                start = corpus.offsets[example]
                made.token_type_ids[row, : len(tokens)] = corpus.token_type_ids[
                    start : start + len(tokens)
                ]
            if corpus.labels is not None:
                made.labels[row] = corpus.labels[example]
            made.example_mask[row] = 1
    return made
