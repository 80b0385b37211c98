"""Converts PEFT adapters to the subset of the format that vLLM can load.

vLLM reads one rank and one scale for all modules, and the experts of a mixture as separate modules.
It does not support magnitudes, biases and fully trained modules.
"""

from __future__ import annotations

import numpy as np

from jlora.checkpoints.safetensors_io import format_names
from jlora.peft.modules_to_save import PeftModule
from jlora.peft.save import PeftAdapter

_FACTOR_PAIRS = {
    "lora_A.weight": "lora_B.weight",
    "lora_embedding_A": "lora_embedding_B",
}

_MERGE_HINT = "Merge the adapter and serve the merged checkpoint, or convert it with jlora.to_lora."


def convert_to_vllm(peft_adapter: PeftAdapter) -> PeftAdapter:
    """Converts an adapter to an equivalent one that vLLM can load.

    Raises:
        ValueError: vLLM does not support a part of the adapter.
    """
    if peft_adapter.peft_type != "LORA":
        raise ValueError(
            f"vLLM supports only LoRA, and the peft_type of this adapter is "
            f"{peft_adapter.peft_type}. {_MERGE_HINT}"
        )
    if any(module.fields["use_dora"] for module in peft_adapter.modules):
        raise ValueError(f"vLLM does not support DoRA. {_MERGE_HINT}")
    if peft_adapter.extra_tensors:
        raise ValueError(
            f"vLLM supports only LoRA factors, and this adapter also has "
            f"{format_names(sorted(peft_adapter.extra_tensors))}. Merge it and serve the merged "
            f"checkpoint."
        )
    modules = [part for module in peft_adapter.modules for part in _split_experts(module)]
    rank = max(module.fields["r"] for module in modules)
    return peft_adapter._replace(modules=[_pad_to_rank(module, rank) for module in modules])


def _module_scaling(module: PeftModule) -> float:
    fields = module.fields
    rank: float = fields["r"]
    return fields["lora_alpha"] / (rank**0.5 if fields["use_rslora"] else rank)


def _split_experts(module: PeftModule) -> list[PeftModule]:
    """Splits a module of experts into one module for each; gate and up of an expert share `A`."""
    parameter, rank = module.parameter, module.fields["r"]
    if parameter.name == "weight":
        return [module]
    a, b = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
    num_experts = a.shape[0] // rank
    modules = []
    for expert in range(num_experts):
        expert_a = a[expert * rank : (expert + 1) * rank]  # (r, fan_in)
        expert_b = b.reshape(b.shape[0], rank, num_experts)[:, :, expert]  # (fan_out, r)
        projections = {"down_proj": expert_b}
        if parameter.name == "gate_up_proj":
            projections = dict(zip(("gate_proj", "up_proj"), np.split(expert_b, 2), strict=True))
        for name, projection_b in projections.items():
            expert_parameter = parameter._replace(
                module=f"{parameter.module}.{expert}.{name}", name="weight"
            )
            tensors = {"lora_A.weight": expert_a, "lora_B.weight": projection_b}
            modules.append(PeftModule(expert_parameter, module.fields, tensors))
    return modules


def _pad_to_rank(module: PeftModule, rank: int) -> PeftModule:
    """Pads a module with zeros to a rank, and folds its scale into `B`."""
    missing, tensors = rank - module.fields["r"], {}
    for a, b in _FACTOR_PAIRS.items():
        if a in module.tensors:
            scaled = module.tensors[b] * np.float32(_module_scaling(module))
            tensors[a] = np.pad(module.tensors[a], ((0, missing), (0, 0)))
            tensors[b] = np.pad(scaled, ((0, 0), (0, missing)))
    fields = {**module.fields, "r": rank, "lora_alpha": rank, "use_rslora": False}
    fields["lora_dropout"] = 0.0  # vLLM does not train.
    return module._replace(fields=fields, tensors=tensors)
