"""The update of one weight by an adapter: materialized, as low-rank factors, and its SVD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters.base import AdapterLeaf, Expression, make_weight_expression
from jlora.adapters.lora import LoRALeaf
from jlora.interpreter.factored_array import FactoredArray, build_tensor_network
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import matrices_to_weight, promote_to_float32, weight_to_matrices

_HIGHEST_PRECISION = jax.lax.Precision.HIGHEST


def compute_dense_delta(path: str, base: jax.Array, expression: Expression) -> jax.Array:
    """Returns the materialized update of an adapted weight, in the weight's shape.

    Without gains it is computed from the terms alone, because a sum with the base would round them.

    Args:
        path: Path of the weight, for errors.
        base: The weight, in float32 or wider.
        expression: The adapted weight.

    Raises:
        ValueError: The update depends on the input, as that of `LoRAMoE`.
    """
    network = build_tensor_network(path, base.shape, **expression._asdict())
    if not expression.gains:
        return FactoredArray(jnp.zeros_like(base), network).materialize()
    return FactoredArray(base, network).materialize() - base


def svd_from_expression(
    path: str, leaf: AdapterLeaf, base: jax.Array, expression: Expression
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the singular triplets of the update, for each of the weight's matrices.

    Returns:
        `u` (batch, fan_in, k), `s` (batch, k) in descending order, and `vt` (batch, k, fan_out).
    """
    factors = low_rank_factors(leaf, expression)
    if factors is not None:
        return svd(WeightDelta(*factors))
    update = compute_dense_delta(path, base, expression)
    return svd(WeightDelta(dense=weight_to_matrices(update, leaf.axes)))


