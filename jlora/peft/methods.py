"""The PEFT methods that jlora reads and writes: their config fields and their tensors."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.base import AdapterConfig, AdapterLeaf
from jlora.adapters.dora import DoRA
from jlora.adapters.fourierft import FourierFT
from jlora.adapters.hira import HiRA
from jlora.adapters.ia3 import IA3
from jlora.adapters.loha import LoHa
from jlora.adapters.lokr import LoKr
from jlora.adapters.lora import LoRA
from jlora.adapters.vb_lora import VBLoRA
from jlora.adapters.vera import VeRA
from jlora.interpreter.weight import AdaptableWeight
from jlora.peft.tensor_layouts import TensorLayout

ConfigFields = Mapping[str, Any]

# Suffix and layout of the tensor of each array of a leaf.
LayoutsByArray = dict[str, tuple[str, TensorLayout]]


class PeftMethod(NamedTuple):
    """One PEFT method.

    Attributes:
        defaults: Config fields that jlora uses, with PEFT's defaults.
        suffixes: Suffixes of the names of the method's tensors.
        make_config: Function from the fields of one module to jlora's config.
        tensor_layouts: Function from a leaf and its weight to the tensors in a file.
        families: Families of the leaves that are written as this method.
        config_fields: Function from a leaf and its weight to its config fields. A field is None
            where the module does not depend on it.
        supported_values: Fields with a single supported value, or a tuple of supported values.
        rank_field: Field of the rank of a module; None for no such field.
        alpha_field: Field of the alpha of a module; None for no such field.
        patterns: Field with values by module for each config field that has one.
        window_sizes: Numbers of window axes of the convolutions that PEFT adapts.
        supports_bias: True if the config has a field for trained biases.
        shared_tensors: Name and layout of each tensor that all modules share, by array.
        default_targets: Lists of modules, of which PEFT targets one where `target_modules` is null,
            by the type of the model.
    """

    defaults: dict[str, Any]
    suffixes: tuple[str, ...]
    make_config: Callable[[ConfigFields, AdaptableWeight], AdapterConfig]
    tensor_layouts: Callable[[AdapterLeaf, AdaptableWeight], LayoutsByArray]
    families: tuple[str, ...]
    config_fields: Callable[[Any, AdaptableWeight], dict[str, Any]]
    supported_values: ConfigFields = types.MappingProxyType({})
    rank_field: str | None = "r"
    alpha_field: str | None = None
    patterns: Mapping[str, str] = types.MappingProxyType({})
    window_sizes: tuple[int, ...] = ()
    supports_bias: bool = False
    shared_tensors: Mapping[str, tuple[str, TensorLayout]] = types.MappingProxyType({})
    default_targets: tuple[tuple[str, ...], ...] = (("q_proj", "v_proj"), ("query", "value"))

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns why PEFT cannot adapt a weight as jlora does; None if it can."""
        sizes = self.window_sizes
        if weight.kind != "convolution" or len(weight.window) in sizes:
            return None
        return (
            f"PEFT's method supports convolutions with {' or '.join(map(str, sizes)) or 'no'} "
            f"window axes, and {weight.path!r} has {len(weight.window)}"
        )


def _low_rank_layouts(
    weight: AdaptableWeight, prefix: str = "lora_", suffix: str = ".weight"
) -> LayoutsByArray:
    """Returns the layouts of the factors of LoRA, and of methods with factors in the same form."""
    if weight.kind == "embedding":
        a, b = f"{prefix}embedding_A", f"{prefix}embedding_B"
        return {"a": (a, TensorLayout("i r", "r c")), "b": (b, TensorLayout("r o", "o r"))}
    if weight.kind == "convolution":
        a_layout, b_layout = TensorLayout("i r", "r c w"), TensorLayout("r o", "o r 1")
    else:
        a_layout, b_layout = TensorLayout("i r", "r c"), TensorLayout("r o", "o r")
    return {"a": (f"{prefix}A{suffix}", a_layout), "b": (f"{prefix}B{suffix}", b_layout)}


def _magnitude_axes(weight: AdaptableWeight) -> str:
    return "u o 1" if weight.kind == "convolution" else "o"


def _lora_config(fields: ConfigFields, weight: AdaptableWeight) -> AdapterConfig:
    del weight
    make = DoRA if fields["use_dora"] else LoRA
    return make(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        use_rslora=fields["use_rslora"],
        dropout=fields["lora_dropout"],
    )


