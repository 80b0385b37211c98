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

from jlora.checkpoints.tensors import read_json
from jlora.training.data.template import ChatTemplate, find_template, special_tokens


class Tokenizer(NamedTuple):
    """Text to token ids, as a checkpoint's folder says.

    Attributes:
        plain: Encodes text alone: it adds no token, and its offsets cover every character.
        whole: Adds what the model expects around a text, or a pair of texts.
        before: The tokens that the model expects before a text, such as the bos token.
        bos: The id of the token that begins a text, if there is one.
        eos: Of the token that ends one.
        pad: Of what fills up a batch; 0 where the folder names none, as nothing looks at it.
        template: Of chats, if the folder has one.
        fingerprint: Of all of that; equal ones make equal tokens.
    """

    plain: tokenizers.Tokenizer
    whole: tokenizers.Tokenizer
    before: tuple[int, ...]
    bos: int | None
    eos: int | None
    pad: int
    template: ChatTemplate | None
    fingerprint: str

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike[str],
        template: ChatTemplate | None = None,
        *,
        now: datetime.datetime | None = None,
    ) -> Tokenizer:
        """The tokenizer of a folder with a tokenizer.json.

        Args:
            folder: A checkpoint's.
            template: Of chats; the folder's when left out.
            now: What the template's `strftime_now` tells; what it has itself, or the clock, when
                None. Of a template that is not `dated` nothing depends on it.

        Raises:
            FileNotFoundError: There is no tokenizer.json.
            ValueError: It is damaged.
        """
        folder = Path(folder)
        whole, plain = _read(folder), _read(folder)
        # What is left of it without special tokens is the trimming of blanks from offsets.
        plain.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        config = _config(folder, "tokenizer_config.json")
        bos, eos, pad = (_id(folder, whole, kind) for kind in ("bos", "eos", "pad"))
        before = _before(whole)
        if config.get("add_bos_token") is False:
            before = ()
        elif config.get("add_bos_token") and bos is not None:
            before = (bos,)
        if template is None and find_template(folder) is not None:
            template = ChatTemplate.of(folder)
        if template is not None and now is not None:
            template = dataclasses.replace(template, now=now)
        digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
        digest.update(repr((before, bos, eos)).encode())
        if template is not None:
            digest.update(repr((template.text, sorted(template.variables.items()))).encode())
            if template.dated and template.now is not None:
                digest.update(template.now.isoformat().encode())
        return cls(plain, whole, before, bos, eos, pad or 0, template, digest.hexdigest())

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of a token."""
        return max(self.whole.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any token that is not of it."""
        return [encoding.ids for encoding in self.plain.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return self.whole.decode(list(ids), skip_special_tokens=False)


def _read(folder: Path) -> tokenizers.Tokenizer:
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


def _config(folder: Path, name: str) -> Mapping[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _id(folder: Path, tokenizer: tokenizers.Tokenizer, kind: str) -> int | None:
    """The id of a special token: by its text, or as a model's config names it."""
    text = special_tokens(folder).get(f"{kind}_token")
    found = None if text is None else tokenizer.token_to_id(text)
    if text is not None and found is None:
        raise ValueError(
            f"{folder}: {kind}_token={text!r} is none of tokenizer.json's tokens. Take both files "
            f"from one checkpoint."
        )
    for name in ("generation_config.json", "config.json"):
        if found is None:
            found = _config(folder, name).get(f"{kind}_token_id")
            found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else None


def _before(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before every text."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    within = tokenizer.encode("a").ids
    starts = range(len(within) - len(alone) + 1)
    start = next((i for i in starts if within[i : i + len(alone)] == alone), 0)
    return tuple(within[:start])
