"""Regularizers: penalties to add to a loss, and soft thresholds."""

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


def orthogonal_regularizer(adapter: PyTree) -> jax.Array:
    """Computes AdaLoRA's penalty `||A^T A - I||^2 + ||B B^T - I||^2`, summed over all matrices.

    Add it to the loss with a factor of 0.1 to 0.5.

    Args:
        adapter: Any tree with AdaLoRA leaves.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: The tree has no AdaLoRA leaf.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, equation 4.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.AdaLoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> float(jlora.orthogonal_regularizer(adapter)) > 0
        True
    """
    nodes = jax.tree.leaves(adapter, is_leaf=is_adapter_node)
    leaves = [node for node in nodes if isinstance(node, AdaLoRALeaf)]
    if not leaves:
        raise ValueError(
            "orthogonal_regularizer needs an AdaLoRA leaf, got none. Use rules with jlora.AdaLoRA."
        )
    total = jnp.zeros((), jnp.float32)
    for leaf in leaves:
        batch, rank = leaf.s.shape[:-1], leaf.rank
        a = leaf.a.reshape(*batch, -1, rank)
        b = leaf.b.reshape(*batch, rank, -1)
        # (*batch, rank, rank)
        for gram in (jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)):
            total += ((gram - jnp.eye(rank)) ** 2).sum()
    return total


def subspace_overlap(adapter: Mapping[str, Any], *others: Mapping[str, Any]) -> jax.Array:
    """Computes the overlap of the adapters' input directions, `sum ||A^T A'||^2`.

    As a penalty on a new task, with the adapters of earlier tasks as `others`, it keeps the new
    adapter orthogonal to them, so that they can be added up later. No gradient reaches the others.

    Args:
        adapter: Trained adapter, with leaves of LoRA or a method built on it.
        *others: Adapters of the same model. Only weights that both adapt count.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: One of the others has no weight in common with the adapter.

    References:
        Wang et al., O-LoRA, arXiv:2310.14152, equations 6 to 8.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> first, second = (lora.init(jax.random.key(i), params, x) for i in range(2))
        >>> float(jlora.subspace_overlap(second, first)) > 0
        True
    """
    total = jnp.zeros((), jnp.float32)
    lora_leaves = {path: leaf for path, leaf in adapter.items() if isinstance(leaf, LoRALeaf)}
    for i, other in enumerate(others):
        common = [path for path in lora_leaves if isinstance(other.get(path), LoRALeaf)]
        if not common:
            raise ValueError(
                f"subspace_overlap: others[{i}] must share a LoRA weight with the adapter, got "
                f"none of its {len(lora_leaves)} weights. Pass adapters of the same model."
            )
        for path in common:
            leaf, other_leaf = lora_leaves[path], jax.lax.stop_gradient(other[path])
            batch = leaf.axis_sizes.batch
            a = leaf.a.reshape(*batch, -1, leaf.rank)
            other_a = other_leaf.a.reshape(*batch, -1, other_leaf.rank)
            total += ((jnp.swapaxes(a, -1, -2) @ other_a) ** 2).sum()
    return total


class SoftThresholdState(NamedTuple):
    """State of `soft_threshold`.

    Attributes:
        step: Number of steps taken.
    """

    step: jax.Array


def soft_threshold(
    threshold: float | optax.Schedule, label: str = "gate"
) -> optax.GradientTransformation:
    """Builds a final transformation that pulls arrays of one label towards zero, and onto it.

    An array that would have become `z` becomes `sign(z) max(|z| - threshold, 0)`. This is the
    proximal step of an L1 penalty: for a learning rate of `lr` and a penalty of `strength * |g|`,
    chain it after the optimizer with a threshold of `lr * strength`.

    Args:
        threshold: Distance of a step's pull, or a schedule of it.
        label: Label of the arrays, as in `jlora.param_labels`.

    Returns:
        A transformation whose `update` needs `params`.

    Raises:
        ValueError: The threshold is negative. From `init`: the tree has no such label.

    References:
        Ding et al., SoRA, arXiv:2311.11696, equations 7 and 8.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> optimizer = optax.chain(optax.sgd(1.0), jlora.soft_threshold(0.5, label="full"))
        >>> params = jnp.array([2.0, 0.25])
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).tolist()
        [1.5, 0.0]
    """
    if not callable(threshold) and not threshold >= 0:
        raise ValueError(
            f"threshold must be 0.0 or more, got {threshold}, which would push away from zero."
        )

    def init(params: PyTree) -> SoftThresholdState:
        present = set(jax.tree.leaves(param_labels(params)))
        if label not in present:
            raise ValueError(
                f"soft_threshold: label={label!r} must be a label of the tree, got "
                f"{sorted(present)}. Use rules with jlora.SoRA, or another label."
            )
        return SoftThresholdState(jnp.int32(0))

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, SoftThresholdState]:
        if params is None:
            raise ValueError("soft_threshold needs params: call update(updates, state, params).")
        width = threshold(state.step) if callable(threshold) else threshold

        def shrink(array_label: str, change: jax.Array, array: jax.Array) -> jax.Array:
            if array_label != label:
                return change
            updated = array + change
            return jnp.sign(updated) * jnp.maximum(jnp.abs(updated) - width, 0) - array

        shrunk = jax.tree.map(shrink, param_labels(params), updates, params)
        return shrunk, SoftThresholdState(state.step + 1)

    return optax.GradientTransformation(init, update)
