"""Interference between adapters: cosine similarity, shared subspaces and sign conflicts."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._delta import WeightDelta, get_weight_delta, is_matrix, materialize_delta, svd
from jlora._tree import PyTree
from jlora.adapters.base import get_adapter_leaves
from jlora.checkpoints.safetensors_io import replace_file_atomically
from jlora.checkpoints.stored_weight import read_weight
from jlora.interpreter.weight import as_divisor
from jlora.merging._validation import check_adapters, collect_bases, unify_layer_layouts

Adapter = Mapping[str, Any]


class PairStats(NamedTuple):
    """Pairwise statistics of the adapters' updates of one weight, in float64.

    An entry is NaN where one of the two adapters does not adapt the weight or its update is zero.

    Attributes:
        cosine: Cosine similarity of the updates, (adapters, adapters): -1 for opposite updates, 0
            for orthogonal ones, 1 for updates that are equal up to a factor.
        input_overlap: Fraction of the input subspace of the adapter of lower rank that the other
            adapter shares, (adapters, adapters), from 0 to 1; the mean over a stack. NaN where the
            weight is not a matrix.
        output_overlap: Fraction of the output subspace, likewise, (adapters, adapters).
        sign_conflicts: Fraction of the entries with opposite signs, (adapters, adapters).
        effective_rank: Effective rank of each update, (adapters,); the mean over a stack, and 0
            for an update of zero.

    Example:
        >>> import numpy as np
        >>> from jlora.merging import PairStats
        >>> nan = np.full((1, 1), np.nan)
        >>> PairStats(np.ones((1, 1)), nan, nan, np.zeros((1, 1)), np.ones(1)).cosine
        array([[1.]])
    """

    cosine: np.ndarray
    input_overlap: np.ndarray
    output_overlap: np.ndarray
    sign_conflicts: np.ndarray
    effective_rank: np.ndarray


_PAIR_MEASURES = ("cosine", "input_overlap", "output_overlap", "sign_conflicts")

_PANEL_TITLES = ("cosine", "shared inputs", "shared outputs")


@dataclasses.dataclass(frozen=True)
class Interference:
    """Interference between adapters in each weight that any of them adapts.

    Printed as a table with the means, the effective ranks and the closest pair of each weight.

    Attributes:
        names: Names of the adapters, in the order of all arrays.
        per_weight: Statistics of each weight, by its path.

    Example:
        >>> import numpy as np
        >>> from jlora.merging import Interference, PairStats
        >>> nan, cosine = np.full((2, 2), np.nan), np.array([[1.0, 0.5], [0.5, 1.0]])
        >>> stats = PairStats(cosine, nan, nan, nan, np.ones(2))
        >>> Interference(("law", "news"), {"w": stats}).mean("cosine")[0, 1].item()
        0.5
    """

    names: tuple[str, ...]
    per_weight: dict[str, PairStats]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Positions of each pair of adapters."""
        return tuple(itertools.combinations(range(len(self.names)), 2))

    def mean(self, measure: str) -> np.ndarray:
        """Returns the mean of a measure over the weights; NaN where no weight has a value.

        Args:
            measure: "cosine", "input_overlap", "output_overlap", "sign_conflicts" or
                "effective_rank".
        """
        values = np.stack([getattr(stats, measure) for stats in self.per_weight.values()])
        return _mean_of_finite(values)

    def __str__(self) -> str:
        head = ["adapters", *_PAIR_MEASURES]
        means = PairStats(*(self.mean(measure) for measure in PairStats._fields))
        pairs = [_format_pair_row(self, means, pair) for pair in self.pairs]
        ranks = [
            [name, f"{rank:.2f}"]
            for name, rank in zip(self.names, means.effective_rank, strict=True)
        ]
        weights = [
            [path, *_format_pair_row(self, stats, _most_aligned_pair(self, stats))]
            for path, stats in self.per_weight.items()
        ]
        return "\n\n".join(
            [
                "Means over the weights:\n" + _format_aligned_table([head, *pairs], 1),
                _format_aligned_table([["adapter", "effective rank"], *ranks], 1),
                "Pair with the largest absolute cosine of each weight:\n"
                + _format_aligned_table([["weight", *head], *weights], 2),
            ]
        )


