"""`jlora rank-search` on the command line, and resumed after kill -9."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from jlora import cli
from jlora.cli import rank_search
from jlora.rank_search.study import SearchOptions
from jlora.training.signals import TrainingInterrupted

# The package has a function of this name.
main = importlib.import_module("jlora.cli.main")

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = """
output: run
model: {path: base}
data:
  train: [{path: x.jsonl, format: chat}]
  validation: [{path: y.jsonl, format: chat}]
"""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> list[Any]:
    """Arguments of calls of the search, which is not run."""
    search = importlib.import_module("jlora.rank_search.search")

    monkeypatch.chdir(tmp_path)
    pathlib.Path("recipe.yaml").write_text(RECIPE)
    found: list[Any] = []
    monkeypatch.setattr(search, "search", lambda *args, **more: found.append((*args, more)))
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["rank-search", *arguments])
    return status, capsys.readouterr().err


def test_options_and_overrides_in_any_order(
    capsys: pytest.CaptureFixture[str], seen: list[Any]
) -> None:
    words = ["--adapter.alpha", "4.0", "--ranks", "1,4", "--seed", "7", "recipe.yaml"]
    words += [
        "--seeds",
        "5",
        "--lr-multipliers=0.5,3",
        "--output",
        "there",
        "--targets",
        "mlp, all",
    ]
    assert run(capsys, *words, "--steps", "9", "--timeout-minutes", "2", "--resume")[0] == 0
    ((given, asked, more),) = seen
    # --seed is a field of the recipe, not a short form of --seeds.
    assert (given.seed, given.output, given.adapter.alpha) == (7, "there", 4.0)
    assert asked == SearchOptions(
        ranks=(1, 4),
        seeds=5,
        lr_multipliers=(0.5, 3.0),
        targets=("mlp", "all"),
        steps=9,
        timeout_minutes=2.0,
    )
    assert more["resume"] is True
    assert more["command"] == (
        "jlora rank-search recipe.yaml --ranks 1,4 --seeds 5 --steps 9 --targets 'mlp, all' "
        "--lr-multipliers 0.5,3 --timeout-minutes 2.0 --adapter.alpha 4.0 --seed 7 --output there"
    )


def test_default_options_are_those_of_library(
    capsys: pytest.CaptureFixture[str], seen: list[Any]
) -> None:
    assert run(capsys, "recipe.yaml") == (0, "")
    ((_, asked, more),) = seen
    assert asked == SearchOptions()
    assert more == {"resume": False, "command": "jlora rank-search recipe.yaml"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "1,two"], "--ranks='1,two' must be numbers separated by commas"),
        (["--ranks", "1,2.5"], "--ranks='1,2.5' must be numbers"),
        (["--lr-multipliers", ""], "--lr-multipliers='' must be numbers"),
        (["--seeds", "1"], "seeds=1 must be 2 or more"),
        (["--adapter.rnak", "2"], "Unknown field 'adapter.rnak'"),
    ],
)
def test_invalid_option_prints_one_line(
    capsys: pytest.CaptureFixture[str], seen: list[Any], words: list[str], message: str
) -> None:
    status, error = run(capsys, "recipe.yaml", *words)
    assert (status, seen) == (1, [])
    assert message in error


def test_missing_package_prints_one_line(
    capsys: pytest.CaptureFixture[str], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = importlib.import_module("jlora.rank_search.search")

    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError('Run `pip install "jlora[search]"`.')

    monkeypatch.setattr(search, "search", missing)
    assert run(capsys, "recipe.yaml") == (1, 'error: Run `pip install "jlora[search]"`.\n')


def test_signal_prints_how_to_resume(
    capsys: pytest.CaptureFixture[str], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = importlib.import_module("jlora.rank_search.search")

    def ended(*_: Any, **__: Any) -> None:
        raise TrainingInterrupted("SIGTERM: step 3 of 8 is saved.", 143)

    monkeypatch.setattr(search, "search", ended)
    status, error = run(capsys, "recipe.yaml")
    assert status == 143
    assert error.endswith("Continue the search with --resume.\n")


@pytest.mark.parametrize("word", ["--seed", "--seed=3", "--output"])
def test_split_overrides_keeps_recipe_flags(word: str) -> None:
    own, overrides = main.split_overrides(rank_search.RankSearchOptions, ["recipe.yaml", word])
    assert (own, overrides) == (["recipe.yaml"], [word])
    assert main.split_overrides(rank_search.RankSearchOptions, ["--see", "3"]) == (
        ["--see", "3"],
        [],
    )


# --- kill -9 --------------------------------------------------------------------------------------


def jlora(*words: str) -> subprocess.Popen[str]:
    """Starts a process with quick compilation and no compilation cache but that of the search."""
    environment = {
        **{
            name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
        },
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from jlora.cli import main; sys.exit(main())", *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def scores(folder: pathlib.Path) -> dict[str, Any]:
    """Trials and choices of search.json, without times."""
    held = json.loads((folder / "search.json").read_text())
    trials = [(t["setting"], t["seed"], t["values"], t["stop_reason"]) for t in held["trials"]]
    return {"trials": trials, "chosen": [stage["chosen"] for stage in held["stages"]]}


@pytest.mark.slow
def test_killed_search_resumes_to_same_result(
    encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rows = [{"text": f"a {w} {verb}s", "label": verb} for w in ("cat", "dog") for verb in "ab"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "x.jsonl"), "format": "classification"}
    raw = {
        "output": str(tmp_path / "whole"),
        "model": {"path": str(encoder), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {"train": [source], "validation": [source], "max_seq_length": 16, "buckets": [16]},
        "batch": {"size": 2},
        # Frequent checkpoints: every kill interrupts a trial between them.
        "training": {"steps": 24, "save_steps": 3, "save_interval_minutes": None},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    options = "--ranks 1,2 --seeds 2 --targets all --lr-multipliers 1 --alpha-over-rank 2"
    words = ["rank-search", str(tmp_path / "recipe.yaml"), *options.split(), "--num-rungs", "2"]
    whole = jlora(*words)
    _, error = whole.communicate(timeout=900)
    assert whole.returncode == 0, error

    killed = tmp_path / "killed"
    kills = 0
    for attempt in range(40):
        child = jlora(*words, "--output", str(killed), *(["--resume"] if attempt else []))
        before = set(killed.glob("trials/*/checkpoints/*[0-9]"))
        deadline = time.monotonic() + 300
        # Wait until a trial has saved a new checkpoint.
        while child.poll() is None and time.monotonic() < deadline:
            saved = set(killed.glob("trials/*/checkpoints/*[0-9]"))
            if attempt < 3 and saved - before:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        _, error = child.communicate(timeout=300)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills == 3
    assert scores(killed) == scores(tmp_path / "whole")
    names = {"table.md", "quality.png", "best.yaml", "search.json", "trials", "cache"}
    assert {path.name for path in killed.iterdir()} == names
