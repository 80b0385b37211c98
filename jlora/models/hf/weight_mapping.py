"""Weights of a model as pieces that are tensors of a checkpoint, in both directions.

A weight may be one tensor with its axes turned, a stack of the tensors of many layers or experts,
or several tensors side by side. In each case it is a set of boxes, and every box is one tensor:

    weight[starts[0] : starts[0] + box[0], ...] == tensor.transpose(order).reshape(box)
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._quantized_array import get_component_shardings
from jlora._sharding import fit_sharding
from jlora.checkpoints.safetensors_io import FLOAT_DTYPES, CheckpointReader, format_names
from jlora.quantization.qarray import QArray
from jlora.quantization.quantize import choose_block_axis, quantize_weight
from jlora.quantization.schemes import QuantizationScheme

Sharding = jax.sharding.Sharding


class TensorSlice(NamedTuple):
    """One tensor and its place in a weight.

    Attributes:
        key: The tensor's name.
        axis_order: Which axis of the tensor each axis of the box is; those of stacks are left out.
        start_indices: Where the box begins, one per axis of the weight.
        slice_sizes: Its shape, one per axis of the weight; 1 for the axes of stacks, which come first.
    """

    key: str
    axis_order: tuple[int, ...]
    start_indices: tuple[int, ...]
    slice_sizes: tuple[int, ...]

    @property
    def num_stack_axes(self) -> int:
        """How many axes of the weight are stacks."""
        return len(self.slice_sizes) - len(self.axis_order)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        turned = self.slice_sizes[self.num_stack_axes :]
        return tuple(turned[self.axis_order.index(axis)] for axis in range(len(self.axis_order)))

    def to_weight_layout(self, tensor: Any) -> Any:
        """The tensor as the weight lays it out."""
        return tensor.transpose(self.axis_order).reshape(self.slice_sizes)

    def to_tensor(self, array: Any) -> Any:
        """The inverse of `to_weight_layout`."""
        turned = array.reshape(self.slice_sizes[self.num_stack_axes :])
        return turned.transpose(tuple(int(i) for i in np.argsort(self.axis_order)))


class CheckpointWeight(NamedTuple):
    """A weight of the model.

    Attributes:
        shape: As the model has it.
        slices: The boxes that fill it.
    """

    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]


def single_tensor_weight(
    key: str, shape: Sequence[int], axis_order: Sequence[int] | None = None
) -> CheckpointWeight:
    """A weight that is one tensor, with its axes in the order given."""
    axes = tuple(axis_order) if axis_order is not None else tuple(range(len(shape)))
    return CheckpointWeight(
        tuple(shape), (TensorSlice(key, axes, (0,) * len(shape), tuple(shape)),)
    )


def stack_weights(weights: Sequence[CheckpointWeight]) -> CheckpointWeight:
    """Weights of one shape, one upon the other along a new first axis."""
    pieces = [
        piece._replace(
            start_indices=(number, *piece.start_indices), slice_sizes=(1, *piece.slice_sizes)
        )
        for number, weight in enumerate(weights)
        for piece in weight.slices
    ]
    return CheckpointWeight((len(weights), *weights[0].shape), tuple(pieces))


def concatenate_weights(weights: Sequence[CheckpointWeight], axis: int = -1) -> CheckpointWeight:
    """Weights joined along an axis."""
    shape = list(weights[0].shape)
    axis %= len(shape)
    pieces, start = [], 0
    for weight in weights:
        for piece in weight.slices:
            starts = list(piece.start_indices)
            starts[axis] += start
            pieces.append(piece._replace(start_indices=tuple(starts)))
        start += weight.shape[axis]
    shape[axis] = start
    return CheckpointWeight(tuple(shape), tuple(pieces))


def check_checkpoint_tensors(
    reader: CheckpointReader,
    weights: Mapping[str, CheckpointWeight],
    passthrough_pattern: re.Pattern[str],
) -> None:
    """Refuses a checkpoint whose tensors are not those of the weights.

    Args:
        reader: The checkpoint.
        weights: What the model needs.
        passthrough_pattern: The names of tensors that the model can do without.

    Raises:
        ValueError: Names every tensor that is missing, unknown, or of another shape or dtype.
    """
    pieces = {piece.key: piece for weight in weights.values() for piece in weight.slices}
    problems = [f"{key} is missing" for key in pieces if key not in reader.headers]
    problems += [
        f"{key} is unknown"
        for key in reader.headers
        if key not in pieces and not passthrough_pattern.fullmatch(key)
    ]
    for key, piece in pieces.items():
        header = reader.headers.get(key)
        if header is None:
            continue
        if header.shape != piece.tensor_shape:
            problems.append(f"{key} has shape {header.shape} instead of {piece.tensor_shape}")
        if header.dtype not in FLOAT_DTYPES:
            problems.append(f"{key} has dtype {header.dtype}, none of {', '.join(FLOAT_DTYPES)}")
    if problems:
        raise ValueError(
            f"{reader.folder} is not the checkpoint that its config.json describes: "
            f"{format_names(problems)}. Use files that one `save_pretrained` wrote."
        )


_LOADABLE_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_weights(
    reader: CheckpointReader,
    weights: Mapping[str, CheckpointWeight],
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], Sharding | None],
    schemes: Mapping[str, QuantizationScheme] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """The weights as arrays on their devices, read one piece at a time.

    The host holds no more than one piece, and of that only what its devices need.

    Args:
        reader: The checkpoint, checked.
        weights: What to load, by path.
        dtype: Of all weights; each file's own when None.
        sharding: A path and shape to where the weight belongs; JAX's default device when None.
        schemes: How weights are quantised, by path. Of these the devices hold one layer (one
            expert) at a time as it was.

    Raises:
        ValueError: The dtype is none of weights.
    """
    if dtype is not None and jnp.dtype(dtype).name not in _LOADABLE_DTYPES:
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name} would not hold the weights. Use one of "
            f"{', '.join(_LOADABLE_DTYPES)}."
        )
    loaded: dict[str, Any] = {}
    for path, weight in weights.items():
        load = (
            _load_weight
            if path not in schemes
            else functools.partial(_load_quantized_weight, schemes[path])
        )
        loaded[path] = load(reader, weight, dtype, functools.partial(sharding, path))
    return loaded


def _load_weight(
    reader: CheckpointReader,
    weight: CheckpointWeight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> jax.Array:
    dtype, place = _weight_dtype_and_sharding(reader, weight, dtype, sharding)
    if len(weight.slices) == 1:
        return _cast_tensor_slice(_load_tensor_slice(reader, weight.slices[0], place), dtype)
    array = _sharded_zeros(jax.ShapeDtypeStruct(weight.shape, dtype), place)
    for piece in weight.slices:
        box = _load_tensor_slice(reader, piece, fit_sharding(place, piece.slice_sizes))
        array = _write_tensor_slice(array, box, piece.start_indices)
    return array


def _sharded_zeros(like: Any, out_shardings: Any) -> Any:
    zeros = lambda: jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), like)  # noqa: E731
    return jax.jit(zeros, out_shardings=out_shardings)()


def _weight_dtype_and_sharding(
    reader: CheckpointReader,
    weight: CheckpointWeight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> tuple[Any, Sharding]:
    """The type that a weight gets, and where it belongs."""
    stored = [FLOAT_DTYPES[reader.headers[piece.key].dtype] for piece in weight.slices]
    dtype = jnp.dtype(functools.reduce(jnp.promote_types, stored) if dtype is None else dtype)
    place = sharding(jax.ShapeDtypeStruct(weight.shape, dtype))
    return dtype, place or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _load_quantized_weight(
    scheme: QuantizationScheme,
    reader: CheckpointReader,
    weight: CheckpointWeight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> QArray:
    """A weight that is quantised layer by layer (expert by expert), while it is read."""
    kind, place = _weight_dtype_and_sharding(reader, weight, dtype, sharding)
    stacks = weight.slices[0].num_stack_axes
    layers: dict[tuple[int, ...], list[TensorSlice]] = {}
    for piece in weight.slices:
        at, within = piece.start_indices[:stacks], (0,) * stacks + piece.start_indices[stacks:]
        layers.setdefault(at, []).append(piece._replace(start_indices=within))
    shape = (1,) * stacks + weight.shape[stacks:]
    like = abstract_quantized_weight(weight, kind, scheme)
    whole = _sharded_zeros(like, get_component_shardings(like, place))
    for at, pieces in layers.items():
        layer = CheckpointWeight(shape, tuple(pieces))
        array = _load_weight(reader, layer, kind, lambda _: fit_sharding(place, shape))
        starts = at + (0,) * (len(shape) - stacks)
        one = quantize_weight(array, scheme, like.axis)
        whole = jax.tree.map(lambda rest, part: _write_tensor_slice(rest, part, starts), whole, one)  # noqa: B023
    return whole


def abstract_quantized_weight(
    weight: CheckpointWeight, dtype: jax.typing.DTypeLike, scheme: QuantizationScheme
) -> QArray:
    """The shapes of a weight in a scheme, which are those of its layers, stacked."""
    axis = choose_block_axis(weight.shape[weight.slices[0].num_stack_axes :], scheme)
    return quantize_weight(jax.ShapeDtypeStruct(weight.shape, dtype), scheme, axis)


def _load_tensor_slice(
    reader: CheckpointReader, tensor_slice: TensorSlice, sharding: Sharding
) -> jax.Array:
    """A piece on its devices, of which each process reads what its devices hold."""

    def region(index: Any) -> np.ndarray:
        turned = index[tensor_slice.num_stack_axes :]
        wanted = tuple(
            turned[tensor_slice.axis_order.index(axis)]
            for axis in range(len(tensor_slice.axis_order))
        )
        part = reader.read(tensor_slice.key, wanted)
        shape = (1,) * tensor_slice.num_stack_axes + tuple(
            part.shape[axis] for axis in tensor_slice.axis_order
        )
        return part.transpose(tensor_slice.axis_order).reshape(shape)

    return jax.make_array_from_callback(tensor_slice.slice_sizes, sharding, region)


@functools.partial(jax.jit, static_argnums=1)
def _cast_tensor_slice(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _write_tensor_slice(
    array: jax.Array, update: jax.Array, start_indices: tuple[int, ...]
) -> jax.Array:
    return lax.dynamic_update_slice(array, update.astype(array.dtype), start_indices)


def output_tensor_specs(
    weights: Mapping[str, CheckpointWeight], get_dtype: Callable[[str], Any]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The dtype and shape of every tensor that the weights make."""
    return {
        piece.key: (get_dtype(piece.key), piece.tensor_shape)
        for weight in weights.values()
        for piece in weight.slices
    }


def make_tensor_getter(
    weights: Mapping[str, CheckpointWeight], arrays: Mapping[str, Any]
) -> Callable[[str], np.ndarray]:
    """A tensor's name to the tensor, out of the model's arrays; one comes to the host at a time."""
    places = {p.key: (path, p) for path, weight in weights.items() for p in weight.slices}

    def make(key: str) -> np.ndarray:
        path, piece = places[key]
        box = arrays[path]
        if piece.slice_sizes != weights[path].shape:
            sizes = zip(piece.start_indices, piece.slice_sizes, strict=True)
            box = box[tuple(slice(start, start + size) for start, size in sizes)]
        return piece.to_tensor(np.asarray(jax.device_get(box)))

    return make
