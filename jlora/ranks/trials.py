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
from jlora.ranks.judging import DIVERGED, Summary, summarized
from jlora.ranks.ledger import Ledger, Setting, Trial
from jlora.training import recipe as recipes
from jlora.training.loop import NotFinite
from jlora.training.recipe.sections import Recipe
from jlora.training.records import METRICS, read_lines
from jlora.training.run import CHECKPOINTS, RESULT, train
from jlora.training.setup import model_of, task_of
from jlora.training.sharing import Shared
from jlora.training.telling import Talk

FOLDER = "trials"
OWN = "recipe"
# Weights of the layers of jlora.models. Routers stay as they are, as for all other runs.
PATTERNS: dict[str, str | None] = {
    "attention": r"/layers?(_\d+)?/attention/.*kernel$",
    "mlp": r"/layers?(_\d+)?/(mlp|moe)(/.*)?(?<!router)/(kernel|gate_up|down)$",
    "all": None,
}


class OutOfTime(Exception):
    """The minutes of a search are over, and no further trial begins."""


def patterns(recipe: Recipe) -> dict[str, str | None]:
    """The targets that a search may choose, by name; those of the recipe itself come first."""
    own = recipe.lora.targets
    return dict(PATTERNS) if own is None else {OWN: own, **PATTERNS}


def setting_of(recipe: Recipe) -> Setting:
    """The recipe as it is.

    Raises:
        ValueError: Its family has no rank that could be chosen.
    """
    values, family = recipe.lora.values(), recipe.lora.family
    if family == "AdaLoRA" or not {"rank", "alpha"} <= set(values):
        why = "chooses ranks as it trains" if family == "AdaLoRA" else "has no rank and alpha"
        raise ValueError(
            f"lora.family={family} {why}, so that there is nothing to search. Use a family with "
            f"both, such as LoRA."
        )
    targets = next(iter(patterns(recipe)))
    if recipe.lora.targets is None:
        targets = "all"
    return Setting(values["rank"], targets, recipe.optimizer.learning_rate, values["alpha"])


