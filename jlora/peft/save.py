"""Saves an adapter as a PEFT folder."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora._tree import PyTree
from jlora.adapters.base import AdapterLeaf, check_adapter
from jlora.adapters.full import FullDeltaLeaf
from jlora.adapters.lokr import factorization
from jlora.adapters.trainable_tokens import TrainableTokensLeaf
from jlora.checkpoints.safetensors_io import (
    TensorSpec,
    create_folder_atomically,
    format_names,
    write_safetensors,
)
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft.config import CONFIG_NAME
from jlora.peft.load import KEY_PREFIX, SAFETENSORS_WEIGHTS_NAME
from jlora.peft.methods import PEFT_METHODS, PeftMethod
from jlora.peft.modules_to_save import (
    HEAD_NAMES,
    BaseWeights,
    PeftModule,
    embedding_layer_tensors,
    find_head_modules,
    list_module_names,
    modules_to_save_tensors,
    peft_tensor_name,
    select_bias_mode,
    shortest_saved_names,
    trainable_token_tensors,
    trained_bias_tensors,
)
from jlora.peft.tensor_layouts import (
    ModuleParameter,
    WeightGeometry,
    leaf_to_tensor,
    list_module_parameters,
)

TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


class PeftAdapter(NamedTuple):
    """The contents of a PEFT folder.

    Attributes:
        peft_type: PEFT method, such as "LORA".
        modules: Modules with factors of the method.
        extra_tensors: Other tensors, by their names in the file without the common prefix.
        config_fields: Config fields beside those of the modules.
    """

    peft_type: str
    modules: list[PeftModule]
    extra_tensors: dict[str, np.ndarray]
    config_fields: dict[str, Any]


def convert_to_peft(
    adapter: Mapping[str, Any],
    params: PyTree,
    weights: Mapping[str, AdaptableWeight],
    checkpoint_mapping: Mapping[str, CheckpointWeight],
    *,
    save_embedding_layers: bool,
    task_type: str | None = None,
) -> PeftAdapter:
    """Converts an adapter to PEFT's modules and tensors.

    Args:
        adapter: Adapter to convert.
        params: The base that the adapter belongs on.
        weights: Weights of the base, with their kind and axes in the model.
        checkpoint_mapping: Checkpoint tensors of the weights, by path.
        save_embedding_layers: True to include the base's embedding beside an embedding's factors.
        task_type: PEFT task type; None for none. The complete head is included for classification
            tasks, trained or not.

    Raises:
        ValueError: PEFT does not support a part of the adapter.
    """
    leaves = check_adapter(adapter)
    flat = _tree.flatten_with_paths(params)
    base = BaseWeights(
        dict(zip(flat.paths, flat.leaves, strict=True)),
        weights,
        checkpoint_mapping,
        _group_parameters_by_path(checkpoint_mapping),
    )
    unknown = [path for path in leaves if path not in base.parameters]
    if unknown:
        raise ValueError(
            f"The adapter has {format_names(unknown)}, which is not in the checkpoint mapping of "
            f"the model. Pass the model that the adapter was trained on."
        )
    full_leaves = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, FullDeltaLeaf)}
    token_leaves = {
        path: leaf for path, leaf in leaves.items() if isinstance(leaf, TrainableTokensLeaf)
    }
    method_leaves = {
        path: leaf for path, leaf in leaves.items() if path not in {*full_leaves, *token_leaves}
    }
    peft_type = _select_peft_type(method_leaves)
    method = PEFT_METHODS[peft_type]
    modules = [
        module
        for path, leaf in method_leaves.items()
        for module in _split_leaf_into_modules(method, leaf, weights[path], base.parameters[path])
    ]
    if not modules:
        raise ValueError(
            "The adapter must have factors of a PEFT method, got only fully trained weights. Save "
            "them as a merged checkpoint, with jlora.merge and jlora.models.save."
        )
    _check_ia3_biases(modules, base)
    target_modules = {module.parameter.module for module in modules}
    # A saved module includes its bias, so these are the biases of the other modules.
    trained_modules = {
        parameter.module
        for path in full_leaves
        if weights[path].kind != "bias"
        for parameter in base.parameters[path]
    }
    heads = find_head_modules(task_type, target_modules, base)
    saved_modules = trained_modules | heads
    bias_leaves = {
        path: leaf
        for path, leaf in full_leaves.items()
        if not {parameter.module for parameter in base.parameters[path]} <= saved_modules
    }
    if bias_leaves and not method.supports_bias:
        raise ValueError(
            f"PEFT's {peft_type} does not support trained biases, and this adapter has "
            f"{format_names(sorted(bias_leaves))}. Merge it, or do not train the biases."
        )
    fields: dict[str, Any] = {}
    if saved_modules:
        names = shortest_saved_names(trained_modules - heads, list_module_names(checkpoint_mapping))
        fields["modules_to_save"] = [*names, *(HEAD_NAMES if heads else ())]
    if bias_leaves:
        fields["bias"] = select_bias_mode(bias_leaves, target_modules, saved_modules, base)
    if token_leaves:
        fields["trainable_token_indices"] = {
            base.parameters[path][0].module.rpartition(".")[2]: list(leaf.token_indices)
            for path, leaf in token_leaves.items()
        }
    extra_tensors = {
        **_shared_peft_tensors(method, adapter, method_leaves),
        **modules_to_save_tensors(saved_modules, full_leaves, base),
        **trained_bias_tensors(bias_leaves, target_modules, base),
        **trainable_token_tensors(token_leaves, base),
        **(embedding_layer_tensors(modules, base) if save_embedding_layers else {}),
    }
    return PeftAdapter(peft_type, modules, extra_tensors, fields)


def write_peft_folder(
    folder: str | os.PathLike[str],
    peft_adapter: PeftAdapter,
    module_names: Sequence[str],
    *,
    base_model_name_or_path: str | None,
    task_type: str | None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a new folder.

    Args:
        folder: Path of the new folder.
        peft_adapter: Contents of the folder.
        module_names: Names of all modules of the model, for the shortest unambiguous targets.
        base_model_name_or_path: Name or folder of the base; None for none.
        task_type: PEFT task type; None for none.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: A tensor is not finite, or the modules differ in a field without a pattern.
    """
    method = PEFT_METHODS[peft_adapter.peft_type]
    tensors = {
        peft_tensor_name(peft_adapter.modules, module, suffix): tensor
        for module in peft_adapter.modules
        for suffix, tensor in module.tensors.items()
    }
    tensors |= peft_adapter.extra_tensors
    file_tensors = {
        key if key.startswith("base_model.") else KEY_PREFIX + key: np.ascontiguousarray(value)
        for key, value in tensors.items()
    }
    for key, value in file_tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(
                f"{key} has NaN or infinite entries, so nothing was written. Save an earlier "
                f"adapter."
            )
    config = {
        "peft_type": peft_adapter.peft_type,
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "inference_mode": True,
        **({"bias": "none"} if method.supports_bias else {}),
        "modules_to_save": None,
        **_build_config_fields(method, peft_adapter, module_names),
        **peft_adapter.config_fields,
    }
    with create_folder_atomically(folder) as partial:
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        specs = {key: TensorSpec.from_array(tensor) for key, tensor in file_tensors.items()}
        write_safetensors(
            partial / SAFETENSORS_WEIGHTS_NAME, specs, file_tensors.__getitem__, {"format": "pt"}
        )


