"""Training that starts with a high rank and ends with a low one."""

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


class RankScheduleState(NamedTuple):
    """What `rank_schedule` remembers.

    Attributes:
        step: How many steps were made.
        rank: To which the factors were cut last; that of the arrays before.
        inner: The optimizer's own state.
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
    """The optimizer, after some of whose steps plain LoRA's factors are cut to a lower rank.

    The rank falls in a line from `init_rank` at step `begin_step` to `end_rank` at step `end_step`, rounded up. Where
    it falls, each pair is replaced by the best approximation of that rank to what the optimizer's
    own step makes of it, with factors of equal size, and zeros where ranks were, so that shapes
    stay. Two factors of zero have no gradient, and stay zero. All other steps are the optimizer's.

    After a cut the optimizer starts anew, for moments belong to factors that are gone: whatever
    part of its state remembers gradients is as `init` makes it, counts for bias correction
    included. Schedules of the learning rate go on; those inside `optax.MultiSteps`, whose whole
    state is one memory of gradients, do not: put that around what this returns.

    `trim_zero_ranks` leaves out the zeros in the end. Alternatives: `jlora.AdaLoRA` with
    `jlora.adalora_rank_allocator`, which weighs directions of all weights against each other; `jlora.SoRA`
    with `jlora.soft_threshold`, which learns ranks by a penalty; `jlora.DyLoRA` with
    `jlora.truncate_rank`, whose every rank is trained.

    Args:
        optimizer: Any optax transformation, `jlora.lora_optimizer` too. Weights of other families
            and arrays of no adapter are stepped as ever.
        init_rank: The rank at `begin_step`, no higher than that of the arrays.
        end_rank: The rank from `end_step` on.
        begin_step: The step of the first cut, counted from 1; where `init_rank` is the arrays' rank nothing
            is cut there.
        end_step: The step of the last cut.
        interval: Steps between two cuts.

    Raises:
        ValueError: When the numbers do not fit each other, and from `init`, when the tree has no
            plain LoRA leaf or none of a rank as high as `init_rank`.

    References:
        Eckart and Young, for the best approximation. Lialin et al., ReLoRA, arXiv:2307.05695, for
        starting the optimizer anew where factors are replaced.
    """
    _check_rank_schedule(init_rank, end_rank, begin_step, end_step, interval)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> RankScheduleState:
        largest = max((leaf.rank for leaf in _get_plain_lora_leaves(params)), default=0)
        if not largest:
            raise ValueError("shrinking found no plain LoRA leaf. Give rules with jlora.LoRA.")
        if init_rank > largest:
            raise ValueError(
                f"first={init_rank} exceeds the adapter's highest rank of {largest}. Start with a "
                f"higher rank, or from a lower first."
            )
        return RankScheduleState(jnp.int32(0), jnp.int32(largest), inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("shrinking needs params: call update(updates, state, params).")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        step = state.step + 1
        rank = scheduled(step)
        due = (step >= begin_step) & (step <= end_step) & (rank < state.rank)
        due &= ((step - begin_step) % interval == 0) | (step == end_step)

        def cut(updates: PyTree, inner_state: Any) -> tuple[PyTree, Any]:
            moved = _project_updates_to_rank(updates, params, rank)
            fresh = inner.init(optax.apply_updates(params, moved))
            return moved, _reset_optimizer_moments(inner_state, fresh, params)

        updates, inner_state = lax.cond(due, cut, lambda *kept: kept, updates, inner_state)
        return updates, RankScheduleState(step, jnp.where(due, rank, state.rank), inner_state)

    def scheduled(step: jax.Array) -> jax.Array:
        left = jnp.clip(end_step - step, 0, end_step - begin_step)
        # In whole numbers, rounded up: a float may fall just short of one.
        return (end_rank + -((end_rank - init_rank) * left // (end_step - begin_step))).astype(
            jnp.int32
        )

    return optax.GradientTransformationExtraArgs(init, update)


def trim_zero_ranks(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter without ranks whose two factors are zero: it computes the same with less.

    Every weight gets its own rank, a stack of layers the largest of its layers'. A weight with none
    left is left out.

    Args:
        adapter: With plain LoRA leaves, as concrete arrays; all others stay as they are.

    Raises:
        ValueError: When there is no plain LoRA leaf, or one that is not finite.
    """
    result = dict(adapter)
    leaves = {
        path: leaf for path, leaf in check_adapter(adapter).items() if _is_plain_lora_leaf(leaf)
    }
    if not leaves:
        raise ValueError(
            "trimmed found no plain LoRA leaf. Use jlora.prune_ranks for AdaLoRA and SoRA, "
            "jlora.truncate_rank for DyLoRA, and jlora.to_lora for any other."
        )
    for path, leaf in leaves.items():
        a, b = (np.asarray(factor) for factor in low_rank.factor_matrices(leaf))
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            raise ValueError(
                f"The adapter on {path!r} holds NaN or infinite numbers. Go back to a checkpoint "
                f"from before the training diverged."
            )
        used = (a != 0).any(axis=1) | (b != 0).any(axis=2)  # (batch, rank)
        rank = int(used.sum(axis=1).max())
        if rank == 0:
            del result[path]
        elif rank < leaf.rank:
            result[path] = _select_leaf_ranks(
                leaf, np.argsort(~used, axis=1, kind="stable")[:, :rank]
            )
    return result


