"""Product rules by primitive: the products of weight and activation that stay factored.

Every rule has two functions. `get_axis_roles` returns the role of each axis of the weight, or the
reason for which the product needs the materialized weight; `usage` calls it too. `multiply`
computes the product: the equation on the base, plus `(x A) B` for every term, times the gains.
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
    """Returns the input of a product that is its weight: preferably one that was not gathered."""
    sides = [side for side, network in enumerate(networks) if network is not None]
    return min(sides, key=lambda side: networks[side].is_gathered) if sides else None  # type: ignore
