"""What every adapter family gives: a config that makes leaves, and a leaf that says what it adds.

A family is one file with two frozen dataclasses. The config is what users write in rules. The leaf
is what training changes: a pytree of the family's arrays beside static facts, so that an adapter
alone suffices to apply, merge, save and load it. Arrays that several weights share are a third
dataclass, kept once in the adapter under a name.
"""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jlora import _tree, _validation
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import Dropout
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import (
    MATRIX_KINDS,
    AdaptableWeight,
    AxisSizes,
    WeightKind,
    get_axis_sizes,
)

FROZEN = "frozen"  # The label of arrays that are not trained.


class LeafContext(NamedTuple):
    """What a leaf needs beside the weight that it adapts.

    Attributes:
        shared: Arrays that are shared under the leaf's `share`.
        key: Random key of the step, the same for every weight; None outside training.
    """

    shared: Any = None
    key: jax.Array | None = None


class MethodInfo(NamedTuple):
    """A family's row in the table of families.

    Attributes:
        name: What it is called.
        formula: The adapted weight.
        num_params_formula: How many numbers are trained for a weight (d, k), as an expression in Python.
        recommended_for: When to choose it.
        paper: Where it comes from.
    """

    name: str
    formula: str
    num_params_formula: str
    recommended_for: str
    paper: str


class AdapterConfig(abc.ABC):
    """One family's hyperparameters, as users write them in rules.

    Subclasses are frozen dataclasses. Fields with the names of `jlora.adapters.checks` are checked.
    """

    info: ClassVar[MethodInfo]
    supported_kinds: ClassVar[frozenset[WeightKind]] = MATRIX_KINDS
    share: Any = None  # The name under which the adapter has what its weights share.

    def __post_init__(self) -> None:
        _validation.check_fields(self)

    def selects(self, weight: AdaptableWeight) -> bool:
        """Whether the config alone, as a rule for all weights, is meant for this one."""
        return weight.multiplies_activations and weight.kind != "embedding"

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Why this family cannot adapt the weight; None when it can."""
        if 0 in weight.shape:
            return f"its shape {weight.shape} holds no numbers"
        if weight.kind not in MATRIX_KINDS:
            by = ", ".join(weight.primitives) or "nothing"
            return f"it feeds no product and no look-up that jlora can follow (it is used by: {by})"
        if weight.kind not in self.supported_kinds:
            known = " and ".join(sorted(self.supported_kinds))
            return f"it is of the kind {weight.kind}, and {self.info.name} is defined for {known}"
        if not weight.axes.inputs or not weight.axes.outputs:
            return (
                f"as a weight of shape {weight.shape} with axes {weight.axes} it is a vector: low "
                f"rank means nothing there"
            )
        return None

    @abc.abstractmethod
    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> AdapterLeaf:
        """A fresh leaf for the weight."""

    def init_shared(self, key: jax.Array, weights: Sequence[AdaptableWeight]) -> SharedArrays:
        """What these weights share, for families with a `share`."""
        raise TypeError(f"{type(self).__name__} shares nothing between weights.")


class AdapterArrays(abc.ABC):
    """Arrays that are part of an adapter, and the static facts that give them meaning.

    Subclasses are frozen dataclasses under `@family`. A field made by `array_field` is a child of the
    pytree; every other field is static, and of a type that JSON can hold.
    """

    family: ClassVar[str]

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that every array must have."""

    def validate(self) -> None:
        """Checks the static facts, which a file may have wrong.

        Raises:
            ValueError: For a fact out of its range.
            TypeError: For one of another type.
        """
        _validation.check_fields(self)

    @classmethod
    def array_labels(cls) -> dict[str, str]:
        """For every array its name for the optimizer; `"frozen"` for one that is not trained."""
        return {field.name: field.metadata["label"] for field in get_array_fields(cls)}


class SharedArrays(AdapterArrays):
    """Arrays that several weights share."""


