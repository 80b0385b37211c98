"""Arrays of an adapter as PEFT lays them out, in both directions, each as a pair of short texts.

A text names the axes of an array in their order:

    i  the weight's inputs, as the leaf orders them      r, q, x, y, v, n  axes of the array's own
    c  its inputs but a convolution's window             u  an axis of length one
    w  the window's axes                                 1  as many of those as the window has
    o  its outputs                                       *  between axes that are flattened into one
    e  stacked weights that one tensor holds: experts

`c`, `o` and `e` are one axis of a tensor of torch, however many axes the Flax weight has for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.interpreter.usage import WeightAxes
from jlora.models.hf.weight_mapping import CheckpointWeight, TensorSlice

# Of a mixture's experts transformers 5 makes two parameters of one module, whatever its files hold.
_EXPERT_KEY = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")

_EXPERT_PARAMETERS = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}


class ModuleParameter(NamedTuple):
    """One parameter of a module, and where the Flax model has it.

    Attributes:
        module: The module's name.
        name: "weight", "bias", or that of a module of experts.
        path: Of the Flax weight.
        stack_index: Which one of the weight's stack it is.
        tensor_slice: How the parameter's tensor fills the weight; None for experts, which are many.
    """

    module: str
    name: str
    path: str
    stack_index: tuple[int, ...]
    tensor_slice: TensorSlice | None


def list_module_parameters(
    checkpoint_mapping: Mapping[str, CheckpointWeight],
) -> list[ModuleParameter]:
    """The sites of a model whose weights are these tensors, in the order of its weights."""
    found: dict[tuple[str, str], ModuleParameter] = {}
    for path, weight in checkpoint_mapping.items():
        for piece in weight.slices:
            expert = _EXPERT_KEY.fullmatch(piece.key)
            if expert:
                module, parameter = expert[1], _EXPERT_PARAMETERS[expert[2]]
                entry = piece.start_indices[: piece.num_stack_axes - 1]
                site = ModuleParameter(module, parameter, path, entry, None)
            else:
                module, _, parameter = piece.key.rpartition(".")
                site = ModuleParameter(
                    module, parameter, path, piece.start_indices[: piece.num_stack_axes], piece
                )
            found.setdefault((site.module, site.name), site)
    return list(found.values())


class TensorLayout(NamedTuple):
    """One array of a leaf.

    Attributes:
        leaf_axes: Its axes there, without those of stacks that have a tensor for each entry.
        file_axes: Those of the tensor.
    """

    leaf_axes: str
    file_axes: str


class WeightGeometry(NamedTuple):
    """The weight that an array belongs to.

    Attributes:
        shape: The weight's.
        axes: What each of its axes does.
        window: Those that a convolution slides over.
        stacked_axes: Those of the stacked axes that one tensor holds.
    """

    shape: tuple[int, ...]
    axes: WeightAxes
    window: tuple[int, ...]
    stacked_axes: tuple[int, ...]


def tensor_to_leaf(
    tensor: np.ndarray, layout: TensorLayout, geometry: WeightGeometry
) -> np.ndarray:
    """The tensor as the leaf lays it out.

    Raises:
        ValueError: Its shape is not one that the layout can have.
    """
    groups = _file_axis_groups(layout.file_axes, geometry)
    sizes = _infer_axis_sizes(tensor.shape, groups, geometry)
    parts = tensor.reshape([sizes[atom] for group in groups for atom in group])
    order = [atom for group in groups for atom in group]
    wanted = _leaf_axis_labels(layout.leaf_axes, geometry)
    kept = parts.reshape([sizes[atom] for atom in order if atom in wanted])
    order = [atom for atom in order if atom in wanted]
    return kept.transpose([order.index(atom) for atom in wanted])


def leaf_to_tensor(array: np.ndarray, layout: TensorLayout, geometry: WeightGeometry) -> np.ndarray:
    """The inverse of `tensor_to_leaf`."""
    atoms = _leaf_axis_labels(layout.leaf_axes, geometry)
    sizes = dict(zip(atoms, array.shape, strict=True))
    groups = _file_axis_groups(layout.file_axes, geometry)
    order = [atom for group in groups for atom in group if atom in sizes]
    turned = array.transpose([atoms.index(atom) for atom in order])
    return turned.reshape([math.prod(sizes.get(atom, 1) for atom in group) for group in groups])


def _axis_labels(token: str, geometry: WeightGeometry) -> list[Hashable]:
    """What one letter stands for: numbers of the weight's axes, or names."""
    inputs = geometry.axes.inputs
    known: dict[str, Sequence[Hashable]] = {
        "i": inputs,
        "c": [axis for axis in inputs if axis not in geometry.window],
        "w": geometry.window,
        "o": geometry.axes.outputs,
        "e": geometry.stacked_axes,
        "1": [("one", axis) for axis in geometry.window],
        "u": [("one", "u")],
    }
    return list(known.get(token, [token]))


def _leaf_axis_labels(axes_spec: str, geometry: WeightGeometry) -> list[Hashable]:
    return [atom for token in axes_spec.split() for atom in _axis_labels(token, geometry)]


def _file_axis_groups(axes_spec: str, geometry: WeightGeometry) -> list[list[Hashable]]:
    """The axes of a tensor, each as what it holds, slowest first."""
    groups: list[list[Hashable]] = []
    for token in axes_spec.split():
        if token in ("w", "1"):
            groups += [[atom] for atom in _axis_labels(token, geometry)]
        else:
            groups.append(
                [atom for part in token.split("*") for atom in _axis_labels(part, geometry)]
            )
    return groups


def _infer_axis_sizes(
    shape: tuple[int, ...], groups: list[list[Hashable]], geometry: WeightGeometry
) -> dict[Hashable, int]:
    """The length of every part of a tensor of this shape.

    Raises:
        ValueError: It is not one.
    """
    sizes: dict[Hashable, int] = {}

    def length(atom: Hashable) -> int | None:
        if isinstance(atom, int):
            return geometry.shape[atom]
        return 1 if isinstance(atom, tuple) else sizes.get(atom)

    expected: list[Any] = []
    for size, group in zip(shape, groups, strict=False):
        unknown = [atom for atom in group if length(atom) is None]
        known = math.prod(length(atom) or 1 for atom in group)
        if len(unknown) == 1 and size and size % known == 0:
            sizes[unknown[0]] = size // known
        expected.append(known if not unknown else f"a multiple of {known}" if known > 1 else "any")
    expected += ["any"] * (len(groups) - len(shape))
    found = [math.prod(length(atom) or 0 for atom in group) for group in groups]
    if len(shape) != len(groups) or list(shape) != found:
        turned = len(shape) == 2 and expected == ["any", shape[0]]
        hint = " It looks transposed" if turned or list(shape[::-1]) == found else ""
        wanted = f"({', '.join(map(str, expected))})"
        raise ValueError(f"has shape {shape} instead of {wanted}.{hint}".rstrip("."))
    return {atom: length(atom) or 1 for group in groups for atom in group}
