"""How much each weight of a checkpoint or recipe matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What a checkpoint's folder, a folder of PEFT's or an adapter file holds.

    Attributes:
        path: The folder or file; a recipe, with --importance.
        importance: Print how much each weight matters instead: gradient_norm, fisher, sensitivity
            or activation on a recipe's data; condition or stable_rank of a recipe's base or a
            checkpoint's folder.
        batches: On how many of a recipe's batches that is measured; 8 when left out.
        budget: Print the recipe's rules too, with ranks that train at most so many numbers.
        overrides: What is said otherwise than the recipe, as `--section.field value`.
    """

    path: Path
    importance: str | None = None
    batches: int | None = None
    budget: int | None = None
    overrides: tuple[str, ...] = ()
    example = "jlora inspect my-adapter/"


def run_inspect(options: InspectOptions) -> None:
    """Prints what is there, or how much each weight matters."""
    rest = {"--batches": options.batches, "--budget": options.budget}
    if options.importance is None:
        reject_without_importance({**rest, " ".join(options.overrides): options.overrides})
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


_DEFAULT_NUM_BATCHES = 8  # As many as usually tell the weights apart.

_RECIPE_SUFFIXES = (".yaml", ".yml")


def print_importance(
    path: Path, method: str, batches: int | None, budget: int | None, overrides: Sequence[str]
) -> None:
    """Prints the table, and the recipe's rules for a budget.

    Args:
        path: A recipe, or a checkpoint's folder for methods that need no data.
        method: The name of one.
        batches: How many, of a recipe; 8 when None.
        budget: How many numbers the rules may train; none are printed when None.
        overrides: What is said otherwise than the recipe.

    Raises:
        ValueError: For a method that there is not, or what would do nothing.
    """
    from jlora import importance
    from jlora.importance import from_recipe

    methods = {one.name: one for one in importance.METHODS}
    if method not in methods:
        raise ValueError(f"--importance {method} is none of {', '.join(methods)}.")
    chosen = methods[method]
    needs_data = chosen not in importance.DATA_FREE_METHODS
    if not needs_data and batches is not None:
        raise ValueError(f"--batches: {method} looks at the weights alone. Leave it out.")
    if path.suffix not in _RECIPE_SUFFIXES:
        _check_importance_folder(
            path, method, needs_data, {"--budget": budget, "overrides": overrides}
        )
        print(from_recipe.measure_checkpoint_importance(str(path), chosen()))
        return
    import yaml

    from jlora.training import recipe

    read = recipe.load(path, overrides)
    count = 1 if not needs_data else _DEFAULT_NUM_BATCHES if batches is None else batches
    measured = from_recipe.measure_recipe_importance(read, chosen(), num_batches=count)
    print(measured)
    if budget is not None:
        sections = from_recipe.allocate_recipe_ranks(read, measured, budget)
        print(f"\n# {budget:,} trained numbers, in place of the recipe's own sections:")
        print(yaml.safe_dump(sections, sort_keys=False), end="")


def reject_without_importance(flags: dict[str, object]) -> None:
    """Refuses what does nothing without --importance.

    Raises:
        ValueError: When something is given.
    """
    for name, value in flags.items():
        if value not in (None, ()):
            raise ValueError(
                f"{name} is about --importance METHOD. Give that too, or leave it out."
            )


def _check_importance_folder(
    path: Path, method: str, needs_data: bool, recipe_options: dict[str, object]
) -> None:
    if needs_data:
        raise ValueError(
            f"--importance {method} is measured on data, and {path} has none. Give a recipe "
            f"(.yaml), or a method that needs none: condition, stable_rank."
        )
    for name, value in recipe_options.items():
        if value not in (None, ()):
            raise ValueError(f"{name}: {value} is for a recipe, and {path} is none. Leave it out.")
