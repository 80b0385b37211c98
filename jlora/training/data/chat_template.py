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
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from jlora.checkpoints.safetensors_io import format_names
from jlora.checkpoints.text_files import read_optional_json, read_optional_text
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

# Marks of a message for training, in the formats of OpenAI, Axolotl and ms-swift: 0 or false leaves
# an assistant's turn out of the loss.
TRAINING_MARKS = ("weight", "train", "training", "loss", "loss_scale")

# Marks of other programs, of parts of a message or with another meaning of true.
_OTHER_MARKS = (
    "train_detail",
    "training_detail",
    "train_on",
    "trainable",
    "learn",
    "ignore",
    "mask",
    "masked",
    "loss_mask",
)

_USER_MESSAGE = {"role": "user", "content": "-"}

# Some templates want ids of nine characters.
_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}

_CALL_MESSAGE = {"role": "assistant", "content": "-", "tool_calls": [_CALL]}

_RESULT_FIELDS = {"name": "f", "tool_call_id": _CALL["id"]}

# Texts of content to find out what a template writes. Filters such as trim and upper leave these
# characters as they are, and Python escapes them where a template writes a list by mistake.
_CONTENT_MARKS = ("\ue000", "\ue001")

# Roles of ShareGPT's `from`.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def validate_messages(messages: Any, location: str) -> list[dict[str, Any]]:
    """Returns the messages for a template, as plain dicts.

    Fields reach the template as they are, with three exceptions. Null fields of a message, of a
    part of its content or of a tool call are left out, since tables fill every message with nulls
    for the fields that only others have; `content` and everything in a call's arguments stay.
    `tool_calls` may be JSON text. Messages of ShareGPT, with `from` and `value`, get `role` and
    `content`.

    Args:
        messages: Messages, or their JSON text.
        location: Name of the messages in errors.

    Raises:
        ValueError: If a message has no role of `ROLES`, or content that is neither text nor a list
            of text parts.
    """
    if isinstance(messages, str):
        messages = _parse_messages(messages, location)
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"{location} must be a list of messages, got {abbreviate_repr(messages)}. Use "
            f'[{{"role": "user", "content": "..."}}, ...].'
        )
    return [
        _normalize_message(message, f"{location}, message {number}")
        for number, message in enumerate(messages)
    ]


def _parse_messages(text: str, location: str) -> Any:
    """Returns the messages in a text, which a cell of a .csv file has as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{location} must be a list of messages, got {abbreviate_repr(text)}. Use "
            f'[{{"role": "user", "content": "..."}}, ...], or the format text for plain texts.'
        ) from error


def _normalize_message(message: Any, location: str) -> dict[str, Any]:
    if isinstance(message, Mapping) and "role" not in message and "from" in message:
        message = _from_sharegpt(message, location)
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(
            f"{location} must have the fields role and content, got {abbreviate_repr(message)}."
        )
    if message["role"] not in ROLES:
        raise ValueError(
            f"{location}: role={message['role']!r} must be one of {', '.join(ROLES)}. Rename it."
        )
    plain = {
        key: _to_plain(value)
        for key, value in message.items()
        if value is not None or key == "content"
    }
    if "tool_calls" in plain:
        calls = _parse_tool_calls(plain["tool_calls"], location)
        plain["tool_calls"] = [_drop_nulls_of_call(call) for call in calls]
    if isinstance(plain.get("content"), list):
        plain["content"] = _normalize_parts(plain["content"], location)
    _reject_generation_markers(plain, location)
    content = plain.get("content")
    is_call = plain.get("tool_calls") or plain.get("function_call")
    if not isinstance(content, str | list) and not (content is None and is_call):
        raise ValueError(
            f"{location}: content={abbreviate_repr(content)} must be a string; only a message "
            f"with tool_calls may omit it."
        )
    return plain


def _parse_tool_calls(calls: Any, location: str) -> list[Any]:
    """Returns the calls of a message, which tables of text columns have as JSON."""
    text, error = calls, None
    if isinstance(text, str):
        try:
            calls = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as caught:
            error = caught
    calls = [] if calls is None else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(
            f"{location}: tool_calls={abbreviate_repr(text)} must be a list of objects, or the "
            f"JSON of one. Use "
            f'[{{"type": "function", "function": {{"name": "...", "arguments": {{...}}}}}}].'
        ) from error
    return calls


def _from_sharegpt(message: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Returns a message of ShareGPT with role and content."""
    role = _SHAREGPT_ROLES.get(str(message["from"]))
    if role is None or "value" not in message:
        raise ValueError(
            f"{location}: a message with from needs one of {', '.join(_SHAREGPT_ROLES)} there, and "
            f"a value, got {abbreviate_repr(message)}. Use role and content."
        )
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **rest}


