"""Meshes of devices, and what lies where on them: weights, adapters, optimizer states, batches.

A mesh has three axes. Rows of a batch are split over `data` and `fsdp`; each weight is split over
`fsdp` along the model's width and over `tensor` along its heads, feed-forward or vocabulary. The
compiler gathers what a product needs, one layer at a time under a scan, and sums what comes out.

References:
    Xu et al., GSPMD, arXiv:2105.04663, section 3, for how the compiler completes shardings.
    Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5, for weights split over `fsdp`.
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

BATCH_AXES = ("data", "fsdp")  # What the rows of a batch are split over.

LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # Of one array, an axis of the mesh goes to the first of these names that it has: activations
    # are split by their batch, so that only weights are split by their width.
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("qkv", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # One ragged product takes the rows of all experts; it is split inside each, like a dense one.
    ("experts", None),
    ("layers", None),
    ("length", None),
    ("head_dim", None),
    ("norm", None),
    # Small, or of a length (2 token types, 514 positions, 3 labels) that no mesh divides.
    ("positions", None),
    ("types", None),
    ("pooled", None),
    ("patch_height", None),
    ("patch_width", None),
    ("channels", None),
    ("labels", None),
)

"""From the names that models give their axes to axes of the mesh."""

WeightSpecs = dict[str, PartitionSpec]


def make_mesh(axis_sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`, near neighbours along the last.

    Args:
        axis_sizes: How many devices each axis has. One of them may be -1, which takes those left over;
            `data` does when it is not given, and the others are 1.
        devices: Those of the mesh, which may be of a topology that is not here; all of JAX's when
            left out.

    Raises:
        ValueError: An axis is unknown, a size is none, or the sizes do not make up the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _resolve_mesh_shape(axis_sizes, len(devices))
    try:
        placed = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # An axis that is only a part of one of the torus.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _resolve_mesh_shape(axis_sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """The sizes of all axes, with those left out and -1 filled in."""
    for axis, size in axis_sizes.items():
        if axis not in MESH_AXES:
            raise ValueError(
                f"mesh={dict(axis_sizes)}: {axis!r} is no axis of the mesh. Its axes are {list(MESH_AXES)}."
            )
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"mesh={dict(axis_sizes)}: {axis}={size!r} is no number of devices. Give 1 or more, or "
                f"-1 for those left over."
            )
    rest = [axis for axis, size in axis_sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(
            f"mesh={dict(axis_sizes)}: {rest[0]!r} and {rest[1]!r} cannot both take the devices left "
            f"over. Give -1 to one of them."
        )
    if not rest and "data" not in axis_sizes:
        rest = ["data"]
    given = math.prod(size for size in axis_sizes.values() if size != -1)
    if num_devices % given or (not rest and given != num_devices):
        raise ValueError(
            f"mesh={dict(axis_sizes)} makes up {given} devices, and there are {num_devices}. Give sizes whose "
            f"product is {num_devices}, or -1 to one axis and to the others what divides {num_devices}."
        )
    left = num_devices // given
    return tuple(left if axis in rest else axis_sizes.get(axis, 1) for axis in MESH_AXES)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """A context in which the models' own `with_logical_constraint`s hold on this mesh.

    Functions must be traced in it: call them, or `lower` them, inside. It cannot be entered inside
    a jitted function.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def weight_specs(model: nn.Module, *inputs: Any) -> WeightSpecs:
    """How each weight of a model is split, by its path.

    Args:
        model: Whose weights have axes with names; no weight is made.
        inputs: What it is called with, as arrays or shapes.

    Raises:
        ValueError: The model gives an axis a name that `LOGICAL_AXIS_RULES` does not have.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    named = nn.get_partition_spec(boxed)
    paths = _tree.flatten_with_paths(boxed).paths
    specs = jax.tree.leaves(named, is_leaf=_is_partition_spec)
    return {
        path: _resolve_logical_axes(path, names) for path, names in zip(paths, specs, strict=True)
    }


def _resolve_logical_axes(path: str, logical_axes: PartitionSpec) -> PartitionSpec:
    known = dict(LOGICAL_AXIS_RULES)
    for name in logical_axes:
        if name is not None and name not in known:
            raise ValueError(
                f"The weight {path!r} has an axis named {name!r}, of which RULES does not say how "
                f"it is split. The names that it has are {list(known)}."
            )
    resolved = spmd.logical_to_mesh_axes(tuple(logical_axes), LOGICAL_AXIS_RULES)
    assert resolved is not None
    return PartitionSpec(*resolved)


def make_named_sharding(
    mesh: Mesh, path: str, spec: PartitionSpec, shape: Sequence[int]
) -> NamedSharding:
    """Where an array lies.

    Args:
        mesh: On which.
        path: What errors call it.
        spec: How it is split.
        shape: Its own.

    Raises:
        ValueError: An axis is not divisible by the devices that it is split over.
    """
    for axis, names in enumerate(spec):
        names = () if names is None else (names,) if isinstance(names, str) else names
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[axis] % parts:
            over = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
            raise ValueError(
                f"The weight {path!r} of shape {tuple(shape)} cannot be split: its axis {axis} of "
                f"length {shape[axis]} is not divisible by {over}. Make {' * '.join(names)} a "
                f"divisor of {shape[axis]}, and leave the other devices to another axis."
            )
    return NamedSharding(mesh, spec)


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Checks that the rows of a batch can be shared out.

    Raises:
        ValueError: They cannot.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        below = batch_size - batch_size % parts
        raise ValueError(
            f"A batch of {batch_size} rows cannot be split over data={mesh.shape['data']} * "
            f"fsdp={mesh.shape['fsdp']} = {parts} devices. Use "
            f"{f'{below} or ' if below else ''}{below + parts} rows, or move devices to 'tensor'."
        )


def make_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: rows split, all else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def make_tree_shardings(mesh: Mesh, arrays: Any, specs: Any) -> Any:
    """Where each array of a tree lies, as a tree like it.

    Args:
        mesh: On which.
        arrays: Arrays or shapes.
        specs: A tree like it of how each is split, or a mapping of their paths.

    Raises:
        ValueError: An axis is not divisible by the devices that it is split over.
    """
    flat = _tree.flatten_with_paths(arrays)
    if isinstance(specs, Mapping) and set(specs) == set(flat.paths):
        split = [specs[path] for path in flat.paths]
    else:
        split = jax.tree.leaves(specs, is_leaf=_is_partition_spec)
    places = []
    for path, leaf, spec in zip(flat.paths, flat.leaves, split, strict=True):
        where = make_named_sharding(mesh, path, spec, leaf.shape)
        places.append(
            _quantized_array.get_component_shardings(leaf, where)
            if _quantized_array.is_quantized(leaf)
            else where
        )
    return jax.tree.unflatten(flat.treedef, places)


def adapter_specs(adapter: Mapping[str, Any], weight_shardings: WeightSpecs) -> dict[str, Any]:
    """How each array of an adapter is split: along the weight's axes, like the weight.

    Axes of an array's own, such as the rank, are whole, and so are arrays that weights share.

    Args:
        adapter: What `init` returned, of arrays or shapes.
        weight_shardings: How the weights are split, by path.

    Raises:
        TypeError: When `adapter` is not one.
        ValueError: When `weight_shardings` lacks a path of it.
    """
    check_adapter(adapter)
    return {
        path: _adapter_leaf_specs(path, node, weight_shardings) for path, node in adapter.items()
    }


def _adapter_leaf_specs(path: str, node: Any, weight_shardings: WeightSpecs) -> Any:
    fields = [field.name for field in get_array_fields(node)]
    axes: Mapping[str, Sequence[int | None]] = {}
    spec: tuple[Any, ...] = ()
    if isinstance(node, AdapterLeaf):
        if path not in weight_shardings:
            raise ValueError(
                f"The adapter has {path!r}, of which no spec is given. The nearest paths are "
                f"{_tree.closest_matches(path, weight_shardings)}. Give the specs of the model that it was made for."
            )
        axes = node.array_axes()
        spec = (*weight_shardings[path], *[None] * (len(node.shape) - len(weight_shardings[path])))

    def split(name: str) -> PartitionSpec:
        return PartitionSpec(*(None if n is None else spec[n] for n in axes.get(name, ())))

    held = [name for name in fields if getattr(node, name) is not None]
    return dataclasses.replace(node, **{name: split(name) for name in held})  # type: ignore


def opt_state_specs(opt_state: Any, trainable: Any, trainable_specs: Any) -> Any:
    """How each array of an optimizer's state is split: like the array that it belongs to.

    A moment is held under the keys of its array, whatever else is around it (chains, masks, one
    optimizer per label). Counts, and what has another shape than its array, are whole.

    Args:
        opt_state: What the optimizer's `init` returned, of arrays or shapes.
        trainable: What it was given, of arrays or shapes.
        trainable_specs: How that is split, what `adapter_specs` returned.
    """
    arrays, _ = jax.tree_util.tree_flatten_with_path(trainable)
    split = jax.tree.leaves(trainable_specs, is_leaf=_is_partition_spec)
    known = {keys: (array.shape, spec) for (keys, array), spec in zip(arrays, split, strict=True)}

    def like(keys: tuple[Any, ...], held: Any) -> PartitionSpec:
        for start in range(len(keys)):
            shape, spec = known.get(keys[start:], (None, None))
            if spec is not None and shape == held.shape:
                return spec
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(like, opt_state)


def _is_partition_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
