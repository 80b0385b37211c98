"""Saves an adapter as a PEFT folder."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import types
from collections.abc import Collection, Mapping, Sequence
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
from jlora.peft.config import CONFIG_NAME, TASK_HEADS, build_pattern, build_selector
from jlora.peft.load import (
    HEAD_MODULE,
    KEY_PREFIX,
    SAFETENSORS_WEIGHTS_NAME,
    is_same_table,
)
from jlora.peft.methods import PEFT_METHODS, PeftMethod
from jlora.peft.modules_to_save import (
    BaseWeights,
    PeftModule,
    base_token_tensors,
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
from jlora.peft.tied_weights import TiedPair, head_tensors
from jlora.peft.uniform_fields import unify_fields

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
    tied_modules: Mapping[str, str] = types.MappingProxyType({}),
    is_head_tied: bool | None = None,
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
        tied_modules: Path of the weight that each tied module shares, by module. Such a module gets
            the update of the other module of its weight.
        is_head_tied: Whether the base's config.json ties the head to the embedding, even if the
            head has a weight of its own here; None if that is unknown.

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
    for path, leaf in method_leaves.items():
        _check_weight_support(peft_type, leaf, weights[path], base.parameters[path])
    if token_leaves and peft_type != "LORA":
        raise ValueError(
            f"PEFT's {peft_type} has no trained tokens, and this adapter has them on "
            f"{format_names(sorted(token_leaves))}. Merge that part of the adapter."
        )
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
    tied_pairs = [
        TiedPair(head, base.parameters[path][0])
        for head, path in tied_modules.items()
        if path in leaves
    ]
    for pair in tied_pairs:
        modules += _make_head_modules(pair, modules)
    target_modules = {module.parameter.module for module in modules}
    # A saved module includes its bias, so these are the biases of the other modules.
    trained_modules = {
        parameter.module
        for path in full_leaves
        for parameter in base.parameters[path]
        if parameter.name != "bias"
    }
    tied_heads = {
        pair.head: pair.embedding for pair in tied_pairs if pair.embedding.module in trained_modules
    }
    trained_modules |= set(tied_heads)
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
    has_tied_uses = _check_tied_uses(
        {**method_leaves, **full_leaves}, weights, {pair.embedding.path for pair in tied_pairs}
    )
    is_pair_adapted = any(pair.embedding.path not in token_leaves for pair in tied_pairs)
    if peft_type == "LORA" and (is_pair_adapted or has_tied_uses):
        fields["ensure_weight_tying"] = True
    if saved_modules:
        module_names = [*list_module_names(checkpoint_mapping), *tied_modules]
        names = shortest_saved_names(trained_modules - heads, module_names)
        fields["modules_to_save"] = [*names, *(TASK_HEADS[str(task_type)] if heads else ())]
    if bias_leaves:
        fields["bias"] = select_bias_mode(bias_leaves, target_modules, saved_modules, base)
    if token_leaves:
        fields["trainable_token_indices"] = {
            base.parameters[path][0].module.rpartition(".")[2]: list(leaf.token_indices)
            for path, leaf in token_leaves.items()
        }
    head_tokens = _select_head_tokens(leaves, token_leaves, base, is_head_tied)
    if head_tokens:
        fields["trainable_token_indices"][HEAD_MODULE] = head_tokens
    extra_tensors = {
        **_shared_peft_tensors(method, adapter, method_leaves),
        **modules_to_save_tensors(saved_modules, full_leaves, base, tied_heads),
        **trained_bias_tensors(bias_leaves, target_modules, base),
        **trainable_token_tensors(token_leaves, base),
        **base_token_tensors(HEAD_MODULE, head_tokens, base),
        **(embedding_layer_tensors(modules, base) if save_embedding_layers else {}),
    }
    return PeftAdapter(peft_type, modules, extra_tensors, fields)


def write_peft_folder(
    folder: str | os.PathLike[str],
    peft_adapter: PeftAdapter,
    target_names: Sequence[str],
    *,
    base_model_name_or_path: str | None,
    task_type: str | None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a new folder.

    Args:
        folder: Path of the new folder.
        peft_adapter: Contents of the folder.
        target_names: Names of all modules of the model, and of parameters of experts, for the
            shortest unambiguous targets.
        base_model_name_or_path: Name or folder of the base; None for none.
        task_type: PEFT task type; None for none.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: A tensor is not finite, or the modules differ in a field without a pattern.
    """
    method = PEFT_METHODS[peft_adapter.peft_type]
    parameter_modules = _modules_of_parameters(peft_adapter, target_names)
    modules = unify_fields(
        peft_adapter.peft_type, peft_adapter.modules, has_parameters=bool(parameter_modules)
    )
    fields = _build_config_fields(method, modules, target_names, parameter_modules)
    if peft_adapter.peft_type == "IA3":
        fields |= _build_feedforward_fields(modules, target_names)
    tensors = {
        peft_tensor_name(modules, module, suffix): tensor
        for module in modules
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
        **fields,
        **peft_adapter.config_fields,
    }
    with create_folder_atomically(folder) as partial:
        # PEFT sorts the fields. The keys inside a pattern have an order of their own.
        text = json.dumps(dict(sorted(config.items())), indent=2)
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


