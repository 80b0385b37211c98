"""Jinja for templates of strangers: a sandbox whose time and memory are bounded.

Jinja's sandbox keeps a template from Python's internals, but not from loops in loops, or from texts
that double. Here loops, outputs and calls are counted; the contents of every value are measured
before it is used and after it is made, and all that is made is added up. Filters that no template
needs and whose time grows with the square of a text are left out.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_STEPS = 5_000_000

MAX_SECONDS = 10.0

# Letters of a value and of everything in it; every entry counts as `_ENTRY_LETTERS` more.
MAX_SIZE = 20_000_000

# All values that a rendering makes, in multiples of `MAX_SIZE`.
MAX_TOTAL_RATIO = 10

_ENTRY_LETTERS = 32

_MAX_DEPTH = 100

_MAX_INTEGER = 1_000_000

_MAX_INTEGER_BITS = 4096

_MAX_FIELD_LETTERS = 10_000

_MAX_TEMPLATE_LETTERS = 1_000_000

# Of a field such as {:>99999999} or %99999999d.
_WIDE_FIELD = re.compile(r"\d{5}")

_LEFT_OUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")

_LEFT_OUT_METHODS = ("striptags", "unescape")

# Of which each argument may be written once for every part of the first.
_REPEATING = (
    "center",
    "expandtabs",
    "indent",
    "join",
    "ljust",
    "rjust",
    "tojson",
    "translate",
    "zfill",
)

# Which may compare each letter of a text with each of an argument.
_SEARCHING = ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim")

_MAX_COMPARISONS = 100_000_000

# Encodings and error handlers whose time and result grow with the text alone.
_CODEC_ARGUMENTS = (
    *("ascii", "latin-1", "latin1", "iso-8859-1", "utf-8", "utf8", "utf-16", "utf-32"),
    *("ignore", "replace", "strict"),
)

_CODEC_NAMES = ", ".join(_CODEC_ARGUMENTS)

# Which make a value of every letter of a text.
_LETTER_BY_LETTER = (
    "batch",
    "list",
    "map",
    "reject",
    "select",
    "slice",
    "sort",
    "title",
    "unique",
    "wordcount",
)


class _Budget(threading.local):
    """Steps, letters and time of the rendering in this thread."""

    steps = 0
    letters = 0
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
        super().__init__(finalize=self._finalize, **options)
        self._budget = _Budget()
        self.filters = _GuardedFilters(self)
        self.globals.pop("lipsum", None)

    def begin(self) -> None:
        """Begins a budget for one rendering."""
        budget = self._budget
        budget.steps, budget.letters, budget.start = 0, 0, time.thread_time()

    def step(self, count: int = 1) -> None:
        """Counts iterations, outputs or calls.

        Raises:
            jinja2.TemplateRuntimeError: There were too many, or they took too long.
        """
        budget = self._budget
        budget.steps += count
        if budget.steps > MAX_STEPS or time.thread_time() - budget.start > MAX_SECONDS:
            raise jinja2.TemplateRuntimeError(
                f"it takes more than {MAX_STEPS:,} steps or {MAX_SECONDS:g} seconds"
            )

    def make(self, value: Any, *, is_new: bool = False) -> Any:
        """Returns a value that an operation made, and counts its letters.

        Args:
            value: The value.
            is_new: Whether the entries of a list are new as well.

        Raises:
            jinja2.TemplateRuntimeError: It is too large, or all values are.
        """
        size = measure(value).size
        if not is_new and isinstance(value, list | tuple | dict):
            size = _ENTRY_LETTERS * (1 + len(value))
        self._budget.letters += size
        if self._budget.letters > MAX_TOTAL_RATIO * MAX_SIZE:
            raise _make_size_error()
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """Returns the pieces of an output as one text.

        Raises:
            jinja2.TemplateRuntimeError: It would be too large.
        """
        kept, size = [], 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_SIZE:
                raise _make_size_error()
            kept.append(piece)
        self.step(len(kept))
        return self.make("".join(kept))

    def _finalize(self, value: Any) -> Any:
        self.step()
        return value if isinstance(value, str) else self.make(value, is_new=True)

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        if len(source) > _MAX_TEMPLATE_LETTERS:
            raise jinja2.TemplateSyntaxError(
                f"it has more than {_MAX_TEMPLATE_LETTERS:,} letters", 1, name, filename
            )
        self.begin()  # Constant parts are computed now.
        template = super()._parse(source, name, filename)
        for loop in template.find_all(jinja2.nodes.For):
            pieces = sum(len(one.nodes) for one in loop.find_all(jinja2.nodes.Output))
            count = jinja2.nodes.Const(1 + pieces, lineno=loop.lineno)
            loop.iter = _filter_node(loop.iter, "_count", [count])
        _limit_values(template)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template may read an attribute."""
        return attr not in _LEFT_OUT_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Returns the result of an operator, unless it would be too large."""
        self.step()
        check_operands(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        self.step(0)
        return self.make(result)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a call, unless it would be too large."""
        self.step()
        method = getattr(obj, "__wrapped__", obj)  # The sandbox wraps methods that format.
        owner = getattr(method, "__self__", None)
        if isinstance(obj, jinja2.runtime.LoopContext) and args:  # A recursive loop.
            args = (self.count(args[0]), *args[1:])
            return self.make(super().call(context, obj, *args, **kwargs))
        args, kwargs = self._collect(args, kwargs)
        values = [*args, *kwargs.values()]
        if isinstance(owner, str | bytes | list | tuple | dict):
            check_arguments(method.__name__, owner, values)
        else:
            check_arguments("", None, values)
        result = super().call(context, obj, *args, **kwargs)
        self.step(0)
        return self.make(result, is_new=isinstance(owner, str | bytes))

    def count(self, values: Iterable[Any], steps: int = 1) -> Iterator[Any]:
        """Yields the values of a loop, each of which is a step, or several."""
        for value in values:
            self.step(steps)
            yield value

    def call_filter_function(
        self, name: str, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Returns the result of a filter, unless it would be too large."""
        self.step()
        args, kwargs = self._collect(args, kwargs)
        # Some filters take the context or the environment before the value.
        start = int(hasattr(function, "jinja_pass_arg"))
        subject = args[start] if len(args) > start else None
        values = [*args[start + 1 :], *kwargs.values()]
        check_arguments(name, subject, values)
        result = function(*args, **kwargs)
        self.step(0)
        return self.make(result, is_new=isinstance(subject, str | bytes))

    def _collect(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with the values of generators in lists, which can be measured."""
        collected = tuple(self._collect_one(value) for value in args)
        return collected, {name: self._collect_one(value) for name, value in kwargs.items()}

    def _collect_one(self, value: Any) -> Any:
        is_stream = isinstance(value, Iterator) and not isinstance(
            value, jinja2.runtime.LoopContext
        )
        return self.make(list(self.count(value))) if is_stream else value


class _GuardedFilters(dict[str, Callable[..., Any]]):
    """Filters of an environment, each of which checks the sizes of its arguments and result."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        super().__init__()
        self._environment = environment
        for name, function in environment.filters.items():
            if name not in _LEFT_OUT_FILTERS:
                self[name] = function
        super().__setitem__("_count", environment.count)
        super().__setitem__("_make", environment.make)
        super().__setitem__("_concat", lambda values: self._concat(values))

    def _concat(self, values: list[Any]) -> str:
        measure(values)
        return self._environment.concat([str(value) for value in values])

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        @functools.wraps(function)  # Including the mark of filters that take the context.
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self._environment.call_filter_function(name, function, args, kwargs)

        super().__setitem__(name, guarded)


class _Measure(NamedTuple):
    """Size of a value.

    Attributes:
        size: Letters of all that is in it, with those that count for entries.
        entries: Number of values in it, and in those.
        depth: How deep they are nested.
    """

    size: int
    entries: int
    depth: int


def measure(value: Any) -> _Measure:
    """Returns the size of a value with all that is in it, as often as it is in it.

    Raises:
        jinja2.TemplateRuntimeError: It is too large or too deep.
    """
    size = entries = deepest = 0
    stack = [(value, 1)]
    while stack:
        one, depth = stack.pop()
        entries, deepest = entries + 1, max(deepest, depth)
        size += _ENTRY_LETTERS if depth > 1 else 1
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, int):
            if one.bit_length() > _MAX_INTEGER_BITS:
                raise jinja2.TemplateRuntimeError("it computes a number of too many digits")
        else:
            inner = _contents(one)
            if _ENTRY_LETTERS * len(inner) > MAX_SIZE:
                raise _make_size_error()
            stack.extend((item, depth + 1) for item in inner)
        if size > MAX_SIZE:
            raise _make_size_error()
        if depth > _MAX_DEPTH:
            raise jinja2.TemplateRuntimeError("it nests values too deep")
    return _Measure(size, entries, deepest)


def _contents(value: Any) -> Any:
    """Returns the values in a value."""
    if isinstance(value, jinja2.utils.Namespace):
        value = value._Namespace__attrs  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, ItemsView | KeysView | ValuesView):
        return list(value)
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return ()


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises an error if the result of an operator may be too large.

    Raises:
        jinja2.TemplateRuntimeError: It may be.
    """
    sizes = [measure(left).size, measure(right).size]
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        if operator == "**" and bits[0] * abs(right) > _MAX_INTEGER_BITS:
            raise jinja2.TemplateRuntimeError("it computes a power of too many digits")
        if operator == "*" and sum(bits) > _MAX_INTEGER_BITS:
            raise jinja2.TemplateRuntimeError("it computes a number of too many digits")
    elif operator == "*":
        factors = [
            abs(value) if isinstance(value, int) else size
            for value, size in zip((left, right), sizes, strict=True)
        ]
        _check_size(factors[0] * factors[1])
    elif operator == "%" and isinstance(left, str):
        check_arguments("format", left, [right])


def check_arguments(name: str, subject: Any, values: list[Any]) -> None:
    """Raises an error if the result of a filter or method may be too large.

    Args:
        name: Name of the filter or method.
        subject: Value that it is applied to; None for other functions.
        values: Other arguments.

    Raises:
        jinja2.TemplateRuntimeError: It may be.
    """
    if name == "join" and isinstance(subject, str) and values and not isinstance(values[0], str):
        subject, values = values[0], [subject, *values[1:]]  # The method of the separator.
    whole, sizes = measure(subject), [measure(value).size for value in values]
    bound = whole.size + sum(sizes)
    _check_size(bound)
    # Letters that every repetition may add.
    added = sum(
        abs(value) if isinstance(value, int) else size
        for value, size in zip(values, sizes, strict=True)
    )
    if any(isinstance(value, int) and abs(value) > _MAX_INTEGER for value in values):
        _check_size(bound * added)
    is_text = isinstance(subject, str | bytes)
    if is_text and name in _SEARCHING:
        letters = max((len(value) for value in values if isinstance(value, str | bytes)), default=0)
        if len(subject) * letters > _MAX_COMPARISONS:
            raise jinja2.TemplateRuntimeError(
                f"it compares {len(subject):,} letters with {letters:,} in {name}"
            )
    if name in ("format", "format_map"):
        check_format(str(subject))
        fields = str(subject).count("%") + str(subject).count("{")
        _check_size(bound + fields * (sum(sizes) + (fields > 20) * _MAX_FIELD_LETTERS))
    elif name == "replace" and is_text and len(values) > 1:
        old = len(values[0]) if isinstance(values[0], str | bytes) else 1
        _check_size(bound + (len(subject) // max(1, old) + 1) * max(sizes[1:]))
    elif name == "sum" and any(not isinstance(one, int | float | str) for one in values):
        raise jinja2.TemplateRuntimeError("it sums what are no numbers")
    elif name in _REPEATING:
        parts = whole.entries * whole.depth
        if is_text and name == "indent":
            text = subject if isinstance(subject, str) else subject.decode("latin-1")
            parts = 1 + sum(text.count(one) for one in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
        elif is_text and name in ("expandtabs", "join", "translate"):
            parts = len(subject)
        _check_size(bound + parts * added)
    elif name in ("encode", "decode") and is_text:
        for value in values:
            if str(value).lower().replace("_", "-") not in _CODEC_ARGUMENTS:
                raise jinja2.TemplateRuntimeError(
                    f"it uses the encoding {str(value)[:40]!r}, and not {_CODEC_NAMES}"
                )
    elif name in _LETTER_BY_LETTER and is_text:
        _check_size(_ENTRY_LETTERS * len(subject))
    elif name in ("split", "rsplit", "splitlines") and is_text:
        separator = values[0] if values and isinstance(values[0], type(subject)) else None
        parts = len(subject) // 2
        if separator:
            parts = subject.count(separator)  # type: ignore[arg-type]
        _check_size(_ENTRY_LETTERS * parts)


def check_format(text: str) -> None:
    """Raises an error for a format with a field of 10,000 letters or more.

    Raises:
        jinja2.TemplateRuntimeError: There is one, or the width is an argument.
    """
    if _WIDE_FIELD.search(text) or re.search(r"%[-+ #0]*\*|\{[^{}]*\{", text):
        raise jinja2.TemplateRuntimeError("it formats a field of too many letters")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise _make_size_error()


def _make_size_error() -> jinja2.TemplateRuntimeError:
    return jinja2.TemplateRuntimeError(f"it makes values of more than {MAX_SIZE:,} letters")


def _filter_node(node: Any, name: str, args: list[Any] | None = None) -> Any:
    return jinja2.nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)


def _limit_values(node: Any) -> None:
    """Checks the size of every value that a template makes without a call, below a node."""
    for child in node.iter_child_nodes():
        _limit_values(child)
    for name, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_limit_value(one) for one in value]
        else:
            setattr(node, name, _limit_value(value))


def _limit_value(node: Any) -> Any:
    if isinstance(node, jinja2.nodes.Concat):
        return _filter_node(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_concat")
    is_slice = isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice)
    makes = isinstance(node, jinja2.nodes.List | jinja2.nodes.Dict | jinja2.nodes.Tuple)
    if is_slice or (makes and getattr(node, "ctx", "load") == "load"):
        return _filter_node(node, "_make")
    return node
