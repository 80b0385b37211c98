"""search.json: what a search was asked for and what every trial of it came to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.checkpoints.safetensors_io import format_names
from jlora.rank_search.selection import DIVERGED


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How wide and how long a search is.

    Attributes:
        ranks: Those that are tried, from the smallest up, as long as more gain something.
        seeds: With how many seeds each rank and each choice of targets is trained; 2 or more.
        steps: Of each trial; those of the recipe when None.
        targets: Names of `jlora.importance.trials.PATTERNS`; the recipe's own are tried besides.
        lr_multipliers: Learning rates, as multiples of the recipe's.
        alpha_over_rank: alpha / rank; that of the recipe is tried besides.
        fix: What stays the recipe's while ranks differ: "alpha", or "scale", the factor that the
            product of factors is multiplied by.
        sampler: "grid", all pairs of rates and alphas, or "optuna", which draws between their ends.
        num_trials: How many Optuna draws.
        num_rungs: How often a trial of learning rate and alpha is looked at, the last time at its end;
            each time after twice as many steps.
        timeout_minutes: After which no trial begins; the search can be resumed. No end when None.

    References:
        That alpha is held: Schulman et al., LoRA Without Regret, Thinking Machines Lab, 2025, find
        that with the scale alpha / rank and one alpha the best learning rate hardly depends on the
        rank, so that ranks can be compared at the same one.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seeds: int = 3
    steps: int | None = None
    targets: tuple[str, ...] = ("attention", "mlp", "all")
    lr_multipliers: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    alpha_over_rank: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    fix: str = "alpha"
    sampler: str = "grid"
    num_trials: int = 16
    num_rungs: int = 3
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or self.ranks[0] < 1:
            raise ValueError(
                f"ranks={self.ranks} are no growing list of ranks. Give some, such as 1,2,4,8."
            )
        if self.seeds < 2:
            raise ValueError(
                f"seeds={self.seeds} tell nothing of the noise that gains are compared with. Give "
                f"2 or more."
            )
        for name, least in (("steps", 1), ("num_trials", 1), ("num_rungs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is no count. Give {least} or more.")
        for name in ("lr_multipliers", "alpha_over_rank"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(
                    f"{name}={values} are no positive numbers. Give some, such as 0.5,1,2."
                )
        for name, known in (("fix", ("alpha", "scale")), ("sampler", ("grid", "optuna"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is none of {', '.join(known)}. Choose one."
                )
        if self.timeout_minutes is not None and not 0 < self.timeout_minutes < math.inf:
            raise ValueError(
                f"timeout_minutes={self.timeout_minutes} is no time. Give a positive number."
            )


STUDY_FILE = "search.json"

STUDY_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TrialSetting:
    """What trials differ in, their seeds aside.

    Attributes:
        rank: Of every adapted weight.
        targets: Which weights those are, by a name of `jlora.importance.trials.patterns`.
        learning_rate: The highest.
        alpha: Of the scale.
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
    """One run, as far as it went.

    Attributes:
        stage: That first asked for it.
        setting: What it is of.
        seed: Its draws'.
        total_steps: How many steps the whole run has, for which its learning rates are.
        values: The metric on the validation data, by the step at which it was measured.
        stop_reason: "paused" where it paused, "max_steps" at its end, "diverged" where a loss, a gradient or the
            metric was no number; empty before the first.
        trainable_params: How many numbers it trains; None before its end.
        seconds: Of the clock, compiling and evaluating with it.
        step_ms: The median of its steps, in milliseconds.
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
        """Of its folder: everything that tells it from other trials of the same recipe."""
        s = self.setting
        return f"r{s.rank}-{s.targets}-lr{s.learning_rate!r}-a{s.alpha!r}-{self.total_steps}steps-s{self.seed}"

    @property
    def last_step(self) -> int:
        """After how many steps it was measured last."""
        return max(self.values, default=0)

    def score(self, step: int, metric: str) -> float | None:
        """Of its state after a step, the higher the better; None if that is not known.

        Of a run that went past the step without being measured there, it is that of the first
        measurement after it.
        """
        measured = [each for each in self.values if each >= step]
        if measured:
            value = self.values[min(measured)]
            return value if metric == "accuracy" else -value
        return DIVERGED if self.stop_reason == "diverged" else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """From what `to_dict` returned, through JSON."""
        values = {int(step): float(value) for step, value in data["values"].items()}
        return cls(**{**data, "setting": TrialSetting(**data["setting"]), "values": values})


class Study:
    """The state of a search in its file, which is whole at every moment.

    Attributes:
        trials: By name, in the order in which they were first asked for.
        metadata: Beside them: the recipe, the options, fingerprints of the data, what came out, and
            the seconds that all of it took, up to the last save.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], trials: dict[str, Trial]) -> None:
        self.folder, self.metadata, self.trials = folder, metadata, trials
        self._previous_seconds, self._start_time = metadata.get("seconds", 0.0), time.monotonic()

    @classmethod
    def create(cls, folder: Path, metadata: dict[str, Any]) -> Study:
        """A new one, whose file is written.

        Raises:
            FileExistsError: There is one.
        """
        if (folder / STUDY_FILE).exists():
            raise FileExistsError(
                f"{folder} holds a search, which is left as it was. Go on with --resume, or give "
                f"another --output."
            )
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder, {"format": STUDY_FORMAT, **metadata}, {})
        found.save()
        return found

    @classmethod
    def resume(cls, folder: Path, metadata: dict[str, Any]) -> Study:
        """The one in a folder, for the same recipe.

        Args:
            folder: Of the search.
            metadata: What `create` was given; all but "recipe" may differ, and once learning rates are
                tried also the rungs may not.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It cannot be read, is of a later release, or of another recipe or rungs.
        """
        path = folder / STUDY_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: there is no search to go on with. Begin without --resume."
            )
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            form, recipe = held["format"], held["recipe"]
            looks = held["options"]["num_rungs"] if form <= STUDY_FORMAT else None
            trials = [Trial.from_dict(one) for one in held.pop("trials")]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no state of a search ({type(error).__name__}: {error}). Give another "
                f"--output, and begin anew."
            ) from error
        if form > STUDY_FORMAT:
            raise ValueError(
                f"{path} was made by format {form}, and this release reads up to {STUDY_FORMAT}. Use the "
                f"release that wrote it."
            )
        differing = diff_nested_mappings(recipe, metadata["recipe"])
        if differing:
            raise ValueError(
                f"{path} is of another recipe: {format_names(differing)}. Resume with the recipe as it "
                f"was, or give another --output."
            )
        asked = metadata["options"]["num_rungs"]
        if looks != asked and any(trial.stage == "rates" for trial in trials):
            raise ValueError(
                f"num_rungs={asked}, and {path} has trials of learning rates that were looked at at "
                f"the steps of num_rungs={looks}. Resume with as many as before."
            )
        return cls(folder, {**held, **metadata}, {trial.name: trial for trial in trials})

    def get_or_add_trial(
        self, stage: str, setting: TrialSetting, seed: int, total_steps: int
    ) -> Trial:
        """The trial of a setting, or a new one."""
        made = Trial(stage, setting, seed, total_steps)
        return self.trials.setdefault(made.name, made)

    def check_data(self, seed: int, fingerprints: Mapping[str, str | None]) -> None:
        """Notes what data a trial had.

        Raises:
            ValueError: Earlier trials had other data.
        """
        held = self.metadata.setdefault("data", {})
        for use, fingerprint in fingerprints.items():
            name = f"{use} of seed {seed}" if use == "train" else use
            if held.setdefault(name, fingerprint) != fingerprint:
                raise ValueError(
                    f"The {use} data is not what earlier trials in {self.folder} had, so that "
                    f"scores cannot be compared. Put it back, or begin anew with another --output."
                )

    def save(self) -> None:
        """Writes the file, in one move."""
        path = self.folder / STUDY_FILE
        partial = path.with_suffix(".partial")
        self.metadata["seconds"] = round(
            self._previous_seconds + time.monotonic() - self._start_time, 1
        )
        held = {**self.metadata, "trials": [trial.to_dict() for trial in self.trials.values()]}
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_to_finite_json(held), indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def diff_nested_mappings(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The fields in which two nested mappings differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            found
            for key in {**old, **new}
            for found in diff_nested_mappings(
                old.get(key), new.get(key), f"{prefix}.{key}".lstrip(".")
            )
        ]
    return [] if old == new else [f"{prefix}={old!r} there, {new!r} here"]


def _to_finite_json(value: Any) -> Any:
    """The value as JSON has it: None in the place of what is no finite number."""
    if isinstance(value, Mapping):
        return {str(key): _to_finite_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_finite_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
