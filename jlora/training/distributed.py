"""Several processes, and signals: initialization, agreement, and a clean end on SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.training.recipe.sections import DistributedSection

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


# --- signals --------------------------------------------------------------------------------------

# A shell reports 128 plus the number of the signal that ended a process.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class TrainingInterrupted(Exception):
    """A run ended early after a signal; its last step is saved.

    Attributes:
        exit_status: Exit status for the process: 143 after SIGTERM, 130 after SIGINT.

    Example:
        >>> TrainingInterrupted("SIGTERM: step 3 of 9 is saved", 143).exit_status
        143
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class SignalHandler:
    """Context that records the first SIGTERM or SIGINT; a second one of the same kind kills.

    Python accepts handlers in the main thread only. In other threads the context does nothing.

    Attributes:
        received: First signal; None before one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_STATUS:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous_handlers.clear()

    def _handle_signal(self, number: int, _: types.FrameType | None) -> None:
        self.received = signal.Signals(number)
        # Saving may hang, so the next signal must have its usual effect.
        signal.signal(number, self._previous_handlers[self.received])  # type: ignore[arg-type]