def with_setting(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with a setting's values, and only what was set written out."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    lora = {**raw.get("lora", {}), "rank": setting.rank, "alpha": setting.alpha}
    lora["family"] = recipe.lora.family
    pattern = patterns(recipe)[setting.targets]
    lora.pop("targets", None)
    if pattern is not None:
        lora["targets"] = pattern
    optimizer = {**raw.get("optimizer", {}), "learning_rate": setting.learning_rate}
    return recipes.checked({**raw, "lora": lora, "optimizer": optimizer})


def derived(recipe: Recipe, trial: Trial, folder: Path) -> Recipe:
    """The recipe of a trial: it is evaluated at its end alone, and exports and tests nothing."""
    raw = with_setting(recipe, trial.setting).model_dump(mode="json")
    raw["output"], raw["seed"] = str(folder), trial.seed
    raw["data"]["test"] = []
    raw["training"].update(epochs=1, steps=trial.of, evaluate_every=trial.of, patience=None)
    # A loss that is no number is what a trial found out, and no accident.
    raw["training"].update(nonfinite="stop", keep_last=1)
    for section in ("export", "report"):
        raw.pop(section)
    return recipes.checked(raw)


class Runner:
    """Makes trials, or knows them already.

    Attributes:
        metric: "loss" or "accuracy".
        steps: Of each trial.
    """

    def __init__(
        self,
        recipe: Recipe,
        ledger: Ledger,
        *,
        steps: int,
        say: Talk,
        deadline: float = math.inf,
        devices: Sequence[Any] | None = None,
    ) -> None:
        """Takes what all trials share.

        Args:
            recipe: That they are derived from.
            ledger: Takes their results.
            steps: Of each.
            say: Tells of each.
            deadline: By `time.monotonic`, after which none begins.
            devices: Those that are used; all when left out.
        """
        self.metric, self.steps = recipe.training.metric, steps
        self._recipe, self._ledger, self._say = recipe, ledger, say
        self._deadline, self._devices = deadline, devices
        self._shared = Shared()

    def trial(self, stage: str, setting: Setting, seed: int) -> Trial:
        """The trial as it is known."""
        return self._ledger.trial(stage, setting, seed, self.steps)

    def score(self, stage: str, setting: Setting, seed: int, until: int | None = None) -> float:
        """The score of a trial after so many steps, all when left out; -inf where it diverged.

        Raises:
            OutOfTime: It would have to be made, and time is over.
            Interrupted: A signal came; the trial is saved, and goes on with the next call.
        """
        until = self.steps if until is None else until
        trial = self.trial(stage, setting, seed)
        found = trial.score(until, self.metric)
        if found is None:
            self._make(trial, until)
            found = trial.score(until, self.metric)
            assert found is not None
        return found

    def summary(self, stage: str, setting: Setting, seeds: Sequence[int]) -> Summary:
        """The scores of a setting with several seeds."""
        return summarized([self.score(stage, setting, seed) for seed in seeds])

    def _make(self, trial: Trial, until: int) -> None:
        """Trains up to a step, and notes what came of it."""
        folder = self._ledger.folder / FOLDER / trial.name
        result = _result_of(folder) if until == self.steps else None
        if result is not None:  # The search was killed before it noted that.
            _note_result(trial, result, self.metric)
            trial.seconds = trial.seconds or result["seconds"]
        else:
            if time.monotonic() > self._deadline:
                raise OutOfTime
            began = time.monotonic()
            self._train(trial, folder, until)
            trial.seconds += time.monotonic() - began
        times = [line["seconds"] for line in read_lines(folder / METRICS) if "seconds" in line]
        trial.step_ms = 1e3 * statistics.median(times) if times else None
        self._ledger.save()
        self._say(f"{self._told(trial, until)}, {trial.seconds:.0f} s")

    def _train(self, trial: Trial, folder: Path, until: int) -> None:
        recipe = derived(self._recipe, trial, folder)
        steps = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()]
        try:
            outcome = train(
                recipe,
                resume=bool(steps),
                until=until,
                devices=self._devices,
                shared=self._shared,
                quiet=True,
            )
        except NotFinite:
            trial.why = "diverged"
        else:
            self._ledger.check_data(trial.seed, self._shared.fingerprints)
            if outcome.why == "until":
                _note(trial, until, outcome.paused[self.metric], "until")
            else:
                result = _result_of(folder)
                assert result is not None
                _note_result(trial, result, self.metric)

    def _told(self, trial: Trial, until: int) -> str:
        score = trial.score(until, self.metric)
        value = "diverged" if score == DIVERGED else f"{self.metric} {trial.values[until]:.4f}"
        part = "" if until == self.steps else f" after {until} of {self.steps} steps"
        return f"{trial.setting}, seed {trial.seed}{part}: {value}"


def _note(trial: Trial, step: int, value: float, why: str) -> None:
    if math.isfinite(value):
        trial.values[step], trial.why = value, why
    else:
        trial.why = "diverged"


def _result_of(folder: Path) -> Mapping[str, Any] | None:
    """What a run that ended wrote; None if none did."""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # One that was killed as it wrote it.
        return None


def _note_result(trial: Trial, result: Mapping[str, Any], metric: str) -> None:
    # What is no number, JSON has as text.
    _note(trial, trial.of, float(result["validation"][metric]), "steps")
    trial.trained = result["trained"]


def check_settings(recipe: Recipe, settings: Sequence[Setting]) -> None:
    """Tries settings on the shapes of the base: what cannot be is told before anything is trained.

    Raises:
        ValueError: A rank is larger than a weight has room for, or a pattern finds no weight.
    """
    model = model_of(recipe, hub.folder_of(recipe.model.path, recipe.model.revision))
    labels = getattr(model.config, "labels", None) or 2
    shapes = models.shapes(model, recipe.model.dtype or "bfloat16")
    for setting in settings:
        try:
            task = task_of(with_setting(recipe, setting), model, labels)
            jax.eval_shape(task.lora.init, jax.random.key(0), shapes, *task.inputs)
        except ValueError as error:
            raise ValueError(f"A trial of {setting} cannot be: {error}") from error
