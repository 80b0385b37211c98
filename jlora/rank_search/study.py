"""Options of a search, its trials, and their state on disk in search.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from jlora.checkpoints.base_digest import OTHER_BASE
from jlora.checkpoints.safetensors_io import format_names, replace_file_atomically
from jlora.checkpoints.text_files import name_file_in_errors, read_json
from jlora.rank_search.selection import DIVERGED

STUDY_FILE = "search.json"

STUDY_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Configuration of a search.

    Attributes:
        ranks: Ranks to try, in increasing order, until a larger one gains nothing beyond noise.
        seeds: Number of seeds of each rank and each choice of target modules; 2 or more.
        steps: Training steps of each trial. None: those of the recipe.
        targets: Target modules to try besides the recipe's own: names of
            `jlora.rank_search.trials.TARGET_PATTERNS`, or "recipe".
        lr_multipliers: Learning rates to try, as multiples of the recipe's.
        alpha_over_rank: Ratios alpha / rank to try besides that of the recipe.
        fix: Quantity that stays as in the recipe while ranks differ: "alpha", or "scale", the
            factor on the product of the adapter's factors.
        num_rungs: Number of rungs of successive halving over learning rate and alpha. Each rung is
            after twice as many steps as the one before, the last at the end of the trial.
        timeout_minutes: Time in minutes after which no trial starts; the search can be resumed.
            None: no limit.

    Raises:
        ValueError: A value is out of its range.

    References:
        For a fixed alpha: Schulman et al., LoRA Without Regret, Thinking Machines Lab, 2025, find
        that with the scale alpha / rank and one alpha the best learning rate hardly depends on the
        rank, so that ranks can be compared at one learning rate.

    Example:
        >>> from jlora.rank_search import SearchOptions
        >>> SearchOptions(ranks=(1, 2, 4), timeout_minutes=30).num_rungs
        3
        >>> SearchOptions(seeds=1)
        Traceback (most recent call last):
        ValueError: seeds=1 must be 2 or more: one seed has no noise to compare gains with.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seeds: int = 3
    steps: int | None = None
    targets: tuple[str, ...] = ("attention", "mlp", "all")
    lr_multipliers: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    alpha_over_rank: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    fix: str = "alpha"
    num_rungs: int = 3
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or self.ranks[0] < 1:
            raise ValueError(
                f"ranks={self.ranks} must be positive and increasing, such as 1,2,4,8."
            )
        if self.seeds < 2:
            raise ValueError(
                f"seeds={self.seeds} must be 2 or more: one seed has no noise to compare gains "
                f"with."
            )
        for name in ("steps", "num_rungs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        for name in ("lr_multipliers", "alpha_over_rank"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(
                    f"{name}={values} must be one or more positive numbers, such as 0.5,1,2."
                )
        if self.fix not in ("alpha", "scale"):
            raise ValueError(f"fix={self.fix!r} must be one of alpha, scale.")
        if self.timeout_minutes is not None and not 0 < self.timeout_minutes < math.inf:
            raise ValueError(
                f"timeout_minutes={self.timeout_minutes} must be positive and finite, or None for "
                f"no limit."
            )


# Types of the values that search.json has and a search computes with.
_SAVED_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "data", "base"), (dict,)),
    "date": (str,),
    "seconds": (int, float),
}
_SAVED_TRIAL_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rank", "seed", "total_steps"), (int,)),
    **dict.fromkeys(("targets", "stage", "stop_reason"), (str,)),
    **dict.fromkeys(("learning_rate", "alpha", "seconds"), (int, float)),
    "trainable_params": (int, NoneType),
    "step_ms": (int, float, NoneType),
}


def _check_saved_type(name: str, value: Any, types: tuple[type, ...]) -> None:
    if type(value) not in types:
        raise ValueError(
            f"{name}={value!r:.200} must be {' or '.join(one.__name__ for one in types)}. Set "
            f"another --output and start a new search."
        )


@dataclasses.dataclass(frozen=True)
class TrialSetting:
    """Hyperparameters in which trials differ, apart from their seeds.

    Attributes:
        rank: Rank of every adapted weight.
        targets: Target modules: a name of `jlora.rank_search.trials.TARGET_PATTERNS`, or "recipe".
        learning_rate: Peak learning rate.
        alpha: LoRA alpha, the numerator of the scale.

    Example:
        >>> from jlora.rank_search import TrialSetting
        >>> print(TrialSetting(8, "attention", 2e-4, 16.0))
        rank 8, attention, learning rate 0.0002, alpha 16
    """

    rank: int
    targets: str
    learning_rate: float
    alpha: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank}, {self.targets}, learning rate {self.learning_rate:g}, "
            f"alpha {self.alpha:g}"
        )


@dataclasses.dataclass
class Trial:
    """State of one training run of a search.

    Attributes:
        stage: Stage that first used the trial.
        setting: Hyperparameters.
        seed: Random seed of the run.
        total_steps: Training steps of the complete run, on which the learning rate schedule
            depends.
        values: Metric on the validation data by the step at which it was measured.
        stop_reason: "paused" at a rung, "max_steps" at the end, "diverged" where a loss, a gradient
            or the metric was not finite; empty before the first measurement.
        trainable_params: Number of trainable parameters; None before the end.
        seconds: Wall-clock time, including compilation and evaluation.
        step_ms: Median time of a training step in milliseconds; None before the first measurement.

    Example:
        >>> from jlora.rank_search import Trial, TrialSetting
        >>> trial = Trial("rank", TrialSetting(8, "all", 2e-4, 16.0), seed=0, total_steps=100)
        >>> trial.values[50] = 0.75
        >>> trial.score(50, "accuracy"), trial.score(100, "accuracy")
        (0.75, None)
    """

    stage: str
    setting: TrialSetting
    seed: int
    total_steps: int
    values: dict[int, float] = dataclasses.field(default_factory=dict)
    stop_reason: str = ""
    trainable_params: int | None = None
    seconds: float = 0.0
    step_ms: float | None = None

    @property
    def name(self) -> str:
        """Folder name, unique among the trials of one recipe."""
        s = self.setting
        return (
            f"r{s.rank}-{s.targets}-lr{s.learning_rate!r}-a{s.alpha!r}-{self.total_steps}steps-"
            f"s{self.seed}"
        )

    @property
    def last_step(self) -> int:
        """Step of the last measurement; 0 before the first."""
        return max(self.values, default=0)

    def score(self, step: int, metric: str) -> float | None:
        """Returns the score after a step, where higher is better; None if it is not known.

        Of a run that went past the step without a measurement there, it is the score of the first
        later measurement. -inf for a run that diverged before.

        Args:
            step: Number of training steps.
            metric: "accuracy", or "loss", whose sign is flipped.
        """
        measured = [each for each in self.values if each >= step]
        if measured:
            value = self.values[min(measured)]
            return value if metric == "accuracy" else -value
        return DIVERGED if self.stop_reason == "diverged" else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as a mapping for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """Returns the trial that `to_dict` wrote, read back from JSON.

        Raises:
            ValueError: A value has another type. Other errors of damaged data are possible.
        """
        values = {int(step): float(value) for step, value in data["values"].items()}
        trial = cls(**{**data, "setting": TrialSetting(**data["setting"]), "values": values})
        for part in (trial, trial.setting):
            for field in dataclasses.fields(part):
                if field.name in _SAVED_TRIAL_TYPES:
                    types = _SAVED_TRIAL_TYPES[field.name]
                    _check_saved_type(field.name, getattr(part, field.name), types)
        return trial


class Study:
    """State of a search, written atomically to search.json.

    Attributes:
        folder: Output folder of the search.
        metadata: Recipe, options, digests of the base, fingerprints of the data, results, and the
            seconds of all processes of the search up to the last save.
        trials: Trials by name, in the order of their first use.

    Example:
        >>> import pathlib
        >>> import tempfile
        >>> from jlora.rank_search import Study, TrialSetting
        >>> metadata = {"recipe": {"seed": 0}, "options": {"num_rungs": 3}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     study = Study.create(pathlib.Path(folder), metadata)
        ...     trial = study.get_or_add_trial("rank", TrialSetting(8, "all", 2e-4, 16.0), 0, 100)
        ...     study.save()
        ...     list(Study.resume(pathlib.Path(folder), metadata).trials)
        ['r8-all-lr0.0002-a16.0-100steps-s0']
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], trials: dict[str, Trial]) -> None:
        self.folder, self.metadata, self.trials = folder, metadata, trials
        self._previous_seconds, self._start_time = metadata.get("seconds", 0.0), time.monotonic()

    @classmethod
    def create(cls, folder: Path, metadata: dict[str, Any]) -> Study:
        """Creates a study without trials and writes its file.

        Args:
            folder: Output folder, created if missing.
            metadata: Mapping for JSON with the keys "recipe" and "options".

        Raises:
            FileExistsError: The folder has a study already.
        """
        if os.path.lexists(folder / STUDY_FILE):
            raise FileExistsError(
                f"{folder} has a search already, which is left unchanged. Continue it with "
                f"--resume, or set another --output."
            )
        folder.mkdir(parents=True, exist_ok=True)
        study = cls(folder, {"format": STUDY_FORMAT, **metadata}, {})
        study.save()
        return study

    @classmethod
    def resume(cls, folder: Path, metadata: dict[str, Any]) -> Study:
        """Reads the study of a folder to continue it with the same recipe.

        Args:
            folder: Output folder of the search.
            metadata: Mapping as for `create`. "recipe" must be that of the study; the number of
                rungs must be, too, once trials of learning rates exist. Other entries may differ.

        Raises:
            FileNotFoundError: The folder has no study.
            ValueError: The file cannot be read, has a newer format, or is of another recipe or
                number of rungs.
        """
        path = folder / STUDY_FILE
        if not os.path.lexists(path):
            raise FileNotFoundError(
                f"{path} is missing: there is no search to resume. Start without --resume."
            )
        with name_file_in_errors(path):
            saved = read_json(path)
            saved_format, saved_recipe = saved["format"], saved["recipe"]
            saved_rungs = saved["options"]["num_rungs"] if saved_format <= STUDY_FORMAT else None
            trials = [Trial.from_dict(trial) for trial in saved.pop("trials")]
            for name, types in _SAVED_TYPES.items():
                if name in saved:
                    _check_saved_type(name, saved[name], types)
        if saved_format > STUDY_FORMAT:
            raise ValueError(
                f"{path} has format={saved_format}, but this release reads up to {STUDY_FORMAT}. "
                f"Use the release that wrote it."
            )
        differences = diff_nested_mappings(saved_recipe, metadata["recipe"])
        if differences:
            raise ValueError(
                f"{path} is of another recipe: {format_names(differences)}. Resume with the "
                f"original recipe, or set another --output."
            )
        num_rungs = metadata["options"]["num_rungs"]
        if saved_rungs != num_rungs and any(trial.stage == "rates" for trial in trials):
            raise ValueError(
                f"num_rungs={num_rungs}, but {path} has trials of learning rates with the rungs of "
                f"num_rungs={saved_rungs}. Resume with the same number."
            )
        return cls(folder, {**saved, **metadata}, {trial.name: trial for trial in trials})

    def get_or_add_trial(
        self, stage: str, setting: TrialSetting, seed: int, total_steps: int
    ) -> Trial:
        """Returns the trial of a setting and seed, added without measurements if it is new."""
        trial = Trial(stage, setting, seed, total_steps)
        return self.trials.setdefault(trial.name, trial)

    def check_base(self, summary: Mapping[str, str]) -> None:
        """Records the base of the trials and compares it with that of earlier ones.

        Args:
            summary: Digests of the base, as `BaseDigest.summarize` returns them.

        Raises:
            ValueError: Earlier trials had another base.
        """
        recorded = self.metadata.setdefault("base", dict(summary))
        if changed := [name for name in summary if recorded.get(name) != summary[name]]:
            raise ValueError(
                f"The base has {OTHER_BASE[changed[0]]} than in earlier trials in "
                f"{self.folder / STUDY_FILE}, so that scores cannot be compared. Restore the "
                f"base, or start a new search with another --output."
            )

    def check_data(self, seed: int, fingerprints: Mapping[str, str | None]) -> None:
        """Records the data of a trial and compares it with that of earlier trials.

        Args:
            seed: Random seed of the trial, on which the training data depends.
            fingerprints: Fingerprints of the data by its use: "train" and "validation".

        Raises:
            ValueError: An earlier trial had other data.
        """
        recorded = self.metadata.setdefault("data", {})
        for use, fingerprint in fingerprints.items():
            name = f"{use} of seed {seed}" if use == "train" else use
            if recorded.setdefault(name, fingerprint) != fingerprint:
                raise ValueError(
                    f"The {use} data differs from that of earlier trials in "
                    f"{self.folder / STUDY_FILE}, so that scores cannot be compared. Restore the "
                    f"data, or start a new search with another --output."
                )

    def save(self) -> None:
        """Writes the file atomically: it is complete at every moment, even if killed."""
        self.metadata["seconds"] = round(
            self._previous_seconds + time.monotonic() - self._start_time, 1
        )
        state = {**self.metadata, "trials": [trial.to_dict() for trial in self.trials.values()]}
        text = json.dumps(_to_finite_json(state), indent=1, allow_nan=False) + "\n"
        replace_file_atomically(self.folder / STUDY_FILE, text.encode())


def diff_nested_mappings(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Returns the fields in which two nested mappings differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            difference
            for key in {**old, **new}
            for difference in diff_nested_mappings(
                old.get(key), new.get(key), f"{prefix}.{key}".lstrip(".")
            )
        ]
    return [] if old == new else [f"{prefix}={old!r} there, {new!r} here"]


def _to_finite_json(value: Any) -> Any:
    """Returns the value for JSON, with None in place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _to_finite_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_finite_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
