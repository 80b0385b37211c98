"""Parameters of torch modules, and the layouts of PEFT's tensors, in both directions.

A layout is a pair of axis specs, one for the leaf's array and one for the file's tensor. A spec
names the axes in their order:

    i  the weight's inputs, as the leaf orders them      r, q, x, y, v, n  axes of the array alone
    c  its inputs except a convolution's window          u  an axis of length one
    w  the window's axes                                 1  an axis of length one per window axis
    o  its outputs                                       *  joins axes that are flattened into one
    e  stacked weights in one tensor: experts

`c`, `o` and `e` are one axis of a torch tensor, even if the Flax weight has several axes for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.interpreter.terms import WeightAxes
from jlora.models.hf.weight_mapping import CheckpointWeight, TensorSlice

# transformers 5 joins the experts of a mixture into two parameters of one module, whichever names
# its checkpoint has.
_EXPERT_KEY = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")

_EXPERT_PARAMETERS = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}


class ModuleParameter(NamedTuple):
    """One parameter of a torch module, and its place in the Flax model.

    Attributes:
        module: Name of the module.
        name: "weight", "bias", or "gate_up_proj" or "down_proj" of a module of experts.
        path: Path of the Flax weight.
        stack_index: Index in the stack of the weight; empty for a weight that is not a stack.
        tensor_slice: Slice of the weight that the parameter's tensor fills; None for experts,
            whose tensors are separate in a checkpoint.
    """

    module: str
    name: str
    path: str
    stack_index: tuple[int, ...]
    tensor_slice: TensorSlice | None


def list_module_parameters(
    checkpoint_mapping: Mapping[str, CheckpointWeight],
) -> list[ModuleParameter]:
    """Returns the module parameters of a checkpoint mapping, in the order of its weights."""
    parameters: dict[tuple[str, str], ModuleParameter] = {}
    for path, weight in checkpoint_mapping.items():
        for part in weight.slices:
            expert = _EXPERT_KEY.fullmatch(part.key)
            if expert:
                module, name = expert[1], _EXPERT_PARAMETERS[expert[2]]
                stack_index = part.start_indices[: part.num_stack_axes - 1]
                parameter = ModuleParameter(module, name, path, stack_index, None)
            else:
                module, _, name = part.key.rpartition(".")
                stack_index = part.start_indices[: part.num_stack_axes]
                parameter = ModuleParameter(module, name, path, stack_index, part)
            parameters.setdefault((module, name), parameter)
    return list(parameters.values())


def list_expert_modules(
    checkpoint_mapping: Mapping[str, CheckpointWeight],
) -> dict[str, tuple[tuple[str, str], int, str]]:
    """Returns the modules that a checkpoint has for single experts.

    Returns:
        By the module's name: module and name of the parameter of all experts, the expert's number,
        and its projection, such as "gate_proj".
    """
    modules = {}
    for weight in checkpoint_mapping.values():
        for part in weight.slices:
            match = _EXPERT_KEY.fullmatch(part.key)
            if match:
                parameter = (match[1], _EXPERT_PARAMETERS[match[2]])
                number = part.start_indices[part.num_stack_axes - 1]
                modules[part.key.removesuffix(".weight")] = (parameter, number, match[2])
    return modules


def list_expert_parameters(
    checkpoint_mapping: Mapping[str, CheckpointWeight],
) -> dict[tuple[str, str], ModuleParameter]:
    """Returns the weights of the modules that a checkpoint has for single experts."""
    return {
        (module, "weight"): ModuleParameter(module, "weight", path, (), part)
        for path, weight in checkpoint_mapping.items()
        for part in weight.slices
        if _EXPERT_KEY.fullmatch(part.key)
        for module in [part.key.removesuffix(".weight")]
    }


def weight_region(tensor_slice: TensorSlice) -> tuple[slice, ...]:
    """Returns the index of the region of a weight that a tensor fills."""
    bounds = zip(tensor_slice.start_indices, tensor_slice.slice_sizes, strict=True)
    return tuple(slice(start, start + size) for start, size in bounds)


class TensorLayout(NamedTuple):
    """Layout of one array of a leaf, as two axis specs.

    Attributes:
        leaf_axes: Axes of the leaf's array, without stack axes that have a tensor for each entry.
        file_axes: Axes of the tensor in the file.
    """

    leaf_axes: str
    file_axes: str


class WeightGeometry(NamedTuple):
    """Shape and axes of the weight that an array belongs to.

    Attributes:
        shape: Shape of the weight.
        axes: Batch, input and output axes of the weight.
        window: Window axes of a convolution.
        stacked_axes: Stack axes that are part of one tensor.
    """

    shape: tuple[int, ...]
    axes: WeightAxes
    window: tuple[int, ...]
    stacked_axes: tuple[int, ...]


def tensor_to_leaf(
    tensor: np.ndarray, layout: TensorLayout, geometry: WeightGeometry
) -> np.ndarray:
    """Rearranges a tensor of a file to the layout of the leaf's array.

    Raises:
        ValueError: The tensor's shape does not match the layout.
    """
    groups = _file_axis_groups(layout.file_axes, geometry)
    sizes = _infer_axis_sizes(tensor.shape, groups, geometry)
    leaf_labels = _leaf_axis_labels(layout.leaf_axes, geometry)
    # Labels that the leaf lacks are axes of length one.
    file_labels = [label for group in groups for label in group if label in leaf_labels]
    split = tensor.reshape([sizes[label] for label in file_labels])
    return split.transpose([file_labels.index(label) for label in leaf_labels])


def leaf_to_tensor(array: np.ndarray, layout: TensorLayout, geometry: WeightGeometry) -> np.ndarray:
    """Rearranges a leaf's array to the layout of the file; the inverse of `tensor_to_leaf`."""
    leaf_labels = _leaf_axis_labels(layout.leaf_axes, geometry)
    sizes = dict(zip(leaf_labels, array.shape, strict=True))
    groups = _file_axis_groups(layout.file_axes, geometry)
    file_labels = [label for group in groups for label in group if label in sizes]
    transposed = array.transpose([leaf_labels.index(label) for label in file_labels])
    shape = [math.prod(sizes.get(label, 1) for label in group) for group in groups]
    return transposed.reshape(shape)