def _group_parameters_by_path(
    checkpoint_mapping: Mapping[str, CheckpointWeight],
) -> dict[str, list[ModuleParameter]]:
    by_path: dict[str, list[ModuleParameter]] = {}
    for parameter in list_module_parameters(checkpoint_mapping):
        by_path.setdefault(parameter.path, []).append(parameter)
    return by_path


def _select_peft_type(leaves: Mapping[str, AdapterLeaf]) -> str:
    """Returns the `peft_type` of all leaves.

    Raises:
        ValueError: PEFT does not support a family, or the leaves have different types.
    """
    families = {leaf.family for leaf in leaves.values()}
    peft_types = {
        peft_type for peft_type, method in PEFT_METHODS.items() if families & set(method.families)
    }
    unknown = families - {name for method in PEFT_METHODS.values() for name in method.families}
    if unknown:
        raise ValueError(
            f"PEFT does not support {sorted(unknown)}. Convert the adapter with jlora.to_lora, or "
            f"merge it."
        )
    if len(peft_types) > 1 or (len(families) > 1 and "dora" in families):
        raise ValueError(
            f"A PEFT folder must have one method, and this adapter has {sorted(families)}. Save "
            f"the leaves of each family to a folder of their own."
        )
    residual = [path for path, leaf in leaves.items() if getattr(leaf, "residual", False)]
    if residual:
        raise ValueError(
            f"The adapter on {residual[0]!r} belongs on a base of jlora.residual_base or "
            f"jlora.loftq, which other programs do not have. Convert it with "
            f"jlora.rebase_to_original first."
        )
    return peft_types.pop() if peft_types else "LORA"


