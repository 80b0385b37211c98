"""Quantising the weights of a parameter tree that rules name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.packed import dense, is_packed
from jlora.quantization.leaf import Quantized, quantized
from jlora.quantization.schemes import Scheme

PyTree = Any


def quantize(params: PyTree, rules: Mapping[str, Scheme | None]) -> PyTree:
    """A new parameter tree, in which some weights are quantised.

    It is used through `lora_transform`: `apply(params, adapter, ...)`, with `{}` for no adapter. The
    model itself knows nothing of quantised weights; `dequantize` makes arrays of them again.

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
    if isinstance(rules, Scheme):
        raise TypeError(
            f"rules={rules!r} names no weights. Give a mapping from patterns, such as "
            f"{{r'kernel$': {rules!r}}}: norms, biases and embeddings are better left out."
        )
    tree.check_rules(rules, lambda node: isinstance(node, Scheme))
    flat = tree.flatten(params)
    assigned = tree.assign(rules, list(flat.paths))
    for problem in assigned.problems:
        raise ValueError(problem)
    leaves = list(flat.leaves)
    finite: dict[str, Any] = {}
    for place, path in enumerate(flat.paths):
        pattern, scheme = assigned.rules.get(path, ("", None))
        if scheme is None:
            continue
        check_weight(path, pattern, leaves[place])
        leaves[place] = quantized_weight(leaves[place], scheme)
        finite[path] = _finite(leaves[place])
    for path, good in finite.items():
        if good is not None and not good:
            raise not_finite(path)
    return jax.tree.unflatten(flat.treedef, leaves)


def dequantize(params: PyTree) -> PyTree:
    """A new parameter tree, in which quantised weights are arrays of what they stand for."""
    return jax.tree.map(dense, params, is_leaf=is_packed)


def quantized_weight(weight: Any, scheme: Scheme) -> Quantized:
    """One weight in a scheme; of shapes, if it is one."""
    axis = _axis(tuple(weight.shape), scheme)
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda array: quantized(array, scheme, axis), weight)
    return quantized(weight, scheme, axis)


def check_weight(path: str, pattern: str, weight: Any) -> None:
    """Refuses what cannot be quantised.

    Raises:
        TypeError: It is no array of floats.
        ValueError: It is quantised already, or has no numbers.
    """
    if is_packed(weight):
        raise ValueError(
            f"The rule {pattern!r} matches {path!r}, which is quantised already ({weight}). Narrow "
            f"the pattern; jlora.dequantize makes arrays of quantised weights."
        )
    if not tree.is_array(weight) or not jnp.issubdtype(weight.dtype, jnp.floating):
        kind = weight.dtype if tree.is_array(weight) else type(weight).__name__
        raise TypeError(
            f"The rule {pattern!r} matches {path!r}, which is {kind} and no array of floats. "
            f"Narrow the pattern."
        )
    if not weight.shape or 0 in weight.shape:
        raise ValueError(
            f"The rule {pattern!r} matches {path!r}, whose shape {tuple(weight.shape)} has no axis "
            f"to cut into blocks. Narrow the pattern."
        )


def not_finite(path: str) -> ValueError:
    """What is raised for a weight that holds NaN or Inf."""
    return ValueError(
        f"{path!r} holds NaN or Inf, which would spoil the blocks that they are in. Mend the "
        f"checkpoint, or leave this weight out of the rules."
    )


def _finite(weight: Quantized) -> Any:
    """Whether all of a weight was finite; None where that is not known yet."""
    scales = jax.tree.leaves(weight.scales)
    if any(isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct) for array in scales):
        return None
    floats = [array for array in scales if jnp.issubdtype(array.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(array).all() for array in floats]).all()


def _axis(shape: tuple[int, ...], scheme: Scheme) -> int:
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
