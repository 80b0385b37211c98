"""Deterministic epoch plans: shuffling, mixing, packing and batching from a seed.

A plan depends only on the lengths of the examples, the options, the seed and the epoch.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Number of shuffled examples that are packed together, longest first. A larger window does not
# fill the rows better.
PACKING_WINDOW = 8192

# Purposes of random draws; each has its own key.
_SHUFFLE_SOURCE, _SHUFFLE_EXAMPLES, _SHUFFLE_ROWS, _SHUFFLE_BATCHES = range(4)

# Number of the source, and number of the example in it.
ExampleId = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Shape of batches.

    Attributes:
        batch_size: Rows of one forward pass, over all processes.
        seq_length: Tokens of a row.
        gradient_accumulation_steps: Forward passes of one training step.
        packing: True to fill each row with several examples. Preference and classification data
            is never packed.
        buckets: Without packing, increasing lengths that rows are padded to, ending in
            `seq_length`; an example goes to the first bucket that fits it. None: `(seq_length,)`.

    Raises:
        ValueError: If a number is not a positive int, buckets are given with packing, or buckets
            do not increase up to `seq_length`.

    Example:
        >>> from jlora.training import data
        >>> config = data.BatchConfig(batch_size=8, seq_length=1024, gradient_accumulation_steps=4)
        >>> config.effective_batch_size
        32
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
                raise ValueError(f"BatchConfig.{name}={value} must be an int of at least 1.")
        if self.buckets is None:
            return
        if self.packing:
            raise ValueError(
                f"BatchConfig.buckets={self.buckets} apply to rows of one example, but "
                f"packing=True fills rows with several. Leave one of them out."
            )
        increasing = all(a < b for a, b in itertools.pairwise((0, *self.buckets)))
        if not increasing or self.buckets[-1:] != (self.seq_length,):
            raise ValueError(
                f"BatchConfig.buckets={self.buckets} must increase and end in "
                f"seq_length={self.seq_length}."
            )

    @property
    def effective_batch_size(self) -> int:
        """Rows of one training step."""
        return self.batch_size * self.gradient_accumulation_steps


class PlannedBatch(NamedTuple):
    """Plan of one batch.

    Attributes:
        seq_length: Tokens of a row.
        example_ids: Source and number of every example of each row; empty for padding rows.

    Example:
        >>> from jlora.training import data
        >>> batch = data.PlannedBatch(seq_length=8, example_ids=(((0, 1), (0, 0)), ()))
        >>> [len(row) for row in batch.example_ids]  # Two packed examples, and a padding row.
        [2, 0]
    """

    seq_length: int
    example_ids: tuple[tuple[ExampleId, ...], ...]


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """Batches of an epoch, in flat arrays.

    `plan[i]` is the `PlannedBatch` i, and `len(plan)` the number of batches.

    Attributes:
        sources: int32 (examples,), source of every example, row by row.
        examples: int64 (examples,), number of every example in its source.
        starts: int64 (rows + 1,), start of each row's examples; equal for padding rows.
        seq_lengths: (batches,), tokens of a batch's rows.
        effective_batch_size: Rows of a batch.

    Example:
        >>> import numpy as np
        >>> from jlora.training import data
        >>> config = data.BatchConfig(batch_size=2, seq_length=8, packing=False)
        >>> plan = data.plan_epoch([np.array([3, 5, 4])], config, seed=0, epoch=0, shuffle=False)
        >>> len(plan), plan[1].example_ids
        (2, (((0, 2),), ()))
    """

    sources: np.ndarray
    examples: np.ndarray
    starts: np.ndarray
    seq_lengths: np.ndarray
    effective_batch_size: int

    def __len__(self) -> int:
        return len(self.seq_lengths)

    def __getitem__(self, index: int) -> PlannedBatch:
        """Returns the batch with that number.

        Raises:
            IndexError: If there is no such batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.effective_batch_size
        bounds = self.starts[first : first + self.effective_batch_size + 1].tolist()
        rows = (self._row_example_ids(*pair) for pair in itertools.pairwise(bounds))
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
    """Returns the batches of one epoch; padding rows complete the last batch of each length.

    An epoch has w passes through a source of weight w: two with weight 2, and one tenth of the
    source with weight 0.1, a different tenth in each of ten epochs. Every pass has its own shuffle.

    Args:
        lengths: Per source, the tokens of its examples: (examples,).
        config: Shape of batches.
        seed: Random seed, 0 to 2**63 - 1. Equal arguments give equal plans.
        epoch: Number of the epoch, from 0.
        weights: Passes through each source; None: one.
        shuffle: True to shuffle; otherwise sources and examples keep their order.

    Raises:
        ValueError: If an example is longer than a row, or a weight or the seed is out of range.

    Example:
        >>> import numpy as np
        >>> from jlora.training import data
        >>> lengths = [np.array([3, 5, 4])]
        >>> config = data.BatchConfig(batch_size=2, seq_length=8)
        >>> plan = data.plan_epoch(lengths, config, seed=0, epoch=0, shuffle=False)
        >>> plan[0]  # Examples 1 and 0 are packed into one row.
        PlannedBatch(seq_length=8, example_ids=(((0, 1), (0, 0)), ((0, 2),)))
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be an int from 0 to 2**63 - 1.")
    _check_example_lengths(lengths, config)
    fractions = weights_as_fractions(weights, len(lengths))
    drawn = [
        _sample_source_examples(len(sizes), fractions[source], seed, source, epoch, shuffle)
        for source, sizes in enumerate(lengths)
    ]
    sources = np.repeat(np.arange(len(drawn), dtype=np.int32), [len(part) for part in drawn])
    examples = np.concatenate(drawn)
    sizes = np.concatenate([all_[part] for all_, part in zip(lengths, drawn, strict=True)])
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
    """Returns the weights as exact fractions, so that ten times 0.1 is 1.

    Raises:
        ValueError: If a weight is out of range, or their number is not that of the sources.
    """
    weights = [1.0] * num_sources if weights is None else weights
    if len(weights) != num_sources or not num_sources:
        raise ValueError(
            f"weights={list(weights)} must have one value for each of at least one source, got "
            f"{len(weights)} for {num_sources} sources."
        )
    for number, weight in enumerate(weights):
        if not 1e-4 <= weight < 1e4:
            raise ValueError(
                f"weights[{number}]={weight} must be from 0.0001 to 10000 passes through the "
                f"source. Leave the source out to skip it."
            )
    return [Fraction(weight).limit_denominator(10_000) for weight in weights]


def seeded_permutation(
    size: int, seed: int, purpose: int, index: int, source: int = 0
) -> np.ndarray:
    """Returns a permutation of `range(size)` that is the same with every release of NumPy."""
    key = np.array([seed, purpose << 60 | source << 40 | index], np.uint64)
    # NumPy guarantees the bits of a generator across releases, but not its shuffles.
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _check_example_lengths(lengths: Sequence[np.ndarray], config: BatchConfig) -> None:
    for source, sizes in enumerate(lengths):
        if len(sizes) and sizes.max() > config.seq_length:
            example = int(sizes.argmax())
            raise ValueError(
                f"Example {example} of source {source} has {sizes[example]} tokens, more than "
                f"BatchConfig.seq_length={config.seq_length}. Tokenize the data with a "
                f"max_seq_length of at most that."
            )


def _sample_source_examples(
    num_examples: int, weight: Fraction, seed: int, source: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """Returns the examples of one source in one epoch: the next part of its sequence of passes."""
    start, end = int(weight * num_examples * epoch), int(weight * num_examples * (epoch + 1))
    parts = [np.empty(0, np.int64)]
    for number in range(start // num_examples, -(-end // num_examples)) if num_examples else ():
        order = (
            seeded_permutation(num_examples, seed, _SHUFFLE_SOURCE, number, source)
            if shuffle
            else np.arange(num_examples)
        )
        parts.append(order[max(start - number * num_examples, 0) : end - number * num_examples])
    return np.concatenate(parts)


def _one_example_per_row(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the same as `_pack_examples`, without packing."""
    return np.arange(count), np.arange(count + 1)


