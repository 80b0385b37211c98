"""The course of a search: which settings each stage tries, from what the one before it chose."""

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

from jlora.rank_search.optuna_sampler import import_optuna, tpe_search
from jlora.rank_search.report import write_search_report
from jlora.rank_search.selection import rung_steps
from jlora.rank_search.stages import (
    RungScores,
    SearchStage,
    compare_settings,
    rank_ladder,
    run_sampler_search,
    successive_halving,
)
from jlora.rank_search.study import SearchOptions, Study, TrialSetting
from jlora.rank_search.trials import (
    SearchTimeoutError,
    TrialRunner,
    apply_setting,
    check_settings,
    get_target_patterns,
    setting_from_recipe,
)
from jlora.training.progress import Console
from jlora.training.recipe.sections import Recipe


class StagedSearch:
    """The stages of a search, each of which begins where the one before it ended.

    Attributes:
        recipe_setting: The recipe as it is.
        rung_scores: The scores of all settings of learning rate and alpha, by rung.
    """

    def __init__(self, recipe: Recipe, options: SearchOptions) -> None:
        """Lays them out.

        Raises:
            ValueError: Targets are unknown, or the recipe's family has no rank.
            ModuleNotFoundError: The sampler is Optuna, which is not installed.
        """
        known = get_target_patterns(recipe)
        unknown = [name for name in options.targets if name not in known]
        if unknown or not options.targets:
            raise ValueError(
                f"targets={list(options.targets)}: {unknown} are none of {list(known)}. Give one "
                f"or more of those."
            )
        if options.sampler == "optuna":
            import_optuna()
        self.recipe_setting = setting_from_recipe(recipe)
        self.rung_scores: RungScores = {}
        self._options = options
        self._rank_stabilized = bool(recipe.adapter.config_values().get("use_rslora"))
        self._seeds = [recipe.seed + number for number in range(options.seeds)]

    def setting_at_rank(self, rank: int) -> TrialSetting:
        """The recipe with another rank."""
        alpha = self.recipe_setting.alpha
        if self._options.fix == "scale":
            ratio = rank / self.recipe_setting.rank
            alpha *= math.sqrt(ratio) if self._rank_stabilized else ratio
        return dataclasses.replace(self.recipe_setting, rank=rank, alpha=alpha)

    def rank_settings(self) -> list[TrialSetting]:
        """The recipe with each of the ranks."""
        return list(map(self.setting_at_rank, self._options.ranks))

    def extreme_settings(self) -> list[TrialSetting]:
        """Settings of which all others are parts: the largest ranks, and every pattern."""
        largest = max(self._options.ranks)
        own = self.setting_at_rank(largest)
        every = [dataclasses.replace(own, targets=name) for name in self._options.targets]
        return list(dict.fromkeys([self.recipe_setting, own, *every]))

    def grid(self, center: TrialSetting) -> list[TrialSetting]:
        """Learning rates and alphas around a setting, which comes first."""
        alphas = [center.alpha, *(ratio * center.rank for ratio in self._options.alpha_over_rank)]
        found = [
            dataclasses.replace(
                center, learning_rate=float(f"{factor * center.learning_rate:.6g}"), alpha=alpha
            )
            for alpha in dict.fromkeys(alphas)
            for factor in self._options.lr_multipliers
        ]
        return list(dict.fromkeys([center, *found]))

    def run(self, runner: TrialRunner) -> Iterator[SearchStage]:
        """Makes the trials of one stage after the other; gives each stage when it is over."""
        options, seeds = self._options, self._seeds
        ranks = rank_ladder(runner, self.rank_settings(), seeds)
        yield ranks
        named = dict.fromkeys([self.recipe_setting.targets, *options.targets])
        choices = [dataclasses.replace(ranks.setting, targets=name) for name in named]
        targets = compare_settings(runner, choices, seeds, name="targets")
        yield targets
        rates = self._run_rates_stage(runner, targets.setting)
        yield rates
        finalists = [rates.setting, targets.setting, self.recipe_setting]
        yield compare_settings(runner, finalists, seeds, name="confirmation")

    def _run_rates_stage(self, runner: TrialRunner, center: TrialSetting) -> SearchStage:
        """The stage of learning rate and alpha.

        It has a seed of its own: the winner was lucky with it, and is confirmed with the others.
        """
        seed, options = self._seeds[-1] + 1, self._options
        if options.sampler == "optuna":
            rates = [factor * center.learning_rate for factor in (1, *options.lr_multipliers)]
            alphas = [center.alpha, *(ratio * center.rank for ratio in options.alpha_over_rank)]
            ends = (min(rates), max(rates)), (min(alphas), max(alphas))
            play = tpe_search(center, *ends, options.num_trials, seed)
            stage, self.rung_scores = run_sampler_search(runner, play, seed, options.num_rungs)
        else:
            stage, self.rung_scores = successive_halving(
                runner, self.grid(center), seed, options.num_rungs
            )
        return stage

    def describe_cost(self, steps: int) -> str:
        """What will be run at most, in a sentence."""
        options = self._options
        several = len(options.ranks) * options.seeds
        named = dict.fromkeys([self.recipe_setting.targets, *options.targets])
        several += (len(named) - 1) * options.seeds
        several += options.seeds  # Of the winner.
        if self.recipe_setting not in self.rank_settings():
            several += options.seeds
        count = options.num_trials
        if options.sampler == "grid":
            count = max(len(self.grid(setting)) for setting in self.rank_settings())
        looks, done, left, short = rung_steps(steps, options.num_rungs), 0, count, 0
        for look in looks:
            short += left * (look - done)
            # Optuna may let all go on.
            left, done = left if options.sampler == "optuna" else math.ceil(left / 2), look
        return (
            f"At most {several} trials of {steps} steps, and {count} settings of learning rate and "
            f"alpha that are looked at after {', '.join(map(str, looks))} steps: "
            f"{several * steps + short:,} steps in all."
        )


