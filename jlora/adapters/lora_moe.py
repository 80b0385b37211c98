"""A mixture of LoRA experts: several updates of one weight, routed by the input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation
from jlora.adapters import low_rank
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    Expression,
    ExpressionInputs,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.initializers import sample_fan_in_uniform
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMoE(AdapterConfig):
    """`x W + (alpha / rank) sum_e g_e(x) x A_e B_e`, with a gate `g` over the top `top_k` experts.

    The gate is the softmax of the `top_k` highest scores of `x R`. It depends on the input, so the
    adapter cannot be merged. `lora.apply_with_aux_loss` also returns the load-balancing loss, which
    is added to the training loss with a small coefficient. (For an update of each expert of a
    mixture-of-experts model, use plain `LoRA` on its stacked weights.)

    Attributes:
        num_experts: Number of experts, each a low-rank update.
        top_k: Number of experts that every input uses.
        rank: Rank of each expert.
        alpha: Numerator of the updates' scale; positive.
        dropout: Probability of dropping an entry of the input of `A` while training; the router's
            input is not dropped.
        dtype: Data type of all arrays. Scores and gates are computed in float32.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Wu et al., Mixture of LoRA Experts, arXiv:2404.13628; Li et al., MixLoRA, arXiv:2404.15159,
        section 3. Fedus et al., arXiv:2101.03961, section 2.2, for the loss.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.LoRAMoE(num_experts=3, rank=2, alpha=4)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((4, 6))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> output, aux_loss = lora.apply_with_aux_loss(params, adapter, x)
        >>> output.shape, aux_loss.shape
        ((4, 5), ())
    """

    info = MethodInfo(
        name="Mixture of LoRAs",
        formula="x W + (alpha / r) sum_e g_e(x) x A_e B_e",
        num_params_formula="e * (r * (d + k) + d)",
        recommended_for="many tasks in one adapter; not mergeable",
        paper="Wu et al. 2404.13628; Li et al. 2404.15159",
    )
    supported_kinds = frozenset({"linear"})

    num_experts: int
    rank: int
    alpha: float
    top_k: int = 2
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_positive_int("LoRAMoE.num_experts", self.num_experts)
        _validation.check_positive_int("LoRAMoE.top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"LoRAMoE.top_k={self.top_k} exceeds num_experts={self.num_experts}. Use at most "
                f"that."
            )

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns the reason of any method, or that the weight is materialized or has experts."""
        if "ragged_dot_general" in weight.primitives:
            return (
                "its inputs are already routed to experts (lax.ragged_dot); use LoRA, which has an "
                "update for each expert"
            )
        if weight.dense_reasons:
            reasons = ", ".join(weight.dense_reasons)
            return f"the weight is materialized ({reasons}), but the update depends on the input"
        return super().unsupported_reason(weight)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoRAMoELeaf:
        """Returns `A` uniform, `B` zero, and a normal router with a standard deviation of 0.02."""
        _validation.warn_excess_rank(self, self.rank, weight)
        leaf = LoRAMoELeaf(
            a=None,  # type: ignore[arg-type]
            b=None,  # type: ignore[arg-type]
            router=None,  # type: ignore[arg-type]
            shape=weight.shape,
            axes=weight.axes,
            num_experts=int(self.num_experts),
            top_k=int(self.top_k),
            rank=int(self.rank),
            alpha=float(self.alpha),
            dropout=float(self.dropout),
        )
        shapes = leaf.shapes()
        key_a, key_router = jax.random.split(key)
        return dataclasses.replace(
            leaf,
            a=sample_fan_in_uniform(key_a, shapes["a"], weight.fan_in, self.dtype),
            b=jnp.zeros(shapes["b"], self.dtype),
            router=0.02 * jax.random.normal(key_router, shapes["router"], self.dtype),
        )


@register_family("lora_moe")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMoELeaf(AdapterLeaf):
    """Experts of one weight.

    Attributes:
        a: (*batch, num_experts, *inputs, rank), in the order of `axes`.
        b: (*batch, num_experts, rank, *outputs).
        router: (*batch, *inputs, num_experts).
    """

    a: jax.Array = array_field("a")
    b: jax.Array = array_field("b")
    router: jax.Array = array_field("router")
    shape: tuple[int, ...]
    axes: WeightAxes
    num_experts: int
    top_k: int
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        return low_rank.lora_scaling(self.rank, self.alpha)

    def expression(self, context: ExpressionInputs) -> Expression:
        """Returns the sum over the experts, weighted by the gate."""
        del context
        batch, inputs, outputs = self.axes
        a = (self.a, (*batch, "expert", *inputs, "rank"))
        b = (self.b * self.scale, (*batch, "expert", "rank", *outputs))
        router = (self.router, (*batch, *inputs, "expert"))
        return Expression(terms=[[a, b]], routing=(router, "expert", self.top_k))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.axis_sizes
        return {
            "a": (*batch, self.num_experts, *inputs, self.rank),
            "b": (*batch, self.num_experts, self.rank, *outputs),
            "router": (*batch, *inputs, self.num_experts),
        }

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, inputs, outputs = self.axes
        return {
            "a": (*batch, None, *inputs, None),
            "b": (*batch, None, None, *outputs),
            "router": (*batch, *inputs, None),
        }
