"""A call of a model as a program of arrays, and where in it the parameters are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jlora import tree
from jlora.factored import bases, releases

PyTree = Any


class Traced(NamedTuple):
    """A call of the wrapped function as a program of arrays."""

    program: releases.Program
    flat: tree.Flat  # The parameters.
    param_index: dict[int, int]  # From a leaf of the parameters to the program's input.
    arrays: list[Any]
    restore: Callable[[Sequence[Any]], Any]  # From the program's outputs to the call's.


def trace(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> Traced:
    """The call `fn(params, *inputs, **kwargs)` as a program; what is no array in it is static."""
    flat = tree.flatten(params)
    rest, rest_tree = jax.tree.flatten((inputs, kwargs))
    leaves = [*flat.leaves, *rest]
    indices = [i for i, leaf in enumerate(leaves) if tree.is_array(leaf)]
    outputs: dict[str, Any] = {}

    def call(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(indices, arrays, strict=True):
            filled[index] = array
        count = len(flat.leaves)
        own_params = jax.tree.unflatten(flat.treedef, filled[:count])
        own_inputs, own_kwargs = jax.tree.unflatten(rest_tree, filled[count:])
        results, outputs["tree"] = jax.tree.flatten(fn(own_params, *own_inputs, **own_kwargs))
        outputs["static"] = [None if tree.is_array(result) else result for result in results]
        outputs["is_array"] = [tree.is_array(result) for result in results]
        return [result for result in results if tree.is_array(result)]

    arrays = [leaves[index] for index in indices]
    program = releases.trace(call, *map(bases.like, arrays))

    def restore(computed: Sequence[Any]) -> Any:
        following = iter(computed)
        results = [
            next(following) if array else static
            for array, static in zip(outputs["is_array"], outputs["static"], strict=True)
        ]
        return jax.tree.unflatten(outputs["tree"], results)

    param_index = {place: i for i, place in enumerate(indices) if place < len(flat.leaves)}
    return Traced(program, flat, param_index, arrays, restore)
