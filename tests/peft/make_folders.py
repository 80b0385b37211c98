"""Writes data/: adapters that PEFT saved, and what the model computes with each.

The base models are those of tests/models/data. Run it once where torch, transformers 5 and peft are
installed; the tests need none of them:

    python tests/peft/make_folders.py
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BASES = HERE.parent / "models" / "data" / "decoders"
DATA = HERE / "data"
ATTENTION = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Of each case: the base, PEFT's config, and its fields.
CASES: dict[str, tuple[str, type, dict[str, Any]]] = {
    "lora": ("llama", peft.LoraConfig, {"r": 3, "lora_alpha": 6, "target_modules": EVERY}),
    "lora_rs": (
        "qwen3",
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "lora_patterns": (
        "llama3",
        peft.LoraConfig,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": r".*\.(q_proj|up_proj|down_proj)",
            "rank_pattern": {"layers.1.self_attn.q_proj": 4, "up_proj": 3},
            "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 5},
        },
    ),
    "lora_some_layers": (
        "gemma3",
        peft.LoraConfig,
        {"r": 2, "target_modules": ATTENTION, "layers_to_transform": [0, 2]},
    ),
    "lora_biases": (
        "llama3",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    ),
    "lora_all_biases": (
        "qwen2",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "bias": "all"},
    ),
    "lora_saved": (
        "llama",
        peft.LoraConfig,
        {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "lora_head_and_table": (
        "llama",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    ),
    "lora_tokens": (
        "llama",
        peft.LoraConfig,
        {
            "r": 2,
            "target_modules": ATTENTION,
            "trainable_token_indices": {"embed_tokens": [3, 7, 40]},
        },
    ),
    "lora_experts": (
        "qwen3_moe",
        peft.LoraConfig,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "lora_down_experts": (
        "qwen3_moe",
        peft.LoraConfig,
        {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "lora_fused": (
        "phi3",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
    ),
    "dora": (
        "llama",
        peft.LoraConfig,
        {"r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    ),
    "vera": (
        "llama",
        peft.VeraConfig,
        {"r": 5, "target_modules": ["q_proj", "o_proj"], "d_initial": 0.3},
    ),
    "adalora": (
        "llama",
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "target_modules": ATTENTION, "total_step": 10},
    ),
    "loha": (
        "llama",
        peft.LoHaConfig,
        {"r": 2, "alpha": 3, "target_modules": EVERY, "rank_pattern": {"up_proj": 3}},
    ),
    "lokr": ("llama", peft.LoKrConfig, {"r": 2, "alpha": 3, "target_modules": EVERY}),
    "lokr_factor": (
        "llama",
        peft.LoKrConfig,
        {
            "r": 1,
            "alpha": 3,
            "target_modules": EVERY,
            "decompose_factor": 4,
            "decompose_both": True,
        },
    ),
    "hira": ("llama", peft.HiraConfig, {"r": 2, "target_modules": EVERY}),
    "ia3": (
        "llama",
        peft.IA3Config,
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "fourierft": (
        "llama",
        peft.FourierFTConfig,
        {"n_frequency": 9, "scaling": 20.0, "target_modules": ATTENTION},
    ),
    "vblora": (
        "llama",
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 7, "vector_length": 2, "target_modules": EVERY},
    ),
}


def moved(model: torch.nn.Module) -> None:
    """Every trained number off its start; vectors of gains stay near one."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 0.3 if "vector_bank" not in name else 1.0
            parameter.data = parameter.data + torch.randn_like(parameter) * size


def main() -> None:
    """Writes one folder per case."""
    warnings.simplefilter("ignore")
    shutil.rmtree(DATA, ignore_errors=True)
    for name, (base, config, fields) in CASES.items():
        folder = DATA / name
        model = transformers.AutoModelForCausalLM.from_pretrained(
            BASES / base,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        wrapped = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **fields))
        moved(wrapped)
        wrapped.eval()
        known = load_file(BASES / base / "expected.safetensors")
        with torch.no_grad():
            logits = wrapped(
                input_ids=known["input_ids"].long(), attention_mask=known["mask"].long()
            ).logits
        wrapped.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        written = json.loads((folder / "adapter_config.json").read_text())
        written["base_model_name_or_path"] = base  # And not a folder of this machine.
        text = json.dumps(written, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text)
        save_file({"logits": logits.float().contiguous()}, folder / "expected.safetensors")
        print(name, sum(file.stat().st_size for file in folder.iterdir()))
    versions = {
        "peft": peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (DATA / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
