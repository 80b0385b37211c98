"""A checkpoint's tokenizer, without the cutting and padding that its file may ask for."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from jlora.checkpoints.safetensors_io import read_json
from jlora.training.data.chat_template import ChatTemplate, find_chat_template, load_special_tokens


class Tokenizer(NamedTuple):
    """Text to token ids, as a checkpoint's folder says.

    Attributes:
        without_special_tokens: Encodes text alone: it adds no token, and its offsets cover every character.
        with_special_tokens: Adds what the model expects around a text, or a pair of texts.
        prefix_ids: The tokens that the model expects before a text, such as the bos token.
        bos_token_id: The id of the token that begins a text, if there is one.
        eos_token_id: Of the token that ends one.
        pad_token_id: Of what fills up a batch; 0 where the folder names none, as nothing looks at it.
        chat_template: Of chats, if the folder has one.
        fingerprint: Of all of that; equal ones make equal tokens.
    """

    without_special_tokens: tokenizers.Tokenizer
    with_special_tokens: tokenizers.Tokenizer
    prefix_ids: tuple[int, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    chat_template: ChatTemplate | None
    fingerprint: str

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        chat_template: ChatTemplate | None = None,
        *,
        now: datetime.datetime | None = None,
    ) -> Tokenizer:
        """The tokenizer of a folder with a tokenizer.json.

        Args:
            folder: A checkpoint's.
            chat_template: Of chats; the folder's when left out.
            now: What the template's `strftime_now` tells; what it has itself, or the clock, when
                None. Of a template that is not `dated` nothing depends on it.

        Raises:
            FileNotFoundError: There is no tokenizer.json.
            ValueError: It is damaged.
        """
        folder = Path(folder)
        whole, plain = _load_tokenizer_json(folder), _load_tokenizer_json(folder)
        # What is left of it without special tokens is the trimming of blanks from offsets.
        plain.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        config = _read_optional_json(folder, "tokenizer_config.json")
        bos, eos, pad = (
            _find_special_token_id(folder, whole, kind) for kind in ("bos", "eos", "pad")
        )
        before = _find_prefix_ids(whole)
        if config.get("add_bos_token") is False:
            before = ()
        elif config.get("add_bos_token") and bos is not None:
            before = (bos,)
        if chat_template is None and find_chat_template(folder) is not None:
            chat_template = ChatTemplate.from_folder(folder)
        if chat_template is not None and now is not None:
            chat_template = dataclasses.replace(chat_template, now=now)
        digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
        digest.update(repr((before, bos, eos)).encode())
        if chat_template is not None:
            digest.update(
                repr((chat_template.text, sorted(chat_template.variables.items()))).encode()
            )
            if chat_template.depends_on_date and chat_template.now is not None:
                digest.update(chat_template.now.isoformat().encode())
        return cls(plain, whole, before, bos, eos, pad or 0, chat_template, digest.hexdigest())

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of a token."""
        return max(self.with_special_tokens.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any token that is not of it."""
        return [
            encoding.ids for encoding in self.without_special_tokens.encode_batch_fast(list(texts))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return self.with_special_tokens.decode(list(ids), skip_special_tokens=False)


def _load_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing. Give the folder of a checkpoint with its tokenizer; "
            f"transformers' `save_pretrained` of a fast tokenizer writes the file."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises nothing more special.
        raise ValueError(
            f"{file} is no tokenizer ({error}). Copy it anew from its source."
        ) from error
    # A file can ask to cut texts at the length that a model was trained with.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_optional_json(folder: Path, file_name: str) -> Mapping[str, Any]:
    return read_json(folder / file_name) if (folder / file_name).is_file() else {}


def _find_special_token_id(
    folder: Path, tokenizer: tokenizers.Tokenizer, token_kind: str
) -> int | None:
    """The id of a special token: by its text, or as a model's config names it."""
    text = load_special_tokens(folder).get(f"{token_kind}_token")
    found = None if text is None else tokenizer.token_to_id(text)
    if text is not None and found is None:
        raise ValueError(
            f"{folder}: {token_kind}_token={text!r} is none of tokenizer.json's tokens. Take both files "
            f"from one checkpoint."
        )
    for name in ("generation_config.json", "config.json"):
        if found is None:
            found = _read_optional_json(folder, name).get(f"{token_kind}_token_id")
            found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else None


def _find_prefix_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before every text."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    within = tokenizer.encode("a").ids
    starts = range(len(within) - len(alone) + 1)
    start = next((i for i in starts if within[i : i + len(alone)] == alone), 0)
    return tuple(within[:start])
