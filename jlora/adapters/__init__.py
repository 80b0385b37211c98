"""Adapter methods (LoRA, DoRA, VeRA, ...): one file each, with its config and its leaf."""

from __future__ import annotations

from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    SharedArrays,
    array_field,
    register_family,
)
from jlora.adapters.dora import DoRA
from jlora.adapters.dylora import DyLoRA
from jlora.adapters.fourierft import FourierFT
from jlora.adapters.full import BitFit, FullDelta
from jlora.adapters.hira import HiRA
from jlora.adapters.ia3 import IA3
from jlora.adapters.layer_layout import match_layer_layout
from jlora.adapters.loha import LoHa
from jlora.adapters.lokr import LoKr
from jlora.adapters.lora import LoRA
from jlora.adapters.lora_fa import LoRAFA
from jlora.adapters.lora_moe import LoRAMoE
from jlora.adapters.registry import ADAPTER_CONFIGS, format_families_table
from jlora.adapters.sora import SoRA
from jlora.adapters.trainable_tokens import TrainableTokens
from jlora.adapters.vb_lora import VBLoRA
from jlora.adapters.vera import VeRA
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight

__all__ = [
    "ADAPTER_CONFIGS",
    "IA3",
    "AdaLoRA",
    "AdaptableWeight",
    "AdapterConfig",
    "AdapterLeaf",
    "BitFit",
    "DoRA",
    "DyLoRA",
    "FourierFT",
    "FullDelta",
    "HiRA",
    "LeafContext",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAMoE",
    "MethodInfo",
    "SharedArrays",
    "SoRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "WeightAxes",
    "array_field",
    "format_families_table",
    "match_layer_layout",
    "register_family",
]
