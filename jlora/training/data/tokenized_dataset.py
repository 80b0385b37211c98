"""Tokenised examples in flat arrays, and what happens to those that are too long."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

TruncationPolicy = Literal["error", "drop", "truncate", "split"]

TRUNCATION_POLICIES: tuple[str, ...] = get_args(TruncationPolicy)


class TokenSequence(NamedTuple):
    """One sequence of an example.

    Attributes:
        ids: Of its tokens.
        loss_mask: For each, or for all, whether the loss counts how well it is predicted.
        token_type_ids: For each whether it is of the second of a pair of texts.
    """

    ids: Sequence[int] | np.ndarray
    loss_mask: np.ndarray | bool
    token_type_ids: Sequence[int] | None = None


class _SequenceArrays(NamedTuple):
    """A part whose tokens were looked at."""

    ids: np.ndarray
    loss_mask: np.ndarray
    token_type_ids: bytes


class TokenizeStats(NamedTuple):
    """What became of the rows.

    Attributes:
        rows: How many there were.
        examples: How many there are now.
        dropped: Rows that were too long.
        truncated_to_nothing: Rows of which nothing was left to learn once they were cut.
        without_loss_tokens: Rows that had nothing to learn at all.
        truncated: Rows that were cut.
        split: Rows that became several examples.
        tokens: Of all examples.
        loss_tokens: Tokens that the loss counts.
    """

    rows: int = 0
    examples: int = 0
    dropped: int = 0
    truncated_to_nothing: int = 0
    without_loss_tokens: int = 0
    truncated: int = 0
    split: int = 0
    tokens: int = 0
    loss_tokens: int = 0


class TokenizedDataset(NamedTuple):
    """Examples, of one sequence of tokens each, or of two: the chosen and the rejected.

    Attributes:
        tokens: int32 (tokens,), sequence after sequence.
        loss_mask: bool (tokens,), whether the loss counts a token. Never the first of a sequence,
            which nothing predicts.
        offsets: int64 (sequences + 1,), where each sequence starts.
        sequences_per_example: Of an example: 1, or 2 for preferences.
        labels: int32 (examples,), for classification.
        label_names: What the labels are called.
        token_type_ids: int8 (tokens,), 1 in the second of a pair of texts; None unless there are pairs.
        stats: What became of the rows.
        fingerprint: Of the arrays.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    sequences_per_example: int
    labels: np.ndarray | None
    label_names: tuple[str, ...] | None
    token_type_ids: np.ndarray | None
    stats: TokenizeStats
    fingerprint: str

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return (len(self.offsets) - 1) // self.sequences_per_example

    def example_lengths(self) -> np.ndarray:
        """The tokens of each example, of the longer of its sequences if they are two."""
        return np.diff(self.offsets).reshape(-1, self.sequences_per_example).max(axis=1)

    def get_sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of one sequence, and which of them are learnt."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.loss_mask[part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How rows become examples.

    Attributes:
        max_seq_length: How many tokens an example has at most.
        truncation: What happens to longer ones: "error" names the row; "drop" leaves it out;
            "truncate" keeps its beginning, and leaves it out if nothing to learn is left; "split",
            for text alone, makes consecutive examples of it,
            each of which begins with the last token of the one before, so that every token is
            learnt once.
        vocab_size: Of the model; ids beyond it are refused. None looks for negative ones alone.
        columns: What the format calls a column to what the data calls it.
        data_name: What errors call the data.
    """

    max_seq_length: int
    truncation: TruncationPolicy = "error"
    vocab_size: int | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data_name: str = "the data"

    def __post_init__(self) -> None:
        if type(self.max_seq_length) is not int or self.max_seq_length < 2:
            raise ValueError(
                f"Reading.length={self.max_seq_length}, in a recipe data.max_seq_length, holds no token and the "
                f"next. Give 2 or more."
            )
        if self.truncation not in TRUNCATION_POLICIES:
            raise ValueError(
                f"Reading.truncation={self.truncation!r} is none of {', '.join(TRUNCATION_POLICIES)}. Choose one."
            )


class TokenizedDatasetBuilder:
    """Collects examples in arrays that grow, under the rules of a `TokenizeConfig`."""

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        self._counts = dict.fromkeys(TokenizeStats._fields, 0)
        self._tokens = array.array("i")
        self._loss_mask = bytearray()
        self._token_type_ids = bytearray()
        self._lengths = array.array("q")
        self._labels = array.array("i")

    def add(self, row_index: int, *token_sequences: TokenSequence) -> None:
        """A row to learn to write: its sequences, which are kept or left out together.

        Raises:
            ValueError: A token is none of the model's, or the row is too long.
        """
        self._counts["rows"] += 1
        sequences = [self._validate_sequence(row_index, part) for part in token_sequences]
        if not _all_have_loss_tokens(sequences):
            self._counts["without_loss_tokens"] += 1
        elif max(len(sequence.ids) for sequence in sequences) <= self.config.max_seq_length:
            self._append_sequences(sequences)
        else:
            self._add_too_long(row_index, sequences)

    def add_labeled(
        self, row_index: int, token_sequence: TokenSequence, label: int, *, truncated: bool
    ) -> None:
        """A row to tell the label of, which the tokenizer has cut already if that was asked for.

        Raises:
            ValueError: A token is none of the model's, or the row is too long.
        """
        self._counts["rows"] += 1
        sequence = self._validate_sequence(row_index, token_sequence)
        if len(sequence.ids) > self.config.max_seq_length:
            self._raise_or_drop(row_index, len(sequence.ids))
            return
        self._counts["truncated"] += truncated
        self._append_sequences([sequence])
        self._labels.append(label)

    def build(
        self, *, sequences_per_example: int = 1, label_names: Sequence[str] | None = None
    ) -> TokenizedDataset:
        """The examples collected.

        Args:
            sequences_per_example: Of each.
            label_names: Of labelled ones.

        Raises:
            ValueError: There are none.
        """
        labelled = label_names is not None
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(self._lengths, np.int64))])
        learn = np.frombuffer(self._loss_mask, np.bool_)
        types = np.frombuffer(self._token_type_ids, np.int8)
        counts = self._counts | {"examples": (len(offsets) - 1) // sequences_per_example}
        report = TokenizeStats(**counts | {"tokens": len(learn), "loss_tokens": int(learn.sum())})
        if not report.examples:
            raise ValueError(
                f"{self.config.data_name} leaves nothing to learn: of {report.rows} rows "
                f"{report.dropped} are longer than data.max_seq_length={self.config.max_seq_length}, "
                f"{report.truncated_to_nothing} have nothing to learn before that, and {report.without_loss_tokens} nothing "
                f"at all. Give a greater length, or look at the rows."
            )
        corpus = TokenizedDataset(
            tokens=np.frombuffer(self._tokens, np.int32),
            loss_mask=learn,
            offsets=offsets.astype(np.int64),
            sequences_per_example=sequences_per_example,
            labels=np.frombuffer(self._labels, np.int32) if labelled else None,
            label_names=None if label_names is None else tuple(label_names),
            token_type_ids=types if types.any() else None,
            stats=report,
            fingerprint="",
        )
        return corpus._replace(fingerprint=_fingerprint_dataset(corpus))

    def _validate_sequence(self, row_index: int, token_sequence: TokenSequence) -> _SequenceArrays:
        """The part in arrays. Nothing predicts its first token, so that is never learnt."""
        ids = np.array(token_sequence.ids, np.int32)
        below = self.config.vocab_size or np.inf
        if ids.size and (ids.min() < 0 or ids.max() >= below):
            raise ValueError(
                f"{self.config.data_name}, row {row_index}: token {ids[(ids < 0) | (ids >= below)][0]} is "
                f"none of the model's {below}. Take the tokenizer of the model's own checkpoint."
            )
        learn = np.array(np.broadcast_to(token_sequence.loss_mask, ids.shape), np.bool_)
        learn[:1] = False
        return _SequenceArrays(
            ids,
            learn,
            bytes(
                len(ids) if token_sequence.token_type_ids is None else token_sequence.token_type_ids
            ),
        )

    def _add_too_long(self, row_index: int, sequences: list[_SequenceArrays]) -> None:
        length, policy = self.config.max_seq_length, self.config.truncation
        if policy == "split":
            self._counts["split"] += 1
            for sequence in sequences:
                self._append_chunks(sequence)
        elif policy == "truncate":
            cut = [_slice_sequence(sequence, slice(length)) for sequence in sequences]
            self._counts["truncated" if _all_have_loss_tokens(cut) else "truncated_to_nothing"] += 1
            if _all_have_loss_tokens(cut):
                self._append_sequences(cut)
        else:
            self._raise_or_drop(row_index, max(len(sequence.ids) for sequence in sequences))

    def _raise_or_drop(self, row_index: int, num_tokens: int) -> None:
        if self.config.truncation != "drop":
            raise ValueError(
                f"{self.config.data_name}, row {row_index}: {num_tokens} tokens are more than "
                f"data.max_seq_length={self.config.max_seq_length}. Give a greater one, or data.truncation=truncate "
                f"or drop."
            )
        self._counts["dropped"] += 1

    def _append_chunks(self, sequence: _SequenceArrays) -> None:
        # A piece begins with the token that the one before ends with, to predict the next from.
        length = self.config.max_seq_length
        for start in range(0, len(sequence.ids) - 1, length - 1):
            piece = _slice_sequence(sequence, slice(start, start + length))
            piece.loss_mask[0] = False
            self._append_sequences([piece])

    def _append_sequences(self, sequences: Sequence[_SequenceArrays]) -> None:
        for ids, learn, types in sequences:
            self._tokens.frombytes(ids.tobytes())
            self._loss_mask.extend(learn.tobytes())
            self._token_type_ids.extend(types)
            self._lengths.append(len(ids))


def _slice_sequence(sequence: _SequenceArrays, bounds: slice) -> _SequenceArrays:
    return _SequenceArrays(
        sequence.ids[bounds], sequence.loss_mask[bounds].copy(), sequence.token_type_ids[bounds]
    )


def _all_have_loss_tokens(sequences: Sequence[_SequenceArrays]) -> bool:
    return all(sequence.loss_mask.any() for sequence in sequences)


def _fingerprint_dataset(dataset: TokenizedDataset) -> str:
    digest = hashlib.sha256(repr((dataset.sequences_per_example, dataset.label_names)).encode())
    for field in (
        dataset.tokens,
        dataset.loss_mask,
        dataset.offsets,
        dataset.labels,
        dataset.token_type_ids,
    ):
        digest.update(b"-" if field is None else field.tobytes())
    return digest.hexdigest()