class AdapterLeaf(AdapterArrays):
    """The arrays of one adapted weight."""

    shape: tuple[int, ...]  # Of the weight.
    axes: WeightAxes
    dropout: float = 0.0
    share: Any = None  # The name of what it shares with other weights, if anything.
    is_full: ClassVar[bool] = False  # Whether the weight is used as its sum, whatever uses it.

    @property
    def is_weight_sized(self) -> bool:
        """Whether a step forms arrays of the weight's size, as no low-rank family does."""
        return self.is_full

    @property
    def axis_sizes(self) -> AxisSizes:
        return get_axis_sizes(self.shape, self.axes)

    def validate(self) -> None:
        super().validate()
        axes = sorted(axis for group in self.axes for axis in group)
        # A weight that feeds no product has no axes to name.
        if axes not in ([], list(range(len(self.shape)))):
            raise ValueError(f"axes={self.axes} are not those of a weight of shape {self.shape}")

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        """Along which axis of the weight each axis of an array runs; None for an axis of its own.

        An array that runs along none is left out. Whoever shards a weight shards these alike.
        """
        return {}

    def shared_mismatch(self, shared: Any) -> str | None:
        """Why what it shares does not fit it; None when it does."""
        del shared
        return None

    @abc.abstractmethod
    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns the weight with this leaf's gains and terms."""


FAMILIES: dict[str, type[AdapterArrays]] = {}

ArraysT = TypeVar("ArraysT", bound=type[AdapterArrays])


def array_field(label: str, *, optional: bool = False) -> Any:
    """A dataclass field that holds an array, with its label for the optimizer.

    One that is optional is None in leaves that have no use for it.
    """
    if optional:
        return dataclasses.field(default=None, metadata={"label": label})
    return dataclasses.field(metadata={"label": label})


def get_array_fields(leaf: AdapterArrays | type[AdapterArrays]) -> list[dataclasses.Field[Any]]:
    """The fields of a leaf that hold arrays."""
    return [field for field in dataclasses.fields(leaf) if "label" in field.metadata]  # type: ignore


def register_arrays_pytree(cls: ArraysT) -> ArraysT:
    """Makes a dataclass a pytree of its arrays."""
    arrays = [field.name for field in get_array_fields(cls)]
    static = [f.name for f in dataclasses.fields(cls) if f.name not in arrays]  # type: ignore
    jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=static)
    return cls


def register_family(name: str) -> Callable[[ArraysT], ArraysT]:
    """Makes a dataclass a pytree and known by this name in files."""

    def known(cls: ArraysT) -> ArraysT:
        cls.family = name
        FAMILIES[name] = register_arrays_pytree(cls)
        return cls

    return known


def is_adapter_node(node: Any) -> bool:
    """Whether a node of a tree is a part of an adapter: of one weight, or shared."""
    return isinstance(node, AdapterArrays)


def get_adapter_leaves(adapter: Mapping[str, Any]) -> dict[str, AdapterLeaf]:
    """The parts of an adapter that belong to one weight each, by its path."""
    return {path: node for path, node in adapter.items() if isinstance(node, AdapterLeaf)}


def check_adapter(adapter: Any) -> dict[str, AdapterLeaf]:
    """Its parts that belong to one weight each, by path, after checking that it is an adapter.

    Raises:
        TypeError: When it is not one.
        ValueError: When a part lacks what it shares, or that does not fit it.
    """
    if not isinstance(adapter, Mapping) or not all(map(is_adapter_node, adapter.values())):
        raise TypeError(
            f"adapter={type(adapter).__name__} is not what init returns: a dict from the paths of "
            f"weights to their adapters. Pass the adapter alone, after params."
        )
    leaves = get_adapter_leaves(adapter)
    for path, leaf in leaves.items():
        if leaf.share is None:
            continue
        if leaf.share not in adapter:
            raise ValueError(
                f"The adapter on {path!r} shares arrays under {leaf.share!r}, which the adapter "
                f"lacks. Keep that entry with every part of the adapter."
            )
        reason = leaf.shared_mismatch(adapter[leaf.share])
        if reason is not None:
            raise ValueError(
                f"What the adapter has under {leaf.share!r} is not what its part on {path!r} was "
                f"made with: {reason}. Keep the two together."
            )
    return leaves


