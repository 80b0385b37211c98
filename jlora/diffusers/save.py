"""Adapters as a file of diffusers or kohya."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora._tree import PyTree
from jlora.adapters.base import check_adapter
from jlora.checkpoints.safetensors_io import format_names, write_new_safetensors
from jlora.diffusers.keys import KOHYA_PREFIXES, group_by_kohya_name, to_kohya_name
from jlora.diffusers.load import (
    LORA_ADAPTER_METADATA_KEY,
    list_adaptable_modules,
    unsupported_reason,
)
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.peft.modules_to_save import PeftModule
from jlora.peft.save import convert_to_peft
from jlora.rules import trace_weights

_DOWN_SUFFIX, _UP_SUFFIX = "lora_A.weight", "lora_B.weight"


class ModelAdapter(NamedTuple):
    """One model's part of a file.

    Attributes:
        adapter: What is written.
        fn: A function of params and inputs.
        params: The base that the adapter belongs on.
        inputs: Example inputs, arrays or shapes.
        checkpoint_mapping: Which tensors of diffusers' checkpoint the weights are.
    """

    adapter: Mapping[str, Any]
    fn: Callable[..., Any]
    params: PyTree
    inputs: tuple[Any, ...]
    checkpoint_mapping: Mapping[str, Stored]


def check_model_prefix(prefix: str) -> None:
    """Refuses what no key can begin with.

    Raises:
        ValueError: Names it.
    """
    if not prefix.isidentifier():
        raise ValueError(f"prefix={prefix!r} is no name of a model, such as 'unet'. Give one.")


def write_lora_file(
    path: str | os.PathLike[str], model_adapters: Mapping[str, ModelAdapter], file_format: str
) -> None:
    """See `jlora.diffusers.save_parts`."""
    tensors: dict[str, np.ndarray] = {}
    fields: dict[str, Any] = {}
    for prefix, part in model_adapters.items():
        check_model_prefix(prefix)
        modules, known = _convert_lora_modules(part)
        if file_format == "kohya":
            tensors |= _kohya_tensors(_kohya_key_prefix(prefix, model_adapters), modules, known)
        else:
            tensors |= _diffusers_tensors(prefix, modules)
            fields |= {
                f"{prefix}.{name}": value
                for name, value in _diffusers_config_fields(modules).items()
            }
    if not tensors:
        raise ValueError("There is no adapter to write. Give one, by its prefix.")
    for key, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(
                f"{key} holds NaN or Inf; nothing was written. Save an earlier adapter."
            )
    metadata = {"format": "pt"}
    if fields:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(fields, indent=2)
    # Unlike NumPy's `ascontiguousarray` this makes no axis for a number that has none.
    contiguous = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    write_new_safetensors(path, contiguous, metadata)


def _convert_lora_modules(model_adapter: ModelAdapter) -> tuple[list[PeftModule], Sequence[str]]:
    """The modules that an adapter has, and all that its model has."""
    leaves = check_adapter(model_adapter.adapter)
    others = {path: leaf.family for path, leaf in leaves.items()}
    others = {p: name for p, name in others.items() if name not in ("lora", "lora_fa", "dylora")}
    if others or not leaves:
        what = format_names([f"{name!r} on {path!r}" for path, name in others.items()]) or "nothing"
        raise ValueError(
            f"These files hold LoRA alone, and the adapter has {what}. Convert it with "
            f"jlora.to_lora, or merge it."
        )
    used = trace_weights(model_adapter.fn, model_adapter.params, *model_adapter.inputs)
    sites = list_adaptable_modules(used, model_adapter.checkpoint_mapping)
    whole = convert_to_peft(
        model_adapter.adapter,
        model_adapter.params,
        used,
        model_adapter.checkpoint_mapping,
        save_embedding_layers=False,
    )
    for module in whole.modules:
        reason = unsupported_reason(used[module.parameter.path], module.parameter)
        if reason or module.parameter.module not in sites:
            raise ValueError(
                f"{module.parameter.path} cannot be written: {reason or 'it is no weight of a module'}. "
                f"Leave it out of the adapter, or merge it."
            )
    if not whole.modules:
        raise ValueError("The adapter is zero everywhere, and nothing of it is left to write.")
    return whole.modules, tuple(sites)


def _effective_alpha(module: PeftModule) -> float:
    """The alpha that makes `alpha / rank` the scale."""
    alpha, rank = module.fields["lora_alpha"], module.fields["r"]
    return alpha * rank**0.5 if module.fields["use_rslora"] else alpha


def _diffusers_tensors(prefix: str, modules: Sequence[PeftModule]) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.{module.parameter.module}.{suffix}": module.tensors[suffix]
        for module in modules
        for suffix in (_DOWN_SUFFIX, _UP_SUFFIX)
    }


def _diffusers_config_fields(modules: Sequence[PeftModule]) -> dict[str, Any]:
    """What diffusers makes PEFT's config of."""
    names = [module.parameter.module for module in modules]
    ranks = {module.parameter.module: module.fields["r"] for module in modules}
    alphas = {module.parameter.module: _effective_alpha(module) for module in modules}
    return {
        "peft_type": "LORA",
        "r": _most_common_value(ranks),
        "lora_alpha": _most_common_value(alphas),
        "rank_pattern": _build_module_pattern(ranks),
        "alpha_pattern": _build_module_pattern(alphas),
        # Whole names: the model may have more modules than were described here.
        "target_modules": names,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
    }


def _most_common_value(values: Mapping[str, float]) -> float:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _build_module_pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Every module's value, unless all have one.

    PEFT takes the first pattern that is a name's ending, so longer ones come first.
    """
    if len(set(values.values())) == 1:
        return {}
    return {name: values[name] for name in sorted(values, key=len, reverse=True)}


def _kohya_key_prefix(prefix: str, model_adapters: Mapping[str, ModelAdapter]) -> str:
    """What kohya's keys of a model begin with."""
    if prefix not in KOHYA_PREFIXES:
        raise ValueError(
            f"prefix={prefix!r} has no name in style='kohya', which knows {sorted(KOHYA_PREFIXES)}. Use "
            f"style='diffusers'."
        )
    several = "text_encoder_2" in model_adapters
    return KOHYA_PREFIXES[prefix][-1 if several else 0]


def _kohya_tensors(
    key_prefix: str, modules: Sequence[PeftModule], module_names: Sequence[str]
) -> dict[str, np.ndarray]:
    meant = group_by_kohya_name(module_names)
    tensors = {}
    for module in modules:
        name = to_kohya_name(module.parameter.module)
        if len(meant[name]) > 1:
            raise ValueError(
                f"In style='kohya' {meant[name]} have one name, {key_prefix}_{name}. Use "
                f"style='diffusers'."
            )
        down, up = module.tensors[_DOWN_SUFFIX], module.tensors[_UP_SUFFIX]
        tensors[f"{key_prefix}_{name}.lora_down.weight"] = down
        tensors[f"{key_prefix}_{name}.lora_up.weight"] = up
        tensors[f"{key_prefix}_{name}.alpha"] = np.asarray(_effective_alpha(module), np.float32)
    return tensors
