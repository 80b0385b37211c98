"""Equations that hold programs: how factored weights enter them.

Every rule calls the public function that made the equation (`jax.lax.scan`, `jax.checkpoint`,
`jax.shard_map`, ...) on a body that evaluates the held program with factored weights, so it runs,
differentiates and shards as the original did.
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
    """A program held by an equation, for those who only want to look inside.

    Attributes:
        eqn_inputs: For each of the program's inputs, the equation's input that it is.
        scanned_inputs: Which of them the program sees one leading index at a time.
        carry_unchanged: Which of the program's inputs a loop carries, and whether unchanged.
        materialized_inputs: Which of the equation's inputs become dense sums on the way in.
        returns_outputs: Whether the program's outputs are the equation's.
    """

    program: _compat.TracedProgram
    eqn_inputs: Sequence[int]
    scanned_inputs: frozenset[int] = frozenset()
    carry_unchanged: Mapping[int, bool] = types.MappingProxyType({})
    materialized_inputs: frozenset[int] = frozenset()
    returns_outputs: bool = False


class ControlFlowRule(NamedTuple):
    """How to look into an equation and how to run it (None: with dense weights, after all)."""

    get_subprograms: Callable[[Any], list[SubProgram]]
    evaluate: ControlFlowFn


def is_factored(value: Any) -> bool:
    return isinstance(value, FactoredArray)


def materialize_value(value: Any) -> Any:
    return value.materialize() if is_factored(value) else value


def _cast_loop_carries(values: Sequence[Any], invars: Sequence[Any]) -> list[Any]:
    """Loop carries as arrays of the traced type: a literal would come in as a Python number."""
    return [
        value if isinstance(value, jax.Array) else jnp.asarray(value, atom.aval.dtype)
        for value, atom in zip(values, invars, strict=True)
    ]


def single_body(param_name: str) -> Callable[[Any], list[SubProgram]]:
    """The bodies of an equation that runs one program, held under this parameter, on its inputs."""

    def bodies(eqn: Any) -> list[SubProgram]:
        return [
            SubProgram(
                _compat.program_from_jaxpr(eqn.params[param_name]),
                range(len(eqn.invars)),
                returns_outputs=True,
            )
        ]

    return bodies


def _eval_jit(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    # Inlined: the whole of `apply` is meant to run under the caller's own jit.
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
    held = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    rerun = jax.checkpoint(
        lambda inputs: call_with_aux_losses(lambda: evaluate(held, inputs)),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    outputs, losses = rerun(list(values))
    record_aux_losses(losses)
    return outputs


def _get_scan_subprograms(eqn: Any) -> list[SubProgram]:
    parts = _compat.count_scan_inputs(eqn)
    scanned = range(parts.num_consts + parts.num_carry, len(eqn.invars))
    program = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    carried = _find_unchanged_carries(program, parts.num_consts, parts.num_carry)
    sliced = frozenset(scanned)
    return [
        SubProgram(program, range(len(eqn.invars)), scanned_inputs=sliced, carry_unchanged=carried)
    ]


def _eval_scan(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    parts = _compat.count_scan_inputs(eqn)
    held = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    first = parts.num_consts + parts.num_carry
    consts, xs = list(values[: parts.num_consts]), values[first:]
    carry = _LoopCarry(held, parts.num_consts, parts.num_carry, values[parts.num_consts : first])
    stacks = [
        _make_scan_input(x) if is_factored(x) else _ScanInput(x, lambda item: item) for x in xs
    ]
    moving = carry.initial_arrays(eqn.invars[parts.num_consts : first])

    def body(state: tuple[Any, list[Any]], items: list[Any]) -> tuple[Any, Any]:
        step, arrays = state
        inputs = [
            *(fold_dropout_keys(const, step) for const in consts),
            *(fold_dropout_keys(value, step) for value in carry.with_constants(arrays)),
            *(stack.rebuild(item) for stack, item in zip(stacks, items, strict=True)),
        ]
        outputs, losses = call_with_aux_losses(lambda: evaluate(held, inputs))
        following = carry.changing_arrays(outputs[: parts.num_carry])
        return (step + 1, following), (
            [materialize_value(y) for y in outputs[parts.num_carry :]],
            losses,
        )

    (_, last), (ys, losses) = lax.scan(
        body,
        (jnp.int32(0), moving),
        [stack.arrays for stack in stacks],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    record_aux_losses(steps.sum() for steps in losses)
    return [*carry.with_constants(last), *ys]


class _LoopCarry:
    """The carries of a loop, of which factored ones that never change stay out of it."""

    def __init__(
        self, program: _compat.TracedProgram, first_index: int, count: int, values: Sequence[Any]
    ) -> None:
        self._values = list(values)
        unchanged = _find_unchanged_carries(program, first_index, count).values()
        self._is_constant = [
            is_factored(value) and same for value, same in zip(values, unchanged, strict=True)
        ]

    def initial_arrays(self, invars: Sequence[Any]) -> list[Any]:
        moving = [i for i, fixed in enumerate(self._is_constant) if not fixed]
        return _cast_loop_carries(
            [materialize_value(self._values[i]) for i in moving], [invars[i] for i in moving]
        )

    def with_constants(self, arrays: Sequence[Any]) -> list[Any]:
        following = iter(arrays)
        return [
            value if fixed else next(following)
            for value, fixed in zip(self._values, self._is_constant, strict=True)
        ]

    def changing_arrays(self, outputs: Sequence[Any]) -> list[Any]:
        return [
            materialize_value(output)
            for output, fixed in zip(outputs, self._is_constant, strict=True)
            if not fixed
        ]


def _find_unchanged_carries(
    program: _compat.TracedProgram, first_index: int, count: int
) -> dict[int, bool]:
    """For the inputs of a loop's body that are its carries, whether they stay what they are."""
    return {
        first_index + i: find_forwarded_input(program, program.outputs[i]) == first_index + i
        for i in range(count)
    }


