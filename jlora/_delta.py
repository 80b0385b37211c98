"""The update of one weight by an adapter: materialized, as low-rank factors, and its SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters.base import AdapterLeaf, adapt_weight
from jlora.adapters.lora import LoRALeaf
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import (
    Axis,
    Operand,
    ProductTerm,
    WeightAxes,
    arrange,
    contract,
    flat_size,
    widest_dtype,
)
from jlora.interpreter.weight import (
    divide_by_size,
    matrices_to_weight,
    promote_to_float32,
    weight_to_matrices,
)

_HIGHEST_PRECISION = jax.lax.Precision.HIGHEST


def compute_dense_delta(weight: FactoredArray) -> jax.Array:
    """Returns the change of an adapted weight, with the weight's shape.

    That is the terms alone where there are no gains: a sum with the base would round them.

    Args:
        weight: Adapted weight, its base in float32 or wider.

    Raises:
        ValueError: For a mixture, whose change depends on the input.
    """
    if not weight.gains:
        return weight.with_base(jnp.zeros_like(weight.base)).materialize()
    return weight.materialize() - weight.base


def svd_of_change(
    leaf: AdapterLeaf, weight: FactoredArray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the singular values and vectors of the change, for each of the weight's matrices.

    Args:
        leaf: Adapter of the weight.
        weight: Adapted weight, its base in float32 or wider.

    Returns:
        Left vectors (batch, fan_in, k), values (batch, k) with the largest first, and right vectors
        (batch, k, fan_out).
    """
    factors = low_rank_factors(leaf, weight)
    if factors is None:
        dense = weight_to_matrices(compute_dense_delta(weight), leaf.axes)
        return svd(WeightDelta(dense=dense))
    return svd(WeightDelta(*factors))


def low_rank_factors(
    leaf: AdapterLeaf, weight: FactoredArray, *, allow_full_rank: bool = False
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the change as factors (batch, fan_in, m) and (batch, m, fan_out).

    None where it is no product of a few arrays with the inputs and a few with the outputs, with a
    small `m` between them.

    Args:
        leaf: Adapter of the weight.
        weight: Adapted weight.
        allow_full_rank: Whether `m` may be as large as the weight's own rank, or larger.
    """
    is_split = any(len(group) != 1 for group in weight.axis_groups)
    if weight.gains or is_split or len(weight.terms) != 1:
        return None
    (term,) = weight.terms
    if not isinstance(term, ProductTerm):
        return None
    batch, inputs, outputs = ([weight.axes[place] for place in group] for group in leaf.axes)
    axes = dict.fromkeys(axis for operand in term.operands for axis in operand.axes)
    middle = [axis for axis in axes if axis not in weight.axes]
    near = [operand for operand in term.operands if set(operand.axes) & set(inputs)]
    far = [operand for operand in term.operands if not set(operand.axes) & set(inputs)]
    near_axes, far_axes = ({a for operand in side for a in operand.axes} for side in (near, far))
    is_crossed = bool(near_axes & set(outputs))
    is_partial = bool((set(inputs) - near_axes) | (set(outputs) - far_axes))
    fan_in, fan_out, size = flat_size(inputs), flat_size(outputs), flat_size(middle)
    is_large = size >= min(fan_in, fan_out) and not allow_full_rank
    if is_crossed or is_partial or is_large:
        return None
    a = _multiply_operands(near, [*batch, *inputs, *middle])
    b = _multiply_operands(far, [*batch, *middle, *outputs])
    return a.reshape(-1, fan_in, size), b.reshape(-1, size, fan_out)


def _multiply_operands(operands: Sequence[Operand], out_axes: Sequence[Axis]) -> jax.Array:
    """Returns the product of operands in float32 or wider, with ones along axes they lack."""
    wide = [operand.map(promote_to_float32) for operand in operands]
    if not wide:
        return jnp.ones([axis.size for axis in out_axes])
    first, *others = wide
    if not others:
        return arrange(first, out_axes)
    return contract(first, others, out_axes, precision=_HIGHEST_PRECISION, cast_operands=False)


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
    weight = adapt_weight(adapter, path, None if base is None else promote_to_float32(base))
    factors = low_rank_factors(leaf, weight, allow_full_rank=isinstance(leaf, LoRALeaf))
    if factors is not None and is_matrix(leaf.axes):
        return WeightDelta(*factors)
    if base is None:
        arrays = jax.tree.leaves(weight.terms)
        weight = weight.with_base(jnp.zeros(leaf.shape, widest_dtype(jnp.float32, *arrays)))
    update = compute_dense_delta(weight)
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
        matrices, size = divide_by_size(delta.dense)
        u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
        return u, s * size[..., 0], vt
    assert delta.a is not None
    assert delta.b is not None
    (a, size_a), (b, size_b) = divide_by_size(delta.a), divide_by_size(delta.b)
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    core = jnp.matmul(r_a, jnp.swapaxes(r_b, -1, -2), precision=_HIGHEST_PRECISION)  # (batch, m, m)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    vt = jnp.matmul(vt, jnp.swapaxes(q_b, -1, -2), precision=_HIGHEST_PRECISION)
    s = s * size_a[..., 0] * size_b[..., 0]
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
        weight = adapt_weight(adapter, path, missing_base)
    except _MissingBaseError:
        return True
    return bool(weight.gains)
