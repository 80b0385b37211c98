"""From one kind of adapter to another, and the base that belongs to some."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree, _validation
from jlora._delta import compute_dense_delta, svd_of_change
from jlora._quantized_array import is_quantized
from jlora._tree import PyTree
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
    """What the adapter changes: for every adapted weight its path and the difference, laid out like
    the weight, in float32 or wider.

    Args:
        params: The base.
        adapter: What `init` returned, trained.

    Raises:
        ValueError: When the adapter does not fit the parameters, or is a mixture.
    """
    flat = _tree.flatten_with_paths(params)
    changes = {}
    for path, place in weight_indices(flat, adapter).items():
        base = promote_to_float32(flat.leaves[place])
        changes[path] = compute_dense_delta(adapt_weight(adapter, path, base))
    return changes


def residual_base(params: PyTree, adapter: Adapter) -> PyTree:
    """The base that belongs to an adapter whose factors were taken out of the weights.

    PiSSA, OLoRA, MiLoRA and LoRA-GA start with an update that is not zero. On this base, which
    lacks it, the model starts where it was: `apply(residual_base(params, adapter), adapter, x)` is
    `fn(params, x)` up to rounding in the weights' type. Train and serve the adapter on it, or turn
    it into one for the original base with `rebase_to_original`.

    Args:
        params: The original base; it is not changed.
        adapter: Fresh from `init`. After a step of training it would be too late.

    Raises:
        ValueError: When nothing of the adapter was taken out of the weights.
    """
    flat = _tree.flatten_with_paths(params)
    leaves = list(flat.leaves)
    taken = [path for path, leaf in check_adapter(adapter).items() if _is_residual_leaf(leaf)]
    if not taken:
        raise ValueError(
            "residual_base got an adapter whose update starts at zero: its base is params. Only "
            "the initialisations pissa, olora, milora and lora_ga need another."
        )
    for path, place in weight_indices(flat, adapter).items():
        if path in taken and is_quantized(leaves[place]):
            raise ValueError(
                f"residual_base cannot take the factors out of {path!r}, which is quantised "
                f"({leaves[place]}). Initialise on the weights as they were, take the factors out, "
                f"and quantise what is left: jlora.quantize(jlora.residual_base(params, adapter), "
                f"...)."
            )
        if path in taken:
            base = jnp.asarray(leaves[place])
            # A DoRA's gains, and a gate of ones, are beside the point: the product is taken out.
            product = {path: _to_plain_lora(adapter[path])}
            zeros = jnp.zeros_like(promote_to_float32(base))
            update = adapt_weight(product, path, zeros).materialize()
            leaves[place] = (promote_to_float32(base) - update).astype(base.dtype)
    return jax.tree.unflatten(flat.treedef, leaves)


def rebase_to_original(adapter: Adapter, initial_adapter: Adapter) -> dict[str, Any]:
    """A plain LoRA for the original base, from one trained on the base of `residual_base` or
    `loftq`.

    What the training changed is `A B - A0 B0`, a LoRA of twice the rank. Parts of the adapter that
    were on the original base already stay as they are. What was pruned or converted to LoRA since
    is taken too.

    Args:
        adapter: The trained adapter.
        initial_adapter: What `init` had returned, or `loftq`.

    Raises:
        ValueError: When the adapter has other weights than `initial_adapter`, or nothing of `initial_adapter` was
            taken out of the base.
        TypeError: For DoRA, whose change is no difference of two products.
    """
    check_adapter(adapter)
    taken = {
        path: leaf
        for path, leaf in check_adapter(initial_adapter).items()
        if _is_residual_leaf(leaf)
    }
    if not taken:
        raise ValueError(
            "rebase_to_original got a fresh adapter whose update starts at zero: its base is the "
            "original one already."
        )
    unknown = sorted(set(adapter) - set(initial_adapter))
    if unknown:
        raise ValueError(
            f"The adapter has {unknown[:3]}, which fresh has not. Give what init returned before "
            f"this adapter was trained."
        )
    converted = dict(adapter)
    for path, start in taken.items():
        axis = len(start.axis_sizes.batch)
        factors = [(start.a, -start.b * start.scale)]
        leaf = adapter.get(path)  # Pruning leaves out what has no rank left.
        if leaf is not None and type(leaf) not in (LoRALeaf, LoRAFALeaf):
            raise TypeError(
                f"The adapter on {path!r} is a {type(leaf).__name__}, whose change on the residual "
                f"base is no LoRA on the original one. Prune it where it has gates; else merge it "
                f"into its residual base."
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
    """The leaf's factors as those of plain LoRA."""
    facts = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(LoRALeaf)}
    return LoRALeaf(**{**facts, **changes})


