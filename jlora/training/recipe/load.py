"""Loads recipes from YAML files and command-line overrides, and formats validation errors."""

from __future__ import annotations

import collections
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

from jlora._tree import shorten
from jlora.checkpoints.text_files import name_file_in_errors, read_text
from jlora.training.recipe.base import UNKNOWN_TAG, Section, TaggedSection
from jlora.training.recipe.config_sections import ADAPTER_SECTIONS, QUANTIZATION_SECTIONS
from jlora.training.recipe.foreign_fields import FOREIGN_FIELDS
from jlora.training.recipe.schema import find_nested_section
from jlora.training.recipe.sections import Recipe


class _RecipeYamlLoader(yaml.SafeLoader):
    """YAML loader with 1e-4 as a float, 2026-01-31 and 1:30 as text, and keys of text, each once.

    Its time grows with the length of the text alone.
    """

    _num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._num_nodes += 1
        if self._num_nodes > _MAX_YAML_VALUES:
            raise yaml.MarkedYAMLError(
                None, None, f"more than {_MAX_YAML_VALUES:,} values", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        # YAML 1.1 has numbers of base 60, of which PyYAML adds up the digits.
        is_base_60 = tag in _NUMBER_TAGS and ":" in value
        return self.DEFAULT_SCALAR_TAG if is_base_60 else tag

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        if ":" in text or len(text) > _MAX_NUMBER_LETTERS:
            raise yaml.constructor.ConstructorError(
                None, None, f"{text[:40]!r} is not a number, or too long", node.start_mark
            )
        is_int = node.tag == _NUMBER_TAGS[0]
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"  # Keys of a merge have lower precedence.
        ]
        # Equal hashes of numbers are easily found.
        if other := [key for key in keys if not isinstance(key, str)]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shorten(other[0])} is not text", node.start_mark
            )
        counts = collections.Counter(keys)
        if duplicates := sorted(key for key, count in counts.items() if count > 1):
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate keys {shorten(duplicates)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


_MAX_YAML_DEPTH = 100

_MAX_YAML_VALUES = 50_000

_MAX_YAML_LETTERS = 1_000_000

_MAX_NUMBER_LETTERS = 400

_MAX_LISTED_ERRORS = 20

_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

for _tag in _NUMBER_TAGS:
    _RecipeYamlLoader.add_constructor(_tag, _RecipeYamlLoader.construct_number)

_RecipeYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

_RecipeYamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _RecipeYamlLoader.yaml_implicit_resolvers.items()
}

# Sections of tagged unions, by their tag.
_TAGGED_SECTIONS: dict[str, type[TaggedSection]] = {**ADAPTER_SECTIONS, **QUANTIZATION_SECTIONS}

