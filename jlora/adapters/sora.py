"""SoRA: LoRA with a gate on every rank, which sparsity closes."""

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
    """`W + (alpha / rank) * A diag(g) B`, the gates `g` driven to zero where they do little.

    Train it with `optax.chain(optimizer, jlora.soft_threshold(learning_rate * strength))`: the
    proximal step for a penalty of `strength` on the absolute gates. `jlora.prune_ranks` then leaves out
    the ranks whose gate is zero. Gates start at one.

    Attributes:
        rank: What training starts with; all other fields are as in `LoRA`.

    References:
        Ding et al., SoRA, arXiv:2311.11696, section 3.2 and equation 8. Its code draws the gates
        normal; from one every rank starts alike.
    """

    info = MethodInfo(
        name="SoRA",
        formula="W + (alpha / r) A diag(g) B, g made sparse",
        num_params_formula="r * (d + k + 1)",
        recommended_for="finding each weight's rank without a budget",
        paper="Ding et al. 2311.11696",
    )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> SoRALeaf:
        """Factors as `init` makes them, and open gates."""
        made = super().init_leaf(key, weight)
        facts = low_rank.leaf_field_values(made)
        gate = jnp.ones((*weight.axis_sizes.batch, self.rank), self.dtype)
        return SoRALeaf(**facts, gate=gate)


@register_family("sora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoRALeaf(LoRALeaf):
    """The factors of one weight, and its gates (*batch, rank)."""

    gate: jax.Array = array_field("gate")

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """`W + scale * A diag(g) B`; the gates are folded into `B`."""
        del context
        b = low_rank.apply_rank_gates(self, self.gate * self.scale, self.b)
        return weight.add(*low_rank.label_factors(self, self.a, b))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, *_ = self.axis_sizes
        return {**super().shapes(), "gate": (*batch, self.rank)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {**super().array_axes(), "gate": (*self.axes.batch, None)}
