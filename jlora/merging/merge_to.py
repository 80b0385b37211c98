"""Merges an adapter into a checkpoint's dtype and reports the rounding loss of each update."""

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
from jlora.adapters.layer_layout import match_layer_layout
from jlora.interpreter.weight import as_divisor
from jlora.transform import materialize_leaves, merge

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
    more of a weight's update: small updates are below the spacing of a narrow dtype. A wider dtype
    preserves them.

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
    flat = _tree.flatten_with_paths(params)
    adapter = match_layer_layout(adapter, params)
    positions = weight_indices(flat, adapter)
    shared = {name: node for name, node in adapter.items() if name not in positions}
    leaves = materialize_leaves(flat, dequantize)
    report: dict[str, MergeFidelity] = {}
    for path, position in positions.items():
        base = jnp.asarray(leaves[position])
        target = base.dtype if dtype is None else jnp.dtype(dtype)
        wide = base.astype(jnp.promote_types(base.dtype, jnp.float32))
        merged = merge({path: wide}, {path: adapter[path], **shared})[path]
        leaves[position], statistics = _round_merged_weight(wide, merged, target)
        is_finite, has_update, *fidelity = (float(value) for value in statistics)
        if not is_finite:
            raise ValueError(
                f"The merged weight {path!r} has NaN or infinite entries in {target}. Train with a "
                f"lower learning rate, or merge to a dtype of wider range."
            )
        if has_update:
            report[path] = MergeFidelity(*fidelity)
    lost = [path for path, fidelity in report.items() if fidelity.is_lost]
    if lost:
        worst = min(lost, key=lambda path: min(report[path].gain, report[path].cosine))
        fidelity = report[worst]
        warnings.warn(
            f"{len(lost)} of {len(report)} updates are lost by rounding. The worst is {worst!r}: "
            f"{fidelity.gain:.0%} of the update remains, and its cosine with the exact update is "
            f"{fidelity.cosine:.2f}. Merge to float32, or serve the adapter without merging.",
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
    """Rounds a merged weight to a dtype and computes the statistics of its update.

    Returns:
        The rounded weight; and (6,): whether it is finite, whether the exact update is nonzero,
        and the four fields of `MergeFidelity`.
    """
    rounded = merged.astype(dtype)
    exact_update, rounded_update = merged - base, rounded.astype(base.dtype) - base
    # Divided by their sizes, no square over- or underflows.
    update_size, base_size = (as_divisor(jnp.abs(x).max()) for x in (exact_update, base))
    exact_update, rounded_update = exact_update / update_size, rounded_update / update_size
    exact_norm, rounded_norm, base_norm = (
        jnp.linalg.norm(x.ravel()) for x in (exact_update, rounded_update, base / base_size)
    )
    inner = jnp.vdot(rounded_update, exact_update)

    def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
        is_positive = denominator > 0
        return jnp.where(is_positive, numerator / jnp.where(is_positive, denominator, 1), 0)

    statistics = [
        jnp.isfinite(rounded).all(),
        exact_norm > 0,
        safe_divide(inner, exact_norm**2),
        safe_divide(inner, exact_norm * rounded_norm),
        (rounded_update == 0).mean(),
        safe_divide(exact_norm, base_norm) * (update_size / base_size),
    ]
    return rounded, jnp.stack([value.astype(jnp.float32) for value in statistics])
