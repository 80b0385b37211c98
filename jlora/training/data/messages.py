"""The messages of a chat, looked at before a template sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# A template's marks around what is generated. They are no characters, so no text holds them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{OPEN}{CLOSE}]")


def checked(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages as a template takes them: plain dicts, without the fields that are null.

    Tables give every message all fields that one of them has.

    Raises:
        ValueError: A message has no role of `ROLES`, or content that is no string.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"{where} is {_short(messages)}, no list of messages. Give "
            f'[{{"role": "user", "content": "..."}}, ...].'
        )
    for number, message in enumerate(messages):
        _check_message(message, f"{where}, message {number}")
    return plain(messages, where)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(
            f"{where} is {_short(message)} and has no role. Give it the fields role and content."
        )
    if message["role"] not in ROLES:
        raise ValueError(
            f"{where}: role={message['role']!r} is none of {', '.join(ROLES)}. Rename it."
        )
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"{where}: content={_short(content)} is no string. Give text; only a message with "
            f"tool_calls may go without."
        )


def plain(value: Any, where: str) -> Any:
    """The same of dicts, lists and what they hold, without what is null.

    Raises:
        ValueError: A string holds a mark.
    """
    if isinstance(value, str):
        if MARKS.search(value):
            raise ValueError(
                f"{where} holds U+FDD0 or U+FDD1, which stand for no character. Remove them."
            )
        return value
    if isinstance(value, Mapping):
        return {key: plain(item, where) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence):
        return [plain(item, where) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
