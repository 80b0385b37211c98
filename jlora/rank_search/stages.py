"""The stages of a search: rank, targets, then learning rate and alpha, and what each chose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jlora.rank_search.selection import (
    DIVERGED,
    ScoreSummary,
    is_within_noise,
    one_standard_error_rule,
    rung_steps,
    select_better_half,
    stderr_of_difference,
)
from jlora.rank_search.study import TrialSetting
from jlora.rank_search.trials import TrialRunner


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting that was tried with several seeds, or one.

    Attributes:
        setting: What was tried.
        summary: Of its scores.
        trainable_params: How many numbers it trains; None where no run of it came to its end.
        step_ms: The median of its steps, and over its seeds.
    """

    setting: TrialSetting
    summary: ScoreSummary
    trainable_params: int | None
    step_ms: float | None


@dataclasses.dataclass(frozen=True)
class SearchStage:
    """What a stage tried and chose.

    Attributes:
        name: "rank", "targets", "rates" or "confirmation".
        candidates: In the order in which they were tried.
        chosen: The number of the one that was taken.
        reason: In a sentence.
    """

    name: str
    candidates: tuple[Candidate, ...]
    chosen: int
    reason: str

    @property
    def setting(self) -> TrialSetting:
        """The setting that was taken."""
        return self.candidates[self.chosen].setting

    @property
    def summary(self) -> ScoreSummary:
        """Its scores."""
        return self.candidates[self.chosen].summary

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {
            "candidates": [
                dataclasses.asdict(each) | {"summary": each.summary._asdict()}
                for each in self.candidates
            ]
        }