def _lora_layouts(leaf: AdapterLeaf, weight: AdaptableWeight) -> LayoutsByArray:
    tensors = _low_rank_layouts(weight)
    if len(leaf.axes.batch) and weight.kind == "linear" and _is_expert_weight(weight):
        tensors = {
            "a": ("lora_A.weight", TensorLayout("e i r", "e*r c")),
            "b": ("lora_B.weight", TensorLayout("e r o", "o r*e")),
        }
    if leaf.family == "dora":
        magnitude = TensorLayout("o", _magnitude_axes(weight))
        tensors["magnitude"] = ("lora_magnitude_vector", magnitude)
    return tensors


def _is_expert_weight(weight: AdaptableWeight) -> bool:
    return any(primitive.startswith("ragged_dot") for primitive in weight.primitives)


def _lora_fields(leaf: Any, weight: AdaptableWeight) -> dict[str, Any]:
    del weight
    return {
        "r": leaf.rank,
        "lora_alpha": leaf.alpha,
        "use_rslora": leaf.use_rslora,
        "use_dora": leaf.family == "dora",
        "lora_dropout": leaf.dropout,
    }


def _adalora_config(fields: ConfigFields, weight: AdaptableWeight) -> AdapterConfig:
    del weight
    return AdaLoRA(
        rank=fields["init_r"], alpha=fields["lora_alpha"], dropout=fields["lora_dropout"]
    )


def _adalora_layouts(leaf: AdapterLeaf, weight: AdaptableWeight) -> LayoutsByArray:
    del leaf
    return {**_low_rank_layouts(weight, suffix=""), "s": ("lora_E", TensorLayout("r", "r u"))}


def _core_layout(weight: AdaptableWeight) -> TensorLayout:
    """Returns the layout of a Tucker core, which has two window axes in PEFT's files."""
    return TensorLayout("q r w", "r q w u" if len(weight.window) == 1 else "r q w")


def _loha_layouts(leaf: AdapterLeaf, weight: AdaptableWeight) -> LayoutsByArray:
    tensors: LayoutsByArray = {}
    for n in (1, 2):
        if leaf.family == "loha_tucker":
            tensors[f"a{n}"] = (f"hada_w{n}_b", TensorLayout("c r", "r c"))
            tensors[f"b{n}"] = (f"hada_w{n}_a", TensorLayout("r o", "r o"))
            tensors[f"core{n}"] = (f"hada_t{n}", _core_layout(weight))
        else:
            tensors[f"a{n}"] = (f"hada_w{n}_b", TensorLayout("i r", "r c*w"))
            tensors[f"b{n}"] = (f"hada_w{n}_a", TensorLayout("r o", "o r"))
    return tensors


def _lokr_layouts(leaf: Any, weight: AdaptableWeight) -> LayoutsByArray:
    tensors = {
        "w1": ("lokr_w1", TensorLayout("x y", "y x")),
        "a1": ("lokr_w1_b", TensorLayout("x r", "r x")),
        "b1": ("lokr_w1_a", TensorLayout("r y", "y r")),
        "w2": ("lokr_w2", TensorLayout("w x y", "y x w")),
        "a2": ("lokr_w2_b", TensorLayout("w x r", "r x*w")),
        "b2": ("lokr_w2_a", TensorLayout("r y", "y r")),
    }
    if leaf.w2_form == "core":
        tensors["a2"] = ("lokr_w2_b", TensorLayout("x r", "r x"))
        tensors["b2"] = ("lokr_w2_a", TensorLayout("r y", "r y"))
        tensors["core2"] = ("lokr_t2", _core_layout(weight))
    return {name: tensors[name] for name in leaf.shapes()}


def _has_window(leaf: Any, weight: AdaptableWeight) -> bool:
    return math.prod(leaf.shape[axis] for axis in weight.window) > 1


def _loha_fields(leaf: Any, weight: AdaptableWeight) -> dict[str, Any]:
    is_tucker = leaf.family == "loha_tucker"
    return {
        "r": leaf.rank,
        "alpha": leaf.alpha,
        "use_effective_conv2d": is_tucker if _has_window(leaf, weight) else None,
    }


def _lokr_fields(leaf: Any, weight: AdaptableWeight) -> dict[str, Any]:
    d1, k1 = leaf.w1_shape
    can_decompose = leaf.rank < max(d1, k1) / 2
    can_have_core = _has_window(leaf, weight) and leaf.w2_form != "full"
    window = math.prod(leaf.shape[axis] for axis in leaf.window)
    channels, outputs = (
        math.prod(leaf.axis_sizes.inputs) // window,
        math.prod(leaf.axis_sizes.outputs),
    )
    return {
        "r": leaf.rank,
        "alpha": leaf.alpha,
        "module_dropout": 0.0,
        "decompose_both": leaf.decompose_w1 if can_decompose else None,
        # The size of each side and its first factor. The config has one number for all modules,
        # which `save` finds from these.
        "decompose_factor": ((channels, d1), (outputs, k1)),
        "use_effective_conv2d": leaf.w2_form == "core" if can_have_core else None,
    }


