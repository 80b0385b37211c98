"""Several adapters as one, added up as what they change and not factor by factor."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import _validation
from jlora._delta import (
    WeightDelta,
    depends_on_base,
    get_weight_delta,
    is_matrix,
    low_rank_factors,
    materialize_delta,
    reshape_to_weight,
    svd,
)
from jlora._tree import PyTree
from jlora.adapters import low_rank
from jlora.adapters.adalora import AdaLoRALeaf
from jlora.adapters.base import AdapterLeaf, adapt_weight, get_adapter_leaves
from jlora.adapters.full import BitFitLeaf, FullDeltaLeaf
from jlora.adapters.lora import LoRALeaf
from jlora.adapters.weighted_sum import WeightedSumLeaf
from jlora.merging._validation import check_adapters, collect_bases
from jlora.merging.methods import Linear, MergeMethod


def require_low_rank_factors(
    adapter_name: str, adapter: Mapping[str, Any], path: str
) -> tuple[jax.Array, jax.Array]:
    """The change of one weight as `a` (*batch, *inputs, m) and `b` (*batch, m, *outputs).

    Args:
        adapter_name: Of the adapter, for the message.
        adapter: One that `check_adapters` has passed.
        path: Of a weight that it adapts.

    Raises:
        TypeError: For a family whose change is no such pair.
    """
    leaf: AdapterLeaf = adapter[path]
    # Their rank is what was asked for, and may be as high as the weight's own.
    plain = isinstance(leaf, LoRALeaf | AdaLoRALeaf | WeightedSumLeaf)
    factors = None
    if not depends_on_base(adapter, path):
        factors = low_rank_factors(
            leaf, adapt_weight(adapter, path, None), allow_full_rank=plain
        )
    if factors is None:
        raise TypeError(
            f"{adapter_name!r} has a {type(leaf).__name__} on {path!r}, whose change is no pair of thin "
            f"factors. Take the nearest LoRA, jlora.to_lora(adapter, params, rank).adapter, or "
            f"join the adapters with jlora.merging.combine."
        )
    a, b = factors
    shapes = low_rank.factor_shapes(leaf.axis_sizes, a.shape[-1])
    return a.reshape(shapes["a"]), b.reshape(shapes["b"])


def concatenate_factors(
    leaf: AdapterLeaf, factors: Sequence[tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """One pair of all: the factors of one weight side by side, so that the ranks add.

    Args:
        leaf: Of the weight.
        factors: At least one pair.
    """
    a = jnp.concatenate([a for a, _ in factors], axis=-1)
    b = jnp.concatenate([b for _, b in factors], axis=len(leaf.axis_sizes.batch))
    return a, b


def lora_leaf_from_factors(leaf: AdapterLeaf, a: jax.Array, b: jax.Array) -> LoRALeaf:
    """Plain LoRA of the scale one and without dropout, for the leaf's weight."""
    rank = a.shape[-1]
    return LoRALeaf(a=a, b=b, shape=leaf.shape, axes=leaf.axes, rank=rank, alpha=float(rank))


Adapter = Mapping[str, Any]

_DEFAULT_METHOD = Linear()


class CombineResult(NamedTuple):
    """One adapter made of several.

    Attributes:
        adapter: For every weight that any of them adapts a LoRA leaf, or the dense change.
        energy: For every weight the share of the combined change's squared norm that the adapter
            keeps; 1 where it is exact.
    """

    adapter: dict[str, Any]
    energy: dict[str, jax.Array]

    def __str__(self) -> str:
        width = max(map(len, self.adapter))
        lines = [f"{'weight':{width}} {'rank':>5} {'kept':>7}"]
        for path, leaf in self.adapter.items():
            rank = leaf.rank if isinstance(leaf, LoRALeaf) else "whole"
            lines.append(f"{path:{width}} {rank:>5} {float(self.energy[path]):7.4f}")
        return "\n".join(lines)


