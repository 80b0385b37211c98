"""What a compiled program does, counted from its text: products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, so a scan over 80 layers looks like one.
Here every instruction counts as often as its loops run it.

References:
    XLA's `HloCostAnalysis` (xla/service/hlo_cost_analysis.cc), whose count of a convolution's
    multiplications this follows: on a TPU every matrix product is a convolution.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVE_OPCODES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

_DTYPE_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}

# What moves no data, or whose data other instructions move.
_ZERO_TRAFFIC_OPCODES = {
    "after-all",
    "bitcast",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
    "while",
}


class HloShape(NamedTuple):
    """An array in the program.

    Attributes:
        dtype: XLA's name of it.
        dims: Its lengths.
        is_on_core: Whether it is in the memory of the core (VMEM, SMEM) rather than in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    is_on_core: bool

    @property
    def nbytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)  # As in f32 and f8e4m3fn.
        bits = _DTYPE_BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return -(-math.prod(self.dims) * bits // 8)


class HloInstruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[HloShape, ...]  # Of what it returns; several for a tuple.
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called_computations(self) -> tuple[str, ...]:
        """The computations that it runs once."""
        if self.opcode == "while" or ("to_apply=" in self.attributes and self.opcode != "call"):
            return ()  # What is applied to single numbers is no work of its own.
        found = re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", self.attributes)
        listed = re.findall(
            r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        )
        both = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        names = [name.strip().lstrip("%") for group in listed for name in group.split(",")]
        return (*found, *names, *both)


HloComputation = dict[str, HloInstruction]


class HloModule(NamedTuple):
    """The computations of a module by name, and which of them is its entry."""

    computations: dict[str, HloComputation]
    entry: str


_COMPUTATION_REGEX = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

_INSTRUCTION_REGEX = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")

_SHAPE_REGEX = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse_hlo(text: str) -> HloModule:
    """The program of a module's text, `compiled.as_text()`."""
    computations: dict[str, HloComputation] = {}
    current: HloComputation = {}
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION_REGEX.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION_REGEX.match(line)
        if found:
            instruction = _parse_hlo_instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("The text is no HLO module: it has no ENTRY. Give compiled.as_text().")
    return HloModule(computations, entry)


def _parse_hlo_instruction(name: str, rest: str, is_root: bool) -> HloInstruction:
    kind, rest = _split_at_closing_paren(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _split_at_closing_paren("(" + rest)
    operands = re.findall(r"%([\w.\-]+)", inside) if opcode != "constant" else []
    if opcode in ("constant", "parameter"):
        attributes = inside + attributes
    return HloInstruction(
        name, opcode, _parse_hlo_shapes(kind), tuple(operands), attributes, is_root
    )


def _split_at_closing_paren(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that the text starts with, and what is after it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[1:place], text[place + 1 :]
    raise ValueError(f"A parenthesis is not closed in {text[:80]!r}.")


def _parse_hlo_shapes(text: str) -> tuple[HloShape, ...]:
    def dims(lengths: str) -> tuple[int, ...]:
        return tuple(int(length.lstrip("<=")) for length in lengths.split(",") if length)

    return tuple(
        HloShape(found[1], dims(found[2]), bool(re.search(r"S\([1-9]", found[3] or "")))
        for found in _SHAPE_REGEX.finditer(text)
    )


class ExecutedInstruction(NamedTuple):
    """An instruction, how often the program runs it, and where it stands."""

    instruction: HloInstruction
    executions: int
    computation: HloComputation
    is_fused: bool  # Whether it is inside a fusion, whose insides touch no memory.


def iter_executed_instructions(
    module: HloModule, *, count_trips: bool = True
) -> Iterator[ExecutedInstruction]:
    """Every instruction with how often it is run.

    Args:
        module: The module.
        count_trips: Whether the body of a loop counts as often as it is run, else once.
    """

    def visit(name: str, times: int, fused: bool) -> Iterator[ExecutedInstruction]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield ExecutedInstruction(instruction, times, computation, fused)
            if instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
                assert body is not None
                trips = trip_count(module, instruction) if count_trips else 1
                yield from visit(body[1], times * (trips or 1), fused)
            inside = fused or instruction.opcode == "fusion"
            for called in instruction.called_computations:
                yield from visit(called, times, inside)

    return visit(module.entry, 1, False)


def trip_count(module: HloModule, loop: HloInstruction) -> int | None:
    """How often a loop's body runs; None when that is not written in the program.

    CPUs and GPUs note it. On TPUs it is what the condition compares its counter with, over what the
    body adds to that: ones in JAX's own loops, twos in unrolled products whose operand goes round a
    ring of chips.
    """
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        module.computations[found[1]]
        for key in ("condition", "body")
        if (found := re.search(rf"{key}=%?([\w.\-]+)", loop.attributes))
    )
    compared = next(one for one in condition.values() if one.is_root)
    if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
        return None
    counter, bound = (condition[name] for name in compared.operands)
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    place = re.search(r"index=(\d+)", counter.attributes)
    assert place is not None
    returned = next(one for one in body.values() if one.is_root)
    added = _counter_increment(module, body, returned.operands[int(place[1])])
    return added and -(-_parse_constant(bound) // added)


def _counter_increment(module: HloModule, body: HloComputation, name: str) -> int | None:
    """What a counter grows by where it is set to this; None where that is not plain."""
    instruction = body[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _counter_increment(module, body, instruction.operands[0])
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called_computations[0]]
        return _counter_increment(
            module, inside, next(one.name for one in inside.values() if one.is_root)
        )
    if instruction.opcode != "add":
        return None
    numbers = [
        _parse_constant(body[operand])
        for operand in instruction.operands
        if body[operand].opcode == "constant"
    ]
    return numbers[0] if len(numbers) == 1 else None


def _parse_constant(constant: HloInstruction) -> int:
    return int(constant.attributes.split(",")[0])


# A kernel is a black box. Of splash attention's, how many products of queries and keys' shape each
# makes for every pair that the causal mask leaves.
_SPLASH_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def count_flops(executed: ExecutedInstruction) -> int:
    """Twice the multiplications of a product, convolution or attention kernel; 0 for all else."""
    instruction = executed.instruction
    if instruction.opcode == "custom-call":
        return _count_splash_attention_flops(executed)
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (executed.computation[name].shapes[0].dims for name in instruction.operands[:2])
    (out, *_) = instruction.shapes
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(out.dims) * math.prod(left[axis] for axis in axes)
    return 2 * _count_convolution_multiplies(instruction.attributes, left, right, out.dims)


def _count_splash_attention_flops(executed: ExecutedInstruction) -> int:
    for name, products in _SPLASH_KERNEL_PRODUCTS.items():
        if executed.instruction.name.startswith(name):
            shapes = [
                executed.computation[operand].shapes[0] for operand in executed.instruction.operands
            ]
            (*outer, length, dim) = next(s.dims for s in shapes if "f" in s.dtype)  # The queries.
            return 2 * products * math.prod(outer) * (length * length // 2) * dim
    return 0


def _count_convolution_multiplies(
    attributes: str, left: Sequence[int], right: Sequence[int], out: Sequence[int]
) -> int:
    """How many numbers are multiplied; those with padding or between dilated ones are not."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())
    count = 1
    for place, label in enumerate(spatial):

        def field(name: str, default: int, place: int = place) -> int:
            return int(given[name].split("x")[place]) if name in given else default

        low = given["pad"].split("x")[place].split("_")[0] if "pad" in given else 0
        ends = (labels[1].index(label), labels[2].index(label), labels[3].index(label))
        base, size, length = left[ends[0]], right[ends[1]], out[ends[2]]
        stretch = field("lhs_dilate", 1)
        at = (
            np.arange(length)[:, None] * field("stride", 1)
            - int(low)
            + np.arange(size) * field("rhs_dilate", 1)
        )
        inside = (at >= 0) & (at < (base - 1) * stretch + 1) & (at % stretch == 0)
        count *= int(inside.sum())
    outputs = out[labels[3].index("b")] * out[labels[3].index("f")]
    return count * outputs * right[labels[2].index("i")]


def count_hbm_bytes(module: HloModule, executed: ExecutedInstruction) -> int:
    """Bytes that an instruction reads from and writes to HBM, each array once.

    Of an array that is only sliced, and of one that is updated in place, the slice counts.
    """
    instruction = executed.instruction
    opcode = instruction.opcode
    if (
        executed.is_fused
        or opcode in _ZERO_TRAFFIC_OPCODES
        or opcode.endswith(("-done", "-update"))
    ):
        return 0
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _sum_shape_hbm_bytes(instruction.shapes[:1])
    if opcode in ("dynamic-update-slice", "scatter"):
        place = 1 if opcode == "dynamic-update-slice" else 2
        return 2 * _sum_shape_hbm_bytes(executed.computation[instruction.operands[place]].shapes)
    if opcode == "fusion":
        (called,) = instruction.called_computations
        return _count_fusion_hbm_bytes(
            module.computations[called], instruction, executed.computation
        )
    read = [shape for name in instruction.operands for shape in executed.computation[name].shapes]
    if opcode.endswith("-start"):  # It returns its operand again beside the result.
        return sum(map(_shape_hbm_bytes, read)) + _sum_shape_hbm_bytes(instruction.shapes[1:2])
    return _sum_shape_hbm_bytes(read) + _sum_shape_hbm_bytes(instruction.shapes)


def _shape_hbm_bytes(shape: HloShape) -> int:
    return 0 if shape.is_on_core else shape.nbytes


def _sum_shape_hbm_bytes(shapes: Sequence[HloShape]) -> int:
    return sum(map(_shape_hbm_bytes, shapes))


def _count_fusion_hbm_bytes(
    body: HloComputation, fusion: HloInstruction, caller: HloComputation
) -> int:
    users: dict[str, list[HloInstruction]] = collections.defaultdict(list)
    for instruction in body.values():
        for name in instruction.operands:
            users[name].append(instruction)
    total = 0
    for name, instruction in body.items():
        if instruction.opcode != "parameter":
            continue
        number = int(instruction.attributes.split(",")[0] or 0)
        shapes = caller[fusion.operands[number]].shapes
        if any(shape.is_on_core for shape in shapes):
            continue
        sliced = _count_sliced_bytes(name, users)
        total += (
            _sum_shape_hbm_bytes(shapes)
            if sliced is None
            else min(sliced, _sum_shape_hbm_bytes(shapes))
        )
    for instruction in body.values():
        if instruction.is_root:
            parts = [instruction]
            if instruction.opcode == "tuple":
                parts = [body[name] for name in instruction.operands]
            for part, shape in zip(parts, fusion.shapes, strict=False):
                if part.opcode == "dynamic-update-slice":
                    updated = body[part.operands[1]].shapes[0].nbytes
                    total += 0 if shape.is_on_core else updated
                else:
                    total += _shape_hbm_bytes(shape)
    return total


def _count_sliced_bytes(name: str, users: dict[str, list[HloInstruction]]) -> int | None:
    """Bytes that are used of an array of which only slices are; None when all of it is."""
    total = 0
    for user in users[name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.shapes[0].nbytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # Updated in place.
        elif user.opcode in ("bitcast", "fusion", "copy"):
            deeper = _count_sliced_bytes(user.name, users) if user.opcode == "bitcast" else None
            if deeper is None:
                return None
            total += deeper
        else:
            return None
    return total if users[name] else 0


class CollectiveStats(NamedTuple):
    """Collectives of one kind over as many links, per step.

    Attributes:
        kind: One of `COLLECTIVE_OPCODES`.
        executions: How many are run.
        sent_bytes: That one chip sends over all its links together.
        num_links: Over how many the compiler spreads each; two, as a ring has, where it does not say.
    """

    kind: str
    executions: int
    sent_bytes: int
    num_links: int = 2


def collect_collective_stats(
    module: HloModule, *, count_trips: bool = True
) -> tuple[CollectiveStats, ...]:
    """What chips exchange, by kind.

    A ring of n sends (n - 1) / n of what is gathered, and twice that of what is summed up. (On some
    slices the compiler gathers by summing up what is padded with zeros, which this shows.)

    Args:
        module: The module.
        count_trips: Whether the body of a loop counts as often as it is run, else once.
    """
    times: collections.Counter[tuple[str, int]] = collections.Counter()
    sent: collections.Counter[tuple[str, int]] = collections.Counter()
    seen: set[tuple[str, str]] = set()
    for run in iter_executed_instructions(module, count_trips=count_trips):
        kind = run.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVE_OPCODES:
            continue
        channel = re.search(r"channel_id=(\d+)", run.instruction.attributes)
        if channel:
            # One that runs beside products is written once in each of the fusions that it spans.
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        operands = [
            shape for name in run.instruction.operands for shape in run.computation[name].shapes
        ]
        size = sum(shape.nbytes for shape in operands)
        ring = _replica_group_size(run.instruction.attributes)
        share = {
            "all-gather": ring - 1,
            "all-reduce": 2 * (ring - 1) / ring,
            "collective-permute": 1,
        }.get(kind, (ring - 1) / ring)
        if share:
            colors = re.search(r"\{colors:(\d+)", run.instruction.attributes)
            how = kind, int(colors[1]) if colors else 2
            times[how] += run.executions
            sent[how] += round(run.executions * size * share)
    return tuple(CollectiveStats(how[0], times[how], sent[how], how[1]) for how in sorted(times))


def _replica_group_size(attributes: str) -> int:
    """How many chips take part in a collective together."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", attributes
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if "source_target_pairs" in attributes:
        return 2
    found = re.search(r"replica_groups=.{0,80}", attributes)
    raise ValueError(
        f"Which chips take part in a collective is written in a way that is not known: "
        f"{found[0] if found else attributes[:80]!r}. Plan with the libtpu of `jlora[plan]`."
    )
