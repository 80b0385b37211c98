"""Functions with derivatives of their own (`jax.custom_vjp`, `jax.custom_jvp`).

Their rule must be kept: it may be a straight-through estimator, which differentiating the body
would silently replace. So the rule itself is traced and evaluated with factored weights. What it
returns for the weight is usually one product, `x^T dy`; kept as that product, its meeting with `A`
and `B` goes through the rank, and the gradient of the full weight is never formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.factored import bases, products, releases, structure
from jlora.factored.contraction import Atom, Operand, contract
from jlora.factored.control import Body, Control, Evaluate, densify, is_factored, whole
from jlora.factored.network import Factored, Network, Term
from jlora.faithful import is_faithful

# Moves between the product and the rule's result that a pair of operands can follow.
_MOVES = ("transpose", "convert_element_type", "reshape", "squeeze", "copy")


def _run(eqn: Any, values: Sequence[Any], evaluate: Evaluate) -> list[Any] | None:
    held = releases.program(eqn.params["call_jaxpr"])
    if is_faithful(held.jaxpr):
        return evaluate(held, values)
    if not _enters(eqn):
        return None
    for value in values:
        if is_factored(value) and any(term.gate for term in value.network.terms):
            raise ValueError(
                f"The mixture on {value.network.path!r} cannot be used inside a function with a "
                f"derivative of its own ({eqn.primitive.name}): its rule would choose experts by "
                f"the gradient. Leave this weight out of the rule."
            )
        if is_factored(value) and any(term.dropout for term in value.network.terms):
            raise ValueError(
                f"The dropout of the adapter on {value.network.path!r} cannot be applied inside a "
                f"function with a derivative of its own ({eqn.primitive.name}): its rule would "
                f"see the input that was not dropped. Give its rule dropout=0.0."
            )
    values = [_unobserved(_plain_choice(value)) for value in values]
    backward = _Backward(eqn, [_plain(value) for value in values])

    @jax.custom_vjp
    def run(values: list[Any]) -> list[Any]:
        return [densify(output) for output in evaluate(held, values)]

    def forward(values: list[Any]) -> tuple[list[Any], Any]:
        results = evaluate(backward.forward, values)
        outputs = [densify(output) for output in results[: len(eqn.outvars)]]
        return outputs, (values, results[len(eqn.outvars) :])

    def pull_back(saved: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        values, residuals = saved
        return (backward(values, residuals, cotangents, evaluate),)

    run.defvjp(forward, pull_back)
    return run(list(values))


def _plain_choice(value: Any) -> Any:
    """The value with the choice among updates made: derivatives of a rule are of one of them."""
    if not is_factored(value):
        return value
    return dataclasses.replace(value, network=value.network.plain())


def _unobserved(value: Any) -> Any:
    """The value without arrays for moments: the rule of the function knows nothing of them."""
    if not is_factored(value) or not value.network.observed:
        return value
    return dataclasses.replace(value, network=dataclasses.replace(value.network, observed=()))


def _enters(eqn: Any) -> bool:
    """Whether a function's rule can be evaluated on factored weights, and is worth it.

    A rule that closes over arrays cannot be traced apart from the program that made them.
    """
    held = releases.program(eqn.params["call_jaxpr"])
    return eqn.params["num_consts"] == 0 and _multiplies(held)


def _multiplies(held: releases.Program) -> bool:
    """Whether a program holds any product that a weight could take part in."""
    return any(
        eqn.primitive.name in products.RULES
        or any(
            _multiplies(releases.program(jaxpr))
            for value in eqn.params.values()
            for jaxpr in (value if isinstance(value, tuple) else (value,))
            if hasattr(jaxpr, "eqns")
        )
        for eqn in held.jaxpr.eqns
    )


def _plain(value: Any) -> Any:
    """An array of the value's shape, type and (in a shard_map) varying axes."""
    return bases.like(value.base) if is_factored(value) else value


class _Backward:
    """The equation's own rule, traced in two halves: values with residuals, and cotangents."""

    def __init__(self, eqn: Any, arrays: Sequence[Any]) -> None:
        structure_of_rule: list[Any] = []  # Filled while tracing.
        self._inexact = [jnp.issubdtype(a.aval.dtype, jnp.inexact) for a in eqn.invars]

        def first_half(*arrays: Any) -> tuple[list[Any], list[Any]]:
            fixed = list(arrays)

            def differentiable(*inexact: Any) -> list[Any]:
                moving = iter(inexact)
                return releases.bind(
                    eqn,
                    [
                        next(moving) if kind else a
                        for a, kind in zip(fixed, self._inexact, strict=True)
                    ],
                )

            outputs, rule = jax.vjp(
                differentiable, *(a for a, kind in zip(arrays, self._inexact, strict=True) if kind)
            )
            residuals, tree = jax.tree.flatten(rule)
            structure_of_rule.append(tree)
            return outputs, residuals

        self.forward = releases.trace(first_half, *arrays)
        self._rule = structure_of_rule[0]

    def __call__(
        self,
        values: Sequence[Any],
        residuals: Sequence[Any],
        cotangents: Sequence[Any],
        evaluate: Evaluate,
    ) -> list[Any]:
        """A cotangent for every input: None for integers, a factored one for factored weights."""
        held = releases.trace(
            lambda residuals, cotangents: jax.tree.unflatten(self._rule, residuals)(cotangents),
            [_plain(residual) for residual in residuals],
            list(cotangents),
        )
        inputs = [*residuals, *cotangents]
        wanted = iter(held.outputs)
        results = [next(wanted) if kind else None for kind in self._inexact]
        pairs = {
            i: _as_product(held, results[i])
            for i, value in enumerate(values)
            if is_factored(value) and not value.network.gains
        }
        needed = [a for a in results if a is not None]
        needed += [a for pair in pairs.values() if pair for a in pair.atoms]
        computed = map(densify, evaluate(held._replace(outputs=needed), inputs))
        cotangent = [None if a is None else next(computed) for a in results]
        for i, value in enumerate(values):
            if is_factored(value):
                pair = pairs.get(i)
                update = pair and _product_network(pair, [next(computed) for _ in pair.atoms])
                cotangent[i] = _to_operands(value, cotangent[i], update)
        return cotangent


