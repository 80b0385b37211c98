"""Each method of PEFT that jlora reads and writes: its config's fields, and its tensors."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.dora import DoRA
from jlora.adapters.fourierft import FourierFT
from jlora.adapters.hira import HiRA
from jlora.adapters.ia3 import IA3
from jlora.adapters.loha import LoHa
from jlora.adapters.lokr import LoKr
from jlora.adapters.lora import LoRA
from jlora.adapters.protocol import AdapterConfig, AdapterLeaf, Weight
from jlora.adapters.vb_lora import VBLoRA
from jlora.adapters.vera import VeRA
from jlora.peft.layouts import Layout

Fields = Mapping[str, Any]
Tensors = dict[str, tuple[str, Layout]]  # An array of the leaf to its suffix and layout.


class Format(NamedTuple):
    """One method.

    Attributes:
        defaults: The fields that say something here, with what they are when left out.
        only: Fields of which one value alone is implemented; several where a tuple holds them.
        config: The fields, with one module's own rank and alpha, to jlora's config.
        suffixes: The endings of its own tensors' names.
        tensors: What a leaf on a weight has in files.
        families: Of the leaves that are written so.
        fields: The leaves to the fields that they share.
        rank: The field that `rank_pattern` replaces, or None.
        alpha: The field that `alpha_pattern` replaces, or None.
        biases: Whether its config has a mode for biases.
        shared: Of what modules share, by array, the tensor's name and layout.
    """

    defaults: dict[str, Any]
    suffixes: tuple[str, ...]
    config: Callable[[Fields, Weight], AdapterConfig]
    tensors: Callable[[AdapterLeaf, Weight], Tensors]
    families: tuple[str, ...]
    fields: Callable[[Any], dict[str, Any]]
    only: Fields = types.MappingProxyType({})
    rank: str | None = "r"
    alpha: str | None = None
    biases: bool = False
    shared: Mapping[str, tuple[str, Layout]] = types.MappingProxyType({})


def _pair(weight: Weight, prefix: str = "lora_", end: str = ".weight") -> Tensors:
    """The factors of LoRA and of what is written like it."""
    if weight.kind == "embedding":
        a, b = f"{prefix}embedding_A", f"{prefix}embedding_B"
        return {"a": (a, Layout("i r", "r c")), "b": (b, Layout("r o", "o r"))}
    if weight.kind == "convolution":
        of_a, of_b = Layout("i r", "r c w"), Layout("r o", "o r 1")
    else:
        of_a, of_b = Layout("i r", "r c"), Layout("r o", "o r")
    return {"a": (f"{prefix}A{end}", of_a), "b": (f"{prefix}B{end}", of_b)}


def _along_outputs(weight: Weight) -> str:
    return "u o 1" if weight.kind == "convolution" else "o"


# --- LoRA and DoRA -------------------------------------------------------------------------------


def _lora(fields: Fields, weight: Weight) -> AdapterConfig:
    del weight
    make = DoRA if fields["use_dora"] else LoRA
    return make(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rank_stabilized=fields["use_rslora"],
        dropout=fields["lora_dropout"],
    )


def _lora_tensors(leaf: AdapterLeaf, weight: Weight) -> Tensors:
    tensors = _pair(weight)
    if len(leaf.axes.batch) and weight.kind == "linear" and _holds_experts(weight):
        tensors = {
            "a": ("lora_A.weight", Layout("e i r", "e*r c")),
            "b": ("lora_B.weight", Layout("e r o", "o r*e")),
        }
    if leaf.family == "dora":
        magnitude = Layout("o", _along_outputs(weight))
        tensors["magnitude"] = ("lora_magnitude_vector", magnitude)
    return tensors


def _holds_experts(weight: Weight) -> bool:
    return any(use.startswith("ragged_dot") for use in weight.uses)


def _lora_fields(leaf: Any) -> dict[str, Any]:
    return {
        "r": leaf.rank,
        "lora_alpha": leaf.alpha,
        "use_rslora": leaf.rank_stabilized,
        "use_dora": leaf.family == "dora",
        "lora_dropout": leaf.dropout,
    }


# --- the others -----------------------------------------------------------------------------------


def _adalora(fields: Fields, weight: Weight) -> AdapterConfig:
    del weight
    return AdaLoRA(
        rank=fields["init_r"], alpha=fields["lora_alpha"], dropout=fields["lora_dropout"]
    )


def _adalora_tensors(leaf: AdapterLeaf, weight: Weight) -> Tensors:
    del leaf
    return {**_pair(weight, end=""), "s": ("lora_E", Layout("r", "r u"))}


def _loha_tensors(leaf: AdapterLeaf, weight: Weight) -> Tensors:
    del weight
    tensors: Tensors = {}
    for n in (1, 2):
        if leaf.family == "loha_tucker":
            tensors[f"a{n}"] = (f"hada_w{n}_b", Layout("c r", "r c"))
            tensors[f"b{n}"] = (f"hada_w{n}_a", Layout("r o", "r o"))
            tensors[f"core{n}"] = (f"hada_t{n}", Layout("q r w", "r q w"))
        else:
            tensors[f"a{n}"] = (f"hada_w{n}_b", Layout("i r", "r c*w"))
            tensors[f"b{n}"] = (f"hada_w{n}_a", Layout("r o", "o r"))
    return tensors


def _lokr_tensors(leaf: Any, weight: Weight) -> Tensors:
    del weight
    tensors = {
        "w1": ("lokr_w1", Layout("x y", "y x")),
        "a1": ("lokr_w1_b", Layout("x r", "r x")),
        "b1": ("lokr_w1_a", Layout("r y", "y r")),
        "w2": ("lokr_w2", Layout("w x y", "y x w")),
        "a2": ("lokr_w2_b", Layout("w x r", "r x*w")),
        "b2": ("lokr_w2_a", Layout("r y", "y r")),
    }
    if leaf.form2 == "core":
        tensors["a2"] = ("lokr_w2_b", Layout("x r", "r x"))
        tensors["b2"] = ("lokr_w2_a", Layout("r y", "r y"))
        tensors["core2"] = ("lokr_t2", Layout("q r w", "r q w"))
    return {name: tensors[name] for name in leaf.shapes()}


def _lokr_fields(leaf: Any) -> dict[str, Any]:
    d1, k1 = leaf.first
    window = math.prod(leaf.shape[axis] for axis in leaf.window)
    channels, outputs = math.prod(leaf.groups.inputs) // window, math.prod(leaf.groups.outputs)
    return {
        "r": leaf.rank,
        "alpha": leaf.alpha,
        "module_dropout": 0.0,
        "decompose_both": leaf.pair1,
        # What is split, and into how many; one number makes it in all modules.
        "decompose_factor": ((channels, d1), (outputs, k1)),
        "use_effective_conv2d": leaf.form2 == "core",
    }


def _hira_tensors(leaf: AdapterLeaf, weight: Weight) -> Tensors:
    del leaf
    return _pair(weight, "hira_", "")


def _ia3(fields: Fields, weight: Weight) -> AdapterConfig:
    del weight
    return IA3(on="inputs" if fields["is_feedforward"] else "outputs")


def _ia3_tensors(leaf: Any, weight: Weight) -> Tensors:
    scaled = [axis for axis in leaf.scaled if axis not in leaf.axes.batch]
    if scaled == list(leaf.axes.outputs):
        file = "u o 1" if weight.kind == "convolution" else "o u"
        return {"l": ("ia3_l", Layout("o", file))}
    return {"l": ("ia3_l", Layout("c", "u c 1" if weight.kind == "convolution" else "u c"))}


def _vera(fields: Fields, weight: Weight) -> AdapterConfig:
    del weight
    return VeRA(rank=fields["r"], d_initial=fields["d_initial"], dropout=fields["vera_dropout"])


def _vb_lora(fields: Fields, weight: Weight) -> AdapterConfig:
    del weight
    return VBLoRA(
        rank=fields["r"],
        vectors=fields["num_vectors"],
        length=fields["vector_length"],
        top_k=fields["topk"],
        dropout=fields["vblora_dropout"],
    )


def _fourierft(fields: Fields, weight: Weight) -> AdapterConfig:
    return FourierFT(
        frequencies=fields["n_frequency"],
        alpha=fields["scaling"],
        dropout=0.0,
        seed=fields["random_loc_seed"],
    )


_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

FORMATS: dict[str, Format] = {
    "LORA": Format(
        suffixes=("lora_A.weight", "lora_B.weight", *_EMBEDDING, "lora_magnitude_vector"),
        defaults={
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
        },
        only={
            "lora_bias": False,
            "use_qalora": False,
            "use_bdlora": None,
            "kasa_config": None,
            "velora_config": None,
            "monteclora_config": None,
            "arrow_config": None,
            "alora_invocation_tokens": None,
            "layer_replication": None,
            "megatron_config": None,
            # Others change the base, and which base that is the file does not say.
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
        },
        config=_lora,
        tensors=_lora_tensors,
        families=("lora", "dora", "lora_fa", "dylora"),
        fields=_lora_fields,
        alpha="lora_alpha",
        biases=True,
    ),
    "ADALORA": Format(
        suffixes=("lora_A", "lora_B", "lora_E"),
        defaults={"init_r": 12, "lora_alpha": 8, "lora_dropout": 0.0, "fan_in_fan_out": False},
        only={"use_dora": False, "use_rslora": False, "layer_replication": None, "r": 8},
        config=_adalora,
        tensors=_adalora_tensors,
        families=("adalora",),
        fields=lambda leaf: {
            "init_r": leaf.rank,
            "target_r": leaf.rank,
            "lora_alpha": leaf.alpha,
            "lora_dropout": leaf.dropout,
            "total_step": 1,  # PEFT does not load a config without.
        },
        rank="init_r",
        alpha="lora_alpha",
        biases=True,
    ),
    "LOHA": Format(
        suffixes=tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        defaults={"r": 8, "alpha": 8, "use_effective_conv2d": False},
        config=lambda f, w: LoHa(rank=f["r"], alpha=f["alpha"], tucker=f["use_effective_conv2d"]),
        tensors=_loha_tensors,
        families=("loha", "loha_tucker"),
        fields=lambda leaf: {
            "r": leaf.rank,
            "alpha": leaf.alpha,
            "use_effective_conv2d": leaf.family == "loha_tucker",
        },
        alpha="alpha",
    ),
    "LOKR": Format(
        suffixes=tuple(
            f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        ),
        defaults={
            "r": 8,
            "alpha": 8,
            "use_effective_conv2d": False,
            "decompose_both": False,
            "decompose_factor": -1,
        },
        config=lambda f, w: LoKr(
            rank=f["r"],
            alpha=f["alpha"],
            tucker=f["use_effective_conv2d"],
            factor=f["decompose_factor"],
            decompose_both=f["decompose_both"],
        ),
        tensors=_lokr_tensors,
        families=("lokr",),
        fields=_lokr_fields,
        alpha="alpha",
    ),
    "HIRA": Format(
        suffixes=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        defaults={"r": 8, "hira_dropout": 0.0, "fan_in_fan_out": False},
        config=lambda f, w: HiRA(rank=f["r"], dropout=f["hira_dropout"]),
        tensors=_hira_tensors,
        families=("hira",),
        fields=lambda leaf: {"r": leaf.rank, "hira_dropout": leaf.dropout},
    ),
    "IA3": Format(
        suffixes=("ia3_l",),
        defaults={"fan_in_fan_out": False, "is_feedforward": False},
        config=_ia3,
        tensors=_ia3_tensors,
        families=("ia3",),
        fields=lambda leaf: {},
        rank=None,
    ),
    "VERA": Format(
        suffixes=("vera_lambda_d", "vera_lambda_b"),
        defaults={"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "fan_in_fan_out": False},
        only={"save_projection": True},
        config=_vera,
        tensors=lambda leaf, weight: {
            "d": ("vera_lambda_d", Layout("r", "r")),
            "b": ("vera_lambda_b", Layout("o", "o")),
        },
        families=("vera",),
        fields=lambda leaf: {"r": leaf.rank, "vera_dropout": leaf.dropout, "save_projection": True},
        rank=None,
        shared={
            "a": ("base_model.vera_A", Layout("x r", "r x")),
            "b": ("base_model.vera_B", Layout("r y", "y r")),
        },
        biases=True,
    ),
    "VBLORA": Format(
        suffixes=("vblora_logits_A", "vblora_logits_B"),
        defaults={
            "r": 4,
            "num_vectors": 256,
            "vector_length": 256,
            "topk": 2,
            "vblora_dropout": 0.0,
            "fan_in_fan_out": False,
        },
        only={"save_only_topk_weights": False},
        config=_vb_lora,
        tensors=lambda leaf, weight: {
            "logits_a": ("vblora_logits_A", Layout("r x v", "r x v")),
            "logits_b": ("vblora_logits_B", Layout("r y v", "y r v")),
        },
        families=("vb_lora",),
        fields=lambda leaf: {
            "r": leaf.rank,
            "num_vectors": leaf.vectors,
            "vector_length": leaf.length,
            "topk": leaf.top_k,
            "vblora_dropout": leaf.dropout,
        },
        rank=None,
        shared={"bank": ("base_model.vblora_vector_bank", Layout("n v", "n v"))},
        biases=True,
    ),
    "FOURIERFT": Format(
        suffixes=("fourierft_spectrum",),
        defaults={
            "n_frequency": 1000,
            "scaling": 150.0,
            "random_loc_seed": 777,
            "fan_in_fan_out": False,
        },
        config=_fourierft,
        tensors=lambda leaf, weight: {"spectrum": ("fourierft_spectrum", Layout("n", "n"))},
        families=("fourierft",),
        fields=lambda leaf: {
            "n_frequency": leaf.frequencies,
            "scaling": leaf.alpha,
            "random_loc_seed": leaf.seed,
        },
        rank=None,
        biases=True,
    ),
}
