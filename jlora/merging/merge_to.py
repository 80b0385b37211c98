"""Merging into the type that a checkpoint is written in, and a report of what that costs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _tree
from jlora._tree import PyTree
from jlora.adapters.base import weight_indices
from jlora.transform import materialize_leaves, merge

# A change kept to less than this, or turned away by as much, is worth a warning.
_MIN_FIDELITY = 0.9


class UpdateLostWarning(UserWarning):
    """Rounding takes away much of what an adapter changes."""


class MergeFidelity(NamedTuple):
    """What is left of one weight's change in the type it is written in.

    Attributes:
        gain: How long the change is along what it should be: 1 when nothing is lost.
        cosine: Between the two: 1 when nothing is lost.
        unchanged: The share of entries that stay as they were.
        relative_norm: The length of the change over that of the weight.
    """

    gain: float
    cosine: float
    unchanged: float
    relative_norm: float

    @property
    def is_lost(self) -> bool:
        """Whether so much is gone that a wider type is needed."""
        return self.gain < _MIN_FIDELITY or self.cosine < _MIN_FIDELITY


class MergeResult(NamedTuple):
    """A merged base.

    Attributes:
        params: The new tree.
        report: What is left of each change, by the weight's path; without weights that the adapter
            does not change at all.
    """

    params: PyTree
    report: dict[str, MergeFidelity]

    def __str__(self) -> str:
        lines = [f"{'weight':40} {'gain':>7} {'cosine':>7} {'unchanged':>9} {'|change|/|W|':>12}"]
        lines += [
            f"{path:40} {k.gain:7.3f} {k.cosine:7.3f} {k.unchanged:9.3f} {k.relative_norm:12.1e}"
            for path, k in self.report.items()
        ]
        return "\n".join(lines)


def merge_to_dtype(
    params: PyTree,
    adapter: Mapping[str, Any],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    dequantize: bool = False,
) -> MergeResult:
    """The merged tree in a type, every weight summed in float32 and rounded once.

    Warns where rounding takes a tenth or more of a weight's change: a small change is below the
    spacing of a narrow type. A wider type keeps it.

    Args:
        params: The base; it is not changed.
        adapter: What `init` returned, trained.
        dtype: Of all weights; each weight's own when None.
        dequantize: Whether all quantised weights become arrays, adapted or not.

    Raises:
        ValueError: The adapter does not fit, a merged weight is not finite in its type, or some
            weights are quantised and `dequantize` is off.
    """
    flat = _tree.flatten_with_paths(params)
    where = weight_indices(flat, adapter)
    shared = {name: node for name, node in adapter.items() if name not in where}
    leaves = materialize_leaves(flat, dequantize)
    report: dict[str, MergeFidelity] = {}
    for path, place in where.items():
        base = jnp.asarray(leaves[place])
        target = base.dtype if dtype is None else jnp.dtype(dtype)
        wide = base.astype(jnp.promote_types(base.dtype, jnp.float32))
        summed = merge({path: wide}, {path: adapter[path], **shared})[path]
        leaves[place], figures = _round_merged_weight(wide, summed, target)
        finite, is_new, *kept = (float(figure) for figure in figures)
        if not finite:
            raise ValueError(
                f"The merged {path!r} holds NaN or Inf in {target}. Train with a lower learning "
                f"rate, or merge to a type of a wider range."
            )
        if is_new:
            report[path] = MergeFidelity(*kept)
    lost = [path for path, kept in report.items() if kept.is_lost]
    if lost:
        worst = min(lost, key=lambda path: min(report[path].gain, report[path].cosine))
        left = report[worst]
        warnings.warn(
            f"{len(lost)} of {len(report)} changes are lost by rounding, most at {worst!r}: along "
            f"the change {left.gain:.0%} of it is left, and the cosine of the two is "
            f"{left.cosine:.2f}. Merge to float32, or keep the adapter apart.",
            UpdateLostWarning,
            stacklevel=2,
        )
    if dtype is not None:
        leaves = [_cast_if_float(leaf, dtype) for leaf in leaves]
    return MergeResult(jax.tree.unflatten(flat.treedef, leaves), report)


def _cast_if_float(leaf: Any, dtype: jax.typing.DTypeLike) -> Any:
    is_float = _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(leaf).astype(dtype) if is_float else leaf


@functools.partial(jax.jit, static_argnums=2)
def _round_merged_weight(
    base: jax.Array, merged: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The sum in its type; whether it is finite, whether it is new, and the figures of `MergeFidelity`."""
    written = merged.astype(dtype)
    wanted, found = merged - base, written.astype(base.dtype) - base
    length, other, size = (jnp.linalg.norm(x.ravel()) for x in (wanted, found, base))
    along = jnp.vdot(found, wanted)

    def ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
        return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), 0)

    figures = [
        jnp.isfinite(written).all(),
        length > 0,
        ratio(along, length**2),
        ratio(along, length * other),
        (found == 0).mean(),
        ratio(length, size),
    ]
    return written, jnp.stack([figure.astype(jnp.float32) for figure in figures])
