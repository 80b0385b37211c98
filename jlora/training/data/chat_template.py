"""Chat templates: checked messages, rendered as transformers renders them, with loss spans."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from jlora.checkpoints.safetensors_io import format_names
from jlora.checkpoints.text_files import read_json, read_text
from jlora.training.data.bounded_jinja import BoundedEnvironment

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# Markers around generated text. They are Unicode noncharacters, so that no text contains them.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"

GENERATION_MARKERS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")

# Start and end of a part of a text, in characters.
CharSpan = tuple[int, int]

TrainOn = Literal["assistant", "last", "all"]

SPECIAL_TOKEN_KEYS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)

_JINJA_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def validate_messages(messages: Any, location: str) -> list[dict[str, Any]]:
    """Returns the messages for a template: plain dicts, without null fields.

    Tables fill every message with nulls for the fields that only others have.

    Raises:
        ValueError: If a message has no role of `ROLES`, or content that is not a string.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"{location} must be a list of messages, got {_abbreviate_repr(messages)}. Use "
            f'[{{"role": "user", "content": "..."}}, ...].'
        )
    for number, message in enumerate(messages):
        _check_message(message, f"{location}, message {number}")
    return drop_null_fields(messages, location)


def _check_message(message: Any, location: str) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(
            f"{location} must have the fields role and content, got {_abbreviate_repr(message)}."
        )
    if message["role"] not in ROLES:
        raise ValueError(
            f"{location}: role={message['role']!r} must be one of {', '.join(ROLES)}. Rename it."
        )
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"{location}: content={_abbreviate_repr(content)} must be a string; only a message "
            f"with tool_calls may omit it."
        )


def drop_null_fields(value: Any, location: str) -> Any:
    """Returns nested dicts and lists without null entries.

    Raises:
        ValueError: If a string contains a generation marker.
    """
    if isinstance(value, str):
        if GENERATION_MARKERS.search(value):
            raise ValueError(
                f"{location} contains U+FDD0 or U+FDD1, which are not characters. Remove them."
            )
        return value
    if isinstance(value, Mapping):
        return {
            key: drop_null_fields(item, location) for key, item in value.items() if item is not None
        }
    if isinstance(value, Sequence):
        return [drop_null_fields(item, location) for item in value]
    return value


