"""How long a step takes at best, and what to change where it does not fit.

The estimate knows the program and the chip's peaks, and nothing of how near a kernel comes to
them: it is a bound to compare plans by, not a forecast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jlora.planning.compiled import Measured, Memory, gib
from jlora.planning.topology import Chip

Term = Literal["compute", "hbm", "ici"]


class Estimate(NamedTuple):
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
    def bound(self) -> Term:
        """What takes longest."""
        terms: dict[Term, float] = {
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


def estimate(measured: Measured, chip: Chip, *, tokens: int, chips: int) -> Estimate:
    """Bounds on the time of one step.

    Args:
        measured: What it does on each chip.
        chip: What that can do.
        tokens: In a step, over all chips.
        chips: How many there are.
    """
    link = chip.ici_bytes_per_s / chip.links
    return Estimate(
        compute_s=measured.flops / chip.flops_per_s,
        hbm_s=measured.hbm_bytes / chip.hbm_bytes_per_s,
        ici_s=sum(c.bytes / (min(c.links, chip.links) * link) for c in measured.collectives),
        tokens=tokens,
        chips=chips,
    )


class Change(NamedTuple):
    """Something to change, and what it does to a plan.

    Attributes:
        what: In words.
        frees: Bytes per chip, estimated.
        fits: Whether that alone would be enough.
    """

    what: str
    frees: int
    fits: bool


def advice(
    memory: Memory,
    available: int,
    *,
    mesh: Mapping[str, int],
    rows: int,
    length: int,
    remat: str = "everything",
    layers: int = 1,
    width: int = 0,
) -> list[Change]:
    """What would make a plan fit, what is enough alone first; nothing where it fits already.

    Every number is computed from the plan's own: temporaries are taken to grow with the tokens of
    a chip, and groups of arguments to shrink with what they are split over.

    Args:
        memory: What the step needs on each chip: a plan's, or that of `DoesNotFit`.
        available: What a chip has.
        mesh: The sizes of the mesh's axes.
        rows: Of a batch, over all chips.
        length: Of a row, in tokens.
        remat: What is computed again already.
        layers: Of the model.
        width: Of its residual stream; 0 where it is not known.
    """
    over = memory.peak - available
    if over <= 0:
        return []
    data, fsdp, tensor = (mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    held = {name: memory.arguments.get(name, 0) for name in ("weights", "adapter", "optimizer")}
    fixed = memory.peak - memory.temporaries
    changes: list[Change] = []

    def suggest(what: str, frees: float) -> None:
        if frees > over / 100:
            changes.append(Change(what, round(frees), frees >= over))

    if remat != "everything" and width:
        # Of every layer only its input is held, and of one layer all.
        inputs = 2 * layers * length * width * rows // (data * fsdp)
        within = (memory.temporaries - inputs) / max(layers, 1)
        suggest(
            f"remat='everything' in place of {remat!r}: of each layer's activations only its input "
            f"is held, {gib(inputs)} in all",
            memory.temporaries - inputs - max(within, 0),
        )
    share = data * fsdp
    room = available - fixed
    if room > 0:
        shares = range(share, rows, share)
        fits = [n for n in shares if rows % n == 0 and n * memory.temporaries <= room * rows]
        if fits:
            fitting = max(fits)
            suggest(
                f"{fitting} rows in a batch in place of {rows}, with the gradients of "
                f"{rows // fitting} batches summed up",
                memory.temporaries * (1 - fitting / rows),
            )
    if rows > share and not any(" rows in a batch" in change.what for change in changes):
        suggest(
            f"{share} rows in a batch in place of {rows}, one for each of data * fsdp",
            memory.temporaries * (1 - share / rows),
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
        f"{more} times as many chips, with fsdp={fsdp * data * more} and the same {rows} rows"
        if rows % (share * more) == 0
        else f"{more} times as many chips, with tensor={tensor * more}",
        memory.peak * (1 - 1 / more),
    )
    return sorted(changes, key=lambda change: not change.fits)
