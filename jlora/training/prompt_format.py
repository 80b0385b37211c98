"""Format in which a run's data writes prompts and ends answers, kept with its adapter."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora import models
from jlora.checkpoints.adapter_file import (
    fingerprint_base,
    read_lineage,
    read_prompt_fields,
    write_adapter,
)
from jlora.checkpoints.base_digest import BaseDigest
from jlora.checkpoints.lineage import Lineage
from jlora.checkpoints.safetensors_io import replace_file_atomically
from jlora.checkpoints.text_files import read_optional_json, read_optional_text, read_text
from jlora.training.data.chat_template import ChatTemplate
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.recipe.sections import Recipe

CHAT_TEMPLATE_FILE = "chat_template.jinja"
PROMPT_FORMAT_FILE = "prompt_format.json"  # In PEFT folders, where PEFT ignores it.


class PromptFormat(NamedTuple):
    """Format of a run's prompts and answers.

    Attributes:
        is_chat: Whether prompts are messages for a chat template.
        end_token_ids: Special tokens with which answers of chats end, sorted.
        chat_template: Text of the run's own chat template; None: that of its base.
        chat_template_date: Day for templates that contain the date; None: the clock.
    """

    is_chat: bool
    end_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    chat_template_date: str | None = None

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, is_chat: bool, end_token_ids: tuple[int, ...]
    ) -> PromptFormat:
        """Returns the format of a run, with the chat template of its recipe."""
        file = recipe.data.chat_template
        template = None if file is None else read_text(Path(file))
        return cls(is_chat, end_token_ids, template, recipe.data.chat_template_date)

    @classmethod
    def from_fields(cls, fields: Any, location: str) -> PromptFormat:
        """Returns the format in fields of JSON, as `_asdict` returns them.

        Raises:
            ValueError: A field has another type, or does not exist.
        """
        known = fields if isinstance(fields, dict) else {}
        ends = known.get("end_token_ids", ())
        template, date = known.get("chat_template"), known.get("chat_template_date")
        expected = {
            f"the fields {', '.join(cls._fields)}": not set(known) - set(cls._fields),
            "is_chat, true or false": type(known.get("is_chat")) is bool,
            "end_token_ids, a list of token ids": isinstance(ends, list | tuple)
            and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ends),
            "chat_template, a text or null": template is None or isinstance(template, str),
            "chat_template_date, such as 2026-01-31, or null": date is None or _is_date(date),
        }
        if wrong := [name for name, is_right in expected.items() if not is_right]:
            raise ValueError(
                f"{location} is damaged: expected {'; '.join(wrong)}. Copy the adapter again."
            )
        if template is not None:
            ChatTemplate(template, source=f"{location}: chat_template").check_syntax()
        return cls(**{**known, "end_token_ids": tuple(ends)})

    def load_tokenizer(self, folder: Path, source: str = "the chat template") -> Tokenizer:
        """Returns the tokenizer of the base in a folder, with the chat template and the date.

        Args:
            folder: Folder of the base.
            source: Name of the format's own chat template in errors.
        """
        date, template = self.chat_template_date, None
        now = None if date is None else datetime.datetime.fromisoformat(date)
        if self.chat_template is not None:
            template = ChatTemplate.from_folder(
                folder, text=self.chat_template, now=now, source=source
            )
        return Tokenizer.from_folder(folder, template, now=now)

    def write_beside_peft(self, folder: Path) -> None:
        """Writes the format, and the chat template as other programs read it, to a PEFT folder."""
        _update_json(folder / PROMPT_FORMAT_FILE, self._asdict())
        if self.chat_template is not None:
            write_chat_template(folder, self.chat_template)

    def write_to_merged(self, folder: Path) -> None:
        """Writes the chat template and the ends of answers that a merged checkpoint lacks."""
        if self.chat_template is not None:
            write_chat_template(folder, self.chat_template)
            _update_json(folder / "tokenizer_config.json", {"chat_template": self.chat_template})
        known = models.eos_token_ids(folder)
        if new := [token_id for token_id in self.end_token_ids if token_id not in known]:
            _update_json(folder / "generation_config.json", {"eos_token_id": [*known, *new]})


def _is_date(text: Any) -> bool:
    """Returns whether a value is a date as recipes have it, with dashes."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except (TypeError, ValueError):
        return False


