"""Tokenized examples in flat arrays, and the truncation of those that are too long."""

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
    """Token sequence of an example.

    Attributes:
        ids: Token ids, (tokens,).
        loss_mask: True for tokens that count for the loss, (tokens,), or one value for all.
        token_type_ids: 1 for tokens of the second of a pair of texts, (tokens,); None: all 0.

    Example:
        >>> from jlora.training.data import TokenSequence
        >>> TokenSequence([5, 6, 2], True).ids
        [5, 6, 2]
    """

    ids: Sequence[int] | np.ndarray
    loss_mask: np.ndarray | bool
    token_type_ids: Sequence[int] | None = None


class _SequenceArrays(NamedTuple):
    """Validated `TokenSequence` as arrays."""

    ids: np.ndarray
    loss_mask: np.ndarray
    token_type_ids: bytes


class TokenizeStats(NamedTuple):
    """Counts of rows and examples during tokenization.

    Attributes:
        rows: Rows of the data.
        examples: Examples of the tokenized dataset.
        dropped: Rows dropped because they were too long.
        truncated_to_nothing: Rows dropped because truncation removed all of their loss tokens.
        without_loss_tokens: Rows dropped because they had no loss tokens.
        truncated: Rows truncated.
        split: Rows split into several examples.
        tokens: Tokens of all examples.
        loss_tokens: Tokens that count for the loss.

    Example:
        >>> from jlora.training import data
        >>> stats = data.TokenizeStats(rows=10, examples=9, dropped=1)
        >>> stats.rows - stats.examples == stats.dropped
        True
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
    """Tokenized examples of one sequence each, or of two: the chosen and the rejected answer.

    Attributes:
        tokens: int32 (tokens,) ids, sequence after sequence.
        loss_mask: bool (tokens,), True for tokens that count for the loss; False for the first of
            a sequence, which has no prediction.
        offsets: int64 (sequences + 1,), start of each sequence.
        sequences_per_example: 1, or 2 for preferences.
        labels: int32 (examples,) class ids for classification, otherwise None.
        label_names: Names of the labels, in the order of the class ids, or None.
        token_type_ids: int8 (tokens,), 1 in the second of a pair of texts; None without pairs.
        stats: Counts of the tokenization.
        fingerprint: Hash of the arrays.
        is_chat: Whether the rows were messages, which a chat template wrote.

    Example:
        >>> from jlora.training import data
        >>> from jlora.training.data import TokenizedDatasetBuilder, TokenSequence
        >>> config = data.TokenizeConfig(max_seq_length=4)
        >>> builder = TokenizedDatasetBuilder(config)
        >>> builder.add(0, TokenSequence([5, 6, 2], True))
        >>> dataset = builder.build()
        >>> dataset.num_examples, dataset.example_lengths().tolist(), dataset.loss_mask.tolist()
        (1, [3], [False, True, True])
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
    is_chat: bool = False

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return (len(self.offsets) - 1) // self.sequences_per_example

    def example_lengths(self) -> np.ndarray:
        """Returns the tokens of each example, (examples,); of two sequences, the longer one."""
        return np.diff(self.offsets).reshape(-1, self.sequences_per_example).max(axis=1)

    def get_sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids and the loss mask of one sequence."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.loss_mask[part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Configuration of tokenization.

    Attributes:
        max_seq_length: Maximum number of tokens of an example.
        truncation: Treatment of longer rows: "error" raises with the number of the row; "drop"
            drops it; "truncate" keeps its beginning, or drops it if no loss tokens remain;
            "split", for plain text only, makes consecutive examples, each of which begins with
            the last token of the previous one, so that every token counts for the loss once.
        vocab_size: Vocabulary size of the model, which token ids must be below; None: no limit.
        columns: Column names of the data, by the names of the format. The texts of several
            columns are joined by a blank line, without empty ones.
        data_name: Name of the data in errors.

    Raises:
        ValueError: If max_seq_length is not an int of at least 2, or truncation is unknown.

    Example:
        >>> from jlora.training import data
        >>> config = data.TokenizeConfig(max_seq_length=1024, columns={"text": "content"})
        >>> config.truncation
        'error'
    """

    max_seq_length: int
    truncation: TruncationPolicy = "error"
    vocab_size: int | None = None
    columns: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    data_name: str = "the data"

    def __post_init__(self) -> None:
        if type(self.max_seq_length) is not int or self.max_seq_length < 2:
            raise ValueError(
                f"TokenizeConfig.max_seq_length={self.max_seq_length} (data.max_seq_length of a "
                f"recipe) must be an int of at least 2: a token and the next one."
            )
        if self.truncation not in TRUNCATION_POLICIES:
            raise ValueError(
                f"TokenizeConfig.truncation={self.truncation!r} must be one of "
                f"{', '.join(TRUNCATION_POLICIES)}."
            )


class TokenizedDatasetBuilder:
    """Collects examples in growing arrays, and truncates them as a `TokenizeConfig` sets.

    Example:
        >>> from jlora.training.data import TokenizeConfig, TokenizedDatasetBuilder, TokenSequence
        >>> builder = TokenizedDatasetBuilder(TokenizeConfig(max_seq_length=8, vocab_size=10))
        >>> builder.add(0, TokenSequence([5, 6, 2], True))
    """

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        self._counts = dict.fromkeys(TokenizeStats._fields, 0)
        self._tokens = array.array("i")
        self._loss_mask = bytearray()
        self._token_type_ids = bytearray()
        self._lengths = array.array("q")
        self._labels = array.array("i")

    def add(self, row_index: int, *token_sequences: TokenSequence) -> None:
        """Adds a row of one or two sequences, which are kept or dropped together.

        Raises:
            ValueError: If a token is outside the vocabulary, or the row is too long.
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
        """Adds a row with a label, which the tokenizer has already truncated where requested.

        Raises:
            ValueError: If a token is outside the vocabulary, or the row is too long.
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
        self,
        *,
        sequences_per_example: int = 1,
        label_names: Sequence[str] | None = None,
        is_chat: bool = False,
    ) -> TokenizedDataset:
        """Returns the collected examples.

        Args:
            sequences_per_example: Sequences of each example: 1, or 2 for preferences.
            label_names: Names of the labels, if the rows have labels.
            is_chat: Whether a chat template wrote the rows.

        Raises:
            ValueError: If there are no examples.
        """
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(self._lengths, np.int64))])
        loss_mask = np.frombuffer(self._loss_mask, np.bool_)
        types = np.frombuffer(self._token_type_ids, np.int8)
        counts = self._counts | {
            "examples": (len(offsets) - 1) // sequences_per_example,
            "tokens": len(loss_mask),
            "loss_tokens": int(loss_mask.sum()),
        }
        stats = TokenizeStats(**counts)
        if not stats.examples:
            raise ValueError(
                f"{self.config.data_name} has no examples to train on: of {stats.rows} rows, "
                f"{stats.dropped} are longer than "
                f"data.max_seq_length={self.config.max_seq_length}, {stats.truncated_to_nothing} "
                f"have no loss tokens within it, and {stats.without_loss_tokens} have none at all. "
                f"Increase data.max_seq_length, or check the rows."
            )
        dataset = TokenizedDataset(
            tokens=np.frombuffer(self._tokens, np.int32),
            loss_mask=loss_mask,
            offsets=offsets.astype(np.int64),
            sequences_per_example=sequences_per_example,
            labels=None if label_names is None else np.frombuffer(self._labels, np.int32),
            label_names=None if label_names is None else tuple(label_names),
            token_type_ids=types if types.any() else None,
            stats=stats,
            fingerprint="",
            is_chat=is_chat,
        )
        return dataset._replace(fingerprint=_fingerprint_dataset(dataset))

    def _validate_sequence(self, row_index: int, token_sequence: TokenSequence) -> _SequenceArrays:
        """Returns the sequence as arrays, without its first token in the loss mask."""
        ids = np.array(token_sequence.ids, np.int32)
        vocab_size = self.config.vocab_size or np.inf
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            token = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ValueError(
                f"{self.config.data_name}, row {row_index}: token {token} is outside of the "
                f"model's vocabulary of {vocab_size}. Use the tokenizer of the model's checkpoint."
            )
        loss_mask = np.array(np.broadcast_to(token_sequence.loss_mask, ids.shape), np.bool_)
        loss_mask[:1] = False
        types = token_sequence.token_type_ids
        return _SequenceArrays(ids, loss_mask, bytes(len(ids) if types is None else types))

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
                f"data.max_seq_length={self.config.max_seq_length}. Increase it, or use "
                f"data.truncation=truncate or drop."
            )
        self._counts["dropped"] += 1

    def _append_chunks(self, sequence: _SequenceArrays) -> None:
        # A chunk begins with the last token of the previous one, which predicts its next token.
        length = self.config.max_seq_length
        for start in range(0, len(sequence.ids) - 1, length - 1):
            chunk = _slice_sequence(sequence, slice(start, start + length))
            chunk.loss_mask[0] = False
            self._append_sequences([chunk])

    def _append_sequences(self, sequences: Sequence[_SequenceArrays]) -> None:
        for ids, loss_mask, types in sequences:
            self._tokens.frombytes(ids.tobytes())
            self._loss_mask.extend(loss_mask.tobytes())
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
