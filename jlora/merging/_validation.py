"""Checks on adapters that are to be combined or compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jlora import _tree
from jlora._delta import depends_on_base
from jlora._tree import PyTree
from jlora.adapters.base import AdapterLeaf, get_adapter_leaves, get_array_fields, weight_indices
from jlora.adapters.layer_layout import match_layer_layout, name_layers, unstack_layers
from jlora.adapters.lora_moe import LoRAMoELeaf

Adapter = Mapping[str, Any]


def check_adapters(adapters: Any) -> None:
    """Checks that adapters belong to one model and that their weight updates can be added.

    Raises:
        TypeError: `adapters` is not a sequence, or an entry is not an adapter.
        ValueError: The sequence is empty, or no adapter has a leaf; an adapter is a mixture of
            experts, belongs on a residual base, has a non-finite entry or an array of the wrong
            shape; or two adapters differ in the shape or axes of a weight.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Sequence):
        raise TypeError(
            f"adapters must be a list of adapters, got {type(adapters).__name__}. Pass a list, "
            f"such as [first, second]."
        )
    if not adapters:
        raise ValueError("adapters=[] must have at least one adapter. Pass one or more.")
    if not any(adapters):
        raise ValueError("All adapters are empty: they adapt no weight. Pass trained adapters.")
    first_leaves: dict[str, tuple[int, AdapterLeaf]] = {}
    for index, adapter in enumerate(adapters):
        _check_adapter_shapes(adapter)
        for path, leaf in get_adapter_leaves(adapter).items():
            _check_mergeable_leaf(index, path, leaf)
            first_index, first = first_leaves.setdefault(path, (index, leaf))
            if (first.shape, first.axes) != (leaf.shape, leaf.axes):
                raise ValueError(
                    f"adapters[{first_index}] and adapters[{index}] adapt different weights under "
                    f"the path {path!r}: shape {first.shape} with {first.axes}, and shape "
                    f"{leaf.shape} with {leaf.axes}. Pass adapters of one model, loaded with the "
                    f"same layout of layers."
                )
        for path, node in adapter.items():
            for field in get_array_fields(node):
                _check_leaf_array_finite(
                    f"adapters[{index}][{path!r}].{field.name}", node, field.name
                )


def unify_layer_layouts(
    adapters: Sequence[Adapter], params: PyTree | None = None
) -> list[dict[str, Any]]:
    """Returns adapters whose layers have one layout: that of params, or else separate if any is.

    Raises:
        ValueError: An adapter does not fit `params`; or `params` is None, one adapter has a stack
            and another only some of its layers, which may as well be weights beside the stack.
    """
    if params is not None:
        return [match_layer_layout(adapter, params) for adapter in adapters]
    unstacked = [unstack_layers(adapter) for adapter in adapters]
    same = [set(adapter) == set(other) for adapter, other in zip(adapters, unstacked, strict=True)]
    if len(set(same)) < 2:
        return [dict(adapter) for adapter in adapters]
    for path, layers in _separated_stacks(adapters, unstacked):
        for adapter in adapters:
            missing = [layer for layer in layers if layer not in adapter]
            if 0 < len(missing) < len(layers):
                raise ValueError(
                    f"One adapter has {path!r}, and another some of its layers but not "
                    f"{missing[0]!r}: they may be other weights. Convert both to one layout first, "
                    f"with jlora.adapters.match_layer_layout(adapter, params)."
                )
    return unstacked


def _separated_stacks(
    adapters: Sequence[Adapter], unstacked: Sequence[Adapter]
) -> Iterator[tuple[str, list[str]]]:
    """Yields the paths of stacks that were separated, with the paths of their layers."""
    for adapter, separate in zip(adapters, unstacked, strict=True):
        for path, layers in name_layers(adapter).items():
            if path in adapter and path not in separate:
                yield path, list(layers)


def collect_bases(adapters: Iterable[Adapter], params: PyTree | None) -> dict[str, Any]:
    """Returns the base of each weight whose update depends on it, by path.

    Raises:
        ValueError: Such a weight exists and `params` is None or belongs to another model.
    """
    flat = None if params is None else _tree.flatten_with_paths(params)
    bases: dict[str, Any] = {}
    for index, adapter in enumerate(adapters):
        positions = {} if flat is None else weight_indices(flat, adapter)
        for path, leaf in get_adapter_leaves(adapter).items():
            if not depends_on_base(adapter, path):
                continue
            if flat is None:
                raise ValueError(
                    f"params=None: the update of {path!r} in adapters[{index}] depends on the "
                    f"weight itself (family {leaf.family!r}). Pass params, the base that the "
                    f"adapter was trained on."
                )
            bases[path] = flat.leaves[positions[path]]
    return bases


def _check_adapter_shapes(adapter: Any) -> None:
    """Checks an adapter's arrays against its own metadata, as `weight_indices` does for params."""
    leaves = get_adapter_leaves(adapter) if isinstance(adapter, Mapping) else {}
    shapes = [jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in leaves.values()]
    weight_indices(_tree.FlatTree(tuple(leaves), shapes, None), adapter)


def _check_mergeable_leaf(index: int, path: str, leaf: AdapterLeaf) -> None:
    if isinstance(leaf, LoRAMoELeaf):
        raise ValueError(
            f"adapters[{index}] has a mixture of experts on {path!r}, whose update depends on the "
            f"input and has no weight matrix. Leave that part out, or apply the mixture by itself."
        )
    if getattr(leaf, "residual", False):
        raise ValueError(
            f"adapters[{index}] belongs on a residual base at {path!r}: its factors were "
            f"initialized from a part of the weight. Convert it with jlora.rebase_to_original."
        )


def _check_leaf_array_finite(name: str, node: Any, field: str) -> None:
    value = getattr(node, field)
    if value is None or isinstance(value, Tracer):
        return
    if not np.isfinite(np.asarray(value).astype(np.float32)).all():
        raise ValueError(
            f"{name} has NaN or infinite entries, which would spread to every result. Go back to "
            f"a checkpoint from before the training diverged."
        )
