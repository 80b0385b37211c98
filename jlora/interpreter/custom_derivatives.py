"""Functions with custom derivative rules (`jax.custom_vjp`, `jax.custom_jvp`).

Their rule must be kept: it may be a straight-through estimator, which differentiating the body
would silently replace. So the rule itself is traced and evaluated on factored weights. The weight
cotangent that it returns is usually one product, `x^T dy`. It stays factored as that product, so
its contraction with `A` and `B` goes through the rank, and the gradient of the full weight is never
formed.
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
    """Marks a `jax.custom_jvp` or `jax.custom_vjp` whose rule is the derivative of its body.

    Rules without the mark are kept where they use an adapted weight. With it, jlora differentiates
    the body itself, through the factors.

    Args:
        array: Any argument of the function.

    Returns:
        The argument, unchanged.
    """
    return checkpoint_name(array, _BODY_DERIVATIVE_MARK)


def differentiates_body(jaxpr: Any) -> bool:
    """Whether the body of a function has an argument marked by `mark_derivative_of_body`."""
    return any(
        eqn.primitive.name == "name" and eqn.params["name"] == _BODY_DERIVATIVE_MARK
        for eqn in jaxpr.eqns
    )


# Data movement between the product and the result of the rule that two operands can follow.
_FOLLOWED_PRIMITIVES = ("transpose", "convert_element_type", "reshape", "squeeze", "copy")


def _eval_custom_derivative(
    eqn: Any, values: Sequence[Any], evaluate: EvalProgramFn
) -> list[Any] | None:
    program = _compat.program_from_jaxpr(eqn.params["call_jaxpr"])
    if differentiates_body(program.jaxpr):
        return evaluate(program, values)
    if not _can_evaluate_rule(eqn):
        return None
    for value in values:
        if is_factored(value) and any(term.routing for term in value.network.terms):
            raise ValueError(
                f"LoRAMoE on {value.network.path!r} cannot be used inside a function with a custom "
                f"derivative ({eqn.primitive.name}), whose rule would route by the gradient. "
                f"Exclude this weight from the adapter rules."
            )
        if is_factored(value) and any(term.dropout for term in value.network.terms):
            raise ValueError(
                f"Dropout of the adapter on {value.network.path!r} cannot be applied inside a "
                f"function with a custom derivative ({eqn.primitive.name}), whose rule would use "
                f"the input without dropout. Set dropout=0.0 in the config of this weight."
            )
    values = [_drop_moment_taps(_apply_weight_selection(value)) for value in values]
    vjp_rule = _VjpRule(eqn, [_abstractify_value(value) for value in values])

    @jax.custom_vjp
    def run(values: list[Any]) -> list[Any]:
        return [materialize_value(output) for output in evaluate(program, values)]

    def fwd(values: list[Any]) -> tuple[list[Any], Any]:
        results = evaluate(vjp_rule.forward_program, values)
        outputs = [materialize_value(output) for output in results[: len(eqn.outvars)]]
        return outputs, (values, results[len(eqn.outvars) :])

    def bwd(res: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        values, residuals = res
        return (vjp_rule(values, residuals, cotangents, evaluate),)

    run.defvjp(fwd, bwd)
    return run(list(values))


def _apply_weight_selection(value: Any) -> Any:
    """Applies the selections of a weight, because a derivative rule is evaluated for one update."""
    if not is_factored(value):
        return value
    return dataclasses.replace(value, network=value.network.apply_selections())


def _drop_moment_taps(value: Any) -> Any:
    """Removes the moment taps of a weight, because a derivative rule has no gradient for them."""
    if not is_factored(value) or not value.network.moment_taps:
        return value
    return dataclasses.replace(value, network=dataclasses.replace(value.network, moment_taps=()))


def _can_evaluate_rule(eqn: Any) -> bool:
    """Whether a rule can be evaluated on factored weights, and has a product that benefits.

    A rule that closes over arrays cannot be traced outside the program that computes them.
    """
    program = _compat.program_from_jaxpr(eqn.params["call_jaxpr"])
    return eqn.params["num_consts"] == 0 and _contains_product(program)


def _contains_product(program: _compat.TracedProgram) -> bool:
    """Whether a program or a program inside it has a product that a weight can be part of."""
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
    """Returns an array with the shape, type and (in a shard_map) varying axes of the value."""
    return base_weight.abstractify(value.base) if is_factored(value) else value


class _VjpRule:
    """The derivative rule of an equation, traced as a forward and a backward program.

    Attributes:
        forward_program: Program from the inputs to the outputs and the residuals.
    """

    def __init__(self, eqn: Any, arrays: Sequence[Any]) -> None:
        rule_treedefs: list[Any] = []  # Filled while tracing.
        self._is_inexact = [jnp.issubdtype(a.aval.dtype, jnp.inexact) for a in eqn.invars]

        def forward(*arrays: Any) -> tuple[list[Any], list[Any]]:
            all_arrays = list(arrays)

            def differentiable(*inexact: Any) -> list[Any]:
                remaining = iter(inexact)
                return _compat.bind_eqn(
                    eqn,
                    [
                        next(remaining) if is_inexact else a
                        for a, is_inexact in zip(all_arrays, self._is_inexact, strict=True)
                    ],
                )

            outputs, rule = jax.vjp(
                differentiable,
                *(a for a, is_inexact in zip(arrays, self._is_inexact, strict=True) if is_inexact),
            )
            residuals, tree = jax.tree.flatten(rule)
            rule_treedefs.append(tree)
            return outputs, residuals

        self.forward_program = _compat.trace_program(forward, *arrays)
        self._rule_treedef = rule_treedefs[0]

    def __call__(
        self,
        values: Sequence[Any],
        residuals: Sequence[Any],
        cotangents: Sequence[Any],
        evaluate: EvalProgramFn,
    ) -> list[Any]:
        """Returns a cotangent for every input: None for integers, factored for factored weights."""
        backward_program = _compat.trace_program(
            lambda residuals, cotangents: jax.tree.unflatten(self._rule_treedef, residuals)(
                cotangents
            ),
            [_abstractify_value(residual) for residual in residuals],
            list(cotangents),
        )
        inputs = [*residuals, *cotangents]
        outvars = iter(backward_program.outputs)
        cotangent_vars = [next(outvars) if is_inexact else None for is_inexact in self._is_inexact]
        chains = {
            i: _match_product_chain(backward_program, cotangent_vars[i])
            for i, value in enumerate(values)
            if is_factored(value) and not value.network.gains
        }
        required = [var for var in cotangent_vars if var is not None]
        required += [var for chain in chains.values() if chain for var in chain.required_inputs]
        computed = map(
            materialize_value, evaluate(backward_program._replace(outputs=required), inputs)
        )
        cotangent = [None if var is None else next(computed) for var in cotangent_vars]
        for i, value in enumerate(values):
            if is_factored(value):
                chain = chains.get(i)
                update = chain and _build_cotangent_network(
                    chain, [next(computed) for _ in chain.required_inputs]
                )
                cotangent[i] = _contract_cotangent(value, cotangent[i], update)
        return cotangent


class _ProductChain(NamedTuple):
    """A product of two arrays, followed by data movement and scaling.

    Attributes:
        product_eqn: Equation of the product.
        later_eqns: Later equations, in order.
    """

    product_eqn: Any
    later_eqns: list[Any]

    @property
    def required_inputs(self) -> list[Any]:
        """Variables of both factors and of the scalars, which have to be computed for the chain."""
        scalings = ((eqn, data_movement.match_scalar_scaling(eqn)) for eqn in self.later_eqns)
        scalars = [
            eqn.invars[s.scalar_side] for eqn, s in scalings if s and s.scalar_side is not None
        ]
        return [*self.product_eqn.invars, *scalars]


def _match_product_chain(program: _compat.TracedProgram, outvar: Any) -> _ProductChain | None:
    """Returns the product that computes an output, or None for any other computation."""
    eqn_by_output = {var: eqn for eqn in program.jaxpr.eqns for var in eqn.outvars}
    later_eqns: list[Any] = []
    while not _compat.is_literal(outvar) and outvar in eqn_by_output:
        eqn = eqn_by_output[outvar]
        if eqn.primitive.name == "dot_general":
            return _ProductChain(eqn, later_eqns[::-1])
        scaling = data_movement.match_scalar_scaling(eqn)
        if eqn.primitive.name not in _FOLLOWED_PRIMITIVES and scaling is None:
            return None
        later_eqns.append(eqn)
        outvar = eqn.invars[scaling.array_side if scaling else 0]
    return None


def _build_cotangent_network(chain: _ProductChain, values: Sequence[Any]) -> TensorNetwork | None:
    """Builds the result of a product chain as a network of the two factors, or None."""
    (contracting, batch) = chain.product_eqn.params["dimension_numbers"]
    left, right, *scalars = values
    left_axes, right_axes = ([Axis(n) for n in a.aval.shape] for a in chain.product_eqn.invars)
    for dims in (contracting, batch):
        for i, j in zip(*dims, strict=True):
            right_axes[j] = left_axes[i]
    contracted = {left_axes[i] for i in contracting[0]}
    out_axes = [left_axes[i] for i in batch[0]]
    out_axes += [
        axis
        for axis in (*left_axes, *right_axes)
        if axis not in contracted and axis not in out_axes
    ]
    term = Term((Operand(left, tuple(left_axes)), Operand(right, tuple(right_axes))))
    network: TensorNetwork | None = TensorNetwork(
        tuple((axis,) for axis in out_axes), "", (), (term,)
    )
    remaining = iter(scalars)
    for eqn in chain.later_eqns:
        scaling = data_movement.match_scalar_scaling(eqn)
        if scaling is not None:
            scalar = None if scaling.scalar_side is None else next(remaining)
            network = data_movement.scale_network(
                network, scaling.factor_fn(scalar), base_is_scaled=True
            )
            continue
        out_networks = data_movement.DATA_MOVEMENT_RULES[eqn.primitive.name](eqn, [network], [None])
        if not out_networks:
            return None
        (network,) = out_networks
    return network


def _contract_cotangent(
    value: FactoredArray, dense_cotangent: Any, update: TensorNetwork | None
) -> FactoredArray:
    """Converts the cotangent of a materialized weight into that of its factored form."""
    axes = value.network.axes
    regrouped = update and data_movement.regroup_axes(update, [axis.size for axis in axes])
    if regrouped is None or any(len(group) != 1 for group in regrouped.axis_groups):
        return _via_dense(value, dense_cotangent)
    weight_axis_by_axis = {
        group[0]: axis for group, axis in zip(regrouped.axis_groups, axes, strict=True)
    }
    factors = [
        Operand(operand.array, tuple(weight_axis_by_axis.get(axis, axis) for axis in operand.axes))
        for operand in regrouped.terms[0].operands
    ]
    # Where operands share an axis of one factor (a Hadamard product), the contraction with one of
    # them leaves an array larger than the full weight.
    unpaired = set(factors[0].axes) ^ set(factors[1].axes)
    for term in value.network.terms:
        shared = [axis for operand in term.operands for axis in operand.axes if axis in unpaired]
        if len(shared) > len(set(shared)):
            return _via_dense(value, dense_cotangent)

    def contract_term(term: Term) -> Term:
        operands = []
        for operand in term.operands:
            others = [other for other in term.operands if other is not operand]
            # Start with the factor that shares an axis with another operand: contracting the two
            # factors first would form the full weight.
            first, second = sorted(
                factors,
                key=lambda factor: not any(set(factor.axes) & set(o.axes) for o in others),
            )
            kept = {*second.axes, *operand.axes}
            rank_axes = dict.fromkeys(a for o in (first, *others) for a in o.axes if a in kept)
            through_rank = Operand(contract(first, others, list(rank_axes)), tuple(rank_axes))
            array = contract(through_rank, [second], operand.axes)
            operands.append(Operand(array.astype(operand.array.dtype), operand.axes))
        return Term(tuple(operands))

    network = value.network
    terms = tuple(contract_term(term) for term in network.terms)
    base_cotangent = (
        None if base_weight.is_deferred(value.base) else dense_cotangent.astype(value.base.dtype)
    )
    return FactoredArray(
        base_cotangent, TensorNetwork(network.axis_groups, network.path, (), terms)
    )


def _via_dense(value: FactoredArray, dense_cotangent: Any) -> FactoredArray:
    """Converts the cotangent of a materialized weight by differentiating its materialization."""
    dense_cotangent = dense_cotangent.astype(value.base.dtype)
    if base_weight.is_deferred(value.base):
        materialize = lambda network: dataclasses.replace(value, network=network).materialize()  # noqa: E731
        _, pull_back = jax.vjp(materialize, value.network)
        return FactoredArray(None, pull_back(dense_cotangent)[0])
    _, pull_back = jax.vjp(FactoredArray.materialize, value)
    return pull_back(dense_cotangent)[0]


def _get_custom_subprograms(eqn: Any) -> list[SubProgram]:
    (subprogram,) = single_body("call_jaxpr")(eqn)
    if _can_evaluate_rule(eqn):
        return [subprogram]
    return [subprogram._replace(materialized_inputs=frozenset(range(len(eqn.invars))))]


CUSTOM_DERIVATIVE_RULES: dict[str, ControlFlowRule] = {
    name: ControlFlowRule(_get_custom_subprograms, _eval_custom_derivative)
    for name in ("custom_vjp_call", "custom_jvp_call")
}
