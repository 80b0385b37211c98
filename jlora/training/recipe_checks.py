"""Checks of a recipe against its base and devices, before any data or weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _tree, models
from jlora._tree import PyTree
from jlora.explain import Explanation
from jlora.models import tokamax_attention
from jlora.models.splash_attention import SPLASH_BLOCK_SIZE
from jlora.optim.offload import check_host_memory
from jlora.training import objectives
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import (
    default_targets,
    frozen_patterns,
    model_from_recipe,
    objective_from_recipe,
    schemes_from_recipe,
)


def check_recipe(recipe: Recipe, folder: Path, devices: Iterable[Any]) -> None:
    """Checks what a recipe asks of its base and of the devices.

    Args:
        recipe: Recipe of a run.
        folder: Folder of the base, of which config.json is read.
        devices: Devices of the mesh.

    Raises:
        FileNotFoundError: The base has no config.json.
        ValueError: A field does not fit the base or the devices; the message names it.
    """
    model = model_from_recipe(recipe, folder)
    if recipe.data.max_seq_length > model.config.max_seq_length:
        raise ValueError(
            f"data.max_seq_length={recipe.data.max_seq_length} must be at most "
            f"{model.config.max_seq_length}, the maximum sequence length of the base."
        )
    devices = list(devices)
    check_attention(recipe, model, devices)
    if recipe.optimizer.offload:
        check_host_memory(devices)
    params = _abstract_params(recipe, model)
    _check_rules(recipe, model, list(_tree.flatten_with_paths(params).paths))
    objective = _make_objective(recipe, model)
    jax.eval_shape(objective.lora.init, jax.random.key(0), params, *objective.example_inputs)


def explain_targets(recipe: Recipe, folder: Path) -> Explanation:
    """Returns the weights of a recipe's base, with the adapter that its rules give to each.

    Args:
        recipe: Recipe, whose data is not read.
        folder: Folder of the base, of which config.json is read.
    """
    model = model_from_recipe(recipe, folder)
    objective = _make_objective(recipe, model)
    return objective.lora.explain(_abstract_params(recipe, model), *objective.example_inputs)


def check_attention(recipe: Recipe, model: Any, devices: Iterable[Any]) -> None:
    """Checks that devices, types and lengths have the attention implementation of a recipe.

    Raises:
        ValueError: They do not.
    """
    implementation = recipe.model.attention_implementation
    field = f"model.attention_implementation={implementation}"
    if implementation in ("auto", "xla"):
        return
    if not isinstance(model, models.Decoder):
        raise ValueError(f"{field} applies only to decoders. Leave it out.")
    platform = "tpu" if implementation == "splash" else "gpu"
    found = sorted({device.platform for device in devices} - {platform})
    if found:
        raise ValueError(
            f"{field} needs devices of the kind {platform}, got {', '.join(found)}. Use auto, for "
            f"the best one of the device, or xla."
        )
    if implementation == "tokamax" and not tokamax_attention.is_installed():
        raise ValueError(
            f'{field} needs tokamax, which is not installed: pip install "jlora[gpu]" on Python '
            f"3.12 or newer. Or use auto, for the best one that there is."
        )
    if implementation in ("cudnn", "tokamax"):
        dtype = recipe.model.compute_dtype or recipe.model.dtype
        if dtype == "float32":
            raise ValueError(
                f"{field} computes in bfloat16 or float16, not in float32. Set "
                f"model.compute_dtype, or use auto."
            )
        has_softcap = getattr(model.config, "attention_softcap", None) is not None
        if implementation == "cudnn" and has_softcap:
            raise ValueError(f"{field} does not support the softcap of this base. Use auto.")
        return
    lengths = [recipe.data.max_seq_length, *(recipe.data.buckets or ())]
    wrong = [length for length in lengths if length % SPLASH_BLOCK_SIZE]
    if wrong:
        raise ValueError(
            f"{field} takes rows whose length is a multiple of {SPLASH_BLOCK_SIZE}, got "
            f"{wrong[0]} in data.max_seq_length or data.buckets. Change that, or use xla."
        )


def _abstract_params(recipe: Recipe, model: Any) -> PyTree:
    dtype = recipe.model.dtype or jnp.bfloat16
    return models.abstract_params(model, dtype, quantize=schemes_from_recipe(recipe, model))


def _make_objective(recipe: Recipe, model: Any) -> objectives.Objective:
    # Weights and rules do not depend on the attention, whose kernels this machine may not have.
    if isinstance(model, models.Decoder):
        model = model.clone(attention_implementation="xla")
    # A new head has no influence on the rules, so that any number of labels will do.
    num_labels = getattr(model.config, "num_labels", None) or 2
    return objective_from_recipe(recipe, model, num_labels)


def _check_rules(recipe: Recipe, model: Any, paths: list[str]) -> None:
    """Checks that every pattern of a recipe decides about a weight."""
    main = recipe.adapter.target_pattern
    targets = {
        **{f"adapters.{n}.target_pattern": r.target_pattern for n, r in enumerate(recipe.adapters)},
        "adapter.target_pattern": main or default_targets(recipe.adapter.family),
    }
    patterns: dict[str, str] = {
        f"frozen_modules.{n}": pattern for n, pattern in enumerate(frozen_patterns(recipe, model))
    }
    for field, target in targets.items():
        assert target is not None
        try:
            patterns[field] = models.find_target_pattern(model, target)
        except ValueError as error:
            raise ValueError(f"{field}: {error} {_LISTING}") from None
    fields: dict[str, str] = {}
    for field, pattern in patterns.items():
        number = field.removeprefix("frozen_modules.")
        is_frozen = number != field
        given = recipe.frozen_modules[int(number)] if is_frozen else targets[field]
        if pattern in fields:
            raise ValueError(
                f"{field}={given!r} has no effect, as {fields[pattern]} has the same weights and "
                f"comes first. Leave one out."
            )
        fields[pattern] = field
        errors = _tree.match_patterns(dict.fromkeys(fields), paths).errors
        if errors:
            default = "" if field != "adapter.target_pattern" or main else " (the default)"
            error = errors[0].replace("lora.explain(params, ...) lists them all.", _LISTING)
            raise ValueError(f"{field}={given!r}{default}: {error}")


_LISTING = "`jlora inspect recipe.yaml --targets` lists them all."
