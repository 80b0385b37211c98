"""What an adapter changes in one weight: dense, as thin factors, and by its singular values."""

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
    """What an expression adds to its base, laid out like the weight.

    The terms alone where there are no gains: a sum with the base would round them.

    Args:
        path: Of the weight, for errors.
        base: The weight, in float32 or wider.
        expression: The adapted weight.

    Raises:
        ValueError: For a mixture, whose change depends on the input.
    """
    network = build_tensor_network(path, base.shape, **expression._asdict())
    if not expression.gains:
        return FactoredArray(jnp.zeros_like(base), network).materialize()
    return FactoredArray(base, network).materialize() - base


def svd_from_expression(
    path: str, leaf: AdapterLeaf, base: jax.Array, expression: Expression
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The singular triplets of the change, for each of the weight's matrices: (batch, fan_in, k),
    (batch, k) with the largest first, and (batch, k, fan_out).
    """
    thin = low_rank_factors(leaf, expression)
    if thin is None:
        return svd(
            WeightDelta(
                dense=weight_to_matrices(compute_dense_delta(path, base, expression), leaf.axes)
            )
        )
    return svd(WeightDelta(*thin))


def low_rank_factors(
    leaf: AdapterLeaf, expression: Expression, *, allow_full_rank: bool = False
) -> tuple[jax.Array, jax.Array] | None:
    """The change as a product (batch, fan_in, m) (batch, m, fan_out), where it is one of a few
    arrays with the inputs, a few with the outputs, and a small `m` between; None elsewhere.

    Args:
        leaf: Whose change it is.
        expression: What it makes of its weight.
        allow_full_rank: Whether `m` may also be as large as the weight's own rank, or larger.
    """
    special = expression.gains or expression.splits or expression.routing or expression.selection
    if special or len(expression.terms) != 1:
        return None
    batch, inputs, outputs = leaf.axes
    (term,) = expression.terms
    length: dict[Any, int] = dict(enumerate(leaf.shape))
    for array, labels in term:
        length.update(zip(labels, array.shape, strict=True))
    middle = [label for label in length if label not in range(len(leaf.shape))]
    near = [one for one in term if set(one[1]) & set(inputs)]
    far = [one for one in term if not set(one[1]) & set(inputs)]
    near_labels, far_labels = ({a for _, labels in side for a in labels} for side in (near, far))
    size = math.prod(length[label] for label in middle)
    fan_in = math.prod(length[axis] for axis in inputs)
    fan_out = math.prod(length[axis] for axis in outputs)
    crossed = near_labels & set(outputs)
    missing = (set(inputs) - near_labels) | (set(outputs) - far_labels)
    if crossed or missing or (size >= min(fan_in, fan_out) and not allow_full_rank):
        return None
    number = {label: i for i, label in enumerate(length)}

    def product(side: list[Any], kept: list[Any]) -> jax.Array:
        operands: list[Any] = []
        for array, labels in side:
            operands += [promote_to_float32(array), [number[label] for label in labels]]
        for label in kept:  # Ones for what no array of this side has.
            operands += [jnp.ones(length[label]), [number[label]]]
        return jnp.einsum(
            *operands, [number[label] for label in kept], precision=_HIGHEST_PRECISION
        )

    a, b = product(near, [*batch, *inputs, *middle]), product(far, [*batch, *middle, *outputs])
    return a.reshape(-1, fan_in, size), b.reshape(-1, size, fan_out)


class WeightDelta(NamedTuple):
    """The change of one weight, as a stack of matrices: either factors or the dense change.

    Attributes:
        a: (batch, fan_in, m).
        b: (batch, m, fan_out).
        dense: (batch, fan_in, fan_out).
    """

    a: jax.Array | None = None
    b: jax.Array | None = None
    dense: jax.Array | None = None


def get_weight_delta(adapter: Mapping[str, Any], path: str, base: Any) -> WeightDelta:
    """The change of the weight at a path.

    Factors of LoRA stay factors whatever their rank. A weight that is no matrix (a bias, a
    norm) is one column, (batch, size, 1).

    Args:
        adapter: One that `check_adapter` has passed.
        path: Of one of its weights.
        base: The weight; None where it is not at hand and `depends_on_base` says no.
    """
    leaf: AdapterLeaf = adapter[path]
    expression = make_weight_expression(
        adapter, path, None if base is None else promote_to_float32(base)
    )
    thin = low_rank_factors(leaf, expression, allow_full_rank=isinstance(leaf, LoRALeaf))
    if thin is not None and is_matrix(leaf.axes):
        return WeightDelta(*thin)
    if base is None:
        arrays = [array for term in expression.terms for array, _ in term]
        base = jnp.zeros(leaf.shape, jnp.result_type(jnp.float32, *arrays))
    change = compute_dense_delta(path, promote_to_float32(base), expression)
    return WeightDelta(dense=weight_to_matrices(change, matrix_axes(leaf)))


def is_matrix(axes: WeightAxes) -> bool:
    """Whether a weight takes inputs to outputs, so that low rank means something."""
    return bool(axes.inputs and axes.outputs)


def matrix_axes(leaf: AdapterLeaf) -> WeightAxes:
    """The axes of the weight, or all of them as inputs where it is no matrix."""
    if is_matrix(leaf.axes):
        return leaf.axes
    batch = leaf.axes.batch
    rest = tuple(axis for axis in range(len(leaf.shape)) if axis not in batch)
    return WeightAxes(batch, rest, ())


def reshape_to_weight(matrices: jax.Array, leaf: AdapterLeaf) -> jax.Array:
    """A dense change, (batch, fan_in, fan_out), laid out like the leaf's weight."""
    return matrices_to_weight(matrices, leaf.shape, matrix_axes(leaf))


def materialize_delta(delta: WeightDelta) -> jax.Array:
    """The dense change, of a stack or of one of its matrices."""
    if delta.dense is not None:
        return delta.dense
    assert delta.a is not None
    assert delta.b is not None
    return jnp.matmul(delta.a, delta.b, precision=_HIGHEST_PRECISION)


def svd(delta: WeightDelta) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The singular vectors and values, of a stack or of one of its matrices.

    From factors by their QR decompositions: nothing of the weight's size is formed.
    """
    if delta.dense is not None:
        u, s, vt = jnp.linalg.svd(delta.dense, full_matrices=False)
        return u, s, vt
    assert delta.a is not None
    assert delta.b is not None
    left, inner_a = jnp.linalg.qr(delta.a)
    right, inner_b = jnp.linalg.qr(jnp.swapaxes(delta.b, -1, -2))
    core = jnp.matmul(inner_a, jnp.swapaxes(inner_b, -1, -2), precision=_HIGHEST_PRECISION)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    vt = jnp.matmul(vt, jnp.swapaxes(right, -1, -2), precision=_HIGHEST_PRECISION)
    return jnp.matmul(left, u, precision=_HIGHEST_PRECISION), s, vt


class _MissingBaseError(Exception):
    """Something asked for the numbers of a base that is not there."""


class _MissingBase:
    """Stands where the base would be."""

    def __getattr__(self, name: str) -> Any:
        raise _MissingBaseError(name)


def depends_on_base(adapter: Mapping[str, Any], path: str) -> bool:
    """Whether the change of the weight at a path depends on the weight, as DoRA's, HiRA's and IA3's
    do.
    """
    absent = _MissingBase()
    try:
        expression = make_weight_expression(adapter, path, absent)
    except _MissingBaseError:
        return True
    arrays = (array for term in expression.terms for array, _ in term)
    return bool(expression.gains) or any(array is absent for array in arrays)
