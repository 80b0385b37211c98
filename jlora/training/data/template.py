"""Chat templates: messages to text, and which of it the assistant says."""

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

from jlora.checkpoints.tensors import listed, read_json
from jlora.training.data.messages import CLOSE, MARKS, OPEN, Message, checked, plain

Span = tuple[int, int]
LossOn = Literal["responses", "last", "all"]

SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template of transformers' kind, which runs in a sandbox.

    Attributes:
        text: The template, in Jinja.
        variables: What it may use besides the messages: bos_token and others, `enable_thinking`.
        now: What `strftime_now` tells; the clock when None. Set it if the template is `dated` and
            the run may be resumed on another day, when the texts would be others.

    References:
        transformers' `apply_chat_template`, whose renderings these are.
    """

    text: str
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    now: datetime.datetime | None = None

    @classmethod
    def of(
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
        given = {**special_tokens(folder), **(variables or {})}
        return cls(_text_of(folder) if text is None else text, given, now)

    @property
    def dated(self) -> bool:
        """Whether the template asks for the date, so that its texts depend on `now`."""
        return "strftime_now" in _COMMENT.sub("", self.text)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        where: str = "messages",
    ) -> str:
        """The text of a chat.

        Args:
            messages: Each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            add_generation_prompt: Whether the text ends where the assistant begins to speak.
            where: What errors call the messages.

        Raises:
            ValueError: A message is wrong, or the template refuses them.
        """
        marked = self._marked(checked(messages, where), tools, add_generation_prompt, where)
        return MARKS.sub("", marked)

    def spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        loss_on: LossOn = "responses",
        where: str = "messages",
    ) -> tuple[str, list[Span]]:
        """The text of a chat, and from where to where in it the assistant speaks.

        The token that ends a turn belongs to what the assistant says, the blank or line break that
        a template puts after it does not. A template with `{% generation %}` says itself what is
        generated. For others the text up to an answer is rendered without and with it.

        Args:
            messages: Each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            loss_on: "responses" for all that the assistant says; "last" for its last message, and
                messages after that are left out; "all" for the whole text.
            where: What errors call the messages.

        Raises:
            ValueError: A message is wrong, the template refuses them, or writes earlier turns in
                another way once more follow.
        """
        if loss_on not in get_args(LossOn):
            raise ValueError(
                f"loss_on={loss_on!r} is none of {', '.join(get_args(LossOn))}. Choose one."
            )
        messages = checked(messages, where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if loss_on == "last" and turns:
            messages = messages[: turns[-1] + 1]
            turns = turns[-1:]
        marked = self._marked(messages, tools, False, where)
        text = MARKS.sub("", marked)
        if loss_on == "all":
            return text, [(0, len(text))]
        if not turns:
            return text, []
        if _TAG.search(self.text):
            first = turns[0] if loss_on == "last" else 0
            return text, self._generated(messages, first, marked, tools, where)
        return text, [self._turn(messages, turn, text, tools, where) for turn in turns]

    def _generated(
        self,
        messages: list[dict[str, Any]],
        first: int,
        marked: str,
        tools: Sequence[Mapping[str, Any]] | None,
        where: str,
    ) -> list[Span]:
        """What the template marked, of the messages from the first wanted on."""
        spans = _marked_spans(marked)
        if not first:
            return spans
        earlier = self._marked(messages[:first], tools, False, where)
        return spans[len(_marked_spans(earlier)) :]

    def _turn(
        self,
        messages: list[dict[str, Any]],
        turn: int,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        where: str,
    ) -> Span:
        """Where one answer is in the text of all messages."""
        before = self._marked(messages[:turn], tools, True, where)
        last = turn == len(messages) - 1
        through = text if last else self._marked(messages[: turn + 1], tools, False, where)
        if not through.startswith(before) or not text.startswith(through):
            raise ValueError(
                f"{where}: the chat template writes message {turn} in one way where the chat ends "
                f"and in another where it goes on, so what the assistant says cannot be told "
                f"apart. Use data.loss_on=last, or a template with {{% generation %}} tags."
            )
        said = through[len(before) :]
        ended, content = said.rstrip(), messages[turn].get("content", "").rstrip()
        # Where no token ends a turn, the line break does, and has to be learnt.
        if ended == content or (content and ended.endswith(content)):
            ended = said
        return len(before), len(before) + len(ended)

    def _marked(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        where: str,
    ) -> str:
        """The text with marks around what the template's tags say is generated."""
        try:
            return self._compiled.render(
                {
                    **self.variables,
                    "messages": messages,
                    "tools": None if tools is None else plain(tools, f"{where}, tools"),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # A template can raise anything.
            raise ValueError(
                f"{where}: the chat template refuses the messages ({error}). Write them as it "
                f"expects, or give another template."
            ) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
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

    def _strftime_now(self, form: str) -> str:
        return (self.now or datetime.datetime.now()).strftime(form)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which puts marks around what it holds."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so.

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call of what marks it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _marked_spans(marked: str) -> list[Span]:
    """Where marked parts are in the text without the marks."""
    places = [match.start() - count for count, match in enumerate(MARKS.finditer(marked))]
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


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens of a tokenizer's folder: bos_token and the like, as far as it has them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        for key in SPECIAL_TOKENS:
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found


def _text_of(folder: Path) -> str:
    text = find_template(folder)
    if text is None:
        raise ValueError(
            f"{folder} has no chat template: no chat_template.jinja, and no chat_template in "
            f"tokenizer_config.json. Take the folder of a model tuned to chat, or give a template."
        )
    return text


def find_template(folder: Path) -> str | None:
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
            f"{config} has the chat templates {listed(sorted(named))} and none named default. Give "
            f"the text of one."
        )
    return named["default"]
