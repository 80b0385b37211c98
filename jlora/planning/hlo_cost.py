"""Cost of a compiled program, counted in its HLO text: FLOPs, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, so a scan over 80 layers counts as one.
Here every instruction counts as often as it is executed.

References:
    XLA's `HloCostAnalysis` (xla/service/hlo_cost_analysis.cc), for the count of multiplications in
    a convolution: on a TPU every matrix product is a convolution.
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

# Instructions without traffic of their own.
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
    """Shape of an array in the program.

    Attributes:
        dtype: XLA's name of the dtype.
        dims: Lengths of the axes.
        is_on_core: Whether it is in the memory of the core (VMEM, SMEM) rather than in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    is_on_core: bool

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        digits = re.search(r"\d+", self.dtype)  # As in f32 and f8e4m3fn.
        bits = _DTYPE_BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return -(-math.prod(self.dims) * bits // 8)


class HloInstruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
        name: Name of the result.
        opcode: Operation.
        shapes: Shape of the result; several for a tuple.
        operands: Names of the operands.
        attributes: Text after the operands; of a constant or parameter, its value before that.
        is_root: Whether it is the result of the computation.
    """

    name: str
    opcode: str
    shapes: tuple[HloShape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called_computations(self) -> tuple[str, ...]:
        """The computations that one execution of it executes once."""
        if self.opcode == "while" or ("to_apply=" in self.attributes and self.opcode != "call"):
            return ()  # A function that is applied to single elements is not counted.
        called = re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", self.attributes)
        lists = re.findall(
            r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        )
        branches = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        names = [name.strip().lstrip("%") for group in lists for name in group.split(",")]
        return (*called, *names, *branches)


HloComputation = dict[str, HloInstruction]


class HloModule(NamedTuple):
    """A module.

    Attributes:
        computations: Computations by name.
        entry: Name of the entry computation.
    """

    computations: dict[str, HloComputation]
    entry: str


_COMPUTATION_REGEX = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

_INSTRUCTION_REGEX = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")

_SHAPE_REGEX = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse_hlo(text: str) -> HloModule:
    """Parses the text of a module.

    Args:
        text: Result of `compiled.as_text()`.

    Raises:
        ValueError: The text is not an HLO module.
    """
    computations: dict[str, HloComputation] = {}
    current: HloComputation = {}
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION_REGEX.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION_REGEX.match(line)
        if match:
            instruction = _parse_hlo_instruction(match[2], match[3], bool(match[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError(
            "The text must be an HLO module, but has no ENTRY. Use compiled.as_text()."
        )
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
    """Returns the text inside the parenthesis at the start, and the text after it."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[1:position], text[position + 1 :]
    raise ValueError(f"A parenthesis is not closed in {text[:80]!r}.")


def _parse_hlo_shapes(text: str) -> tuple[HloShape, ...]:
    def dims(lengths: str) -> tuple[int, ...]:
        return tuple(int(length.lstrip("<=")) for length in lengths.split(",") if length)

    return tuple(
        HloShape(match[1], dims(match[2]), bool(re.search(r"S\([1-9]", match[3] or "")))
        for match in _SHAPE_REGEX.finditer(text)
    )


class ExecutedInstruction(NamedTuple):
    """An instruction with its number of executions and its context.

    Attributes:
        instruction: Instruction.
        executions: Number of executions in one run of the program.
        computation: Computation that has the instruction.
        is_fused: Whether it is inside a fusion, and therefore without memory traffic.
    """

    instruction: HloInstruction
    executions: int
    computation: HloComputation
    is_fused: bool


def iter_executed_instructions(
    module: HloModule, *, count_trips: bool = True
) -> Iterator[ExecutedInstruction]:
    """Iterates over all instructions with their numbers of executions.

    Args:
        module: Parsed module.
        count_trips: Whether the body of a loop counts once per iteration; False: once.
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
    """Returns the number of iterations of a loop; None if the program does not contain it.

    Programs for CPUs and GPUs have it as an attribute. In programs for TPUs it is the bound of the
    condition over the increment of the counter: 1 in JAX's own loops, and 2 in unrolled products
    whose operand is passed around a ring of chips.
    """
    attribute = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if attribute:
        return int(attribute[1])
    condition, body = (
        module.computations[match[1]]
        for key in ("condition", "body")
        if (match := re.search(rf"{key}=%?([\w.\-]+)", loop.attributes))
    )
    comparison = _get_root(condition)
    if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes:
        return None
    counter, bound = (condition[name] for name in comparison.operands)
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    index = re.search(r"index=(\d+)", counter.attributes)
    assert index is not None
    increment = _counter_increment(module, body, _get_root(body).operands[int(index[1])])
    return increment and -(-_parse_constant(bound) // increment)


def _get_root(computation: HloComputation) -> HloInstruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _counter_increment(module: HloModule, body: HloComputation, name: str) -> int | None:
    """Returns the increment of a counter that becomes an instruction's result; None if unclear."""
    instruction = body[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _counter_increment(module, body, instruction.operands[0])
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called_computations[0]]
        return _counter_increment(module, inside, _get_root(inside).name)
    if instruction.opcode != "add":
        return None
    constants = [
        _parse_constant(body[operand])
        for operand in instruction.operands
        if body[operand].opcode == "constant"
    ]
    return constants[0] if len(constants) == 1 else None


def _parse_constant(constant: HloInstruction) -> int:
    return int(constant.attributes.split(",")[0])


# The program of a kernel is opaque. Numbers of products with the shape of queries and keys in each
# kernel of splash attention, for the token pairs of the causal mask.
_SPLASH_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def count_flops(executed: ExecutedInstruction) -> int:
    """Returns the FLOPs of one execution: twice the multiplications of a product or convolution.

    Kernels of splash attention count too; all other instructions have 0.
    """
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
    """Returns the number of multiplications, without those by padding or dilation zeros."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())
    count = 1
    for axis, label in enumerate(spatial):

        def option(name: str, default: int, axis: int = axis) -> int:
            return int(options[name].split("x")[axis]) if name in options else default

        pad_low = options["pad"].split("x")[axis].split("_")[0] if "pad" in options else 0
        length = left[labels[1].index(label)]
        window_size = right[labels[2].index(label)]
        out_length = out[labels[3].index(label)]
        dilation = option("lhs_dilate", 1)
        positions = (  # (out_length, window_size), in the padded and dilated input.
            np.arange(out_length)[:, None] * option("stride", 1)
            - int(pad_low)
            + np.arange(window_size) * option("rhs_dilate", 1)
        )
        is_inside = (positions >= 0) & (positions < (length - 1) * dilation + 1)
        count *= int((is_inside & (positions % dilation == 0)).sum())
    outputs = out[labels[3].index("b")] * out[labels[3].index("f")]
    return count * outputs * right[labels[2].index("i")]


def count_hbm_bytes(module: HloModule, executed: ExecutedInstruction) -> int:
    """Returns the bytes that one execution reads from and writes to HBM, each array once.

    Of an array that is sliced or updated in place, only the slice counts.
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
        index = 1 if opcode == "dynamic-update-slice" else 2
        return 2 * _sum_shape_hbm_bytes(executed.computation[instruction.operands[index]].shapes)
    if opcode == "fusion":
        (called,) = instruction.called_computations
        return _count_fusion_hbm_bytes(
            module.computations[called], instruction, executed.computation
        )
    read = [shape for name in instruction.operands for shape in executed.computation[name].shapes]
    if opcode.endswith("-start"):  # Its result also has the operand.
        return sum(map(_shape_hbm_bytes, read)) + _sum_shape_hbm_bytes(instruction.shapes[1:2])
    return _sum_shape_hbm_bytes(read) + _sum_shape_hbm_bytes(instruction.shapes)


def _shape_hbm_bytes(shape: HloShape) -> int:
    return 0 if shape.is_on_core else shape.nbytes


def _sum_shape_hbm_bytes(shapes: Sequence[HloShape]) -> int:
    return sum(map(_shape_hbm_bytes, shapes))


def _count_fusion_hbm_bytes(
    body: HloComputation, fusion: HloInstruction, caller: HloComputation
) -> int:
    """Returns the HBM traffic of a fusion: its parameters and results, or their slices."""
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
    """Returns the bytes of the used slices of an array; None if all of it is used."""
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
        kind: Opcode, one of `COLLECTIVE_OPCODES`.
        executions: Number of executions.
        sent_bytes: Bytes that one chip sends over all its links together.
        num_links: Number of links that the compiler uses for each; 2, as in a ring, by default.
    """

    kind: str
    executions: int
    sent_bytes: int
    num_links: int = 2


def collect_collective_stats(
    module: HloModule, *, count_trips: bool = True
) -> tuple[CollectiveStats, ...]:
    """Returns the communication between chips by kind and number of links.

    In a ring of n chips each sends (n - 1) / n of a gathered array, and twice that of a reduced
    one. On some slices the compiler gathers by adding arrays that are padded with zeros; those
    count as all-reduce.

    Args:
        module: Parsed module.
        count_trips: Whether the body of a loop counts once per iteration; False: once.
    """
    executions: collections.Counter[tuple[str, int]] = collections.Counter()
    sent: collections.Counter[tuple[str, int]] = collections.Counter()
    seen: set[tuple[str, str]] = set()
    for run in iter_executed_instructions(module, count_trips=count_trips):
        kind = run.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVE_OPCODES:
            continue
        channel = re.search(r"channel_id=(\d+)", run.instruction.attributes)
        if channel:
            # A collective that overlaps products appears once in each fusion that it spans.
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        operands = [
            shape for name in run.instruction.operands for shape in run.computation[name].shapes
        ]
        size = sum(shape.nbytes for shape in operands)
        ring = _replica_group_size(run.instruction.attributes)
        fraction = {
            "all-gather": ring - 1,
            "all-reduce": 2 * (ring - 1) / ring,
            "collective-permute": 1,
        }.get(kind, (ring - 1) / ring)
        if fraction:
            colors = re.search(r"\{colors:(\d+)", run.instruction.attributes)
            key = kind, int(colors[1]) if colors else 2
            executions[key] += run.executions
            sent[key] += round(run.executions * size * fraction)
    return tuple(
        CollectiveStats(kind, executions[kind, links], sent[kind, links], links)
        for kind, links in sorted(executions)
    )


def _replica_group_size(attributes: str) -> int:
    """Returns the number of chips that take part in a collective together."""
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
    groups = re.search(r"replica_groups=.{0,80}", attributes)
    raise ValueError(
        f"Unknown format of the replica groups of a collective: "
        f"{groups[0] if groups else attributes[:80]!r}. Use the libtpu of `jlora[plan]`."
    )
