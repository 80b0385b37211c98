"""docs/callbacks.md: its recipe is valid, its code runs, and its table has every method."""

from __future__ import annotations

import inspect
import pathlib
import re
import sys
import types
from typing import Any

import jax
import pytest
import yaml
from _support.training_fixtures import Make
from _support.training_loops import looped

from jlora.training import Callback, Recipe, recipe, train

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()


class FakeMlflow(types.ModuleType):
    """The functions of mlflow that the page calls."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[str] = []
        self.logged: dict[int, dict[str, float]] = {}

    def set_experiment(self, name: str) -> None:
        self.calls.append(name)

    def start_run(self, run_id: str | None) -> Any:
        self.calls.append(f"start {run_id}")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="17"))

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        Recipe.model_validate(values)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.setdefault(step, {}).update(metrics)

    def end_run(self) -> None:
        self.calls.append("end")


def test_page_recipe_is_valid() -> None:
    (section,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    source = {"path": "chats.jsonl", "format": "chat"}
    raw = {"output": "run", "model": {"path": "base"}, "data": {"train": [source]}}
    found = recipe.validate({**raw, **yaml.safe_load(section)}).report.wandb
    assert found is not None
    assert found.project == "my-project"


def test_page_table_has_every_method() -> None:
    methods = [name for name, _ in inspect.getmembers(Callback, inspect.isfunction)]
    rows = re.findall(r"^\| `(\w+)\((.*)\)` \|", PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(methods)
    for name, parameters in rows:
        signature = inspect.signature(getattr(Callback, name))
        assert ["self", *filter(None, parameters.split(", "))] == [*signature.parameters], name


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_page_code_prints_its_output(
    recipe_of: Make,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trains: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    raw = recipe_of(optimizer={"learning_rate": 0.1}, training={"steps": 8})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    logger, target = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (output,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)

    def run(chosen: Recipe, callbacks: list[Callback]) -> Any:
        if trains:
            return train(chosen, callbacks=callbacks, quiet=True, devices=jax.devices()[:1])
        # Losses of 9, 8, ...
        return looped(*callbacks, recipe=chosen, steps=8, losses=range(9, 0, -1))

    monkeypatch.setattr("jlora.training.train", run)
    namespace: dict[str, Any] = {"__name__": "page"}
    for code in (logger, target):
        exec(compile(code, "docs/callbacks.md", "exec"), namespace)
    assert capsys.readouterr().out == output
    assert mlflow.calls == ["animals", "start None", "end"]
    assert (tmp_path / "run" / "mlflow_run_id.txt").read_text() == "17"
    steps = sorted(mlflow.logged)
    assert steps == list(range(1, len(steps) + 1))
    losses = [mlflow.logged[step]["train/loss"] for step in steps]
    assert losses[-2] <= 4.0 < min(losses[:-2])
