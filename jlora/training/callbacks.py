"""Callbacks of a training run: the methods that the training loop calls, and their requests."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jlora.training.loop import TrainLoop

MetricValues = Mapping[str, float]


class Request(enum.IntEnum):
    """Request of a callback to the training loop; the highest request of a step comes first.

    Attributes:
        STOP: End of the run, with a checkpoint and all outputs.
        SAVE: Checkpoint of the current step.
        EVALUATE: Evaluation on the validation data, followed by a checkpoint.
        INTERRUPT: End of the run before any other request, such as an evaluation.

    Example:
        >>> from jlora.training import Request
        >>> max(Request.SAVE, Request.EVALUATE)
        <Request.EVALUATE: 3>
    """

    STOP = 1
    SAVE = 2
    EVALUATE = 3
    INTERRUPT = 4


class Evaluation(NamedTuple):
    """Result of an evaluation.

    Attributes:
        metrics: Means over the validation data, by name, as in metrics.jsonl.
        is_best: Whether it is the best evaluation so far.
    """

    metrics: dict[str, float]
    is_best: bool


class Callback:
    """Base class of callbacks, whose methods do nothing.

    A subclass overrides the methods that it needs. The loop calls them in the order of its
    callbacks. With several processes every process calls all methods.

    Attributes:
        stop_reason: Stop reason of the run if this callback requests its end.

    Example:
        >>> from jlora.training import Callback, Request
        >>> class TargetLoss(Callback):
        ...     stop_reason = "target_loss"
        ...     loss = float("inf")
        ...     def on_step_end(self, loop, step, metrics):
        ...         self.loss = metrics["train/loss"]
        ...     def request(self, loop, ends_epoch):
        ...         return Request.STOP if self.loss < 0.5 else None
        >>> callback = TargetLoss()
        >>> callback.on_step_end(None, 1, {"train/loss": 0.4})
        >>> callback.request(None, ends_epoch=False)
        <Request.STOP: 1>
    """

    stop_reason = "callback"

    def on_train_start(self, loop: TrainLoop) -> None:
        """Prepares the callback, before the first step of a new or resumed run.

        Args:
            loop: Loop with the restored state and progress.
        """

    def on_step_end(self, loop: TrainLoop, step: int, metrics: MetricValues) -> None:
        """Receives the metrics of a step.

        The devices may already compute the next step then, and `loop.state` is its result. Before a
        checkpoint, an evaluation and the end, they do not.

        Args:
            loop: Loop of the run.
            step: Number of the finished step, from 1.
            metrics: `train/loss`, `train/gradient_norm`, `train/learning_rate`, `num_targets`,
                `tokens` and `seconds`, and `train/accuracy`, `train/margin` or `train/penalty`
                where the objective has them. Equal in all processes except `tokens` and `seconds`.
        """

    def request(self, loop: TrainLoop, ends_epoch: bool) -> Request | None:
        """Returns a request to the loop, or None.

        It is called after each step is started, before the first step of a resumed run, and again
        after an evaluation or a checkpoint. The loop grants each request once per step.

        Args:
            loop: Loop of the run; `loop.progress.step` is the step to save or evaluate.
            ends_epoch: Whether the step is the last one of an epoch.

        Returns:
            A request that is equal in all processes, since all of them take part in it.
        """
        return None

    def evaluate(self, loop: TrainLoop) -> Evaluation | None:
        """Evaluates the current state, after a request for an evaluation.

        Returns:
            The result, or None without validation data or if the evaluation was cancelled.
        """
        return None

    def on_evaluate_end(
        self, loop: TrainLoop, step: int, metrics: MetricValues, is_best: bool
    ) -> None:
        """Receives the metrics of an evaluation.

        Args:
            loop: Loop of the run.
            step: Step after which the model was evaluated.
            metrics: `eval/loss` and further `eval/` metrics.
            is_best: Whether it is the best evaluation so far.
        """

    def on_save(self, loop: TrainLoop) -> None:
        """Saves the current state and progress, after a request and at the end of the run."""

    def on_train_end(self, loop: TrainLoop) -> None:
        """Ends the training, after the last step and its checkpoint; not called after an exception.

        Args:
            loop: Loop of the run; `loop.stop_reason` is the reason of its end.
        """

    def close(self) -> None:
        """Closes files and other resources.

        It is also called after an exception in the loop, and if `on_train_start` was not reached.
        """
