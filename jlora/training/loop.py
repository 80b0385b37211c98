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

from jlora.optim.offloading import HOST
from jlora.training.interruption import EXIT_STATUS, Interrupted, Watch
from jlora.training.processes import agreement
from jlora.training.recipe.sections import Recipe
from jlora.training.records import Recorder, record_all
from jlora.training.saving import Saver
from jlora.training.setup import Setup, dropout_key
from jlora.training.step import Measured, State

PyTree = Any
_SAVE = 1  # A wish that is less than those of signals.


class Placed(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: What a step takes.
        ids: Per row, the (source, example) pairs in it.
        after: The position of the data after it.
        ends_epoch: Whether it is the last one of an epoch.
        tokens: How many of its places hold one, in this process's rows.
    """

    arrays: PyTree
    ids: Sequence[Any]
    after: tuple[int, int]
    ends_epoch: bool
    tokens: int


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run is. All of it is in a checkpoint.

    Attributes:
        step: How many steps were made.
        position: Of the data: epoch, and batch in it.
        tokens: How many were learned.
        best: The best score of an evaluation, the higher, the better.
        best_step: When it was.
        worse: Evaluations since then.
        evaluated: The step of the last evaluation.
    """

    step: int = 0
    position: tuple[int, int] = (0, 0)
    tokens: float = 0.0
    best: float = -math.inf
    best_step: int | None = None
    worse: int = 0
    evaluated: int | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        held = dataclasses.asdict(self)
        return {**held, "best": None if self.best_step is None else self.best}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Progress:
        """From what `facts` returned."""
        best = -math.inf if facts["best"] is None else facts["best"]
        epoch, batch = facts["position"]
        return cls(**{**facts, "best": best, "position": (epoch, batch)})


class NotFinite(ArithmeticError):
    """A loss or gradient was NaN or infinite; weights and optimizer are those of before."""


class Hooks(NamedTuple):
    """What a loop tells others.

    Attributes:
        recorders: Take measurements.
        show: Takes those of a step, for a progress bar.
        evaluate: From the trained arrays, and what says whether to give up, to the means of an
            evaluation, by name, or None if it gave up; None for none.
    """

    recorders: Sequence[Recorder]
    show: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[PyTree, Callable[[], bool]], dict[str, float] | None] | None


