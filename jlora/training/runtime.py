"""JAX's runtime: the connection of processes, numbers that they agree on, and kept programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.training.recipe.sections import DistributedSection

_MAX_CACHE_BYTES = 10 * 2**30


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


@contextlib.contextmanager
def persistent_compilation_cache(folder: Path, **settings: Any) -> Iterator[None]:
    """Enables JAX's persistent compilation cache in a folder, for later processes to reuse.

    A cache folder that the user has set stays in use.

    Args:
        folder: Folder of the compiled programs, which JAX creates.
        **settings: Further settings of `jax.config`, by name.
    """
    settings = {"jax_compilation_cache_dir": str(folder), **settings}
    previous = {name: getattr(jax.config, name) for name in settings}
    if previous["jax_compilation_cache_dir"] is not None:
        yield
        return
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        # JAX stays with the folder of its first compilation.
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in previous.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def user_compilation_cache() -> Iterator[Path | None]:
    """Keeps the programs that are compiled for GPUs and TPUs in a folder of the user.

    The folder is $XDG_CACHE_HOME/jlora/programs, by default ~/.cache/jlora/programs. The programs
    that were not used for longest are removed where they would exceed 10 GiB. Where the user has
    set a folder (JAX_COMPILATION_CACHE_DIR) or turned the cache off
    (JAX_ENABLE_COMPILATION_CACHE=false), that stays so. Programs for CPUs are not kept: they are
    compiled quickly, and for the instructions of one machine, where a home may be on several.

    Yields:
        The folder; None where programs are not kept in it.
    """
    config = jax.config.values
    is_set = config["jax_compilation_cache_dir"] is not None
    is_off = jax.default_backend() == "cpu" or not config["jax_enable_compilation_cache"]
    folder = None if is_set or is_off else _make_user_folder()
    if folder is None:
        yield None
        return
    with persistent_compilation_cache(folder, jax_compilation_cache_max_size=_MAX_CACHE_BYTES):
        yield folder


def _make_user_folder() -> Path | None:
    """Returns the folder, created if it is missing; None where the user cannot write one."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification of these folders ignores relative paths.
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        folder = root / "jlora" / "programs"
        # Programs are executed: nobody else may write them.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # A file in its place, or no home.
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
