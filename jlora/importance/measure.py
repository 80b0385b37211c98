"""Measurement of the importance of weights, by any of the methods."""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jlora import _tree, _validation
from jlora._tree import PyTree, is_quantized
from jlora.adapters.lora import LoRA
from jlora.importance.scores import Importance
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import weight_to_matrices
from jlora.rules import Rules
from jlora.transform import lora_transform

# Stands for any method's config: only the weights that it adapts are used.
PLACEHOLDER_CONFIG = LoRA(rank=1, alpha=1)


class TargetWeight(NamedTuple):
    """A weight to score.

    Attributes:
        leaf_index: Index in the leaves of params.
        value: Array of the weight.
        axes: Roles of its axes.
    """

    leaf_index: int
    value: Any
    axes: WeightAxes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def batch(self) -> tuple[int, ...]:
        return self.axes.sizes(self.shape).batch


class MeasureRequest(NamedTuple):
    """Inputs of `ImportanceMethod.measure`.

    Attributes:
        fn: `fn(params, batch)`.
        params: Base parameters.
        batches: Batches to measure on; at least one.
        first_batch: First of the batches.
        rules: Rules that select weights, as in `lora_transform`.
        max_pass_bytes: Maximum size of all weight-sized arrays in memory at a time.
        token_mask: Function from a batch to the mask of its tokens; None: all count.
    """

    fn: Callable[[PyTree, Any], Any]
    params: PyTree
    batches: Iterable[Any]
    first_batch: Any
    rules: Rules
    max_pass_bytes: int
    token_mask: Callable[[Any], jax.Array] | None = None


class ImportanceMethod(abc.ABC):
    """A measure of importance: a score per matrix of a weight, and optionally a value per rank.

    Subclasses are frozen dataclasses with a `name`.

    Example:
        >>> import jlora
        >>> [method.name for method in jlora.importance.METHODS]
        ['gradient_norm', 'fisher', 'sensitivity', 'activation', 'condition', 'stable_rank']
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def measure(self, request: MeasureRequest) -> Importance:
        """Returns the scores of all selected weights."""


def measure_importance(
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    method: ImportanceMethod,
    select: Rules | str | None = None,
    max_pass_bytes: int = 2**30,
    token_mask: Callable[[Any], jax.Array] | None = None,
) -> Importance:
    """Measures how important each weight is, on a few batches.

    Batches are used one at a time. Gradients of a few weights are in memory at a time, each until
    it is reduced to its statistics: for each batch, a large model needs as many backward passes as
    its gradient has `max_pass_bytes`. Each pass is compiled once for every shape of batches.

    Args:
        fn: Function of `(params, batch)`: the loss, a scalar, for gradient methods; the model for
            `ActivationVariance`; either for methods without data, to find how weights are used.
        params: Base parameters as arrays, not quantized.
        batches: Iterable of pytrees of arrays, iterated once. Methods without data use only the
            shapes of the first one.
        method: `GradientNorm()`, `Fisher()`, `Sensitivity()`, `ActivationVariance()`,
            `ConditionNumber()` or `StableRank()` of `jlora.importance`.
        select: Weights to score. None: those that plain LoRA adapts. A string: those whose path
            contains a match of this regular expression. Or rules as in `lora_transform`, whose
            configs are not used.
        max_pass_bytes: Maximum bytes of gradients (for `ActivationVariance`, of input moments) in
            one pass; a weight, with all layers of a stack, is never split.
        token_mask: Function from a batch to the mask of its tokens, such as (batch, length): zero
            for padding, which `ActivationVariance` does not count. Batches and, for `Fisher`,
            examples without a token do not count either. None: there is no padding. (Gradient
            methods take padding out of their loss in `fn`.)

    Raises:
        TypeError: `method` is not an `ImportanceMethod`, or `batches` is not an iterable of
            batches.
        ValueError: There is no batch; `select` matches no weight, or one that cannot be adapted;
            weights are quantized; or a measured value is not finite.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> loss = lambda params, x: ((x @ params["v"] @ params["w"]) ** 2).mean()
        >>> params = {"v": jnp.ones((3, 4)), "w": 2 * jnp.ones((4, 2))}
        >>> method = jlora.importance.GradientNorm()
        >>> scores = jlora.importance.measure_importance(
        ...     loss, params, [jnp.ones((5, 3))], method=method
        ... )
        >>> scores.weights["v"].score > scores.weights["w"].score
        True
    """
    if not isinstance(method, ImportanceMethod):
        raise TypeError(
            f"method must be a method of jlora.importance, such as GradientNorm(), got {method!r}."
        )
    _validation.check_positive_int("measure_importance: max_pass_bytes", max_pass_bytes)
    if isinstance(batches, Mapping | str | np.ndarray | jax.Array) or hasattr(batches, "_fields"):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}, which looks "
            f"like one batch. Use [batch]."
        )
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("batches is empty, and importance needs one or more.")
    all_batches = itertools.chain([first], remaining)
    rules = _resolve_select_rules(select)
    request = MeasureRequest(fn, params, all_batches, first, rules, max_pass_bytes, token_mask)
    return method.measure(request)


def _resolve_select_rules(select: Rules | str | None) -> Rules:
    if isinstance(select, Mapping):
        return {pattern: config and PLACEHOLDER_CONFIG for pattern, config in select.items()}
    return {select: PLACEHOLDER_CONFIG} if isinstance(select, str) else PLACEHOLDER_CONFIG


def rules_for_paths(paths: Iterable[str]) -> Rules:
    """Returns rules that select exactly these weights."""
    return {f"^{re.escape(path)}$": PLACEHOLDER_CONFIG for path in paths}


def find_target_weights(request: MeasureRequest) -> dict[str, TargetWeight]:
    """Returns the selected weights by path, in the order of params.

    Raises:
        ValueError: As in `init` of `lora_transform`, or a weight is quantized.
        TypeError: A weight is abstract.
    """
    lora = lora_transform(request.fn, request.rules)
    key = jax.random.key(0)
    adapter = jax.eval_shape(lambda p, b: lora.init(key, p, b), request.params, request.first_batch)
    flat = _tree.flatten_with_paths(request.params)
    targets = {
        path: TargetWeight(i, flat.leaves[i], adapter[path].axes)
        for i, path in enumerate(flat.paths)
        if path in adapter
    }
    for path, target in targets.items():
        if is_quantized(target.value):
            raise ValueError(
                f"{path!r} is quantized ({target.value}), and codes have no gradient. Measure on "
                f"the weights before quantization, or on jlora.dequantize(params)."
            )
        if isinstance(target.value, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{path!r} must be an array, got only a shape. Call measure_importance with the "
                f"loaded parameters."
            )
    return targets


def group_into_passes(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Splits names into consecutive groups whose sizes add up to at most a limit.

    A name whose size exceeds the limit gets a group of its own.
    """
    passes: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not passes or total + size > limit:
            passes.append([])
            total = 0
        passes[-1].append(name)
        total += size
    return passes


def weight_as_matrices(target: TargetWeight) -> jax.Array:
    """Returns the weight as (batch, fan_in, fan_out)."""
    return weight_to_matrices(target.value, target.axes)
