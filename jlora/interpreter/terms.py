"""Terms and gains of a factored weight in products: dropout, routing, input moments, and losses.

`add_terms` adds the product of the input with every term, and `apply_with_gains` scales input or
result. Routing has a load-balancing loss. Products inside a scan, a checkpoint or a shard_map
cannot return it to the caller, so the rule of each such equation collects the losses inside
(`call_with_aux_losses`), returns them as one more output, and records them outside.
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

# Smallest magnitude of a gain. Smaller ones are clipped, so that products can be divided by them.
_MIN_GAIN = 2.0**-60


def label_activation_axes(
    shape: Sequence[int], groups: dict[int, tuple[Axis, ...]]
) -> list[tuple[Axis, ...]]:
    """Returns the axis groups of an activation, with a new axis where `groups` has none."""
    return [groups.get(axis, (Axis(length),)) for axis, length in enumerate(shape)]


def split_axes(array: Any, groups: Sequence[tuple[Axis, ...]]) -> Operand:
    """Reshapes an array, whose array axes are these groups, to one array axis per `Axis`."""
    axes = tuple(axis for group in groups for axis in group)
    return Operand(array.reshape([axis.size for axis in axes]), axes)


def add_terms(
    base_product: Any,
    factored: FactoredArray,
    x: Operand,
    out_axes: Sequence[Axis],
    precision: Any,
) -> Any:
    """Adds the products of `x` with every term to the product with the base.

    Args:
        base_product: Product with the base.
        factored: Weight with the terms.
        x: Input of the product.
        out_axes: Axes of the result.
        precision: Precision of the products.
    """
    total = base_product
    for use_index, term in enumerate(factored.network.terms):
        operands = list(term.selected_operands)
        if term.routing is not None:
            routing_weights = _compute_routing_weights(
                term.routing, x, out_axes, factored.network.path, precision
            )
            operands.append(routing_weights)
        dropped = (
            x
            if term.dropout is None
            else x.map(functools.partial(term.dropout, use_index=use_index))
        )
        update = contract(
            dropped, operands, out_axes, precision=precision, out_dtype=base_product.dtype
        )
        total = term.add(total, update.reshape(base_product.shape))
    return total


def _compute_routing_weights(
    routing: TopKRouting, x: Operand, out_axes: Sequence[Axis], path: str, precision: Any
) -> Operand:
    """Returns the weight of every expert for every input, and records the load-balancing loss.

    The softmax is over the `top_k` highest scores. The loss is
    `n sum_e (share of inputs routed to e) (mean probability of e)`, which is 1 at uniform use.

    References:
        Jiang et al., Mixtral of Experts, arXiv:2401.04088, section 2.1: the weights.
        Fedus et al., Switch Transformers, arXiv:2101.03961, section 2.2: the loss.
    """
    token_axes = [axis for axis in x.axes if axis in out_axes]
    input_axes = [axis for axis in routing.router.axes if axis in x.axes and axis not in out_axes]
    missing = set(routing.router.axes) - set(x.axes) - {routing.expert_axis}
    if missing or flat_size(input_axes) != routing.fan_in:
        raise ValueError(
            f"LoRAMoE on {path!r} gets {flat_size(input_axes)} of the {routing.fan_in} input "
            f"features at one of its uses (of a slice, a shard or the transpose of the weight). "
            f"Its router needs all of them. Exclude this weight from the adapter rules."
        )
    router = routing.router.map(lambda array: array.astype(jnp.float32))
    x_float32 = x.map(lambda array: array.astype(jnp.float32))
    scores = contract(x_float32, [router], [*token_axes, routing.expert_axis], precision=precision)
    num_experts = routing.expert_axis.size
    _, top_experts = lax.top_k(scores, routing.top_k)
    is_routed = jax.nn.one_hot(top_experts, num_experts, dtype=bool).any(-2)
    weights = jax.nn.softmax(scores, axis=-1, where=is_routed)
    # Each matrix of a stack is balanced separately.
    balanced_dims = tuple(i for i, axis in enumerate(token_axes) if axis not in routing.router.axes)
    share = lax.stop_gradient(is_routed.astype(jnp.float32).mean(balanced_dims)) / routing.top_k
    record_aux_losses(
        [num_experts * jnp.sum(share * jax.nn.softmax(scores, -1).mean(balanced_dims))]
    )
    return Operand(weights, (*token_axes, routing.expert_axis))


def _apply_gain(array: Any, gain: Operand, groups: Sequence[tuple[Axis, ...]]) -> Any:
    """Multiplies an array, whose array axes are these groups, with a gain along some of them.

    The product is computed in float32 or wider, because a gain close to one would round to one in
    a narrower type.
    """
    gain_groups = [group for group in groups if set(group) & set(gain.axes)]
    factor = contract(gain, (), [axis for group in gain_groups for axis in group])
    factor = factor.reshape([flat_size(group) if group in gain_groups else 1 for group in groups])
    factor = factor.astype(jnp.promote_types(array.dtype, jnp.float32))
    if jnp.finfo(array.dtype).tiny > _MIN_GAIN:
        return (array.astype(factor.dtype) * factor).astype(array.dtype)
    clipped = jnp.where(factor < 0, -_MIN_GAIN, _MIN_GAIN)
    correction = jnp.where(jnp.abs(factor) < _MIN_GAIN, clipped - factor, 0)
    return _multiply_by_gain(array, factor + lax.stop_gradient(correction))


@jax.custom_jvp
def _multiply_by_gain(array: Any, factor: Any) -> Any:
    """Multiplies an array with a factor whose type is at least as wide."""
    return (array.astype(factor.dtype) * factor).astype(array.dtype)


@functools.partial(_multiply_by_gain.defjvp, symbolic_zeros=True)
def _multiply_by_gain_jvp(primals: Any, tangents: Any) -> Any:
    array, factor = primals
    array_tangent, factor_tangent = tangents
    result = _multiply_by_gain(array, factor)
    total = None
    if not isinstance(array_tangent, SymbolicZero):
        total = _multiply_by_gain(array_tangent, factor)
    if not isinstance(factor_tangent, SymbolicZero):
        tangent = _gain_tangent(result, factor, factor_tangent)
        total = tangent if total is None else total + tangent
    return result, total


# The residuals are the arguments, and no wider array computed from them.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gain_tangent(result: Any, factor: Any, factor_tangent: Any) -> Any:
    """Computes the tangent of `_multiply_by_gain` with respect to the factor, from its result.

    The result is a residual of the next operation anyway, so a training step need not keep the
    array too. Second derivatives alone lose precision: as many digits as the factor is below one.
    """
    return (result.astype(factor.dtype) * (factor_tangent / factor)).astype(result.dtype)


def tap_input_moments(x: Operand, network: TensorNetwork, input_axes: Sequence[Axis]) -> Any:
    """Returns the activation, whose backward pass writes its moments as gradients of the taps.

    The moments are the count of inputs, their sum, and the sum of their outer products, for each
    matrix of the weight. These gradients are not derivatives of the output.

    Args:
        x: Input of the product.
        network: Network with the moment taps.
        input_axes: Contracted axes.

    Raises:
        ValueError: If a use has not exactly the inputs of the weight.
    """
    count, first, second = network.moment_taps
    ordered_axes = [axis for axis in first.axes if axis in input_axes]
    if flat_size(ordered_axes) ** 2 * count.array.size != second.array.size:
        raise ValueError(
            f"Input moments of {network.path!r} cannot be computed: one of its uses has only part "
            f"of the inputs, or other inputs (its transpose). Exclude it from the rules."
        )
    matrix_axes = [axis for axis in first.axes if axis in x.axes and axis not in input_axes]
    token_axes = [axis for axis in x.axes if axis not in (*matrix_axes, *input_axes)]

    @jax.custom_vjp
    def tap(array: Any, sums: list[Any]) -> Any:
        del sums
        return array

    def backward(array: Any, cotangent: Any) -> tuple[Any, list[Any]]:
        rows = contract(Operand(array, x.axes), (), [*matrix_axes, *token_axes, *ordered_axes])
        rows = rows.reshape(
            flat_size(matrix_axes), flat_size(token_axes), flat_size(ordered_axes)
        ).astype(jnp.float32)
        outer = jnp.einsum("bti,btj->bij", rows, rows, precision=lax.Precision.HIGHEST)
        # One per input, computed from it so that it varies over the same mesh axes.
        ones = jnp.where(rows[:, :, 0] == 0, 1.0, 1.0)
        sums = [ones.sum(1), rows.sum(1), outer]
        varying_axes = _compat.get_varying_axes(rows)
        if varying_axes:
            sums = lax.psum(sums, varying_axes)
        tap_gradients = [
            value.reshape(operand.array.shape).astype(operand.array.dtype)
            for value, operand in zip(sums, network.moment_taps, strict=True)
        ]
        return cotangent, tap_gradients

    tap.defvjp(lambda array, sums: (array, array), backward)
    return tap(x.array, [operand.array for operand in network.moment_taps])


def product_dtype(x: Any, base: Any, result: Any) -> Any:
    """Returns the type of products with the factors.

    It is the type of the operands, or the wider one where they differ. With 8-bit operands, whose
    scaling fits the base and not the factors, it is the type of the result.
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
    """Applies `product` to `x` and multiplies with the gains.

    A gain along contracted axes scales `x`; any other gain scales the result.

    Args:
        gains: Gains of the weight.
        x: Input of the product.
        x_groups: Axis groups of `x`.
        out_groups: Axis groups of the result.
        product: Function from the input to the result without gains.
    """
    out_axes = {axis for group in out_groups for axis in group}
    output_gains = [gain for gain in gains if set(gain.axes) <= out_axes]
    for gain in gains:
        if not set(gain.axes) <= out_axes:
            x = _apply_gain(x, gain, x_groups)
    result = product(x)
    for gain in output_gains:
        result = _apply_gain(result, gain, out_groups)
    return result


_collected_aux_losses: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "aux_losses", default=None
)


@contextlib.contextmanager
def collect_aux_losses() -> Iterator[list[Any]]:
    """Yields a list that collects the losses recorded inside the context."""
    losses: list[Any] = []
    token = _collected_aux_losses.set(losses)
    try:
        yield losses
    finally:
        _collected_aux_losses.reset(token)


def record_aux_losses(losses: Iterable[Any]) -> None:
    """Adds losses to the innermost `collect_aux_losses`, if there is one."""
    collected = _collected_aux_losses.get()
    if collected is not None:
        collected.extend(losses)


def call_with_aux_losses(fn: Callable[[], list[Any]]) -> tuple[list[Any], list[Any]]:
    """Calls `fn`; returns its result and the losses recorded during the call."""
    with collect_aux_losses() as losses:
        return fn(), losses


def sum_aux_losses(losses: Iterable[Any]) -> Any:
    """Returns the sum of the losses in float32, zero if there are none."""
    return sum(losses, start=jnp.zeros((), jnp.float32))
