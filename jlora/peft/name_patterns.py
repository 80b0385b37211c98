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
from collections.abc import Collection, Iterable, Iterator, Sequence

# The parser of `re`; it has had the same nodes since Python 3.6, and no public name.
from re import _constants as _nodes  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

# Nested counts, such as ((a{99}){99}){99}, are longer than they look.
_MAX_PATTERN_LETTERS = 10_000

_MAX_STEPS = 1_000_000

# Of all patterns of one config together: some, and more for each name of a module. The longest
# published pattern takes some 600 steps a name.
_MAX_SHARED_STEPS = 500_000

_MAX_SHARED_STEPS_PER_NAME = 10_000

# Letters, escaped signs and dots for any letter; perhaps at the start of the name alone.
_PLAIN_PATTERN = re.compile(r"\^?(?:[\w.-]|\\[^\w\n])+")

_PLAIN_LAYERS = re.compile(r"[\w-]+")

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


_TOO_MANY_STEPS = "The patterns take too many steps. List the names of the modules instead."


class _SharedSteps:
    """Steps of all patterns of one config.

    Attributes:
        steps: Number of steps so far.
        names: Names that were matched.
        results: Whether a pattern matched a name, since rank and alpha often have the same ones.
    """

    def __init__(self) -> None:
        self.steps, self.names = 0, set[str]()
        self.results: dict[tuple[str, str], bool] = {}


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


def is_plain_pattern(pattern: str) -> bool:
    """Returns whether a pattern has no operators but dots, escapes and a "^" at its start."""
    return _PLAIN_PATTERN.fullmatch(pattern) is not None


class PatternValues(dict[str, Any]):
    """A mapping such as `rank_pattern`, from patterns of the ends of names to values.

    A pattern matches a name that ends in it, after a dot or alone. Patterns without operators are
    looked up, and not tried one after another, for the long lists of real configs.

    Example:
        >>> from jlora.peft.name_patterns import PatternValues
        >>> ranks = PatternValues({"0.q_proj": 4, "q_proj": 2})
        >>> ranks.first_match("model.1.q_proj")
        'q_proj'
    """

    @functools.cached_property
    def _index(self) -> _PatternIndex:
        return _PatternIndex(list(self))

    def first_match(self, name: str) -> str | None:
        """Returns the first pattern that matches a name.

        Raises:
            ValueError: As `full_match` does.
        """
        index = self._index
        first = min(index.find_plain(name), default=len(index.patterns))
        for position, pattern in index.others:
            if position > first:
                break
            if _matches_end(pattern, name):
                return pattern
        return index.patterns[first] if first < len(index.patterns) else None

    def first_unmatched(self, names: Collection[str]) -> str | None:
        """Returns the first pattern that matches none of the names.

        Raises:
            ValueError: As `full_match` does.
        """
        index = self._index
        others = dict(index.others)
        found = {position for name in names for position in index.find_plain(name)}
        for position, pattern in enumerate(index.patterns):
            if position in others:
                is_found = any(_matches_end(pattern, name) for name in names)
            else:
                is_found = index.equals[position] in found
            if not is_found:
                return pattern
        return None


def _matches_end(pattern: str, name: str) -> bool:
    return full_match(rf"(.*\.)?({pattern})", name)


class _PatternIndex:
    """Patterns of `PatternValues`, those without operators by their letters.

    Attributes:
        patterns: The patterns.
        others: Position and pattern of those with operators.
        plain: Position of each other pattern, by its length, the places of its dots and whether it
            is at the start alone, and then by its letters.
        equals: Position of the first pattern with the same letters for each of those.
    """

    def __init__(self, patterns: list[str]) -> None:
        self.patterns, self.others = patterns, list[tuple[int, str]]()
        self.plain: dict[int, dict[tuple[tuple[int, ...], bool], dict[str, int]]] = {}
        self.equals: dict[int, int] = {}
        for position, pattern in enumerate(patterns):
            if not is_plain_pattern(pattern):
                self.others.append((position, pattern))
                continue
            at_start = pattern.startswith("^")
            letters = re.findall(r"\\.|.", pattern.removeprefix("^"))
            dots = tuple(place for place, letter in enumerate(letters) if letter == ".")
            group = self.plain.setdefault(len(letters), {}).setdefault((dots, at_start), {})
            first = group.setdefault("".join(letter[-1] for letter in letters), position)
            self.equals[position] = first

    def find_plain(self, name: str) -> set[int]:
        """Returns the positions of the patterns without operators that match a name."""
        found = set[int]()
        if "\n" in name:  # A dot matches any other letter.
            return found
        for start in (0, *(place + 1 for place, letter in enumerate(name) if letter == ".")):
            ending = name[start:]
            groups = self.plain.get(len(ending), {})
            _count_shared_steps(3 * len(groups), name)
            for (dots, at_start), positions in groups.items():
                if start and at_start:
                    continue
                letters = ending
                if any(ending[place] != "." for place in dots):
                    letters = "".join(
                        "." if place in dots else letter for place, letter in enumerate(ending)
                    )
                if letters in positions:
                    found.add(positions[letters])
        return found


