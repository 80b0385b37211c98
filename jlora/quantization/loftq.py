"""LoftQ: a quantized base, and an adapter initialized from the quantization error."""

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
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import (
    divide_by_size,
    matrices_to_weight,
    promote_to_float32,
    weight_to_matrices,
)
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
    """Quantizes weights `W` to `Q` and initializes the adapter so that `Q + scale A B` is near `W`.

    After `jlora.quantize` alone, the model starts at `Q`. Here the factors start as the best
    approximation of `W - Q` of their rank. One iteration does just that, as in ZeroQuant-V2 and
    LQER, and its base equals that of `jlora.quantize`. More iterations quantize `W - scale A B`
    instead of `W` and fit the factors again, which reduces the error further. Their base differs
    from that of `jlora.quantize`, so keep the returned parameters with the adapter.

    The two results belong together. On `W` itself, or on `W` quantized otherwise, the adapter is
    wrong: it would add an error that is not there. To export the trained model, merge the adapter
    into its own base, `lora.merge(params, adapter, dequantize=True)`, or convert the trained change
    to a LoRA for `W`: `jlora.rebase_to_original(trained, adapter)`.

    Weights that `rules` select are quantized with or without an adapter on them. Adapted weights
    that they do not select are left alone, and so are their factors. Weights are processed one by
    one, with an exact decomposition of one matrix at a time; a weight takes a few float32 copies of
    itself in addition.

    Args:
        params: Parameter tree of the original weights, which is not changed.
        adapter: Adapter from `init`, untrained: LoRA, LoRA-FA, SoRA or DoRA where a weight is
            quantized. The factors are replaced, whichever initializer drew them. LoRA-FA's `A` gets
            orthonormal columns, and DoRA's magnitudes become those of `Q + scale A B`.
        rules: Mapping from path patterns to schemes, as in `jlora.quantize`.
        iterations: Number of times that weights are quantized and factors fitted; 5 in the paper.

    Returns:
        `(params, adapter)`, both of the last iteration: the factors fit the returned base.

    Raises:
        TypeError: As in `jlora.quantize`; `adapter` is not an adapter; or arrays are abstract or
            traced.
        ValueError: As in `jlora.quantize`; the adapter does not fit the parameters, is already
            trained, has another method, has a rank above that of a weight, or none of it is on a
            quantized weight.

    References:
        Li et al., LoftQ, arXiv:2310.08659, algorithm 1. Yao et al., ZeroQuant-V2, arXiv:2303.08302,
        section 5, and Zhang et al., LQER, arXiv:2402.02446, for one iteration.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.sin(jnp.arange(48.0)).reshape(8, 6)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 8)))
        >>> rules = {"w": jlora.Int4(block_size=4)}
        >>> base, adapter = jlora.loftq(params, adapter, rules)
        >>> merged = lora.merge(base, adapter, dequantize=True)
        >>> quantized = jlora.dequantize(jlora.quantize(params, rules))
        >>> error = lambda tree: float(jnp.linalg.norm(tree["w"] - params["w"]))
        >>> error(merged) < error(quantized)
        True
    """
    _validation.check_positive_int("loftq: iterations", iterations)
    flat = _tree.flatten_with_paths(params)
    adapted = weight_indices(flat, adapter)
    schemes = match_schemes(rules, dict(zip(flat.paths, flat.leaves, strict=True)))
    _check_loftq_inputs(flat, adapter, [path for path in adapted if path in schemes])
    leaves, initialized = list(flat.leaves), dict(adapter)
    for i, path in enumerate(flat.paths):
        if path not in schemes:
            continue
        weight = jnp.asarray(leaves[i])
        base = quantize_weight(weight, schemes[path])
        check_finite_qarrays({path: base})
        if path in adapted:
            base, triplets = _fit_base_and_factors(weight, base, adapter[path], iterations)
            initialized[path] = _replace_factors(adapter[path], triplets, base)
        leaves[i] = base
    return jax.tree.unflatten(flat.treedef, leaves), initialized


