"""Moments of the inputs of weights on a calibration batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._tree import PyTree
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    array_field,
    register_arrays_pytree,
)
from jlora.initializers import InputMoments
from jlora.interpreter._compat import get_varying_axes
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import (
    Axis,
    Operand,
    Term,
    WeightAxes,
    WeightProduct,
    arrange,
    fit_token_mask,
    flat_size,
    split_axes,
)
from jlora.interpreter.weight import AdaptableWeight
from jlora.transform import Rules, lora_transform


def input_moments(
    fn: Callable[..., Any],
    rules: Rules,
    params: PyTree,
    *inputs: Any,
    token_mask: jax.Array | None = None,
    **kwargs: Any,
) -> dict[str, InputMoments]:
    """Computes the moments of the inputs of every weight that the rules adapt.

    Each weight takes an array (fan_in, fan_in) in float32 for every layer of a stack; on a large
    model select a few weights at a time. Moments of several batches add up:
    `jax.tree.map(jnp.add, m, n)`.

    Args:
        fn: Model, as in `lora_transform`.
        rules: Rules that select weights, as in `lora_transform`; their configs are not used.
        params: Base parameters.
        *inputs: Calibration batch, passed to `fn`.
        token_mask: Mask of the batch's tokens, such as (batch, length): zero for padding, which is
            not counted. None: there is none.
        **kwargs: Keyword arguments of `fn`.

    Returns:
        Number, sum and sum of outer products of the inputs, by path.

    Raises:
        ValueError: The rules select a convolution or an embedding, `fn` returns no floats, a
            weight has no input that leads to an output of `fn`, or the mask does not have the shape
            of the inputs of a weight.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3.2, which takes the directions from these.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.arange(6.0).reshape(2, 3)
        >>> config = jlora.LoRA(rank=1, alpha=1)
        >>> moments = jlora.input_moments(lambda p, x: x @ p["w"], config, params, x)["w"]
        >>> moments.num_inputs.tolist(), moments.input_sum.tolist()
        ([2.0], [[3.0, 5.0, 7.0]])
    """
    tap_rules = (
        {pattern: config and _InputMomentsConfig() for pattern, config in rules.items()}
        if isinstance(rules, Mapping)
        else _InputMomentsConfig()
    )
    taps = lora_transform(fn, tap_rules)
    adapter = taps.init(jax.random.key(0), params, *inputs, **kwargs)

    def sum_outputs(adapter: Any) -> jax.Array:
        # Unlike `apply`, it takes a mask.
        outputs, _ = taps.apply_with_aux_loss(
            params, adapter, *inputs, token_mask=token_mask, **kwargs
        )
        leaves = jax.tree.leaves(outputs)
        floats = [x for x in leaves if jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact)]
        if not floats:
            raise ValueError(
                "input_moments: fn returns no floats to differentiate. Return a float array."
            )
        return sum((x.astype(jnp.float32).sum() for x in floats), start=jnp.zeros(()))

    # The gradients of the taps are the moments.
    gradients = jax.grad(sum_outputs)(adapter)
    moments = {}
    for path, leaf in gradients.items():
        batch, input_sizes, _ = leaf.axis_sizes
        count, fan_in = math.prod(batch), math.prod(input_sizes)
        moments[path] = InputMoments(
            leaf.num_inputs.reshape(count),
            leaf.input_sum.reshape(count, fan_in),
            leaf.outer_product_sum.reshape(count, fan_in, fan_in),
        )
        if _has_known_zero(moments[path].num_inputs):
            raise ValueError(
                f"input_moments: {path!r} has no input that leads to an output of fn. It is used "
                f"behind a stop_gradient or an argmax, inside a function with a custom "
                f"derivative, or token_mask is zero everywhere. Leave it out of the rules."
            )
    return moments


def _has_known_zero(counts: jax.Array) -> bool:
    """Returns whether some entry is known to be zero; under jit, none is."""
    try:
        return not counts.all()
    except jax.errors.ConcretizationTypeError:
        return False


@dataclasses.dataclass(frozen=True)
class _InputMomentsConfig(AdapterConfig):
    """Config of taps in place of an adapter: their gradients are moments of a weight's inputs."""

    info = MethodInfo("Moments of the inputs", "", "", "", "")
    supported_kinds = frozenset({"linear"})

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        if "ragged_dot_general" in weight.primitives or weight.dense_reasons:
            return f"its inputs cannot be observed (it is used by: {weight.primitives})"
        return super().unsupported_reason(weight)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> _InputMomentsLeaf:
        del key
        batch, inputs, _ = weight.axis_sizes
        return _InputMomentsLeaf(
            num_inputs=jnp.zeros(batch),
            input_sum=jnp.zeros((*batch, *inputs)),
            outer_product_sum=jnp.zeros((*batch, *inputs, *inputs)),
            shape=weight.shape,
            axes=weight.axes,
        )


