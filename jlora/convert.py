"""Converts adapters: updates, residual bases, plain LoRA, rank truncation and pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree, _validation
from jlora._delta import compute_dense_delta, svd_of_change
from jlora._tree import PyTree, is_quantized
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.base import (
    AdapterLeaf,
    adapt_weight,
    check_adapter,
    weight_indices,
)
from jlora.adapters.dylora import DyLoRALeaf
from jlora.adapters.lora import LoRALeaf
from jlora.adapters.lora_fa import LoRAFALeaf
from jlora.adapters.sora import SoRALeaf
from jlora.interpreter.weight import promote_to_float32

Adapter = Mapping[str, Any]


def delta(params: PyTree, adapter: Adapter) -> dict[str, jax.Array]:
    """Returns the materialized updates of an adapter.

    Args:
        params: The base.
        adapter: Trained adapter.

    Returns:
        For the path of every adapted weight, the adapted weight minus the base, in the weight's
        shape and in float32 or wider.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: The adapter does not fit the parameters, or has a `LoRAMoE` leaf.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((6, 5))}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((3, 6)))
        >>> update = jlora.delta(params, adapter)["w"]  # B starts at zero.
        >>> update.shape, bool(jnp.any(update))
        ((6, 5), False)
    """
    flat = _tree.flatten_with_paths(params)
    updates = {}
    for path, index in weight_indices(flat, adapter).items():
        base = promote_to_float32(flat.leaves[index])
        updates[path] = compute_dense_delta(adapt_weight(adapter, path, base))
    return updates


def residual_base(params: PyTree, adapter: Adapter) -> PyTree:
    """Returns the base minus the initial update, for initializations that do not start at zero.

    PiSSA, OLoRA, MiLoRA and LoRA-GA start with a non-zero update. On the residual base the initial
    model equals the original one: `apply(residual_base(params, adapter), adapter, x)` is
    `fn(params, x)` up to rounding in the weights' type. Train and serve the adapter on the residual
    base, or convert it to one for the original base with `rebase_to_original`.

    Args:
        params: The original base; it is not changed.
        adapter: Fresh adapter from `init`, before any training step.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: All updates of the adapter start at zero, it does not fit the parameters, or a
            weight is quantized.

    References:
        Meng et al., PiSSA, arXiv:2404.02948, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
        >>> config = jlora.LoRA(rank=1, alpha=1, init=jlora.initializers.pissa())
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> base = jlora.residual_base(params, adapter)
        >>> bool(jnp.allclose(lora.apply(base, adapter, x), x @ params["w"], atol=1e-5))
        True
    """
    flat = _tree.flatten_with_paths(params)
    leaves = list(flat.leaves)
    residual = [path for path, leaf in check_adapter(adapter).items() if _is_residual_leaf(leaf)]
    if not residual:
        raise ValueError(
            "residual_base got an adapter whose update starts at zero: its base is params. Only "
            "the initializations pissa, olora, milora and lora_ga need another base."
        )
    for path, index in weight_indices(flat, adapter).items():
        if path not in residual:
            continue
        if is_quantized(leaves[index]):
            raise ValueError(
                f"residual_base cannot subtract the factors from {path!r}, which is quantized "
                f"({leaves[index]}). Initialize on the weights before quantization, then call "
                f"jlora.quantize(jlora.residual_base(params, adapter), ...)."
            )
        base = jnp.asarray(leaves[index])
        # Only the product is subtracted: DoRA's gains, or gates of one, do not change the base.
        product = {path: _to_plain_lora(adapter[path])}
        zeros = jnp.zeros_like(promote_to_float32(base))
        update = adapt_weight(product, path, zeros).materialize()
        leaves[index] = (promote_to_float32(base) - update).astype(base.dtype)
    return jax.tree.unflatten(flat.treedef, leaves)


def rebase_to_original(adapter: Adapter, initial_adapter: Adapter) -> dict[str, Any]:
    """Returns a plain LoRA for the original base, from one on a base of `residual_base` or `loftq`.

    The training's change is `A B - A0 B0`, a LoRA of twice the rank. Leaves whose base is already
    the original one are not changed. Leaves that were pruned or converted to LoRA after training
    are supported.

    Args:
        adapter: Trained adapter.
        initial_adapter: Adapter that `init` or `loftq` returned before training.

    Raises:
        ValueError: The adapter has weights that `initial_adapter` does not have, or all updates of
            `initial_adapter` start at zero.
        TypeError: A leaf is not a plain LoRA, such as one of DoRA, whose change is not a difference
            of two products.

    References:
        Meng et al., PiSSA, arXiv:2404.02948, appendix C.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
        >>> config = jlora.LoRA(rank=1, alpha=1, init=jlora.initializers.pissa())
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> initial = lora.init(jax.random.key(0), params, x)
        >>> trained = jax.tree.map(lambda array: array + 0.1, initial)
        >>> jlora.rebase_to_original(trained, initial)["w"].rank
        2
    """
    check_adapter(adapter)
    residual = {
        path: leaf
        for path, leaf in check_adapter(initial_adapter).items()
        if _is_residual_leaf(leaf)
    }
    if not residual:
        raise ValueError(
            "rebase_to_original got an initial_adapter whose update starts at zero: its base is "
            "the original one already."
        )
    unknown = sorted(set(adapter) - set(initial_adapter))
    if unknown:
        raise ValueError(
            f"The adapter has {unknown[:3]}, which initial_adapter does not have. Pass the adapter "
            f"that init returned before this one was trained."
        )
    converted = dict(adapter)
    for path, start in residual.items():
        axis = len(start.axis_sizes.batch)
        factors = [(start.a, -start.b * start.scale)]
        leaf = adapter.get(path)  # None where pruning left no ranks.
        if leaf is not None and type(leaf) not in (LoRALeaf, LoRAFALeaf):
            raise TypeError(
                f"The adapter on {path!r} is a {type(leaf).__name__}, whose change on the residual "
                f"base is not a LoRA on the original one. Call jlora.prune_ranks if it has gates; "
                f"otherwise merge it into its residual base."
            )
        if leaf is not None:
            factors.insert(0, (leaf.a, leaf.b * leaf.scale))
        rank = sum(a.shape[-1] for a, _ in factors)
        converted[path] = LoRALeaf(
            a=jnp.concatenate([a for a, _ in factors], -1),
            b=jnp.concatenate([b for _, b in factors], axis),
            shape=start.shape,
            axes=start.axes,
            rank=rank,
            alpha=float(rank),
            dropout=start.dropout,
        )
    return converted


def _is_residual_leaf(leaf: AdapterLeaf) -> TypeGuard[LoRALeaf]:
    return isinstance(leaf, LoRALeaf) and leaf.residual


def _to_plain_lora(leaf: LoRALeaf, **changes: Any) -> LoRALeaf:
    """Returns a plain LoRA leaf with the leaf's factors, and some fields replaced."""
    fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(LoRALeaf)}
    return LoRALeaf(**{**fields, **changes})


