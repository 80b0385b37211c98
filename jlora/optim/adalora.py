"""AdaLoRA's rank allocator: keeps the most important singular directions within a budget."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._tree import PyTree
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.base import is_adapter_node

_SVD_ARRAYS = ("a", "s", "b")


class RankAllocatorState(NamedTuple):
    """State of `adalora_rank_allocator`.

    Attributes:
        step: Number of steps taken.
        inner_state: State of the wrapped optimizer.
        sensitivity: Running means of `|w dL/dw|` for the three arrays of each AdaLoRA leaf.
        uncertainty: Running means of the distance of each step's sensitivity from its mean.
        rank_mask: Mask of the directions kept at the last selection, (*batch, rank) for each
            AdaLoRA leaf.
    """

    step: jax.Array
    inner_state: Any
    sensitivity: list[dict[str, jax.Array]]
    uncertainty: list[dict[str, jax.Array]]
    rank_mask: list[jax.Array]


def adalora_rank_allocator(
    optimizer: optax.GradientTransformation,
    *,
    target_rank: float,
    total_steps: int,
    warmup_steps: int,
    final_steps: int,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer and sets the least important directions of AdaLoRA to zero.

    The importance of a direction is that of its `s` plus the means over its column of `A` and its
    row of `B`; the importance of an entry is its smoothed sensitivity times its uncertainty. The
    number of directions that remain falls along a cubic from all to `target_rank` per matrix,
    shared by all weights. During the last `final_steps` the selection is fixed.

    Args:
        optimizer: Any Optax transformation, including `jlora.lora_optimizer`.
        target_rank: Average number of directions that remain per matrix at the end.
        total_steps: Total number of training steps.
        warmup_steps: Number of steps at the beginning in which nothing is set to zero.
        final_steps: Number of steps at the end in which the selection is fixed.
        interval: Number of steps between two selections.
        beta1: Smoothing of the sensitivity, in [0, 1).
        beta2: Smoothing of the uncertainty, in [0, 1).

    Returns:
        A transformation whose `update` needs `params`.

    Raises:
        ValueError: The options are out of range or leave no step to select in. From `init`: the
            tree has no AdaLoRA leaf, or the target exceeds its ranks.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, section 3.2 (equations 7 to 11), section 3.3,
        appendix A (schedule of the budget) and algorithm 1. The cubic begins at the end of the
        warm-up, as in the reference code.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.AdaLoRA(rank=3, alpha=3))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> optimizer = jlora.adalora_rank_allocator(
        ...     jlora.lora_optimizer(optax.adam(1e-3)),
        ...     target_rank=2,
        ...     total_steps=100,
        ...     warmup_steps=10,
        ...     final_steps=20,
        ... )
        >>> optimizer.init(adapter).rank_mask[0].shape
        (3,)
    """
    if not target_rank > 0:
        raise ValueError(f"target_rank must be positive, got {target_rank}.")
    if min(warmup_steps, final_steps) < 0 or warmup_steps + final_steps >= total_steps:
        raise ValueError(
            f"warmup_steps + final_steps must be less than total_steps, got {warmup_steps} + "
            f"{final_steps} of {total_steps}, which leaves no step to select ranks in. Reduce them."
        )
    if interval < 1 or not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(
            f"interval must be 1 or more, and beta1 and beta2 in [0, 1), got interval={interval}, "
            f"beta1={beta1}, beta2={beta2}."
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> RankAllocatorState:
        leaves = _get_adalora_leaves(params)
        if not leaves:
            raise ValueError(
                "adalora_rank_allocator needs an AdaLoRA leaf, got none. Use rules with "
                "jlora.AdaLoRA."
            )
        largest = max(leaf.rank for leaf in leaves)
        if target_rank > largest:
            raise ValueError(
                f"adalora_rank_allocator: target_rank={target_rank} must be at most the adapter's "
                f"rank, got {largest}. Start AdaLoRA with a higher rank."
            )
        zeros = [{n: jnp.zeros_like(getattr(leaf, n)) for n in _SVD_ARRAYS} for leaf in leaves]
        rank_mask = [jnp.ones(leaf.s.shape, bool) for leaf in leaves]
        return RankAllocatorState(jnp.int32(0), inner.init(params), zeros, zeros, rank_mask)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError(
                "adalora_rank_allocator needs params: call update(updates, state, params)."
            )
        leaves, gradients = _get_adalora_leaves(params), _get_adalora_leaves(updates)
        sensitivity, uncertainty = [], []
        for leaf, gradient, mean, spread in zip(
            leaves, gradients, state.sensitivity, state.uncertainty, strict=True
        ):
            new = {n: jnp.abs(getattr(leaf, n) * getattr(gradient, n)) for n in _SVD_ARRAYS}
            mean = {n: beta1 * mean[n] + (1 - beta1) * new[n] for n in _SVD_ARRAYS}
            spread = {
                n: beta2 * spread[n] + (1 - beta2) * jnp.abs(new[n] - mean[n]) for n in _SVD_ARRAYS
            }
            sensitivity.append(mean)
            uncertainty.append(spread)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)

        step = state.step + 1
        last_selection = total_steps - final_steps
        selects = (step > warmup_steps) & (step <= last_selection)
        selects &= (step % interval == 0) | (step == last_selection)
        scores = [
            _triplet_importance(leaf, mean, spread)
            for leaf, mean, spread in zip(leaves, sensitivity, uncertainty, strict=True)
        ]
        best = _top_ranks_mask(scores, _budget(step, leaves))
        rank_mask = [
            jnp.where(selects, new, old) for new, old in zip(best, state.rank_mask, strict=True)
        ]
        masks_applied = selects | (step > last_selection)
        masks = iter(rank_mask)

        def mask_update(update: Any, leaf: Any) -> Any:
            if not isinstance(leaf, AdaLoRALeaf):
                return update
            s = jnp.where(masks_applied & ~next(masks), -leaf.s, update.s)
            return dataclasses.replace(update, s=s)

        updates = jax.tree.map(mask_update, updates, params, is_leaf=is_adapter_node)
        return updates, RankAllocatorState(step, inner_state, sensitivity, uncertainty, rank_mask)

    def _budget(step: jax.Array, leaves: list[AdaLoRALeaf]) -> jax.Array:
        initial = sum(leaf.s.size for leaf in leaves)
        target = round(target_rank * sum(leaf.s.size // leaf.rank for leaf in leaves))
        progress = (step - warmup_steps) / (total_steps - warmup_steps - final_steps)
        remaining = (1 - jnp.clip(progress, 0, 1)) ** 3
        return jnp.round(target + (initial - target) * remaining).astype(jnp.int32)

    return optax.GradientTransformationExtraArgs(init, update)


def _get_adalora_leaves(tree: PyTree) -> list[AdaLoRALeaf]:
    nodes = jax.tree.leaves(tree, is_leaf=is_adapter_node)
    leaves = [node for node in nodes if isinstance(node, AdaLoRALeaf)]
    for leaf in leaves:
        if not all(hasattr(getattr(leaf, name), "shape") for name in _SVD_ARRAYS):
            raise ValueError(
                "adalora_rank_allocator needs all arrays of every AdaLoRA leaf, but some are "
                "masked or left out. Put it around the complete optimizer: "
                "adalora_rank_allocator(lora_optimizer(...))."
            )
    return leaves


def _triplet_importance(
    leaf: AdaLoRALeaf, sensitivity: dict[str, jax.Array], uncertainty: dict[str, jax.Array]
) -> jax.Array:
    """Returns the importance of every direction, (*batch, rank)."""
    scores = {name: sensitivity[name] * uncertainty[name] for name in _SVD_ARRAYS}
    batch, rank = leaf.s.shape[:-1], leaf.rank
    a = scores["a"].reshape(*batch, -1, rank).mean(-2)
    b = scores["b"].reshape(*batch, rank, -1).mean(-1)
    return scores["s"] + a + b


def _top_ranks_mask(scores: list[jax.Array], count: jax.Array) -> list[jax.Array]:
    """Returns masks of the `count` best directions of all leaves; of equal ones, the first."""
    flat = jnp.concatenate([score.ravel() for score in scores])
    position = jnp.argsort(jnp.argsort(-flat))
    bounds = [0]
    for score in scores:
        bounds.append(bounds[-1] + math.prod(score.shape))
    return [
        (position[start:end] < count).reshape(score.shape)
        for score, start, end in zip(scores, bounds[:-1], bounds[1:], strict=True)
    ]
