"""Regular expressions of adapter configs, matched in time that grows with name and pattern alone.

Python's `re` tries the ways to match one after another, and a hostile pattern of ten letters has
2^n of them for a name of n letters. Here all ways advance together: a part of a pattern maps the
set of positions where it may start to the set where it may end.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterable, Iterator

# The parser of `re`; it has had the same nodes since Python 3.6, and no public name.
from re import _constants as _nodes  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

# Nested counts, such as ((a{99}){99}){99}, are longer than they look.
_MAX_PATTERN_LETTERS = 10_000

_MAX_STEPS = 1_000_000

# Of all patterns of one config together: some, and more for each name of a module.
_MAX_SHARED_STEPS = 5_000_000

_MAX_SHARED_STEPS_PER_NAME = 5_000

_PLAIN_KEY = re.compile(r"[\w.-]+")


class _SharedSteps:
    """Steps of all patterns of one config.

    Attributes:
        steps: Number of steps so far.
        names: Names that were matched.
    """

    def __init__(self) -> None:
        self.steps, self.names = 0, set[str]()


_shared_steps: contextvars.ContextVar[_SharedSteps | None] = contextvars.ContextVar(
    "shared_steps", default=None
)


@contextlib.contextmanager
def share_steps() -> Iterator[None]:
    """Bounds the steps of all patterns in the block, or the decorated function, together."""
    token = _shared_steps.set(_shared_steps.get() or _SharedSteps())
    try:
        yield
    finally:
        _shared_steps.reset(token)


def match_key(key: str, name: str) -> bool:
    """Returns whether a name ends in a key of `rank_pattern` or the like, after a dot or alone.

    Raises:
        ValueError: As `full_match` does.
    """
    if not _PLAIN_KEY.fullmatch(key):
        return full_match(rf"(.*\.)?({key})", name)
    # Letters, and dots for any letter: no search, for the long lists of real configs.
    start = len(name) - len(key)
    return (
        start >= 0
        and (not start or (name[start - 1] == "." and "\n" not in name))
        and all(a == b or (a == "." and b != "\n") for a, b in zip(key, name[start:], strict=True))
    )


def full_match(pattern: str, name: str) -> bool:
    """Returns whether a regular expression matches a complete name, as `re.fullmatch` does.

    Raises:
        ValueError: The pattern is invalid, too costly, or has references to groups, possessive
            repeats or atomic groups, which no published adapter has.
    """
    matcher = _Matcher(name)
    if matcher.shared is not None:
        matcher.shared.names.add(name)
    return len(name) in matcher.ends(_parse(pattern), {0}, _flags(pattern))


@functools.lru_cache(maxsize=4096)
def check_pattern(pattern: str) -> None:
    """Raises an error for a pattern that `full_match` does not support.

    Raises:
        ValueError: The pattern is invalid or not supported.
    """
    full_match(pattern, "")


@functools.lru_cache(maxsize=4096)
def _parse(pattern: str) -> Any:
    if len(pattern) > _MAX_PATTERN_LETTERS:
        raise ValueError(
            f"A pattern has {len(pattern):,} letters, more than {_MAX_PATTERN_LETTERS:,}. List the "
            f"names of the modules instead."
        )
    try:
        return _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern[:200]!r} is not a regular expression ({error}). Use the pattern that PEFT "
            f"wrote."
        ) from error


def _flags(pattern: str) -> int:
    return _parse(pattern).state.flags


class _Matcher:
    """Matcher of one name.

    Attributes:
        text: The name.
        steps: Number of steps so far.
        shared: Steps of the config; None outside of `share_steps`.
    """

    def __init__(self, text: str) -> None:
        self.text, self.steps, self.shared = text, 0, _shared_steps.get()

    def ends(self, sequence: Iterable[Any], starts: set[int], flags: int) -> set[int]:
        """Returns the positions where a sequence of nodes may end."""
        for operation, argument in sequence:
            if not starts:
                break
            # Each letter of a set such as [abc] is compared.
            letters = len(argument) if operation is _nodes.IN else 1
            self._count_steps(len(starts) * letters)
            starts = self._node_ends(operation, argument, starts, flags)
        return starts

    def _count_steps(self, count: int) -> None:
        self.steps += count
        is_over = self.steps > _MAX_STEPS
        if self.shared is not None:
            self.shared.steps += count
            names = len(self.shared.names)
            limit = _MAX_SHARED_STEPS + _MAX_SHARED_STEPS_PER_NAME * names
            is_over = is_over or self.shared.steps > limit
        if is_over:
            raise ValueError(
                "The patterns take too many steps. List the names of the modules instead."
            )

    def _node_ends(self, operation: Any, argument: Any, starts: set[int], flags: int) -> set[int]:
        if operation in (_nodes.LITERAL, _nodes.NOT_LITERAL, _nodes.ANY, _nodes.IN):
            return {
                start + 1
                for start in starts
                if start < len(self.text)
                and _matches_letter(operation, argument, self.text[start], flags)
            }
        if operation is _nodes.BRANCH:
            return {end for one in argument[1] for end in self.ends(one, starts, flags)}
        if operation is _nodes.SUBPATTERN:
            _, added, removed, inner = argument
            return self.ends(inner, starts, (flags | added) & ~removed)
        if operation in (_nodes.MAX_REPEAT, _nodes.MIN_REPEAT):
            least, most, inner = argument
            return self._repeat_ends(least, most, inner, starts, flags)
        if operation is _nodes.AT:
            return {start for start in starts if self._is_at(argument, start, flags)}
        if operation in (_nodes.ASSERT, _nodes.ASSERT_NOT):
            direction, inner = argument
            wanted = operation is _nodes.ASSERT
            return {p for p in starts if self._looks(inner, p, direction, flags) == wanted}
        raise ValueError(
            f"A pattern has {str(operation).lower()}, which is not supported. List the names of "
            f"the modules instead."
        )

    def _repeat_ends(
        self, least: int, most: int, inner: Any, starts: set[int], flags: int
    ) -> set[int]:
        current = starts
        for _ in range(least):
            following = self.ends(inner, current, flags)
            if following == current or not following:  # And so on for ever.
                current = following
                break
            current = following
        found = frontier = current
        for _ in range(most - least):
            frontier = self.ends(inner, frontier, flags) - found
            if not frontier:
                break
            found = found | frontier
        return found

    def _looks(self, inner: Any, position: int, direction: int, flags: int) -> bool:
        if direction > 0:
            return bool(self.ends(inner, {position}, flags))
        return any(position in self.ends(inner, {start}, flags) for start in range(position + 1))

    def _is_at(self, kind: Any, position: int, flags: int) -> bool:
        text, length = self.text, len(self.text)
        if kind in (_nodes.AT_BEGINNING, _nodes.AT_BEGINNING_STRING):
            lines = flags & re.MULTILINE and kind is _nodes.AT_BEGINNING
            return not position or bool(lines and text[position - 1] == "\n")
        if kind is _nodes.AT_END:
            is_before_break = text[position : position + 1] == "\n"
            lines = flags & re.MULTILINE or position == length - 1
            return position == length or bool(is_before_break and lines)
        if kind is _nodes.AT_END_STRING:
            return position == length
        sides = [text[position - 1 : position] if position else "", text[position : position + 1]]
        before, after = (bool(one) and _is_word(one, flags) for one in sides)
        return (before != after) == (kind is _nodes.AT_BOUNDARY)


def _matches_letter(operation: Any, argument: Any, letter: str, flags: int) -> bool:
    if operation is _nodes.ANY:
        return bool(flags & re.DOTALL) or letter != "\n"
    letters = {letter}
    if flags & re.IGNORECASE:
        letters |= {letter.lower(), letter.upper()}
    if operation is _nodes.IN:
        negated = argument[0][0] is _nodes.NEGATE
        items = argument[1:] if negated else argument
        return any(_is_in(item, one, flags) for item in items for one in letters) != negated
    is_letter = any(ord(one) == argument for one in letters if len(one) == 1)
    return is_letter == (operation is _nodes.LITERAL)


def _is_in(item: Any, letter: str, flags: int) -> bool:
    """Returns whether a letter is in one item of a set of letters."""
    operation, argument = item
    if len(letter) != 1:  # Of an upper case with two letters.
        return False
    if operation is _nodes.LITERAL:
        return ord(letter) == argument
    if operation is _nodes.RANGE:
        return argument[0] <= ord(letter) <= argument[1]
    name = str(argument)
    is_ascii = not flags & re.ASCII or letter.isascii()
    if "DIGIT" in name:
        result = letter.isdecimal() and is_ascii
    elif "SPACE" in name:
        result = letter.isspace() and is_ascii
    else:
        result = _is_word(letter, flags)
    return result != ("_NOT_" in name)


def _is_word(letter: str, flags: int) -> bool:
    return (letter.isalnum() or letter == "_") and (not flags & re.ASCII or letter.isascii())