def _split_leaf_into_modules(
    method: PeftMethod, leaf: Any, weight: AdaptableWeight, parameters: list[ModuleParameter]
) -> list[PeftModule]:
    """Splits a leaf into the modules of its weight."""
    modules = []
    layouts = method.tensor_layouts(leaf, weight)
    for parameter in parameters:
        stacked_axes = leaf.axes.batch[len(parameter.stack_index) :]
        geometry = WeightGeometry(leaf.shape, leaf.axes, weight.window, stacked_axes)
        values = {
            name: np.asarray(jax.device_get(getattr(leaf, name)[parameter.stack_index]))
            for name in leaf.shapes()
        }
        fields = method.config_fields(leaf)
        if parameter.stack_index and "a" in values and "b" in values and hasattr(leaf, "scale"):
            values, rank = _strip_rank_padding(leaf, values, len(stacked_axes))
            if not rank:
                continue  # A layer that is not adapted.
            use_rslora = getattr(leaf, "use_rslora", False)
            if rank != leaf.rank and method.rank_field and method.alpha_field:
                fields[method.rank_field] = rank
                fields[method.alpha_field] = leaf.scale * (rank**0.5 if use_rslora else rank)
        tensors = {
            suffix: leaf_to_tensor(values[name], layout, geometry)
            for name, (suffix, layout) in layouts.items()
        }
        modules.append(PeftModule(parameter, fields, tensors))
    return modules


def _check_ia3_biases(modules: Sequence[PeftModule], base: BaseWeights) -> None:
    """Checks that IA3 scales no outputs of a module with a bias, which PEFT would scale as well.

    Raises:
        ValueError: It does, and the bias is not zero.
    """
    all_parameters = [p for parameters in base.parameters.values() for p in parameters]
    bias_paths = {p.module: p.path for p in all_parameters if p.name == "bias"}
    for module in modules:
        gains = module.tensors.get("ia3_l")
        path = bias_paths.get(module.parameter.module)
        if gains is None or gains.shape[0] == 1 or not path:
            continue
        if np.asarray(jax.device_get(maybe_dequantize(base.arrays[path]))).any():
            raise ValueError(
                f"PEFT's IA3 scales the bias of {module.parameter.module} with its outputs, and "
                f"jlora's scales only the weight, so the outputs in PEFT would differ. Merge the "
                f"adapter."
            )


def _strip_rank_padding(
    leaf: Any, values: dict[str, np.ndarray], num_stacked_axes: int
) -> tuple[dict[str, np.ndarray], int]:
    """Removes the ranks of one module that are zero in both factors.

    Returns:
        The arrays, and the remaining rank.
    """
    a, b = values["a"], values["b"]
    rank_axis = num_stacked_axes  # Of b; that of a is its last axis.
    a_axes = tuple(range(a.ndim - 1))
    b_axes = tuple(axis for axis in range(b.ndim) if axis != rank_axis)
    is_used = (a != 0).any(axis=a_axes) | (b != 0).any(axis=b_axes)  # (r,)
    if is_used.all() or leaf.family not in ("lora", "dora"):
        return values, leaf.rank
    stripped = {**values, "a": a[..., is_used], "b": b.compress(is_used, axis=rank_axis)}
    return stripped, int(is_used.sum())


