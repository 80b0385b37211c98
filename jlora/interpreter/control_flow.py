"""Equations that run programs: how factored weights enter them.

Every rule calls the public function that made the equation (`jax.lax.scan`, `jax.checkpoint`,
`jax.shard_map`, ...) on a body that evaluates the held program with factored weights, so it runs,
differentiates and shards as the original did. Auxiliary losses inside a body are one more of its
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora._mesh import num_shards
from jlora.interpreter import _compat
from jlora.interpreter.factored_array import (
    FactoredArray,
    is_deferred,
    make_scannable,
    split_for_shard_map,
)
from jlora.interpreter.primitive_rules import (
    RULES,
    EvalContext,
    SubProgram,
    SubProgramRule,
    find_forwarded,
    find_forwarded_by_body,
    single_body,
)
from jlora.interpreter.terms import Axis, Operand


def _is_factored(value: Any) -> bool:
    return isinstance(value, FactoredArray)


def _fold_in(values: Sequence[Any], data: Any) -> list[Any]:
    """Returns values whose weights have random keys of their own for a step of a loop."""
    return [value.fold_in(data) if _is_factored(value) else value for value in values]


def _materialize_all(context: EvalContext, values: Sequence[Any], used_by: str) -> list[Any]:
    return [context.materialize(value, used_by) for value in values]


def _list_computed(eqn: Any) -> list[int]:
    """Lists the outputs of an equation that are not one of its inputs."""
    rule = RULES[eqn.primitive.name]
    assert isinstance(rule, SubProgramRule)
    forwarded = rule.get_forwarded(eqn)
    return [i for i in range(len(eqn.outvars)) if i not in forwarded]


def _pick(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [values[i] for i in numbers]


def _place(eqn: Any, numbers: Sequence[int], outputs: Sequence[Any]) -> list[Any]:
    """Returns all outputs of an equation, None for those that are one of its inputs."""
    by_number = dict(zip(numbers, outputs, strict=True))
    return [by_number.get(i) for i in range(len(eqn.outvars))]


# --- jit, remat -----------------------------------------------------------------------------------


def _eval_jit(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
    # Inlined: the whole of `apply` is meant to run under the caller's own jit.
    with jax.named_scope(eqn.params.get("name") or "call"):
        outputs = context.evaluate(_compat.program_from_jaxpr(eqn.params["jaxpr"]), values)
    shardings = eqn.params.get("out_shardings", ())
    return [
        lax.with_sharding_constraint(output, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not _is_factored(output)
        else output
        for output, sharding in zip(outputs, shardings or [None] * len(outputs), strict=True)
    ]


def _eval_custom_vmap(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
    # A rule for batches computes what the function does, so vmap of the function will do.
    return context.evaluate(_compat.program_from_jaxpr(eqn.params["call"]), values)


def _eval_remat(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    computed = _list_computed(eqn)

    def body(inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        nested = context.nested()
        return _pick(nested.evaluate(program, inputs), computed), nested.losses

    rerun = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    outputs, losses = rerun(list(values))
    context.losses.extend(losses)
    return _place(eqn, computed, outputs)


# --- loops ----------------------------------------------------------------------------------------


def _get_scan_subprograms(eqn: Any) -> list[SubProgram]:
    parts = _compat.count_scan_inputs(eqn)
    scanned = range(parts.num_consts + parts.num_carry, len(eqn.invars))
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    carried = _find_unchanged_carries(program, parts.num_consts, parts.num_carry)
    sliced = frozenset(scanned)
    return [
        SubProgram(program, range(len(eqn.invars)), scanned_inputs=sliced, carry_unchanged=carried)
    ]


def _eval_scan(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
    parts = _compat.count_scan_inputs(eqn)
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    first = parts.num_consts + parts.num_carry
    consts, xs = list(values[: parts.num_consts]), values[first:]
    carry = _LoopCarry(
        context, program, parts.num_consts, parts.num_carry, values[parts.num_consts : first]
    )
    stacks = [
        _make_scan_input(context, x) if _is_factored(x) else _ScanInput(x, lambda item: item)
        for x in xs
    ]
    moving = carry.initial_arrays(eqn.invars[parts.num_consts : first])
    stacked = [i for i in _list_computed(eqn) if i >= parts.num_carry]

    def body(state: tuple[Any, list[Any]], items: list[Any]) -> tuple[Any, Any]:
        step, arrays = state
        nested = context.nested()
        inputs = [
            *_fold_in([*consts, *carry.with_constants(arrays)], step),
            *(stack.rebuild(item) for stack, item in zip(stacks, items, strict=True)),
        ]
        outputs = nested.evaluate(program, inputs)
        following = carry.changing_arrays(outputs[: parts.num_carry])
        ys = _materialize_all(context, _pick(outputs, stacked), "scan")
        return (step + 1, following), (ys, nested.losses)

    (_, last), (ys, losses) = lax.scan(
        body,
        (jnp.int32(0), moving),
        [stack.arrays for stack in stacks],
        length=None if stacks else eqn.params["length"],  # A symbolic one is that of the stacks.
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    context.losses.extend(steps.sum() for steps in losses)
    return [*carry.with_constants(last), *_place(eqn, stacked, ys)[parts.num_carry :]]


class _LoopCarry:
    """The carries of a loop, of which factored ones that never change stay outside it."""

    def __init__(
        self,
        context: EvalContext,
        program: _compat.TracedProgram,
        first_index: int,
        count: int,
        values: Sequence[Any],
    ) -> None:
        self._context = context
        self._values = list(values)
        unchanged = _find_unchanged_carries(program, first_index, count).values()
        self._is_constant = [
            _is_factored(value) and same for value, same in zip(values, unchanged, strict=True)
        ]

    def initial_arrays(self, invars: Sequence[Any]) -> list[Any]:
        changing = [i for i, fixed in enumerate(self._is_constant) if not fixed]
        arrays = _materialize_all(self._context, [self._values[i] for i in changing], "a loop")
        # A literal would come in as a Python number.
        return [
            array if isinstance(array, jax.Array) else jnp.asarray(array, invars[i].aval.dtype)
            for array, i in zip(arrays, changing, strict=True)
        ]

    def with_constants(self, arrays: Sequence[Any]) -> list[Any]:
        following = iter(arrays)
        return [
            value if fixed else next(following)
            for value, fixed in zip(self._values, self._is_constant, strict=True)
        ]

    def changing_arrays(self, outputs: Sequence[Any]) -> list[Any]:
        changing = [
            output for output, fixed in zip(outputs, self._is_constant, strict=True) if not fixed
        ]
        return _materialize_all(self._context, changing, "a loop")


def _find_unchanged_carries(
    program: _compat.TracedProgram, first_index: int, count: int
) -> dict[int, bool]:
    """For the inputs of a loop's body that are its carries, whether they stay what they are."""
    forwarded = find_forwarded(program)
    return {first_index + i: forwarded.get(i) == first_index + i for i in range(count)}


