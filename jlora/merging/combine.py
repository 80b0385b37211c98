"""Combines several adapters into one by their weight updates, and concatenates their factors.

Updates are combined as products, `sum_i w_i A_i B_i`; factors of different adapters are never
multiplied with each other.
"""

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
from jlora.checkpoints.stored_weight import read_weight
from jlora.interpreter.terms import widest_dtype
from jlora.merging._validation import check_adapters, collect_bases, unify_layer_layouts
from jlora.merging.merge_methods import Linear, MergeMethod

Adapter = Mapping[str, Any]

_DEFAULT_METHOD = Linear()


class CombineResult(NamedTuple):
    """One adapter combined from several.

    Printed as a table with the rank and the energy of each weight.

    Attributes:
        adapter: A LoRA leaf, or the dense update, for each weight that any of the adapters adapts.
        energy: Fraction of the combined update's squared norm that the adapter preserves, by the
            weight's path; 1 where the result is exact.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import combine_adapters
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> print(combine_adapters([lora.init(jax.random.key(0), params, x)]))
        weight  rank  energy
        w          1  1.0000
    """

    adapter: dict[str, Any]
    energy: dict[str, jax.Array]

    def __str__(self) -> str:
        width = max(map(len, ("weight", *self.adapter)))
        lines = [f"{'weight':{width}} {'rank':>5} {'energy':>7}"]
        for path, leaf in self.adapter.items():
            rank = leaf.rank if isinstance(leaf, LoRALeaf) else "full"
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
    """Combines adapters by their weight updates: `sum_i w_i delta_i` with `Linear`.

    One adapter's `A` is never multiplied with another's `B`. `Linear` concatenates the factors, so
    that the ranks add up; with `rank` or `energy` it decomposes the concatenated factors and
    materializes no update. Other methods compare entries. They materialize the updates of one
    matrix at a time (of a stack, one layer after another), and without `rank` or `energy` their
    result is the dense update. The result of `Linear` is dense, too, where one of the updates is
    not a product of thin factors (DoRA, IA3, HiRA, FullDelta). A bias or a norm is one column, and
    that of a stack is one column of all layers. The result is float32 or wider, has scale one and
    no dropout.

    Runs under `jax.jit` and `jax.vmap`, over weights and over adapters, except with `energy`.

    Args:
        adapters: Trained adapters of one model, of any families that can be merged. An adapter
            without a leaf on a weight does not change it.
        weights: Mixing weight of each adapter, (adapters,), which may be negative; ones when None.
        method: `Linear()`, `Magnitude`, `TIES`, `DARE` or `DELLA`.
        params: The base. Required for families whose update depends on the weight: DoRA, HiRA and
            IA3.
        rank: Rank of the result, the nearest LoRA in the sense of least squares; lower where a
            weight's own rank is lower. Weights that are not matrices (biases, norms) stay exact.
            Not reduced when None.
        energy: Instead of a rank, the fraction of the combined update's squared norm to preserve,
            above 0 and up to 1 (all but rounding); each weight gets the lowest such rank.
        key: Random key for `DARE` and `DELLA`. Each weight, layer and adapter has its own draws.

    Returns:
        The combined adapter, and the energy that it preserves of each weight's update.

    Raises:
        TypeError: `adapters`, `weights` or `method` is of another type.
        ValueError: The adapters cannot be combined (a mixture of experts, a residual base,
            different shapes); the number of weights is not that of the adapters; an entry is not
            finite; or options exclude each other.

    References:
        Task arithmetic: Ilharco et al., arXiv:2212.04089, section 2. The other methods cite their
        papers.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import combine_adapters
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> adapters = [lora.init(jax.random.key(seed), params, x) for seed in (0, 1)]
        >>> combine_adapters(adapters, [0.5, 0.5]).adapter["w"].rank
        2
    """
    check_adapters(adapters)
    adapters = unify_layer_layouts(adapters, params)
    check_adapters(adapters)
    mixing_weights = _validate_adapter_weights(weights, len(adapters))
    _check_combine_options(method, rank, energy, key)
    bases = collect_bases(adapters, params)
    combined = CombineResult({}, {})
    for path in dict.fromkeys(path for adapter in adapters for path in get_adapter_leaves(adapter)):
        indices = [index for index, adapter in enumerate(adapters) if path in adapter]
        deltas = tuple(
            get_weight_delta(adapters[index], path, read_weight(bases.get(path)))
            for index in indices
        )
        leaves = [adapters[index][path] for index in indices]
        inputs = _WeightInputs(
            deltas,
            jnp.stack([mixing_weights[index] for index in indices]),
            _make_adapter_keys(key, path, indices) if method.is_random else None,
        )
        combined.adapter[path], combined.energy[path] = _combine_weight(
            path, leaves, inputs, method, rank, energy
        )
    return combined


