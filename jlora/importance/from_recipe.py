"""Importance of the weights that a recipe adapts, on its own data, and a recipe's new rules."""

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
    """Importance of the weights of a Hugging Face folder, by a method that needs no data.

    Args:
        path: The folder, or its name on the Hub.
        method: `Condition()` or `StableRank()`.
    """
    model, params = models.load(path)
    inputs = example_inputs(model)
    return measure_importance(
        lambda p, given: model.apply(p, *given), params, [inputs], method=method
    )


def measure_recipe_importance(
    recipe: Recipe,
    method: ImportanceMethod,
    *,
    num_batches: int,
    devices: Sequence[Any] | None = None,
    **options: Any,
) -> Importance:
    """Importance of the weights that a recipe's rules adapt by ranks, on its first batches.

    The base is loaded to where a run would have it, and each forward pass of a step is a batch, its
    loss the mean over what counts in it.

    Args:
        recipe: Checked already.
        method: Any.
        num_batches: How many; fewer when an epoch of the data has fewer.
        devices: Those that are used; all when None.
        **options: Passed to `importance`.

    Raises:
        FileNotFoundError: The base or data are not there.
        ValueError: The recipe quantises its base, or has a new head, which is zero before
            training, so that nothing has a gradient through it; and as `importance`.
    """
    _validation.check_positive_int("importance: batches", num_batches)
    if recipe.quantize is not None:
        raise ValueError(
            "quantize is set, and importance is measured on the weights as they are in the files. "
            "Leave it out here: --quantize null."
        )
    folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    model = model_from_recipe(recipe, folder)
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = sharding.make_mesh(sizes, devices)
    sharding.check_batch_size(mesh, recipe.batch.size)
    specs = sharding.weight_specs(model, *example_inputs(model))
    mine = local_rows(mesh, recipe.batch.size)
    data = load_datasets(recipe, folder, model.config.vocab_size, mine, slice(0, 0))
    task = objective_from_recipe(
        recipe, model, None if data.label_names is None else len(data.label_names)
    )
    trained: dict[str, Any] = {"adapter": {}}
    if task.init_head is not None:
        if isinstance(method, GradientMethod):
            raise ValueError(
                f"The base has no head for its labels, and a new one starts at zero: nothing "
                f"before it has a gradient, which {method.name} is made of. Use activation, or "
                f"a checkpoint with a head."
            )
        trained["head"] = task.init_head(jax.random.key(recipe.seed))
    params = models.load(
        folder,
        dtype=recipe.model.dtype,
        sharding=lambda path, shape: sharding.make_named_sharding(
            mesh, path, specs[path], shape.shape
        ),
        **get_layer_layout_options(model),
    ).params

    def loss(params: PyTree, batch: Any) -> jax.Array:
        sums = task.loss_fn(trained, {"base": params, "adapter": {}}, batch, None)
        return sums.loss / jnp.maximum(sums.num_targets, 1)

    def forward_passes() -> Iterator[Any]:
        with prefetch_to_device(mesh, data.train, epochs=1) as ahead:
            for placed in ahead:
                for number in range(jax.tree.leaves(placed.arrays)[0].shape[0]):
                    yield jax.tree.map(lambda array, n=number: array[n], placed.arrays)

    select = {
        pattern: _get_ranked_config(config)
        for pattern, config in rules_from_recipe(recipe, model).items()
    }
    with sharding.use_mesh(mesh):
        some = itertools.islice(forward_passes(), num_batches)
        return measure_importance(loss, params, some, method=method, select=select, **options)


def allocate_recipe_ranks(recipe: Recipe, scores: Importance, budget: int) -> dict[str, Any]:
    """The sections `lora`, `more` and `frozen` of the recipe, with a rank for each weight.

    Rules of families without ranks, and what is frozen, stay as they are.

    Args:
        recipe: What was measured on.
        scores: What `measure_recipe_importance` returned.
        budget: Of trained numbers, as `allocate` takes it.

    Raises:
        TypeError: When the recipe's main family has no rank.
        ValueError: As `allocate` and `as_recipe`, and when a rule of `more` has a rank and is not
            like the main one.
    """
    config = recipe.adapter.to_config()
    if not isinstance(config, LoRA | AdaLoRA):
        raise TypeError(
            f"lora.family={recipe.adapter.family} has no rank that a budget could be spent on. Use "
            f"--lora.family LoRA."
        )
    for place, rule in enumerate(recipe.adapters):
        own = rule.to_config()
        if _get_ranked_config(own) is not None and not _differ_only_in_rank(own, config):
            raise ValueError(
                f"more.{place} is a {type(own).__name__} with other facts than the main rule has, "
                f"and the weights that it names would get the main rule's. Make the two alike but "
                f"for rank and alpha, or leave that rule out."
            )
    sections = to_recipe(allocate_ranks(scores, budget, config=config))
    others = [
        {"family": rule.family, **rule.model_dump(mode="json", exclude_defaults=True)}
        for rule in recipe.adapters
        if _get_ranked_config(rule.to_config()) is None
    ]
    # The first rule that matches a weight wins, and those with ranks name each of theirs.
    more = [*sections.get("adapters", []), *others]
    frozen = [*recipe.frozen_modules, *sections.get("frozen_modules", [])]
    return {
        "adapter": sections["adapter"],
        **({"adapters": more} if more else {}),
        **({"frozen_modules": frozen} if frozen else {}),
    }


def _differ_only_in_rank(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    ranks = {name: getattr(other, name) for name in ("rank", "alpha") if hasattr(other, name)}
    return dataclasses.replace(one, **ranks) == other


def _get_ranked_config(config: Any) -> Any:
    """The config, where ranks can be given to it."""
    return config if isinstance(config, LoRA | AdaLoRA) else None
