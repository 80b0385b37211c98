"""Functions with derivatives of their own (`jax.custom_vjp`, `jax.custom_jvp`).

Their rule must be kept: it may be a straight-through estimator, which differentiating the body
would silently replace. So the rule itself is traced and evaluated with factored weights. The
cotangent that it returns for the weight is usually one product, `x^T dy`. Kept as that product, it
is contracted with `A` and `B` through the rank, and the full weight's gradient is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.interpreter import _compat, data_movement
from jlora.interpreter.factored_array import FactoredArray, abstractify, is_deferred
from jlora.interpreter.primitive_rules import (
    RULES,
    EvalContext,
    MovementRule,
    ProductRule,
    SubProgram,
    SubProgramRule,
    single_body,
)
from jlora.interpreter.terms import Axis, Operand, ProductTerm, cast, contract

_BODY_DERIVATIVE_MARK = "the rule is the derivative of the body"


def mark_derivative_of_body(array: jax.Array) -> jax.Array:
    """Returns an argument of a `jax.custom_jvp` or `jax.custom_vjp` as it is, with a mark.

    The mark declares that the function's rule is the derivative of its body, only cheaper. Where an
    adapted weight reaches such a function the body is differentiated, through the factors. Rules
    without the mark are kept.
    """
    return checkpoint_name(array, _BODY_DERIVATIVE_MARK)


def differentiates_body(jaxpr: Any) -> bool:
    """Returns whether the body of a function has a marked argument."""
    return any(
        eqn.primitive.name == "name" and eqn.params["name"] == _BODY_DERIVATIVE_MARK
        for eqn in jaxpr.eqns
    )


# Moves between the product and the rule's result that a pair of operands can follow.
_FOLLOWED_PRIMITIVES = ("transpose", "convert_element_type", "reshape", "squeeze", "copy")


def _eval_custom_derivative(
    context: EvalContext, eqn: Any, values: Sequence[Any]
) -> list[Any] | None:
    program = _compat.program_from_jaxpr(eqn.params["call_jaxpr"])
    if differentiates_body(program.jaxpr):
        return context.evaluate(program, values)
    if not _can_evaluate_rule(eqn):
        return None
    values = [_with_product_terms(value, eqn.primitive.name) for value in values]
    rule = _VjpRule(context, eqn, [_abstractify_value(value) for value in values])

    @jax.custom_vjp
    def run(values: list[Any]) -> list[Any]:
        outputs = context.evaluate(program, values)
        return [context.materialize(output, eqn.primitive.name) for output in outputs]

    def forward(values: list[Any]) -> tuple[list[Any], Any]:
        results = context.evaluate(rule.forward_program, values)
        outputs = [context.materialize(x, eqn.primitive.name) for x in results[: rule.num_outputs]]
        return outputs, (values, results[rule.num_outputs :])

    def backward(saved: Any, cotangents: list[Any]) -> tuple[list[Any]]:
        values, residuals = saved
        return (rule.pull_back(values, residuals, cotangents),)

    run.defvjp(forward, backward)
    return run(list(values))


def _with_product_terms(value: Any, used_by: str) -> Any:
    """Returns a value whose terms are plain products, to contract the rule's cotangent with.

    Raises:
        ValueError: A term depends on the input, and the rule would see another one.
    """
    if not isinstance(value, FactoredArray):
        return value
    terms = [term.to_product(value, used_by) for term in value.terms]
    kept = tuple(term for term in terms if term is not None)
    return FactoredArray(value.base, value.axis_groups, value.path, value.gains, kept)


def _can_evaluate_rule(eqn: Any) -> bool:
    """Returns whether a function's rule can be evaluated on factored weights, and is worth it.

    A rule that closes over arrays cannot be traced apart from the program that made them.
    """
    program = _compat.program_from_jaxpr(eqn.params["call_jaxpr"])
    return eqn.params["num_consts"] == 0 and _contains_product(program)


def _contains_product(program: _compat.TracedProgram) -> bool:
    """Returns whether a program has any product that a weight could be part of."""
    return any(
        isinstance(RULES.get(eqn.primitive.name), ProductRule)
        or any(
            _contains_product(_compat.program_from_jaxpr(jaxpr))
            for value in eqn.params.values()
            for jaxpr in (value if isinstance(value, tuple) else (value,))
            if hasattr(jaxpr, "eqns")
        )
        for eqn in program.jaxpr.eqns
    )


def _abstractify_value(value: Any) -> Any:
    """Returns an array of the value's shape, type and (in a shard_map) varying axes."""
    return abstractify(value.base) if isinstance(value, FactoredArray) else value


