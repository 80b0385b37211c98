"""Recipes: validation, errors, overrides, the default recipe and the JSON schema."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
import safetensors.numpy
import yaml

import jlora
from jlora.adapters.registry import ADAPTER_CONFIGS
from jlora.quantization.schemes import SCHEMES
from jlora.training import recipe
from jlora.training.recipe import schema
from jlora.training.recipe.base import Section
from jlora.training.recipe.config_sections import ADAPTER_SECTIONS
from jlora.training.recipe.load import apply_overrides
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import model_from_recipe

RECIPES = pathlib.Path(__file__).parents[2] / "examples" / "recipes"
LEAST: dict[str, Any] = {
    "output": "run",
    "model": {"path": "base"},
    "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
}


def with_(**changes: Any) -> dict[str, Any]:
    return {**LEAST, **changes}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="is not a valid recipe") as caught:
        recipe.validate(raw)
    return str(caught.value)


def test_default_recipe_yaml_is_default_recipe(tmp_path: pathlib.Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.default_recipe_yaml())
    assert recipe.load(tmp_path / "recipe.yaml") == recipe.validate(LEAST)
    lines = recipe.default_recipe_yaml().splitlines()
    assert max(map(len, lines)) <= 100
    # Every field is there, under a comment.
    for name in (
        "use_rslora",
        "warmup_ratio",
        "coordinator_address",
        "truncation",
        "save_total_limit",
    ):
        number = next(n for n, line in enumerate(lines) if line.strip().startswith(f"{name}:"))
        assert lines[number - 1].strip().startswith("#"), name


def sections(of: Any = Recipe) -> set[type[Section]]:
    found = {of}
    for field in of.model_fields.values():
        for part in schema._annotation_members(field.annotation):
            if isinstance(part, type) and issubclass(part, Section) and part not in found:
                found |= sections(part)
    return found


@pytest.mark.parametrize("section", sorted(sections(), key=lambda s: s.__name__))
def test_field_descriptions_cover_all_fields(section: Any) -> None:
    if section.__name__ != "_Unknown":
        assert set(section.field_descriptions()) == set(section.model_fields)
        assert all(section.field_descriptions().values())


@pytest.mark.parametrize("config", ADAPTER_CONFIGS, ids=lambda c: c.__name__)
def test_validate_every_family_builds_config(config: Any) -> None:
    needed = {"token_indices": [3, 1]} if config is jlora.TrainableTokens else {}
    adapter = {"family": config.__name__, "target_pattern": "q", **needed}
    budget = {"budget": {"target_rank": 8}} if config is jlora.AdaLoRA else {}
    made = recipe.validate(with_(adapter=adapter, optimizer=budget)).adapter
    assert type(made.to_config()) is config
    own = {field.name for field in dataclasses.fields(config)} - {"share"}
    assert set(type(made).config_fields) == own


def test_validate_fields_reach_adapter_config() -> None:
    adapter = {"family": "DoRA", "rank": 3, "alpha": 6, "dropout": 0.1, "init": "gaussian"}
    made = recipe.validate(with_(adapter=adapter)).adapter.to_config()
    assert isinstance(made, jlora.DoRA)
    assert (made.rank, made.alpha, made.dropout, made.init.name) == (3, 6.0, 0.1, "gaussian")


@pytest.mark.parametrize("name", SCHEMES)
def test_validate_every_scheme_builds_config(name: str) -> None:
    made = recipe.validate(with_(quantize={"scheme": name, "block_size": 32, "axis": -1})).quantize
    assert made is not None
    assert made.to_scheme() == SCHEMES[name](block_size=32, axis=-1)
    assert set(type(made).config_fields) == {
        field.name for field in dataclasses.fields(SCHEMES[name])
    }
    assert recipe.validate(with_(quantize={"scheme": name})).quantize.to_scheme() == SCHEMES[name]()  # type: ignore


@pytest.mark.parametrize(
    ("quantize", "good"),
    [
        (None, True),
        ({}, True),
        ({"scheme": "nf4", "double_quantization": False}, True),
        ({"double_quantization": False, "target_pattern": "mlp"}, True),
        ({"scheme": "int8", "block_size": 32}, True),
        ({"scheme": "int8", "double_quantization": False}, False),
        ({"scheme": "nf5"}, False),
        ({"bits": 4}, False),
        ("nf4", False),
    ],
)
def test_json_schema_agrees_on_quantization(quantize: Any, good: bool) -> None:
    raw = with_(quantize=quantize)
    assert passes(raw) == good
    if good:
        made = recipe.validate(raw)
        assert recipe.validate(made.model_dump(mode="json")) == made
    else:
        refusal(raw)


def test_json_schema_names_and_descriptions() -> None:
    schema = recipe.json_schema()
    json.dumps(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"output", "model", "data"}
    model = schema["$defs"]["ModelSection"]
    assert model["properties"]["path"]["description"].startswith("Hugging Face folder")
    assert {"LoRA", "DoRA", "FourierFT"} <= set(schema["$defs"])
    assert schema["$defs"]["LoRA"]["properties"]["rank"]["description"].startswith("Rank of")
    assert "_Unknown" not in schema["$defs"]


def passes(raw: Any) -> bool:
    return jsonschema.Draft202012Validator(recipe.json_schema()).is_valid(raw)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_json_schema_accepts_example_recipes(path: pathlib.Path) -> None:
    assert passes(yaml.safe_load(path.read_text()))
    assert passes(recipe.load(path).model_dump(mode="json"))


def test_json_schema_accepts_default_recipe() -> None:
    assert passes(yaml.safe_load(recipe.default_recipe_yaml()))


@pytest.mark.parametrize(
    ("rule", "good"),
    [
        ({"family": "LoRA", "rank": 16, "alpha": 32}, True),
        ({"rank": 8, "alpha": 16}, True),
        ({}, True),
        ({"family": "DoRA", "rank": 8, "alpha": 16.0}, True),
        ({"family": "IA3"}, True),
        ({"family": "TrainableTokens", "token_indices": [3, 1]}, True),
        ({"family": "TrainableTokens"}, False),
        ({"family": "Bogus", "x": 1}, False),
        ({"family": "Bogus"}, False),
        ({"family": "LoRA", "rnak": 8}, False),
        ({"rnak": 8}, False),
        ({"family": "IA3", "rank": 8}, False),
        ({"family": "DoRA", "rank": "8"}, False),
    ],
)
def test_json_schema_agrees_on_adapters(rule: dict[str, Any], good: bool) -> None:
    for raw in (with_(adapter=rule), with_(adapters=[{**rule, "target_pattern": "q"}])):
        assert passes(raw) == good
        if good:
            recipe.validate(raw)
        else:
            refusal(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter": {"family": "Dora"}},
            "family='Dora' must be one of AdaLoRA, .* Did you mean 'DoRA'",
        ),
        (
            {"adapter": {"rank": 0}},
            "adapter: LoRA.rank=0 must be at least 1",
        ),
        ({"adapter": {"rank": True}}, "adapter.rank=True: .* valid integer. rank: Rank of the"),
        ({"adapter": {"rank": "8"}}, "adapter.rank='8': .* valid integer"),
        (
            {"adapter": {"rnk": 8}},
            "Unknown field 'adapter.rnk'. Did you mean 'rank'. Expected one of alpha, dr",
        ),
        (
            {"adapter": {"family": "IA3", "rank": 8}},
            "Unknown field 'adapter.rank' for family=IA3. Expected one of apply_to, dtype, fam",
        ),
        (
            {"adapter": {"family": "TrainableTokens"}},
            "adapter.token_indices is missing. token_indices: Indices",
        ),
        ({"modle": {}}, "Unknown field 'modle'. Did you mean 'model'."),
        ({"adapters": [{"rank": 8}]}, "adapters.0 has no target_pattern"),
        (
            {"adapters": [{"target_pattern": "(", "rank": 8}]},
            "'.' is not a valid regular expression",
        ),
        ({"frozen_modules": ["["]}, "'.' is not a valid regular expression"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0: .* greater than 0"),
        ({"optimizer": {"learning_rate": -1e-4}}, "learning_rate=-0.0001: .* greater than 0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate=nan: .* finite"),
        ({"optimizer": {"warmup_ratio": 1.0}}, "warmup_ratio=1.0: .* less than 1"),
        ({"optimizer": {"budget": {"target_rank": 4}}}, "budget and the family AdaLoRA require"),
        ({"adapter": {"family": "AdaLoRA"}}, "budget and the family AdaLoRA require each other"),
        ({"training": {"steps": 0}}, "training.steps=0: .* greater than or equal to 1"),
        (
            {"training": {"early_stopping_patience": 2}},
            "patience=2 applies to evaluations .*validation is empty",
        ),
        ({"training": {"eval_steps": 7}}, "training.eval_steps=7 .*Give validation sour"),
        (
            {"training": {"epochs": 2, "steps": 5}},
            "epochs=2 and steps=5 both set the length of the ru",
        ),
        ({"batch": {"eval_batch_size": 3}}, "eval_batch_size=3 .*validation and data.test are em"),
        ({"training": {"metric": "accuracy"}}, "metric=accuracy is not available for language"),
        ({"batch": {"size": -8}}, "batch.size=-8: .* greater than or equal to 1"),
        ({"batch": {"size": 2.5}}, "batch.size=2.5: .* valid integer. size: Rows of each forward"),
        ({"mesh": {"model": 2}}, "Unknown field 'mesh.model'"),
        ({"distributed": {"process_id": 1}}, "must be given together. Give all three"),
        (
            {"distributed": {"process_id": 2, "num_processes": 2, "coordinator_address": "host:1"}},
            "process_id=2 must be below num_processes=2",
        ),
        ({"quantize": "nf4"}, "quantize='nf4': Expected a mapping such as .scheme: nf4., got str"),
        (
            {"quantize": {"scheme": "nf5"}},
            "quantize: scheme='nf5' must be one of .* Did you mean 'nf4'",
        ),
        ({"quantize": {"scheme": ["nf4"]}}, "quantize: scheme=.'nf4'. must be one of "),
        (
            {"quantize": {"blocksize": 64}},
            "Unknown field 'quantize.blocksize'. Did you mean 'block_size'",
        ),
        (
            {"quantize": {"scheme": "int8", "double_quantization": True}},
            "Unknown field 'quantize.double_quantization' for scheme=int8. Expected one of axis, "
            "block_size, scheme, target_pattern",
        ),
        ({"quantize": {"block_size": 3}}, "quantize: NF4.block_size must be an even .* got 3"),
        ({"quantize": {"block_size": "64"}}, "block_size='64': .* block_size: Number of elements"),
        ({"quantize": {"target_pattern": "("}}, "'.' is not a valid regular expression"),
        (
            {"quantize": {}, "adapter": {"init": "pissa"}},
            "adapter.init=pissa subtracts the initial update from the weights, .* "
            "Use init: kaiming_uniform, gaussian",
        ),
        (
            {
                "quantize": {},
                "adapters": [{"target_pattern": "q", "family": "DoRA", "init": "olora"}],
            },
            "adapters.0.init=olora subtracts the initial update",
        ),
        (
            {"export": {"merge_into": "original"}},
            "merge_into=original applies to .*requires quantize",
        ),
        (
            {"quantize": {}, "export": {"merge_into": "original"}},
            "requires quantize and export.merged: true. Give both, or leave it out",
        ),
        ({"adapter": 5}, "adapter=5: Expected a mapping such as .family: LoRA., got int"),
        ({"optimizer": {"budget": {"interval": 0}}}, "interval=0: .* interval: Steps between two"),
        ({"output": ""}, "output='': .* at least 1 character"),
        ({"optimizer": {"epsilon": 1e-300}}, "epsilon=1e-300: 1e-300 is zero in float32. Use a"),
        ({"optimizer": {"weight_decay": 1e39}}, "weight_decay=1e.39: 1e.39 is infinite in float32"),
        ({"seed": -1}, "seed=-1: .* greater than or equal to 0"),
    ],
)
def test_validate_invalid_field_names_value(changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(with_(**changes))), refusal(with_(**changes))


def sources(*formats: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"path": "x.jsonl", "format": name, **fields} for name in formats]


def data(*formats: str, **fields: Any) -> dict[str, Any]:
    return {"train": sources(*formats), **fields}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (data("chat", "preference"), "belong to different tasks, but a run has one"),
        (
            data("chat", truncation="split"),
            "truncation=split applies only to the format text.*'chat'",
        ),
        (
            data("text", test=sources("chat"), truncation="split"),
            "truncation=split .*'chat', 'text'",
        ),
        (
            data("text", validation=sources("completion"), truncation="split"),
            "=split .*'completion'",
        ),
        (
            data("chat", max_seq_length=8, buckets=[4, 16], packing=False),
            "bucket 16 exceeds max_seq_length=8",
        ),
        (
            data("chat", max_seq_length=8, buckets=[4]),
            "buckets=.4. apply to .* Use packing: false, or leave b",
        ),
        (
            data("chat", validation=sources("chat", weight=0.5)),
            "validation.0.weight=0.5 applies only to tra",
        ),
        (data("chat", test=sources("chat", "chat", weight=2)), "test.0.weight=2.0 .*Leave it out"),
        (
            data("completion", "text", train_on="last"),
            "train_on=last applies only to chat, .*'completion', ",
        ),
        (
            data("text", train_on="all"),
            "train_on=all applies only to chat and completion, but the sources",
        ),
        (data("classification", train_on="all"), "train_on=all .*'classification'.. Leave it out"),
        ({"train": sources("chat", weight=1e-5)}, "train.0.weight=1e-05: .* equal to 0.0001. weig"),
        ({"train": sources("chat", weight=1e4)}, "train.0.weight=10000.0: .* less than 10000"),
        ({"train": sources("chat", weight=float("inf"))}, "train.0.weight=inf: "),
        ({"train": sources("chat", weight=float("nan"))}, "train.0.weight=nan: "),
        (
            data("chat", chat_template="nope.jinja"),
            "data.chat_template='nope.jinja': There is no s",
        ),
        (data("chat", chat_template="{{ x }}" * 99), "There is no such file. Use an existing"),
        (
            data("chat", chat_template_date="2026-02-30"),
            "data.chat_template_date='2026-02-30': Expected a date such as 2026-01-31",
        ),
        (
            data("chat", chat_template_date="20260131"),
            "data.chat_template_date='20260131': Expected a date",
        ),
        (
            data("chat", chat_template_date="today"),
            "data.chat_template_date='today': Expected a date",
        ),
        (data("poem"), "data.train.0.format='poem'"),
        ({"train": []}, "data.train=.*at least 1 item"),
        (data("chat", validation=[{"path": "x"}]), "data.validation.0.format is missing"),
    ],
)
def test_validate_invalid_data_names_value(given: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(with_(data=given))), refusal(with_(data=given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"report": {"sample_prompts": ["who?"]}},
            "report.sample_prompts=.'who.'. require a model .*Leave them",
        ),
        ({"training": {"metric": "accuracy"}}, "training.metric=accuracy .*validation is empty"),
    ],
)
def test_validate_unused_for_labels_raises(changes: dict[str, Any], message: str) -> None:
    raw = with_(data=data("classification", test=sources("classification")), **changes)
    assert re.search(message, refusal(raw)), refusal(raw)


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (data("text", truncation="split", validation=sources("text")), {}),
        (data("chat", buckets=[8], packing=False), {}),
        (data("preference", buckets=[8]), {}),
        (data("chat", "text", train_on="last"), {}),
        (data("completion", "text", train_on="all"), {}),
        (data("text", validation=sources("chat"), train_on="last"), {}),
        ({"train": sources("chat", weight=1e-4)}, {}),
        (data("chat", chat_template_date="2026-01-31"), {}),
        (data("chat", test=sources("chat")), {"batch": {"eval_batch_size": 3}}),
        (data("chat", validation=sources("chat")), {"training": {"eval_steps": 7}}),
        (data("preference"), {"report": {"sample_prompts": ["who?"]}}),
        (data("chat"), {"training": {"steps": 5}}),
        (data("chat"), {"training": {"epochs": 3}}),
    ],
)
def test_validate_dumped_recipe_round_trips(
    given: dict[str, Any], changes: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    made = recipe.validate(with_(data=given, **changes))
    # As written by a run: epochs besides steps, and every default.
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    assert recipe.load(tmp_path / "recipe.yaml") == made


def test_validate_existing_chat_template(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}")
    assert recipe.validate(with_(data=data("chat", chat_template=str(path)))).data.chat_template


def test_load_unquoted_dates_are_text(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(with_(data=data("chat", chat_template_date="DAY"))).replace(
            "DAY", "2026-01-31"
        )
    )
    assert "chat_template_date: 2026-01-31" in path.read_text()
    assert recipe.load(path).data.chat_template_date == "2026-01-31"
    assert (
        recipe.load(path, ["--data.chat_template_date", "2026-02-01"]).data.chat_template_date
        == "2026-02-01"
    )


def test_validate_lists_all_errors() -> None:
    told = refusal({"adapter": {"rank": "x"}, "seed": -1})
    for name in (
        "output is missing",
        "model is missing",
        "data is missing",
        "adapter.rank",
        "seed",
    ):
        assert name in told


def test_recipe_task_of_formats() -> None:
    for formats, task in [
        (("chat", "text"), "language"),
        (("preference",), "preference"),
        (("classification",), "classification"),
    ]:
        assert recipe.validate(with_(data=data(*formats))).task == task


def test_overrides_reach_nested_fields() -> None:
    arguments = [
        "--adapter.rank",
        "32",
        "--optimizer.learning-rate=1e-4",
        "--data.train.0.path",
        "b",
    ]
    made = apply_overrides(
        LEAST, [*arguments, "--training.steps", "7", "--adapter.target_pattern", "q|v"]
    )
    read = recipe.validate(made)
    assert read.adapter.to_config() == jlora.LoRA(rank=32, alpha=32.0)
    assert (read.optimizer.learning_rate, read.training.steps) == (1e-4, 7)
    assert (read.data.train[0].path, read.adapter.target_pattern) == ("b", "q|v")
    assert LEAST["data"]["train"][0]["path"] == "train.jsonl"


@pytest.mark.parametrize(
    ("arguments", "place", "value"),
    [
        (["--output", "2024"], "output", "2024"),
        (["--output", "1e-4"], "output", "1e-4"),
        (["--output", "null"], "output", "null"),
        (["--model.path", "a: b # c"], "model.path", "a: b # c"),
        (["--model.revision", "0123"], "model.revision", "0123"),
        (["--model.revision", "null"], "model.revision", None),
        (["--model.dtype=float16"], "model.dtype", "float16"),
        (["--adapter.target_pattern", "[qv]_proj$"], "adapter.target_pattern", "[qv]_proj$"),
        (["--adapter.target_pattern", "[qv]"], "adapter.target_pattern", "[qv]"),
        (["--frozen_modules", "['[0]']", "--frozen_modules.0", "[1]"], "frozen_modules.0", "[1]"),
        (["--data.train.0.name", "true"], "data.train.0.name", "true"),
        (["--data.train.0.columns.messages", "7"], "data.train.0.columns.messages", "7"),
        (
            ["--report.sample_prompts", "[a, b]", "--report.sample_prompts.1", "Say: 1"],
            "report.sample_prompts.1",
            "Say: 1",
        ),
        (["--seed", "7"], "seed", 7),
        (
            ["--adapter.target_pattern", "[q_proj, v_proj]"],
            "adapter.target_pattern",
            ["q_proj", "v_proj"],
        ),
        (["--quantize.target_pattern", "[qv]"], "quantize.target_pattern", "[qv]"),
        (["--quantize.scheme", "int8"], "quantize.scheme", "int8"),
        (["--quantize.block_size", "32"], "quantize.block_size", 32),
        (["--model.scan_layers", "false"], "model.scan_layers", False),
        (["--data.train.0.max_examples", "null"], "data.train.0.max_examples", None),
        (["--adapter.alpha", "-5"], "adapter.alpha", -5),
    ],
)
def test_overrides_values_have_field_types(arguments: list[str], place: str, value: Any) -> None:
    found: Any = apply_overrides(LEAST, arguments)
    for key in place.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    assert found == value
    assert type(found) is type(value)


def test_overrides_steps_replace_epochs() -> None:
    def training(held: dict[str, Any], *arguments: str) -> dict[str, Any]:
        return apply_overrides(with_(training=held), arguments)["training"]

    assert training({"epochs": 3}, "--training.steps", "5") == {"steps": 5}
    assert training({"steps": 5}, "--training.epochs", "3") == {"epochs": 3}
    assert training({"epochs": 3}, "--training.steps", "null") == {"epochs": 3, "steps": None}
    # Giving both is an error of the recipe.
    both = {"epochs": 3, "steps": 5}
    assert training({}, "--training.steps", "5", "--training.epochs", "3") == both
    assert training({}, "--training.epochs", "3", "--training.steps", "5") == both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.rank", "3"], "'adapter.rank' is not an override. Use --section.field value"),
        (["--adapter.rank"], "--adapter.rank has no value"),
        (["--adapter.rank", "--output", "run"], "--adapter.rank has no value"),
        (["--data.train.1.path", "x"], "1 is not an index of a list of length 1; the first"),
        (["--output.name", "x"], "output='run' is not a section or list"),
        (["--adapter", "{rank: [}"], "--adapter is not valid YAML"),
    ],
)
def test_overrides_invalid_raise(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(LEAST, arguments)


def test_load_invalid_files_raise(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match="is not a file. Create one with `jlora init >"):
        recipe.load(path)
    for text, message in [
        ("- 1", "must be a mapping of sections, got list"),
        ("", "got NoneType"),
        ("a: [", "is not valid YAML"),
        ("seed: 1\nseed: 2", r"duplicate keys \['seed'\]"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            recipe.load(path)


def test_load_scientific_notation_is_a_float(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "optimizer: {learning_rate: 1e-4, epsilon: 1E-6}\n")
    read = recipe.load(path)
    assert (read.optimizer.learning_rate, read.optimizer.epsilon) == (1e-4, 1e-6)


def test_recipe_dump_round_trips() -> None:
    adapter = {"family": "DoRA", "rank": 3, "target_pattern": "q"}
    made = recipe.validate(
        with_(adapter=adapter, adapters=[{"family": "BitFit", "target_pattern": "bias$"}])
    )
    assert recipe.validate(made.model_dump(mode="json")) == made
    assert set(ADAPTER_SECTIONS) == {config.__name__ for config in ADAPTER_CONFIGS}


@pytest.mark.parametrize(("name", "stacked"), [("llama", True), ("qwen3_moe_some", False)])
def test_scan_layers_null_depends_on_layers(name: str, stacked: bool) -> None:
    folder = pathlib.Path(__file__).parent.parent / "models/data/decoders" / name
    open_ended = recipe.validate(with_(model={"path": str(folder)}))
    assert open_ended.model.scan_layers is None
    model = model_from_recipe(open_ended, folder)
    assert (model.scan_layers, model.can_scan_layers) == (stacked, stacked)


GOOD_YAML = "output: o\nmodel: {path: b}\ndata: {train: [{path: a, format: text}]}\n"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD_YAML + "seed: &a [*a]\n", "contains itself"),
        (GOOD_YAML + "seed: &a {<<: *a}\n", "contains itself"),
        ("[" * 20_000, "not valid YAML"),
        (GOOD_YAML + "seed: " + "[" * 200 + "]" * 200 + "\n", "more than 100 levels"),
        (GOOD_YAML + LAUGHS, "more than 50,000 values"),
        (GOOD_YAML + "seed: [" + "1," * 60_000 + "]\n", "YAML: more than 50,000 values"),
        (GOOD_YAML + "#" * 1_000_000, "has 1,000,068 letters, more than 1,000,000"),
        (GOOD_YAML + "seed: 1" + ":1" * 300_000 + "\n", "seed='1:1:1:1.*valid integer"),
        (GOOD_YAML + "seed: !!int '1" + ":1" * 300_000 + "'\n", "is not a number, or too long"),
        (GOOD_YAML + "seed: " + "9" * 300_000 + "\n", "is not a number, or too long"),
        (GOOD_YAML + "1: a\n", "the key 1 is not text"),
        (GOOD_YAML + "[1]: a\n", r"the key \[1\] is not text"),
        (GOOD_YAML + "".join(f"k{n}: 1\n" for n in range(8_000)), "and 7,980 more"),
        (GOOD_YAML + f"{'k' * 500}: 1\n{'k' * 500}: 1\n", "duplicate keys"),
        (GOOD_YAML + f"? {'adapte' * 150_000}\n: 1\n", "Unknown field 'adapteadapte"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)
def test_load_hostile_yaml_raises(text: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        recipe.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 30_000
    assert time.process_time() - start < 2


def test_load_yaml_times_are_text(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD_YAML.replace("output: o", "output: 1:30"))
    assert recipe.load(path).output == "1:30"


def test_load_yaml_merges_anchors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        GOOD_YAML + "adapter: &a {rank: 2, alpha: 3.0}\n"
        "adapters: [{<<: *a, rank: 4, target_pattern: q}]\n"
    )
    (extra,) = recipe.load(path).adapters
    assert extra.config_values()["rank"] == 4
    assert extra.config_values()["alpha"] == 3


@pytest.mark.parametrize(
    ("stored", "options", "expected"),
    [
        (np.float16, {}, "float32"),
        (np.float16, {"dtype": "bfloat16"}, None),
        (np.float16, {"compute_dtype": "bfloat16"}, "bfloat16"),
        (np.float32, {}, None),
        (np.float32, {"dtype": "float16"}, "float32"),
    ],
)
def test_model_from_recipe_float16_computes_wider(
    stored: Any, options: dict[str, Any], expected: str | None, tmp_path: pathlib.Path
) -> None:
    llama = pathlib.Path(__file__).parent.parent / "models/data/decoders/llama"
    shutil.copy(llama / "config.json", tmp_path)
    zeros = np.zeros((18, 12), stored)
    weights = {f"model.layers.{n}.mlp.up_proj.weight": zeros for n in range(2)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    made = recipe.validate(with_(model={"path": str(tmp_path), **options}))
    assert model_from_recipe(made, tmp_path).dtype == expected