def read_prompt_format(adapter: Path, model: Any = None) -> PromptFormat | None:
    """Returns the prompt format of an adapter; None if nothing is known of it.

    Files without a format have the recipe in their lineage, and its chat template beside them. A
    PEFT folder of another program may have a chat template.

    Args:
        adapter: Adapter file of jlora, or PEFT folder.
        model: Model of the base, whose vocabulary has the ends of answers. None: not compared.

    Raises:
        FileNotFoundError: The recipe has a chat template, which is not there.
        ValueError: The format is damaged, or of another vocabulary.
    """
    prompt_format = _read_any_prompt_format(adapter)
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    ends = () if prompt_format is None else prompt_format.end_token_ids
    if vocab_size is not None and (beyond := [end for end in ends if end >= vocab_size]):
        raise ValueError(
            f"{adapter}: its prompts end with the token {beyond[0]}, but the base has "
            f"{vocab_size:,} tokens. Use the base of its run, or copy the adapter again."
        )
    return prompt_format


def _read_any_prompt_format(adapter: Path) -> PromptFormat | None:
    if adapter.is_dir():
        file = adapter / PROMPT_FORMAT_FILE
        fields = read_optional_json(file)
        template = read_optional_text(adapter / CHAT_TEMPLATE_FILE)
        if fields is not None:
            return PromptFormat.from_fields(fields, str(file))
        if template is None:
            return None
        return PromptFormat.from_fields(
            {"is_chat": True, "chat_template": template}, str(adapter / CHAT_TEMPLATE_FILE)
        )
    fields = read_prompt_fields(adapter)
    if fields is not None:
        return PromptFormat.from_fields(fields, f"{adapter}: 'prompts' in its metadata")
    data = (read_lineage(adapter).recipe or {}).get("data")
    sources = data.get("train") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(sources, list):
        return None  # The recipe of another program.
    is_chat = any(isinstance(each, dict) and each.get("format") == "chat" for each in sources)
    text = None
    if data.get("chat_template") is not None:
        template = adapter.parent / CHAT_TEMPLATE_FILE
        text = read_optional_text(template)
        if text is None:
            raise FileNotFoundError(
                f"{adapter} was trained with a chat template of its own, "
                f"data.chat_template={data['chat_template']!r}, but there is no {template}. Copy "
                f"that file of the run's folder beside the adapter."
            )
    date = data.get("chat_template_date")
    fields = {"is_chat": is_chat, "chat_template": text, "chat_template_date": date}
    return PromptFormat.from_fields(fields, f"{adapter}: its recipe")


def save_adapter_and_format(
    path: Path,
    adapter: Mapping[str, Any],
    params: Any,
    prompt_format: PromptFormat | None,
    base_digest: BaseDigest,
    lineage: Lineage | None = None,
) -> None:
    """Saves an adapter like `jlora.save_adapter`, with its prompt format and its base's digest.

    Args:
        path: File to write.
        adapter: Adapter.
        params: Base parameters that it belongs to.
        prompt_format: Prompt format of the adapter. None: unknown.
        base_digest: Digest of the checkpoint that `params` are from.
        lineage: Origin of the adapter. None: unknown.
    """
    fingerprints = fingerprint_base(params, adapter)
    fields = None if prompt_format is None else prompt_format._asdict()
    write_adapter(path, adapter, fingerprints, lineage, base_digest, fields)


def write_chat_template(folder: Path, text: str) -> None:
    """Writes a chat template to a folder, in the file that transformers reads."""
    replace_file_atomically(folder / CHAT_TEMPLATE_FILE, text.encode())


def _update_json(path: Path, fields: dict[str, Any]) -> None:
    """Sets fields of a JSON file, which is created if it does not exist."""
    content = read_optional_json(path) or {}
    text = json.dumps({**content, **fields}, indent=2, ensure_ascii=False) + "\n"
    replace_file_atomically(path, text.encode())
