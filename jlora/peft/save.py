"""An adapter as a folder that PEFT reads."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora._tree import PyTree
from jlora.adapters.base import AdapterLeaf, check_adapter
from jlora.adapters.full import FullDeltaLeaf
from jlora.adapters.lokr import factorization
from jlora.adapters.trainable_tokens import TrainableTokensLeaf
from jlora.checkpoints.safetensors_io import create_folder_atomically, format_names
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.peft.config import CONFIG_NAME
from jlora.peft.load import KEY_PREFIX, SAFETENSORS_WEIGHTS_NAME
from jlora.peft.methods import PEFT_METHODS, PeftMethod
from jlora.peft.modules_to_save import (
    _HEAD_NAMES,
    PeftModule,
    _BaseWeights,
    _embedding_layer_tensors,
    _find_head_modules,
    _modules_to_save_tensors,
    _peft_tensor_name,
    _select_bias_mode,
    _shortest_saved_names,
    _trainable_token_tensors,
    _trained_bias_tensors,
    list_module_names,
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
    """Everything that a folder of PEFT's holds.

    Attributes:
        peft_type: Its `peft_type`.
        modules: The method's own parts.
        extra_tensors: Other tensors, by their names in the file without the common prefix.
        config_fields: Of the config, beside those of the modules.
    """

    peft_type: str
    modules: list[PeftModule]
    extra_tensors: dict[str, np.ndarray]
    config_fields: dict[str, Any]


def convert_to_peft(
    adapter: Mapping[str, Any],
    params: PyTree,
    weights: Mapping[str, AdaptableWeight],
    checkpoint_mapping: Mapping[str, Stored],
    *,
    save_embedding_layers: bool,
    task_type: str | None = None,
) -> PeftAdapter:
    """An adapter as PEFT's modules and tensors.

    Args:
        adapter: What is written.
        params: The base that it belongs on.
        weights: Every weight of the base, with how the model uses it.
        checkpoint_mapping: Which tensors of a checkpoint they are.
        save_embedding_layers: Whether to write the base's own table beside the factors of an embedding.
        task_type: PEFT's task type. With those of classification the head is written whole, trained or
            not.

    Raises:
        ValueError: PEFT has no form for a part of it.
    """
    leaves = check_adapter(adapter)
    flat = _tree.flatten_with_paths(params)
    base = _BaseWeights(
        dict(zip(flat.paths, flat.leaves, strict=True)),
        weights,
        checkpoint_mapping,
        _group_parameters_by_path(checkpoint_mapping),
    )
    strange = [path for path in leaves if path not in base.parameters]
    if strange:
        raise ValueError(
            f"The adapter has {format_names(strange)}, which no tensor of a checkpoint is. Give the "
            f"model that it was made for."
        )
    wholes = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, FullDeltaLeaf)}
    rows = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TrainableTokensLeaf)}
    own = {path: leaf for path, leaf in leaves.items() if path not in {*wholes, *rows}}
    kind = _select_peft_type(own)
    form = PEFT_METHODS[kind]
    modules = [
        module
        for path, leaf in own.items()
        for module in _split_leaf_into_modules(form, leaf, weights[path], base.parameters[path])
    ]
    if not modules:
        raise ValueError(
            "The adapter has no part of a method of PEFT's: what is trained whole goes into a "
            "merged checkpoint. Use jlora.merge and jlora.models.save."
        )
    _check_ia3_biases(modules, base)
    targets = {module.parameter.module for module in modules}
    # A module is saved with its bias; what is left are biases alone.
    trained = {s.module for p in wholes if weights[p].kind != "bias" for s in base.parameters[p]}
    heads = _find_head_modules(task_type, targets, base)
    saved = trained | heads
    biases = {p: wholes[p] for p in wholes if not {s.module for s in base.parameters[p]} <= saved}
    if biases and not form.supports_bias:
        raise ValueError(
            f"PEFT's {kind} has no mode for biases, and this adapter has {format_names(sorted(biases))}. "
            f"Merge it, or leave the biases as they are."
        )
    fields: dict[str, Any] = {}
    if saved:
        names = _shortest_saved_names(trained - heads, list_module_names(checkpoint_mapping))
        fields["modules_to_save"] = [*names, *(_HEAD_NAMES if heads else ())]
    if biases:
        fields["bias"] = _select_bias_mode(biases, targets, saved, base)
    if rows:
        fields["trainable_token_indices"] = {
            base.parameters[path][0].module.rpartition(".")[2]: list(leaf.token_indices)
            for path, leaf in rows.items()
        }
    extra = {
        **_shared_peft_tensors(form, adapter, own),
        **_modules_to_save_tensors(saved, wholes, base),
        **_trained_bias_tensors(biases, targets, base),
        **_trainable_token_tensors(rows, base),
        **(_embedding_layer_tensors(modules, base) if save_embedding_layers else {}),
    }
    return PeftAdapter(kind, modules, extra, fields)


def write_peft_folder(
    folder: str | os.PathLike[str],
    peft_adapter: PeftAdapter,
    module_names: Sequence[str],
    *,
    base_model_name_or_path: str | None,
    task_type: str | None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a new folder."""
    form = PEFT_METHODS[peft_adapter.peft_type]
    tensors = {
        _peft_tensor_name(peft_adapter.modules, m, s): t
        for m in peft_adapter.modules
        for s, t in m.tensors.items()
    }
    tensors |= peft_adapter.extra_tensors
    named = {
        key if key.startswith("base_model.") else KEY_PREFIX + key: np.ascontiguousarray(value)
        for key, value in tensors.items()
    }
    for key, value in named.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(
                f"{key} holds NaN or Inf; nothing was written. Save an earlier adapter."
            )
    config = {
        "peft_type": peft_adapter.peft_type,
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "inference_mode": True,
        **({"bias": "none"} if form.supports_bias else {}),
        "modules_to_save": None,
        **_build_config_fields(form, peft_adapter, module_names),
        **peft_adapter.config_fields,
    }
    with create_folder_atomically(folder) as partial:
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        safetensors.numpy.save_file(
            named, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"}
        )


