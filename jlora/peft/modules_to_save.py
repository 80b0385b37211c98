"""Tensors of a PEFT folder beside the factors: fully trained modules, biases, tokens, embeddings.

PEFT calls modules that it trains completely `modules_to_save`. They include the head of a
classification task.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora._quantized_array import maybe_dequantize
from jlora.adapters.trainable_tokens import TrainableTokensLeaf
from jlora.checkpoints.safetensors_io import format_names
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft.config import TASK_HEADS
from jlora.peft.load import TRAINABLE_TOKENS_SUFFIX
from jlora.peft.tensor_layouts import ModuleParameter, list_module_parameters, weight_region


class PeftModule(NamedTuple):
    """The tensors of one module of a PEFT adapter, as written.

    Attributes:
        parameter: Parameter of the module.
        fields: Config fields of the module, such as its rank and alpha.
        tensors: Tensors, by the suffix of their names.
    """

    parameter: ModuleParameter
    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]


class BaseWeights(NamedTuple):
    """The weights of the base, by path.

    Attributes:
        arrays: Values of the weights.
        weights: Kind and axes of the weights, from their use in the model.
        checkpoint_mapping: Checkpoint tensors of the weights.
        parameters: Module parameters of the weights.
    """

    arrays: Mapping[str, Any]
    weights: Mapping[str, AdaptableWeight]
    checkpoint_mapping: Mapping[str, CheckpointWeight]
    parameters: Mapping[str, list[ModuleParameter]]


def list_module_names(checkpoint_mapping: Mapping[str, CheckpointWeight]) -> list[str]:
    """Returns the names of the modules of a checkpoint mapping."""
    parameters = list_module_parameters(checkpoint_mapping)
    return list(dict.fromkeys(parameter.module for parameter in parameters))


def list_target_names(checkpoint_mapping: Mapping[str, CheckpointWeight]) -> list[str]:
    """Returns the names of a mapping's modules, and of the parameters of modules of experts."""
    names = [
        p.module if p.name in ("weight", "bias") else f"{p.module}.{p.name}"
        for p in list_module_parameters(checkpoint_mapping)
    ]
    return list(dict.fromkeys(names))


def list_checkpoint_modules(checkpoint_mapping: Mapping[str, CheckpointWeight]) -> list[str]:
    """Returns the names of a mapping's modules as a checkpoint has them: one for each expert."""
    keys = (part.key for weight in checkpoint_mapping.values() for part in weight.slices)
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))


def peft_tensor_name(modules: Sequence[PeftModule], module: PeftModule, suffix: str) -> str:
    """Returns the name of a tensor in the file, without the common prefix.

    PEFT wraps a module with two adapted parameters twice; the first parameter is the inner one.
    """
    parameter = module.parameter
    names = {m.parameter.name for m in modules if m.parameter.module == parameter.module}
    is_inner = len(names) == 2 and parameter.name == "gate_up_proj"
    return f"{parameter.module}{'.base_layer' if is_inner else ''}.{suffix}"


def _is_head_module(module: str, names: tuple[str, ...]) -> bool:
    """Returns True if PEFT treats a module or one of its parents as a head, by the name's end."""
    return any(part.endswith(names) for part in module.split("."))


def shortest_saved_names(saved_modules: Collection[str], module_names: Sequence[str]) -> list[str]:
    """Returns the shortest names for `modules_to_save` that match no other module.

    PEFT compares the ends of names without a dot, so that "norm" matches every layer norm.
    """

    def is_specific(ending: str) -> bool:
        return {name for name in module_names if name.endswith(ending)} <= set(saved_modules)

    names = set()
    for module in saved_modules:
        parts = module.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        names.add(next((ending for ending in endings if is_specific(ending)), module))
    return sorted(names)


def find_head_modules(
    task_type: str | None, target_modules: set[str], base: BaseWeights
) -> set[str]:
    """Returns the modules that PEFT fully trains because of the task type.

    Raises:
        ValueError: The adapter has factors on such a module.
    """
    if task_type not in TASK_HEADS:
        return set()
    heads = {
        module
        for module in list_module_names(base.checkpoint_mapping)
        if _is_head_module(module, TASK_HEADS[task_type])
    }
    if target_modules & heads:
        raise ValueError(
            f"task_type={task_type!r}: PEFT fully trains the head in this task, and this adapter "
            f"has factors on {format_names(sorted(target_modules & heads))}. Leave out task_type, "
            f"or train the head with jlora.FullDelta."
        )
    return heads


def _merged_weight(path: str, leaf: Any, base: BaseWeights) -> np.ndarray:
    """Returns a weight plus its update, added in float32 and rounded to the weight's dtype."""
    value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[path])))
    delta = np.asarray(jax.device_get(leaf.delta), np.float32)
    return value if not delta.any() else (value.astype(np.float32) + delta).astype(value.dtype)


