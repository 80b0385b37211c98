"""Saves adapters as a LoRA file of diffusers or kohya."""

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
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft.modules_to_save import PeftModule
from jlora.peft.save import convert_to_peft
from jlora.rules import trace_weights

_DOWN_SUFFIX, _UP_SUFFIX = "lora_A.weight", "lora_B.weight"


class ModelAdapter(NamedTuple):
    """The adapter of one model of a pipeline, with its model.

    Attributes:
        adapter: Adapter to save.
        fn: Function of params and inputs.
        params: The base that the adapter belongs on.
        inputs: Example inputs, arrays or shapes.
        checkpoint_mapping: Tensors of the diffusers checkpoint that each weight consists of, by
            the weight's path.

    Example:
        >>> import numpy as np
        >>> from jlora.diffusers import ModelAdapter
        >>> model_adapter = ModelAdapter({}, lambda params, x: x, {}, (np.ones(2),), {})
        >>> model_adapter.adapter
        {}
    """

    adapter: Mapping[str, Any]
    fn: Callable[..., Any]
    params: PyTree
    inputs: tuple[Any, ...]
    checkpoint_mapping: Mapping[str, CheckpointWeight]


def check_model_prefix(prefix: str) -> None:
    """Checks that keys can start with a prefix.

    Raises:
        ValueError: The prefix is not an identifier.
    """
    if not prefix.isidentifier():
        raise ValueError(f"prefix={prefix!r} must be the name of a model, such as 'unet'.")


def write_lora_file(
    path: str | os.PathLike[str], model_adapters: Mapping[str, ModelAdapter], file_format: str
) -> None:
    """Implements `jlora.diffusers.save_pipeline`."""
    tensors: dict[str, np.ndarray] = {}
    fields: dict[str, Any] = {}
    for prefix, model_adapter in model_adapters.items():
        check_model_prefix(prefix)
        modules, module_names = _convert_lora_modules(model_adapter)
        if file_format == "kohya":
            key_prefix = _kohya_key_prefix(prefix, model_adapters)
            tensors |= _kohya_tensors(key_prefix, modules, module_names)
        else:
            tensors |= _diffusers_tensors(prefix, modules)
            fields |= {
                f"{prefix}.{name}": value
                for name, value in _diffusers_config_fields(modules).items()
            }
    if not tensors:
        raise ValueError("model_adapters={} must have at least one adapter, by its prefix.")
    for key, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(
                f"{key} has NaN or infinite entries, so nothing was written. Save an earlier "
                f"adapter."
            )
    metadata = {"format": "pt"}
    if fields:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(fields, indent=2)
    # NumPy's `ascontiguousarray` would add an axis to a scalar.
    contiguous = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    write_new_safetensors(path, contiguous, metadata)


def _convert_lora_modules(model_adapter: ModelAdapter) -> tuple[list[PeftModule], Sequence[str]]:
    """Returns the modules that an adapter has factors on, and the names of all modules."""
    leaves = check_adapter(model_adapter.adapter)
    if not leaves:
        raise ValueError("The adapter must have LoRA on at least one weight, got no weights.")
    others = [
        f"{leaf.family!r} on {path!r}"
        for path, leaf in leaves.items()
        if leaf.family not in ("lora", "lora_fa", "dylora")
    ]
    if others:
        raise ValueError(
            f"Only LoRA is supported in these files, and the adapter has {format_names(others)}. "
            f"Convert it with jlora.to_lora, or merge it."
        )
    weights = trace_weights(model_adapter.fn, model_adapter.params, *model_adapter.inputs)
    parameters = list_adaptable_modules(weights, model_adapter.checkpoint_mapping)
    peft_adapter = convert_to_peft(
        model_adapter.adapter,
        model_adapter.params,
        weights,
        model_adapter.checkpoint_mapping,
        save_embedding_layers=False,
    )
    for module in peft_adapter.modules:
        reason = unsupported_reason(weights[module.parameter.path], module.parameter)
        if reason is None and module.parameter.module not in parameters:
            reason = "it is not the weight of a module"
        if reason:
            raise ValueError(
                f"{module.parameter.path} cannot be written: {reason}. Leave it out of the "
                f"adapter, or merge it."
            )
    if not peft_adapter.modules:
        raise ValueError("The adapter must have a nonzero factor, got zeros on all weights.")
    return peft_adapter.modules, tuple(parameters)


def _effective_alpha(module: PeftModule) -> float:
    """Returns the alpha for which the scale is `alpha / rank`."""
    alpha, rank = module.fields["lora_alpha"], module.fields["r"]
    return alpha * rank**0.5 if module.fields["use_rslora"] else alpha


def _diffusers_tensors(prefix: str, modules: Sequence[PeftModule]) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.{module.parameter.module}.{suffix}": module.tensors[suffix]
        for module in modules
        for suffix in (_DOWN_SUFFIX, _UP_SUFFIX)
    }


def _diffusers_config_fields(modules: Sequence[PeftModule]) -> dict[str, Any]:
    """Returns the fields from which diffusers builds PEFT's config."""
    names = [module.parameter.module for module in modules]
    ranks = {module.parameter.module: module.fields["r"] for module in modules}
    alphas = {module.parameter.module: _effective_alpha(module) for module in modules}
    return {
        "peft_type": "LORA",
        "r": _most_common_value(ranks),
        "lora_alpha": _most_common_value(alphas),
        "rank_pattern": _build_module_pattern(ranks),
        "alpha_pattern": _build_module_pattern(alphas),
        # Full names, since the model may have modules that the checkpoint mapping lacks.
        "target_modules": names,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
    }


def _most_common_value(values: Mapping[str, float]) -> float:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _build_module_pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Returns a pattern for each module; an empty dict if all modules have the same value.

    PEFT uses the first pattern that a name ends in, so longer ones come first.
    """
    if len(set(values.values())) == 1:
        return {}
    return {name: values[name] for name in sorted(values, key=len, reverse=True)}


def _kohya_key_prefix(prefix: str, model_adapters: Mapping[str, ModelAdapter]) -> str:
    """Returns the prefix of a model in kohya's keys."""
    if prefix not in KOHYA_PREFIXES:
        raise ValueError(
            f"prefix={prefix!r} must be one of {sorted(KOHYA_PREFIXES)} with file_format='kohya'. "
            f"Use file_format='diffusers'."
        )
    has_two_encoders = "text_encoder_2" in model_adapters
    return KOHYA_PREFIXES[prefix][-1 if has_two_encoders else 0]


def _kohya_tensors(
    key_prefix: str, modules: Sequence[PeftModule], module_names: Sequence[str]
) -> dict[str, np.ndarray]:
    by_kohya_name = group_by_kohya_name(module_names)
    tensors = {}
    for module in modules:
        name = to_kohya_name(module.parameter.module)
        if len(by_kohya_name[name]) > 1:
            raise ValueError(
                f"With file_format='kohya', the modules {by_kohya_name[name]} have the same name, "
                f"{key_prefix}_{name}. Use file_format='diffusers'."
            )
        down, up = module.tensors[_DOWN_SUFFIX], module.tensors[_UP_SUFFIX]
        tensors[f"{key_prefix}_{name}.lora_down.weight"] = down
        tensors[f"{key_prefix}_{name}.lora_up.weight"] = up
        tensors[f"{key_prefix}_{name}.alpha"] = np.asarray(_effective_alpha(module), np.float32)
    return tensors
