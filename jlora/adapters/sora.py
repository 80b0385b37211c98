"""SoRA: LoRA with a gate on every rank that an L1 penalty drives to zero."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jlora.adapters import low_rank
from jlora.adapters.base import (
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoRA(LoRA):
    """`W + (alpha / rank) * A diag(g) B`, with the gates `g` of unimportant ranks driven to zero.

    Train it with `optax.chain(optimizer, jlora.soft_threshold(learning_rate * strength))`: the
    proximal step of an L1 penalty of `strength` on the gates. `jlora.prune_ranks` then removes the
    ranks whose gate is zero. Gates start at one. The other fields are those of `LoRA`.

    Attributes:
        rank: Initial rank.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Ding et al., SoRA, arXiv:2311.11696, section 3.2 and equation 8. Its code draws the gates
        from a normal distribution; with ones, every rank starts alike.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.SoRA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].gate
        Array([1., 1.], dtype=float32)
    """

    info = MethodInfo(
        name="SoRA",
        formula="W + (alpha / r) A diag(g) B, g sparse",
        num_params_formula="r * (d + k + 1)",
        recommended_for="choosing each weight's rank without a budget",
        paper="Ding et al. 2311.11696",
    )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> SoRALeaf:
        """Returns factors from `init`, and gates of one."""
        fields = low_rank.leaf_field_values(super().init_leaf(key, weight))
        gate = jnp.ones((*weight.axis_sizes.batch, self.rank), self.dtype)
        return SoRALeaf(**fields, gate=gate)


@register_family("sora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoRALeaf(LoRALeaf):
    """Factors and gates of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        gate: (*batch, rank).
    """

    gate: jax.Array = array_field("gate")

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `W + scale * A diag(g) B`; the gates are folded into `B`."""
        del context
        b = low_rank.apply_rank_gates(self, low_rank.scale_factor(self.gate, self.scale), self.b)
        return weight.add(*low_rank.label_factors(self, self.a, b))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, *_ = self.axis_sizes
        return {**super().shapes(), "gate": (*batch, self.rank)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {**super().array_axes(), "gate": (*self.axes.batch, None)}
