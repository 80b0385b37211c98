"""`dot_general`: a weight as one side of a matrix product or contraction."""

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
    """What an axis of a weight does in a product."""

    INPUT = "input"  # Contracted with the activation.
    WINDOW = "window"  # Contracted too, while a convolution slides over it.
    OUTPUT = "output"  # Appears in the result.
    BATCH = "batch"  # Pairs off with an axis of the activation: one matrix for each index.


class DenseReason(str):
    """Why a use of a weight needs the dense sum."""


AxisRoles = dict[Axis, AxisRole]


def has_mixed_gain(network: TensorNetwork, roles: AxisRoles) -> bool:
    """Whether a gain runs along what is summed over and along what is not, or along a window: then
    neither the activation nor the result can be scaled by it.
    """
    for gain in network.gains:
        along = {roles[atom] for atom in gain.axes} - {AxisRole.BATCH}
        if along - {AxisRole.OUTPUT} and along - {AxisRole.INPUT}:
            return True
    return False


class ProductRule(NamedTuple):
    """How one primitive multiplies with a weight.

    Attributes:
        get_axis_roles: `(eqn, side, network)` to the roles of the network's atoms, or why not.
        multiply: `(eqn, bind, side, values)` to the result; `values[side]` is the factored weight.
    """

    get_axis_roles: Callable[[Any, int, TensorNetwork], AxisRoles | DenseReason]
    multiply: Callable[[Any, Callable[..., Any], int, Sequence[Any]], Any]


def _split_dimension_numbers(eqn: Any, side: int) -> tuple[tuple[int, ...], ...]:
    """(weight's contracting, weight's batch, other's contracting, other's batch) axes."""
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
    if any(atom.is_gathered and role is not AxisRole.BATCH for atom, role in roles.items()):
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
    groups = label_activation_axes(
        eqn.invars[1 - side].aval.shape, {i: network.axis_groups[w] for i, w in shared.items()}
    )
    free = [group for axis, group in enumerate(groups) if axis not in shared]
    own = [g for axis, g in enumerate(network.axis_groups) if axis not in (*contracting, *batch)]
    lhs_free, rhs_free = (own, free) if side == 0 else (free, own)
    out_groups = [*(network.axis_groups[axis] for axis in batch), *lhs_free, *rhs_free]

    out = [atom for group in out_groups for atom in group]

    def product(x: Any) -> Any:
        whole = _fused_kernel_product(eqn, side, x, factored, groups)
        if whole is not None:
            return whole
        result = bind(factored.base, x) if side == 0 else bind(x, factored.base)
        x = jnp.asarray(x).astype(product_dtype(x, factored.base, result))
        return add_terms(result, factored, split_axes(x, groups), out, eqn.params["precision"])

    if network.moment_taps:
        contracted = [atom for axis in x_contracting for atom in groups[axis]]
        x = tap_input_moments(split_axes(jnp.asarray(x), groups), network, contracted).reshape(
            x.shape
        )
    return apply_with_gains(network.gains, x, groups, out_groups, product)


def _fused_kernel_product(
    eqn: Any, side: int, x: Any, factored: FactoredArray, groups: Sequence[tuple[Axis, ...]]
) -> Any:
    """The product with base and update in one, where the device has a kernel for it."""
    network = factored.network
    contracting, batch, x_contracting, _ = _split_dimension_numbers(eqn, side)
    order = tuple(axis for axis in range(len(network.axis_groups)) if axis not in contracting)
    last = tuple(range(len(groups) - len(x_contracting), len(groups)))
    # The activation is on the left, its contracted axes last, and W is a matrix as it lies.
    if side == 0 or batch or x_contracting != last or _needs_general_path(eqn, x, factored):
        return None
    if contracting + order == tuple(range(len(network.axis_groups))):
        transpose_rhs = False
    elif order + contracting == tuple(range(len(network.axis_groups))):
        transpose_rhs = True
    else:
        return None
    inputs = [atom for axis in contracting for atom in network.axis_groups[axis]]
    outputs = [atom for axis in order for atom in network.axis_groups[axis]]
    factors = _get_lora_factors(network, inputs, outputs)
    if factors is None:
        return None
    a, b = (factor.astype(x.dtype) for factor in factors)
    k, n = flat_size(inputs), flat_size(outputs)
    matrix = (n, k) if transpose_rhs else (k, n)
    rows = jax.ShapeDtypeStruct((*x.shape[: len(x.shape) - len(last)], k), x.dtype)
    w = jax.ShapeDtypeStruct(matrix, factored.base.dtype)
    device = lora_matmul.select_kernel_device(rows, w, a.shape[-1], transpose_rhs=transpose_rhs)
    if device is None:
        return None

    def product(values: list[Any]) -> Any:
        x, w, a, b = values
        return lora_matmul.lora_matmul(
            x.reshape(rows.shape),
            w.reshape(matrix),
            a,
            b,
            transpose_rhs=transpose_rhs,
            device=device,
        )

    out = base_weight.apply_rematerialized(product, [x, factored.base, a, b])
    return out.reshape(eqn.outvars[0].aval.shape)


def _needs_general_path(eqn: Any, x: Any, factored: FactoredArray) -> bool:
    """Whether the product is more than one of two matrices in their own type, and one update."""
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
    """`A` (k, rank) and `B` (rank, n) of a network with one term, if that is a pair of them."""
    pair = network.terms[0].operands
    if len(pair) != 2:
        return None
    a, b = sorted(pair, key=lambda operand: not set(operand.axes) >= set(input_axes))
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

