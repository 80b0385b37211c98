"""Running a traced program on factored weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax

from jlora.factored import bases, control, custom, products, releases, structure
from jlora.factored.network import Factored, Network
from jlora.factored.roles import Dense, mixes

CONTROL = control.RULES | custom.RULES


def evaluate(held: releases.Program, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program; inputs and outputs are arrays or factored weights.

    Equations that no factored weight reaches are evaluated as they stand. Where one cannot stay
    factored, the equation sees its dense sum.
    """
    values: dict[Any, Any] = dict(zip(held.jaxpr.constvars, held.consts, strict=True))
    values |= dict(zip(held.jaxpr.invars, inputs, strict=True))
    uses = _last_uses(held)

    def read(atom: Any) -> Any:
        return atom.val if releases.is_literal(atom) else values[atom]

    for number, eqn in enumerate(held.jaxpr.eqns):
        arguments = [read(atom) for atom in eqn.invars]
        with _scope(eqn):
            outputs = _run(eqn, arguments, number)
        values.update(zip(eqn.outvars, outputs, strict=True))
        for done in uses.get(number, ()):
            values.pop(done, None)  # Frees activations when run outside jit.
    return [read(atom) for atom in held.outputs]


def _scope(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """The model's own names for its layers, so that a profile still shows them."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _last_uses(held: releases.Program) -> dict[int, list[Any]]:
    last: dict[Any, int] = {}
    for number, eqn in enumerate(held.jaxpr.eqns):
        last.update((a, number) for a in eqn.invars if not releases.is_literal(a))
    for atom in held.outputs:
        if not releases.is_literal(atom):
            last.pop(atom, None)
    uses: dict[int, list[Any]] = {}
    for atom, number in last.items():
        uses.setdefault(number, []).append(atom)
    return uses


def _run(eqn: Any, values: Sequence[Any], number: int) -> Sequence[Any]:
    if not any(isinstance(value, Factored) for value in values):
        return releases.bind(eqn, values)
    name = eqn.primitive.name
    if name in CONTROL or name in products.RULES:
        # Two uses of one weight drop different inputs.
        values = [control.fold_keys(value, number) for value in values]
    if name in CONTROL:
        outputs = CONTROL[name].run(eqn, values, evaluate)
        if outputs is not None:
            return outputs
    scaling = structure.scaling(eqn)
    if scaling is not None and [isinstance(v, Factored) for v in values].count(True) == 1:
        weight = values[scaling.side]
        if isinstance(weight, Factored):
            factor = scaling.factor(None if scaling.number is None else values[scaling.number])
            constant = scaling.number is None or releases.is_literal(eqn.invars[scaling.number])
            network = structure.scaled(weight.network, factor, base_too=constant)
            if constant:
                (base,) = bases.move(eqn, [_base(value) for value in values])
                return [Factored(base, network)]
            return [Factored(weight.base, network)]
    if name in structure.RULES:
        networks = [_network(value) for value in values]
        moved = structure.RULES[name](eqn, networks, values)
        if moved is not None:
            outputs = bases.move(eqn, [_base(value) for value in values])
            return [
                output if network is None else Factored(output, network)
                for output, network in zip(outputs, moved, strict=True)
            ]
    if name in products.RULES:
        return [_multiply(eqn, values)]
    return releases.bind(eqn, [control.densify(value) for value in values])


def _multiply(eqn: Any, values: Sequence[Any]) -> Any:
    rule = products.RULES[eqn.primitive.name]
    side = products.side_of([_network(value) for value in values])
    assert side is not None
    values = [v if i == side else control.densify(v) for i, v in enumerate(values)]
    roles = rule.roles(eqn, side, values[side].network)
    if isinstance(roles, Dense) or mixes(values[side].network, roles):
        return releases.bind(eqn, [control.densify(value) for value in values])[0]
    return rule.multiply(eqn, lambda *arrays: bases.multiply(eqn, arrays), side, values)


def _network(value: Any) -> Network | None:
    return value.network if isinstance(value, Factored) else None


def _base(value: Any) -> Any:
    return value.base if isinstance(value, Factored) else value
