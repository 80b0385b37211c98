"""Device meshes and sharding specs for weights, adapters, optimizer states and batches.

A mesh has three axes. Batches are split over `data` and `fsdp`. Each weight is split over `fsdp`
along the hidden size of the model, and over `tensor` along its heads, feed-forward or vocabulary.
The compiler gathers the weights of a product, one layer at a time under a scan, and adds partial
results.

References:
    Xu et al., GSPMD, arXiv:2105.04663, section 3: completion of shardings by the compiler.
    Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5: weights split over `fsdp`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.linen import spmd
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora import _quantized_array, _tree
from jlora.adapters.base import AdapterLeaf, check_adapter, get_array_fields

MESH_AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")  # Mesh axes over which batches are split.

# From the logical axis names of models to mesh axes.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # A mesh axis is used for the first of these names in an array: activations are split along the
    # batch, so that only weights are split along "embed".
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("qkv", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # One ragged product has the rows of all experts; it is split inside each, like a dense one.
    ("experts", None),
    ("layers", None),
    ("length", None),
    ("head_dim", None),
    ("norm", None),
    # Small, or of lengths that no mesh divides (2 token types, 514 positions, 3 labels).
    ("positions", None),
    ("types", None),
    ("pooled", None),
    ("patch_height", None),
    ("patch_width", None),
    ("channels", None),
    ("labels", None),
)

WeightSpecs = dict[str, PartitionSpec]


def make_mesh(axis_sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp` and `tensor`; neighbors are along the last.

    Args:
        axis_sizes: Number of devices along each axis. One may be -1, for all remaining devices.
            `data` is -1 if it is left out and no other axis is; the others are 1.
        devices: Devices of the mesh, possibly of a topology that is not attached; None: all
            devices of JAX.

    Raises:
        ValueError: An axis or size is not valid, or the product is not the number of devices.

    Example:
        >>> import jax
        >>> from jlora.training import make_mesh
        >>> mesh = make_mesh({"fsdp": -1})
        >>> mesh.shape["fsdp"] == jax.device_count(), mesh.shape["tensor"]
        (True, 1)
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _resolve_mesh_shape(axis_sizes, len(devices))
    try:
        grid = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # A mesh axis is a part of a physical axis of the torus.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _resolve_mesh_shape(axis_sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of all axes, with omitted ones and -1 filled in."""
    mesh = f"mesh={dict(axis_sizes)}"
    for axis, size in axis_sizes.items():
        if axis not in MESH_AXES:
            raise ValueError(f"{mesh}: unknown axis {axis!r}. Valid axes: {list(MESH_AXES)}.")
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"{mesh}: {axis} must be a positive integer, or -1 for all remaining devices, got "
                f"{size!r}."
            )
    rest = [axis for axis, size in axis_sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"{mesh}: at most one axis may be -1, got {rest[0]!r} and {rest[1]!r}.")
    if not rest and "data" not in axis_sizes:
        rest = ["data"]
    product = math.prod(size for size in axis_sizes.values() if size != -1)
    if num_devices % product or (not rest and product != num_devices):
        raise ValueError(
            f"{mesh} has {product} devices, but {num_devices} are available. Use sizes whose "
            f"product is {num_devices}, or -1 for one axis and divisors of {num_devices} for the "
            f"others. Without data, that axis gets the remaining devices."
        )
    remaining = num_devices // product
    return tuple(remaining if axis in rest else axis_sizes.get(axis, 1) for axis in MESH_AXES)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Context in which the `with_logical_constraint`s of models apply to a mesh.

    Functions must be traced inside: call them, or `lower` them, there. A jitted function cannot
    enter the context.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jlora.training import make_mesh, use_mesh
        >>> mesh = make_mesh({"fsdp": -1})
        >>> with use_mesh(mesh):
        ...     x = nn.with_logical_constraint(jnp.ones((mesh.size, 4)), ("batch", None))
        >>> x.addressable_shards[0].data.shape
        (1, 4)
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def weight_specs(model: nn.Module, *inputs: Any) -> WeightSpecs:
    """Returns the partition spec of each weight of a model, by path.

    Args:
        model: Flax module whose weights have logical axis names. No weight is allocated.
        inputs: Inputs of the model, as arrays or shapes.

    Raises:
        ValueError: `LOGICAL_AXIS_RULES` lacks the name of an axis.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    paths = _tree.flatten_with_paths(boxed).paths
    names = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=_is_partition_spec)
    return {
        path: _resolve_logical_axes(path, axes) for path, axes in zip(paths, names, strict=True)
    }


def _resolve_logical_axes(path: str, logical_axes: PartitionSpec) -> PartitionSpec:
    known = dict(LOGICAL_AXIS_RULES)
    for name in logical_axes:
        if name is not None and name not in known:
            raise ValueError(
                f"The weight {path!r} has an axis named {name!r}, which has no rule. Axes with "
                f"rules: {list(known)}."
            )
    resolved = spmd.logical_to_mesh_axes(tuple(logical_axes), LOGICAL_AXIS_RULES)
    assert resolved is not None
    return PartitionSpec(*resolved)


def make_named_sharding(
    mesh: Mesh, path: str, spec: PartitionSpec, shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array.

    Args:
        mesh: Mesh of the devices.
        path: Name of the array in errors.
        spec: Partition spec of the array.
        shape: Shape of the array.

    Raises:
        ValueError: The length of an axis is not divisible by its number of shards.
    """
    for axis, names in enumerate(spec):
        names = () if names is None else (names,) if isinstance(names, str) else names
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[axis] % parts:
            over = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
            raise ValueError(
                f"The weight {path!r} of shape {tuple(shape)} cannot be sharded: axis {axis} of "
                f"length {shape[axis]} is not divisible by {over}. Make {' * '.join(names)} a "
                f"divisor of {shape[axis]}, and use another axis for the other devices."
            )
    return NamedSharding(mesh, spec)


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Checks that a batch can be split over the mesh.

    Raises:
        ValueError: The batch size is not divisible by `data` times `fsdp`.

    Example:
        >>> from jlora.training import check_batch_size, make_mesh
        >>> mesh = make_mesh({"fsdp": -1})
        >>> check_batch_size(mesh, 4 * mesh.size)
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        below = batch_size - batch_size % parts
        raise ValueError(
            f"The batch size of {batch_size} must be divisible by data={mesh.shape['data']} * "
            f"fsdp={mesh.shape['fsdp']} = {parts} devices. Use "
            f"{f'{below} or ' if below else ''}{below + parts}, or move devices to 'tensor'."
        )


