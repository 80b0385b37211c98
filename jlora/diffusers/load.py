"""A file of diffusers or kohya as an adapter."""

from __future__ import annotations

import json
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
from jlora.diffusers.keys import KeyParser, TensorRole
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.peft import config as configs
from jlora.peft.leaf_conversion import ErrorFactory, ModuleTensors, leaf_from_modules
from jlora.peft.methods import PEFT_METHODS
from jlora.peft.tensor_layouts import ModuleParameter, list_module_parameters

LORA_ADAPTER_METADATA_KEY = (
    "lora_adapter_metadata"  # diffusers' name for the fields of PEFT's config.
)

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Where the alpha was a whole number in torch, some converters write it as one.
_ALPHA_DTYPES = (*FLOAT_DTYPES, "F64", "I64", "I32")


def load_lora_file(
    path: str | os.PathLike[str],
    weights: Mapping[str, AdaptableWeight],
    checkpoint_mapping: Mapping[str, Stored],
    prefix: str,
) -> dict[str, Any]:
    """See `jlora.diffusers.load`."""
    path = Path(path)

    def problem(what: str) -> ValueError:
        return ValueError(
            f"{path}: {what} Use a file that was made for this model, as it was written."
        )

    sites = list_adaptable_modules(weights, checkpoint_mapping)
    names = KeyParser(prefix, sites, problem)
    found, fields = _read_lora_modules(path, names, prefix, problem)
    parts: dict[str, list[ModuleTensors]] = {}
    for module, tensors in found.items():
        site = sites[module]
        reason = unsupported_reason(weights[site.path], site)
        if reason:
            raise problem(f"{module} cannot be adapted: {reason}.")
        part = _make_module_tensors(site, weights[site.path], tensors, fields, problem)
        parts.setdefault(site.path, []).append(part)
    if fields:
        configs.check_rank_patterns(fields, found)
    form = PEFT_METHODS["LORA"]
    return {
        path: leaf_from_modules(form, weights[path], some, problem) for path, some in parts.items()
    }


def list_adaptable_modules(
    weights: Mapping[str, AdaptableWeight], checkpoint_mapping: Mapping[str, Stored]
) -> dict[str, ModuleParameter]:
    """The modules with a weight of their own, by name.

    Raises:
        ValueError: `checkpoint_mapping` has a path that params has not.
    """
    strange = [path for path in checkpoint_mapping if path not in weights]
    if strange:
        raise ValueError(
            f"stored has {format_names(strange)}, which params has not. Leave them out."
        )
    found = [
        site
        for site in list_module_parameters(checkpoint_mapping)
        if site.name == "weight" and site.tensor_slice
    ]
    return {site.module: site for site in found}


def unsupported_reason(weight: AdaptableWeight, parameter: ModuleParameter) -> str | None:
    """Why these files have no LoRA for a weight; None when they have."""
    if weight.kind not in ("linear", "convolution"):
        return f"it is of the kind {weight.kind}, and these files know linear and convolution"
    if len(weight.axes.batch) > len(parameter.stack_index):
        return f"its tensor is a batch of weights along the axes {weight.axes.batch}"
    return None


def _read_lora_modules(
    path: Path, key_parser: KeyParser, prefix: str, make_error: ErrorFactory
) -> tuple[dict[str, dict[TensorRole, np.ndarray]], dict[str, Any] | None]:
    """The tensors of each module, and what the metadata says of all."""
    if path.suffix in _PICKLE_SUFFIXES:
        raise ValueError(
            f"{path} is not opened, since files that end in {path.suffix} can run code. Load it in "
            f"the program that wrote it and save it as safetensors."
        )
    found: dict[str, dict[TensorRole, np.ndarray]] = {}
    with open_safetensors(path) as file:
        keys = list(file.keys())
        own = [key for key in keys if key_parser.matches(key)]
        if not own:
            others = sorted({key.partition(".")[0] for key in keys})
            raise make_error(
                f"it has no tensor for prefix={prefix!r}; its keys begin with "
                f"{format_names(others) or 'nothing'}."
            )
        for key in own:
            module, role = key_parser.parse(key)
            tensors = found.setdefault(module, {})
            if role in tensors:
                raise make_error(f"{key} is not the only tensor that is {role} of {module}.")
            dtypes = _ALPHA_DTYPES if role == "alpha" else tuple(FLOAT_DTYPES)
            tensors[role] = read_finite_tensor(file, key, path, dtypes)
        metadata = dict(file.metadata() or {})
    fields = _parse_adapter_metadata(
        path, metadata.get(LORA_ADAPTER_METADATA_KEY), prefix, make_error
    )
    if fields and any("alpha" in tensors for tensors in found.values()):
        raise make_error("it says alpha in its metadata and in tensors too.")
    return found, fields