def _check_weight_support(
    peft_type: str, leaf: Any, weight: AdaptableWeight, parameters: Sequence[ModuleParameter]
) -> None:
    """Checks that PEFT can adapt a weight with its method.

    Raises:
        ValueError: It cannot.
    """
    is_mixture = any(p.tensor_slice is None or p.module.endswith(".mlp.gate") for p in parameters)
    if is_mixture and leaf.family not in ("lora", "lora_fa", "dylora"):
        raise ValueError(
            f"PEFT supports only LoRA on experts and routers, and the adapter on {weight.path!r} "
            f"is of the family {leaf.family!r}. Convert it with jlora.to_lora, or merge it."
        )
    for parameter in parameters:
        part = parameter.tensor_slice
        if part and part.slice_sizes[part.num_stack_axes :] != weight.shape[part.num_stack_axes :]:
            raise ValueError(
                f"{weight.path!r} consists of several tensors of the checkpoint, such as "
                f"{part.key}, and its factors are not those of one. Merge the adapter."
            )
    reason = PEFT_METHODS[peft_type].unsupported_reason(weight)
    if reason:
        raise ValueError(f"{reason}. Convert the adapter with jlora.to_lora, or merge it.")


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
        fields = method.config_fields(leaf, weight)
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


def _check_tied_uses(
    leaves: Mapping[str, AdapterLeaf],
    weights: Mapping[str, AdaptableWeight],
    known_paths: Collection[str],
) -> bool:
    """Checks the weights of a function that are both an embedding and the factor of a product.

    Returns:
        Whether there are such weights, beside those at the known paths.

    Raises:
        ValueError: PEFT needs the name of the head to adapt it, which the mapping does not have.
    """
    paths = [
        path
        for path in leaves
        if weights[path].kind == "embedding"
        and "dot_general" in weights[path].primitives
        and path not in known_paths
    ]
    for path in paths:
        if leaves[path].family not in ("lora", "lora_fa", "dylora"):
            raise ValueError(
                f"{path!r} is an embedding and the weight of a head, and PEFT's adapter of family "
                f"{leaves[path].family!r} would change the embedding alone. Use jlora.LoRA on it, "
                f"or merge the adapter."
            )
    return bool(paths)


def _make_head_modules(pair: TiedPair, modules: Sequence[PeftModule]) -> list[PeftModule]:
    """Returns the module of a tied head, if the embedding has factors.

    Raises:
        ValueError: PEFT cannot give the head the update of the embedding.
    """
    heads = []
    for module in modules:
        if module.parameter.module != pair.embedding.module:
            continue
        tensors = head_tensors(module.tensors)
        if tensors is None:
            raise ValueError(
                f"The head shares the weight {pair.embedding.path!r} of the embedding, and PEFT's "
                f"adapters of the two would differ, with {format_names(sorted(module.tensors))}. "
                f"Use jlora.LoRA on that weight, or merge the adapter."
            )
        heads.append(PeftModule(pair.embedding._replace(module=pair.head), module.fields, tensors))
    return heads


def _select_head_tokens(
    leaves: Mapping[str, AdapterLeaf],
    token_leaves: Mapping[str, TrainableTokensLeaf],
    base: BaseWeights,
    is_head_tied: bool | None,
) -> list[int]:
    """Returns tokens to list for a head with a weight of its own, so that PEFT leaves it alone.

    Where config.json ties the head to the embedding, PEFT puts the embedding's tokens into the head
    too, unless the head has other tokens of its own. Those have the values of the base.

    Raises:
        ValueError: The head is adapted, and PEFT cannot add tokens to it.
    """
    heads = [
        parameter
        for parameters in base.parameters.values()
        for parameter in parameters
        if (parameter.module, parameter.name) == (HEAD_MODULE, "weight")
    ]
    if is_head_tied is False or not token_leaves or not heads or heads[0].path in token_leaves:
        return []
    path, leaf = next(iter(token_leaves.items()))
    if heads[0].path in leaves:
        if not is_head_tied and not is_same_table(base.weights, heads[0], base.parameters[path][0]):
            return []
        raise ValueError(
            f"PEFT cannot leave the rows of the head {heads[0].path!r} as they are, which the "
            f"adapter changes, beside trained tokens of {path!r}: config.json of the base ties the "
            f"two. Merge the adapter."
        )
    return [0] if tuple(leaf.token_indices) != (0,) else [1]


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
    if leaf.family == "dora" and not is_used.any():
        is_used[0] = True  # The magnitude alone changes the weight.
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
    if "fan_in" in {field.name for field in dataclasses.fields(shared)}:
        # PEFT's arrays are as large as the largest adapted weight.
        sizes = [leaf.axis_sizes for leaf in leaves.values()]
        fan_in, fan_out = (
            max(math.prod(getattr(one, group)) for one in sizes) for group in ("inputs", "outputs")
        )
        shared = dataclasses.replace(
            shared, a=shared.a[:fan_in], b=shared.b[:, :fan_out], fan_in=fan_in, fan_out=fan_out
        )
    no_axes = next(iter(leaves.values())).axes._replace(batch=(), inputs=(), outputs=())
    geometry = WeightGeometry((), no_axes, (), ())
    return {
        key: leaf_to_tensor(np.asarray(jax.device_get(getattr(shared, name))), layout, geometry)
        for name, (key, layout) in method.shared_tensors.items()
    }


