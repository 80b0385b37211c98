"""Training, its recipe, and what it needs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train what a recipe describes. `--section.field value` says otherwise than the recipe.

    Attributes:
        recipe: The YAML file; `jlora init` writes one to change.
        resume: Go on from the last checkpoint.
        allow_changes: Go on though data, base or hyperparameters are others than they were.
        overrides: What is said otherwise.
    """

    recipe: Path
    resume: bool = False
    allow_changes: bool = False
    overrides: tuple[str, ...] = ()
    example = "jlora train recipe.yaml --lora.rank 32 --output run-32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compile a recipe's step for a TPU that is not here, and tell what it needs on each chip.

    Attributes:
        recipe: The YAML file.
        topology: A chip and the sides of a slice: v5e:4x4, v5p:4x4x4, v6e:8x8.
        overrides: What is said otherwise than the recipe, as `--section.field value`.
    """

    recipe: Path
    topology: str = "v5e:4x4"
    overrides: tuple[str, ...] = ()
    example = "jlora plan recipe.yaml --topology v5e:16x16 --mesh.fsdp 256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Print a recipe with every field, its default and what it means.

    Attributes:
        schema: Print the JSON schema for editors instead.
    """

    schema: bool = False
    example = "jlora init > recipe.yaml"


def run_train(options: TrainOptions) -> int:
    """Trains; the exit status says whether a signal ended it."""
    from jlora.training import recipe
    from jlora.training.distributed import TrainingInterrupted
    from jlora.training.train import train

    read = recipe.load(options.recipe, options.overrides)
    try:
        train(read, resume=options.resume, allow_changes=options.allow_changes)
    except TrainingInterrupted as ended:
        print(ended, file=sys.stderr)
        return ended.exit_status
    return 0


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; the exit status is 1 where it does not fit."""
    from jlora.planning.plan import plan
    from jlora.training import recipe

    made = plan(recipe.load(options.recipe, options.overrides), options.topology)
    print(made)
    return 0 if made.fits else 1


def run_init(options: InitOptions) -> None:
    """Prints it."""
    import json

    from jlora.training import recipe

    print(
        json.dumps(recipe.json_schema(), indent=2)
        if options.schema
        else recipe.default_recipe_yaml()
    )
