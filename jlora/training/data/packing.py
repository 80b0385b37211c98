"""Which examples make which batch: a function of lengths, options, a seed and the epoch alone."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Examples are packed among so many of the shuffled ones, the longest first. A greater window fills
# the rows no better.
PACKING_WINDOW = 8192

# What a draw is for; no two share a key.
_SHUFFLE_SOURCE, _SHUFFLE_EXAMPLES, _SHUFFLE_ROWS, _SHUFFLE_BATCHES = range(4)

ExampleId = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The shape of batches.

    Attributes:
        batch_size: Of a batch that goes through the model at once, over all processes.
        seq_length: Tokens of a row.
        gradient_accumulation_steps: How many of those one step takes one after another.
        packing: Whether a row holds as many examples as it has room for. Preferences and
            classified texts never share rows.
        buckets: Without packing, the lengths that rows are filled up to, growing up to `seq_length`:
            an example goes to the first that holds it. `(length,)` when left out.
    """

    batch_size: int
    seq_length: int
    gradient_accumulation_steps: int = 1
    packing: bool = True
    buckets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_length", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Batching.{name}={value} is no count. Give 1 or more.")
        if self.buckets is None:
            return
        if self.packing:
            raise ValueError(
                f"Batching.buckets={self.buckets} are lengths of rows of one example, and "
                f"packing=True fills rows with several. Leave out one of them."
            )
        growing = all(a < b for a, b in itertools.pairwise((0, *self.buckets)))
        if not growing or self.buckets[-1:] != (self.seq_length,):
            raise ValueError(
                f"Batching.buckets={self.buckets} do not grow up to length={self.seq_length}. Give "
                f"growing lengths, of which that is the last."
            )

    @property
    def effective_batch_size(self) -> int:
        """The rows of one step."""
        return self.batch_size * self.gradient_accumulation_steps


class PlannedBatch(NamedTuple):
    """One batch.

    Attributes:
        seq_length: Tokens of a row.
        example_ids: For each row the source and the number of every example in it; none in empty rows.
    """

    seq_length: int
    example_ids: tuple[tuple[ExampleId, ...], ...]


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch, in flat arrays.

    Attributes:
        sources: Of every example, row by row.
        examples: Its number in the source.
        starts: (rows + 1,), where each row's examples start; empty rows hold none.
        seq_lengths: (batches,), tokens of a batch's rows.
        effective_batch_size: Rows of a batch.
    """

    sources: np.ndarray
    examples: np.ndarray
    starts: np.ndarray
    seq_lengths: np.ndarray
    effective_batch_size: int

    def __len__(self) -> int:
        return len(self.seq_lengths)

    def __getitem__(self, index: int) -> PlannedBatch:
        """The batch of that number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.effective_batch_size
        bounds = self.starts[first : first + self.effective_batch_size + 1].tolist()
        rows = (self._row_example_ids(*both) for both in itertools.pairwise(bounds))
        return PlannedBatch(int(self.seq_lengths[index]), tuple(rows))

    def _row_example_ids(self, start: int, end: int) -> tuple[ExampleId, ...]:
        sources, examples = self.sources[start:end].tolist(), self.examples[start:end].tolist()
        return tuple(zip(sources, examples, strict=True))


