"""Merges an adapter into a checkpoint's dtype and reports the rounding loss of each update."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _tree
from jlora._delta import depends_on_base
from jlora._quantized_array import maybe_dequantize
from jlora._tree import PyTree
from jlora.adapters.base import weight_indices
from jlora.adapters.layer_layout import match_layer_layout
from jlora.checkpoints.stored_weight import StoredWeight, read_weight
from jlora.interpreter.terms import widest_dtype
from jlora.interpreter.weight import as_divisor
from jlora.transform import check_not_quantized, lora_transform, merge

# A gain or a cosine below this is worth a warning.
_MIN_FIDELITY = 0.9


class UpdateLostWarning(UserWarning):
    """Warns that rounding removes a large part of an adapter's updates.

    Example:
        >>> import warnings
        >>> import jlora
        >>> warnings.simplefilter("error", jlora.UpdateLostWarning)  # Refuse lossy merges.
        >>> warnings.simplefilter("default", jlora.UpdateLostWarning)
    """


class MergeFidelity(NamedTuple):
    """Fidelity of one weight's update after rounding to the target dtype.

    Attributes:
        gain: Length of the rounded update along the exact one, relative to the exact one; 1
            without loss.
        cosine: Cosine similarity of the rounded and the exact update; 1 without loss.
        unchanged: Fraction of the weight's entries that the rounded update does not change.
        relative_norm: Norm of the exact update over the norm of the weight.

    Example:
        >>> import jlora
        >>> jlora.MergeFidelity(gain=0.5, cosine=0.7, unchanged=0.6, relative_norm=1e-4).is_lost
        True
    """

    gain: float
    cosine: float
    unchanged: float
    relative_norm: float

    @property
    def is_lost(self) -> bool:
        """True if the loss calls for a wider dtype: a gain or a cosine below 0.9."""
        return self.gain < _MIN_FIDELITY or self.cosine < _MIN_FIDELITY


class MergeResult(NamedTuple):
    """Merged parameters and the fidelity of each update.

    Printed as a table of the fidelities.

    Attributes:
        params: Merged parameter tree.
        report: Fidelity of each update, by the weight's path, without weights whose update is
            zero.

    Example:
        >>> import jax.numpy as jnp
        >>> import jlora
        >>> report = {"w": jlora.MergeFidelity(1, 1, 0, 0.1)}
        >>> jlora.MergeResult({"w": jnp.ones(2)}, report).report["w"].gain
        1
    """

    params: PyTree
    report: dict[str, MergeFidelity]

    def __str__(self) -> str:
        lines = [f"{'weight':40} {'gain':>7} {'cosine':>7} {'unchanged':>9} {'|change|/|W|':>12}"]
        lines += [
            f"{path:40} {f.gain:7.3f} {f.cosine:7.3f} {f.unchanged:9.3f} {f.relative_norm:12.1e}"
            for path, f in self.report.items()
        ]
        return "\n".join(lines)


def merge_to_dtype(
    params: PyTree,
    adapter: Mapping[str, Any],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    dequantize: bool = False,
) -> MergeResult:
    """Merges an adapter into a parameter tree of a dtype, with one rounding of each weight.

    Each merged weight is computed in float32 or wider. Warns where rounding removes a tenth or
    more of a weight's update: small updates are below the spacing of a narrow dtype, which a wider
    dtype preserves, or even below that of float32.

    Args:
        params: The base, which is not modified.
        adapter: Trained adapter.
        dtype: Dtype of all floating-point weights; that of each weight when None.
        dequantize: True to dequantize all quantized weights, adapted or not.

    Returns:
        The merged parameters, and the fidelity of each update.

    Raises:
        ValueError: The adapter does not fit `params`; a merged weight is not finite in its dtype;
            or weights are quantized and `dequantize` is False.

    Warns:
        UpdateLostWarning: Rounding removes a tenth or more of an update.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"b": jnp.ones(3, jnp.bfloat16)}
        >>> lora = jlora.lora_transform(lambda p, x: x + p["b"], {"b": jlora.BitFit()})
        >>> fresh = lora.init(jax.random.key(0), params, jnp.ones((1, 3)))
        >>> adapter = jax.tree.map(lambda delta: delta + 1e-4, fresh)
        >>> jlora.merge_to_dtype(params, adapter, jnp.float32).params["b"]
        Array([1.0001, 1.0001, 1.0001], dtype=float32)
    """
    result = merge_stored(params, adapter, dtype, dequantize=dequantize)
    merged = jax.tree.map(read_weight, result.params)
    warn_lost_updates(result.report, stacklevel=3)
    return MergeResult(merged, result.report)


def merge_stored(
    params: PyTree,
    adapter: Mapping[str, Any],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    dequantize: bool = False,
) -> MergeResult:
    """Prepares the merge of `merge_to_dtype`, in which a weight is computed when it is read.

    Args:
        params: The base, of arrays or of stored weights.
        adapter: Trained adapter.
        dtype: As for `merge_to_dtype`.
        dequantize: As for `merge_to_dtype`.

    Returns:
        Parameters of which those that change are `StoredWeight`s, and the report, which gets the
        fidelity of a weight when it is read. Reading raises a `ValueError` for a weight that is not
        finite.

    Raises:
        ValueError: The adapter does not fit `params`, or weights are quantized and `dequantize` is
            False.
    """
    flat = _tree.flatten_with_paths(params)
    adapter = match_layer_layout(adapter, params)
    positions = weight_indices(flat, adapter)
    shared = {name: node for name, node in adapter.items() if name not in positions}
    leaves = list(flat.leaves)
    check_not_quantized(flat, dequantize)
    report: dict[str, MergeFidelity] = {}

    def read_merged(path: str, leaf: Any, target: Any) -> jax.Array:
        base = jnp.asarray(maybe_dequantize(read_weight(leaf)))
        merged, fidelity = _merge_weight(path, base, {path: adapter[path], **shared}, target)
        if fidelity is not None:
            report[path] = fidelity
        return merged

    for path, position in positions.items():
        leaf = leaves[position]
        target = leaf.dtype if dtype is None else jnp.dtype(dtype)
        read = functools.partial(read_merged, path, leaf, target)
        leaves[position] = StoredWeight(tuple(leaf.shape), target, read)
    for position in set(range(len(leaves))) - set(positions.values()):
        leaves[position] = _cast_lazily(leaves[position], dtype)
    return MergeResult(jax.tree.unflatten(flat.treedef, leaves), report)


def warn_lost_updates(report: Mapping[str, MergeFidelity], stacklevel: int = 2) -> None:
    """Warns if rounding removes a large part of an update.

    Args:
        report: Fidelities of the updates, by path.
        stacklevel: Level of the caller in the warning.
    """
    lost = [path for path, fidelity in report.items() if fidelity.is_lost]
    if not lost:
        return
    worst = min(lost, key=lambda path: min(report[path].gain, report[path].cosine))
    fidelity = report[worst]
    warnings.warn(
        f"{len(lost)} of {len(report)} updates are lost by rounding. The worst is {worst!r}: "
        f"{fidelity.gain:.0%} of the update remains, and its cosine with the exact update is "
        f"{fidelity.cosine:.2f}. Merge to float32, or serve the adapter without merging.",
        UpdateLostWarning,
        stacklevel=stacklevel,
    )


def _cast_lazily(leaf: Any, dtype: jax.typing.DTypeLike | None) -> Any:
    """Returns a leaf that is not adapted, in the dtype if it is of floats."""
    if _tree.is_quantized(leaf):
        leaf = StoredWeight(leaf.shape, leaf.dtype, functools.partial(maybe_dequantize, leaf))
    is_float = _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    if dtype is None or not is_float:
        return leaf

    def read() -> jax.Array:
        return jnp.asarray(read_weight(leaf)).astype(dtype)

    return StoredWeight(tuple(leaf.shape), jnp.dtype(dtype), read)


# Bytes of a weight in float32 that are merged at a time.
_BLOCK_BYTES = 1 << 26


def _merge_weight(
    path: str, base: jax.Array, adapter: dict[str, Any], dtype: Any
) -> tuple[jax.Array, MergeFidelity | None]:
    """Merges one weight, a large one in blocks of its first axis.

    Returns:
        The merged weight, and the fidelity of its update; None if the update is zero.

    Raises:
        ValueError: The merged weight is not finite.
    """
    # The update without the base, whose sum may round it away in float32 too.
    is_alone = not depends_on_base(adapter, path)
    row_bytes = 4 * base.size // max(1, *base.shape[:1])
    rows = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    if base.ndim < 2 or rows >= base.shape[0]:
        wide = base.astype(widest_dtype(base.dtype, jnp.float32))
        update = merge({path: jnp.zeros_like(wide)}, adapter)[path] if is_alone else None
        merged = merge({path: wide}, adapter)[path]
        result, sums = _round_merged_weight(wide, merged, update, dtype)
        totals = _scale_sums(sums)
    else:
        result, totals = jnp.zeros(base.shape, dtype), np.zeros(6)
        for start in range(0, base.shape[0], rows):
            size = min(rows, base.shape[0] - start)
            block, sums = _merge_block(
                base, adapter, start, path=path, size=size, dtype=dtype, is_alone=is_alone
            )
            result = _write_block(result, block, start)
            totals += _scale_sums(sums)
    num_nonfinite, exact, rounded, squares, inner, unchanged = totals
    if num_nonfinite:
        raise ValueError(
            f"The merged weight {path!r} has NaN or infinite entries in {jnp.dtype(dtype)}. Train "
            f"with a lower learning rate, or merge to a dtype of wider range."
        )
    if not exact:
        return result, None
    fidelity = MergeFidelity(
        gain=inner / exact,
        cosine=inner / math.sqrt(exact * rounded) if rounded else 0.0,
        unchanged=unchanged / base.size,
        relative_norm=math.sqrt(exact / squares) if squares else 0.0,
    )
    return result, fidelity


@functools.partial(jax.jit, static_argnames=("path", "size", "dtype", "is_alone"))
def _merge_block(
    base: jax.Array,
    adapter: Any,
    start: Any,
    *,
    path: str,
    size: int,
    dtype: Any,
    is_alone: bool,
) -> tuple[jax.Array, jax.Array]:
    """Merges rows of a weight, as `_round_merged_weight` does all."""

    def take_rows(params: Any, start: Any) -> jax.Array:
        return lax.dynamic_slice_in_dim(params[path], start, size)

    wide = {path: base.astype(widest_dtype(base.dtype, jnp.float32))}
    apply = lora_transform(take_rows).apply
    update = apply(jax.tree.map(jnp.zeros_like, wide), adapter, start) if is_alone else None
    merged = apply(wide, adapter, start)
    return _round_merged_weight(take_rows(wide, start), merged, update, dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _write_block(array: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, block, start, 0)


def _scale_sums(sums: jax.Array) -> np.ndarray:
    """Returns the first six sums of `_round_merged_weight`, in float64 without their scales."""
    *totals, exact, kept, base = np.asarray(sums, np.float64)
    return np.array(totals) * np.array([1, exact**2, kept**2, base**2, kept * exact, 1])


@functools.partial(jax.jit, static_argnums=3)
def _round_merged_weight(
    base: jax.Array, merged: jax.Array, update: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Rounds a merged weight to a dtype and computes sums over its entries.

    Args:
        base: The base in float32 or wider.
        merged: The merged weight in that dtype.
        update: The exact update. None: the difference of the merged weight and the base.
        dtype: Dtype of the result.

    Returns:
        The rounded weight; and (9,): the number of entries that are not finite; the squared norms
        of the exact update, the rounded update and the base, and the inner product of the updates,
        each divided by their sizes; the number of entries that the rounded update does not change;
        and the sizes of both updates and of the base, their largest entries.
    """
    rounded = merged.astype(dtype)
    rounded_update = rounded.astype(base.dtype) - base
    arrays = (merged - base if update is None else update, rounded_update, base)
    # Divided by their sizes, no square over- or underflows.
    sizes = [as_divisor(jnp.abs(array).max()) for array in arrays]
    exact, kept, part = (array / size for array, size in zip(arrays, sizes, strict=True))
    sums = [
        (~jnp.isfinite(rounded)).sum(),
        (exact**2).sum(),
        (kept**2).sum(),
        (part**2).sum(),
        (kept * exact).sum(),
        (rounded_update == 0).sum(),
        *sizes,
    ]
    return rounded, jnp.stack([value.astype(jnp.float32) for value in sums])
