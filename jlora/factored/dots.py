"""`dot_general`: a weight as one side of a matrix product or contraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.factored import bases, releases
from jlora.factored.contraction import Atom, contract, size
from jlora.factored.network import Factored, Network
from jlora.factored.roles import Dense, Product, Role, Roles
from jlora.factored.terms import (
    add_terms,
    labelled,
    observed,
    product_dtype,
    split_axes,
    with_gains,
)
from jlora.kernels import adapted


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
        whole = _whole(eqn, side, x, factored, groups)
        if whole is not None:
            return whole
        result = bind(factored.base, x) if side == 0 else bind(x, factored.base)
        x = jnp.asarray(x).astype(product_dtype(x, factored.base, result))
        return add_terms(result, factored, split_axes(x, groups), out, eqn.params["precision"])

    if network.observed:
        contracted = [atom for axis in x_contracting for atom in groups[axis]]
        x = observed(split_axes(jnp.asarray(x), groups), network, contracted).reshape(x.shape)
    return with_gains(network.gains, x, groups, out_groups, product)


def _whole(
    eqn: Any, side: int, x: Any, factored: Factored, groups: Sequence[tuple[Atom, ...]]
) -> Any:
    """The product with base and update in one, where the device has a kernel for it."""
    network = factored.network
    contracting, batch, x_contracting, _ = _dot_sides(eqn, side)
    order = tuple(axis for axis in range(len(network.axes)) if axis not in contracting)
    last = tuple(range(len(groups) - len(x_contracting), len(groups)))
    # The activation is on the left, its contracted axes last, and W is a matrix as it lies.
    if side == 0 or batch or x_contracting != last or _asks_more(eqn, x, factored):
        return None
    if contracting + order == tuple(range(len(network.axes))):
        turned = False
    elif order + contracting == tuple(range(len(network.axes))):
        turned = True
    else:
        return None
    inputs = [atom for axis in contracting for atom in network.axes[axis]]
    outputs = [atom for axis in order for atom in network.axes[axis]]
    factors = _factors(network, inputs, outputs)
    if factors is None:
        return None
    a, b = (factor.astype(x.dtype) for factor in factors)
    k, n = size(inputs), size(outputs)
    matrix = (n, k) if turned else (k, n)
    rows = jax.ShapeDtypeStruct((*x.shape[: len(x.shape) - len(last)], k), x.dtype)
    w = jax.ShapeDtypeStruct(matrix, factored.base.dtype)
    device = adapted.device_for(rows, w, a.shape[-1], turned=turned)
    if device is None:
        return None

    def product(values: list[Any]) -> Any:
        x, w, a, b = values
        return adapted.adapted_product(
            x.reshape(rows.shape), w.reshape(matrix), a, b, turned=turned, device=device
        )

    out = bases.apply(product, [x, factored.base, a, b])
    return out.reshape(eqn.outvars[0].aval.shape)


def _asks_more(eqn: Any, x: Any, factored: Factored) -> bool:
    """Whether the product is more than one of two matrices in their own type, and one update."""
    terms = factored.network.terms
    return (
        len(terms) != 1
        or terms[0].dropout is not None
        or terms[0].gate is not None
        or terms[0].pick is not None
        or eqn.params["precision"] is not None
        or eqn.outvars[0].aval.dtype != x.dtype
        or bool(releases.varying(x))
        or releases.explicitly_split(x)
    )


def _factors(
    network: Network, inputs: Sequence[Atom], outputs: Sequence[Atom]
) -> tuple[Any, Any] | None:
    """`A` (k, rank) and `B` (rank, n) of a network with one term, if that is a pair of them."""
    pair = network.terms[0].operands
    if len(pair) != 2:
        return None
    a, b = sorted(pair, key=lambda operand: not set(operand.atoms) >= set(inputs))
    ranks = set(a.atoms) & set(b.atoms)
    if len(ranks) != 1 or set(a.atoms) != {*inputs, *ranks} or set(b.atoms) != {*outputs, *ranks}:
        return None
    (rank,) = ranks
    return (
        contract(a, (), [*inputs, rank]).reshape(-1, rank.size),
        contract(b, (), [rank, *outputs]).reshape(rank.size, -1),
    )


PRODUCT = Product(_dot_roles, _dot)
