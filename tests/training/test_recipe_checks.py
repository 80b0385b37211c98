"""What a recipe asks of its base and devices is checked before data and weights are read."""

from __future__ import annotations

import importlib
import pathlib
import shutil
import types
from typing import Any

import jax
import pytest
from _support.training_fixtures import Make
from _support.training_runs import run

from jlora import models
from jlora.training import objectives, recipe
from jlora.training.datasets import make_batch_config
from jlora.training.recipe_checks import check_recipe, explain_targets
from jlora.training.setup import model_from_recipe, rules_from_recipe


class Device:
    """A device of a kind that is not there."""

    process_index = 0

    def __init__(self, platform: str, memory: str = "pinned_host") -> None:
        self.platform, self._memory = platform, memory

    def addressable_memories(self) -> list[Any]:
        return [types.SimpleNamespace(kind=self._memory)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"adapter": {"target_pattern": "atention"}},
            r"adapter.target_pattern: The target 'atention' matches nothing.* "
            r"nearest paths of weights .*attention.*`jlora inspect recipe.yaml --targets` lists "
            r"them all",
        ),
        (
            {"adapters": [{"target_pattern": "nothing", "rank": 1}]},
            "adapters.0.target_pattern: The target 'nothing' matches nothing",
        ),
        ({"frozen_modules": ["q$", "no/such"]}, r"frozen_modules.0='q\$': .* matches none"),
        (
            {"frozen_modules": ["kernel"]},
            r"adapter.target_pattern=.* \(the default\): .* has no effect: every weight it match",
        ),
        (
            {
                "adapter": {"target_pattern": "/q/kernel"},
                "adapters": [{"target_pattern": "/q/kernel", "rank": 1}],
            },
            "adapter.target_pattern='/q/kernel' has no effect, as adapters.0.target_pattern has",
        ),
        ({"adapter": {"target_pattern": "norm"}}, "which cannot be adapted by LoRA"),
        ({"data": {"max_seq_length": 4096}}, "data.max_seq_length=4096 must be at most"),
        (
            {"model": {"attention_implementation": "splash"}},
            "attention_implementation=splash needs devices of the kind tpu, got cpu",
        ),
        (
            {"model": {"attention_implementation": "cudnn"}},
            "attention_implementation=cudnn needs devices of the kind gpu, got cpu",
        ),
    ],
)
def test_train_refuses_before_reading_data(
    recipe_of: Make, sections: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("Data or weights were read.")

    train = importlib.import_module("jlora.training.train")  # The package has a function train.
    monkeypatch.setattr(train, "load_datasets", read)
    monkeypatch.setattr(train, "build_setup", read)
    raw = recipe_of(**sections)
    with pytest.raises(ValueError, match=message):
        run(raw)


@pytest.mark.parametrize(
    ("platform", "model", "data", "message"),
    [
        ("gpu", {"attention_implementation": "cudnn"}, {}, "computes in bfloat16 or float16"),
        (
            "gpu",
            {"attention_implementation": "cudnn", "compute_dtype": "bfloat16"},
            {},
            None,
        ),
        ("gpu", {"attention_implementation": "tokamax"}, {}, 'pip install "jlora.gpu."'),
        ("tpu", {"attention_implementation": "tokamax"}, {}, "of the kind gpu, got tpu"),
        ("gpu", {"attention_implementation": "splash"}, {}, "of the kind tpu, got gpu"),
        ("tpu", {"attention_implementation": "splash"}, {}, "multiple of 128, got 64"),
        ("tpu", {}, {}, None),
    ],
)
def test_check_recipe_attention_of_devices(
    recipe_of: Make,
    base: pathlib.Path,
    platform: str,
    model: dict[str, Any],
    data: dict[str, Any],
    message: str | None,
) -> None:
    given = recipe.validate(recipe_of(model=model, data=data))
    if message is None:
        check_recipe(given, base, [Device(platform)])
        return
    with pytest.raises(ValueError, match=message):
        check_recipe(given, base, [Device(platform)])


def test_check_recipe_offload_without_host_memory(recipe_of: Make, base: pathlib.Path) -> None:
    given = recipe.validate(recipe_of(optimizer={"offload": True}))
    check_recipe(given, base, [Device("gpu")])
    with pytest.raises(ValueError, match="cannot be placed in host memory"):
        check_recipe(given, base, [Device("gpu", "device")])


def test_splash_objective_is_traced(recipe_of: Make, base: pathlib.Path) -> None:
    # The kernel takes no text of two tokens, which other objectives are traced with.
    given = recipe.validate(recipe_of(model={"attention_implementation": "splash"}))
    model = model_from_recipe(given, base)
    made = objectives.make_lm_objective(model, rules_from_recipe(given, model), given.optimizer)
    params = models.abstract_params(model, "float32")
    adapter = jax.eval_shape(made.lora.init, jax.random.key(0), params, *made.example_inputs)
    assert len(adapter) == 7
    unpacked = recipe.validate(
        recipe_of(
            model={"attention_implementation": "splash"},
            data={"packing": False, "max_seq_length": 512},
        )
    )
    assert make_batch_config(unpacked, 2, 1).buckets == (128, 256, 512)


def test_explain_targets_lists_adapters(recipe_of: Make, base: pathlib.Path) -> None:
    given = recipe.validate(recipe_of(frozen_modules=["/q/kernel"]))
    rows = {row.path: row.adapter for row in explain_targets(given, base).rows}
    frozen = {path for path, adapter in rows.items() if adapter == "frozen"}
    assert {path.split("/")[-2] for path in rows.keys() - frozen} == {
        *("k", "v", "o", "gate", "up", "down")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"].update(path="nowhere/at/all"), "model.path='nowhere/at/all' is"),
        (
            lambda raw: raw["data"]["train"][0].update(path="none.jsonl"),
            "data.train.0.path='none.j",
        ),
        (
            lambda raw: raw["data"].update(test=[{"path": "no.csv", "format": "chat"}]),
            "data.test.0.path='no.csv': .*neither a local file",
        ),
    ],
)
def test_train_missing_path_names_field(recipe_of: Make, change: Any, message: str) -> None:
    raw = recipe_of()
    change(raw)
    with pytest.raises(FileNotFoundError, match=message):
        run(raw)


def test_train_base_without_config_raises(
    recipe_of: Make, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.path=.* has no config\.json"):
        run(recipe_of(model={"path": str(folder)}))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"adapter": {"target_pattern": "("}}, "adapter.target_pattern='\\('"),
        ({"adapters": [{"target_pattern": "("}]}, "adapters.0.target_pattern='\\('"),
        ({"frozen_modules": ["a", "("]}, "frozen_modules.1='\\('"),
        ({"quantize": {"target_pattern": "("}}, "quantize.target_pattern='\\('"),
    ],
)
def test_validate_regular_expression_names_field(
    recipe_of: Make, sections: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValueError, match=f"{field} is not a valid regular expression"):
        recipe.validate(recipe_of(**sections))
