"""The trials of a search: ordinary runs of recipes that are derived from one."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jlora import models
from jlora.checkpoints import hub
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

# Weights of the layers of jlora.models. Routers stay as they are, as for all other runs.
TARGET_PATTERNS: dict[str, str | None] = {
    "attention": r"/layers?(_\d+)?/attention/.*kernel$",
    "mlp": r"/layers?(_\d+)?/(mlp|moe)(/.*)?(?<!router)/(kernel|gate_up|down)$",
    "all": None,
}


class SearchTimeoutError(Exception):
    """The minutes of a search are over, and no further trial begins."""


def get_target_patterns(recipe: Recipe) -> dict[str, str | None]:
    """The targets that a search may choose, by name; those of the recipe itself come first."""
    own = recipe.adapter.target_pattern
    return dict(TARGET_PATTERNS) if own is None else {RECIPE_TARGETS: own, **TARGET_PATTERNS}


def setting_from_recipe(recipe: Recipe) -> TrialSetting:
    """The recipe as it is.

    Raises:
        ValueError: Its family has no rank that could be chosen.
    """
    values, family = recipe.adapter.config_values(), recipe.adapter.family
    if family == "AdaLoRA" or not {"rank", "alpha"} <= set(values):
        why = "chooses ranks as it trains" if family == "AdaLoRA" else "has no rank and alpha"
        raise ValueError(
            f"adapter.family={family} {why}, so that there is nothing to search. Use a family with "
            f"both, such as LoRA."
        )
    targets = next(iter(get_target_patterns(recipe)))
    if recipe.adapter.target_pattern is None:
        targets = "all"
    return TrialSetting(values["rank"], targets, recipe.optimizer.learning_rate, values["alpha"])


def apply_setting(recipe: Recipe, setting: TrialSetting) -> Recipe:
    """The recipe with a setting's values, and only what was set written out."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    lora = {**raw.get("adapter", {}), "rank": setting.rank, "alpha": setting.alpha}
    lora["family"] = recipe.adapter.family
    pattern = get_target_patterns(recipe)[setting.targets]
    lora.pop("target_pattern", None)
    if pattern is not None:
        lora["target_pattern"] = pattern
    optimizer = {**raw.get("optimizer", {}), "learning_rate": setting.learning_rate}
    return recipes.validate({**raw, "adapter": lora, "optimizer": optimizer})


def make_trial_recipe(recipe: Recipe, trial: Trial, folder: Path) -> Recipe:
    """The recipe of a trial: it is evaluated at its end alone, and exports and tests nothing."""
    raw = apply_setting(recipe, trial.setting).model_dump(mode="json")
    raw["output"], raw["seed"] = str(folder), trial.seed
    raw["data"]["test"] = []
    raw["training"].update(
        epochs=1,
        steps=trial.total_steps,
        eval_steps=trial.total_steps,
        early_stopping_patience=None,
    )
    # A loss that is no number is what a trial found out, and no accident.
    raw["training"].update(on_nonfinite_loss="raise", save_total_limit=1)
    for section in ("export", "report"):
        raw.pop(section)
    return recipes.validate(raw)


