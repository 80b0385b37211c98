"""The stages of a search: rank, targets, then learning rate and alpha, and what each chose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jlora.ranks.judging import (
    DIVERGED,
    Summary,
    better_half,
    error_of_difference,
    is_within_noise,
    one_standard_error,
    rungs,
)
from jlora.ranks.ledger import Setting
from jlora.ranks.trials import Runner


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting that was tried with several seeds, or one.

    Attributes:
        setting: What was tried.
        summary: Of its scores.
        trained: How many numbers it trains; None where no run of it came to its end.
        step_ms: The median of its steps, and over its seeds.
    """

    setting: Setting
    summary: Summary
    trained: int | None
    step_ms: float | None


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage tried and chose.

    Attributes:
        name: "rank", "targets", "rates" or "confirmation".
        candidates: In the order in which they were tried.
        chosen: The number of the one that was taken.
        why: In a sentence.
    """

    name: str
    candidates: tuple[Candidate, ...]
    chosen: int
    why: str

    @property
    def setting(self) -> Setting:
        """The setting that was taken."""
        return self.candidates[self.chosen].setting

    @property
    def summary(self) -> Summary:
        """Its scores."""
        return self.candidates[self.chosen].summary

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {
            "candidates": [
                dataclasses.asdict(each) | {"summary": each.summary._asdict()}
                for each in self.candidates
            ]
        }


def candidate(runner: Runner, stage: str, setting: Setting, seeds: Sequence[int]) -> Candidate:
    """A setting, with the trials that it needs made."""
    summary = runner.summary(stage, setting, seeds)
    trials = [runner.trial(stage, setting, seed) for seed in seeds]
    trained = next((trial.trained for trial in trials if trial.trained is not None), None)
    times = sorted(trial.step_ms for trial in trials if trial.step_ms is not None)
    return Candidate(setting, summary, trained, times[len(times) // 2] if times else None)


def ladder(
    runner: Runner, settings: Sequence[Setting], seeds: Sequence[int], *, name: str = "rank"
) -> Stage:
    """Tries ranks from the smallest up, until the gain of the next is within the noise.

    Taken is the smallest whose mean is within one standard error of the best.

    Args:
        runner: Makes the trials.
        settings: One of each rank, growing.
        seeds: Of each.
        name: Of the stage.
    """
    tried: list[Candidate] = []
    why = f"Rank {settings[-1].rank} is the largest that was asked for."
    for setting in settings:
        tried.append(candidate(runner, name, setting, seeds))
        if len(tried) > 1 and is_within_noise(tried[-2].summary, tried[-1].summary):
            before, after = tried[-2].summary, tried[-1].summary
            why = (
                f"From rank {tried[-2].setting.rank} to {setting.rank} the mean gains "
                f"{after.mean - before.mean:.4f}, and the standard error of this is "
                f"{error_of_difference(before, after):.4f}."
            )
            break
    chosen = one_standard_error(
        [each.summary for each in tried], [each.setting.rank for each in tried]
    )
    return Stage(name, tuple(tried), chosen, f"{why} {_taken(tried, chosen, 'smallest rank')}")


def compared(
    runner: Runner, settings: Sequence[Setting], seeds: Sequence[int], *, name: str
) -> Stage:
    """Tries settings, and takes that which trains least within one standard error of the best."""
    different = list(dict.fromkeys(settings))
    tried = [candidate(runner, name, setting, seeds) for setting in different]
    sizes = [math.inf if each.trained is None else each.trained for each in tried]
    chosen = one_standard_error([each.summary for each in tried], sizes)
    return Stage(name, tuple(tried), chosen, _taken(tried, chosen, "fewest trained numbers"))


def _taken(tried: Sequence[Candidate], chosen: int, what: str) -> str:
    best = max(tried, key=lambda each: each.summary.mean)
    if best is tried[chosen]:
        return "The best is taken: no smaller one is within a standard error of it."
    return (
        f"Of those within one standard error ({best.summary.error:.4f}) of the best, the one with "
        f"the {what} is taken."
    )


Played = dict[Setting, list[float]]
"""The scores of each setting after each rung that it came to."""


def halving(
    runner: Runner, settings: Sequence[Setting], seed: int, looks: int, *, name: str = "rates"
) -> tuple[Stage, Played]:
    """Trains all settings for a few steps, the better half for twice as many, and so on.

    Each goes on from where it paused. Those at the last rung are compared after all their steps.

    Args:
        runner: Makes the trials.
        settings: What is compared.
        seed: The same for all, so that they see the same examples.
        looks: How many rungs there are.
        name: Of the stage.

    References:
        Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1.
    """
    played: Played = {setting: [] for setting in dict.fromkeys(settings)}
    left = list(played)
    for step in rungs(runner.steps, looks):
        scores = [runner.score(name, setting, seed, step) for setting in left]
        for setting, score in zip(left, scores, strict=True):
            played[setting].append(score)
        if step < runner.steps:
            left = [left[number] for number in better_half(scores)]
    return _best_played(runner, played, seed, name, looks), played


Search = Callable[[Callable[[Setting, int], float], int], None]
"""Asks the function that it is given for scores of settings it thinks of, after each rung."""


def sampled(
    runner: Runner, search: Search, seed: int, looks: int, *, name: str = "rates"
) -> tuple[Stage, Played]:
    """Lets a black-box optimizer choose settings, and when each ends.

    Args:
        runner: Makes the trials.
        search: The optimizer; rungs are numbered from 0.
        seed: Of all trials.
        looks: How many rungs there are.
        name: Of the stage.
    """
    played: Played = {}
    steps = rungs(runner.steps, looks)

    def score(setting: Setting, rung: int) -> float:
        found = runner.score(name, setting, seed, steps[rung])
        scores = played.setdefault(setting, [])
        if len(scores) == rung:  # An optimizer may ask for a setting twice.
            scores.append(found)
        return found

    search(score, looks)
    return _best_played(runner, played, seed, name, looks), played


def _best_played(runner: Runner, played: Played, seed: int, name: str, looks: int) -> Stage:
    """The best of those that came to the last rung."""
    ended = [
        setting
        for setting, scores in played.items()
        if len(scores) == looks and scores[-1] != DIVERGED
    ]
    if not ended:
        first = next(iter(played))
        why = (
            f"Of {len(played)} settings those that led at a look had all diverged by the next. The "
            f"first, which the stages before had chosen, stays."
        )
        return Stage(name, (candidate(runner, name, first, [seed]),), 0, why)
    tried = tuple(candidate(runner, name, setting, [seed]) for setting in ended)
    chosen = one_standard_error([each.summary for each in tried], [0] * len(tried))
    why = (
        f"{len(tried)} of {len(played)} settings were trained for all {runner.steps} steps, with "
        f"one seed; the best is taken, and confirmed with others."
    )
    return Stage(name, tried, chosen, why)


def verdict(best: Candidate, own: Candidate) -> str:
    """How the choice stands to the recipe as it was, in a sentence."""
    if best.setting == own.setting:
        return "It is the recipe as it was."
    return _gain(best.summary, own.summary)


def _gain(best: Summary, before: Summary) -> str:
    if DIVERGED in (best.mean, before.mean):
        return "The recipe as it was diverged."
    gain, error = best.mean - before.mean, error_of_difference(best, before)
    how = "more" if abs(gain) > error else "no more"
    return (
        f"Its mean is {abs(gain):.4f} {'better' if gain >= 0 else 'worse'} than that of the recipe "
        f"as it was, which is {how} than one standard error of the difference, {error:.4f}."
    )
