"""Calls of a model as traced programs, and their evaluation with adapted weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jlora import _tree
from jlora._tree import PyTree
from jlora.interpreter import _compat
from jlora.interpreter.factored_array import FactoredArray, abstractify
from jlora.interpreter.primitive_rules import RULES, EvalContext, MovementRule


class TracedCall(NamedTuple):
    """A call of the wrapped function as a program of arrays.

    Attributes:
        program: The program.
        flat_params: The parameters.
        param_index: From the number of a parameter leaf to the number of the program's input.
        input_arrays: Arrays, or shapes, that the program was traced with.
        unflatten_outputs: Function from the program's outputs to those of the call.
    """

    program: _compat.TracedProgram
    flat_params: _tree.FlatTree
    param_index: dict[int, int]
    input_arrays: list[Any]
    unflatten_outputs: Callable[[Sequence[Any]], Any]


def trace_call(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> TracedCall:
    """Traces `fn(params, *inputs, **kwargs)`. Arguments that are not arrays are static."""
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
    try:
        program = _compat.trace_program(call, *map(abstractify, arrays))
    except Exception as error:
        error.add_note(
            f"The error is from the function that was given to lora_transform, called as "
            f"fn(params, ...) with params a {type(params).__name__} of {len(flat.leaves)} leaves, "
            f"{len(inputs)} inputs and the keyword arguments {sorted(kwargs)}."
        )
        raise

    def unflatten_outputs(computed: Sequence[Any]) -> Any:
        following = iter(computed)
        results = [
            next(following) if array else static
            for array, static in zip(outputs["is_array"], outputs["static"], strict=True)
        ]
        return jax.tree.unflatten(outputs["tree"], results)

    param_index = {place: i for i, place in enumerate(indices) if place < len(flat.leaves)}
    return TracedCall(program, flat, param_index, arrays, unflatten_outputs)


def make_context(
    *, allow_materialize: bool = True, token_mask: jax.Array | None = None
) -> EvalContext:
    return EvalContext(eval_program, allow_materialize=allow_materialize, token_mask=token_mask)


def eval_program(
    context: EvalContext, program: _compat.TracedProgram, inputs: Sequence[Any]
) -> list[Any]:
    """Returns the outputs of a program; inputs and outputs are arrays or factored weights.

    Equations that no factored weight reaches are evaluated as they stand. Where one cannot keep a
    weight factored, it gets the materialized weight.
    """
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(program.jaxpr.invars, inputs, strict=True))
    last_uses = _find_last_uses(program)

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else values[atom]

    for number, eqn in enumerate(program.jaxpr.eqns):
        arguments = [read(atom) for atom in eqn.invars]
        with _named_scope(eqn):
            outputs = _eval_equation(context, eqn, arguments, number)
        values.update(zip(eqn.outvars, outputs, strict=True))
        for done in last_uses.get(number, ()):
            values.pop(done, None)  # Frees activations when run outside jit.
    return [read(atom) for atom in program.outputs]


def _eval_equation(
    context: EvalContext, eqn: Any, values: Sequence[Any], number: int
) -> Sequence[Any]:
    if not any(isinstance(value, FactoredArray) for value in values):
        return _compat.bind_eqn(eqn, values)
    rule = RULES.get(eqn.primitive.name)
    if rule is not None:
        if not isinstance(rule, MovementRule):  # Two uses of one weight drop different inputs.
            values = [v.fold_in(number) if isinstance(v, FactoredArray) else v for v in values]
        outputs = rule.evaluate(context, eqn, values)
        if outputs is not None:
            return outputs
    arrays = [context.materialize(value, eqn.primitive.name) for value in values]
    return _compat.bind_eqn(eqn, arrays)


def _named_scope(eqn: Any) -> contextlib.AbstractContextManager[Any]:
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
