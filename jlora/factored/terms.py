"""What a product with an adapted weight adds to that with its base: terms, gains, moments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jlora.factored import balance, releases
from jlora.factored.contraction import Atom, Operand, contract, size
from jlora.factored.network import Factored, Gate, Network

# What a gain nearer to zero is taken for, so that a product can be divided by it.
_LEAST_GAIN = 2.0**-60


def labelled(shape: Sequence[int], groups: dict[int, tuple[Atom, ...]]) -> list[tuple[Atom, ...]]:
    """Groups of atoms for an activation's axes: those it shares with the weight, or a new atom."""
    return [groups.get(axis, (Atom(length),)) for axis, length in enumerate(shape)]


def split_axes(array: Any, groups: Sequence[tuple[Atom, ...]]) -> Operand:
    atoms = tuple(atom for group in groups for atom in group)
    return Operand(array.reshape([atom.size for atom in atoms]), atoms)


def add_terms(
    base: Any,
    factored: Factored,
    x: Operand,
    out: Sequence[Atom],
    precision: Any,
) -> Any:
    """`base` plus the products of `x` with every term, where `out` are the result's atoms."""
    total = base
    for use, term in enumerate(factored.network.terms):
        operands = list(term.picked)
        if term.gate is not None:
            gate = _gate_weights(term.gate, x, out, factored.network.path, precision)
            operands.append(gate)
        dropped = x if term.dropout is None else x.map(functools.partial(term.dropout, use=use))
        update = contract(dropped, operands, out, precision=precision, out_dtype=base.dtype)
        total = term.add(total, update.reshape(base.shape))
    return total


def _gate_weights(
    gate: Gate, x: Operand, out: Sequence[Atom], path: str, precision: Any
) -> Operand:
    """The weight of every choice for every input, and its load-balancing loss handed on.

    The softmax is over the `top_k` best scores alone. The loss is
    `n sum_e (share of inputs that keep e) (mean probability of e)`, one where all are used alike.

    References:
        Jiang et al., Mixtral of Experts, arXiv:2401.04088, section 2.1, for the weights.
        Fedus et al., Switch Transformers, arXiv:2101.03961, section 2.2, for the loss.
    """
    tokens = [atom for atom in x.atoms if atom in out]
    met = [atom for atom in gate.router.atoms if atom in x.atoms and atom not in out]
    unmet = set(gate.router.atoms) - set(x.atoms) - {gate.choices}
    if unmet or size(met) != gate.fan_in:
        raise ValueError(
            f"The mixture on {path!r} meets {size(met)} of the {gate.fan_in} numbers of an input "
            f"at one of its uses (of a part of the weight, its transpose, or a shard), and its "
            f"router has to see all of them. Leave this weight out of the rule."
        )
    router = gate.router.map(lambda array: array.astype(jnp.float32))
    wide = x.map(lambda array: array.astype(jnp.float32))
    scores = contract(wide, [router], [*tokens, gate.choices], precision=precision)
    count = gate.choices.size
    _, best = lax.top_k(scores, gate.top_k)
    kept = jax.nn.one_hot(best, count, dtype=bool).any(-2)
    weights = jax.nn.softmax(scores, axis=-1, where=kept)
    # Each of a stack of matrices has a balance of its own.
    axes = tuple(i for i, atom in enumerate(tokens) if atom not in gate.router.atoms)
    share = lax.stop_gradient(kept.astype(jnp.float32).mean(axes)) / gate.top_k
    balance.add([count * jnp.sum(share * jax.nn.softmax(scores, -1).mean(axes))])
    return Operand(weights, (*tokens, gate.choices))


def _scaled(array: Any, gain: Operand, groups: Sequence[tuple[Atom, ...]]) -> Any:
    """The array, whose axes are these groups, times a gain along some of them.

    The product is made in float32 or wider: a gain that differs little from one would be one in a
    narrow type.
    """
    held = [group for group in groups if set(group) & set(gain.atoms)]
    factor = contract(gain, (), [atom for group in held for atom in group])
    factor = factor.reshape([size(group) if group in held else 1 for group in groups])
    factor = factor.astype(jnp.promote_types(array.dtype, jnp.float32))
    if jnp.finfo(array.dtype).tiny > _LEAST_GAIN:
        return (array.astype(factor.dtype) * factor).astype(array.dtype)
    away = jnp.where(factor < 0, -_LEAST_GAIN, _LEAST_GAIN)
    moved = jnp.where(jnp.abs(factor) < _LEAST_GAIN, away - factor, 0)
    return _times(array, factor + lax.stop_gradient(moved))