class LayerPatterns:
    """The patterns of `layers_pattern`: names of the module whose children are the layers.

    Args:
        patterns: The patterns; none for any module inside another one.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.plain: dict[str, int] = {}
        self.others: list[tuple[int, str]] = []
        self.is_any = not patterns
        for position, pattern in enumerate(patterns):
            if _PLAIN_LAYERS.fullmatch(pattern):
                self.plain.setdefault(pattern, position)
            else:
                self.others.append((position, pattern))

    def layer_number(self, module: str) -> int | None:
        """Returns the number of a module's layer, by the first pattern with one; None for no layer.

        Raises:
            ValueError: As `full_match` does, or a pattern finds two layers in one name.
        """
        parts = module.split(".")
        found = [place for place in range(1, len(parts) - 1) if parts[place].isdecimal()]
        if self.is_any:
            return next((int(parts[place]) for place in found if place > 1), None)
        numbers = {}
        for place in found:
            if parts[place - 1] in self.plain:
                numbers.setdefault(self.plain[parts[place - 1]], int(parts[place]))
        first = min(numbers, default=None)
        for position, pattern in self.others:
            if first is not None and position > first:
                break
            number = _find_layer(pattern, module)
            if number is not None:
                return number
        return None if first is None else numbers[first]


def _find_layer(pattern: str, module: str) -> int | None:
    """Returns the number after the first place in a name where a pattern matches whole parts."""
    for start in (0, *(place + 1 for place, letter in enumerate(module) if letter == ".")):
        ends = match_ends(pattern, module, start)
        matches = [_LAYER_NUMBER.match(module, end) for end in ends]
        numbers = {int(match[1]) for match in matches if match}
        if len(numbers) > 1:
            raise ValueError(
                f"layers_pattern has {pattern[:200]!r}, which finds the layers {sorted(numbers)} "
                f"in one name. Use the name of the module with the layers."
            )
        if numbers:
            return numbers.pop()
    return None


def full_match(pattern: str, name: str) -> bool:
    """Returns whether a regular expression matches a complete name, as `re.fullmatch` does.

    Raises:
        ValueError: The pattern is invalid, too costly, or has references to groups, possessive
            repeats or atomic groups, which no published adapter has.
    """
    shared = _shared_steps.get()
    results = {} if shared is None else shared.results
    if (pattern, name) not in results:
        results[pattern, name] = len(name) in match_ends(pattern, name, 0)
    return results[pattern, name]


def match_ends(pattern: str, name: str, start: int) -> set[int]:
    """Returns the positions where a match of a pattern from a position may end.

    Raises:
        ValueError: As `full_match` does.
    """
    _count_shared_steps(1 + len(pattern) // 2, name)  # Those of the parser.
    return _Matcher(name).ends(_parse(pattern), {start}, _flags(pattern))


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


def _count_shared_steps(count: int, name: str) -> None:
    """Adds steps for a name to those of the config, if there is one."""
    shared = _shared_steps.get()
    if shared is None:
        return
    shared.steps += count
    shared.names.add(name)
    if shared.steps > _MAX_SHARED_STEPS + _MAX_SHARED_STEPS_PER_NAME * len(shared.names):
        raise ValueError(_TOO_MANY_STEPS)


class _Matcher:
    """Matcher of one name.

    Attributes:
        text: The name.
        steps: Number of steps so far.
    """

    def __init__(self, text: str) -> None:
        self.text, self.steps = text, 0

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
        _count_shared_steps(count, self.text)
        if self.steps > _MAX_STEPS:
            raise ValueError(_TOO_MANY_STEPS)

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
