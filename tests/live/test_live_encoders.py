"""Encoders and ViT that jlora saves, and their adapters, loaded by transformers and PEFT.

These run where torch, transformers 5 and peft are installed: `make test-live`.
"""

from __future__ import annotations

import functools
import json
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

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

ENCODERS = pathlib.Path(__file__).parent.parent / "models" / "data" / "encoders"
NAMES = sorted(folder.name for folder in ENCODERS.iterdir() if folder.is_dir())
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "images")
EVERY = r"layer_\d+/.*/kernel$"
TASKS = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS"}
# float32 through two adapted layers, twice; outputs below 20, whose spacing is 2e-6.
CLOSE = {"atol": 2e-5, "rtol": 5e-6}


def batch(name: str) -> dict[str, np.ndarray]:
    tensors = load_file(ENCODERS / name / "expected.safetensors")
    return {key: tensors[key] for key in INPUTS if key in tensors}


def theirs(folder: pathlib.Path) -> Any:
    """The model of the class in config.json; no weight may be newly initialized."""
    config = json.loads((folder / "config.json").read_text())
    model, report = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def outputs(model: Any, name: str) -> np.ndarray:
    """Hidden states or logits; those of padding are zero."""
    given = batch(name)
    if "images" in given:
        named = {"pixel_values": torch.tensor(given["images"]).permute(0, 3, 1, 2)}
    else:
        named = {key: torch.tensor(value).long() for key, value in given.items()}
    with torch.no_grad():
        return seen(model(**named)[0].numpy(), name)


def seen(output: np.ndarray, name: str) -> np.ndarray:
    mask = batch(name).get("attention_mask")
    return output if mask is None or output.ndim < 3 else output * (mask > 0)[..., None]


@functools.cache
def base(name: str) -> models.LoadedModel:
    return models.load(ENCODERS / name, dtype=jnp.float32)


def moved(adapter: Any) -> Any:
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def adapted(name: str, rules: Any) -> tuple[Any, np.ndarray]:
    """An adapter off its start, and what the model computes with it."""
    model, params = base(name)
    given = tuple(batch(name).values())
    lora = jlora.lora_transform(model.apply, rules)
    adapter = moved(lora.init(jax.random.key(0), params, *given))
    return adapter, seen(np.asarray(jax.jit(lora.apply)(params, adapter, *given)), name)


@pytest.mark.parametrize("name", NAMES)
def test_save_merged_encoder_in_transformers(name: str, tmp_path: pathlib.Path) -> None:
    adapter, ours = adapted(name, {EVERY: jlora.LoRA(rank=2, alpha=4)})
    merged = jlora.merge(base(name).params, adapter)
    models.save(tmp_path / "out", merged, ENCODERS / name, dtype=jnp.float32, max_shard_size=4000)
    plain = outputs(theirs(ENCODERS / name), name)
    assert np.abs(ours - plain).max() > 0.1  # The adapter does something.
    np.testing.assert_allclose(outputs(theirs(tmp_path / "out"), name), ours, **CLOSE)


