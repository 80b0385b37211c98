"""LoRA: a low-rank update of a frozen weight."""

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
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
    """Low-rank adaptation: `W + (alpha / rank) * A B`, with x on the left.

    Attributes:
        rank: Rank of the update; positive.
        alpha: Numerator of the update's scale; positive.
        dropout: Probability of dropping an entry of the input of `A` while training. It acts only
            where `apply` is given a `dropout_key`.
        use_rslora: Whether the scale is `alpha / sqrt(rank)`, which keeps the update's size as the
            rank grows (rsLoRA), instead of `alpha / rank`.
        init: One of `jlora.initializers`. By default `A` is uniform and `B` zero; for embeddings,
            as in the reference code, `A` is zero and `B` normal.
        dtype: Data type of `A` and `B`. They are cast to the activation's type at each product.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
        Kalajdzievski, rsLoRA, arXiv:2312.03732, section 4.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].a.shape, adapter["w"].b.shape, adapter["w"].scale
        ((6, 2), (2, 5), 2.0)
    """

    info = MethodInfo(
        name="LoRA, rsLoRA",
        formula="W + (alpha / r) A B; rsLoRA: alpha / sqrt(r)",
        num_params_formula="r * (d + k)",
        recommended_for="the default, and the baseline of all others",
        paper="Hu et al. 2106.09685; Kalajdzievski 2312.03732",
    )

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    init: initializers.FactorInit = initializers.kaiming_uniform
    dtype: Any = jnp.float32

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoRALeaf:
        """Returns factors from `init`."""
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
    """Factors of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        shape: Shape of the weight.
        axes: Roles of the weight's axes.
        residual: Whether its base is one of `jlora.residual_base` or `jlora.loftq`.
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
        """Returns `W + scale * A B`; the scale is folded into `B`, the smallest array."""
        del context
        b = low_rank.scale_factor(self.b, self.scale)
        return weight.add(*low_rank.label_factors(self, self.a, b))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return low_rank.factor_shapes(self.axis_sizes, self.rank)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return low_rank.factor_axes(self.axes)
