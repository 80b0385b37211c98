"""What an adapter changes in one weight: dense, as thin factors, and by its singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters.lora import LoRALeaf
from jlora.adapters.protocol import (
    AdapterLeaf,
    Expression,
    as_matrices,
    expression_of,
    from_matrices,
    wide,
)
from jlora.factored.network import Factored, build
from jlora.factored.probe import Axes

_EXACT = jax.lax.Precision.HIGHEST


def difference(path: str, base: jax.Array, expression: Expression) -> jax.Array:
    """What an expression adds to its base, laid out like the weight.

    The terms alone where there are no gains: a sum with the base would round them.

    Args:
        path: Of the weight, for errors.
        base: The weight, in float32 or wider.
        expression: The adapted weight.

    Raises:
        ValueError: For a mixture, whose change depends on the input.
    """
    network = build(path, base.shape, **expression._asdict())
    if not expression.gains:
        return Factored(jnp.zeros_like(base), network).dense()
    return Factored(base, network).dense() - base


def decomposed(
    path: str, leaf: AdapterLeaf, base: jax.Array, expression: Expression
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The singular triplets of the change, for each of the weight's matrices: (batch, fan_in, k),
    (batch, k) with the largest first, and (batch, k, fan_out).
    """
    thin = thin_factors(leaf, expression)
    if thin is None:
        return triplets(Change(dense=as_matrices(difference(path, base, expression), leaf.axes)))
    return triplets(Change(*thin))


def thin_factors(
    leaf: AdapterLeaf, expression: Expression, *, any_rank: bool = False
) -> tuple[jax.Array, jax.Array] | None:
    """The change as a product (batch, fan_in, m) (batch, m, fan_out), where it is one of a few
    arrays with the inputs, a few with the outputs, and a small `m` between; None elsewhere.

    Args:
        leaf: Whose change it is.
        expression: What it makes of its weight.
        any_rank: Whether `m` may also be as large as the weight's own rank, or larger.
    """
    special = expression.gains or expression.splits or expression.gate or expression.pick
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
    if crossed or missing or (size >= min(fan_in, fan_out) and not any_rank):
        return None
    number = {label: i for i, label in enumerate(length)}

    def product(side: list[Any], kept: list[Any]) -> jax.Array:
        operands: list[Any] = []
        for array, labels in side:
            operands += [wide(array), [number[label] for label in labels]]
        for label in kept:  # Ones for what no array of this side has.
            operands += [jnp.ones(length[label]), [number[label]]]
        return jnp.einsum(*operands, [number[label] for label in kept], precision=_EXACT)

    a, b = product(near, [*batch, *inputs, *middle]), product(far, [*batch, *middle, *outputs])
    return a.reshape(-1, fan_in, size), b.reshape(-1, size, fan_out)


# --- changes as matrices -------------------------------------------------------------------------


class Change(NamedTuple):
    """The change of one weight, as a stack of matrices: either factors or the dense change.

    Attributes:
        a: (batch, fan_in, m).
        b: (batch, m, fan_out).
        dense: (batch, fan_in, fan_out).
    """

    a: jax.Array | None = None
    b: jax.Array | None = None
    dense: jax.Array | None = None


def change_of(adapter: Mapping[str, Any], path: str, base: Any) -> Change:
    """The change of the weight at a path.

    Factors of LoRA stay factors whatever their rank. A weight that is no matrix (a bias, a
    norm) is one column, (batch, size, 1).

    Args:
        adapter: One that `check_adapter` has passed.
        path: Of one of its weights.
        base: The weight; None where it is not at hand and `looks_at_base` says no.
    """
    leaf: AdapterLeaf = adapter[path]
    expression = expression_of(adapter, path, None if base is None else wide(base))
    thin = thin_factors(leaf, expression, any_rank=isinstance(leaf, LoRALeaf))
    if thin is not None and is_matrix(leaf.axes):
        return Change(*thin)
    if base is None:
        arrays = [array for term in expression.terms for array, _ in term]
        base = jnp.zeros(leaf.shape, jnp.result_type(jnp.float32, *arrays))
    change = difference(path, wide(base), expression)
    return Change(dense=as_matrices(change, matrix_axes(leaf)))


def is_matrix(axes: Axes) -> bool:
    """Whether a weight takes inputs to outputs, so that low rank means something."""
    return bool(axes.inputs and axes.outputs)


def matrix_axes(leaf: AdapterLeaf) -> Axes:
    """The axes of the weight, or all of them as inputs where it is no matrix."""
    if is_matrix(leaf.axes):
        return leaf.axes
    batch = leaf.axes.batch
    rest = tuple(axis for axis in range(len(leaf.shape)) if axis not in batch)
    return Axes(batch, rest, ())


def as_weight(matrices: jax.Array, leaf: AdapterLeaf) -> jax.Array:
    """A dense change, (batch, fan_in, fan_out), laid out like the leaf's weight."""
    return from_matrices(matrices, leaf.shape, matrix_axes(leaf))


def dense_of(change: Change) -> jax.Array:
    """The dense change, of a stack or of one of its matrices."""
    if change.dense is not None:
        return change.dense
    assert change.a is not None
    assert change.b is not None
    return jnp.matmul(change.a, change.b, precision=_EXACT)


def triplets(change: Change) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The singular vectors and values, of a stack or of one of its matrices.

    From factors by their QR decompositions: nothing of the weight's size is formed.
    """
    if change.dense is not None:
        u, s, vt = jnp.linalg.svd(change.dense, full_matrices=False)
        return u, s, vt
    assert change.a is not None
    assert change.b is not None
    left, inner_a = jnp.linalg.qr(change.a)
    right, inner_b = jnp.linalg.qr(jnp.swapaxes(change.b, -1, -2))
    core = jnp.matmul(inner_a, jnp.swapaxes(inner_b, -1, -2), precision=_EXACT)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    vt = jnp.matmul(vt, jnp.swapaxes(right, -1, -2), precision=_EXACT)
    return jnp.matmul(left, u, precision=_EXACT), s, vt


# --- families that look at the base --------------------------------------------------------------


class _BaseNeeded(Exception):
    """Something asked for the numbers of a base that is not there."""


class _Absent:
    """Stands where the base would be."""

    def __getattr__(self, name: str) -> Any:
        raise _BaseNeeded(name)


def looks_at_base(adapter: Mapping[str, Any], path: str) -> bool:
    """Whether the change of the weight at a path depends on the weight, as DoRA's, HiRA's and IA3's
    do.
    """
    absent = _Absent()
    try:
        expression = expression_of(adapter, path, absent)
    except _BaseNeeded:
        return True
    arrays = (array for term in expression.terms for array, _ in term)
    return bool(expression.gains) or any(array is absent for array in arrays)
