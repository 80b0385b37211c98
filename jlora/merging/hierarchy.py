"""One adapter trained on top of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jlora.adapters.dylora import DyLoRALeaf
from jlora.adapters.protocol import AdapterLeaf, leaves_of
from jlora.merging.checking import check_adapters
from jlora.merging.pairs import beside, factors_of, plain_lora

Adapter = Mapping[str, Any]


def stacked(lower: Adapter, upper: Adapter) -> dict[str, Any]:
    """An adapter on top of another: `W + delta_lower + delta_upper`, the lower one frozen.

    Train a task's adapter on a frozen base adapter with it:
    `loss(upper) = ...lora.apply(params, stacked(lower, upper), x)`. It computes what `upper` does
    on `lora.merge(params, lower)`, without a merged copy of the base. No gradient reaches `lower`,
    and nothing of it is dropped at random. Train and save `upper`; `combine` joins the two.

    Args:
        lower: The trained adapter below. Weights that it alone adapts may be of any family that is
            a change of the weight, which a mixture of experts is not.
        upper: The adapter on top. Likewise.

    Raises:
        ValueError: Where both adapt a weight and the two do not lie alike or the upper one has a
            dropout; where both have shared arrays under one name; where either belongs on the base
            of `residual_base`.
        TypeError: Where both adapt a weight and one of them is no pair of factors.
    """
    check_adapters([lower, upper])
    lower = jax.lax.stop_gradient(dict(lower))
    below, above = leaves_of(lower), leaves_of(upper)
    shared = sorted((set(lower) - set(below)) & set(upper))
    if shared:
        raise ValueError(
            f"Both adapters have shared arrays under {shared[0]!r}, and one would take the place "
            f"of the other. Merge the lower one into the base: lora.merge(params, lower)."
        )
    joined: dict[str, Any] = {**lower, **upper}
    for path, leaf in below.items():
        if path not in above:
            joined[path] = _settled(leaf)
            continue
        _check_stackable(path, above[path])
        factors = [factors_of("lower", lower, path), factors_of("upper", upper, path)]
        joined[path] = plain_lora(leaf, *beside(leaf, factors))
    used = {leaf.share for leaf in leaves_of(joined).values()}
    return {
        name: node for name, node in joined.items() if isinstance(node, AdapterLeaf) or name in used
    }


def _settled(leaf: Any) -> Any:
    """The leaf without what training draws: dropout, and DyLoRA's ranks."""
    if isinstance(leaf, DyLoRALeaf):
        leaf = dataclasses.replace(leaf, least_rank=leaf.rank)
    return dataclasses.replace(leaf, dropout=0.0) if leaf.dropout else leaf


def _check_stackable(path: str, leaf: AdapterLeaf) -> None:
    if isinstance(leaf, DyLoRALeaf):
        raise TypeError(
            f"The upper adapter has a DyLoRALeaf on {path!r}, whose ranks are drawn at each step, "
            f"which those of the lower must not be. Train it on lora.merge(params, lower)."
        )
    if leaf.dropout:
        raise ValueError(
            f"The upper adapter has dropout={leaf.dropout} on {path!r}, which the lower one adapts "
            f"too and whose input it must not drop. Train it on lora.merge(params, lower), or with "
            f"dropout=0.0; jlora.merging.combine joins the two for serving."
        )
