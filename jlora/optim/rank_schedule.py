"""Rank schedules: training that starts with a high LoRA rank and ends with a low one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jlora import _validation
from jlora._tree import PyTree
from jlora.adapters import low_rank
from jlora.adapters.base import check_adapter, is_adapter_node
from jlora.adapters.lora import LoRALeaf
from jlora.interpreter.weight import divide_by_size


class RankScheduleState(NamedTuple):
    """State of `rank_schedule`.

    Attributes:
        step: Number of steps taken.
        rank: Rank of the last cut; before the first cut, the rank of the arrays.
        inner: State of the wrapped optimizer.
    """

    step: jax.Array
    rank: jax.Array
    inner: Any


def rank_schedule(
    optimizer: optax.GradientTransformation,
    *,
    init_rank: int,
    end_rank: int,
    begin_step: int,
    end_step: int,
    interval: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer and cuts the factors of plain LoRA to lower ranks on a schedule.

    The rank falls linearly from `init_rank` at step `begin_step` to `end_rank` at step `end_step`,
    rounded up. At a cut, each pair of factors is replaced by the best approximation of that rank to
    the product after the optimizer's own step, with factors of equal size. The removed ranks become
    zeros, so that shapes stay. Two factors of zero have no gradient, and stay zero. All other steps
    are those of the optimizer.

    After a cut the optimizer restarts, since its moments belong to factors that are gone: every
    part of its state that accumulates gradients is reset to its `init`, including counts for bias
    correction. Learning-rate schedules continue, except inside `optax.MultiSteps`, whose entire
    state accumulates gradients: put that around the result of this function.

    `trim_zero_ranks` removes the zeros at the end. Alternatives: `jlora.AdaLoRA` with
    `jlora.adalora_rank_allocator`, which compares directions of all weights; `jlora.SoRA` with
    `jlora.soft_threshold`, which learns ranks by a penalty; `jlora.DyLoRA` with
    `jlora.truncate_rank`, which trains every rank.

    Args:
        optimizer: Any Optax transformation, including `jlora.lora_optimizer`. Adapters of other
            methods and arrays outside adapters are updated as without the schedule.
        init_rank: Rank at `begin_step`, at most the rank of the arrays.
        end_rank: Rank from `end_step` on.
        begin_step: Step of the first cut, counted from 1. Where `init_rank` is the rank of the
            arrays, nothing is cut there.
        end_step: Step of the last cut.
        interval: Number of steps between two cuts.

    Returns:
        A transformation whose `update` needs `params`.

    Raises:
        TypeError: A rank is not an integer.
        ValueError: The options are out of range or contradict each other. From `init`: the tree has
            no plain LoRA leaf, or none of a rank as high as `init_rank`.

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank, 1936, for the
        best approximation. Lialin et al., ReLoRA, arXiv:2307.05695, for the reset of the optimizer
        where factors are replaced.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=4, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> optimizer = jlora.optim.rank_schedule(
        ...     optax.adam(1e-3), init_rank=4, end_rank=1, begin_step=10, end_step=100, interval=10
        ... )
        >>> int(optimizer.init(adapter).rank)
        4
    """
    _check_rank_schedule(init_rank, end_rank, begin_step, end_step, interval)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> RankScheduleState:
        max_rank = max((leaf.rank for leaf in _get_plain_lora_leaves(params)), default=0)
        if not max_rank:
            raise ValueError(
                "rank_schedule needs a plain LoRA leaf, got none. Use rules with jlora.LoRA."
            )
        if init_rank > max_rank:
            raise ValueError(
                f"init_rank={init_rank} must be at most the adapter's highest rank, got "
                f"{max_rank}. Start the adapter with a higher rank, or the schedule with a lower "
                f"one."
            )
        return RankScheduleState(jnp.int32(0), jnp.int32(max_rank), inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("rank_schedule needs params: call update(updates, state, params).")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        step = state.step + 1
        rank = scheduled_rank(step)
        cuts = (step >= begin_step) & (step <= end_step) & (rank < state.rank)
        cuts &= ((step - begin_step) % interval == 0) | (step == end_step)

        def cut(updates: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            projected = _project_updates_to_rank(updates, params, rank)
            init_state = inner.init(optax.apply_updates(params, projected))
            return projected, _reset_optimizer_moments(inner_state, init_state, params)

        updates, inner_state = lax.cond(
            cuts, cut, lambda *unchanged: unchanged, updates, inner_state
        )
        return updates, RankScheduleState(step, jnp.where(cuts, rank, state.rank), inner_state)

    def scheduled_rank(step: jax.Array) -> jax.Array:
        remaining = jnp.clip(end_step - step, 0, end_step - begin_step)
        # Integer arithmetic, rounded up: a float may fall just short of an integer.
        decrease = (end_rank - init_rank) * remaining // (end_step - begin_step)
        return (end_rank + -decrease).astype(jnp.int32)

    return optax.GradientTransformationExtraArgs(init, update)


def trim_zero_ranks(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Removes ranks whose two factors are zero; the smaller adapter computes the same.

    Every weight gets its own rank; a stack of layers gets the largest rank of its layers. A weight
    without any rank left is removed from the adapter.

    Args:
        adapter: Adapter with plain LoRA leaves, as concrete arrays; leaves of other methods stay as
            they are.

    Raises:
        ValueError: The adapter has no plain LoRA leaf, or one that is not finite.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=4, alpha=4))
        >>> leaf = lora.init(jax.random.key(0), params, x)["w"]  # B is zero.
        >>> leaf = dataclasses.replace(leaf, a=leaf.a.at[:, 1:].set(0))
        >>> jlora.optim.trim_zero_ranks({"w": leaf})["w"].a.shape
        (6, 1)
    """
    trimmed = dict(adapter)
    leaves = {
        path: leaf for path, leaf in check_adapter(adapter).items() if _is_plain_lora_leaf(leaf)
    }
    if not leaves:
        raise ValueError(
            "trim_zero_ranks needs a plain LoRA leaf, got none. Use jlora.prune_ranks for AdaLoRA "
            "and SoRA, jlora.truncate_rank for DyLoRA, and jlora.to_lora for any other method."
        )
    for path, leaf in leaves.items():
        a, b = (np.asarray(factor) for factor in low_rank.factor_matrices(leaf))
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            raise ValueError(
                f"The adapter on {path!r} holds NaN or infinite values. Go back to a checkpoint "
                f"from before the training diverged."
            )
        nonzero = (a != 0).any(axis=1) | (b != 0).any(axis=2)  # (batch, rank)
        rank = int(nonzero.sum(axis=1).max())
        if rank == 0:
            del trimmed[path]
        elif rank < leaf.rank:
            trimmed[path] = _select_leaf_ranks(
                leaf, np.argsort(~nonzero, axis=1, kind="stable")[:, :rank]
            )
    return trimmed


def _select_leaf_ranks(leaf: LoRALeaf, ranks: np.ndarray) -> LoRALeaf:
    """Returns the leaf with the ranks of these indices, (batch, rank), at the same scale."""
    batch, inputs, outputs = leaf.axis_sizes
    count, rank = ranks.shape
    a = np.asarray(leaf.a).reshape(count, -1, leaf.rank)
    b = np.asarray(leaf.b).reshape(count, leaf.rank, -1)
    a = np.take_along_axis(a, ranks[:, None, :], axis=2)  # (batch, fan_in, rank)
    b = np.take_along_axis(b, ranks[:, :, None], axis=1)  # (batch, rank, fan_out)
    return dataclasses.replace(
        leaf,
        a=jnp.asarray(a.reshape(*batch, *inputs, rank)),
        b=jnp.asarray(b.reshape(*batch, rank, *outputs)),
        rank=rank,
        alpha=leaf.scale * rank,
        use_rslora=False,
    )


def _is_plain_lora_leaf(node: Any) -> TypeGuard[LoRALeaf]:
    return type(node) is LoRALeaf


def _get_plain_lora_leaves(tree: PyTree) -> list[LoRALeaf]:
    leaves = [
        node for node in jax.tree.leaves(tree, is_leaf=is_adapter_node) if _is_plain_lora_leaf(node)
    ]
    for leaf in leaves:
        if not all(hasattr(factor, "shape") for factor in (leaf.a, leaf.b)):
            raise ValueError(
                "rank_schedule needs both factors of every LoRA leaf, but some are masked or left "
                "out. Put it around the complete optimizer: "
                "rank_schedule(lora_optimizer(...), ...)."
            )
    return leaves


def _project_updates_to_rank(updates: PyTree, params: PyTree, rank: jax.Array) -> PyTree:
    """Returns updates after which each pair of factors has at most a rank.

    The product of the pair is the best approximation of that rank to the product that the given
    updates would lead to.
    """

    def project(update: Any, leaf: Any) -> Any:
        if not _is_plain_lora_leaf(leaf):
            return update
        updated: Any = optax.apply_updates(leaf, update)  # type: ignore[arg-type]
        a, b = _best_rank_approximation(updated, rank)
        # A pair of no higher rank keeps the optimizer's step.
        is_lower = rank < leaf.rank
        return dataclasses.replace(
            update,
            a=jnp.where(is_lower, (a - leaf.a).astype(update.a.dtype), update.a),
            b=jnp.where(is_lower, (b - leaf.b).astype(update.b.dtype), update.b),
        )

    return jax.tree.map(project, updates, params, is_leaf=is_adapter_node)


def _best_rank_approximation(leaf: LoRALeaf, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns factors of the best approximation of `A B`, with the leaf's shapes and dtypes."""
    exact = lax.Precision.HIGHEST
    (a, size_a), (b, size_b) = map(divide_by_size, low_rank.factor_matrices(leaf))
    q_a, r_a = jnp.linalg.qr(a)  # A = Q_a R_a
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))  # B^T = Q_b R_b
    core = jnp.matmul(r_a, jnp.swapaxes(r_b, -1, -2), precision=exact)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.where(jnp.arange(s.shape[-1]) < rank, jnp.sqrt(s), 0)
    root = root * jnp.sqrt(size_a[..., 0]) * jnp.sqrt(size_b[..., 0])
    a = jnp.matmul(q_a, u * root[..., None, :], precision=exact)
    b = jnp.matmul(root[..., :, None] * vt, jnp.swapaxes(q_b, -1, -2), precision=exact)
    # A narrow weight has fewer directions than the pair has ranks.
    missing = leaf.rank - s.shape[-1]
    a = jnp.pad(a, ((0, 0), (0, 0), (0, missing)))
    b = jnp.pad(b, ((0, 0), (0, missing), (0, 0)))
    a = a.reshape(leaf.a.shape).astype(leaf.a.dtype)
    b = b.reshape(leaf.b.shape).astype(leaf.b.dtype)
    return a, b


