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

from jlora.factored import balance, bases, releases
from jlora.factored.contraction import Atom, Operand
from jlora.factored.network import Dropout, Factored, note_sum
from jlora.splitting import ways

Evaluate = Callable[[releases.Program, Sequence[Any]], list[Any]]
Run = Callable[[Any, Sequence[Any], Evaluate], list[Any] | None]


class Body(NamedTuple):
    """A program held by an equation, for those who only want to look inside.

    Attributes:
        sources: For each of the program's inputs, the equation's input that it is.
        sliced: Which of them the program sees one leading index at a time.
        carried: Which of the program's inputs a loop carries, and whether unchanged.
        dense: Which of the equation's inputs become dense sums on the way in.
        returns: Whether the program's outputs are the equation's.
    """

    program: releases.Program
    sources: Sequence[int]
    sliced: frozenset[int] = frozenset()
    carried: Mapping[int, bool] = types.MappingProxyType({})
    dense: frozenset[int] = frozenset()
    returns: bool = False


class Control(NamedTuple):
    """How to look into an equation and how to run it (None: with dense weights, after all)."""

    bodies: Callable[[Any], list[Body]]
    run: Run


def is_factored(value: Any) -> bool:
    return isinstance(value, Factored)


def densify(value: Any) -> Any:
    return value.dense() if is_factored(value) else value


def _as_declared(values: Sequence[Any], atoms: Sequence[Any]) -> list[Any]:
    """Loop carries as arrays of the traced type: a literal would come in as a Python number."""
    return [
        value if isinstance(value, jax.Array) else jnp.asarray(value, atom.aval.dtype)
        for value, atom in zip(values, atoms, strict=True)
    ]


# --- jit, remat ----------------------------------------------------------------------------------


def whole(key: str) -> Callable[[Any], list[Body]]:
    """The bodies of an equation that runs one program, held under this parameter, on its inputs."""

    def bodies(eqn: Any) -> list[Body]:
        return [Body(releases.program(eqn.params[key]), range(len(eqn.invars)), returns=True)]

    return bodies


