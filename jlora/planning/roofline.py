"""Roofline bounds on the time of a step, and changes that reduce its memory.

The bounds are computed from the program and the chip's peak performance, which real kernels do not
reach: they compare plans and do not predict the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jlora.planning.compiled_cost import StepCost, StepMemory, format_gib
from jlora.planning.tpu_topology import TPUChip

RooflineTerm = Literal["compute", "hbm", "ici"]


class StepTimeEstimate(NamedTuple):
    """Bounds on the time of one step.

    Attributes:
        compute_s: Seconds of all products at the chip's peak.
        hbm_s: Seconds of all HBM traffic at peak bandwidth, without reuse between instructions.
        ici_s: Seconds of all communication at the bandwidth of the links that the compiler uses.
        tokens: Tokens of a step, over all chips.
        chips: Number of chips.

    Example:
        >>> from jlora.planning import StepTimeEstimate
        >>> estimate = StepTimeEstimate(2.0, 1.0, 0.5, tokens=700, chips=4)
        >>> estimate.bound, estimate.fastest_s, estimate.slowest_s
        ('compute', 2.0, 3.5)
        >>> estimate.tokens_per_s
        (200.0, 350.0)
    """

    compute_s: float
    hbm_s: float
    ici_s: float
    tokens: int
    chips: int

    @property
    def bound(self) -> RooflineTerm:
        """The term that takes longest."""
        terms: dict[RooflineTerm, float] = {
            "compute": self.compute_s,
            "hbm": self.hbm_s,
            "ici": self.ici_s,
        }
        return max(terms, key=lambda term: terms[term])

    @property
    def fastest_s(self) -> float:
        """Seconds of a step with full overlap of all terms."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def slowest_s(self) -> float:
        """Seconds of a step without overlap, each term at its peak."""
        return self.compute_s + self.hbm_s + self.ici_s

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Tokens per second over all chips, of the slowest and the fastest step."""
        return self.tokens / self.slowest_s, self.tokens / self.fastest_s


def estimate_step_time(
    cost: StepCost, chip: TPUChip, *, tokens: int, chips: int
) -> StepTimeEstimate:
    """Returns bounds on the time of one step.

    Args:
        cost: Cost of the step on each chip.
        chip: Performance of a chip.
        tokens: Tokens of a step, over all chips.
        chips: Number of chips.

    Example:
        >>> from jlora.planning import StepCost, StepMemory, TPUChip, estimate_step_time
        >>> chip = TPUChip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 4, 256)
        >>> cost = StepCost(StepMemory({}, 0, 0, 0, 0), int(394e12), int(819e9), (), 0)
        >>> estimate = estimate_step_time(cost, chip, tokens=4096, chips=4)
        >>> estimate.compute_s, estimate.hbm_s
        (2.0, 1.0)
    """
    link = chip.ici_bytes_per_s / chip.num_ici_links
    return StepTimeEstimate(
        compute_s=cost.flops / chip.flops_per_s,
        hbm_s=cost.hbm_bytes / chip.hbm_bytes_per_s,
        ici_s=sum(
            c.sent_bytes / (min(c.num_links, chip.num_ici_links) * link) for c in cost.collectives
        ),
        tokens=tokens,
        chips=chips,
    )


class PlanSuggestion(NamedTuple):
    """A change that reduces the memory of a plan.

    Attributes:
        description: Text about the change.
        saved_bytes: Estimated savings in bytes per chip.
        is_sufficient: Whether the step fits with this change alone.
    """

    description: str
    saved_bytes: int
    is_sufficient: bool


def suggest_plan_changes(
    memory: StepMemory,
    available_bytes: int,
    *,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    seq_length: int,
    remat_policy: str = "full",
    num_layers: int = 1,
    hidden_size: int = 0,
) -> list[PlanSuggestion]:
    """Returns changes that reduce the memory of a step, the sufficient ones first.

    The savings are estimated from the memory of the plan: temporaries are proportional to the
    tokens of a chip, and groups of arguments are inversely proportional to their shards.

    Args:
        memory: Memory of the step on each chip, from a plan or from `DoesNotFitError`.
        available_bytes: Memory of a chip in bytes.
        mesh_shape: Sizes of the mesh axes by name.
        batch_size: Batch size over all chips.
        seq_length: Tokens of a row.
        remat_policy: Current rematerialization policy of the model.
        num_layers: Number of layers.
        hidden_size: Hidden size of the model; 0 if unknown.

    Returns:
        The changes; empty if the step fits.

    Example:
        >>> from jlora.planning import StepMemory, suggest_plan_changes
        >>> memory = StepMemory({"weights": 8 * 2**30}, 0, 0, 12 * 2**30, 0)
        >>> changes = suggest_plan_changes(
        ...     memory, 16 * 2**30, mesh_shape={"data": 2}, batch_size=8, seq_length=512
        ... )
        >>> changes[0].description
        'a batch size of 4 instead of 8, with 2 accumulation steps'
    """
    over = memory.peak - available_bytes
    if over <= 0:
        return []
    data, fsdp, tensor = (mesh_shape.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    replicated = [memory.arguments.get(name, 0) for name in ("weights", "adapter", "optimizer")]
    changes: list[PlanSuggestion] = []

    def suggest(description: str, saved: float) -> None:
        if saved > over / 100:
            changes.append(PlanSuggestion(description, round(saved), saved >= over))

    if remat_policy != "full" and hidden_size:
        # The inputs of all layers are kept, and all activations of one layer.
        inputs = 2 * num_layers * seq_length * hidden_size * batch_size // (data * fsdp)
        within_layer = (memory.temporaries - inputs) / max(num_layers, 1)
        suggest(
            f"remat_policy='full' instead of {remat_policy!r}: only the input of each layer is "
            f"kept, {format_gib(inputs)} in total",
            memory.temporaries - inputs - max(within_layer, 0),
        )
    num_parts = data * fsdp  # Chips over which a batch is split.
    free = available_bytes - (memory.peak - memory.temporaries)
    fitting = [
        size
        for size in range(num_parts, batch_size, num_parts)
        if batch_size % size == 0 and size * memory.temporaries <= free * batch_size
    ]
    if fitting:
        size = max(fitting)
        suggest(
            f"a batch size of {size} instead of {batch_size}, with {batch_size // size} "
            f"accumulation steps",
            memory.temporaries * (1 - size / batch_size),
        )
    if batch_size > num_parts and not any("batch size of" in c.description for c in changes):
        suggest(
            f"a batch size of {num_parts} instead of {batch_size}, one row for each of data * fsdp",
            memory.temporaries * (1 - num_parts / batch_size),
        )
    if data > 1:
        suggest(
            f"fsdp={data * fsdp} and data=1 instead of fsdp={fsdp} and data={data}: weights, "
            f"adapter and optimizer are split over all of them",
            sum(replicated) * (1 - 1 / data),
        )
    factor = 2
    while factor < 1024 and memory.peak * (1 - 1 / factor) < over:
        factor *= 2
    suggest(
        f"{factor} times as many chips, with fsdp={fsdp * data * factor} and the same batch size"
        if batch_size % (num_parts * factor) == 0
        else f"{factor} times as many chips, with tensor={tensor * factor}",
        memory.peak * (1 - 1 / factor),
    )
    return sorted(changes, key=lambda change: not change.is_sufficient)
