"""Which module of transformers every weight of a Flax model is, as PEFT names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jlora.checkpoints.pieces import Piece, Weight

# Of a mixture's experts transformers 5 makes two parameters of one module, whatever its files hold.
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
_JOINED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


class Site(NamedTuple):
    """One parameter of a module, and where the Flax model has it.

    Attributes:
        module: The module's name.
        parameter: "weight", "bias", or that of a module of experts.
        path: Of the Flax weight.
        entry: Which one of the weight's stack it is.
        piece: How the parameter's tensor fills the weight; None for experts, which are many.
    """

    module: str
    parameter: str
    path: str
    entry: tuple[int, ...]
    piece: Piece | None


def sites_of(weights: Mapping[str, Weight]) -> list[Site]:
    """The sites of a model whose weights are these tensors, in the order of its weights."""
    found: dict[tuple[str, str], Site] = {}
    for path, weight in weights.items():
        for piece in weight.pieces:
            expert = _EXPERT.fullmatch(piece.key)
            if expert:
                module, parameter = expert[1], _JOINED[expert[2]]
                entry = piece.starts[: piece.stacks - 1]
                site = Site(module, parameter, path, entry, None)
            else:
                module, _, parameter = piece.key.rpartition(".")
                site = Site(module, parameter, path, piece.starts[: piece.stacks], piece)
            found.setdefault((site.module, site.parameter), site)
    return list(found.values())
