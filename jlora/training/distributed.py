"""Several processes, and signals: initialization, agreement, and a clean end on SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.training.callbacks import Callback, Request
from jlora.training.recipe.sections import DistributedSection

if TYPE_CHECKING:
    from jlora.training.checkpointing import CheckpointManager
    from jlora.training.loop import TrainLoop

# --- processes ------------------------------------------------------------------------------------


def initialize_distributed(options: DistributedSection) -> None:
    """Calls `jax.distributed.initialize` if the run has several processes.

    It must be called before any other use of JAX.

    Args:
        options: Section `distributed` of the recipe. Environment variables
            (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) are used where it is empty.

    Raises:
        RuntimeError: The processes do not connect.
        ValueError: An environment variable is not a number.

    Example:
        >>> from jlora.training import initialize_distributed
        >>> from jlora.training.recipe.sections import DistributedSection
        >>> initialize_distributed(DistributedSection())  # One process: nothing to do.
    """
    arguments = get_distributed_init_args(options, os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)


def get_distributed_init_args(
    options: DistributedSection, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a single process.

    Args:
        options: Section `distributed` of the recipe.
        environment: Environment variables.

    Raises:
        ValueError: An environment variable is not a number.
    """
    if options.coordinator_address is not None:
        return {
            "coordinator_address": options.coordinator_address,
            "num_processes": options.num_processes,
            "process_id": options.process_id,
        }
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return {} if options.auto else None
    arguments: dict[str, Any] = {"coordinator_address": address}
    for name, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        text = environment.get(variable)
        if text is not None and not text.isdigit():
            raise ValueError(f"{variable}={text!r} must be a number. Change it, or unset it.")
        arguments[name] = None if text is None else int(text)
    return arguments


def make_max_over_processes(mesh: Mesh) -> Callable[[int], Any]:
    """Returns a function from a number of this process to the maximum over all processes.

    Its result is computed after the work that the devices already have; `int` waits for it. All
    processes must call it equally often.
    """
    if jax.process_count() == 1:
        return lambda number: number
    sharded = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    num_local = len(mesh.local_devices)
    maximum = jax.jit(
        lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
    )

    def max_over_processes(number: int) -> Any:
        numbers = np.full(num_local, number, np.int32)
        return maximum(jax.make_array_from_process_local_data(sharded, numbers, (mesh.size,)))

    return max_over_processes


class ProcessMaximum:
    """Maximum of a number over all processes, which does not wait for the running step.

    With several processes, a number has an effect one update later.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Prepares the maximum over the processes of a mesh."""
        self._max_over_processes = make_max_over_processes(mesh)
        self._pending: Any = 0

    def update(self, number: int) -> int:
        """Returns the maximum of the last numbers; all processes must call it equally often.

        Args:
            number: Number of this process, at least 0.
        """
        previous, self._pending = self._pending, self._max_over_processes(number)
        return number if jax.process_count() == 1 else int(previous)

    def reset(self) -> None:
        """Drops the last numbers, in all processes at the same time."""
        self._pending = 0


# --- signals --------------------------------------------------------------------------------------

# A shell reports 128 plus the number of the signal that ended a process.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class TrainingInterrupted(Exception):
    """A run ended early after a signal; its last step is saved.

    Attributes:
        exit_status: Exit status for the process: 143 after SIGTERM, 130 after SIGINT.

    Example:
        >>> from jlora.training import TrainingInterrupted
        >>> TrainingInterrupted("SIGTERM: step 3 of 9 is saved", 143).exit_status
        143
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class SignalHandler(Callback):
    """Callback that interrupts the run on SIGTERM or SIGINT; a second one of the same kind kills.

    Python accepts handlers in the main thread only. In other threads the callback does nothing.

    Attributes:
        received: First signal; None before one.
    """

    stop_reason = "interrupted"

    def __init__(self, mesh: Mesh, checkpoints: CheckpointManager) -> None:
        """Prepares the handler.

        Args:
            mesh: Mesh of the run, whose processes stop together.
            checkpoints: Checkpoints, which are complete when the run is interrupted.
        """
        self._checkpoints = checkpoints
        self._agreement = ProcessMaximum(mesh)
        self._agreed: signal.Signals | None = None
        self.received: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, object] = {}

    def is_pending(self) -> bool:
        """Whether a signal arrived, which cancels an evaluation; False with several processes."""
        return jax.process_count() == 1 and self.received is not None

    def on_train_start(self, loop: TrainLoop) -> None:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_STATUS:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)

    def request(self, loop: TrainLoop, ends_epoch: bool) -> Request | None:
        """Returns `INTERRUPT` once the processes agree that a signal arrived."""
        number = self._agreement.update(0 if self.received is None else int(self.received))
        if not number:
            return None
        self._agreed = signal.Signals(number)
        return Request.INTERRUPT

    def on_train_end(self, loop: TrainLoop) -> None:
        """Raises if a signal ended the run, or arrived while it was about to pause.

        Raises:
            TrainingInterrupted: A signal arrived; the state is saved.
            OSError: The state could not be saved.
        """
        if loop.stop_reason == "paused" and self.is_pending():
            self._agreed = self.received
        if self._agreed is None:
            return
        # The message reports the checkpoint as saved: it is retried, and its errors are raised.
        loop.save()
        self._checkpoints.wait_until_finished()
        raise TrainingInterrupted(
            f"{self._agreed.name}: step {loop.progress.step} of {loop.total_steps} is saved in "
            f"{self._checkpoints.folder}. Continue with --resume.",
            EXIT_STATUS[self._agreed],
        )

    def close(self) -> None:
        """Restores the earlier handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous_handlers.clear()

    def _handle_signal(self, number: int, _: types.FrameType | None) -> None:
        self.received = signal.Signals(number)
        # Saving may hang, so the next signal must have its usual effect.
        signal.signal(number, self._previous_handlers[self.received])  # type: ignore[arg-type]