# Both set the length of a run, so that an override of one replaces the other.
_EXCLUSIVE_FIELDS = {"training.steps": "epochs", "training.epochs": "steps"}


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe from a YAML file.

    Args:
        path: YAML file.
        overrides: Command-line overrides of fields, such as `["--adapter.rank", "32"]`.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If the path is a folder.
        ValueError: If the file is not valid YAML, or not a valid recipe; the message lists the
            invalid fields, up to 20, with their values.

    Example:
        >>> import pathlib, tempfile
        >>> from jlora.training import recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "recipe.yaml"
        ...     _ = file.write_text(
        ...         "{output: run, model: {path: base},"
        ...         " data: {train: [{path: train.jsonl, format: chat}]}}"
        ...     )
        ...     recipe.load(file, ["--adapter.rank", "32"]).adapter.rank
        32
    """
    path = Path(path)
    if path.is_dir():
        inner = path / "recipe.yaml"
        mend = f"Give {inner}" if inner.is_file() else "Give a recipe, which is a YAML file"
        raise IsADirectoryError(f"{path} is a folder. {mend}.")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is not a recipe, which is a YAML file. Give that.")
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} is not a file. Create one with `jlora init > {path}`.")
    raw = parse_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must be a mapping of sections, got {type(raw).__name__}.")
    return validate(apply_overrides(raw, overrides), str(path))


def find_replaced_length(path: str | os.PathLike[str], recipe: Recipe) -> str | None:
    """Returns the length of the run that a file sets and an override replaced, as `field=value`.

    Args:
        path: YAML file of a recipe.
        recipe: Recipe that `load` returned for it, with overrides.
    """
    raw = parse_yaml(read_text(Path(path)), str(path)).get("training") or {}
    for name in ("steps", "epochs"):
        default = type(recipe.training).model_fields[name].default
        if raw.get(name, default) != default and getattr(recipe.training, name) == default:
            return f"training.{name}={raw[name]}"
    return None


def validate(raw: Mapping[str, Any], source: str = "The recipe") -> Recipe:
    """Returns the recipe of a nested mapping.

    Args:
        raw: Sections and their fields.
        source: Name of the recipe in errors.

    Raises:
        ValueError: If the recipe is invalid; the message lists the invalid fields, up to 20, with
            their values.

    Example:
        >>> from jlora.training import recipe
        >>> source = {"path": "train.jsonl", "format": "chat"}
        >>> raw = {"output": "run", "model": {"path": "base"}, "data": {"train": [source]}}
        >>> recipe.validate(raw).optimizer.schedule
        'cosine'
    """
    try:
        return Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        lines = [_format_validation_error(details) for details in errors[:_MAX_LISTED_ERRORS]]
        if len(errors) > len(lines):
            lines.append(f"and {len(errors) - len(lines):,} more.")
        text = "\n".join(f"  {line}" for line in lines)
        raise ValueError(f"{source} is not a valid recipe:\n{text}") from None


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a recipe's mapping with overrides of the form `--section.field value`.

    Values are parsed as YAML, except those of text fields; a field of one text or several gets
    several in brackets. Numbers index into lists:
    `--data.train.0.path other.jsonl`. An override of epochs removes the mapping's steps, and the
    reverse.

    Raises:
        ValueError: If an argument does not have this form, or its path does not exist.
    """
    result = _copy_mapping_tree(raw)
    pending = list(overrides)
    overridden: set[str] = set()
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is not an override. Use --section.field value.")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ValueError(f"{flag} has no value. Use {flag} value.")
            text = pending.pop(0)
        name = name.replace("-", "_")
        value = _parse_override_value(name.split("."), text, flag)
        _set_recipe_field(result, name.split("."), value, flag)
        if name in _EXCLUSIVE_FIELDS and value is not None:
            overridden.add(name)
            if f"training.{_EXCLUSIVE_FIELDS[name]}" not in overridden:
                result["training"].pop(_EXCLUSIVE_FIELDS[name], None)
    return result


def _copy_mapping_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_mapping_tree(inner) for key, inner in value.items()}
    return [_copy_mapping_tree(inner) for inner in value] if isinstance(value, list) else value


def _set_recipe_field(tree: Any, keys: list[str], value: Any, flag: str) -> None:
    """Sets one entry of nested mappings and lists, and creates missing mappings."""
    for key in keys[:-1]:
        tree = (
            tree[_parse_list_index(tree, key, flag)]
            if isinstance(tree, list)
            else _get_or_create_mapping(tree, key)
        )
        if not isinstance(tree, dict | list):
            raise ValueError(f"{flag}: {key}={tree!r} is not a section or list.")
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
        raise ValueError(
            f"{flag}: {key} is not an index of a list of length {len(tree)}; the first index is 0."
        )
    return int(key)


def _parse_override_value(keys: Sequence[str], text: str, flag: str) -> Any:
    """Returns the value of a text for the field at `keys`."""
    field_types: set[Any] = {Recipe}
    for key in keys:
        field_types = {inner for outer in field_types for inner in _field_types(outer, key)}
    not_text = {cls for cls in field_types if typing.get_origin(cls) is not Literal} - {str}
    kinds = {typing.get_origin(cls) or cls for cls in field_types}
    if kinds >= {str, list}:  # A text, or several in brackets. [qv] is a regular expression.
        is_list = text.startswith("[") and text.endswith("]")
        if is_list and (keys[-1] != "target_pattern" or "," in text):
            return parse_yaml(text, flag)
        not_text = {types.NoneType} & kinds
    if not field_types or not_text - {types.NoneType}:
        return parse_yaml(text, flag)
    return None if not_text and text in ("", "~", "null") else text


