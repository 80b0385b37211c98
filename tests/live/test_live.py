"""Checkpoints and adapters that jlora saves, loaded by transformers and PEFT.

These run where torch, transformers 5 and peft are installed: `make test-live`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
hf_peft = pytest.importorskip("peft")

import jlora  # noqa: E402
from jlora import models, peft  # noqa: E402
from jlora.models.hf.config_reader import ConfigReader  # noqa: E402
from jlora.models.hf.decoder_configs import DECODER_PARSERS, decoder_config  # noqa: E402
from jlora.models.hf.encoder_configs import encoder_config, vit_config  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

DECODERS = pathlib.Path(__file__).parent.parent / "models" / "data" / "decoders"
NAMES = sorted(folder.name for folder in DECODERS.iterdir() if folder.is_dir())
EVERY = r"(q|k|v|o|qkv|gate|up|gate_up|down)(/kernel)?$"
# float32 through three adapted layers, twice; logits below 20.
CLOSE = {"atol": 5e-5, "rtol": 5e-6}


def theirs(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.float().numpy()


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 44, (2, 8))


def adapted(name: str, rules: Any, scan_layers: bool = False) -> tuple[Any, Any, Any, np.ndarray]:
    model, params = models.load(DECODERS / name, dtype=jnp.float32, scan_layers=scan_layers)
    lora = jlora.lora_transform(model.apply, rules)
    fresh = lora.init(jax.random.key(0), params, jnp.asarray(tokens()))
    leaves, treedef = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    adapter = jax.tree.unflatten(treedef, noisy)
    return model, params, adapter, np.asarray(jax.jit(lora.apply)(params, adapter, tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_save_merged_decoder_in_transformers(name: str, tmp_path: pathlib.Path) -> None:
    scan_layers = name != "qwen3_moe_some"
    rules = {EVERY: jlora.LoRA(rank=2, alpha=4)}
    _, params, adapter, ours = adapted(name, rules, scan_layers)
    merged = jlora.merge(params, adapter)
    models.save(
        tmp_path / "out",
        merged,
        DECODERS / name,
        dtype=jnp.float32,
        scan_layers=scan_layers,
        max_shard_size=4000,
    )
    np.testing.assert_allclose(logits(theirs(tmp_path / "out"), tokens()), ours, **CLOSE)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("llama", {EVERY: jlora.LoRA(rank=3, alpha=5)}),
        ("llama", {"embedding|head|/q": jlora.LoRA(rank=3, alpha=5, use_rslora=True)}),
        ("llama", {EVERY: jlora.DoRA(rank=3, alpha=5), "embedding": jlora.DoRA(rank=2, alpha=3)}),
        ("llama3", {EVERY: jlora.LoRA(rank=3, alpha=5), "bias": jlora.BitFit()}),
        ("llama", {EVERY: jlora.LoRA(rank=3, alpha=5), "head|^params/norm": jlora.FullDelta()}),
        (
            "llama",
            {
                EVERY: jlora.LoRA(rank=3, alpha=5),
                "embedding": jlora.TrainableTokens(token_indices=(3, 40)),
            },
        ),
        ("qwen3_moe", {EVERY: jlora.LoRA(rank=2, alpha=5)}),
        ("qwen3_moe", {r"moe/gate_up$|/q/": jlora.LoRA(rank=2, alpha=5)}),
        ("phi3", {EVERY: jlora.LoRA(rank=2, alpha=5)}),
        ("gemma3", {EVERY: jlora.LoRAFA(rank=2, alpha=5)}),
        ("llama", {EVERY: jlora.AdaLoRA(rank=2, alpha=5)}),
        ("llama", {EVERY: jlora.LoHa(rank=2, alpha=5)}),
        ("llama", {EVERY: jlora.LoKr(rank=1, alpha=5, factor=3)}),
        ("llama", {EVERY: jlora.LoKr(rank=1, alpha=5, decompose_both=True)}),
        ("llama", {EVERY: jlora.HiRA(rank=2)}),
        ("llama", {r"/(k|v)/kernel": jlora.IA3(), "down": jlora.IA3(apply_to="inputs")}),
        ("llama", {EVERY: jlora.VeRA(rank=5)}),
        ("llama", {EVERY: jlora.VBLoRA(rank=2, num_vectors=5, vector_length=2)}),
        ("llama", {EVERY: jlora.FourierFT(num_frequencies=7, alpha=20, seed=5)}),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "-".join(type(config).__name__ for config in value.values())
    ),
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_save_decoder_adapter_in_peft(
    name: str, rules: Any, scan_layers: bool, tmp_path: pathlib.Path
) -> None:
    model, params, adapter, ours = adapted(name, rules, scan_layers)
    peft.save(tmp_path / "out", adapter, model, params, task_type="CAUSAL_LM")
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(DECODERS / name), tmp_path / "out")
    np.testing.assert_allclose(logits(wrapped.eval(), tokens()), ours, **CLOSE)


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "smollm3",
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "vit",
    ],
)
def test_config_every_field_is_read(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of the class of transformers is parsed, without effect, or of one value."""
    config = transformers.AutoConfig.for_model(model_type)
    known = {*config.to_dict(), *config.attribute_map}
    readers: list[ConfigReader] = []
    monkeypatch.setattr(ConfigReader, "warn_unread_fields", lambda self: readers.append(self))
    fields = {**config.to_dict(), "architectures": None}
    if model_type in DECODER_PARSERS:
        decoder_config(fields)
    else:
        (vit_config if model_type == "vit" else encoder_config)(fields)
    assert known - readers[0].fields_read == set()
