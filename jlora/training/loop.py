"""The training loop: steps, evaluations, checkpoints, and the conditions that end a run."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from jlora._tree import PyTree
from jlora.optim.offload import HOST_MEMORY_KIND
from jlora.training.checkpointing import CheckpointManager
from jlora.training.distributed import (
    EXIT_STATUS,
    SignalHandler,
    TrainingInterrupted,
    make_max_over_processes,
)
from jlora.training.metrics import EVAL_PREFIX, TRAIN_PREFIX, MetricsLogger, log_metrics
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, make_dropout_key
from jlora.training.train_step import StepMetrics, TrainState

_SAVE_REQUEST = 1  # Request for a checkpoint; lower than any signal number, so signals win.


class DeviceBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: Batch of the training step.
        example_ids: Pairs (source, example) in each row of this process.
        next_position: Epoch and batch of the data stream after this batch.
        ends_epoch: Whether it is the last batch of an epoch.
        num_tokens: Number of real (not padding) tokens in the rows of this process.
    """

    arrays: PyTree
    example_ids: Sequence[Any]
    next_position: tuple[int, int]
    ends_epoch: bool
    num_tokens: int


@dataclasses.dataclass(kw_only=True)
class TrainProgress:
    """Progress of a run, which every checkpoint contains.

    Attributes:
        step: Number of steps done.
        position: Position in the data stream: epoch, and batch in the epoch.
        num_targets: Number of target tokens, pairs or texts in all batches so far.
        best_score: Best score of an evaluation; higher is better.
        best_step: Step of the best evaluation; None before the first one.
        evals_since_best: Number of evaluations since the best one.
        last_eval_step: Step of the last evaluation; None before the first one.
    """

    step: int = 0
    position: tuple[int, int] = (0, 0)
    num_targets: float = 0.0
    best_score: float = -math.inf
    best_step: int | None = None
    evals_since_best: int = 0
    last_eval_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as values of JSON."""
        fields = dataclasses.asdict(self)
        return {**fields, "best_score": None if self.best_step is None else self.best_score}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainProgress:
        """Returns the progress that `to_dict` described."""
        best = -math.inf if values["best_score"] is None else values["best_score"]
        epoch, batch = values["position"]
        return cls(**{**values, "best_score": best, "position": (epoch, batch)})


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; weights and optimizer state are unchanged.

    Example:
        >>> issubclass(NonFiniteError, ArithmeticError)
        True
    """


class LoopCallbacks(NamedTuple):
    """Functions that the loop calls.

    Attributes:
        metrics_loggers: Loggers of the metrics of steps and evaluations.
        show_step: Function `(step, metrics)` that displays a training step.
        show_evaluation: Function `(step, metrics, is_best)` that displays an evaluation.
        evaluate: Function from the trainable arrays and a predicate `is_cancelled` to the means of
            an evaluation by name, or to None if it was cancelled; None without validation data.
    """

    metrics_loggers: Sequence[MetricsLogger]
    show_step: Callable[[int, dict[str, float]], None]
    show_evaluation: Callable[[int, dict[str, float], bool], None]
    evaluate: Callable[[PyTree, Callable[[], bool]], dict[str, float] | None] | None


