"""The pairs of factors that adapters change weights by, and several of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters import pair
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.lora import LoRALeaf
from jlora.adapters.mix import MixLeaf
from jlora.adapters.protocol import AdapterLeaf, expression_of
from jlora.deltas import looks_at_base, thin_factors


def factors_of(name: str, adapter: Mapping[str, Any], path: str) -> tuple[jax.Array, jax.Array]:
    """The change of one weight as `a` (*batch, *inputs, m) and `b` (*batch, m, *outputs).

    Args:
        name: Of the adapter, for the message.
        adapter: One that `check_adapters` has passed.
        path: Of a weight that it adapts.

    Raises:
        TypeError: For a family whose change is no such pair.
    """
    leaf: AdapterLeaf = adapter[path]
    # Their rank is what was asked for, and may be as high as the weight's own.
    plain = isinstance(leaf, LoRALeaf | AdaLoRALeaf | MixLeaf)
    factors = None
    if not looks_at_base(adapter, path):
        factors = thin_factors(leaf, expression_of(adapter, path, None), any_rank=plain)
    if factors is None:
        raise TypeError(
            f"{name!r} has a {type(leaf).__name__} on {path!r}, whose change is no pair of thin "
            f"factors. Take the nearest LoRA, jlora.to_lora(adapter, params, rank).adapter, or "
            f"join the adapters with jlora.merging.combine."
        )
    a, b = factors
    shapes = pair.shapes_of(leaf.groups, a.shape[-1])
    return a.reshape(shapes["a"]), b.reshape(shapes["b"])


def beside(
    leaf: AdapterLeaf, factors: Sequence[tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """One pair of all: the factors of one weight side by side, so that the ranks add.

    Args:
        leaf: Of the weight.
        factors: At least one pair.
    """
    a = jnp.concatenate([a for a, _ in factors], axis=-1)
    b = jnp.concatenate([b for _, b in factors], axis=len(leaf.groups.batch))
    return a, b


def plain_lora(leaf: AdapterLeaf, a: jax.Array, b: jax.Array) -> LoRALeaf:
    """Plain LoRA of the scale one and without dropout, for the leaf's weight."""
    rank = a.shape[-1]
    return LoRALeaf(a=a, b=b, shape=leaf.shape, axes=leaf.axes, rank=rank, alpha=float(rank))