def _normalize_parts(parts: list[Any], location: str) -> list[dict[str, Any]] | str:
    """Returns content in parts, `{"type": "text", "text": "..."}`, without null fields.

    A list without parts is an empty text.
    """
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{location}: content={abbreviate_repr(parts)} must be a string or a list of "
                f'parts such as {{"type": "text", "text": "..."}}. Leave other parts out.'
            )
        if part.get("type", "text") != "text":
            raise ValueError(
                f"{location}: content has a part of type {part['type']!r}, which a language model "
                f"does not read. Use parts of type text."
            )
    parts = [{k: v for k, v in part.items() if v is not None} for part in parts]
    return [{"type": "text", **part} for part in parts] or ""


def list_texts(content: Any) -> list[str]:
    """Returns the texts of a message's content, which is text, a list of text parts, or null."""
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [content or ""]


def _replace_texts(content: Any, texts: Sequence[str]) -> Any:
    """Returns content of the same form with other texts."""
    if isinstance(content, list):
        return [{**part, "text": text} for part, text in zip(content, texts, strict=True)]
    return texts[0]


def _drop_nulls_of_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool call without null fields; those in its arguments are data."""
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function")
    if isinstance(function, Mapping):
        call["function"] = {key: value for key, value in function.items() if value is not None}
    return call


def _to_plain(value: Any) -> Any:
    """Returns nested mappings and sequences as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_plain(item) for item in value]
    return value


def _reject_generation_markers(value: Any, location: str) -> None:
    """Raises if a string contains a marker of generated text."""
    if isinstance(value, str):
        if GENERATION_MARKERS.search(value):
            raise ValueError(
                f"{location} contains U+FDD0 or U+FDD1, which are not characters. Remove them."
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _reject_generation_markers(key, location)
            _reject_generation_markers(item, location)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            _reject_generation_markers(item, location)


def is_trained(message: Mapping[str, Any], location: str) -> bool | None:
    """Returns the mark of a message for training; None without one.

    Raises:
        ValueError: The mark is neither 0 or 1 nor a boolean, the message has two that differ, or
            one of another format.
    """
    other = next((name for name in _OTHER_MARKS if message.get(name) not in (None, "", [])), None)
    if other is not None:
        raise ValueError(
            f"{location}: {other}={abbreviate_repr(message[other])} is a mark for training of "
            f"another format. Mark whole messages of the assistant, by weight: 0 or train: false, "
            f"or remove the field."
        )
    marks = {name: message[name] for name in TRAINING_MARKS if name in message}
    for name, mark in marks.items():
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise ValueError(
                f"{location}: {name}={mark!r} must be 0 or 1, or false or true: whether the "
                f"message counts for the loss."
            )
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise ValueError(f"{location}: {marks} disagree. Keep one of them.")
    return bool(next(iter(marks.values()))) if marks else None


def _common_prefix(one: str, two: str) -> str:
    """Returns what two texts begin with, without the start of a tag such as `<|user|>`."""
    pairs = enumerate(zip(one, two, strict=False))
    common = one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))]
    if common in (one, two):
        return common
    opening = max(common.rfind("<"), common.rfind("["))
    is_closed = opening < 0 or re.search(r"[>\]]", common[opening:])
    return common if is_closed else common[:opening]


