"""Conversion of adapters between stacked layers and separate ones.

A scan keeps the weights of all layers in one array, `layers/mlp/up/kernel`, where a model without a
scan has `layers_0/mlp/up/kernel`, `layers_1/mlp/up/kernel`, ... Files name layers one by one, so
that they fit both. Stacks of stacks, `layers/layers/kernel`, have an index for each level.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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

# A number after it is an index of a list of separate layers.
_STACKED = re.compile(r"(?:^|(?<=/))layers(?=/|$)(?!/[0-9]+(?:/|$))")
_SEPARATE = re.compile(r"layers_(0|[1-9][0-9]{0,8})")


class LayerPlace(NamedTuple):
    """The weight of a layer: a stack with the layer's index at every level, or a weight alone.

    Attributes:
        path: Path of the weight.
        indices: Indices along the weight's first axes; empty for a weight alone.
    """

    path: str
    indices: tuple[int, ...]


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
    others = {path: leaf for path, leaf in leaves.items() if path not in shapes}
    if not others:
        return dict(adapter)
    matched = {path: node for path, node in adapter.items() if path not in others}
    layers_by_path = unstack_leaves(others, matched)
    for path in [path for path in layers_by_path if path in layers_by_path[path]]:
        if _count_levels(path, others[path]):  # A stack whose layers have the names of others.
            matched[path] = layers_by_path.pop(path)[path]
    names = [name for layers in layers_by_path.values() for name in layers]
    places = locate_layers([*matched, *names], shapes)
    members: dict[str, dict[tuple[int, ...], AdapterLeaf]] = {}  # By the path of the stack.
    for path, layers in layers_by_path.items():
        if not any(name in places for name in layers):
            matched[path] = leaves[path]
            continue
        for name, leaf in layers.items():
            place = places.get(name, LayerPlace(name, ()))
            if place.indices:
                layers_of_stack = members.setdefault(place.path, {})
                if place.indices in layers_of_stack:
                    raise ValueError(_overlap_error(place.path, layers_of_stack))
                layers_of_stack[place.indices] = leaf
            else:
                matched[name] = leaf
    for path, layers in members.items():
        if path in matched:
            raise ValueError(_overlap_error(path, layers))
        matched[path] = _stack_levels(path, layers, shapes[path])
    return matched


def locate_layers(
    names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LayerPlace]:
    """Returns the places of the layers of an adapter among weights; none for a layer without one.

    A name that is the path of a weight is that weight.

    Args:
        names: Paths of separate layers, and of weights in no layer.
        shapes: Shapes of the weights of a base by path.

    Raises:
        ValueError: A layer may be a part of two weights.
    """
    names = list(names)
    prefixes = _path_prefixes(shapes)

    def find(name: str) -> list[LayerPlace]:
        found = _find_places(name, prefixes, shapes)
        has_room = [
            all(index < size for index, size in zip(indices, shapes[path], strict=False))
            for path, indices in found
        ]
        return [place for place, fits in zip(found, has_room, strict=True) if fits] or found

    places: dict[str, LayerPlace] = {}
    for name in names:
        found = [LayerPlace(name, ())] if name in shapes else find(name)
        if len(found) > 1:
            raise ValueError(_place_error(name, found))
        if found:
            places[name] = found[0]
    filled: dict[str, set[tuple[int, ...]]] = {}
    for path, indices in places.values():
        if indices:
            filled.setdefault(path, set()).add(indices)

    def is_missing(place: LayerPlace) -> bool:
        """Whether a stack has other layers of the adapter, and not this one."""
        starts = {place.indices[: level + 1] for level in range(len(place.indices))}
        return bool(starts) and place.path in filled and not starts & filled[place.path]

    for name in names if filled else ():
        found = find(name) if name in shapes else []
        if any(map(is_missing, found)):
            raise ValueError(_place_error(name, found))
    return places


def unstack_layers(adapter: Mapping[str, Any], kept: Collection[str] = ()) -> dict[str, Any]:
    """Returns an adapter with a leaf for every layer, whatever the layout of its layers is.

    A stack stays as it is where a layer of it has the name of another weight of the adapter.

    Args:
        adapter: Adapter of any layout.
        kept: Paths of further stacks that stay as they are.
    """
    layers_by_path = unstack_leaves(adapter)
    unstacked: dict[str, Any] = {}
    for path, node in adapter.items():
        unstacked |= {path: node} if path in kept else layers_by_path.get(path, {path: node})
    return unstacked


def unstack_leaves(
    adapter: Mapping[str, Any], base_paths: Collection[str] = ()
) -> dict[str, dict[str, AdapterLeaf]]:
    """Returns the leaves of the layers of every leaf by path, as `name_layers` names them."""
    return {
        path: {name: _take_layer(adapter[path], place.indices) for name, place in places.items()}
        for path, places in name_layers(adapter, base_paths).items()
    }


def name_layers(
    adapter: Mapping[str, Any], base_paths: Collection[str] = ()
) -> dict[str, dict[str, LayerPlace]]:
    """Returns the names of the layers of every leaf, with their places in it, by path.

    A stack is named as a whole where a layer of it has the name of another weight.

    Args:
        adapter: Adapter of any layout.
        base_paths: Paths of the weights of its base, also of those that it does not adapt.
    """
    leaves = get_adapter_leaves(adapter)
    named = {path: _name_leaf_layers(path, leaf) for path, leaf in leaves.items()}
    counts = collections.Counter(name for places in named.values() for name in places)
    counts.update(path for path in adapter if path not in named.get(path, ()))
    prefixes = _path_prefixes(base_paths)

    def is_unique(name: str, place: LayerPlace) -> bool:
        found = _find_places(name, prefixes, base_paths)
        return counts[name] == 1 and found in ([], [place])

    return {
        path: places
        if path in places or all(is_unique(*item) for item in places.items())
        else {path: LayerPlace(path, ())}
        for path, places in named.items()
    }


def _name_leaf_layers(path: str, leaf: AdapterLeaf) -> dict[str, LayerPlace]:
    """Returns the places of a leaf's layers by name; that of the leaf itself if it is no stack."""
    places: dict[str, LayerPlace] = {}
    for indices in np.ndindex(*leaf.shape[: _count_levels(path, leaf)]):
        name = path
        for index in indices:
            name = _STACKED.sub(f"layers_{index}", name, count=1)
        places[name] = LayerPlace(path, indices)
    return places


