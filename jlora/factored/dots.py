"""`dot_general`: a weight as one side of a matrix product or contraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jlora.factored.network import Network
from jlora.factored.roles import Dense, Product, Role, Roles
from jlora.factored.terms import (
    add_terms,
    labelled,
    observed,
    product_dtype,
    split_axes,
    with_gains,
)


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
    groups = labelled(
        eqn.invars[1 - side].aval.shape, {i: network.axes[w] for i, w in shared.items()}
    )
    free = [group for axis, group in enumerate(groups) if axis not in shared]
    own = [g for axis, g in enumerate(network.axes) if axis not in (*contracting, *batch)]
    lhs_free, rhs_free = (own, free) if side == 0 else (free, own)
    out_groups = [*(network.axes[axis] for axis in batch), *lhs_free, *rhs_free]

    out = [atom for group in out_groups for atom in group]

    def product(x: Any) -> Any:
        result = bind(factored.base, x) if side == 0 else bind(x, factored.base)
        x = jnp.asarray(x).astype(product_dtype(x, factored.base, result))
        return add_terms(result, factored, split_axes(x, groups), out, eqn.params["precision"])

    if network.observed:
        contracted = [atom for axis in x_contracting for atom in groups[axis]]
        x = observed(split_axes(jnp.asarray(x), groups), network, contracted).reshape(x.shape)
    return with_gains(network.gains, x, groups, out_groups, product)


PRODUCT = Product(_dot_roles, _dot)
