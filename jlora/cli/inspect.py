"""`jlora inspect`: contents of checkpoints and adapters, and the importance of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show the contents of a checkpoint, PEFT adapter or jlora adapter.

    Attributes:
        path: Folder or file; with --importance also a recipe.
        importance: Importance measure to print for each weight instead: gradient_norm, fisher,
            sensitivity or activation on a recipe's data; condition or stable_rank of a recipe's
            base or a checkpoint folder.
        batches: Number of a recipe's batches to measure on; 8 by default.
        targets: Print every weight of a recipe's base or a checkpoint folder instead, with its path
            for target_pattern, its adapter and how it is computed.
        budget: Maximum number of trainable parameters; prints sections for the recipe with ranks
            allocated within it.
        overrides: Overrides of recipe fields, as `--section.field value`.
    """

    path: Path
    importance: str | None = None
    batches: int | None = None
    budget: int | None = None
    targets: bool = False
    overrides: tuple[str, ...] = ()
    example = "jlora inspect my-adapter/"


def run_inspect(options: InspectOptions) -> None:
    """Prints the contents, or the importance of each weight.

    Raises:
        ValueError: If an option has no effect, or the importance measure is unknown.
    """
    if options.targets:
        if options.importance is not None:
            raise ValueError("--targets and --importance print different tables. Leave one out.")
        print_targets(options.path, options.overrides)
        return
    if options.importance is None:
        flags = {"--batches": options.batches, "--budget": options.budget}
        reject_without_importance({**flags, " ".join(options.overrides): options.overrides})
        if options.path.suffix in _RECIPE_SUFFIXES and options.path.exists():
            raise ValueError(
                f"{options.path} is a recipe. Add --importance to measure the weights of its base, "
                f"such as --importance stable_rank, or --targets to list them. It is not a "
                f"safetensors file."
            )
        from jlora.cli.checkpoint_contents import inspect_path

        print(inspect_path(options.path))
        return
    print_importance(
        options.path,
        options.importance,
        batches=options.batches,
        budget=options.budget,
        overrides=options.overrides,
    )


# Usually enough to separate the weights.
_DEFAULT_NUM_BATCHES = 8

_RECIPE_SUFFIXES = (".yaml", ".yml")


def print_importance(
    path: Path, method: str, batches: int | None, budget: int | None, overrides: Sequence[str]
) -> None:
    """Prints the importance of each weight, and a recipe's sections for a budget.

    Args:
        path: Recipe, or checkpoint folder for methods without data.
        method: Name of the importance measure.
        batches: Number of a recipe's batches; None: 8.
        budget: Maximum number of trainable parameters; None: no sections are printed.
        overrides: Overrides of recipe fields.

    Raises:
        ValueError: If the method is unknown, or an option has no effect.
    """
    from jlora import importance
    from jlora.importance import from_recipe

    methods = {cls.name: cls for cls in importance.METHODS}
    if method not in methods:
        raise ValueError(f"--importance {method} must be one of {', '.join(methods)}.")
    measure = methods[method]
    needs_data = measure not in importance.DATA_FREE_METHODS
    if not needs_data and batches is not None:
        raise ValueError(f"--batches: {method} uses only the weights. Leave it out.")
    if path.suffix not in _RECIPE_SUFFIXES:
        _check_importance_folder(
            path, method, needs_data, {"--budget": budget, "overrides": overrides}
        )
        print(from_recipe.measure_checkpoint_importance(str(path), measure()))
        return
    import yaml

    from jlora.training import recipe

    loaded = recipe.load(path, overrides)
    num_batches = 1 if not needs_data else _DEFAULT_NUM_BATCHES if batches is None else batches
    result = from_recipe.measure_recipe_importance(loaded, measure(), num_batches=num_batches)
    print(result)
    if budget is not None:
        sections = from_recipe.allocate_recipe_ranks(loaded, result, budget)
        print(f"\n# Sections for the recipe, with at most {budget:,} trainable parameters:")
        print(yaml.safe_dump(sections, sort_keys=False), end="")


def print_targets(path: Path, overrides: Sequence[str]) -> None:
    """Prints the weights of a base, and what a recipe's rules make of each.

    Args:
        path: Recipe, or checkpoint folder.
        overrides: Overrides of recipe fields.

    Raises:
        FileNotFoundError: If there is no such recipe or folder.
        ValueError: If overrides are given for a folder.
    """
    from jlora import models
    from jlora.checkpoints.hub import resolve_checkpoint_folder
    from jlora.models.hf.load import example_inputs
    from jlora.training import recipe
    from jlora.training.recipe_checks import explain_targets
    from jlora.transform import lora_transform

    if path.suffix in _RECIPE_SUFFIXES:
        loaded = recipe.load(path, overrides)
        folder = resolve_checkpoint_folder(loaded.model.path, loaded.model.revision)
        print(explain_targets(loaded, folder))
        return
    if overrides:
        raise ValueError(f"{' '.join(overrides)} applies to a recipe, but {path} is not one.")
    model = models.model_from_config(resolve_checkpoint_folder(str(path)))
    params = models.abstract_params(model, "bfloat16")
    print(lora_transform(model.apply).explain(params, *example_inputs(model)))


def reject_without_importance(flags: dict[str, object]) -> None:
    """Rejects flags that have no effect without --importance.

    Raises:
        ValueError: If one of them is set.
    """
    for name, value in flags.items():
        if value not in (None, ()):
            raise ValueError(f"{name} requires --importance METHOD. Add that, or leave it out.")


def _check_importance_folder(
    path: Path, method: str, needs_data: bool, recipe_options: dict[str, object]
) -> None:
    if needs_data:
        raise ValueError(
            f"--importance {method} is measured on data, but {path} is not a recipe. Give a recipe "
            f"(.yaml), or use a method without data: condition, stable_rank."
        )
    for name, value in recipe_options.items():
        if value not in (None, ()):
            raise ValueError(
                f"{name}: {value} applies only to recipes, but {path} is not one. Leave it out."
            )
