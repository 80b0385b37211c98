"""Products of activations with weights: `dot_general`, and `ragged_dot` for experts."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpreter import _compat
from jlora.interpreter.factored_array import FactoredArray, call_with_bases
from jlora.interpreter.primitive_rules import (
    RULES,
    AxisRole,
    AxisRoles,
    DenseReason,
    ProductRule,
    product_dtype,
)
from jlora.interpreter.terms import (
    Axis,
    Operand,
    ProductTerm,
    WeightProduct,
    arrange,
    cast,
    contract,
    contract_shared,
    contraction_order,
    flat_size,
    is_longer,
    label_dimensions,
    reshape,
    split_axes,
)
from jlora.kernels import lora_matmul

# --- dot_general ----------------------------------------------------------------------------------


def _split_dimension_numbers(eqn: Any, side: int) -> tuple[tuple[int, ...], ...]:
    """Returns the contracting and batch dimensions of the weight, and those of the activation."""
    contracting, batch = eqn.params["dimension_numbers"]
    return contracting[side], batch[side], contracting[1 - side], batch[1 - side]


def _dot_axis_roles(eqn: Any, side: int, weight: FactoredArray) -> AxisRoles | DenseReason:
    contracting, batch, _, _ = _split_dimension_numbers(eqn, side)
    roles: AxisRoles = {}
    for place, group in enumerate(weight.axis_groups):
        role = AxisRole.OUTPUT
        if place in contracting:
            role = AxisRole.INPUT
        elif place in batch:
            role = AxisRole.BATCH
        roles.update(dict.fromkeys(group, role))
    gathered = {role for axis, role in roles.items() if axis.is_gathered}
    if gathered - {AxisRole.BATCH} and not is_matrix_lookup(roles):
        return DenseReason("looked-up rows, which are an activation")
    dtype = eqn.invars[1 - side].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return DenseReason(f"product with {dtype}")
    return roles


def is_matrix_lookup(roles: AxisRoles) -> bool:
    """Whether a weight that was looked up is a matrix for each index (an expert), and not a row."""
    own = {role for axis, role in roles.items() if not axis.is_gathered and is_longer(axis.size, 1)}
    return len(own) < len(roles) and {AxisRole.INPUT, AxisRole.OUTPUT} <= own


class DotProduct(WeightProduct):
    """`dot_general` of an activation and a weight."""

    def __init__(self, eqn: Any, side: int, weight: FactoredArray) -> None:
        self.eqn, self.side, self.path = eqn, side, weight.path
        self.contracting, self.batch, x_contracting, x_batch = _split_dimension_numbers(eqn, side)
        self.precision = eqn.params["precision"]
        groups = weight.axis_groups
        shared = {x: groups[w] for x, w in zip(x_contracting, self.contracting, strict=True)}
        shared |= {x: groups[w] for x, w in zip(x_batch, self.batch, strict=True)}
        self.x_groups = label_dimensions(eqn.invars[1 - side].aval.shape, shared)
        self.x_contracting = x_contracting
        self.input_axes = [axis for place in x_contracting for axis in self.x_groups[place]]
        x_free = [group for place, group in enumerate(self.x_groups) if place not in shared]
        used = (*self.contracting, *self.batch)
        w_free = [group for place, group in enumerate(groups) if place not in used]
        first, second = (w_free, x_free) if side == 0 else (x_free, w_free)
        self.out_groups = [*(groups[place] for place in self.batch), *first, *second]

    def label(self, x: Any) -> Operand:
        """Returns the activation as an operand."""
        return split_axes(x, self.x_groups)

    def trace_key(self) -> Hashable:
        avals = [(atom.aval.shape, atom.aval.dtype) for atom in self.eqn.invars]
        return self.side, _compat.make_eqn_key(self.eqn), tuple(avals)

    def multiply_base(self, x: Any, base: Any) -> Any:
        values = [base, x] if self.side == 0 else [x, base]
        return call_with_bases(lambda arrays: _compat.bind_eqn(self.eqn, arrays)[0], values)

    def multiply(self, x: Any, operands: Sequence[Operand], result: Any) -> Any:
        x = cast(x, product_dtype(x, self.eqn.invars[self.side].aval, result))
        update = contract(
            self.label(x),
            operands,
            self.out_axes,
            precision=self.precision,
            out_dtype=result.dtype,
        )
        return reshape(update, result.shape)

    def multiply_fused(self, x: Any, weight: FactoredArray) -> Any:
        """Returns `x W + (x A) B` from one kernel, where the device has one for it."""
        layout = self._matrix_layout(len(weight.axis_groups))
        term = self._single_term(x, weight)
        if layout is None or term is None:
            return None
        outputs, transpose_rhs = layout
        input_axes = [a for place in self.contracting for a in weight.axis_groups[place]]
        output_axes = [a for place in outputs for a in weight.axis_groups[place]]
        rank = _find_rank_axis(term, input_axes, output_axes)
        if rank is None:
            return None
        k, n = flat_size(input_axes), flat_size(output_axes)
        matrix = (n, k) if transpose_rhs else (k, n)
        batch_shape = x.shape[: len(x.shape) - len(self.x_contracting)]
        device = lora_matmul.select_kernel_device(
            jax.ShapeDtypeStruct((*batch_shape, k), x.dtype),
            jax.ShapeDtypeStruct(matrix, weight.base.dtype),
            rank.size,
            transpose_rhs=transpose_rhs,
        )
        if device is None:
            return None
        a, b = sorted(term.operands, key=lambda operand: not set(operand.axes) >= set(input_axes))
        a = reshape(cast(arrange(a, [*input_axes, rank]), x.dtype), (k, rank.size))  # (k, rank)
        b = reshape(cast(arrange(b, [rank, *output_axes]), x.dtype), (rank.size, n))  # (rank, n)

        def product(values: list[Any]) -> Any:
            x, w, a, b = values
            return lora_matmul.lora_matmul(
                x.reshape(*batch_shape, k),
                w.reshape(matrix),
                a,
                b,
                transpose_rhs=transpose_rhs,
                device=device,
            )

        out = call_with_bases(product, [x, weight.base, a, b])
        return out.reshape(self.eqn.outvars[0].aval.shape)

    def _matrix_layout(self, ndim: int) -> tuple[tuple[int, ...], bool] | None:
        """Returns the weight's output dimensions and whether it is the transposed matrix.

        None unless the activation is on the left, contracted over its last dimensions, and the
        weight is a matrix without a transpose of its entries.
        """
        x_last = tuple(range(len(self.x_groups) - len(self.x_contracting), len(self.x_groups)))
        if self.side == 0 or self.batch or self.x_contracting != x_last:
            return None
        outputs = tuple(place for place in range(ndim) if place not in self.contracting)
        if self.contracting + outputs == tuple(range(ndim)):
            return outputs, False
        return (outputs, True) if outputs + self.contracting == tuple(range(ndim)) else None

    def _single_term(self, x: Any, weight: FactoredArray) -> ProductTerm | None:
        """Returns the weight's one term, where a product of matrices in their own type suffices."""
        if len(weight.terms) != 1 or type(weight.terms[0]) is not ProductTerm:
            return None
        has_own_type = self.eqn.outvars[0].aval.dtype == x.dtype and self.precision is None
        if not has_own_type or _compat.get_varying_axes(x) or _compat.has_explicit_sharding(x):
            return None
        return weight.terms[0]


