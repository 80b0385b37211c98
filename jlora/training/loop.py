"""The loop of a run: steps, evaluations, checkpoints, and what ends it."""

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
from jlora.training.metrics import MetricsLogger, log_metrics
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, make_dropout_key
from jlora.training.train_step import StepMetrics, TrainState

_SAVE_REQUEST = 1  # A wish that is less than those of signals.


class DeviceBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: What a step takes.
        example_ids: Per row, the (source, example) pairs in it.
        next_position: The position of the data after it.
        ends_epoch: Whether it is the last one of an epoch.
        num_tokens: How many of its places hold one, in this process's rows.
    """

    arrays: PyTree
    example_ids: Sequence[Any]
    next_position: tuple[int, int]
    ends_epoch: bool
    num_tokens: int


@dataclasses.dataclass(kw_only=True)
class TrainProgress:
    """Where a run is. All of it is in a checkpoint.

    Attributes:
        step: How many steps were made.
        position: Of the data: epoch, and batch in it.
        num_targets: How many were learned.
        best_score: The best score of an evaluation, the higher, the better.
        best_step: When it was.
        evals_since_best: Evaluations since then.
        last_eval_step: The step of the last evaluation.
    """

    step: int = 0
    position: tuple[int, int] = (0, 0)
    num_targets: float = 0.0
    best_score: float = -math.inf
    best_step: int | None = None
    evals_since_best: int = 0
    last_eval_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        held = dataclasses.asdict(self)
        return {**held, "best_score": None if self.best_step is None else self.best_score}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainProgress:
        """From what `to_dict` returned."""
        best = -math.inf if values["best_score"] is None else values["best_score"]
        epoch, batch = values["position"]
        return cls(**{**values, "best_score": best, "position": (epoch, batch)})


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; weights and optimizer are those of before."""


class LoopCallbacks(NamedTuple):
    """What a loop tells others.

    Attributes:
        metrics_loggers: Take measurements.
        show_progress: Takes those of a step, for a progress bar.
        evaluate: From the trained arrays, and what says whether to give up, to the means of an
            evaluation, by name, or None if it gave up; None for none.
    """

    metrics_loggers: Sequence[MetricsLogger]
    show_progress: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[PyTree, Callable[[], bool]], dict[str, float] | None] | None


