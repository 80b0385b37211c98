"""Selection of settings from noisy scores: standard errors over seeds and successive halving.

Higher scores are better. A run that diverged has the score -inf.
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
        mean: Mean of the scores; -inf if one of them is.
        stderr: Standard error of the mean: the sample standard deviation over the square root of
            the number of seeds. 0 where the mean is -inf; NaN for one seed, which has no deviation.
        seeds: Number of seeds.
    """

    mean: float
    stderr: float
    seeds: int


def summarize_scores(scores: Sequence[float]) -> ScoreSummary:
    """Computes the mean of scores and its standard error.

    Raises:
        ValueError: There are no scores, or one is NaN or +inf.
    """
    if not scores:
        raise ValueError("scores=[] must have the score of one seed or more.")
    values = np.asarray(scores, np.float64)
    if np.isnan(values).any() or (values == math.inf).any():
        raise ValueError(
            f"scores={list(scores)} must be finite, or -inf for a run that diverged, got NaN or "
            f"+inf."
        )
    count = len(values)
    if (values == DIVERGED).any():
        return ScoreSummary(DIVERGED, 0.0, count)
    if count == 1:
        return ScoreSummary(float(values[0]), math.nan, 1)
    return ScoreSummary(float(values.mean()), float(values.std(ddof=1) / math.sqrt(count)), count)


def stderr_of_difference(first: ScoreSummary, second: ScoreSummary) -> float:
    """Computes the standard error of the difference of two means with independent scores.

    Two settings share their seeds, which order the examples alike, so that the actual error is
    smaller: a gain that exceeds this error exceeds the actual one.
    """
    return math.hypot(first.stderr, second.stderr)


def is_within_noise(smaller: ScoreSummary, larger: ScoreSummary) -> bool:
    """Whether the gain from the smaller to the larger setting is at most its standard error.

    Raises:
        ValueError: One of the summaries has a single seed and therefore no standard error.
    """
    if DIVERGED in (smaller.mean, larger.mean):
        return larger.mean == DIVERGED and smaller.mean != DIVERGED
    error = stderr_of_difference(smaller, larger)
    if math.isnan(error):
        raise ValueError(
            f"Both means must be over two seeds or more, got {smaller.seeds} and {larger.seeds}: "
            f"one seed has no standard error to compare a gain with."
        )
    return larger.mean - smaller.mean <= error


def one_standard_error_rule(candidates: Sequence[ScoreSummary], sizes: Sequence[float]) -> int:
    """Returns the index of the smallest candidate within one standard error of the best mean.

    Among candidates of equal size the better one is selected, then the first. The standard error
    is that of the best mean; among candidates with one seed each, the best is selected.

    Args:
        candidates: Scores of the candidates.
        sizes: Cost of each candidate, such as its number of trainable parameters.

    Raises:
        ValueError: All candidates diverged, there are none, or the lengths differ.

    References:
        Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984, section
        3.4.3. Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 7.10.
        Both take the error from the folds of a cross-validation; here it is from seeds.
    """
    if len(candidates) != len(sizes):
        raise ValueError(
            f"sizes must have one entry for each candidate, got {len(sizes)} for {len(candidates)}."
        )
    if all(candidate.mean == DIVERGED for candidate in candidates):
        raise ValueError(
            f"All of {len(candidates)} settings diverged or were not measured. Lower "
            f"optimizer.learning_rate."
        )
    best = max(candidates, key=lambda candidate: candidate.mean)
    bound = best.mean - (0.0 if math.isnan(best.stderr) else best.stderr)
    within = [index for index, candidate in enumerate(candidates) if candidate.mean >= bound]
    return min(within, key=lambda index: (sizes[index], -candidates[index].mean, index))


def select_better_half(scores: Sequence[float]) -> list[int]:
    """Returns the indices of the better half, rounded up, in increasing order.

    Among equal scores the first are selected. Diverged runs are never selected.

    Raises:
        ValueError: A score is NaN.
    """
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"scores={list(scores)} must not have NaN. Use -inf for a diverged run.")
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    better = order[: math.ceil(len(scores) / 2)]
    return sorted(index for index in better if scores[index] != DIVERGED)


def rung_steps(steps: int, num_rungs: int) -> list[int]:
    """Returns the training steps of the rungs of successive halving.

    The last rung is at `steps`, each other at half of the next, rounded up.

    Raises:
        ValueError: `steps` is too small for so many different rungs, or a value is not positive.

    References:
        Successive halving: Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1, and Li et al.,
        Hyperband, arXiv:1603.06560, with eta = 2. The former ends with one setting; here all
        settings that reach the last rung are compared after all their steps.
    """
    rungs = [math.ceil(steps / 2**power) for power in reversed(range(max(num_rungs, 0)))]
    if num_rungs < 1 or steps < 1 or len(set(rungs)) < num_rungs:
        raise ValueError(
            f"num_rungs={num_rungs} do not fit into steps={steps}: each rung is half of the next. "
            f"Use fewer rungs or more steps."
        )
    return rungs


def stderr_of_stderr(num_seeds: int) -> float:
    """Computes the relative uncertainty of a standard error: 0.5 for three seeds.

    References:
        For normal scores, the standard deviation of a sample standard deviation is about
        1 / sqrt(2 (n - 1)) of it.
    """
    return 1 / math.sqrt(2 * (num_seeds - 1))