LORA = jlora.LoRA(rank=3, alpha=5)
WINDOW = "patch/kernel"
CASES: dict[str, tuple[str, Any]] = {
    "bert_lora": ("bert", {EVERY: LORA}),
    "bert_lora_embedding": ("bert", {"word/embedding|query/kernel": LORA}),
    "bert_bitfit": ("bert_sequence", {EVERY: LORA, "bias": jlora.BitFit()}),
    "bert_classifier": ("bert_sequence", {EVERY: LORA, "classifier": jlora.FullDelta()}),
    "bert_tokens_dora": ("bert_tokens", {EVERY: jlora.DoRA(rank=3, alpha=5)}),
    "roberta_lora": ("roberta", {EVERY: LORA}),
    "roberta_hira": ("roberta_tokens", {EVERY: jlora.HiRA(rank=2)}),
    "roberta_classifier": ("roberta_tokens", {EVERY: LORA, "classifier": jlora.FullDelta()}),
    "distilbert_lora": ("distilbert_sequence", {EVERY: LORA}),
    "distilbert_bitfit": ("distilbert", {EVERY: LORA, "bias": jlora.BitFit()}),
    "distilbert_classifier": (
        "distilbert_sequence",
        {EVERY: LORA, "classifier": jlora.FullDelta()},
    ),
    "distilbert_loha": ("distilbert_tokens", {EVERY: jlora.LoHa(rank=2, alpha=5)}),
    "distilbert_lokr": ("distilbert", {EVERY: jlora.LoKr(rank=1, alpha=5, factor=3)}),
    "vit_lora": ("vit", {f"{EVERY}|{WINDOW}": LORA}),
    "vit_image_lora": ("vit_image", {f"{EVERY}|{WINDOW}": LORA}),
    "vit_dora": ("vit_image", {f"mlp/up/kernel|{WINDOW}": jlora.DoRA(rank=3, alpha=5)}),
    "vit_loha": ("vit_image", {f"{EVERY}|{WINDOW}": jlora.LoHa(rank=2, alpha=5)}),
    "vit_loha_tucker": (
        "vit_image",
        {f"{EVERY}|{WINDOW}": jlora.LoHa(rank=2, alpha=5, tucker=True)},
    ),
    "vit_lokr": ("vit_image", {f"{EVERY}|{WINDOW}": jlora.LoKr(rank=1, alpha=5, factor=3)}),
    "vit_hira": ("vit_image", {EVERY: jlora.HiRA(rank=2)}),
    "vit_hira_window": ("vit_image", {f"query/kernel|{WINDOW}": jlora.HiRA(rank=2)}),
    "vit_bitfit": ("vit_image", {EVERY: LORA, "bias": jlora.BitFit()}),
    "vit_classifier": ("vit_image", {EVERY: LORA, "classifier": jlora.FullDelta()}),
}


@pytest.mark.parametrize("case", CASES)
def test_save_encoder_adapter_in_peft(case: str, tmp_path: pathlib.Path) -> None:
    name, rules = CASES[case]
    adapter, ours = adapted(name, rules)
    task = TASKS.get(name.rpartition("_")[2])
    peft.save(tmp_path / "out", adapter, *base(name), task_type=task)
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(ENCODERS / name), tmp_path / "out")
    np.testing.assert_allclose(outputs(wrapped.eval(), name), ours, **CLOSE)


LORA_CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert_sequence", {"target_modules": ["query"]}),
    ("bert_sequence", {"target_modules": "all-linear"}),
    ("bert_sequence", {"target_modules": ["query"], "bias": "all"}),
    ("bert_sequence", {"target_modules": ["query"], "lora_bias": True, "use_rslora": True}),
    ("bert", {"target_modules": ["query", "dense"]}),
    ("roberta", {"target_modules": "all-linear"}),
    ("bert_tokens", {"target_modules": ["query", "dense"]}),
    ("roberta_sequence", {"target_modules": ["query", "dense"]}),
    ("roberta_sequence", {"target_modules": "all-linear"}),
    ("roberta_sequence", {"target_modules": ["query"], "bias": "lora_only"}),
    ("roberta_tokens", {"target_modules": ["key"], "modules_to_save": ["LayerNorm"]}),
    ("distilbert_sequence", {"target_modules": ["q_lin", "lin1"]}),
    ("bert", {"target_modules": ["word_embeddings", "position_embeddings"]}),
    ("bert", {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [3, 5]}}),
    ("vit_image", {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]}),
    ("vit_image", {"target_modules": "all-linear"}),
]


@pytest.mark.parametrize(("name", "fields"), LORA_CASES, ids=str)
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_load_encoder_folder_of_peft(
    name: str, fields: Any, is_old: bool, tmp_path: pathlib.Path
) -> None:
    task = TASKS.get(name.rpartition("_")[2])
    config = hf_peft.LoraConfig(r=2, lora_alpha=3, task_type=task, **fields)
    wrapped = hf_peft.get_peft_model(theirs(ENCODERS / name), config)
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    expected = outputs(wrapped.eval(), name)
    wrapped.save_pretrained(tmp_path / "out")
    if is_old:  # Before peft 0.11 the head was not in the config.
        path = tmp_path / "out" / "adapter_config.json"
        written = json.loads(path.read_text())
        path.write_text(json.dumps({**written, "modules_to_save": fields.get("modules_to_save")}))
    model, params = base(name)
    loaded = peft.load(tmp_path / "out", model, params)
    merged = jlora.merge(loaded.params, loaded.adapter)
    ours = seen(np.asarray(model.apply(merged, *batch(name).values())), name)
    np.testing.assert_allclose(ours, expected, **CLOSE)
