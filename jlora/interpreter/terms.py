"""The load-balancing losses of mixtures, gathered from wherever in a program they arise.

Products inside a scan, a checkpoint or a shard_map cannot hand a loss to the caller by themselves:
whoever runs such a program collects what is found inside and returns it as one more output.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jlora.interpreter import _compat
from jlora.interpreter.einsum import Axis, Operand, contract, flat_size
from jlora.interpreter.factored_array import FactoredArray, TensorNetwork, TopKRouting

# What a gain nearer to zero is taken for, so that a product can be divided by it.
_MIN_GAIN = 2.0**-60


def label_activation_axes(
    shape: Sequence[int], groups: dict[int, tuple[Axis, ...]]
) -> list[tuple[Axis, ...]]:
    """Groups of atoms for an activation's axes: those it shares with the weight, or a new atom."""
    return [groups.get(axis, (Axis(length),)) for axis, length in enumerate(shape)]


def split_axes(array: Any, groups: Sequence[tuple[Axis, ...]]) -> Operand:
    atoms = tuple(atom for group in groups for atom in group)
    return Operand(array.reshape([atom.size for atom in atoms]), atoms)


def add_terms(
    base_product: Any,
    factored: FactoredArray,
    x: Operand,
    out_axes: Sequence[Axis],
    precision: Any,
) -> Any:
    """`base_product` plus the products of `x` with every term, where `out_axes` are the result's atoms."""
    total = base_product
    for use, term in enumerate(factored.network.terms):
        operands = list(term.selected_operands)
        if term.routing is not None:
            gate = _compute_routing_weights(
                term.routing, x, out_axes, factored.network.path, precision
            )
            operands.append(gate)
        dropped = x if term.dropout is None else x.map(functools.partial(term.dropout, use=use))
        update = contract(
            dropped, operands, out_axes, precision=precision, out_dtype=base_product.dtype
        )
        total = term.add(total, update.reshape(base_product.shape))
    return total


def _compute_routing_weights(
    routing: TopKRouting, x: Operand, out_axes: Sequence[Axis], path: str, precision: Any
) -> Operand:
    """The weight of every choice for every input, and its load-balancing loss handed on.

    The softmax is over the `top_k` best scores alone. The loss is
    `n sum_e (share of inputs that keep e) (mean probability of e)`, one where all are used alike.

    References:
        Jiang et al., Mixtral of Experts, arXiv:2401.04088, section 2.1, for the weights.
        Fedus et al., Switch Transformers, arXiv:2101.03961, section 2.2, for the loss.
    """
    tokens = [atom for atom in x.axes if atom in out_axes]
    met = [atom for atom in routing.router.axes if atom in x.axes and atom not in out_axes]
    unmet = set(routing.router.axes) - set(x.axes) - {routing.expert_axis}
    if unmet or flat_size(met) != routing.fan_in:
        raise ValueError(
            f"The mixture on {path!r} meets {flat_size(met)} of the {routing.fan_in} numbers of an input "
            f"at one of its uses (of a part of the weight, its transpose, or a shard), and its "
            f"router has to see all of them. Leave this weight out of the rule."
        )
    router = routing.router.map(lambda array: array.astype(jnp.float32))
    wide = x.map(lambda array: array.astype(jnp.float32))
    scores = contract(wide, [router], [*tokens, routing.expert_axis], precision=precision)
    count = routing.expert_axis.size
    _, best = lax.top_k(scores, routing.top_k)
    kept = jax.nn.one_hot(best, count, dtype=bool).any(-2)
    weights = jax.nn.softmax(scores, axis=-1, where=kept)
    # Each of a stack of matrices has a balance of its own.
    axes = tuple(i for i, atom in enumerate(tokens) if atom not in routing.router.axes)
    share = lax.stop_gradient(kept.astype(jnp.float32).mean(axes)) / routing.top_k
    record_aux_losses([count * jnp.sum(share * jax.nn.softmax(scores, -1).mean(axes))])
    return Operand(weights, (*tokens, routing.expert_axis))


def _apply_gain(array: Any, gain: Operand, groups: Sequence[tuple[Axis, ...]]) -> Any:
    """The array, whose axes are these groups, times a gain along some of them.

    The product is made in float32 or wider: a gain that differs little from one would be one in a
    narrow type.
    """
    held = [group for group in groups if set(group) & set(gain.axes)]
    factor = contract(gain, (), [atom for group in held for atom in group])
    factor = factor.reshape([flat_size(group) if group in held else 1 for group in groups])
    factor = factor.astype(jnp.promote_types(array.dtype, jnp.float32))
    if jnp.finfo(array.dtype).tiny > _MIN_GAIN:
        return (array.astype(factor.dtype) * factor).astype(array.dtype)
    away = jnp.where(factor < 0, -_MIN_GAIN, _MIN_GAIN)
    moved = jnp.where(jnp.abs(factor) < _MIN_GAIN, away - factor, 0)
    return _multiply_by_gain(array, factor + lax.stop_gradient(moved))


@jax.custom_jvp
def _multiply_by_gain(array: Any, factor: Any) -> Any:
    """The array times a factor of a type no narrower."""
    return (array.astype(factor.dtype) * factor).astype(array.dtype)