def _count_levels(path: str, leaf: AdapterLeaf) -> int:
    """Returns the number of a leaf's first axes that run over layers."""
    levels = min(len(_STACKED.findall(path)), len(leaf.shape))
    is_full = isinstance(leaf, FullDeltaLeaf)  # Of a weight that may have no roles of axes.
    arrays = [(axes, getattr(leaf, name)) for name, axes in leaf.array_axes().items()]
    for level in range(levels):
        has_entries = [
            axes[: level + 1] == tuple(range(level + 1))
            and array.shape[level : level + 1] == leaf.shape[level : level + 1] != (0,)
            for axes, array in arrays
            if array is not None and level in axes
        ]
        is_batch = is_full or leaf.axes.batch[level : level + 1] == (level,)
        if not has_entries or not all(has_entries) or not is_batch:
            return level
    return levels


def _path_prefixes(paths: Iterable[str]) -> set[str]:
    prefixes: set[str] = set()
    for path in paths:
        while path and path not in prefixes:
            prefixes.add(path)
            path = path.rpartition("/")[0]
    return prefixes


def _find_places(name: str, prefixes: set[str], paths: Collection[str]) -> list[LayerPlace]:
    """Returns the weight of that name, and the stacks that may have a layer of that name."""
    found = [LayerPlace("", ())]
    for part in name.split("/") if prefixes else ():
        options: list[tuple[str, tuple[int, ...]]] = [(part, ())]
        if match := _SEPARATE.fullmatch(part):
            options.append(("layers", (int(match[1]),)))
        found = [
            LayerPlace(path, (*place.indices, *index))
            for place in found
            for key, index in options
            if (path := f"{place.path}/{key}".removeprefix("/")) in prefixes
        ]
    return [place for place in found if place.path in paths]


def _overlap_error(path: str, layers: Collection[tuple[int, ...]]) -> str:
    return (
        f"The adapter has both {path!r} and layers {sorted(layers)[:6]} of it, and params has only "
        f"the stack. Use the base that it was trained on."
    )


def _place_error(name: str, places: Sequence[LayerPlace]) -> str:
    return (
        f"The adapter's {name!r} may be a part of {' or of '.join(repr(p.path) for p in places)}, "
        f"since params has both. Pass the adapter with the paths of params, as init returned it."
    )


def _take_layer(leaf: AdapterLeaf, indices: Sequence[int]) -> AdapterLeaf:
    """Returns the leaf of one layer of a stack, by its index at every level."""
    for index in indices:
        names = [name for name in _stacked_array_names(leaf) if getattr(leaf, name) is not None]
        stack: Any = leaf  # A dataclass.
        leaf = dataclasses.replace(
            stack,
            **{name: getattr(leaf, name)[index] for name in names},
            **_shift_axes(leaf, leaf.shape[1:], -1),
        )
    return leaf


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


def _stack_levels(
    path: str, layers: Mapping[tuple[int, ...], AdapterLeaf], shape: tuple[int, ...]
) -> AdapterLeaf:
    """Returns the leaf of a stack, or of stacks in a stack, from the leaves of its layers."""
    by_index: dict[int, dict[tuple[int, ...], AdapterLeaf]] = {}
    for (index, *rest), leaf in layers.items():
        by_index.setdefault(index, {})[tuple(rest)] = leaf
    if any(() in inner and len(inner) > 1 for inner in by_index.values()):
        raise ValueError(_overlap_error(path, layers))
    stacks = {
        index: inner[()] if () in inner else _stack_levels(path, inner, shape[1:])
        for index, inner in by_index.items()
    }
    return _stack_leaves(path, stacks, shape)


def _stack_leaves(
    path: str, layers: Mapping[int, AdapterLeaf], shape: tuple[int, ...]
) -> AdapterLeaf:
    """Returns the leaf of a stack of this shape from the leaves of its layers, by index."""
    num_layers = shape[0] if shape else 0
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
