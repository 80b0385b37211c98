"""Importance of the weights that a recipe adapts, on its own data, and a recipe's new rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import models
from jlora.adapters import checks
from jlora.adapters.adalora import AdaLoRA
from jlora.adapters.lora import LoRA
from jlora.checkpoints import hub
from jlora.models.folders import example_inputs
from jlora.ranks.allocation import allocate
from jlora.ranks.gradients import Gradients
from jlora.ranks.measuring import Method, importance
from jlora.ranks.recipes import as_recipe
from jlora.ranks.scores import Importance
from jlora.training import mesh as meshes
from jlora.training.placing import placed_ahead, rows_here
from jlora.training.reading import read
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import layout_of, model_of, rules_of, task_of

PyTree = Any


def of_checkpoint(path: str, method: Method) -> Importance:
    """Importance of the weights of a Hugging Face folder, by a method that needs no data.

    Args:
        path: The folder, or its name on the Hub.
        method: `Condition()` or `StableRank()`.
    """
    model, params = models.load(path)
    inputs = example_inputs(model)
    return importance(lambda p, given: model.apply(p, *given), params, [inputs], method=method)


def of_recipe(
    recipe: Recipe,
    method: Method,
    *,
    batches: int,
    devices: Sequence[Any] | None = None,
    **options: Any,
) -> Importance:
    """Importance of the weights that a recipe's rules adapt by ranks, on its first batches.

    The base is loaded to where a run would have it, and each forward pass of a step is a batch, its
    loss the mean over what counts in it.

    Args:
        recipe: Checked already.
        method: Any.
        batches: How many; fewer when an epoch of the data has fewer.
        devices: Those that are used; all when None.
        **options: Passed to `importance`.

    Raises:
        FileNotFoundError: The base or data are not there.
        ValueError: The recipe quantises its base, or has a new head, which is zero before
            training, so that nothing has a gradient through it; and as `importance`.
    """
    checks.count("importance: batches", batches)
    if recipe.quantize is not None:
        raise ValueError(
            "quantize is set, and importance is measured on the weights as they are in the files. "
            "Leave it out here: --quantize null."
        )
    folder = hub.folder_of(recipe.model.path, recipe.model.revision)
    model = model_of(recipe, folder)
    sizes = {name: size for name, size in recipe.mesh if size is not None}
    mesh = meshes.make_mesh(sizes, devices)
    meshes.check_batch(mesh, recipe.batch.rows)
    specs = meshes.weight_specs(model, *example_inputs(model))
    mine = rows_here(mesh, recipe.batch.rows)
    data = read(recipe, folder, model.config.vocab_size, mine, slice(0, 0))
    task = task_of(recipe, model, None if data.labels is None else len(data.labels))
    trained: dict[str, Any] = {"adapter": {}}
    if task.head is not None:
        if isinstance(method, Gradients):
            raise ValueError(
                f"The base has no head for its labels, and a new one starts at zero: nothing "
                f"before it has a gradient, which {method.name} is made of. Use activation, or "
                f"a checkpoint with a head."
            )
        trained["head"] = task.head(jax.random.key(recipe.seed))
    params = models.load(
        folder,
        dtype=recipe.model.dtype,
        sharding=lambda path, shape: meshes.place(mesh, path, specs[path], shape.shape),
        **layout_of(model),
    ).params

    def loss(params: PyTree, batch: Any) -> jax.Array:
        sums = task.loss(trained, {"base": params, "adapter": {}}, batch, None)
        return sums.loss / jnp.maximum(sums.weight, 1)

    def forward_passes() -> Iterator[Any]:
        with placed_ahead(mesh, data.train, epochs=1) as ahead:
            for placed in ahead:
                for number in range(jax.tree.leaves(placed.arrays)[0].shape[0]):
                    yield jax.tree.map(lambda array, n=number: array[n], placed.arrays)

    select = {pattern: _ranked(config) for pattern, config in rules_of(recipe, model).items()}
    with meshes.active(mesh):
        some = itertools.islice(forward_passes(), batches)
        return importance(loss, params, some, method=method, select=select, **options)


def with_ranks(recipe: Recipe, measured: Importance, budget: int) -> dict[str, Any]:
    """The sections `lora`, `more` and `frozen` of the recipe, with a rank for each weight.

    Rules of families without ranks, and what is frozen, stay as they are.

    Args:
        recipe: What was measured on.
        measured: What `of_recipe` returned.
        budget: Of trained numbers, as `allocate` takes it.

    Raises:
        TypeError: When the recipe's main family has no rank.
        ValueError: As `allocate` and `as_recipe`, and when a rule of `more` has a rank and is not
            like the main one.
    """
    config = recipe.lora.config()
    if not isinstance(config, LoRA | AdaLoRA):
        raise TypeError(
            f"lora.family={recipe.lora.family} has no rank that a budget could be spent on. Use "
            f"--lora.family LoRA."
        )
    for place, rule in enumerate(recipe.more):
        own = rule.config()
        if _ranked(own) is not None and not _differ_in_rank_alone(own, config):
            raise ValueError(
                f"more.{place} is a {type(own).__name__} with other facts than the main rule has, "
                f"and the weights that it names would get the main rule's. Make the two alike but "
                f"for rank and alpha, or leave that rule out."
            )
    sections = as_recipe(allocate(measured, budget, config=config))
    others = [
        {"family": rule.family, **rule.model_dump(mode="json", exclude_defaults=True)}
        for rule in recipe.more
        if _ranked(rule.config()) is None
    ]
    # The first rule that matches a weight wins, and those with ranks name each of theirs.
    more = [*sections.get("more", []), *others]
    frozen = [*recipe.frozen, *sections.get("frozen", [])]
    return {
        "lora": sections["lora"],
        **({"more": more} if more else {}),
        **({"frozen": frozen} if frozen else {}),
    }


def _differ_in_rank_alone(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    ranks = {name: getattr(other, name) for name in ("rank", "alpha") if hasattr(other, name)}
    return dataclasses.replace(one, **ranks) == other


def _ranked(config: Any) -> Any:
    """The config, where ranks can be given to it."""
    return config if isinstance(config, LoRA | AdaLoRA) else None