class _SingularTriplets(NamedTuple):
    """Leading singular triplets of a weight's matrices.

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
    """Returns the base of the last iteration, and its quantization error up to the leaf's rank.

    Args:
        weight: Original weight.
        base: Base of the first iteration.
        leaf: Adapter leaf with the rank and the axes.
        iterations: Number of iterations.
    """
    triplets = _quantization_error_svd(weight, base, leaf.axes, leaf.rank)
    for _ in range(iterations - 1):
        remainder = _subtract_low_rank(weight, triplets, leaf.axes)
        # The remainder is in float32, which is not the dtype that the weight is computed with.
        base = dataclasses.replace(
            quantize_weight(remainder, base.scheme, base.axis), dtype_name=base.dtype_name
        )
        triplets = _quantization_error_svd(weight, base, leaf.axes, leaf.rank)
    return base, triplets


@functools.partial(jax.jit, static_argnames=("axes", "rank"))
def _quantization_error_svd(
    weight: jax.Array, base: QArray, axes: WeightAxes, rank: int
) -> _SingularTriplets:
    """Returns the best approximation of `weight - base` of a rank."""

    def leading_triplets(matrix: jax.Array) -> _SingularTriplets:
        matrix, size = divide_by_size(matrix)
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return _SingularTriplets(u[:, :rank], s[:rank] * size[0], vt[:rank])

    # One matrix at a time: all triplets of a stack at once would take three times its memory.
    error = promote_to_float32(weight) - promote_to_float32(base)
    return jax.lax.map(leading_triplets, weight_to_matrices(error, axes))


@functools.partial(jax.jit, static_argnames="axes")
def _subtract_low_rank(
    weight: jax.Array, triplets: _SingularTriplets, axes: WeightAxes
) -> jax.Array:
    """Returns the weight minus a low-rank product, in float32 or wider."""
    u, s, vt = triplets
    # (batch, fan_in, rank) @ (batch, rank, fan_out)
    product = jnp.matmul(u * s[:, None, :], vt, precision=jax.lax.Precision.HIGHEST)
    return promote_to_float32(weight) - matrices_to_weight(product, weight.shape, axes)


def _replace_factors(leaf: LoRALeaf, triplets: _SingularTriplets, base: QArray) -> LoRALeaf:
    """Returns the leaf with a low-rank product as its update of a base."""
    u, s, vt = triplets
    s = s / leaf.scale
    if isinstance(leaf, LoRAFALeaf):
        # A is never trained, so its columns keep the length that they are drawn with.
        a, b = u, s[:, :, None] * vt
    else:
        root = jnp.sqrt(s)
        # Where there is no error only B is zero; with A zero too, no gradient would reach either.
        a, b = u * jnp.where(root > 0, root, 1)[:, None, :], root[:, :, None] * vt
    a = a.reshape(leaf.a.shape).astype(leaf.a.dtype)
    b = b.reshape(leaf.b.shape).astype(leaf.b.dtype)
    replaced = dataclasses.replace(leaf, a=a, b=b, residual=True)
    if isinstance(replaced, DoRALeaf):
        norm = replaced.weight_norm(base).reshape(replaced.magnitude.shape)
        replaced = dataclasses.replace(replaced, magnitude=norm.astype(replaced.magnitude.dtype))
    return replaced


_SUPPORTED_LEAVES = (LoRALeaf, LoRAFALeaf, SoRALeaf, DoRALeaf)

_UNSUPPORTED_REASONS = {
    "adalora": "drops ranks in training, and its s starts at zero",
    "dylora": "is truncated to lower ranks in training, where its scale differs",
}


def _check_loftq_inputs(flat: _tree.FlatTree, adapter: Mapping[str, Any], paths: list[str]) -> None:
    """Checks that the adapter can be initialized on the weights at these paths.

    Raises:
        TypeError: Arrays are abstract or traced.
        ValueError: As in `loftq`.
    """
    if not paths:
        raise ValueError(
            f"rules must quantize an adapted weight, got none of the {len(adapter)} adapted "
            f"weights, such as {min(adapter, default=None)!r}. Without one, the factors have no "
            f"quantization error to compensate. Name them in the rules, or use jlora.quantize."
        )
    weights = dict(zip(flat.paths, flat.leaves, strict=True))
    for path in paths:
        arrays = [weights[path], *jax.tree.leaves(adapter[path])]
        if any(isinstance(array, Tracer | jax.ShapeDtypeStruct) for array in arrays):
            raise TypeError(
                f"loftq needs the values of {path!r} and of its adapter, got only shapes. Call it "
                f"with loaded parameters, outside of jit."
            )
        _check_loftq_leaf(path, adapter[path], weights[path])


def _check_loftq_leaf(path: str, leaf: AdapterLeaf, weight: Any) -> None:
    if type(leaf) not in _SUPPORTED_LEAVES:
        reason = _UNSUPPORTED_REASONS.get(
            leaf.family, "does not add just a product of two factors to the weight"
        )
        raise ValueError(
            f"loftq cannot initialize the adapter on {path!r}: its family {leaf.family!r} "
            f"{reason}. Use LoRA, LoRAFA, SoRA or DoRA there, or leave the weight out of these "
            f"rules and quantize it with jlora.quantize."
        )
    assert isinstance(leaf, LoRALeaf)
    if leaf.residual:
        raise ValueError(
            f"The adapter on {path!r} was subtracted from its weight by its initializer, or has "
            f"already been through loftq. Only one of these can change a weight: use an "
            f"initializer that starts at zero, such as initializers.kaiming_uniform."
        )
    if not _has_zero_update(leaf, weight):
        raise ValueError(
            f"The adapter on {path!r} is not fresh from init for this weight: it changes the "
            f"weight, and loftq would replace trained parameters. Call it before training, or "
            f"quantize with jlora.quantize."
        )
    _, inputs, outputs = leaf.axis_sizes
    max_rank = min(math.prod(inputs), math.prod(outputs))
    if leaf.rank > max_rank:
        raise ValueError(
            f"loftq: rank={leaf.rank} on {path!r} must be at most {max_rank}, the weight's own "
            f"rank. Use a lower rank there."
        )


def _has_zero_update(leaf: LoRALeaf, weight: Any) -> bool:
    """Returns whether a leaf does not change its weight yet."""
    a, b = low_rank.factor_matrices(leaf)
    # Both factors of initializers.orthogonal are nonzero, and their product is zero. With A = Q R,
    # A B has the norm of R B.
    r = jnp.linalg.qr(a, mode="r")
    product = jnp.matmul(r, b, precision=jax.lax.Precision.HIGHEST)
    rounding = 2 * float(jnp.finfo(leaf.b.dtype).eps)
    is_zero = jnp.linalg.norm(product) <= rounding * jnp.linalg.norm(a) * jnp.linalg.norm(b)
    if isinstance(leaf, SoRALeaf):
        is_zero &= (leaf.gate == 1).all()
    if isinstance(leaf, DoRALeaf):
        norm = leaf.weight_norm(weight).reshape(leaf.magnitude.shape)
        # The tolerance covers the same sum in another order. NaN is reported elsewhere.
        is_zero &= jnp.allclose(norm, leaf.magnitude, rtol=1e-3, atol=1e-6, equal_nan=True)
    return bool(is_zero)
