"""Optuna as the optimizer of learning rate and alpha: TPE with asynchronous successive halving."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jlora.rank_search.selection import DIVERGED
from jlora.rank_search.study import TrialSetting

ScoreFn = Callable[[TrialSetting, int], float]

"""Function from a setting and a rung, counted from 0, to the score there."""


def tpe_search(
    center: TrialSetting,
    learning_rate_range: tuple[float, float],
    alpha_range: tuple[float, float],
    num_trials: int,
    seed: int,
) -> Callable[[ScoreFn, int], None]:
    """Returns a search by Optuna's TPE sampler and its successive halving pruner.

    The first setting is `center`. Learning rate and alpha are sampled on logarithmic scales and
    rounded to three digits.

    Args:
        center: First setting, whose rank and target modules all settings have.
        learning_rate_range: Lowest and highest learning rate.
        alpha_range: Lowest and highest alpha.
        num_trials: Number of settings.
        seed: Random seed of the sampler: the same scores lead to the same settings.

    Returns:
        Function of a score function and a number of rungs, which runs the search.

    Raises:
        ModuleNotFoundError: Optuna is not installed.

    References:
        Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011. The pruner is
        asynchronous, Li et al., arXiv:1810.05934: a setting continues if it is in the better half
        of those that reached the same rung before it.
    """
    optuna = import_optuna()

    def run_search(score: ScoreFn, num_rungs: int) -> None:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=seed),
                # Reported steps are 2**rung, so that rungs may be at any number of training steps.
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            )
            study.enqueue_trial({"learning_rate": center.learning_rate, "alpha": center.alpha})
            for _ in range(num_trials):
                trial = study.ask()
                setting = dataclasses.replace(
                    center,
                    learning_rate=_suggest_rounded(
                        trial, "learning_rate", learning_rate_range, center.learning_rate
                    ),
                    alpha=_suggest_rounded(trial, "alpha", alpha_range, center.alpha),
                )
                _run_optuna_trial(optuna, study, trial, setting, score, num_rungs)
        finally:
            optuna.logging.set_verbosity(verbosity)

    return run_search


def _run_optuna_trial(
    optuna: Any, study: Any, trial: Any, setting: TrialSetting, score: ScoreFn, num_rungs: int
) -> None:
    """Scores a setting rung by rung until it is pruned, diverges, or is at the last rung."""
    value = DIVERGED
    for rung in range(num_rungs):
        value = score(setting, rung)
        # Optuna ranks NaN last.
        trial.report(math.nan if value == DIVERGED else value, 2**rung)
        is_last = rung + 1 == num_rungs
        if value == DIVERGED or (not is_last and trial.should_prune()):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
    study.tell(trial, value)


def _suggest_rounded(
    trial: Any, name: str, bounds: tuple[float, float], initial_value: float
) -> float:
    """Returns a sampled value rounded to three digits; the initial value is not rounded."""
    value = trial.suggest_float(name, *bounds, log=True)
    return initial_value if value == initial_value else float(f"{value:.3g}")


def import_optuna() -> Any:
    """Returns the module `optuna`.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ModuleNotFoundError(
            "sampler='optuna' needs Optuna, which is not installed. Run "
            "`pip install \"jlora[search]\"`, or use sampler='grid'."
        ) from error
    return optuna
