"""Equations in which a weight meets an activation: the products that stay factored.

Every product has two functions. `roles` says what each atom of the weight does there (the probe
asks it), or why the product cannot be made from the operands. `multiply` makes it: the base's own
equation, plus `(x A) B` for every term, times the gains.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlora.interpreter import conv, dot_products
from jlora.interpreter.dot_products import ProductRule
from jlora.interpreter.factored_array import TensorNetwork

PRODUCT_RULES: dict[str, ProductRule] = {
    "dot_general": dot_products.DOT_GENERAL_RULE,
    "ragged_dot_general": dot_products.RAGGED_DOT_RULE,
    "conv_general_dilated": conv.CONV_RULE,
}


def find_weight_side(networks: Sequence[TensorNetwork | None]) -> int | None:
    """Which input of the product is treated as the weight: the one that is not itself looked up."""
    sides = [side for side, network in enumerate(networks) if network is not None]
    return min(sides, key=lambda side: networks[side].is_gathered) if sides else None  # type: ignore
