"""Trials of a search: training runs of recipes that are derived from one recipe."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jlora import models
from jlora.checkpoints import hub
from jlora.checkpoints.safetensors_io import remove_path
from jlora.checkpoints.text_files import name_file_in_errors, read_optional_json
from jlora.rank_search.selection import DIVERGED, ScoreSummary, summarize_scores
from jlora.rank_search.study import Study, Trial, TrialSetting
from jlora.training import recipe as recipes
from jlora.training.loop import NonFiniteError
from jlora.training.metrics import METRICS_FILE, read_metrics
from jlora.training.program_cache import ProgramCache
from jlora.training.progress import Console
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import model_from_recipe, objective_from_recipe
from jlora.training.train import CHECKPOINTS_DIR, RESULT_FILE, train

TRIALS_FOLDER = "trials"

RECIPE_TARGETS = "recipe"

# Weights of the layers of jlora.models. Routers are not adapted, as in every other run.
TARGET_PATTERNS: dict[str, str | None] = {
    "attention": r"/layers?(_\d+)?/attention/.*kernel$",
    "mlp": r"/layers?(_\d+)?/(mlp|moe)(/.*)?(?<!router)/(kernel|gate_up|down)$",
    "all": None,
}


class SearchTimeoutError(Exception):
    """Raised when a trial would have to start after the timeout of a search."""


def get_target_patterns(recipe: Recipe) -> dict[str, str | list[str] | None]:
    """Returns the target modules of a search by name, those of the recipe first."""
    pattern = recipe.adapter.target_pattern
    if pattern is None:
        return dict(TARGET_PATTERNS)
    return {RECIPE_TARGETS: pattern, **TARGET_PATTERNS}


def setting_from_recipe(recipe: Recipe) -> TrialSetting:
    """Returns the setting of the original recipe.

    Raises:
        ValueError: The recipe's adapter family has no rank to search.
    """
    values, family = recipe.adapter.config_values(), recipe.adapter.family
    if family == "AdaLoRA" or not {"rank", "alpha"} <= set(values):
        why = "chooses ranks during training" if family == "AdaLoRA" else "has no rank and alpha"
        raise ValueError(
            f"adapter.family={family} {why}, so that there is nothing to search. Use a family with "
            f"both, such as LoRA."
        )
    targets = next(iter(get_target_patterns(recipe)))
    if recipe.adapter.target_pattern is None:
        targets = "all"
    return TrialSetting(values["rank"], targets, recipe.optimizer.learning_rate, values["alpha"])


def apply_setting(recipe: Recipe, setting: TrialSetting) -> Recipe:
    """Returns the recipe with a setting's values; fields that were not set stay unset."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    adapter = {**raw.get("adapter", {}), "rank": setting.rank, "alpha": setting.alpha}
    adapter["family"] = recipe.adapter.family
    pattern = get_target_patterns(recipe)[setting.targets]
    adapter.pop("target_pattern", None)
    if pattern is not None:
        adapter["target_pattern"] = pattern
    optimizer = {**raw.get("optimizer", {}), "learning_rate": setting.learning_rate}
    return recipes.validate({**raw, "adapter": adapter, "optimizer": optimizer})


def make_trial_recipe(recipe: Recipe, trial: Trial, folder: Path) -> Recipe:
    """Returns the recipe of a trial: evaluated only at its end, without exports or test data."""
    raw = apply_setting(recipe, trial.setting).model_dump(mode="json")
    raw["output"], raw["seed"] = str(folder), trial.seed
    raw["data"]["test"] = []
    raw["training"].update(
        epochs=1,
        steps=trial.total_steps,
        eval_steps=trial.total_steps,
        early_stopping_patience=None,
    )
    # A loss that is not finite is the result of a trial, not a fault to skip.
    raw["training"].update(on_nonfinite_loss="raise", save_total_limit=1)
    for section in ("export", "report"):
        raw.pop(section)
    return recipes.validate(raw)


