"""AdaLoRA's budget: which directions of which weights may stay."""

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
    """What `adalora_rank_allocator` remembers.

    Attributes:
        step: How many steps were made.
        inner_state: The optimizer's own state.
        sensitivity: For every AdaLoRA leaf, running means of `|w dL/dw|` for its three arrays.
        uncertainty: Running means of how far each step's was from that.
        rank_mask: For every AdaLoRA leaf, which of its directions were kept last, (*batch, rank).
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
    """The optimizer, after whose steps the least important directions of AdaLoRA are set to zero.

    A direction's importance is that of its `s` plus the mean over its row of `A` and of `B`, each
    entry's being smoothed sensitivity times its uncertainty. How many directions stay falls from
    all, in a cubic, to `target_rank` for each matrix, over all weights together. During the last
    `final_steps` those that were chosen stay chosen.

    Args:
        optimizer: Any optax transformation, `jlora.lora_optimizer` too.
        target_rank: How many directions a matrix keeps in the end, on average.
        total_steps: How many steps training will take.
        warmup_steps: At the beginning nothing is set to zero.
        final_steps: At the end the choice is fixed.
        interval: Steps between two choices.
        beta1: Smoothing of the sensitivity.
        beta2: Smoothing of the uncertainty.

    Raises:
        ValueError: When the numbers do not fit each other, and from `init`, when the tree has no
            AdaLoRA leaf or its ranks are below the target.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, section 3.2 (equations 8 to 11), section 3.3
        (equation 12) and algorithm 1. The cubic begins at the end of the warm-up, as in the
        reference code.
    """
    if not target_rank > 0:
        raise ValueError(f"target_rank={target_rank} leaves no direction. Use a positive number.")
    if min(warmup_steps, final_steps) < 0 or warmup_steps + final_steps >= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and final_steps={final_steps} leave no step of the "
            f"total_steps={total_steps} to choose in. Make them fewer."
        )
    if interval < 1 or not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(
            f"interval={interval}, beta1={beta1}, beta2={beta2}: the interval must be 1 or more, "
            f"the betas 0 up to, but not, 1."
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> RankAllocatorState:
        leaves = _get_adalora_leaves(params)
        if not leaves:
            raise ValueError(
                "adalora_rank_allocator found no AdaLoRA leaf. Give rules with jlora.AdaLoRA."
            )
        largest = max(leaf.rank for leaf in leaves)
        if target_rank > largest:
            raise ValueError(
                f"adalora_rank_allocator's target_rank={target_rank} exceeds the adapter's rank of "
                f"{largest}. Start AdaLoRA with a higher rank."
            )
        zeros = [{n: jnp.zeros_like(getattr(leaf, n)) for n in _SVD_ARRAYS} for leaf in leaves]
        kept = [jnp.ones(leaf.s.shape, bool) for leaf in leaves]
        return RankAllocatorState(jnp.int32(0), inner.init(params), zeros, zeros, kept)

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
            now = {n: jnp.abs(getattr(leaf, n) * getattr(gradient, n)) for n in _SVD_ARRAYS}
            mean = {n: beta1 * mean[n] + (1 - beta1) * now[n] for n in _SVD_ARRAYS}
            spread = {
                n: beta2 * spread[n] + (1 - beta2) * jnp.abs(now[n] - mean[n]) for n in _SVD_ARRAYS
            }
            sensitivity.append(mean)
            uncertainty.append(spread)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)

        step = state.step + 1
        last_choice = total_steps - final_steps
        due = (step > warmup_steps) & (step <= last_choice)
        due &= (step % interval == 0) | (step == last_choice)
        scores = [
            _triplet_importance(leaf, mean, spread)
            for leaf, mean, spread in zip(leaves, sensitivity, uncertainty, strict=True)
        ]
        best = _top_ranks_mask(scores, _budget(step, leaves))
        kept = [jnp.where(due, new, old) for new, old in zip(best, state.rank_mask, strict=True)]
        enforced = due | (step > last_choice)
        chosen = iter(kept)

        def masked(update: Any, leaf: Any) -> Any:
            if not isinstance(leaf, AdaLoRALeaf):
                return update
            s = jnp.where(enforced & ~next(chosen), -leaf.s, update.s)
            return dataclasses.replace(update, s=s)

        updates = jax.tree.map(masked, updates, params, is_leaf=is_adapter_node)
        return updates, RankAllocatorState(step, inner_state, sensitivity, uncertainty, kept)

    def _budget(step: jax.Array, leaves: list[AdaLoRALeaf]) -> jax.Array:
        first = sum(leaf.s.size for leaf in leaves)
        last = round(target_rank * sum(leaf.s.size // leaf.rank for leaf in leaves))
        through = (step - warmup_steps) / (total_steps - warmup_steps - final_steps)
        left = (1 - jnp.clip(through, 0, 1)) ** 3
        return jnp.round(last + (first - last) * left).astype(jnp.int32)

    return optax.GradientTransformationExtraArgs(init, update)


def _get_adalora_leaves(tree: PyTree) -> list[AdaLoRALeaf]:
    nodes = jax.tree.leaves(tree, is_leaf=is_adapter_node)
    leaves = [node for node in nodes if isinstance(node, AdaLoRALeaf)]
    for leaf in leaves:
        if not all(hasattr(getattr(leaf, name), "shape") for name in _SVD_ARRAYS):
            raise ValueError(
                "adalora_rank_allocator needs all arrays of every AdaLoRA leaf, and some were masked or "
                "left out. Put it around the whole optimizer: adalora_rank_allocator(lora_optimizer(...))."
            )
    return leaves


def _triplet_importance(
    leaf: AdaLoRALeaf, sensitivity: dict[str, jax.Array], uncertainty: dict[str, jax.Array]
) -> jax.Array:
    """The importance of every direction, (*batch, rank)."""
    scores = {name: sensitivity[name] * uncertainty[name] for name in _SVD_ARRAYS}
    batch, rank = leaf.s.shape[:-1], leaf.rank
    a = scores["a"].reshape(*batch, -1, rank).mean(-2)
    b = scores["b"].reshape(*batch, rank, -1).mean(-1)
    return scores["s"] + a + b


def _top_ranks_mask(scores: list[jax.Array], count: jax.Array) -> list[jax.Array]:
    """Which of all directions together are among the `count` best; of equal ones, the first."""
    flat = jnp.concatenate([score.ravel() for score in scores])
    place = jnp.argsort(jnp.argsort(-flat))
    ends = [0]
    for score in scores:
        ends.append(ends[-1] + math.prod(score.shape))
    return [
        (place[start:end] < count).reshape(score.shape)
        for score, start, end in zip(scores, ends[:-1], ends[1:], strict=True)
    ]
