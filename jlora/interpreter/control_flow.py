"""Rules for equations that contain programs: jit, remat, scan, while, cond and shard_map.

Every rule calls the public function that creates such an equation (`jax.lax.scan`,
`jax.checkpoint`, `jax.shard_map`, ...) with a body that evaluates the inner program on factored
weights, so that it runs, differentiates and shards like the original.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora._sharding import num_shards
from jlora.interpreter import _compat, base_weight
from jlora.interpreter.einsum import Axis, Operand
from jlora.interpreter.factored_array import Dropout, FactoredArray, notify_materialized
from jlora.interpreter.terms import (
    call_with_aux_losses,
    collect_aux_losses,
    record_aux_losses,
    sum_aux_losses,
)

EvalProgramFn = Callable[[_compat.TracedProgram, Sequence[Any]], list[Any]]

ControlFlowFn = Callable[[Any, Sequence[Any], EvalProgramFn], list[Any] | None]


class SubProgram(NamedTuple):
    """A program inside an equation, described for analysis.

    Attributes:
        program: The program.
        eqn_inputs: Index of the equation's input, for each input of the program.
        scanned_inputs: Indices of the equation's inputs that are sliced along their first axis.
        carry_unchanged: For each input of the program that is a loop carry, whether the body
            returns it unchanged.
        materialized_inputs: Indices of the equation's inputs that are materialized before the call.
        returns_outputs: Whether the outputs of the program are those of the equation.
    """

    program: _compat.TracedProgram
    eqn_inputs: Sequence[int]
    scanned_inputs: frozenset[int] = frozenset()
    carry_unchanged: Mapping[int, bool] = types.MappingProxyType({})
    materialized_inputs: frozenset[int] = frozenset()
    returns_outputs: bool = False


class ControlFlowRule(NamedTuple):
    """How to analyze an equation with inner programs, and how to evaluate it.

    Attributes:
        get_subprograms: Function from the equation to its inner programs.
        evaluate: Function from the equation, its inputs and `eval_program` to the outputs. None is
            returned where the equation needs materialized weights.
    """

    get_subprograms: Callable[[Any], list[SubProgram]]
    evaluate: ControlFlowFn


def is_factored(value: Any) -> bool:
    """Whether a value is a factored weight."""
    return isinstance(value, FactoredArray)


def materialize_value(value: Any) -> Any:
    """Returns a factored weight as one array, and any other value unchanged."""
    return value.materialize() if is_factored(value) else value


def _cast_loop_carries(values: Sequence[Any], invars: Sequence[Any]) -> list[Any]:
    """Casts loop carries to arrays of the traced type; a literal would enter as a Python number."""
    return [
        value if isinstance(value, jax.Array) else jnp.asarray(value, atom.aval.dtype)
        for value, atom in zip(values, invars, strict=True)
    ]


def single_body(param_name: str) -> Callable[[Any], list[SubProgram]]:
    """Returns the `get_subprograms` of equations that call the program in `param_name` once."""

    def get_subprograms(eqn: Any) -> list[SubProgram]:
        return [
            SubProgram(
                _compat.program_from_jaxpr(eqn.params[param_name]),
                range(len(eqn.invars)),
                returns_outputs=True,
            )
        ]

    return get_subprograms


def _eval_jit(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    # Inlined, because `apply` is meant to run under the jit of the caller.
    with jax.named_scope(eqn.params.get("name") or "call"):
        outputs = evaluate(_compat.program_from_jaxpr(eqn.params["jaxpr"]), values)
    shardings = eqn.params.get("out_shardings", ())
    return [
        lax.with_sharding_constraint(output, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not is_factored(output)
        else output
        for output, sharding in zip(outputs, shardings or [None] * len(outputs), strict=True)
    ]


def _eval_remat(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    checkpointed = jax.checkpoint(
        lambda inputs: call_with_aux_losses(lambda: evaluate(program, inputs)),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    outputs, losses = checkpointed(list(values))
    record_aux_losses(losses)
    return outputs


def _get_scan_subprograms(eqn: Any) -> list[SubProgram]:
    counts = _compat.count_scan_inputs(eqn)
    scanned_range = range(counts.num_consts + counts.num_carry, len(eqn.invars))
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    unchanged = _find_unchanged_carries(program, counts.num_consts, counts.num_carry)
    scanned = frozenset(scanned_range)
    return [
        SubProgram(
            program, range(len(eqn.invars)), scanned_inputs=scanned, carry_unchanged=unchanged
        )
    ]


def _eval_scan(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    counts = _compat.count_scan_inputs(eqn)
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    num_before_xs = counts.num_consts + counts.num_carry
    consts, xs = list(values[: counts.num_consts]), values[num_before_xs:]
    carry = _LoopCarry(
        program, counts.num_consts, counts.num_carry, values[counts.num_consts : num_before_xs]
    )
    scan_inputs = [
        _make_scan_input(x) if is_factored(x) else _ScanInput(x, lambda item: item) for x in xs
    ]
    init_arrays = carry.initial_arrays(eqn.invars[counts.num_consts : num_before_xs])

    def body(state: tuple[Any, list[Any]], items: list[Any]) -> tuple[Any, Any]:
        step, arrays = state
        inputs = [
            *(fold_dropout_keys(const, step) for const in consts),
            *(fold_dropout_keys(value, step) for value in carry.with_constants(arrays)),
            *(stack.rebuild(item) for stack, item in zip(scan_inputs, items, strict=True)),
        ]
        outputs, losses = call_with_aux_losses(lambda: evaluate(program, inputs))
        following = carry.changing_arrays(outputs[: counts.num_carry])
        return (step + 1, following), (
            [materialize_value(y) for y in outputs[counts.num_carry :]],
            losses,
        )

    (_, last), (ys, losses) = lax.scan(
        body,
        (jnp.int32(0), init_arrays),
        [stack.arrays for stack in scan_inputs],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    record_aux_losses(steps.sum() for steps in losses)
    return [*carry.with_constants(last), *ys]


class _LoopCarry:
    """Carries of a loop; factored weights that the body never changes become its constants."""

    def __init__(
        self, program: _compat.TracedProgram, first_index: int, count: int, values: Sequence[Any]
    ) -> None:
        self._values = list(values)
        unchanged = _find_unchanged_carries(program, first_index, count).values()
        self._is_constant = [
            is_factored(value) and is_same for value, is_same in zip(values, unchanged, strict=True)
        ]

    def initial_arrays(self, invars: Sequence[Any]) -> list[Any]:
        changing = [i for i, is_constant in enumerate(self._is_constant) if not is_constant]
        return _cast_loop_carries(
            [materialize_value(self._values[i]) for i in changing], [invars[i] for i in changing]
        )

    def with_constants(self, arrays: Sequence[Any]) -> list[Any]:
        remaining = iter(arrays)
        return [
            value if is_constant else next(remaining)
            for value, is_constant in zip(self._values, self._is_constant, strict=True)
        ]

    def changing_arrays(self, outputs: Sequence[Any]) -> list[Any]:
        return [
            materialize_value(output)
            for output, is_constant in zip(outputs, self._is_constant, strict=True)
            if not is_constant
        ]


def _find_unchanged_carries(
    program: _compat.TracedProgram, first_index: int, count: int
) -> dict[int, bool]:
    """Returns, by input index of a loop body, whether each carry is returned unchanged."""
    return {
        first_index + i: find_forwarded_input(program, program.outputs[i]) == first_index + i
        for i in range(count)
    }


def find_forwarded_input(program: _compat.TracedProgram, outvar: Any) -> int | None:
    """Returns the index of the input that an output forwards unchanged, or None."""
    if _compat.is_literal(outvar):
        return None
    if outvar in program.inputs:
        return program.inputs.index(outvar)
    for eqn in program.jaxpr.eqns:
        if outvar in eqn.outvars and eqn.primitive.name == "jit":
            inner = _compat.program_from_jaxpr(eqn.params["jaxpr"])
            source = find_forwarded_input(inner, inner.outputs[eqn.outvars.index(outvar)])
            return None if source is None else find_forwarded_input(program, eqn.invars[source])
    return None


class _ScanInput(NamedTuple):
    """One scanned input.

    Attributes:
        arrays: Arrays that the scan slices along their first axis.
        rebuild: Function from one slice of them to the value inside the body.
    """

    arrays: Any
    rebuild: Callable[[Any], Any]


def _make_scan_input(factored: FactoredArray) -> _ScanInput:
    """Lays out a stacked weight with the stacking axis first, and shares operands without it."""
    base = base_weight.make_scannable(factored.base)
    if base_weight.is_deferred(factored.base) and not base_weight.is_deferred(base):
        notify_materialized(factored.network)
    first_group, *other_groups = factored.network.axis_groups
    if len(first_group) != 1:
        return _ScanInput(factored.materialize(), lambda item: item)
    (scan_axis,) = first_group
    operands: list[Any] = []

    def collect(operand: Operand) -> Operand:
        if scan_axis in operand.axes:
            operands.append(jnp.moveaxis(operand.array, operand.axes.index(scan_axis), 0))
        return operand

    factored.network.map(collect)

    def rebuild(item: tuple[Any, list[Any]]) -> FactoredArray:
        base, arrays = item
        slices = iter(arrays)

        def replace(operand: Operand) -> Operand:
            if scan_axis not in operand.axes:
                return operand
            return Operand(next(slices), tuple(a for a in operand.axes if a is not scan_axis))

        return FactoredArray(base, factored.network.map(replace).with_axis_groups(other_groups))

    return _ScanInput((base, operands), rebuild)


def fold_dropout_keys(value: Any, data: Any) -> Any:
    """Folds `data` (a loop step or the index of a use) into the dropout keys of a weight."""
    if not is_factored(value) or not any(term.dropout for term in value.network.terms):
        return value

    def fold(dropout: Dropout) -> Dropout:
        folded = dropout.keys.map(
            lambda keys: jax.vmap(lambda key: jax.random.fold_in(key, data))(
                keys.reshape(-1)
            ).reshape(keys.shape)
        )
        return Dropout(dropout.rate, folded)

    terms = [
        dataclasses.replace(term, dropout=term.dropout and fold(term.dropout))
        for term in value.network.terms
    ]
    return FactoredArray(value.base, dataclasses.replace(value.network, terms=tuple(terms)))


def _get_while_subprograms(eqn: Any) -> list[SubProgram]:
    cond_count, body_count = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry_range = range(cond_count + body_count, len(eqn.invars))
    body = _compat.program_from_jaxpr(eqn.params["body_jaxpr"])
    unchanged = _find_unchanged_carries(body, body_count, len(carry_range))
    condition_unchanged = {
        cond_count - body_count + index: is_same for index, is_same in unchanged.items()
    }
    condition = _compat.program_from_jaxpr(eqn.params["cond_jaxpr"])
    return [
        SubProgram(
            condition, [*range(cond_count), *carry_range], carry_unchanged=condition_unchanged
        ),
        SubProgram(
            body,
            [*range(cond_count, cond_count + body_count), *carry_range],
            carry_unchanged=unchanged,
        ),
    ]


def _eval_while(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    condition, body = _get_while_subprograms(eqn)
    cond_consts = values[: eqn.params["cond_nconsts"]]
    num_consts = len(cond_consts) + eqn.params["body_nconsts"]
    body_consts = values[len(cond_consts) : num_consts]
    carry = _LoopCarry(
        body.program, len(body_consts), len(values) - num_consts, values[num_consts:]
    )

    def cond_fun(state: tuple[Any, list[Any]]) -> Any:
        return evaluate(condition.program, [*cond_consts, *carry.with_constants(state[1])])[0]

    def body_fun(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, arrays = state
        inputs = [
            fold_dropout_keys(value, step)
            for value in (*body_consts, *carry.with_constants(arrays))
        ]
        return step + 1, carry.changing_arrays(evaluate(body.program, inputs))

    # Loops of unknown length have no reverse mode, so their routers need no balancing losses.
    with collect_aux_losses():
        init = jnp.int32(0), carry.initial_arrays(eqn.invars[num_consts:])
        _, final_arrays = lax.while_loop(cond_fun, body_fun, init)
    return carry.with_constants(final_arrays)


def _get_cond_subprograms(eqn: Any) -> list[SubProgram]:
    operand_range = range(1, len(eqn.invars))
    materialized = frozenset(operand_range) if _is_platform_dependent(eqn) else frozenset[int]()
    return [
        SubProgram(
            _compat.program_from_jaxpr(branch), operand_range, materialized_inputs=materialized
        )
        for branch in eqn.params["branches"]
    ]


def _is_platform_dependent(eqn: Any) -> bool:
    """Whether the branch is chosen at compilation; no public function can rebuild that choice."""
    return eqn.params.get("branches_platforms") is not None


def _eval_cond(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any] | None:
    if _is_platform_dependent(eqn):
        return None
    index, *operands = values

    def make_branch(program: _compat.TracedProgram) -> Callable[[], Any]:
        def branch() -> tuple[list[Any], Any]:
            outputs, losses = call_with_aux_losses(lambda: evaluate(program, operands))
            # One loss per branch, because branches may contain different numbers of routers.
            return [materialize_value(output) for output in outputs], sum_aux_losses(losses)

        return branch

    outputs, loss = lax.switch(
        index, [make_branch(body.program) for body in _get_cond_subprograms(eqn)]
    )
    record_aux_losses([loss])
    return outputs


def _eval_shard_map(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    mesh = eqn.params["mesh"]
    shard_inputs = [
        _make_shard_map_input(value, spec, mesh)
        if is_factored(value)
        else _ShardMapInput(value, spec, lambda x: x)
        for value, spec in zip(values, eqn.params["in_specs"], strict=True)
    ]

    manual_axes = tuple(eqn.params["newly_manual_axes"])

    def body(*shards: Any) -> tuple[list[Any], list[Any]]:
        inputs = [
            shard_input.rebuild(shard)
            for shard_input, shard in zip(shard_inputs, shards, strict=True)
        ]
        outputs, losses = call_with_aux_losses(lambda: evaluate(program, inputs))
        return [materialize_value(output) for output in outputs], [loss[None] for loss in losses]

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(shard_input.specs for shard_input in shard_inputs),
        out_specs=(list(eqn.params["out_specs"]), PartitionSpec(manual_axes)),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    outputs, losses = run(*(shard_input.arrays for shard_input in shard_inputs))
    record_aux_losses(shards.mean() for shards in losses)
    return outputs


class _ShardMapInput(NamedTuple):
    """One input of `jax.shard_map`.

    Attributes:
        arrays: Arrays to shard.
        specs: Their partition specs.
        rebuild: Function from one shard of them to the value inside the body.
    """

    arrays: Any
    specs: Any
    rebuild: Callable[[Any], Any]


def _make_shard_map_input(
    factored: FactoredArray, spec: PartitionSpec, mesh: Any
) -> _ShardMapInput:
    """Shards the operands of a weight like the axes of the weight that they have."""
    network = factored.network
    axis_spec = [*spec, *[None] * (len(network.axis_groups) - len(spec))]
    if any(
        s is not None and len(g) != 1 for s, g in zip(axis_spec, network.axis_groups, strict=True)
    ):
        return _ShardMapInput(factored.materialize(), spec, lambda shard: shard)
    entry_by_axis = {
        group[0]: entry
        for group, entry in zip(network.axis_groups, axis_spec, strict=True)
        if entry is not None
    }
    local_axes = {
        axis: Axis(axis.size // num_shards(entry, mesh), axis.weight_axis, axis.is_gathered)
        for axis, entry in entry_by_axis.items()
    }
    operands: list[Operand] = []
    network.map(lambda operand: operands.append(operand) or operand)
    base_arrays, base_specs, rebuild_base = base_weight.split_for_shard_map(
        factored.base, axis_spec, mesh
    )
    if base_weight.is_deferred(factored.base) and isinstance(base_arrays, jax.Array):
        notify_materialized(network)
    specs = [PartitionSpec(*(entry_by_axis.get(a) for a in operand.axes)) for operand in operands]

    def rebuild(shard: tuple[Any, list[Any]]) -> FactoredArray:
        base, arrays = shard
        local_arrays = iter(arrays)
        groups = [
            tuple(local_axes.get(axis, axis) for axis in group) for group in network.axis_groups
        ]
        local_network = network.map(
            lambda operand: Operand(
                next(local_arrays), tuple(local_axes.get(a, a) for a in operand.axes)
            )
        )
        return FactoredArray(rebuild_base(base), local_network.with_axis_groups(groups))

    arrays = (base_arrays, [operand.array for operand in operands])
    return _ShardMapInput(arrays, (base_specs, specs), rebuild)


CONTROL_FLOW_RULES: dict[str, ControlFlowRule] = {
    "jit": ControlFlowRule(single_body("jaxpr"), _eval_jit),
    "remat2": ControlFlowRule(single_body("jaxpr"), _eval_remat),
    "scan": ControlFlowRule(_get_scan_subprograms, _eval_scan),
    "while": ControlFlowRule(_get_while_subprograms, _eval_while),
    "cond": ControlFlowRule(_get_cond_subprograms, _eval_cond),
    "shard_map": ControlFlowRule(single_body("jaxpr"), _eval_shard_map),
}