class _VjpRule:
    """The equation's own rule, traced in two halves: outputs with residuals, and cotangents."""

    def __init__(self, context: EvalContext, eqn: Any, arrays: Sequence[Any]) -> None:
        treedefs: list[Any] = []  # Filled while tracing.
        self._context, self._used_by = context, eqn.primitive.name
        self.num_outputs = len(eqn.outvars)
        self._is_inexact = [jnp.issubdtype(a.aval.dtype, jnp.inexact) for a in eqn.invars]

        def first_half(*arrays: Any) -> tuple[list[Any], list[Any]]:
            def differentiable(*inexact: Any) -> list[Any]:
                following = iter(inexact)
                kinds = zip(arrays, self._is_inexact, strict=True)
                return _compat.bind_eqn(eqn, [next(following) if kind else a for a, kind in kinds])

            inexact = [a for a, kind in zip(arrays, self._is_inexact, strict=True) if kind]
            outputs, pull_back = jax.vjp(differentiable, *inexact)
            residuals, treedef = jax.tree.flatten(pull_back)
            treedefs.append(treedef)
            return outputs, residuals

        self.forward_program = _compat.trace_program(first_half, *arrays)
        self._treedef = treedefs[0]

    def pull_back(
        self, values: Sequence[Any], residuals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        """Returns a cotangent for every input: None for integers, a factored one for weights."""
        program = _compat.trace_program(
            lambda residuals, cotangents: jax.tree.unflatten(self._treedef, residuals)(cotangents),
            [_abstractify_value(residual) for residual in residuals],
            list(cotangents),
        )
        outvars = iter(program.outputs)
        results = [next(outvars) if kind else None for kind in self._is_inexact]
        chains = {
            i: _match_product_chain(program, results[i])
            for i, value in enumerate(values)
            if isinstance(value, FactoredArray) and not value.gains
        }
        needed = [a for a in results if a is not None]
        needed += [a for chain in chains.values() if chain for a in chain.required_inputs]
        outputs = self._context.evaluate(
            program._replace(outputs=needed), [*residuals, *cotangents]
        )
        computed = (self._context.materialize(output, self._used_by) for output in outputs)
        dense = [None if a is None else next(computed) for a in results]
        for i, value in enumerate(values):
            if isinstance(value, FactoredArray):
                chain = chains.get(i)
                update = chain and _build_cotangent_product(
                    chain, [next(computed) for _ in chain.required_inputs]
                )
                dense[i] = _contract_cotangent(value, dense[i], update)
        return dense


class _ProductChain(NamedTuple):
    """A product of two arrays, and the moves and scalings after it, in order."""

    product_eqn: Any
    later_eqns: list[Any]

    @property
    def required_inputs(self) -> list[Any]:
        """The values to compute for it: both factors, and the numbers of the scalings."""
        scalings = ((eqn, data_movement.match_scalar_scaling(eqn)) for eqn in self.later_eqns)
        numbers = [
            eqn.invars[s.scalar_side] for eqn, s in scalings if s and s.scalar_side is not None
        ]
        return [*self.product_eqn.invars, *numbers]


def _match_product_chain(program: _compat.TracedProgram, outvar: Any) -> _ProductChain | None:
    """Returns the product that an output is; None if it is anything else."""
    equations = {var: eqn for eqn in program.jaxpr.eqns for var in eqn.outvars}
    after: list[Any] = []
    while not _compat.is_literal(outvar) and outvar in equations:
        eqn = equations[outvar]
        if eqn.primitive.name == "dot_general":
            return _ProductChain(eqn, after[::-1])
        scaling = data_movement.match_scalar_scaling(eqn)
        if eqn.primitive.name not in _FOLLOWED_PRIMITIVES and scaling is None:
            return None
        after.append(eqn)
        outvar = eqn.invars[scaling.array_side if scaling else 0]
    return None


def _build_cotangent_product(chain: _ProductChain, values: Sequence[Any]) -> FactoredArray | None:
    """Returns the cotangent as one term of the product's two factors, without a base."""
    (contracting, batch) = chain.product_eqn.params["dimension_numbers"]
    left, right, *numbers = values
    left_axes, right_axes = ([Axis(n) for n in a.aval.shape] for a in chain.product_eqn.invars)
    for paired in (contracting, batch):
        for i, j in zip(*paired, strict=True):
            right_axes[j] = left_axes[i]
    summed = {left_axes[i] for i in contracting[0]}
    out = [left_axes[i] for i in batch[0]]
    out += [axis for axis in (*left_axes, *right_axes) if axis not in summed and axis not in out]
    term = ProductTerm((Operand(left, tuple(left_axes)), Operand(right, tuple(right_axes))))
    update = FactoredArray(None, tuple((axis,) for axis in out), "", (), (term,))
    following = iter(numbers)
    for eqn in chain.later_eqns:
        scaling = data_movement.match_scalar_scaling(eqn)
        if scaling is not None:
            number = None if scaling.scalar_side is None else next(following)
            factor = scaling.factor_fn(number)
            update = data_movement.scale_weight(update, factor, base_is_scaled=True)
            continue
        rule = RULES[eqn.primitive.name]
        assert isinstance(rule, MovementRule)
        moved = rule.move(eqn, [update], [None])
        if not moved or moved[0] is None:
            return None
        update = moved[0]
    return update


def _contract_cotangent(
    value: FactoredArray, dense_cotangent: Any, update: FactoredArray | None
) -> FactoredArray:
    """Returns the cotangent of a factored weight from that of its materialized array.

    For `y = x (W + A B)` and the cotangent `x^T dy`, that of `A` is `x^T (dy B^T)` and that of `B`
    is `(x A)^T dy`: both contracted through the rank.
    """
    axes = value.axes
    split = update and data_movement.regroup_axes(update, [axis.size for axis in axes])
    if split is None or any(len(group) != 1 for group in split.axis_groups):
        return _differentiate_materialized(value, dense_cotangent)
    (term,) = split.terms
    assert isinstance(term, ProductTerm)
    renamed = {group[0]: axis for group, axis in zip(split.axis_groups, axes, strict=True)}
    factors = [
        Operand(operand.array, tuple(renamed.get(axis, axis) for axis in operand.axes))
        for operand in term.operands
    ]
    # Where operands share an axis of one factor (a Hadamard product), the array after contracting
    # one of them is larger than the full weight.
    ends = set(factors[0].axes) ^ set(factors[1].axes)
    terms: list[ProductTerm] = [term for term in value.terms if isinstance(term, ProductTerm)]
    for own in terms:
        present = [axis for operand in own.operands for axis in operand.axes if axis in ends]
        if len(present) > len(set(present)):
            return _differentiate_materialized(value, dense_cotangent)
    moved = None if is_deferred(value.base) else cast(dense_cotangent, value.base.dtype)
    cotangents = tuple(_term_cotangent(own, factors) for own in terms)
    return FactoredArray(moved, value.axis_groups, value.path, (), cotangents)


def _term_cotangent(term: ProductTerm, factors: Sequence[Operand]) -> ProductTerm:
    """Returns the cotangent of every operand of a term, from the factors of the weight's."""
    operands = []
    for operand in term.operands:
        others = [other for other in term.operands if other is not operand]
        # Begin where an operand can be contracted: the factors' own product is the full weight.
        first, second = sorted(
            factors, key=lambda factor: not any(set(factor.axes) & set(o.axes) for o in others)
        )
        needed = {*second.axes, *operand.axes}
        shared = dict.fromkeys(a for o in (first, *others) for a in o.axes if a in needed)
        through_rank = Operand(contract(first, others, list(shared)), tuple(shared))
        array = contract(through_rank, [second], operand.axes)
        operands.append(Operand(cast(array, operand.array.dtype), operand.axes))
    return ProductTerm(tuple(operands))


def _differentiate_materialized(value: FactoredArray, dense_cotangent: Any) -> FactoredArray:
    """Returns the cotangent of a factored weight by differentiating its materialized array."""
    dense_cotangent = cast(dense_cotangent, value.base.dtype)
    if not is_deferred(value.base):
        _, pull_back = jax.vjp(FactoredArray.materialize, value)
        return pull_back(dense_cotangent)[0]

    def materialize(gains: Any, terms: Any) -> Any:
        return FactoredArray(value.base, value.axis_groups, value.path, gains, terms).materialize()

    _, pull_back = jax.vjp(materialize, value.gains, value.terms)
    gains, terms = pull_back(dense_cotangent)
    return FactoredArray(None, value.axis_groups, value.path, gains, terms)


def _get_custom_subprograms(eqn: Any) -> list[SubProgram]:
    (body,) = single_body("call_jaxpr")(eqn)
    if _can_evaluate_rule(eqn):
        return [body]
    return [body._replace(materialized_inputs=frozenset(range(len(eqn.invars))))]


RULES |= {
    name: SubProgramRule(_get_custom_subprograms, _eval_custom_derivative)
    for name in ("custom_vjp_call", "custom_jvp_call")
}
