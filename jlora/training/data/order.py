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
WINDOW = 8192
# What a draw is for; no two share a key.
_PASS, _MIXED, _ROWS, _BATCHES = range(4)

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """The shape of batches.

    Attributes:
        rows: Of a batch that goes through the model at once, over all processes.
        length: Tokens of a row.
        accumulate: How many of those one step takes one after another.
        packing: Whether a row holds as many examples as it has room for. Preferences and
            classified texts never share rows.
        buckets: Without packing, the lengths that rows are filled up to, growing up to `length`:
            an example goes to the first that holds it. `(length,)` when left out.
    """

    rows: int
    length: int
    accumulate: int = 1
    packing: bool = True
    buckets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "length", "accumulate"):
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
        if not growing or self.buckets[-1:] != (self.length,):
            raise ValueError(
                f"Batching.buckets={self.buckets} do not grow up to length={self.length}. Give "
                f"growing lengths, of which that is the last."
            )

    @property
    def batch_rows(self) -> int:
        """The rows of one step."""
        return self.rows * self.accumulate


class Planned(NamedTuple):
    """One batch.

    Attributes:
        length: Tokens of a row.
        rows: For each row the source and the number of every example in it; none in empty rows.
    """

    length: int
    rows: tuple[tuple[Pair, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of an epoch, in flat arrays.

    Attributes:
        sources: Of every example, row by row.
        examples: Its number in the source.
        starts: (rows + 1,), where each row's examples start; empty rows hold none.
        lengths: (batches,), tokens of a batch's rows.
        batch_rows: Rows of a batch.
    """

    sources: np.ndarray
    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    batch_rows: int

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Planned:
        """The batch of that number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch_rows
        bounds = self.starts[first : first + self.batch_rows + 1].tolist()
        rows = (self._row(*both) for both in itertools.pairwise(bounds))
        return Planned(int(self.lengths[index]), tuple(rows))

    def _row(self, start: int, end: int) -> tuple[Pair, ...]:
        sources, examples = self.sources[start:end].tolist(), self.examples[start:end].tolist()
        return tuple(zip(sources, examples, strict=True))


def epoch_plan(
    lengths: Sequence[np.ndarray],
    batching: Batching,
    *,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    shuffle: bool = True,
) -> Plan:
    """The batches of one epoch. The last of each length is filled up with empty rows.

    A source of weight w is gone through w times an epoch: of weight 2 twice, of weight 0.1 a tenth
    of it in each of ten epochs. Every time it was seen whole, it is shuffled anew.

    Args:
        lengths: For every source, the tokens of its examples.
        batching: The shape of batches.
        seed: 0 or more. Of equal ones, everything else equal, the plans are equal.
        epoch: From 0.
        weights: Of the sources; 1 when left out.
        shuffle: Whether to. Without, sources and examples come in their order.

    Raises:
        ValueError: An example is longer than a row, or a weight is no positive number.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is no seed. Give a whole number from 0 to 2**63 - 1.")
    _check_lengths(lengths, batching)
    fractions = exact_weights(weights, len(lengths))
    drawn = [
        _drawn(len(of_source), fractions[source], seed, source, epoch, shuffle)
        for source, of_source in enumerate(lengths)
    ]
    sources = np.repeat(np.arange(len(drawn), dtype=np.int32), [len(part) for part in drawn])
    examples = np.concatenate(drawn)
    sizes = np.concatenate(
        [of_source[part] for of_source, part in zip(lengths, drawn, strict=True)]
    )
    if shuffle:
        order = permutation(len(examples), seed, _MIXED, epoch)
        sources, examples, sizes = sources[order], examples[order], sizes[order]
    grouped = _packed(sizes, batching.length) if batching.packing else _alone(len(sizes))
    return _batched(sources, examples, sizes, grouped, batching, (seed, epoch, shuffle))


def exact_weights(weights: Sequence[float] | None, sources: int) -> list[Fraction]:
    """The weights as fractions, so that ten times a tenth is one.

    Raises:
        ValueError: One is no positive number, or there is not one for each source.
    """
    weights = [1.0] * sources if weights is None else weights
    if len(weights) != sources or not sources:
        raise ValueError(
            f"weights={list(weights)} are {len(weights)} for {sources} sources. Give one for each "
            f"of one or more."
        )
    for number, weight in enumerate(weights):
        if not 1e-4 <= weight < 1e4:
            raise ValueError(
                f"weights[{number}]={weight} is no number of passes through a source. Give one "
                f"from 0.0001 to 10000, or leave the source out."
            )
    return [Fraction(weight).limit_denominator(10_000) for weight in weights]


def permutation(size: int, seed: int, purpose: int, number: int, source: int = 0) -> np.ndarray:
    """The numbers below `size` in an order that is the same with every release of numpy."""
    key = np.array([seed, purpose << 60 | source << 40 | number], np.uint64)
    # NumPy promises the same bits of a generator for ever, but not the same shuffles.
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _check_lengths(lengths: Sequence[np.ndarray], batching: Batching) -> None:
    for source, of_source in enumerate(lengths):
        if len(of_source) and of_source.max() > batching.length:
            example = int(of_source.argmax())
            raise ValueError(
                f"Example {example} of source {source} has {of_source[example]} tokens, more than "
                f"Batching.length={batching.length}. Read the data with no greater length."
            )


def _drawn(
    size: int, weight: Fraction, seed: int, source: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """The examples of one source in one epoch: the next ones of all its passes."""
    start, end = int(weight * size * epoch), int(weight * size * (epoch + 1))
    parts = [np.empty(0, np.int64)]
    for number in range(start // size, -(-end // size)) if size else ():
        whole = permutation(size, seed, _PASS, number, source) if shuffle else np.arange(size)
        parts.append(whole[max(start - number * size, 0) : end - number * size])
    return np.concatenate(parts)


def _alone(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count), np.arange(count + 1)


def _packed(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples row by row, and where each row starts among them."""
    order: list[int] = []
    starts = [0]
    for start in range(0, len(sizes), WINDOW):
        for row in _best_fit(sizes[start : start + WINDOW], length):
            order.extend(start + example for example in row)
            starts.append(len(order))
    return np.array(order, np.int64), np.array(starts, np.int64)


def _best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Rows of examples, each put where it leaves the least room, the longest first."""
    rows: list[list[int]] = []
    free: list[int] = []  # The amounts of room that rows have, growing.
    having: dict[int, list[list[int]]] = {}  # The rows that have it.
    order = np.argsort(-sizes, kind="stable")
    for example, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect.bisect_left(free, size)
        if place == len(free):
            room, row = length, []
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


def _batched(
    sources: np.ndarray,
    examples: np.ndarray,
    sizes: np.ndarray,
    grouped: tuple[np.ndarray, np.ndarray],
    batching: Batching,
    drawing: tuple[int, int, bool],
) -> Plan:
    """Rows shuffled, into batches of one length each, which are shuffled as well."""
    order, starts = grouped
    seed, epoch, shuffle = drawing
    count = len(starts) - 1
    rows = permutation(count, seed, _ROWS, epoch) if shuffle else np.arange(count)
    buckets = np.array(batching.buckets or (batching.length,))
    bucket = np.zeros(count, np.int64) if batching.packing else np.searchsorted(buckets, sizes)
    per = batching.batch_rows
    # -1 stands for an empty row.
    filled = [_filled(rows[bucket[rows] == number], per) for number in range(len(buckets))]
    lengths = np.repeat(buckets, [len(part) for part in filled])
    table = np.concatenate(filled)
    if shuffle and len(buckets) > 1:
        mixed = permutation(len(table), seed, _BATCHES, epoch)
        table, lengths = table[mixed], lengths[mixed]
    flat = table.reshape(-1)
    taken = [order[starts[row] : starts[row + 1]] if row >= 0 else order[:0] for row in flat]
    picked = np.concatenate([order[:0], *taken])
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in taken])])
    return Plan(sources[picked], examples[picked], bounds.astype(np.int64), lengths, per)


def _filled(rows: np.ndarray, per: int) -> np.ndarray:
    """Rows (batches, rows of one), the last filled up."""
    missing = -len(rows) % per
    return np.concatenate([rows, np.full(missing, -1)]).reshape(-1, per)
