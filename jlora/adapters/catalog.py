"""All families, for the table in the README."""

from __future__ import annotations

from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.dora import DoRA
from jlora.adapters.dylora import DyLoRA
from jlora.adapters.fourierft import FourierFT
from jlora.adapters.full import BitFit, Full
from jlora.adapters.hira import HiRA
from jlora.adapters.ia3 import IA3
from jlora.adapters.loha import LoHa
from jlora.adapters.lokr import LoKr
from jlora.adapters.lora import LoRA
from jlora.adapters.lora_fa import LoRAFA
from jlora.adapters.mixture import LoRAMixture
from jlora.adapters.protocol import AdapterConfig
from jlora.adapters.sora import SoRA
from jlora.adapters.token_rows import TokenRows
from jlora.adapters.vb_lora import VBLoRA
from jlora.adapters.vera import VeRA

CONFIGS: tuple[type[AdapterConfig], ...] = (
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
    LoRAMixture,
    BitFit,
    Full,
    TokenRows,
)


def families_table() -> str:
    """Every family as a row of a Markdown table: formula, trained numbers for a weight (d, k), the
    kinds of weight, what it is good for, and the paper.
    """
    header = ("`jlora.`", "the weight becomes", "trained for (d, k)", "on", "good for", "paper")
    rows = [
        (
            f"`{config.__name__}`",
            f"`{config.about.formula}`",
            f"`{config.about.parameters}`",
            "any" if config is Full else ", ".join(sorted(config.kinds)),
            config.about.good_for,
            config.about.paper,
        )
        for config in CONFIGS
    ]
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
