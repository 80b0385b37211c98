"""How much adapters are in each other's way: cosines, shared subspaces, signs in conflict."""

from __future__ import annotations

import dataclasses
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
from jlora.merging._validation import check_adapters, collect_bases

Adapter = Mapping[str, Any]


class PairStats(NamedTuple):
    """How the adapters meet in one weight, in float64.

    An entry is NaN where one of the two adapters leaves the weight alone or changes nothing in it.

    Attributes:
        cosine: (adapters, adapters), between the changes: -1 undoes, 0 is out of the way, 1 is the
            same up to a factor.
        input_overlap: (adapters, adapters), the share of the input directions of the one of lower rank
            that the other has too, from 0 to 1; the mean over a stack. NaN where the weight is no
            matrix.
        output_overlap: (adapters, adapters), the same of the output directions.
        sign_conflicts: (adapters, adapters), the share of entries that the two change in opposite
            directions.
        effective_rank: (adapters,), of each change, the mean over a stack; 0 where nothing is
            changed.
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
    """How adapters meet in every weight that any of them changes.

    Attributes:
        names: Of the adapters, in the order of all arrays.
        per_weight: What is found in each weight, by its path.
    """

    names: tuple[str, ...]
    per_weight: dict[str, PairStats]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The places of every two adapters."""
        return tuple(itertools.combinations(range(len(self.names)), 2))

    def mean(self, measure: str) -> np.ndarray:
        """The mean over the weights of one of the measures; NaN where there is nothing to take it
        of.

        Args:
            measure: "cosine", "input_overlap", "output_overlap", "sign_conflicts" or "effective_rank".
        """
        values = np.stack([getattr(meeting, measure) for meeting in self.per_weight.values()])
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
            [path, *_format_pair_row(self, meeting, _most_aligned_pair(self, meeting))]
            for path, meeting in self.per_weight.items()
        ]
        return "\n\n".join(
            [
                "Means over the weights:\n" + _format_aligned_table([head, *pairs], 1),
                _format_aligned_table([["adapter", "effective rank"], *ranks], 1),
                "In each weight the two with the cosine furthest from 0:\n"
                + _format_aligned_table([["weight", *head], *weights], 2),
            ]
        )


def measure_interference(
    adapters: Mapping[str, Adapter], params: PyTree | None = None
) -> Interference:
    """How much each two adapters are in each other's way, weight by weight.

    All but the conflicts comes from the factors where a change has them. Signs are compared on the
    dense changes of one matrix at a time.

    Args:
        adapters: At least two, by name.
        params: Their base. Only needed for families whose change depends on the weight: DoRA, HiRA,
            IA3.

    Raises:
        TypeError: For adapters that are none.
        ValueError: For fewer than two, for adapters that cannot be compared (mixtures, those on a
            residual base, other shapes), or for numbers that are not finite.

    References:
        Subspaces: Hu et al., LoRA, arXiv:2106.09685, section 7.2, with both ranks whole. Sign
        conflicts: Yadav et al., TIES-Merging, arXiv:2306.01708, section 3. Effective rank: Roy and
        Vetterli, The effective rank, EUSIPCO 2007, section 2.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters={type(adapters).__name__} has no names. Give a dict from names to adapters."
        )
    given = list(adapters.values())
    if len(given) < 2:
        raise ValueError(
            f"adapters={list(adapters)} has nothing to compare. Give at least two, by name."
        )
    check_adapters(given)
    bases = collect_bases(given, params)
    weights: dict[str, PairStats] = {}
    for path in dict.fromkeys(path for adapter in given for path in get_adapter_leaves(adapter)):
        there = [number for number, adapter in enumerate(given) if path in adapter]
        changes = tuple(get_weight_delta(given[number], path, bases.get(path)) for number in there)
        low_rank = is_matrix(given[there[0]][path].axes)
        found = jax.device_get(_compute_weight_stats(changes))
        weights[path] = _make_pair_stats(found, there, len(given), low_rank)
    return Interference(tuple(map(str, adapters)), weights)


class _MatrixStats(NamedTuple):
    """What is measured in each of a weight's matrices; the last axes are adapters."""

    inner_products: Any  # (batch, n, n), between the changes.
    input_overlap: Any  # (batch, n, n)
    output_overlap: Any  # (batch, n, n)
    sign_conflicts: Any  # (batch, n, n), counts.
    num_entries: Any  # (batch,), entries.
    effective_rank: Any  # (batch, n)


@jax.jit
def _compute_weight_stats(deltas: tuple[WeightDelta, ...]) -> _MatrixStats:
    return jax.lax.map(_compute_matrix_stats, deltas)


def _compute_matrix_stats(deltas: tuple[WeightDelta, ...]) -> _MatrixStats:
    found = [svd(change) for change in deltas]
    pairs = itertools.combinations_with_replacement(range(len(found)), 2)
    measured = {pair: _compare_subspaces(found[pair[0]], found[pair[1]]) for pair in pairs}

    def square(measure: int) -> jax.Array:
        every = range(len(found))
        return jnp.stack(
            [jnp.stack([measured[min(i, j), max(i, j)][measure] for j in every]) for i in every]
        )

    signs = jnp.stack([jnp.sign(materialize_delta(change)) for change in deltas])
    up, down = (signs > 0).astype(jnp.int8), (signs < 0).astype(jnp.int8)
    # Integers: float32 cannot count the entries of a large matrix.
    opposed = jnp.einsum("nio,mio->nm", up, down, preferred_element_type=jnp.int32)
    return _MatrixStats(
        *(square(measure) for measure in range(3)),
        sign_conflicts=opposed + opposed.T,
        num_entries=jnp.int32(signs[0].size),
        effective_rank=jnp.stack([_entropy_effective_rank(s) for _, s, _ in found]),
    )


