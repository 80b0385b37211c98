"""Writes data/: adapters that PEFT saved, and the outputs of the model with each.

The base models are those of tests/models/data. Run it once where torch, transformers 5 and peft are
installed; the tests need none of them:

    python tests/peft/make_folders.py
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
MODELS = HERE.parent / "models" / "data"
DATA = HERE / "data"
ATTENTION = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Classes of the bases that are not decoders.
CLASSES = {
    "encoders/bert": transformers.BertModel,
    "encoders/bert_sequence": transformers.BertForSequenceClassification,
    "encoders/roberta_tokens": transformers.RobertaForTokenClassification,
    "encoders/distilbert": transformers.DistilBertModel,
    "encoders/vit_image": transformers.ViTForImageClassification,
}
TASKS = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS"}

# The base, PEFT's config and its fields of each case.
CASES: dict[str, tuple[str, type, dict[str, Any]]] = {
    "lora": ("llama", peft.LoraConfig, {"r": 3, "lora_alpha": 6, "target_modules": EVERY}),
    "lora_rs": (
        "qwen3",
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear"},
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
    "bert": (
        "encoders/bert",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["query", "value", "word_embeddings"]},
    ),
    "bert_sequence": (
        "encoders/bert_sequence",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["query", "output.dense"], "bias": "all"},
    ),
    "roberta_tokens": (
        "encoders/roberta_tokens",
        peft.IA3Config,
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
    ),
    "distilbert": (
        "encoders/distilbert",
        peft.HiraConfig,
        {"r": 2, "target_modules": ["q_lin", "lin1"]},
    ),
    "vit": (
        "encoders/vit_image",
        peft.LoraConfig,
        {"r": 2, "target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
    ),
    "vit_dora": (
        "encoders/vit_image",
        peft.LoraConfig,
        {"r": 2, "use_dora": True, "target_modules": ["fc1", "projection"]},
    ),
    "vit_loha": (
        "encoders/vit_image",
        peft.LoHaConfig,
        {
            "r": 2,
            "alpha": 3,
            "target_modules": ["o_proj", "projection"],
            "use_effective_conv2d": True,
        },
    ),
    "vit_lokr": (
        "encoders/vit_image",
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "target_modules": ["fc2", "projection"]},
    ),
}


def base_of(name: str) -> Any:
    """The base, in float32."""
    cls = CLASSES.get(name, transformers.AutoModelForCausalLM)
    rest = {"add_pooling_layer": False} if cls is transformers.BertModel else {}
    if cls is transformers.AutoModelForCausalLM:
        rest = {"experts_implementation": "eager"}
    folder = MODELS / name
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **rest)


def task_of(name: str) -> str | None:
    """PEFT's task type for a base."""
    if name not in CLASSES:
        return "CAUSAL_LM"
    return TASKS.get(name.rpartition("_")[2])


def outputs(model: Any, name: str) -> torch.Tensor:
    """Logits, or hidden states, of the inputs that the base's own outputs are of."""
    known = load_file(MODELS / name / "expected.safetensors")
    if "phi3" in name:  # Each text alone: longrope looks at the longest of a batch.
        lengths = known["mask"].sum(-1)
        rows = [row[:n][None].long() for row, n in zip(known["input_ids"], lengths, strict=True)]
        outs = [model(input_ids=row)[0][0] for row in rows]
        return torch.nn.utils.rnn.pad_sequence(outs, batch_first=True)
    if name not in CLASSES:
        return model(input_ids=known["input_ids"].long(), attention_mask=known["mask"].long())[0]
    if "images" in known:
        return model(pixel_values=known["images"].permute(0, 3, 1, 2))[0]
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{n: known[n].long() for n in names if n in known})[0]


def moved(model: torch.nn.Module) -> None:
    """Adds noise to all trainable parameters; gains stay near one."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 0.3 if "vector_bank" not in name else 1.0
            parameter.data = parameter.data + torch.randn_like(parameter) * size


def main(data: Path = DATA, names: Iterable[str] = tuple(CASES)) -> None:
    """Writes one folder per case."""
    warnings.simplefilter("ignore")
    shutil.rmtree(data, ignore_errors=True)
    for name in names:
        base, config, fields = CASES[name]
        folder = data / name
        base = base if base in CLASSES else f"decoders/{base}"
        torch.manual_seed(sum(map(ord, name)))  # PEFT draws its factors.
        wrapped = peft.get_peft_model(base_of(base), config(task_type=task_of(base), **fields))
        moved(wrapped)
        wrapped.eval()
        with torch.no_grad():
            output = outputs(wrapped, base)
        wrapped.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        written = json.loads((folder / "adapter_config.json").read_text())
        written["base_model_name_or_path"] = base  # And not a folder of this machine.
        for field in ("target_modules", "feedforward_modules"):
            if isinstance(written.get(field), list):  # PEFT has sets, of no order.
                written[field] = sorted(written[field])
        text = json.dumps(written, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text)
        save_file({"output": output.float().contiguous()}, folder / "expected.safetensors")
        print(name, sum(file.stat().st_size for file in folder.iterdir()))
    versions = {
        "peft": peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (data / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
