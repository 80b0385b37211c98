"""Recipes from YAML files and the command line, and what is wrong with those that are none."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jlora.training.recipe.families import RULES
from jlora.training.recipe.section import Section
from jlora.training.recipe.sections import Recipe
from jlora.training.recipe.showing import inner_section


class _Loader(yaml.SafeLoader):
    """YAML, with 1e-4 as the number that it is meant to be, and no key given twice."""

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
    """A recipe's mapping with what `--section.field value` says; values are read as YAML.

    Numbers step into lists: `--data.train.0.path other.jsonl`.

    Raises:
        ValueError: For an argument that is no such pair.
    """
    result = _copied(raw)
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is no override. Write --section.field value.")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not pending:
                raise ValueError(f"{flag} has no value. Write {flag} value.")
            text = pending.pop(0)
        _put(result, name.replace("-", "_").split("."), _parsed(text, flag), flag)
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


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {error}") from None


def _told(fault: Any) -> str:
    """One fault: the field, its value, what is wrong, and what the field means."""
    loc, kind = fault["loc"], fault["type"]
    # The names of families are steps to pydantic, and none in the file.
    path = ".".join(str(part) for part in loc if part not in (*RULES, "unknown"))
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
        if part in RULES:
            found = RULES[str(part)]
        elif part in found.model_fields:
            found = inner_section(found.model_fields[str(part)].annotation) or found
    return found
