"""What may be added to a loss, and what weight decay should touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.lora import LoRALeaf
from jlora.adapters.protocol import is_leaf
from jlora.optim.labels import labels

PyTree = Any

# Arrays that make the update smaller as they shrink; a magnitude or a gate does something else.
_FACTORS = frozenset({"a", "b", "s", "core", "w1", "w2", "spectrum"})


def decay_mask(params: PyTree) -> PyTree:
    """A tree of the same structure with True for what weight decay is meant for: the factors.

    Magnitudes, gates, scaling vectors, banks, routers and whole weights are left alone. Give it as
    `optax.adamw(..., mask=jlora.decay_mask)`.
    """
    return jax.tree.map(lambda label: label in _FACTORS, labels(params))


def orthogonality(adapter: PyTree) -> jax.Array:
    """AdaLoRA's penalty, `||A^T A - I||^2 + ||B B^T - I||^2` summed over all matrices: a float32.

    Add it to the loss with a factor of 0.1 to 0.5.

    Args:
        adapter: Any tree with AdaLoRA leaves.

    Raises:
        ValueError: When it has none.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, equation 4.
    """
    nodes = jax.tree.leaves(adapter, is_leaf=is_leaf)
    leaves = [node for node in nodes if isinstance(node, AdaLoRALeaf)]
    if not leaves:
        raise ValueError("orthogonality found no AdaLoRA leaf. Give rules with jlora.AdaLoRA.")
    total = jnp.zeros((), jnp.float32)
    for leaf in leaves:
        batch, rank = leaf.s.shape[:-1], leaf.rank
        a = leaf.a.reshape(*batch, -1, rank)
        b = leaf.b.reshape(*batch, rank, -1)
        for gram in (jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)):
            total += ((gram - jnp.eye(rank)) ** 2).sum()
    return total


def overlap(adapter: Mapping[str, Any], *others: Mapping[str, Any]) -> jax.Array:
    """How much adapters share of their input directions: `sum ||A^T A'||^2`, a float32.

    Added to the loss of a new task, with the adapters of earlier ones as `others`, it keeps what is
    learned out of their way, so that they can be added up later. No gradient reaches the others.

    Args:
        adapter: The one that is trained, with leaves of LoRA or a family built on it.
        others: Adapters of the same model. Only weights that both adapt count.

    Raises:
        ValueError: When another has no weight in common with it.

    References:
        Wang et al., O-LoRA, arXiv:2310.14152, equations 6 to 8.
    """
    total = jnp.zeros((), jnp.float32)
    mine = {path: leaf for path, leaf in adapter.items() if isinstance(leaf, LoRALeaf)}
    for number, other in enumerate(others):
        common = [path for path in mine if isinstance(other.get(path), LoRALeaf)]
        if not common:
            raise ValueError(
                f"overlap: number {number} of the others adapts none of the {len(mine)} weights "
                f"that the adapter has LoRA factors for. Give adapters of the same model."
            )
        for path in common:
            leaf, theirs = mine[path], jax.lax.stop_gradient(other[path])
            batch = leaf.groups.batch
            a = leaf.a.reshape(*batch, -1, leaf.rank)
            b = theirs.a.reshape(*batch, -1, theirs.rank)
            total += ((jnp.swapaxes(a, -1, -2) @ b) ** 2).sum()
    return total
