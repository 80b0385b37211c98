"""Tokenised examples in flat arrays, and what happens to those that are too long."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Overlong = Literal["error", "drop", "truncate", "split"]
POLICIES: tuple[str, ...] = get_args(Overlong)


class Part(NamedTuple):
    """One sequence of an example.

    Attributes:
        ids: Of its tokens.
        learn: For each, or for all, whether the loss counts how well it is predicted.
        types: For each whether it is of the second of a pair of texts.
    """

    ids: Sequence[int] | np.ndarray
    learn: np.ndarray | bool
    types: Sequence[int] | None = None


class _Sequence(NamedTuple):
    """A part whose tokens were looked at."""

    ids: np.ndarray
    learn: np.ndarray
    types: bytes


class Report(NamedTuple):
    """What became of the rows.

    Attributes:
        rows: How many there were.
        examples: How many there are now.
        dropped: Rows that were too long.
        lost: Rows of which nothing was left to learn once they were cut.
        unlearned: Rows that had nothing to learn at all.
        truncated: Rows that were cut.
        split: Rows that became several examples.
        tokens: Of all examples.
        learned: Tokens that the loss counts.
    """

    rows: int = 0
    examples: int = 0
    dropped: int = 0
    lost: int = 0
    unlearned: int = 0
    truncated: int = 0
    split: int = 0
    tokens: int = 0
    learned: int = 0


class Corpus(NamedTuple):
    """Examples, of one sequence of tokens each, or of two: the chosen and the rejected.

    Attributes:
        tokens: int32 (tokens,), sequence after sequence.
        learn: bool (tokens,), whether the loss counts a token. Never the first of a sequence,
            which nothing predicts.
        offsets: int64 (sequences + 1,), where each sequence starts.
        sequences: Of an example: 1, or 2 for preferences.
        labels: int32 (examples,), for classification.
        label_names: What the labels are called.
        types: int8 (tokens,), 1 in the second of a pair of texts; None unless there are pairs.
        report: What became of the rows.
        fingerprint: Of the arrays.
    """

    tokens: np.ndarray
    learn: np.ndarray
    offsets: np.ndarray
    sequences: int
    labels: np.ndarray | None
    label_names: tuple[str, ...] | None
    types: np.ndarray | None
    report: Report
    fingerprint: str

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return (len(self.offsets) - 1) // self.sequences

    def lengths(self) -> np.ndarray:
        """The tokens of each example, of the longer of its sequences if they are two."""
        return np.diff(self.offsets).reshape(-1, self.sequences).max(axis=1)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of one sequence, and which of them are learnt."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.learn[part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become examples.

    Attributes:
        length: How many tokens an example has at most.
        overlong: What happens to longer ones: "error" names the row; "drop" leaves it out;
            "truncate" keeps its beginning, and leaves it out if nothing to learn is left; "split",
            for text alone, makes consecutive examples of it,
            each of which begins with the last token of the one before, so that every token is
            learnt once.
        vocab_size: Of the model; ids beyond it are refused. None looks for negative ones alone.
        columns: What the format calls a column to what the data calls it.
        where: What errors call the data.
    """

    length: int
    overlong: Overlong = "error"
    vocab_size: int | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = "the data"

    def __post_init__(self) -> None:
        if type(self.length) is not int or self.length < 2:
            raise ValueError(
                f"Reading.length={self.length}, in a recipe data.length, holds no token and the "
                f"next. Give 2 or more."
            )
        if self.overlong not in POLICIES:
            raise ValueError(
                f"Reading.overlong={self.overlong!r} is none of {', '.join(POLICIES)}. Choose one."
            )


