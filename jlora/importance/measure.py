"""Measuring how much each weight matters, by any of the methods."""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jlora import _tree, _validation
from jlora._quantized_array import is_quantized
from jlora._tree import PyTree
from jlora.adapters.lora import LoRA
from jlora.importance.scores import Importance
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import get_axis_sizes, weight_to_matrices
from jlora.rules import Rules
from jlora.transform import lora_transform

PLACEHOLDER_CONFIG = LoRA(
    rank=1, alpha=1
)  # Stands for any family: only which weights it takes is looked at.


class TargetWeight(NamedTuple):
    """A weight that is to be scored.

    Attributes:
        leaf_index: Which of the leaves of params it is.
        value: The array.
        axes: What each of its axes does.
    """

    leaf_index: int
    value: Any
    axes: WeightAxes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def batch(self) -> tuple[int, ...]:
        return get_axis_sizes(self.shape, self.axes).batch


class MeasureRequest(NamedTuple):
    """What is to be measured.

    Attributes:
        fn: `fn(params, batch)`.
        params: The base.
        batches: One after the other; at least one.
        first_batch: The first of them.
        rules: Which weights, as `lora_transform` takes them.
        max_pass_bytes: How much may be held at once of what is as large as weights.
    """

    fn: Callable[[PyTree, Any], Any]
    params: PyTree
    batches: Iterable[Any]
    first_batch: Any
    rules: Rules
    max_pass_bytes: int


class ImportanceMethod(abc.ABC):
    """A way to say how much a weight matters: a score for each of its matrices, and perhaps what
    each further rank is worth.

    Subclasses are frozen dataclasses.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def measure(self, request: MeasureRequest) -> Importance:
        """The scores of all weights that are asked for."""


def measure_importance(
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    method: ImportanceMethod,
    select: Rules | str | None = None,
    max_pass_bytes: int = 2**30,
) -> Importance:
    """How much each weight matters, measured on a few batches.

    Batches are gone through one at a time, and gradients of a few weights are held at a time, each
    for as long as it takes to reduce it to its statistics: a large model needs as many backward
    passes for a batch as its gradient has `max_pass_bytes`. Each pass is compiled once for every shape
    of batches.

    Args:
        fn: `fn(params, batch)`: the loss, a scalar, for methods of gradients; the model for
            `Activation`; for methods that need no data either, to see how weights are used.
        params: The base, of arrays; not quantised.
        batches: Any iterable of pytrees of arrays, gone through once. Of the methods that need no
            data only the first one's shapes are looked at.
        method: `GradientNorm()`, `Fisher()`, `Sensitivity()`, `Activation()`, `Condition()` or
            `StableRank()` of `jlora.importance`.
        select: Which weights: those that a plain LoRA takes when None; those whose path holds a
            regular expression; or rules as `lora_transform` takes them, whose configs do not
            matter.
        max_pass_bytes: How many bytes of gradients (of moments of inputs, for `Activation`) one pass
            holds at most; a weight, with all layers of a stack, is never split.

    Raises:
        TypeError: For another type of method, or batches that are no iterable of batches.
        ValueError: When there is no batch, select takes no weight or one that cannot be adapted,
            weights are quantised, or something measured is not finite.
    """
    if not isinstance(method, ImportanceMethod):
        raise TypeError(
            f"method={method!r} is none. Give one of jlora.importance, such as GradientNorm()."
        )
    _validation.check_positive_int("importance: pass_bytes", max_pass_bytes)
    if isinstance(batches, Mapping | str | np.ndarray | jax.Array) or hasattr(batches, "_fields"):
        raise TypeError(
            f"batches={type(batches).__name__} looks like one batch. Give an iterable of batches, "
            f"such as [batch]."
        )
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty, and nothing can be measured on it. Give one or more.")
    everything = itertools.chain([first], rest)
    return method.measure(
        MeasureRequest(fn, params, everything, first, _resolve_select_rules(select), max_pass_bytes)
    )


def _resolve_select_rules(select: Rules | str | None) -> Rules:
    if isinstance(select, Mapping):
        return {pattern: config and PLACEHOLDER_CONFIG for pattern, config in select.items()}
    return {select: PLACEHOLDER_CONFIG} if isinstance(select, str) else PLACEHOLDER_CONFIG


def rules_for_paths(paths: Iterable[str]) -> Rules:
    """Rules that take these weights."""
    return {f"^{re.escape(path)}$": PLACEHOLDER_CONFIG for path in paths}


def find_target_weights(request: MeasureRequest) -> dict[str, TargetWeight]:
    """The weights that are asked for, by path, in the order of params.

    Raises:
        ValueError: As `lora_transform`'s `init`; and for weights that are quantised.
        TypeError: For weights of which only shapes are given.
    """
    lora = lora_transform(request.fn, request.rules)
    key = jax.random.key(0)
    adapter = jax.eval_shape(lambda p, b: lora.init(key, p, b), request.params, request.first_batch)
    flat = _tree.flatten_with_paths(request.params)
    sites = {
        path: TargetWeight(place, flat.leaves[place], adapter[path].axes)
        for place, path in enumerate(flat.paths)
        if path in adapter
    }
    for path, site in sites.items():
        if is_quantized(site.value):
            raise ValueError(
                f"{path!r} is quantised ({site.value}), and codes have no gradient. Measure on the "
                f"weights as they were before, or on jlora.dequantize(params)."
            )
        if isinstance(site.value, jax.ShapeDtypeStruct):
            raise TypeError(
                f"Of {path!r} only the shape is given. Call importance with the loaded parameters."
            )
    return sites


def group_into_passes(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in their order, in groups whose sizes add up to no more than the limit; one that
    exceeds it is alone.
    """
    passes: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not passes or held + size > limit:
            passes.append([])
            held = 0
        passes[-1].append(name)
        held += size
    return passes


def weight_as_matrices(target: TargetWeight) -> jax.Array:
    """The weight as (batch, fan_in, fan_out)."""
    return weight_to_matrices(target.value, target.axes)
