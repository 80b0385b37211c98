"""Bounds on the files that a reader has to follow. Those of calls and of a step only decrease."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from benchmarks.code import files_entered


def test_transform_calls_enter_few_files() -> None:
    recorders = files_entered.record_transform()
    counts = {name: len(recorder.files) for name, recorder in recorders.items()}
    bounds = {"apply": 12, "explain": 19, "merge": 8, "init": 16}
    assert all(0 < counts[name] <= bounds[name] for name in bounds), counts
    assert {"transform.py", "adapters/lora.py", "interpreter/dot_products.py"} <= {
        *recorders["apply"].files
    }


def test_import_enters_no_file() -> None:
    path = files_entered.PACKAGE / "rank_search" / "selection.py"
    recorder = files_entered.FileRecorder()
    names = {"__name__": "copy"}
    with recorder.record():
        exec(compile(path.read_text(), path, "exec"), names)
    assert recorder.files == []
    with recorder.record():
        names["rung_steps"](8, 2)  # type: ignore[operator]
    assert recorder.functions == {
        "rank_search/selection.py": ["rung_steps", "rung_steps.<locals>.<listcomp>"]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "first", "bound"),
    # The run's bound was 63 before outputs were locked, bases hashed and recipes checked first.
    [(None, "training/train.py", 71), (files_entered.LOOP_FUNCTION, "training/loop.py", 28)],
    ids=["run", "step"],
)
def test_training_enters_few_files(
    tmp_path: pathlib.Path, start: str | None, first: str, bound: int
) -> None:
    recorder = files_entered.record_training(tmp_path, start)
    assert len(recorder.files) <= bound, recorder.files
    assert recorder.files[0] == first
    assert {"training/train_step.py", "training/data/prefetch.py"} <= {*recorder.files}


@pytest.mark.slow
def test_files_entered_writes_json(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "files.json"
    monkeypatch.setattr(sys, "argv", ["files_entered", "--json", str(output)])
    files_entered.main()
    functions = json.loads(output.read_text())
    assert f"| apply | {len(functions['apply'])} |" in capsys.readouterr().out
