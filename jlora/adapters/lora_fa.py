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
    """LoRA with a random, frozen `A`, so that the backward pass saves no layer inputs.

    The gradient of `B` needs the `rank` elements of `x A` for every token instead of all of `x`.
    On embeddings, too, `A` is random and frozen, and `B` starts at zero. The fields are those of
    `LoRA`.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Zhang et al., LoRA-FA, arXiv:2308.03303, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRAFA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].array_labels()
        {'a': 'frozen', 'b': 'b'}
    """

    info = MethodInfo(
        name="LoRA-FA",
        formula="W + (alpha / r) A B, A frozen",
        num_params_formula="r * k",
        recommended_for="memory: the backward pass saves no layer inputs",
        paper="Zhang et al. 2308.03303",
    )

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoRAFALeaf:
        """Returns factors from `init`, for embeddings those of a linear weight."""
        if weight.kind == "embedding" and self.init is initializers.kaiming_uniform:
            weight = weight._replace(kind="linear")
        return LoRAFALeaf(**low_rank.leaf_field_values(super().init_leaf(key, weight)))


@register_family("lora_fa")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFALeaf(LoRALeaf):
    """Factors of one weight, with `a` frozen."""

    a: jax.Array = array_field(FROZEN)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns LoRA's update without a gradient of `A`, so that its input is not saved."""
        del context
        a, b = jax.lax.stop_gradient(self.a), low_rank.scale_factor(self.b, self.scale)
        return weight.add(*low_rank.label_factors(self, a, b))
