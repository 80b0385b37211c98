"""Evaluates a traced program with adapted weights in place of its parameters."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._quantized_array import is_quantized
from jlora.adapters.base import make_weight_expression
from jlora.interpreter import control_flow
from jlora.interpreter.eval_jaxpr import TracedCall, eval_program
from jlora.interpreter.factored_array import FactoredArray, build_tensor_network
from jlora.rules import Adapter


def _evaluate_adapted(
    traced: TracedCall, indices: Mapping[str, int], adapter: Adapter, dropout_key: jax.Array | None
) -> list[Any]:
    """Evaluates the traced program with adapted weights.

    Args:
        traced: Traced call of the function.
        indices: Leaf index of each adapted parameter, by path.
        adapter: Leaves of the adapter, by path.
        dropout_key: Random key of dropout. None: no dropout.

    Returns:
        The outputs of the program.
    """
    values: list[Any] = list(traced.input_arrays)
    for path, leaf_index in indices.items():
        index = traced.param_index[leaf_index]
        factored = _make_factored_array(path, values[index], adapter, dropout_key)
        values[index] = factored.materialize() if adapter[path].is_full else factored
    for leaf_index, index in traced.param_index.items():
        if is_quantized(values[index]):  # Dequantized where it is used.
            path, shape = traced.flat_params.paths[leaf_index], values[index].shape
            values[index] = FactoredArray(values[index], build_tensor_network(path, shape))
    # A constant output is a literal of JAX.
    outputs = eval_program(traced.program, values)
    return [jnp.asarray(control_flow.materialize_value(output)) for output in outputs]


def _make_factored_array(
    path: str, base: Any, adapter: Adapter, dropout_key: jax.Array | None
) -> FactoredArray:
    """Builds the factored form of the weight at a path, with dropout keys if there is a key."""
    leaf, dropout = adapter[path], None
    if dropout_key is not None and leaf.dropout > 0:
        batch = leaf.axes.batch
        keys = jax.random.split(
            _fold_in_path(dropout_key, path), tuple(leaf.shape[axis] for axis in batch)
        )
        dropout = (leaf.dropout, keys, batch)
    expression = make_weight_expression(adapter, path, base, dropout_key)
    return FactoredArray(
        base, build_tensor_network(path, leaf.shape, **expression._asdict(), dropout=dropout)
    )


def _fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """Derives a key from the path, so that adapting another weight changes no mask of this one."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # A legacy uint32 key.
        key = jax.random.wrap_key_data(key)
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
