"""Recipes from YAML files and the command line, and what is wrong with those that are none."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from jlora.training.recipe.base import UNKNOWN_TAG, Section
from jlora.training.recipe.config_sections import ADAPTER_SECTIONS, QUANTIZATION_SECTIONS
from jlora.training.recipe.foreign_fields import FOREIGN_FIELDS
from jlora.training.recipe.schema import find_nested_section
from jlora.training.recipe.sections import Recipe


class _RecipeYamlLoader(yaml.SafeLoader):
    """YAML, with 1e-4 as a number, 2026-01-31 as the text that it is, and no key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{sorted(twice)} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_RecipeYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

_RecipeYamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _RecipeYamlLoader.yaml_implicit_resolvers.items()
}

# The sections of which a field holds one, by the name that says which.
_TAGGED_SECTIONS: dict[str, type[Section]] = {**ADAPTER_SECTIONS, **QUANTIZATION_SECTIONS}

# Each says how long a run is, so that the command line's stands in the place of the file's other.
_EXCLUSIVE_FIELDS = {"training.steps": "epochs", "training.epochs": "steps"}


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: The file.
        overrides: What the command line says otherwise: `["--lora.rank", "32"]`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML, or no recipe; each fault is named with its field and value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. `jlora init > {path}` writes one to change.")
    raw = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__} instead of a mapping of sections.")
    return validate(apply_overrides(raw, overrides), str(path))


def validate(raw: Mapping[str, Any], source: str = "The recipe") -> Recipe:
    """The recipe that a mapping describes.

    Raises:
        ValueError: It is none; each fault is named with its field and value.
    """
    try:
        return Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        faults = "\n".join(f"  {_format_validation_error(fault)}" for fault in error.errors())
        raise ValueError(f"{source} is no recipe that can be run:\n{faults}") from None


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe's mapping with what `--section.field value` says.

    Values are read as YAML, but those of text fields are the text. Numbers step into lists:
    `--data.train.0.path other.jsonl`. Epochs take the place of the mapping's steps, and steps that
    of its epochs.

    Raises:
        ValueError: For an argument that is no such pair.
    """
    result = _copy_mapping_tree(raw)
    pending = list(overrides)
    given: set[str] = set()
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is no override. Write --section.field value.")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ValueError(f"{flag} has no value. Write {flag} value.")
            text = pending.pop(0)
        name = name.replace("-", "_")
        value = _parse_override_value(name.split("."), text, flag)
        _set_recipe_field(result, name.split("."), value, flag)
        if name in _EXCLUSIVE_FIELDS and value is not None:
            given.add(name)
            if f"training.{_EXCLUSIVE_FIELDS[name]}" not in given:
                result["training"].pop(_EXCLUSIVE_FIELDS[name], None)
    return result


def _copy_mapping_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_mapping_tree(inner) for key, inner in value.items()}
    return [_copy_mapping_tree(inner) for inner in value] if isinstance(value, list) else value


def _set_recipe_field(tree: Any, keys: list[str], value: Any, flag: str) -> None:
    """Sets one place of nested mappings and lists; mappings that are missing are made."""
    for key in keys[:-1]:
        tree = (
            tree[_parse_list_index(tree, key, flag)]
            if isinstance(tree, list)
            else _get_or_create_mapping(tree, key)
        )
        if not isinstance(tree, dict | list):
            raise ValueError(f"{flag}: {key} holds {tree!r}, and nothing is inside that.")
    if isinstance(tree, list):
        tree[_parse_list_index(tree, keys[-1], flag)] = value
    else:
        tree[keys[-1]] = value


def _get_or_create_mapping(tree: dict[str, Any], key: str) -> Any:
    if tree.get(key) is None:
        tree[key] = {}
    return tree[key]


def _parse_list_index(tree: list[Any], key: str, flag: str) -> int:
    if not key.isdigit() or int(key) >= len(tree):
        raise ValueError(f"{flag}: {key} is no entry of a list of {len(tree)}; the first is 0.")
    return int(key)


def _parse_override_value(keys: Sequence[str], text: str, flag: str) -> Any:
    """What a text means for the field that it is given to."""
    found: set[Any] = {Recipe}
    for key in keys:
        found = {part for kind in found for part in _field_types(kind, key)}
    others = {kind for kind in found if typing.get_origin(kind) is not Literal} - {str}
    if not found or others - {types.NoneType}:
        return _parse_yaml(text, flag)
    return None if others and text in ("", "~", "null") else text


def _field_types(container_type: Any, key: str) -> set[Any]:
    """The types of what a section, list or mapping holds there."""
    if inspect.isclass(container_type) and issubclass(container_type, Section):
        return (
            _flatten_annotation(container_type.model_fields[key].annotation)
            if key in container_type.model_fields
            else set()
        )
    return (
        _flatten_annotation(typing.get_args(container_type)[-1])
        if typing.get_origin(container_type) in (list, dict)
        else set()
    )


def _flatten_annotation(annotation: Any) -> set[Any]:
    """The types of which a value may be one."""
    if typing.get_origin(annotation) is Annotated:
        return _flatten_annotation(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _flatten_annotation(part)}
    return {annotation}


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeYamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from None


def _format_validation_error(details: Any) -> str:
    """One fault: the field, its value, what is wrong, and what the field means."""
    loc, kind = details["loc"], details["type"]
    # The names of families and schemes are steps to pydantic, and none in the file.
    path = ".".join(str(part) for part in loc if part not in (*_TAGGED_SECTIONS, UNKNOWN_TAG))
    message = details["msg"].removeprefix("Value error, ")
    section = _find_section(loc[:-1])
    if kind == "extra_forbidden":
        return _format_unknown_field(path, str(loc[-1]), section)
    text = section.field_descriptions().get(str(loc[-1])) if loc else None
    meaning = f" {loc[-1]}: {text}" if text else ""
    if kind == "missing":
        return f"{path} is missing.{meaning}"
    if kind == "value_error" and isinstance(details["input"], Mapping | Section):
        return f"{path}: {message}" if path else message
    return f"{path}={details['input']!r}: {message.rstrip('.')}.{meaning}"


def _format_unknown_field(path: str, name: str, section: type[Section]) -> str:
    """An unknown field: the field of another library, of another section, or a misspelling."""
    foreign = FOREIGN_FIELDS.get(name)
    if foreign is not None:
        note = f" ({foreign.note})" if foreign.note else ""
        return (
            f"Unknown field {path!r}. What {foreign.library} calls {name} is {foreign.field} "
            f"here{note}."
        )
    elsewhere = [other for other in _field_paths(Recipe) if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"Unknown field {path!r}. Did you mean {' or '.join(map(repr, elsewhere))}?"
    names = sorted(section.model_fields)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"Unknown field {path!r}. {hint}Expected one of {', '.join(names)}."


def _field_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all fields outside lists."""
    for name, field in section.model_fields.items():
        yield prefix + name
        nested = find_nested_section(field.annotation)
        if nested is not None and typing.get_origin(field.annotation) is not list:
            yield from _field_paths(nested, f"{prefix}{name}.")


def _find_section(loc: Sequence[str | int]) -> type[Section]:
    """The section that a fault is in."""
    found: type[Section] = Recipe
    for part in loc:
        if part in _TAGGED_SECTIONS:
            found = _TAGGED_SECTIONS[str(part)]
        elif part in found.model_fields:
            found = find_nested_section(found.model_fields[str(part)].annotation) or found
    return found
