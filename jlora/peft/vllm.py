"""PEFT's folders as vLLM takes them.

vLLM reads one rank and one scale for all modules, no magnitudes, biases or modules trained whole,
and the experts of a mixture as modules of their own.
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
    """The same adapter in the form that vLLM takes.

    Raises:
        ValueError: It has none.
    """
    if peft_adapter.peft_type != "LORA":
        raise ValueError(
            f"vLLM takes LoRA alone, and this adapter is of {peft_adapter.peft_type}. {_MERGE_HINT}"
        )
    if any(module.fields["use_dora"] for module in peft_adapter.modules):
        raise ValueError(f"vLLM does not take DoRA. {_MERGE_HINT}")
    if peft_adapter.extra_tensors:
        raise ValueError(
            f"vLLM takes factors alone, and this adapter also has {format_names(sorted(peft_adapter.extra_tensors))}. "
            f"Merge it and serve the merged checkpoint."
        )
    modules = [one for module in peft_adapter.modules for one in _split_experts(module)]
    rank = max(module.fields["r"] for module in modules)
    return peft_adapter._replace(modules=[_pad_to_rank(module, rank) for module in modules])


def _module_scaling(module: PeftModule) -> float:
    fields = module.fields
    rank: float = fields["r"]
    return fields["lora_alpha"] / (rank**0.5 if fields["use_rslora"] else rank)


def _split_experts(module: PeftModule) -> list[PeftModule]:
    """A module of experts as one for each; those of gate and up share their `A`."""
    site, rank = module.parameter, module.fields["r"]
    if site.name == "weight":
        return [module]
    a, b = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
    count = a.shape[0] // rank
    found = []
    for expert in range(count):
        own_a = a[expert * rank : (expert + 1) * rank]
        own_b = b.reshape(b.shape[0], rank, count)[:, :, expert]
        parts = {"down_proj": own_b}
        if site.name == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(own_b, 2), strict=True))
        for name, part in parts.items():
            own = site._replace(module=f"{site.module}.{expert}.{name}", name="weight")
            tensors = {"lora_A.weight": own_a, "lora_B.weight": part}
            found.append(PeftModule(own, module.fields, tensors))
    return found


def _pad_to_rank(module: PeftModule, rank: int) -> PeftModule:
    """The module with ranks of zeros added, and its scale in `B`."""
    missing, tensors = rank - module.fields["r"], {}
    for a, b in _FACTOR_PAIRS.items():
        if a in module.tensors:
            scaled = module.tensors[b] * np.float32(_module_scaling(module))
            tensors[a] = np.pad(module.tensors[a], ((0, missing), (0, 0)))
            tensors[b] = np.pad(scaled, ((0, 0), (0, missing)))
    fields = {**module.fields, "r": rank, "lora_alpha": rank, "use_rslora": False}
    return module._replace(fields=fields, tensors=tensors)