@register_arrays_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class _InputMomentsLeaf(AdapterLeaf):
    num_inputs: jax.Array = array_field("moments")  # noqa: RUF009
    input_sum: jax.Array = array_field("moments")  # noqa: RUF009
    outer_product_sum: jax.Array = array_field("moments")  # noqa: RUF009
    shape: tuple[int, ...]
    axes: WeightAxes

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        del context
        batch, inputs, _ = self.axes
        again = [("again", axis) for axis in inputs]
        count, total, outer = weight.label(
            (self.num_inputs, batch),
            (self.input_sum, (*batch, *inputs)),
            (self.outer_product_sum, (*batch, *inputs, *again)),
        )
        return weight.add_term(_MomentsTerm(count, total, outer))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, _ = self.axis_sizes
        return {
            "num_inputs": batch,
            "input_sum": (*batch, *inputs),
            "outer_product_sum": (*batch, *inputs, *inputs),
        }


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["num_inputs", "input_sum", "outer_product_sum", "token_mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _MomentsTerm(Term):
    """Nothing that is added: the backward pass of a product leaves moments of its inputs here.

    The gradients of the three operands become, for each of the weight's matrices, the number of
    inputs, their sum, and the sum of their outer products. They are derivatives of nothing. Inputs
    where `token_mask` is zero are left out.
    """

    num_inputs: Operand
    input_sum: Operand
    outer_product_sum: Operand
    token_mask: jax.Array | None = None

    def map(self, fn: Callable[[Operand], Operand]) -> _MomentsTerm:
        return dataclasses.replace(
            self,
            num_inputs=fn(self.num_inputs),
            input_sum=fn(self.input_sum),
            outer_product_sum=fn(self.outer_product_sum),
        )

    def with_token_mask(self, token_mask: jax.Array) -> _MomentsTerm:
        return dataclasses.replace(self, token_mask=token_mask)

    def prepare_input(self, x: Any, product: WeightProduct) -> Any:
        labeled = split_axes(x, product.x_groups)
        out_axes = set(product.out_axes)
        inputs = [a for a in self.input_sum.axes if a in labeled.axes and a not in out_axes]
        if flat_size(inputs) ** 2 * self.num_inputs.array.size != self.outer_product_sum.array.size:
            raise ValueError(
                f"Input moments of {product.path!r} cannot be computed: one of its uses has only "
                f"part of the inputs, or other inputs (its transpose). Exclude it from the rules."
            )
        matrices = [a for a in self.input_sum.axes if a in labeled.axes and a not in inputs]
        tokens = [axis for axis in labeled.axes if axis not in (*matrices, *inputs)]
        sums = (self.num_inputs, self.input_sum, self.outer_product_sum)
        mask = None
        if self.token_mask is not None:
            mask = fit_token_mask(self.token_mask, [a.size for a in tokens], product.path)

        @jax.custom_vjp
        def tap(array: Any, mask: Any, sums: list[Any]) -> Any:
            del mask, sums
            return array

        def backward(residuals: tuple[Any, Any], cotangent: Any) -> tuple[Any, None, list[Any]]:
            array, mask = residuals
            rows = arrange(Operand(array, labeled.axes), [*matrices, *tokens, *inputs])
            sizes = (flat_size(matrices), flat_size(tokens), flat_size(inputs))
            rows = rows.reshape(sizes).astype(jnp.float32)
            # A one for each input, made from it so that it varies over the same shards.
            ones = jnp.where(rows[:, :, 0] == 0, 1.0, 1.0)
            if mask is not None:
                ones = ones * mask.reshape(1, -1)
                rows = jnp.where(ones[..., None] == 0, 0, rows)
            # (matrices, tokens, inputs) with itself -> (matrices, inputs, inputs)
            outer = jnp.einsum("bti,btj->bij", rows, rows, precision=jax.lax.Precision.HIGHEST)
            found = [ones.sum(1), rows.sum(1), outer]
            axes = get_varying_axes(rows)
            if axes:
                found = jax.lax.psum(found, axes)
            return (
                cotangent,
                None,
                [
                    value.reshape(operand.array.shape).astype(operand.array.dtype)
                    for value, operand in zip(found, sums, strict=True)
                ],
            )

        tap.defvjp(lambda array, mask, sums: (array, (array, mask)), backward)
        return tap(labeled.array, mask, [operand.array for operand in sums]).reshape(x.shape)

    def add_product(
        self, total: Any, x: Any, product: WeightProduct
    ) -> tuple[Any, Sequence[jax.Array]]:
        del x, product
        return total, ()

    def add_materialized(self, total: Any, weight: Any) -> Any:
        del weight
        return total

    def scale(self, factor: Any) -> _MomentsTerm:
        del factor
        return self

    def is_zero_outside(self, axis: Axis) -> bool:
        del axis
        return True

    def to_product(self, weight: Any, used_by: str) -> None:
        del weight, used_by