def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | jax.Array | np.ndarray | None = None,
    *,
    method: MergeMethod = _DEFAULT_METHOD,
    params: PyTree | None = None,
    rank: int | None = None,
    energy: float | None = None,
    key: jax.Array | None = None,
) -> CombineResult:
    """One adapter of several, combined in what they change: `sum_i w_i delta_i` for `Linear`.

    Nothing crosses one adapter's `A` with another's `B`. `Linear` joins the factors, so that ranks
    add; with `rank` or `energy` it decomposes the joined factors and forms no dense change. Other
    methods look at entries: they form the dense changes of one matrix at a time (of a stack, one
    layer after another), and without `rank` or `energy` their result is the dense change. So is
    that of `Linear` where one of the changes is no product of thin factors (DoRA, IA3, HiRA, Full).
    Biases and norms are one column each, and those of a stack one column of all its layers. The
    result is float32 or wider, of scale one, and has no dropout.

    Runs under `jax.jit` and `jax.vmap`, over weights and over adapters, but for `energy`.

    Args:
        adapters: What `init` returned, trained; of any families that can be merged. A weight that
            one of them leaves alone is unchanged by it.
        weights: A number for each adapter, (adapters,), which may be negative; ones when None.
        method: `Linear()`, `Magnitude`, `TIES`, `DARE` or `DELLA`.
        params: Their base. Only needed for families whose change depends on the weight: DoRA, HiRA,
            IA3.
        rank: Of the result, the nearest LoRA in the sense of least squares; lower where a weight's
            own rank is. Weights that are no matrix (biases, norms) stay exact.
        energy: In place of a rank: for every weight the lowest rank that keeps this share of the
            combined change's squared norm, above 0 and up to 1 (all but rounding).
        key: For `DARE` and `DELLA`. Every weight, layer and adapter has its own draws.

    Raises:
        TypeError: For adapters, weights or a method that are none.
        ValueError: For adapters that cannot be combined (mixtures, those on a residual base, other
            shapes), weights of another number, numbers that are not finite, or options that do not
            go together.
    """
    check_adapters(adapters)
    factors = _validate_adapter_weights(weights, len(adapters))
    _check_combine_options(method, rank, energy, key)
    bases = collect_bases(adapters, params)
    combined = CombineResult({}, {})
    for path in dict.fromkeys(path for adapter in adapters for path in get_adapter_leaves(adapter)):
        there = [number for number, adapter in enumerate(adapters) if path in adapter]
        changes = tuple(
            get_weight_delta(adapters[number], path, bases.get(path)) for number in there
        )
        leaves = [adapters[number][path] for number in there]
        parts = _WeightInputs(
            changes,
            jnp.stack([factors[number] for number in there]),
            _make_adapter_keys(key, path, there) if method.is_random else None,
        )
        made = _combine_weight(path, leaves, parts, method, rank, energy)
        combined.adapter[path], combined.energy[path] = made
    return combined


def analogy(a: Adapter, b: Adapter, c: Adapter, **options: Any) -> CombineResult:
    """An adapter for `d`, where `a` is to `b` as `c` is to `d`: `c + (b - a)`.

    Args:
        a: Such as of sentiment in reviews of one shop, without labels.
        b: The same with labels.
        c: Of another shop, without labels.
        **options: Of `combine_adapters`, but for weights.

    References:
        Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, section 5.
    """
    return combine_adapters([c, b, a], [1.0, 1.0, -1.0], **options)


def _validate_adapter_weights(weights: Any, num_adapters: int) -> jax.Array:
    """The weights, (count,), in float32 or wider."""
    if weights is None:
        return jnp.ones(num_adapters)
    given = jnp.asarray(weights)
    if given.shape != (num_adapters,):
        raise ValueError(
            f"weights of shape {given.shape} are not one for each of the {num_adapters} adapters. Give "
            f"{num_adapters} numbers in the order of the adapters."
        )
    if not jnp.issubdtype(given.dtype, jnp.floating) and not jnp.issubdtype(
        given.dtype, jnp.integer
    ):
        raise TypeError(f"weights={weights!r} are {given.dtype}. Give real numbers.")
    if not isinstance(given, Tracer) and not np.isfinite(np.asarray(given, np.float64)).all():
        raise ValueError(f"weights={weights!r} are not finite. Give finite numbers.")
    return given.astype(jnp.promote_types(given.dtype, jnp.float32))


def _check_combine_options(method: Any, rank: Any, energy: Any, key: Any) -> None:
    if not isinstance(method, MergeMethod):
        raise TypeError(
            f"method={method!r} is none of jlora.merging's. Give one such as "
            f"jlora.merging.TIES(density=0.2)."
        )
    if rank is not None and energy is not None:
        raise ValueError(
            f"rank={rank} and energy={energy} both say how low the result's rank is. Give one."
        )
    if rank is not None:
        _validation.check_integer("rank", rank)
        _validation.check_positive_int("rank", rank)
    if energy is not None and not (_validation.is_real_number(energy) and 0 < energy <= 1):
        raise ValueError(
            f"energy={energy!r} is no share of a squared norm. Use a number above 0 and up to 1, "
            f"such as 0.95."
        )
    if method.is_random and key is None:
        raise ValueError(
            f"method={method} drops entries at random and was given no key. Give key="
            f"jax.random.key(0), or another seed for other draws."
        )


