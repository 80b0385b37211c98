"""Stages of a search (rank, target modules, learning rate and alpha) and the choice each makes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
    """A setting with the results of its trials.

    Attributes:
        setting: Hyperparameters.
        summary: Scores over one or more seeds.
        trainable_params: Number of trainable parameters; None if no trial reached its end.
        step_ms: Median over the seeds of the median step time in milliseconds; None if no trial was
            measured.
    """

    setting: TrialSetting
    summary: ScoreSummary
    trainable_params: int | None
    step_ms: float | None


@dataclasses.dataclass(frozen=True)
class SearchStage:
    """Candidates of a stage and the one that was selected.

    Attributes:
        name: "rank", "targets", "rates" or "confirmation".
        candidates: Candidates in the order in which they were tried.
        chosen: Index of the selected candidate.
        reason: Reason of the choice, in one or two sentences.
    """

    name: str
    candidates: tuple[Candidate, ...]
    chosen: int
    reason: str

    @property
    def setting(self) -> TrialSetting:
        """Setting of the selected candidate."""
        return self.candidates[self.chosen].setting

    @property
    def summary(self) -> ScoreSummary:
        """Scores of the selected candidate."""
        return self.candidates[self.chosen].summary

    def to_dict(self) -> dict[str, Any]:
        """Returns the stage as a mapping for JSON."""
        return dataclasses.asdict(self) | {
            "candidates": [
                dataclasses.asdict(candidate) | {"summary": candidate.summary._asdict()}
                for candidate in self.candidates
            ]
        }


def evaluate_candidate(
    runner: TrialRunner, stage: str, setting: TrialSetting, seeds: Sequence[int]
) -> Candidate:
    """Runs the missing trials of a setting and returns it with their results."""
    summary = runner.summarize(stage, setting, seeds)
    trials = [runner.get_trial(stage, setting, seed) for seed in seeds]
    trainable_params = next(
        (trial.trainable_params for trial in trials if trial.trainable_params is not None), None
    )
    times = sorted(trial.step_ms for trial in trials if trial.step_ms is not None)
    step_ms = times[len(times) // 2] if times else None
    return Candidate(setting, summary, trainable_params, step_ms)


def rank_ladder(
    runner: TrialRunner,
    settings: Sequence[TrialSetting],
    seeds: Sequence[int],
    *,
    name: str = "rank",
) -> SearchStage:
    """Tries ranks in increasing order until the gain of the next is within noise.

    Selects the smallest rank whose mean is within one standard error of the best.

    Args:
        runner: Runner of the trials.
        settings: One setting for each rank, in increasing order.
        seeds: Random seeds of each setting.
        name: Name of the stage.
    """
    candidates: list[Candidate] = []
    stop_reason = f"Rank {settings[-1].rank} is the largest of the ranks to try."
    for setting in settings:
        candidates.append(evaluate_candidate(runner, name, setting, seeds))
        if len(candidates) < 2:
            continue
        before, after = candidates[-2].summary, candidates[-1].summary
        if is_within_noise(before, after):
            stop_reason = (
                f"From rank {candidates[-2].setting.rank} to {setting.rank} the mean gains "
                f"{after.mean - before.mean:.4f}, and the standard error of this is "
                f"{stderr_of_difference(before, after):.4f}."
            )
            break
    chosen = one_standard_error_rule(
        [candidate.summary for candidate in candidates],
        [candidate.setting.rank for candidate in candidates],
    )
    choice_reason = _explain_choice(candidates, chosen, "smallest rank")
    return SearchStage(name, tuple(candidates), chosen, f"{stop_reason} {choice_reason}")


def compare_settings(
    runner: TrialRunner, settings: Sequence[TrialSetting], seeds: Sequence[int], *, name: str
) -> SearchStage:
    """Tries settings and selects the cheapest within one standard error of the best.

    The cheapest is the one with the fewest trainable parameters.

    Args:
        runner: Runner of the trials.
        settings: Settings to compare; duplicates are dropped.
        seeds: Random seeds of each setting.
        name: Name of the stage.
    """
    candidates = [
        evaluate_candidate(runner, name, setting, seeds) for setting in dict.fromkeys(settings)
    ]
    sizes = [
        math.inf if candidate.trainable_params is None else candidate.trainable_params
        for candidate in candidates
    ]
    chosen = one_standard_error_rule([candidate.summary for candidate in candidates], sizes)
    reason = _explain_choice(candidates, chosen, "fewest trainable parameters")
    return SearchStage(name, tuple(candidates), chosen, reason)


def _explain_choice(candidates: Sequence[Candidate], chosen: int, criterion: str) -> str:
    best = max(candidates, key=lambda candidate: candidate.summary.mean)
    if best is candidates[chosen]:
        return "The best is selected: no smaller one is within a standard error of it."
    return (
        f"Among those within one standard error ({best.summary.stderr:.4f}) of the best, the one "
        f"with the {criterion} is selected."
    )


RungScores = dict[TrialSetting, list[float]]

"""Scores of each setting at the rungs that it reached."""


def successive_halving(
    runner: TrialRunner,
    settings: Sequence[TrialSetting],
    seed: int,
    num_rungs: int,
    *,
    name: str = "rates",
) -> tuple[SearchStage, RungScores]:
    """Trains all settings to the first rung, the better half to the second, and so on.

    A trial continues from its checkpoint at the rung before. Settings that reach the last rung are
    compared after all their steps.

    Args:
        runner: Runner of the trials.
        settings: Settings to compare; duplicates are dropped.
        seed: Random seed of all trials, so that they train on the same examples.
        num_rungs: Number of rungs.
        name: Name of the stage.

    References:
        Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1.
    """
    rung_scores: RungScores = {setting: [] for setting in dict.fromkeys(settings)}
    remaining = list(rung_scores)
    for step in rung_steps(runner.steps, num_rungs):
        scores = [runner.score(name, setting, seed, step) for setting in remaining]
        for setting, score in zip(remaining, scores, strict=True):
            rung_scores[setting].append(score)
        if step < runner.steps:
            remaining = [remaining[index] for index in select_better_half(scores)]
    return _choose_at_last_rung(runner, rung_scores, seed, name, num_rungs), rung_scores


def _choose_at_last_rung(
    runner: TrialRunner, rung_scores: RungScores, seed: int, name: str, num_rungs: int
) -> SearchStage:
    """Selects the best of the settings that reached the last rung."""
    finalists = [
        setting
        for setting, scores in rung_scores.items()
        if len(scores) == num_rungs and scores[-1] != DIVERGED
    ]
    if not finalists:
        first = next(iter(rung_scores))
        reason = (
            f"Of {len(rung_scores)} settings, all that continued after a rung diverged by the "
            f"next. The first, which the earlier stages selected, stays."
        )
        return SearchStage(name, (evaluate_candidate(runner, name, first, [seed]),), 0, reason)
    candidates = tuple(evaluate_candidate(runner, name, setting, [seed]) for setting in finalists)
    summaries = [candidate.summary for candidate in candidates]
    chosen = one_standard_error_rule(summaries, [0] * len(candidates))
    reason = (
        f"{len(candidates)} of {len(rung_scores)} settings were trained for all {runner.steps} "
        f"steps, with one seed; the best is selected, and confirmed with other seeds."
    )
    return SearchStage(name, candidates, chosen, reason)


def compare_to_recipe(best: Candidate, recipe_candidate: Candidate) -> str:
    """Returns a sentence that compares the selected setting with the original recipe."""
    if best.setting == recipe_candidate.setting:
        return "It is the original recipe."
    return _format_gain(best.summary, recipe_candidate.summary)


def _format_gain(best: ScoreSummary, baseline: ScoreSummary) -> str:
    if DIVERGED in (best.mean, baseline.mean):
        return "The original recipe diverged."
    gain, error = best.mean - baseline.mean, stderr_of_difference(best, baseline)
    comparison = "more" if abs(gain) > error else "no more"
    return (
        f"Its mean is {abs(gain):.4f} {'better' if gain >= 0 else 'worse'} than that of the "
        f"original recipe, which is {comparison} than one standard error of the difference, "
        f"{error:.4f}."
    )