def _get_scan_forwarded(eqn: Any) -> dict[int, int]:
    parts = _compat.count_scan_inputs(eqn)
    first_scanned = parts.num_consts + parts.num_carry
    return {
        output: source
        for output, source in find_forwarded(
            _compat.program_from_jaxpr(eqn.params["jaxpr"])
        ).items()
        # A carry stays the same, and the slices of a stack are stacked again.
        if source == parts.num_consts + output
        or (output >= parts.num_carry and source >= first_scanned)
    }


class _ScanInput(NamedTuple):
    """Arrays that a scan slices, and the function from one slice to a value."""

    arrays: Any
    rebuild: Callable[[Any], Any]


def _make_scan_input(context: EvalContext, weight: FactoredArray) -> _ScanInput:
    """Returns a stacked weight as arrays with the stack's axis first.

    Operands without that axis are shared by all slices.
    """
    base = make_scannable(weight.base)
    if is_deferred(weight.base) and not is_deferred(base):
        context.note_materialized(weight, "scan")
    leading, *rest = weight.axis_groups
    if len(leading) != 1:
        return _ScanInput(context.materialize(weight, "scan"), lambda item: item)
    (axis,) = leading
    operands: list[Any] = []

    def collect(operand: Operand) -> Operand:
        if axis in operand.axes:
            operands.append(jnp.moveaxis(operand.array, operand.axes.index(axis), 0))
        return operand

    weight.map(collect)

    def rebuild(item: tuple[Any, list[Any]]) -> FactoredArray:
        base, arrays = item
        slices = iter(arrays)

        def replace(operand: Operand) -> Operand:
            if axis not in operand.axes:
                return operand
            return Operand(next(slices), tuple(a for a in operand.axes if a is not axis))

        return weight.map(replace).with_axis_groups(rest).with_base(base)

    return _ScanInput((base, operands), rebuild)