def _parse_adapter_metadata(
    path: Path, metadata: str | None, prefix: str, make_error: ErrorFactory
) -> dict[str, Any] | None:
    """The fields of PEFT's config that the metadata has for this model."""
    if metadata is None:
        return None
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise make_error(
            f"its metadata {LORA_ADAPTER_METADATA_KEY} is not JSON ({error})."
        ) from error
    if not isinstance(content, dict):
        raise make_error(f"its metadata {LORA_ADAPTER_METADATA_KEY} holds no JSON object.")
    start = f"{prefix}."
    own = {k.removeprefix(start): value for k, value in content.items() if k.startswith(start)}
    if not own:
        return None
    fields, form = configs.validate_config(path, {"peft_type": "LORA", **own})
    if form is not PEFT_METHODS["LORA"] or fields["use_dora"]:
        raise make_error(
            f"its metadata speak of {'DoRA' if fields.get('use_dora') else own['peft_type']}, and "
            f"LoRA alone is read from these files."
        )
    return fields


def _make_module_tensors(
    parameter: ModuleParameter,
    weight: AdaptableWeight,
    tensors: Mapping[TensorRole, np.ndarray],
    fields: Mapping[str, Any] | None,
    make_error: ErrorFactory,
) -> ModuleTensors:
    """One module's factors with its rank and alpha, after checking them against the weight."""
    missing = [role for role in ("down", "up") if role not in tensors]
    if missing:
        raise make_error(f"{parameter.module} lacks {' and '.join(missing)}.")
    down, up = tensors["down"], tensors["up"]
    form = PEFT_METHODS["LORA"]
    inputs, window, outputs = _torch_weight_sizes(weight)
    _check_factor_shape(
        f"down of {parameter.module}", down.shape, (None, inputs, *window), make_error
    )
    _check_factor_shape(
        f"up of {parameter.module}", up.shape, (outputs, None, *[1] * len(window)), make_error
    )
    rank = down.shape[0]
    if rank < 1 or up.shape[1] != rank:
        raise make_error(f"{parameter.module} has ranks {rank} in down and {up.shape[1]} in up.")
    if fields is None:
        own = {
            **form.defaults,
            "lora_alpha": _parse_alpha(parameter.module, tensors.get("alpha"), rank, make_error),
        }
    else:
        own = configs.fields_for_module(fields, form, parameter.module)
        if own["r"] != rank:
            raise make_error(
                f"{parameter.module} has rank {rank}, and by the metadata r={own['r']}."
            )
    own["r"] = rank
    return ModuleTensors(parameter, own, {"lora_A.weight": down, "lora_B.weight": up})


def _torch_weight_sizes(weight: AdaptableWeight) -> tuple[int, list[int], int]:
    """The inputs, the window and the outputs of the weight's tensor in torch."""
    window = [weight.shape[axis] for axis in weight.window]
    return math.prod(weight.shape[axis] for axis in weight.channel_axes), window, weight.fan_out


def _check_factor_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int | None, ...], make_error: ErrorFactory
) -> None:
    """Refuses a shape that is not the expected one, in which None is the rank."""

    def fits(sizes: tuple[int, ...]) -> bool:
        pairs = zip(sizes, expected, strict=False)
        return len(sizes) == len(expected) and all(b in (a, None) for a, b in pairs)

    if not fits(shape):
        wanted = tuple("rank" if size is None else size for size in expected)
        hint = " It looks transposed." if fits(shape[::-1]) else ""
        raise make_error(f"{name} has shape {shape} instead of {wanted}.{hint}")


def _parse_alpha(
    module: str, tensor: np.ndarray | None, rank: int, make_error: ErrorFactory
) -> float:
    """A module's alpha, which is the rank where the file has none."""
    if tensor is None:
        return float(rank)
    if tensor.size != 1:
        raise make_error(f"alpha of {module} has shape {tensor.shape}, and is one number.")
    alpha = float(tensor.reshape(()))
    if alpha <= 0:
        raise make_error(f"alpha of {module} is {alpha}, which is not positive.")
    return alpha
