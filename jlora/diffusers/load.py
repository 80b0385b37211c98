"""Loads a LoRA file of diffusers or kohya as an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints.safetensors_io import (
    FLOAT_DTYPES,
    format_names,
    open_safetensors,
    read_finite_tensor,
)
from jlora.checkpoints.text_files import name_file_in_errors, parse_json
from jlora.diffusers.keys import KeyParser, TensorRole
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft import config
from jlora.peft.leaf_conversion import ErrorFactory, ModuleTensors, leaf_from_modules
from jlora.peft.methods import PEFT_METHODS
from jlora.peft.name_patterns import share_steps
from jlora.peft.tensor_layouts import ModuleParameter, list_module_parameters

# Key of the fields of PEFT's config in the metadata of diffusers.
LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Some converters write an integer alpha as an integer tensor.
_ALPHA_DTYPES = (*FLOAT_DTYPES, "F64", "I64", "I32")


@share_steps()
def load_lora_file(
    path: str | os.PathLike[str],
    weights: Mapping[str, AdaptableWeight],
    checkpoint_mapping: Mapping[str, CheckpointWeight],
    prefix: str,
) -> dict[str, Any]:
    """Implements `jlora.diffusers.load`.

    Args:
        path: Path of the file.
        weights: Weights of the base, with their kind and axes in the model.
        checkpoint_mapping: Checkpoint tensors of the weights, by path.
        prefix: Prefix of the model in the file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or does not fit the model.
    """
    path = Path(path)

    def make_error(reason: str) -> ValueError:
        return ValueError(f"{path}: {reason} Use an unmodified file for this model.")

    with name_file_in_errors(path):
        parameters = list_adaptable_modules(weights, checkpoint_mapping)
        key_parser = KeyParser(prefix, parameters, make_error)
        module_tensors, fields = _read_lora_modules(path, key_parser, prefix, make_error)
        by_path: dict[str, list[ModuleTensors]] = {}
        for module, tensors in module_tensors.items():
            parameter = parameters[module]
            weight = weights[parameter.path]
            reason = unsupported_reason(weight, parameter)
            if reason:
                raise make_error(f"{module} cannot be adapted: {reason}.")
            by_path.setdefault(parameter.path, []).append(
                _make_module_tensors(parameter, weight, tensors, fields, make_error)
            )
        if fields:
            config.check_rank_patterns(fields, PEFT_METHODS["LORA"], parameters)
        method = PEFT_METHODS["LORA"]
        return {
            path: leaf_from_modules(method, weights[path], modules, make_error)
            for path, modules in by_path.items()
        }


def list_adaptable_modules(
    weights: Mapping[str, AdaptableWeight], checkpoint_mapping: Mapping[str, CheckpointWeight]
) -> dict[str, ModuleParameter]:
    """Returns the weight parameter of each module that is one tensor, by module.

    Raises:
        ValueError: `checkpoint_mapping` has a path that is not in the parameters.
    """
    unknown = [path for path in checkpoint_mapping if path not in weights]
    if unknown:
        raise ValueError(
            f"checkpoint_mapping has {format_names(unknown)}, which params does not have. Leave "
            f"them out."
        )
    return {
        parameter.module: parameter
        for parameter in list_module_parameters(checkpoint_mapping)
        if parameter.name == "weight" and parameter.tensor_slice
    }


def unsupported_reason(weight: AdaptableWeight, parameter: ModuleParameter) -> str | None:
    """Returns the reason that these files do not support LoRA on a weight; None if they do."""
    if weight.kind not in ("linear", "convolution"):
        return f"its kind is {weight.kind}, and these files support linear and convolution"
    if len(weight.axes.batch) > len(parameter.stack_index):
        return f"its tensor is a batch of weights along the axes {weight.axes.batch}"
    return None


def _read_lora_modules(
    path: Path, key_parser: KeyParser, prefix: str, make_error: ErrorFactory
) -> tuple[dict[str, dict[TensorRole, np.ndarray]], dict[str, Any] | None]:
    """Returns the tensors of each module, and the config fields of the metadata, if any."""
    if path.suffix in _PICKLE_SUFFIXES:
        raise ValueError(
            f"{path} is not opened, since files that end in {path.suffix} can run code. Load it in "
            f"the program that wrote it and save it as safetensors."
        )
    module_tensors: dict[str, dict[TensorRole, np.ndarray]] = {}
    with open_safetensors(path) as file:
        keys = list(file.keys())
        model_keys = [key for key in keys if key_parser.matches(key)]
        if not model_keys:
            others = sorted({key.partition(".")[0] for key in keys})
            raise make_error(
                f"it has no tensor for prefix={prefix!r}; the prefixes of its keys are "
                f"{format_names(others) or 'none'}."
            )
        for key in model_keys:
            module, role = key_parser.parse(key)
            tensors = module_tensors.setdefault(module, {})
            if role in tensors:
                raise make_error(f"{key} must be the only tensor for {role} of {module}.")
            dtypes = _ALPHA_DTYPES if role == "alpha" else tuple(FLOAT_DTYPES)
            tensors[role] = read_finite_tensor(file, key, path, dtypes)
        metadata = dict(file.metadata() or {})
    fields = _parse_adapter_metadata(
        path, metadata.get(LORA_ADAPTER_METADATA_KEY), prefix, make_error
    )
    if fields and any("alpha" in tensors for tensors in module_tensors.values()):
        raise make_error("it must have alpha in its metadata or in tensors, got both.")
    return module_tensors, fields


def _parse_adapter_metadata(
    path: Path, metadata: str | None, prefix: str, make_error: ErrorFactory
) -> dict[str, Any] | None:
    """Returns the fields of PEFT's config for this model; None if the metadata has none."""
    if metadata is None:
        return None
    content = parse_json(metadata, f"{path}: {LORA_ADAPTER_METADATA_KEY} in its metadata")
    if not isinstance(content, dict):
        raise make_error(f"its metadata {LORA_ADAPTER_METADATA_KEY} must contain a JSON object.")
    start = f"{prefix}."
    raw = {k.removeprefix(start): value for k, value in content.items() if k.startswith(start)}
    if not raw:
        return None
    fields, method = config.validate_config(path, {"peft_type": "LORA", **raw})
    if method is not PEFT_METHODS["LORA"] or fields["use_dora"]:
        raise make_error(
            f"the method in its metadata is "
            f"{'DoRA' if fields.get('use_dora') else raw['peft_type']}, and only LoRA is supported "
            f"in these files."
        )
    return fields