def plan_epoch(
    lengths: Sequence[np.ndarray],
    config: BatchConfig,
    *,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    shuffle: bool = True,
) -> EpochPlan:
    """The batches of one epoch. The last of each length is filled up with empty rows.

    A source of weight w is gone through w times an epoch: of weight 2 twice, of weight 0.1 a tenth
    of it in each of ten epochs. Every time it was seen whole, it is shuffled anew.

    Args:
        lengths: For every source, the tokens of its examples.
        config: The shape of batches.
        seed: 0 or more. Of equal ones, everything else equal, the plans are equal.
        epoch: From 0.
        weights: Of the sources; 1 when left out.
        shuffle: Whether to. Without, sources and examples come in their order.

    Raises:
        ValueError: An example is longer than a row, or a weight is no positive number.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is no seed. Give a whole number from 0 to 2**63 - 1.")
    _check_example_lengths(lengths, config)
    fractions = weights_as_fractions(weights, len(lengths))
    drawn = [
        _sample_source_examples(len(of_source), fractions[source], seed, source, epoch, shuffle)
        for source, of_source in enumerate(lengths)
    ]
    sources = np.repeat(np.arange(len(drawn), dtype=np.int32), [len(part) for part in drawn])
    examples = np.concatenate(drawn)
    sizes = np.concatenate(
        [of_source[part] for of_source, part in zip(lengths, drawn, strict=True)]
    )
    if shuffle:
        order = seeded_permutation(len(examples), seed, _SHUFFLE_EXAMPLES, epoch)
        sources, examples, sizes = sources[order], examples[order], sizes[order]
    grouped = (
        _pack_examples(sizes, config.seq_length)
        if config.packing
        else _one_example_per_row(len(sizes))
    )
    return _assemble_epoch_plan(sources, examples, sizes, grouped, config, (seed, epoch, shuffle))


def weights_as_fractions(weights: Sequence[float] | None, num_sources: int) -> list[Fraction]:
    """The weights as fractions, so that ten times a tenth is one.

    Raises:
        ValueError: One is no positive number, or there is not one for each source.
    """
    weights = [1.0] * num_sources if weights is None else weights
    if len(weights) != num_sources or not num_sources:
        raise ValueError(
            f"weights={list(weights)} are {len(weights)} for {num_sources} sources. Give one for each "
            f"of one or more."
        )
    for number, weight in enumerate(weights):
        if not 1e-4 <= weight < 1e4:
            raise ValueError(
                f"weights[{number}]={weight} is no number of passes through a source. Give one "
                f"from 0.0001 to 10000, or leave the source out."
            )
    return [Fraction(weight).limit_denominator(10_000) for weight in weights]


def seeded_permutation(
    size: int, seed: int, purpose: int, index: int, source: int = 0
) -> np.ndarray:
    """The numbers below `size` in an order that is the same with every release of numpy."""
    key = np.array([seed, purpose << 60 | source << 40 | index], np.uint64)
    # NumPy promises the same bits of a generator for ever, but not the same shuffles.
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _check_example_lengths(lengths: Sequence[np.ndarray], config: BatchConfig) -> None:
    for source, of_source in enumerate(lengths):
        if len(of_source) and of_source.max() > config.seq_length:
            example = int(of_source.argmax())
            raise ValueError(
                f"Example {example} of source {source} has {of_source[example]} tokens, more than "
                f"Batching.length={config.seq_length}. Read the data with no greater length."
            )


def _sample_source_examples(
    num_examples: int, weight: Fraction, seed: int, source: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """The examples of one source in one epoch: the next ones of all its passes."""
    start, end = int(weight * num_examples * epoch), int(weight * num_examples * (epoch + 1))
    parts = [np.empty(0, np.int64)]
    for number in range(start // num_examples, -(-end // num_examples)) if num_examples else ():
        whole = (
            seeded_permutation(num_examples, seed, _SHUFFLE_SOURCE, number, source)
            if shuffle
            else np.arange(num_examples)
        )
        parts.append(whole[max(start - number * num_examples, 0) : end - number * num_examples])
    return np.concatenate(parts)


def _one_example_per_row(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count), np.arange(count + 1)


def _pack_examples(example_lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples row by row, and where each row starts among them."""
    order: list[int] = []
    starts = [0]
    for start in range(0, len(example_lengths), PACKING_WINDOW):
        for row in _best_fit_decreasing(
            example_lengths[start : start + PACKING_WINDOW], seq_length
        ):
            order.extend(start + example for example in row)
            starts.append(len(order))
    return np.array(order, np.int64), np.array(starts, np.int64)


def _best_fit_decreasing(example_lengths: np.ndarray, seq_length: int) -> list[list[int]]:
    """Rows of examples, each put where it leaves the least room, the longest first."""
    rows: list[list[int]] = []
    free: list[int] = []  # The amounts of room that rows have, growing.
    having: dict[int, list[list[int]]] = {}  # The rows that have it.
    order = np.argsort(-example_lengths, kind="stable")
    for example, size in zip(order.tolist(), example_lengths[order].tolist(), strict=True):
        place = bisect.bisect_left(free, size)
        if place == len(free):
            room, row = seq_length, []
            rows.append(row)
        else:
            room = free[place]
            row = having[room].pop()
            if not having[room]:
                del free[place]
        row.append(example)
        room -= size
        if room:
            if not having.setdefault(room, []):
                bisect.insort(free, room)
            having[room].append(row)
    return rows


def _assemble_epoch_plan(
    sources: np.ndarray,
    examples: np.ndarray,
    example_lengths: np.ndarray,
    packed_order: tuple[np.ndarray, np.ndarray],
    config: BatchConfig,
    shuffle_options: tuple[int, int, bool],
) -> EpochPlan:
    """Rows shuffled, into batches of one length each, which are shuffled as well."""
    order, starts = packed_order
    seed, epoch, shuffle = shuffle_options
    count = len(starts) - 1
    rows = seeded_permutation(count, seed, _SHUFFLE_ROWS, epoch) if shuffle else np.arange(count)
    buckets = np.array(config.buckets or (config.seq_length,))
    bucket = (
        np.zeros(count, np.int64) if config.packing else np.searchsorted(buckets, example_lengths)
    )
    per = config.effective_batch_size
    # -1 stands for an empty row.
    filled = [
        _pad_to_whole_batches(rows[bucket[rows] == number], per) for number in range(len(buckets))
    ]
    lengths = np.repeat(buckets, [len(part) for part in filled])
    table = np.concatenate(filled)
    if shuffle and len(buckets) > 1:
        mixed = seeded_permutation(len(table), seed, _SHUFFLE_BATCHES, epoch)
        table, lengths = table[mixed], lengths[mixed]
    flat = table.reshape(-1)
    taken = [order[starts[row] : starts[row + 1]] if row >= 0 else order[:0] for row in flat]
    picked = np.concatenate([order[:0], *taken])
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in taken])])
    return EpochPlan(sources[picked], examples[picked], bounds.astype(np.int64), lengths, per)


def _pad_to_whole_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows (batches, rows of one), the last filled up."""
    missing = -len(rows) % batch_size
    return np.concatenate([rows, np.full(missing, -1)]).reshape(-1, batch_size)
