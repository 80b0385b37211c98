"""Recipes: what they accept, what errors say, and that what is shown is true."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import pytest
import yaml

import jlora
from jlora.adapters.catalog import CONFIGS
from jlora.training import recipe
from jlora.training.recipe.families import RULES
from jlora.training.recipe.reading import overridden
from jlora.training.recipe.section import Section
from jlora.training.recipe.sections import Recipe

LEAST: dict[str, Any] = {
    "output": "run",
    "model": {"path": "base"},
    "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
}


def with_(**changes: Any) -> dict[str, Any]:
    return {**LEAST, **changes}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="is no recipe") as caught:
        recipe.checked(raw)
    return str(caught.value)


def test_the_commented_recipe_is_the_default(tmp_path: pathlib.Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.commented())
    assert recipe.load(tmp_path / "recipe.yaml") == recipe.checked(LEAST)
    lines = recipe.commented().splitlines()
    assert max(map(len, lines)) <= 100
    # Every field is there, under a comment.
    for name in ("rank_stabilized", "warmup_share", "coordinator", "overlong", "keep_last"):
        number = next(n for n, line in enumerate(lines) if line.strip().startswith(f"{name}:"))
        assert lines[number - 1].strip().startswith("#"), name


def sections(of: Any = Recipe) -> set[type[Section]]:
    found = {of}
    for field in of.model_fields.values():
        for part in recipe.showing._members(field.annotation):
            if isinstance(part, type) and issubclass(part, Section) and part not in found:
                found |= sections(part)
    return found


@pytest.mark.parametrize("section", sorted(sections(), key=lambda s: s.__name__))
def test_every_field_says_what_it_means(section: Any) -> None:
    if section.__name__ != "_Unknown":
        assert set(section.descriptions()) == set(section.model_fields)
        assert all(section.descriptions().values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_family_can_be_asked_for(config: Any) -> None:
    needed = {"tokens": [3, 1]} if config is jlora.TokenRows else {}
    lora = {"family": config.__name__, "targets": "q", **needed}
    budget = {"budget": {"target_rank": 8}} if config is jlora.AdaLoRA else {}
    made = recipe.checked(with_(lora=lora, optimizer=budget)).lora
    assert type(made.config()) is config
    own = {field.name for field in dataclasses.fields(config)} - {"share"}
    assert set(type(made).own) == own


def test_a_familys_fields_reach_its_config() -> None:
    lora = {"family": "DoRA", "rank": 3, "alpha": 6, "dropout": 0.1, "init": "gaussian"}
    made = recipe.checked(with_(lora=lora)).lora.config()
    assert isinstance(made, jlora.DoRA)
    assert (made.rank, made.alpha, made.dropout, made.init.name) == (3, 6.0, 0.1, "gaussian")


def test_the_schema_accepts_what_loads_and_nothing_else() -> None:
    schema = recipe.json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"output", "model", "data"}
    model = schema["$defs"]["Model"]
    assert model["properties"]["path"]["description"].startswith("A Hugging Face folder")
    assert {"LoRA", "DoRA", "FourierFT"} <= set(schema["$defs"])
    assert schema["$defs"]["LoRA"]["properties"]["rank"]["description"].startswith("Width of")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"family": "Dora"}}, "family='Dora' is none of .*the nearest are .'DoRA'"),
        ({"lora": {"rank": 0}}, "lora: LoRA.rank=0 leaves no room for an update. Use a rank"),
        ({"lora": {"rank": True}}, "lora.rank=True: .* valid integer. rank: Width of the bott"),
        ({"lora": {"rank": "8"}}, "lora.rank='8': .* valid integer"),
        ({"lora": {"rnk": 8}}, "lora.rnk is no field. Do you mean rank. There are alpha, dr"),
        ({"lora": {"family": "IA3", "rank": 8}}, "lora.rank is no field. There are dtype, fam"),
        ({"lora": {"family": "TokenRows"}}, "lora.tokens is missing. tokens: The numbers"),
        ({"modle": {}}, "modle is no field. Do you mean model."),
        ({"more": [{"rank": 8}]}, "more.0 has no targets"),
        ({"more": [{"targets": "(", "rank": 8}]}, "'.' is no regular expression"),
        ({"frozen": ["["]}, "'.' is no regular expression"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0: .* greater than 0"),
        ({"optimizer": {"learning_rate": -1e-4}}, "learning_rate=-0.0001: .* greater than 0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate=nan: .* finite"),
        ({"optimizer": {"warmup_share": 1.0}}, "warmup_share=1.0: .* less than 1"),
        ({"optimizer": {"budget": {"target_rank": 4}}}, "budget and the family AdaLoRA need"),
        ({"lora": {"family": "AdaLoRA"}}, "budget and the family AdaLoRA need each other"),
        ({"training": {"steps": 0}}, "training.steps=0: .* greater than or equal to 1"),
        ({"training": {"patience": 2}}, "patience=2 waits for evaluations, and data.validati"),
        ({"training": {"metric": "accuracy"}}, "metric=accuracy, and text is measured by"),
        ({"batch": {"rows": -8}}, "batch.rows=-8: .* greater than or equal to 1"),
        ({"batch": {"rows": 2.5}}, "batch.rows=2.5: .* valid integer. rows: In each forward"),
        ({"mesh": {"model": 2}}, "mesh.model is no field"),
        ({"distributed": {"process": 1}}, "belong together. Give all three"),
        (
            {"distributed": {"process": 2, "processes": 2, "coordinator": "host:1"}},
            "process=2 is none of processes=2",
        ),
        ({"output": ""}, "output='': .* at least 1 character"),
        ({"seed": -1}, "seed=-1: .* greater than or equal to 0"),
    ],
)
def test_faults_are_told_with_field_value_and_mend(changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(with_(**changes))), refusal(with_(**changes))


def data(*formats: str, **fields: Any) -> dict[str, Any]:
    return {"train": [{"path": "x.jsonl", "format": f} for f in formats], **fields}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (data("chat", "preference"), "of different tasks, and a run has one"),
        (data("chat", overlong="split"), "overlong=split cuts plain text alone"),
        (data("chat", length=8, buckets=[4, 16]), "bucket 16 exceeds length=8"),
        (data("poem"), "data.train.0.format='poem'"),
        ({"train": []}, "data.train=.*at least 1 item"),
        (data("chat", validation=[{"path": "x"}]), "data.validation.0.format is missing"),
    ],
)
def test_faults_of_data_are_told(given: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(with_(data=given))), refusal(with_(data=given))


def test_all_faults_are_told_at_once() -> None:
    told = refusal({"lora": {"rank": "x"}, "seed": -1})
    for name in ("output is missing", "model is missing", "data is missing", "lora.rank", "seed"):
        assert name in told


def test_formats_say_the_task() -> None:
    for formats, task in [
        (("chat", "text"), "language"),
        (("preference",), "preference"),
        (("classification",), "classification"),
    ]:
        assert recipe.checked(with_(data=data(*formats))).task == task


def test_overrides_reach_every_place() -> None:
    arguments = ["--lora.rank", "32", "--optimizer.learning-rate=1e-4", "--data.train.0.path", "b"]
    made = overridden(LEAST, [*arguments, "--training.steps", "7", "--lora.targets", "q|v"])
    read = recipe.checked(made)
    assert read.lora.config() == jlora.LoRA(rank=32, alpha=32.0)
    assert (read.optimizer.learning_rate, read.training.steps) == (1e-4, 7)
    assert (read.data.train[0].path, read.lora.targets) == ("b", "q|v")
    assert LEAST["data"]["train"][0]["path"] == "train.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.rank", "3"], "'lora.rank' is no override. Write --section.field value"),
        (["--lora.rank"], "--lora.rank has no value"),
        (["--data.train.1.path", "x"], "1 is no entry of a list of 1; the first is 0"),
        (["--output.name", "x"], "output holds 'run', and nothing is inside that"),
        (["--lora", "{rank: [}"], "--lora is no YAML"),
    ],
)
def test_overrides_that_are_none_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overridden(LEAST, arguments)


def test_files_that_are_no_recipes_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match="is no file. `jlora recipe >"):
        recipe.load(path)
    for text, message in [
        ("- 1", "holds list instead of a mapping"),
        ("", "holds NoneType"),
        ("a: [", "is no YAML"),
        ("seed: 1\nseed: 2", r"\['seed'\] stands there twice"),
        ("a: !!python/object/apply:os.system [ls]", "is no YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            recipe.load(path)


def test_scientific_notation_is_a_number(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "optimizer: {learning_rate: 1e-4, epsilon: 1E-6}\n")
    read = recipe.load(path)
    assert (read.optimizer.learning_rate, read.optimizer.epsilon) == (1e-4, 1e-6)


def test_a_recipe_is_written_as_it_is_read() -> None:
    lora = {"family": "DoRA", "rank": 3, "targets": "q"}
    made = recipe.checked(with_(lora=lora, more=[{"family": "BitFit", "targets": "bias$"}]))
    assert recipe.checked(made.model_dump(mode="json")) == made
    assert set(RULES) == {config.__name__ for config in CONFIGS}
