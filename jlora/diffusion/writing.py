"""Adapters as a file of diffusers or kohya."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.adapters.protocol import check_adapter
from jlora.assigning import weights_of
from jlora.checkpoints.pieces import Weight as Stored
from jlora.checkpoints.tensors import listed, write_new_file
from jlora.diffusion.names import KOHYA, by_flat_name, flat
from jlora.diffusion.reading import METADATA, adaptable, unfit
from jlora.peft.writing import Module, taken_apart

PyTree = Any
_DOWN, _UP = "lora_A.weight", "lora_B.weight"


class Part(NamedTuple):
    """One model's part of a file.

    Attributes:
        adapter: What is written.
        fn: A function of params and inputs.
        params: The base that the adapter belongs on.
        inputs: Example inputs, arrays or shapes.
        stored: Which tensors of diffusers' checkpoint the weights are.
    """

    adapter: Mapping[str, Any]
    fn: Callable[..., Any]
    params: PyTree
    inputs: tuple[Any, ...]
    stored: Mapping[str, Stored]


def check_prefix(prefix: str) -> None:
    """Refuses what no key can begin with.

    Raises:
        ValueError: Names it.
    """
    if not prefix.isidentifier():
        raise ValueError(f"prefix={prefix!r} is no name of a model, such as 'unet'. Give one.")


def write(path: str | os.PathLike[str], parts: Mapping[str, Part], style: str) -> None:
    """See `jlora.diffusion.save_parts`."""
    tensors: dict[str, np.ndarray] = {}
    fields: dict[str, Any] = {}
    for prefix, part in parts.items():
        check_prefix(prefix)
        modules, known = _modules(part)
        if style == "kohya":
            tensors |= _of_kohya(_head(prefix, parts), modules, known)
        else:
            tensors |= _of_diffusers(prefix, modules)
            fields |= {f"{prefix}.{name}": value for name, value in _fields(modules).items()}
    if not tensors:
        raise ValueError("There is no adapter to write. Give one, by its prefix.")
    for key, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(
                f"{key} holds NaN or Inf; nothing was written. Save an earlier adapter."
            )
    metadata = {"format": "pt"}
    if fields:
        metadata[METADATA] = json.dumps(fields, indent=2)
    # Unlike NumPy's `ascontiguousarray` this makes no axis for a number that has none.
    contiguous = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    write_new_file(path, contiguous, metadata)


def _modules(part: Part) -> tuple[list[Module], Sequence[str]]:
    """The modules that an adapter has, and all that its model has."""
    leaves = check_adapter(part.adapter)
    others = {path: leaf.family for path, leaf in leaves.items()}
    others = {p: name for p, name in others.items() if name not in ("lora", "lora_fa", "dylora")}
    if others or not leaves:
        what = listed([f"{name!r} on {path!r}" for path, name in others.items()]) or "nothing"
        raise ValueError(
            f"These files hold LoRA alone, and the adapter has {what}. Convert it with "
            f"jlora.to_lora, or merge it."
        )
    used = weights_of(part.fn, part.params, *part.inputs)
    sites = adaptable(used, part.stored)
    whole = taken_apart(part.adapter, part.params, used, part.stored, embeddings=False)
    for module in whole.modules:
        reason = unfit(used[module.site.path], module.site)
        if reason or module.site.module not in sites:
            raise ValueError(
                f"{module.site.path} cannot be written: {reason or 'it is no weight of a module'}. "
                f"Leave it out of the adapter, or merge it."
            )
    if not whole.modules:
        raise ValueError("The adapter is zero everywhere, and nothing of it is left to write.")
    return whole.modules, tuple(sites)


def _alpha(module: Module) -> float:
    """The alpha that makes `alpha / rank` the scale."""
    alpha, rank = module.fields["lora_alpha"], module.fields["r"]
    return alpha * rank**0.5 if module.fields["use_rslora"] else alpha


# --- diffusers ------------------------------------------------------------------------------------


def _of_diffusers(prefix: str, modules: Sequence[Module]) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.{module.site.module}.{suffix}": module.tensors[suffix]
        for module in modules
        for suffix in (_DOWN, _UP)
    }


def _fields(modules: Sequence[Module]) -> dict[str, Any]:
    """What diffusers makes PEFT's config of."""
    names = [module.site.module for module in modules]
    ranks = {module.site.module: module.fields["r"] for module in modules}
    alphas = {module.site.module: _alpha(module) for module in modules}
    return {
        "peft_type": "LORA",
        "r": _common(ranks),
        "lora_alpha": _common(alphas),
        "rank_pattern": _pattern(ranks),
        "alpha_pattern": _pattern(alphas),
        # Whole names: the model may have more modules than were described here.
        "target_modules": names,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
    }


def _common(values: Mapping[str, float]) -> float:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Every module's value, unless all have one.

    PEFT takes the first pattern that is a name's ending, so longer ones come first.
    """
    if len(set(values.values())) == 1:
        return {}
    return {name: values[name] for name in sorted(values, key=len, reverse=True)}


# --- kohya ----------------------------------------------------------------------------------------


def _head(prefix: str, parts: Mapping[str, Part]) -> str:
    """What kohya's keys of a model begin with."""
    if prefix not in KOHYA:
        raise ValueError(
            f"prefix={prefix!r} has no name in style='kohya', which knows {sorted(KOHYA)}. Use "
            f"style='diffusers'."
        )
    several = "text_encoder_2" in parts
    return KOHYA[prefix][-1 if several else 0]


def _of_kohya(head: str, modules: Sequence[Module], known: Sequence[str]) -> dict[str, np.ndarray]:
    meant = by_flat_name(known)
    tensors = {}
    for module in modules:
        name = flat(module.site.module)
        if len(meant[name]) > 1:
            raise ValueError(
                f"In style='kohya' {meant[name]} have one name, {head}_{name}. Use "
                f"style='diffusers'."
            )
        down, up = module.tensors[_DOWN], module.tensors[_UP]
        tensors[f"{head}_{name}.lora_down.weight"] = down
        tensors[f"{head}_{name}.lora_up.weight"] = up
        tensors[f"{head}_{name}.alpha"] = np.asarray(_alpha(module), np.float32)
    return tensors