def _field_types(container_type: Any, key: str) -> set[Any]:
    """Returns the types of a section's field, or of the entries of a list or mapping."""
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
    """Returns the members of a union, or the type itself."""
    if typing.get_origin(annotation) is Annotated:
        return _flatten_annotation(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {cls for part in typing.get_args(annotation) for cls in _flatten_annotation(part)}
    return {annotation}


def parse_yaml(text: str, source: str) -> Any:
    """Parses YAML of an untrusted origin.

    Args:
        text: YAML.
        source: Name of the file or flag in errors.

    Raises:
        ValueError: The text is not valid YAML, refers to its own parents, or has more than a
            million letters, 100 levels or, with the repetitions of its anchors, 50,000 values.
    """
    if len(text) > _MAX_YAML_LETTERS:
        raise ValueError(
            f"{source} has {len(text):,} letters, more than {_MAX_YAML_LETTERS:,}. Remove some."
        )
    with name_file_in_errors(source):
        try:
            node = yaml.compose(text, _RecipeYamlLoader)
            _count_yaml_values(node, {}, source)
            return yaml.load(text, _RecipeYamlLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{source} is not valid YAML: {error}") from None


def _count_yaml_values(
    node: yaml.Node | None, counts: dict[int, int], source: str, depth: int = 0
) -> int:
    """Returns the number of values of a YAML node, where anchors count each time they are used.

    Args:
        node: Node.
        counts: Counts of nodes that were visited, by id; 0 for those that are being visited.
        source: Name of the file in errors.
        depth: Number of nodes that contain the node.

    Raises:
        ValueError: The node contains itself, has too many levels or too many values.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = 0
        children = [
            child for item in node.value for child in (item if isinstance(item, tuple) else [item])
        ]
        if depth >= _MAX_YAML_DEPTH:
            raise ValueError(f"{source} has more than {_MAX_YAML_DEPTH} levels. Remove some.")
        counts[id(node)] = 1 + sum(
            _count_yaml_values(child, counts, source, depth + 1) for child in children
        )
    count = counts[id(node)]
    if not count:
        raise ValueError(
            f"{source} has an anchor in line {node.start_mark.line + 1} that contains itself. "
            f"Write its values out."
        )
    if count > _MAX_YAML_VALUES:
        raise ValueError(
            f"{source} has more than {_MAX_YAML_VALUES:,} values after its anchors are repeated. "
            f"Remove anchors."
        )
    return count


def _format_validation_error(details: Any) -> str:
    """Returns a line with the field, its value, the error, and the field's description."""
    loc, kind = details["loc"], details["type"]
    # The tags of families and schemes are part of pydantic's path, but not of the file's.
    parts = [str(part) for part in loc if part not in (*_TAGGED_SECTIONS, UNKNOWN_TAG)]
    path = ".".join(part if len(part) <= 100 else f"{part[:97]}..." for part in parts)
    message = details["msg"].removeprefix("Value error, ")
    section = _find_section(loc[:-1])
    if kind == "extra_forbidden":
        return _format_unknown_field(path, str(loc[-1]), section)
    text = section.field_descriptions().get(str(loc[-1])) if loc else None
    description = f" {loc[-1]}: {text}" if text else ""
    if kind == "missing":
        return f"{path} is missing.{description}"
    if kind == "value_error" and isinstance(details["input"], Mapping | Section):
        return f"{path}: {message}" if path else message
    return f"{path}={shorten(details['input'], 1000)}: {message.rstrip('.')}.{description}"


def _format_unknown_field(path: str, name: str, section: type[Section]) -> str:
    """Returns the error for a field of another library, of another section, or a misspelling."""
    foreign = FOREIGN_FIELDS.get(name)
    if foreign is not None:
        note = f" ({foreign.note})" if foreign.note else ""
        return (
            f"Unknown field {path!r}. Use {foreign.field}{note}, which corresponds to {name} of "
            f"{foreign.library}."
        )
    names = sorted(section.model_fields)
    if issubclass(section, TaggedSection) and _is_field_of_other_tag(section, name):
        tag = section.model_fields[section.tag_field].default
        return (
            f"Unknown field {path!r} for {section.tag_field}={tag}. Expected one of "
            f"{', '.join(names)}."
        )
    elsewhere = [other for other in _field_paths(Recipe) if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"Unknown field {path!r}. Did you mean {' or '.join(map(repr, elsewhere))}?"
    near = difflib.get_close_matches(name[:100], names, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"Unknown field {path!r}. {hint}Expected one of {', '.join(names)}."


def _is_field_of_other_tag(section: type[TaggedSection], name: str) -> bool:
    """Returns True if another section of the same union has the field."""
    return any(
        name in other.model_fields
        for other in _TAGGED_SECTIONS.values()
        if other.tag_field == section.tag_field
    )


def _field_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yields the dotted paths of all fields outside lists."""
    for name, field in section.model_fields.items():
        yield prefix + name
        nested = find_nested_section(field.annotation)
        if nested is not None and typing.get_origin(field.annotation) is not list:
            yield from _field_paths(nested, f"{prefix}{name}.")


def _find_section(loc: Sequence[str | int]) -> type[Section]:
    """Returns the section at pydantic's path of an error."""
    section: type[Section] = Recipe
    for part in loc:
        if part in _TAGGED_SECTIONS:
            section = _TAGGED_SECTIONS[str(part)]
        elif part in section.model_fields:
            section = find_nested_section(section.model_fields[str(part)].annotation) or section
    return section