@jax.custom_jvp
def _times(array: Any, factor: Any) -> Any:
    """The array times a factor of a type no narrower."""
    return (array.astype(factor.dtype) * factor).astype(array.dtype)


@functools.partial(_times.defjvp, symbolic_zeros=True)
def _times_jvp(primals: Any, tangents: Any) -> Any:
    array, factor = primals
    moved, turned = tangents
    result = _times(array, factor)
    total = None
    if not isinstance(moved, SymbolicZero):
        total = _times(moved, factor)
    if not isinstance(turned, SymbolicZero):
        part = _turned(result, factor, turned)
        total = part if total is None else total + part
    return result, total


# What is kept for the gradient are the arguments, and nothing wider that is made from them.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _turned(result: Any, factor: Any, turn: Any) -> Any:
    """What a change of the factor does, from `_times`' result: that is kept for the gradient of
    what comes next anyway, and so a step need not keep the array too. Only second derivatives lose
    by it: as many digits as the factor is below one.
    """
    return (result.astype(factor.dtype) * (turn / factor)).astype(result.dtype)


def observed(x: Operand, network: Network, inputs: Sequence[Atom]) -> Any:
    """The activation, whose backward pass hands its moments to the network's observed arrays.

    Those are the count of inputs, their sum, and the sum of their outer products, for each of the
    weight's matrices. What reaches them is no derivative of anything.
    """
    count, first, second = network.observed
    ordered = [atom for atom in first.atoms if atom in inputs]
    if size(ordered) ** 2 * count.array.size != second.array.size:
        raise ValueError(
            f"The moments of the inputs of {network.path!r} cannot be taken: one of its uses meets "
            f"a part of them, or others (its transpose). Leave it out of the rules."
        )
    matrices = [atom for atom in first.atoms if atom in x.atoms and atom not in inputs]
    tokens = [atom for atom in x.atoms if atom not in (*matrices, *inputs)]

    @jax.custom_vjp
    def meet(array: Any, sums: list[Any]) -> Any:
        del sums
        return array

    def backward(array: Any, cotangent: Any) -> tuple[Any, list[Any]]:
        rows = contract(Operand(array, x.atoms), (), [*matrices, *tokens, *ordered])
        rows = rows.reshape(size(matrices), size(tokens), size(ordered)).astype(jnp.float32)
        outer = jnp.einsum("bti,btj->bij", rows, rows, precision=lax.Precision.HIGHEST)
        # A one for each input, made from it so that it varies over the same shards.
        ones = jnp.where(rows[:, :, 0] == 0, 1.0, 1.0)
        sums = [ones.sum(1), rows.sum(1), outer]
        axes = releases.varying(rows)
        if axes:
            sums = lax.psum(sums, axes)
        shaped = [
            value.reshape(operand.array.shape).astype(operand.array.dtype)
            for value, operand in zip(sums, network.observed, strict=True)
        ]
        return cotangent, shaped

    meet.defvjp(lambda array, sums: (array, array), backward)
    return meet(x.array, [operand.array for operand in network.observed])


def product_dtype(x: Any, base: Any, result: Any) -> Any:
    """The type to multiply in: the operands' own, unless they differ or are of 8 bits, which are
    scaled for the base and not for the factors.
    """
    if x.dtype == base.dtype and x.dtype.itemsize > 1:
        return x.dtype
    if min(x.dtype.itemsize, base.dtype.itemsize) > 1:
        return max((x.dtype, base.dtype), key=lambda dtype: dtype.itemsize)
    return result.dtype


def with_gains(
    gains: Sequence[Operand],
    x: Any,
    x_groups: Sequence[tuple[Atom, ...]],
    out_groups: Sequence[tuple[Atom, ...]],
    product: Callable[[Any], Any],
) -> Any:
    """What `product` makes of `x`, with every gain on the result, or on `x` where it runs along
    what is summed over.
    """
    out_atoms = {atom for group in out_groups for atom in group}
    after = [gain for gain in gains if set(gain.atoms) <= out_atoms]
    for gain in gains:
        if not set(gain.atoms) <= out_atoms:
            x = _scaled(x, gain, x_groups)
    result = product(x)
    for gain in after:
        result = _scaled(result, gain, out_groups)
    return result
