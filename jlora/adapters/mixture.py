"""A mixture of LoRAs: several updates of one weight, chosen among by each input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters import checks, pair
from jlora.adapters.inits import within
from jlora.adapters.protocol import (
    About,
    AdapterConfig,
    AdapterLeaf,
    Expression,
    Given,
    Weight,
    array,
    family,
)
from jlora.factored.probe import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMixture(AdapterConfig):
    """`x W + (alpha / rank) sum_e g_e(x) x A_e B_e`, with a gate `g` over the best `top_k` experts.

    The gate is the softmax of the best `top_k` of the scores `x R`. What it chooses depends on the
    input, so a mixture cannot be merged. `lora.apply_with_balance` also returns the load-balancing
    loss, to be added to the training loss with a small factor. (An update for each expert of a
    mixture-of-experts model is plain `LoRA` on its stacked weights.)

    Attributes:
        experts: How many updates there are.
        top_k: How many every input uses.
        rank: Of each.
        alpha: Numerator of the scale put on the updates; positive.
        dropout: Probability of dropping an entry of the input of `A` while training; the router
            sees all of it.
        dtype: Of all arrays. Scores and gates are computed in float32.

    References:
        Wu et al., Mixture of LoRA Experts, arXiv:2404.13628; Li et al., MixLoRA, arXiv:2404.15159,
        section 3. Fedus et al., arXiv:2101.03961, section 2.2, for the loss.
    """

    about = About(
        name="Mixture of LoRAs",
        formula="x W + (alpha / r) sum_e g_e(x) x A_e B_e",
        parameters="e * (r * (d + k) + d)",
        good_for="many tasks in one adapter; not mergeable",
        paper="Wu et al. 2404.13628; Li et al. 2404.15159",
    )
    kinds = frozenset({"linear"})

    experts: int
    rank: int
    alpha: float
    top_k: int = 2
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("LoRAMixture.experts", self.experts)
        checks.count("LoRAMixture.top_k", self.top_k)
        if self.top_k > self.experts:
            raise ValueError(
                f"LoRAMixture.top_k={self.top_k} exceeds experts={self.experts}. Use at most that."
            )

    def refusal(self, weight: Weight) -> str | None:
        """As for any family, and for rows that have experts already."""
        if "ragged_dot_general" in weight.uses:
            return "its rows have experts already (lax.ragged_dot); use LoRA, one for each of them"
        if weight.dense:
            why = ", ".join(weight.dense)
            return f"its dense sum is needed ({why}), and a mixture is no sum of weights"
        return super().refusal(weight)

    def leaf(self, key: jax.Array, weight: Weight) -> LoRAMixtureLeaf:
        """`A` uniform, `B` zero, the router normal with a deviation of 0.02."""
        checks.warn_of_waste(self, self.rank, weight)
        leaf = LoRAMixtureLeaf(
            a=None,  # type: ignore[arg-type]
            b=None,  # type: ignore[arg-type]
            router=None,  # type: ignore[arg-type]
            shape=weight.shape,
            axes=weight.axes,
            experts=int(self.experts),
            top_k=int(self.top_k),
            rank=int(self.rank),
            alpha=float(self.alpha),
            dropout=float(self.dropout),
        )
        shapes = leaf.shapes()
        key_a, key_router = jax.random.split(key)
        return dataclasses.replace(
            leaf,
            a=within(key_a, shapes["a"], weight.fan_in, self.dtype),
            b=jnp.zeros(shapes["b"], self.dtype),
            router=0.02 * jax.random.normal(key_router, shapes["router"], self.dtype),
        )


@family("lora_mixture")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMixtureLeaf(AdapterLeaf):
    """The experts of one weight.

    Attributes:
        a: (*batch, experts, *inputs, rank), in the order of `axes`.
        b: (*batch, experts, rank, *outputs).
        router: (*batch, *inputs, experts).
    """

    a: jax.Array = array("a")
    b: jax.Array = array("b")
    router: jax.Array = array("router")
    shape: tuple[int, ...]
    axes: Axes
    experts: int
    top_k: int
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        return pair.scale_of(self.rank, self.alpha)

    def expression(self, given: Given) -> Expression:
        """The sum over the experts, each weighed by the gate."""
        del given
        batch, inputs, outputs = self.axes
        a = (self.a, (*batch, "expert", *inputs, "rank"))
        b = (self.b * self.scale, (*batch, "expert", "rank", *outputs))
        router = (self.router, (*batch, *inputs, "expert"))
        return Expression(terms=[[a, b]], gate=(router, "expert", self.top_k))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.groups
        return {
            "a": (*batch, self.experts, *inputs, self.rank),
            "b": (*batch, self.experts, self.rank, *outputs),
            "router": (*batch, *inputs, self.experts),
        }

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, inputs, outputs = self.axes
        return {
            "a": (*batch, None, *inputs, None),
            "b": (*batch, None, None, *outputs),
            "router": (*batch, *inputs, None),
        }