def _select_leaf_ranks(leaf: LoRALeaf, ranks: np.ndarray) -> LoRALeaf:
    """The leaf with these of its ranks, (batch, rank), at the same scale."""
    batch, inputs, outputs = leaf.axis_sizes
    count, rank = ranks.shape
    a = np.asarray(leaf.a).reshape(count, -1, leaf.rank)
    b = np.asarray(leaf.b).reshape(count, leaf.rank, -1)
    a = np.take_along_axis(a, ranks[:, None, :], axis=2)
    b = np.take_along_axis(b, ranks[:, :, None], axis=1)
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
                "shrinking needs both factors of every LoRA leaf, and some were masked or left "
                "out. Put it around the whole optimizer: shrinking(lora_optimizer(...), ...)."
            )
    return leaves


def _project_updates_to_rank(updates: PyTree, params: PyTree, rank: jax.Array) -> PyTree:
    """The updates after which each pair is the best approximation of the rank to what it would
    have become.
    """

    def one(update: Any, leaf: Any) -> Any:
        if not _is_plain_lora_leaf(leaf):
            return update
        became: Any = optax.apply_updates(leaf, update)  # type: ignore[arg-type]
        a, b = _best_rank_approximation(became, rank)
        # A pair that has no more ranks than that stays as the optimizer's step makes it.
        lower = rank < leaf.rank
        return dataclasses.replace(
            update,
            a=jnp.where(lower, (a - leaf.a).astype(update.a.dtype), update.a),
            b=jnp.where(lower, (b - leaf.b).astype(update.b.dtype), update.b),
        )

    return jax.tree.map(one, updates, params, is_leaf=is_adapter_node)


def _best_rank_approximation(leaf: LoRALeaf, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of the best approximation of `A B`, shaped and typed like the leaf's."""
    exact = lax.Precision.HIGHEST
    a, b = low_rank.factor_matrices(leaf)
    left, inner_a = jnp.linalg.qr(a)
    right, inner_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    core = jnp.matmul(inner_a, jnp.swapaxes(inner_b, -1, -2), precision=exact)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.where(jnp.arange(s.shape[-1]) < rank, jnp.sqrt(s), 0)
    a = jnp.matmul(left, u * root[..., None, :], precision=exact)
    b = jnp.matmul(root[..., :, None] * vt, jnp.swapaxes(right, -1, -2), precision=exact)
    # A narrow weight has fewer directions than the pair has ranks.
    missing = leaf.rank - s.shape[-1]
    a = jnp.pad(a, ((0, 0), (0, 0), (0, missing)))
    b = jnp.pad(b, ((0, 0), (0, missing), (0, 0)))
    return a.reshape(leaf.a.shape).astype(leaf.a.dtype), b.reshape(leaf.b.shape).astype(
        leaf.b.dtype
    )


def _reset_optimizer_moments(state: Any, init_state: Any, params: PyTree) -> Any:
    """The state, with those of its parts fresh that hold something for each of the params."""
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
    """Whether a state is that of a transformation which keeps trees like params."""
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
    for name, rank in (("first", init_rank), ("last", end_rank)):
        _validation.check_rank(f"shrinking: {name}", rank)
    _validation.check_positive_int("shrinking: interval", interval)
    if end_rank > init_rank:
        raise ValueError(
            f"last={end_rank} exceeds first={init_rank}, and ranks only fall. Swap them."
        )
    if not 0 <= begin_step < end_step:
        raise ValueError(
            f"begin={begin_step} and end={end_step} leave no step to cut at. Give 0 <= begin < end."
        )
