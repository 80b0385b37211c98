"""The measured step of jlora: what it trains, and on which base, at a size for a CPU."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import jax
import pytest

import jlora
from benchmarks.h100 import common, step

TINY = common.SHAPES["tiny"]


def measured(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    output = folder / "row.json"
    words = ["step", "--tiny", "--steps", "2", "--repeats", "1", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", words)
    step.main()
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "jlora"),
        (("--method", "floor"), "floor"),
        (
            ("--quantize", "nf4", "--stacked", "--remat", "everything", "--length", "16"),
            "jlora, nf4, layers in a stack, remat=everything",
        ),
    ],
)
def test_a_row_says_what_was_measured(
    options: tuple[str, ...], name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = measured(tmp_path, monkeypatch, *options)
    assert row["method"] == name
    assert row["trained"] == (TINY.width if name == "floor" else TINY.lora_size())
    assert row["length"] == (16 if "--length" in options else 32)
    assert row["loss_after"] < row["loss_before"]
    assert row["details"]["kernels"] is False
    assert "python -m benchmarks.h100.step --tiny" in row["command"]


@pytest.mark.parametrize("stacked", [False, True])
def test_projections_alone_are_quantised(stacked: bool) -> None:
    model = step.decoder(TINY, stacked=stacked, remat="nothing")
    params = step.parameters(model, jlora.Int8(block_size=32))
    is_quantised = lambda leaf: isinstance(leaf, jlora.QArray)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantised)
    for path, leaf in leaves:
        names = jax.tree_util.keystr(path)
        assert is_quantised(leaf) == any(f"'{name}'" in names for name in TINY.projections), names
    wide = step.parameters(model, None)
    shapes = [leaf.shape for _, leaf in leaves]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(wide)]


def test_the_floor_is_that_of_a_model_without_an_adapter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        measured(tmp_path, monkeypatch, "--method", "floor", "--quantize", "nf4")
    assert "each layer with its own" in capsys.readouterr().err
