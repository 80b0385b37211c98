"""Search for rank, target modules, learning rate and alpha in stages, and its files.

Each stage starts from the choice of the one before: first the rank, then the target modules, then
learning rate and alpha, and last a confirmation against the original recipe.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jlora
from jlora.checkpoints import hub
from jlora.checkpoints.base_digest import BaseDigest
from jlora.checkpoints.output_lock import lock_output
from jlora.checkpoints.safetensors_io import remove_partial_outputs
from jlora.rank_search.report import write_search_report
from jlora.rank_search.selection import rung_steps
from jlora.rank_search.stages import (
    RungScores,
    SearchStage,
    compare_settings,
    rank_ladder,
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
from jlora.training.checkpointing import check_writable
from jlora.training.progress import Console
from jlora.training.recipe.sections import Recipe
from jlora.training.runtime import persistent_compilation_cache

_CACHE_FOLDER = "cache"
# Each of the many short trials would compile even the smallest programs anew.
_CACHE_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}

_VERSIONED_PACKAGES = ("jax", "jaxlib", "flax", "optax")


class StagedSearch:
    """The stages of a search, each of which starts from the choice of the one before.

    Attributes:
        recipe_setting: Setting of the original recipe.
        rung_scores: Scores of all settings of learning rate and alpha at their rungs.
    """

    def __init__(self, recipe: Recipe, options: SearchOptions) -> None:
        """Checks the options against the recipe.

        Raises:
            ValueError: A target is unknown, or the recipe's adapter family has no rank.
        """
        known = get_target_patterns(recipe)
        unknown = [name for name in options.targets if name not in known]
        if unknown or not options.targets:
            raise ValueError(
                f"targets={list(options.targets)} must be one or more of {list(known)}, got "
                f"{unknown}."
            )
        self.recipe_setting = setting_from_recipe(recipe)
        self.rung_scores: RungScores = {}
        self._options = options
        self._rank_stabilized = bool(recipe.adapter.config_values().get("use_rslora"))
        self._seeds = [recipe.seed + offset for offset in range(options.seeds)]

    def setting_at_rank(self, rank: int) -> TrialSetting:
        """Returns the recipe's setting with another rank."""
        alpha = self.recipe_setting.alpha
        if self._options.fix == "scale":
            ratio = rank / self.recipe_setting.rank
            alpha *= math.sqrt(ratio) if self._rank_stabilized else ratio
        return dataclasses.replace(self.recipe_setting, rank=rank, alpha=alpha)

    def rank_settings(self) -> list[TrialSetting]:
        """Returns the recipe's setting with each of the ranks to try."""
        return list(map(self.setting_at_rank, self._options.ranks))

    def extreme_settings(self) -> list[TrialSetting]:
        """Returns settings that cover all others: the largest rank with all target modules."""
        largest = self.setting_at_rank(max(self._options.ranks))
        others = [dataclasses.replace(largest, targets=name) for name in self._options.targets]
        return list(dict.fromkeys([self.recipe_setting, largest, *others]))

    def grid(self, center: TrialSetting) -> list[TrialSetting]:
        """Returns all pairs of learning rate and alpha around a setting, which comes first."""
        alphas = [center.alpha, *(ratio * center.rank for ratio in self._options.alpha_over_rank)]
        settings = [
            dataclasses.replace(
                center, learning_rate=float(f"{factor * center.learning_rate:.6g}"), alpha=alpha
            )
            for alpha in dict.fromkeys(alphas)
            for factor in self._options.lr_multipliers
        ]
        return list(dict.fromkeys([center, *settings]))

    def run(self, runner: TrialRunner) -> Iterator[SearchStage]:
        """Runs the trials of the stages in order and yields each stage when it ends."""
        seeds = self._seeds
        rank_stage = rank_ladder(runner, self.rank_settings(), seeds)
        yield rank_stage
        settings = [
            dataclasses.replace(rank_stage.setting, targets=name) for name in self._target_names()
        ]
        targets_stage = compare_settings(runner, settings, seeds, name="targets")
        yield targets_stage
        rates_stage = self._run_rates_stage(runner, targets_stage.setting)
        yield rates_stage
        finalists = [rates_stage.setting, targets_stage.setting, self.recipe_setting]
        yield compare_settings(runner, finalists, seeds, name="confirmation")

    def _target_names(self) -> list[str]:
        """Returns the target modules to try, those of the recipe first."""
        return list(dict.fromkeys([self.recipe_setting.targets, *self._options.targets]))

    def _run_rates_stage(self, runner: TrialRunner, center: TrialSetting) -> SearchStage:
        """Runs the stage of learning rate and alpha.

        Its trials share a seed that no other stage uses. The winner was partly lucky with that
        seed, and is confirmed with the seeds of the other stages.
        """
        stage, self.rung_scores = successive_halving(
            runner, self.grid(center), self._seeds[-1] + 1, self._options.num_rungs
        )
        return stage

    def describe_cost(self, steps: int) -> str:
        """Returns a sentence with the largest number of trials and steps of the search.

        Args:
            steps: Training steps of each trial.
        """
        options = self._options
        full_trials = len(options.ranks) * options.seeds
        full_trials += (len(self._target_names()) - 1) * options.seeds
        full_trials += options.seeds  # Confirmation of the winner.
        if self.recipe_setting not in self.rank_settings():
            full_trials += options.seeds
        num_settings = max(len(self.grid(setting)) for setting in self.rank_settings())
        rungs = rung_steps(steps, options.num_rungs)
        remaining, previous_rung, halving_steps = num_settings, 0, 0
        for rung in rungs:
            halving_steps += remaining * (rung - previous_rung)
            remaining = math.ceil(remaining / 2)
            previous_rung = rung
        return (
            f"At most {full_trials} trials of {steps} steps, and {num_settings} settings of "
            f"learning rate and alpha with rungs after {', '.join(map(str, rungs))} steps: "
            f"{full_trials * steps + halving_steps:,} steps in total."
        )