def find_forwarded_input(program: _compat.TracedProgram, outvar: Any) -> int | None:
    """Which input of the program an output is, unchanged; None when it is computed."""
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
    """What a scan slices, and what makes a value of one slice."""

    arrays: Any
    rebuild: Callable[[Any], Any]


def _make_scan_input(factored: FactoredArray) -> _ScanInput:
    """A stacked weight as arrays with the stack's axis first; operands without it are shared."""
    base = base_weight.make_scannable(factored.base)
    if base_weight.is_deferred(factored.base) and not base_weight.is_deferred(base):
        notify_materialized(factored.network)
    leading, *rest = factored.network.axis_groups
    if len(leading) != 1:
        return _ScanInput(factored.materialize(), lambda item: item)
    (atom,) = leading
    operands: list[Any] = []

    def collect(operand: Operand) -> Operand:
        if atom in operand.axes:
            operands.append(jnp.moveaxis(operand.array, operand.axes.index(atom), 0))
        return operand

    factored.network.map(collect)

    def rebuild(item: tuple[Any, list[Any]]) -> FactoredArray:
        base, arrays = item
        slices = iter(arrays)

        def replace(operand: Operand) -> Operand:
            if atom not in operand.axes:
                return operand
            return Operand(next(slices), tuple(a for a in operand.axes if a is not atom))

        return FactoredArray(base, factored.network.map(replace).with_axis_groups(rest))

    return _ScanInput((base, operands), rebuild)


def fold_dropout_keys(value: Any, data: Any) -> Any:
    """A weight with dropout keys of its own for this step of a loop, or this use."""
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


