"""Base classes of adapter methods: a config that creates leaves, and a leaf that adapts one weight.

A method is one file with two frozen dataclasses. The config holds the hyperparameters that users
write in rules. The leaf is the trainable state: a pytree of the method's arrays with static fields,
so that an adapter alone suffices to apply, merge, save and load it. Arrays that several weights
share are a third dataclass, stored once in the adapter under a name.
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
from jlora._serialization import register_serialization
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import Dropout, WeightAxes
from jlora.interpreter.weight import (
    MATRIX_KINDS,
    AdaptableWeight,
    AxisSizes,
    WeightKind,
)

FROZEN = "frozen"  # The label of arrays that are not trained.


class LeafContext(NamedTuple):
    """Values that a leaf needs beside the weight that it adapts.

    Attributes:
        shared: The arrays that are shared under the leaf's `share`; None without any.
        key: The random key of the step, the same for every weight; None outside training.

    Example:
        >>> from jlora.adapters import LeafContext
        >>> LeafContext()
        LeafContext(shared=None, key=None)
    """

    shared: Any = None
    key: jax.Array | None = None


class MethodInfo(NamedTuple):
    """The row of one adapter method in the table of methods.

    Attributes:
        name: Display name.
        formula: The adapted weight.
        num_params_formula: Number of trainable parameters of a weight (d, k), as an expression in
            Python.
        recommended_for: Use for which the method is recommended.
        paper: Source of the method.

    Example:
        >>> import jlora
        >>> jlora.LoRA.info.num_params_formula
        'r * (d + k)'
    """

    name: str
    formula: str
    num_params_formula: str
    recommended_for: str
    paper: str


# Words of PEFT's configs for options of jlora's.
_PEFT_OPTIONS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "target_modules": "rules",
    "layers_to_transform": "rules",
    "rank_pattern": "rules",
    "modules_to_save": "rules",
}


class AdapterConfig(abc.ABC):
    """Hyperparameters of one adapter method, as users write them in rules.

    Subclasses are frozen dataclasses. Fields whose names are in `jlora._validation.FIELD_CHECKS`
    are validated.

    Attributes:
        info: The method's row in the table of methods.
        supported_kinds: Kinds of weights that the method can adapt.
        share: Name in the adapter of the arrays that several weights share; None: nothing is
            shared.

    Example:
        A new method is a config and a leaf:

        >>> import dataclasses, jax, jax.numpy as jnp, jlora
        >>> from jlora.adapters import AdapterConfig, AdapterLeaf, MethodInfo
        >>> from jlora.adapters import array_field, register_family
        >>> @register_family("output_scale")
        ... @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class OutputScaleLeaf(AdapterLeaf):
        ...     gain: jax.Array = array_field("gain")
        ...     shape: tuple
        ...     axes: tuple
        ...
        ...     def adapt(self, weight, context):
        ...         return weight.multiply((self.gain, self.axes.outputs))
        ...
        ...     def shapes(self):
        ...         return {"gain": self.axis_sizes.outputs}
        >>> @dataclasses.dataclass(frozen=True)
        ... class OutputScale(AdapterConfig):
        ...     info = MethodInfo("Output scale", "W diag(g)", "k", "examples", "none")
        ...
        ...     def init_leaf(self, key, weight):
        ...         gain = jnp.ones(weight.axis_sizes.outputs)
        ...         return OutputScaleLeaf(gain=gain, shape=weight.shape, axes=weight.axes)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], OutputScale())
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> scaled = jax.tree.map(lambda gain: 2 * gain, adapter)
        >>> print(lora.apply(params, scaled, x))
        [[6. 6.]]
    """

    info: ClassVar[MethodInfo]
    supported_kinds: ClassVar[frozenset[WeightKind]] = MATRIX_KINDS
    share: Any = None

    def __new__(cls, *args: Any, **options: Any) -> AdapterConfig:
        """Refuses names that are no options of the config, with the nearest or PEFT's meaning.

        Raises:
            TypeError: A name is none of the fields, or a value was given without a name.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore
        unknown = [name for name in options if name not in names]
        if args:
            raise TypeError(
                f"{cls.__name__} takes its options by name, got {args[0]!r} without one. They are "
                f"{', '.join(names)}."
            )
        if unknown:
            option = _PEFT_OPTIONS.get(unknown[0])
            advice = f"Its options are {', '.join(names)}."
            if option in names:
                advice = f"PEFT's {unknown[0]!r} is the option {option!r} here."
            elif option == "rules":
                advice = f"PEFT's {unknown[0]!r} is a mapping from patterns to configs here."
            raise TypeError(f"{cls.__name__} has no option {unknown[0]!r}. {advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _validation.check_fields(self)

    def selects(self, weight: AdaptableWeight) -> bool:
        """Whether the config adapts the weight when it is the only rule."""
        return weight.multiplies_activations and weight.kind != "embedding"

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns why the method cannot adapt the weight; None when it can."""
        if 0 in weight.shape:
            return f"its shape {weight.shape} has no elements"
        if weight.kind not in MATRIX_KINDS:
            by = ", ".join(weight.primitives) or "nothing"
            return (
                f"it feeds no product and no look-up that jlora can follow (it is used by: {by}; "
                f"jlora.register_rule adds a primitive of your own)"
            )
        if weight.kind not in self.supported_kinds:
            known = " and ".join(sorted(self.supported_kinds))
            return f"it is of the kind {weight.kind}, and {self.info.name} is defined for {known}"
        if not weight.axes.inputs or not weight.axes.outputs:
            return (
                f"as a weight of shape {weight.shape} with axes {weight.axes} it is a vector, "
                f"which has no low rank"
            )
        return None

    @abc.abstractmethod
    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> AdapterLeaf:
        """Returns a fresh leaf for the weight."""

    def init_shared(self, key: jax.Array, weights: Sequence[AdaptableWeight]) -> SharedArrays:
        """Returns the arrays that these weights share, for methods with a `share`.

        Raises:
            TypeError: The method shares no arrays.
        """
        raise TypeError(f"{type(self).__name__} shares no arrays between weights.")


class AdapterArrays(abc.ABC):
    """Arrays that are part of an adapter, with the static fields that give them meaning.

    Subclasses are frozen dataclasses under `@register_family`. A field of `array_field` is a child
    of the pytree; every other field is static and of a type that JSON can represent.
    """

    family: ClassVar[str]

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the required shape of every array."""

    def validate(self) -> None:
        """Checks the static fields, which a file may have wrong.

        Raises:
            ValueError: A value is out of range.
            TypeError: A value is of another type.
        """
        _validation.check_fields(self)

    @classmethod
    def array_labels(cls) -> dict[str, str]:
        """Returns the optimizer label of every array; `"frozen"` for one that is not trained."""
        return {field.name: field.metadata["label"] for field in get_array_fields(cls)}


class SharedArrays(AdapterArrays):
    """Arrays that several weights share, stored once in the adapter under their name.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.VeRA(rank=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((2, 6)))
        >>> isinstance(adapter["vera"], jlora.adapters.SharedArrays)
        True
    """


class AdapterLeaf(AdapterArrays):
    """The arrays of one adapted weight. `AdapterConfig` has an example of a new method.

    Attributes:
        shape: Shape of the weight.
        axes: Roles of the weight's axes.
        dropout: Probability of dropping an entry of the update's input while training.
        share: Name of the arrays that are shared with other weights; None: nothing is shared.
        is_full: Whether every use of the weight reads the materialized weight.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((2, 6)))
        >>> isinstance(adapter["w"], jlora.adapters.AdapterLeaf), adapter["w"].axis_sizes.inputs
        (True, (6,))
    """

    shape: tuple[int, ...]
    axes: WeightAxes
    dropout: float = 0.0
    share: Any = None
    is_full: ClassVar[bool] = False

    @property
    def is_weight_sized(self) -> bool:
        """Whether a step forms arrays of the weight's size, which low-rank methods do not."""
        return self.is_full

    @property
    def axis_sizes(self) -> AxisSizes:
        return self.axes.sizes(self.shape)

    def validate(self) -> None:
        super().validate()
        axes = sorted(axis for group in self.axes for axis in group)
        # A weight that feeds no product has no axes to name.
        if axes not in ([], list(range(len(self.shape)))):
            raise ValueError(f"axes={self.axes} are not those of a weight of shape {self.shape}")

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        """Returns the weight's axis that each axis of an array runs along; None for its own axes.

        An array without an axis of the weight is left out. Shardings of the weight carry over to
        its arrays along these axes.
        """
        return {}

    def shared_mismatch(self, shared: Any) -> str | None:
        """Returns why the shared arrays do not fit this leaf; None when they do."""
        del shared
        return None

    @abc.abstractmethod
    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns the weight with this leaf's gains and terms.

        Args:
            weight: The weight without gains and terms; its base is frozen.
            context: Shared arrays and the random key of the step.
        """


FAMILIES: dict[str, type[AdapterArrays]] = {}

ArraysT = TypeVar("ArraysT", bound=type[AdapterArrays])


def array_field(label: str, *, optional: bool = False) -> Any:
    """Returns a dataclass field that holds an array.

    Args:
        label: The array's label for the optimizer, a key of `jlora.param_labels`. `"frozen"`: the
            array is not trained.
        optional: Whether the array is None in leaves that do not use it.

    Example:
        >>> from jlora.adapters import array_field
        >>> array_field("a").metadata["label"]
        'a'
    """
    if optional:
        return dataclasses.field(default=None, metadata={"label": label})
    return dataclasses.field(metadata={"label": label})


def get_array_fields(leaf: AdapterArrays | type[AdapterArrays]) -> list[dataclasses.Field[Any]]:
    """Returns the fields of a leaf that hold arrays."""
    return [field for field in dataclasses.fields(leaf) if "label" in field.metadata]  # type: ignore


def register_arrays_pytree(cls: ArraysT) -> ArraysT:
    """Registers a dataclass as a pytree of its arrays."""
    arrays = [field.name for field in get_array_fields(cls)]
    static = [f.name for f in dataclasses.fields(cls) if f.name not in arrays]  # type: ignore
    jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=static)
    register_serialization(cls, arrays, static, decoders={"axes": lambda axes: WeightAxes(*axes)})
    return cls


def register_family(name: str) -> Callable[[ArraysT], ArraysT]:
    """Returns a class decorator that registers a dataclass as a pytree and under a name for files.

    Args:
        name: Name of the class in adapter files.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((2, 6)))
        >>> adapter["w"].family, adapter["w"].array_labels()  # @register_family("lora")
        ('lora', {'a': 'a', 'b': 'b'})
    """

    def register(cls: ArraysT) -> ArraysT:
        cls.family = name
        FAMILIES[name] = register_arrays_pytree(cls)
        return cls

    return register


def is_adapter_node(node: Any) -> bool:
    """Whether a node of a tree holds arrays of an adapter: those of one weight, or shared ones."""
    return isinstance(node, AdapterArrays)


def get_adapter_leaves(adapter: Mapping[str, Any]) -> dict[str, AdapterLeaf]:
    """Returns the leaves of an adapter, one for each adapted weight, by its path."""
    return {path: node for path, node in adapter.items() if isinstance(node, AdapterLeaf)}


def check_adapter(adapter: Any) -> dict[str, AdapterLeaf]:
    """Validates an adapter and returns its leaves by path.

    Raises:
        TypeError: The value is not an adapter.
        ValueError: Shared arrays of a leaf are missing or do not fit it.
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
                f"The arrays that the adapter has under {leaf.share!r} do not fit its leaf on "
                f"{path!r}: {reason}. Keep the two together."
            )
    return leaves


