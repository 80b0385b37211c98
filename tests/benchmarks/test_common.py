"""How the scripts for one H100 time a step, and what they refuse to write down."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.h100 import common, table

# One projection after the other: rank times inputs and outputs, for two layers.
TINY = 2 * 16 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 160) + (160 + 64))


def a_row(**changes: Any) -> common.Row:
    options = common.parser(None).parse_args(["--tiny"])
    timing = common.Timing(4.0, [3.0, 4.0, 5.0], 6.25, 6.125)._replace(**changes)
    return common.row(
        "none",
        options,
        timing,
        script="benchmarks.h100.none",
        libraries=("numpy",),
        peak_gib=None,
        trained=TINY,
    )


def test_steps_are_waited_for_only_at_the_end_of_a_repeat() -> None:
    seen = []

    def step() -> int:
        seen.append("step")
        return len(seen)

    timing = common.timed(step, lambda: seen.append("wait"), steps=4, repeats=2)
    chained = [*["step"] * 4, "wait"]
    assert seen == [*["step"] * common.WARM_UP, "wait", *chained, "wait", *chained]
    assert (timing.loss_before, timing.loss_after) == (1.0, len(seen) - 1)
    assert len(timing.repeats_ms) == 2


def test_the_time_is_that_of_one_step_and_the_median_of_the_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 8.0, 100.0, 104.0, 200.0, 206.0])  # seconds
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(now))
    timing = common.timed(lambda: 0.0, lambda: None, steps=4, repeats=3)
    assert timing.repeats_ms == [2000.0, 1000.0, 1500.0]
    assert timing.step_ms == 1500.0


def test_tokens_per_second_are_those_of_the_batch() -> None:
    assert a_row().tokens_per_s == 2 * 32 * 250


def test_the_size_of_lora_is_that_of_seven_projections() -> None:
    assert common.SHAPES["tiny"].lora_size() == TINY
    # As PEFT counts for Llama-3-8B at rank 16 on all linear layers.
    assert common.SHAPES["8b"].lora_size() == 41_943_040


def test_a_projection_without_an_adapter_is_refused() -> None:
    common.check_trained(TINY, common.SHAPES["tiny"])
    with pytest.raises(RuntimeError, match=r"trained=30,720 .* has 35,840\. Some projection"):
        common.check_trained(TINY - 2 * 16 * (160), common.SHAPES["tiny"])


@pytest.mark.parametrize("after", [6.25, float("nan")])
def test_a_step_that_does_not_train_is_refused_and_its_row_kept(
    after: float, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(RuntimeError, match="is not below loss_before"):
        common.finish(a_row(loss_after=after), tmp_path / "row.json")
    assert (tmp_path / "row.json").exists()


def test_a_row_is_written_as_json_and_printed_on_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common.finish(a_row(), tmp_path / "row.json")
    written = json.loads((tmp_path / "row.json").read_text())
    assert written["repeats_ms"] == [3.0, 4.0, 5.0]
    assert written["versions"]["python"] == sys.version.split()[0]
    assert "numpy" in written["versions"]
    assert capsys.readouterr().out.count("\n") == 1


def test_the_command_names_no_folder_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "row.json"
    words = ["peer", "--tiny", "--output", str(output), "--trace", str(tmp_path / "kernels.json")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("XLA_FLAGS", "--one --two")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert common.command("benchmarks.h100.peer") == (
        "XLA_PYTHON_CLIENT_MEM_FRACTION=.9 XLA_FLAGS='--one --two' python -m benchmarks.h100.peer "
        "--tiny --output row.json --trace kernels.json"
    )


def test_a_table_has_a_row_for_each_measurement_and_its_share_of_the_floor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for name, ms in (("slow", 8.0), ("floor", 4.0)):
        row = dataclasses.replace(a_row(), method=name, step_ms=ms, peak_gib=1.5)
        common.write(row, tmp_path / f"{name}.json")
    longer = dataclasses.replace(a_row(), length=64, planned_gib=2.25)
    common.write(longer, tmp_path / "longer.json")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert table.tables() == {
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


def test_the_shared_part_loads_no_library_that_is_measured() -> None:
    script = (
        "import sys, benchmarks.h100.common as common; "
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


@pytest.mark.parametrize("name", common.SHAPES)
def test_heads_fill_the_width_as_the_linen_decoder_has_them(name: str) -> None:
    shape = common.SHAPES[name]
    assert shape.heads * shape.head_dim == shape.width
    assert shape.heads % shape.kv_heads == 0