def _make_adapter_keys(key: Any, path: str, adapter_indices: Sequence[int]) -> jax.Array:
    """A key for each adapter that adapts the weight, (adapters,), all of the weight's own."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # A key of the old kind.
        key = jax.random.wrap_key_data(key)
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return jax.vmap(functools.partial(jax.random.fold_in, own))(jnp.array(adapter_indices))


class _WeightInputs(NamedTuple):
    """What is combined in one weight."""

    deltas: tuple[WeightDelta, ...]
    weights: jax.Array  # (changes,)
    keys: jax.Array | None  # (changes,)


def _combine_weight(
    path: str,
    leaves: Sequence[AdapterLeaf],
    inputs: _WeightInputs,
    method: MergeMethod,
    rank: int | None,
    energy: float | None,
) -> tuple[AdapterLeaf, jax.Array]:
    """The leaf of one weight, and the share that it keeps."""
    leaf, exact = leaves[0], jnp.ones(())
    lowered = is_matrix(leaf.axes) and (rank is not None or energy is not None)
    joined = _join_low_rank_deltas(inputs) if isinstance(method, Linear) else None
    if joined is not None and not lowered:
        return _lora_leaf_from_matrices(leaf, joined.a, joined.b), exact
    if not lowered:
        cls = BitFitLeaf if all(isinstance(one, BitFitLeaf) for one in leaves) else FullDeltaLeaf
        delta = reshape_to_weight(_combine_dense(method, inputs), leaf)
        return cls(delta=delta, shape=leaf.shape, axes=leaf.axes), exact
    u, s, vt = (
        _jitted_svd(joined) if joined is not None else _combine_dense_svd(method, rank, inputs)
    )
    if rank is None:
        assert energy is not None
        rank = _rank_for_energy(path, s, energy)
    kept = min(rank, s.shape[-1])
    root = jnp.sqrt(s[:, :kept])
    a, b = u[:, :, :kept] * root[:, None, :], root[:, :, None] * vt[:, :kept]
    return _lora_leaf_from_matrices(leaf, a, b), _energy_fraction(s, kept)


def _join_low_rank_deltas(inputs: _WeightInputs) -> WeightDelta | None:
    """`[a1 a2 ...] [w1 b1; w2 b2; ...]`, where all changes are factors."""
    near, far = [], []
    for weight, change in zip(inputs.weights, inputs.deltas, strict=True):
        if change.a is None or change.b is None:
            return None
        near.append(change.a)
        far.append(weight * change.b)
    return WeightDelta(jnp.concatenate(near, -1), jnp.concatenate(far, -2))


def _lora_leaf_from_matrices(leaf: AdapterLeaf, a: Any, b: Any) -> LoRALeaf:
    """Plain LoRA of scale one from (batch, fan_in, rank) and (batch, rank, fan_out)."""
    batch, inputs, outputs = leaf.axis_sizes
    rank = a.shape[-1]
    return LoRALeaf(
        a=a.reshape(*batch, *inputs, rank),
        b=b.reshape(*batch, rank, *outputs),
        shape=leaf.shape,
        axes=leaf.axes,
        rank=rank,
        alpha=float(rank),
    )


def _combine_matrix(method: MergeMethod, inputs: _WeightInputs, index: jax.Array) -> jax.Array:
    """The combined change of one of a weight's matrices."""
    keys = inputs.keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
    deltas = jnp.stack([materialize_delta(change) for change in inputs.deltas])
    return method.combine(deltas, inputs.weights, keys)


@functools.partial(jax.jit, static_argnums=0)
def _combine_dense(method: MergeMethod, inputs: _WeightInputs) -> jax.Array:
    """The combined change, (batch, fan_in, fan_out), made one matrix after another."""

    def one(held: tuple[jax.Array, tuple[WeightDelta, ...]]) -> jax.Array:
        number, changes = held
        return _combine_matrix(method, inputs._replace(deltas=changes), number)

    return jax.lax.map(one, (jnp.arange(_num_matrices(inputs)), inputs.deltas))


_jitted_svd = jax.jit(svd)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _combine_dense_svd(
    method: MergeMethod, rank: int | None, inputs: _WeightInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first `rank` singular vectors of the combined change, and all singular values."""

    def one(held: tuple[jax.Array, tuple[WeightDelta, ...]]) -> tuple[jax.Array, ...]:
        number, changes = held
        change = _combine_matrix(method, inputs._replace(deltas=changes), number)
        u, s, vt = svd(WeightDelta(dense=change))
        return u[:, :rank], s, vt[:rank]

    u, s, vt = jax.lax.map(one, (jnp.arange(_num_matrices(inputs)), inputs.deltas))
    return u, s, vt


def _num_matrices(inputs: _WeightInputs) -> int:
    return jax.tree.leaves(inputs.deltas)[0].shape[0]


def _energy_fraction(s: jax.Array, rank: int) -> jax.Array:
    """The share of the squared norm in the first singular values of a stack, (batch, k)."""
    largest = s.max()
    # Small ones do not underflow, and of NaN no share is told.
    squares = jnp.square(s / jnp.where(largest == 0, 1, largest))
    whole = squares.sum()
    return jnp.where(whole == 0, 1, squares[:, :rank].sum() / jnp.where(whole == 0, 1, whole))


def _rank_for_energy(path: str, s: jax.Array, energy: float) -> int:
    """The lowest rank that keeps a share of the squared norm, at least one."""
    if isinstance(s, Tracer):
        raise ValueError(
            f"energy={energy} chooses the rank of {path!r} by its numbers, which jax.jit and "
            f"jax.vmap do not know. Give rank=, or call combine outside of them."
        )
    values = np.asarray(s, np.float64)
    # What rounding leaves is no rank: the tolerance of numpy.linalg.matrix_rank.
    tolerance = values.max(initial=0) * s.shape[-1] * float(jnp.finfo(s.dtype).eps)
    squares = np.where(values > tolerance, values, 0) ** 2
    within = np.cumsum(squares.sum(0))
    return 1 + int(np.searchsorted(within, energy * within[-1])) if within[-1] else 1
