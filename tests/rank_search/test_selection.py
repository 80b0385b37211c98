"""Selection rules of a search, on synthetic scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jlora.rank_search.selection import (
    DIVERGED,
    ScoreSummary,
    is_within_noise,
    one_standard_error_rule,
    rung_steps,
    select_better_half,
    stderr_of_difference,
    stderr_of_stderr,
    summarize_scores,
)


def test_summarize_scores_mean_and_stderr() -> None:
    scores = [0.3, 0.5, 0.4, 0.8, 0.35]
    found = summarize_scores(scores)
    mean = sum(scores) / 5
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 4)
    # Sums of five numbers in float64.
    assert found.mean == pytest.approx(mean, rel=1e-15)
    assert found.stderr == pytest.approx(deviation / math.sqrt(5), rel=1e-14)
    assert found.seeds == 5
    one = summarize_scores([0.7])
    assert (one.mean, one.seeds) == (0.7, 1)
    assert math.isnan(one.stderr)
    assert summarize_scores([0.7, DIVERGED, 0.6]) == ScoreSummary(DIVERGED, 0.0, 3)


def test_stderr_of_difference_matches_sampling() -> None:
    rng = np.random.default_rng(0)
    # 20,000 pairs of means over 3 and 5 seeds, whose deviations are 2 and 0.7.
    one = rng.normal(0, 2, (20_000, 3)).mean(axis=1)
    two = rng.normal(0, 0.7, (20_000, 5)).mean(axis=1)
    found = stderr_of_difference(
        ScoreSummary(0, 2 / math.sqrt(3), 3), ScoreSummary(0, 0.7 / math.sqrt(5), 5)
    )
    # The deviation of 20,000 draws is known to half a percent; four times that.
    assert found == pytest.approx((one - two).std(), rel=0.02)


@pytest.mark.parametrize(
    ("gain", "within"), [(0.09, True), (0.1, True), (0.11, False), (0.0, True), (-0.3, True)]
)
def test_is_within_noise_up_to_one_stderr(gain: float, within: bool) -> None:
    # Errors of 0.06 and 0.08 make one of 0.1.
    smaller, larger = ScoreSummary(0.0, 0.06, 3), ScoreSummary(gain, 0.08, 3)
    assert is_within_noise(smaller, larger) is within


def test_is_within_noise_with_diverged_means() -> None:
    fine, diverged = ScoreSummary(0.5, 0.01, 3), ScoreSummary(DIVERGED, 0.0, 3)
    assert is_within_noise(fine, diverged)
    assert not is_within_noise(diverged, fine)
    assert not is_within_noise(diverged, diverged)


def test_one_standard_error_rule_takes_smallest() -> None:
    means = [0.70, 0.80, 0.84, 0.90, 0.88]
    candidates = [ScoreSummary(mean, 0.02, 3) for mean in means]
    sizes = [1, 2, 4, 8, 16]
    for error, taken in ((0.0, 3), (0.05, 3), (0.0601, 2), (0.1001, 1), (0.5, 0)):
        candidates[3] = ScoreSummary(0.90, error, 3)
        assert one_standard_error_rule(candidates, sizes) == taken, error
    # The error is that of the best mean; other errors are not used.
    noisy = [ScoreSummary(0.6, 9.0, 3), ScoreSummary(0.9, 0.01, 3)]
    assert one_standard_error_rule(noisy, [1, 2]) == 1


def test_one_standard_error_rule_breaks_ties() -> None:
    equal = [ScoreSummary(0.9, 0.1, 3)] * 3
    assert one_standard_error_rule(equal, [2, 1, 3]) == 1
    assert one_standard_error_rule(equal, [2, 2, 2]) == 0
    assert one_standard_error_rule([ScoreSummary(0.85, 0.1, 3), *equal], [2, 2, 2, 2]) == 1
    assert (
        one_standard_error_rule(
            [ScoreSummary(0.2, math.nan, 1), ScoreSummary(0.3, math.nan, 1)], [1, 2]
        )
        == 1
    )


def test_one_standard_error_rule_skips_diverged() -> None:
    fine, diverged = ScoreSummary(0.1, 5.0, 2), ScoreSummary(DIVERGED, 0.0, 2)
    assert one_standard_error_rule([diverged, fine, diverged], [1, 2, 3]) == 1
    with pytest.raises(ValueError, match=r"All of 2 settings diverged.*learning_rate"):
        one_standard_error_rule([diverged, diverged], [1, 2])
    with pytest.raises(ValueError, match="All of 0 settings"):
        one_standard_error_rule([], [])
    with pytest.raises(ValueError, match="got 1 for 2"):
        one_standard_error_rule([fine, fine], [1])


def test_select_better_half_rounds_up_in_order() -> None:
    assert select_better_half([0.1, 0.9, 0.3, 0.8, 0.2]) == [1, 2, 3]
    assert select_better_half([0.1, 0.9, 0.3, 0.8]) == [1, 3]
    assert select_better_half([0.5]) == [0]
    assert select_better_half([]) == []
    # Among equal scores, the first.
    assert select_better_half([0.4, 0.4, 0.4, 0.4]) == [0, 1]
    assert select_better_half([0.1, 0.4, 0.9, 0.4]) == [1, 2]


def test_select_better_half_drops_diverged() -> None:
    assert select_better_half([DIVERGED, 0.1, DIVERGED, DIVERGED]) == [1]
    assert select_better_half([DIVERGED, DIVERGED]) == []


@pytest.mark.parametrize(
    ("steps", "count", "found"),
    [
        (80, 3, [20, 40, 80]),
        (80, 1, [80]),
        (7, 3, [2, 4, 7]),
        (100, 4, [13, 25, 50, 100]),
        (4, 3, [1, 2, 4]),
    ],
)
def test_rung_steps_double(steps: int, count: int, found: list[int]) -> None:
    assert rung_steps(steps, count) == found


@pytest.mark.parametrize(("steps", "count"), [(4, 4), (2, 3), (0, 1), (5, 0), (5, -1)])
def test_rung_steps_that_do_not_fit_raise(steps: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"num_rungs={count} do not fit into steps={steps}"):
        rung_steps(steps, count)


def test_selection_nonfinite_scores_raise() -> None:
    for scores in ([0.1, math.nan], [math.inf, 0.2]):
        with pytest.raises(ValueError, match="must be finite, or -inf"):
            summarize_scores(scores)
    with pytest.raises(ValueError, match=r"scores=\[\] must have"):
        summarize_scores([])
    with pytest.raises(ValueError, match="must not have NaN"):
        select_better_half([0.1, math.nan])
    with pytest.raises(ValueError, match="two seeds or more, got 1 and 3"):
        is_within_noise(summarize_scores([0.5]), ScoreSummary(0.6, 0.1, 3))


def test_stderr_of_stderr_matches_sampling() -> None:
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(100_000, 12)).std(axis=1, ddof=1)
    # The formula is the first term of an expansion in 1 / n, which is 2 % off at 12.
    assert stderr_of_stderr(12) == pytest.approx(deviations.std(), rel=0.03)
    assert stderr_of_stderr(3) == 0.5
