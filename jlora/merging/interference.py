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

from jlora.adapters.protocol import leaves_of
from jlora.deltas import Change, change_of, dense_of, is_matrix, triplets
from jlora.merging.checking import bases_of, check_adapters

PyTree = Any
Adapter = Mapping[str, Any]


class Meeting(NamedTuple):
    """How the adapters meet in one weight, in float64.

    An entry is NaN where one of the two adapters leaves the weight alone or changes nothing in it.

    Attributes:
        cosine: (adapters, adapters), between the changes: -1 undoes, 0 is out of the way, 1 is the
            same up to a factor.
        inputs: (adapters, adapters), the share of the input directions of the one of lower rank
            that the other has too, from 0 to 1; the mean over a stack. NaN where the weight is no
            matrix.
        outputs: (adapters, adapters), the same of the output directions.
        conflicts: (adapters, adapters), the share of entries that the two change in opposite
            directions.
        effective_rank: (adapters,), of each change, the mean over a stack; 0 where nothing is
            changed.
    """

    cosine: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    conflicts: np.ndarray
    effective_rank: np.ndarray


_COLUMNS = ("cosine", "inputs", "outputs", "conflicts")
_TITLES = ("cosine", "shared inputs", "shared outputs")


@dataclasses.dataclass(frozen=True)
class Interference:
    """How adapters meet in every weight that any of them changes.

    Attributes:
        names: Of the adapters, in the order of all arrays.
        weights: What is found in each weight, by its path.
    """

    names: tuple[str, ...]
    weights: dict[str, Meeting]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The places of every two adapters."""
        return tuple(itertools.combinations(range(len(self.names)), 2))

    def mean(self, measure: str) -> np.ndarray:
        """The mean over the weights of one of the measures; NaN where there is nothing to take it
        of.

        Args:
            measure: "cosine", "inputs", "outputs", "conflicts" or "effective_rank".
        """
        values = np.stack([getattr(meeting, measure) for meeting in self.weights.values()])
        return _mean(values)

    def __str__(self) -> str:
        head = ["adapters", *_COLUMNS]
        means = Meeting(*(self.mean(measure) for measure in Meeting._fields))
        pairs = [_pair_line(self, means, pair) for pair in self.pairs]
        ranks = [
            [name, f"{rank:.2f}"]
            for name, rank in zip(self.names, means.effective_rank, strict=True)
        ]
        weights = [
            [path, *_pair_line(self, meeting, _most_aligned(self, meeting))]
            for path, meeting in self.weights.items()
        ]
        return "\n\n".join(
            [
                "Means over the weights:\n" + _table([head, *pairs], 1),
                _table([["adapter", "effective rank"], *ranks], 1),
                "In each weight the two with the cosine furthest from 0:\n"
                + _table([["weight", *head], *weights], 2),
            ]
        )


def interference(adapters: Mapping[str, Adapter], params: PyTree | None = None) -> Interference:
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
    bases = bases_of(given, params)
    weights: dict[str, Meeting] = {}
    for path in dict.fromkeys(path for adapter in given for path in leaves_of(adapter)):
        there = [number for number, adapter in enumerate(given) if path in adapter]
        changes = tuple(change_of(given[number], path, bases.get(path)) for number in there)
        low_rank = is_matrix(given[there[0]][path].axes)
        found = jax.device_get(_figures(changes))
        weights[path] = _meeting(found, there, len(given), low_rank)
    return Interference(tuple(map(str, adapters)), weights)


class _Figures(NamedTuple):
    """What is measured in each of a weight's matrices; the last axes are adapters."""

    inner: Any  # (batch, n, n), between the changes.
    inputs: Any  # (batch, n, n)
    outputs: Any  # (batch, n, n)
    conflicts: Any  # (batch, n, n), counts.
    size: Any  # (batch,), entries.
    effective_rank: Any  # (batch, n)


@jax.jit
def _figures(changes: tuple[Change, ...]) -> _Figures:
    return jax.lax.map(_figures_of_matrix, changes)


def _figures_of_matrix(changes: tuple[Change, ...]) -> _Figures:
    found = [triplets(change) for change in changes]
    pairs = itertools.combinations_with_replacement(range(len(found)), 2)
    measured = {pair: _measured(found[pair[0]], found[pair[1]]) for pair in pairs}

    def square(measure: int) -> jax.Array:
        every = range(len(found))
        return jnp.stack(
            [jnp.stack([measured[min(i, j), max(i, j)][measure] for j in every]) for i in every]
        )

    signs = jnp.stack([jnp.sign(dense_of(change)) for change in changes])
    up, down = (signs > 0).astype(jnp.int8), (signs < 0).astype(jnp.int8)
    # Integers: float32 cannot count the entries of a large matrix.
    opposed = jnp.einsum("nio,mio->nm", up, down, preferred_element_type=jnp.int32)
    return _Figures(
        *(square(measure) for measure in range(3)),
        conflicts=opposed + opposed.T,
        size=jnp.int32(signs[0].size),
        effective_rank=jnp.stack([_effective_rank(s) for _, s, _ in found]),
    )


_Triplets = tuple[jax.Array, jax.Array, jax.Array]


