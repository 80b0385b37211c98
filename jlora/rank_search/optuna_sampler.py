"""Optuna as the optimizer of learning rate and alpha."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jlora.rank_search.selection import DIVERGED
from jlora.rank_search.study import TrialSetting

ScoreFn = Callable[[TrialSetting, int], float]


def tpe_search(
    center: TrialSetting,
    learning_rate_range: tuple[float, float],
    alpha_range: tuple[float, float],
    num_trials: int,
    seed: int,
) -> Callable[[ScoreFn, int], None]:
    """A search by Optuna's TPE, which its pruner by successive halving ends early.

    The first setting is `center`. Learning rate and alpha are drawn on logarithmic scales, and
    rounded to three digits.

    Args:
        center: Whose rank and targets all settings have.
        learning_rate_range: The least and the highest learning rate.
        alpha_range: The least and the greatest alpha.
        num_trials: How many settings are tried.
        seed: Of the draws: with the same scores, the same settings are asked for again.

    Raises:
        ModuleNotFoundError: Optuna is not installed.

    References:
        Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011. The pruner is
        asynchronous, Li et al., arXiv:1810.05934: a setting goes on if it is in the better half of
        those that came to the same rung before it.
    """
    optuna = import_optuna()

    def search(score: ScoreFn, looks: int) -> None:
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=seed),
                # A rung's number is told as 2**number, which makes any number of steps a rung.
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
                _run_optuna_trial(optuna, study, trial, setting, score, looks)
        finally:
            optuna.logging.set_verbosity(level)

    return search


def _run_optuna_trial(
    optuna: Any, study: Any, trial: Any, setting: TrialSetting, score: ScoreFn, num_rungs: int
) -> None:
    """Lets one setting climb until it is pruned, diverges, or is at the last rung."""
    found = DIVERGED
    for rung in range(num_rungs):
        found = score(setting, rung)
        # Optuna takes NaN for the worst.
        trial.report(math.nan if found == DIVERGED else found, 2**rung)
        last = rung + 1 == num_rungs
        if found == DIVERGED or (not last and trial.should_prune()):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
    study.tell(trial, found)


def _suggest_rounded(
    trial: Any, name: str, bounds: tuple[float, float], initial_value: float
) -> float:
    """A value between bounds, to three digits; that of the first setting as it is."""
    value = trial.suggest_float(name, *bounds, log=True)
    return initial_value if value == initial_value else float(f"{value:.3g}")


def import_optuna() -> Any:
    """Optuna.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ModuleNotFoundError(
            'sampler="optuna" needs Optuna, which is not installed. Run '
            '`pip install "jlora[search]"`, or use the sampler "grid".'
        ) from error
    return optuna