class Builder:
    """Collects examples in arrays that grow, under the rules of a `Reading`."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._counts = dict.fromkeys(Report._fields, 0)
        self._tokens = array.array("i")
        self._learn = bytearray()
        self._types = bytearray()
        self._lengths = array.array("q")
        self._labels = array.array("i")

    def add(self, row: int, *parts: Part) -> None:
        """A row to learn to write: its sequences, which are kept or left out together.

        Raises:
            ValueError: A token is none of the model's, or the row is too long.
        """
        self._counts["rows"] += 1
        sequences = [self._checked(row, part) for part in parts]
        if not _all_learn(sequences):
            self._counts["unlearned"] += 1
        elif max(len(sequence.ids) for sequence in sequences) <= self.reading.length:
            self._put(sequences)
        else:
            self._add_overlong(row, sequences)

    def add_labelled(self, row: int, part: Part, label: int, *, truncated: bool) -> None:
        """A row to tell the label of, which the tokenizer has cut already if that was asked for.

        Raises:
            ValueError: A token is none of the model's, or the row is too long.
        """
        self._counts["rows"] += 1
        sequence = self._checked(row, part)
        if len(sequence.ids) > self.reading.length:
            self._refuse_or_drop(row, len(sequence.ids))
            return
        self._counts["truncated"] += truncated
        self._put([sequence])
        self._labels.append(label)

    def build(self, *, sequences: int = 1, label_names: Sequence[str] | None = None) -> Corpus:
        """The examples collected.

        Args:
            sequences: Of each.
            label_names: Of labelled ones.

        Raises:
            ValueError: There are none.
        """
        labelled = label_names is not None
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(self._lengths, np.int64))])
        learn = np.frombuffer(self._learn, np.bool_)
        types = np.frombuffer(self._types, np.int8)
        counts = self._counts | {"examples": (len(offsets) - 1) // sequences}
        report = Report(**counts | {"tokens": len(learn), "learned": int(learn.sum())})
        if not report.examples:
            raise ValueError(
                f"{self.reading.where} leaves nothing to learn: of {report.rows} rows "
                f"{report.dropped} are longer than data.length={self.reading.length}, "
                f"{report.lost} have nothing to learn before that, and {report.unlearned} nothing "
                f"at all. Give a greater length, or look at the rows."
            )
        corpus = Corpus(
            tokens=np.frombuffer(self._tokens, np.int32),
            learn=learn,
            offsets=offsets.astype(np.int64),
            sequences=sequences,
            labels=np.frombuffer(self._labels, np.int32) if labelled else None,
            label_names=None if label_names is None else tuple(label_names),
            types=types if types.any() else None,
            report=report,
            fingerprint="",
        )
        return corpus._replace(fingerprint=_fingerprint(corpus))

    def _checked(self, row: int, part: Part) -> _Sequence:
        """The part in arrays. Nothing predicts its first token, so that is never learnt."""
        ids = np.array(part.ids, np.int32)
        below = self.reading.vocab_size or np.inf
        if ids.size and (ids.min() < 0 or ids.max() >= below):
            raise ValueError(
                f"{self.reading.where}, row {row}: token {ids[(ids < 0) | (ids >= below)][0]} is "
                f"none of the model's {below}. Take the tokenizer of the model's own checkpoint."
            )
        learn = np.array(np.broadcast_to(part.learn, ids.shape), np.bool_)
        learn[:1] = False
        return _Sequence(ids, learn, bytes(len(ids) if part.types is None else part.types))

    def _add_overlong(self, row: int, sequences: list[_Sequence]) -> None:
        length, policy = self.reading.length, self.reading.overlong
        if policy == "split":
            self._counts["split"] += 1
            for sequence in sequences:
                self._put_pieces(sequence)
        elif policy == "truncate":
            cut = [_cut(sequence, slice(length)) for sequence in sequences]
            self._counts["truncated" if _all_learn(cut) else "lost"] += 1
            if _all_learn(cut):
                self._put(cut)
        else:
            self._refuse_or_drop(row, max(len(sequence.ids) for sequence in sequences))

    def _refuse_or_drop(self, row: int, tokens: int) -> None:
        if self.reading.overlong != "drop":
            raise ValueError(
                f"{self.reading.where}, row {row}: {tokens} tokens are more than "
                f"data.length={self.reading.length}. Give a greater one, or data.overlong=truncate "
                f"or drop."
            )
        self._counts["dropped"] += 1

    def _put_pieces(self, sequence: _Sequence) -> None:
        # A piece begins with the token that the one before ends with, to predict the next from.
        length = self.reading.length
        for start in range(0, len(sequence.ids) - 1, length - 1):
            piece = _cut(sequence, slice(start, start + length))
            piece.learn[0] = False
            self._put([piece])

    def _put(self, sequences: Sequence[_Sequence]) -> None:
        for ids, learn, types in sequences:
            self._tokens.frombytes(ids.tobytes())
            self._learn.extend(learn.tobytes())
            self._types.extend(types)
            self._lengths.append(len(ids))


def _cut(sequence: _Sequence, part: slice) -> _Sequence:
    return _Sequence(sequence.ids[part], sequence.learn[part].copy(), sequence.types[part])


def _all_learn(sequences: Sequence[_Sequence]) -> bool:
    return all(sequence.learn.any() for sequence in sequences)


def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256(repr((corpus.sequences, corpus.label_names)).encode())
    for field in (corpus.tokens, corpus.learn, corpus.offsets, corpus.labels, corpus.types):
        digest.update(b"-" if field is None else field.tobytes())
    return digest.hexdigest()
