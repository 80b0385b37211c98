"""Evaluation on validation and test data, and the callback that evaluates during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jlora._tree import PyTree
from jlora.training.callbacks import Callback, Evaluation, Request
from jlora.training.data.batch_stream import BatchStream
from jlora.training.data_loader import prefetch_to_device
from jlora.training.loop import TrainLoop
from jlora.training.metrics import EVAL_PREFIX
from jlora.training.progress import Console, evaluation_line
from jlora.training.recipe.sections import TrainingSection
from jlora.training.setup import Setup

EvaluateFn = Callable[[PyTree, Callable[[], bool]], dict[str, float] | None]


class Evaluator(Callback):
    """Callback that evaluates periodically, keeps the best score, and stops early.

    Scores and the number of evaluations since the best one are part of the loop's progress, so that
    a resumed run continues with them. An evaluation that was due when the run was interrupted is
    done first.

    Attributes:
        means: Means of the last evaluation by name; empty before the first one.
    """

    stop_reason = "early_stopping"

    def __init__(
        self,
        evaluate: EvaluateFn | None,
        options: TrainingSection,
        *,
        is_cancelled: Callable[[], bool],
        console: Console,
    ) -> None:
        """Prepares the evaluations.

        Args:
            evaluate: Result of `make_eval_fn`; None without validation data: no evaluations.
            options: Section `training` of the recipe.
            is_cancelled: Predicate that is called before each batch and cancels the evaluation.
            console: Printer of the evaluation at a pause.
        """
        self._evaluate, self._options = evaluate, options
        self._is_cancelled, self._console = is_cancelled, console
        self.means: dict[str, float] = {}

    def request(self, loop: TrainLoop, ends_epoch: bool) -> Request | None:
        """Returns `EVALUATE` when one is due, or `STOP` once the patience is exhausted."""
        patience = self._options.early_stopping_patience
        if self._is_due(loop, ends_epoch):
            return Request.EVALUATE
        if patience is not None and loop.progress.evals_since_best >= patience:
            return Request.STOP
        return None

    def _is_due(self, loop: TrainLoop, ends_epoch: bool) -> bool:
        step, interval = loop.progress.step, self._options.eval_steps
        if self._evaluate is None or loop.progress.last_eval_step == step:
            return False
        is_last = step >= loop.total_steps
        return is_last or (ends_epoch if interval is None else step % interval == 0)

    def evaluate(self, loop: TrainLoop) -> Evaluation | None:
        """Evaluates and updates the best score; None if the evaluation was cancelled."""
        means = self._compute_means(loop)
        if means is None:
            return None
        progress = loop.progress
        score = -means["loss"] if self._options.metric == "loss" else means["accuracy"]
        progress.last_eval_step = progress.step
        progress.evals_since_best += 1
        is_best = score > progress.best_score  # False for NaN. The first of equal scores is best.
        if is_best:
            progress.best_score, progress.best_step = score, progress.step
            progress.evals_since_best = 0
        return Evaluation({f"{EVAL_PREFIX}{name}": v for name, v in means.items()}, is_best)

    def on_train_end(self, loop: TrainLoop) -> None:
        """Evaluates at a pause, unless an evaluation was due there.

        The progress does not change: the resumed run continues as if it had not paused, and the
        best of the regular evaluations stays the best.
        """
        step = loop.progress.step
        is_evaluated = self.means and loop.progress.last_eval_step == step
        if loop.stop_reason != "paused" or is_evaluated:
            return
        means = self._compute_means(loop)
        if means is not None:
            self._console(evaluation_line(step, loop.total_steps, means, is_best=False))

    def _compute_means(self, loop: TrainLoop) -> dict[str, float] | None:
        """Returns the means of the current state; None without data or if it was cancelled."""
        if self._evaluate is None:
            return None
        means = self._evaluate(loop.state.trainable, self._is_cancelled)
        self.means = means or {}
        return means


def make_eval_fn(setup: Setup, stream: BatchStream) -> EvaluateFn:
    """Returns a function from the trainable arrays to the means over all examples of a stream.

    Its second argument is a predicate that is called before each batch. If it returns True, the
    evaluation is cancelled and the result is None.
    """

    def evaluate(trainable: PyTree, is_cancelled: Callable[[], bool]) -> dict[str, float] | None:
        sums = []
        with prefetch_to_device(setup.mesh, stream, epochs=1) as batches:
            for batch in batches:
                if is_cancelled():
                    return None
                sums.append(setup.eval_step(trainable, setup.frozen, batch.arrays))
                jax.block_until_ready(sums[-2:][0])  # At most two batches are on the devices.
        return average_loss_sums(sums)

    return evaluate


def make_test_fn(setup: Setup, stream: BatchStream) -> Callable[[PyTree], dict[str, float]]:
    """Returns a function like that of `make_eval_fn` that is never cancelled."""
    evaluate = make_eval_fn(setup, stream)

    def test(trainable: PyTree) -> dict[str, float]:
        means = evaluate(trainable, lambda: False)
        assert means is not None
        return means

    return test


def average_loss_sums(batch_sums: Iterable[Any]) -> dict[str, float]:
    """Returns the means over several evaluated batches, by name.

    Args:
        batch_sums: `LossSums` of each batch.
    """
    totals: dict[str, float] = {}
    num_targets = 0.0
    for sums in batch_sums:
        values = jax.device_get(sums)
        num_targets += float(values.num_targets)
        for name, value in {"loss": values.loss, **values.extra_sums}.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value, np.float64))
    return {name: total / num_targets for name, total in totals.items()}
