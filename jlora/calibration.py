"""What the weights of a model meet on a calibration batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.inits import Moments
from jlora.adapters.protocol import (
    About,
    AdapterConfig,
    AdapterLeaf,
    Expression,
    Given,
    Weight,
    array,
    register,
)
from jlora.factored.probe import Axes
from jlora.transform import Rules, lora_transform

PyTree = Any


def input_moments(
    fn: Callable[..., Any], rules: Rules, params: PyTree, *inputs: Any, **kwargs: Any
) -> dict[str, Moments]:
    """For every weight that the rules adapt, the moments of the inputs that it meets.

    Each costs an array (fan_in, fan_in) in float32, for every layer of a stack; on a large model
    name a few weights at a time. Moments of several batches add up: `jax.tree.map(jnp.add, m, n)`.

    Args:
        fn: The model, as `lora_transform` takes it.
        rules: As `lora_transform` takes them; what the configs are does not matter.
        params: The base.
        *inputs: A calibration batch.
        **kwargs: Passed to `fn`.

    Raises:
        ValueError: When the rules name a convolution or an embedding, `fn` returns no floats, or a
            weight met no input on the way to what it returns.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3.2, which takes the directions from these.
    """
    watched = (
        {pattern: config and _Watch() for pattern, config in rules.items()}
        if isinstance(rules, Mapping)
        else _Watch()
    )
    watch = lora_transform(fn, watched)
    adapter = watch.init(jax.random.key(0), params, *inputs, **kwargs)

    def anything(adapter: Any) -> jax.Array:
        leaves = jax.tree.leaves(watch.apply(params, adapter, *inputs, **kwargs))
        floats = [x for x in leaves if jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact)]
        if not floats:
            raise ValueError("input_moments: fn returns no floats to differentiate. Let it.")
        return sum((x.astype(jnp.float32).sum() for x in floats), start=jnp.zeros(()))

    found = jax.grad(anything)(adapter)
    moments = {}
    for path, leaf in found.items():
        batch, inputs_, _ = leaf.groups
        count, fan_in = math.prod(batch), math.prod(inputs_)
        moments[path] = Moments(
            leaf.number.reshape(count),
            leaf.first.reshape(count, fan_in),
            leaf.second.reshape(count, fan_in, fan_in),
        )
        if _is_zero(moments[path].number):
            raise ValueError(
                f"input_moments: {path!r} met no input on the way to what fn returns. It is used "
                f"behind a stop_gradient or an argmax, or inside a function with a derivative of "
                f"its own. Leave it out of the rules."
            )
    return moments


def _is_zero(numbers: jax.Array) -> bool:
    """Whether some entry is known to be zero, which under a jit none is."""
    try:
        return not numbers.all()
    except jax.errors.ConcretizationTypeError:
        return False


@dataclasses.dataclass(frozen=True)
class _Watch(AdapterConfig):
    """No adapter: arrays whose gradients become the moments of what a weight meets."""

    about = About("Moments of the inputs", "", "", "", "")
    kinds = frozenset({"linear"})

    def refusal(self, weight: Weight) -> str | None:
        if "ragged_dot_general" in weight.uses or weight.dense:
            return f"the inputs that it meets cannot be told (it is used by: {weight.uses})"
        return super().refusal(weight)

    def leaf(self, key: jax.Array, weight: Weight) -> _WatchLeaf:
        del key
        batch, inputs, _ = weight.groups
        return _WatchLeaf(
            number=jnp.zeros(batch),
            first=jnp.zeros((*batch, *inputs)),
            second=jnp.zeros((*batch, *inputs, *inputs)),
            shape=weight.shape,
            axes=weight.axes,
        )


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class _WatchLeaf(AdapterLeaf):
    number: jax.Array = array("moments")  # noqa: RUF009
    first: jax.Array = array("moments")  # noqa: RUF009
    second: jax.Array = array("moments")  # noqa: RUF009
    shape: tuple[int, ...]
    axes: Axes

    def expression(self, given: Given) -> Expression:
        del given
        batch, inputs, _ = self.axes
        again = [("again", axis) for axis in inputs]
        return Expression(
            observed=[
                (self.number, batch),
                (self.first, (*batch, *inputs)),
                (self.second, (*batch, *inputs, *again)),
            ]
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, _ = self.groups
        return {
            "number": batch,
            "first": (*batch, *inputs),
            "second": (*batch, *inputs, *inputs),
        }