def _get_while_forwarded(eqn: Any) -> dict[int, int]:
    first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    body = _compat.program_from_jaxpr(eqn.params["body_jaxpr"])
    unchanged = _find_unchanged_carries(body, eqn.params["body_nconsts"], len(eqn.invars) - first)
    return {i: first + i for i, same in enumerate(unchanged.values()) if same}


def _get_while_subprograms(eqn: Any) -> list[SubProgram]:
    cond_count, body_count = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = range(cond_count + body_count, len(eqn.invars))
    body = _compat.program_from_jaxpr(eqn.params["body_jaxpr"])
    unchanged = _find_unchanged_carries(body, body_count, len(carry))
    tested = {cond_count - body_count + place: same for place, same in unchanged.items()}
    condition = _compat.program_from_jaxpr(eqn.params["cond_jaxpr"])
    return [
        SubProgram(condition, [*range(cond_count), *carry], carry_unchanged=tested),
        SubProgram(
            body, [*range(cond_count, cond_count + body_count), *carry], carry_unchanged=unchanged
        ),
    ]


def _eval_while(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
    condition, body = _get_while_subprograms(eqn)
    cond_consts = values[: eqn.params["cond_nconsts"]]
    first = len(cond_consts) + eqn.params["body_nconsts"]
    body_consts = values[len(cond_consts) : first]
    carry = _LoopCarry(context, body.program, len(body_consts), len(values) - first, values[first:])
    # Nothing trains through a loop of unknown length, so auxiliary losses inside are dropped.
    nested = context.nested()

    def proceed(state: tuple[Any, list[Any]]) -> Any:
        inputs = [*cond_consts, *carry.with_constants(state[1])]
        return nested.evaluate(condition.program, inputs)[0]

    def advance(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, arrays = state
        inputs = _fold_in([*body_consts, *carry.with_constants(arrays)], step)
        return step + 1, carry.changing_arrays(nested.evaluate(body.program, inputs))

    start = jnp.int32(0), carry.initial_arrays(eqn.invars[first:])
    _, last = lax.while_loop(proceed, advance, start)
    return carry.with_constants(last)


def _get_cond_subprograms(eqn: Any) -> list[SubProgram]:
    sources = range(1, len(eqn.invars))
    dense = frozenset(sources) if _is_platform_dependent(eqn) else frozenset[int]()
    return [
        SubProgram(_compat.program_from_jaxpr(branch), sources, materialized_inputs=dense)
        for branch in eqn.params["branches"]
    ]


def _is_platform_dependent(eqn: Any) -> bool:
    """Whether the choice is made while compiling: no public function remakes such a choice."""
    return eqn.params.get("branches_platforms") is not None


def _get_cond_forwarded(eqn: Any) -> dict[int, int]:
    """Outputs that all branches forward from the same operand."""
    first, *others = (
        find_forwarded(_compat.program_from_jaxpr(branch)).items()
        for branch in eqn.params["branches"]
    )
    common = set(first).intersection(*others)
    return {output: source + 1 for output, source in common}  # Input 0 is the index.


def _eval_cond(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    if _is_platform_dependent(eqn):
        return None
    index, *operands = values
    computed = _list_computed(eqn)

    def branch(program: _compat.TracedProgram) -> Callable[[], Any]:
        def run() -> tuple[list[Any], Any]:
            nested = context.nested()
            outputs = _pick(nested.evaluate(program, operands), computed)
            # One loss for each branch, for they may hold different numbers of mixtures.
            return _materialize_all(context, outputs, "cond"), sum_losses(nested.losses)

        return run

    outputs, loss = lax.switch(index, [branch(body.program) for body in _get_cond_subprograms(eqn)])
    context.losses.append(loss)
    return _place(eqn, computed, outputs)


def sum_losses(losses: Sequence[Any]) -> Any:
    """Returns the sum of auxiliary losses, a float32; zero when there are none."""
    return sum(losses, start=jnp.zeros((), jnp.float32))


# --- shard_map ------------------------------------------------------------------------------------


def _get_shard_map_forwarded(eqn: Any) -> dict[int, int]:
    """Outputs that are an input, split over the mesh alike."""
    return {
        output: source
        for output, source in find_forwarded_by_body("jaxpr")(eqn).items()
        if eqn.params["in_specs"][source] == eqn.params["out_specs"][output]
    }


def _eval_shard_map(context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any]:
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    mesh = eqn.params["mesh"]
    parts = [
        _make_shard_map_input(context, value, spec, mesh)
        if _is_factored(value)
        else _ShardMapInput(value, spec, lambda x: x)
        for value, spec in zip(values, eqn.params["in_specs"], strict=True)
    ]
    computed = _list_computed(eqn)
    # In the order of the mesh: that of a set differs between the processes of a run.
    names = tuple(name for name in mesh.axis_names if name in eqn.params["newly_manual_axes"])

    mask = context.token_mask
    for value in values if mask is not None else ():
        terms = value.terms if _is_factored(value) else ()
        if any(term.with_token_mask(mask) is not term for term in terms):
            raise ValueError(
                f"token_mask cannot be applied to {value.path!r} in a shard_map, whose shards of "
                f"the tokens are not known. Leave this weight out of the rules, or pass no mask."
            )

    def body(*shards: Any) -> tuple[list[Any], list[Any]]:
        nested = context.nested()
        nested.token_mask = None
        inputs = [part.rebuild(shard) for part, shard in zip(parts, shards, strict=True)]
        outputs = _pick(nested.evaluate(program, inputs), computed)
        return _materialize_all(context, outputs, "shard_map"), [
            loss[None] for loss in nested.losses
        ]

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(part.specs for part in parts),
        out_specs=(_pick(eqn.params["out_specs"], computed), PartitionSpec(names)),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    outputs, losses = run(*(part.arrays for part in parts))
    context.losses.extend(shards.mean() for shards in losses)
    return _place(eqn, computed, outputs)


class _ShardMapInput(NamedTuple):
    """Arrays that a shard_map splits, their specs, and the function from shards to a value."""

    arrays: Any
    specs: Any
    rebuild: Callable[[Any], Any]


def _make_shard_map_input(
    context: EvalContext, weight: FactoredArray, spec: PartitionSpec, mesh: Any
) -> _ShardMapInput:
    """Returns a weight whose operands are split over the mesh like its dimensions."""
    entries = [*spec, *[None] * (len(weight.axis_groups) - len(spec))]
    split = [(group, e) for group, e in zip(weight.axis_groups, entries, strict=True) if e]
    if any(len(group) != 1 for group, _ in split):
        return _ShardMapInput(context.materialize(weight, "shard_map"), spec, lambda shard: shard)
    placed = {group[0]: entry for group, entry in split}
    local = {
        axis: Axis(axis.size // num_shards(entry, mesh), axis.weight_axis, axis.is_gathered)
        for axis, entry in placed.items()
    }
    operands: list[Operand] = []
    weight.map(lambda operand: operands.append(operand) or operand)
    base_arrays, base_specs, rebuild_base = split_for_shard_map(weight.base, entries, mesh)
    if is_deferred(weight.base) and isinstance(base_arrays, jax.Array):
        context.note_materialized(weight, "shard_map")
    specs = [PartitionSpec(*(placed.get(a) for a in operand.axes)) for operand in operands]

    def rebuild(shard: tuple[Any, list[Any]]) -> FactoredArray:
        base, arrays = shard
        pieces = iter(arrays)
        groups = [tuple(local.get(axis, axis) for axis in group) for group in weight.axis_groups]
        inner = weight.map(
            lambda operand: Operand(next(pieces), tuple(local.get(a, a) for a in operand.axes))
        )
        return inner.with_axis_groups(groups).with_base(rebuild_base(base))

    arrays = (base_arrays, [operand.array for operand in operands])
    return _ShardMapInput(arrays, (base_specs, specs), rebuild)


RULES |= {
    "jit": SubProgramRule(single_body("jaxpr"), _eval_jit, find_forwarded_by_body("jaxpr")),
    "custom_vmap_call": SubProgramRule(
        single_body("call"), _eval_custom_vmap, find_forwarded_by_body("call")
    ),
    "remat2": SubProgramRule(single_body("jaxpr"), _eval_remat, find_forwarded_by_body("jaxpr")),
    "scan": SubProgramRule(_get_scan_subprograms, _eval_scan, _get_scan_forwarded),
    "while": SubProgramRule(_get_while_subprograms, _eval_while, _get_while_forwarded),
    "cond": SubProgramRule(_get_cond_subprograms, _eval_cond, _get_cond_forwarded),
    "shard_map": SubProgramRule(single_body("jaxpr"), _eval_shard_map, _get_shard_map_forwarded),
}
