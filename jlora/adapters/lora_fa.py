"""LoRA-FA: LoRA with `A` frozen."""

from __future__ import annotations

import dataclasses

import jax

from jlora.adapters import inits, pair
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.adapters.protocol import FROZEN, About, Expression, Given, Weight, array, family


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

    about = About(
        name="LoRA-FA",
        formula="W + (alpha / r) A B, A frozen",
        parameters="r * k",
        good_for="memory: the layers' inputs are not kept for the backward pass",
        paper="Zhang et al. 2308.03303",
    )

    def leaf(self, key: jax.Array, weight: Weight) -> LoRAFALeaf:
        """Factors as `init` makes them for a linear weight."""
        if weight.kind == "embedding" and self.init is inits.uniform:
            weight = weight._replace(kind="linear")
        return LoRAFALeaf(**pair.facts_of(super().leaf(key, weight)))


@family("lora_fa")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFALeaf(LoRALeaf):
    """The factors of one weight, `a` frozen."""

    a: jax.Array = array(FROZEN)

    def expression(self, given: Given) -> Expression:
        """As LoRA, but that no gradient reaches `A`: its input is then needed no longer."""
        del given
        a, b = jax.lax.stop_gradient(self.a), self.b * self.scale
        return Expression(terms=[pair.labelled(self, a, b)])
