"""Importance of the weights that a recipe adapts, on its own data, and ranks for the recipe."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation, models
from jlora._tree import PyTree
from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.lora import LoRA
from jlora.checkpoints import hub
from jlora.importance.allocate import allocate_ranks
from jlora.importance.measure import ImportanceMethod, measure_importance
from jlora.importance.methods import GradientMethod
from jlora.importance.recipes import to_recipe
from jlora.importance.scores import Importance
from jlora.models.hf.load import example_inputs
from jlora.training import sharding
from jlora.training.data_loader import local_rows, prefetch_to_device
from jlora.training.datasets import load_datasets
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import (
    get_layer_layout_options,
    model_from_recipe,
    objective_from_recipe,
    rules_from_recipe,
)


def measure_checkpoint_importance(path: str, method: ImportanceMethod) -> Importance:
    """Measures the importance of the weights of a Hugging Face folder, by a method without data.

    Args:
        path: Folder, or repository on the Hugging Face Hub.
        method: `ConditionNumber()` or `StableRank()`.
    """
    model, params = models.load(path)
    inputs = example_inputs(model)
    return measure_importance(
        lambda p, batch: model.apply(p, *batch), params, [inputs], method=method
    )


def measure_recipe_importance(
    recipe: Recipe,
    method: ImportanceMethod,
    *,
    num_batches: int,
    devices: Sequence[Any] | None = None,
    **options: Any,
) -> Importance:
    """Measures the importance of the weights to which a recipe's rules give ranks.

    The base is loaded with the sharding of a training run. Each forward pass of a step is a batch;
    its loss is the mean over its target tokens or examples.

    Args:
        recipe: Validated recipe.
        method: Any method.
        num_batches: Number of batches, from the start of the data; fewer when an epoch has fewer.
        devices: Devices to use. None: all.
        **options: Keyword arguments of `measure_importance`.

    Raises:
        FileNotFoundError: The base or the data do not exist.
        ValueError: The recipe quantizes its base, or has a new head: it is zero before training,
            so that no gradient passes through it. Also as in `measure_importance`.
    """
    _validation.check_positive_int("measure_recipe_importance: num_batches", num_batches)
    if recipe.quantize is not None:
        raise ValueError(
            "quantize must be null to measure importance, which uses the weights as they are in "
            "the files. Use --quantize null."
        )
    folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    model = model_from_recipe(recipe, folder)
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, devices)
    sharding.check_batch_size(mesh, recipe.batch.size)
    specs = sharding.weight_specs(model, *example_inputs(model))
    local = local_rows(mesh, recipe.batch.size)
    data = load_datasets(recipe, folder, model.config.vocab_size, local, slice(0, 0))
    objective = objective_from_recipe(
        recipe, model, None if data.label_names is None else len(data.label_names)
    )
    trainable: dict[str, Any] = {"adapter": {}}
    if objective.init_head is not None:
        if isinstance(method, GradientMethod):
            raise ValueError(
                f"The base has no head for its labels, and a new one starts at zero, so that no "
                f"weight before it has a gradient, which {method.name} needs. Use activation, or a "
                f"checkpoint with a head."
            )
        trainable["head"] = objective.init_head(jax.random.key(recipe.seed))
    params = models.load(
        folder,
        dtype=recipe.model.dtype,
        sharding=lambda path, shape: sharding.make_named_sharding(
            mesh, path, specs[path], shape.shape
        ),
        **get_layer_layout_options(model),
    ).params

    frozen: dict[str, Any] = {"adapter": {}, "reference": {}}

    def loss(params: PyTree, batch: Any) -> jax.Array:
        sums = objective.loss_fn(trainable, frozen | {"base": params}, batch, None)
        return sums.loss / jnp.maximum(sums.num_targets, 1)

    def forward_passes() -> Iterator[Any]:
        with prefetch_to_device(mesh, data.train, epochs=1) as steps:
            for step in steps:
                for i in range(jax.tree.leaves(step.arrays)[0].shape[0]):
                    yield jax.tree.map(lambda array, i=i: array[i], step.arrays)

    select = {
        pattern: _get_ranked_config(config)
        for pattern, config in rules_from_recipe(recipe, model).items()
    }
    with sharding.use_mesh(mesh):
        batches = itertools.islice(forward_passes(), num_batches)
        return measure_importance(
            loss,
            params,
            batches,
            method=method,
            select=select,
            token_mask=objective.token_mask,
            **options,
        )


def allocate_recipe_ranks(recipe: Recipe, scores: Importance, budget: int) -> dict[str, Any]:
    """Returns the recipe's `adapter`, `adapters` and `frozen_modules`, with a rank per weight.

    Rules of methods without ranks, and frozen modules, stay as they are.

    Args:
        recipe: Recipe that was measured.
        scores: Result of `measure_recipe_importance`.
        budget: Maximum number of trainable parameters, as in `allocate_ranks`.

    Raises:
        TypeError: The recipe's main method has no rank.
        ValueError: As in `allocate_ranks` and `to_recipe`, or a rule of `adapters` has a rank and
            differs from the main rule in other fields.
    """
    config = recipe.adapter.to_config()
    if not isinstance(config, LoRA | AdaLoRA):
        raise TypeError(
            f"adapter.family={recipe.adapter.family} has no rank to allocate. Use "
            f"--adapter.family LoRA."
        )
    for i, section in enumerate(recipe.adapters):
        other = section.to_config()
        if _get_ranked_config(other) is not None and not _differ_only_in_rank(other, config):
            raise ValueError(
                f"adapters.{i} must equal the main adapter except for rank and alpha, got a "
                f"{type(other).__name__} that differs in other fields, which its weights would "
                f"lose. Make the two equal, or remove that rule."
            )
    sections = to_recipe(allocate_ranks(scores, budget, config=config))
    unranked = [
        {"family": section.family, **section.model_dump(mode="json", exclude_defaults=True)}
        for section in recipe.adapters
        if _get_ranked_config(section.to_config()) is None
    ]
    # The first rule that matches a weight wins, and the rules with ranks match single weights.
    adapters = [*sections.get("adapters", []), *unranked]
    frozen = [*recipe.frozen_modules, *sections.get("frozen_modules", [])]
    return {
        "adapter": sections["adapter"],
        **({"adapters": adapters} if adapters else {}),
        **({"frozen_modules": frozen} if frozen else {}),
    }


def _differ_only_in_rank(config: Any, other: Any) -> bool:
    if type(config) is not type(other):
        return False
    ranks = {name: getattr(other, name) for name in ("rank", "alpha") if hasattr(other, name)}
    return dataclasses.replace(config, **ranks) == other


def _get_ranked_config(config: Any) -> Any:
    """Returns the config, or None where its method has no rank to allocate."""
    return config if isinstance(config, LoRA | AdaLoRA) else None
