"""The benchmark of the training step, at the size for a CPU."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import jax
import pytest

import jlora
from benchmarks.speed import _common, train_step

TINY = _common.SHAPES["tiny"]


def measured(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    output = folder / "row.json"
    words = ["step", "--tiny", "--steps", "2", "--repeats", "1", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", words)
    train_step.main()
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "jlora"),
        (("--method", "floor"), "floor"),
        (
            ("--quantize", "nf4", "--stacked", "--remat-policy", "full", "--length", "16"),
            "jlora, nf4, layers in a stack, remat_policy=full",
        ),
    ],
)
@pytest.mark.slow
def test_row_of_every_method(
    options: tuple[str, ...], name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = measured(tmp_path, monkeypatch, *options)
    assert row["method"] == name
    assert row["trained"] == (TINY.width if name == "floor" else TINY.lora_size())
    assert row["length"] == (16 if "--length" in options else 32)
    assert row["loss_after"] < row["loss_before"]
    assert row["details"]["kernels"] is False
    assert "python -m benchmarks.speed.train_step --tiny" in row["command"]


@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_only_projections_quantized(stacked: bool) -> None:
    model = train_step.decoder(TINY, stacked=stacked, remat_policy="none")
    params = train_step.parameters(model, jlora.Int8(block_size=32))
    is_quantised = lambda leaf: isinstance(leaf, jlora.QArray)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantised)
    for path, leaf in leaves:
        names = jax.tree_util.keystr(path)
        assert is_quantised(leaf) == any(f"'{name}'" in names for name in TINY.projections), names
    wide = train_step.parameters(model, None)
    shapes = [leaf.shape for _, leaf in leaves]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(wide)]


def test_floor_of_quantized_base_raises(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        measured(tmp_path, monkeypatch, "--method", "floor", "--quantize", "nf4")
    assert "requires separate layers" in capsys.readouterr().err
