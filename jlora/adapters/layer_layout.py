"""Conversion of adapters between stacked layers and separate ones.

A scan keeps the weights of all layers in one array, `layers/mlp/up/kernel`, where a model without a
scan has `layers_0/mlp/up/kernel`, `layers_1/mlp/up/kernel`, ... Files name layers one by one, so
that they fit both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora._tree import PyTree
from jlora.adapters.base import (
    AdapterLeaf,
    get_adapter_leaves,
    get_array_fields,
    static_field_values,
)
from jlora.adapters.full import FullDeltaLeaf
from jlora.adapters.lora import LoRALeaf
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import promote_to_float32

_STACKED = re.compile(r"(?:^|(?<=/))layers(?=/|$)")
_SEPARATE = re.compile(r"(?:^|(?<=/))layers_(\d+)(?=/|$)")


def match_layer_layout(adapter: Mapping[str, Any], params: PyTree) -> dict[str, Any]:
    """Returns an adapter for the layout of the layers in `params`, stacked or separate.

    Leaves that already fit are returned as they are.

    Args:
        adapter: Adapter for layers of either layout, as `init` returns it or trained.
        params: Parameters of the base, or their shapes.

    Raises:
        ValueError: The layers cannot be stacked: their methods or settings differ, or some of them
            have no adapter and the method has none that changes nothing.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.adapters import match_layer_layout
        >>> fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"]["w"])[0]
        >>> params, x = {"layers": {"w": jnp.ones((2, 3, 3))}}, jnp.ones((1, 3))
        >>> adapter = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1)).init(
        ...     jax.random.key(0), params, x
        ... )
        >>> apart = {"layers_0": {"w": jnp.ones((3, 3))}, "layers_1": {"w": jnp.ones((3, 3))}}
        >>> sorted(match_layer_layout(adapter, apart))
        ['layers_0/w', 'layers_1/w']
    """
    flat = _tree.flatten_with_paths(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in zip(flat.paths, flat.leaves, strict=True)}
    return match_weight_shapes(adapter, shapes)


def match_weight_shapes(
    adapter: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Does what `match_layer_layout` does, for the shapes of weights by path."""
    leaves = get_adapter_leaves(adapter)
    if all(path in shapes for path in leaves):
        return dict(adapter)
    matched: dict[str, Any] = {}
    stacks: dict[str, dict[int, AdapterLeaf]] = {}
    for path, node in adapter.items():
        separate = {} if path in shapes or path not in leaves else unstack_leaf(path, node)
        index, stacked_path = split_layer_path(path)
        if path not in shapes and stacked_path in shapes:
            stacks.setdefault(stacked_path, {})[index] = node
        elif separate and any(name in shapes for name in separate):
            matched |= separate
        else:
            matched[path] = node
    for path, layers in stacks.items():
        matched[path] = _stack_leaves(path, layers, shapes[path])
    return matched


