"""What every adapter family gives: a config that makes leaves, and a leaf that says what it adds.

A family is one file with two frozen dataclasses. The config is what users write in rules. The leaf
is what training changes: a pytree of the family's arrays beside static facts, so that an adapter
alone suffices to apply, merge, save and load it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax

from jlora import tree
from jlora.factored.probe import Axes

Labelled = tuple[Any, Sequence[Hashable]]  # An array and the label of each of its axes.


class Weight(NamedTuple):
    """A weight to be adapted, and how its model uses it.

    Attributes:
        path: Where it is in the parameter tree.
        value: The array, or a `jax.ShapeDtypeStruct` where only shapes are known.
        axes: What each of its axes does.
        embedding: Whether rows of it are looked up.
    """

    path: str
    value: Any
    axes: Axes
    embedding: bool

    @property
    def fan_in(self) -> int:
        return math.prod(self.value.shape[axis] for axis in self.axes.inputs)

    @property
    def fan_out(self) -> int:
        return math.prod(self.value.shape[axis] for axis in self.axes.outputs)


class Expression(NamedTuple):
    """An adapted weight as `gains * base + sum of terms`.

    Axes of arrays are labelled with the number of the weight's axis they run along; any other
    label is summed over.

    Attributes:
        gains: Factors on the base.
        terms: Products of arrays that are added.
    """

    gains: Sequence[Labelled] = ()
    terms: Sequence[Sequence[Labelled]] = ()


@runtime_checkable
class AdapterConfig(Protocol):
    """One family's hyperparameters, as users write them in rules."""

    def refusal(self, weight: Weight) -> str | None:
        """Why this family cannot adapt the weight, with the mend; None when it can."""
        ...

    def init(self, key: jax.Array, weight: Weight) -> Any:
        """A fresh leaf for the weight."""
        ...


class AdapterLeaf(abc.ABC):
    """The arrays of one adapted weight, and the static facts that give them meaning.

    Subclasses are frozen dataclasses under `@family`. A field made by `array` is a child of the
    pytree; every other field is static, and of a type that JSON can hold.
    """

    family: ClassVar[str]

    shape: tuple[int, ...]  # Of the weight.
    axes: Axes
    dropout: float

    @abc.abstractmethod
    def expression(self, base: Any) -> Expression:
        """The adapted weight; `base` is the frozen array, which additive families ignore."""

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that every array must have."""

    @classmethod
    def labels(cls) -> dict[str, str]:
        """For every array its name for the optimizer; `"frozen"` for one that is not trained."""
        return {field.name: field.metadata["label"] for field in array_fields(cls)}


FAMILIES: dict[str, type[AdapterLeaf]] = {}

LeafType = TypeVar("LeafType", bound=type[AdapterLeaf])


def array(label: str) -> Any:
    """A dataclass field that holds an array, with its label for the optimizer."""
    return dataclasses.field(metadata={"label": label})


def array_fields(leaf: AdapterLeaf | type[AdapterLeaf]) -> list[dataclasses.Field[Any]]:
    """The fields of a leaf that hold arrays."""
    return [field for field in dataclasses.fields(leaf) if "label" in field.metadata]  # type: ignore


def family(name: str) -> Callable[[LeafType], LeafType]:
    """Makes a dataclass a pytree and known by this name in files."""

    def register(cls: LeafType) -> LeafType:
        arrays = [field.name for field in array_fields(cls)]
        static = [f.name for f in dataclasses.fields(cls) if f.name not in arrays]  # type: ignore
        jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=static)
        cls.family = name
        FAMILIES[name] = cls
        return cls

    return register


def is_leaf(node: Any) -> bool:
    """Whether a node of a tree is the adapter of one weight."""
    return isinstance(node, AdapterLeaf)


def places(flat: tree.Flat, adapter: Any) -> dict[str, int]:
    """Where each adapted weight is among the leaves of params, after checking that it fits.

    Raises:
        TypeError: When `adapter` is not one.
        ValueError: When params lacks a path of it, or has another shape there.
    """
    if not isinstance(adapter, Mapping) or not all(map(is_leaf, adapter.values())):
        raise TypeError(
            f"adapter={type(adapter).__name__} is not what init returns: a dict from the paths of "
            f"weights to their adapters. Pass the adapter alone, after params."
        )
    index = {path: i for i, path in enumerate(flat.paths)}
    missing = [path for path in adapter if path not in index]
    if missing:
        raise ValueError(
            f"The adapter has {missing[0]!r} ({len(missing)} such of {len(adapter)}), which params "
            f"does not. The nearest paths are {tree.nearest(missing[0], flat.paths)}. Pass the "
            f"tree that init was given, with the same outer keys."
        )
    for path, leaf in adapter.items():
        _check_fits(path, leaf, flat.leaves[index[path]])
    return {path: index[path] for path in adapter}


def _check_fits(path: str, leaf: AdapterLeaf, weight: Any) -> None:
    if tuple(weight.shape) != leaf.shape:
        raise ValueError(
            f"The adapter on {path!r} was made for a weight of shape {leaf.shape}, but params has "
            f"{tuple(weight.shape)} there. Use the params it was initialised with, or init anew."
        )
    for name, shape in leaf.shapes().items():
        value = getattr(leaf, name)
        if tuple(getattr(value, "shape", ())) != shape:
            got = getattr(value, "shape", type(value).__name__)
            hint = " (it looks transposed)" if tuple(got)[::-1] == shape else ""
            raise ValueError(
                f"The array {name!r} of the adapter on {path!r} has shape {got}{hint}, expected "
                f"{shape} for a weight of shape {leaf.shape} with axes {leaf.axes}. If a part of "
                f"the adapter was left out, put it back with jlora.combine."
            )


def static_facts(leaf: AdapterLeaf) -> Mapping[str, Any]:
    """The fields of a leaf that are not arrays."""
    arrays = {field.name for field in array_fields(leaf)}
    fields = dataclasses.fields(leaf)  # type: ignore
    return {f.name: getattr(leaf, f.name) for f in fields if f.name not in arrays}
