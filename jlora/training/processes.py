"""Several processes of one run: how they find each other, and agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.training.recipe.sections import Distributed


def connect(options: Distributed) -> None:
    """Joins the processes of a run, before anything else is asked of JAX.

    Raises:
        RuntimeError: They do not find each other.
    """
    arguments = joining(options, os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)


def joining(options: Distributed, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None for a process alone.

    Raises:
        ValueError: A variable is no number.
    """
    if options.coordinator is not None:
        return {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process,
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


def agreement(mesh: Mesh) -> Callable[[int], Any]:
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