def _reset_optimizer_moments(state: Any, init_state: Any, params: PyTree) -> Any:
    """Returns the state with all parts that hold trees like params reset to `init_state`."""
    if _has_param_like_state(state, params):
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), init_state, state)
    if isinstance(state, Mapping):
        parts = {k: _reset_optimizer_moments(v, init_state[k], params) for k, v in state.items()}
        return type(state)(parts)  # type: ignore[call-arg]
    if isinstance(state, tuple):
        parts = [
            _reset_optimizer_moments(old, new, params)
            for old, new in zip(state, init_state, strict=True)
        ]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def _has_param_like_state(state: Any, params: PyTree) -> bool:
    """Returns whether a state is that of one transformation with fields that look like params."""
    if not isinstance(state, tuple) or not hasattr(state, "_fields"):
        return False

    def is_like(value: Any) -> bool:
        if isinstance(params, Mapping):
            return isinstance(value, Mapping) and value.keys() == params.keys()
        return type(value) is type(params)

    return any(map(is_like, state))


def _check_rank_schedule(
    init_rank: int, end_rank: int, begin_step: int, end_step: int, interval: int
) -> None:
    for name, rank in (("init_rank", init_rank), ("end_rank", end_rank)):
        _validation.check_rank(f"rank_schedule: {name}", rank)
    _validation.check_positive_int("rank_schedule: interval", interval)
    if end_rank > init_rank:
        raise ValueError(
            f"end_rank={end_rank} must be at most init_rank={init_rank}, since ranks only fall. "
            f"Swap them."
        )
    if not 0 <= begin_step < end_step:
        raise ValueError(
            f"begin_step={begin_step} and end_step={end_step} must satisfy 0 <= begin_step < "
            f"end_step, so that there is a step to cut at."
        )
