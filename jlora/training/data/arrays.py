"""The arrays of a batch, filled from the examples that were planned for its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jlora.training.data.corpus import Corpus
from jlora.training.data.order import Pair


class Language(NamedTuple):
    """What a language model learns from, each (..., rows, length), or (..., rows, 2, length).

    The axis of 2 is there for preferences: the chosen, then the rejected.

    Attributes:
        tokens: int32, 0 (or the pad token) where there is none.
        targets: int32, the next token of the same example; 0 where there is none.
        learn: float32, 1 where the loss counts how well the target is predicted.
        segments: int32, which of the row's examples a token is of, from 1; 0 for padding.
        positions: int32, from 0 in every example.
    """

    tokens: np.ndarray
    targets: np.ndarray
    learn: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Classes(NamedTuple):
    """What a classifier learns from.

    Attributes:
        tokens: int32 (..., rows, length).
        mask: int32 (..., rows, length), 0 for padding.
        types: int32 (..., rows, length), 1 in the second of a pair of texts.
        labels: int32 (..., rows).
        real: float32 (..., rows), 0 for rows that fill the batch up.
    """

    tokens: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    real: np.ndarray


def language(
    corpora: Sequence[Corpus], length: int, rows: Sequence[Sequence[Pair]], pad: int
) -> Language:
    """The arrays of rows of examples, (rows, length), or (rows, 2, length) for preferences.

    Args:
        corpora: The sources.
        length: Of every row.
        rows: The source and number of the examples of each.
        pad: The token of places without one.
    """
    pair = corpora[0].sequences
    made = Language(
        tokens=np.full((len(rows) * pair, length), pad, np.int32),
        targets=np.zeros((len(rows) * pair, length), np.int32),
        learn=np.zeros((len(rows) * pair, length), np.float32),
        segments=np.zeros((len(rows) * pair, length), np.int32),
        positions=np.zeros((len(rows) * pair, length), np.int32),
    )
    counted = np.arange(length, dtype=np.int32)
    for number, examples in enumerate(rows):
        for half in range(pair):
            row = Language(*(array[number * pair + half] for array in made))
            sequences = [corpora[source].sequence(i * pair + half) for source, i in examples]
            _fill(row, sequences, counted)
    shape = (len(rows), length) if pair == 1 else (len(rows), pair, length)
    return Language(*(array.reshape(shape) for array in made))


def _fill(
    row: Language, sequences: Sequence[tuple[np.ndarray, np.ndarray]], counted: np.ndarray
) -> None:
    start = 0
    for segment, (tokens, learn) in enumerate(sequences, start=1):
        end = start + len(tokens)
        row.tokens[start:end] = tokens
        row.targets[start : end - 1] = tokens[1:]
        row.learn[start : end - 1] = learn[1:]
        row.segments[start:end] = segment
        row.positions[start:end] = counted[: len(tokens)]
        start = end


def classes(
    corpora: Sequence[Corpus], length: int, rows: Sequence[Sequence[Pair]], pad: int
) -> Classes:
    """The arrays of rows of one labelled example each. Arguments as of `language`."""
    made = Classes(
        tokens=np.full((len(rows), length), pad, np.int32),
        mask=np.zeros((len(rows), length), np.int32),
        types=np.zeros((len(rows), length), np.int32),
        labels=np.zeros(len(rows), np.int32),
        real=np.zeros(len(rows), np.float32),
    )
    for row, examples in enumerate(rows):
        for source, example in examples:
            corpus = corpora[source]
            tokens, _ = corpus.sequence(example)
            made.tokens[row, : len(tokens)] = tokens
            made.mask[row, : len(tokens)] = 1
            if corpus.types is not None:
                start = corpus.offsets[example]
                made.types[row, : len(tokens)] = corpus.types[start : start + len(tokens)]
            if corpus.labels is not None:
                made.labels[row] = corpus.labels[example]
            made.real[row] = 1
    return made
