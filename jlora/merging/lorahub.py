"""The weights of a mix, found from a few examples of a task."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import _validation
from jlora.adapters.weighted_sum import WeightedSumLeaf
from jlora.merging.weighted import adapter_names, check_weighted_adapter, get_weights, with_weights

AdapterLossFn = Callable[..., Any]


class FusionResult(NamedTuple):
    """A mix under the best weights that were found.

    Attributes:
        adapter: The mix under them; `fixed` makes plain LoRA of it.
        weights: (n,) numbers, in the order of the mix's names; for each path where they were found
            layer by layer.
        loss: Of the examples, at those weights.
        history: What was minimised, at every try in turn: for `lorahub` with the penalty.
    """

    adapter: dict[str, WeightedSumLeaf]
    weights: Any
    loss: float
    history: tuple[float, ...]


def lorahub(
    loss_fn: AdapterLossFn,
    weighted_adapter: Mapping[str, Any],
    *args: Any,
    num_trials: int = 40,
    seed: int = 0,
    bound: float = 1.5,
    l1_penalty: float = 0.05,
) -> FusionResult:
    """The weights that a search without gradients finds for a few examples (LoraHub).

    It minimises `loss_fn + penalty * mean |w|` over weights in `[-bound, bound]` by CMA-ES. The bare
    base is tried first, so the result is never worse than that. The same seed finds the same.

    Args:
        loss_fn: From `(adapter, *arguments)` to a number; any function, as nothing is differentiated.
            Give a jitted one: all tries have the same shapes, so it compiles once.
        weighted_adapter: What `mixed` returned. Its own weights are not looked at.
        *args: Passed on, such as the parameters and the examples.
        num_trials: How many tries; a positive count.
        seed: Of the search.
        bound: Of the absolute weights; positive.
        l1_penalty: On their mean absolute value; 0 or more.

    Raises:
        ValueError: For a value out of its range, or when the loss of the bare base is not finite.
        ModuleNotFoundError: When Optuna or cmaes is missing.

    References:
        Huang et al., LoraHub, arXiv:2307.13269, section 3; the mean in the penalty, the bound and
        zero weights to begin with as in its code (sail-sg/lorahub). There the sums of `w_i A_i` and
        of `w_i B_i` are multiplied, which takes every `A_i` times every `B_j` and needs one rank
        for all; here each adapter's own change is weighed. The search is Optuna's CMA-ES instead of
        Nevergrad's.
    """
    _validation.check_positive_int("num_trials", num_trials)
    _validation.check_positive("bound", bound)
    _validation.check_nonnegative("l1_penalty", l1_penalty)
    names = adapter_names(weighted_adapter)
    tries: list[tuple[np.ndarray, float, float]] = []  # weights, loss, with the penalty
    with _cmaes_study(seed) as study:
        study.enqueue_trial(dict.fromkeys(names, 0.0))
        for _ in range(num_trials):
            trial = study.ask()
            found = [trial.suggest_float(name, -bound, bound) for name in names]
            weights = np.array(found)
            value = float(loss_fn(with_weights(weighted_adapter, weights), *args))
            total = value + l1_penalty * float(np.abs(weights).mean())
            if not tries and not math.isfinite(value):
                raise ValueError(
                    f"loss={value} of the bare base is not finite, so nothing can be compared. "
                    f"Look at the examples and the base."
                )
            # A try that overflows is as bad as can be, and the search goes elsewhere.
            tries.append((weights, value, total if math.isfinite(total) else math.inf))
            study.tell(trial, min(tries[-1][2], float(np.finfo(np.float64).max)))
    weights, value, _ = min(tries, key=lambda one: one[2])
    return FusionResult(
        with_weights(weighted_adapter, weights), weights, value, tuple(one[2] for one in tries)
    )


def fit_weights(
    loss_fn: AdapterLossFn,
    weighted_adapter: Mapping[str, Any],
    *args: Any,
    num_steps: int,
    optimizer: optax.GradientTransformation,
    layer_wise: bool = False,
) -> FusionResult:
    """The weights that an optimizer finds for a few examples, starting at the mix's own.

    The weights alone are differentiated: no gradient of a factor is formed. The best of all steps
    is returned.

    Args:
        loss_fn: From `(adapter, *arguments)` to a scalar that can be differentiated. The program is
            compiled once for a loss, an optimizer and a count of steps.
        weighted_adapter: What `mixed` returned.
        *args: Passed on, such as the parameters and the examples.
        num_steps: How many; a positive count.
        optimizer: Such as `optax.adam(0.05)`.
        layer_wise: Whether each weight of the model gets its own `n` numbers, and each of a stack's
            layers its own where the mix's weights are so.

    Raises:
        ValueError: When the mix has different weights for different paths and `layer_wise` is off,
            or when no loss is finite.

    References:
        Yang et al., AdaMerging, arXiv:2310.02575, section 3, for weights by task and by layer;
        there the loss is the entropy of the outputs.
    """
    _validation.check_positive_int("num_steps", num_steps)
    start: Any = get_weights(weighted_adapter)
    if not layer_wise:
        start = _require_uniform_weights(weighted_adapter)

    passed, values = _optimize_weights(
        loss_fn, optimizer, num_steps, start, dict(weighted_adapter), args
    )
    history = np.asarray(values, np.float64)
    if not np.isfinite(history).any():
        raise ValueError(
            f"loss={history[0]} is not finite at the mix's own weights nor after. Look at the "
            f"examples, or start with smaller weights."
        )
    best = int(np.where(np.isfinite(history), history, np.inf).argmin())
    weights = jax.tree.map(lambda one: np.asarray(one[best]), passed)
    return FusionResult(
        with_weights(weighted_adapter, weights),
        weights,
        history[best].item(),
        tuple(history.tolist()),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _optimize_weights(
    loss_fn: AdapterLossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    initial_weights: Any,
    weighted_adapter: Any,
    args: tuple[Any, ...],
) -> tuple[Any, jax.Array]:
    """The weights before every step and after the last, stacked, and the losses at each."""

    def objective(weights: Any) -> jax.Array:
        return loss_fn(with_weights(weighted_adapter, weights), *args)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        weights, state = carry
        value, slope = jax.value_and_grad(objective)(weights)
        updates, state = optimizer.update(slope, state, weights)
        return (optax.apply_updates(weights, updates), state), (weights, value)

    (last, _), (passed, values) = jax.lax.scan(
        step, (initial_weights, optimizer.init(initial_weights)), length=num_steps
    )
    passed = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), passed, last)
    return passed, jnp.append(values, objective(last))


def _require_uniform_weights(weighted_adapter: Mapping[str, Any]) -> jax.Array:
    """The weights that all paths of a mix have."""
    first, *rest = check_weighted_adapter(weighted_adapter).values()
    if any(not np.array_equal(first.weights, leaf.weights) for leaf in rest) or first.layered:
        raise ValueError(
            "The mix has weights for each path, and layer_wise=False would set them all alike. Use "
            "layer_wise=True, or start from with_weights(mix, numbers)."
        )
    return first.weights


@contextlib.contextmanager
def _cmaes_study(seed: int) -> Iterator[Any]:
    """A study of Optuna's that minimises by CMA-ES, in silence."""
    try:
        import cmaes  # noqa: F401
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"fuse searches with Optuna's CMA-ES, and {error.name!r} is missing. Run "
            f'`pip install "jlora[search]"`.'
        ) from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        # With one weight there is no covariance, and Optuna's sampler draws at random.
        sampler = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        yield optuna.create_study(sampler=sampler)
    finally:
        optuna.logging.set_verbosity(before)