def measure_interference(
    adapters: Mapping[str, Adapter], params: PyTree | None = None
) -> Interference:
    """Measures the interference between each pair of adapters, weight by weight.

    All measures except the sign conflicts are computed from the factors where an update has them.
    Signs are compared on the materialized updates of one matrix at a time.

    Args:
        adapters: At least two trained adapters of one model, by name.
        params: The base. Required for families whose update depends on the weight: DoRA, HiRA and
            IA3.

    Returns:
        The pairwise statistics of each weight; print them, or pass them to `save_heatmap`.

    Raises:
        TypeError: `adapters` is not a mapping, or an entry is not an adapter.
        ValueError: There are fewer than two adapters, they cannot be compared (a mixture of
            experts, a residual base, different shapes), or an entry is not finite.

    References:
        Subspaces: Hu et al., LoRA, arXiv:2106.09685, section 7.2, with both adapters at their full
        rank. Sign conflicts: Yadav et al., TIES-Merging, arXiv:2306.01708, section 3. Effective
        rank: Roy and Vetterli, The effective rank, EUSIPCO 2007, section 2.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import measure_interference
        >>> params, x = {"b": jnp.ones(3)}, jnp.ones((1, 3))
        >>> lora = jlora.lora_transform(lambda p, x: x + p["b"], {"b": jlora.BitFit()})
        >>> fresh = lora.init(jax.random.key(0), params, x)
        >>> up, down = (jax.tree.map(lambda d: d + sign, fresh) for sign in (1.0, -1.0))
        >>> stats = measure_interference({"up": up, "down": down}).per_weight["b"]
        >>> round(stats.cosine[0, 1].item()), stats.sign_conflicts[0, 1].item()
        (-1, 1.0)
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters must be a mapping from names to adapters, got {type(adapters).__name__}. "
            f"Pass a dict, such as {{'french': french, 'law': law}}."
        )
    adapter_list = list(adapters.values())
    if len(adapter_list) < 2:
        raise ValueError(
            f"adapters={list(adapters)} must have at least two adapters to compare. Pass two or "
            f"more, by name."
        )
    check_adapters(adapter_list)
    adapter_list = unify_layer_layouts(adapter_list, params)
    check_adapters(adapter_list)
    bases = collect_bases(adapter_list, params)
    per_weight: dict[str, PairStats] = {}
    paths = dict.fromkeys(path for adapter in adapter_list for path in get_adapter_leaves(adapter))
    for path in paths:
        indices = [index for index, adapter in enumerate(adapter_list) if path in adapter]
        deltas = tuple(
            get_weight_delta(adapter_list[index], path, read_weight(bases.get(path)))
            for index in indices
        )
        low_rank = is_matrix(adapter_list[indices[0]][path].axes)
        stats = jax.device_get(_compute_weight_stats(deltas))
        per_weight[path] = _make_pair_stats(stats, indices, len(adapter_list), low_rank)
    return Interference(tuple(map(str, adapters)), per_weight)


class _MatrixStats(NamedTuple):
    """Statistics of each of a weight's matrices, for n adapters."""

    inner_products: Any  # (batch, n, n), of the updates divided by their sizes.
    input_overlap: Any  # (batch, n, n)
    output_overlap: Any  # (batch, n, n)
    sign_conflicts: Any  # (batch, n, n), counts of entries.
    num_entries: Any  # (batch,)
    effective_rank: Any  # (batch, n)
    sizes: Any  # (batch, n), the largest singular values.


@jax.jit
def _compute_weight_stats(deltas: tuple[WeightDelta, ...]) -> _MatrixStats:
    return jax.lax.map(_compute_matrix_stats, deltas)


