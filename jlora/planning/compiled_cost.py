"""What a step needs on each chip, read from the program that was compiled for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError

from jlora.optim.offload import HOST_MEMORY_KIND
from jlora.planning import hlo_cost


class StepMemory(NamedTuple):
    """Bytes of HBM per chip, at the time of a step when most are held.

    Attributes:
        arguments: What the step is called with, by group: weights, adapter, and so on.
        padding: What the layouts of the arguments add to that.
        outputs: What the step returns, without what takes the place of an argument.
        temporaries: All else that it holds: activations, gathered weights, gradients.
        program: The program itself.
        host: Bytes of the host's memory that a chip's arguments take; they are not in the others.
    """

    arguments: dict[str, int]
    padding: int
    outputs: int
    temporaries: int
    program: int
    host: int = 0

    @property
    def peak(self) -> int:
        held = sum(self.arguments.values())
        return held + self.padding + self.outputs + self.temporaries + self.program


class StepCost(NamedTuple):
    """What one step of a compiled program does on each chip.

    Attributes:
        memory: What it holds.
        flops: Of its matrix products and kernels that say theirs, as often as loops run them.
        hbm_bytes: What it reads from and writes to HBM.
        collectives: What chips exchange, by kind.
        unknown_loops: How many loops were counted once, as their lengths are not in the program.
    """

    memory: StepMemory
    flops: int
    hbm_bytes: int
    collectives: tuple[hlo_cost.CollectiveStats, ...]
    unknown_loops: int

    @property
    def ici_bytes(self) -> int:
        """What one chip sends to others."""
        return sum(collective.sent_bytes for collective in self.collectives)


class DoesNotFitError(ValueError):
    """The compiler found that a step needs more memory than a chip has.

    Attributes:
        memory: What it needs.
        available_bytes: What the chip has.
    """

    def __init__(self, memory: StepMemory, available_bytes: int) -> None:
        self.memory, self.available_bytes = memory, available_bytes
        held = ", ".join(f"{name} {format_gib(size)}" for name, size in memory.arguments.items())
        super().__init__(
            f"The step needs {format_gib(memory.peak)} per chip, which has {format_gib(available_bytes)}: {held}, and "
            f"{format_gib(memory.temporaries)} for activations, gathered weights and gradients. "
            f"`jlora.planning.roofline.advice` says what would make it fit."
        )


def format_gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"


def compile_step(lowered: Any, groups: Mapping[str, Any]) -> Any:
    """The compiled step.

    Args:
        lowered: What `jax.jit(step).lower(...)` returned.
        groups: By name, the trees of shapes, with shardings, that it was lowered for.

    Raises:
        DoesNotFit: A chip has too little memory.
    """
    try:
        return lowered.compile()
    except JaxRuntimeError as error:
        found = _parse_oom_message(str(error))
        if found is None:
            raise
        held = {name: bytes_per_chip(arrays) for name, arrays in groups.items()}
        needed, available, temporaries_only = found
        temporaries = needed if temporaries_only else max(0, needed - sum(held.values()))
        host = bytes_on_host(list(groups.values()))
        raise DoesNotFitError(StepMemory(held, 0, 0, temporaries, 0, host), available) from error


_SIZE_PATTERN = r"([\d.]+)([KMGT]?)"


def _parse_oom_message(message: str) -> tuple[int, int, bool] | None:
    """Bytes needed and available, and whether the first are the temporaries alone."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, only in (
        (rf"HLO temporaries \({_SIZE_PATTERN}\) exceeds available HBM \({_SIZE_PATTERN}\)", True),
        (rf"Used {_SIZE_PATTERN} of {_SIZE_PATTERN} hbm", False),
    ):
        found = re.search(pattern, message)
        if found:
            sizes = [
                round(float(found[place]) * 1024 ** ("KMGT".find(found[place + 1]) + 1))
                if found[place + 1]
                else round(float(found[place]))
                for place in (1, 3)
            ]
            return sizes[0], sizes[1], only
    return None


def bytes_per_chip(arrays: Any) -> int:
    """Bytes that each chip holds of a tree of arrays or shapes, by their shardings.

    What the host holds for it does not count.
    """
    return sum(
        _shard_bytes(array) for array in jax.tree.leaves(arrays) if not _is_array_on_host(array)
    )


def bytes_on_host(arrays: Any) -> int:
    """Bytes that the host holds for each chip of a tree of arrays or shapes."""
    return sum(_shard_bytes(array) for array in jax.tree.leaves(arrays) if _is_array_on_host(array))


def _shard_bytes(array: Any) -> int:
    sharding = getattr(array, "sharding", None)
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def _is_array_on_host(array: Any) -> bool:
    sharding = getattr(array, "sharding", None)
    return sharding is not None and sharding.memory_kind == HOST_MEMORY_KIND


def compute_step_cost(compiled: Any, groups: Mapping[str, Any]) -> StepCost:
    """What one step does on each chip.

    Args:
        compiled: What `compile_step` returned.
        groups: As there.

    Raises:
        RuntimeError: The program is written in a way that this release of JAX cannot read.
    """
    stats = compiled.memory_analysis()
    held = {name: bytes_per_chip(arrays) for name, arrays in groups.items()}
    try:
        program = hlo_cost.parse_hlo(compiled.as_text())
    except JaxRuntimeError as error:
        raise RuntimeError(
            f"The program that was compiled cannot be read by jax {jax.__version__}. Install the "
            f"libtpu that was released with it: `pip install 'jlora[plan]'`."
        ) from error
    runs = list(hlo_cost.iter_executed_instructions(program))
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # The peak is over all memories, and what lies in the host's is held throughout.
    peak = stats.peak_memory_in_bytes - stats.host_argument_size_in_bytes
    return StepCost(
        memory=StepMemory(
            arguments=held,
            padding=stats.argument_size_in_bytes - sum(held.values()),
            outputs=outputs,
            # Its own count of temporaries is of what is reserved, not of what is held at once.
            temporaries=peak - stats.argument_size_in_bytes - outputs,
            program=stats.generated_code_size_in_bytes,
            host=bytes_on_host(list(groups.values())),
        ),
        flops=sum(run.executions * hlo_cost.count_flops(run) for run in runs),
        hbm_bytes=sum(run.executions * hlo_cost.count_hbm_bytes(program, run) for run in runs),
        collectives=hlo_cost.collect_collective_stats(program),
        unknown_loops=sum(
            run.instruction.opcode == "while"
            and hlo_cost.trip_count(program, run.instruction) is None
            for run in runs
        ),
    )
