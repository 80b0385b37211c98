"""Running a traced program on factored weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jlora import _tree
from jlora._tree import PyTree
from jlora.interpreter import (
    _compat,
    base_weight,
    control_flow,
    custom_derivatives,
    data_movement,
    products,
)
from jlora.interpreter.dot_products import DenseReason, has_mixed_gain
from jlora.interpreter.factored_array import FactoredArray, TensorNetwork

SUBPROGRAM_RULES = control_flow.CONTROL_FLOW_RULES | custom_derivatives.CUSTOM_DERIVATIVE_RULES


def eval_program(program: _compat.TracedProgram, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program; inputs and outputs are arrays or factored weights.

    Equations that no factored weight reaches are evaluated as they stand. Where one cannot stay
    factored, the equation sees its dense sum.
    """
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(program.jaxpr.invars, inputs, strict=True))
    uses = _find_last_uses(program)

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else values[atom]

    for number, eqn in enumerate(program.jaxpr.eqns):
        arguments = [read(atom) for atom in eqn.invars]
        with _layer_name_scope(eqn):
            outputs = _eval_equation(eqn, arguments, number)
        values.update(zip(eqn.outvars, outputs, strict=True))
        for done in uses.get(number, ()):
            values.pop(done, None)  # Frees activations when run outside jit.
    return [read(atom) for atom in program.outputs]


def _layer_name_scope(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """The model's own names for its layers, so that a profile still shows them."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _find_last_uses(program: _compat.TracedProgram) -> dict[int, list[Any]]:
    last: dict[Any, int] = {}
    for number, eqn in enumerate(program.jaxpr.eqns):
        last.update((a, number) for a in eqn.invars if not _compat.is_literal(a))
    for atom in program.outputs:
        if not _compat.is_literal(atom):
            last.pop(atom, None)
    uses: dict[int, list[Any]] = {}
    for atom, number in last.items():
        uses.setdefault(number, []).append(atom)
    return uses


def _eval_equation(eqn: Any, values: Sequence[Any], eqn_index: int) -> Sequence[Any]:
    if not any(isinstance(value, FactoredArray) for value in values):
        return _compat.bind_eqn(eqn, values)
    name = eqn.primitive.name
    if name in SUBPROGRAM_RULES or name in products.PRODUCT_RULES:
        # Two uses of one weight drop different inputs.
        values = [control_flow.fold_dropout_keys(value, eqn_index) for value in values]
    if name in SUBPROGRAM_RULES:
        outputs = SUBPROGRAM_RULES[name].evaluate(eqn, values, eval_program)
        if outputs is not None:
            return outputs
    scaling = data_movement.match_scalar_scaling(eqn)
    if scaling is not None and [isinstance(v, FactoredArray) for v in values].count(True) == 1:
        weight = values[scaling.array_side]
        if isinstance(weight, FactoredArray):
            factor = scaling.factor_fn(
                None if scaling.scalar_side is None else values[scaling.scalar_side]
            )
            constant = scaling.scalar_side is None or _compat.is_literal(
                eqn.invars[scaling.scalar_side]
            )
            network = data_movement.scale_network(weight.network, factor, base_is_scaled=constant)
            if constant:
                (base,) = base_weight.eval_data_movement(
                    eqn, [_get_base_array(value) for value in values]
                )
                return [FactoredArray(base, network)]
            return [FactoredArray(weight.base, network)]
    if name in data_movement.DATA_MOVEMENT_RULES:
        networks = [_get_network(value) for value in values]
        moved = data_movement.DATA_MOVEMENT_RULES[name](eqn, networks, values)
        if moved is not None:
            outputs = base_weight.eval_data_movement(
                eqn, [_get_base_array(value) for value in values]
            )
            return [
                output if network is None else FactoredArray(output, network)
                for output, network in zip(outputs, moved, strict=True)
            ]
    if name in products.PRODUCT_RULES:
        return [_eval_weight_product(eqn, values)]
    return _compat.bind_eqn(eqn, [control_flow.materialize_value(value) for value in values])


def _eval_weight_product(eqn: Any, values: Sequence[Any]) -> Any:
    rule = products.PRODUCT_RULES[eqn.primitive.name]
    side = products.find_weight_side([_get_network(value) for value in values])
    assert side is not None
    values = [v if i == side else control_flow.materialize_value(v) for i, v in enumerate(values)]
    roles = rule.get_axis_roles(eqn, side, values[side].network)
    if isinstance(roles, DenseReason) or has_mixed_gain(values[side].network, roles):
        return _compat.bind_eqn(eqn, [control_flow.materialize_value(value) for value in values])[0]
    return rule.multiply(
        eqn, lambda *arrays: base_weight.eval_base_product(eqn, arrays), side, values
    )


def _get_network(value: Any) -> TensorNetwork | None:
    return value.network if isinstance(value, FactoredArray) else None


def _get_base_array(value: Any) -> Any:
    return value.base if isinstance(value, FactoredArray) else value


class TracedCall(NamedTuple):
    """A call of the wrapped function as a program of arrays."""

    program: _compat.TracedProgram
    flat_params: _tree.FlatTree  # The parameters.
    param_index: dict[int, int]  # From a leaf of the parameters to the program's input.
    input_arrays: list[Any]
    unflatten_outputs: Callable[[Sequence[Any]], Any]  # From the program's outputs to the call's.


def trace_call(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> TracedCall:
    """The call `fn(params, *inputs, **kwargs)` as a program; what is no array in it is static."""
    flat = _tree.flatten_with_paths(params)
    rest, rest_tree = jax.tree.flatten((inputs, kwargs))
    leaves = [*flat.leaves, *rest]
    indices = [i for i, leaf in enumerate(leaves) if _tree.is_array(leaf)]
    outputs: dict[str, Any] = {}

    def call(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(indices, arrays, strict=True):
            filled[index] = array
        count = len(flat.leaves)
        own_params = jax.tree.unflatten(flat.treedef, filled[:count])
        own_inputs, own_kwargs = jax.tree.unflatten(rest_tree, filled[count:])
        results, outputs["tree"] = jax.tree.flatten(fn(own_params, *own_inputs, **own_kwargs))
        outputs["static"] = [None if _tree.is_array(result) else result for result in results]
        outputs["is_array"] = [_tree.is_array(result) for result in results]
        return [result for result in results if _tree.is_array(result)]

    arrays = [leaves[index] for index in indices]
    program = _compat.trace_program(call, *map(base_weight.abstractify, arrays))

    def restore(computed: Sequence[Any]) -> Any:
        following = iter(computed)
        results = [
            next(following) if array else static
            for array, static in zip(outputs["is_array"], outputs["static"], strict=True)
        ]
        return jax.tree.unflatten(outputs["tree"], results)

    param_index = {place: i for i, place in enumerate(indices) if place < len(flat.leaves)}
    return TracedCall(program, flat, param_index, arrays, restore)
