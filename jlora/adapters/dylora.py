"""DyLoRA: LoRA whose every prefix of ranks works."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from jlora import _validation
from jlora.adapters import low_rank
from jlora.adapters.base import LeafContext, MethodInfo, register_family
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class DyLoRA(LoRA):
    """LoRA trained at a rank `b` drawn anew for each step: `W + (alpha / b) A[:, :b] B[:b]`.

    The step's rank is drawn from the `dropout_key` given to `apply`, the same for every weight;
    without a key all ranks are used. Afterwards `jlora.truncate_rank(adapter, r)` is the adapter of any
    rank from `min_rank` up.

    Attributes:
        rank: The largest. All other fields but the next two are as in `LoRA`.
        min_rank: The smallest that is drawn.
        last_only: Whether a step trains only the last of its ranks, as the paper's faster variant.

    References:
        Valipour et al., DyLoRA, arXiv:2210.07558, algorithm 1.
    """

    info = MethodInfo(
        name="DyLoRA",
        formula="W + (alpha / b) A[:, :b] B[:b], b drawn at each step",
        num_params_formula="r * (d + k)",
        recommended_for="one training run for all ranks: choose after it",
        paper="Valipour et al. 2210.07558",
    )

    min_rank: int = 1
    last_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_positive_int("DyLoRA.least_rank", self.min_rank)
        _validation.check_bool("DyLoRA.last_only", self.last_only)
        if self.min_rank > self.rank:
            raise ValueError(
                f"DyLoRA.least_rank={self.min_rank} exceeds rank={self.rank}. Use at most that."
            )
        if self.init.residual:
            raise ValueError(
                f"DyLoRA.init={self.init!r} needs all its ranks to be where the base was. Use one "
                f"that starts at zero, such as initializers.kaiming_uniform."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> DyLoRALeaf:
        """Factors as `init` makes them."""
        made = super().init_leaf(key, weight)
        facts = low_rank.leaf_field_values(made)
        return DyLoRALeaf(**facts, min_rank=int(self.min_rank), last_only=self.last_only)


@register_family("dylora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DyLoRALeaf(LoRALeaf):
    """The factors of one weight, of which any first few ranks are an adapter."""

    min_rank: int
    last_only: bool

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """All ranks, or those of a step: the others are masked, for shapes cannot depend on it."""
        if context.key is None:
            return super().adapt(weight, context)
        key = jax.random.fold_in(context.key, zlib.crc32(b"DyLoRA"))
        drawn = jax.random.randint(key, (), self.min_rank, self.rank + 1)
        number = jnp.arange(self.rank)
        outputs = len(self.axes.outputs)

        def trained(factor: jax.Array, last: jax.Array) -> jax.Array:
            frozen = jax.lax.stop_gradient(factor)
            return jnp.where(last, factor, frozen) if self.last_only else factor

        by_row = number.reshape(-1, *[1] * outputs)  # The rank as it lies in `b`.
        a = trained(self.a, number == drawn - 1)
        b = trained(self.b, by_row == drawn - 1)
        scale = low_rank.lora_scaling(1, self.alpha) / (
            jnp.sqrt(drawn) if self.use_rslora else drawn
        )
        b = b * jnp.where(by_row < drawn, scale, 0).astype(b.dtype)
        return weight.add(*low_rank.label_factors(self, a, b))