def _find_rank_axis(
    term: ProductTerm, input_axes: Sequence[Axis], output_axes: Sequence[Axis]
) -> Axis | None:
    """Returns the axis that factors `A` and `B` share, if a term is just a pair of them."""
    if len(term.operands) != 2:
        return None
    a, b = sorted(term.operands, key=lambda operand: not set(operand.axes) >= set(input_axes))
    ranks = set(a.axes) & set(b.axes)
    is_pair = set(a.axes) == {*input_axes, *ranks} and set(b.axes) == {*output_axes, *ranks}
    return next(iter(ranks)) if len(ranks) == 1 and is_pair else None


def _make_dot_product(
    eqn: Any, side: int, weight: FactoredArray, values: Sequence[Any]
) -> tuple[WeightProduct, Any]:
    return DotProduct(eqn, side, weight), jnp.asarray(values[1 - side])


RULES["dot_general"] = ProductRule(_dot_axis_roles, _make_dot_product)

# --- ragged_dot -----------------------------------------------------------------------------------

# One weight matrix for each group of rows: lhs (m, k), rhs (groups, k, n).
_RAGGED_DIMENSIONS = ((((1,), (1,)), ((), ())), (0,), (0,))


def _ragged_axis_roles(eqn: Any, side: int, weight: FactoredArray) -> AxisRoles | DenseReason:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    form = (
        (tuple(map(tuple, contracting)), tuple(map(tuple, batch))),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    has_offset = eqn.params["group_offset"] is not None
    if side != 1 or form != _RAGGED_DIMENSIONS or has_offset or weight.is_gathered:
        return DenseReason("ragged product of another form than (rows, in) x (groups, in, out)")
    group, inputs, outputs = weight.axis_groups
    return (
        dict.fromkeys(group, AxisRole.BATCH)
        | dict.fromkeys(inputs, AxisRole.INPUT)
        | dict.fromkeys(outputs, AxisRole.OUTPUT)
    )


class RaggedProduct(WeightProduct):
    """Rows sorted by group, (rows, k), times the matrix of each row's group, (groups, k, n)."""

    routing_error = "by lax.ragged_dot, whose rows are already assigned to experts"

    def __init__(self, eqn: Any, weight: FactoredArray, num_rows: int, group_sizes: Any) -> None:
        self._eqn, self.path = eqn, weight.path
        self._group_sizes = group_sizes
        self.precision = eqn.params["precision"]
        self._row = Axis(num_rows)
        self._group, self._inputs, self._outputs = weight.axis_groups
        self.x_groups = [(self._row,), self._inputs]
        self.out_groups = [(self._row,), self._outputs]

    def multiply_base(self, x: Any, base: Any) -> Any:
        return call_with_bases(
            lambda arrays: _compat.bind_eqn(self._eqn, arrays)[0], [x, base, self._group_sizes]
        )

    @functools.cached_property
    def _group_of_row(self) -> Any:
        # Rows without a group get the last one, and their results are set to zero.
        numbers = jnp.arange(flat_size(self._group))
        return jnp.repeat(numbers, self._group_sizes, total_repeat_length=self._row.size)

    def _is_grouped(self, operand: Operand) -> bool:
        return bool(set(self._group) & set(operand.axes))

    def _stack(self, operand: Operand, *groups: Sequence[Axis]) -> Any:
        """Returns the operand as (groups, ...) with one dimension for each list of axes."""
        axes = [*self._group, *(axis for group in groups for axis in group)]
        shape = (flat_size(self._group), *(flat_size(group) for group in groups))
        return reshape(arrange(operand, axes), shape)

    def label_gain(self, gain: Operand) -> Operand:
        return self._by_row(gain)

    def _by_row(self, operand: Operand) -> Operand:
        """Returns the operand with its entries for each row's group."""
        if not self._is_grouped(operand):
            return operand
        rest = [axis for axis in operand.axes if axis not in self._group]
        array = self._stack(operand, *([axis] for axis in rest))
        return Operand(array[self._group_of_row], (self._row, *rest))

    def multiply(self, x: Any, operands: Sequence[Operand], result: Any) -> Any:
        current, is_zeroed = split_axes(x, self.x_groups), False
        ends = {*self._inputs, *self._outputs}
        operands = contract_shared(operands, ends, self._group, self.precision)
        shared = [[a for a in operand.axes if a not in self._group] for operand in operands]
        for number, left in contraction_order(current.axes, shared, self.out_axes):
            operand = operands[number].map(lambda array: cast(array, x.dtype))
            summed = [axis for axis in operand.axes if axis in current.axes]
            if self._is_grouped(operand) and summed and not set(summed) & set(left):
                current, is_zeroed = self._multiply_by_group(current, operand, summed), True
                continue
            array = contract(current, [self._by_row(operand)], left, precision=self.precision)
            current = Operand(array, tuple(left))
        update = reshape(arrange(current, self.out_axes, result.dtype), result.shape)
        if is_zeroed:
            return update
        # The product with the base gives rows without a group zeros, and so must this.
        is_used = jnp.arange(self._row.size) < self._group_sizes.sum()
        return jnp.where(is_used.reshape(-1, *[1] * (update.ndim - 1)), update, 0)

    def _multiply_by_group(
        self, current: Operand, operand: Operand, summed: Sequence[Axis]
    ) -> Operand:
        """Returns the product with one matrix for each group, axes that it lacks taken as rows."""
        new = [a for a in operand.axes if a not in (*self._group, *summed)]
        middle = [a for a in current.axes if a is not self._row and a not in summed]
        rows = arrange(current, [self._row, *middle, *summed]).reshape(-1, flat_size(summed))
        array = lax.ragged_dot(
            rows,
            self._stack(operand, summed, new),
            self._group_sizes * flat_size(middle),
            precision=self.precision,
        )
        axes = (self._row, *middle, *new)
        return Operand(reshape(array, [axis.size for axis in axes]), axes)


def _make_ragged_product(
    eqn: Any, side: int, weight: FactoredArray, values: Sequence[Any]
) -> tuple[WeightProduct, Any]:
    del side
    x, _, group_sizes = values
    return RaggedProduct(eqn, weight, x.shape[0], group_sizes), x


RULES["ragged_dot_general"] = ProductRule(_ragged_axis_roles, _make_ragged_product)
