"""The recipe of `jlora init`, with comments and every default, and the JSON schema for editors."""

from __future__ import annotations

import inspect
import textwrap
import typing
from typing import Any

import yaml

from jlora.training.recipe.base import Section, TaggedSection
from jlora.training.recipe.sections import Recipe


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of recipes, for editors.

    Example:
        >>> from jlora.training import recipe
        >>> recipe.json_schema()["required"]
        ['output', 'model', 'data']
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def default_recipe_yaml() -> str:
    """Returns a recipe with a comment for every field and its default value; it is valid as is.

    Example:
        >>> from jlora.training import recipe
        >>> print(recipe.default_recipe_yaml().splitlines()[2])
        output: run
    """
    header = (
        "# Recipe for `jlora train`. Fields have their default values, except those marked "
        '"Required".\n'
    )
    return header + "\n".join(_render_section_lines(Recipe, 0)) + "\n"


def _render_section_lines(section: type[Section], depth: int) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    for name, field in section.model_fields.items():
        text = section.field_descriptions()[name]
        nested = find_nested_section(field.annotation)
        is_list = typing.get_origin(field.annotation) is list
        default = (
            field.examples[0] if field.examples else field.get_default(call_default_factory=True)
        )
        if nested is None or default in ([], None):
            required = "Required. " if field.is_required() else ""
            lines += [
                *_format_yaml_comment(required + text, indent),
                f"{indent}{name}: {_dump_inline_yaml(default)}",
            ]
            continue
        blank = [""] if depth == 0 else []
        lines += [*blank, *_format_yaml_comment(text, indent), f"{indent}{name}:"]
        body = _render_section_lines(nested, depth + 1)
        lines += _indent_as_list_entry(body) if is_list else body
    return lines


def _indent_as_list_entry(body: list[str]) -> list[str]:
    """Returns the lines of a mapping as the single entry of a list."""
    first = next(number for number, line in enumerate(body) if not line.lstrip().startswith("#"))
    indent = len(body[first]) - len(body[first].lstrip())
    marked = f"{body[first][:indent]}- {body[first][indent:]}"
    return [*body[:first], marked, *(f"  {line}" for line in body[first + 1 :])]


def find_nested_section(annotation: Any) -> type[Section] | None:
    """Returns the section class in a field's type, of a union the default one, or None."""
    members = _annotation_members(annotation)
    sections = [cls for cls in members if inspect.isclass(cls) and issubclass(cls, Section)]
    defaults = [
        cls for cls in sections if not issubclass(cls, TaggedSection) or _is_default_section(cls)
    ]
    return defaults[0] if defaults else None


def _is_default_section(section: type[TaggedSection]) -> bool:
    return section.model_fields[section.tag_field].default == section.default_tag


def _annotation_members(annotation: Any) -> set[Any]:
    """Returns the annotation and the types nested in it."""
    members = {annotation}
    for part in typing.get_args(annotation):
        members |= _annotation_members(part) if typing.get_args(part) else {part}
    return members


def _format_yaml_comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 96 - len(indent))]


def _dump_inline_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n...")[0].strip()