def abbreviate_repr(value: Any) -> str:
    """Returns the repr of a value of the data for an error, at most 60 characters."""
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

    Content reaches the template as it is: text, a list of text parts, or null beside calls. A
    template that reads only text, or only parts, gets that form, where transformers would write a
    list as Python does, or leave the text out.

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
        source: str = "the chat template",
    ) -> ChatTemplate:
        """Returns a checkpoint folder's template, of chat_template.jinja or tokenizer_config.json.

        Args:
            folder: Folder with the tokenizer's files.
            text: Template to use with the folder's special tokens; None: the folder's own.
            variables: Variables to add to the special tokens, or to replace them.
            now: Date and time for `strftime_now`; None: the clock.
            source: Name of `text` in errors.

        Raises:
            ValueError: If the folder has no template.
        """
        folder = Path(folder)
        variables = {**load_special_tokens(folder), **(variables or {})}
        if text is not None:
            return cls(text, variables, now, source)
        file = folder / "chat_template.jinja"
        if not os.path.lexists(file):
            file = folder / "tokenizer_config.json"
        return cls(_load_template_text(folder), variables, now, f"the chat template of {file}")

    @property
    def depends_on_date(self) -> bool:
        """True if the template calls `strftime_now`, so that its texts depend on `now`."""
        return "strftime_now" in _remove_comments(self.text)

    def check_syntax(self) -> None:
        """Checks that the template is Jinja, before messages are there.

        Raises:
            ValueError: It is not.
        """
        _ = self._compiled

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
        with it. An assistant message with `weight: 0`, or false as `train`, `training` or `loss`,
        has no span.

        Args:
            messages: Messages, each with a role and content.
            tools: JSON schemas of functions that the assistant may call.
            train_on: "assistant" for all assistant turns; "last" for the last one, with messages
                after it dropped; "all" for the complete text.
            location: Name of the messages in errors.

        Raises:
            ValueError: If a message is invalid, the template raises, renders an earlier turn
                differently once more messages follow, leaves out an answer or its calls, or writes
                nothing after an answer; or if a mark for training disagrees with `train_on`.
        """
        if train_on not in get_args(TrainOn):
            raise ValueError(
                f"train_on={train_on!r} must be one of {', '.join(get_args(TrainOn))}."
            )
        messages = validate_messages(messages, location)
        marks = self._read_training_marks(messages, train_on, location)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last" and turns:
            messages = messages[: turns[-1] + 1]
            turns = turns[-1:]
        left_out = [turn for turn in turns if marks[turn] is False]
        marked = self._render_marked(messages, tools, False, location)
        text = GENERATION_MARKERS.sub("", marked)
        turns = [turn for turn in turns if turn not in left_out]
        if train_on == "all":
            gaps = self._assistant_spans(messages, left_out, marked, text, tools, location)
            starts, ends = [0, *(gap[1] for gap in gaps)], [*(gap[0] for gap in gaps), len(text)]
            spans = [span for span in zip(starts, ends, strict=True) if span[0] < span[1]]
        else:
            for turn in turns:
                self._check_content_is_written(messages, turn, text, tools, location)
            spans = self._assistant_spans(messages, turns, marked, text, tools, location)
        for turn in turns:
            self._check_calls_are_written(messages[turn], text, f"{location}, message {turn}")
        return text, spans

    def _read_training_marks(
        self, messages: Sequence[Message], train_on: TrainOn, location: str
    ) -> list[bool | None]:
        """Returns the mark of each message for training."""
        marks = []
        for number, message in enumerate(messages):
            where = f"{location}, message {number}"
            mark = is_trained(message, where)
            if message["role"] != "assistant" and mark is (train_on != "all"):
                raise ValueError(
                    f"{where}: a message of the {message['role']} is marked "
                    f"{'for' if mark else 'out of'} the loss, but data.train_on={train_on} sets "
                    f"that for all of them. Mark assistant messages only."
                )
            marks.append(mark)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        marked = next((i for i in answers[:-1] if marks[i]), None)
        if train_on == "last" and marked is not None:
            raise ValueError(
                f"{location}, message {marked} is marked for the loss, but only the last answer "
                f"of a chat counts for it with data.train_on=last, and in preferences. Use "
                f"format: chat and data.train_on=assistant, or remove the mark."
            )
        return marks

    def _check_content_is_written(
        self,
        messages: list[dict[str, Any]],
        index: int,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> None:
        """Raises if the text of a chat lacks the content of an answer."""
        message = messages[index]
        if message.get("tool_calls"):  # Many templates leave out the content beside calls.
            return
        content = list_texts(message.get("content"))[-1].rpartition("</think>")[2].strip()
        # Templates may leave out thoughts, which are before the last line.
        if not content or content.splitlines()[-1].strip() in text:
            return
        _, written = self._split_at_content(messages, index, tools, location)
        if not written:
            raise ValueError(
                f"{location}, message {index}: {self.source} does not write its content, so that "
                f"the model would not learn it. Use another template."
            )

    def _check_calls_are_written(
        self, message: Mapping[str, Any], text: str, location: str
    ) -> None:
        """Raises if the text of a chat lacks the calls of an answer."""
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        calls += [message["function_call"]] if message.get("function_call") else []
        names = [call["name"] for call in calls if isinstance(call, Mapping) and "name" in call]
        missing = next((name for name in names if str(name) not in text), None)
        if missing is not None:
            raise ValueError(
                f"{location}: {self.source} does not write its call of {missing!r}, so that the "
                f"model would not learn it. Use a template for tools, and tool_calls rather than "
                f"function_call; or write the call in the content."
            )

    def _assistant_spans(
        self,
        messages: list[dict[str, Any]],
        turns: Sequence[int],
        marked_text: str,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> list[CharSpan]:
        """Returns the spans of some assistant turns in the text of all messages."""
        if not turns:
            return []
        if not self._has_generation_tags:
            return [self._assistant_span(messages, turn, text, tools, location) for turn in turns]
        spans = _find_marked_spans(marked_text)
        others = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in turns]
        if not others:
            return spans
        kept = []
        for turn in turns:
            before, through = (  # Many templates read the first message of a chat.
                len(_find_marked_spans(self._render_marked(part, tools, False, location)))
                if part
                else 0
                for part in (messages[:turn], messages[: turn + 1])
            )
            kept += spans[before:through]
        return kept

    def _assistant_span(
        self,
        messages: list[dict[str, Any]],
        turn_index: int,
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> CharSpan:
        """Returns the span of one assistant turn in the text of all messages."""
        texts = list_texts(messages[turn_index].get("content"))
        first, content = texts[0].strip(), texts[-1].strip()
        through = text
        if turn_index < len(messages) - 1:
            through = self._render_through(messages[: turn_index + 1], text, tools, location)
        before = (
            self._render_marked(messages[:turn_index], tools, True, location)
            if turn_index
            else self._find_first_header(messages, tools, location)
        )
        start = len(before)
        is_found = True
        if not through.startswith(before):
            # The prompt of an answer has more than an answer begins with, such as `<think>`.
            earlier = self._render_through(messages[:turn_index], text, tools, location)
            turn = through[len(earlier) :] if through.startswith(earlier) else ""
            header = len(_common_prefix(before[len(earlier) :], turn))
            # The answer may begin as the rest of the prompt does.
            place = turn.rfind(first)
            if 0 <= place < header <= place + len(first):
                header = place
            start = len(earlier) + header
            # Templates leave out the thoughts of an answer, which precede the rest.
            is_found = content.rpartition("</think>")[2].strip() in turn[header:]
        turn = through[start:]
        if not is_found or not turn.strip() or not text.startswith(through):
            raise ValueError(
                f"{location}: {self.source} renders message {turn_index} differently at the end "
                f"of a chat and before further messages, so the assistant's span is ambiguous. Use "
                f"data.train_on=last, or a template with {{% generation %}} tags."
            )
        stripped = turn.rstrip()
        # Without an end-of-turn token, the line break ends a turn and has to be learned.
        if content and stripped.endswith(content):
            rest = text[len(through) :]
            _, marked = self._split_at_content(messages, turn_index, tools, location, after=True)
            end = (marked or rest).removesuffix(rest)
            if not end:
                raise ValueError(
                    f"{location}: the chat template writes nothing after message {turn_index}, so "
                    f"a model would not learn where an answer ends. Write {{{{ eos_token }}}} "
                    f"after the content in a template of your own (data.chat_template)."
                )
            if end.isspace():
                stripped = turn
        return start, start + len(stripped)

    def _find_first_header(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> str:
        """Returns the text before the answer that a chat begins with.

        Many templates read the first message, so that an empty chat has no generation prompt.
        """
        before, _ = self._split_at_content(messages, 0, tools, location)
        prompt = self._find_prompt(messages[0], tools, location)
        if not prompt:  # Answers begin where the message before them ends.
            other = self._render_marked([_USER_MESSAGE], tools, False, location)
            return _common_prefix(before, other)
        place = before.rfind(prompt)
        # What is between the prompt and the content, such as thoughts, belongs to the answer.
        return before[: place + len(prompt)] if place >= 0 else before

    def _find_prompt(
        self,
        message: dict[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> str:
        """Returns the generation prompt of a chat that asks again after a first answer."""
        ended, prompted = (
            self._render_marked([message, _USER_MESSAGE], tools, prompts, location)
            for prompts in (False, True)
        )
        return prompted[len(_common_prefix(ended, prompted)) :]

    def _split_at_content(
        self,
        messages: list[dict[str, Any]],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
        *,
        after: bool = False,
    ) -> tuple[str, str]:
        """Returns the text of a chat before and after a place in the content of a message.

        The place is the end of the content, or its start after the thoughts. The second text is
        empty if the template does not write the content.
        """
        content = messages[index].get("content") or ""
        texts = list_texts(content)
        if after:
            texts[-1] += GENERATION_START
        else:
            part = next((n for n in reversed(range(len(texts))) if "</think>" in texts[n]), 0)
            thoughts, closing, answer = texts[part].rpartition("</think>")
            texts[part] = f"{thoughts}{closing}{GENERATION_START}{answer}"
        marked = {**messages[index], "content": _replace_texts(content, texts)}
        changed = [*messages[:index], marked, *messages[index + 1 :]]
        first, _, second = self._render_marked(changed, tools, False, location).partition(
            GENERATION_START
        )
        return first, second

    def _render_through(
        self,
        messages: list[dict[str, Any]],
        text: str,
        tools: Sequence[Mapping[str, Any]] | None,
        location: str,
    ) -> str:
        """Returns the text of the first messages of a chat.

        Some templates end a chat in another way than a turn before further messages: with another
        token (gpt-oss), or one more (Phi-3). The text is then the one that asks for a next answer,
        without the prompt for it, or what it has in common with the one that ends.
        """
        if not messages:
            return ""
        ended = self._render_marked(messages, tools, False, location)
        if text.startswith(ended):
            return ended
        prompted = self._render_marked(messages, tools, True, location)
        if messages[-1]["role"] == "assistant" and len(messages) == 1:
            through = prompted.removesuffix(self._find_prompt(messages[0], tools, location))
            if text.startswith(through):
                return through
        elif len(messages) > 1:
            earlier, asked = (
                self._render_marked(messages[:-1], tools, prompts, location)
                for prompts in (False, True)
            )
            if asked.startswith(earlier) and text.startswith(
                through := prompted.removesuffix(asked[len(earlier) :])
            ):
                return through
        return _common_prefix(ended, prompted)

    def _render_marked(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        location: str,
    ) -> str:
        """Returns the text with markers around the parts in `{% generation %}` tags."""
        for tool in tools or ():
            _reject_generation_markers(tool, f"{location}, tools")
        try:
            return self._compiled.render(
                {
                    **self.variables,
                    "messages": [
                        self._convert_content({k: m[k] for k in m if k not in TRAINING_MARKS})
                        for m in messages
                    ],
                    "tools": None if tools is None else _to_plain(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except MemoryError as error:
            raise MemoryError(
                f"{location}: memory ran out while {self.source} was rendered. Free memory, or "
                f"use shorter messages."
            ) from error
        except Exception as error:  # A template can raise anything.
            raise ValueError(
                f"{location}: {self.source} rejects the messages ({error}). Change them to its "
                f"format, or use another template."
            ) from error

    def _convert_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message whose content is text, parts or null, as the template reads it.

        Templates that read text alone write a list of parts, and null, as Python does, and those
        that read parts alone leave text out, without an error.
        """
        content = message.get("content")
        if content is None and "content" in message:
            is_read = message.get("tool_calls") and self._reads_null
            return message if is_read else {**message, "content": ""}
        text = "".join(list_texts(content))
        one_part = [{"type": "text", "text": text}]
        for form in (content, text, one_part) if content else ():
            if self._writes_content(message["role"], form):
                return message if form is content else {**message, "content": form}
        return message

    def _writes_content(self, role: str, content: Any) -> bool:
        """Returns whether the template writes content of such a form: text, one part, or parts.

        That is tried once, in a short chat.
        """
        number = min(len(content), 2) if isinstance(content, list) else 0
        if (role, number) not in self._written_forms:
            marks = _CONTENT_MARKS[: max(number, 1)]
            parts = [{"type": "text", "text": mark} for mark in marks]
            text = self._render_probe({"role": role, "content": parts if number else marks[0]})
            self._written_forms[role, number] = all(mark in (text or "") for mark in marks)
        return self._written_forms[role, number]

    @functools.cached_property
    def _written_forms(self) -> dict[tuple[str, int], bool]:
        """By role and number of parts, 0 for text: whether the template writes such content."""
        return {}

    @functools.cached_property
    def _reads_null(self) -> bool:
        """Whether the template reads null content beside calls, rather than writes None."""
        null, empty = (
            self._render_probe({"role": "assistant", "content": content, "tool_calls": [_CALL]})
            for content in (None, "")
        )
        return empty is None or (null is not None and null.count("None") <= empty.count("None"))

    def _render_probe(self, probe: dict[str, Any]) -> str | None:
        """Returns the text of a short chat with a message; None if the template raises."""
        before: list[dict[str, Any]] = []
        after: list[dict[str, Any]] = []
        if probe["role"] in ("system", "developer"):
            after = [_USER_MESSAGE]
        elif probe["role"] == "assistant":
            before = [_USER_MESSAGE]
        elif probe["role"] != "user":
            before, probe = [_USER_MESSAGE, _CALL_MESSAGE], {**probe, **_RESULT_FIELDS}
        chat = [*map(self._convert_content, before), probe, *map(self._convert_content, after)]
        given = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": False}
        compiled = self._compiled
        try:
            return compiled.render({**self.variables, **given})
        except Exception as error:  # A template can raise anything.
            if type(error) is jinja2.TemplateRuntimeError:
                raise  # A limit of time or memory, which any chat would meet.
            return None

    @functools.cached_property
    def _has_generation_tags(self) -> bool:
        """Whether the template has `{% generation %}` tags, outside of comments and raw parts."""
        blocks = self._syntax_tree.find_all(jinja2.nodes.CallBlock)
        return any(isinstance(block.call.node, jinja2.nodes.ExtensionAttribute) for block in blocks)

    @functools.cached_property
    def undeclared_variables(self) -> frozenset[str]:
        """Variables that the template may read before it sets them, without `variables`.

        Those of every chat, such as messages and tools, are among them.
        """
        read = jinja2.meta.find_undeclared_variables(self._syntax_tree)
        return frozenset(read - self.variables.keys() - self._compiled.globals.keys())

    @functools.cached_property
    def input_variables(self) -> frozenset[str]:
        """Those of `undeclared_variables` that the template never sets, or has a default for."""
        nodes = jinja2.nodes
        names = self._syntax_tree.find_all(nodes.Name)
        own = {name.name for name in names if name.ctx != "load"}
        asked = [
            node.node
            for node in self._syntax_tree.find_all((nodes.Test, nodes.Filter))
            if node.name in ("defined", "undefined", "none", "default", "d")
        ]
        defaults = {node.name for node in asked if isinstance(node, nodes.Name)}
        return self.undeclared_variables - (own - defaults)

    @functools.cached_property
    def _syntax_tree(self) -> jinja2.nodes.Template:
        return self._compiled.environment.parse(self.text)

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


def _remove_comments(text: str) -> str:
    """Returns a template without its comments, in a time that grows with its length alone."""
    kept, end = [], 0
    while (start := text.find("{#", end)) >= 0:
        closing = text.find("#}", start + 2)
        if closing < 0:
            break
        kept.append(text[end:start])
        end = closing + 2
    return "".join([*kept, text[end:]])


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_special_tokens(folder: Path) -> dict[str, str]:
    """Returns the special tokens of a tokenizer's folder, such as bos_token, by their key."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_optional_json(folder / name) or {}
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
        FileNotFoundError: If its file is not a regular file.
        ValueError: If the folder has several templates and none is named default, or its file is
            damaged.
    """
    text = read_optional_text(folder / "chat_template.jinja")
    if text is not None:
        return text
    config = folder / "tokenizer_config.json"
    template = (read_optional_json(config) or {}).get("chat_template")
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
            f"{config}: chat_template={abbreviate_repr(template)} must be a text, or a list of "
            f"mappings with distinct names and their templates. Copy it again from its source."
        )
    if "default" not in by_name:
        raise ValueError(
            f"{config} has the chat templates {format_names(sorted(by_name))} and none named "
            f"default. Give the text of one."
        )
    return by_name["default"]
