"""The search for rank, targets, learning rate and alpha."""

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
    """Choose rank, targets, learning rate and alpha for a recipe, by trials on its validation data.

    Attributes:
        recipe: The YAML file. Its output folder gets table.md, quality.png, best.yaml, search.json
            and the trials.
        resume: Go on with the search in the folder.
        ranks: Ranks to try, from the smallest up, until the gain is within the noise.
        seeds: Seeds of each rank and choice of targets; 2 or more.
        steps: Of each trial; those of the recipe when left out.
        targets: Which weights to try: attention, mlp, all; the recipe's own are tried besides.
        lr_multipliers: Learning rates to try, as multiples of the recipe's.
        alpha_over_rank: alpha / rank to try; that of the recipe is tried besides.
        fix: alpha or scale: what stays as in the recipe while ranks differ.
        num_rungs: Looks at each trial of learning rate and alpha, each after twice as many steps; the
            worse half ends at each.
        sampler: grid, or optuna, which draws learning rates and alphas between the ends of the
            grid.
        num_trials: How many of them optuna draws.
        timeout_minutes: After which no trial begins; no end when left out.
        overrides: What is said otherwise than the recipe, as `--section.field value`.
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
    sampler: str = "grid"
    num_trials: int = 16
    timeout_minutes: float | None = None
    overrides: tuple[str, ...] = ()
    example = "jlora rank-search recipe.yaml --ranks 1,2,4,8 --steps 200 --output search"


def run_rank_search(options: RankSearchOptions) -> int:
    """Searches; the exit status says whether a signal ended it."""
    from jlora.rank_search.search import search
    from jlora.rank_search.study import SearchOptions
    from jlora.training import recipe
    from jlora.training.distributed import TrainingInterrupted

    read = recipe.load(options.recipe, options.overrides)
    asked = SearchOptions(
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
                "sampler",
                "num_trials",
                "timeout_minutes",
            )
        },
    )
    try:
        search(read, asked, resume=options.resume, command=format_command_line(options))
    except TrainingInterrupted as ended:
        print(f"{ended}\nThe search goes on with --resume.", file=sys.stderr)
        return ended.exit_status
    return 0


def format_command_line(options: RankSearchOptions) -> str:
    """The command line that gives these options, without --resume."""
    words = ["jlora", "rank-search", str(options.recipe)]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in ("recipe", "resume", "overrides") and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *options.overrides])


def _parse_number_list(
    name: str, text: str, number_type: Callable[[str], Number]
) -> tuple[Number, ...]:
    try:
        return tuple(number_type(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--{name}={text!r} is no list of numbers. Write them with commas: 1,2,4."
        ) from None
