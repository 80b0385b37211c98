"""Jinja for templates of strangers: a sandbox whose time and memory are bounded.

Jinja's sandbox keeps a template from Python's internals, but not from loops in loops, or from texts
that double. Here loops and calls are counted, and the sizes of texts and lists are checked.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

MAX_STEPS = 5_000_000

MAX_SECONDS = 10.0

# Letters of a text, and entries of a list.
MAX_SIZE = 20_000_000

_MAX_INTEGER = 1_000_000

_MAX_TEMPLATE_LETTERS = 1_000_000

# Of a field such as {:>99999999} or %99999999d.
_WIDE_FIELD = re.compile(r"\d{5}")


class _Budget(threading.local):
    """Steps and time of the rendering in this thread."""

    steps = 0
    start = 0.0


class _BoundedTemplate(jinja2.Template):
    """Template of which every rendering begins with a new budget."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Returns the text.

        Raises:
            jinja2.TemplateError: The template takes too much time or memory, or raises.
        """
        assert isinstance(self.environment, BoundedEnvironment)
        self.environment.begin()
        return super().render(*args, **kwargs)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Sandboxed environment whose templates end."""

    template_class = _BoundedTemplate
    intercepted_binops = frozenset(("+", "*", "**", "%", "//", "/", "-"))

    def __init__(self, **options: Any) -> None:
        """Builds the environment.

        Args:
            **options: Options of `jinja2.Environment`.
        """
        super().__init__(**options)
        self._budget = _Budget()
        self.filters = _GuardedFilters(self)
        self.globals.pop("lipsum", None)

    def begin(self) -> None:
        """Begins a budget for one rendering."""
        self._budget.steps, self._budget.start = 0, time.thread_time()

    def step(self) -> None:
        """Counts one iteration or call.

        Raises:
            jinja2.TemplateRuntimeError: There were too many, or they took too long.
        """
        budget = self._budget
        budget.steps += 1
        if budget.steps > MAX_STEPS or time.thread_time() - budget.start > MAX_SECONDS:
            raise jinja2.TemplateRuntimeError(
                f"it takes more than {MAX_STEPS:,} steps or {MAX_SECONDS:g} seconds"
            )

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        if len(source) > _MAX_TEMPLATE_LETTERS:
            raise jinja2.TemplateSyntaxError(
                f"it has more than {_MAX_TEMPLATE_LETTERS:,} letters", 1, name, filename
            )
        template = super()._parse(source, name, filename)
        for loop in template.find_all(jinja2.nodes.For):
            loop.iter = _filter_node(loop.iter, "_count")
        _limit_concatenations(template)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Returns the result of an operator, unless it would be too large."""
        self.step()
        if operator == "**":
            check_power(left, right)
        elif operator == "*":
            check_sizes([left, right], is_repeated=True)
        elif operator == "%" and isinstance(left, str):
            check_format(left)
            check_sizes([left, right])
        return check_result(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a call, unless it would be too large."""
        self.step()
        method = getattr(obj, "__wrapped__", obj)  # The sandbox wraps methods that format.
        owner = getattr(method, "__self__", None)
        if isinstance(obj, jinja2.runtime.LoopContext) and args:  # A recursive loop.
            args = (self.count(args[0]), *args[1:])
        elif isinstance(owner, str | list | tuple | dict):
            if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
                check_format(owner)
            check_sizes([owner, *args, *kwargs.values()])
        else:
            check_sizes([*args, *kwargs.values()])
        return check_result(super().call(context, obj, *args, **kwargs))

    def count(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yields the values of a loop, each of which is a step."""
        for value in values:
            self.step()
            yield value


class _GuardedFilters(dict[str, Callable[..., Any]]):
    """Filters of an environment, each of which checks the sizes of its arguments and result."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        super().__init__()
        self._environment = environment
        for name, function in environment.filters.items():
            self[name] = function
        super().__setitem__("_count", environment.count)
        super().__setitem__("_limit", check_result)

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        @functools.wraps(function)  # Including the mark of filters that take the context.
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._environment.step()
            if name == "format":
                check_format(next((one for one in args if isinstance(one, str)), ""))
            check_sizes([*args, *kwargs.values()])
            return check_result(function(*args, **kwargs))

        super().__setitem__(name, guarded)


def check_result(value: Any) -> Any:
    """Returns a text, list or integer, unless it is too large.

    Raises:
        jinja2.TemplateRuntimeError: It is too large.
    """
    if _size(value) > MAX_SIZE:
        raise jinja2.TemplateRuntimeError(f"it makes a value of more than {MAX_SIZE:,} entries")
    return value


def check_sizes(values: Iterable[Any], *, is_repeated: bool = False) -> None:
    """Raises an error if the result of an operation on values may be too large.

    Args:
        values: Operands or arguments.
        is_repeated: Whether integers are numbers of repetitions.

    Raises:
        jinja2.TemplateRuntimeError: The product of the sizes is too large, or an integer.
    """
    product, has_text = 1, False
    for value in values:
        if isinstance(value, int) and not is_repeated and abs(value) > 2**63:
            product = MAX_SIZE + 1
        is_count = isinstance(value, int) and (is_repeated or abs(value) > _MAX_INTEGER)
        product *= max(1, abs(value) if is_count else _size(value))
        has_text = has_text or not isinstance(value, int | float)
    if product > MAX_SIZE and (has_text or product > 2**4096):
        raise jinja2.TemplateRuntimeError(f"it makes a value of more than {MAX_SIZE:,} entries")


def check_power(base: Any, exponent: Any) -> None:
    """Raises an error if a power of integers has more than 4,096 bits.

    Raises:
        jinja2.TemplateRuntimeError: It has.
    """
    are_integers = isinstance(base, int) and isinstance(exponent, int)
    if are_integers and base.bit_length() * abs(exponent) > 4096:
        raise jinja2.TemplateRuntimeError("it computes a power of too many digits")


def check_format(text: str) -> None:
    """Raises an error for a format with a field of 10,000 letters or more.

    Raises:
        jinja2.TemplateRuntimeError: There is one, or the width is an argument.
    """
    if _WIDE_FIELD.search(text) or re.search(r"%[-+ #0]*\*|\{[^{}]*\{", text):
        raise jinja2.TemplateRuntimeError("it formats a field of too many letters")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length() if abs(value) > 2**63 else 1
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 1


def _filter_node(node: Any, name: str) -> Any:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _limit_concatenations(node: Any) -> None:
    """Checks the size of the result of every `~` below a node."""
    for child in node.iter_child_nodes():
        _limit_concatenations(child)
    for name, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Concat):
            setattr(node, name, _filter_node(value, "_limit"))
        elif isinstance(value, list):
            value[:] = [
                _filter_node(one, "_limit") if isinstance(one, jinja2.nodes.Concat) else one
                for one in value
            ]
