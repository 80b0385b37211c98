"""Optuna as the optimizer of learning rate and alpha."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jlora.ranks.judging import DIVERGED
from jlora.ranks.ledger import Setting

Scored = Callable[[Setting, int], float]


def tree_of_parzen(
    around: Setting,
    rates: tuple[float, float],
    alphas: tuple[float, float],
    count: int,
    seed: int,
) -> Callable[[Scored, int], None]:
    """A search by Optuna's TPE, which its pruner by successive halving ends early.

    The first setting is `around`. Learning rate and alpha are drawn on logarithmic scales, and
    rounded to three digits.

    Args:
        around: Whose rank and targets all settings have.
        rates: The least and the highest learning rate.
        alphas: The least and the greatest alpha.
        count: How many settings are tried.
        seed: Of the draws: with the same scores, the same settings are asked for again.

    Raises:
        ModuleNotFoundError: Optuna is not installed.

    References:
        Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011. The pruner is
        asynchronous, Li et al., arXiv:1810.05934: a setting goes on if it is in the better half of
        those that came to the same rung before it.
    """
    optuna = imported()

    def search(score: Scored, looks: int) -> None:
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=seed),
                # A rung's number is told as 2**number, which makes any number of steps a rung.
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            )
            study.enqueue_trial({"learning_rate": around.learning_rate, "alpha": around.alpha})
            for _ in range(count):
                trial = study.ask()
                setting = dataclasses.replace(
                    around,
                    learning_rate=_drawn(trial, "learning_rate", rates, around.learning_rate),
                    alpha=_drawn(trial, "alpha", alphas, around.alpha),
                )
                _play(optuna, study, trial, setting, score, looks)
        finally:
            optuna.logging.set_verbosity(level)

    return search


def _play(optuna: Any, study: Any, trial: Any, setting: Setting, score: Scored, looks: int) -> None:
    """Lets one setting climb until it is pruned, diverges, or is at the last rung."""
    found = DIVERGED
    for rung in range(looks):
        found = score(setting, rung)
        # Optuna takes NaN for the worst.
        trial.report(math.nan if found == DIVERGED else found, 2**rung)
        last = rung + 1 == looks
        if found == DIVERGED or (not last and trial.should_prune()):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
    study.tell(trial, found)


def _drawn(trial: Any, name: str, bounds: tuple[float, float], own: float) -> float:
    """A value between bounds, to three digits; that of the first setting as it is."""
    value = trial.suggest_float(name, *bounds, log=True)
    return own if value == own else float(f"{value:.3g}")


def imported() -> Any:
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
