"""The training loop: steps, their metrics, and the requests of callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jlora._tree import PyTree
from jlora.optim.offload import HOST_MEMORY_KIND
from jlora.training.callbacks import Callback, MetricValues, Request
from jlora.training.checkpointing import CheckpointManager
from jlora.training.metrics import TRAIN_PREFIX
from jlora.training.recipe.sections import Recipe, TrainingSection
from jlora.training.setup import Setup, make_dropout_key
from jlora.training.train_step import StepMetrics, TrainState


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


class StepRecord(NamedTuple):
    """A training step.

    Attributes:
        step: Number of the step, from 1.
        batch: Batch of the step.
        outputs: Metrics of the step, on the devices while it runs and on the host afterwards.
    """

    step: int
    batch: DeviceBatch
    outputs: StepMetrics


class TrainLoop:
    """The loop of one run: it runs the steps and does what the callbacks request.

    Attributes:
        recipe: Recipe of the run.
        setup: Arrays and compiled functions of the run.
        state: Current training state.
        progress: Progress at that state.
        total_steps: Steps of the complete run.
        last_step: Step of the pause, or `total_steps`.
        finished_step: Last step whose metrics are known; None before the first one.
        last_metrics: Metrics of that step; empty before the first one.
        stop_reason: Reason of the end: "max_steps", "paused", or the `stop_reason` of the callback
            that requested it; None before the end.
        is_finished: Whether the run ended without an exception.
    """

    def __init__(
        self,
        recipe: Recipe,
        setup: Setup,
        *,
        callbacks: Sequence[Callback],
        total_steps: int,
        progress: TrainProgress | None = None,
        pause_after_step: int | None = None,
    ) -> None:
        """Prepares the loop.

        Args:
            recipe: Recipe of the run.
            setup: Arrays and compiled functions of the run.
            callbacks: Callbacks, in the order in which they are called.
            total_steps: Steps of the complete run.
            progress: Progress of a resumed run; None: a new run.
            pause_after_step: Step after which the run pauses if steps are left; None: no pause.
        """
        self.recipe, self.setup, self.total_steps = recipe, setup, total_steps
        self.state: TrainState = setup.state
        self.progress = TrainProgress() if progress is None else progress
        self.finished_step: StepRecord | None = None
        self.last_metrics: dict[str, float] = {}
        self.stop_reason: str | None = None
        self.is_finished = False
        self._callbacks = callbacks
        self.last_step = min(pause_after_step or total_steps, total_steps)
        self._dropout_key = make_dropout_key(recipe)
        self._running_step: StepRecord | None = None
        # The time at which the devices finished all work before the running step.
        self._step_start_time = time.monotonic()

    def run(self, state: TrainState, batches: Iterable[DeviceBatch]) -> str:
        """Runs the remaining training steps and closes the callbacks.

        Args:
            state: Initial or restored training state.
            batches: Batches from the position of `progress` on.

        Returns:
            The stop reason.

        Raises:
            MemoryError: The devices are out of memory.
            ValueError: The batches ended before the last step.
            Exception: An exception of a callback. All callbacks are closed before it is raised.
        """
        self.state = state
        with contextlib.ExitStack() as stack:
            for callback in reversed(self._callbacks):
                stack.callback(callback.close)
            for callback in self._callbacks:
                callback.on_train_start(self)
            self.stop_reason = self._run_steps(batches)
            self._finish_step()
            self.save()
            for callback in self._callbacks:
                callback.on_train_end(self)
            self.is_finished = True
        return self.stop_reason

    def save(self) -> None:
        """Saves the current state and progress, unless they are saved."""
        for callback in self._callbacks:
            callback.on_save(self)

    def _run_steps(self, batches: Iterable[DeviceBatch]) -> str:
        """Runs the remaining training steps and returns the stop reason."""
        progress = self.progress
        self._step_start_time = time.monotonic()
        # What was due when the run was interrupted is done first.
        if progress.step and (reason := self._grant_requests(progress.position[1] == 0)):
            return reason
        for batch in itertools.islice(batches, max(0, self.last_step - progress.step)):
            self.state, metrics = self._run_step(batch)
            # The metrics of the previous step are processed while this one runs.
            self._finish_step()
            progress.step += 1
            progress.position = batch.next_position
            self._running_step = StepRecord(progress.step, batch, metrics)
            if reason := self._grant_requests(batch.ends_epoch):
                return reason
        if progress.step < self.last_step:
            raise ValueError(
                f"The batches ended after step {progress.step}, and the run has {self.last_step} "
                f"steps. Iterate over the data again, or reduce total_steps."
            )
        return "paused" if progress.step < self.total_steps else "max_steps"

    def _run_step(self, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        """Starts a step on the devices."""
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

    def _finish_step(self) -> None:
        """Waits for the running step and passes its metrics to the callbacks."""
        if self._running_step is None:
            return
        step, batch, outputs = self._running_step
        self._running_step = None
        values = jax.device_get(outputs)
        start, self._step_start_time = self._step_start_time, time.monotonic()
        self.progress.num_targets += float(values.num_targets)
        means = {
            "loss": values.loss,
            "gradient_norm": values.gradient_norm,
            "learning_rate": values.learning_rate,
            **values.extra_metrics,
        }
        if not values.is_finite:
            means["skipped"] = 1.0
        self.last_metrics = {
            **{f"{TRAIN_PREFIX}{name}": float(value) for name, value in means.items()},
            "num_targets": float(values.num_targets),
            "tokens": float(batch.num_tokens * jax.process_count()),
            "seconds": self._step_start_time - start,
        }
        self.finished_step = StepRecord(step, batch, values)
        for callback in self._callbacks:
            callback.on_step_end(self, step, self.last_metrics)

    def _grant_requests(self, ends_epoch: bool) -> str | None:
        """Does what the callbacks request, each request once; returns the reason to stop, if any.

        The callbacks are asked again after each evaluation and checkpoint, which take time.
        """
        granted: set[Request] = set()
        while True:
            requests: dict[Request, Callback] = {}
            for callback in self._callbacks:
                request = callback.request(self, ends_epoch)
                if request is not None and not isinstance(request, Request):
                    raise TypeError(
                        f"{type(callback).__name__}.request must return a Request, such as "
                        f"Request.STOP, or None, got {request!r}."
                    )
                if request is not None and request not in granted:
                    requests.setdefault(request, callback)
            if not requests:
                return None
            request = max(requests)
            if request in (Request.STOP, Request.INTERRUPT):
                return requests[request].stop_reason
            self._finish_step()
            if request is Request.EVALUATE:
                self._evaluate()
            self.save()
            granted |= {request, Request.SAVE}
            # The devices were idle.
            self._step_start_time = time.monotonic()

    def _evaluate(self) -> None:
        """Evaluates the current state and passes the metrics to the callbacks."""
        for evaluator in self._callbacks:
            evaluation = evaluator.evaluate(self)
            if evaluation is not None:
                for callback in self._callbacks:
                    callback.on_evaluate_end(self, self.progress.step, *evaluation)


class NonFiniteError(ArithmeticError):
    """A step was NaN or infinite; weights and optimizer state are unchanged.

    Example:
        >>> from jlora.training import NonFiniteError
        >>> issubclass(NonFiniteError, ArithmeticError)
        True
    """


class NonFiniteGuard(Callback):
    """Callback that raises, or warns of a skipped step, when a step is not finite.

    It is the last of the callbacks, so that the others have the metrics of the step.
    """

    def __init__(self, options: TrainingSection, checkpoints: CheckpointManager) -> None:
        """Prepares the guard.

        Args:
            options: Section `training` of the recipe.
            checkpoints: Checkpoints, whose last step is part of the error.
        """
        self._options, self._checkpoints = options, checkpoints

    def on_step_end(self, loop: TrainLoop, step: int, metrics: MetricValues) -> None:
        """Checks the metrics of a step.

        Raises:
            NonFiniteError: A value is not finite, and the recipe does not skip the step.
        """
        assert loop.finished_step is not None
        _, batch, values = loop.finished_step
        if values.is_finite:
            return
        cause = (
            f"loss={float(values.loss)}, gradient_norm={float(values.gradient_norm)}. Its batch "
            f"has the examples {_format_example_ids(batch.example_ids)} (source:example)."
        )
        remedy = "Check these examples, reduce optimizer.learning_rate"
        if math.isfinite(values.loss) and math.isfinite(values.gradient_norm):
            cause = (
                f"Loss and gradient are finite (loss={float(values.loss)}, "
                f"gradient_norm={float(values.gradient_norm)}), but the updated weights or "
                f"optimizer state are not."
            )
            remedy = "Reduce optimizer.learning_rate, increase optimizer.epsilon"
        skips = int(values.consecutive_skips)
        options = self._options
        if options.on_nonfinite_loss == "skip" and skips <= options.max_consecutive_skips:
            warnings.warn(f"Step {step} was skipped: {cause}", stacklevel=2)
            return
        steps = self._checkpoints.all_steps()
        last = f"step {steps[-1]} in {self._checkpoints.folder}" if steps else "none"
        series = f", the last of {skips} in a row" if skips > 1 else ""
        raise NonFiniteError(
            f"Step {step}{series} is not finite: {cause} It changed nothing. Last checkpoint: "
            f"{last}. {remedy}, or set training.on_nonfinite_loss=skip."
        )


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
