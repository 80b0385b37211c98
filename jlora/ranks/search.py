"""The search for rank, targets, learning rate and alpha on a recipe's own data and model."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from jlora.ranks.course import Course
from jlora.ranks.judging import rungs
from jlora.ranks.ledger import Ledger, Setting
from jlora.ranks.options import Options
from jlora.ranks.outputs import write
from jlora.ranks.stages import Played, Stage
from jlora.ranks.trials import OutOfTime, Runner, check_settings, with_setting
from jlora.training.recipe.sections import Recipe
from jlora.training.telling import Talk

_CACHE = "cache"
_VERSIONS = ("jlora", "jax", "jaxlib", "flax", "optax")


class Found(NamedTuple):
    """What a search came to.

    Attributes:
        setting: That was chosen; None where time was over before there was a choice.
        stages: That are over.
        finished: Whether all are.
        folder: Of the files.
    """

    setting: Setting | None
    stages: tuple[Stage, ...]
    finished: bool
    folder: Path


def search(
    recipe: Recipe,
    options: Options | None = None,
    *,
    resume: bool = False,
    command: str | None = None,
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
) -> Found:
    """Chooses rank, targets, learning rate and alpha by trials on the validation data.

    The recipe's output folder gets search.json, table.md, quality.png, best.yaml, the trials' run
    folders, and a cache of compiled programs. Test data is not looked at.

    Args:
        recipe: Checked already, with validation data.
        options: How wide and how long; the defaults when left out.
        resume: Whether to go on with the search in the folder.
        command: That is noted in the files.
        devices: Those that are used; all when left out.
        quiet: Whether to show nothing.

    Raises:
        FileExistsError: There is a search in the folder, and it is not resumed.
        FileNotFoundError: There is none to resume, or the base or data are not there.
        ValueError: The recipe has no validation data, a setting cannot be, or all trials diverge.
        ModuleNotFoundError: The sampler is Optuna, which is not installed.
        Interrupted: SIGTERM or SIGINT came; everything up to then is saved.
    """
    began = time.monotonic()
    say, options = Talk(quiet), options or Options()
    _check(recipe)
    steps = _steps(recipe, options)
    course = Course(recipe, options)
    rungs(steps, options.rungs)
    for setting in course.of_ranks():
        with_setting(recipe, setting)
    check_settings(recipe, course.extremes())
    ledger = _ledger(recipe, options, steps, resume, command, devices or jax.devices())
    dated = _dated(recipe, ledger)
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes
    runner = Runner(dated, ledger, steps=steps, say=say, deadline=deadline, devices=devices)
    say(course.estimate(steps))
    stages: list[Stage] = []
    finished = True
    with programs_kept(ledger.folder / _CACHE):
        try:
            for stage in course.run(runner):
                stages.append(stage)
                say(f"{stage.name}: {stage.setting}. {stage.why}")
                _note(ledger, stages, course.played)
        except OutOfTime:
            finished = False
            say(f"minutes={options.minutes} are over. Go on with --resume and more of them.")
    ledger.facts["finished"] = finished
    _note(ledger, stages, course.played)
    for path in write(recipe, ledger, stages, course.played, finished=finished):
        say(f"Wrote {path}.")
    setting = stages[-1].setting if stages else None
    return Found(setting, tuple(stages), finished, ledger.folder)


def _check(recipe: Recipe) -> None:
    if not recipe.data.validation:
        raise ValueError(
            "data.validation=[] leaves nothing to compare trials on, and test data is not for "
            "choosing. Give validation sources."
        )
    if jax.process_count() > 1 or recipe.distributed.coordinator or recipe.distributed.auto:
        raise ValueError(
            "distributed: a search is made by one process, which may have several devices. Leave "
            "it out."
        )


def _steps(recipe: Recipe, options: Options) -> int:
    steps = options.steps or recipe.training.steps
    if steps is None:
        raise ValueError(
            f"training.epochs={recipe.training.epochs} does not say how many steps a trial has. "
            f"Give --steps."
        )
    return steps


def _ledger(
    recipe: Recipe,
    options: Options,
    steps: int,
    resume: bool,
    command: str | None,
    devices: Sequence[Any],
) -> Ledger:
    """The state of the search, for this recipe."""
    dumped = recipe.model_dump(mode="json")
    dumped.pop("output")  # A folder may be moved.
    facts = {
        "recipe": dumped,
        "options": {**dataclasses.asdict(options), "steps": steps},
        "command": command,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "finished": False,
    }
    folder = Path(recipe.output)
    if not resume:
        return Ledger.begun(folder, {"date": datetime.date.today().isoformat(), **facts})
    return Ledger.resumed(folder, facts)


def _dated(recipe: Recipe, ledger: Ledger) -> Recipe:
    """The recipe with the day on which the search began, which chat templates may show."""
    if recipe.data.date is not None:
        return recipe
    data = recipe.data.model_copy(update={"date": ledger.facts["date"]})
    return recipe.model_copy(update={"data": data})


def _note(ledger: Ledger, stages: Sequence[Stage], played: Played) -> None:
    ledger.facts["stages"] = [stage.facts() for stage in stages]
    ledger.facts["rungs"] = [
        {"setting": dataclasses.asdict(setting), "scores": scores}
        for setting, scores in played.items()
    ]
    ledger.save()


@contextlib.contextmanager
def programs_kept(folder: Path) -> Iterator[None]:
    """Compiled programs are kept in a folder meanwhile, and found there by a later process.

    A cache that the user has set stays the one that is used.
    """
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    if before["jax_compilation_cache_dir"] is not None:
        yield
        return
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        # JAX settles on a folder, or on none, when it first compiles.
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
