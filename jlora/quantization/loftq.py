"""LoftQ: a quantised base, and an adapter that starts as what quantising took from it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _tree, _validation
from jlora._tree import PyTree
from jlora.adapters import low_rank
from jlora.adapters.base import AdapterLeaf, weight_indices
from jlora.adapters.dora import DoRALeaf
from jlora.adapters.lora import LoRALeaf
from jlora.adapters.lora_fa import LoRAFALeaf
from jlora.adapters.sora import SoRALeaf
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import matrices_to_weight, promote_to_float32, weight_to_matrices
from jlora.quantization.qarray import QArray
from jlora.quantization.quantize import check_finite_qarrays, match_schemes, quantize_weight
from jlora.quantization.schemes import QuantizationScheme


def loftq(
    params: PyTree,
    adapter: Mapping[str, Any],
    rules: Mapping[str, QuantizationScheme | None],
    *,
    iterations: int = 1,
) -> tuple[PyTree, dict[str, Any]]:
    """Quantised parameters `Q`, and the adapter on them with `Q + scale A B` near the weights `W`.

    Where `jlora.quantize` alone starts the model at `Q`, here the factors start as the best
    approximation of their rank of `W - Q`. One iteration is just that, as in ZeroQuant-V2 and LQER,
    and its base is what `jlora.quantize` makes of `W`. More iterations quantise `W - scale A B`
    instead of `W` and fit the factors anew, which brings the two nearer still; their base is no
    other quantisation of `W`, so keep the returned parameters with the adapter.

    Both belong together. On `W` itself, or quantised otherwise, the adapter is wrong: it would add
    what is not missing. To export what was trained, merge it into its own base,
    `lora.merge(params, adapter, dequantize=True)`, or turn what the training changed into a LoRA
    for `W`: `jlora.rebase_to_original(trained, adapter)`.

    Weights that `rules` name are quantised with or without an adapter on them; adapted weights that
    they do not name are left, and so are their factors. It works weight by weight, with an exact
    decomposition of one matrix at a time; beside a weight there are a few float32 copies of it.

    Args:
        params: The weights as they were; they are not changed.
        adapter: Fresh from `init`. Of LoRA, LoRA-FA, SoRA or DoRA where a weight is quantised: the
            factors are replaced, whatever drew them. LoRA-FA's `A` has orthonormal columns, and the
            magnitudes of DoRA become those of `Q + scale A B`.
        rules: From patterns of paths to schemes, as `jlora.quantize` takes them.
        iterations: How often weights are quantised and factors fitted; 5 in the paper.

    Returns:
        `(params, adapter)`: of the last iteration both, the factors fitted to the returned base.

    Raises:
        TypeError: As from `jlora.quantize`, for what is no adapter, or where numbers are only
            described or traced.
        ValueError: As from `jlora.quantize`, or when the adapter does not fit, is not fresh, is of
            another family, has a rank above a weight's own, or none of it is on a quantised weight.

    References:
        Li et al., LoftQ, arXiv:2310.08659, algorithm 1. Yao et al., ZeroQuant-V2, arXiv:2303.08302,
        section 5, and Zhang et al., LQER, arXiv:2402.02446, for one iteration.
    """
    _validation.check_positive_int("loftq: iterations", iterations)
    flat = _tree.flatten_with_paths(params)
    adapted = weight_indices(flat, adapter)
    schemes = match_schemes(rules, dict(zip(flat.paths, flat.leaves, strict=True)))
    _check_loftq_inputs(flat, adapter, [path for path in adapted if path in schemes])
    leaves, started = list(flat.leaves), dict(adapter)
    for place, path in enumerate(flat.paths):
        if path not in schemes:
            continue
        weight = jnp.asarray(leaves[place])
        base = quantize_weight(weight, schemes[path])
        check_finite_qarrays({path: base})
        if path in adapted:
            base, part = _fit_base_and_factors(weight, base, adapter[path], iterations)
            started[path] = _replace_factors(adapter[path], part, base)
        leaves[place] = base
    return jax.tree.unflatten(flat.treedef, leaves), started


class _SingularTriplets(NamedTuple):
    """The first singular triplets of a weight's matrices.

    Attributes:
        u: (batch, fan_in, rank).
        s: (batch, rank).
        vt: (batch, rank, fan_out).
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


def _fit_base_and_factors(
    weight: jax.Array, base: QArray, leaf: LoRALeaf, iterations: int
) -> tuple[QArray, _SingularTriplets]:
    """The base of the last iteration, and the part of what it lacks that the factors can hold.

    Args:
        weight: As it was.
        base: Of the first iteration.
        leaf: Says the rank and the axes.
        iterations: How many.
    """
    part = _quantization_error_svd(weight, base, leaf.axes, leaf.rank)
    for _ in range(iterations - 1):
        rest = _subtract_low_rank(weight, part, leaf.axes)
        # The rest is in float32, which is not the type that the weight is computed with.
        base = dataclasses.replace(
            quantize_weight(rest, base.scheme, base.axis), dtype_name=base.dtype_name
        )
        part = _quantization_error_svd(weight, base, leaf.axes, leaf.rank)
    return base, part


@functools.partial(jax.jit, static_argnames=("axes", "rank"))
def _quantization_error_svd(
    weight: jax.Array, base: QArray, axes: WeightAxes, rank: int
) -> _SingularTriplets:
    """The best approximation of `weight - base` of a rank."""

    def first(matrix: jax.Array) -> _SingularTriplets:
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return _SingularTriplets(u[:, :rank], s[:rank], vt[:rank])

    # One after another: all triplets of a whole stack would take as much as three of it.
    return jax.lax.map(
        first, weight_to_matrices(promote_to_float32(weight) - promote_to_float32(base), axes)
    )


