"""Labels of the arrays of a tree, optimizers by label, and partitions by label."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora._tree import PyTree
from jlora.adapters.base import FROZEN, is_adapter_node

FULL = "full"

_TRAINABLE = "trained"  # All labels but frozen, where they share one transformation.


def param_labels(params: PyTree) -> PyTree:
    """Returns a tree of the same structure with a label for every array.

    Arrays of an adapter have the labels of its method (`"a"` and `"b"` for LoRA). Everything under
    a top-level key `"base"` is `"frozen"`. Any other array, such as a new head, is `"full"`.

    Args:
        params: Adapter, or a tree that holds adapters, a base and other parameters.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> tree = {"base": {"w": jnp.ones((6, 5))}, "head": {"kernel": jnp.ones((5, 2))}}
        >>> jlora.param_labels(tree)
        {'base': {'w': 'frozen'}, 'head': {'kernel': 'full'}}
    """
    # An adapter may have a weight of the path "base".
    if isinstance(params, Mapping) and "base" in params and not is_adapter_node(params["base"]):
        others = param_labels({key: value for key, value in params.items() if key != "base"})
        base = jax.tree.map(lambda _: FROZEN, params["base"])
        labels = {key: base if key == "base" else others[key] for key in params}
        return type(params)(labels)  # type: ignore[call-arg]

    def label(node: Any) -> Any:
        if not is_adapter_node(node):
            return FULL
        names = type(node).array_labels()
        # A None that partition left is not an array and gets no label.
        return jax.tree_util.tree_map_with_path(lambda path, _: names[path[0].name], node)

    return jax.tree.map(label, params, is_leaf=is_adapter_node)


# Arrays that make the update smaller as they shrink; magnitudes and gates have another role.
_DECAYED_LABELS = frozenset({"a", "b", "s", "core", "w1", "w2", "spectrum"})


def weight_decay_mask(params: PyTree) -> PyTree:
    """Returns a tree of the same structure, True for the factors, which weight decay should shrink.

    Magnitudes, gates, scaling vectors, vector banks, routers and fully trained weights are False.
    Use it as `optax.adamw(..., mask=jlora.weight_decay_mask)`.

    Args:
        params: Any tree that `jlora.param_labels` takes.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DoRA(rank=2, alpha=2))
        >>> mask = jlora.weight_decay_mask(lora.init(jax.random.key(0), params, x))
        >>> mask["w"].a, mask["w"].b, mask["w"].magnitude
        (True, True, False)
    """
    return jax.tree.map(lambda label: label in _DECAYED_LABELS, param_labels(params))


def lora_optimizer(
    transforms: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    *,
    lr_multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer for an adapter, alone or in one tree with its base and with new heads.

    It is `optax.multi_transform` by the labels of `jlora.param_labels`. Arrays with the label
    `"frozen"` get `optax.set_to_zero`: no state and no change, also where their gradients are of
    JAX's type float0, as those of a quantized base.

    Args:
        transforms: One transformation for all trainable arrays, or a mapping with one for each
            label, such as `{"a": optax.adam(1e-4), "b": optax.adam(1e-3)}`.
        lr_multipliers: Mapping from labels to factors of their updates, which give them learning
            rates of their own; only with a single transformation. `{"b": 16}` is LoRA+. None: no
            factors.

    Raises:
        TypeError: `transforms` is neither, or is a mapping and comes with `lr_multipliers`.
        ValueError: A multiplier is not positive. From `init`: the tree has a label that the mapping
            lacks, or the mapping one that the tree lacks; or it has the weights that its adapter
            adapts outside a key "base", so that they would be trained.

    References:
        Hayou et al., LoRA+, arXiv:2402.12354, section 4, for the ratio of `B` to `A`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> optimizer = jlora.lora_optimizer(optax.sgd(0.1), lr_multipliers={"b": 16})
        >>> gradient = jax.tree.map(jnp.ones_like, adapter)
        >>> updates, _ = optimizer.update(gradient, optimizer.init(adapter), adapter)
        >>> print(updates["w"].a[0, 0], updates["w"].b[0, 0])
        -0.1 -1.6
    """
    mapping = transforms if isinstance(transforms, Mapping) else None
    for transform in mapping.values() if mapping is not None else (transforms,):
        if not isinstance(transform, optax.GradientTransformation):
            raise TypeError(
                f"lora_optimizer: transforms must be an Optax transformation, such as "
                f"optax.adamw(1e-3), or a mapping from labels to transformations, got "
                f"{transform!r}."
            )
    if mapping is not None and lr_multipliers is not None:
        raise TypeError(
            "lora_optimizer got lr_multipliers and a mapping. Pass one transformation with "
            "lr_multipliers, or a mapping whose learning rates include them."
        )
    for label, multiplier in (lr_multipliers or {}).items():
        if not multiplier > 0:
            raise ValueError(
                f"lr_multipliers[{label!r}] must be positive, got {multiplier!r}. Use, for "
                f"example, 16."
            )

    def build(params: PyTree) -> optax.GradientTransformationExtraArgs:
        labels = param_labels(params)
        present = set(jax.tree.leaves(labels))
        trainable = sorted(present - {FROZEN})
        missing = sorted(set(lr_multipliers or {}) - present)
        if missing:
            raise ValueError(
                f"lr_multipliers must name labels of the tree, which are {trainable}, got "
                f"{missing}. Remove them."
            )
        if mapping is None:
            by_label: dict[Any, Any] = {_TRAINABLE: transforms, FROZEN: optax.set_to_zero()}
            return optax.multi_transform(
                by_label,
                jax.tree.map(lambda label: FROZEN if label == FROZEN else _TRAINABLE, labels),
            )
        unknown = sorted(present - {FROZEN} - set(mapping))
        unused = sorted(set(mapping) - present)
        if unknown or unused:
            raise ValueError(
                f"lora_optimizer has transformations for {sorted(mapping)}, but the tree's labels "
                f"are {trainable}. Pass exactly one for each of those; 'full' is for arrays "
                f"outside any adapter and outside 'base'."
            )
        return optax.multi_transform({FROZEN: optax.set_to_zero(), **mapping}, labels)

    def init(params: PyTree) -> optax.OptState:
        _reject_trained_base(params)
        return build(params).init(params)

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None, **extra: Any) -> Any:
        updates = jax.tree.map(_replace_float0, updates, updates if params is None else params)
        labels = param_labels(updates)
        updates, state = build(updates).update(updates, state, params, **extra)
        multipliers = dict(lr_multipliers or {})
        if multipliers:
            scale = lambda label, step: step * multipliers.get(label, 1)  # noqa: E731
            updates = jax.tree.map(scale, labels, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _replace_float0(update: Any, param: Any) -> Any:
    """Returns zeros like a parameter for a gradient of the type float0, which has no values."""
    if getattr(update, "dtype", None) != jax.dtypes.float0:
        return update
    dtype = jnp.int8 if param is update else param.dtype
    return jnp.zeros(update.shape, dtype)


def _reject_trained_base(params: PyTree) -> None:
    """Raises if a tree has adapted weights among its fully trained arrays."""
    if isinstance(params, Mapping):  # A base there is frozen.
        params = {key: node for key, node in params.items() if key != "base"}
    nodes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_adapter_node)
    adapted = {
        str(getattr(path[-1], "key", "")): node.shape
        for path, node in nodes
        if path and is_adapter_node(node) and hasattr(node, "shape")
    }
    # A tree may begin below the outer key, such as "params".
    adapted |= {
        weight.partition("/")[2]: shape
        for weight, shape in adapted.items()
        if weight.count("/") > 1 and len(shape) > 1
    }
    for path, array in nodes:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        for weight, shape in adapted.items() if not is_adapter_node(array) else ():
            is_weight = f"/{name}".endswith(f"/{weight}") and array.shape == shape
            # A quantized weight has arrays of its own.
            if is_weight or f"/{weight}/" in f"/{name}":
                raise ValueError(
                    f"The tree has the adapted weight {weight!r} at {name!r}, where it would be "
                    f"trained too. Put the base under the key 'base', or leave it out of the tree."
                )


