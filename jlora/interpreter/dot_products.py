"""Product rules of `dot_general` and `ragged_dot_general`, and the roles of axes in products.

A product with a factored weight is the equation on the base, plus `(x A) B` for every term, times
the gains. Where the device has a fused kernel for base and update, `dot_general` uses it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpreter import _compat, base_weight
from jlora.interpreter.einsum import (
    Axis,
    Operand,
    contract,
    contract_shared,
    contraction_order,
    flat_size,
)
from jlora.interpreter.factored_array import FactoredArray, TensorNetwork, Term
from jlora.interpreter.terms import (
    add_terms,
    apply_with_gains,
    label_activation_axes,
    product_dtype,
    split_axes,
    tap_input_moments,
)
from jlora.kernels import lora_matmul


class AxisRole(enum.Enum):
    """Role of a weight axis in a product."""

    INPUT = "input"  # Contracted with the activation.
    WINDOW = "window"  # Contracted at every position of a convolution.
    OUTPUT = "output"  # Appears in the result.
    BATCH = "batch"  # Paired with an axis of the activation: one matrix per index.


class DenseReason(str):
    """Reason for which a use of a weight needs the materialized weight."""


AxisRoles = dict[Axis, AxisRole]


def has_mixed_gain(network: TensorNetwork, roles: AxisRoles) -> bool:
    """Whether a gain can scale neither the activation nor the result.

    Such a gain has both contracted and output axes, or a window axis.
    """
    for gain in network.gains:
        gain_roles = {roles[axis] for axis in gain.axes} - {AxisRole.BATCH}
        if gain_roles - {AxisRole.OUTPUT} and gain_roles - {AxisRole.INPUT}:
            return True
    return False


class ProductRule(NamedTuple):
    """How one primitive multiplies with a factored weight.

    Attributes:
        get_axis_roles: Function `(eqn, side, network)` that returns the roles of the network axes,
            or the reason for which the weight must be materialized.
        multiply: Function `(eqn, bind, side, values)` that returns the result. `values[side]` is
            the factored weight, and `bind` evaluates the equation on other values.
    """

    get_axis_roles: Callable[[Any, int, TensorNetwork], AxisRoles | DenseReason]
    multiply: Callable[[Any, Callable[..., Any], int, Sequence[Any]], Any]


def _split_dimension_numbers(eqn: Any, side: int) -> tuple[tuple[int, ...], ...]:
    """Returns (weight contracting, weight batch, other contracting, other batch) axes."""
    contracting, batch = eqn.params["dimension_numbers"]
    return contracting[side], batch[side], contracting[1 - side], batch[1 - side]


def _dot_axis_roles(eqn: Any, side: int, network: TensorNetwork) -> AxisRoles | DenseReason:
    contracting, batch, _, _ = _split_dimension_numbers(eqn, side)
    roles = {}
    for axis, group in enumerate(network.axis_groups):
        role = (
            AxisRole.INPUT
            if axis in contracting
            else AxisRole.BATCH
            if axis in batch
            else AxisRole.OUTPUT
        )
        roles.update(dict.fromkeys(group, role))
    if any(label.is_gathered and role is not AxisRole.BATCH for label, role in roles.items()):
        return DenseReason("looked-up rows, which are an activation")
    if not jnp.issubdtype(eqn.invars[1 - side].aval.dtype, jnp.floating):
        return DenseReason(f"product with {eqn.invars[1 - side].aval.dtype}")
    return roles


def _eval_dot_general(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    factored, x = values[side], values[1 - side]
    network: TensorNetwork = factored.network
    contracting, batch, x_contracting, x_batch = _split_dimension_numbers(eqn, side)
    shared = dict(zip(x_contracting, contracting, strict=True)) | dict(
        zip(x_batch, batch, strict=True)
    )
    x_groups = label_activation_axes(
        eqn.invars[1 - side].aval.shape, {i: network.axis_groups[w] for i, w in shared.items()}
    )
    x_free = [group for axis, group in enumerate(x_groups) if axis not in shared]
    weight_free = [
        g for axis, g in enumerate(network.axis_groups) if axis not in (*contracting, *batch)
    ]
    lhs_free, rhs_free = (weight_free, x_free) if side == 0 else (x_free, weight_free)
    out_groups = [*(network.axis_groups[axis] for axis in batch), *lhs_free, *rhs_free]

    out_labels = [label for group in out_groups for label in group]

    def apply_product(x: Any) -> Any:
        fused = _fused_kernel_product(eqn, side, x, factored, x_groups)
        if fused is not None:
            return fused
        result = bind(factored.base, x) if side == 0 else bind(x, factored.base)
        x = jnp.asarray(x).astype(product_dtype(x, factored.base, result))
        return add_terms(
            result, factored, split_axes(x, x_groups), out_labels, eqn.params["precision"]
        )

    if network.moment_taps:
        contracted = [label for axis in x_contracting for label in x_groups[axis]]
        x = tap_input_moments(split_axes(jnp.asarray(x), x_groups), network, contracted).reshape(
            x.shape
        )
    return apply_with_gains(network.gains, x, x_groups, out_groups, apply_product)


def _fused_kernel_product(
    eqn: Any, side: int, x: Any, factored: FactoredArray, groups: Sequence[tuple[Axis, ...]]
) -> Any:
    """Computes base product and update in one kernel, or returns None where none applies."""
    network = factored.network
    contracting, batch, x_contracting, _ = _split_dimension_numbers(eqn, side)
    output_dims = tuple(axis for axis in range(len(network.axis_groups)) if axis not in contracting)
    last_dims = tuple(range(len(groups) - len(x_contracting), len(groups)))
    # The kernels need the activation on the left, its contracted axes last, and W as a matrix in
    # its own layout.
    if side == 0 or batch or x_contracting != last_dims or _needs_general_path(eqn, x, factored):
        return None
    if contracting + output_dims == tuple(range(len(network.axis_groups))):
        transpose_rhs = False
    elif output_dims + contracting == tuple(range(len(network.axis_groups))):
        transpose_rhs = True
    else:
        return None
    inputs = [label for axis in contracting for label in network.axis_groups[axis]]
    outputs = [label for axis in output_dims for label in network.axis_groups[axis]]
    factors = _get_lora_factors(network, inputs, outputs)
    if factors is None:
        return None
    a, b = (factor.astype(x.dtype) for factor in factors)
    k, n = flat_size(inputs), flat_size(outputs)
    w_shape = (n, k) if transpose_rhs else (k, n)
    x_matrix = jax.ShapeDtypeStruct((*x.shape[: len(x.shape) - len(last_dims)], k), x.dtype)
    w = jax.ShapeDtypeStruct(w_shape, factored.base.dtype)
    device = lora_matmul.select_kernel_device(x_matrix, w, a.shape[-1], transpose_rhs=transpose_rhs)
    if device is None:
        return None

    def apply_kernel(values: list[Any]) -> Any:
        x, w, a, b = values
        return lora_matmul.lora_matmul(
            x.reshape(x_matrix.shape),
            w.reshape(w_shape),
            a,
            b,
            transpose_rhs=transpose_rhs,
            device=device,
        )

    out = base_weight.apply_rematerialized(apply_kernel, [x, factored.base, a, b])
    return out.reshape(eqn.outvars[0].aval.shape)


def _needs_general_path(eqn: Any, x: Any, factored: FactoredArray) -> bool:
    """Whether the product has more than two matrices of one type and one update."""
    terms = factored.network.terms
    return (
        len(terms) != 1
        or terms[0].dropout is not None
        or terms[0].routing is not None
        or terms[0].select is not None
        or eqn.params["precision"] is not None
        or eqn.outvars[0].aval.dtype != x.dtype
        or bool(_compat.get_varying_axes(x))
        or _compat.has_explicit_sharding(x)
    )


def _get_lora_factors(
    network: TensorNetwork, input_axes: Sequence[Axis], output_axes: Sequence[Axis]
) -> tuple[Any, Any] | None:
    """Returns `A` (k, rank) and `B` (rank, n) of a network with one such term, else None."""
    operands = network.terms[0].operands
    if len(operands) != 2:
        return None
    a, b = sorted(operands, key=lambda operand: not set(operand.axes) >= set(input_axes))
    ranks = set(a.axes) & set(b.axes)
    if (
        len(ranks) != 1
        or set(a.axes) != {*input_axes, *ranks}
        or set(b.axes) != {*output_axes, *ranks}
    ):
        return None
    (rank,) = ranks
    return (
        contract(a, (), [*input_axes, rank]).reshape(-1, rank.size),
        contract(b, (), [rank, *output_axes]).reshape(rank.size, -1),
    )


DOT_GENERAL_RULE = ProductRule(_dot_axis_roles, _eval_dot_general)

# One weight matrix per group of rows: lhs (m, k), rhs (groups, k, n).
_GROUPED_DIMENSION_NUMBERS = ((((1,), (1,)), ((), ())), (0,), (0,))


def _ragged_axis_roles(eqn: Any, side: int, network: TensorNetwork) -> AxisRoles | DenseReason:
    dimension_numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = dimension_numbers.dot_dimension_numbers
    dimension_form = (
        (tuple(map(tuple, contracting)), tuple(map(tuple, batch))),
        tuple(dimension_numbers.lhs_ragged_dimensions),
        tuple(dimension_numbers.rhs_group_dimensions),
    )
    if (
        side != 1
        or dimension_form != _GROUPED_DIMENSION_NUMBERS
        or eqn.params["group_offset"] is not None
        or network.is_gathered
    ):
        return DenseReason("ragged product of another form than (rows, in) x (groups, in, out)")
    group, inputs, outputs = network.axis_groups
    return (
        dict.fromkeys(group, AxisRole.BATCH)
        | dict.fromkeys(inputs, AxisRole.INPUT)
        | dict.fromkeys(outputs, AxisRole.OUTPUT)
    )


def _eval_ragged_dot(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    """Multiplies each row with the matrix of its group, one operand of a term after another."""
    x, factored, group_sizes = values
    network: TensorNetwork = factored.network.apply_selections()
    if any(term.routing is not None for term in network.terms):
        raise ValueError(
            f"LoRAMoE on {network.path!r} cannot be used by lax.ragged_dot, whose rows are already "
            f"assigned to experts. Exclude this weight from the adapter rules."
        )
    ragged_terms = _RaggedDotTerms(network, x.shape[0], group_sizes, eqn.params["precision"])

    def apply_product(x: Any) -> Any:
        total = bind(x, factored.base, group_sizes)
        for index, term in enumerate(network.terms):
            rows = x if term.dropout is None else term.dropout(x, index)
            total = total + ragged_terms.compute_update(rows, term, total.dtype).reshape(
                total.shape
            )
        return total

    gains = [ragged_terms.gather_by_token(gain) for gain in network.gains]
    x_groups, out_groups = (
        [(ragged_terms.token_axis,), ragged_terms.input_axes],
        [(ragged_terms.token_axis,), ragged_terms.output_axes],
    )
    return apply_with_gains(gains, x, x_groups, out_groups, apply_product)


class _RaggedDotTerms:
    """Products of rows, sorted by group, with the terms of a stack of one matrix per group.

    Attributes:
        token_axis: Axis of the rows.
        input_axes: Contracted axes of the network.
        output_axes: Output axes of the network.
    """

    def __init__(
        self, network: TensorNetwork, num_tokens: int, group_sizes: Any, precision: Any
    ) -> None:
        self.token_axis = Axis(num_tokens)
        self._group_axes, self.input_axes, self.output_axes = network.axis_groups
        self._group_sizes = group_sizes
        self._precision = precision

    @functools.cached_property
    def _group_ids(self) -> Any:
        # Rows without a group get the last one; their result is set to zero.
        group_ids = jnp.arange(flat_size(self._group_axes))
        return jnp.repeat(group_ids, self._group_sizes, total_repeat_length=self.token_axis.size)

    def _has_group_axis(self, operand: Operand) -> bool:
        return bool(set(self._group_axes) & set(operand.axes))

    def _reshape_by_group(self, operand: Operand, *axis_lists: Sequence[Axis]) -> Any:
        """Lays out the operand with its groups first, then one array axis per list of axes."""
        array = contract(
            operand, (), [*self._group_axes, *(axis for axes in axis_lists for axis in axes)]
        )
        return array.reshape(flat_size(self._group_axes), *(flat_size(axes) for axes in axis_lists))

    def gather_by_token(self, operand: Operand) -> Operand:
        """Gathers the entries of the group of each row, (rows, ...)."""
        if not self._has_group_axis(operand):
            return operand
        other_axes = [axis for axis in operand.axes if axis not in self._group_axes]
        array = self._reshape_by_group(operand, *([axis] for axis in other_axes))
        return Operand(array[self._group_ids], (self.token_axis, *other_axes))

    def compute_update(self, x: Any, term: Term, dtype: Any) -> Any:
        """Computes the update of a term, (rows, *outputs)."""
        current, is_masked = split_axes(x, [(self.token_axis,), self.input_axes]), False
        ends = {*self.input_axes, *self.output_axes}
        operands = contract_shared(term.operands, ends, self._group_axes, self._precision)
        operand_axes = [
            [a for a in operand.axes if a not in self._group_axes] for operand in operands
        ]
        for index, out_axes in contraction_order(
            current.axes, operand_axes, [self.token_axis, *self.output_axes]
        ):
            operand = operands[index].map(lambda array: array.astype(x.dtype))
            contracted = [axis for axis in operand.axes if axis in current.axes]
            if self._has_group_axis(operand) and contracted and not set(contracted) & set(out_axes):
                current, is_masked = self._ragged_matmul(current, operand, contracted), True
                continue
            array = contract(
                current, [self.gather_by_token(operand)], out_axes, precision=self._precision
            )
            current = Operand(array, tuple(out_axes))
        update = contract(current, (), [self.token_axis, *self.output_axes], out_dtype=dtype)
        if is_masked:
            return update
        # The product with the base is zero for rows without a group, and so must be the update.
        has_group = jnp.arange(self.token_axis.size) < self._group_sizes.sum()
        return jnp.where(has_group.reshape(-1, *[1] * len(self.output_axes)), update, 0)

    def _ragged_matmul(
        self, current: Operand, operand: Operand, contracted_axes: Sequence[Axis]
    ) -> Operand:
        """Multiplies with one matrix per group; other axes of `current` are flattened into rows."""
        new_axes = [a for a in operand.axes if a not in (*self._group_axes, *contracted_axes)]
        row_axes = [
            a for a in current.axes if a is not self.token_axis and a not in contracted_axes
        ]
        rows = contract(current, (), [self.token_axis, *row_axes, *contracted_axes]).reshape(
            -1, flat_size(contracted_axes)
        )
        array = lax.ragged_dot(
            rows,
            self._reshape_by_group(operand, contracted_axes, new_axes),
            self._group_sizes * flat_size(row_axes),
            precision=self._precision,
        )
        axes = (self.token_axis, *row_axes, *new_axes)
        return Operand(array.reshape([axis.size for axis in axes]), axes)


RAGGED_DOT_RULE = ProductRule(_ragged_axis_roles, _eval_ragged_dot)
