"""Traces a call of a model, and evaluates traced programs on factored weights."""

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
    """Evaluates a program whose inputs and outputs are arrays or factored weights.

    Equations without a factored input are evaluated unchanged. An equation that has no rule for
    the factored form gets the materialized weight.
    """
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(program.jaxpr.invars, inputs, strict=True))
    last_uses = _find_last_uses(program)

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else values[atom]

    for index, eqn in enumerate(program.jaxpr.eqns):
        arguments = [read(atom) for atom in eqn.invars]
        with _layer_name_scope(eqn):
            outputs = _eval_equation(eqn, arguments, index)
        values.update(zip(eqn.outvars, outputs, strict=True))
        for var in last_uses.get(index, ()):
            values.pop(var, None)  # Frees activations when run outside jit.
    return [read(atom) for atom in program.outputs]


def _layer_name_scope(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """Enters the name scope of the layer, so that profiles show the names of the model."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _find_last_uses(program: _compat.TracedProgram) -> dict[int, list[Any]]:
    last_use: dict[Any, int] = {}
    for index, eqn in enumerate(program.jaxpr.eqns):
        last_use.update((a, index) for a in eqn.invars if not _compat.is_literal(a))
    for atom in program.outputs:
        if not _compat.is_literal(atom):
            last_use.pop(atom, None)
    vars_by_index: dict[int, list[Any]] = {}
    for atom, index in last_use.items():
        vars_by_index.setdefault(index, []).append(atom)
    return vars_by_index


def _eval_equation(eqn: Any, values: Sequence[Any], eqn_index: int) -> Sequence[Any]:
    if not any(isinstance(value, FactoredArray) for value in values):
        return _compat.bind_eqn(eqn, values)
    name = eqn.primitive.name
    if name in SUBPROGRAM_RULES or name in products.PRODUCT_RULES:
        # Each use of a weight has its own dropout mask.
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
            scales_base = scaling.scalar_side is None or _compat.is_literal(
                eqn.invars[scaling.scalar_side]
            )
            network = data_movement.scale_network(
                weight.network, factor, base_is_scaled=scales_base
            )
            if scales_base:
                (base,) = base_weight.eval_data_movement(
                    eqn, [_get_base_array(value) for value in values]
                )
                return [FactoredArray(base, network)]
            return [FactoredArray(weight.base, network)]
    if name in data_movement.DATA_MOVEMENT_RULES:
        networks = [_get_network(value) for value in values]
        out_networks = data_movement.DATA_MOVEMENT_RULES[name](eqn, networks, values)
        if out_networks is not None:
            outputs = base_weight.eval_data_movement(
                eqn, [_get_base_array(value) for value in values]
            )
            return [
                output if network is None else FactoredArray(output, network)
                for output, network in zip(outputs, out_networks, strict=True)
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
    """A call of a function as a program of arrays.

    Attributes:
        program: The program.
        flat_params: Flattened parameters.
        param_index: Input index of the program, by leaf index of the parameters.
        input_arrays: Inputs of the program.
        unflatten_outputs: Function from the outputs of the program to those of the call.
    """

    program: _compat.TracedProgram
    flat_params: _tree.FlatTree
    param_index: dict[int, int]
    input_arrays: list[Any]
    unflatten_outputs: Callable[[Sequence[Any]], Any]


def trace_call(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> TracedCall:
    """Traces the call `fn(params, *inputs, **kwargs)`; leaves other than arrays are static."""
    flat_params = _tree.flatten_with_paths(params)
    other_leaves, other_treedef = jax.tree.flatten((inputs, kwargs))
    leaves = [*flat_params.leaves, *other_leaves]
    array_indices = [i for i, leaf in enumerate(leaves) if _tree.is_array(leaf)]
    outputs: dict[str, Any] = {}

    def call(*arrays: Any) -> list[Any]:
        call_leaves = list(leaves)
        for index, is_array in zip(array_indices, arrays, strict=True):
            call_leaves[index] = is_array
        num_params = len(flat_params.leaves)
        call_params = jax.tree.unflatten(flat_params.treedef, call_leaves[:num_params])
        call_inputs, call_kwargs = jax.tree.unflatten(other_treedef, call_leaves[num_params:])
        results, outputs["tree"] = jax.tree.flatten(fn(call_params, *call_inputs, **call_kwargs))
        outputs["static"] = [None if _tree.is_array(result) else result for result in results]
        outputs["is_array"] = [_tree.is_array(result) for result in results]
        return [result for result in results if _tree.is_array(result)]

    arrays = [leaves[index] for index in array_indices]
    program = _compat.trace_program(call, *map(base_weight.abstractify, arrays))

    def unflatten_outputs(computed: Sequence[Any]) -> Any:
        remaining = iter(computed)
        results = [
            next(remaining) if is_array else static
            for is_array, static in zip(outputs["is_array"], outputs["static"], strict=True)
        ]
        return jax.tree.unflatten(outputs["tree"], results)

    param_index = {
        leaf_index: i
        for i, leaf_index in enumerate(array_indices)
        if leaf_index < len(flat_params.leaves)
    }
    return TracedCall(program, flat_params, param_index, arrays, unflatten_outputs)