def make_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays (batch, ...): split along the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def make_tree_shardings(mesh: Mesh, arrays: Any, specs: Any) -> Any:
    """Returns the sharding of each array of a tree, as a tree of the same structure.

    Args:
        mesh: Mesh of the devices.
        arrays: Tree of arrays or shapes.
        specs: Tree of partition specs of the same structure, or a mapping from paths.

    Raises:
        ValueError: The length of an axis is not divisible by its number of shards.
    """
    flat = _tree.flatten_with_paths(arrays)
    if isinstance(specs, Mapping) and set(specs) == set(flat.paths):
        flat_specs = [specs[path] for path in flat.paths]
    else:
        flat_specs = jax.tree.leaves(specs, is_leaf=_is_partition_spec)
    shardings = []
    for path, leaf, spec in zip(flat.paths, flat.leaves, flat_specs, strict=True):
        sharding = make_named_sharding(mesh, path, spec, leaf.shape)
        shardings.append(
            _quantized_array.get_component_shardings(leaf, sharding)
            if _tree.is_quantized(leaf)
            else sharding
        )
    return jax.tree.unflatten(flat.treedef, shardings)


def adapter_specs(adapter: Mapping[str, Any], weight_shardings: WeightSpecs) -> dict[str, Any]:
    """Returns the partition specs of an adapter: axes of the weight are split like the weight.

    Other axes, such as the rank, are not split, and neither are arrays that weights share.

    Args:
        adapter: Adapter of `init`, as arrays or shapes.
        weight_shardings: Partition specs of the weights by path.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: `weight_shardings` lacks an adapted weight.
    """
    check_adapter(adapter)
    return {
        path: _adapter_leaf_specs(path, node, weight_shardings) for path, node in adapter.items()
    }


def _adapter_leaf_specs(path: str, node: Any, weight_shardings: WeightSpecs) -> Any:
    fields = [field.name for field in get_array_fields(node)]
    # For each array the axes of the weight, or None for an axis that the weight does not have.
    axes: Mapping[str, Sequence[int | None]] = {}
    spec: tuple[Any, ...] = ()
    if isinstance(node, AdapterLeaf):
        if path not in weight_shardings:
            raise ValueError(
                f"No spec for the adapted weight {path!r}. Nearest: "
                f"{_tree.closest_matches(path, weight_shardings)}. Use the specs of the adapter's "
                f"own model."
            )
        axes = node.array_axes()
        spec = (*weight_shardings[path], *[None] * (len(node.shape) - len(weight_shardings[path])))

    def array_spec(name: str) -> PartitionSpec:
        return PartitionSpec(*(None if n is None else spec[n] for n in axes.get(name, ())))

    names = [name for name in fields if getattr(node, name) is not None]
    return dataclasses.replace(node, **{name: array_spec(name) for name in names})  # type: ignore


def opt_state_specs(opt_state: Any, trainable: Any, trainable_specs: Any) -> Any:
    """Returns the partition specs of an optimizer state: moments are split like their parameters.

    The key path of a moment ends with that of its parameter, also inside chains, masks, and one
    optimizer per label. Counts, and arrays of other shapes, are not split.

    Args:
        opt_state: State of the optimizer's `init`, as arrays or shapes.
        trainable: Trainable arrays or shapes.
        trainable_specs: Partition specs of `trainable`, as from `adapter_specs`.
    """
    arrays, _ = jax.tree_util.tree_flatten_with_path(trainable)
    specs = jax.tree.leaves(trainable_specs, is_leaf=_is_partition_spec)
    by_keys = {keys: (array.shape, spec) for (keys, array), spec in zip(arrays, specs, strict=True)}

    def find_spec(keys: tuple[Any, ...], array: Any) -> PartitionSpec:
        for start in range(len(keys)):
            shape, spec = by_keys.get(keys[start:], (None, None))
            if spec is not None and shape == array.shape:
                return spec
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(find_spec, opt_state)


def _is_partition_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
