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
from jax.ad_checkpoint import checkpoint_name

from jlora.interpreter import _compat, base_weight, data_movement, products
from jlora.interpreter.control_flow import (
    ControlFlowRule,
    EvalProgramFn,
    SubProgram,
    is_factored,
    materialize_value,
    single_body,
)
from jlora.interpreter.einsum import Axis, Operand, contract
from jlora.interpreter.factored_array import FactoredArray, TensorNetwork, Term

_BODY_DERIVATIVE_MARK = "the rule is the derivative of the body"


def mark_derivative_of_body(array: jax.Array) -> jax.Array:
    """An argument of a `jax.custom_jvp` or `jax.custom_vjp` as it is, which tells jlora that the
    rule gives nothing but the derivative of the function's body.

    Other rules are kept where an adapted weight meets one. In this one's place the body itself is
    differentiated, through the factors.
    """
    return checkpoint_name(array, _BODY_DERIVATIVE_MARK)


def differentiates_body(jaxpr: Any) -> bool:
    """Whether the body of a function has a marked argument."""
    return any(
        eqn.primitive.name == "name" and eqn.params["name"] == _BODY_DERIVATIVE_MARK
        for eqn in jaxpr.eqns
    )


# Moves between the product and the rule's result that a pair of operands can follow.
_FOLLOWED_PRIMITIVES = ("transpose", "convert_element_type", "reshape", "squeeze", "copy")


