"""What a step needs on each chip, read from the program that was compiled for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError

from jlora.optim.offloading import HOST
from jlora.planning import hlo


class Memory(NamedTuple):
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


class Measured(NamedTuple):
    """What one step of a compiled program does on each chip.

    Attributes:
        memory: What it holds.
        flops: Of its matrix products and kernels that say theirs, as often as loops run them.
        hbm_bytes: What it reads from and writes to HBM.
        collectives: What chips exchange, by kind.
        unknown_loops: How many loops were counted once, as their lengths are not in the program.
    """

    memory: Memory
    flops: int
    hbm_bytes: int
    collectives: tuple[hlo.Collective, ...]
    unknown_loops: int

    @property
    def ici_bytes(self) -> int:
        """What one chip sends to others."""
        return sum(collective.bytes for collective in self.collectives)


class DoesNotFit(ValueError):
    """The compiler found that a step needs more memory than a chip has.

    Attributes:
        memory: What it needs.
        available: What the chip has.
    """

    def __init__(self, memory: Memory, available: int) -> None:
        self.memory, self.available = memory, available
        held = ", ".join(f"{name} {gib(size)}" for name, size in memory.arguments.items())
        super().__init__(
            f"The step needs {gib(memory.peak)} per chip, which has {gib(available)}: {held}, and "
            f"{gib(memory.temporaries)} for activations, gathered weights and gradients. "
            f"`jlora.planning.roofline.advice` says what would make it fit."
        )


def gib(size: float) -> str:
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
        found = _too_large(str(error))
        if found is None:
            raise
        held = {name: bytes_per_chip(arrays) for name, arrays in groups.items()}
        needed, available, temporaries_only = found
        temporaries = needed if temporaries_only else max(0, needed - sum(held.values()))
        host = bytes_on_host(list(groups.values()))
        raise DoesNotFit(Memory(held, 0, 0, temporaries, 0, host), available) from error


_SIZE = r"([\d.]+)([KMGT]?)"


def _too_large(message: str) -> tuple[int, int, bool] | None:
    """Bytes needed and available, and whether the first are the temporaries alone."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, only in (
        (rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", True),
        (rf"Used {_SIZE} of {_SIZE} hbm", False),
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
    return sum(_part(array) for array in jax.tree.leaves(arrays) if not _is_on_host(array))


def bytes_on_host(arrays: Any) -> int:
    """Bytes that the host holds for each chip of a tree of arrays or shapes."""
    return sum(_part(array) for array in jax.tree.leaves(arrays) if _is_on_host(array))


def _part(array: Any) -> int:
    sharding = getattr(array, "sharding", None)
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def _is_on_host(array: Any) -> bool:
    sharding = getattr(array, "sharding", None)
    return sharding is not None and sharding.memory_kind == HOST


def measured(compiled: Any, groups: Mapping[str, Any]) -> Measured:
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
        program = hlo.parse(compiled.as_text())
    except JaxRuntimeError as error:
        raise RuntimeError(
            f"The program that was compiled cannot be read by jax {jax.__version__}. Install the "
            f"libtpu that was released with it: `pip install 'jlora[plan]'`."
        ) from error
    runs = list(hlo.runs(program))
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # The peak is over all memories, and what lies in the host's is held throughout.
    peak = stats.peak_memory_in_bytes - stats.host_argument_size_in_bytes
    return Measured(
        memory=Memory(
            arguments=held,
            padding=stats.argument_size_in_bytes - sum(held.values()),
            outputs=outputs,
            # Its own count of temporaries is of what is reserved, not of what is held at once.
            temporaries=peak - stats.argument_size_in_bytes - outputs,
            program=stats.generated_code_size_in_bytes,
            host=bytes_on_host(list(groups.values())),
        ),
        flops=sum(run.times * hlo.flops(run) for run in runs),
        hbm_bytes=sum(run.times * hlo.traffic(program, run) for run in runs),
        collectives=hlo.collectives(program),
        unknown_loops=sum(
            run.instruction.opcode == "while" and hlo.trip_count(program, run.instruction) is None
            for run in runs
        ),
    )