def _compute_matrix_stats(deltas: tuple[WeightDelta, ...]) -> _MatrixStats:
    # Divided by their sizes, no product of two singular values over- or underflows.
    triplets, sizes = [], []
    for u, s, vt in map(svd, deltas):
        sizes.append(as_divisor(s.max()))
        triplets.append((u, s / sizes[-1], vt))
    pairs = itertools.combinations_with_replacement(range(len(triplets)), 2)
    compared = {pair: _compare_subspaces(triplets[pair[0]], triplets[pair[1]]) for pair in pairs}

    def symmetric_matrix(measure: int) -> jax.Array:
        indices = range(len(triplets))
        return jnp.stack(
            [jnp.stack([compared[min(i, j), max(i, j)][measure] for j in indices]) for i in indices]
        )

    signs = jnp.stack([jnp.sign(materialize_delta(delta)) for delta in deltas])
    positive, negative = (signs > 0).astype(jnp.int8), (signs < 0).astype(jnp.int8)
    # Integers, since float32 cannot count the entries of a large matrix.
    opposed = jnp.einsum("nio,mio->nm", positive, negative, preferred_element_type=jnp.int32)
    return _MatrixStats(
        *(symmetric_matrix(measure) for measure in range(3)),
        sign_conflicts=opposed + opposed.T,
        num_entries=jnp.int32(signs[0].size),
        effective_rank=jnp.stack([_entropy_effective_rank(s) for _, s, _ in triplets]),
        sizes=jnp.stack(sizes),
    )


_SvdTriplet = tuple[jax.Array, jax.Array, jax.Array]


