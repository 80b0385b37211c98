"""`jlora train`, `jlora plan` and `jlora init`: runs, plans and creates recipes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train from a recipe. Override any field with `--section.field value`.

    Attributes:
        recipe: YAML file of the recipe; `jlora init` prints one with all fields.
        resume: Resume from the last checkpoint, with the settings and overrides that the run began
            with; further overrides change them.
        allow_changes: Resume even if data, base model or hyperparameters changed.
        overrides: Overrides of recipe fields, as `--section.field value`.
    """

    recipe: Path
    resume: bool = False
    allow_changes: bool = False
    overrides: tuple[str, ...] = ()
    example = "jlora train recipe.yaml --adapter.rank 32 --output run-32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compile the step for a TPU topology, without a TPU; report memory and FLOPs per chip.

    Attributes:
        recipe: YAML file of the recipe.
        topology: Chip and sides of a slice, such as v5e:4x4, v5p:4x4x4 or v6e:8x8.
        overrides: Overrides of recipe fields, as `--section.field value`.
    """

    recipe: Path
    topology: str = "v5e:4x4"
    overrides: tuple[str, ...] = ()
    example = "jlora plan recipe.yaml --topology v5e:16x16 --mesh.fsdp 256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Print a recipe with every field, its default and its description.

    Attributes:
        schema: Print the JSON schema for editors instead.
    """

    schema: bool = False
    example = "jlora init > recipe.yaml"


def run_train(options: TrainOptions) -> int:
    """Trains; returns 0, or the exit status of the signal that ended the run."""
    from jlora.training.signals import TrainingInterrupted
    from jlora.training.train import train

    loaded = load_recipe(options)
    try:
        train(loaded, resume=options.resume, allow_changes=options.allow_changes)
    except TrainingInterrupted as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def load_recipe(options: TrainOptions) -> Any:
    """Returns the recipe of a run, and prints what differs from the file.

    A resumed run continues with the recipe in its output folder, which has the overrides of its
    start.
    """
    from jlora.checkpoints.text_files import read_optional_text
    from jlora.training import recipe
    from jlora.training.recipe.load import find_replaced_length
    from jlora.training.resume import list_changes
    from jlora.training.train import RECIPE_FILE

    loaded = recipe.load(options.recipe, options.overrides)
    replaced = find_replaced_length(options.recipe, loaded)
    saved = Path(loaded.output) / RECIPE_FILE
    is_begun = bool(read_optional_text(saved))  # A full disk leaves an empty file.
    if not options.resume or not is_begun or saved.samefile(options.recipe):
        if replaced is not None:
            print(f"The overrides replace {replaced} of {options.recipe}.", file=sys.stderr)
        return loaded
    # The folder may have been moved since.
    resumed = recipe.load(saved, [*options.overrides, "--output", loaded.output])
    # The date and the layout of layers are filled in when a run begins.
    changes = [
        change
        for change in list_changes(loaded.model_dump(mode="json"), resumed.model_dump(mode="json"))
        if change[0] not in ("data.chat_template_date", "model.scan_layers")
    ]
    for field, in_file, in_run in changes:
        print(
            f"Resuming with {field}={in_run} of {saved}, not {in_file} of {options.recipe}.",
            file=sys.stderr,
        )
    return resumed


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; returns 1 if the step does not fit in memory, otherwise 0."""
    from jlora.planning.plan import plan
    from jlora.training import recipe

    result = plan(recipe.load(options.recipe, options.overrides), options.topology)
    print(result)
    return 0 if result.fits else 1


def run_init(options: InitOptions) -> None:
    """Prints the recipe or the schema."""
    import json

    from jlora.training import recipe

    print(
        json.dumps(recipe.json_schema(), indent=2)
        if options.schema
        else recipe.default_recipe_yaml()
    )
