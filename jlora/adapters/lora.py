"""LoRA: a low-rank update beside a frozen weight."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.protocol import AdapterLeaf, Expression, Weight, array, family
from jlora.factored.probe import Axes

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
"""`(key, shape, dtype)` to an array, as in `jax.nn.initializers`."""


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in) for a matrix (fan_in, rank), as the reference initialises `A`.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1, and its reference code, which calls
        Kaiming's uniform with a = sqrt(5). (`jax.nn.initializers.he_uniform` is sqrt(6) wider.)
    """
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation: `W + (alpha / rank) * A B`, with x on the left.

    Attributes:
        rank: Width of the bottleneck; a positive count.
        alpha: Numerator of the scale put on the update; positive.
        dropout: Probability of dropping an entry of the input of `A` while training. It acts only
            where `apply` is given a `dropout_key`.
        rank_stabilized: Scale by `alpha / sqrt(rank)` instead, which keeps the update's size as
            the rank grows (rsLoRA).
        a_init: Draws `A` as a matrix (fan_in, rank), one for each layer of a stack. `B` starts at
            zero. Embeddings are the other way about: `A` zero and `B` normal, as in the reference.
        dtype: Of `A` and `B`. They are cast to the activation's type at each product.

    Raises:
        ValueError: For a value out of its range.
        TypeError: For a rank that is no int.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
        Kalajdzievski, rsLoRA, arXiv:2312.03732, section 4.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    a_init: Initializer = uniform_fan_in
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, numbers.Integral):
            raise TypeError(
                f"LoRA.rank={self.rank!r} is a {type(self.rank).__name__}; a rank is a count. Use "
                f"an int of 1 or more."
            )
        if self.rank < 1:
            raise ValueError(
                f"LoRA.rank={self.rank} leaves no room for an update. Use a rank of 1 or more; to "
                f"leave a weight frozen, map its pattern to None."
            )
        if not _is_number(self.alpha) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(
                f"LoRA.alpha={self.alpha!r} gives the update no usable scale. Use a positive "
                f"finite number, such as the rank or twice the rank."
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoRA.dropout={self.dropout!r} is no probability of dropping an input. Use 0.0 "
                f"(off) up to, but not, 1.0."
            )
        if not isinstance(self.rank_stabilized, bool):
            raise TypeError(f"LoRA.rank_stabilized={self.rank_stabilized!r} must be True or False.")
        if not callable(self.a_init):
            raise TypeError(
                f"LoRA.a_init={self.a_init!r} is no initializer. Give a function (key, shape, "
                f"dtype), such as jax.nn.initializers.normal(0.02)."
            )
        if not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise TypeError(
                f"LoRA.dtype={self.dtype!r} cannot hold factors. Use a float, such as jnp.float32."
            )

    def refusal(self, weight: Weight) -> str | None:
        """Why a weight has no low-rank update; None when it has."""
        if 0 in weight.value.shape:
            return f"its shape {tuple(weight.value.shape)} holds no numbers"
        if not weight.axes.inputs or not weight.axes.outputs:
            return (
                f"as a weight of shape {tuple(weight.value.shape)} with axes {weight.axes} it is a "
                f"vector: low rank means nothing there"
            )
        return None

    def init(self, key: jax.Array, weight: Weight) -> LoRALeaf:
        """A leaf whose update is zero."""
        shape, axes = tuple(weight.value.shape), weight.axes
        if self.rank > min(weight.fan_in, weight.fan_out):
            warnings.warn(
                f"LoRA.rank={self.rank} on {weight.path!r} exceeds the weight's own rank of at "
                f"most {min(weight.fan_in, weight.fan_out)}, so some of it is wasted.",
                stacklevel=4,
            )
        batch, inputs, outputs = (tuple(shape[axis] for axis in group) for group in axes)
        dtype = jnp.dtype(self.dtype)
        if weight.embedding:
            a = jnp.zeros((*batch, *inputs, self.rank), dtype)
            b = jax.random.normal(key, (*batch, self.rank, *outputs), dtype)
        else:
            keys = jax.random.split(key, math.prod(batch))
            matrix = (weight.fan_in, self.rank)
            a = jax.vmap(lambda one: self.a_init(one, matrix, dtype))(keys)
            a = a.reshape(*batch, *inputs, self.rank)
            b = jnp.zeros((*batch, self.rank, *outputs), dtype)
        return LoRALeaf(
            a=a,
            b=b,
            shape=shape,
            axes=axes,
            rank=int(self.rank),
            alpha=float(self.alpha),
            rank_stabilized=self.rank_stabilized,
            dropout=float(self.dropout),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@family("lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRALeaf(AdapterLeaf):
    """The factors of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        shape: The weight's shape.
        axes: What each of the weight's axes does.
    """

    a: jax.Array = array("a")
    b: jax.Array = array("b")
    shape: tuple[int, ...]
    axes: Axes
    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def expression(self, base: Any) -> Expression:
        """`W + scale * A B`; the scale is folded into `B`, which is far smaller than a result."""
        del base
        batch, inputs, outputs = self.axes
        return Expression(
            terms=[
                [
                    (self.a, (*batch, *inputs, "rank")),
                    (self.b * self.scale, (*batch, "rank", *outputs)),
                ]
            ]
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = (tuple(self.shape[i] for i in group) for group in self.axes)
        return {"a": (*batch, *inputs, self.rank), "b": (*batch, self.rank, *outputs)}
