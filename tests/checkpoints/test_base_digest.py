"""Digests of a base: every weight and every field of config.json counts, the files do not."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from _support.training_fixtures import DATA

import jlora
from jlora import cli
from jlora.checkpoints.adapter_file import check_base_checkpoint, write_adapter
from jlora.checkpoints.base_digest import BaseDigest

CONFIG = {"hidden_size": 4, "rope_scaling": {"factor": 8.0}, "transformers_version": "5.0"}
Tensors = dict[str, np.ndarray]


def write(folder: pathlib.Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    names = {key: f"part-{n % shards}.safetensors" for n, key in enumerate(tensors)}
    for file in set(names.values()):
        part = {key: tensors[key] for key in tensors if names[key] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def tensors() -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {"head": (7, 4), "layers.0.up": (9, 200), "norm": (4,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_base_digest_ignores_the_files(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "one", CONFIG, tensors())
    write(tmp_path / "two", {**CONFIG, "transformers_version": "4.1"}, tensors(), shards=2)
    assert BaseDigest.from_folder(tmp_path / "one") == BaseDigest.from_folder(tmp_path / "two")


def change_one_entry(config: dict[str, Any], arrays: Tensors) -> None:
    arrays["layers.0.up"][5, 123] += 1e-3  # One of 1,800.


def change_dtype(config: dict[str, Any], arrays: Tensors) -> None:
    arrays["norm"] = arrays["norm"].view(np.int32)


def transpose(config: dict[str, Any], arrays: Tensors) -> None:
    arrays["head"] = arrays["head"].reshape(4, 7)


def remove(config: dict[str, Any], arrays: Tensors) -> None:
    del arrays["norm"]


def add(config: dict[str, Any], arrays: Tensors) -> None:
    arrays["bias"] = np.zeros(3, np.float32)


def change_nested_field(config: dict[str, Any], arrays: Tensors) -> None:
    config["rope_scaling"] = {"factor": 4.0}


def add_null_field(config: dict[str, Any], arrays: Tensors) -> None:
    config["sliding_window"] = None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_one_entry, r"the weight layers\.0\.up\)"),
        (change_dtype, "the weight norm"),
        (transpose, "the weight head"),
        (remove, "the weight norm"),
        (add, "the weight bias"),
        (change_nested_field, "config.json: rope_scaling"),
        (add_null_field, "config.json: sliding_window"),
    ],
)
def test_check_unchanged_names_the_change(
    tmp_path: pathlib.Path, change: Callable[[dict[str, Any], Tensors], None], name: str
) -> None:
    write(tmp_path, CONFIG, tensors())
    digest = BaseDigest.from_folder(tmp_path)
    digest.check_unchanged(tmp_path)
    config, arrays = dict(CONFIG), tensors()
    change(config, arrays)
    write(tmp_path, config, arrays)
    with pytest.raises(ValueError, match=name):
        digest.check_unchanged(tmp_path)


def test_export_of_other_base_raises(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The adapter of a run changes no norm, and is still not merged into a base with other norms.
    base = shutil.copytree(DATA / "decoders" / "llama", tmp_path / "base")
    path, out = tmp_path / "adapter.safetensors", tmp_path / "merged"
    write_adapter(path, {}, {}, base_digest=BaseDigest.from_folder(base))
    check_base_checkpoint(path, base)
    arrays = safetensors.numpy.load_file(base / "model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 2
    safetensors.numpy.save_file(arrays, base / "model.safetensors")
    for format_name in ("hf", "peft"):
        arguments = ["export", str(base), str(path), str(out), "--format", format_name]
        assert cli.main(arguments) == 1
        assert "has other weights than the base of its run" in capsys.readouterr().err
    assert not out.exists()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    shutil.copy(DATA / "decoders" / "llama" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(ValueError, match="has another config.json"):
        check_base_checkpoint(path, base)
    params = {"w": np.ones((3, 2), np.float32)}
    jlora.save_adapter(path, {}, params)  # Its base is not a folder.
    check_base_checkpoint(path, base)