def _axis_labels(token: str, geometry: WeightGeometry) -> list[Hashable]:
    """Returns the labels of one letter of a spec: numbers for axes of the weight, or names."""
    inputs = geometry.axes.inputs
    letters: dict[str, Sequence[Hashable]] = {
        "i": inputs,
        "c": [axis for axis in inputs if axis not in geometry.window],
        "w": geometry.window,
        "o": geometry.axes.outputs,
        "e": geometry.stacked_axes,
        "1": [("one", axis) for axis in geometry.window],
        "u": [("one", "u")],
    }
    return list(letters.get(token, [token]))


def _leaf_axis_labels(axes_spec: str, geometry: WeightGeometry) -> list[Hashable]:
    return [label for token in axes_spec.split() for label in _axis_labels(token, geometry)]


def _file_axis_groups(axes_spec: str, geometry: WeightGeometry) -> list[list[Hashable]]:
    """Returns, for each axis of a tensor, the labels that are flattened into it, slowest first."""
    groups: list[list[Hashable]] = []
    for token in axes_spec.split():
        if token in ("w", "1"):
            groups += [[label] for label in _axis_labels(token, geometry)]
        else:
            groups.append(
                [label for letter in token.split("*") for label in _axis_labels(letter, geometry)]
            )
    return groups


def _infer_axis_sizes(
    shape: tuple[int, ...], groups: list[list[Hashable]], geometry: WeightGeometry
) -> dict[Hashable, int]:
    """Infers the size of each label from a tensor's shape.

    Raises:
        ValueError: The shape does not match the groups.
    """
    sizes: dict[Hashable, int] = {}

    def get_size(label: Hashable) -> int | None:
        if isinstance(label, int):
            return geometry.shape[label]
        return 1 if isinstance(label, tuple) else sizes.get(label)

    expected: list[Any] = []
    for size, group in zip(shape, groups, strict=False):
        unknown = [label for label in group if get_size(label) is None]
        known = math.prod(get_size(label) or 1 for label in group)
        if len(unknown) == 1 and size and size % known == 0:
            sizes[unknown[0]] = size // known
        expected.append(known if not unknown else f"a multiple of {known}" if known > 1 else "any")
    expected += ["any"] * (len(groups) - len(shape))
    inferred = [math.prod(get_size(label) or 0 for label in group) for group in groups]
    if len(shape) != len(groups) or list(shape) != inferred:
        is_transposed = len(shape) == 2 and expected == ["any", shape[0]]
        hint = " It looks transposed" if is_transposed or list(shape[::-1]) == inferred else ""
        expected_shape = f"({', '.join(map(str, expected))})"
        raise ValueError(f"has shape {shape} instead of {expected_shape}.{hint}".rstrip("."))
    return {label: get_size(label) or 1 for group in groups for label in group}
