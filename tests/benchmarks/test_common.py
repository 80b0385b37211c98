"""Timing, checks, rows and tables of the speed benchmarks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.speed import _common, _tables

# One projection after the other: rank times inputs and outputs, for two layers.
TINY = 2 * 16 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 160) + (160 + 64))


def a_row(**changes: Any) -> _common.Row:
    options = _common.build_parser(None).parse_args(["--tiny"])
    timing = _common.Timing(4.0, [3.0, 4.0, 5.0], 6.25, 6.125)._replace(**changes)
    return _common.make_row(
        "none",
        options,
        timing,
        script="benchmarks.speed.none",
        libraries=("numpy",),
        peak_gib=None,
        trained=TINY,
    )


def test_time_steps_waits_at_end_of_repeat() -> None:
    seen = []

    def step() -> int:
        seen.append("step")
        return len(seen)

    timing = _common.time_steps(step, lambda: seen.append("wait"), steps=4, repeats=2)
    chained = [*["step"] * 4, "wait"]
    assert seen == [*["step"] * _common.WARM_UP, "wait", *chained, "wait", *chained]
    assert (timing.loss_before, timing.loss_after) == (1.0, len(seen) - 1)
    assert len(timing.repeats_ms) == 2


def test_time_steps_is_median_per_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 8.0, 100.0, 104.0, 200.0, 206.0])  # seconds
    monkeypatch.setattr(_common.time, "perf_counter", lambda: next(now))
    timing = _common.time_steps(lambda: 0.0, lambda: None, steps=4, repeats=3)
    assert timing.repeats_ms == [2000.0, 1000.0, 1500.0]
    assert timing.step_ms == 1500.0


def test_make_row_tokens_per_second() -> None:
    assert a_row().tokens_per_s == 2 * 32 * 250


def test_lora_size_of_seven_projections() -> None:
    assert _common.SHAPES["tiny"].lora_size() == TINY
    # As PEFT counts for Llama-3-8B at rank 16 on all linear layers.
    assert _common.SHAPES["8b"].lora_size() == 41_943_040


def test_check_trainable_size_mismatch_raises() -> None:
    _common.check_trainable_size(TINY, _common.SHAPES["tiny"])
    with pytest.raises(RuntimeError, match=r"trained=30,720 .* has 35,840\. Some projection"):
        _common.check_trainable_size(TINY - 2 * 16 * (160), _common.SHAPES["tiny"])


@pytest.mark.parametrize("after", [6.25, float("nan")])
def test_finish_without_progress_raises(after: float, tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="is not below loss_before"):
        _common.finish(a_row(loss_after=after), tmp_path / "row.json")
    assert (tmp_path / "row.json").exists()


def test_finish_writes_and_prints_row(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _common.finish(a_row(), tmp_path / "row.json")
    written = json.loads((tmp_path / "row.json").read_text())
    assert written["repeats_ms"] == [3.0, 4.0, 5.0]
    assert written["versions"]["python"] == sys.version.split()[0]
    assert "numpy" in written["versions"]
    assert capsys.readouterr().out.count("\n") == 1


def test_format_command_omits_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "row.json"
    words = ["peer", "--tiny", "--output", str(output), "--trace", str(tmp_path / "kernels.json")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("XLA_FLAGS", "--one --two")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert _common.format_command("benchmarks.speed.peer") == (
        "XLA_PYTHON_CLIENT_MEM_FRACTION=.9 XLA_FLAGS='--one --two' python -m benchmarks.speed.peer "
        "--tiny --output row.json --trace kernels.json"
    )


def test_h100_tables_have_ratio_to_floor(tmp_path: pathlib.Path) -> None:
    for name, ms in (("slow", 8.0), ("floor", 4.0)):
        row = dataclasses.replace(a_row(), method=name, step_ms=ms, peak_gib=1.5)
        _common.write_row(row, tmp_path / f"{name}.json")
    longer = dataclasses.replace(a_row(), length=64, planned_gib=2.25)
    _common.write_row(longer, tmp_path / "longer.json")
    assert _tables.h100_tables(tmp_path) == {
        ("tiny", 2, 32): [
            "| method | ms / step | / floor | tokens/s | peak GiB |",
            "|---|---|---|---|---|",
            "| floor | 4.0 | 1.00 | 16,000 | 1.5 |",
            "| slow | 8.0 | 2.00 | 16,000 | 1.5 |",
        ],
        ("tiny", 2, 64): [
            "| method | ms / step | / floor | tokens/s | peak GiB |",
            "|---|---|---|---|---|",
            "| none | 4.0 |  | 16,000 | 2.2 |",
        ],
    }


def test_common_imports_no_measured_library() -> None:
    script = (
        "import sys, benchmarks.speed._common as common; "
        "print([m for m in ('jax', 'torch', 'jlora', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", _common.SHAPES)
def test_shapes_heads_fill_width(name: str) -> None:
    shape = _common.SHAPES[name]
    assert shape.heads * shape.head_dim == shape.width
    assert shape.heads % shape.kv_heads == 0
