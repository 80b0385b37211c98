"""Forward passes in which each example of a batch has its own adapter."""

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
    """Returns the model's outputs with each example computed by the adapter of its own slot.

    The model runs under `jax.vmap` over the examples, each a batch of one. Parameters and slots are
    not mapped, so that products with the base are those of the complete batch and only the small
    factors differ. Outputs of slot 0 are those of the base, bit for bit.

    Args:
        lora: Transform of the model; its rules are not used.
        params: Parameters of the base.
        slots: Factors of all adapters.
        index: (batch,) integers, the slot of each example. They are not checked in a traced
            program: outputs of a slot that does not exist are NaN.
        *inputs: Arrays with one entry for each example, and inputs that all examples share.
        batch_axes: Batch axis of each input; None for inputs that all examples share. A prefix of
            the inputs' tree, as `in_axes` of `jax.vmap`. Scalars are always shared.
        **kwargs: Keyword arguments of `lora.apply`; shared by all examples.

    Raises:
        ValueError: `index` is not one integer for each example, an input has another batch size, or
            an output has several batch axes.

    References:
        A batch of many adapters that shares the products with the base: Chen et al., Punica,
        arXiv:2310.18547; Sheng et al., S-LoRA, arXiv:2311.03285.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((4, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> slots = multi_lora.empty_slots(adapter, slots=2, rank=2)
        >>> slots = multi_lora.set_slot(slots, 1, multi_lora.pad_to_slot(adapter, slots))
        >>> multi_lora.apply_per_example(lora, params, slots, np.array([0, 1, 1, 0]), x).shape
        (4, 2)
    """
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index must be integers of shape (batch,), one slot for each example, got shape "
            f"{index.shape} of type {index.dtype}."
        )
    leaves, treedef = jax.tree.flatten(inputs)
    axes = _resolve_batch_axes(batch_axes, inputs, leaves, index.shape[0])

    def forward(slot: Any, leaves: Sequence[Any]) -> Any:
        adapter = select_slot(slots, slot)
        return lora.apply(params, adapter, *jax.tree.unflatten(treedef, leaves), **kwargs)

    def output_shapes(batch_size: int) -> Any:
        resized = [
            _resize_batch_axis(leaf, axis, batch_size)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        arrays = [leaf for leaf in resized if _tree.is_array(leaf)]

        def forward_arrays(arrays: Sequence[Any]) -> Any:
            remaining = iter(arrays)
            filled = [next(remaining) if _tree.is_array(leaf) else leaf for leaf in resized]
            return forward(jnp.int32(0), filled)

        return jax.eval_shape(forward_arrays, arrays)

    # An output's batch axis is the one whose size follows the batch size.
    out_axes_tree = jax.tree.map(_find_batch_axis, output_shapes(1), output_shapes(2))
    out_axes, outdef = jax.tree.flatten(out_axes_tree, is_leaf=lambda axis: axis is None)
    mapped = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]

    def forward_one(slot: Any, example: Sequence[Any]) -> list[Any]:
        remaining = iter(example)
        batch_of_one = [
            leaf if axis is None else jnp.expand_dims(next(remaining), axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        outputs = outdef.flatten_up_to(forward(slot, batch_of_one))
        return [
            output if axis is None else jnp.squeeze(output, axis)
            for output, axis in zip(outputs, out_axes, strict=True)
        ]

    in_axes = [axis for axis in axes if axis is not None]
    forward_batch = jax.vmap(forward_one, in_axes=(0, in_axes), out_axes=out_axes)
    return jax.tree.unflatten(outdef, forward_batch(index, mapped))


def infer_batch_axes(make_arrays: Callable[[int], PyTree]) -> PyTree:
    """Returns the batch axis of each array; None for arrays whose shape ignores the batch size.

    Args:
        make_arrays: Function from a batch size to arrays, such as a key-value cache:
            `lambda batch_size: models.init_cache(model, batch_size, 64)`. It is traced, not run.

    Raises:
        ValueError: Several axes of an array follow the batch size.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import multi_lora
        >>> make_cache = lambda n: {"keys": jnp.zeros((3, n, 5)), "length": jnp.zeros(())}
        >>> multi_lora.infer_batch_axes(make_cache)
        {'keys': 1, 'length': None}
    """
    shapes = [jax.eval_shape(lambda n=batch_size: make_arrays(n)) for batch_size in (1, 2)]
    return jax.tree.map(_find_batch_axis, *shapes)


def check_slot_index(index: Any, slots: Slots, batch_size: int | None = None) -> np.ndarray:
    """Returns the index as NumPy integers after checking that each is the number of a slot.

    Args:
        index: (batch,), concrete.
        slots: Factors of all adapters.
        batch_size: Expected number of examples. None: not checked.

    Raises:
        ValueError: An entry is negative or too large, or there are not `batch_size` of them.
        TypeError: The entries are not integers.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> slots = multi_lora.empty_slots(adapter, slots=3, rank=2)
        >>> multi_lora.check_slot_index([0, 2], slots)
        array([0, 2], dtype=int32)
    """
    array = np.asarray(index)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"index must be integers, the slot of each example, got {array.dtype}.")
    if array.ndim != 1 or batch_size not in (None, len(array)):
        expected = "(batch,)" if batch_size is None else f"({batch_size},)"
        raise ValueError(
            f"index must have shape {expected}, one slot for each example, got {array.shape}."
        )
    count = next(iter(slots.values())).slots
    invalid = np.flatnonzero((array < 0) | (array >= count))
    if invalid.size:
        raise ValueError(
            f"index[{invalid[0]}]={array[invalid[0]]} must be one of the slots 0 to {count - 1}. "
            f"In a compiled program the outputs of this example would be NaN."
        )
    return array.astype(np.int32)


def _resolve_batch_axes(
    batch_axes: Any, inputs: Any, leaves: Sequence[Any], batch_size: int
) -> list[int | None]:
    """Returns the batch axis of every leaf, counted from the front; None where it is shared."""
    prefix = jax.tree.broadcast(batch_axes, inputs, is_leaf=lambda axis: axis is None)
    axes = jax.tree.leaves(prefix, is_leaf=lambda axis: axis is None)
    resolved: list[int | None] = []
    for number, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        if axis is None or not _tree.is_array(leaf) or not leaf.ndim:
            resolved.append(None)
            continue
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != batch_size:
            raise ValueError(
                f"Leaf {number} of the inputs has shape {leaf.shape}, but its axis {axis} must "
                f"have size {batch_size}, the length of index (of names, for a bank). Give one "
                f"for each example, or set batch_axes to the inputs' batch axes, with None for "
                f"inputs that all examples share."
            )
        resolved.append(axis % leaf.ndim)
    return resolved


def _resize_batch_axis(leaf: Any, axis: int | None, batch_size: int) -> Any:
    if axis is None:
        return leaf
    shape = (*leaf.shape[:axis], batch_size, *leaf.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _find_batch_axis(first: Any, second: Any) -> int | None:
    """Returns the axis along which two shapes differ; None if they are equal."""
    differing = [
        axis for axis, (n, m) in enumerate(zip(first.shape, second.shape, strict=True)) if n != m
    ]
    if len(differing) > 1:
        raise ValueError(
            f"An output must have one batch axis, got shape {first.shape} for a batch of one and "
            f"{second.shape} for a batch of two, which differ along several axes. Return a value "
            f"with one entry for each example."
        )
    return differing[0] if differing else None
