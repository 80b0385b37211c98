"""Quantising the weights of a parameter tree that rules name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _tree
from jlora._quantized_array import is_quantized, maybe_dequantize
from jlora._tree import PyTree
from jlora.quantization.qarray import QArray, quantize_array
from jlora.quantization.schemes import QuantizationScheme


def quantize(params: PyTree, rules: Mapping[str, QuantizationScheme | None]) -> PyTree:
    """A new parameter tree, in which some weights are quantised.

    It is used through `lora_transform`: `apply(params, adapter, ...)`, with `{}` for no adapter.
    The model itself knows nothing of quantised weights; `dequantize` makes arrays of them again.

    Args:
        params: The weights; they are not changed. Shapes alone (`jax.ShapeDtypeStruct`) give
            shapes.
        rules: From regular expressions, searched in a weight's path, to a scheme or None (left as
            it is). The first match wins; what matches nothing is left.

    Raises:
        TypeError: For rules of another type, or a rule for what is no array of floats.
        ValueError: For a rule that matches nothing or has no effect, a weight that is quantised
            already, or one that holds NaN or Inf.
    """
    flat = _tree.flatten_with_paths(params)
    leaves = list(flat.leaves)
    schemes = match_schemes(rules, dict(zip(flat.paths, leaves, strict=True)))
    made: dict[str, QArray] = {}
    for place, path in enumerate(flat.paths):
        if path in schemes:
            made[path] = leaves[place] = quantize_weight(leaves[place], schemes[path])
    check_finite_qarrays(made)
    return jax.tree.unflatten(flat.treedef, leaves)


def match_schemes(
    rules: Mapping[str, QuantizationScheme | None], weights: Mapping[str, Any]
) -> dict[str, QuantizationScheme]:
    """Which weights rules quantise, and how.

    Args:
        rules: As `quantize` takes them.
        weights: All that there are, by path; their shapes and types are looked at.

    Raises:
        TypeError: As from `quantize`.
        ValueError: As from `quantize`, but for NaN and Inf.
    """
    if isinstance(rules, QuantizationScheme):
        raise TypeError(
            f"rules={rules!r} names no weights. Give a mapping from patterns, such as "
            f"{{r'kernel$': {rules!r}}}: norms, biases and embeddings are better left out."
        )
    _tree.check_rules(rules, lambda node: isinstance(node, QuantizationScheme))
    assigned = _tree.match_patterns(rules, list(weights))
    for problem in assigned.errors:
        raise ValueError(problem)
    schemes: dict[str, QuantizationScheme] = {}
    for path, (pattern, scheme) in assigned.rule_by_path.items():
        if scheme is not None:
            _check_quantizable(path, pattern, weights[path])
            schemes[path] = scheme
    return schemes


def dequantize(params: PyTree) -> PyTree:
    """A new parameter tree, in which quantised weights are arrays of what they stand for."""
    return jax.tree.map(maybe_dequantize, params, is_leaf=is_quantized)


def quantize_weight(weight: Any, scheme: QuantizationScheme, axis: int | None = None) -> QArray:
    """One weight in a scheme; of shapes, if it is one.

    Args:
        weight: An array or a shape.
        scheme: How it is quantised.
        axis: Along which; what suits the weight's shape when left out.
    """
    axis = choose_block_axis(tuple(weight.shape), scheme) if axis is None else axis
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda array: quantize_array(array, scheme, axis), weight)
    return quantize_array(weight, scheme, axis)


class QuantizationSummary(NamedTuple):
    """The quantised weights of a tree.

    Attributes:
        num_quantized: How many there are.
        num_weights: How many weights the tree has.
        schemes: Their names.
        bits_per_param: That a number of them takes on average, scales and padding counted.
        size_gib: That they take.
        dequantized_gib: That they would take as arrays.
    """

    num_quantized: int
    num_weights: int
    schemes: tuple[str, ...]
    bits_per_param: float
    size_gib: float
    dequantized_gib: float

    def __str__(self) -> str:
        return (
            f"{self.num_quantized} of {self.num_weights} weights as {', '.join(self.schemes)}: {self.bits_per_param:.2f} "
            f"bits a number, {self.size_gib:.2f} GiB instead of {self.dequantized_gib:.2f}"
        )


def quantization_summary(params: PyTree) -> QuantizationSummary | None:
    """What the quantised weights of a tree take, of arrays or shapes; None where there are none."""
    leaves = _tree.flatten_with_paths(params).leaves
    found = [leaf for leaf in leaves if is_quantized(leaf)]
    if not found:
        return None
    size, numbers = (sum(getattr(leaf, name) for leaf in found) for name in ("nbytes", "size"))
    wide = sum(leaf.size * leaf.dtype.itemsize for leaf in found)
    schemes = tuple(sorted({str(leaf) for leaf in found}))
    bits = 8 * size / numbers
    return QuantizationSummary(len(found), len(leaves), schemes, bits, size / 2**30, wide / 2**30)


def _check_quantizable(path: str, pattern: str, weight: Any) -> None:
    """Refuses what cannot be quantised.

    Raises:
        TypeError: It is no array of floats.
        ValueError: It is quantised already, or has no numbers.
    """
    if is_quantized(weight):
        raise ValueError(
            f"The rule {pattern!r} matches {path!r}, which is quantised already ({weight}). Narrow "
            f"the pattern; jlora.dequantize makes arrays of quantised weights."
        )
    if not _tree.is_array(weight) or not jnp.issubdtype(weight.dtype, jnp.floating):
        kind = weight.dtype if _tree.is_array(weight) else type(weight).__name__
        raise TypeError(
            f"The rule {pattern!r} matches {path!r}, which is {kind} and no array of floats. "
            f"Narrow the pattern."
        )
    if not weight.shape or 0 in weight.shape:
        raise ValueError(
            f"The rule {pattern!r} matches {path!r}, whose shape {tuple(weight.shape)} has no axis "
            f"to cut into blocks. Narrow the pattern."
        )


def check_finite_qarrays(weights: Mapping[str, QArray]) -> None:
    """Refuses weights, by path, that were not finite before they were quantised.

    Raises:
        ValueError: One holds NaN or Inf. Where values are only traced, none is raised.
    """
    finite = {path: _has_finite_scales(weight) for path, weight in weights.items()}
    for path, good in finite.items():
        if good is not None and not good:
            raise ValueError(
                f"{path!r} holds NaN or Inf, which would spoil the blocks that they are in. Mend "
                f"the checkpoint, or leave this weight out of the rules."
            )


def _has_finite_scales(weight: QArray) -> Any:
    scales = jax.tree.leaves(weight.scales)
    if any(isinstance(array, Tracer | jax.ShapeDtypeStruct) for array in scales):
        return None
    floats = [array for array in scales if jnp.issubdtype(array.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(array).all() for array in floats]).all()


def choose_block_axis(shape: tuple[int, ...], scheme: QuantizationScheme) -> int:
    """Along which axis a weight's blocks run."""
    if scheme.axis is not None:
        if -scheme.axis > len(shape):
            raise ValueError(
                f"{scheme!r} runs along axis {scheme.axis}, which a weight of shape {shape} has "
                f"not. Give it a rule of its own."
            )
        return scheme.axis
    order = [-2, -1, *range(-3, -len(shape) - 1, -1)]
    axes = [axis for axis in order if -axis <= len(shape)]
    whole = [axis for axis in axes if shape[axis] % scheme.block_size == 0]
    return whole[0] if whole else max(axes, key=lambda axis: shape[axis])
