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

from jlora.checkpoints.tensors import listed
from jlora.ranks.judging import DIVERGED

FILE = "search.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """What trials differ in, their seeds aside.

    Attributes:
        rank: Of every adapted weight.
        targets: Which weights those are, by a name of `jlora.ranks.trials.patterns`.
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
        of: How many steps the whole run has, for which its learning rates are.
        values: The metric on the validation data, by the step at which it was measured.
        why: "until" where it paused, "steps" at its end, "diverged" where a loss, a gradient or the
            metric was no number; empty before the first.
        trained: How many numbers it trains; None before its end.
        seconds: Of the clock, compiling and evaluating with it.
        step_ms: The median of its steps, in milliseconds.
    """

    stage: str
    setting: Setting
    seed: int
    of: int
    values: dict[int, float] = dataclasses.field(default_factory=dict)
    why: str = ""
    trained: int | None = None
    seconds: float = 0.0
    step_ms: float | None = None

    @property
    def name(self) -> str:
        """Of its folder: everything that tells it from other trials of the same recipe."""
        s = self.setting
        return (
            f"r{s.rank}-{s.targets}-lr{s.learning_rate!r}-a{s.alpha!r}-{self.of}steps-s{self.seed}"
        )

    @property
    def steps(self) -> int:
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
        return DIVERGED if self.why == "diverged" else None

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Trial:
        """From what `facts` returned, through JSON."""
        values = {int(step): float(value) for step, value in facts["values"].items()}
        return cls(**{**facts, "setting": Setting(**facts["setting"]), "values": values})


class Ledger:
    """The state of a search in its file, which is whole at every moment.

    Attributes:
        trials: By name, in the order in which they were first asked for.
        facts: Beside them: the recipe, the options, fingerprints of the data, what came out, and
            the seconds that all of it took, up to the last save.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], trials: dict[str, Trial]) -> None:
        self.folder, self.facts, self.trials = folder, facts, trials
        self._before_s, self._began_s = facts.get("seconds", 0.0), time.monotonic()

    @classmethod
    def begun(cls, folder: Path, facts: dict[str, Any]) -> Ledger:
        """A new one, whose file is written.

        Raises:
            FileExistsError: There is one.
        """
        if (folder / FILE).exists():
            raise FileExistsError(
                f"{folder} holds a search, which is left as it was. Go on with --resume, or give "
                f"another --output."
            )
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder, {"format": FORMAT, **facts}, {})
        found.save()
        return found

    @classmethod
    def resumed(cls, folder: Path, facts: dict[str, Any]) -> Ledger:
        """The one in a folder, for the same recipe.

        Args:
            folder: Of the search.
            facts: What `begun` was given; all but "recipe" may differ, and once learning rates are
                tried also the rungs may not.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It cannot be read, is of a later release, or of another recipe or rungs.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: there is no search to go on with. Begin without --resume."
            )
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            form, recipe = held["format"], held["recipe"]
            looks = held["options"]["rungs"] if form <= FORMAT else None
            trials = [Trial.of_facts(one) for one in held.pop("trials")]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no state of a search ({type(error).__name__}: {error}). Give another "
                f"--output, and begin anew."
            ) from error
        if form > FORMAT:
            raise ValueError(
                f"{path} was made by format {form}, and this release reads up to {FORMAT}. Use the "
                f"release that wrote it."
            )
        differing = differences(recipe, facts["recipe"])
        if differing:
            raise ValueError(
                f"{path} is of another recipe: {listed(differing)}. Resume with the recipe as it "
                f"was, or give another --output."
            )
        asked = facts["options"]["rungs"]
        if looks != asked and any(trial.stage == "rates" for trial in trials):
            raise ValueError(
                f"rungs={asked}, and {path} has trials of learning rates that were looked at at "
                f"the steps of rungs={looks}. Resume with as many as before."
            )
        return cls(folder, {**held, **facts}, {trial.name: trial for trial in trials})

    def trial(self, stage: str, setting: Setting, seed: int, of: int) -> Trial:
        """The trial of a setting, or a new one."""
        made = Trial(stage, setting, seed, of)
        return self.trials.setdefault(made.name, made)

    def check_data(self, seed: int, fingerprints: Mapping[str, str | None]) -> None:
        """Notes what data a trial had.

        Raises:
            ValueError: Earlier trials had other data.
        """
        held = self.facts.setdefault("data", {})
        for use, fingerprint in fingerprints.items():
            name = f"{use} of seed {seed}" if use == "train" else use
            if held.setdefault(name, fingerprint) != fingerprint:
                raise ValueError(
                    f"The {use} data is not what earlier trials in {self.folder} had, so that "
                    f"scores cannot be compared. Put it back, or begin anew with another --output."
                )

    def save(self) -> None:
        """Writes the file, in one move."""
        path = self.folder / FILE
        partial = path.with_suffix(".partial")
        self.facts["seconds"] = round(self._before_s + time.monotonic() - self._began_s, 1)
        held = {**self.facts, "trials": [trial.facts() for trial in self.trials.values()]}
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_plain(held), indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two nested mappings differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            found
            for key in {**old, **new}
            for found in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{where}={old!r} there, {new!r} here"]


def _plain(value: Any) -> Any:
    """The value as JSON has it: None in the place of what is no finite number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