class SearchResult(NamedTuple):
    """Result of a search.

    Attributes:
        setting: Selected setting; None if the timeout came before the first choice.
        stages: Stages that have ended.
        finished: Whether all stages have ended.
        folder: Output folder.

    Example:
        >>> from pathlib import Path
        >>> from jlora.rank_search import SearchResult, TrialSetting
        >>> setting = TrialSetting(8, "attention", 2e-4, 16.0)
        >>> result = SearchResult(setting, stages=(), finished=True, folder=Path("run"))
        >>> print(result.setting)
        rank 8, attention, learning rate 0.0002, alpha 16
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
    """Selects rank, target modules, learning rate and alpha by trials on the validation data.

    Writes search.json, table.md, quality.png, best.yaml, the run folders of the trials and a cache
    of compiled programs to the recipe's output folder. Test data is not used.

    Args:
        recipe: Validated recipe with validation data.
        options: Configuration of the search. None: the defaults.
        resume: Continue the search in the output folder.
        command: Command line, recorded in search.json.
        devices: JAX devices. None: all.
        quiet: Print nothing.

    Returns:
        The selected setting and the stages that led to it.

    Raises:
        FileExistsError: The folder has a search already and `resume` is False.
        FileNotFoundError: There is no search to resume, or the base or data are missing.
        ValueError: The recipe has no validation data, a setting is not possible, all trials
            diverged, or the search to resume is of another recipe, base, data or number of rungs.
        OutputInUseError: Another process is writing the output folder.
        TrainingInterrupted: SIGTERM or SIGINT arrived; all progress is saved.

    References:
        The one-standard-error rule of `jlora.rank_search.selection.one_standard_error_rule` selects
        within a stage; successive halving, Jamieson and Talwalkar, arXiv:1502.07943, searches
        learning rate and alpha.

    Example:
        >>> from jlora.rank_search import SearchOptions, search
        >>> from jlora.training import recipe
        >>> source = {"path": "train.jsonl", "format": "chat"}
        >>> raw = {"output": "run", "model": {"path": "base"}, "data": {"train": [source]}}
        >>> search(recipe.validate(raw), SearchOptions(ranks=(4, 8), timeout_minutes=60))
        Traceback (most recent call last):
        ValueError: data.validation=[] must have sources: trials are compared on them. Add some.
    """
    start = time.monotonic()
    console, options = Console(quiet), options or SearchOptions()
    _check_search_recipe(recipe)
    steps = _get_trial_steps(recipe, options)
    staged = StagedSearch(recipe, options)
    rung_steps(steps, options.num_rungs)
    for setting in staged.rank_settings():
        apply_setting(recipe, setting)
    check_settings(recipe, staged.extreme_settings())
    check_writable(Path(recipe.output))
    with lock_output(recipe.output):
        return _search_locked(
            recipe, options, staged, start, console, resume=resume, command=command, devices=devices
        )


def _search_locked(
    recipe: Recipe,
    options: SearchOptions,
    staged: StagedSearch,
    start: float,
    console: Console,
    *,
    resume: bool,
    command: str | None,
    devices: Sequence[Any] | None,
) -> SearchResult:
    """Runs the search in an output folder that no other process writes."""
    remove_partial_outputs(Path(recipe.output))
    steps = _get_trial_steps(recipe, options)
    study = _open_study(recipe, options, steps, resume, command, devices or jax.devices())
    base = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    study.check_base(BaseDigest.from_folder(base).summarize())
    timeout = math.inf if options.timeout_minutes is None else 60 * options.timeout_minutes
    runner = TrialRunner(
        _pin_recipe_date(recipe, study),
        study,
        steps=steps,
        console=console,
        deadline=start + timeout,
        devices=devices,
    )
    console(staged.describe_cost(steps))
    stages: list[SearchStage] = []
    finished = True
    with persistent_compilation_cache(study.folder / _CACHE_FOLDER, **_CACHE_SETTINGS):
        try:
            for stage in staged.run(runner):
                stages.append(stage)
                console(f"{stage.name}: {stage.setting}. {stage.reason}")
                _record_stages(study, stages, staged.rung_scores)
        except SearchTimeoutError:
            finished = False
            console(
                f"timeout_minutes={options.timeout_minutes:g} reached. Continue with --resume, "
                f"which starts a new timeout."
            )
    study.metadata["finished"] = finished
    _record_stages(study, stages, staged.rung_scores)
    for path in write_search_report(recipe, study, stages, staged.rung_scores, finished=finished):
        console(f"Wrote {path}.")
    setting = stages[-1].setting if stages else None
    return SearchResult(setting, tuple(stages), finished, study.folder)


def _check_search_recipe(recipe: Recipe) -> None:
    if not recipe.data.validation:
        raise ValueError(
            "data.validation=[] must have sources: trials are compared on them. Add some."
        )
    if jax.process_count() > 1 or recipe.distributed.coordinator_address or recipe.distributed.auto:
        raise ValueError(
            "distributed: a search runs in one process, which may have several devices. Remove "
            "the section."
        )


def _get_trial_steps(recipe: Recipe, options: SearchOptions) -> int:
    steps = options.steps or recipe.training.steps
    if steps is None:
        raise ValueError(
            f"training.epochs={recipe.training.epochs} does not fix the number of steps of a "
            f"trial. Set --steps."
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
    """Creates or resumes the study of the recipe."""
    recipe_fields = recipe.model_dump(mode="json")
    recipe_fields.pop("output")  # A folder may be moved.
    metadata = {
        "recipe": recipe_fields,
        "options": {**dataclasses.asdict(options), "steps": steps},
        "command": command,
        "versions": {
            "jlora": jlora.__version__,
            **{name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES},
        },
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "finished": False,
    }
    folder = Path(recipe.output)
    if not resume:
        return Study.create(folder, {"date": datetime.date.today().isoformat(), **metadata})
    return Study.resume(folder, metadata)


def _pin_recipe_date(recipe: Recipe, study: Study) -> Recipe:
    """Returns the recipe with the start date of the search, which chat templates may print."""
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
