"""SIGTERM and SIGINT: a run finishes its step, saves and ends, with an exit status that says so."""

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


def initialize_distributed(options: DistributedSection) -> None:
    """Joins the processes of a run, before anything else is asked of JAX.

    Raises:
        RuntimeError: They do not find each other.
    """
    arguments = get_distributed_init_args(options, os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)


def get_distributed_init_args(
    options: DistributedSection, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None for a process alone.

    Raises:
        ValueError: A variable is no number.
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
    found: dict[str, Any] = {"coordinator_address": address}
    for name, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        text = environment.get(variable)
        if text is not None and not text.isdigit():
            raise ValueError(f"{variable}={text!r} is no number. Set it to one, or unset it.")
        found[name] = None if text is None else int(text)
    return found


def make_max_over_processes(mesh: Mesh) -> Callable[[int], Any]:
    """A function from this process's wish to the greatest of all processes' wishes.

    What it returns is computed after the work that was given to the devices before; `int` waits for
    it. All processes have to call it equally often.
    """
    if jax.process_count() == 1:
        return lambda wish: wish
    every = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    local = len(mesh.local_devices)
    greatest = jax.jit(
        lambda wishes: wishes.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
    )

    def agreed(wish: int) -> Any:
        wishes = np.full(local, wish, np.int32)
        return greatest(jax.make_array_from_process_local_data(every, wishes, (mesh.size,)))

    return agreed


# As a shell reports a process that the signal ended: 128 and its number.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class TrainingInterrupted(Exception):
    """A run ended early, at a step that is saved.

    Attributes:
        exit_status: What the process should exit with: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class SignalHandler:
    """Notes the first signal instead of dying of it; a second one of the same kind kills.

    Where Python cannot take signals, in threads other than the first, it does nothing.
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
        # Saving may hang, and then the next one has to get through.
        signal.signal(number, self._previous_handlers[self.received])  # type: ignore[arg-type]
