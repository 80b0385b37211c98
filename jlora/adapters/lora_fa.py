"""LoRA-FA: LoRA with `A` frozen."""

from __future__ import annotations

import dataclasses

import jax

from jlora import initializers
from jlora.adapters import low_rank
from jlora.adapters.base import (
    FROZEN,
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA whose `A` stays as it was drawn, so that training keeps no input of a layer.

    The gradient of `B` needs the `rank` numbers of `x A` for every token instead of all of `x`.
    On embeddings too it is `A` that is random and frozen, `B` that starts at zero.

    Attributes:
        rank: As in `LoRA`, like all other fields.

    References:
        Zhang et al., LoRA-FA, arXiv:2308.03303, section 3.
    """

    info = MethodInfo(
        name="LoRA-FA",
        formula="W + (alpha / r) A B, A frozen",
        num_params_formula="r * k",
        recommended_for="memory: the layers' inputs are not kept for the backward pass",
        paper="Zhang et al. 2308.03303",
    )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoRAFALeaf:
        """Factors as `init` makes them for a linear weight."""
        if weight.kind == "embedding" and self.init is initializers.kaiming_uniform:
            weight = weight._replace(kind="linear")
        return LoRAFALeaf(**low_rank.leaf_field_values(super().init_leaf(key, weight)))


@register_family("lora_fa")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFALeaf(LoRALeaf):
    """The factors of one weight, `a` frozen."""

    a: jax.Array = array_field(FROZEN)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """As LoRA, but that no gradient reaches `A`: its input is then needed no longer."""
        del context
        a, b = jax.lax.stop_gradient(self.a), self.b * self.scale
        return weight.add(*low_rank.label_factors(self, a, b))
