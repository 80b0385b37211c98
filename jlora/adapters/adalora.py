"""AdaLoRA: an update in singular-value form whose rank is allocated during training."""

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
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(AdapterConfig):
    """`W + (alpha / rank) * A diag(s) B`, with the least important entries of `s` set to zero.

    Train it with `jlora.adalora_rank_allocator` around the optimizer, which scores the importance,
    and with `jlora.orthogonal_regularizer` added to the loss, which keeps `A` and `B` orthogonal.
    `jlora.prune_ranks` then removes the ranks that were set to zero.

    Attributes:
        rank: Initial rank, for example 1.5 times the target rank.
        alpha: Numerator of the update's scale; positive.
        dropout: Probability of dropping an entry of the input of `A` while training.
        dtype: Data type of `A`, `s` and `B`.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, section 3.1. The scale is that of its code; `A` and
        `B` here are the paper's `Q` and `P`, because x is on the left.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.AdaLoRA(rank=3, alpha=6)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].s.shape
        (3,)
    """

    info = MethodInfo(
        name="AdaLoRA",
        formula="W + (alpha / r) A diag(s) B, the least important s set to zero",
        num_params_formula="r * (d + k + 1)",
        recommended_for="a fixed budget of ranks, allocated by importance",
        paper="Zhang et al. 2303.10512",
    )
    supported_kinds = frozenset({"linear"})

    rank: int
    alpha: float
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> AdaLoRALeaf:
        """Returns `A` and `B` normal with a standard deviation of 0.02, and `s` zero."""
        _validation.warn_excess_rank(self, self.rank, weight)
        key_a, key_b = jax.random.split(key)
        shapes = low_rank.factor_shapes(weight.axis_sizes, self.rank)
        return AdaLoRALeaf(
            a=0.02 * jax.random.normal(key_a, shapes["a"], self.dtype),
            s=jnp.zeros((*weight.axis_sizes.batch, self.rank), self.dtype),
            b=0.02 * jax.random.normal(key_b, shapes["b"], self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            alpha=float(self.alpha),
            dropout=float(self.dropout),
        )


@register_family("adalora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRALeaf(AdapterLeaf):
    """Singular triplets of the update of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        s: (*batch, rank).
        b: (*batch, rank, *outputs).
    """

    a: jax.Array = array_field("a")
    s: jax.Array = array_field("s")
    b: jax.Array = array_field("b")
    shape: tuple[int, ...]
    axes: WeightAxes
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        return low_rank.lora_scaling(self.rank, self.alpha)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `W + scale * A diag(s) B`; `s` is folded into `B`."""
        del context
        b = low_rank.apply_rank_gates(self, low_rank.scale_factor(self.s, self.scale), self.b)
        return weight.add(*low_rank.label_factors(self, self.a, b))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, *_ = self.axis_sizes
        return {**low_rank.factor_shapes(self.axis_sizes, self.rank), "s": (*batch, self.rank)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {**low_rank.factor_axes(self.axes), "s": (*self.axes.batch, None)}
