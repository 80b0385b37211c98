"""What may be added to a loss, and what weight decay should touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._tree import PyTree
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.base import is_adapter_node
from jlora.adapters.lora import LoRALeaf
from jlora.optim.multi_transform import param_labels

# Arrays that make the update smaller as they shrink; a magnitude or a gate does something else.
_DECAYED_LABELS = frozenset({"a", "b", "s", "core", "w1", "w2", "spectrum"})


def weight_decay_mask(params: PyTree) -> PyTree:
    """A tree of the same structure with True for what weight decay is meant for: the factors.

    Magnitudes, gates, scaling vectors, banks, routers and whole weights are left alone. Give it as
    `optax.adamw(..., mask=jlora.weight_decay_mask)`.
    """
    return jax.tree.map(lambda label: label in _DECAYED_LABELS, param_labels(params))


def orthogonal_regularizer(adapter: PyTree) -> jax.Array:
    """AdaLoRA's penalty, `||A^T A - I||^2 + ||B B^T - I||^2` summed over all matrices: a float32.

    Add it to the loss with a factor of 0.1 to 0.5.

    Args:
        adapter: Any tree with AdaLoRA leaves.

    Raises:
        ValueError: When it has none.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, equation 4.
    """
    nodes = jax.tree.leaves(adapter, is_leaf=is_adapter_node)
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


def subspace_overlap(adapter: Mapping[str, Any], *others: Mapping[str, Any]) -> jax.Array:
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
            batch = leaf.axis_sizes.batch
            a = leaf.a.reshape(*batch, -1, leaf.rank)
            b = theirs.a.reshape(*batch, -1, theirs.rank)
            total += ((jnp.swapaxes(a, -1, -2) @ b) ** 2).sum()
    return total


class SoftThresholdState(NamedTuple):
    """How many steps were made."""

    step: jax.Array


def soft_threshold(
    threshold: float | optax.Schedule, label: str = "gate"
) -> optax.GradientTransformation:
    """A last transformation that pulls arrays of one label towards zero, and to it when near.

    After it, an array is `sign(z) max(|z| - threshold, 0)` of the `z` it would have become. That is
    the proximal step for a penalty on absolute values: with a learning rate of `lr` and a penalty
    of `strength * |g|`, chain it after the optimizer with a threshold of `lr * strength`.

    Args:
        threshold: How far a step pulls; or a schedule of it.
        label: Of the arrays, as `jlora.param_labels` has it.

    Raises:
        ValueError: For a negative threshold; from `init`, when the tree has no such label.

    References:
        Ding et al., SoRA, arXiv:2311.11696, equations 7 and 8.
    """
    if not callable(threshold) and not threshold >= 0:
        raise ValueError(f"threshold={threshold} would push away from zero. Use 0.0 or more.")

    def init(params: PyTree) -> SoftThresholdState:
        present = set(jax.tree.leaves(param_labels(params)))
        if label not in present:
            raise ValueError(
                f"soft_threshold found no array labelled {label!r}; the tree has "
                f"{sorted(present)}. Give rules with jlora.SoRA, or another label."
            )
        return SoftThresholdState(jnp.int32(0))

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, SoftThresholdState]:
        if params is None:
            raise ValueError("soft_threshold needs params: call update(updates, state, params).")
        width = threshold(state.step) if callable(threshold) else threshold

        def shrink(name: str, change: jax.Array, array: jax.Array) -> jax.Array:
            if name != label:
                return change
            reached = array + change
            return jnp.sign(reached) * jnp.maximum(jnp.abs(reached) - width, 0) - array

        shrunk = jax.tree.map(shrink, param_labels(params), updates, params)
        return shrunk, SoftThresholdState(state.step + 1)

    return optax.GradientTransformation(init, update)