class TrainLoop:
    """One run, from where its state is to its end."""

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
        """Takes everything that a run has.

        Args:
            recipe: Of the run.
            setup: What it computes with.
            state: What it goes on from, and so does `progress`.
            progress: Where that is.
            checkpoints: Takes checkpoints.
            run_metadata: What they say of the run.
            callbacks: What it tells others.
            signals: Notes signals.
            total_steps: How many the run has in all.
            pause_after_step: The step that it pauses after, when it has more.
        """
        self.recipe, self.setup, self.state, self.progress = recipe, setup, state, progress
        self._checkpoints, self._run_metadata, self._callbacks, self._signals = (
            checkpoints,
            run_metadata,
            callbacks,
            signals,
        )
        self._total_steps = total_steps
        self._pause_step = (
            total_steps if pause_after_step is None else min(pause_after_step, total_steps)
        )
        self.eval_metrics: dict[str, float] = {}  # Of the last evaluation.
        self._dropout_key = make_dropout_key(recipe)
        self._last_saved_step = progress.step if progress.step else None
        self._last_save_time = time.monotonic()
        self.last_metrics: dict[str, float] = {}
        self._max_over_processes = make_max_over_processes(setup.mesh)
        self._agreed_request = 0  # What all processes wish for.
        self._pending_step: tuple[int, DeviceBatch, StepMetrics, Any] | None = None
        self._step_start_time = (
            time.monotonic()
        )  # When the devices were done with what was before a step.

    def run(self, batches: Iterable[DeviceBatch]) -> str:
        """Makes the steps that are left; returns why the run ended.

        Raises:
            Interrupted: A signal came; everything up to it is saved.
            NonFiniteError: A loss or gradient was not, and the recipe does not skip such steps.
            OSError: A checkpoint could not be written.
        """
        self._step_start_time = time.monotonic()
        why = self._run_steps(batches)
        self._process_last_step()
        self._save_checkpoint()
        self._wait_for_checkpoint()
        if why == "paused":
            self._evaluate_at_pause()
        return why

    def _evaluate_at_pause(self) -> None:
        """Evaluates where the run pauses, if that was not due anyway. Its progress is not told, so
        that it goes on as if it had not paused: the best of the others stays the best.
        """
        evaluated = self.eval_metrics and self.progress.last_eval_step == self.progress.step
        if self._callbacks.evaluate is None or evaluated:
            return
        means = self._callbacks.evaluate(self.state.trainable, self._has_pending_signal)
        if self._has_pending_signal() or means is None:
            assert self._signals.received is not None
            self._raise_interrupted(self._signals.received)
        self.eval_metrics = means

    def _run_steps(self, batches: Iterable[DeviceBatch]) -> str:
        """Makes the steps; returns why there are no more."""
        progress = self.progress
        # What an interruption kept from being done is done first, as if it had not come.
        if progress.step and self._is_eval_due(progress.position[1] == 0):
            self._evaluate_and_save()
        if self._is_patience_exhausted():
            return "early_stopping"
        if progress.step >= self._pause_step:
            return self._stop_reason()
        for batch in batches:
            self.state, measured = self._run_step(batch)
            # What the last step measured is looked at while this one runs.
            self._process_last_step()
            progress.step += 1
            progress.position = batch.next_position
            wish = self._max_over_processes(self._pending_request())
            self._pending_step = progress.step, batch, measured, wish
            if jax.process_count() == 1:  # Others hear of it one step later.
                self._agreed_request = wish
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
        """Why no more steps are made now."""
        return "paused" if self.progress.step < self._total_steps else "max_steps"

    def _continue_after_save(self) -> None:
        """After a pause in which the devices made no step, and which ended with a save."""
        if self._agreed_request == _SAVE_REQUEST:
            self._agreed_request = 0
        self._step_start_time = time.monotonic()
        if jax.process_count() == 1 and self._signals.received is not None:
            self._agreed_request = int(self._signals.received)
            self._stop_if_signaled()

    def _stop_if_signaled(self) -> None:
        if self._agreed_request > _SAVE_REQUEST:
            self._raise_interrupted(signal.Signals(self._agreed_request))

    def _run_step(self, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        try:
            return self.setup.train_step(
                self.state, self.setup.frozen, batch.arrays, self._dropout_key
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                f"The devices have no room for a step: weights take {_format_device_gib(self.setup.frozen)} GiB "
                f"of each, adapter and optimizer {_format_device_gib(self.state)}, and what the batch of "
                f"{self.recipe.batch.size} rows needs does not fit beside them "
                f"({str(error).partition(chr(10))[0][:160]}). Lower batch.size and raise "
                f"batch.gradient_accumulation_steps, set model.remat_policy to everything, spread weights with mesh.fsdp, "
                f"or give JAX more of the memory with XLA_PYTHON_CLIENT_MEM_FRACTION."
            ) from error

    # --- what a step measured ---------------------------------------------------------------------

    def _process_last_step(self) -> None:
        """Waits for the last step, records what it measured, and acts on it."""
        if self._pending_step is None:
            return
        step, batch, measured, wish = self._pending_step
        self._pending_step = None
        values = jax.device_get(measured)
        began, self._step_start_time = self._step_start_time, time.monotonic()
        self._agreed_request = int(wish)
        self.progress.num_targets += float(values.num_targets)
        told = {
            "loss": float(values.loss),
            "gradient_norm": float(values.gradient_norm),
            "learning_rate": float(values.learning_rate),
            "num_targets": float(values.num_targets),
            "tokens": float(batch.num_tokens * jax.process_count()),
            "seconds": self._step_start_time - began,
            **{name: float(value) for name, value in values.extra_metrics.items()},
        }
        self.last_metrics = told
        log_metrics(self._callbacks.metrics_loggers, step, told)
        self._callbacks.show_progress(step, told)
        if not values.is_finite:
            self._handle_nonfinite_step(step, batch, values)

    def _handle_nonfinite_step(self, step: int, batch: DeviceBatch, values: Any) -> None:
        options = self.recipe.training
        if (
            options.on_nonfinite_loss == "skip"
            and values.consecutive_skips <= options.max_consecutive_skips
        ):
            warnings.warn(
                f"Step {step} was skipped: loss={float(values.loss)}, "
                f"gradient_norm={float(values.gradient_norm)}, of the examples "
                f"{_format_example_ids(batch.example_ids)} (source, example).",
                stacklevel=2,
            )
            return
        steps = self._checkpoints.all_steps()
        kept = f"step {steps[-1]} in {self._checkpoints.folder}" if steps else "none was saved yet"
        again = (
            f", the last of {values.consecutive_skips} in a row"
            if values.consecutive_skips > 1
            else ""
        )
        raise NonFiniteError(
            f"Step {step}{again}: loss={float(values.loss)}, "
            f"gradient_norm={float(values.gradient_norm)}. Its rows are the examples "
            f"{_format_example_ids(batch.example_ids)} (source, example). It changed nothing; the last good checkpoint: "
            f"{kept}. Look at these examples, lower optimizer.learning_rate, or let "
            f"training.on_nonfinite_loss skip such steps."
        )

    # --- evaluations and checkpoints --------------------------------------------------------------

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.step % interval == 0

    def _is_patience_exhausted(self) -> bool:
        patience = self.recipe.training.early_stopping_patience
        return patience is not None and self.progress.evals_since_best >= patience

    def _is_eval_due(self, ends_epoch: bool) -> bool:
        if self._callbacks.evaluate is None or self.progress.last_eval_step == self.progress.step:
            return False
        every = self.recipe.training.eval_steps
        last = self.progress.step >= self._total_steps
        return last or (ends_epoch if every is None else self._is_due(every))

    def _evaluate_and_save(self) -> None:
        """Evaluates and saves."""
        assert self._callbacks.evaluate is not None
        progress = self.progress
        means = self._callbacks.evaluate(self.state.trainable, self._has_pending_signal)
        if means is None:  # A resumed run evaluates first.
            assert self._signals.received is not None
            self._raise_interrupted(self._signals.received)
        self.eval_metrics = means
        log_metrics(
            self._callbacks.metrics_loggers,
            progress.step,
            {f"validation_{name}": value for name, value in means.items()},
        )
        loss_is_it = self.recipe.training.metric == "loss"
        score = -means["loss"] if loss_is_it else means["accuracy"]
        progress.last_eval_step = progress.step
        progress.evals_since_best += 1
        if score > progress.best_score:  # A NaN is not. Of equal ones the first is the best.
            progress.best_score, progress.best_step, progress.evals_since_best = (
                score,
                progress.step,
                0,
            )
        self._save_checkpoint()

    def _has_pending_signal(self) -> bool:
        """Whether an evaluation is not worth its time, because a signal waits for it."""
        return jax.process_count() == 1 and self._signals.received is not None

    def _pending_request(self) -> int:
        """The number of a signal that came, or that a save is due, or nothing."""
        options = self.recipe.training
        if self._signals.received is not None:
            return int(self._signals.received)
        if options.save_interval_minutes is None:
            return 0
        return (
            _SAVE_REQUEST
            if time.monotonic() - self._last_save_time >= 60 * options.save_interval_minutes
            else 0
        )

    def _save_checkpoint(self) -> None:
        if self._last_saved_step == self.progress.step:
            return
        self._wait_for_checkpoint()
        facts = {**self._run_metadata, "progress": self.progress.to_dict()}
        self._checkpoints.save(self.progress.step, self.state, facts, self.progress.best_step)
        self._last_saved_step, self._last_save_time = self.progress.step, time.monotonic()

    def _wait_for_checkpoint(self) -> None:
        """Until the last checkpoint is written."""
        try:
            self._checkpoints.wait_until_finished()
        except OSError as error:
            self._last_saved_step = None
            if self.recipe.training.on_save_error == "raise":
                raise
            warnings.warn(str(error), stacklevel=2)

    def _raise_interrupted(self, received: signal.Signals) -> NoReturn:
        self._process_last_step()
        self._save_checkpoint()
        self._checkpoints.wait_until_finished()  # What is not written is no reason to say that it is.
        raise TrainingInterrupted(
            f"{received.name}: step {self.progress.step} of {self._total_steps} is saved in "
            f"{self._checkpoints.folder}. Go on with --resume.",
            EXIT_STATUS[received],
        )


def _format_device_gib(arrays: PyTree) -> str:
    """What one device holds of some arrays."""
    held = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
        if array.sharding.memory_kind != HOST_MEMORY_KIND
    )
    return f"{held / 2**30:.2f}"


def _format_example_ids(example_ids: Sequence[Any]) -> str:
    """The examples of all rows, at most twenty."""
    flat = [tuple(int(number) for number in pair) for row in example_ids for pair in row]
    more = f" and {len(flat) - 20} more" if len(flat) > 20 else ""
    return ", ".join(f"{source}:{example}" for source, example in flat[:20]) + more


def average_loss_sums(batch_sums: Iterable[Any]) -> dict[str, float]:
    """The means over several evaluated batches."""
    totals: dict[str, float] = {}
    weight = 0.0
    for one in batch_sums:
        values = jax.device_get(one)
        weight += float(values.num_targets)
        for name, value in {"loss": values.loss, **values.extra_metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value, np.float64))
    return {name: total / weight for name, total in totals.items()}
