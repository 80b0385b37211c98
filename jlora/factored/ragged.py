"""`ragged_dot`: rows times the matrix of their group, as experts have them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.factored.contraction import Atom, Operand, absorption, contract, fused, size
from jlora.factored.network import Network, Term
from jlora.factored.roles import Dense, Product, Role, Roles
from jlora.factored.terms import split_axes, with_gains

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
    """Rows times the matrix of their group, one operand of a term after another."""
    x, factored, group_sizes = values
    network: Network = factored.network.plain()
    if any(term.gate is not None for term in network.terms):
        raise ValueError(
            f"The mixture on {network.path!r} cannot be used by lax.ragged_dot, whose rows have "
            f"experts already. Leave this weight out of the rule."
        )
    form = _GroupedRows(network, x.shape[0], group_sizes, eqn.params["precision"])

    def product(x: Any) -> Any:
        total = bind(x, factored.base, group_sizes)
        for use, term in enumerate(network.terms):
            rows = x if term.dropout is None else term.dropout(x, use)
            total = total + form.update(rows, term, total.dtype).reshape(total.shape)
        return total

    gains = [form.by_row(gain) for gain in network.gains]
    x_groups, out_groups = [(form.row,), form.inputs], [(form.row,), form.outputs]
    return with_gains(gains, x, x_groups, out_groups, product)


class _GroupedRows:
    """The products of rows, sorted by group, with the terms of a stack of one matrix per group."""

    def __init__(self, network: Network, rows: int, group_sizes: Any, precision: Any) -> None:
        self.row = Atom(rows)
        self._group, self.inputs, self.outputs = network.axes
        self._group_sizes = group_sizes
        self._precision = precision

    @functools.cached_property
    def _group_of_row(self) -> Any:
        # Rows of no group get the last, and what they meet is made zero.
        numbers = jnp.arange(size(self._group))
        return jnp.repeat(numbers, self._group_sizes, total_repeat_length=self.row.size)

    def _is_grouped(self, operand: Operand) -> bool:
        return bool(set(self._group) & set(operand.atoms))

    def _stacked(self, operand: Operand, *groups: Sequence[Atom]) -> Any:
        """The operand with its groups first, and one axis for each of these lists of atoms."""
        array = contract(operand, (), [*self._group, *(atom for atoms in groups for atom in atoms)])
        return array.reshape(size(self._group), *(size(atoms) for atoms in groups))

    def by_row(self, operand: Operand) -> Operand:
        """The operand with its entries for each row's group."""
        if not self._is_grouped(operand):
            return operand
        rest = [atom for atom in operand.atoms if atom not in self._group]
        array = self._stacked(operand, *([atom] for atom in rest))
        return Operand(array[self._group_of_row], (self.row, *rest))

    def update(self, rows: Any, term: Term, dtype: Any) -> Any:
        """What a term adds to the result, (rows, outputs)."""
        current, zeroed = split_axes(rows, [(self.row,), self.inputs]), False
        ends = {*self.inputs, *self.outputs}
        operands = fused(term.operands, ends, self._group, self._precision)
        shared = [[a for a in operand.atoms if a not in self._group] for operand in operands]
        for number, kept in absorption(current.atoms, shared, [self.row, *self.outputs]):
            operand = operands[number].map(lambda array: array.astype(rows.dtype))
            met = [atom for atom in operand.atoms if atom in current.atoms]
            if self._is_grouped(operand) and met and not set(met) & set(kept):
                current, zeroed = self._times(current, operand, met), True
                continue
            array = contract(current, [self.by_row(operand)], kept, precision=self._precision)
            current = Operand(array, tuple(kept))
        update = contract(current, (), [self.row, *self.outputs], out_dtype=dtype)
        if zeroed:
            return update
        # The product with the base gives rows of no group zeros, and so must this.
        used = jnp.arange(self.row.size) < self._group_sizes.sum()
        return jnp.where(used.reshape(-1, *[1] * len(self.outputs)), update, 0)

    def _times(self, current: Operand, operand: Operand, summed: Sequence[Atom]) -> Operand:
        """The product with one matrix for each group, axes that it lacks counted as rows."""
        fresh = [a for a in operand.atoms if a not in (*self._group, *summed)]
        middle = [a for a in current.atoms if a is not self.row and a not in summed]
        rows = contract(current, (), [self.row, *middle, *summed]).reshape(-1, size(summed))
        array = lax.ragged_dot(
            rows,
            self._stacked(operand, summed, fresh),
            self._group_sizes * size(middle),
            precision=self._precision,
        )
        atoms = (self.row, *middle, *fresh)
        return Operand(array.reshape([atom.size for atom in atoms]), atoms)


PRODUCT = Product(_ragged_roles, _ragged)