def _shared_peft_tensors(
    method: PeftMethod, adapter: Mapping[str, Any], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the tensors that all modules share.

    Raises:
        ValueError: The leaves share arrays of different names.
    """
    if not method.shared_tensors:
        return {}
    names = {leaf.share for leaf in leaves.values()}
    if len(names) > 1:
        raise ValueError(
            f"A PEFT folder must have one set of shared arrays, and this adapter has "
            f"{sorted(names)}. Save the leaves of each set to a folder of their own."
        )
    shared = adapter[names.pop()]
    no_axes = next(iter(leaves.values())).axes._replace(batch=(), inputs=(), outputs=())
    geometry = WeightGeometry((), no_axes, (), ())
    return {
        key: leaf_to_tensor(np.asarray(jax.device_get(getattr(shared, name))), layout, geometry)
        for name, (key, layout) in method.shared_tensors.items()
    }


def _build_config_fields(
    method: PeftMethod, peft_adapter: PeftAdapter, module_names: Sequence[str]
) -> dict[str, Any]:
    """Returns the most common fields of the modules, and patterns for other ranks and alphas.

    Raises:
        ValueError: The modules differ in a field without a pattern.
    """
    modules = peft_adapter.modules
    names = [m.parameter.module for m in modules if m.parameter.name == "weight"]
    experts = sorted(_target_name(m) for m in modules if m.parameter.name != "weight")
    fields: dict[str, Any] = {"target_modules": sorted(_shortest_target_names(names, module_names))}
    if experts:
        targets = _shortest_target_names(experts, experts, num_parts=3)
        fields["target_parameters"] = sorted(targets)
    patterns = {method.rank_field: "rank_pattern", method.alpha_field: "alpha_pattern"}
    for name in modules[0].fields:
        if name == "decompose_factor":
            fields[name] = _find_decompose_factor(modules)
            continue
        counts = collections.Counter(_normalize_number(m.fields[name]) for m in modules)
        common = max(counts, key=lambda value: counts[value])
        by_module = {_target_name(m): m.fields[name] for m in modules}
        fields[name] = next(v for v in by_module.values() if _normalize_number(v) == common)
        others = {m: v for m, v in by_module.items() if _normalize_number(v) != common}
        if not others:
            continue
        if name in patterns:
            fields[patterns[name]] = others
        elif all(isinstance(value, bool) for value in by_module.values()):
            fields[name] = True  # The field applies only to some kinds of modules.
        else:
            raise ValueError(
                f"PEFT has one {name} for all modules, and this adapter has {sorted(counts)}. Save "
                f"the modules of each value to a folder of their own."
            )
    if peft_adapter.peft_type == "IA3":
        feedforward = {m.parameter.module for m in modules if m.tensors["ia3_l"].shape[0] == 1}
        fields["feedforward_modules"] = sorted(_shortest_target_names(sorted(feedforward), names))
    return fields


def _normalize_number(value: Any) -> Any:
    return value if not isinstance(value, float) or value != int(value) else int(value)


def _target_name(module: PeftModule) -> str:
    parameter = module.parameter
    if parameter.name == "weight":
        return parameter.module
    return f"{parameter.module}.{parameter.name}"


def _shortest_target_names(
    selected: Sequence[str], module_names: Sequence[str], num_parts: int = 1
) -> set[str]:
    """Returns the shortest names that PEFT matches with exactly the selected modules."""
    endings = set()
    for name in selected:
        ending = ".".join(name.split(".")[-num_parts:])
        matches = {m for m in module_names if m == ending or m.endswith(f".{ending}")}
        endings.add(ending if matches <= set(selected) else name)
    return endings


def _find_decompose_factor(modules: Sequence[PeftModule]) -> int:
    """Returns the `decompose_factor` that splits all weights as the modules have them.

    Raises:
        ValueError: No factor does.
    """
    splits = {split for module in modules for split in module.fields["decompose_factor"]}
    for factor in (-1, *range(2, 1025)):
        if all(factorization(size, factor) == first for size, first in splits):
            return factor
    raise ValueError(
        "PEFT's LoKr splits all weights by one decompose_factor, and no factor gives the splits of "
        "this adapter. Convert it with jlora.to_lora."
    )