_SvdTriplet = tuple[jax.Array, jax.Array, jax.Array]


def _compare_subspaces(
    one: _SvdTriplet, two: _SvdTriplet
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inner product of two changes, and what their input and output spaces share."""
    (u, s, vt), (w, t, zt) = one, two
    exact = jax.lax.Precision.HIGHEST
    near = jnp.matmul(u.T, w, precision=exact)  # (k, l)
    far = jnp.matmul(vt, zt.T, precision=exact)  # (k, l)
    inner = (s[:, None] * near * far * t).sum()
    both = _significant_directions(s)[:, None] & _significant_directions(t)
    least = jnp.minimum(_significant_directions(s).sum(), _significant_directions(t).sum())
    inputs, outputs = (jnp.where(both, cosines**2, 0).sum() / least for cosines in (near, far))
    return inner, inputs, outputs


def _significant_directions(s: jax.Array) -> jax.Array:
    """Which directions are there beyond rounding."""
    return s > s.max() * s.size * jnp.finfo(s.dtype).eps


def _entropy_effective_rank(s: jax.Array) -> jax.Array:
    """The exponential of the entropy of the singular values as shares of their sum."""
    whole = s.sum()
    share = s / jnp.where(whole > 0, whole, 1)
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum()
    return jnp.where(whole > 0, jnp.exp(entropy), 0)


def _make_pair_stats(
    stats: _MatrixStats, adapter_indices: Sequence[int], num_adapters: int, low_rank: bool
) -> PairStats:
    """The figures of a weight, with NaN for the adapters that are not there."""
    inner = np.asarray(stats.inner_products, np.float64).sum(0)
    squares = np.diagonal(inner)
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    lengths = norms[:, None] * norms
    nothing = np.full_like(inner, np.nan)
    inputs, outputs = (
        _mean_of_finite(np.asarray(values, np.float64)) if low_rank else nothing
        for values in (stats.input_overlap, stats.output_overlap)
    )
    conflicts = (
        np.asarray(stats.sign_conflicts, np.float64).sum(0) / np.asarray(stats.num_entries).sum()
    )

    def among_all(values: np.ndarray) -> np.ndarray:
        whole = np.full((num_adapters, num_adapters), np.nan)
        whole[np.ix_(adapter_indices, adapter_indices)] = np.where(
            np.isfinite(lengths), values, np.nan
        )
        return whole

    ranks = np.full(num_adapters, np.nan)
    ranks[list(adapter_indices)] = np.asarray(stats.effective_rank, np.float64).mean(0)
    return PairStats(
        cosine=among_all(np.clip(inner / lengths, -1, 1)),
        input_overlap=among_all(inputs),
        output_overlap=among_all(outputs),
        sign_conflicts=among_all(conflicts),
        effective_rank=ranks,
    )


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """The mean along the first axis of what is there, NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(0)
    total = np.where(there, values, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _format_aligned_table(lines: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Lines of cells under each other, the first `num_text_columns` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < num_text_columns else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _format_pair_row(
    interference: Interference, stats: PairStats, pair: tuple[int, int]
) -> list[str]:
    """Two adapters and how they meet."""
    figures = [getattr(stats, measure)[pair] for measure in _PAIR_MEASURES]
    texts = [f"{figure:.3f}" if np.isfinite(figure) else "-" for figure in figures]
    return [" / ".join(interference.names[place] for place in pair), *texts]


def _most_aligned_pair(interference: Interference, stats: PairStats) -> tuple[int, int]:
    """The two adapters with the cosine that is furthest from zero."""
    return max(
        interference.pairs, key=lambda pair: np.nan_to_num(np.abs(stats.cosine[pair]), nan=-1)
    )


def save_heatmap(interference: Interference, path: str | os.PathLike[str]) -> None:
    """Writes a PNG: for every weight and every two adapters their cosine and what they share.

    Args:
        interference: What `measure_interference` returned.
        path: The new file; one of that name is replaced.

    Raises:
        ImportError: Matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'heat_map draws with matplotlib, which is missing. Use pip install "jlora[train]".'
        ) from error
    pairs = [" / ".join(interference.names[place] for place in pair) for pair in interference.pairs]
    wide, high = (
        max(0.9, 0.16 * len(pairs)),
        min(max(1.2, 0.2 * len(interference.per_weight)), 300.0),
    )
    beside, below = (0.075 * max(map(len, texts)) for texts in (interference.per_weight, pairs))
    figure = Figure(figsize=(beside + 3 * wide + 2.2, high + below + 0.6), layout="constrained")
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
        bar = figure.colorbar(image, ax=panels, aspect=30, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(Path(path), format="png", dpi=150)


def _draw_heatmap_panel(ax: Any, interference: Interference, measure: str, title: str) -> Any:
    """Draws one measure, a row for each weight and a column for each two adapters."""
    values = np.array(
        [
            [getattr(meeting, measure)[pair] for pair in interference.pairs]
            for meeting in interference.per_weight.values()
        ]
    )
    ax.set_title(title, fontsize=9)
    ax.set_facecolor("0.75")  # Seen where there is nothing to compare.
    signed = measure == "cosine"
    colours, least = ("RdBu_r", -1) if signed else ("Greens", 0)
    if len(interference.pairs) <= 3:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.6 else "black"
                ax.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink
                )
    return ax.imshow(values, cmap=colours, vmin=least, vmax=1, aspect="auto")
