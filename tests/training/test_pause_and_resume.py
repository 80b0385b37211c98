"""Paused and resumed runs, and programs that runs of one process share."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import shutil
import types
from typing import Any

import jax
import pytest
from _support.training_fixtures import Make

from jlora.checkpoints.base_digest import BaseDigest
from jlora.training import recipe, report
from jlora.training.metrics import read_metrics
from jlora.training.program_cache import ProgramCache
from jlora.training.setup import MeshJitted, Setup
from jlora.training.sharding import make_mesh

# The package has a function of this name.
train_module = importlib.import_module("jlora.training.train")


def train(raw: dict[str, Any], **options: Any) -> train_module.TrainResult:
    return train_module.train(
        recipe.validate(raw), quiet=True, devices=jax.devices()[:1], **options
    )


def left_by(raw: dict[str, Any]) -> dict[str, Any]:
    """All outputs of a run without the times."""
    folder = pathlib.Path(raw["output"])
    lines = read_metrics(folder / "metrics.jsonl")
    last = lines[-1]["step"]
    adapter = hashlib.sha256((folder / "adapter.safetensors").read_bytes())
    facts = json.loads((folder / f"checkpoints/{last}/run_metadata/metadata").read_text())
    return {
        "lines": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "adapter": adapter.hexdigest(),
        "facts": facts,  # The SHA-256 of every array, the best evaluation, the data's position.
    }


@pytest.mark.slow
def test_train_paused_is_bit_exact(
    recipe_of: Make, chats: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_report", lambda *_, **__: None)  # Pictures, a second each.
    reads: list[Any] = []
    read = train_module.load_datasets
    monkeypatch.setattr(
        train_module, "load_datasets", lambda *args: reads.append(args) or read(*args)
    )
    # Evaluated after steps 3 and 6, and at the end, which is 7.
    raw = recipe_of(
        data={"validation": [{"path": str(chats), "format": "chat", "max_examples": 3}]},
        training={"steps": 7, "eval_steps": 3, "save_interval_minutes": None},
    )
    train(raw)
    # The data and steps are those of a run with another seed.
    shared = ProgramCache()
    other = {**raw, "seed": 1, "output": str(tmp_path / "other")}
    pause = train(other, pause_after_step=2, program_cache=shared)
    assert pause.output_paths == []
    names = {path.name for path in (tmp_path / "other").iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "recipe.yaml"}
    with pytest.raises(ValueError, match="pause_after_step=1 must be at least 2, the step of"):
        train(other, pause_after_step=1, resume=True, program_cache=shared)
    with pytest.raises(ValueError, match="pause_after_step=0 must be at least 1."):
        train(other, pause_after_step=0)

    paused = {**raw, "output": str(tmp_path / "paused")}
    # At 5 it is evaluated for the pause alone, after it was at 3; at 6 anyway, and once more.
    outcomes = [
        train(paused, pause_after_step=step, resume=step > 5, program_cache=shared)
        for step in (5, 6, 6, 9)
    ]
    assert [outcome.stop_reason for outcome in outcomes] == ["paused"] * 3 + ["max_steps"]
    assert [outcome.step for outcome in outcomes] == [5, 6, 6, 7]
    assert left_by(paused) == left_by(raw)

    # The metrics at a pause are those of an evaluation at that step.
    held = {
        line["step"]: line["eval/loss"] for line in left_by(raw)["lines"] if "eval/loss" in line
    }
    assert sorted(held) == [3, 6, 7]
    assert (
        outcomes[1].paused_eval_metrics["loss"]
        == outcomes[2].paused_eval_metrics["loss"]
        == held[6]
    )
    assert outcomes[0].paused_eval_metrics["loss"] not in held.values()
    assert outcomes[-1].paused_eval_metrics == {}

    # Nothing was read or compiled twice: once alone, once of each seed that shares.
    assert len(reads) == 3
    programs = [step for step, _ in shared._programs.values()]
    assert [step._fn._cache_size() for step in programs] == [1]


def test_get_datasets_by_content(
    recipe_of: Make, base: pathlib.Path, chats: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    data = tmp_path / "data.jsonl"
    template = tmp_path / "template.jinja"
    shutil.copy(chats, data)
    template.write_text("{{ messages }}")
    source = {"path": str(data), "format": "chat"}
    sections = {"train": [source], "chat_template": str(template)}
    given = recipe.validate(recipe_of(data=sections))
    mesh, cache, reads = make_mesh({}, jax.devices()[:1]), ProgramCache(), []

    def load() -> Any:
        stream = types.SimpleNamespace(fingerprint="one")
        reads.append(types.SimpleNamespace(train=stream, validation=None))
        return reads[-1]

    def get() -> Any:
        return cache.get_datasets(given, folder, mesh, load)

    assert get() is get()
    for file in (data, folder / "tokenizer_config.json", template):
        before = file.stat()
        file.write_bytes(file.read_bytes().replace(b"s", b"S"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # Same size and time.
        count = len(reads)
        assert get() is get() is reads[-1]
        assert len(reads) == count + 1


def fake(name: str) -> Setup:
    """A setup with steps and without arrays."""
    mesh = make_mesh({}, jax.devices()[:1])
    blank = Setup(*[None] * len(Setup._fields))  # type: ignore[arg-type]
    return blank._replace(
        mesh=mesh, train_step=MeshJitted(mesh, name), eval_step=MeshJitted(mesh, name)
    )


def test_reuse_programs_by_recipe(recipe_of: Make) -> None:
    shared = ProgramCache(max_programs=2)

    def step_of(name: str, *, steps: int = 6, **sections: Any) -> str:
        given = recipe.validate(recipe_of(**sections))
        return shared.reuse_programs(given, fake(name), steps, None).train_step._fn

    assert step_of("first") == "first"
    assert step_of("second") == "first"
    same = {"seed": 5, "output": "elsewhere", "report": {"tensorboard": True}}
    assert step_of("second", **same, export={"peft": True}) == "first"
    for number, sections in enumerate(
        [
            {"adapter": {"rank": 3}},
            {"adapter": {"alpha": 5.0}},
            {"adapter": {"target_pattern": "attention"}},
            {"optimizer": {"learning_rate": 0.5}},
            {"model": {"remat_policy": "full"}},
            {"batch": {"size": 4}},
            {"steps": 7},  # Learning rates depend on how many there are.
        ]
    ):
        assert step_of(f"{number}", **sections) == f"{number}"
        assert step_of("first again") == "first"
    # The values of config.json are constants of a program.
    config = {"rope_theta": 7.0}
    changed = fake("config")._replace(base_digest=BaseDigest(config, {}))
    given = recipe.validate(recipe_of())
    found = ProgramCache(max_programs=2)
    assert found.reuse_programs(given, fake("first"), 6, None).train_step._fn == "first"
    assert found.reuse_programs(given, changed, 6, None).train_step._fn == "config"
    # Two are held: the one that was not used for longest went.
    assert step_of("new", steps=7) == "6"
    assert step_of("new", adapter={"rank": 3}) == "new"
    with pytest.raises(ValueError, match="max_programs must be a positive integer, got 0"):
        ProgramCache(0)