class Loop:
    """One run, from where its state is to its end."""

    def __init__(
        self,
        recipe: Recipe,
        setup: Setup,
        state: State,
        progress: Progress,
        saver: Saver,
        facts: dict[str, Any],
        hooks: Hooks,
        watch: Watch,
        steps: int,
        until: int | None = None,
    ) -> None:
        """Takes everything that a run has.

        Args:
            recipe: Of the run.
            setup: What it computes with.
            state: What it goes on from, and so does `progress`.
            progress: Where that is.
            saver: Takes checkpoints.
            facts: What they say of the run.
            hooks: What it tells others.
            watch: Notes signals.
            steps: How many the run has in all.
            until: The step that it pauses after, when it has more.
        """
        self.recipe, self.setup, self.state, self.progress = recipe, setup, state, progress
        self._saver, self._facts, self._hooks, self._watch = saver, facts, hooks, watch
        self._steps = steps
        self._until = steps if until is None else min(until, steps)
        self.means: dict[str, float] = {}  # Of the last evaluation.
        self._key = dropout_key(recipe)
        self._saved = progress.step if progress.step else None
        self._saved_at = time.monotonic()
        self.last: dict[str, float] = {}
        self._agree = agreement(setup.mesh)
        self._asked = 0  # What all processes wish for.
        self._pending: tuple[int, Placed, Measured, Any] | None = None
        self._since = time.monotonic()  # When the devices were done with what was before a step.

    def run(self, batches: Iterable[Placed]) -> str:
        """Makes the steps that are left; returns why the run ended.

        Raises:
            Interrupted: A signal came; everything up to it is saved.
            NotFinite: A loss or gradient was not, and the recipe does not skip such steps.
            OSError: A checkpoint could not be written.
        """
        self._since = time.monotonic()
        why = self._made(batches)
        self._look()
        self._save()
        self._wait()
        if why == "until":
            self._evaluate_pause()
        return why

    def _evaluate_pause(self) -> None:
        """Evaluates where the run pauses, if that was not due anyway. Its progress is not told, so
        that it goes on as if it had not paused: the best of the others stays the best.
        """
        evaluated = self.means and self.progress.evaluated == self.progress.step
        if self._hooks.evaluate is None or evaluated:
            return
        means = self._hooks.evaluate(self.state.trained, self._is_leaving)
        if self._is_leaving() or means is None:
            assert self._watch.seen is not None
            self._interrupted(self._watch.seen)
        self.means = means

    def _made(self, batches: Iterable[Placed]) -> str:
        """Makes the steps; returns why there are no more."""
        progress = self.progress
        # What an interruption kept from being done is done first, as if it had not come.
        if progress.step and self._evaluation_is_due(progress.position[1] == 0):
            self._evaluated()
        if self._is_patience_over():
            return "patience"
        if progress.step >= self._until:
            return self._end()
        for batch in batches:
            self.state, measured = self._stepped(batch)
            # What the last step measured is looked at while this one runs.
            self._look()
            progress.step += 1
            progress.position = batch.after
            wish = self._agree(self._wish())
            self._pending = progress.step, batch, measured, wish
            if jax.process_count() == 1:  # Others hear of it one step later.
                self._asked = wish
            self._leave_if_asked()
            if self._evaluation_is_due(batch.ends_epoch):
                self._look()
                self._evaluated()
                self._go_on()
                if self._is_patience_over():
                    return "patience"
            elif self._asked == _SAVE or self._is_due(self.recipe.training.save_every):
                self._look()
                self._save()
                self._go_on()
            if progress.step >= self._until:
                break
        return self._end()

    def _end(self) -> str:
        """Why no more steps are made now."""
        return "until" if self.progress.step < self._steps else "steps"

    def _go_on(self) -> None:
        """After a pause in which the devices made no step, and which ended with a save."""
        if self._asked == _SAVE:
            self._asked = 0
        self._since = time.monotonic()
        if jax.process_count() == 1 and self._watch.seen is not None:
            self._asked = int(self._watch.seen)
            self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._asked > _SAVE:
            self._interrupted(signal.Signals(self._asked))

    def _stepped(self, batch: Placed) -> tuple[State, Measured]:
        try:
            return self.setup.step(self.state, self.setup.frozen, batch.arrays, self._key)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                f"The devices have no room for a step: weights take {_gib(self.setup.frozen)} GiB "
                f"of each, adapter and optimizer {_gib(self.state)}, and what the batch of "
                f"{self.recipe.batch.rows} rows needs does not fit beside them "
                f"({str(error).partition(chr(10))[0][:160]}). Lower batch.rows and raise "
                f"batch.accumulate, set model.remat to everything, spread weights with mesh.fsdp, "
                f"or give JAX more of the memory with XLA_PYTHON_CLIENT_MEM_FRACTION."
            ) from error

    # --- what a step measured ---------------------------------------------------------------------

    def _look(self) -> None:
        """Waits for the last step, records what it measured, and acts on it."""
        if self._pending is None:
            return
        step, batch, measured, wish = self._pending
        self._pending = None
        values = jax.device_get(measured)
        began, self._since = self._since, time.monotonic()
        self._asked = int(wish)
        self.progress.tokens += float(values.weight)
        told = {
            "loss": float(values.loss),
            "gradient_norm": float(values.gradient_norm),
            "learning_rate": float(values.learning_rate),
            "weight": float(values.weight),
            "tokens": float(batch.tokens * jax.process_count()),
            "seconds": self._since - began,
            **{name: float(value) for name, value in values.others.items()},
        }
        self.last = told
        record_all(self._hooks.recorders, step, told)
        self._hooks.show(step, told)
        if not values.finite:
            self._not_finite(step, batch, values)

    def _not_finite(self, step: int, batch: Placed, values: Any) -> None:
        options = self.recipe.training
        if options.nonfinite == "skip" and values.skipped <= options.max_skipped:
            warnings.warn(
                f"Step {step} was skipped: loss={float(values.loss)}, "
                f"gradient_norm={float(values.gradient_norm)}, of the examples "
                f"{_told(batch.ids)} (source, example).",
                stacklevel=2,
            )
            return
        steps = self._saver.steps()
        kept = f"step {steps[-1]} in {self._saver.folder}" if steps else "none was saved yet"
        again = f", the last of {values.skipped} in a row" if values.skipped > 1 else ""
        raise NotFinite(
            f"Step {step}{again}: loss={float(values.loss)}, "
            f"gradient_norm={float(values.gradient_norm)}. Its rows are the examples "
            f"{_told(batch.ids)} (source, example). It changed nothing; the last good checkpoint: "
            f"{kept}. Look at these examples, lower optimizer.learning_rate, or let "
            f"training.nonfinite skip such steps."
        )

    # --- evaluations and checkpoints --------------------------------------------------------------

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _is_patience_over(self) -> bool:
        patience = self.recipe.training.patience
        return patience is not None and self.progress.worse >= patience

    def _evaluation_is_due(self, ends_epoch: bool) -> bool:
        if self._hooks.evaluate is None or self.progress.evaluated == self.progress.step:
            return False
        every = self.recipe.training.evaluate_every
        last = self.progress.step >= self._steps
        return last or (ends_epoch if every is None else self._is_due(every))

    def _evaluated(self) -> None:
        """Evaluates and saves."""
        assert self._hooks.evaluate is not None
        progress = self.progress
        means = self._hooks.evaluate(self.state.trained, self._is_leaving)
        if means is None:  # A resumed run evaluates first.
            assert self._watch.seen is not None
            self._interrupted(self._watch.seen)
        self.means = means
        record_all(
            self._hooks.recorders,
            progress.step,
            {f"validation_{name}": value for name, value in means.items()},
        )
        loss_is_it = self.recipe.training.metric == "loss"
        score = -means["loss"] if loss_is_it else means["accuracy"]
        progress.evaluated = progress.step
        progress.worse += 1
        if score > progress.best:  # A NaN is not. Of equal ones the first is the best.
            progress.best, progress.best_step, progress.worse = score, progress.step, 0
        self._save()

    def _is_leaving(self) -> bool:
        """Whether an evaluation is not worth its time, because a signal waits for it."""
        return jax.process_count() == 1 and self._watch.seen is not None

    def _wish(self) -> int:
        """The number of a signal that came, or that a save is due, or nothing."""
        options = self.recipe.training
        if self._watch.seen is not None:
            return int(self._watch.seen)
        if options.save_minutes is None:
            return 0
        return _SAVE if time.monotonic() - self._saved_at >= 60 * options.save_minutes else 0

    def _save(self) -> None:
        if self._saved == self.progress.step:
            return
        self._wait()
        facts = {**self._facts, "progress": self.progress.facts()}
        self._saver.save(self.progress.step, self.state, facts, self.progress.best_step)
        self._saved, self._saved_at = self.progress.step, time.monotonic()

    def _wait(self) -> None:
        """Until the last checkpoint is written."""
        try:
            self._saver.wait()
        except OSError as error:
            self._saved = None
            if self.recipe.training.save_errors == "stop":
                raise
            warnings.warn(str(error), stacklevel=2)

    def _interrupted(self, seen: signal.Signals) -> NoReturn:
        self._look()
        self._save()
        self._saver.wait()  # What is not written is no reason to say that it is.
        raise Interrupted(
            f"{seen.name}: step {self.progress.step} of {self._steps} is saved in "
            f"{self._saver.folder}. Go on with --resume.",
            EXIT_STATUS[seen],
        )


def _gib(arrays: PyTree) -> str:
    """What one device holds of some arrays."""
    held = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
        if array.sharding.memory_kind != HOST
    )
    return f"{held / 2**30:.2f}"


def _told(ids: Sequence[Any]) -> str:
    """The examples of all rows, at most twenty."""
    flat = [tuple(int(number) for number in pair) for row in ids for pair in row]
    more = f" and {len(flat) - 20} more" if len(flat) > 20 else ""
    return ", ".join(f"{source}:{example}" for source, example in flat[:20]) + more


def means_of(sums: Iterable[Any]) -> dict[str, float]:
    """The means over several evaluated batches."""
    totals: dict[str, float] = {}
    weight = 0.0
    for one in sums:
        values = jax.device_get(one)
        weight += float(values.weight)
        for name, value in {"loss": values.loss, **values.others}.items():
            totals[name] = totals.get(name, 0.0) + float(np.asarray(value, np.float64))
    return {name: total / weight for name, total in totals.items()}
