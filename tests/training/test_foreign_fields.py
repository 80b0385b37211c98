"""Fields of PEFT, transformers, TRL and torchtune in recipes: their errors name jlora's field."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest

from jlora.cli import train
from jlora.training import recipe
from jlora.training.recipe import foreign_fields, schema
from jlora.training.recipe.base import Section
from jlora.training.recipe.config_sections import ADAPTER_SECTIONS
from jlora.training.recipe.foreign_fields import FOREIGN_FIELDS
from jlora.training.recipe.sections import Recipe

LEAST: dict[str, Any] = {
    "output": "run",
    "model": {"path": "base"},
    "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
}


def field_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields, with index 0 for entries of lists."""
    for name, field in section.model_fields.items():
        yield prefix + name
        nested = schema.find_nested_section(field.annotation)
        if nested is not None:
            index = "0." if typing.get_origin(field.annotation) is list else ""
            yield from field_paths(nested, f"{prefix}{name}.{index}")


PATHS = set(field_paths(Recipe)) | {
    f"adapter.{name}" for section in ADAPTER_SECTIONS.values() for name in section.model_fields
}


@pytest.mark.parametrize("name", FOREIGN_FIELDS)
def test_foreign_fields_targets_exist(name: str) -> None:
    target = FOREIGN_FIELDS[name].field
    if target.startswith("--"):
        assert target.removeprefix("--") in train.TrainOptions.__dataclass_fields__
    else:
        assert target in PATHS


def test_foreign_fields_tables_do_not_overlap() -> None:
    tables = (
        foreign_fields._PEFT,
        foreign_fields._TRANSFORMERS,
        foreign_fields._TRL,
        foreign_fields._TORCHTUNE,
    )
    assert sum(map(len, tables)) == len(FOREIGN_FIELDS)


def test_foreign_fields_are_not_in_target_section() -> None:
    # A field of the same name in the target's section would never reach the error.
    for name, foreign in FOREIGN_FIELDS.items():
        parent, _, field = foreign.field.rpartition(".")
        assert name == field or f"{parent}.{name}".lstrip(".") not in PATHS, name


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"adapter": {"r": 8}}, "'adapter.r'. Use adapter.rank, which corresponds to r of PEFT."),
        (
            {"adapter": {"target_modules": ["q"]}},
            "'adapter.target_modules'. Use adapter.target_pattern (the same names, such as "
            "[q_proj, v_proj]), which corresponds to target_modules of PEFT.",
        ),
        (
            {"training": {"num_train_epochs": 3}},
            "'training.num_train_epochs'. Use training.epochs, which corresponds to "
            "num_train_epochs of transformers.",
        ),
        ({"max_length": 8}, "'max_length'. Use data.max_seq_length, which corresponds to max_le"),
        (
            {"data": {**LEAST["data"], "train_on_input": True}},
            "'data.train_on_input'. Use data.train_on (true is all), which corresponds to "
            "train_on_input of torchtune.",
        ),
    ],
)
def test_validate_foreign_field_names_ours(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="is not a valid recipe") as caught:
        recipe.validate({**LEAST, **raw})
    assert f"Unknown field {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rank": 8}, "'rank'. Did you mean 'adapter.rank'?"),
        ({"dtype": "float32"}, "'dtype'. Did you mean 'model.dtype' or 'adapter.dtype'?"),
        ({"adapter": {"rnk": 8}}, "'adapter.rnk'. Did you mean 'rank'? Expected one of alpha, "),
        (
            {"adapters": [{"family": "IA3", "rank": 8, "target_pattern": "q"}]},
            "'adapters.0.rank' for family=IA3. Expected one of apply_to, dtype, family, targ",
        ),
        ({"mesh": {"xyz": 1}}, "'mesh.xyz'. Expected one of data, fsdp, tensor."),
    ],
)
def test_validate_unknown_field_suggests(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="is not a valid recipe") as caught:
        recipe.validate({**LEAST, **raw})
    assert f"Unknown field {message}" in str(caught.value)


def test_format_foreign_fields_table_has_all_rows() -> None:
    lines = foreign_fields.format_foreign_fields_table().splitlines()
    assert lines[:2] == [
        "| library | field there | field in a recipe | value |",
        "| --- | --- | --- | --- |",
    ]
    assert len(lines) == 2 + len(FOREIGN_FIELDS)
    assert "| PEFT | `lora_alpha` | `adapter.alpha` |  |" in lines
    assert lines[2:] == sorted(lines[2:])