class TrialRunner:
    """Runs trials, each at most once, and records their results in a study.

    Attributes:
        metric: Metric of the comparison: "loss" or "accuracy".
        steps: Training steps of each trial.
    """

    def __init__(
        self,
        recipe: Recipe,
        study: Study,
        *,
        steps: int,
        console: Console,
        deadline: float = math.inf,
        devices: Sequence[Any] | None = None,
    ) -> None:
        """Builds a runner.

        Args:
            recipe: Recipe that the trials are derived from.
            study: Study that records the results.
            steps: Training steps of each trial.
            console: Output, one line for each trial.
            deadline: Time of `time.monotonic` after which no trial starts.
            devices: JAX devices. None: all.
        """
        self.metric, self.steps = recipe.training.metric, steps
        self._recipe, self._study, self._console = recipe, study, console
        self._deadline, self._devices = deadline, devices
        self._program_cache = ProgramCache()

    def get_trial(self, stage: str, setting: TrialSetting, seed: int) -> Trial:
        """Returns the trial with its results so far."""
        return self._study.get_or_add_trial(stage, setting, seed, self.steps)

    def score(
        self, stage: str, setting: TrialSetting, seed: int, until: int | None = None
    ) -> float:
        """Returns the score of a trial, after running it if necessary; -inf if it diverged.

        Args:
            stage: Name of the stage, recorded for a new trial.
            setting: Hyperparameters.
            seed: Random seed.
            until: Step of the measurement. None: the last.

        Raises:
            SearchTimeoutError: The trial would have to run after the deadline.
            TrainingInterrupted: A signal arrived; the trial is saved and continues with the next
                call.
        """
        until = self.steps if until is None else until
        trial = self.get_trial(stage, setting, seed)
        score = trial.score(until, self.metric)
        if score is None:
            self._run_trial(trial, until)
            score = trial.score(until, self.metric)
            assert score is not None
        return score

    def summarize(self, stage: str, setting: TrialSetting, seeds: Sequence[int]) -> ScoreSummary:
        """Returns the scores of a setting over seeds, after running missing trials."""
        return summarize_scores([self.score(stage, setting, seed) for seed in seeds])

    def _run_trial(self, trial: Trial, until: int) -> None:
        """Trains up to a step and records the result."""
        folder = self._study.folder / TRIALS_FOLDER / trial.name
        result = _read_run_result(folder) if until == self.steps else None
        if result is not None:  # The search was killed before it recorded the result.
            _record_run_result(trial, result, self.metric, folder)
            trial.seconds = trial.seconds or result["seconds"]
        else:
            if time.monotonic() > self._deadline:
                raise SearchTimeoutError
            start = time.monotonic()
            self._train_trial(trial, folder, until)
            trial.seconds += time.monotonic() - start
        times = [
            line["seconds"] for line in read_metrics(folder / METRICS_FILE) if "seconds" in line
        ]
        trial.step_ms = 1e3 * statistics.median(times) if times else None
        self._study.save()
        self._console(f"{self._format_result(trial, until)}, {trial.seconds:.0f} s")

    def _train_trial(self, trial: Trial, folder: Path, until: int) -> None:
        recipe = make_trial_recipe(self._recipe, trial, folder)
        checkpoints = [path for path in (folder / CHECKPOINTS_DIR).glob("*") if path.name.isdigit()]
        try:
            train_result = train(
                recipe,
                resume=bool(checkpoints),
                pause_after_step=until,
                devices=self._devices,
                program_cache=self._program_cache,
                quiet=True,
            )
        except NonFiniteError:
            self._check_inputs(trial)
            trial.stop_reason = "diverged"
        else:
            self._check_inputs(trial)
            if train_result.stop_reason == "paused":
                value = train_result.paused_eval_metrics[self.metric]
                _record_trial_value(trial, until, value, "paused")
            else:
                result = _read_run_result(folder)
                assert result is not None
                _record_run_result(trial, result, self.metric, folder)

    def _check_inputs(self, trial: Trial) -> None:
        """Compares the base and the data of a trial, which has just run, with those of others."""
        try:
            self._study.check_base(self._program_cache.base_summary)
            self._study.check_data(trial.seed, self._program_cache.data_fingerprints)
        except ValueError:
            remove_path(self._study.folder / TRIALS_FOLDER / trial.name)  # Not to be resumed.
            raise

    def _format_result(self, trial: Trial, until: int) -> str:
        score = trial.score(until, self.metric)
        value = "diverged" if score == DIVERGED else f"{self.metric} {trial.values[until]:.4f}"
        progress = "" if until == self.steps else f" after {until} of {self.steps} steps"
        return f"{trial.setting}, seed {trial.seed}{progress}: {value}"


def _record_trial_value(trial: Trial, step: int, value: float, stop_reason: str) -> None:
    if math.isfinite(value):
        trial.values[step], trial.stop_reason = value, stop_reason
    else:
        trial.stop_reason = "diverged"


def _read_run_result(folder: Path) -> Mapping[str, Any] | None:
    """Returns result.json of a run that ended; None if there is none.

    Raises:
        ValueError: The file is damaged.
    """
    return read_optional_json(folder / RESULT_FILE)


def _record_run_result(trial: Trial, result: Mapping[str, Any], metric: str, folder: Path) -> None:
    with name_file_in_errors(folder / RESULT_FILE):
        # JSON has numbers that are not finite as text.
        value, params = float(result["validation"][metric]), result["trainable_params"]
        if type(params) is not int or not 0 <= result["seconds"] < math.inf:
            raise ValueError("its numbers are damaged. Remove it to measure the trial again.")
    _record_trial_value(trial, trial.total_steps, value, "max_steps")
    trial.trainable_params = params


def check_settings(recipe: Recipe, settings: Sequence[TrialSetting]) -> None:
    """Initializes the adapters of settings on abstract shapes, to fail before any training.

    Args:
        recipe: Original recipe.
        settings: Settings to check.

    Raises:
        ValueError: A rank exceeds that of a weight, or a pattern matches no weight.
    """
    model = model_from_recipe(
        recipe, hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    )
    labels = getattr(model.config, "num_labels", None) or 2
    shapes = models.abstract_params(model, recipe.model.dtype or "bfloat16")
    for setting in settings:
        try:
            task = objective_from_recipe(apply_setting(recipe, setting), model, labels)
            jax.eval_shape(task.lora.init, jax.random.key(0), shapes, *task.example_inputs)
        except ValueError as error:
            raise ValueError(f"A trial of {setting} is not possible: {error}") from error