class TrialRunner:
    """Makes trials, or knows them already.

    Attributes:
        metric: "loss" or "accuracy".
        steps: Of each trial.
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
        """Takes what all trials share.

        Args:
            recipe: That they are derived from.
            study: Takes their results.
            steps: Of each.
            console: Tells of each.
            deadline: By `time.monotonic`, after which none begins.
            devices: Those that are used; all when left out.
        """
        self.metric, self.steps = recipe.training.metric, steps
        self._recipe, self._study, self._console = recipe, study, console
        self._deadline, self._devices = deadline, devices
        self._program_cache = ProgramCache()

    def get_trial(self, stage: str, setting: TrialSetting, seed: int) -> Trial:
        """The trial as it is known."""
        return self._study.get_or_add_trial(stage, setting, seed, self.steps)

    def score(
        self, stage: str, setting: TrialSetting, seed: int, until: int | None = None
    ) -> float:
        """The score of a trial after so many steps, all when left out; -inf where it diverged.

        Raises:
            OutOfTime: It would have to be made, and time is over.
            Interrupted: A signal came; the trial is saved, and goes on with the next call.
        """
        until = self.steps if until is None else until
        trial = self.get_trial(stage, setting, seed)
        found = trial.score(until, self.metric)
        if found is None:
            self._run_trial(trial, until)
            found = trial.score(until, self.metric)
            assert found is not None
        return found

    def summarize(self, stage: str, setting: TrialSetting, seeds: Sequence[int]) -> ScoreSummary:
        """The scores of a setting with several seeds."""
        return summarize_scores([self.score(stage, setting, seed) for seed in seeds])

    def _run_trial(self, trial: Trial, until: int) -> None:
        """Trains up to a step, and notes what came of it."""
        folder = self._study.folder / TRIALS_FOLDER / trial.name
        result = _read_run_result(folder) if until == self.steps else None
        if result is not None:  # The search was killed before it noted that.
            _record_run_result(trial, result, self.metric)
            trial.seconds = trial.seconds or result["seconds"]
        else:
            if time.monotonic() > self._deadline:
                raise SearchTimeoutError
            began = time.monotonic()
            self._train_trial(trial, folder, until)
            trial.seconds += time.monotonic() - began
        times = [
            line["seconds"] for line in read_metrics(folder / METRICS_FILE) if "seconds" in line
        ]
        trial.step_ms = 1e3 * statistics.median(times) if times else None
        self._study.save()
        self._console(f"{self._format_result(trial, until)}, {trial.seconds:.0f} s")

    def _train_trial(self, trial: Trial, folder: Path, until: int) -> None:
        recipe = make_trial_recipe(self._recipe, trial, folder)
        steps = [path for path in (folder / CHECKPOINTS_DIR).glob("*") if path.name.isdigit()]
        try:
            outcome = train(
                recipe,
                resume=bool(steps),
                pause_after_step=until,
                devices=self._devices,
                program_cache=self._program_cache,
                quiet=True,
            )
        except NonFiniteError:
            trial.stop_reason = "diverged"
        else:
            self._study.check_data(trial.seed, self._program_cache.data_fingerprints)
            if outcome.stop_reason == "paused":
                _record_trial_value(
                    trial, until, outcome.paused_eval_metrics[self.metric], "paused"
                )
            else:
                result = _read_run_result(folder)
                assert result is not None
                _record_run_result(trial, result, self.metric)

    def _format_result(self, trial: Trial, until: int) -> str:
        score = trial.score(until, self.metric)
        value = "diverged" if score == DIVERGED else f"{self.metric} {trial.values[until]:.4f}"
        part = "" if until == self.steps else f" after {until} of {self.steps} steps"
        return f"{trial.setting}, seed {trial.seed}{part}: {value}"


def _record_trial_value(trial: Trial, step: int, value: float, stop_reason: str) -> None:
    if math.isfinite(value):
        trial.values[step], trial.stop_reason = value, stop_reason
    else:
        trial.stop_reason = "diverged"


def _read_run_result(folder: Path) -> Mapping[str, Any] | None:
    """What a run that ended wrote; None if none did."""
    try:
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # One that was killed as it wrote it.
        return None


def _record_run_result(trial: Trial, result: Mapping[str, Any], metric: str) -> None:
    # What is no number, JSON has as text.
    _record_trial_value(trial, trial.total_steps, float(result["validation"][metric]), "max_steps")
    trial.trainable_params = result["trainable_params"]


def check_settings(recipe: Recipe, settings: Sequence[TrialSetting]) -> None:
    """Tries settings on the shapes of the base: what cannot be is told before anything is trained.

    Raises:
        ValueError: A rank is larger than a weight has room for, or a pattern finds no weight.
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
            raise ValueError(f"A trial of {setting} cannot be: {error}") from error
