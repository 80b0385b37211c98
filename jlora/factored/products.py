"""Equations in which a weight meets an activation: the products that stay factored.

Every product has two functions. `roles` says what each atom of the weight does there (the probe
asks it), or why the product cannot be made from the operands. `product` makes it: the base's own
equation, times the gains, plus `(x A) B` for every term.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jlora.factored.network import (
    Atom,
    Factored,
    Network,
    Operand,
    Term,
    contract,
    expand,
    size,
)


class Role(enum.Enum):
    """What an axis of a weight does in a product."""

    INPUT = "input"  # Contracted with the activation.
    OUTPUT = "output"  # Appears in the result.
    BATCH = "batch"  # Pairs off with an axis of the activation: one matrix for each index.


class Dense(str):
    """Why a use of a weight needs the dense sum."""


Roles = dict[Atom, Role]


class Product(NamedTuple):
    """How one primitive multiplies with a weight.

    Attributes:
        roles: `(eqn, side, network)` to the roles of the network's atoms, or why not.
        multiply: `(eqn, bind, side, values)` to the result; `values[side]` is the factored weight.
    """

    roles: Callable[[Any, int, Network], Roles | Dense]
    multiply: Callable[[Any, Callable[..., Any], int, Sequence[Any]], Any]


def side_of(eqn: Any, networks: Sequence[Network | None]) -> int | None:
    """Which input of the product is treated as the weight: the one that is not itself looked up."""
    sides = [side for side, network in enumerate(networks) if network is not None]
    return min(sides, key=lambda side: networks[side].indexed) if sides else None  # type: ignore


def _labelled(shape: Sequence[int], groups: dict[int, tuple[Atom, ...]]) -> list[tuple[Atom, ...]]:
    """Groups of atoms for an activation's axes: those it shares with the weight, or a new atom."""
    return [groups.get(axis, (Atom(length),)) for axis, length in enumerate(shape)]


def _split_axes(array: Any, groups: Sequence[tuple[Atom, ...]]) -> Operand:
    atoms = tuple(atom for group in groups for atom in group)
    return Operand(array.reshape([atom.size for atom in atoms]), atoms)


def _add_terms(
    base: Any,
    factored: Factored,
    x: Operand,
    out: Sequence[Atom],
    precision: Any,
) -> Any:
    """`base` plus the products of `x` with every term, where `out` are the result's atoms."""
    total = base
    for use, term in enumerate(factored.network.terms):
        dropped = x if term.dropout is None else x.map(functools.partial(term.dropout, use=use))
        update = contract(dropped, term.operands, out, precision=precision, out_dtype=base.dtype)
        total = total + update.reshape(base.shape)
    return total


def _gain(gain: Operand, groups: Sequence[tuple[Atom, ...]], dtype: Any) -> Any:
    """The gain as a factor on an array whose axes are these groups."""
    held = [group for group in groups if set(group) & set(gain.atoms)]
    array = contract(gain, (), [atom for group in held for atom in group])
    lengths = [size(group) if group in held else 1 for group in groups]
    return array.reshape(lengths).astype(dtype)


def _product_dtype(x: Any, base: Any, result: Any) -> Any:
    """The type to multiply in: the operands' own, unless they differ or are of 8 bits, which are
    scaled for the base and not for the factors.
    """
    if x.dtype == base.dtype and x.dtype.itemsize > 1:
        return x.dtype
    if min(x.dtype.itemsize, base.dtype.itemsize) > 1:
        return max((x.dtype, base.dtype), key=lambda dtype: dtype.itemsize)
    return result.dtype


def _with_gains(
    factored: Factored,
    x: Any,
    x_groups: Sequence[tuple[Atom, ...]],
    out_groups: Sequence[tuple[Atom, ...]],
    product: Callable[[Any, Any], Any],
) -> Any:
    """The product of `x` with the base, every gain applied where it is smallest: to the result if
    its atoms are there, to the activation if they are all there, to the base otherwise.
    """
    base, after = factored.base, []
    out_atoms = {atom for group in out_groups for atom in group}
    x_atoms = {atom for group in x_groups for atom in group}
    for gain in factored.network.gains:
        if set(gain.atoms) <= out_atoms:
            after.append(gain)
        elif set(gain.atoms) <= x_atoms:
            x = x * _gain(gain, x_groups, x.dtype)
        else:
            base = base * expand((gain,), factored.network, base.dtype)
    result = product(x, base)
    for gain in after:
        result = result * _gain(gain, out_groups, result.dtype)
    return result


# --- dot_general ---------------------------------------------------------------------------------


