"""The messages of a chat, looked at before a template sees them."""

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
import jinja2.sandbox

from jlora.checkpoints.safetensors_io import format_names, read_json

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# A template's marks around what is generated. They are no characters, so no text holds them.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"

GENERATION_MARKERS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")


def validate_messages(messages: Any, location: str) -> list[dict[str, Any]]:
    """The messages as a template takes them: plain dicts, without the fields that are null.

    Tables give every message all fields that one of them has.

    Raises:
        ValueError: A message has no role of `ROLES`, or content that is no string.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"{location} is {_abbreviate_repr(messages)}, no list of messages. Give "
            f'[{{"role": "user", "content": "..."}}, ...].'
        )
    for number, message in enumerate(messages):
        _check_message(message, f"{location}, message {number}")
    return drop_null_fields(messages, location)


def _check_message(message: Any, location: str) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(
            f"{location} is {_abbreviate_repr(message)} and has no role. Give it the fields role and content."
        )
    if message["role"] not in ROLES:
        raise ValueError(
            f"{location}: role={message['role']!r} is none of {', '.join(ROLES)}. Rename it."
        )
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"{location}: content={_abbreviate_repr(content)} is no string. Give text; only a message with "
            f"tool_calls may go without."
        )


def drop_null_fields(value: Any, location: str) -> Any:
    """The same of dicts, lists and what they hold, without what is null.

    Raises:
        ValueError: A string holds a mark.
    """
    if isinstance(value, str):
        if GENERATION_MARKERS.search(value):
            raise ValueError(
                f"{location} holds U+FDD0 or U+FDD1, which stand for no character. Remove them."
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


CharSpan = tuple[int, int]

TrainOn = Literal["assistant", "last", "all"]

SPECIAL_TOKEN_KEYS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)

_JINJA_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template of transformers' kind, which runs in a sandbox.

    Attributes:
        text: The template, in Jinja.
        variables: What it may use besides the messages: bos_token and others, `enable_thinking`.
        now: What `strftime_now` tells; the clock when None. Set it if the template is `depends_on_date` and
            the run may be resumed on another day, when the texts would be others.

    References:
        transformers' `apply_chat_template`, whose renderings these are.
    """

    text: str
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    now: datetime.datetime | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        text: str | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> ChatTemplate:
        """The template of a checkpoint's folder: chat_template.jinja or in tokenizer_config.json.

        Args:
            folder: With the tokenizer's files.
            text: Another template, which goes with the folder's special tokens.
            variables: More of them, or others.
            now: What `strftime_now` tells; the clock when None.

        Raises:
            ValueError: The folder has no template.
        """
        folder = Path(folder)
        given = {**load_special_tokens(folder), **(variables or {})}
        return cls(_load_template_text(folder) if text is None else text, given, now)

    @property
    def depends_on_date(self) -> bool:
        """Whether the template asks for the date, so that its texts depend on `now`."""
        return "strftime_now" in _JINJA_COMMENT.sub("", self.text)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        location: str = "messages",
    ) -> str:
        """The text of a chat.

        Args:
            messages: Each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            add_generation_prompt: Whether the text ends where the assistant begins to speak.
            location: What errors call the messages.

        Raises:
            ValueError: A message is wrong, or the template refuses them.
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
        """The text of a chat, and from where to where in it the assistant speaks.

        The token that ends a turn belongs to what the assistant says, the blank or line break that
        a template puts after it does not. A template with `{% generation %}` says itself what is
        generated. For others the text up to an answer is rendered without and with it.

        Args:
            messages: Each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            train_on: "assistant" for all that the assistant says; "last" for its last message, and
                messages after that are left out; "all" for the whole text.
            location: What errors call the messages.

        Raises:
            ValueError: A message is wrong, the template refuses them, or writes earlier turns in
                another way once more follow.
        """
        if train_on not in get_args(TrainOn):
            raise ValueError(
                f"train_on={train_on!r} is none of {', '.join(get_args(TrainOn))}. Choose one."
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
        """What the template marked, of the messages from the first wanted on."""
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
        """Where one answer is in the text of all messages."""
        before = self._render_marked(messages[:turn_index], tools, True, location)
        last = turn_index == len(messages) - 1
        through = (
            text
            if last
            else self._render_marked(messages[: turn_index + 1], tools, False, location)
        )
        if not through.startswith(before) or not text.startswith(through):
            raise ValueError(
                f"{location}: the chat template writes message {turn_index} in one way where the chat ends "
                f"and in another where it goes on, so what the assistant says cannot be told "
                f"apart. Use data.train_on=last, or a template with {{% generation %}} tags."
            )
        said = through[len(before) :]
        ended, content = said.rstrip(), messages[turn_index].get("content", "").rstrip()
        # Where no token ends a turn, the line break does, and has to be learnt.
        if ended == content or (content and ended.endswith(content)):
            ended = said
        return len(before), len(before) + len(ended)

    def _render_marked(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        location: str,
    ) -> str:
        """The text with marks around what the template's tags say is generated."""
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
                f"{location}: the chat template refuses the messages ({error}). Write them as it "
                f"expects, or give another template."
            ) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationExtension, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        try:
            return environment.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"The chat template's line {error.lineno} is no Jinja ({error}). Mend it, or give "
                f"another template."
            ) from error

    def _strftime_now(self, date_format: str) -> str:
        return (self.now or datetime.datetime.now()).strftime(date_format)


class _GenerationExtension(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which puts marks around what it holds."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so.

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call of what marks it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


def _find_marked_spans(marked_text: str) -> list[CharSpan]:
    """Where marked parts are in the text without the marks."""
    places = [
        match.start() - count
        for count, match in enumerate(GENERATION_MARKERS.finditer(marked_text))
    ]
    return list(zip(places[::2], places[1::2], strict=True))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter writes for web pages: `<` as an escape.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens of a tokenizer's folder: bos_token and the like, as far as it has them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        for key in SPECIAL_TOKEN_KEYS:
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found


def _load_template_text(folder: Path) -> str:
    text = find_chat_template(folder)
    if text is None:
        raise ValueError(
            f"{folder} has no chat template: no chat_template.jinja, and no chat_template in "
            f"tokenizer_config.json. Take the folder of a model tuned to chat, or give a template."
        )
    return text


def find_chat_template(folder: Path) -> str | None:
    """The text of a folder's chat template, if it has one.

    Raises:
        ValueError: It has several of which none is named default.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = read_json(config).get("chat_template") if config.is_file() else None
    if not isinstance(found, list):
        return found
    named = {entry["name"]: entry["template"] for entry in found}
    if "default" not in named:
        raise ValueError(
            f"{config} has the chat templates {format_names(sorted(named))} and none named default. Give "
            f"the text of one."
        )
    return named["default"]