def unstack_layers(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an adapter with a leaf for every layer, whatever the layout of its layers is."""
    leaves = get_adapter_leaves(adapter)
    unstacked: dict[str, Any] = {}
    for path, node in adapter.items():
        unstacked |= (unstack_leaf(path, node) if path in leaves else {}) or {path: node}
    return unstacked


def split_layer_path(path: str) -> tuple[int, str]:
    """Returns the index of a separate layer, and the path of the stack; -1 and "" for others."""
    match = _SEPARATE.search(path)
    return (int(match[1]), _SEPARATE.sub("layers", path, count=1)) if match else (-1, "")


def unstack_leaf(path: str, leaf: AdapterLeaf) -> dict[str, AdapterLeaf]:
    """Returns the leaves of the layers of a stack by path; empty for a leaf of no stack."""
    is_stack = leaf.axes.batch[:1] == (0,) or isinstance(leaf, FullDeltaLeaf)
    if not _STACKED.search(path) or not leaf.shape or not is_stack:
        return {}
    names = [name for name in _stacked_array_names(leaf) if getattr(leaf, name) is not None]
    fields = _shift_axes(leaf, leaf.shape[1:], -1)
    stack: Any = leaf  # A dataclass.
    return {
        _STACKED.sub(f"layers_{index}", path, count=1): dataclasses.replace(
            stack, **{name: getattr(leaf, name)[index] for name in names}, **fields
        )
        for index in range(leaf.shape[0])
    }


def _stacked_array_names(leaf: AdapterLeaf) -> list[str]:
    """Returns the arrays of a stacked leaf that have an entry for each layer."""
    return [name for name, axes in leaf.array_axes().items() if axes[:1] == (0,)]


def _shift_axes(leaf: AdapterLeaf, shape: tuple[int, ...], step: int) -> dict[str, Any]:
    """Returns the fields of a leaf that name axes, with a first axis removed (-1) or added (1)."""

    def shift(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis + step for axis in axes if axis + step >= 0)

    has_layer_axis = any(leaf.axes) if step > 0 else leaf.axes.batch[:1] == (0,)
    if not has_layer_axis:  # A full update has no use for the roles of the axes.
        return {"shape": shape, "axes": WeightAxes((), (), ())}
    first = (0,) if step > 0 else ()
    batch, inputs, outputs = map(shift, leaf.axes)
    fields: dict[str, Any] = {"shape": shape, "axes": WeightAxes((*first, *batch), inputs, outputs)}
    values = static_field_values(leaf)
    if "window" in values:
        fields["window"] = shift(values["window"])
    if "scaled_axes" in values:
        fields["scaled_axes"] = (*first, *shift(values["scaled_axes"]))
    return fields


def _stack_leaves(
    path: str, layers: Mapping[int, AdapterLeaf], shape: tuple[int, ...]
) -> AdapterLeaf:
    """Returns the leaf of a stack of this shape from the leaves of its layers, by index."""
    num_layers = shape[0]
    if max(layers) >= num_layers or any(leaf.shape != shape[1:] for leaf in layers.values()):
        raise ValueError(
            f"The adapter has layers {sorted(layers)} of shapes "
            f"{sorted({leaf.shape for leaf in layers.values()})} for {path!r}, which stacks "
            f"{num_layers} layers of shape {shape[1:]}. Use the base that it was trained on."
        )
    if all(type(leaf) is LoRALeaf for leaf in layers.values()):
        layers = _pad_ranks(layers)
    first: Any = layers[min(layers)]  # A dataclass.
    if any(_settings(leaf) != _settings(first) for leaf in layers.values()):
        raise ValueError(_stack_error(path, "their methods or settings differ"))
    missing = [index for index in range(num_layers) if index not in layers]
    if missing and first.family not in _ZERO_FAMILIES:
        raise ValueError(_stack_error(path, f"the layers {missing[:6]} have no adapter"))
    fields = _shift_axes(first, shape, 1)
    stacked_names = _stacked_array_names(dataclasses.replace(first, **fields))
    for field in get_array_fields(first):
        arrays = [getattr(leaf, field.name) for leaf in layers.values()]
        if field.name not in stacked_names:
            if any(
                array is not arrays[0] and not np.array_equal(array, arrays[0]) for array in arrays
            ):
                raise ValueError(_stack_error(path, f"their arrays {field.name!r} differ"))
        elif arrays[0] is not None:
            zeros = jnp.zeros_like(arrays[0])
            by_layer = dict(zip(layers, arrays, strict=True))
            fields[field.name] = jnp.stack(
                [jnp.asarray(by_layer.get(index, zeros)) for index in range(num_layers)]
            )
    return dataclasses.replace(first, **fields)


# Methods that change nothing where their arrays are zero.
_ZERO_FAMILIES = (
    *("lora", "lora_fa", "adalora", "dylora", "sora", "loha", "loha_tucker", "lokr", "vera"),
    *("hira", "fourierft", "lora_moe", "full", "bias"),
)


def _pad_ranks(layers: Mapping[int, Any]) -> dict[int, Any]:
    """Returns LoRA leaves of one rank and one scale, whose products are the same.

    Ranks past a layer's own are zero in both factors, and get no gradient. Where the layers' scales
    differ, `b` is in float32, since a narrow type would round its products with their ratios.
    """
    scalings = {(leaf.rank, leaf.alpha, leaf.use_rslora) for leaf in layers.values()}
    if len(scalings) == 1:
        return dict(layers)
    rank = max(leaf.rank for leaf in layers.values())
    scales = {leaf.scale for leaf in layers.values()}
    scale = max(scales)

    def pad(leaf: Any) -> Any:
        extra = rank - leaf.rank
        a = jnp.pad(leaf.a, [(0, 0)] * (leaf.a.ndim - 1) + [(0, extra)])
        axis = len(leaf.axes.batch)  # The rank axis of b.
        b = jnp.pad(leaf.b, [(0, extra if n == axis else 0) for n in range(leaf.b.ndim)])
        if len(scales) > 1:
            b = promote_to_float32(b) * (leaf.scale / scale)
        return dataclasses.replace(leaf, a=a, b=b, rank=rank, alpha=scale * rank, use_rslora=False)

    return {index: pad(leaf) for index, leaf in layers.items()}


def _settings(leaf: AdapterLeaf) -> tuple[Any, ...]:
    """Returns everything of a leaf but the values of its arrays."""
    arrays = [getattr(leaf, field.name) for field in get_array_fields(leaf)]
    kinds = [None if array is None else (array.shape, array.dtype) for array in arrays]
    return type(leaf), sorted(static_field_values(leaf).items()), kinds


def _stack_error(path: str, reason: str) -> str:
    return (
        f"The layers of {path!r} cannot be stacked: {reason}. Load the model with "
        f"scan_layers=False."
    )