def _pack_examples(example_lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples (examples,), row by row, and the start of each row (rows + 1,)."""
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
    """Packs examples, longest first, each into the row where it leaves the least space."""
    rows: list[list[int]] = []
    sizes_free: list[int] = []  # Increasing free spaces, each of at least one row.
    rows_by_free: dict[int, list[list[int]]] = {}
    order = np.argsort(-example_lengths, kind="stable")
    for example, size in zip(order.tolist(), example_lengths[order].tolist(), strict=True):
        place = bisect.bisect_left(sizes_free, size)
        if place == len(sizes_free):
            free, row = seq_length, []
            rows.append(row)
        else:
            free = sizes_free[place]
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                del sizes_free[place]
        row.append(example)
        free -= size
        if free:
            if not rows_by_free.setdefault(free, []):
                bisect.insort(sizes_free, free)
            rows_by_free[free].append(row)
    return rows


def _assemble_epoch_plan(
    sources: np.ndarray,
    examples: np.ndarray,
    example_lengths: np.ndarray,
    packed_order: tuple[np.ndarray, np.ndarray],
    config: BatchConfig,
    shuffle_options: tuple[int, int, bool],
) -> EpochPlan:
    """Shuffles rows, groups them into batches of one length each, and shuffles the batches."""
    order, starts = packed_order
    seed, epoch, shuffle = shuffle_options
    count = len(starts) - 1
    rows = seeded_permutation(count, seed, _SHUFFLE_ROWS, epoch) if shuffle else np.arange(count)
    buckets = np.array(config.buckets or (config.seq_length,))
    bucket = (
        np.zeros(count, np.int64) if config.packing else np.searchsorted(buckets, example_lengths)
    )
    batch_size = config.effective_batch_size
    # -1 is a padding row.
    padded = [
        _pad_to_whole_batches(rows[bucket[rows] == number], batch_size)
        for number in range(len(buckets))
    ]
    lengths = np.repeat(buckets, [len(part) for part in padded])
    table = np.concatenate(padded)  # (batches, batch_size)
    if shuffle and len(buckets) > 1:
        permutation = seeded_permutation(len(table), seed, _SHUFFLE_BATCHES, epoch)
        table, lengths = table[permutation], lengths[permutation]
    flat = table.reshape(-1)
    per_row = [order[starts[row] : starts[row + 1]] if row >= 0 else order[:0] for row in flat]
    index = np.concatenate([order[:0], *per_row])
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in per_row])])
    return EpochPlan(sources[index], examples[index], bounds.astype(np.int64), lengths, batch_size)


def _pad_to_whole_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns rows as (batches, batch_size), the last batch completed with -1."""
    missing = -len(rows) % batch_size
    return np.concatenate([rows, np.full(missing, -1)]).reshape(-1, batch_size)