def _compare_subspaces(
    first: _SvdTriplet, second: _SvdTriplet
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the inner product, the input overlap and the output overlap of two updates."""
    (u, s, vt), (w, t, zt) = first, second
    exact = jax.lax.Precision.HIGHEST
    input_cosines = jnp.matmul(u.T, w, precision=exact)  # (k, l)
    output_cosines = jnp.matmul(vt, zt.T, precision=exact)  # (k, l)
    inner = (s[:, None] * input_cosines * output_cosines * t).sum()
    both = _significant_directions(s)[:, None] & _significant_directions(t)
    rank = jnp.minimum(_significant_directions(s).sum(), _significant_directions(t).sum())
    inputs, outputs = (
        jnp.where(both, cosines**2, 0).sum() / rank for cosines in (input_cosines, output_cosines)
    )
    return inner, inputs, outputs


def _significant_directions(s: jax.Array) -> jax.Array:
    """Returns a mask of the singular values above rounding error."""
    return s > s.max() * s.size * jnp.finfo(s.dtype).eps


def _entropy_effective_rank(s: jax.Array) -> jax.Array:
    """Returns the exponential of the entropy of the normalized singular values."""
    total = s.sum()
    p = s / jnp.where(total > 0, total, 1)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum()
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def _make_pair_stats(
    stats: _MatrixStats, adapter_indices: Sequence[int], num_adapters: int, low_rank: bool
) -> PairStats:
    """Returns the statistics of a weight, with NaN for adapters that do not adapt it."""
    sizes = np.asarray(stats.sizes, np.float64)
    size_products = sizes[:, :, None] * sizes[:, None, :]
    inner = (np.asarray(stats.inner_products, np.float64) * size_products).sum(0)
    squares = np.diagonal(inner)
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    norm_products = norms[:, None] * norms
    inputs, outputs = (
        _mean_of_finite(np.asarray(values, np.float64)) if low_rank else np.full_like(inner, np.nan)
        for values in (stats.input_overlap, stats.output_overlap)
    )
    conflicts = (
        np.asarray(stats.sign_conflicts, np.float64).sum(0) / np.asarray(stats.num_entries).sum()
    )

    def expand(values: np.ndarray) -> np.ndarray:
        """Fills in NaN for the other adapters: (num_adapters, num_adapters)."""
        expanded = np.full((num_adapters, num_adapters), np.nan)
        expanded[np.ix_(adapter_indices, adapter_indices)] = np.where(
            np.isfinite(norm_products), values, np.nan
        )
        return expanded

    ranks = np.full(num_adapters, np.nan)
    ranks[list(adapter_indices)] = np.asarray(stats.effective_rank, np.float64).mean(0)
    return PairStats(
        cosine=expand(np.clip(inner / norm_products, -1, 1)),
        input_overlap=expand(inputs),
        output_overlap=expand(outputs),
        sign_conflicts=expand(conflicts),
        effective_rank=ranks,
    )


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Returns the mean of the finite values along the first axis; NaN where there are none."""
    finite = np.isfinite(values)
    count = finite.sum(0)
    total = np.where(finite, values, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _format_aligned_table(lines: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Aligns lines of cells, the first `num_text_columns` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _format_pair_row(
    interference: Interference, stats: PairStats, pair: tuple[int, int]
) -> list[str]:
    """Formats the names of two adapters and their measures."""
    values = [getattr(stats, measure)[pair] for measure in _PAIR_MEASURES]
    texts = [f"{value:.3f}" if np.isfinite(value) else "-" for value in values]
    return [" / ".join(interference.names[index] for index in pair), *texts]


def _most_aligned_pair(interference: Interference, stats: PairStats) -> tuple[int, int]:
    """Returns the pair of adapters with the largest absolute cosine."""
    return max(
        interference.pairs, key=lambda pair: np.nan_to_num(np.abs(stats.cosine[pair]), nan=-1)
    )


def save_heatmap(interference: Interference, path: str | os.PathLike[str]) -> None:
    """Writes a PNG with the cosine and the shared subspaces of each weight and pair of adapters.

    Args:
        interference: Result of `measure_interference`.
        path: Path of the PNG file, which is overwritten if it exists.

    Raises:
        ImportError: Matplotlib is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jlora.merging import Interference, PairStats, save_heatmap
        >>> ones = np.ones((2, 2))
        >>> interference = Interference(
        ...     ("law", "news"), {"w": PairStats(ones, ones, ones, ones, np.ones(2))}
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_heatmap(interference, pathlib.Path(folder) / "interference.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "save_heatmap requires matplotlib, which is not installed. Run "
            '`pip install "jlora[train]"`.'
        ) from error
    pairs = [" / ".join(interference.names[index] for index in pair) for pair in interference.pairs]
    panel_width = max(0.9, 0.16 * len(pairs))
    panel_height = min(max(1.2, 0.2 * len(interference.per_weight)), 300.0)
    left, bottom = (0.075 * max(map(len, texts)) for texts in (interference.per_weight, pairs))
    figure = Figure(
        figsize=(left + 3 * panel_width + 2.2, panel_height + bottom + 0.6), layout="constrained"
    )
    axes = figure.subplots(1, 3, sharey=True)
    cosine, *shared = (
        _draw_heatmap_panel(panel, interference, measure, title)
        for panel, measure, title in zip(axes, _PAIR_MEASURES, _PANEL_TITLES, strict=False)
    )
    axes[0].set_yticks(range(len(interference.per_weight)), interference.per_weight, fontsize=7)
    for panel in axes:
        panel.set_xticks(range(len(pairs)), pairs, rotation=90, fontsize=7)
        panel.tick_params(length=0)
    for image, panels in ((cosine, axes[:1]), (shared[0], axes[1:])):
        colorbar = figure.colorbar(image, ax=panels, aspect=30, fraction=0.05, pad=0.02)
        colorbar.ax.tick_params(labelsize=7)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    replace_file_atomically(Path(path), image.getvalue())


def _draw_heatmap_panel(ax: Any, interference: Interference, measure: str, title: str) -> Any:
    """Draws one measure, with a row for each weight and a column for each pair of adapters."""
    values = np.array(
        [
            [getattr(stats, measure)[pair] for pair in interference.pairs]
            for stats in interference.per_weight.values()
        ]
    )
    ax.set_title(title, fontsize=9)
    ax.set_facecolor("0.75")  # Visible where the value is NaN.
    colormap, lowest = ("RdBu_r", -1) if measure == "cosine" else ("Greens", 0)
    if len(interference.pairs) <= 3:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "white" if abs(value) > 0.6 else "black"
                ax.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color
                )
    return ax.imshow(values, cmap=colormap, vmin=lowest, vmax=1, aspect="auto")
