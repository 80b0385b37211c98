"""jlora.peft.modules_to_save."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora._quantized_array import maybe_dequantize
from jlora.adapters.trainable_tokens import TrainableTokensLeaf
from jlora.checkpoints.safetensors_io import format_names
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.peft.load import CLASSIFICATION_TASKS, TRAINABLE_TOKENS_SUFFIX
from jlora.peft.tensor_layouts import ModuleParameter, list_module_parameters

# Under the tasks WITH_HEAD PEFT itself trains whole every module of such a name.
_HEAD_NAMES = ("classifier", "score")


class PeftModule(NamedTuple):
    """One module's part of an adapter, as PEFT has it.

    Attributes:
        parameter: The module.
        fields: Its own rank, alpha and so on.
        tensors: By suffix.
    """

    parameter: ModuleParameter
    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]


class _BaseWeights(NamedTuple):
    """The weights that an adapter belongs on, by path.

    Attributes:
        arrays: Their numbers.
        weights: How the model uses them.
        checkpoint_mapping: Which tensors of a checkpoint they are.
        parameters: Which modules' parameters they are.
    """

    arrays: Mapping[str, Any]
    weights: Mapping[str, AdaptableWeight]
    checkpoint_mapping: Mapping[str, Stored]
    parameters: Mapping[str, list[ModuleParameter]]


def list_module_names(checkpoint_mapping: Mapping[str, Stored]) -> list[str]:
    """The modules that these tensors belong to."""
    return list(dict.fromkeys(site.module for site in list_module_parameters(checkpoint_mapping)))


def _peft_tensor_name(modules: Sequence[PeftModule], module: PeftModule, suffix: str) -> str:
    """A tensor's name: of a module whose two parameters are adapted, the first one is inside."""
    site = module.parameter
    both = {m.parameter.name for m in modules if m.parameter.module == site.module}
    inner = len(both) == 2 and site.name == "gate_up_proj"
    return f"{site.module}{'.base_layer' if inner else ''}.{suffix}"


def _is_head_module(module: str) -> bool:
    """Whether PEFT takes a module, or one that it is part of, for the head: by the name's end."""
    return any(part.endswith(_HEAD_NAMES) for part in module.split("."))


def _shortest_saved_names(saved_modules: Collection[str], module_names: Sequence[str]) -> list[str]:
    """The shortest names for `modules_to_save`, of which PEFT compares the ends without a dot.

    It would take "norm" for every layer norm.
    """
    names = set()
    for module in saved_modules:
        parts = module.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        fits = lambda e: {m for m in module_names if m.endswith(e)} <= set(saved_modules)  # noqa: E731
        names.add(next((ending for ending in endings if fits(ending)), module))
    return sorted(names)


def _find_head_modules(
    task_type: str | None, target_modules: set[str], base: _BaseWeights
) -> set[str]:
    """The modules that PEFT trains whole for the task's sake."""
    if task_type not in CLASSIFICATION_TASKS:
        return set()
    heads = {
        module for module in list_module_names(base.checkpoint_mapping) if _is_head_module(module)
    }
    if target_modules & heads:
        raise ValueError(
            f"task={task_type!r}: PEFT trains the head whole under it, and this adapter has a method's "
            f"part on {format_names(sorted(target_modules & heads))}. Leave out the task, or train the head "
            f"with jlora.FullDelta."
        )
    return heads


def _merged_weight(path: str, leaf: Any, base: _BaseWeights) -> np.ndarray:
    """A weight with its difference added, in float32 and rounded to the weight's type."""
    value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[path])))
    delta = np.asarray(jax.device_get(leaf.delta), np.float32)
    return value if not delta.any() else (value.astype(np.float32) + delta).astype(value.dtype)


def _to_checkpoint_tensor(parameter: ModuleParameter, value: np.ndarray) -> np.ndarray:
    if parameter.tensor_slice is None:
        raise ValueError(
            f"{parameter.path} is trained whole, and as experts it has no tensor of its own in PEFT's "
            f"files. Merge the adapter instead."
        )
    ends = zip(
        parameter.tensor_slice.start_indices, parameter.tensor_slice.slice_sizes, strict=True
    )
    return parameter.tensor_slice.to_tensor(
        value[tuple(slice(start, start + n) for start, n in ends)]
    )


def _modules_to_save_tensors(
    saved_modules: Collection[str], full_leaves: Mapping[str, Any], base: _BaseWeights
) -> dict[str, np.ndarray]:
    """All parameters of these modules, trained or not: a module is saved as one."""
    tensors = {}
    for path in base.checkpoint_mapping:
        for site in base.parameters[path]:
            if site.module in saved_modules:
                value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[path])))
                value = (
                    _merged_weight(path, full_leaves[path], base) if path in full_leaves else value
                )
                tensors[f"{site.module}.{site.name}"] = _to_checkpoint_tensor(site, value)
    return tensors


def _select_bias_mode(
    bias_paths: Collection[str],
    target_modules: set[str],
    saved_modules: Collection[str],
    base: _BaseWeights,
) -> str:
    """Which of the two sets of biases that PEFT can train these are."""
    trained = {site.module for path in bias_paths for site in base.parameters[path]}
    every = {s.module for some in base.parameters.values() for s in some if s.name == "bias"}
    every = every.difference(saved_modules)
    if trained == every & target_modules:
        return "lora_only"
    if trained == every:
        return "all"
    raise ValueError(
        f"PEFT trains all biases, or those of adapted modules; this adapter has those of "
        f"{format_names(sorted(trained))}. Train one of these sets, or merge it."
    )


def _trained_bias_tensors(
    bias_leaves: Mapping[str, Any], target_modules: set[str], base: _BaseWeights
) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in bias_leaves.items():
        value = _merged_weight(path, leaf, base)
        for site in base.parameters[path]:
            inner = ".base_layer" if site.module in target_modules else ""
            tensors[f"{site.module}{inner}.bias"] = _to_checkpoint_tensor(site, value)
    return tensors


def _trainable_token_tensors(
    token_leaves: Mapping[str, TrainableTokensLeaf], base: _BaseWeights
) -> dict[str, np.ndarray]:
    """The trained rows of embeddings, as they are."""
    tensors = {}
    for path, leaf in token_leaves.items():
        table = np.asarray(jax.device_get(maybe_dequantize(base.arrays[path])))[
            list(leaf.token_indices)
        ]
        delta = np.asarray(jax.device_get(leaf.delta), np.float32)
        value = (table.astype(np.float32) + delta).astype(table.dtype)
        tensors[f"{base.parameters[path][0].module}.{TRAINABLE_TOKENS_SUFFIX}"] = value
    return tensors


def _embedding_layer_tensors(
    modules: Sequence[PeftModule], base: _BaseWeights
) -> dict[str, np.ndarray]:
    """The tables that PEFT writes beside their factors: of decoders' embeddings and heads."""
    tensors = {}
    for module in modules:
        site = module.parameter
        if site.module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            value = np.asarray(jax.device_get(maybe_dequantize(base.arrays[site.path])))
            tensors[f"{site.module}.base_layer.{site.name}"] = _to_checkpoint_tensor(site, value)
    return tensors