# Modules that PEFT takes for experts or a router, if a model has some. Before transformers 5, the
# modules of experts had the names that those of dense layers have.
_MIXTURE_NAMES = (".gate_proj", ".up_proj", ".down_proj", ".gate")


def _modules_of_parameters(peft_adapter: PeftAdapter, target_names: Sequence[str]) -> set[str]:
    """Returns the modules that are adapted by `target_parameters`, and not by `target_modules`.

    Raises:
        ValueError: PEFT does not support a part of the adapter on such a module.
    """
    if peft_adapter.peft_type != "LORA":
        return set()
    has_experts = any(name.endswith(".experts.down_proj") for name in target_names)
    dense = {
        module.parameter.module
        for module in peft_adapter.modules
        if has_experts and module.parameter.module.endswith(_MIXTURE_NAMES)
    }
    if dense and peft_adapter.modules[0].fields["use_dora"]:
        raise ValueError(
            f"PEFT adapts {format_names(sorted(dense))} as parameters, on which it does not "
            f"support DoRA. Use jlora.LoRA on these weights, or merge the adapter."
        )
    experts = {m.parameter.module for m in peft_adapter.modules if m.parameter.name != "weight"}
    return experts | dense


def _build_config_fields(
    method: PeftMethod,
    modules: Sequence[PeftModule],
    target_names: Sequence[str],
    parameter_modules: Collection[str],
) -> dict[str, Any]:
    """Returns the most common fields of the modules, and patterns for other ranks and alphas.

    Raises:
        ValueError: The modules differ in a field without a pattern.
    """

    def target_name(module: PeftModule) -> str:
        name, parameter = module.parameter.module, module.parameter.name
        return f"{name}.{parameter}" if name in parameter_modules else name

    names = [target_name(m) for m in modules if m.parameter.module not in parameter_modules]
    parameters = [target_name(m) for m in modules if m.parameter.module in parameter_modules]
    fields: dict[str, Any] = {"target_modules": build_selector(names, target_names)}
    if parameters:
        every = [*target_names, *(f"{name}.weight" for name in target_names)]
        fields["target_parameters"] = build_selector(parameters, every, num_parts=3)
    for name in modules[0].fields:
        if name == "decompose_factor":
            fields[name] = _find_decompose_factor(modules)
            continue
        by_module = {target_name(m): _normalize_number(m.fields[name]) for m in modules}
        known = [value for value in by_module.values() if value is not None]
        counts = collections.Counter(known)
        common = max(counts, key=lambda value: counts[value], default=False)
        fields[name] = common
        if len(counts) < 2:
            continue
        if name not in method.patterns:
            raise ValueError(
                f"PEFT has one {name} for all modules, and this adapter has {sorted(counts)}. Save "
                f"the modules of each value to a folder of their own."
            )
        pattern = build_pattern(by_module, common)
        fields[method.patterns[name]] = pattern
        if name == "n_frequency" and any(
            one.endswith(f".{other}") for one in pattern for other in pattern
        ):
            # PEFT finds these keys by another rule: one without a dot before it is not the first.
            raise ValueError(
                f"PEFT cannot tell the n_frequency of {sorted(pattern)} apart, since one name is "
                f"the end of another. Use the same num_frequencies for both."
            )
    return fields


def _build_feedforward_fields(
    modules: Sequence[PeftModule], target_names: Sequence[str]
) -> dict[str, Any]:
    """Returns IA3's lists of modules.

    Each entry of `feedforward_modules` has to be one of `target_modules`, and matches all names
    that end in it, even without a dot before it.
    """
    names = {m.parameter.module for m in modules}
    inputs = {m.parameter.module for m in modules if m.tensors["ia3_l"].shape[0] == 1}
    entries = build_selector(inputs, target_names)
    others = build_selector(names - inputs, target_names)
    if isinstance(entries, str) or any(name.endswith(tuple(entries)) for name in names - inputs):
        entries = "|".join(map(re.escape, sorted(inputs)))
    if isinstance(entries, str) or isinstance(others, str):
        target = build_selector(names, target_names)
    else:
        target = sorted({*entries, *others})
    if isinstance(entries, list) and isinstance(target, str):
        entries = "|".join(map(re.escape, sorted(inputs)))
    return {"target_modules": target, "feedforward_modules": entries}


def _normalize_number(value: Any) -> Any:
    return value if not isinstance(value, float) or value != int(value) else int(value)


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