# One weight matrix for each group of rows: lhs (m, k), rhs (groups, k, n).
_GROUPED_DIMENSION_NUMBERS = ((((1,), (1,)), ((), ())), (0,), (0,))


def _ragged_axis_roles(eqn: Any, side: int, network: TensorNetwork) -> AxisRoles | DenseReason:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    form = (
        (tuple(map(tuple, contracting)), tuple(map(tuple, batch))),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    if (
        side != 1
        or form != _GROUPED_DIMENSION_NUMBERS
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
    """Rows times the matrix of their group, one operand of a term after another."""
    x, factored, group_sizes = values
    network: TensorNetwork = factored.network.apply_selections()
    if any(term.routing is not None for term in network.terms):
        raise ValueError(
            f"The mixture on {network.path!r} cannot be used by lax.ragged_dot, whose rows have "
            f"experts already. Leave this weight out of the rule."
        )
    form = _RaggedDotTerms(network, x.shape[0], group_sizes, eqn.params["precision"])

    def product(x: Any) -> Any:
        total = bind(x, factored.base, group_sizes)
        for use, term in enumerate(network.terms):
            rows = x if term.dropout is None else term.dropout(x, use)
            total = total + form.compute_update(rows, term, total.dtype).reshape(total.shape)
        return total

    gains = [form.gather_by_token(gain) for gain in network.gains]
    x_groups, out_groups = (
        [(form.token_axis,), form.input_axes],
        [(form.token_axis,), form.output_axes],
    )
    return apply_with_gains(gains, x, x_groups, out_groups, product)


class _RaggedDotTerms:
    """The products of rows, sorted by group, with the terms of a stack of one matrix per group."""

    def __init__(
        self, network: TensorNetwork, num_tokens: int, group_sizes: Any, precision: Any
    ) -> None:
        self.token_axis = Axis(num_tokens)
        self._group_axes, self.input_axes, self.output_axes = network.axis_groups
        self._group_sizes = group_sizes
        self._precision = precision

    @functools.cached_property
    def _group_ids(self) -> Any:
        # Rows of no group get the last, and what they meet is made zero.
        numbers = jnp.arange(flat_size(self._group_axes))
        return jnp.repeat(numbers, self._group_sizes, total_repeat_length=self.token_axis.size)

    def _has_group_axis(self, operand: Operand) -> bool:
        return bool(set(self._group_axes) & set(operand.axes))

    def _reshape_by_group(self, operand: Operand, *axis_lists: Sequence[Axis]) -> Any:
        """The operand with its groups first, and one axis for each of these lists of atoms."""
        array = contract(
            operand, (), [*self._group_axes, *(atom for atoms in axis_lists for atom in atoms)]
        )
        return array.reshape(
            flat_size(self._group_axes), *(flat_size(atoms) for atoms in axis_lists)
        )

    def gather_by_token(self, operand: Operand) -> Operand:
        """The operand with its entries for each row's group."""
        if not self._has_group_axis(operand):
            return operand
        rest = [atom for atom in operand.axes if atom not in self._group_axes]
        array = self._reshape_by_group(operand, *([atom] for atom in rest))
        return Operand(array[self._group_ids], (self.token_axis, *rest))

    def compute_update(self, x: Any, term: Term, dtype: Any) -> Any:
        """What a term adds to the result, (rows, outputs)."""
        current, zeroed = split_axes(x, [(self.token_axis,), self.input_axes]), False
        ends = {*self.input_axes, *self.output_axes}
        operands = contract_shared(term.operands, ends, self._group_axes, self._precision)
        shared = [[a for a in operand.axes if a not in self._group_axes] for operand in operands]
        for number, kept in contraction_order(
            current.axes, shared, [self.token_axis, *self.output_axes]
        ):
            operand = operands[number].map(lambda array: array.astype(x.dtype))
            met = [atom for atom in operand.axes if atom in current.axes]
            if self._has_group_axis(operand) and met and not set(met) & set(kept):
                current, zeroed = self._ragged_matmul(current, operand, met), True
                continue
            array = contract(
                current, [self.gather_by_token(operand)], kept, precision=self._precision
            )
            current = Operand(array, tuple(kept))
        update = contract(current, (), [self.token_axis, *self.output_axes], out_dtype=dtype)
        if zeroed:
            return update
        # The product with the base gives rows of no group zeros, and so must this.
        used = jnp.arange(self.token_axis.size) < self._group_sizes.sum()
        return jnp.where(used.reshape(-1, *[1] * len(self.output_axes)), update, 0)

    def _ragged_matmul(
        self, current: Operand, operand: Operand, contracted_axes: Sequence[Axis]
    ) -> Operand:
        """The product with one matrix for each group, axes that it lacks counted as rows."""
        fresh = [a for a in operand.axes if a not in (*self._group_axes, *contracted_axes)]
        middle = [a for a in current.axes if a is not self.token_axis and a not in contracted_axes]
        rows = contract(current, (), [self.token_axis, *middle, *contracted_axes]).reshape(
            -1, flat_size(contracted_axes)
        )
        array = lax.ragged_dot(
            rows,
            self._reshape_by_group(operand, contracted_axes, fresh),
            self._group_sizes * flat_size(middle),
            precision=self._precision,
        )
        atoms = (self.token_axis, *middle, *fresh)
        return Operand(array.reshape([atom.size for atom in atoms]), atoms)


RAGGED_DOT_RULE = ProductRule(_ragged_axis_roles, _eval_ragged_dot)