def _abbreviate_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    r"""Chat template in the dialect of transformers, run in a sandbox.

    Attributes:
        text: Template, in Jinja.
        variables: Variables besides the messages, such as bos_token or enable_thinking.
        now: Date and time for `strftime_now`; None: the clock. Set it if the template
            `depends_on_date` and the run may be resumed on another day, when the texts would
            change.
        source: Name of the template in errors, such as its file.

    References:
        `apply_chat_template` of transformers, whose renderings are reproduced.

    Example:
        >>> from jlora.training import data
        >>> template = data.ChatTemplate(
        ...     "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        ...     "{% if add_generation_prompt %}assistant: {% endif %}"
        ... )
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> text, spans = template.render_with_spans(chat)
        >>> [text[start:end] for start, end in spans]
        ['Hello\n']
    """

    text: str
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    now: datetime.datetime | None = None
    source: str = "the chat template"

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        text: str | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> ChatTemplate:
        """Returns a checkpoint folder's template, of chat_template.jinja or tokenizer_config.json.

        Args:
            folder: Folder with the tokenizer's files.
            text: Template to use with the folder's special tokens; None: the folder's own.
            variables: Variables to add to the special tokens, or to replace them.
            now: Date and time for `strftime_now`; None: the clock.

        Raises:
            ValueError: If the folder has no template.
        """
        folder = Path(folder)
        variables = {**load_special_tokens(folder), **(variables or {})}
        if text is not None:
            return cls(text, variables, now)
        file = folder / "chat_template.jinja"
        if not file.is_file():
            file = folder / "tokenizer_config.json"
        return cls(_load_template_text(folder), variables, now, f"the chat template of {file}")

    @property
    def depends_on_date(self) -> bool:
        """True if the template calls `strftime_now`, so that its texts depend on `now`."""
        return "strftime_now" in _JINJA_COMMENT.sub("", self.text)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        location: str = "messages",
    ) -> str:
        """Returns the text of a chat.

        Args:
            messages: Messages, each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            add_generation_prompt: True to end the text with the start of an assistant turn.
            location: Name of the messages in errors.

        Raises:
            ValueError: If a message is invalid, or the template raises.
        """
        marked = self._render_marked(
            validate_messages(messages, location), tools, add_generation_prompt, location
        )
        return GENERATION_MARKERS.sub("", marked)

    def render_with_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        train_on: TrainOn = "assistant",
        location: str = "messages",
    ) -> tuple[str, list[CharSpan]]:
        """Returns the text of a chat and the character spans of the assistant's turns.

        The token that ends a turn belongs to its span; the blank or line break that a template
        writes after that token does not. In a template with `{% generation %}` tags, the tags
        define the spans. For other templates, the text up to an answer is rendered without and
        with it.

        Args:
            messages: Messages, each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            train_on: "assistant" for all assistant turns; "last" for the last one, with messages
                after it dropped; "all" for the complete text.
            location: Name of the messages in errors.

        Raises:
            ValueError: If a message is invalid, the template raises, or it renders an earlier turn
                differently once more messages follow.
        """
        if train_on not in get_args(TrainOn):
            raise ValueError(
                f"train_on={train_on!r} must be one of {', '.join(get_args(TrainOn))}."
            )
        messages = validate_messages(messages, location)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last" and turns:
            messages = messages[: turns[-1] + 1]
            turns = turns[-1:]
        marked = self._render_marked(messages, tools, False, location)
        text = GENERATION_MARKERS.sub("", marked)
        if train_on == "all":
            return text, [(0, len(text))]
        if not turns:
            return text, []
        if _GENERATION_TAG.search(self.text):
            first = turns[0] if train_on == "last" else 0
            return text, self._generated_spans(messages, first, marked, tools, location)
        return text, [self._assistant_span(messages, turn, text, tools, location) for turn in turns]

    def _generated_spans(
        self,
        messages: list[dict[str, Any]],
        first_message: int,
        marked_text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> list[CharSpan]:
        """Returns the spans that the template's tags mark, from `first_message` on."""
        spans = _find_marked_spans(marked_text)
        if not first_message:
            return spans
        earlier = self._render_marked(messages[:first_message], tools, False, location)
        return spans[len(_find_marked_spans(earlier)) :]

    def _assistant_span(
        self,
        messages: list[dict[str, Any]],
        turn_index: int,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> CharSpan:
        """Returns the span of one assistant turn in the text of all messages."""
        before = self._render_marked(messages[:turn_index], tools, True, location)
        last = turn_index == len(messages) - 1
        through = (
            text
            if last
            else self._render_marked(messages[: turn_index + 1], tools, False, location)
        )
        if not through.startswith(before) or not text.startswith(through):
            raise ValueError(
                f"{location}: {self.source} renders message {turn_index} differently at the end "
                f"of a chat and before further messages, so the assistant's span is ambiguous. Use "
                f"data.train_on=last, or a template with {{% generation %}} tags."
            )
        turn = through[len(before) :]
        stripped, content = turn.rstrip(), messages[turn_index].get("content", "").rstrip()
        # Without an end-of-turn token, the line break ends a turn and has to be learned.
        if stripped == content or (content and stripped.endswith(content)):
            stripped = turn
        return len(before), len(before) + len(stripped)

    def _render_marked(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        location: str,
    ) -> str:
        """Returns the text with markers around the parts in `{% generation %}` tags."""
        try:
            return self._compiled.render(
                {
                    **self.variables,
                    "messages": messages,
                    "tools": None
                    if tools is None
                    else drop_null_fields(tools, f"{location}, tools"),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # A template can raise anything.
            raise ValueError(
                f"{location}: {self.source} rejects the messages ({error}). Change them to its "
                f"format, or use another template."
            ) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = BoundedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationExtension, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        try:
            return environment.from_string(self.text)
        except Exception as error:  # Jinja compiles to Python, which has limits of its own.
            raise ValueError(
                f"{self.source}, line {getattr(error, 'lineno', 1)} is not valid Jinja ({error}). "
                f"Correct it, or use another template."
            ) from error

    def _strftime_now(self, date_format: str) -> str:
        return (self.now or datetime.datetime.now()).strftime(date_format)


class _GenerationExtension(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which puts markers around its body."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so.

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Returns the block as a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


def _find_marked_spans(marked_text: str) -> list[CharSpan]:
    """Returns the marked spans, counted in the text without markers."""
    bounds = [
        match.start() - count
        for count, match in enumerate(GENERATION_MARKERS.finditer(marked_text))
    ]
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes `<` for web pages.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_special_tokens(folder: Path) -> dict[str, str]:
    """Returns the special tokens of a tokenizer's folder, such as bos_token, by their key."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        for key in SPECIAL_TOKEN_KEYS:
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[key] = token
    return tokens


def _load_template_text(folder: Path) -> str:
    text = find_chat_template(folder)
    if text is None:
        raise ValueError(
            f"{folder} has no chat template: no chat_template.jinja, and no chat_template in "
            f"tokenizer_config.json. Use the folder of a chat model, or give a template."
        )
    return text


def find_chat_template(folder: Path) -> str | None:
    """Returns the text of a folder's chat template, or None.

    Raises:
        ValueError: If the folder has several templates and none is named default, or its file is
            damaged.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return read_text(file)
    template = read_json(config).get("chat_template") if config.is_file() else None
    if template is None or isinstance(template, str):
        return template
    entries = template if isinstance(template, list) else [template]
    by_name = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
    }
    if len(by_name) != len(entries) or not all(
        isinstance(text, str) for pair in by_name.items() for text in pair
    ):
        raise ValueError(
            f"{config}: chat_template={_abbreviate_repr(template)} must be a text, or a list of "
            f"mappings with distinct names and their templates. Copy it again from its source."
        )
    if "default" not in by_name:
        raise ValueError(
            f"{config} has the chat templates {format_names(sorted(by_name))} and none named "
            f"default. Give the text of one."
        )
    return by_name["default"]
