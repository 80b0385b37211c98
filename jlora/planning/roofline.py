"""How long a step takes at best, and what to change where it does not fit.

The estimate knows the program and the chip's peaks, and nothing of how near a kernel comes to
them: it is a bound to compare plans by, not a forecast.
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
        compute_s: All products at the chip's peak.
        hbm_s: All traffic with HBM at its bandwidth, as if the cores kept nothing between
            instructions.
        ici_s: All that chips exchange, over as many links as the compiler spreads it.
        tokens: In a step, over all chips.
        chips: How many there are.
    """

    compute_s: float
    hbm_s: float
    ici_s: float
    tokens: int
    chips: int

    @property
    def bound(self) -> RooflineTerm:
        """What takes longest."""
        terms: dict[RooflineTerm, float] = {
            "compute": self.compute_s,
            "hbm": self.hbm_s,
            "ici": self.ici_s,
        }
        return max(terms, key=lambda term: terms[term])

    @property
    def fastest_s(self) -> float:
        """A step whose parts all run beside each other."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def slowest_s(self) -> float:
        """A step whose parts run one after another, each at its peak."""
        return self.compute_s + self.hbm_s + self.ici_s

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Of the slowest and the fastest step, over all chips."""
        return self.tokens / self.slowest_s, self.tokens / self.fastest_s


def estimate_step_time(
    cost: StepCost, chip: TPUChip, *, tokens: int, chips: int
) -> StepTimeEstimate:
    """Bounds on the time of one step.

    Args:
        cost: What it does on each chip.
        chip: What that can do.
        tokens: In a step, over all chips.
        chips: How many there are.
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
    """Something to change, and what it does to a plan.

    Attributes:
        description: In words.
        saved_bytes: Bytes per chip, estimated.
        is_sufficient: Whether that alone would be enough.
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
    """What would make a plan fit, what is enough alone first; nothing where it fits already.

    Every number is computed from the plan's own: temporaries are taken to grow with the tokens of
    a chip, and groups of arguments to shrink with what they are split over.

    Args:
        memory: What the step needs on each chip: a plan's, or that of `DoesNotFit`.
        available_bytes: What a chip has.
        mesh_shape: The sizes of the mesh's axes.
        batch_size: Of a batch, over all chips.
        seq_length: Of a row, in tokens.
        remat_policy: What is computed again already.
        num_layers: Of the model.
        hidden_size: Of its residual stream; 0 where it is not known.
    """
    over = memory.peak - available_bytes
    if over <= 0:
        return []
    data, fsdp, tensor = (mesh_shape.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    held = {name: memory.arguments.get(name, 0) for name in ("weights", "adapter", "optimizer")}
    fixed = memory.peak - memory.temporaries
    changes: list[PlanSuggestion] = []

    def suggest(what: str, frees: float) -> None:
        if frees > over / 100:
            changes.append(PlanSuggestion(what, round(frees), frees >= over))

    if remat_policy != "full" and hidden_size:
        # Of every layer only its input is held, and of one layer all.
        inputs = 2 * num_layers * seq_length * hidden_size * batch_size // (data * fsdp)
        within = (memory.temporaries - inputs) / max(num_layers, 1)
        suggest(
            f"remat_policy='full' in place of {remat_policy!r}: of each layer's activations only its input "
            f"is held, {format_gib(inputs)} in all",
            memory.temporaries - inputs - max(within, 0),
        )
    share = data * fsdp
    room = available_bytes - fixed
    if room > 0:
        shares = range(share, batch_size, share)
        fits = [
            n for n in shares if batch_size % n == 0 and n * memory.temporaries <= room * batch_size
        ]
        if fits:
            fitting = max(fits)
            suggest(
                f"{fitting} rows in a batch in place of {batch_size}, with the gradients of "
                f"{batch_size // fitting} batches summed up",
                memory.temporaries * (1 - fitting / batch_size),
            )
    if batch_size > share and not any(
        " rows in a batch" in change.description for change in changes
    ):
        suggest(
            f"{share} rows in a batch in place of {batch_size}, one for each of data * fsdp",
            memory.temporaries * (1 - share / batch_size),
        )
    if data > 1:
        suggest(
            f"fsdp={data * fsdp} and data=1 in place of fsdp={fsdp} and data={data}: weights, "
            f"adapter and optimizer are split over all of them",
            sum(held.values()) * (1 - 1 / data),
        )
    more = 2
    while more < 1024 and memory.peak * (1 - 1 / more) < over:
        more *= 2
    suggest(
        f"{more} times as many chips, with fsdp={fsdp * data * more} and the same {batch_size} rows"
        if batch_size % (share * more) == 0
        else f"{more} times as many chips, with tensor={tensor * more}",
        memory.peak * (1 - 1 / more),
    )
    return sorted(changes, key=lambda change: not change.is_sufficient)
