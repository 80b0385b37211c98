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
class RankSearch:
    """Choose rank, targets, learning rate and alpha for a recipe, by trials on its validation data.

    Attributes:
        recipe: The YAML file. Its output folder gets table.md, quality.png, best.yaml, search.json
            and the trials.
        resume: Go on with the search in the folder.
        ranks: Ranks to try, from the smallest up, until the gain is within the noise.
        seeds: Seeds of each rank and choice of targets; 2 or more.
        steps: Of each trial; those of the recipe when left out.
        targets: Which weights to try: attention, mlp, all; the recipe's own are tried besides.
        rates: Learning rates to try, as multiples of the recipe's.
        alphas: alpha / rank to try; that of the recipe is tried besides.
        hold: alpha or scale: what stays as in the recipe while ranks differ.
        rungs: Looks at each trial of learning rate and alpha, each after twice as many steps; the
            worse half ends at each.
        sampler: grid, or optuna, which draws learning rates and alphas between the ends of the
            grid.
        settings: How many of them optuna draws.
        minutes: After which no trial begins; no end when left out.
        overrides: What is said otherwise than the recipe, as `--section.field value`.
    """

    recipe: Path
    resume: bool = False
    ranks: str = "1,2,4,8,16,32"
    seeds: int = 3
    steps: int | None = None
    targets: str = "attention,mlp,all"
    rates: str = "0.25,0.5,1,2,4"
    alphas: str = "0.5,1,2,4"
    hold: str = "alpha"
    rungs: int = 3
    sampler: str = "grid"
    settings: int = 16
    minutes: float | None = None
    overrides: tuple[str, ...] = ()
    example = "jlora rank-search recipe.yaml --ranks 1,2,4,8 --steps 200 --output search"


def rank_search(options: RankSearch) -> int:
    """Searches; the exit status says whether a signal ended it."""
    from jlora.ranks.options import Options
    from jlora.ranks.search import search
    from jlora.training import recipe
    from jlora.training.interruption import Interrupted

    read = recipe.load(options.recipe, options.overrides)
    asked = Options(
        ranks=_numbers("ranks", options.ranks, int),
        targets=tuple(name.strip() for name in options.targets.split(",")),
        rates=_numbers("rates", options.rates, float),
        alphas=_numbers("alphas", options.alphas, float),
        **{
            name: getattr(options, name)
            for name in ("seeds", "steps", "hold", "rungs", "sampler", "settings", "minutes")
        },
    )
    try:
        search(read, asked, resume=options.resume, command=command_of(options))
    except Interrupted as ended:
        print(f"{ended}\nThe search goes on with --resume.", file=sys.stderr)
        return ended.status
    return 0


def command_of(options: RankSearch) -> str:
    """The command line that gives these options, without --resume."""
    words = ["jlora", "rank-search", str(options.recipe)]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in ("recipe", "resume", "overrides") and value != field.default:
            words += [f"--{field.name}", str(value)]
    return shlex.join([*words, *options.overrides])


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--{name}={text!r} is no list of numbers. Write them with commas: 1,2,4."
        ) from None