def count_trainable_elements(node: Any) -> int:
    """Returns the number of trainable parameters of a part of an adapter."""
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
    """Returns the index of each adapted weight among the leaves of params, and validates the fit.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: A path of the adapter is missing in params, or the weight has another shape.
    """
    leaves = check_adapter(adapter)
    index = {path: i for i, path in enumerate(flat.paths)}
    missing = [path for path in leaves if path not in index]
    if missing:
        nearest = _tree.closest_matches(missing[0], flat.paths)
        raise ValueError(
            f"The adapter has {missing[0]!r} ({len(missing)} such of {len(leaves)}), which params "
            f"does not. The nearest paths are {nearest}. Pass the tree that init was given, with "
            f"the same outer keys. Where params stacks layers and the adapter does not, or the "
            f"other way round, use jlora.adapters.match_layer_layout(adapter, params)."
        )
    for path, leaf in leaves.items():
        shape = tuple(flat.leaves[index[path]].shape)
        if shape != leaf.shape:
            raise ValueError(
                f"The adapter on {path!r} was built for a weight of shape {leaf.shape}, but params "
                f"has {shape} there. Use the params it was initialized with, or init anew."
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
            actual = getattr(value, "shape", type(value).__name__)
            hint = _shape_mismatch_hint(tuple(getattr(value, "shape", ())), shape or ())
            fields = dict(static_field_values(node))
            raise ValueError(
                f"The array {name!r} of the adapter on {path!r} has shape {actual}, expected "
                f"{shape} for {fields}.{hint}"
            )


def _shape_mismatch_hint(actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if actual and actual[::-1] == expected:
        return " It looks transposed."
    if len(actual) > len(expected) and actual[-len(expected) :] == expected:
        return " It looks like a stack of adapters: map over it with jax.vmap, or take one of it."
    return " If a part of the adapter was left out, put it back with jlora.combine."


def static_field_values(leaf: AdapterArrays) -> Mapping[str, Any]:
    """Returns the fields of a leaf that are not arrays."""
    arrays = {field.name for field in get_array_fields(leaf)}
    fields = dataclasses.fields(leaf)  # type: ignore
    return {f.name: getattr(leaf, f.name) for f in fields if f.name not in arrays}
