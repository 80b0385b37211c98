"""Checkpoints that tie the head to the embedding: loaded and saved as transformers does.

tests/live compares the outputs with those of transformers.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from jlora import models

DECODERS = pathlib.Path(__file__).parent / "data" / "decoders"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, np.ndarray]


def checkpoint(folder: pathlib.Path, change: Callable[[Tensors], None]) -> Tensors:
    """A copy of a tied checkpoint with changed tensors, which are returned."""
    shutil.copytree(DECODERS / "llama_linear", folder)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def read(folder: pathlib.Path) -> Tensors:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def put_other_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[TABLE][::-1].copy()


def test_load_head_that_differs_is_used(tmp_path: pathlib.Path) -> None:
    tensors = checkpoint(tmp_path / "base", put_other_head)
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight"):
        model, params = models.load(tmp_path / "base")
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(params["params"]["head"], tensors[HEAD].T)
    np.testing.assert_array_equal(params["params"]["embed"]["embedding"], tensors[TABLE])
    with pytest.warns(UserWarning, match="differs"):
        assert models.model_from_config(tmp_path / "base") == model


def test_save_head_that_differs_is_kept(tmp_path: pathlib.Path) -> None:
    tensors = checkpoint(tmp_path / "base", put_other_head)
    with pytest.warns(UserWarning, match="differs"):
        params = models.load(tmp_path / "base").params
    with pytest.warns(UserWarning, match="differs"):
        models.save(tmp_path / "out", params, tmp_path / "base")
    written = read(tmp_path / "out")
    assert set(written) == set(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, key)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False  # Other readers drop a tied head.


def test_load_equal_head_stays_tied(tmp_path: pathlib.Path) -> None:
    checkpoint(tmp_path / "base", lambda t: t.update({HEAD: t[TABLE].copy()}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, params = models.load(tmp_path / "base")
    assert model.config.tie_word_embeddings
    assert "head" not in params["params"]


def test_load_tied_head_of_other_shape_raises(tmp_path: pathlib.Path) -> None:
    checkpoint(tmp_path / "base", lambda t: t.update({HEAD: np.ones((46, 12), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(46, 12\) instead of the"):
        models.load(tmp_path / "base")


def test_load_untied_copies_embedding(tmp_path: pathlib.Path) -> None:
    folder = DECODERS / "llama_linear"
    model, params = models.load(folder, tie_word_embeddings=False)
    table = read(folder)[TABLE]
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(params["params"]["head"], table.T)
    moved = {**params, "params": {**params["params"], "head": params["params"]["head"] * 2}}
    models.save(tmp_path / "out", moved, folder, tie_word_embeddings=False)
    written = read(tmp_path / "out")
    np.testing.assert_array_equal(written[HEAD], 2 * table)
    np.testing.assert_array_equal(written[TABLE], table)
    again = models.load(tmp_path / "out")
    np.testing.assert_array_equal(again.params["params"]["head"], 2 * table.T)


def test_load_tied_on_untied_raises() -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings=True must be False"):
        models.load(DECODERS / "llama", tie_word_embeddings=True)


def test_load_tied_table_stored_as_head(tmp_path: pathlib.Path) -> None:
    tensors = checkpoint(tmp_path / "base", lambda t: t.update({HEAD: t.pop(TABLE)}))
    params = models.load(tmp_path / "base").params
    np.testing.assert_array_equal(params["params"]["embed"]["embedding"], tensors[HEAD])
    models.save(tmp_path / "out", params, tmp_path / "base")
    np.testing.assert_array_equal(read(tmp_path / "out")[TABLE], tensors[HEAD])