def truncate_rank(adapter: Adapter, rank: int) -> dict[str, Any]:
    """Returns the first `rank` ranks of a DyLoRA adapter as plain LoRA.

    Args:
        adapter: Adapter with DyLoRA leaves; all others are not changed.
        rank: Rank of the result, from the smallest trained rank to the largest.

    Raises:
        TypeError: `adapter` is not an adapter, or `rank` is not an integer.
        ValueError: There is no DyLoRA leaf, or the rank was not trained.

    References:
        Valipour et al., DyLoRA, arXiv:2210.07558.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DyLoRA(rank=4, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((3, 6)))
        >>> jlora.truncate_rank(adapter, 2)["w"].rank
        2
    """
    _validation.check_rank("rank", rank)
    leaves = check_adapter(adapter)
    if not any(isinstance(leaf, DyLoRALeaf) for leaf in leaves.values()):
        raise ValueError(
            "truncate_rank got an adapter with no DyLoRA leaf, and the first ranks of other "
            "adapters alone are not an adapter. Use jlora.to_lora(adapter, params, rank) for the "
            "best approximation of a lower rank."
        )
    truncated = dict(adapter)
    for path, leaf in leaves.items():
        if not isinstance(leaf, DyLoRALeaf):
            continue
        if not leaf.min_rank <= rank <= leaf.rank:
            raise ValueError(
                f"rank={rank} was not trained on {path!r}: its ranks are {leaf.min_rank} to "
                f"{leaf.rank}. Choose one of those."
            )
        axis = len(leaf.axis_sizes.batch)
        b = jax.lax.slice_in_dim(leaf.b, 0, rank, axis=axis)
        truncated[path] = _to_plain_lora(leaf, a=leaf.a[..., :rank], b=b, rank=rank)
    return truncated


def prune_ranks(adapter: Adapter) -> dict[str, Any]:
    """Returns an AdaLoRA or SoRA adapter as plain LoRA, without ranks that training set to zero.

    Every weight has its own rank; a stack of layers has the largest rank of its layers. A weight
    without any rank left is removed.

    Args:
        adapter: Adapter with AdaLoRA or SoRA leaves, of concrete arrays; all other leaves are not
            changed.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: There is neither an AdaLoRA nor a SoRA leaf, or a gate is not finite.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, section 3.2. Ding et al., SoRA, arXiv:2311.11696.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.SoRA(rank=3, alpha=3))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((3, 6)))
        >>> leaf = dataclasses.replace(adapter["w"], gate=jnp.array([1.0, 0.0, 0.5]))
        >>> jlora.prune_ranks({"w": leaf})["w"].rank
        2
    """
    leaves = check_adapter(adapter)
    if not any(isinstance(leaf, AdaLoRALeaf | SoRALeaf) for leaf in leaves.values()):
        raise ValueError(
            "prune_ranks got an adapter with no AdaLoRA or SoRA leaf. Only those set ranks to "
            "zero; use jlora.to_lora for a lower rank of any other adapter."
        )
    pruned = dict(adapter)
    for path, leaf in leaves.items():
        if not isinstance(leaf, AdaLoRALeaf | SoRALeaf):
            continue
        gates = leaf.s if isinstance(leaf, AdaLoRALeaf) else leaf.gate
        plain = _drop_zero_ranks(path, leaf, np.asarray(gates))
        if plain is None:
            del pruned[path]
        else:
            pruned[path] = plain
    return pruned


