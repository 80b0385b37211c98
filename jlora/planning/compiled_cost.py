"""Memory, FLOPs and traffic of a compiled training step on each chip."""

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
    """Peak memory of a step, in bytes of HBM per chip.

    Attributes:
        arguments: Arguments of the step by group, such as "weights" and "adapter".
        padding: Padding of the arguments' layouts.
        outputs: Results of the step, without those that reuse the memory of an argument.
        temporaries: Activations, gathered weights and gradients.
        program: The program.
        host: Bytes of host memory for the arguments of a chip, which the other fields exclude.

    Example:
        >>> from jlora.planning import StepMemory
        >>> StepMemory({"weights": 8, "adapter": 2}, 0, 0, temporaries=5, program=1).peak
        16
    """

    arguments: dict[str, int]
    padding: int
    outputs: int
    temporaries: int
    program: int
    host: int = 0

    @property
    def peak(self) -> int:
        """The sum of all HBM of a chip."""
        arguments = sum(self.arguments.values())
        return arguments + self.padding + self.outputs + self.temporaries + self.program


class StepCost(NamedTuple):
    """Cost of one step of a compiled program on each chip.

    Attributes:
        memory: Peak memory.
        flops: FLOPs of matrix products and known kernels; each counts as often as it is executed.
        hbm_bytes: Bytes that are read from and written to HBM.
        collectives: Communication between chips by kind.
        unknown_loops: Number of loops of unknown length, whose bodies count once.

    Example:
        >>> from jlora.planning import StepCost, StepMemory
        >>> memory = StepMemory({}, 0, 0, 0, 0)
        >>> StepCost(memory, flops=10, hbm_bytes=20, collectives=(), unknown_loops=0).ici_bytes
        0
    """

    memory: StepMemory
    flops: int
    hbm_bytes: int
    collectives: tuple[hlo_cost.CollectiveStats, ...]
    unknown_loops: int

    @property
    def ici_bytes(self) -> int:
        """The bytes that one chip sends to others."""
        return sum(collective.sent_bytes for collective in self.collectives)


class DoesNotFitError(ValueError):
    """A step needs more memory than a chip has.

    Attributes:
        memory: Memory of the step.
        available_bytes: Memory of the chip in bytes.

    Example:
        >>> from jlora.planning import DoesNotFitError, StepMemory
        >>> memory = StepMemory({"weights": 3 * 2**30}, 0, 0, 2**30, 0)
        >>> str(DoesNotFitError(memory, 2**31)).partition(":")[0]
        'The step needs 4.00 GiB per chip, but 2.00 GiB are available'
    """

    def __init__(self, memory: StepMemory, available_bytes: int) -> None:
        self.memory, self.available_bytes = memory, available_bytes
        arguments = (f"{name} {format_gib(size)}" for name, size in memory.arguments.items())
        super().__init__(
            f"The step needs {format_gib(memory.peak)} per chip, but {format_gib(available_bytes)} "
            f"are available: {', '.join(arguments)}, and {format_gib(memory.temporaries)} for "
            f"activations, gathered weights and gradients. "
            f"`jlora.planning.suggest_plan_changes` lists changes that make it fit."
        )


def format_gib(size: float) -> str:
    """Returns a number of bytes as text in GiB."""
    return f"{size / 2**30:.2f} GiB"


def compile_step(lowered: Any, groups: Mapping[str, Any]) -> Any:
    """Compiles a lowered step.

    Args:
        lowered: Result of `jax.jit(step).lower(...)`.
        groups: Arguments of the step by group, as trees of shapes with shardings.

    Returns:
        The compiled step.

    Raises:
        DoesNotFitError: A chip has too little memory.

    Example:
        >>> import jax
        >>> from jlora.planning import compile_step, compute_step_cost
        >>> x = jax.ShapeDtypeStruct((4, 4), "float32")
        >>> compiled = compile_step(jax.jit(lambda x: x @ x).lower(x), {"batch": x})
        >>> compute_step_cost(compiled, {"batch": x}).memory.arguments
        {'batch': 64}
    """
    try:
        return lowered.compile()
    except JaxRuntimeError as error:
        sizes = _parse_oom_message(str(error))
        if sizes is None:
            raise
        arguments = {name: bytes_per_chip(arrays) for name, arrays in groups.items()}
        needed, available, temporaries_only = sizes
        temporaries = needed if temporaries_only else max(0, needed - sum(arguments.values()))
        host = bytes_on_host(list(groups.values()))
        memory = StepMemory(arguments, 0, 0, temporaries, 0, host)
        raise DoesNotFitError(memory, available) from error