def analogy(a: Adapter, b: Adapter, c: Adapter, **options: Any) -> CombineResult:
    """Returns an adapter for `d`, where `a` is to `b` as `c` is to `d`: `c + (b - a)`.

    Args:
        a: First adapter, for example of language modeling on the reviews of one shop.
        b: Second adapter, for example of sentiment on the same reviews.
        c: Third adapter, for example of language modeling on the reviews of another shop.
        **options: Options of `combine_adapters` except weights.

    Raises:
        TypeError: As `combine_adapters`.
        ValueError: As `combine_adapters`.

    References:
        Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, section 5.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import analogy
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> a, b, c = (lora.init(jax.random.key(seed), params, x) for seed in range(3))
        >>> analogy(a, b, c, rank=1).adapter["w"].rank
        1
    """
    return combine_adapters([c, b, a], [1.0, 1.0, -1.0], **options)


def require_low_rank_factors(
    adapter_name: str, adapter: Mapping[str, Any], path: str
) -> tuple[jax.Array, jax.Array]:
    """Returns one weight's update as `a` (*batch, *inputs, m) and `b` (*batch, m, *outputs).

    Args:
        adapter_name: Name of the adapter in the error.
        adapter: Adapter that `check_adapters` accepts.
        path: Path of a weight that the adapter adapts.

    Raises:
        TypeError: The family's update is not a product of two thin factors.
    """
    leaf: AdapterLeaf = adapter[path]
    # The rank of these families is set by the user and may be as high as the weight's own.
    plain = isinstance(leaf, LoRALeaf | AdaLoRALeaf | WeightedSumLeaf)
    factors = None
    if not depends_on_base(adapter, path):
        factors = low_rank_factors(leaf, adapt_weight(adapter, path, None), allow_full_rank=plain)
    if factors is None:
        raise TypeError(
            f"{adapter_name!r} has a {type(leaf).__name__} on {path!r}, whose update is not a "
            f"product of two thin factors. Convert the adapter with jlora.to_lora(adapter, "
            f"params, rank).adapter, or combine with jlora.merging.combine_adapters."
        )
    a, b = factors
    shapes = low_rank.factor_shapes(leaf.axis_sizes, a.shape[-1])
    return a.reshape(shapes["a"]), b.reshape(shapes["b"])


