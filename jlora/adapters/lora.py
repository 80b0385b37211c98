"""LoRA: a low-rank update beside a frozen weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation, initializers
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
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
    """Low-rank adaptation: `W + (alpha / rank) * A B`, with x on the left.

    Attributes:
        rank: Width of the bottleneck; a positive count.
        alpha: Numerator of the scale put on the update; positive.
        dropout: Probability of dropping an entry of the input of `A` while training. It acts only
            where `apply` is given a `dropout_key`.
        use_rslora: Scale by `alpha / sqrt(rank)` instead, which keeps the update's size as
            the rank grows (rsLoRA).
        init: One of `jlora.initializers`. By default `A` is uniform and `B` zero; embeddings are the other
            way about, `A` zero and `B` normal, as in the reference.
        dtype: Of `A` and `B`. They are cast to the activation's type at each product.

    Raises:
        ValueError: For a value out of its range.
        TypeError: For one of another type.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
        Kalajdzievski, rsLoRA, arXiv:2312.03732, section 4.
    """

    info = MethodInfo(
        name="LoRA, rsLoRA",
        formula="W + (alpha / r) A B; rsLoRA: alpha / sqrt(r)",
        num_params_formula="r * (d + k)",
        recommended_for="the default; everything else is measured against it",
        paper="Hu et al. 2106.09685; Kalajdzievski 2312.03732",
    )

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    init: initializers.FactorInit = initializers.kaiming_uniform
    dtype: Any = jnp.float32

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoRALeaf:
        """Factors as `init` makes them."""
        _validation.warn_excess_rank(self, self.rank, weight)
        scale = low_rank.lora_scaling(self.rank, self.alpha, self.use_rslora)
        return LoRALeaf(
            **low_rank.init_factors(key, weight, self.init, self.rank, scale, self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            alpha=float(self.alpha),
            use_rslora=self.use_rslora,
            dropout=float(self.dropout),
            residual=self.init.residual,
        )


@register_family("lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRALeaf(AdapterLeaf):
    """The factors of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        shape: The weight's shape.
        axes: What each of the weight's axes does.
        residual: Whether it belongs on a base that `jlora.residual_base` or `jlora.loftq` made.
    """

    a: jax.Array = array_field("a")
    b: jax.Array = array_field("b")
    shape: tuple[int, ...]
    axes: WeightAxes
    rank: int
    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0
    residual: bool = False

    @property
    def scale(self) -> float:
        return low_rank.lora_scaling(self.rank, self.alpha, self.use_rslora)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """`W + scale * A B`; the scale is folded into `B`, which is far smaller than a result."""
        del context
        return weight.add(*low_rank.label_factors(self, self.a, self.b * self.scale))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return low_rank.factor_shapes(self.axis_sizes, self.rank)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return low_rank.factor_axes(self.axes)