def count_trainable_elements(node: Any) -> int:
    """How many numbers of a part of an adapter are trained."""
    names = [name for name, label in node.array_labels().items() if label != FROZEN]
    arrays = (getattr(node, name) for name in names)
    return sum(array.size for array in arrays if array is not None)


def adapt_weight(
    adapter: Mapping[str, Any], path: str, base: Any, dropout_key: jax.Array | None = None
) -> FactoredArray:
    """Returns the adapted weight at a path.

    Args:
        adapter: Adapter that `check_adapter` has passed.
        path: Path of the weight.
        base: Its frozen array.
        dropout_key: Random key of the step; None outside training.
    """
    leaf = adapter[path]
    shared = None if leaf.share is None else adapter[leaf.share]
    weight = FactoredArray.from_weight(base, path, leaf.shape)
    adapted = leaf.adapt(weight, LeafContext(shared, dropout_key))
    if dropout_key is None or not leaf.dropout:
        return adapted
    batch = leaf.axes.batch
    sizes = tuple(leaf.shape[axis] for axis in batch)
    (keys,) = weight.label((jax.random.split(key_for_path(dropout_key, path), sizes), batch))
    terms = (
        term.with_dropout(Dropout(leaf.dropout, keys, index))
        for index, term in enumerate(adapted.terms)
    )
    return dataclasses.replace(adapted, terms=tuple(terms))


def key_for_path(key: jax.Array, path: str) -> jax.Array:
    """Returns a key of the weight's own, so that adapting one more weight moves no other draw."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # A key of the old kind.
        key = jax.random.wrap_key_data(key)
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def weight_indices(flat: _tree.FlatTree, adapter: Any) -> dict[str, int]:
    """Where each adapted weight is among the leaves of params, after checking that it fits.

    Raises:
        TypeError: When `adapter` is not one.
        ValueError: When params lacks a path of it, or has another shape there.
    """
    leaves = check_adapter(adapter)
    index = {path: i for i, path in enumerate(flat.paths)}
    missing = [path for path in leaves if path not in index]
    if missing:
        raise ValueError(
            f"The adapter has {missing[0]!r} ({len(missing)} such of {len(leaves)}), which params "
            f"does not. The nearest paths are {_tree.closest_matches(missing[0], flat.paths)}. Pass the "
            f"tree that init was given, with the same outer keys."
        )
    for path, leaf in leaves.items():
        shape = tuple(flat.leaves[index[path]].shape)
        if shape != leaf.shape:
            raise ValueError(
                f"The adapter on {path!r} was made for a weight of shape {leaf.shape}, but params "
                f"has {shape} there. Use the params it was initialised with, or init anew."
            )
    for path, node in adapter.items():
        _check_array_shapes(path, node)
    return {path: index[path] for path in leaves}


def _check_array_shapes(path: str, node: AdapterArrays) -> None:
    shapes = node.shapes()
    for field in get_array_fields(node):
        name, value = field.name, getattr(node, field.name)
        if name not in shapes and value is None:
            continue
        shape = shapes.get(name)
        if tuple(getattr(value, "shape", ())) != shape:
            got = getattr(value, "shape", type(value).__name__)
            hint = _shape_mismatch_hint(tuple(getattr(value, "shape", ())), shape or ())
            facts = dict(static_field_values(node))
            raise ValueError(
                f"The array {name!r} of the adapter on {path!r} has shape {got}, expected {shape} "
                f"for {facts}.{hint}"
            )


def _shape_mismatch_hint(actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if actual and actual[::-1] == expected:
        return " It looks transposed."
    if len(actual) > len(expected) and actual[-len(expected) :] == expected:
        return " It looks like a stack of adapters: map over it with jax.vmap, or take one of it."
    return " If a part of the adapter was left out, put it back with jlora.combine."


def static_field_values(leaf: AdapterArrays) -> Mapping[str, Any]:
    """The fields of a leaf that are not arrays."""
    arrays = {field.name for field in get_array_fields(leaf)}
    fields = dataclasses.fields(leaf)  # type: ignore
    return {f.name: getattr(leaf, f.name) for f in fields if f.name not in arrays}
