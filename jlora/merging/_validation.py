"""What adapters must have in common before they are combined or compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jlora import _tree
from jlora._delta import depends_on_base
from jlora._tree import PyTree
from jlora.adapters.base import AdapterLeaf, get_adapter_leaves, get_array_fields, weight_indices
from jlora.adapters.lora_moe import LoRAMoELeaf

Adapter = Mapping[str, Any]


def check_adapters(adapters: Any) -> None:
    """Checks that these are adapters of one model whose changes can be added up.

    Raises:
        TypeError: When it is no sequence, or one of them is no adapter.
        ValueError: When there is none, when one of them is a mixture, is on a residual base, holds
            a number that is not finite or an array of another shape, or when two of them have other
            shapes or axes for a weight.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Sequence):
        raise TypeError(
            f"adapters={type(adapters).__name__} is no list of adapters. Give a list, such as "
            f"[first, second]."
        )
    if not adapters:
        raise ValueError("adapters=[] leaves nothing to combine. Give at least one.")
    if not any(adapters):
        raise ValueError("The adapters change no weight at all. Give one that was trained.")
    seen: dict[str, tuple[int, AdapterLeaf]] = {}
    for number, adapter in enumerate(adapters):
        _check_adapter_shapes(adapter)
        for path, leaf in get_adapter_leaves(adapter).items():
            _check_mergeable_leaf(number, path, leaf)
            other, first = seen.setdefault(path, (number, leaf))
            if (first.shape, first.axes) != (leaf.shape, leaf.axes):
                raise ValueError(
                    f"adapters[{other}] and adapters[{number}] take {path!r} for different "
                    f"weights: shape {first.shape} with {first.axes}, and {leaf.shape} with "
                    f"{leaf.axes}. Give adapters of one model, loaded with its layers laid out "
                    f"alike."
                )
        for path, node in adapter.items():
            for field in get_array_fields(node):
                _check_leaf_array_finite(
                    f"adapters[{number}][{path!r}].{field.name}", node, field.name
                )


def collect_bases(adapters: Iterable[Adapter], params: PyTree | None) -> dict[str, Any]:
    """The base of each weight whose change depends on it, by path.

    Raises:
        ValueError: When there is such a weight and no params, or params are of another model.
    """
    flat = None if params is None else _tree.flatten_with_paths(params)
    bases: dict[str, Any] = {}
    for number, adapter in enumerate(adapters):
        where = {} if flat is None else weight_indices(flat, adapter)
        for path, leaf in get_adapter_leaves(adapter).items():
            if not depends_on_base(adapter, path):
                continue
            if flat is None:
                raise ValueError(
                    f"adapters[{number}] changes {path!r} by what depends on the weight itself "
                    f"(family {leaf.family!r}), and params=None. Give params, the base that it was "
                    f"trained on."
                )
            bases[path] = flat.leaves[where[path]]
    return bases


def _check_adapter_shapes(adapter: Any) -> None:
    """Checks an adapter's arrays against its own facts, as `places` does against params."""
    leaves = get_adapter_leaves(adapter) if isinstance(adapter, Mapping) else {}
    shapes = [jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in leaves.values()]
    weight_indices(_tree.FlatTree(tuple(leaves), shapes, None), adapter)


def _check_mergeable_leaf(index: int, path: str, leaf: AdapterLeaf) -> None:
    if isinstance(leaf, LoRAMoELeaf):
        raise ValueError(
            f"adapters[{index}] has a mixture on {path!r}, whose change depends on the input and "
            f"is no weight. Leave that part out, or apply the mixture by itself."
        )
    if getattr(leaf, "residual", False):
        raise ValueError(
            f"adapters[{index}] belongs on a residual base at {path!r}: its factors started as a "
            f"part of the weight. Give what jlora.rebase_to_original makes of it."
        )


def _check_leaf_array_finite(name: str, node: Any, field: str) -> None:
    value = getattr(node, field)
    if value is None or isinstance(value, Tracer):
        return
    if not np.isfinite(np.asarray(value).astype(np.float32)).all():
        raise ValueError(
            f"{name} holds NaN or infinity, which every result would. Go back to a checkpoint from "
            f"before the training diverged."
        )