def truncate_rank(adapter: Adapter, rank: int) -> dict[str, Any]:
    """A DyLoRA adapter at a lower rank, as plain LoRA: its first `rank` ranks.

    Args:
        adapter: With DyLoRA leaves; all others stay as they are.
        rank: From the least that was trained to all.

    Raises:
        ValueError: When there is no DyLoRA leaf, or the rank was not trained.
    """
    _validation.check_rank("rank", rank)
    leaves = check_adapter(adapter)
    cut, found = dict(adapter), False
    for path, leaf in leaves.items():
        if not isinstance(leaf, DyLoRALeaf):
            continue
        found = True
        if not leaf.min_rank <= rank <= leaf.rank:
            raise ValueError(
                f"rank={rank} was not trained on {path!r}: its ranks are {leaf.min_rank} to "
                f"{leaf.rank}. Choose one of those."
            )
        axis = len(leaf.axis_sizes.batch)
        b = jax.lax.slice_in_dim(leaf.b, 0, rank, axis=axis)
        cut[path] = _to_plain_lora(leaf, a=leaf.a[..., :rank], b=b, rank=rank)
    if not found:
        raise ValueError(
            "truncate found no DyLoRA leaf, and of other adapters the first ranks alone are no "
            "adapter. Use jlora.to_lora(adapter, params, rank) for the best of a lower rank."
        )
    return cut


def prune_ranks(adapter: Adapter) -> dict[str, Any]:
    """An AdaLoRA or SoRA adapter without the ranks that training set to zero, as plain LoRA.

    Every weight gets its own rank (a stack of layers the largest of its layers'). A weight with
    none left is left out.

    Args:
        adapter: With AdaLoRA or SoRA leaves, as concrete arrays; all others stay as they are.

    Raises:
        ValueError: When there is neither.
    """
    leaves = check_adapter(adapter)
    pruned, found = dict(adapter), False
    for path, leaf in leaves.items():
        if not isinstance(leaf, AdaLoRALeaf | SoRALeaf):
            continue
        found = True
        weights = leaf.s if isinstance(leaf, AdaLoRALeaf) else leaf.gate
        kept = _drop_zero_ranks(path, leaf, np.asarray(weights))
        if kept is None:
            del pruned[path]
        else:
            pruned[path] = kept
    if not found:
        raise ValueError(
            "prune found no AdaLoRA or SoRA leaf. Only those set ranks to zero; use jlora.to_lora "
            "for a lower rank of any other."
        )
    return pruned


def _drop_zero_ranks(
    path: str, leaf: AdaLoRALeaf | SoRALeaf, rank_gates: np.ndarray
) -> LoRALeaf | None:
    if not np.isfinite(rank_gates).all():
        raise ValueError(
            f"The adapter on {path!r} has gates that are not finite. Go back to a checkpoint from "
            f"before the training diverged."
        )
    rank = int((rank_gates != 0).sum(-1).max())
    if rank == 0:
        return None
    batch, inputs, outputs = leaf.axis_sizes
    first = np.argsort(rank_gates == 0, axis=-1, kind="stable")[..., :rank]  # (*batch, rank)
    a = np.asarray(leaf.a).reshape(*batch, -1, leaf.rank)
    b = np.asarray(leaf.b).reshape(*batch, leaf.rank, -1)
    a = np.take_along_axis(a, first[..., None, :], -1)
    b = np.take_along_axis(b, first[..., :, None], -2)
    gates = np.take_along_axis(rank_gates, first, -1)[..., :, None]
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
    """A plain LoRA, and how much of what it was made from it keeps.

    Attributes:
        adapter: For every weight a LoRA leaf.
        energy: For every weight the share of the change's squared norm that its best approximation
            of this rank keeps; one where nothing is lost.
    """

    adapter: dict[str, LoRALeaf]
    energy: dict[str, float]


def to_lora(adapter: Adapter, params: PyTree, rank: int) -> ConversionResult:
    """The nearest plain LoRA of a rank, by a singular value decomposition of the change.

    Where the family says its change as a product of two thin factors, the decomposition is made
    from those: nothing of the weight's size is formed. For the others (Kronecker products, DoRA,
    HiRA, whole weights) it is made of the change itself, one weight at a time.

    Args:
        adapter: Any but a mixture.
        params: Its base.
        rank: Of the result; lower where a weight's own rank is.

    Raises:
        ValueError: When the adapter does not fit, changes a bias or a norm, or is a mixture.
    """
    _validation.check_rank("rank", rank)
    flat = _tree.flatten_with_paths(params)
    converted = ConversionResult({}, {})
    for path, place in weight_indices(flat, adapter).items():
        leaf = adapter[path]
        if not leaf.axes.inputs or not leaf.axes.outputs:
            raise ValueError(
                f"The adapter changes {path!r}, which has no low rank. Merge that part first: "
                f"jlora.merge(params, {{{path!r}: adapter[{path!r}]}}), and leave it out here."
            )
        base = promote_to_float32(flat.leaves[place])
        u, s, vt = svd_of_change(leaf, adapt_weight(adapter, path, base))
        kept = min(rank, s.shape[-1])
        squares = np.asarray(s, np.float64) ** 2
        whole = squares.sum()
        converted.energy[path] = float(squares[..., :kept].sum() / whole) if whole else 1.0
        root = jnp.sqrt(s[..., :kept])
        batch, inputs, outputs = leaf.axis_sizes
        a, b = u[..., :kept] * root[..., None, :], root[..., :, None] * vt[..., :kept, :]
        converted.adapter[path] = LoRALeaf(
            a=a.reshape(*batch, *inputs, kept),
            b=b.reshape(*batch, kept, *outputs),
            shape=leaf.shape,
            axes=leaf.axes,
            rank=kept,
            alpha=float(kept),
            dropout=leaf.dropout,
            residual=_is_residual_leaf(leaf),
        )
    return converted