def _hira_layouts(leaf: AdapterLeaf, weight: AdaptableWeight) -> LayoutsByArray:
    del leaf
    return _low_rank_layouts(weight, "hira_", "")


def _ia3_config(fields: ConfigFields, weight: AdaptableWeight) -> AdapterConfig:
    del weight
    return IA3(apply_to="inputs" if fields["is_feedforward"] else "outputs")


def _ia3_layouts(leaf: Any, weight: AdaptableWeight) -> LayoutsByArray:
    scaled = [axis for axis in leaf.scaled_axes if axis not in leaf.axes.batch]
    if scaled == list(leaf.axes.outputs):
        file_axes = "u o 1" if weight.kind == "convolution" else "o u"
        return {"l": ("ia3_l", TensorLayout("o", file_axes))}
    return {"l": ("ia3_l", TensorLayout("c", "u c 1" if weight.kind == "convolution" else "u c"))}


def _vera_config(fields: ConfigFields, weight: AdaptableWeight) -> AdapterConfig:
    del weight
    return VeRA(rank=fields["r"], d_initial=fields["d_initial"], dropout=fields["vera_dropout"])


def _vb_lora_config(fields: ConfigFields, weight: AdaptableWeight) -> AdapterConfig:
    del weight
    return VBLoRA(
        rank=fields["r"],
        num_vectors=fields["num_vectors"],
        vector_length=fields["vector_length"],
        top_k=fields["topk"],
        dropout=fields["vblora_dropout"],
    )


def _fourierft_config(fields: ConfigFields, weight: AdaptableWeight) -> AdapterConfig:
    return FourierFT(
        num_frequencies=fields["n_frequency"],
        alpha=fields["scaling"],
        dropout=0.0,
        seed=fields["random_loc_seed"],
    )


_EMBEDDING_SUFFIXES = ("lora_embedding_A", "lora_embedding_B")