def _dot_sides(eqn: Any, side: int) -> tuple[tuple[int, ...], ...]:
    """(weight's contracting, weight's batch, other's contracting, other's batch) axes."""
    contracting, batch = eqn.params["dimension_numbers"]
    return contracting[side], batch[side], contracting[1 - side], batch[1 - side]


def _dot_roles(eqn: Any, side: int, network: Network) -> Roles | Dense:
    contracting, batch, _, _ = _dot_sides(eqn, side)
    roles = {}
    for axis, group in enumerate(network.axes):
        role = Role.INPUT if axis in contracting else Role.BATCH if axis in batch else Role.OUTPUT
        roles.update(dict.fromkeys(group, role))
    if any(atom.indexed and role is not Role.BATCH for atom, role in roles.items()):
        return Dense("looked-up rows, which are an activation")
    if not jnp.issubdtype(eqn.invars[1 - side].aval.dtype, jnp.floating):
        return Dense(f"product with {eqn.invars[1 - side].aval.dtype}")
    return roles


def _dot(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    factored, x = values[side], values[1 - side]
    network: Network = factored.network
    contracting, batch, x_contracting, x_batch = _dot_sides(eqn, side)
    shared = dict(zip(x_contracting, contracting, strict=True)) | dict(
        zip(x_batch, batch, strict=True)
    )
    groups = _labelled(
        eqn.invars[1 - side].aval.shape, {i: network.axes[w] for i, w in shared.items()}
    )
    free = [group for axis, group in enumerate(groups) if axis not in shared]
    own = [g for axis, g in enumerate(network.axes) if axis not in (*contracting, *batch)]
    lhs_free, rhs_free = (own, free) if side == 0 else (free, own)
    out_groups = [*(network.axes[axis] for axis in batch), *lhs_free, *rhs_free]

    def product(x: Any, base: Any) -> Any:
        return bind(base, x) if side == 0 else bind(x, base)

    result = _with_gains(factored, x, groups, out_groups, product)
    x = jnp.asarray(x).astype(_product_dtype(x, factored.base, result))
    out = [atom for group in out_groups for atom in group]
    return _add_terms(result, factored, _split_axes(x, groups), out, eqn.params["precision"])


# --- ragged_dot ----------------------------------------------------------------------------------

# One weight matrix for each group of rows: lhs (m, k), rhs (groups, k, n).
_RAGGED = ((((1,), (1,)), ((), ())), (0,), (0,))


def _ragged_roles(eqn: Any, side: int, network: Network) -> Roles | Dense:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    form = (
        (tuple(map(tuple, contracting)), tuple(map(tuple, batch))),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    if side != 1 or form != _RAGGED or eqn.params["group_offset"] is not None or network.indexed:
        return Dense("ragged product of another form than (rows, in) x (groups, in, out)")
    group, inputs, outputs = network.axes
    return (
        dict.fromkeys(group, Role.BATCH)
        | dict.fromkeys(inputs, Role.INPUT)
        | dict.fromkeys(outputs, Role.OUTPUT)
    )


def _ragged(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    x, factored, group_sizes = values
    network: Network = factored.network
    group, inputs, outputs = network.axes

    def rows_times(rows: Any, matrices: Any, out_dtype: Any) -> Any:
        matrices = matrices.astype(x.dtype)
        options = {"precision": eqn.params["precision"], "preferred_element_type": out_dtype}
        if matrices.ndim == 2:
            return jnp.matmul(rows, matrices, **options)
        return lax.ragged_dot(rows, matrices, group_sizes, **options)

    # A gain that differs by group would need the group of each row; the base takes it instead.
    base = factored.base
    for gain in network.gains:
        base = base * expand((gain,), network, base.dtype)
    total = bind(x, base, group_sizes)
    for use, term in enumerate(network.terms):
        rows = x if term.dropout is None else term.dropout(x, use)
        near, middle, far = _stages(term, network, set(inputs), set(outputs))
        if far is None:
            update = rows_times(rows, _matrices(near, group, inputs, outputs), total.dtype)
        else:
            rows = rows_times(rows, _matrices(near, group, inputs, middle), None)
            update = rows_times(rows, _matrices(far, group, middle, outputs), total.dtype)
        total = total + update
    return total


def _matrices(
    operand: Operand, group: Sequence[Atom], rows: Sequence[Atom], columns: Sequence[Atom]
) -> Any:
    """The operand as one matrix, or as one for each index of the group's atoms if it has them."""
    atoms = [*(atom for atom in group if atom in operand.atoms), *rows, *columns]
    array = contract(operand, (), atoms)
    leading = (size(group),) if any(atom in operand.atoms for atom in group) else ()
    return array.reshape(*leading, size(rows), size(columns))


class _Stages(NamedTuple):
    """A term as one array that meets the activation and one that follows."""

    near: Operand
    middle: tuple[Atom, ...]  # The atoms they share and sum over: the rank.
    far: Operand | None


def _stages(term: Term, network: Network, inputs: set[Atom], outputs: set[Atom]) -> _Stages:
    near = [operand for operand in term.operands if inputs & set(operand.atoms)]
    far = [operand for operand in term.operands if not inputs & set(operand.atoms)]
    near_atoms = {atom for operand in near for atom in operand.atoms}
    far_atoms = {atom for operand in far for atom in operand.atoms}
    if inputs - near_atoms or near_atoms & outputs or outputs - far_atoms:
        # One array over inputs and outputs at once (a term that is not of low rank).
        dense = expand(term.operands, network, jnp.float32)
        atoms = network.atoms
        return _Stages(Operand(dense.reshape([atom.size for atom in atoms]), atoms), (), None)
    known = set(network.atoms)
    middle = [a for a in dict.fromkeys(a for o in near for a in o.atoms) if a in far_atoms - known]

    def fused(operands: list[Operand], ends: set[Atom]) -> Operand:
        kept = dict.fromkeys(
            atom
            for operand in operands
            for atom in operand.atoms
            if atom in ends or atom in middle or atom in known
        )
        return Operand(contract(operands[0], operands[1:], list(kept)), tuple(kept))

    return _Stages(fused(near, inputs), tuple(middle), fused(far, outputs))


# --- conv_general_dilated ------------------------------------------------------------------------


def _conv_roles(eqn: Any, side: int, network: Network) -> Roles | Dense:
    if side != 1:
        return Dense("weight convolved as the image, not as the kernel")
    if eqn.params["batch_group_count"] != 1:
        return Dense("convolution with batch groups")
    if network.indexed:
        return Dense("looked-up rows, which are an activation")
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return {
        atom: Role.OUTPUT if axis == out_axis else Role.INPUT
        for axis, group in enumerate(network.axes)
        for atom in group
    }


def _conv(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    """A convolution with the base, plus one into the rank followed by a 1 x 1 convolution.

    With feature groups every group of input channels has the same `A`, as the update of each
    output channel in `A B` says.
    """
    x, factored = values
    network: Network = factored.network
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, in_axis = numbers.rhs_spec[:2]
    feature = numbers.out_spec[1]
    shape = eqn.outvars[0].aval.shape
    outputs = network.axes[out_axis]
    inputs = [a for axis, group in enumerate(network.axes) if axis != out_axis for a in group]

    x_groups = _labelled(
        eqn.invars[0].aval.shape,
        {numbers.lhs_spec[1]: network.axes[in_axis]} if groups == 1 else {},
    )
    out_groups = _labelled(shape, {feature: outputs})
    total = _with_gains(factored, x, x_groups, out_groups, bind)

    def convolve(x: Any, kernel: Any, out_dtype: Any) -> Any:
        names = (
            "window_strides",
            "padding",
            "lhs_dilation",
            "rhs_dilation",
            "dimension_numbers",
            "feature_group_count",
            "precision",
        )
        return lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            **{name: eqn.params[name] for name in names},
            preferred_element_type=out_dtype,
        )

    def kernel(near: Operand, features: tuple[Atom, ...], count: int) -> Any:
        axes = [features if axis == out_axis else g for axis, g in enumerate(network.axes)]
        array = contract(near, (), [atom for group in axes for atom in group])
        array = array.reshape([size(group) for group in axes])
        return jnp.concatenate([array] * count, out_axis) if count > 1 else array

    for use, term in enumerate(network.terms):
        image = x if term.dropout is None else term.dropout(x, use)
        near, middle, far = _stages(term, network, set(inputs), set(outputs))
        if far is None:
            total = total + convolve(image, kernel(near, outputs, 1), total.dtype)
            continue
        hidden = jnp.moveaxis(convolve(image, kernel(near, middle, groups), None), feature, -1)
        rank, per_group = size(middle), size(outputs) // groups
        last = _matrices(far, (), middle, outputs).reshape(rank, groups, per_group)
        update = jnp.einsum(
            "...gr,rgo->...go",
            hidden.reshape(*hidden.shape[:-1], groups, rank),
            last.astype(x.dtype),
            precision=eqn.params["precision"],
            preferred_element_type=total.dtype,
        )
        update = update.reshape(*hidden.shape[:-1], groups * per_group)
        total = total + jnp.moveaxis(update, -1, feature)
    return total


RULES: dict[str, Product] = {
    "dot_general": Product(_dot_roles, _dot),
    "ragged_dot_general": Product(_ragged_roles, _ragged),
    "conv_general_dilated": Product(_conv_roles, _conv),
}
