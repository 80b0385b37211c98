"""Equations in which a weight meets an activation: the products that stay factored.

Every product has two functions. `roles` says what each atom of the weight does there (the probe
asks it), or why the product cannot be made from the operands. `multiply` makes it: the base's own
equation, plus `(x A) B` for every term, times the gains.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlora.factored import convolutions, dots, ragged
from jlora.factored.network import Network
from jlora.factored.roles import Product

RULES: dict[str, Product] = {
    "dot_general": dots.PRODUCT,
    "ragged_dot_general": ragged.PRODUCT,
    "conv_general_dilated": convolutions.PRODUCT,
}


def side_of(networks: Sequence[Network | None]) -> int | None:
    """Which input of the product is treated as the weight: the one that is not itself looked up."""
    sides = [side for side, network in enumerate(networks) if network is not None]
    return min(sides, key=lambda side: networks[side].indexed) if sides else None  # type: ignore