def evaluate_candidate(
    runner: TrialRunner, stage: str, setting: TrialSetting, seeds: Sequence[int]
) -> Candidate:
    """A setting, with the trials that it needs made."""
    summary = runner.summarize(stage, setting, seeds)
    trials = [runner.get_trial(stage, setting, seed) for seed in seeds]
    trained = next(
        (trial.trainable_params for trial in trials if trial.trainable_params is not None), None
    )
    times = sorted(trial.step_ms for trial in trials if trial.step_ms is not None)
    return Candidate(setting, summary, trained, times[len(times) // 2] if times else None)


def rank_ladder(
    runner: TrialRunner,
    settings: Sequence[TrialSetting],
    seeds: Sequence[int],
    *,
    name: str = "rank",
) -> SearchStage:
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
        tried.append(evaluate_candidate(runner, name, setting, seeds))
        if len(tried) > 1 and is_within_noise(tried[-2].summary, tried[-1].summary):
            before, after = tried[-2].summary, tried[-1].summary
            why = (
                f"From rank {tried[-2].setting.rank} to {setting.rank} the mean gains "
                f"{after.mean - before.mean:.4f}, and the standard error of this is "
                f"{stderr_of_difference(before, after):.4f}."
            )
            break
    chosen = one_standard_error_rule(
        [each.summary for each in tried], [each.setting.rank for each in tried]
    )
    return SearchStage(
        name, tuple(tried), chosen, f"{why} {_explain_choice(tried, chosen, 'smallest rank')}"
    )


def compare_settings(
    runner: TrialRunner, settings: Sequence[TrialSetting], seeds: Sequence[int], *, name: str
) -> SearchStage:
    """Tries settings, and takes that which trains least within one standard error of the best."""
    different = list(dict.fromkeys(settings))
    tried = [evaluate_candidate(runner, name, setting, seeds) for setting in different]
    sizes = [math.inf if each.trainable_params is None else each.trainable_params for each in tried]
    chosen = one_standard_error_rule([each.summary for each in tried], sizes)
    return SearchStage(
        name, tuple(tried), chosen, _explain_choice(tried, chosen, "fewest trained numbers")
    )


def _explain_choice(candidates: Sequence[Candidate], chosen: int, criterion: str) -> str:
    best = max(candidates, key=lambda each: each.summary.mean)
    if best is candidates[chosen]:
        return "The best is taken: no smaller one is within a standard error of it."
    return (
        f"Of those within one standard error ({best.summary.stderr:.4f}) of the best, the one with "
        f"the {criterion} is taken."
    )


RungScores = dict[TrialSetting, list[float]]

"""The scores of each setting after each rung that it came to."""


def successive_halving(
    runner: TrialRunner,
    settings: Sequence[TrialSetting],
    seed: int,
    num_rungs: int,
    *,
    name: str = "rates",
) -> tuple[SearchStage, RungScores]:
    """Trains all settings for a few steps, the better half for twice as many, and so on.

    Each goes on from where it paused. Those at the last rung are compared after all their steps.

    Args:
        runner: Makes the trials.
        settings: What is compared.
        seed: The same for all, so that they see the same examples.
        num_rungs: How many rungs there are.
        name: Of the stage.

    References:
        Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1.
    """
    played: RungScores = {setting: [] for setting in dict.fromkeys(settings)}
    left = list(played)
    for step in rung_steps(runner.steps, num_rungs):
        scores = [runner.score(name, setting, seed, step) for setting in left]
        for setting, score in zip(left, scores, strict=True):
            played[setting].append(score)
        if step < runner.steps:
            left = [left[number] for number in select_better_half(scores)]
    return _choose_at_last_rung(runner, played, seed, name, num_rungs), played


SearchFn = Callable[[Callable[[TrialSetting, int], float], int], None]

"""Asks the function that it is given for scores of settings it thinks of, after each rung."""


def run_sampler_search(
    runner: TrialRunner, search_fn: SearchFn, seed: int, num_rungs: int, *, name: str = "rates"
) -> tuple[SearchStage, RungScores]:
    """Lets a black-box optimizer choose settings, and when each ends.

    Args:
        runner: Makes the trials.
        search_fn: The optimizer; rungs are numbered from 0.
        seed: Of all trials.
        num_rungs: How many rungs there are.
        name: Of the stage.
    """
    played: RungScores = {}
    steps = rung_steps(runner.steps, num_rungs)

    def score(setting: TrialSetting, rung: int) -> float:
        found = runner.score(name, setting, seed, steps[rung])
        scores = played.setdefault(setting, [])
        if len(scores) == rung:  # An optimizer may ask for a setting twice.
            scores.append(found)
        return found

    search_fn(score, num_rungs)
    return _choose_at_last_rung(runner, played, seed, name, num_rungs), played


def _choose_at_last_rung(
    runner: TrialRunner, rung_scores: RungScores, seed: int, name: str, num_rungs: int
) -> SearchStage:
    """The best of those that came to the last rung."""
    ended = [
        setting
        for setting, scores in rung_scores.items()
        if len(scores) == num_rungs and scores[-1] != DIVERGED
    ]
    if not ended:
        first = next(iter(rung_scores))
        why = (
            f"Of {len(rung_scores)} settings those that led at a look had all diverged by the next. The "
            f"first, which the stages before had chosen, stays."
        )
        return SearchStage(name, (evaluate_candidate(runner, name, first, [seed]),), 0, why)
    tried = tuple(evaluate_candidate(runner, name, setting, [seed]) for setting in ended)
    chosen = one_standard_error_rule([each.summary for each in tried], [0] * len(tried))
    why = (
        f"{len(tried)} of {len(rung_scores)} settings were trained for all {runner.steps} steps, with "
        f"one seed; the best is taken, and confirmed with others."
    )
    return SearchStage(name, tried, chosen, why)


def compare_to_recipe(best: Candidate, recipe_candidate: Candidate) -> str:
    """How the choice stands to the recipe as it was, in a sentence."""
    if best.setting == recipe_candidate.setting:
        return "It is the recipe as it was."
    return _format_gain(best.summary, recipe_candidate.summary)


def _format_gain(best: ScoreSummary, baseline: ScoreSummary) -> str:
    if DIVERGED in (best.mean, baseline.mean):
        return "The recipe as it was diverged."
    gain, error = best.mean - baseline.mean, stderr_of_difference(best, baseline)
    how = "more" if abs(gain) > error else "no more"
    return (
        f"Its mean is {abs(gain):.4f} {'better' if gain >= 0 else 'worse'} than that of the recipe "
        f"as it was, which is {how} than one standard error of the difference, {error:.4f}."
    )