def _measured(one: _Triplets, two: _Triplets) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inner product of two changes, and what their input and output spaces share."""
    (u, s, vt), (w, t, zt) = one, two
    exact = jax.lax.Precision.HIGHEST
    near = jnp.matmul(u.T, w, precision=exact)  # (k, l)
    far = jnp.matmul(vt, zt.T, precision=exact)  # (k, l)
    inner = (s[:, None] * near * far * t).sum()
    both = _present(s)[:, None] & _present(t)
    least = jnp.minimum(_present(s).sum(), _present(t).sum())
    inputs, outputs = (jnp.where(both, cosines**2, 0).sum() / least for cosines in (near, far))
    return inner, inputs, outputs


def _present(s: jax.Array) -> jax.Array:
    """Which directions are there beyond rounding."""
    return s > s.max() * s.size * jnp.finfo(s.dtype).eps


def _effective_rank(s: jax.Array) -> jax.Array:
    """The exponential of the entropy of the singular values as shares of their sum."""
    whole = s.sum()
    share = s / jnp.where(whole > 0, whole, 1)
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum()
    return jnp.where(whole > 0, jnp.exp(entropy), 0)


def _meeting(found: _Figures, there: Sequence[int], count: int, low_rank: bool) -> Meeting:
    """The figures of a weight, with NaN for the adapters that are not there."""
    inner = np.asarray(found.inner, np.float64).sum(0)
    squares = np.diagonal(inner)
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    lengths = norms[:, None] * norms
    nothing = np.full_like(inner, np.nan)
    inputs, outputs = (
        _mean(np.asarray(values, np.float64)) if low_rank else nothing
        for values in (found.inputs, found.outputs)
    )
    conflicts = np.asarray(found.conflicts, np.float64).sum(0) / np.asarray(found.size).sum()

    def among_all(values: np.ndarray) -> np.ndarray:
        whole = np.full((count, count), np.nan)
        whole[np.ix_(there, there)] = np.where(np.isfinite(lengths), values, np.nan)
        return whole

    ranks = np.full(count, np.nan)
    ranks[list(there)] = np.asarray(found.effective_rank, np.float64).mean(0)
    return Meeting(
        cosine=among_all(np.clip(inner / lengths, -1, 1)),
        inputs=among_all(inputs),
        outputs=among_all(outputs),
        conflicts=among_all(conflicts),
        effective_rank=ranks,
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean along the first axis of what is there, NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(0)
    total = np.where(there, values, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# --- tables and pictures -------------------------------------------------------------------------


def _table(lines: Sequence[Sequence[str]], texts: int) -> str:
    """Lines of cells under each other, the first `texts` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _pair_line(found: Interference, meeting: Meeting, pair: tuple[int, int]) -> list[str]:
    """Two adapters and how they meet."""
    figures = [getattr(meeting, measure)[pair] for measure in _COLUMNS]
    texts = [f"{figure:.3f}" if np.isfinite(figure) else "-" for figure in figures]
    return [" / ".join(found.names[place] for place in pair), *texts]


def _most_aligned(found: Interference, meeting: Meeting) -> tuple[int, int]:
    """The two adapters with the cosine that is furthest from zero."""
    return max(found.pairs, key=lambda pair: np.nan_to_num(np.abs(meeting.cosine[pair]), nan=-1))


def heat_map(found: Interference, path: str | os.PathLike[str]) -> None:
    """Writes a PNG: for every weight and every two adapters their cosine and what they share.

    Args:
        found: What `interference` returned.
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
    pairs = [" / ".join(found.names[place] for place in pair) for pair in found.pairs]
    wide, high = max(0.9, 0.16 * len(pairs)), min(max(1.2, 0.2 * len(found.weights)), 300.0)
    beside, below = (0.075 * max(map(len, texts)) for texts in (found.weights, pairs))
    figure = Figure(figsize=(beside + 3 * wide + 2.2, high + below + 0.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    cosine, *shared = (
        _panel(panel, found, measure, title)
        for panel, measure, title in zip(axes, _COLUMNS, _TITLES, strict=False)
    )
    axes[0].set_yticks(range(len(found.weights)), found.weights, fontsize=7)
    for panel in axes:
        panel.set_xticks(range(len(pairs)), pairs, rotation=90, fontsize=7)
        panel.tick_params(length=0)
    for image, panels in ((cosine, axes[:1]), (shared[0], axes[1:])):
        bar = figure.colorbar(image, ax=panels, aspect=30, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(Path(path), format="png", dpi=150)


def _panel(panel: Any, found: Interference, measure: str, title: str) -> Any:
    """Draws one measure, a row for each weight and a column for each two adapters."""
    values = np.array(
        [
            [getattr(meeting, measure)[pair] for pair in found.pairs]
            for meeting in found.weights.values()
        ]
    )
    panel.set_title(title, fontsize=9)
    panel.set_facecolor("0.75")  # Seen where there is nothing to compare.
    signed = measure == "cosine"
    colours, least = ("RdBu_r", -1) if signed else ("Greens", 0)
    if len(found.pairs) <= 3:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.6 else "black"
                panel.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink
                )
    return panel.imshow(values, cmap=colours, vmin=least, vmax=1, aspect="auto")