def _group_parameters_by_path(
    checkpoint_mapping: Mapping[str, Stored],
) -> dict[str, list[ModuleParameter]]:
    found: dict[str, list[ModuleParameter]] = {}
    for site in list_module_parameters(checkpoint_mapping):
        found.setdefault(site.path, []).append(site)
    return found


def _select_peft_type(leaves: Mapping[str, AdapterLeaf]) -> str:
    """The one `peft_type` of all leaves."""
    families = {leaf.family for leaf in leaves.values()}
    kinds = {kind for kind, form in PEFT_METHODS.items() if families & set(form.families)}
    unknown = families - {f for form in PEFT_METHODS.values() for f in form.families}
    if unknown:
        raise ValueError(
            f"PEFT has nothing like {sorted(unknown)}. Convert the adapter with jlora.to_lora, or "
            f"merge it."
        )
    if len(kinds) > 1 or (len(families) > 1 and "dora" in families):
        raise ValueError(
            f"One folder of PEFT's holds one method, and this adapter has {sorted(families)}. Save "
            f"each part of it apart."
        )
    rest = [path for path, leaf in leaves.items() if getattr(leaf, "residual", False)]
    if rest:
        raise ValueError(
            f"The adapter on {rest[0]!r} belongs on a base of jlora.residual_base or jlora.loftq, "
            f"which no reader of these files has. Convert it with jlora.rebase_to_original first."
        )
    return kinds.pop() if kinds else "LORA"


def _split_leaf_into_modules(
    method: PeftMethod, leaf: Any, weight: AdaptableWeight, parameters: list[ModuleParameter]
) -> list[PeftModule]:
    """A leaf as its modules."""
    found = []
    shapes = leaf.shapes()
    layouts = method.tensor_layouts(leaf, weight)
    for site in parameters:
        inside = leaf.axes.batch[len(site.stack_index) :]
        facts = WeightGeometry(leaf.shape, leaf.axes, weight.window, inside)
        values = {
            name: np.asarray(jax.device_get(getattr(leaf, name)[site.stack_index]))
            for name in shapes
        }
        fields = method.config_fields(leaf)
        if site.stack_index and "a" in values and "b" in values and hasattr(leaf, "scale"):
            values, rank = _strip_rank_padding(leaf, values, len(inside))
            if not rank:
                continue  # A layer that was not adapted.
            root = getattr(leaf, "use_rslora", False)
            if rank != leaf.rank and method.rank_field and method.alpha_field:
                fields[method.rank_field] = rank
                fields[method.alpha_field] = leaf.scale * (rank**0.5 if root else rank)
        tensors = {
            suffix: leaf_to_tensor(values[name], layout, facts)
            for name, (suffix, layout) in layouts.items()
        }
        found.append(PeftModule(site, fields, tensors))
    return found


def _check_ia3_biases(modules: Sequence[PeftModule], base: _BaseWeights) -> None:
    """Refuses gains on the outputs of modules with a bias, which PEFT would scale too."""
    every = [site for some in base.parameters.values() for site in some]
    biases = {site.module: site.path for site in every if site.name == "bias"}
    for module in modules:
        gains = module.tensors.get("ia3_l")
        path = biases.get(module.parameter.module)
        outputs = gains is not None and gains.shape[0] != 1
        if (
            outputs
            and path
            and np.asarray(jax.device_get(maybe_dequantize(base.arrays[path]))).any()
        ):
            raise ValueError(
                f"PEFT's IA3 scales the bias of {module.parameter.module} with its outputs, and jlora's "
                f"scales the weight alone, so PEFT would compute something else. Merge the adapter."
            )