_CACHE_FOLDER = "cache"

_VERSIONED_PACKAGES = ("jlora", "jax", "jaxlib", "flax", "optax")


class SearchResult(NamedTuple):
    """What a search came to.

    Attributes:
        setting: That was chosen; None where time was over before there was a choice.
        stages: That are over.
        finished: Whether all are.
        folder: Of the files.
    """

    setting: TrialSetting | None
    stages: tuple[SearchStage, ...]
    finished: bool
    folder: Path


def search(
    recipe: Recipe,
    options: SearchOptions | None = None,
    *,
    resume: bool = False,
    command: str | None = None,
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
) -> SearchResult:
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
    say, options = Console(quiet), options or SearchOptions()
    _check_search_recipe(recipe)
    steps = _get_trial_steps(recipe, options)
    course = StagedSearch(recipe, options)
    rung_steps(steps, options.num_rungs)
    for setting in course.rank_settings():
        apply_setting(recipe, setting)
    check_settings(recipe, course.extreme_settings())
    ledger = _open_study(recipe, options, steps, resume, command, devices or jax.devices())
    dated = _pin_recipe_date(recipe, ledger)
    deadline = math.inf if options.timeout_minutes is None else began + 60 * options.timeout_minutes
    runner = TrialRunner(
        dated, ledger, steps=steps, console=say, deadline=deadline, devices=devices
    )
    say(course.describe_cost(steps))
    stages: list[SearchStage] = []
    finished = True
    with persistent_compilation_cache(ledger.folder / _CACHE_FOLDER):
        try:
            for stage in course.run(runner):
                stages.append(stage)
                say(f"{stage.name}: {stage.setting}. {stage.reason}")
                _record_stages(ledger, stages, course.rung_scores)
        except SearchTimeoutError:
            finished = False
            say(
                f"minutes={options.timeout_minutes} are over. Go on with --resume and more of them."
            )
    ledger.metadata["finished"] = finished
    _record_stages(ledger, stages, course.rung_scores)
    for path in write_search_report(recipe, ledger, stages, course.rung_scores, finished=finished):
        say(f"Wrote {path}.")
    setting = stages[-1].setting if stages else None
    return SearchResult(setting, tuple(stages), finished, ledger.folder)


def _check_search_recipe(recipe: Recipe) -> None:
    if not recipe.data.validation:
        raise ValueError(
            "data.validation=[] leaves nothing to compare trials on, and test data is not for "
            "choosing. Give validation sources."
        )
    if jax.process_count() > 1 or recipe.distributed.coordinator_address or recipe.distributed.auto:
        raise ValueError(
            "distributed: a search is made by one process, which may have several devices. Leave "
            "it out."
        )


def _get_trial_steps(recipe: Recipe, options: SearchOptions) -> int:
    steps = options.steps or recipe.training.steps
    if steps is None:
        raise ValueError(
            f"training.epochs={recipe.training.epochs} does not say how many steps a trial has. "
            f"Give --steps."
        )
    return steps


def _open_study(
    recipe: Recipe,
    options: SearchOptions,
    steps: int,
    resume: bool,
    command: str | None,
    devices: Sequence[Any],
) -> Study:
    """The state of the search, for this recipe."""
    dumped = recipe.model_dump(mode="json")
    dumped.pop("output")  # A folder may be moved.
    facts = {
        "recipe": dumped,
        "options": {**dataclasses.asdict(options), "steps": steps},
        "command": command,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "finished": False,
    }
    folder = Path(recipe.output)
    if not resume:
        return Study.create(folder, {"date": datetime.date.today().isoformat(), **facts})
    return Study.resume(folder, facts)


def _pin_recipe_date(recipe: Recipe, study: Study) -> Recipe:
    """The recipe with the day on which the search began, which chat templates may show."""
    if recipe.data.chat_template_date is not None:
        return recipe
    data = recipe.data.model_copy(update={"chat_template_date": study.metadata["date"]})
    return recipe.model_copy(update={"data": data})


def _record_stages(study: Study, stages: Sequence[SearchStage], rung_scores: RungScores) -> None:
    study.metadata["stages"] = [stage.to_dict() for stage in stages]
    study.metadata["rungs"] = [
        {"setting": dataclasses.asdict(setting), "scores": scores}
        for setting, scores in rung_scores.items()
    ]
    study.save()


@contextlib.contextmanager
def persistent_compilation_cache(folder: Path) -> Iterator[None]:
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
