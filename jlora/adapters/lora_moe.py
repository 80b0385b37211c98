"""A mixture of LoRA experts: several updates of one weight, routed by the input."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _validation
from jlora.adapters import low_rank
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.initializers import sample_fan_in_uniform
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import (
    Axis,
    Dropout,
    Operand,
    ProductTerm,
    Term,
    WeightAxes,
    WeightProduct,
    contract,
    fit_token_mask,
    flat_size,
    split_axes,
)
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
        if weight.is_transposed:
            return "it is also used transposed, but its router takes the inputs of one direction"
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

    @property
    def fan_in(self) -> int:
        return math.prod(self.axis_sizes.inputs)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns the weight plus the sum over the experts, each weighted by the router."""
        del context
        batch, inputs, outputs = self.axes
        a = (self.a, (*batch, "expert", *inputs, "rank"))
        b = (low_rank.scale_factor(self.b, self.scale), (*batch, "expert", "rank", *outputs))
        router = (self.router, (*batch, *inputs, "expert"))
        *factors, scores = weight.label(a, b, router)
        return weight.add_term(
            RoutedTerm(tuple(factors), scores, scores.axes[-1], self.top_k, self.fan_in)
        )

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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands", "router", "dropout", "token_mask"],
    meta_fields=["expert_axis", "top_k", "fan_in"],
)
@dataclasses.dataclass(frozen=True)
class RoutedTerm(Term):
    """Several updates that each input weights: a mixture of experts.

    Attributes:
        operands: Factors of the updates, with the experts' axis.
        router: Linear function from the input to a score for each expert.
        expert_axis: Axis of the experts.
        top_k: Number of experts that every input uses.
        fan_in: Number of entries of an input, all of which the router has to see.
        dropout: Dropout of the input of the updates; the router sees all of it.
        token_mask: Mask of the tokens that count for the load-balancing loss; None: all.
    """

    operands: tuple[Operand, ...]
    router: Operand
    expert_axis: Axis
    top_k: int
    fan_in: int
    dropout: Dropout | None = None
    token_mask: jax.Array | None = None

    def map(self, fn: Callable[[Operand], Operand]) -> RoutedTerm:
        return dataclasses.replace(
            self,
            operands=tuple(fn(operand) for operand in self.operands),
            router=fn(self.router),
            dropout=self.dropout and self.dropout.map(fn),
        )

    def add_product(
        self, total: Any, x: Any, product: WeightProduct
    ) -> tuple[Any, Sequence[jax.Array]]:
        if product.routing_error is not None:
            raise ValueError(
                f"LoRAMoE on {product.path!r} cannot be used {product.routing_error}. Exclude this "
                f"weight from the adapter rules."
            )
        weights, loss = self._route(split_axes(x, product.x_groups), product)
        dropped = x if self.dropout is None else self.dropout(x)
        return total + product.multiply(dropped, (*self.operands, weights), total), (loss,)

    def _route(self, x: Operand, product: WeightProduct) -> tuple[Operand, jax.Array]:
        """Returns the weight of every expert for every input, and the load-balancing loss.

        The softmax is over the `top_k` best scores alone. The loss is
        `n sum_e (share of inputs that use e) (mean probability of e)`: one where all experts are
        used alike.

        References:
            Jiang et al., Mixtral of Experts, arXiv:2401.04088, section 2.1, for the weights.
            Fedus et al., Switch Transformers, arXiv:2101.03961, section 2.2, for the loss.
        """
        out_axes = product.out_axes
        tokens = [axis for axis in x.axes if axis in out_axes]
        seen = [axis for axis in self.router.axes if axis in x.axes and axis not in out_axes]
        unseen = set(self.router.axes) - set(x.axes) - {self.expert_axis}
        if unseen or flat_size(seen) != self.fan_in:
            raise ValueError(
                f"LoRAMoE on {product.path!r} gets {flat_size(seen)} of the {self.fan_in} input "
                f"features at one of its uses (of a slice, a shard or the transpose of the "
                f"weight, or of several looked-up matrices whose results one product sums). Its "
                f"router needs exactly these. Exclude this weight from the adapter "
                f"rules."
            )
        wide_x, router = (o.map(lambda array: array.astype(jnp.float32)) for o in (x, self.router))
        # (tokens, inputs) (inputs, experts) -> (tokens, experts)
        axes = [*tokens, self.expert_axis]
        scores = contract(wide_x, [router], axes, precision=product.precision)
        count = self.expert_axis.size
        _, best = lax.top_k(scores, self.top_k)
        is_used = jax.nn.one_hot(best, count, dtype=bool).any(-2)
        weights = jax.nn.softmax(scores, axis=-1, where=is_used)
        # Each of a stack of matrices has a balance of its own.
        axes = tuple(i for i, axis in enumerate(tokens) if axis not in self.router.axes)
        mask: jax.Array | float = 1.0
        num_tokens: jax.Array | float = math.prod(tokens[i].size for i in axes)
        if self.token_mask is not None:
            mask = fit_token_mask(self.token_mask, [tokens[i].size for i in axes], product.path)
            num_tokens = jnp.maximum(mask.sum(), 1)
            mask = jnp.expand_dims(mask, [i for i in range(scores.ndim) if i not in axes])
        share = (
            lax.stop_gradient((is_used.astype(jnp.float32) * mask).sum(axes))
            / num_tokens
            / self.top_k
        )
        loss = count * jnp.sum(share * (jax.nn.softmax(scores, -1) * mask).sum(axes) / num_tokens)
        return Operand(weights, (*tokens, self.expert_axis)), loss

    def add_materialized(self, total: Any, weight: Any) -> Any:
        raise ValueError(
            f"LoRAMoE on {weight.path!r} routes by the input, so it cannot be merged into one "
            f"weight or used outside a product (lora.explain lists the uses of each weight). Call "
            f"apply with the separate adapter, or exclude this weight from the adapter rules."
        )

    def scale(self, factor: Any) -> RoutedTerm:
        return dataclasses.replace(self, operands=ProductTerm(self.operands).scale(factor).operands)

    def is_zero_outside(self, axis: Axis) -> bool:
        return ProductTerm(self.operands).is_zero_outside(axis)

    def can_pad(self, axis: Axis) -> bool:
        keys = () if self.dropout is None else self.dropout.keys.axes
        return self.is_zero_outside(axis) and axis not in keys

    def to_product(self, weight: Any, used_by: str) -> ProductTerm | None:
        raise ValueError(
            f"LoRAMoE on {weight.path!r} cannot be used inside a function with a custom derivative "
            f"({used_by}), whose rule would route by the gradient. Exclude this weight from the "
            f"adapter rules."
        )

    def with_dropout(self, dropout: Dropout) -> RoutedTerm:
        return dataclasses.replace(self, dropout=dropout)

    def with_token_mask(self, token_mask: jax.Array) -> RoutedTerm:
        return dataclasses.replace(self, token_mask=token_mask)

    def fold_in(self, data: Any) -> RoutedTerm:
        return dataclasses.replace(self, dropout=self.dropout and self.dropout.fold_in(data))

    def gather(self, look_up: Callable[[Operand], Operand]) -> RoutedTerm:
        dropout = self.dropout and self.dropout.gather()
        return dataclasses.replace(
            dataclasses.replace(self, dropout=None).map(look_up), dropout=dropout
        )
