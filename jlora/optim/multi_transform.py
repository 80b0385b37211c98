"""Which arrays of a tree are trained and how: labels, optimizers by label, and partitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from jlora._tree import PyTree
from jlora.adapters.base import FROZEN, is_adapter_node

FULL = "full"

_TRAINABLE = "trained"  # All labels but frozen, where they share one transformation.


def param_labels(params: PyTree) -> PyTree:
    """A tree of the same structure with a label for every array.

    Arrays of adapters have their family's labels (`"a"` and `"b"` for LoRA); everything under a
    top-level key `"base"` is `"frozen"`; any other array (a new head) is `"full"`.
    """
    # An adapter may have a weight of that very path.
    if isinstance(params, Mapping) and "base" in params and not is_adapter_node(params["base"]):
        rest = param_labels({key: value for key, value in params.items() if key != "base"})
        base = jax.tree.map(lambda _: FROZEN, params["base"])
        parts = {key: base if key == "base" else rest[key] for key in params}
        return type(params)(parts)  # type: ignore[call-arg]

    def label(node: Any) -> Any:
        if not is_adapter_node(node):
            return FULL
        names = type(node).array_labels()
        # A hole that partition left has no array and gets no label.
        return jax.tree_util.tree_map_with_path(lambda path, _: names[path[0].name], node)

    return jax.tree.map(label, params, is_leaf=is_adapter_node)


def lora_optimizer(
    transforms: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    *,
    lr_multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for an adapter, alone or in one tree with its base and with new heads.

    It is `optax.multi_transform` by the labels of `jlora.param_labels`. What is labelled `"frozen"` gets
    `optax.set_to_zero`: no state and no change.

    Args:
        transforms: One transformation for everything that is trained; or one for each label, such
            as `{"a": optax.adam(1e-4), "b": optax.adam(1e-3)}`.
        lr_multipliers: With one transformation, what the steps of some labels are multiplied by: a learning
            rate of their own. `{"b": 16}` is LoRA+.

    Raises:
        TypeError: When it is neither.
        ValueError: From `init`, when the tree has a label that the mapping lacks or the mapping one
            that the tree lacks.

    References:
        Hayou et al., LoRA+, arXiv:2402.12354, section 4, for the ratio of `B` to `A`.
    """
    mapping = transforms if isinstance(transforms, Mapping) else None
    for transform in mapping.values() if mapping is not None else (transforms,):
        if not isinstance(transform, optax.GradientTransformation):
            raise TypeError(
                f"lora_optimizer got {transform!r}. Give an optax transformation, such as "
                f"optax.adamw(1e-3), or a mapping from labels to such."
            )
    if mapping is not None and lr_multipliers is not None:
        raise TypeError(
            "lora_optimizer got ratios and a mapping. Give one transformation with ratios, or a "
            "mapping whose learning rates have them."
        )
    for label, ratio in (lr_multipliers or {}).items():
        if not ratio > 0:
            raise ValueError(
                f"ratios[{label!r}]={ratio!r} is no multiple of a learning rate. Use a positive "
                f"number, such as 16."
            )

    def build(params: PyTree) -> optax.GradientTransformationExtraArgs:
        of_tree = param_labels(params)
        present = set(jax.tree.leaves(of_tree))
        trained = sorted(present - {FROZEN})
        missing = sorted(set(lr_multipliers or {}) - present)
        if missing:
            raise ValueError(
                f"lora_optimizer has ratios for {missing}, but the tree's labels are {trained}. "
                f"Leave them out."
            )
        if mapping is None:
            chosen: dict[Any, Any] = {_TRAINABLE: transforms, FROZEN: optax.set_to_zero()}
            return optax.multi_transform(
                chosen, jax.tree.map(lambda one: FROZEN if one == FROZEN else _TRAINABLE, of_tree)
            )
        unknown = sorted(present - {FROZEN} - set(mapping))
        unused = sorted(set(mapping) - present)
        if unknown or unused:
            raise ValueError(
                f"lora_optimizer has transformations for {sorted(mapping)}, but the tree's labels "
                f"are {trained}. Give exactly one for each of those; 'full' is for arrays outside "
                f"any adapter and outside 'base'."
            )
        return optax.multi_transform({FROZEN: optax.set_to_zero(), **mapping}, of_tree)

    def init(params: PyTree) -> optax.OptState:
        return build(params).init(params)

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None, **extra: Any) -> Any:
        of_tree = param_labels(updates)
        updates, state = build(updates).update(updates, state, params, **extra)
        multiples = dict(lr_multipliers or {})
        if multiples:
            scale = lambda label, step: step * multiples.get(label, 1)  # noqa: E731
            updates = jax.tree.map(scale, of_tree, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def partition(
    adapter: PyTree, is_trainable: Callable[[str], bool] = lambda label: label != FROZEN
) -> tuple[PyTree, PyTree]:
    """The adapter as two trees, `(trained, rest)`, each with None where the other has an array.

    Args:
        adapter: Any tree that `jlora.param_labels` takes.
        is_trainable: Whether arrays of a label belong to the first tree; by default all that the
            family trains.
    """
    of_tree = param_labels(adapter)
    first = jax.tree.map(lambda label, x: x if is_trainable(label) else None, of_tree, adapter)
    second = jax.tree.map(lambda label, x: None if is_trainable(label) else x, of_tree, adapter)
    return first, second


def combine(*parts: PyTree) -> PyTree:
    """The tree whose every array comes from the one part that has it.

    Raises:
        ValueError: When two parts have an array in one place, or none has.
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
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{len(present)} of the {len(values)} parts have an array at {where}. Combine the "
                f"two trees of one partition."
            )
        return present[0]

    return jax.tree_util.tree_map_with_path(
        choose, *parts, is_leaf=lambda node: node is None or is_adapter_node(node)
    )


def _get_field_of_each(nodes: Sequence[Any], name: str) -> list[Any]:
    return [None if node is None else getattr(node, name) for node in nodes]
