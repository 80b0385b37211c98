"""The benchmark of several devices, at the size for a CPU."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.speed import _common, _tables, train

TINY = _common.SHAPES["tiny"]


def measured(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    output = folder / "row.json"
    words = ["train", "--tiny", "--steps", "1", "--repeats", "1", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", [*words, *options])
    train.main()
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One device in float32, with the batch of two devices."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("alone")
        return measured(folder, patch, "--float32", "--rows", "4", "--losses", "4")


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "tensor=2"])
@pytest.mark.slow
def test_meshes_have_losses_of_one_device(
    mesh: str, alone: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--mesh", mesh, "--float32", "--rows", "4", "--losses", "4")
    row = measured(tmp_path, monkeypatch, *options)
    assert alone["details"]["losses"][0] > alone["details"]["losses"][3]
    # Sums in another order, in float32.
    assert _tables.max_loss_difference(row, alone) < 1e-6
    assert (row["trained"], row["batch"], row["details"]["cards"]) == (TINY.lora_size(), 4, 2)
    kinds = {one["kind"] for one in row["details"]["collectives"]}
    # The gradient is summed up over rows, a product over its parts; weights in parts are gathered.
    assert "all-reduce" in kinds
    assert ("all-gather" in kinds) == (mesh == "fsdp=2")
    assert alone["details"]["collectives"] == []
    # Of the weights in parts a device holds half; of copies all.
    assert (row["planned_gib"] < 0.8 * alone["planned_gib"]) or mesh == "data=2"


@pytest.mark.parametrize(("first", "second"), [("data=1", "fsdp=2"), ("fsdp=2", "data=1")])
@pytest.mark.slow
def test_restored_from_other_mesh_continues(
    first: str, second: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--quantize=nf4", "--rows=2", "--losses=2", "--stacked", "--remat-policy=full"]
    row = measured(tmp_path, monkeypatch, "--mesh", second, "--restored-from", first, *options)
    restored = row["details"]["restored"]
    assert (restored["from"], restored["equal"]) == (train.parse_mesh(first), True)
    # It continues below the other mesh's last loss, and does not restart.
    losses = restored["losses_before"] + row["details"]["losses"]
    assert losses == sorted(losses, reverse=True)
    assert row["method"].endswith("nf4, layers in a stack, remat_policy=full")


@pytest.mark.slow
def test_benchmark_compiles_the_step_of_train(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = []

    class Lower(train.StepClock):
        def on_step_end(self, loop: Any, step: int, metrics: Any) -> None:
            super().on_step_end(loop, step, metrics)
            if step == 1:
                batch, key = loop.finished_step.batch.arrays, jax.random.key(4)
                step_args = (loop.state, loop.setup.frozen, batch, key)
                programs.append(loop.setup.train_step.lower(*step_args).as_text())

    lower = train.MeshRun.lower

    def kept(run: Any) -> Any:
        lowered = lower(run)
        programs.append(lowered.as_text())
        return lowered

    monkeypatch.setattr(train, "StepClock", Lower)
    monkeypatch.setattr(train.MeshRun, "lower", kept)
    options = ("--loop-steps=6", "--losses=1", "--quantize=nf4", "--stacked")
    details = measured(tmp_path, monkeypatch, *options)["details"]
    of_benchmark, of_train = programs
    assert of_benchmark == of_train
    assert details["loop"]["steps"] == 6
    assert details["loop"]["texts_per_row"] > 2


def test_useful_flops_of_tiny_shape() -> None:
    # Products of 3 tokens with every matrix: forward and once backward; the factors' twice.
    matrices = sum(np.prod(sides) for sides in TINY.projections.values()) * 2 + 64 * 512
    factors = TINY.lora_size()
    pairs = 2 * 4 * 16 * 3 / 2  # Layers, heads, their width, and half of all places.
    wanted = 3 * (2 * 2 * matrices + 3 * 2 * factors + 3 * 2 * 2 * pairs)
    assert train.useful_flops(TINY, 1, 3) == wanted


def row(cards: int, tokens_per_s: int, **more: Any) -> Any:
    details = {
        "cards": cards,
        "quantize": "none",
        "compute_dtype": "bfloat16",
        "stacked": False,
        "remat_policy": "none",
        "share_of_peak": 0.5,
        "collectives": [{"kind": "all-gather", "times": 7, "bytes": 2_500_000_000}][: cards - 1],
        "losses": [2.0, 1.0],
        **more,
    }
    fields = {"shape": "8b", "batch": 2 * cards, "length": 4096, "peak_gib": 20.0 / cards}
    return {"method": f"{cards} cards", "tokens_per_s": tokens_per_s, "details": details, **fields}


def test_efficiency_compares_equal_workloads() -> None:
    found = [row(1, 1000), row(2, 1900), row(2, 1900, quantize="nf4")]
    shares = [_tables.efficiency(one, found) for one in found]
    assert shares == [1.0, 0.95, None]
    (lines,) = _tables.multi_gpu_tables(found).values()
    assert lines[2] == "| 1 cards | 1 | 1,000 | 1.000 | 0.500 | 20.0 | none |"
    assert lines[3] == "| 2 cards | 2 | 1,900 | 0.950 | 0.500 | 10.0 | 2.50 (all-gather 7x) |"
    assert lines[4].split("|")[4].strip() == "-"


def test_max_loss_difference_other_batch_raises() -> None:
    one, two = ({**row(1, 1), "command": name, "batch": 4} for name in ("a", "b"))
    two["details"]["losses"] = [2.0, 1.001]
    assert _tables.max_loss_difference(two, one) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="'b' and 'a' have different batches or steps"):
        _tables.max_loss_difference({**two, "batch": 2}, one)


@pytest.mark.parametrize("text", ["fsdp", "rows=2", "fsdp=0", "fsdp=2,fsdp=2", ""])
def test_parse_mesh_invalid_raises(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a mesh. Use axes of"):
        train.parse_mesh(text)
    with pytest.raises(argparse.ArgumentTypeError, match="requires 16 devices, but there are 8"):
        train.parse_mesh("data=4,fsdp=4")


def test_parse_and_format_mesh() -> None:
    assert train.parse_mesh("fsdp=2,tensor=4") == {"data": 1, "fsdp": 2, "tensor": 4}
    assert train.format_mesh(train.parse_mesh("data=1")) == "one card"
    assert train.peak_flops("NVIDIA H200") == 989.4e12
    assert train.peak_flops("cpu") is None