def _to_checkpoint_tensor(parameter: ModuleParameter, value: np.ndarray) -> np.ndarray:
    if parameter.tensor_slice is None:
        raise ValueError(
            f"{parameter.path} is fully trained. PEFT's files cannot store fully trained experts. "
            f"Merge the adapter instead."
        )
    return parameter.tensor_slice.to_tensor(value[weight_region(parameter.tensor_slice)])


def modules_to_save_tensors(
    saved_modules: Collection[str],
    full_leaves: Mapping[str, Any],
    base: BaseWeights,
    tied_heads: Mapping[str, ModuleParameter],
) -> dict[str, np.ndarray]:
    """Returns all parameters of the saved modules, trained or not: PEFT saves complete modules.

    Args:
        saved_modules: Names of the modules.
        full_leaves: Full updates, by path.
        base: The base.
        tied_heads: Embedding with the weight of each module that has none of its own, by module.
    """
    tensors = {}
    for head, parameter in tied_heads.items():
        value = _merged_weight(parameter.path, full_leaves[parameter.path], base)
        tensors[f"{head}.{parameter.name}"] = _to_checkpoint_tensor(parameter, value)
    for path in base.checkpoint_mapping:
        for parameter in base.parameters[path]:
            if parameter.module in saved_modules:
                if path in full_leaves:
                    value = _merged_weight(path, full_leaves[path], base)
                else:
                    value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[path])))
                name = f"{parameter.module}.{parameter.name}"
                tensors[name] = _to_checkpoint_tensor(parameter, value)
    return tensors


def select_bias_mode(
    bias_paths: Collection[str],
    target_modules: set[str],
    saved_modules: Collection[str],
    base: BaseWeights,
) -> str:
    """Returns the mode of PEFT's `bias` field: "lora_only" or "all".

    Raises:
        ValueError: The trained biases are neither those of the adapted modules nor all.
    """
    trained = {parameter.module for path in bias_paths for parameter in base.parameters[path]}
    all_parameters = [p for parameters in base.parameters.values() for p in parameters]
    with_bias = {p.module for p in all_parameters if p.name == "bias"}.difference(saved_modules)
    if trained == with_bias & target_modules:
        return "lora_only"
    if trained == with_bias:
        return "all"
    raise ValueError(
        f"PEFT trains all biases, or those of the adapted modules, and this adapter has the biases "
        f"of {format_names(sorted(trained))}. Train one of these sets, or merge the adapter."
    )


def trained_bias_tensors(
    bias_leaves: Mapping[str, Any], target_modules: set[str], base: BaseWeights
) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in bias_leaves.items():
        value = _merged_weight(path, leaf, base)
        for parameter in base.parameters[path]:
            wrapper = ".base_layer" if parameter.module in target_modules else ""
            name = f"{parameter.module}{wrapper}.bias"
            tensors[name] = _to_checkpoint_tensor(parameter, value)
    return tensors


def trainable_token_tensors(
    token_leaves: Mapping[str, TrainableTokensLeaf], base: BaseWeights
) -> dict[str, np.ndarray]:
    """Returns the embeddings of the trained tokens: the sum of base and update."""
    tensors = {}
    for path, leaf in token_leaves.items():
        embedding = np.asarray(jax.device_get(maybe_dequantize(base.arrays[path])))
        rows = embedding[list(leaf.token_indices)]  # (tokens, width)
        delta = np.asarray(jax.device_get(leaf.delta), np.float32)
        value = (rows.astype(np.float32) + delta).astype(rows.dtype)
        tensors[f"{base.parameters[path][0].module}.{TRAINABLE_TOKENS_SUFFIX}"] = value
    return tensors


def base_token_tensors(
    module: str, tokens: Sequence[int], base: BaseWeights
) -> dict[str, np.ndarray]:
    """Returns the base's values of tokens, as those of trained tokens; none for no tokens."""
    if not tokens:
        return {}
    (parameter,) = (p for ps in base.parameters.values() for p in ps if p.module == module)
    value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[parameter.path])))
    table = _to_checkpoint_tensor(parameter, value)
    return {f"{module}.{TRAINABLE_TOKENS_SUFFIX}": table[list(tokens)]}


def embedding_layer_tensors(
    modules: Sequence[PeftModule], base: BaseWeights
) -> dict[str, np.ndarray]:
    """Returns the base weights that PEFT writes beside factors on embeddings and LM heads."""
    tensors = {}
    for module in modules:
        parameter = module.parameter
        if parameter.module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[parameter.path])))
            name = f"{parameter.module}.base_layer.{parameter.name}"
            tensors[name] = _to_checkpoint_tensor(parameter, value)
    return tensors
