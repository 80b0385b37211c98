"""Writes data/encoders/: small random checkpoints and what transformers computes with them.

Run it once where torch and transformers 5 are installed; the tests need neither:

    python tests/models/make_encoder_data.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

DATA = Path(__file__).parent / "data" / "encoders"
VOCABULARY = 44
# Eight texts, the second one of two segments.
LENGTHS = (11, 7, 1, 9, 4, 10, 6, 3)
SEGMENT_STARTS = (11, 4, 1, 9, 4, 10, 6, 3)

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 17,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 18,
    "hidden_dim": 26,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 17,
}
VIT: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "Model", BERT),
    "bert_sequence": ("Bert", "ForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert_tokens": (
        "Bert",
        "ForTokenClassification",
        {**BERT, "num_labels": 5, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    ),
    "roberta": ("Roberta", "Model", ROBERTA),
    "roberta_sequence": ("Roberta", "ForSequenceClassification", {**ROBERTA, "num_labels": 3}),
    "roberta_tokens": ("Roberta", "ForTokenClassification", {**ROBERTA, "num_labels": 5}),
    "distilbert": ("DistilBert", "Model", DISTILBERT),
    # Two labels, of which config.json says nothing.
    "distilbert_sequence": (
        "DistilBert",
        "ForSequenceClassification",
        {**DISTILBERT, "activation": "relu"},
    ),
    "distilbert_tokens": ("DistilBert", "ForTokenClassification", {**DISTILBERT, "num_labels": 5}),
    "vit": (
        "ViT",
        "Model",
        {
            **VIT,
            "image_size": [8, 12],
            "patch_size": [4, 3],
            "pooler_output_size": 10,
            "pooler_act": "relu",
        },
    ),
    # The last row and column of the images belong to no patch.
    "vit_image": (
        "ViT",
        "ForImageClassification",
        {**VIT, "image_size": 10, "patch_size": 3, "qkv_bias": False, "num_labels": 4},
    ),
}


def model_of(name: str) -> torch.nn.Module:
    """The model with every weight moved off its trivial value and rounded to bfloat16."""
    stem, head, settings = CASES[name]
    config = getattr(transformers, f"{stem}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{stem}{head}")(config)
    torch.manual_seed(sum(map(ord, name)))
    for parameter in model.parameters():
        moved = torch.randn_like(parameter) * 0.25 + (parameter.data == 1)
        parameter.data = moved.to(torch.bfloat16).to(torch.float32)
    return model.eval()


def inputs(config: Any) -> dict[str, torch.Tensor]:
    """What the model is called with: images (4, 3, height, width), or texts (8, 11)."""
    torch.manual_seed(5)
    if config.model_type == "vit":
        size = config.image_size
        height, width = size if isinstance(size, list) else (size, size)
        images = torch.randn(4, config.num_channels, height, width)
        return {"pixel_values": images.to(torch.bfloat16).to(torch.float32)}
    position = torch.arange(max(LENGTHS))
    mask = torch.stack([position < length for length in LENGTHS]).long()
    ids = torch.randint(3, VOCABULARY, mask.shape)
    if config.model_type == "roberta":
        ids[0, 3] = config.pad_token_id  # Inside a text; no position is counted for it.
    ids = torch.where(mask == 1, ids, config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if config.model_type == "bert":
        types = torch.stack([position >= start for start in SEGMENT_STARTS]).long()
        batch["token_type_ids"] = types * mask
    return batch


def expected(model: Any) -> dict[str, torch.Tensor]:
    """What goes in, and what comes out in float32 and bfloat16; images with their channels last."""
    batch = inputs(model.config)
    with torch.no_grad():
        whole = model(**batch)
        halved = model.to(torch.bfloat16)(**batch)
        model.to(torch.float32)
    known = {name: value.int() for name, value in batch.items() if name != "pixel_values"}
    if "pixel_values" in batch:
        known["images"] = batch["pixel_values"].permute(0, 2, 3, 1)
    if "logits" in whole:
        return {**known, "output": whole.logits, "output_bfloat16": halved.logits.float()}
    if "pooler_output" in whole:
        known["pooled"] = whole.pooler_output
    hidden = halved.last_hidden_state.float()
    return {**known, "output": whole.last_hidden_state, "output_bfloat16": hidden}


def main(data: Path = DATA, names: Iterable[str] = tuple(CASES)) -> None:
    """Writes one folder per case."""
    shutil.rmtree(data, ignore_errors=True)
    for name in names:
        folder = data / name
        model = model_of(name)
        tensors = expected(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / "expected.safetensors",
        )
        print(name, sum(file.stat().st_size for file in folder.iterdir()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (data / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