def partition(
    adapter: PyTree, is_trainable: Callable[[str], bool] = lambda label: label != FROZEN
) -> tuple[PyTree, PyTree]:
    """Splits a tree in two, `(trainable, rest)`, each with None where the other has an array.

    Args:
        adapter: Any tree that `jlora.param_labels` takes.
        is_trainable: Predicate of labels that go to the first tree. Default: all labels that the
            method trains.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRAFA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> trainable, rest = jlora.partition(adapter)
        >>> trainable["w"].a is None, rest["w"].b is None
        (True, True)
        >>> jlora.combine(trainable, rest)["w"].a.shape
        (6, 2)
    """
    labels = param_labels(adapter)
    trainable = jax.tree.map(lambda label, x: x if is_trainable(label) else None, labels, adapter)
    rest = jax.tree.map(lambda label, x: None if is_trainable(label) else x, labels, adapter)
    return trainable, rest


def combine(*parts: PyTree) -> PyTree:
    """Inverse of `partition`: takes every array from the one part that has it.

    Args:
        *parts: Trees of the same structure, with None for the arrays of other parts.

    Raises:
        ValueError: Two parts have an array in the same place, or none has.

    Example:
        >>> import jlora
        >>> jlora.combine({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
        {'a': 1.0, 'b': 2.0}
    """

    def choose(path: Any, *values: Any) -> Any:
        present = [value for value in values if value is not None]
        if present and is_adapter_node(present[0]):
            shapes = present[0].shapes()
            fields = {
                name: choose(
                    (*path, jax.tree_util.GetAttrKey(name)), *_get_field_of_each(values, name)
                )
                for name in present[0].array_labels()
                if name in shapes  # The others are None in every part.
            }
            return dataclasses.replace(present[0], **fields)
        if len(present) != 1:
            raise ValueError(
                f"Exactly one part must have an array at {jax.tree_util.keystr(path)}, got "
                f"{len(present)} of the {len(values)} parts. Combine the two trees of one "
                f"partition."
            )
        return present[0]

    return jax.tree_util.tree_map_with_path(
        choose, *parts, is_leaf=lambda node: node is None or is_adapter_node(node)
    )


def _get_field_of_each(nodes: Sequence[Any], name: str) -> list[Any]:
    return [None if node is None else getattr(node, name) for node in nodes]