def low_rank_factors(
    leaf: AdapterLeaf, expression: Expression, *, allow_full_rank: bool = False
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the update as a product (batch, fan_in, m) (batch, m, fan_out), if it is one.

    It is one if each array of the expression's only term has either input or output axes, and the
    contracted axes between them, of size `m`, are small.

    Args:
        leaf: Adapter of the weight.
        expression: The adapted weight.
        allow_full_rank: Whether `m` may be as large as the weight's largest possible rank, or
            larger.

    Returns:
        The factors; None when the update is not such a product.
    """
    special = expression.gains or expression.splits or expression.routing or expression.selection
    if special or len(expression.terms) != 1:
        return None
    batch, inputs, outputs = leaf.axes
    (term,) = expression.terms
    sizes: dict[Any, int] = dict(enumerate(leaf.shape))
    for array, labels in term:
        sizes.update(zip(labels, array.shape, strict=True))
    contracted = [label for label in sizes if label not in range(len(leaf.shape))]
    a_arrays = [labeled for labeled in term if set(labeled[1]) & set(inputs)]
    b_arrays = [labeled for labeled in term if not set(labeled[1]) & set(inputs)]
    a_labels = {label for _, labels in a_arrays for label in labels}
    b_labels = {label for _, labels in b_arrays for label in labels}
    rank = math.prod(sizes[label] for label in contracted)
    fan_in = math.prod(sizes[axis] for axis in inputs)
    fan_out = math.prod(sizes[axis] for axis in outputs)
    mixed = a_labels & set(outputs)
    missing = (set(inputs) - a_labels) | (set(outputs) - b_labels)
    if mixed or missing or (rank >= min(fan_in, fan_out) and not allow_full_rank):
        return None
    number = {label: i for i, label in enumerate(sizes)}

    def product(arrays: list[Any], out_labels: list[Any]) -> jax.Array:
        operands: list[Any] = []
        for array, labels in arrays:
            operands += [promote_to_float32(array), [number[label] for label in labels]]
        for label in out_labels:  # Ones, for axes that none of the arrays has.
            operands += [jnp.ones(sizes[label]), [number[label]]]
        return jnp.einsum(
            *operands, [number[label] for label in out_labels], precision=_HIGHEST_PRECISION
        )

    a = product(a_arrays, [*batch, *inputs, *contracted])
    b = product(b_arrays, [*batch, *contracted, *outputs])
    return a.reshape(-1, fan_in, rank), b.reshape(-1, rank, fan_out)


class WeightDelta(NamedTuple):
    """The update of one weight as a stack of matrices, either factored or materialized.

    Attributes:
        a: (batch, fan_in, m); None for a materialized update.
        b: (batch, m, fan_out); None for a materialized update.
        dense: (batch, fan_in, fan_out); None for a factored update.
    """

    a: jax.Array | None = None
    b: jax.Array | None = None
    dense: jax.Array | None = None


def get_weight_delta(adapter: Mapping[str, Any], path: str, base: Any) -> WeightDelta:
    """Returns the update of the weight at a path.

    Factors of LoRA stay factored at any rank. A weight that is not a matrix (a bias, a norm) is one
    column, (batch, size, 1).

    Args:
        adapter: Adapter that `check_adapter` has validated.
        path: Path of one of its weights.
        base: The weight. None: not available, which requires that `depends_on_base` is False.
    """
    leaf: AdapterLeaf = adapter[path]
    expression = make_weight_expression(
        adapter, path, None if base is None else promote_to_float32(base)
    )
    factors = low_rank_factors(leaf, expression, allow_full_rank=isinstance(leaf, LoRALeaf))
    if factors is not None and is_matrix(leaf.axes):
        return WeightDelta(*factors)
    if base is None:
        arrays = [array for term in expression.terms for array, _ in term]
        base = jnp.zeros(leaf.shape, jnp.result_type(jnp.float32, *arrays))
    update = compute_dense_delta(path, promote_to_float32(base), expression)
    return WeightDelta(dense=weight_to_matrices(update, matrix_axes(leaf)))


def is_matrix(axes: WeightAxes) -> bool:
    """Whether a weight maps inputs to outputs, so that a low rank is defined."""
    return bool(axes.inputs and axes.outputs)


def matrix_axes(leaf: AdapterLeaf) -> WeightAxes:
    """Returns the axes of a matrix; for other weights, all but the batch axes are inputs."""
    if is_matrix(leaf.axes):
        return leaf.axes
    batch = leaf.axes.batch
    rest = tuple(axis for axis in range(len(leaf.shape)) if axis not in batch)
    return WeightAxes(batch, rest, ())


def reshape_to_weight(matrices: jax.Array, leaf: AdapterLeaf) -> jax.Array:
    """Reshapes a materialized update, (batch, fan_in, fan_out), to the leaf's weight."""
    return matrices_to_weight(matrices, leaf.shape, matrix_axes(leaf))


def materialize_delta(delta: WeightDelta) -> jax.Array:
    """Returns the materialized update, of a stack or of one of its matrices."""
    if delta.dense is not None:
        return delta.dense
    assert delta.a is not None
    assert delta.b is not None
    return jnp.matmul(delta.a, delta.b, precision=_HIGHEST_PRECISION)


def svd(delta: WeightDelta) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the singular vectors and values, of a stack or of one of its matrices.

    For factors it uses their QR decompositions: no array of the weight's size is formed.
    """
    if delta.dense is not None:
        u, s, vt = jnp.linalg.svd(delta.dense, full_matrices=False)
        return u, s, vt
    assert delta.a is not None
    assert delta.b is not None
    q_a, r_a = jnp.linalg.qr(delta.a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(delta.b, -1, -2))
    core = jnp.matmul(r_a, jnp.swapaxes(r_b, -1, -2), precision=_HIGHEST_PRECISION)  # (batch, m, m)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    vt = jnp.matmul(vt, jnp.swapaxes(q_b, -1, -2), precision=_HIGHEST_PRECISION)
    return jnp.matmul(q_a, u, precision=_HIGHEST_PRECISION), s, vt


class _MissingBaseError(Exception):
    """An attribute of a missing base was read."""


class _MissingBase:
    """Placeholder of a base, which fails when it is read."""

    def __getattr__(self, name: str) -> Any:
        raise _MissingBaseError(name)


def depends_on_base(adapter: Mapping[str, Any], path: str) -> bool:
    """Whether the update of the weight at a path depends on the weight.

    Those of DoRA, HiRA and IA3 do.
    """
    missing_base = _MissingBase()
    try:
        expression = make_weight_expression(adapter, path, missing_base)
    except _MissingBaseError:
        return True
    arrays = (array for term in expression.terms for array, _ in term)
    return bool(expression.gains) or any(array is missing_base for array in arrays)