@functools.partial(jax.jit, static_argnames="axes")
def _subtract_low_rank(
    weight: jax.Array, triplets: _SingularTriplets, axes: WeightAxes
) -> jax.Array:
    """The weight less a part of it, in float32 or wider."""
    u, s, vt = triplets
    product = jnp.matmul(u * s[:, None, :], vt, precision=jax.lax.Precision.HIGHEST)
    return promote_to_float32(weight) - matrices_to_weight(product, weight.shape, axes)


def _replace_factors(leaf: LoRALeaf, triplets: _SingularTriplets, base: QArray) -> LoRALeaf:
    """The leaf with a part as its update of a base."""
    u, s, vt = triplets
    s = s / leaf.scale
    if isinstance(leaf, LoRAFALeaf):
        # A is never trained, so its columns keep the length that they are drawn with.
        a, b = u, s[:, :, None] * vt
    else:
        root = jnp.sqrt(s)
        # Where nothing is lacking only B is zero; were A too, no gradient would reach either.
        a, b = u * jnp.where(root > 0, root, 1)[:, None, :], root[:, :, None] * vt
    a = a.reshape(leaf.a.shape).astype(leaf.a.dtype)
    b = b.reshape(leaf.b.shape).astype(leaf.b.dtype)
    made = dataclasses.replace(leaf, a=a, b=b, residual=True)
    if isinstance(made, DoRALeaf):
        norm = made.weight_norm(base).reshape(made.magnitude.shape)
        made = dataclasses.replace(made, magnitude=norm.astype(made.magnitude.dtype))
    return made


_SUPPORTED_LEAVES = (LoRALeaf, LoRAFALeaf, SoRALeaf, DoRALeaf)

_UNSUPPORTED_REASONS = {
    "adalora": "gives up ranks in training, and its s starts at zero",
    "dylora": "is cut to lower ranks in training, where its scale is another",
}


def _check_loftq_inputs(flat: _tree.FlatTree, adapter: Mapping[str, Any], paths: list[str]) -> None:
    """Refuses an adapter that cannot be started on the weights at these paths.

    Raises:
        TypeError: There are no numbers to look at.
        ValueError: As from `loftq`.
    """
    if not paths:
        raise ValueError(
            f"The rules quantise none of the {len(adapter)} adapted weights, such as "
            f"{min(adapter, default=None)!r}, so no factors have anything to make up for. Name "
            f"them in the rules, or use jlora.quantize."
        )
    weights = dict(zip(flat.paths, flat.leaves, strict=True))
    for path in paths:
        arrays = [weights[path], *jax.tree.leaves(adapter[path])]
        if any(isinstance(array, Tracer | jax.ShapeDtypeStruct) for array in arrays):
            raise TypeError(
                f"loftq needs the numbers of {path!r} and of its adapter, of which only shapes are "
                f"known. Call it with loaded parameters, outside of jit."
            )
        _check_loftq_leaf(path, adapter[path], weights[path])


def _check_loftq_leaf(path: str, leaf: AdapterLeaf, weight: Any) -> None:
    if type(leaf) not in _SUPPORTED_LEAVES:
        reason = _UNSUPPORTED_REASONS.get(
            leaf.family, "adds no product of two factors alone to the weight"
        )
        raise ValueError(
            f"loftq cannot start the adapter on {path!r}: its family {leaf.family!r} {reason}. Use "
            f"LoRA, LoRAFA, SoRA or DoRA there, or leave the weight out of these rules and "
            f"quantise it with jlora.quantize."
        )
    assert isinstance(leaf, LoRALeaf)
    if leaf.residual:
        raise ValueError(
            f"The adapter on {path!r} was taken out of its weight by its initialisation, or has "
            f"been through loftq. A weight can give way to one of these only: use an "
            f"initialisation that starts at zero, such as initializers.kaiming_uniform."
        )
    if not _has_zero_update(leaf, weight):
        raise ValueError(
            f"The adapter on {path!r} is not as init made it for this weight: it changes it, and "
            f"loftq would put other numbers in the place of those trained. Call it before "
            f"training, or quantise with jlora.quantize."
        )
    _, inputs, outputs = leaf.axis_sizes
    largest = min(math.prod(inputs), math.prod(outputs))
    if leaf.rank > largest:
        raise ValueError(
            f"loftq takes {leaf.rank} directions of {path!r}, which has {largest}. Use a rank of "
            f"at most {largest} there."
        )


def _has_zero_update(leaf: LoRALeaf, weight: Any) -> bool:
    """Whether a leaf changes nothing yet."""
    a, b = low_rank.factor_matrices(leaf)
    # Those of initializers.orthogonal are both off zero, their product is not. A = Q R has that of R B.
    inner = jnp.linalg.qr(a, mode="r")
    product = jnp.matmul(inner, b, precision=jax.lax.Precision.HIGHEST)
    rounding = 2 * float(jnp.finfo(leaf.b.dtype).eps)
    fresh = jnp.linalg.norm(product) <= rounding * jnp.linalg.norm(a) * jnp.linalg.norm(b)
    if isinstance(leaf, SoRALeaf):
        fresh &= (leaf.gate == 1).all()
    if isinstance(leaf, DoRALeaf):
        norm = leaf.weight_norm(weight).reshape(leaf.magnitude.shape)
        # As far as the same sum in another order can be away. NaN is told of elsewhere.
        fresh &= jnp.allclose(norm, leaf.magnitude, rtol=1e-3, atol=1e-6, equal_nan=True)
    return bool(fresh)
