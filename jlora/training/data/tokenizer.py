"""Tokenizer of a checkpoint folder, without the truncation and padding that its file may set."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from jlora.checkpoints.text_files import name_file_in_errors, read_optional_json, read_text
from jlora.training.data.chat_template import ChatTemplate, find_chat_template, load_special_tokens

# Letters of several alphabets, most of which are not in a small vocabulary.
_PROBE_TEXT = "a b\n\u00e9\u4e2d\U0001f600"


class Tokenizer(NamedTuple):
    """Tokenizer of a checkpoint folder.

    Attributes:
        without_special_tokens: Tokenizer that adds no special tokens, and whose offsets cover
            every character.
        with_special_tokens: Tokenizer that adds the special tokens of the model around a text or
            a pair of texts.
        prefix_ids: Ids of the tokens that the model expects before a text, such as bos.
        bos_token_id: Id of the token that begins a text, or None.
        eos_token_id: Id of the token that ends a text, or None.
        pad_token_id: Id of the padding token; 0 if the folder defines none, as padding is masked.
        chat_template: Chat template, or None.
        fingerprint: Hash of all of these; equal ones give equal tokens.
        source: Path of tokenizer.json, for errors.

    Example:
        >>> import tempfile, tokenizers
        >>> from jlora.training import data
        >>> vocab = {"<s>": 0, "low": 1, "rank": 2}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     words.save(f"{folder}/tokenizer.json")
        ...     tokenizer = data.Tokenizer.from_folder(folder)
        >>> tokenizer.encode(["low rank"])
        [[1, 2]]
    """

    without_special_tokens: tokenizers.Tokenizer
    with_special_tokens: tokenizers.Tokenizer
    prefix_ids: tuple[int, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    chat_template: ChatTemplate | None
    fingerprint: str
    source: str = "tokenizer.json"

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        chat_template: ChatTemplate | None = None,
        *,
        now: datetime.datetime | None = None,
    ) -> Tokenizer:
        """Loads the tokenizer of a folder with a tokenizer.json.

        Args:
            folder: Checkpoint folder.
            chat_template: Chat template; None: the folder's.
            now: Date and time for the template's `strftime_now`; None: the template's own, or the
                clock. Without effect on templates that do not `depends_on_date`.

        Raises:
            FileNotFoundError: If there is no tokenizer.json.
            ValueError: If it is damaged.
        """
        folder = Path(folder)
        full, plain = load_tokenizer_json(folder), load_tokenizer_json(folder)
        # Without special tokens, post-processing only trims blanks from offsets.
        plain.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        config = _read_optional_json(folder, "tokenizer_config.json")
        bos, eos, pad = (
            _find_special_token_id(folder, full, kind) for kind in ("bos", "eos", "pad")
        )
        prefix = _find_prefix_ids(full)
        if config.get("add_bos_token") is False:
            prefix = ()
        elif config.get("add_bos_token") and bos is not None:
            prefix = (bos,)
        if chat_template is None and find_chat_template(folder) is not None:
            chat_template = ChatTemplate.from_folder(folder)
        if chat_template is not None and now is not None:
            chat_template = dataclasses.replace(chat_template, now=now)
        digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
        digest.update(repr((prefix, bos, eos)).encode())
        if chat_template is not None:
            digest.update(
                repr((chat_template.text, sorted(chat_template.variables.items()))).encode()
            )
            if chat_template.depends_on_date and chat_template.now is not None:
                digest.update(chat_template.now.isoformat().encode())
        fingerprint, source = digest.hexdigest(), str(folder / "tokenizer.json")
        return cls(plain, full, prefix, bos, eos, pad or 0, chat_template, fingerprint, source)

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one."""
        return max(self.with_special_tokens.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, without special tokens around it."""
        with name_file_in_errors(self.source):
            encodings = self.without_special_tokens.encode_batch_fast(list(texts))
        return [encoding.ids for encoding in encodings]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts that continue another one, such as completions.

        Some tokenizers write a blank before every text (SentencePiece). One in the middle of an
        example would be in the tokens and not in the data, so these texts are encoded behind
        another character.
        """
        if not _adds_blank(self.without_special_tokens):
            return self.encode(texts)
        found: list[list[int] | None] = [None] * len(texts)
        for anchor in _ANCHORS:
            missing = [number for number, ids in enumerate(found) if ids is None]
            with name_file_in_errors(self.source):
                encodings = self.without_special_tokens.encode_batch(
                    [anchor + texts[number] for number in missing]
                )
            for number, encoding in zip(missing, encodings, strict=True):
                first = [start for start, end in encoding.offsets if end > len(anchor)]
                if not first or first[0] >= len(anchor):  # No token has parts of both.
                    skipped = len(encoding.ids) - len(first)
                    found[number] = encoding.ids[skipped:]
        separate = self.encode(texts)
        return [ids or alone for ids, alone in zip(found, separate, strict=True)]

    def add_prefix(self, ids: Sequence[int]) -> list[int]:
        """Returns the ids with `prefix_ids` before them, unless the text begins with these."""
        prefix = list(self.prefix_ids)
        return [*([] if list(ids[: len(prefix)]) == prefix else prefix), *ids]

    def add_eos(self, ids: Sequence[int]) -> list[int]:
        """Returns the ids with the eos token behind them, unless only blanks follow one.

        Raises:
            ValueError: If the tokenizer has no eos token.
        """
        if self.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no eos token, so a model would not learn where a text ends. Add "
                "an eos_token to tokenizer_config.json."
            )
        ids = list(ids)
        # Few tokens are looked at: the blanks behind an end are a line break or two.
        for count, token_id in enumerate(reversed(ids[-_MAX_BLANKS:])):
            if token_id == self.eos_token_id:
                return ids if not self.decode(ids[len(ids) - count :]).strip() else [*ids, token_id]
        return [*ids, self.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, special tokens included."""
        with name_file_in_errors(self.source):
            return self.with_special_tokens.decode(list(ids), skip_special_tokens=False)


# Texts that continuations are encoded behind; one of them is a token of its own.
_ANCHORS = ("\n", ".", ":", "a", "1")

_MAX_BLANKS = 8

# How SentencePiece and tokenizers of bytes write a blank in a token.
_BLANKS = ("\u2581", "\u0120")


def _adds_blank(tokenizer: tokenizers.Tokenizer) -> bool:
    """Returns whether a tokenizer writes a blank before every text."""
    tokens = tokenizer.encode(_find_probe(tokenizer)).tokens
    return bool(tokens) and tokens[0].startswith(_BLANKS)


def _find_probe(tokenizer: tokenizers.Tokenizer) -> str:
    """Returns a text that the tokenizer has tokens for; empty if there is none."""
    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda pair: pair[1])
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = (token for token, _ in vocab if token not in added and not token.startswith(_BLANKS))
    for text in ("a", "A", *tokens):
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception:  # Some have no token for unknown texts, and the library no error type.
            continue
        if ids:
            return text
    return ""


def load_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a folder's tokenizer.json, without truncation and padding.

    Raises:
        FileNotFoundError: If there is no tokenizer.json.
        ValueError: If it is damaged, or cannot encode a text.
    """
    file = folder / "tokenizer.json"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. Pass the folder of a checkpoint, or its owner/name on the "
            f"Hub."
        )
    if not os.path.lexists(file):
        raise FileNotFoundError(
            f"{file} is missing. Use the folder of a checkpoint with its tokenizer; "
            f"`save_pretrained` of a fast tokenizer of transformers writes the file."
        )
    with name_file_in_errors(file):
        tokenizer = tokenizers.Tokenizer.from_str(read_text(file))
        # A file can request truncation at the length of the model's training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some parts of a tokenizer are first used here.
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        tokenizer.decode(tokenizer.encode(_PROBE_TEXT).ids)
        if not vocabulary:
            raise ValueError("it has no tokens. Copy it again from its source.")
    return tokenizer


