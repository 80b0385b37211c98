"""VeRA: random factors shared by all layers, and trainable vectors that scale them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation
from jlora.adapters.base import (
    FROZEN,
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    SharedArrays,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(AdapterConfig):
    """`W + A diag(d) B diag(b)`, with `A` and `B` random, frozen, and the same for all weights.

    The shared pair has the size of the largest weight; smaller ones use its first rows and columns.
    It is stored in the adapter once, under the name `share`.

    Attributes:
        rank: Rank of the shared pair. Each rank costs one trainable parameter per weight, so it is
            far higher than LoRA's; the paper uses 256 to 1024.
        d_initial: Initial value of `d`; positive. `b` starts at zero.
        dropout: Probability of dropping an entry of the input while training.
        share: Name of the shared pair in the adapter. Different configs need different names.
        dtype: Data type of all arrays.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Kopiczko et al., VeRA, arXiv:2310.11454, section 3.1; shared between shapes as in PEFT.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.VeRA(rank=8))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["vera"].a.shape, adapter["w"].d.shape, adapter["w"].b.shape
        ((6, 8), (8,), (5,))
    """

    info = MethodInfo(
        name="VeRA",
        formula="W + A diag(d) B diag(b), A and B random and shared",
        num_params_formula="r + k",
        recommended_for="the fewest parameters per adapter: many adapters, little storage",
        paper="Kopiczko et al. 2310.11454",
    )
    supported_kinds = frozenset({"linear"})

    rank: int
    d_initial: float = 0.1
    dropout: float = 0.0
    share: str = "vera"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = float(jnp.finfo(self.dtype).max)
        if not _validation.is_positive_float32(self.d_initial) or self.d_initial > largest:
            raise ValueError(
                f"VeRA.d_initial={self.d_initial!r} must be positive and finite in "
                f"{jnp.dtype(self.dtype).name}: a zero `d` blocks all gradients. Use a value such "
                f"as 0.1."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> VeRALeaf:
        """Returns `d` at its initial value, and `b` at zero."""
        del key
        batch, _, outputs = weight.axis_sizes
        return VeRALeaf(
            d=jnp.full((*batch, self.rank), self.d_initial, self.dtype),
            b=jnp.zeros((*batch, *outputs), self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            dropout=float(self.dropout),
            share=self.share,
        )

    def init_shared(self, key: jax.Array, weights: Sequence[AdaptableWeight]) -> VeRAProjections:
        """Returns a random pair for the largest weight, from Kaiming's uniform for ReLU."""
        fan_in = max(weight.fan_in for weight in weights)
        fan_out = max(weight.fan_out for weight in weights)
        key_a, key_b = jax.random.split(key)
        bound_a, bound_b = math.sqrt(6 / fan_in), math.sqrt(6 / self.rank)
        a = jax.random.uniform(key_a, (fan_in, self.rank), self.dtype, -bound_a, bound_a)
        b = jax.random.uniform(key_b, (self.rank, fan_out), self.dtype, -bound_b, bound_b)
        return VeRAProjections(a=a, b=b, rank=int(self.rank), fan_in=fan_in, fan_out=fan_out)


@register_family("vera_shared")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRAProjections(SharedArrays):
    """The random pair that weights share.

    Attributes:
        a: (fan_in, rank).
        b: (rank, fan_out).
    """

    a: jax.Array = array_field(FROZEN)
    b: jax.Array = array_field(FROZEN)
    rank: int
    fan_in: int
    fan_out: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (self.fan_in, self.rank), "b": (self.rank, self.fan_out)}


@register_family("vera")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRALeaf(AdapterLeaf):
    """Scaling vectors of one weight.

    Attributes:
        d: (*batch, rank).
        b: (*batch, *outputs).
    """

    d: jax.Array = array_field("d")
    b: jax.Array = array_field("b")
    shape: tuple[int, ...]
    axes: WeightAxes
    rank: int
    dropout: float
    share: str

    def shared_mismatch(self, shared: Any) -> str | None:
        fan_in, fan_out = math.prod(self.axis_sizes.inputs), math.prod(self.axis_sizes.outputs)
        if not isinstance(shared, VeRAProjections):
            return f"they are a {type(shared).__name__}"
        if shared.rank != self.rank or shared.fan_in < fan_in or shared.fan_out < fan_out:
            return (
                f"the pair is for rank {shared.rank} and weights up to ({shared.fan_in}, "
                f"{shared.fan_out}), and the leaf for rank {self.rank} and ({fan_in}, {fan_out})"
            )
        return None

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `W + A diag(d) B diag(b)`, with `b` folded into `B`.

        The gradient of `b` then needs `x A`, (batch, rank), instead of an array of the output's
        size.
        """
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        a = jax.lax.stop_gradient(context.shared.a)[:fan_in].reshape(*sizes.inputs, self.rank)
        b = jax.lax.stop_gradient(context.shared.b)[:, :fan_out].reshape(self.rank, *sizes.outputs)
        scaled_b = b * self.b.reshape(*sizes.batch, 1, *sizes.outputs)  # (*batch, rank, *outputs)
        return weight.add(
            (a, (*inputs, "rank")),
            (self.d, (*batch, "rank")),
            (scaled_b, (*batch, "rank", *outputs)),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.axis_sizes
        return {"d": (*batch, self.rank), "b": (*batch, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {"d": (*batch, None), "b": (*batch, *outputs)}