PEFT_METHODS: dict[str, PeftMethod] = {
    "LORA": PeftMethod(
        suffixes=(
            "lora_A.weight",
            "lora_B.weight",
            "lora_B.bias",
            *_EMBEDDING_SUFFIXES,
            "lora_magnitude_vector",
        ),
        defaults={
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "ensure_weight_tying": False,
            "lora_bias": False,
        },
        supported_values={
            "use_qalora": False,
            "use_bdlora": None,
            "kasa_config": None,
            "velora_config": None,
            "monteclora_config": None,
            "arrow_config": None,
            "alora_invocation_tokens": None,
            "layer_replication": None,
            "megatron_config": None,
            # Other values change the base, and the file does not record that base.
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
        },
        make_config=_lora_config,
        tensor_layouts=_lora_layouts,
        families=("lora", "dora", "lora_fa", "dylora"),
        config_fields=_lora_fields,
        alpha_field="lora_alpha",
        patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
        window_sizes=(1, 2, 3),
        supports_bias=True,
    ),
    "ADALORA": PeftMethod(
        suffixes=("lora_A", "lora_B", "lora_E"),
        default_targets=(
            ("q_proj", "v_proj"),
            ("query", "key", "value", "dense"),
            ("query", "value"),
        ),
        defaults={
            "init_r": 12,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            # Fields of LoRA that PEFT's AdaLoRA has and does not read.
            "r": 8,
            "use_rslora": False,
        },
        supported_values={"use_dora": False, "layer_replication": None},
        make_config=_adalora_config,
        tensor_layouts=_adalora_layouts,
        families=("adalora",),
        config_fields=lambda leaf, weight: {
            "init_r": leaf.rank,
            "target_r": leaf.rank,
            "lora_alpha": leaf.alpha,
            "lora_dropout": leaf.dropout,
            "total_step": 1,  # PEFT does not load a config without it.
        },
        rank_field="init_r",
        alpha_field="lora_alpha",
        supports_bias=True,
    ),
    "LOHA": PeftMethod(
        suffixes=tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        defaults={"r": 8, "alpha": 8, "use_effective_conv2d": False},
        make_config=lambda f, w: LoHa(
            rank=f["r"], alpha=f["alpha"], tucker=f["use_effective_conv2d"]
        ),
        tensor_layouts=_loha_layouts,
        families=("loha", "loha_tucker"),
        config_fields=_loha_fields,
        alpha_field="alpha",
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        window_sizes=(1, 2),
    ),
    "LOKR": PeftMethod(
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
        make_config=lambda f, w: LoKr(
            rank=f["r"],
            alpha=f["alpha"],
            tucker=f["use_effective_conv2d"],
            factor=f["decompose_factor"],
            decompose_both=f["decompose_both"],
        ),
        tensor_layouts=_lokr_layouts,
        families=("lokr",),
        config_fields=_lokr_fields,
        alpha_field="alpha",
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        # With one window axis, PEFT orders the entries of a full `w2` in another way.
        window_sizes=(2,),
    ),
    "HIRA": PeftMethod(
        suffixes=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        defaults={"r": 32, "hira_dropout": 0.0, "fan_in_fan_out": False},
        make_config=lambda f, w: HiRA(rank=f["r"], dropout=f["hira_dropout"]),
        tensor_layouts=_hira_layouts,
        families=("hira",),
        config_fields=lambda leaf, weight: {"r": leaf.rank, "hira_dropout": leaf.dropout},
        # PEFT's HiRA has the field `rank_pattern` and does not read it.
        window_sizes=(1, 2, 3),
    ),
    "IA3": PeftMethod(
        suffixes=("ia3_l",),
        defaults={"fan_in_fan_out": False, "is_feedforward": False},
        make_config=_ia3_config,
        tensor_layouts=_ia3_layouts,
        families=("ia3",),
        config_fields=lambda leaf, weight: {},
        rank_field=None,
        window_sizes=(2, 3),
        default_targets=(
            ("k_proj", "v_proj", "down_proj"),
            ("q_proj", "v_proj", "down_proj"),
            ("key", "value", "output.dense"),
        ),
    ),
    "VERA": PeftMethod(
        suffixes=("vera_lambda_d", "vera_lambda_b"),
        defaults={"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "fan_in_fan_out": False},
        supported_values={"save_projection": True},
        make_config=_vera_config,
        tensor_layouts=lambda leaf, weight: {
            "d": ("vera_lambda_d", TensorLayout("r", "r")),
            "b": ("vera_lambda_b", TensorLayout("o", "o")),
        },
        families=("vera",),
        config_fields=lambda leaf, weight: {
            "r": leaf.rank,
            "vera_dropout": leaf.dropout,
            "save_projection": True,
        },
        rank_field=None,
        shared_tensors={
            "a": ("base_model.vera_A", TensorLayout("x r", "r x")),
            "b": ("base_model.vera_B", TensorLayout("r y", "y r")),
        },
        supports_bias=True,
    ),
    "VBLORA": PeftMethod(
        suffixes=("vblora_logits_A", "vblora_logits_B"),
        defaults={
            "r": 4,
            "num_vectors": 256,
            "vector_length": 256,
            "topk": 2,
            "vblora_dropout": 0.0,
            "fan_in_fan_out": False,
            "save_only_topk_weights": False,
        },
        make_config=_vb_lora_config,
        tensor_layouts=lambda leaf, weight: {
            "logits_a": ("vblora_logits_A", TensorLayout("r x v", "r x v")),
            "logits_b": ("vblora_logits_B", TensorLayout("r y v", "y r v")),
        },
        families=("vb_lora",),
        config_fields=lambda leaf, weight: {
            "r": leaf.rank,
            "num_vectors": leaf.num_vectors,
            "vector_length": leaf.vector_length,
            "topk": leaf.top_k,
            "vblora_dropout": leaf.dropout,
        },
        rank_field=None,
        shared_tensors={"bank": ("base_model.vblora_vector_bank", TensorLayout("n v", "n v"))},
        supports_bias=True,
    ),
    "FOURIERFT": PeftMethod(
        suffixes=("fourierft_spectrum",),
        defaults={
            "n_frequency": 1000,
            "n_frequency_pattern": {},
            "scaling": 150.0,
            "random_loc_seed": 777,
            "fan_in_fan_out": False,
        },
        make_config=_fourierft_config,
        tensor_layouts=lambda leaf, weight: {
            "spectrum": ("fourierft_spectrum", TensorLayout("n", "n"))
        },
        families=("fourierft",),
        config_fields=lambda leaf, weight: {
            "n_frequency": leaf.num_frequencies,
            "scaling": leaf.alpha,
            "random_loc_seed": leaf.seed,
        },
        rank_field="n_frequency",
        patterns={"n_frequency": "n_frequency_pattern"},
        supports_bias=True,
    ),
}
