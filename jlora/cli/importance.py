"""How much each weight of a checkpoint or recipe matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_BATCHES = 8  # As many as usually tell the weights apart.
_SUFFIXES = (".yaml", ".yml")


def show(
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
    from jlora import ranks
    from jlora.ranks import on_recipes

    methods = {one.name: one for one in ranks.METHODS}
    if method not in methods:
        raise ValueError(f"--importance {method} is none of {', '.join(methods)}.")
    chosen = methods[method]
    needs_data = chosen not in ranks.DATA_FREE
    if not needs_data and batches is not None:
        raise ValueError(f"--batches: {method} looks at the weights alone. Leave it out.")
    if path.suffix not in _SUFFIXES:
        _check_folder(path, method, needs_data, {"--budget": budget, "overrides": overrides})
        print(on_recipes.of_checkpoint(str(path), chosen()))
        return
    import yaml

    from jlora.training import recipe

    read = recipe.load(path, overrides)
    count = 1 if not needs_data else _BATCHES if batches is None else batches
    measured = on_recipes.of_recipe(read, chosen(), batches=count)
    print(measured)
    if budget is not None:
        sections = on_recipes.with_ranks(read, measured, budget)
        print(f"\n# {budget:,} trained numbers, in place of the recipe's own sections:")
        print(yaml.safe_dump(sections, sort_keys=False), end="")


def refuse_without(given: dict[str, object]) -> None:
    """Refuses what does nothing without --importance.

    Raises:
        ValueError: When something is given.
    """
    for name, value in given.items():
        if value not in (None, ()):
            raise ValueError(
                f"{name} is about --importance METHOD. Give that too, or leave it out."
            )


def _check_folder(path: Path, method: str, needs_data: bool, of_recipes: dict[str, object]) -> None:
    if needs_data:
        raise ValueError(
            f"--importance {method} is measured on data, and {path} has none. Give a recipe "
            f"(.yaml), or a method that needs none: condition, stable_rank."
        )
    for name, value in of_recipes.items():
        if value not in (None, ()):
            raise ValueError(f"{name}: {value} is for a recipe, and {path} is none. Leave it out.")
