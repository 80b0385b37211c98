"""Command `jlora rank-search`: search for rank, target modules, learning rate and alpha."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSearchOptions:
    """Select rank, target modules, learning rate and alpha for a recipe by trials.

    Trials are compared on the recipe's validation data.

    Attributes:
        recipe: YAML file of the recipe. Its output folder gets table.md, quality.png, best.yaml,
            search.json and the trials.
        resume: Continue the search in the output folder.
        ranks: Ranks to try, in increasing order, until the gain is within noise.
        seeds: Number of seeds of each rank and choice of target modules; 2 or more.
        steps: Training steps of each trial; those of the recipe if omitted.
        targets: Target modules to try besides the recipe's own: attention, mlp, all.
        lr_multipliers: Learning rates to try, as multiples of the recipe's.
        alpha_over_rank: Ratios alpha / rank to try besides that of the recipe.
        fix: Quantity that stays as in the recipe while ranks differ: alpha or scale.
        num_rungs: Rungs of successive halving over learning rate and alpha, each after twice as
            many steps; the worse half stops at each.
        timeout_minutes: Time in minutes after which no trial starts; no limit if omitted.
        overrides: Overrides of the recipe, as `--section.field value`.
    """

    recipe: Path
    resume: bool = False
    ranks: str = "1,2,4,8,16,32"
    seeds: int = 3
    steps: int | None = None
    targets: str = "attention,mlp,all"
    lr_multipliers: str = "0.25,0.5,1,2,4"
    alpha_over_rank: str = "0.5,1,2,4"
    fix: str = "alpha"
    num_rungs: int = 3
    timeout_minutes: float | None = None
    overrides: tuple[str, ...] = ()
    example = "jlora rank-search recipe.yaml --ranks 1,2,4,8 --steps 200 --output search"


def run_rank_search(options: RankSearchOptions) -> int:
    """Runs the search and returns the exit status: that of the signal if one ended it, or 0."""
    from jlora.rank_search.search import search
    from jlora.rank_search.study import SearchOptions
    from jlora.training import recipe as recipes
    from jlora.training.signals import TrainingInterrupted

    recipe = recipes.load(options.recipe, options.overrides)
    search_options = SearchOptions(
        ranks=_parse_number_list("ranks", options.ranks, int),
        targets=tuple(name.strip() for name in options.targets.split(",")),
        lr_multipliers=_parse_number_list("lr-multipliers", options.lr_multipliers, float),
        alpha_over_rank=_parse_number_list("alpha-over-rank", options.alpha_over_rank, float),
        **{
            name: getattr(options, name)
            for name in (
                "seeds",
                "steps",
                "fix",
                "num_rungs",
                "timeout_minutes",
            )
        },
    )
    try:
        command = format_command_line(options)
        search(recipe, search_options, resume=options.resume, command=command)
    except TrainingInterrupted as interruption:
        print(f"{interruption}\nContinue the search with --resume.", file=sys.stderr)
        return interruption.exit_status
    return 0


def format_command_line(options: RankSearchOptions) -> str:
    """Returns the command line with these options, without --resume."""
    words = ["jlora", "rank-search", str(options.recipe)]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in ("recipe", "resume", "overrides") and value != field.default:
            words += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join([*words, *options.overrides])


def _parse_number_list(
    name: str, text: str, number_type: Callable[[str], Number]
) -> tuple[Number, ...]:
    try:
        return tuple(number_type(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--{name}={text!r} must be numbers separated by commas, such as 1,2,4."
        ) from None