def _jit(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any]:
    # Inlined: the whole of `apply` is meant to run under the caller's own jit.
    with jax.named_scope(eqn.params.get("name") or "call"):
        outputs = evaluate(releases.program(eqn.params["jaxpr"]), values)
    shardings = eqn.params.get("out_shardings", ())
    return [
        lax.with_sharding_constraint(output, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not is_factored(output)
        else output
        for output, sharding in zip(outputs, shardings or [None] * len(outputs), strict=True)
    ]


def _remat(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any]:
    held = releases.program(eqn.params["jaxpr"])
    rerun = jax.checkpoint(
        lambda inputs: balance.with_losses(lambda: evaluate(held, inputs)),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    outputs, losses = rerun(list(values))
    balance.add(losses)
    return outputs


# --- scan ----------------------------------------------------------------------------------------


def _scan_bodies(eqn: Any) -> list[Body]:
    parts = releases.scan_parts(eqn)
    scanned = range(parts.num_consts + parts.num_carry, len(eqn.invars))
    program = releases.program(eqn.params["jaxpr"])
    carried = _unchanged(program, parts.num_consts, parts.num_carry)
    sliced = frozenset(scanned)
    return [Body(program, range(len(eqn.invars)), sliced=sliced, carried=carried)]


def _scan(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any]:
    parts = releases.scan_parts(eqn)
    held = releases.program(eqn.params["jaxpr"])
    first = parts.num_consts + parts.num_carry
    consts, xs = list(values[: parts.num_consts]), values[first:]
    carry = _Carry(held, parts.num_consts, parts.num_carry, values[parts.num_consts : first])
    stacks = [_unstack(x) if is_factored(x) else _Stack(x, lambda item: item) for x in xs]
    moving = carry.initial(eqn.invars[parts.num_consts : first])

    def body(state: tuple[Any, list[Any]], items: list[Any]) -> tuple[Any, Any]:
        step, arrays = state
        inputs = [
            *(fold_keys(const, step) for const in consts),
            *(fold_keys(value, step) for value in carry.full(arrays)),
            *(stack.rebuild(item) for stack, item in zip(stacks, items, strict=True)),
        ]
        outputs, losses = balance.with_losses(lambda: evaluate(held, inputs))
        following = carry.moving(outputs[: parts.num_carry])
        return (step + 1, following), ([densify(y) for y in outputs[parts.num_carry :]], losses)

    (_, last), (ys, losses) = lax.scan(
        body,
        (jnp.int32(0), moving),
        [stack.arrays for stack in stacks],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    balance.add(steps.sum() for steps in losses)
    return [*carry.full(last), *ys]


class _Carry:
    """The carries of a loop, of which factored ones that never change stay out of it."""

    def __init__(
        self, held: releases.Program, start: int, count: int, values: Sequence[Any]
    ) -> None:
        self._values = list(values)
        unchanged = _unchanged(held, start, count).values()
        self._fixed = [
            is_factored(value) and same for value, same in zip(values, unchanged, strict=True)
        ]

    def initial(self, atoms: Sequence[Any]) -> list[Any]:
        moving = [i for i, fixed in enumerate(self._fixed) if not fixed]
        return _as_declared([densify(self._values[i]) for i in moving], [atoms[i] for i in moving])

    def full(self, arrays: Sequence[Any]) -> list[Any]:
        following = iter(arrays)
        return [
            value if fixed else next(following)
            for value, fixed in zip(self._values, self._fixed, strict=True)
        ]

    def moving(self, outputs: Sequence[Any]) -> list[Any]:
        return [
            densify(output) for output, fixed in zip(outputs, self._fixed, strict=True) if not fixed
        ]


def _unchanged(held: releases.Program, start: int, count: int) -> dict[int, bool]:
    """For the inputs of a loop's body that are its carries, whether they stay what they are."""
    return {start + i: forwarded(held, held.outputs[i]) == start + i for i in range(count)}


def forwarded(held: releases.Program, outvar: Any) -> int | None:
    """Which input of the program an output is, unchanged; None when it is computed."""
    if releases.is_literal(outvar):
        return None
    if outvar in held.inputs:
        return held.inputs.index(outvar)
    for eqn in held.jaxpr.eqns:
        if outvar in eqn.outvars and eqn.primitive.name == "jit":
            inner = releases.program(eqn.params["jaxpr"])
            source = forwarded(inner, inner.outputs[eqn.outvars.index(outvar)])
            return None if source is None else forwarded(held, eqn.invars[source])
    return None


class _Stack(NamedTuple):
    """What a scan slices, and what makes a value of one slice."""

    arrays: Any
    rebuild: Callable[[Any], Any]


def _unstack(factored: Factored) -> _Stack:
    """A stacked weight as arrays with the stack's axis first; operands without it are shared."""
    base = bases.by_leading_axis(factored.base)
    if bases.is_deferred(factored.base) and not bases.is_deferred(base):
        note_sum(factored.network)
    leading, *rest = factored.network.axes
    if len(leading) != 1:
        return _Stack(factored.dense(), lambda item: item)
    (atom,) = leading
    operands: list[Any] = []

    def collect(operand: Operand) -> Operand:
        if atom in operand.atoms:
            operands.append(jnp.moveaxis(operand.array, operand.atoms.index(atom), 0))
        return operand

    factored.network.map(collect)

    def rebuild(item: tuple[Any, list[Any]]) -> Factored:
        base, arrays = item
        slices = iter(arrays)

        def replace(operand: Operand) -> Operand:
            if atom not in operand.atoms:
                return operand
            return Operand(next(slices), tuple(a for a in operand.atoms if a is not atom))

        return Factored(base, factored.network.map(replace).with_axes(rest))

    return _Stack((base, operands), rebuild)


def fold_keys(value: Any, number: Any) -> Any:
    """A weight with dropout keys of its own for this step of a loop, or this use."""
    if not is_factored(value) or not any(term.dropout for term in value.network.terms):
        return value

    def fold(dropout: Dropout) -> Dropout:
        folded = dropout.keys.map(
            lambda keys: jax.vmap(lambda key: jax.random.fold_in(key, number))(
                keys.reshape(-1)
            ).reshape(keys.shape)
        )
        return Dropout(dropout.rate, folded)

    terms = [
        dataclasses.replace(term, dropout=term.dropout and fold(term.dropout))
        for term in value.network.terms
    ]
    return Factored(value.base, dataclasses.replace(value.network, terms=tuple(terms)))


# --- while, cond ---------------------------------------------------------------------------------


def _while_bodies(eqn: Any) -> list[Body]:
    cond_count, body_count = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = range(cond_count + body_count, len(eqn.invars))
    body = releases.program(eqn.params["body_jaxpr"])
    unchanged = _unchanged(body, body_count, len(carry))
    tested = {cond_count - body_count + place: same for place, same in unchanged.items()}
    condition = releases.program(eqn.params["cond_jaxpr"])
    return [
        Body(condition, [*range(cond_count), *carry], carried=tested),
        Body(body, [*range(cond_count, cond_count + body_count), *carry], carried=unchanged),
    ]


def _while(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any]:
    condition, body = _while_bodies(eqn)
    cond_consts = values[: eqn.params["cond_nconsts"]]
    first = len(cond_consts) + eqn.params["body_nconsts"]
    body_consts = values[len(cond_consts) : first]
    carry = _Carry(body.program, len(body_consts), len(values) - first, values[first:])

    def proceed(state: tuple[Any, list[Any]]) -> Any:
        return evaluate(condition.program, [*cond_consts, *carry.full(state[1])])[0]

    def advance(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, arrays = state
        inputs = [fold_keys(value, step) for value in (*body_consts, *carry.full(arrays))]
        return step + 1, carry.moving(evaluate(body.program, inputs))

    # Nothing trains through a loop of unknown length, so its mixtures need no balance.
    with balance.collecting():
        start = jnp.int32(0), carry.initial(eqn.invars[first:])
        _, last = lax.while_loop(proceed, advance, start)
    return carry.full(last)


def _cond_bodies(eqn: Any) -> list[Body]:
    sources = range(1, len(eqn.invars))
    dense = frozenset(sources) if _by_platform(eqn) else frozenset[int]()
    return [
        Body(releases.program(branch), sources, dense=dense) for branch in eqn.params["branches"]
    ]


def _by_platform(eqn: Any) -> bool:
    """Whether the choice is made while compiling: no public function remakes such a choice."""
    return eqn.params.get("branches_platforms") is not None


def _cond(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any] | None:
    if _by_platform(eqn):
        return None
    index, *operands = values

    def branch(held: releases.Program) -> Callable[[], Any]:
        def run() -> tuple[list[Any], Any]:
            outputs, losses = balance.with_losses(lambda: evaluate(held, operands))
            # One loss for each branch, for they may hold different numbers of mixtures.
            return [densify(output) for output in outputs], balance.total(losses)

        return run

    outputs, loss = lax.switch(index, [branch(body.program) for body in _cond_bodies(eqn)])
    balance.add([loss])
    return outputs


# --- shard_map -----------------------------------------------------------------------------------


def _shard_map(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any]:
    held = releases.program(eqn.params["jaxpr"])
    mesh = eqn.params["mesh"]
    parts = [
        _by_shard(value, spec, mesh) if is_factored(value) else _Sharded(value, spec, lambda x: x)
        for value, spec in zip(values, eqn.params["in_specs"], strict=True)
    ]

    names = tuple(eqn.params["newly_manual_axes"])

    def body(*shards: Any) -> tuple[list[Any], list[Any]]:
        inputs = [part.rebuild(shard) for part, shard in zip(parts, shards, strict=True)]
        outputs, losses = balance.with_losses(lambda: evaluate(held, inputs))
        return [densify(output) for output in outputs], [loss[None] for loss in losses]

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(part.specs for part in parts),
        out_specs=(list(eqn.params["out_specs"]), PartitionSpec(names)),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    outputs, losses = run(*(part.arrays for part in parts))
    balance.add(shards.mean() for shards in losses)
    return outputs


class _Sharded(NamedTuple):
    arrays: Any
    specs: Any
    rebuild: Callable[[Any], Any]


def _by_shard(factored: Factored, spec: PartitionSpec, mesh: Any) -> _Sharded:
    """A weight whose operands are split over the mesh as the axes of the weight that they hold."""
    network = factored.network
    axis_spec = [*spec, *[None] * (len(network.axes) - len(spec))]
    if any(s is not None and len(g) != 1 for s, g in zip(axis_spec, network.axes, strict=True)):
        return _Sharded(factored.dense(), spec, lambda shard: shard)
    placed = {
        group[0]: entry
        for group, entry in zip(network.axes, axis_spec, strict=True)
        if entry is not None
    }
    local = {
        atom: Atom(atom.size // ways(entry, mesh), atom.root, atom.indexed)
        for atom, entry in placed.items()
    }
    operands: list[Operand] = []
    network.map(lambda operand: operands.append(operand) or operand)
    held, held_specs, part = bases.by_shard(factored.base, axis_spec, mesh)
    if bases.is_deferred(factored.base) and isinstance(held, jax.Array):
        note_sum(network)
    specs = [PartitionSpec(*(placed.get(a) for a in operand.atoms)) for operand in operands]

    def rebuild(shard: tuple[Any, list[Any]]) -> Factored:
        base, arrays = shard
        pieces = iter(arrays)
        axes = [tuple(local.get(atom, atom) for atom in group) for group in network.axes]
        inner = network.map(
            lambda operand: Operand(next(pieces), tuple(local.get(a, a) for a in operand.atoms))
        )
        return Factored(part(base), inner.with_axes(axes))

    arrays = (held, [operand.array for operand in operands])
    return _Sharded(arrays, (held_specs, specs), rebuild)


RULES: dict[str, Control] = {
    "jit": Control(whole("jaxpr"), _jit),
    "remat2": Control(whole("jaxpr"), _remat),
    "scan": Control(_scan_bodies, _scan),
    "while": Control(_while_bodies, _while),
    "cond": Control(_cond_bodies, _cond),
    "shard_map": Control(whole("jaxpr"), _shard_map),
}