_SIZE_PATTERN = r"([\d.]+)([KMGT]?)"


def _parse_oom_message(message: str) -> tuple[int, int, bool] | None:
    """Returns bytes needed and available, and whether the needed ones are only temporaries.

    None if the message is not about memory.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, temporaries_only in (
        (rf"HLO temporaries \({_SIZE_PATTERN}\) exceeds available HBM \({_SIZE_PATTERN}\)", True),
        (rf"Used {_SIZE_PATTERN} of {_SIZE_PATTERN} hbm", False),
    ):
        match = re.search(pattern, message)
        if match:
            needed, needed_unit, available, available_unit = match.groups()
            return (
                _parse_size(needed, needed_unit),
                _parse_size(available, available_unit),
                temporaries_only,
            )
    return None


def _parse_size(number: str, unit: str) -> int:
    """Returns the bytes of a size such as 15.75 and "G"; the unit may be empty."""
    return round(float(number) * 1024 ** ("KMGT".find(unit) + 1 if unit else 0))


def bytes_per_chip(arrays: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes on each chip, by their shardings.

    Arrays in host memory do not count.
    """
    return sum(
        _shard_bytes(array) for array in jax.tree.leaves(arrays) if not _is_array_on_host(array)
    )


def bytes_on_host(arrays: Any) -> int:
    """Returns the bytes of host memory for each chip of a tree of arrays or shapes."""
    return sum(_shard_bytes(array) for array in jax.tree.leaves(arrays) if _is_array_on_host(array))


def _shard_bytes(array: Any) -> int:
    sharding = getattr(array, "sharding", None)
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def _is_array_on_host(array: Any) -> bool:
    sharding = getattr(array, "sharding", None)
    return sharding is not None and sharding.memory_kind == HOST_MEMORY_KIND


def compute_step_cost(compiled: Any, groups: Mapping[str, Any]) -> StepCost:
    """Returns the cost of one step on each chip.

    Args:
        compiled: Result of `compile_step`.
        groups: Arguments of the step by group, as for `compile_step`.

    Raises:
        RuntimeError: The installed release of JAX cannot read the program.

    Example:
        >>> import jax
        >>> from jlora.planning import compile_step, compute_step_cost
        >>> x = jax.ShapeDtypeStruct((4, 6), "float32")
        >>> compiled = compile_step(jax.jit(lambda x: x @ x.T).lower(x), {"batch": x})
        >>> compute_step_cost(compiled, {"batch": x}).flops == 2 * 4 * 6 * 4
        True
    """
    stats = compiled.memory_analysis()
    arguments = {name: bytes_per_chip(arrays) for name, arrays in groups.items()}
    try:
        program = hlo_cost.parse_hlo(compiled.as_text())
    except JaxRuntimeError as error:
        raise RuntimeError(
            f"jax {jax.__version__} cannot read the compiled program. Install the matching "
            f"libtpu: `pip install 'jlora[plan]'`."
        ) from error
    runs = list(hlo_cost.iter_executed_instructions(program))
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # The peak is over all memories, and arguments in host memory are part of it throughout.
    peak = stats.peak_memory_in_bytes - stats.host_argument_size_in_bytes
    return StepCost(
        memory=StepMemory(
            arguments=arguments,
            padding=stats.argument_size_in_bytes - sum(arguments.values()),
            outputs=outputs,
            # XLA's own count of temporaries is that of reserved memory, not of the peak.
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
