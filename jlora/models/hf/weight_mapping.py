"""Mapping between the weights of a model and the tensors of a checkpoint, in both directions.

A weight may be one tensor with transposed axes, a stack of the tensors of many layers or experts,
or several concatenated tensors. In each case it is a set of slices, and every slice is one tensor:

    weight[start_indices[0] : start_indices[0] + slice_sizes[0], ...]
        == tensor.transpose(axis_order).reshape(slice_sizes)
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

from jlora._mesh import fit_sharding
from jlora._quantized_array import get_component_shardings
from jlora.checkpoints.safetensors_io import FLOAT_DTYPES, CheckpointReader, format_names
from jlora.checkpoints.stored_weight import StoredWeight
from jlora.quantization.qarray import QArray
from jlora.quantization.quantize import choose_block_axis, quantize_weight
from jlora.quantization.schemes import QuantizationScheme

Sharding = jax.sharding.Sharding


class TensorSlice(NamedTuple):
    """Slice of a weight that one tensor of a checkpoint fills.

    Attributes:
        key: Name of the tensor.
        axis_order: Axis of the tensor for each axis of the slice, without the stack axes.
        start_indices: Start of the slice along each axis of the weight.
        slice_sizes: Size of the slice along each axis of the weight; 1 for stack axes, which come
            first.
    """

    key: str
    axis_order: tuple[int, ...]
    start_indices: tuple[int, ...]
    slice_sizes: tuple[int, ...]

    @property
    def num_stack_axes(self) -> int:
        """Number of leading axes of the weight that stack layers or experts."""
        return len(self.slice_sizes) - len(self.axis_order)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        sizes = self.slice_sizes[self.num_stack_axes :]
        return tuple(sizes[self.axis_order.index(axis)] for axis in range(len(self.axis_order)))

    def to_weight_layout(self, tensor: Any) -> Any:
        """Transposes and reshapes the tensor to the slice of the weight."""
        return tensor.transpose(self.axis_order).reshape(self.slice_sizes)

    def to_tensor(self, array: Any) -> Any:
        """Inverse of `to_weight_layout`."""
        transposed = array.reshape(self.slice_sizes[self.num_stack_axes :])
        return transposed.transpose(tuple(int(i) for i in np.argsort(self.axis_order)))


class CheckpointWeight(NamedTuple):
    """A weight of the model and the tensors that fill it.

    Attributes:
        shape: Shape of the weight in the model.
        slices: Slices that cover the weight.
    """

    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]


def single_tensor_weight(
    key: str, shape: Sequence[int], axis_order: Sequence[int] | None = None
) -> CheckpointWeight:
    """Returns a weight that is one tensor.

    Args:
        key: Name of the tensor.
        shape: Shape of the weight.
        axis_order: Axis of the tensor for each axis of the weight. None: the same axes.

    Example:
        >>> from jlora.models import single_tensor_weight
        >>> single_tensor_weight("proj.weight", (4, 3), (1, 0)).shape
        (4, 3)
    """
    shape = tuple(shape)
    axes = tuple(axis_order) if axis_order is not None else tuple(range(len(shape)))
    return CheckpointWeight(shape, (TensorSlice(key, axes, (0,) * len(shape), shape),))


def stack_weights(weights: Sequence[CheckpointWeight]) -> CheckpointWeight:
    """Stacks weights of one shape along a new first axis.

    Args:
        weights: One weight for each layer.

    Example:
        >>> from jlora import models
        >>> layers = [models.single_tensor_weight(f"{n}.weight", (4, 3)) for n in range(2)]
        >>> models.stack_weights(layers).shape
        (2, 4, 3)
    """
    slices = [
        part._replace(
            start_indices=(index, *part.start_indices), slice_sizes=(1, *part.slice_sizes)
        )
        for index, weight in enumerate(weights)
        for part in weight.slices
    ]
    return CheckpointWeight((len(weights), *weights[0].shape), tuple(slices))


def concatenate_weights(weights: Sequence[CheckpointWeight], axis: int = -1) -> CheckpointWeight:
    """Concatenates weights along an axis.

    Args:
        weights: Parts that the checkpoint has apart, in their order.
        axis: Axis of the weight.

    Example:
        >>> from jlora import models
        >>> parts = [models.single_tensor_weight(f"{n}.weight", (4, 3)) for n in ("gate", "up")]
        >>> models.concatenate_weights(parts).shape
        (4, 6)
    """
    shape = list(weights[0].shape)
    axis %= len(shape)
    slices, offset = [], 0
    for weight in weights:
        for part in weight.slices:
            start_indices = list(part.start_indices)
            start_indices[axis] += offset
            slices.append(part._replace(start_indices=tuple(start_indices)))
        offset += weight.shape[axis]
    shape[axis] = offset
    return CheckpointWeight(tuple(shape), tuple(slices))


def check_checkpoint_tensors(
    reader: CheckpointReader,
    weights: Mapping[str, CheckpointWeight],
    passthrough_pattern: re.Pattern[str],
) -> None:
    """Raises an error for a checkpoint that does not consist of the tensors of the weights.

    Args:
        reader: Reader of the checkpoint.
        weights: Weights of the model, by path.
        passthrough_pattern: Names of tensors that the model does not use.

    Raises:
        ValueError: Tensors are missing, unknown, or of another shape or dtype; their names are
            listed.
    """
    slices = {part.key: part for weight in weights.values() for part in weight.slices}
    problems = [f"{key} is missing" for key in slices if key not in reader.headers]
    problems += [
        f"{key} is unknown"
        for key in reader.headers
        if key not in slices and not passthrough_pattern.fullmatch(key)
    ]
    for key, part in slices.items():
        header = reader.headers.get(key)
        if header is None:
            continue
        if header.shape != part.tensor_shape:
            problems.append(f"{key} has shape {header.shape} instead of {part.tensor_shape}")
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
    """Reads the weights one tensor at a time, as arrays on their devices.

    The host never stores more than one tensor, and only the shards of its devices.

    Args:
        reader: Reader of the checkpoint, which `check_checkpoint_tensors` has checked.
        weights: Weights to load, by path.
        dtype: dtype of all weights. None: that of the files.
        sharding: Function from the path and shape of a weight to its sharding; it may return None
            for JAX's default device.
        schemes: Quantization schemes of weights, by path. One layer (one expert) of these is on
            the devices without quantization at a time.

    Returns:
        Arrays and quantized weights, by path.

    Raises:
        ValueError: The dtype is not a supported floating-point type.
    """
    if dtype is not None and jnp.dtype(dtype).name not in _LOADABLE_DTYPES:
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name} must be one of {', '.join(_LOADABLE_DTYPES)}."
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
    dtype, target_sharding = _weight_dtype_and_sharding(reader, weight, dtype, sharding)
    if len(weight.slices) == 1:
        array = _load_tensor_slice(reader, weight.slices[0], target_sharding)
        return array if array.dtype == dtype else _cast_tensor_slice(array, dtype)
    array = _compile_zeros(weight.shape, dtype, target_sharding)()
    for part in weight.slices:
        update = _load_tensor_slice(reader, part, fit_sharding(target_sharding, part.slice_sizes))
        array = _write_tensor_slice(array, update, part.start_indices)
        # The update may be in the memory that the tensor was read to.
        jax.block_until_ready(array)
    return array


@functools.lru_cache(maxsize=1024)
def _compile_zeros(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding
) -> Callable[[], jax.Array]:
    """Returns a compiled function that fills an array with zeros on its devices.

    It is cached, because a model has many weights of the same shape, dtype and sharding.
    """
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def stored_dtype(
    reader: CheckpointReader, weight: CheckpointWeight, dtype: jax.typing.DTypeLike | None
) -> Any:
    """Returns the dtype of a loaded weight: the requested one, or that of its tensors."""
    stored = [FLOAT_DTYPES[reader.headers[part.key].dtype] for part in weight.slices]
    return jnp.dtype(functools.reduce(jnp.promote_types, stored) if dtype is None else dtype)


def _weight_dtype_and_sharding(
    reader: CheckpointReader,
    weight: CheckpointWeight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> tuple[Any, Sharding]:
    """Returns the dtype and the sharding of a weight on its devices."""
    dtype = stored_dtype(reader, weight, dtype)
    target_sharding = sharding(jax.ShapeDtypeStruct(weight.shape, dtype))
    return dtype, target_sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _load_quantized_weight(
    scheme: QuantizationScheme,
    reader: CheckpointReader,
    weight: CheckpointWeight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> QArray:
    """Reads a weight and quantizes it layer by layer (expert by expert)."""
    weight_dtype, target_sharding = _weight_dtype_and_sharding(reader, weight, dtype, sharding)
    num_stack_axes = weight.slices[0].num_stack_axes
    layers: dict[tuple[int, ...], list[TensorSlice]] = {}  # By index along the stack axes.
    for part in weight.slices:
        layer_index = part.start_indices[:num_stack_axes]
        start_indices = (0,) * num_stack_axes + part.start_indices[num_stack_axes:]
        layers.setdefault(layer_index, []).append(part._replace(start_indices=start_indices))
    layer_shape = (1,) * num_stack_axes + weight.shape[num_stack_axes:]
    layer_sharding = fit_sharding(target_sharding, layer_shape)
    abstract = abstract_quantized_weight(weight, weight_dtype, scheme)
    quantized = jax.tree.map(
        lambda array, sharding: _compile_zeros(array.shape, array.dtype, sharding)(),
        abstract,
        get_component_shardings(abstract, target_sharding),
    )
    for layer_index, slices in layers.items():
        layer_weight = CheckpointWeight(layer_shape, tuple(slices))
        layer = _load_weight(reader, layer_weight, weight_dtype, lambda _: layer_sharding)
        start_indices = layer_index + (0,) * (len(layer_shape) - num_stack_axes)
        write = functools.partial(_write_tensor_slice, start_indices=start_indices)
        quantized = jax.tree.map(write, quantized, quantize_weight(layer, scheme, abstract.axis))
    return quantized


def abstract_quantized_weight(
    weight: CheckpointWeight, dtype: jax.typing.DTypeLike, scheme: QuantizationScheme
) -> QArray:
    """Returns the abstract value of a quantized weight: its quantized layers, stacked."""
    axis = choose_block_axis(weight.shape[weight.slices[0].num_stack_axes :], scheme)
    return quantize_weight(jax.ShapeDtypeStruct(weight.shape, dtype), scheme, axis)


def _load_tensor_slice(
    reader: CheckpointReader, tensor_slice: TensorSlice, sharding: Sharding
) -> jax.Array:
    """Reads a slice of a weight to its devices; each process reads the shards of its devices."""
    num_stack_axes, axis_order = tensor_slice.num_stack_axes, tensor_slice.axis_order

    def read_shard(index: Any) -> np.ndarray:
        index = index[num_stack_axes:]
        tensor_index = tuple(index[axis_order.index(axis)] for axis in range(len(axis_order)))
        shard = reader.read(tensor_slice.key, tensor_index, axis_order)
        return shard.reshape((1,) * num_stack_axes + shard.shape)

    return jax.make_array_from_callback(tensor_slice.slice_sizes, sharding, read_shard)


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
    """Returns the dtype and shape of every tensor of the weights, by name."""
    return {
        part.key: (get_dtype(part.key), part.tensor_shape)
        for weight in weights.values()
        for part in weight.slices
    }


def make_tensor_getter(
    weights: Mapping[str, CheckpointWeight], arrays: Mapping[str, Any]
) -> Callable[[str], np.ndarray]:
    """Returns a function from the name of a tensor to the tensor.

    Each call copies one tensor from the model's arrays to the host. A stored weight is read when
    its first tensor is needed, and kept until its last one.

    Args:
        weights: Weights of the model, by path.
        arrays: Arrays of the weights, by path.

    Example:
        >>> import flax.traverse_util, jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> model = models.Decoder(config)
        >>> params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
        >>> arrays = flax.traverse_util.flatten_dict(params, sep="/")
        >>> get_tensor = models.make_tensor_getter(models.checkpoint_mapping(model)[0], arrays)
        >>> get_tensor("model.layers.0.mlp.up_proj.weight").shape
        (16, 8)
    """
    slices = {part.key: (path, part) for path, weight in weights.items() for part in weight.slices}
    last: dict[str, Any] = {}  # The weight that was read last: its other tensors follow.

    def get_tensor(key: str) -> np.ndarray:
        path, part = slices[key]
        array = arrays[path]
        if isinstance(array, StoredWeight):
            if path not in last:
                last.clear()
                last[path] = array.read()
            array = last[path]
            if part.key == weights[path].slices[-1].key:
                last.clear()
        if part.slice_sizes != weights[path].shape:
            sizes = zip(part.start_indices, part.slice_sizes, strict=True)
            array = array[tuple(slice(start, start + size) for start, size in sizes)]
        return part.to_tensor(np.asarray(jax.device_get(array)))

    return get_tensor