@functools.partial(_multiply_by_gain.defjvp, symbolic_zeros=True)
def _multiply_by_gain_jvp(primals: Any, tangents: Any) -> Any:
    array, factor = primals
    moved, turned = tangents
    result = _multiply_by_gain(array, factor)
    total = None
    if not isinstance(moved, SymbolicZero):
        total = _multiply_by_gain(moved, factor)
    if not isinstance(turned, SymbolicZero):
        part = _gain_tangent(result, factor, turned)
        total = part if total is None else total + part
    return result, total


# What is kept for the gradient are the arguments, and nothing wider that is made from them.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gain_tangent(result: Any, factor: Any, factor_tangent: Any) -> Any:
    """What a change of the factor does, from `_multiply_by_gain`' result: that is kept for the gradient of
    what comes next anyway, and so a step need not keep the array too. Only second derivatives lose
    by it: as many digits as the factor is below one.
    """
    return (result.astype(factor.dtype) * (factor_tangent / factor)).astype(result.dtype)


def tap_input_moments(x: Operand, network: TensorNetwork, input_axes: Sequence[Axis]) -> Any:
    """The activation, whose backward pass hands its moments to the network's observed arrays.

    Those are the count of inputs, their sum, and the sum of their outer products, for each of the
    weight's matrices. What reaches them is no derivative of anything.
    """
    count, first, second = network.moment_taps
    ordered = [atom for atom in first.axes if atom in input_axes]
    if flat_size(ordered) ** 2 * count.array.size != second.array.size:
        raise ValueError(
            f"The moments of the inputs of {network.path!r} cannot be taken: one of its uses meets "
            f"a part of them, or others (its transpose). Leave it out of the rules."
        )
    matrices = [atom for atom in first.axes if atom in x.axes and atom not in input_axes]
    tokens = [atom for atom in x.axes if atom not in (*matrices, *input_axes)]

    @jax.custom_vjp
    def meet(array: Any, sums: list[Any]) -> Any:
        del sums
        return array

    def backward(array: Any, cotangent: Any) -> tuple[Any, list[Any]]:
        rows = contract(Operand(array, x.axes), (), [*matrices, *tokens, *ordered])
        rows = rows.reshape(flat_size(matrices), flat_size(tokens), flat_size(ordered)).astype(
            jnp.float32
        )
        outer = jnp.einsum("bti,btj->bij", rows, rows, precision=lax.Precision.HIGHEST)
        # A one for each input, made from it so that it varies over the same shards.
        ones = jnp.where(rows[:, :, 0] == 0, 1.0, 1.0)
        sums = [ones.sum(1), rows.sum(1), outer]
        axes = _compat.get_varying_axes(rows)
        if axes:
            sums = lax.psum(sums, axes)
        shaped = [
            value.reshape(operand.array.shape).astype(operand.array.dtype)
            for value, operand in zip(sums, network.moment_taps, strict=True)
        ]
        return cotangent, shaped

    meet.defvjp(lambda array, sums: (array, array), backward)
    return meet(x.array, [operand.array for operand in network.moment_taps])


def product_dtype(x: Any, base: Any, result: Any) -> Any:
    """The type to multiply in: the operands' own, unless they differ or are of 8 bits, which are
    scaled for the base and not for the factors.
    """
    if x.dtype == base.dtype and x.dtype.itemsize > 1:
        return x.dtype
    if min(x.dtype.itemsize, base.dtype.itemsize) > 1:
        return max((x.dtype, base.dtype), key=lambda dtype: dtype.itemsize)
    return result.dtype


def apply_with_gains(
    gains: Sequence[Operand],
    x: Any,
    x_groups: Sequence[tuple[Axis, ...]],
    out_groups: Sequence[tuple[Axis, ...]],
    product: Callable[[Any], Any],
) -> Any:
    """What `product` makes of `x`, with every gain on the result, or on `x` where it runs along
    what is summed over.
    """
    out_atoms = {atom for group in out_groups for atom in group}
    after = [gain for gain in gains if set(gain.axes) <= out_atoms]
    for gain in gains:
        if not set(gain.axes) <= out_atoms:
            x = _apply_gain(x, gain, x_groups)
    result = product(x)
    for gain in after:
        result = _apply_gain(result, gain, out_groups)
    return result


_collected_aux_losses: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "found", default=None
)


@contextlib.contextmanager
def collect_aux_losses() -> Iterator[list[Any]]:
    """A list that gets every loss found inside the context, and none that is found elsewhere."""
    losses: list[Any] = []
    token = _collected_aux_losses.set(losses)
    try:
        yield losses
    finally:
        _collected_aux_losses.reset(token)


def record_aux_losses(losses: Iterable[Any]) -> None:
    """Hands losses to whoever collects."""
    found = _collected_aux_losses.get()
    if found is not None:
        found.extend(losses)


def call_with_aux_losses(fn: Callable[[], list[Any]]) -> tuple[list[Any], list[Any]]:
    """What `fn` returns, and the losses found meanwhile."""
    with collect_aux_losses() as losses:
        return fn(), losses


def sum_aux_losses(losses: Iterable[Any]) -> Any:
    """Their sum, a float32; zero when there are none."""
    return sum(losses, start=jnp.zeros((), jnp.float32))
