"""What a recipe may say: a commented one with every default, and a schema for editors."""

from __future__ import annotations

import inspect
import textwrap
import typing
from typing import Any

import yaml

from jlora.training.recipe.choosing import Choice
from jlora.training.recipe.section import Section
from jlora.training.recipe.sections import Recipe


def json_schema() -> dict[str, Any]:
    """The schema of recipes for editors, as JSON Schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def commented() -> str:
    """A recipe with every field at its default and what it means; it loads as it is."""
    start = "# A recipe for `jlora train`. Every field but those marked has the value shown here.\n"
    return start + "\n".join(_lines(Recipe, 0)) + "\n"


def _lines(section: type[Section], depth: int) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    for name, field in section.model_fields.items():
        text = section.descriptions()[name]
        inner = inner_section(field.annotation)
        many = typing.get_origin(field.annotation) is list
        default = (
            field.examples[0] if field.examples else field.get_default(call_default_factory=True)
        )
        if inner is None or default in ([], None):
            needed = "Needed. " if field.is_required() else ""
            lines += [*_comment(needed + text, indent), f"{indent}{name}: {_yaml(default)}"]
            continue
        space = [""] if depth == 0 else []
        lines += [*space, *_comment(text, indent), f"{indent}{name}:"]
        body = _lines(inner, depth + 1)
        lines += _as_entry(body) if many else body
    return lines


def _as_entry(body: list[str]) -> list[str]:
    """The lines of a mapping as those of the one entry of a list."""
    first = next(number for number, line in enumerate(body) if not line.lstrip().startswith("#"))
    indent = len(body[first]) - len(body[first].lstrip())
    marked = f"{body[first][:indent]}- {body[first][indent:]}"
    return [*body[:first], marked, *(f"  {line}" for line in body[first + 1 :])]


def inner_section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or may hold, once or in a list; of several the usual one."""
    members = _members(annotation)
    found = [kind for kind in members if inspect.isclass(kind) and issubclass(kind, Section)]
    usual = [kind for kind in found if not issubclass(kind, Choice) or _is_usual(kind)]
    return usual[0] if usual else None


def _is_usual(kind: type[Choice]) -> bool:
    return kind.model_fields[kind.tag].default == kind.usual


def _members(annotation: Any) -> set[Any]:
    found = {annotation}
    for part in typing.get_args(annotation):
        found |= _members(part) if typing.get_args(part) else {part}
    return found


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 96 - len(indent))]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n...")[0].strip()