def _eval_custom_derivative(
    eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn
) -> list[Any] | None:
    held = _compat.program_from_jaxpr(eqn.params["call_jaxpr"])
    if differentiates_body(held.jaxpr):
        return evaluate(held, values)
    if not _can_evaluate_rule(eqn):
        return None
    for value in values:
        if is_factored(value) and any(term.routing for term in value.network.terms):
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
    values = [_drop_moment_taps(_apply_weight_selection(value)) for value in values]
    backward = _VjpRule(eqn, [_abstractify_value(value) for value in values])

    @jax.custom_vjp
    def run(values: list[Any]) -> list[Any]:
        return [materialize_value(output) for output in evaluate(held, values)]

    def forward(values: list[Any]) -> tuple[list[Any], Any]:
        results = evaluate(backward.forward_program, values)
        outputs = [materialize_value(output) for output in results[: len(eqn.outvars)]]
        return outputs, (values, results[len(eqn.outvars) :])

    def pull_back(saved: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        values, residuals = saved
        return (backward(values, residuals, cotangents, evaluate),)

    run.defvjp(forward, pull_back)
    return run(list(values))


def _apply_weight_selection(value: Any) -> Any:
    """The value with the choice among updates made: derivatives of a rule are of one of them."""
    if not is_factored(value):
        return value
    return dataclasses.replace(value, network=value.network.apply_selections())


def _drop_moment_taps(value: Any) -> Any:
    """The value without arrays for moments: the rule of the function knows nothing of them."""
    if not is_factored(value) or not value.network.moment_taps:
        return value
    return dataclasses.replace(value, network=dataclasses.replace(value.network, moment_taps=()))


def _can_evaluate_rule(eqn: Any) -> bool:
    """Whether a function's rule can be evaluated on factored weights, and is worth it.

    A rule that closes over arrays cannot be traced apart from the program that made them.
    """
    held = _compat.program_from_jaxpr(eqn.params["call_jaxpr"])
    return eqn.params["num_consts"] == 0 and _contains_product(held)


def _contains_product(program: _compat.TracedProgram) -> bool:
    """Whether a program holds any product that a weight could take part in."""
    return any(
        eqn.primitive.name in products.PRODUCT_RULES
        or any(
            _contains_product(_compat.program_from_jaxpr(jaxpr))
            for value in eqn.params.values()
            for jaxpr in (value if isinstance(value, tuple) else (value,))
            if hasattr(jaxpr, "eqns")
        )
        for eqn in program.jaxpr.eqns
    )


def _abstractify_value(value: Any) -> Any:
    """An array of the value's shape, type and (in a shard_map) varying axes."""
    return base_weight.abstractify(value.base) if is_factored(value) else value


class _VjpRule:
    """The equation's own rule, traced in two halves: values with residuals, and cotangents."""

    def __init__(self, eqn: Any, arrays: Sequence[Any]) -> None:
        structure_of_rule: list[Any] = []  # Filled while tracing.
        self._is_inexact = [jnp.issubdtype(a.aval.dtype, jnp.inexact) for a in eqn.invars]

        def first_half(*arrays: Any) -> tuple[list[Any], list[Any]]:
            fixed = list(arrays)

            def differentiable(*inexact: Any) -> list[Any]:
                moving = iter(inexact)
                return _compat.bind_eqn(
                    eqn,
                    [
                        next(moving) if kind else a
                        for a, kind in zip(fixed, self._is_inexact, strict=True)
                    ],
                )

            outputs, rule = jax.vjp(
                differentiable,
                *(a for a, kind in zip(arrays, self._is_inexact, strict=True) if kind),
            )
            residuals, tree = jax.tree.flatten(rule)
            structure_of_rule.append(tree)
            return outputs, residuals

        self.forward_program = _compat.trace_program(first_half, *arrays)
        self._rule_treedef = structure_of_rule[0]

    def __call__(
        self,
        values: Sequence[Any],
        residuals: Sequence[Any],
        cotangents: Sequence[Any],
        evaluate: EvalProgramFn,
    ) -> list[Any]:
        """A cotangent for every input: None for integers, a factored one for factored weights."""
        held = _compat.trace_program(
            lambda residuals, cotangents: jax.tree.unflatten(self._rule_treedef, residuals)(
                cotangents
            ),
            [_abstractify_value(residual) for residual in residuals],
            list(cotangents),
        )
        inputs = [*residuals, *cotangents]
        wanted = iter(held.outputs)
        results = [next(wanted) if kind else None for kind in self._is_inexact]
        pairs = {
            i: _match_product_chain(held, results[i])
            for i, value in enumerate(values)
            if is_factored(value) and not value.network.gains
        }
        needed = [a for a in results if a is not None]
        needed += [a for pair in pairs.values() if pair for a in pair.required_inputs]
        computed = map(materialize_value, evaluate(held._replace(outputs=needed), inputs))
        cotangent = [None if a is None else next(computed) for a in results]
        for i, value in enumerate(values):
            if is_factored(value):
                pair = pairs.get(i)
                update = pair and _build_cotangent_network(
                    pair, [next(computed) for _ in pair.required_inputs]
                )
                cotangent[i] = _contract_cotangent(value, cotangent[i], update)
        return cotangent


class _ProductChain(NamedTuple):
    """A product of two arrays, and the moves and scalings after it, in order."""

    product_eqn: Any
    later_eqns: list[Any]

    @property
    def required_inputs(self) -> list[Any]:
        """What has to be computed for it: both factors, and the numbers of the scalings."""
        scalings = ((eqn, data_movement.match_scalar_scaling(eqn)) for eqn in self.later_eqns)
        numbers = [
            eqn.invars[s.scalar_side] for eqn, s in scalings if s and s.scalar_side is not None
        ]
        return [*self.product_eqn.invars, *numbers]


def _match_product_chain(program: _compat.TracedProgram, outvar: Any) -> _ProductChain | None:
    """The product that an output is; None if it is anything else."""
    made_by = {var: eqn for eqn in program.jaxpr.eqns for var in eqn.outvars}
    after: list[Any] = []
    while not _compat.is_literal(outvar) and outvar in made_by:
        eqn = made_by[outvar]
        if eqn.primitive.name == "dot_general":
            return _ProductChain(eqn, after[::-1])
        scaling = data_movement.match_scalar_scaling(eqn)
        if eqn.primitive.name not in _FOLLOWED_PRIMITIVES and scaling is None:
            return None
        after.append(eqn)
        outvar = eqn.invars[scaling.array_side if scaling else 0]
    return None


def _build_cotangent_network(chain: _ProductChain, values: Sequence[Any]) -> TensorNetwork | None:
    """The result of the product and what follows, as a network of the product's two factors."""
    (contracting, batch) = chain.product_eqn.params["dimension_numbers"]
    left, right, *numbers = values
    left_atoms, right_atoms = ([Axis(n) for n in a.aval.shape] for a in chain.product_eqn.invars)
    for paired in (contracting, batch):
        for i, j in zip(*paired, strict=True):
            right_atoms[j] = left_atoms[i]
    summed = {left_atoms[i] for i in contracting[0]}
    out = [left_atoms[i] for i in batch[0]]
    out += [atom for atom in (*left_atoms, *right_atoms) if atom not in summed and atom not in out]
    term = Term((Operand(left, tuple(left_atoms)), Operand(right, tuple(right_atoms))))
    network: TensorNetwork | None = TensorNetwork(tuple((atom,) for atom in out), "", (), (term,))
    following = iter(numbers)
    for eqn in chain.later_eqns:
        scaling = data_movement.match_scalar_scaling(eqn)
        if scaling is not None:
            number = None if scaling.scalar_side is None else next(following)
            network = data_movement.scale_network(
                network, scaling.factor_fn(number), base_is_scaled=True
            )
            continue
        moved = data_movement.DATA_MOVEMENT_RULES[eqn.primitive.name](eqn, [network], [None])
        if not moved:
            return None
        (network,) = moved
    return network


def _contract_cotangent(
    value: FactoredArray, dense_cotangent: Any, update: TensorNetwork | None
) -> FactoredArray:
    """The cotangent of a factored weight from that of its dense sum."""
    atoms = value.network.axes
    split = update and data_movement.regroup_axes(update, [atom.size for atom in atoms])
    if split is None or any(len(group) != 1 for group in split.axis_groups):
        return _via_dense(value, dense_cotangent)
    renamed = {group[0]: atom for group, atom in zip(split.axis_groups, atoms, strict=True)}
    factors = [
        Operand(operand.array, tuple(renamed.get(atom, atom) for atom in operand.axes))
        for operand in split.terms[0].operands
    ]
    # Where operands share an axis of one factor (a Hadamard product), what is left after one of
    # them is larger than the full weight.
    ends = set(factors[0].axes) ^ set(factors[1].axes)
    for term in value.network.terms:
        held = [atom for operand in term.operands for atom in operand.axes if atom in ends]
        if len(held) > len(set(held)):
            return _via_dense(value, dense_cotangent)

    def cotangent(term: Term) -> Term:
        operands = []
        for operand in term.operands:
            others = [other for other in term.operands if other is not operand]
            # Begin where an operand can be absorbed: the factors' own product is the full weight.
            first, second = sorted(
                factors,
                key=lambda factor: not any(set(factor.axes) & set(o.axes) for o in others),
            )
            wanted = {*second.axes, *operand.axes}
            met = dict.fromkeys(a for o in (first, *others) for a in o.axes if a in wanted)
            through_rank = Operand(contract(first, others, list(met)), tuple(met))
            array = contract(through_rank, [second], operand.axes)
            operands.append(Operand(array.astype(operand.array.dtype), operand.axes))
        return Term(tuple(operands))

    network = value.network
    terms = tuple(cotangent(term) for term in network.terms)
    moved = (
        None if base_weight.is_deferred(value.base) else dense_cotangent.astype(value.base.dtype)
    )
    return FactoredArray(moved, TensorNetwork(network.axis_groups, network.path, (), terms))


def _via_dense(value: FactoredArray, dense_cotangent: Any) -> FactoredArray:
    """The cotangent of a factored weight by differentiating its dense sum."""
    dense_cotangent = dense_cotangent.astype(value.base.dtype)
    if base_weight.is_deferred(value.base):
        summed = lambda network: dataclasses.replace(value, network=network).materialize()  # noqa: E731
        _, pull_back = jax.vjp(summed, value.network)
        return FactoredArray(None, pull_back(dense_cotangent)[0])
    _, pull_back = jax.vjp(FactoredArray.materialize, value)
    return pull_back(dense_cotangent)[0]


def _get_custom_subprograms(eqn: Any) -> list[SubProgram]:
    (body,) = single_body("call_jaxpr")(eqn)
    if _can_evaluate_rule(eqn):
        return [body]
    return [body._replace(materialized_inputs=frozenset(range(len(eqn.invars))))]


CUSTOM_DERIVATIVE_RULES: dict[str, ControlFlowRule] = {
    name: ControlFlowRule(_get_custom_subprograms, _eval_custom_derivative)
    for name in ("custom_vjp_call", "custom_jvp_call")
}
