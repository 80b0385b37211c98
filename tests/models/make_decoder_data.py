"""Writes data/decoders/: small random checkpoints and what transformers computes with them.

Run it once where torch and transformers 5 are installed; the tests need neither:

    python tests/models/make_decoder_data.py
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

DATA = Path(__file__).parent / "data" / "decoders"
VOCABULARY = 44
# Two texts of 9 and 6 tokens.
LENGTHS = (9, 6)
NEW_TOKENS = 7

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
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 6.0],
    "original_max_position_embeddings": 8,
}
PHI = {"hidden_size": 16, "num_attention_heads": 2, "original_max_position_embeddings": 8}
ALTERNATING = ["sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama3": (
        "Llama",
        {"rope_parameters": LLAMA3, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_linear": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 6}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN, "head_dim": 8}),
    "qwen2_sliding": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
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
    "qwen3_moe_some": (
        "Qwen3Moe",
        {
            "head_dim": 4,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "mlp_only_layers": [0],
        },
    ),
    "gemma": ("Gemma", {"head_dim": 6}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9, "num_hidden_layers": 3},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "num_hidden_layers": 3,
            "layer_types": [*ALTERNATING, "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            },
        },
    ),
    "phi3": ("Phi3", {**PHI, "rope_parameters": LONGROPE, "sliding_window": 5}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
}


def model_of(name: str) -> torch.nn.Module:
    """The model with every weight moved off its trivial value and rounded to bfloat16."""
    stem, over = CASES[name]
    config = getattr(transformers, f"{stem}Config")(**{**SMALL, **over})
    config._attn_implementation = "eager"  # It alone has soft caps.
    config._experts_implementation = "eager"  # The others need widths of 16 bytes.
    stem = stem.removesuffix("Text") if stem == "Gemma3Text" else stem
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    torch.manual_seed(sum(map(ord, name)))
    for parameter in model.parameters():
        moved = torch.randn_like(parameter) * 0.35 + (parameter.data == 1)
        parameter.data = moved.to(torch.bfloat16).to(torch.float32)
    return model.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each (2, 9), padded on the right."""
    torch.manual_seed(5)
    mask = torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS]).long()
    return torch.randint(3, VOCABULARY, mask.shape) * mask, mask


def padded(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    """One row per text, with zeros on the right."""
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, (0, 0) * (row.ndim - 1) + (0, length - len(row))) for row in rows])


def expected(model: Any) -> dict[str, torch.Tensor]:
    """Logits in float32 and bfloat16, and the tokens of greedy generation, of each text alone."""
    ids, mask = inputs()
    texts = [row[:length][None] for row, length in zip(ids, LENGTHS, strict=True)]
    with torch.no_grad():
        logits = [model(input_ids=text).logits[0].float() for text in texts]
        tokens = [
            model.generate(
                input_ids=text,
                attention_mask=torch.ones_like(text),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, text.shape[1] :]
            for text in texts
        ]
        model.to(torch.bfloat16)
        halved = [model(input_ids=text).logits[0].float() for text in texts]
        model.to(torch.float32)
    return {
        "input_ids": ids.int(),
        "mask": mask.int(),
        "logits": padded(logits, max(LENGTHS)),
        "logits_bfloat16": padded(halved, max(LENGTHS)),
        "tokens": padded(tokens, NEW_TOKENS).int(),
    }


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