def concatenate_factors(
    leaf: AdapterLeaf, factors: Sequence[tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """Concatenates pairs of factors of one weight along the rank, so that the ranks add up.

    Args:
        leaf: A leaf of the weight.
        factors: At least one pair `a` (*batch, *inputs, r) and `b` (*batch, r, *outputs).
    """
    a = jnp.concatenate([a for a, _ in factors], axis=-1)
    b = jnp.concatenate([b for _, b in factors], axis=len(leaf.axis_sizes.batch))
    return a, b


def lora_leaf_from_factors(leaf: AdapterLeaf, a: jax.Array, b: jax.Array) -> LoRALeaf:
    """Returns plain LoRA with scale one and without dropout, for the leaf's weight."""
    rank = a.shape[-1]
    return LoRALeaf(a=a, b=b, shape=leaf.shape, axes=leaf.axes, rank=rank, alpha=float(rank))


def _validate_adapter_weights(weights: Any, num_adapters: int) -> jax.Array:
    """Returns the mixing weights, (num_adapters,), in float32 or wider."""
    if weights is None:
        return jnp.ones(num_adapters)
    array = jnp.asarray(weights)
    if array.shape != (num_adapters,):
        raise ValueError(
            f"weights must have shape ({num_adapters},), one for each adapter, got shape "
            f"{array.shape}. Pass {num_adapters} numbers in the order of the adapters."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
        array.dtype, jnp.integer
    ):
        raise TypeError(f"weights={weights!r} must be real numbers, got {array.dtype}.")
    if not isinstance(array, Tracer) and not np.isfinite(np.asarray(array, np.float64)).all():
        raise ValueError(f"weights={weights!r} must be finite. Pass finite numbers.")
    return array.astype(widest_dtype(array.dtype, jnp.float32))


def _check_combine_options(method: Any, rank: Any, energy: Any, key: Any) -> None:
    if not isinstance(method, MergeMethod):
        raise TypeError(
            f"method={method!r} must be a jlora.merging.MergeMethod. Pass one such as "
            f"jlora.merging.TIES(density=0.2)."
        )
    if rank is not None and energy is not None:
        raise ValueError(
            f"rank={rank} and energy={energy} both set the rank of the result. Pass one of them."
        )
    if rank is not None:
        _validation.check_integer("rank", rank)
        _validation.check_positive_int("rank", rank)
    if energy is not None and not (_validation.is_real_number(energy) and 0 < energy <= 1):
        raise ValueError(
            f"energy={energy!r} must be a fraction of the squared norm, above 0 and up to 1. Use "
            f"a number such as 0.95."
        )
    if method.is_random and key is None:
        raise ValueError(
            f"key=None: method={method} drops entries at random and requires a key. Pass "
            f"key=jax.random.key(0), or another seed for other draws."
        )


def _make_adapter_keys(key: Any, path: str, adapter_indices: Sequence[int]) -> jax.Array:
    """Returns a key, derived from the path, for each adapter of the weight: (adapters,)."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # A raw uint32 key.
        key = jax.random.wrap_key_data(key)
    weight_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return jax.vmap(functools.partial(jax.random.fold_in, weight_key))(jnp.array(adapter_indices))


class _WeightInputs(NamedTuple):
    """The updates to be combined in one weight.

    Attributes:
        deltas: Update of each adapter that adapts the weight.
        weights: Mixing weights, (adapters,).
        keys: Random keys, (adapters,); None for a method that is not random.
    """

    deltas: tuple[WeightDelta, ...]
    weights: jax.Array
    keys: jax.Array | None


def _combine_weight(
    path: str,
    leaves: Sequence[AdapterLeaf],
    inputs: _WeightInputs,
    method: MergeMethod,
    rank: int | None,
    energy: float | None,
) -> tuple[AdapterLeaf, jax.Array]:
    """Returns the combined leaf of one weight, and the energy that it preserves."""
    leaf, exact = leaves[0], jnp.ones(())
    reduced = is_matrix(leaf.axes) and (rank is not None or energy is not None)
    joined = _join_low_rank_deltas(inputs) if isinstance(method, Linear) else None
    if joined is not None and not reduced:
        return _lora_leaf_from_matrices(leaf, joined.a, joined.b), exact
    if not reduced:
        cls = BitFitLeaf if all(isinstance(one, BitFitLeaf) for one in leaves) else FullDeltaLeaf
        delta = reshape_to_weight(_combine_dense(method, inputs), leaf)
        return cls(delta=delta, shape=leaf.shape, axes=leaf.axes), exact
    u, s, vt = (
        _jitted_svd(joined) if joined is not None else _combine_dense_svd(method, rank, inputs)
    )
    if rank is None:
        assert energy is not None
        rank = _rank_for_energy(path, s, energy)
    rank = min(rank, s.shape[-1])
    root = jnp.sqrt(s[:, :rank])
    a, b = u[:, :, :rank] * root[:, None, :], root[:, :, None] * vt[:, :rank]
    return _lora_leaf_from_matrices(leaf, a, b), _energy_fraction(s, rank)


def _join_low_rank_deltas(inputs: _WeightInputs) -> WeightDelta | None:
    """Returns `[a1 a2 ...] [w1 b1; w2 b2; ...]`; None unless all updates have factors."""
    a_factors, b_factors = [], []
    for weight, delta in zip(inputs.weights, inputs.deltas, strict=True):
        if delta.a is None or delta.b is None:
            return None
        a_factors.append(delta.a)  # (batch, fan_in, r)
        b_factors.append(weight * delta.b)  # (batch, r, fan_out)
    return WeightDelta(jnp.concatenate(a_factors, -1), jnp.concatenate(b_factors, -2))


def _lora_leaf_from_matrices(leaf: AdapterLeaf, a: Any, b: Any) -> LoRALeaf:
    """Returns plain LoRA with scale one from (batch, fan_in, rank) and (batch, rank, fan_out)."""
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
    """Returns the combined update of one of a weight's matrices, (fan_in, fan_out)."""
    keys = inputs.keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
    deltas = jnp.stack([materialize_delta(delta) for delta in inputs.deltas])
    return method.combine(deltas, inputs.weights, keys)


@functools.partial(jax.jit, static_argnums=0)
def _combine_dense(method: MergeMethod, inputs: _WeightInputs) -> jax.Array:
    """Returns the combined update, (batch, fan_in, fan_out), one matrix after another."""

    def combine_one(indexed: tuple[jax.Array, tuple[WeightDelta, ...]]) -> jax.Array:
        index, deltas = indexed
        return _combine_matrix(method, inputs._replace(deltas=deltas), index)

    return jax.lax.map(combine_one, (jnp.arange(_num_matrices(inputs)), inputs.deltas))


_jitted_svd = jax.jit(svd)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _combine_dense_svd(
    method: MergeMethod, rank: int | None, inputs: _WeightInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first `rank` singular vectors of the combined update, and all singular values.

    The shapes are (batch, fan_in, rank), (batch, k) and (batch, rank, fan_out).
    """

    def decompose_one(indexed: tuple[jax.Array, tuple[WeightDelta, ...]]) -> tuple[jax.Array, ...]:
        index, deltas = indexed
        combined = _combine_matrix(method, inputs._replace(deltas=deltas), index)
        u, s, vt = svd(WeightDelta(dense=combined))
        return u[:, :rank], s, vt[:rank]

    u, s, vt = jax.lax.map(decompose_one, (jnp.arange(_num_matrices(inputs)), inputs.deltas))
    return u, s, vt


def _num_matrices(inputs: _WeightInputs) -> int:
    return jax.tree.leaves(inputs.deltas)[0].shape[0]


def _energy_fraction(s: jax.Array, rank: int) -> jax.Array:
    """Returns the fraction of the squared norm in the first `rank` singular values, (batch, k)."""
    largest = s.max()
    # Scaling by the largest value avoids underflow; NaN stays NaN.
    squares = jnp.square(s / jnp.where(largest == 0, 1, largest))
    total = squares.sum()
    return jnp.where(total == 0, 1, squares[:, :rank].sum() / jnp.where(total == 0, 1, total))


def _rank_for_energy(path: str, s: jax.Array, energy: float) -> int:
    """Returns the lowest rank that preserves a fraction of the squared norm, at least one."""
    if isinstance(s, Tracer):
        raise ValueError(
            f"energy={energy} sets the rank of {path!r} from the values of its update, which are "
            f"not available under jax.jit and jax.vmap. Pass rank=, or call combine_adapters "
            f"outside of them."
        )
    values = np.asarray(s, np.float64)
    # Rounding does not count as rank: the tolerance of numpy.linalg.matrix_rank.
    tolerance = values.max(initial=0) * s.shape[-1] * float(jnp.finfo(s.dtype).eps)
    squares = np.where(values > tolerance, values, 0) ** 2
    cumulative = np.cumsum(squares.sum(0))
    return 1 + int(np.searchsorted(cumulative, energy * cumulative[-1])) if cumulative[-1] else 1