def _eval_while(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    condition, body = _get_while_subprograms(eqn)
    cond_consts = values[: eqn.params["cond_nconsts"]]
    first = len(cond_consts) + eqn.params["body_nconsts"]
    body_consts = values[len(cond_consts) : first]
    carry = _LoopCarry(body.program, len(body_consts), len(values) - first, values[first:])

    def proceed(state: tuple[Any, list[Any]]) -> Any:
        return evaluate(condition.program, [*cond_consts, *carry.with_constants(state[1])])[0]

    def advance(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, arrays = state
        inputs = [
            fold_dropout_keys(value, step)
            for value in (*body_consts, *carry.with_constants(arrays))
        ]
        return step + 1, carry.changing_arrays(evaluate(body.program, inputs))

    # Nothing trains through a loop of unknown length, so its mixtures need no balance.
    with collect_aux_losses():
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


def _eval_cond(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any] | None:
    if _is_platform_dependent(eqn):
        return None
    index, *operands = values

    def branch(held: _compat.TracedProgram) -> Callable[[], Any]:
        def run() -> tuple[list[Any], Any]:
            outputs, losses = call_with_aux_losses(lambda: evaluate(held, operands))
            # One loss for each branch, for they may hold different numbers of mixtures.
            return [materialize_value(output) for output in outputs], sum_aux_losses(losses)

        return run

    outputs, loss = lax.switch(index, [branch(body.program) for body in _get_cond_subprograms(eqn)])
    record_aux_losses([loss])
    return outputs


def _eval_shard_map(eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn) -> list[Any]:
    held = _compat.program_from_jaxpr(eqn.params["jaxpr"])
    mesh = eqn.params["mesh"]
    parts = [
        _make_shard_map_input(value, spec, mesh)
        if is_factored(value)
        else _ShardMapInput(value, spec, lambda x: x)
        for value, spec in zip(values, eqn.params["in_specs"], strict=True)
    ]

    names = tuple(eqn.params["newly_manual_axes"])

    def body(*shards: Any) -> tuple[list[Any], list[Any]]:
        inputs = [part.rebuild(shard) for part, shard in zip(parts, shards, strict=True)]
        outputs, losses = call_with_aux_losses(lambda: evaluate(held, inputs))
        return [materialize_value(output) for output in outputs], [loss[None] for loss in losses]

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(part.specs for part in parts),
        out_specs=(list(eqn.params["out_specs"]), PartitionSpec(names)),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    outputs, losses = run(*(part.arrays for part in parts))
    record_aux_losses(shards.mean() for shards in losses)
    return outputs


class _ShardMapInput(NamedTuple):
    arrays: Any
    specs: Any
    rebuild: Callable[[Any], Any]


def _make_shard_map_input(
    factored: FactoredArray, spec: PartitionSpec, mesh: Any
) -> _ShardMapInput:
    """A weight whose operands are split over the mesh as the axes of the weight that they hold."""
    network = factored.network
    axis_spec = [*spec, *[None] * (len(network.axis_groups) - len(spec))]
    if any(
        s is not None and len(g) != 1 for s, g in zip(axis_spec, network.axis_groups, strict=True)
    ):
        return _ShardMapInput(factored.materialize(), spec, lambda shard: shard)
    placed = {
        group[0]: entry
        for group, entry in zip(network.axis_groups, axis_spec, strict=True)
        if entry is not None
    }
    local = {
        atom: Axis(atom.size // num_shards(entry, mesh), atom.weight_axis, atom.is_gathered)
        for atom, entry in placed.items()
    }
    operands: list[Operand] = []
    network.map(lambda operand: operands.append(operand) or operand)
    held, held_specs, part = base_weight.split_for_shard_map(factored.base, axis_spec, mesh)
    if base_weight.is_deferred(factored.base) and isinstance(held, jax.Array):
        notify_materialized(network)
    specs = [PartitionSpec(*(placed.get(a) for a in operand.axes)) for operand in operands]

    def rebuild(shard: tuple[Any, list[Any]]) -> FactoredArray:
        base, arrays = shard
        pieces = iter(arrays)
        axes = [tuple(local.get(atom, atom) for atom in group) for group in network.axis_groups]
        inner = network.map(
            lambda operand: Operand(next(pieces), tuple(local.get(a, a) for a in operand.axes))
        )
        return FactoredArray(part(base), inner.with_axis_groups(axes))

    arrays = (held, [operand.array for operand in operands])
    return _ShardMapInput(arrays, (held_specs, specs), rebuild)


CONTROL_FLOW_RULES: dict[str, ControlFlowRule] = {
    "jit": ControlFlowRule(single_body("jaxpr"), _eval_jit),
    "remat2": ControlFlowRule(single_body("jaxpr"), _eval_remat),
    "scan": ControlFlowRule(_get_scan_subprograms, _eval_scan),
    "while": ControlFlowRule(_get_while_subprograms, _eval_while),
    "cond": ControlFlowRule(_get_cond_subprograms, _eval_cond),
    "shard_map": ControlFlowRule(single_body("jaxpr"), _eval_shard_map),
}