def _make_module_tensors(
    parameter: ModuleParameter,
    weight: AdaptableWeight,
    tensors: Mapping[TensorRole, np.ndarray],
    fields: Mapping[str, Any] | None,
    make_error: ErrorFactory,
) -> ModuleTensors:
    """Checks one module's factors against its weight, and adds its rank and alpha."""
    missing = [role for role in ("down", "up") if role not in tensors]
    if missing:
        raise make_error(f"{parameter.module} lacks {' and '.join(missing)}.")
    down, up = tensors["down"], tensors["up"]
    method = PEFT_METHODS["LORA"]
    inputs, window, outputs = _torch_weight_sizes(weight)
    _check_factor_shape(
        f"down of {parameter.module}", down.shape, (None, inputs, *window), make_error
    )
    _check_factor_shape(
        f"up of {parameter.module}", up.shape, (outputs, None, *[1] * len(window)), make_error
    )
    rank = down.shape[0]
    if rank < 1 or up.shape[1] != rank:
        raise make_error(
            f"{parameter.module} must have one rank, got ranks {rank} in down and {up.shape[1]} in "
            f"up."
        )
    if fields is None:
        module_fields = {
            **method.defaults,
            "lora_alpha": _parse_alpha(parameter.module, tensors.get("alpha"), rank, make_error),
        }
    else:
        module_fields = config.fields_for_module(fields, method, parameter.module)
        if module_fields["r"] != rank:
            raise make_error(
                f"{parameter.module} has rank {rank}, and the metadata has r={module_fields['r']}."
            )
    module_fields["r"] = rank
    return ModuleTensors(parameter, module_fields, {"lora_A.weight": down, "lora_B.weight": up})


def _torch_weight_sizes(weight: AdaptableWeight) -> tuple[int, list[int], int]:
    """Returns the input size, the window and the output size of the weight's torch tensor."""
    window = [weight.shape[axis] for axis in weight.window]
    return math.prod(weight.shape[axis] for axis in weight.channel_axes), window, weight.fan_out


def _check_factor_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int | None, ...], make_error: ErrorFactory
) -> None:
    """Checks that a shape is the expected one, in which None is the rank."""

    def fits(sizes: tuple[int, ...]) -> bool:
        pairs = zip(sizes, expected, strict=False)
        return len(sizes) == len(expected) and all(b in (a, None) for a, b in pairs)

    if not fits(shape):
        expected_shape = tuple("rank" if size is None else size for size in expected)
        hint = " It looks transposed." if fits(shape[::-1]) else ""
        raise make_error(f"{name} has shape {shape} instead of {expected_shape}.{hint}")


def _parse_alpha(
    module: str, tensor: np.ndarray | None, rank: int, make_error: ErrorFactory
) -> float:
    """Returns a module's alpha; the rank if the file has no alpha."""
    if tensor is None:
        return float(rank)
    if tensor.size != 1:
        raise make_error(f"alpha of {module} must be one number, got shape {tensor.shape}.")
    alpha = float(tensor.reshape(()))
    if alpha <= 0:
        raise make_error(f"alpha of {module} must be positive, got {alpha}.")
    return alpha
