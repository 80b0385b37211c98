"""Which of several settings is taken, where seeds make scores differ: rules on numbers alone.

A score is the higher, the better. A run that diverged has the score -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DIVERGED = -math.inf


class ScoreSummary(NamedTuple):
    """The scores of one setting over several seeds.

    Attributes:
        mean: Of the scores; -inf if one of them is.
        stderr: The standard error of the mean, the sample deviation over the root of the count; 0
            where the mean is -inf, and NaN for one seed, which tells nothing of it.
        seeds: How many.
    """

    mean: float
    stderr: float
    seeds: int


def summarize_scores(scores: Sequence[float]) -> ScoreSummary:
    """The mean of scores and its standard error.

    Raises:
        ValueError: There are none, or one is NaN or +inf.
    """
    if not scores:
        raise ValueError("scores=[] have no mean. Give the score of one seed or more.")
    values = np.asarray(scores, np.float64)
    if np.isnan(values).any() or (values == math.inf).any():
        raise ValueError(
            f"scores={list(scores)} are no numbers to compare. Give -inf for a run that diverged."
        )
    count = len(values)
    if (values == DIVERGED).any():
        return ScoreSummary(DIVERGED, 0.0, count)
    if count == 1:
        return ScoreSummary(float(values[0]), math.nan, 1)
    return ScoreSummary(float(values.mean()), float(values.std(ddof=1) / math.sqrt(count)), count)


def stderr_of_difference(first: ScoreSummary, second: ScoreSummary) -> float:
    """The standard error of the difference of two means, as if their scores were independent.

    Where both are over the same seeds, which order the examples alike, the real error is smaller:
    a gain that is told from noise by this is told from it.
    """
    return math.hypot(first.stderr, second.stderr)


def is_within_noise(smaller: ScoreSummary, larger: ScoreSummary) -> bool:
    """Whether the gain from the smaller to the larger setting is no more than its standard error.

    Raises:
        ValueError: One of them has one seed, and no error.
    """
    if DIVERGED in (smaller.mean, larger.mean):
        return larger.mean == DIVERGED and smaller.mean != DIVERGED
    error = stderr_of_difference(smaller, larger)
    if math.isnan(error):
        raise ValueError(
            f"Means over {smaller.seeds} and {larger.seeds} seeds have no noise to compare a gain "
            f"with. Give two seeds or more."
        )
    return larger.mean - smaller.mean <= error


def one_standard_error_rule(candidates: Sequence[ScoreSummary], sizes: Sequence[float]) -> int:
    """The number of the smallest candidate whose mean is within one standard error of the best.

    Of equally small ones the better is taken, then the first. The error is that of the best one's
    mean; of candidates with one seed each, the best is taken.

    Args:
        candidates: What is chosen from.
        sizes: What each costs, such as the numbers that it trains.

    Raises:
        ValueError: All diverged, or there are none.

    References:
        Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984, section
        3.4.3. Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 7.10.
        Both have the error from the folds of a cross-validation; here it is from seeds.
    """
    if len(candidates) != len(sizes):
        raise ValueError(f"{len(candidates)} candidates have {len(sizes)} sizes. Give one each.")
    if all(each.mean == DIVERGED for each in candidates):
        raise ValueError(
            f"All of {len(candidates)} settings diverged or were not measured. Lower "
            f"optimizer.learning_rate."
        )
    best = max(candidates, key=lambda each: each.mean)
    bound = best.mean - (0.0 if math.isnan(best.stderr) else best.stderr)
    within = [number for number, each in enumerate(candidates) if each.mean >= bound]
    return min(within, key=lambda number: (sizes[number], -candidates[number].mean, number))


def select_better_half(scores: Sequence[float]) -> list[int]:
    """The numbers of the better half, rounded up, in their order; of equal ones the first.

    None that diverged goes on.
    """
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"scores={list(scores)} have a NaN. Give -inf for a run that diverged.")
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
    kept = order[: math.ceil(len(scores) / 2)]
    return sorted(number for number in kept if scores[number] != DIVERGED)


def rung_steps(steps: int, num_rungs: int) -> list[int]:
    """The steps at which halving looks: the last is `steps`, each half of the next, rounded up.

    Raises:
        ValueError: There are not as many different ones.

    References:
        Successive halving: Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1, and Li et al.,
        Hyperband, arXiv:1603.06560, with eta = 2. The former ends with one setting; here as many
        as are left at the last rung are compared after all their steps.
    """
    found = [math.ceil(steps / 2**power) for power in reversed(range(max(num_rungs, 0)))]
    if num_rungs < 1 or steps < 1 or len(set(found)) < num_rungs:
        raise ValueError(
            f"num_rungs={num_rungs} do not fit into steps={steps}: each is half of the next. Give fewer "
            f"rungs or more steps."
        )
    return found


def stderr_of_stderr(num_seeds: int) -> float:
    """By how much of itself a standard error from so many seeds is uncertain: 0.5 for three.

    References:
        The deviation of a sample deviation is about 1 / sqrt(2 (n - 1)) of it, for normal scores.
    """
    return 1 / math.sqrt(2 * (num_seeds - 1))
