"""A different adapter for every row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora._tree import PyTree
from jlora.multi_lora.slots import Slots, select_slot
from jlora.transform import LoraTransform


def apply_per_example(
    lora: LoraTransform,
    params: PyTree,
    slots: Slots,
    index: Any,
    *inputs: Any,
    batch_axes: Any = 0,
    **kwargs: Any,
) -> Any:
    """What the model returns where every row has the adapter of its own slot.

    The model runs under `jax.vmap` over rows, each a batch of one, with parameters and slots left
    out of it: products with the base are those of the whole batch, and only small factors differ.
    Rows of slot 0 are those of the base, to the bit.

    Args:
        lora: Around the model.
        params: The base.
        slots: Of all adapters.
        index: (rows,) integers. In a traced program they are not checked: rows whose slot does not
            exist are NaN.
        *inputs: Arrays with one entry for each row, and what all rows share.
        batch_axes: Along which axis of each input the rows are; None where all share it. A prefix of
            the inputs' tree, as `in_axes` of `jax.vmap`. Numbers without axes are always shared.
        **kwargs: As `lora.apply` takes them; shared.

    Raises:
        ValueError: When an input has another number of rows.
    """
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index of shape {index.shape} and type {index.dtype} is not one slot for each row. "
            f"Give integers (rows,)."
        )
    flat, treedef = jax.tree.flatten(inputs)
    axes = _resolve_batch_axes(batch_axes, inputs, flat, index.shape[0])

    def whole(index: Any, leaves: Sequence[Any]) -> Any:
        adapter = select_slot(slots, index)
        return lora.apply(params, adapter, *jax.tree.unflatten(treedef, leaves), **kwargs)

    def shapes(rows: int) -> Any:
        leaves = [
            _resize_batch_axis(leaf, axis, rows) for leaf, axis in zip(flat, axes, strict=True)
        ]
        arrays = [leaf for leaf in leaves if _tree.is_array(leaf)]

        def run(arrays: Sequence[Any]) -> Any:
            following = iter(arrays)
            filled = [next(following) if _tree.is_array(leaf) else leaf for leaf in leaves]
            return whole(jnp.int32(0), filled)

        return jax.eval_shape(run, arrays)

    out_axes = jax.tree.map(_find_batch_axis, shapes(1), shapes(2))
    places, outdef = jax.tree.flatten(out_axes, is_leaf=lambda axis: axis is None)
    mapped = [leaf for leaf, axis in zip(flat, axes, strict=True) if axis is not None]

    def alone(index: Any, rows: Sequence[Any]) -> list[Any]:
        following = iter(rows)
        leaves = [
            leaf if axis is None else jnp.expand_dims(next(following), axis)
            for leaf, axis in zip(flat, axes, strict=True)
        ]
        outputs = outdef.flatten_up_to(whole(index, leaves))
        return [
            output if axis is None else jnp.squeeze(output, axis)
            for output, axis in zip(outputs, places, strict=True)
        ]

    moving = [axis for axis in axes if axis is not None]
    run = jax.vmap(alone, in_axes=(0, moving), out_axes=places)
    return jax.tree.unflatten(outdef, run(index, mapped))


def infer_batch_axes(make_arrays: Callable[[int], PyTree]) -> PyTree:
    """Along which axis of each array the rows are, None where they are along none.

    Args:
        make_arrays: From a number of rows to arrays, such as a cache of keys and values:
            `lambda rows: models.empty_cache(model, rows, 64)`.
    """
    shapes = [jax.eval_shape(lambda rows=rows: make_arrays(rows)) for rows in (1, 2)]
    return jax.tree.map(_find_batch_axis, *shapes)


def check_slot_index(index: Any, slots: Slots, batch_size: int | None = None) -> np.ndarray:
    """The index as NumPy integers, each of which is the number of a slot.

    Args:
        index: (rows,), concrete.
        slots: Of all adapters.
        batch_size: How many rows there are; any number when left out.

    Raises:
        ValueError: One is negative or too large, or their number is another.
        TypeError: They are no integers.
    """
    found = np.asarray(index)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"index holds {found.dtype}. Give the integers of slots, one for each row.")
    if found.ndim != 1 or batch_size not in (None, len(found)):
        raise ValueError(
            f"index has shape {found.shape}, for {batch_size} rows. Give one slot for each row."
        )
    count = next(iter(slots.values())).slots
    bad = np.flatnonzero((found < 0) | (found >= count))
    if bad.size:
        raise ValueError(
            f"index[{bad[0]}]={found[bad[0]]} is none of the slots 0 to {count - 1}. On a device "
            f"the row would be NaN."
        )
    return found.astype(np.int32)


def _resolve_batch_axes(
    batch_axes: Any, inputs: Any, flat: Sequence[Any], batch_size: int
) -> list[int | None]:
    """The row axis of every leaf."""
    prefix = jax.tree.broadcast(batch_axes, inputs, is_leaf=lambda axis: axis is None)
    axes = jax.tree.leaves(prefix, is_leaf=lambda axis: axis is None)
    found: list[int | None] = []
    for number, (leaf, axis) in enumerate(zip(flat, axes, strict=True)):
        if axis is None or not _tree.is_array(leaf) or not leaf.ndim:
            found.append(None)
            continue
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != batch_size:
            raise ValueError(
                f"Leaf {number} of the inputs has shape {leaf.shape}, and its axis {axis} is not "
                f"one of {batch_size} rows, as many as index has. Say where its rows are with row_axes, "
                f"or None for what all rows share."
            )
        found.append(axis % leaf.ndim)
    return found


def _resize_batch_axis(leaf: Any, axis: int | None, batch_size: int) -> Any:
    if axis is None:
        return leaf
    shape = (*leaf.shape[:axis], batch_size, *leaf.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _find_batch_axis(first: Any, second: Any) -> int | None:
    """The axis along which two shapes differ."""
    differs = [
        axis for axis, (n, m) in enumerate(zip(first.shape, second.shape, strict=True)) if n != m
    ]
    if len(differs) > 1:
        raise ValueError(
            f"An output has shape {first.shape} for one row and {second.shape} for two: its rows are "
            f"along several axes, so a row's own part cannot be told. Return it another way."
        )
    return differs[0] if differs else None
