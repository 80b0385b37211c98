"""What the axes of a weight do where it meets an activation."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jlora.factored.contraction import Atom
from jlora.factored.network import Network


class Role(enum.Enum):
    """What an axis of a weight does in a product."""

    INPUT = "input"  # Contracted with the activation.
    WINDOW = "window"  # Contracted too, while a convolution slides over it.
    OUTPUT = "output"  # Appears in the result.
    BATCH = "batch"  # Pairs off with an axis of the activation: one matrix for each index.


class Dense(str):
    """Why a use of a weight needs the dense sum."""


Roles = dict[Atom, Role]


def mixes(network: Network, roles: Roles) -> bool:
    """Whether a gain runs along what is summed over and along what is not, or along a window: then
    neither the activation nor the result can be scaled by it.
    """
    for gain in network.gains:
        along = {roles[atom] for atom in gain.atoms} - {Role.BATCH}
        if along - {Role.OUTPUT} and along - {Role.INPUT}:
            return True
    return False


class Product(NamedTuple):
    """How one primitive multiplies with a weight.

    Attributes:
        roles: `(eqn, side, network)` to the roles of the network's atoms, or why not.
        multiply: `(eqn, bind, side, values)` to the result; `values[side]` is the factored weight.
    """

    roles: Callable[[Any, int, Network], Roles | Dense]
    multiply: Callable[[Any, Callable[..., Any], int, Sequence[Any]], Any]
