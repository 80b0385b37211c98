"""Recipes from YAML files and the command line, and what is wrong with those that are none."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from jlora.training.recipe.choosing import UNKNOWN
from jlora.training.recipe.families import RULES
from jlora.training.recipe.schemes import QUANTIZATIONS
from jlora.training.recipe.section import Section
from jlora.training.recipe.sections import Recipe
from jlora.training.recipe.showing import inner_section


class _Loader(yaml.SafeLoader):
    """YAML, with 1e-4 as a number, 2026-01-31 as the text that it is, and no key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{sorted(twice)} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
# The sections of which a field holds one, by the name that says which.
_CHOICES: dict[str, type[Section]] = {**RULES, **QUANTIZATIONS}
# Each says how long a run is, so that the command line's stands in the place of the file's other.
_INSTEAD = {"training.steps": "epochs", "training.epochs": "steps"}


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
        raise FileNotFoundError(f"{path} is no file. `jlora recipe > {path}` writes one to change.")
    raw = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__} instead of a mapping of sections.")
    return checked(overridden(raw, overrides), str(path))


def checked(raw: Mapping[str, Any], where: str = "The recipe") -> Recipe:
    """The recipe that a mapping describes.

    Raises:
        ValueError: It is none; each fault is named with its field and value.
    """
    try:
        return Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        faults = "\n".join(f"  {_told(fault)}" for fault in error.errors())
        raise ValueError(f"{where} is no recipe that can be run:\n{faults}") from None


def overridden(raw: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A recipe's mapping with what `--section.field value` says.

    Values are read as YAML, but those of text fields are the text. Numbers step into lists:
    `--data.train.0.path other.jsonl`. Epochs take the place of the mapping's steps, and steps that
    of its epochs.

    Raises:
        ValueError: For an argument that is no such pair.
    """
    result = _copied(raw)
    pending = list(arguments)
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
        value = _value(name.split("."), text, flag)
        _put(result, name.split("."), value, flag)
        if name in _INSTEAD and value is not None:
            given.add(name)
            if f"training.{_INSTEAD[name]}" not in given:
                result["training"].pop(_INSTEAD[name], None)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _put(tree: Any, keys: list[str], value: Any, flag: str) -> None:
    """Sets one place of nested mappings and lists; mappings that are missing are made."""
    for key in keys[:-1]:
        tree = tree[_place(tree, key, flag)] if isinstance(tree, list) else _inner(tree, key)
        if not isinstance(tree, dict | list):
            raise ValueError(f"{flag}: {key} holds {tree!r}, and nothing is inside that.")
    if isinstance(tree, list):
        tree[_place(tree, keys[-1], flag)] = value
    else:
        tree[keys[-1]] = value


def _inner(tree: dict[str, Any], key: str) -> Any:
    if tree.get(key) is None:
        tree[key] = {}
    return tree[key]


def _place(tree: list[Any], key: str, flag: str) -> int:
    if not key.isdigit() or int(key) >= len(tree):
        raise ValueError(f"{flag}: {key} is no entry of a list of {len(tree)}; the first is 0.")
    return int(key)


def _value(keys: Sequence[str], text: str, flag: str) -> Any:
    """What a text means for the field that it is given to."""
    found: set[Any] = {Recipe}
    for key in keys:
        found = {part for kind in found for part in _inside(kind, key)}
    others = {kind for kind in found if typing.get_origin(kind) is not Literal} - {str}
    if not found or others - {types.NoneType}:
        return _parsed(text, flag)
    return None if others and text in ("", "~", "null") else text


def _inside(kind: Any, key: str) -> set[Any]:
    """The types of what a section, list or mapping holds there."""
    if inspect.isclass(kind) and issubclass(kind, Section):
        return _kinds(kind.model_fields[key].annotation) if key in kind.model_fields else set()
    return _kinds(typing.get_args(kind)[-1]) if typing.get_origin(kind) in (list, dict) else set()


def _kinds(annotation: Any) -> set[Any]:
    """The types of which a value may be one."""
    if typing.get_origin(annotation) is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return {annotation}


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {error}") from None


def _told(fault: Any) -> str:
    """One fault: the field, its value, what is wrong, and what the field means."""
    loc, kind = fault["loc"], fault["type"]
    # The names of families and schemes are steps to pydantic, and none in the file.
    path = ".".join(str(part) for part in loc if part not in (*_CHOICES, UNKNOWN))
    message = fault["msg"].removeprefix("Value error, ")
    section = _section(loc[:-1])
    if kind == "extra_forbidden":
        names = sorted(section.model_fields)
        near = difflib.get_close_matches(str(loc[-1]), names, n=1)
        hint = f"Do you mean {near[0]}? " if near else ""
        return f"{path} is no field. {hint}There are {', '.join(names)}."
    text = section.descriptions().get(str(loc[-1])) if loc else None
    meaning = f" {loc[-1]}: {text}" if text else ""
    if kind == "missing":
        return f"{path} is missing.{meaning}"
    if kind == "value_error" and isinstance(fault["input"], Mapping | Section):
        return f"{path}: {message}" if path else message
    return f"{path}={fault['input']!r}: {message.rstrip('.')}.{meaning}"


def _section(loc: Sequence[str | int]) -> type[Section]:
    """The section that a fault is in."""
    found: type[Section] = Recipe
    for part in loc:
        if part in _CHOICES:
            found = _CHOICES[str(part)]
        elif part in found.model_fields:
            found = inner_section(found.model_fields[str(part)].annotation) or found
    return found