class TrainLoop:
    """The loop of one run.

    Attributes:
        recipe: Recipe of the run.
        setup: Arrays and compiled functions of the run.
        state: Current training state.
        progress: Progress at that state.
        eval_metrics: Means of the last evaluation; empty before the first one.
        last_metrics: Metrics of the last step; empty before the first one.
    """

    def __init__(
        self,
        recipe: Recipe,
        setup: Setup,
        state: TrainState,
        progress: TrainProgress,
        checkpoints: CheckpointManager,
        run_metadata: dict[str, Any],
        callbacks: LoopCallbacks,
        signals: SignalHandler,
        total_steps: int,
        pause_after_step: int | None = None,
    ) -> None:
        """Prepares the loop.

        Args:
            recipe: Recipe of the run.
            setup: Arrays and compiled functions of the run.
            state: Initial or restored training state.
            progress: Progress at that state.
            checkpoints: Manager that writes the checkpoints.
            run_metadata: Metadata that is written to every checkpoint.
            callbacks: Loggers, display and evaluation.
            signals: Handler that records signals.
            total_steps: Steps of the complete run.
            pause_after_step: Step after which the run pauses if steps are left; None: no pause.
        """
        self.recipe, self.setup, self.state, self.progress = recipe, setup, state, progress
        self._checkpoints, self._run_metadata = checkpoints, run_metadata
        self._callbacks, self._signals = callbacks, signals
        self._total_steps = total_steps
        self._pause_step = (
            total_steps if pause_after_step is None else min(pause_after_step, total_steps)
        )
        self.eval_metrics: dict[str, float] = {}
        self.last_metrics: dict[str, float] = {}
        self._dropout_key = make_dropout_key(recipe)
        self._last_saved_step = progress.step if progress.step else None
        self._last_save_time = time.monotonic()
        self._max_over_processes = make_max_over_processes(setup.mesh)
        self._agreed_request = 0  # Highest request of all processes.
        self._pending_step: tuple[int, DeviceBatch, StepMetrics, Any] | None = None
        # The time at which the devices finished all work before the current step.
        self._step_start_time = time.monotonic()

    def run(self, batches: Iterable[DeviceBatch]) -> str:
        """Runs the remaining training steps.

        Args:
            batches: Batches from the position of `progress` on.

        Returns:
            The stop reason: "max_steps", "early_stopping" or "paused".

        Raises:
            TrainingInterrupted: A signal arrived; the state is saved.
            NonFiniteError: A loss or gradient is not finite, and the recipe does not skip the step.
            OSError: A checkpoint cannot be written.
            MemoryError: The devices are out of memory.
        """
        self._step_start_time = time.monotonic()
        stop_reason = self._run_steps(batches)
        self._process_last_step()
        self._save_checkpoint()
        self._wait_for_checkpoint()
        if stop_reason == "paused":
            self._evaluate_at_pause()
        return stop_reason

    def _run_steps(self, batches: Iterable[DeviceBatch]) -> str:
        """Runs the remaining training steps and returns the stop reason."""
        progress = self.progress
        # An evaluation that was due when the run was interrupted is done first.
        if progress.step and self._is_eval_due(progress.position[1] == 0):
            self._evaluate_and_save()
        if self._is_patience_exhausted():
            return "early_stopping"
        if progress.step >= self._pause_step:
            return self._stop_reason()
        for batch in batches:
            self.state, metrics = self._run_step(batch)
            # The metrics of the previous step are processed while this one runs.
            self._process_last_step()
            progress.step += 1
            progress.position = batch.next_position
            request = self._max_over_processes(self._pending_request())
            self._pending_step = progress.step, batch, metrics, request
            if jax.process_count() == 1:  # Several processes agree one step later.
                self._agreed_request = request
            self._stop_if_signaled()
            if self._is_eval_due(batch.ends_epoch):
                self._process_last_step()
                self._evaluate_and_save()
                self._continue_after_save()
                if self._is_patience_exhausted():
                    return "early_stopping"
            elif self._agreed_request == _SAVE_REQUEST or self._is_due(
                self.recipe.training.save_steps
            ):
                self._process_last_step()
                self._save_checkpoint()
                self._continue_after_save()
            if progress.step >= self._pause_step:
                break
        return self._stop_reason()

    def _stop_reason(self) -> str:
        """Returns the stop reason of a run that is at its pause or its end."""
        return "paused" if self.progress.step < self._total_steps else "max_steps"

    def _run_step(self, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        try:
            return self.setup.train_step(
                self.state, self.setup.frozen, batch.arrays, self._dropout_key
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                f"Out of device memory in the training step. Per device: weights "
                f"{_format_device_gib(self.setup.frozen)} GiB, adapter and optimizer "
                f"{_format_device_gib(self.state)} GiB, plus the activations of a batch of "
                f"{self.recipe.batch.size} ({str(error).partition(chr(10))[0][:160]}). Reduce "
                f"batch.size and increase batch.gradient_accumulation_steps, set "
                f"model.remat_policy=full, shard the weights with mesh.fsdp, or raise "
                f"XLA_PYTHON_CLIENT_MEM_FRACTION."
            ) from error

    # --- metrics of a step ------------------------------------------------------------------------

    def _process_last_step(self) -> None:
        """Waits for the last step, logs its metrics, and checks that they are finite."""
        if self._pending_step is None:
            return
        step, batch, step_metrics, request = self._pending_step
        self._pending_step = None
        values = jax.device_get(step_metrics)
        start, self._step_start_time = self._step_start_time, time.monotonic()
        self._agreed_request = int(request)
        self.progress.num_targets += float(values.num_targets)
        means = {
            "loss": values.loss,
            "gradient_norm": values.gradient_norm,
            "learning_rate": values.learning_rate,
            **values.extra_metrics,
        }
        metrics = {
            **{f"{TRAIN_PREFIX}{name}": float(value) for name, value in means.items()},
            "num_targets": float(values.num_targets),
            "tokens": float(batch.num_tokens * jax.process_count()),
            "seconds": self._step_start_time - start,
        }
        self.last_metrics = metrics
        log_metrics(self._callbacks.metrics_loggers, step, metrics)
        self._callbacks.show_step(step, metrics)
        if not values.is_finite:
            self._handle_nonfinite_step(step, batch, values)

    def _handle_nonfinite_step(self, step: int, batch: DeviceBatch, values: Any) -> None:
        """Warns of a skipped step, or raises if the recipe does not skip it."""
        options = self.recipe.training
        cause = (
            f"loss={float(values.loss)}, gradient_norm={float(values.gradient_norm)}. Its batch "
            f"has the examples {_format_example_ids(batch.example_ids)} (source:example)."
        )
        skips = int(values.consecutive_skips)
        if options.on_nonfinite_loss == "skip" and skips <= options.max_consecutive_skips:
            warnings.warn(f"Step {step} was skipped: {cause}", stacklevel=2)
            return
        steps = self._checkpoints.all_steps()
        last = f"step {steps[-1]} in {self._checkpoints.folder}" if steps else "none"
        series = f", the last of {skips} in a row" if skips > 1 else ""
        raise NonFiniteError(
            f"Step {step}{series} is not finite: {cause} It changed nothing. Last checkpoint: "
            f"{last}. Check these examples, reduce optimizer.learning_rate, or set "
            f"training.on_nonfinite_loss=skip."
        )

    # --- evaluations ------------------------------------------------------------------------------

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.step % interval == 0

    def _is_eval_due(self, ends_epoch: bool) -> bool:
        if self._callbacks.evaluate is None or self.progress.last_eval_step == self.progress.step:
            return False
        interval = self.recipe.training.eval_steps
        is_last = self.progress.step >= self._total_steps
        return is_last or (ends_epoch if interval is None else self._is_due(interval))

    def _is_patience_exhausted(self) -> bool:
        patience = self.recipe.training.early_stopping_patience
        return patience is not None and self.progress.evals_since_best >= patience

    def _evaluate_and_save(self) -> None:
        """Evaluates, logs the means, updates the best score, and saves a checkpoint."""
        progress, means = self.progress, self._evaluate()
        log_metrics(
            self._callbacks.metrics_loggers,
            progress.step,
            {f"{EVAL_PREFIX}{name}": value for name, value in means.items()},
        )
        score = -means["loss"] if self.recipe.training.metric == "loss" else means["accuracy"]
        progress.last_eval_step = progress.step
        progress.evals_since_best += 1
        is_best = score > progress.best_score  # False for NaN. The first of equal scores is best.
        if is_best:
            progress.best_score, progress.best_step = score, progress.step
            progress.evals_since_best = 0
        self._callbacks.show_evaluation(progress.step, means, is_best)
        self._save_checkpoint()

    def _evaluate_at_pause(self) -> None:
        """Evaluates at the pause, unless an evaluation was due there.

        The progress does not change: the resumed run continues as if it had not paused, and the
        best of the regular evaluations stays the best.
        """
        is_evaluated = self.eval_metrics and self.progress.last_eval_step == self.progress.step
        if self._callbacks.evaluate is None or is_evaluated:
            return
        means = self._evaluate()
        if self._signals.received is not None and self._has_pending_signal():
            self._raise_interrupted(self._signals.received)
        self._callbacks.show_evaluation(self.progress.step, means, False)

    def _evaluate(self) -> dict[str, float]:
        """Returns the means of an evaluation.

        Raises:
            TrainingInterrupted: A signal cancelled it. A resumed run starts with the evaluation.
        """
        assert self._callbacks.evaluate is not None
        means = self._callbacks.evaluate(self.state.trainable, self._has_pending_signal)
        if means is None:
            assert self._signals.received is not None
            self._raise_interrupted(self._signals.received)
        self.eval_metrics = means
        return means

    # --- signals ----------------------------------------------------------------------------------

    def _has_pending_signal(self) -> bool:
        """Whether a signal arrived, which cancels an evaluation; False with several processes."""
        return jax.process_count() == 1 and self._signals.received is not None

    def _pending_request(self) -> int:
        """Returns the number of a received signal, `_SAVE_REQUEST` when a save is due, or 0."""
        options = self.recipe.training
        if self._signals.received is not None:
            return int(self._signals.received)
        if options.save_interval_minutes is None:
            return 0
        elapsed = time.monotonic() - self._last_save_time
        return _SAVE_REQUEST if elapsed >= 60 * options.save_interval_minutes else 0

    def _stop_if_signaled(self) -> None:
        if self._agreed_request > _SAVE_REQUEST:
            self._raise_interrupted(signal.Signals(self._agreed_request))

    def _raise_interrupted(self, received: signal.Signals) -> NoReturn:
        self._process_last_step()
        self._save_checkpoint()
        # The message reports the checkpoint as saved, so its errors are not suppressed here.
        self._checkpoints.wait_until_finished()
        raise TrainingInterrupted(
            f"{received.name}: step {self.progress.step} of {self._total_steps} is saved in "
            f"{self._checkpoints.folder}. Continue with --resume.",
            EXIT_STATUS[received],
        )

    # --- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        if self._last_saved_step == self.progress.step:
            return
        self._wait_for_checkpoint()
        metadata = {**self._run_metadata, "progress": self.progress.to_dict()}
        self._checkpoints.save(self.progress.step, self.state, metadata, self.progress.best_step)
        self._last_saved_step, self._last_save_time = self.progress.step, time.monotonic()

    def _wait_for_checkpoint(self) -> None:
        """Waits until the last checkpoint is written; warns or raises if it cannot be."""
        try:
            self._checkpoints.wait_until_finished()
        except OSError as error:
            self._last_saved_step = None
            if self.recipe.training.on_save_error == "raise":
                raise
            warnings.warn(str(error), stacklevel=2)

    def _continue_after_save(self) -> None:
        """Restarts the step timer after a save, during which the devices were idle."""
        if self._agreed_request == _SAVE_REQUEST:
            self._agreed_request = 0
        self._step_start_time = time.monotonic()
        if jax.process_count() == 1 and self._signals.received is not None:
            self._agreed_request = int(self._signals.received)
            self._stop_if_signaled()


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


def _format_device_gib(arrays: PyTree) -> str:
    """Returns the GiB that a tree of arrays takes on each device."""
    size = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
        if array.sharding.memory_kind != HOST_MEMORY_KIND
    )
    return f"{size / 2**30:.2f}"


def _format_example_ids(example_ids: Sequence[Any]) -> str:
    """Returns the examples of all rows as `source:example`, at most twenty."""
    flat = [tuple(int(number) for number in pair) for row in example_ids for pair in row]
    more = f" and {len(flat) - 20} more" if len(flat) > 20 else ""
    return ", ".join(f"{source}:{example}" for source, example in flat[:20]) + more
