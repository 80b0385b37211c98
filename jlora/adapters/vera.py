"""VeRA: random factors shared by all layers, and trained vectors that scale them."""

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
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(AdapterConfig):
    """`W + A diag(d) B diag(b)`, with `A` and `B` random, frozen, and the same for all weights.

    The shared pair is as large as the largest of its weights asks for; smaller ones use its first
    rows and columns. It is in the adapter once, under the name `share`.

    Attributes:
        rank: Of the shared pair; far higher than LoRA's, for it costs no trained numbers but
            `rank` for each weight. The paper uses 256 to 1024.
        d_initial: What `d` starts at. `b` starts at zero.
        dropout: Probability of dropping an entry of the input while training.
        share: The name of the shared pair. Configs that differ need different names.
        dtype: Of all arrays.

    References:
        Kopiczko et al., VeRA, arXiv:2310.11454, section 3.1; shared over shapes as PEFT does.
    """

    info = MethodInfo(
        name="VeRA",
        formula="W + A diag(d) B diag(b), A and B random and shared",
        num_params_formula="r + k",
        recommended_for="the fewest numbers per adapter: many adapters, little storage",
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
        if not _validation.is_real_number(self.d_initial) or not 0 < self.d_initial < math.inf:
            raise ValueError(
                f"VeRA.d_initial={self.d_initial!r} lets nothing through. Use a positive finite "
                f"number, such as 0.1."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> VeRALeaf:
        """`d` at its initial value, `b` at zero."""
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
        """A random pair for the largest of the weights, uniform as Kaiming's for ReLU."""
        fan_in = max(weight.fan_in for weight in weights)
        fan_out = max(weight.fan_out for weight in weights)
        key_a, key_b = jax.random.split(key)
        of_a, of_b = math.sqrt(6 / fan_in), math.sqrt(6 / self.rank)
        a = jax.random.uniform(key_a, (fan_in, self.rank), self.dtype, -of_a, of_a)
        b = jax.random.uniform(key_b, (self.rank, fan_out), self.dtype, -of_b, of_b)
        return VeRAProjections(a=a, b=b, rank=int(self.rank), fan_in=fan_in, fan_out=fan_out)


@register_family("vera_shared")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRAProjections(SharedArrays):
    """The random pair: `a` (fan_in, rank) and `b` (rank, fan_out)."""

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
    """The vectors of one weight: `d` (*batch, rank) and `b` (*batch, *outputs)."""

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
            return f"it is a {type(shared).__name__}"
        if shared.rank != self.rank or shared.fan_in < fan_in or shared.fan_out < fan_out:
            return (
                f"its pair is for rank {shared.rank} and weights up to ({shared.fan_in}, "
                f"{shared.fan_out}), the part for rank {self.rank} and ({fan_in}, {fan_out})"
            )
        return None

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """`b` is folded into `B`: its gradient then needs the rank of `x A`, and no result."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        a = jax.lax.stop_gradient(context.shared.a)[:fan_in].reshape(*sizes.inputs, self.rank)
        b = jax.lax.stop_gradient(context.shared.b)[:, :fan_out].reshape(self.rank, *sizes.outputs)
        beside_rank = self.b.reshape(*sizes.batch, 1, *sizes.outputs)
        return weight.add(
            (a, (*inputs, "rank")),
            (self.d, (*batch, "rank")),
            (b * beside_rank, (*batch, "rank", *outputs)),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.axis_sizes
        return {"d": (*batch, self.rank), "b": (*batch, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {"d": (*batch, None), "b": (*batch, *outputs)}