class _Product(NamedTuple):
    """A product of two arrays, and the moves and scalings after it, in order."""

    product: Any
    after: list[Any]

    @property
    def atoms(self) -> list[Any]:
        """What has to be computed for it: both factors, and the numbers of the scalings."""
        scalings = ((eqn, structure.scaling(eqn)) for eqn in self.after)
        numbers = [eqn.invars[s.number] for eqn, s in scalings if s and s.number is not None]
        return [*self.product.invars, *numbers]


def _as_product(held: releases.Program, outvar: Any) -> _Product | None:
    """The product that an output is; None if it is anything else."""
    made_by = {var: eqn for eqn in held.jaxpr.eqns for var in eqn.outvars}
    after: list[Any] = []
    while not releases.is_literal(outvar) and outvar in made_by:
        eqn = made_by[outvar]
        if eqn.primitive.name == "dot_general":
            return _Product(eqn, after[::-1])
        scaling = structure.scaling(eqn)
        if eqn.primitive.name not in _MOVES and scaling is None:
            return None
        after.append(eqn)
        outvar = eqn.invars[scaling.side if scaling else 0]
    return None


def _product_network(pair: _Product, values: Sequence[Any]) -> Network | None:
    """The result of the product and what follows, as a network of the product's two factors."""
    (contracting, batch) = pair.product.params["dimension_numbers"]
    left, right, *numbers = values
    left_atoms, right_atoms = ([Atom(n) for n in a.aval.shape] for a in pair.product.invars)
    for paired in (contracting, batch):
        for i, j in zip(*paired, strict=True):
            right_atoms[j] = left_atoms[i]
    summed = {left_atoms[i] for i in contracting[0]}
    out = [left_atoms[i] for i in batch[0]]
    out += [atom for atom in (*left_atoms, *right_atoms) if atom not in summed and atom not in out]
    term = Term((Operand(left, tuple(left_atoms)), Operand(right, tuple(right_atoms))))
    network: Network | None = Network(tuple((atom,) for atom in out), "", (), (term,))
    following = iter(numbers)
    for eqn in pair.after:
        scaling = structure.scaling(eqn)
        if scaling is not None:
            number = None if scaling.number is None else next(following)
            network = structure.scaled(network, scaling.factor(number), base_too=True)
            continue
        moved = structure.RULES[eqn.primitive.name](eqn, [network], [None])
        if not moved:
            return None
        (network,) = moved
    return network


def _to_operands(value: Factored, dense: Any, update: Network | None) -> Factored:
    """The cotangent of a factored weight from that of its dense sum."""
    atoms = value.network.atoms
    split = update and structure.regroup(update, [atom.size for atom in atoms])
    if split is None or any(len(group) != 1 for group in split.axes):
        return _through_the_sum(value, dense)
    renamed = {group[0]: atom for group, atom in zip(split.axes, atoms, strict=True)}
    factors = [
        Operand(operand.array, tuple(renamed.get(atom, atom) for atom in operand.atoms))
        for operand in split.terms[0].operands
    ]
    # Where operands share an axis of one factor (a Hadamard product), what is left after one of
    # them is larger than the full weight.
    ends = set(factors[0].atoms) ^ set(factors[1].atoms)
    for term in value.network.terms:
        held = [atom for operand in term.operands for atom in operand.atoms if atom in ends]
        if len(held) > len(set(held)):
            return _through_the_sum(value, dense)

    def cotangent(term: Term) -> Term:
        operands = []
        for operand in term.operands:
            others = [other for other in term.operands if other is not operand]
            # Begin where an operand can be absorbed: the factors' own product is the full weight.
            first, second = sorted(
                factors,
                key=lambda factor: not any(set(factor.atoms) & set(o.atoms) for o in others),
            )
            wanted = {*second.atoms, *operand.atoms}
            met = dict.fromkeys(a for o in (first, *others) for a in o.atoms if a in wanted)
            through_rank = Operand(contract(first, others, list(met)), tuple(met))
            array = contract(through_rank, [second], operand.atoms)
            operands.append(Operand(array.astype(operand.array.dtype), operand.atoms))
        return Term(tuple(operands))

    network = value.network
    terms = tuple(cotangent(term) for term in network.terms)
    moved = None if bases.is_deferred(value.base) else dense.astype(value.base.dtype)
    return Factored(moved, Network(network.axes, network.path, (), terms))


def _through_the_sum(value: Factored, dense: Any) -> Factored:
    """The cotangent of a factored weight by differentiating its dense sum."""
    dense = dense.astype(value.base.dtype)
    if bases.is_deferred(value.base):
        summed = lambda network: dataclasses.replace(value, network=network).dense()  # noqa: E731
        _, pull_back = jax.vjp(summed, value.network)
        return Factored(None, pull_back(dense)[0])
    _, pull_back = jax.vjp(Factored.dense, value)
    return pull_back(dense)[0]


def _bodies(eqn: Any) -> list[Body]:
    (body,) = whole("call_jaxpr")(eqn)
    if _enters(eqn):
        return [body]
    return [body._replace(dense=frozenset(range(len(eqn.invars))))]


RULES: dict[str, Control] = {
    name: Control(_bodies, _run) for name in ("custom_vjp_call", "custom_jvp_call")
}
