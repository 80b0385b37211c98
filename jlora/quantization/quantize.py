"""Quantization of the weights of a parameter tree, selected by rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora._tree import PyTree, is_quantized
from jlora.quantization.qarray import QArray, quantize_array
from jlora.quantization.schemes import QuantizationScheme


def quantize(params: PyTree, rules: Mapping[str, QuantizationScheme | None]) -> PyTree:
    """Returns a new parameter tree in which the weights selected by rules are quantized.

    The result is used through `lora_transform`: `apply(params, adapter, ...)`, with `{}` for no
    adapter. The model itself cannot compute with quantized weights; `dequantize` turns them back
    into arrays.

    Args:
        params: Parameter tree of floats, which is not changed. Abstract arrays
            (`jax.ShapeDtypeStruct`) give abstract quantized weights.
        rules: Mapping from regular expressions, searched in a weight's path, to a scheme, or to
            None for weights that stay as they are. The first match wins; weights that no pattern
            matches stay as they are.

    Raises:
        TypeError: `rules` is not such a mapping, or a rule matches something other than an array of
            floats.
        ValueError: A rule matches nothing or has no effect, a weight is already quantized, or a
            weight holds NaN or Inf.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"dense": {"kernel": jnp.ones((64, 3)), "bias": jnp.zeros(3)}}
        >>> base = jlora.quantize(params, {r"kernel$": jlora.NF4()})
        >>> print(base["dense"]["kernel"], base["dense"]["bias"].dtype)
        nf4 float32
    """
    flat = _tree.flatten_with_paths(params)
    leaves = list(flat.leaves)
    schemes = match_schemes(rules, dict(zip(flat.paths, leaves, strict=True)))
    qarrays: dict[str, QArray] = {}
    for i, path in enumerate(flat.paths):
        if path in schemes:
            qarrays[path] = leaves[i] = quantize_weight(leaves[i], schemes[path])
    check_finite_qarrays(qarrays)
    return jax.tree.unflatten(flat.treedef, leaves)


def dequantize(params: PyTree) -> PyTree:
    """Returns a new parameter tree in which quantized weights are replaced by arrays.

    Args:
        params: Parameter tree, with or without quantized weights.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.ones((64, 3))}, {"w": jlora.Int8()})
        >>> jlora.dequantize(base)["w"].shape
        (64, 3)
    """
    return jax.tree.map(maybe_dequantize, params, is_leaf=is_quantized)


class QuantizationSummary(NamedTuple):
    """Summary of the quantized weights of a parameter tree; see `quantization_summary`.

    Attributes:
        num_quantized: Number of quantized weights.
        num_weights: Number of all weights in the tree.
        schemes: Names of the schemes, sorted.
        bits_per_param: Average bits per parameter of the quantized weights, with scales and
            padding.
        size_gib: Size of the quantized weights in GiB.
        dequantized_gib: Size of the same weights as arrays in GiB.

    Example:
        >>> from jlora.quantization import QuantizationSummary
        >>> print(QuantizationSummary(2, 3, ("int8",), 8.25, 1.5, 2.91))
        2 of 3 weights as int8: 8.25 bits per parameter, 1.50 GiB instead of 2.91
    """

    num_quantized: int
    num_weights: int
    schemes: tuple[str, ...]
    bits_per_param: float
    size_gib: float
    dequantized_gib: float

    def __str__(self) -> str:
        return (
            f"{self.num_quantized} of {self.num_weights} weights as {', '.join(self.schemes)}: "
            f"{self.bits_per_param:.2f} bits per parameter, {self.size_gib:.2f} GiB instead of "
            f"{self.dequantized_gib:.2f}"
        )


def quantization_summary(params: PyTree) -> QuantizationSummary | None:
    """Summarizes the quantized weights of a parameter tree.

    Args:
        params: Parameter tree of arrays or abstract arrays.

    Returns:
        The summary, or None where no weight is quantized.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((64, 3)), "b": jnp.ones(3)}
        >>> base = jlora.quantize(params, {"w": jlora.Int4()})
        >>> summary = jlora.quantization.quantization_summary(base)
        >>> summary.num_quantized, summary.schemes, summary.bits_per_param
        (1, ('int4',), 4.5)
    """
    leaves = _tree.flatten_with_paths(params).leaves
    qarrays = [leaf for leaf in leaves if is_quantized(leaf)]
    if not qarrays:
        return None
    nbytes, size = (sum(getattr(leaf, name) for leaf in qarrays) for name in ("nbytes", "size"))
    dequantized = sum(leaf.size * leaf.dtype.itemsize for leaf in qarrays)
    schemes = tuple(sorted({str(leaf) for leaf in qarrays}))
    return QuantizationSummary(
        len(qarrays), len(leaves), schemes, 8 * nbytes / size, nbytes / 2**30, dequantized / 2**30
    )


def match_schemes(
    rules: Mapping[str, QuantizationScheme | None], weights: Mapping[str, Any]
) -> dict[str, QuantizationScheme]:
    """Returns the scheme of every weight that the rules quantize, by path.

    Args:
        rules: As in `quantize`.
        weights: All weights by path; only their shapes and dtypes are used.

    Raises:
        TypeError: As in `quantize`.
        ValueError: As in `quantize`, except for NaN and Inf.
    """
    if isinstance(rules, QuantizationScheme):
        raise TypeError(
            f"rules must be a mapping from patterns to schemes, got {rules!r}. Use, for example, "
            f"{{r'kernel$': {rules!r}}}: norms, biases and embeddings are better left out."
        )
    _tree.check_rules(rules, lambda node: isinstance(node, QuantizationScheme))
    matches = _tree.match_patterns(rules, list(weights))
    for error in matches.errors:
        raise ValueError(error)
    schemes: dict[str, QuantizationScheme] = {}
    for path, (pattern, scheme) in matches.rule_by_path.items():
        if scheme is not None:
            _check_quantizable(path, pattern, weights[path])
            schemes[path] = scheme
    return schemes


def quantize_weight(weight: Any, scheme: QuantizationScheme, axis: int | None = None) -> QArray:
    """Quantizes one weight.

    Args:
        weight: Array, or abstract array, which gives an abstract result.
        scheme: Quantization scheme.
        axis: Blocked axis, counted from the last. None: chosen by the weight's shape.
    """
    axis = choose_block_axis(tuple(weight.shape), scheme) if axis is None else axis
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda array: quantize_array(array, scheme, axis), weight)
    return quantize_array(weight, scheme, axis)


def choose_block_axis(shape: tuple[int, ...], scheme: QuantizationScheme) -> int:
    """Returns the blocked axis of a weight, counted from the last.

    Raises:
        ValueError: The weight does not have the scheme's axis.
    """
    if scheme.axis is not None:
        if -scheme.axis > len(shape):
            raise ValueError(
                f"axis={scheme.axis} of {scheme!r} must be an axis of the weight, got shape "
                f"{shape}. Give this weight a rule of its own."
            )
        return scheme.axis
    order = [-2, -1, *range(-3, -len(shape) - 1, -1)]
    axes = [axis for axis in order if -axis <= len(shape)]
    unpadded = [axis for axis in axes if shape[axis] % scheme.block_size == 0]
    return unpadded[0] if unpadded else max(axes, key=lambda axis: shape[axis])


def check_finite_qarrays(weights: Mapping[str, QArray]) -> None:
    """Checks that quantized weights, by path, were finite before quantization.

    Raises:
        ValueError: A weight holds NaN or Inf. Traced or abstract values are not checked.
    """
    finite_by_path = {path: _has_finite_scales(weight) for path, weight in weights.items()}
    for path, finite in finite_by_path.items():
        if finite is not None and not finite:
            raise ValueError(
                f"{path!r} holds NaN or Inf, which would spoil the blocks that they are in. Fix "
                f"the checkpoint, or leave this weight out of the rules."
            )


def _check_quantizable(path: str, pattern: str, weight: Any) -> None:
    """Checks that a weight can be quantized.

    Raises:
        TypeError: The weight is not an array of floats.
        ValueError: The weight is already quantized, or has no elements.
    """
    if is_quantized(weight):
        raise ValueError(
            f"The rule {pattern!r} matches {path!r}, which is already quantized ({weight}). Narrow "
            f"the pattern, or call jlora.dequantize first."
        )
    if not _tree.is_array(weight) or not jnp.issubdtype(weight.dtype, jnp.floating):
        kind = weight.dtype if _tree.is_array(weight) else type(weight).__name__
        raise TypeError(
            f"The rule {pattern!r} matches {path!r}, which must be an array of floats, got {kind}. "
            f"Narrow the pattern."
        )
    if not weight.shape or 0 in weight.shape:
        raise ValueError(
            f"The rule {pattern!r} matches {path!r}, whose shape {tuple(weight.shape)} has no axis "
            f"to split into blocks. Narrow the pattern."
        )


def _has_finite_scales(weight: QArray) -> Any:
    scales = jax.tree.leaves(weight.scales)
    if any(isinstance(array, Tracer | jax.ShapeDtypeStruct) for array in scales):
        return None
    floats = [array for array in scales if jnp.issubdtype(array.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(array).all() for array in floats]).all()
