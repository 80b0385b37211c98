"""Checkpoints that transformers 4.57 writes, with the config fields and tensor names of then."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from foreign_models import FOREIGN

from jlora import models

pytestmark = FOREIGN

VOCABULARY, LABELS, NEW_TOKENS = 44, 3, 7
LENGTHS = (9, 6)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]}
SLIDING = {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9, "num_hidden_layers": 3}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 500.0}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 6}),
    "qwen2": ("Qwen2", {"rope_theta": 100.0, "rope_scaling": YARN}),
    "qwen2_sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 6}),
    "gemma2": ("Gemma2", SLIDING),
    "gemma3": (
        "Gemma3Text",
        {
            **SLIDING,
            "sliding_window_pattern": 2,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": (
        "Phi3",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "original_max_position_embeddings": 8,
            "partial_rotary_factor": 0.5,
            "rope_theta": 100.0,
            "rope_scaling": LONGROPE,
            "sliding_window": 5,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
}

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 17,
    "num_labels": LABELS,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 18,
    "hidden_dim": 26,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 17,
    "num_labels": LABELS,
}
VIT: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 10,
    "patch_size": 3,
    "num_labels": LABELS,
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", BERT),
    "roberta": ("Roberta", "ForSequenceClassification", {**BERT, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", "ForSequenceClassification", DISTILBERT),
    "vit": ("ViT", "ForImageClassification", VIT),
}


class Saved(NamedTuple):
    """A model of transformers, the same one loaded by jlora, and the folder between them."""

    theirs: Any
    ours: models.LoadedModel
    folder: pathlib.Path


def saved(stem: str, head: str, config: dict[str, Any], size: float, folder: pathlib.Path) -> Saved:
    """Every weight is moved off its trivial value."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    made = getattr(transformers, f"{stem}Config")(**config)
    made._attn_implementation = "eager"  # It alone has soft caps.
    torch.manual_seed(7)
    theirs = getattr(transformers, stem.removesuffix("Text") + head)(made).eval()
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * size + (parameter.data == 1)
    theirs.save_pretrained(folder)
    return Saved(theirs, models.load(folder), folder)


@pytest.fixture(scope="module")
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    stem, over = DECODERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return saved(stem, "ForCausalLM", {**SMALL, **over}, 0.35, folder)


@pytest.fixture(scope="module")
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(*ENCODERS[request.param], 0.25, tmp_path_factory.mktemp(request.param))


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, each (2, 9), padded on the left."""
    mask = np.array([[0] * (LENGTHS[0] - n) + [1] * n for n in LENGTHS])
    return np.random.default_rng(5).integers(3, VOCABULARY, mask.shape) * mask, mask


def outputs(model: Any, **batch: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in batch.items()}).logits.numpy()


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_load_old_decoder_has_the_same_logits(decoder: Saved) -> None:
    # Without padding: before it, old releases rotate by other positions than generation does.
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (2, LENGTHS[0]))
    model, params = decoder.ours
    ours = jax.jit(model.apply)(params, ids)
    # Both round to float32, 1e-7 of logits up to 5, in each of some thirty products.
    np.testing.assert_allclose(ours, outputs(decoder.theirs, input_ids=ids), atol=2e-5, rtol=5e-6)


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_generate_old_decoder_has_the_same_tokens(decoder: Saved) -> None:
    import torch

    ids, mask = texts()
    theirs = []
    for row, is_token in zip(ids, mask, strict=True):
        # In a batch, transformers switches longrope for all texts by the longest, and with a cache
        # it keeps the keys of before the switch.
        prompt = torch.tensor(row[is_token > 0])[None]
        answer = decoder.theirs.generate(
            input_ids=prompt, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False
        )
        theirs.append(answer[0, prompt.shape[1] :].numpy())
    sampling = models.SamplingParams(eos_token_ids=models.eos_token_ids(decoder.folder))
    ours = models.generate(
        *decoder.ours, ids, mask, max_new_tokens=NEW_TOKENS, sampling=sampling
    ).tokens
    padded = [np.pad(answer, (0, NEW_TOKENS - len(answer))) for answer in theirs]
    np.testing.assert_array_equal(ours, padded)


@pytest.mark.parametrize("encoder", ENCODERS, indirect=True)
def test_load_old_encoder_has_the_same_logits(encoder: Saved) -> None:
    model, params = encoder.ours
    if encoder.theirs.config.model_type == "vit":
        images = np.random.default_rng(5).normal(size=(4, 10, 10, 3)).astype(np.float32)
        ours = jax.jit(model.apply)(params, images)
        theirs = outputs(encoder.theirs, pixel_values=images.transpose(0, 3, 1, 2))
    else:
        ids, mask = (one[:, ::-1].copy() for one in texts())  # Padded on the right.
        ids = np.where(mask, ids, encoder.theirs.config.pad_token_id)
        ours = jax.jit(model.apply)(params, ids, mask)
        theirs = outputs(encoder.theirs, input_ids=ids, attention_mask=mask)
    # Both round to float32, 2e-7 of outputs up to 4, in each of some thirty products.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("encoder", ENCODERS, indirect=True)
def test_load_encoder_config_with_defaults(encoder: Saved, tmp_path: pathlib.Path) -> None:
    assert_spelled_out_is_the_same(encoder, tmp_path)


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_load_decoder_config_with_defaults(decoder: Saved, tmp_path: pathlib.Path) -> None:
    assert_spelled_out_is_the_same(decoder, tmp_path)


def assert_spelled_out_is_the_same(one: Saved, folder: pathlib.Path) -> None:
    shutil.copytree(one.folder, folder, dirs_exist_ok=True)
    one.theirs.config.to_json_file(folder / "config.json", use_diff=False)
    assert models.load(folder).model == one.ours.model
