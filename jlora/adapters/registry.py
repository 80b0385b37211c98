"""The registry of adapter methods, and their table in Markdown."""

from __future__ import annotations

from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.base import AdapterConfig
from jlora.adapters.dora import DoRA
from jlora.adapters.dylora import DyLoRA
from jlora.adapters.fourierft import FourierFT
from jlora.adapters.full import BitFit, FullDelta
from jlora.adapters.hira import HiRA
from jlora.adapters.ia3 import IA3
from jlora.adapters.loha import LoHa
from jlora.adapters.lokr import LoKr
from jlora.adapters.lora import LoRA
from jlora.adapters.lora_fa import LoRAFA
from jlora.adapters.lora_moe import LoRAMoE
from jlora.adapters.sora import SoRA
from jlora.adapters.trainable_tokens import TrainableTokens
from jlora.adapters.vb_lora import VBLoRA
from jlora.adapters.vera import VeRA

ADAPTER_CONFIGS: tuple[type[AdapterConfig], ...] = (
    LoRA,
    LoRAFA,
    DoRA,
    VeRA,
    AdaLoRA,
    DyLoRA,
    SoRA,
    LoHa,
    LoKr,
    HiRA,
    FourierFT,
    IA3,
    VBLoRA,
    LoRAMoE,
    BitFit,
    FullDelta,
    TrainableTokens,
)


def format_families_table() -> str:
    """Returns a Markdown table with one row per adapter method.

    The columns are the formula, the number of trainable parameters of a weight (d, k), the
    supported kinds of weights, the recommended use, and the paper.

    Example:
        >>> from jlora.adapters import format_families_table
        >>> print(format_families_table().splitlines()[2].split("|")[1].strip())
        `LoRA`
    """
    header = (
        "`jlora.`",
        "adapted weight",
        "trainable parameters of (d, k)",
        "kinds of weights",
        "recommended for",
        "paper",
    )
    rows = [
        (
            f"`{config.__name__}`",
            f"`{config.info.formula}`",
            f"`{config.info.num_params_formula}`",
            "any" if config is FullDelta else ", ".join(sorted(config.supported_kinds)),
            config.info.recommended_for,
            config.info.paper,
        )
        for config in ADAPTER_CONFIGS
    ]
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
