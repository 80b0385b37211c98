"""What a recipe may say: a commented one with every default, and a schema for editors."""

from __future__ import annotations

import inspect
import textwrap
import typing
from typing import Any

import yaml

from jlora.training.recipe.base import Section, TaggedSection
from jlora.training.recipe.sections import Recipe


def json_schema() -> dict[str, Any]:
    """The schema of recipes for editors, as JSON Schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def default_recipe_yaml() -> str:
    """A recipe with every field at its default and what it means; it loads as it is."""
    start = "# A recipe for `jlora train`. Every field but those marked has the value shown here.\n"
    return start + "\n".join(_render_section_lines(Recipe, 0)) + "\n"


def _render_section_lines(section: type[Section], depth: int) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    for name, field in section.model_fields.items():
        text = section.field_descriptions()[name]
        inner = find_nested_section(field.annotation)
        many = typing.get_origin(field.annotation) is list
        default = (
            field.examples[0] if field.examples else field.get_default(call_default_factory=True)
        )
        if inner is None or default in ([], None):
            needed = "Needed. " if field.is_required() else ""
            lines += [
                *_format_yaml_comment(needed + text, indent),
                f"{indent}{name}: {_dump_inline_yaml(default)}",
            ]
            continue
        space = [""] if depth == 0 else []
        lines += [*space, *_format_yaml_comment(text, indent), f"{indent}{name}:"]
        body = _render_section_lines(inner, depth + 1)
        lines += _indent_as_list_entry(body) if many else body
    return lines


def _indent_as_list_entry(body: list[str]) -> list[str]:
    """The lines of a mapping as those of the one entry of a list."""
    first = next(number for number, line in enumerate(body) if not line.lstrip().startswith("#"))
    indent = len(body[first]) - len(body[first].lstrip())
    marked = f"{body[first][:indent]}- {body[first][indent:]}"
    return [*body[:first], marked, *(f"  {line}" for line in body[first + 1 :])]


def find_nested_section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or may hold, once or in a list; of several the usual one."""
    members = _annotation_members(annotation)
    found = [kind for kind in members if inspect.isclass(kind) and issubclass(kind, Section)]
    usual = [
        kind for kind in found if not issubclass(kind, TaggedSection) or _is_default_section(kind)
    ]
    return usual[0] if usual else None


def _is_default_section(kind: type[TaggedSection]) -> bool:
    return kind.model_fields[kind.tag_field].default == kind.default_tag


def _annotation_members(annotation: Any) -> set[Any]:
    found = {annotation}
    for part in typing.get_args(annotation):
        found |= _annotation_members(part) if typing.get_args(part) else {part}
    return found


def _format_yaml_comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 96 - len(indent))]


def _dump_inline_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n...")[0].strip()