def _strip_rank_padding(
    leaf: Any, values: dict[str, np.ndarray], num_stacked_axes: int
) -> tuple[dict[str, np.ndarray], int]:
    """One module's factors without the ranks that are zero on both sides, and how many are left."""
    a, b = values["a"], values["b"]
    over_a = tuple(range(a.ndim - 1))
    over_b = tuple(axis for axis in range(b.ndim) if axis != num_stacked_axes)
    kept = (a != 0).any(axis=over_a) | (b != 0).any(axis=over_b)
    if kept.all() or leaf.family not in ("lora", "dora"):
        return values, leaf.rank
    return {**values, "a": a[..., kept], "b": b.compress(kept, axis=num_stacked_axes)}, int(
        kept.sum()
    )


def _shared_peft_tensors(
    method: PeftMethod, adapter: Mapping[str, Any], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """What the modules share."""
    if not method.shared_tensors:
        return {}
    names = {leaf.share for leaf in leaves.values()}
    if len(names) > 1:
        raise ValueError(
            f"The adapter shares arrays under {sorted(names)}, and one folder of PEFT's has room "
            f"for one set. Save each part of it apart."
        )
    shared = adapter[names.pop()]
    nothing = WeightGeometry(
        (), next(iter(leaves.values())).axes._replace(batch=(), inputs=(), outputs=()), (), ()
    )
    return {
        key: leaf_to_tensor(np.asarray(jax.device_get(getattr(shared, name))), layout, nothing)
        for name, (key, layout) in method.shared_tensors.items()
    }


def _build_config_fields(
    method: PeftMethod, peft_adapter: PeftAdapter, module_names: Sequence[str]
) -> dict[str, Any]:
    """The fields that the modules agree on, and patterns for the rank and alpha of the others."""
    names = [m.parameter.module for m in peft_adapter.modules if m.parameter.name == "weight"]
    joined = {f"{m.parameter.module}.{m.parameter.name}" for m in peft_adapter.modules} - {
        f"{name}.weight" for name in names
    }
    fields: dict[str, Any] = {"target_modules": sorted(_shortest_target_names(names, module_names))}
    if joined:
        fields["target_parameters"] = sorted(
            _shortest_target_names(sorted(joined), sorted(joined), num_parts=3)
        )
    patterns = {method.rank_field: "rank_pattern", method.alpha_field: "alpha_pattern"}
    for name in peft_adapter.modules[0].fields:
        if name == "decompose_factor":
            fields[name] = _find_decompose_factor(peft_adapter.modules)
            continue
        values = collections.Counter(
            _normalize_number(m.fields[name]) for m in peft_adapter.modules
        )
        common = max(values, key=lambda value: values[value])
        by_module = {_target_name(m): m.fields[name] for m in peft_adapter.modules}
        fields[name] = next(v for v in by_module.values() if _normalize_number(v) == common)
        others = {m: v for m, v in by_module.items() if _normalize_number(v) != common}
        if not others:
            continue
        if name in patterns:
            fields[patterns[name]] = others
        elif all(isinstance(value, bool) for value in by_module.values()):
            fields[name] = True  # What is only said of some kinds of module.
        else:
            raise ValueError(
                f"PEFT has one {name} for all modules, and this adapter has {sorted(values)}. Save "
                f"the parts that agree apart."
            )
    if peft_adapter.peft_type == "IA3":
        sides = {
            m.parameter.module for m in peft_adapter.modules if m.tensors["ia3_l"].shape[0] == 1
        }
        fields["feedforward_modules"] = sorted(_shortest_target_names(sorted(sides), names))
    return fields


def _normalize_number(value: Any) -> Any:
    return value if not isinstance(value, float) or value != int(value) else int(value)


def _target_name(module: PeftModule) -> str:
    site = module.parameter
    return site.module if site.name == "weight" else f"{site.module}.{site.name}"


def _shortest_target_names(
    selected: Sequence[str], module_names: Sequence[str], num_parts: int = 1
) -> set[str]:
    """The shortest list of endings that names just the modules chosen."""
    endings = set()
    for name in selected:
        ending = ".".join(name.split(".")[-num_parts:])
        like = {m for m in module_names if m == ending or m.endswith(f".{ending}")}
        endings.add(ending if like <= set(selected) else name)
    return endings


def _find_decompose_factor(modules: Sequence[PeftModule]) -> int:
    """The `decompose_factor` that splits all weights as the modules have them."""
    splits = {split for module in modules for split in module.fields["decompose_factor"]}
    for factor in (-1, *range(2, 1025)):
        if all(factorization(size, factor) == first for size, first in splits):
            return factor
    raise ValueError(
        "PEFT splits all weights of a LoKr by one factor, and no factor makes the splits that this "
        "adapter has. Convert it with jlora.to_lora."
    )
