"""DyLoRA: LoRA trained so that every prefix of its ranks is an adapter."""

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
    """LoRA trained at a rank `b` drawn for each step: `W + (alpha / b) A[:, :b] B[:b]`.

    The step's rank is drawn from the `dropout_key` of `apply`, the same for every weight; without a
    key all ranks are used. After training, `jlora.truncate_rank(adapter, r)` returns the adapter of
    any rank from `min_rank` to `rank`. The other fields are those of `LoRA`.

    Attributes:
        rank: Largest rank.
        min_rank: Smallest rank that is drawn.
        last_only: Whether a step trains only the last of its ranks, the paper's faster variant.

    Raises:
        ValueError: A value is out of range, or `init` does not start at zero.
        TypeError: A value is of another type.

    References:
        Valipour et al., DyLoRA, arXiv:2210.07558.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DyLoRA(rank=4, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((3, 6)))
        >>> jlora.truncate_rank(adapter, 2)["w"].a.shape
        (6, 2)
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
        _validation.check_positive_int("DyLoRA.min_rank", self.min_rank)
        _validation.check_bool("DyLoRA.last_only", self.last_only)
        if self.min_rank > self.rank:
            raise ValueError(
                f"DyLoRA.min_rank={self.min_rank} exceeds rank={self.rank}. Use at most that."
            )
        if self.init.residual:
            raise ValueError(
                f"DyLoRA.init={self.init!r} takes an update of all ranks out of the base, which a "
                f"lower rank would lack. Use an initialization whose update starts at zero, such "
                f"as initializers.kaiming_uniform."
            )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> DyLoRALeaf:
        """Returns factors from `init`."""
        fields = low_rank.leaf_field_values(super().init_leaf(key, weight))
        return DyLoRALeaf(**fields, min_rank=int(self.min_rank), last_only=self.last_only)


@register_family("dylora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DyLoRALeaf(LoRALeaf):
    """Factors of one weight, every prefix of whose ranks is an adapter."""

    min_rank: int
    last_only: bool

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns the update of all ranks, or of the step's, with the others masked.

        The ranks are masked instead of sliced, because shapes cannot depend on a drawn value.
        """
        if context.key is None:
            return super().adapt(weight, context)
        key = jax.random.fold_in(context.key, zlib.crc32(b"DyLoRA"))
        step_rank = jax.random.randint(key, (), self.min_rank, self.rank + 1)
        a_ranks = jnp.arange(self.rank)  # The rank of each column of `a`.
        b_ranks = a_ranks.reshape(-1, *[1] * len(self.axes.outputs))  # The rank axis of `b`.

        def freeze_earlier(factor: jax.Array, is_last: jax.Array) -> jax.Array:
            frozen = jax.lax.stop_gradient(factor)
            return jnp.where(is_last, factor, frozen) if self.last_only else factor

        a = freeze_earlier(self.a, a_ranks == step_rank - 1)
        b = freeze_earlier(self.b, b_ranks == step_rank - 1)
        divisor = step_rank.astype(jnp.float32)
        divisor = jnp.sqrt(divisor) if self.use_rslora else divisor
        scale = low_rank.lora_scaling(1, self.alpha) / divisor
        b = low_rank.scale_factor(b, jnp.where(b_ranks < step_rank, scale, 0))
        return weight.add(*low_rank.label_factors(self, a, b))