def _read_optional_json(folder: Path, file_name: str) -> Mapping[str, Any]:
    return read_optional_json(folder / file_name) or {}


def _find_special_token_id(
    folder: Path, tokenizer: tokenizers.Tokenizer, token_kind: str
) -> int | None:
    """Returns the id of a special token, by its text or from a config of the model."""
    text = load_special_tokens(folder).get(f"{token_kind}_token")
    is_unicode = text is not None and not any(0xD800 <= ord(letter) < 0xE000 for letter in text)
    token_id = tokenizer.token_to_id(text) if text is not None and is_unicode else None
    if text is not None and token_id is None:
        raise ValueError(
            f"{folder}: {token_kind}_token={text!r:.200} of tokenizer_config.json or "
            f"special_tokens_map.json is not a token of tokenizer.json. Use the files of one "
            f"checkpoint."
        )
    for name in ("generation_config.json", "config.json"):
        if token_id is None:
            token_id = _read_optional_json(folder, name).get(f"{token_kind}_token_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
    return token_id if isinstance(token_id, int) else None


def _find_prefix_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the tokenizer adds before every text."""
    encoding = tokenizer.encode(_find_probe(tokenizer))
    # Tokens that the tokenizer adds belong to no text.
    texts = [number for number, text in enumerate(encoding.sequence_ids) if text is not None]
    return tuple(encoding.ids[: texts[0]]) if texts else ()