def _drop_zero_ranks(
    path: str, leaf: AdaLoRALeaf | SoRALeaf, rank_gates: np.ndarray
) -> LoRALeaf | None:
    """Returns a plain LoRA leaf of the ranks with a non-zero gate; None when all are zero."""
    if not np.isfinite(rank_gates).all():
        raise ValueError(
            f"The adapter on {path!r} has gates that are not finite. Use a checkpoint from before "
            f"the training diverged."
        )
    rank = int((rank_gates != 0).sum(-1).max())
    if rank == 0:
        return None
    batch, inputs, outputs = leaf.axis_sizes
    order = np.argsort(rank_gates == 0, axis=-1, kind="stable")[..., :rank]  # (*batch, rank)
    a = np.asarray(leaf.a).reshape(*batch, -1, leaf.rank)
    b = np.asarray(leaf.b).reshape(*batch, leaf.rank, -1)
    a = np.take_along_axis(a, order[..., None, :], -1)
    b = np.take_along_axis(b, order[..., :, None], -2)
    gates = np.take_along_axis(rank_gates, order, -1)[..., :, None]
    return LoRALeaf(
        a=jnp.asarray(a.reshape(*batch, *inputs, rank)),
        b=jnp.asarray((b * gates).reshape(*batch, rank, *outputs)),
        shape=leaf.shape,
        axes=leaf.axes,
        rank=rank,
        alpha=leaf.scale * rank,
        dropout=leaf.dropout,
        residual=_is_residual_leaf(leaf),
    )


class ConversionResult(NamedTuple):
    """A plain LoRA that approximates another adapter.

    Attributes:
        adapter: LoRA leaf of every weight, by path.
        energy: Fraction of the squared norm of each weight's update that the LoRA leaf preserves,
            by path; one where nothing is lost.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((6, 5))}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoHa(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((3, 6)))
        >>> converted, energy = jlora.to_lora(adapter, params, rank=2)
        >>> converted["w"].rank, list(energy)
        (2, ['w'])
    """

    adapter: dict[str, LoRALeaf]
    energy: dict[str, float]


def to_lora(adapter: Adapter, params: PyTree, rank: int) -> ConversionResult:
    """Returns the best plain LoRA approximation of a rank, by singular value decomposition.

    Where a method's update is a product of two low-rank factors, the decomposition is computed from
    them, and no array of the weight's size is formed. For other methods (Kronecker products, DoRA,
    HiRA, full deltas) the update is materialized, one weight at a time.

    Args:
        adapter: Adapter of any method but `LoRAMoE`.
        params: Its base.
        rank: Rank of the result; lower for weights whose largest possible rank is lower.

    Raises:
        TypeError: `adapter` is not an adapter, or `rank` is not an integer.
        ValueError: The adapter does not fit the parameters, adapts a bias or a norm, or has a
            `LoRAMoE` leaf.

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank, 1936.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((6, 5))}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoHa(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((3, 6)))
        >>> result = jlora.to_lora(adapter, params, rank=4)
        >>> result.adapter["w"].rank, result.energy["w"]
        (4, 1.0)
    """
    _validation.check_rank("rank", rank)
    flat = _tree.flatten_with_paths(params)
    converted = ConversionResult({}, {})
    for path, index in weight_indices(flat, adapter).items():
        leaf = adapter[path]
        if not leaf.axes.inputs or not leaf.axes.outputs:
            raise ValueError(
                f"The adapter changes {path!r}, which has no low rank. Merge that part first: "
                f"jlora.merge(params, {{{path!r}: adapter[{path!r}]}}), and remove it from the "
                f"adapter."
            )
        base = promote_to_float32(flat.leaves[index])
        u, s, vt = svd_of_change(leaf, adapt_weight(adapter, path, base))
        leaf_rank = min(rank, s.shape[-1])
        squares = np.asarray(s, np.float64) ** 2
        total = squares.sum()
        converted.energy[path] = float(squares[..., :leaf_rank].sum() / total) if total else 1.0
        root = jnp.sqrt(s[..., :leaf_rank])
        batch, inputs, outputs = leaf.axis_sizes
        a, b = u[..., :leaf_rank] * root[..., None, :], root[..., :, None] * vt[..., :leaf_rank, :]
        converted.adapter[path] = LoRALeaf(
            a=a.reshape(*batch, *inputs, leaf_rank),
            b=b.reshape(*batch, leaf_rank, *outputs),
            shape=leaf.shape,
            axes=leaf.axes,
            rank=leaf_rank,
            alpha=float(leaf_rank),
            dropout=leaf.dropout,
            residual=_is_residual_leaf(leaf),
        )
    return converted
