"""Mixing weights fitted to a few examples of a task, with and without gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
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
    """A weighted adapter with its best mixing weights.

    Attributes:
        adapter: Weighted adapter with the best weights; `fold_weights` converts it to plain LoRA.
        weights: Best weights, (n,), in the order of `adapter_names`; by path if they were fitted
            layer by layer.
        loss: Loss of the examples at the best weights.
        history: Minimized value of each trial or step in turn; for `lorahub` it includes the
            penalty.

    Example:
        >>> import numpy as np
        >>> from jlora.merging import FusionResult
        >>> result = FusionResult({}, np.array([0.5, 0.5]), 0.25, (1.0, 0.25))
        >>> result.loss == min(result.history)
        True
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
    """Fits mixing weights to a few examples by a search without gradients (LoraHub).

    Minimizes `loss_fn + l1_penalty * mean |w|` over weights in `[-bound, bound]` by CMA-ES. The
    first trial is the base alone, so the result is never worse than the base. Equal seeds give
    equal results.

    Args:
        loss_fn: Function from `(adapter, *args)` to a number. It is not differentiated. Pass a
            jitted one: all trials have the same shapes, so it compiles once.
        weighted_adapter: Result of `weighted_sum`. Its weights are ignored.
        *args: Further arguments of `loss_fn`, such as the parameters and the examples.
        num_trials: Number of trials, 1 or more.
        seed: Seed of the search.
        bound: Largest absolute weight, above 0.
        l1_penalty: Factor of the mean absolute weight, 0 or more.

    Returns:
        The weighted adapter with the best weights, and the history of the search.

    Raises:
        ValueError: A value is out of its range, or the loss of the base alone is not finite.
        ModuleNotFoundError: The package cmaes is not installed.

    References:
        Huang et al., LoraHub, arXiv:2307.13269, section 3. The mean in the penalty, the bound and
        the initial weights of zero are those of its code (sail-sg/lorahub). LoraHub multiplies the
        sum of `w_i A_i` with the sum of `w_i B_i`, which multiplies every `A_i` with every `B_j`
        and requires one rank for all adapters; here each adapter's own update is weighted. The
        search is the CMA-ES of the package cmaes instead of Nevergrad's.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import lorahub, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> mix = weighted_sum({"law": lora.init(jax.random.key(0), params, x)})
        >>> loss_fn = lambda adapter: float(abs(adapter["w"].weights - 0.5).sum())
        >>> lorahub(loss_fn, mix, num_trials=1).loss  # doctest: +SKIP
        0.5
    """
    _validation.check_positive_int("num_trials", num_trials)
    _validation.check_positive("bound", bound)
    _validation.check_nonnegative("l1_penalty", l1_penalty)
    optimizer = _cma_optimizer(len(adapter_names(weighted_adapter)), bound, seed)
    trials: list[tuple[np.ndarray, float, float]] = []  # weights, loss, loss with the penalty
    generation: list[tuple[np.ndarray, float]] = []
    for number in range(num_trials):
        weights = optimizer.ask() if number else np.zeros(optimizer.dim)
        loss = float(loss_fn(with_weights(weighted_adapter, weights), *args))
        if not number and not math.isfinite(loss):
            raise ValueError(
                f"loss={loss} of the base alone must be finite, since trials are compared with "
                f"it. Check the examples and the base."
            )
        penalized = loss + l1_penalty * float(np.abs(weights).mean())
        # A trial that overflows counts as the worst, so that the search moves elsewhere.
        penalized = penalized if math.isfinite(penalized) else math.inf
        trials.append((weights, loss, penalized))
        if number:  # The base alone is no sample of the search's distribution.
            generation.append((weights, penalized))
        if len(generation) == optimizer.population_size:
            optimizer.tell(generation)
            generation = []
    weights, loss, _ = min(trials, key=lambda one: one[2])
    return FusionResult(
        with_weights(weighted_adapter, weights), weights, loss, tuple(one[2] for one in trials)
    )


def fit_weights(
    loss_fn: AdapterLossFn,
    weighted_adapter: Mapping[str, Any],
    *args: Any,
    num_steps: int,
    optimizer: optax.GradientTransformation,
    layer_wise: bool = False,
) -> FusionResult:
    """Fits mixing weights to a few examples with an optimizer, starting at the current weights.

    Only the weights are differentiated: the program computes no gradient of a factor. The result
    has the best weights of all steps.

    Args:
        loss_fn: Differentiable function from `(adapter, *args)` to a scalar. The program is
            compiled once for a loss, an optimizer and a number of steps.
        weighted_adapter: Result of `weighted_sum`.
        *args: Further arguments of `loss_fn`, such as the parameters and the examples.
        num_steps: Number of optimizer steps, 1 or more.
        optimizer: Optax optimizer, such as `optax.adam(0.05)`.
        layer_wise: True for separate weights (n,) of each weight of the model, and of each layer
            of a stack where the adapter already has those; False for the same weights everywhere.

    Returns:
        The weighted adapter with the best weights, and the loss before each step and after the
        last.

    Raises:
        ValueError: `num_steps` is less than 1; the paths of the adapter have different weights and
            `layer_wise` is False; or no loss is finite.

    References:
        Yang et al., AdaMerging, arXiv:2310.02575, for task-wise and layer-wise weights.
        The loss of the paper is the entropy of the outputs.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> from jlora.merging import fit_weights, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> mix = weighted_sum({"law": lora.init(jax.random.key(0), params, x)}, [0.0])
        >>> loss_fn = lambda adapter: ((adapter["w"].weights - 0.5) ** 2).sum()
        >>> fit_weights(loss_fn, mix, num_steps=1, optimizer=optax.sgd(0.5)).weights
        array([0.5], dtype=float32)
    """
    _validation.check_positive_int("num_steps", num_steps)
    initial_weights: Any = get_weights(weighted_adapter)
    if not layer_wise:
        initial_weights = _require_uniform_weights(weighted_adapter)

    trajectory, losses = _optimize_weights(
        loss_fn, optimizer, num_steps, initial_weights, dict(weighted_adapter), args
    )
    history = np.asarray(losses, np.float64)
    if not np.isfinite(history).any():
        raise ValueError(
            f"loss={history[0]} must be finite at the initial weights or at a later step. Check "
            f"the examples, or start with smaller weights."
        )
    best = int(np.where(np.isfinite(history), history, np.inf).argmin())
    weights = jax.tree.map(lambda steps: np.asarray(steps[best]), trajectory)
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
    """Returns the weights before each step and after the last, stacked, and the loss at each."""

    def objective(weights: Any) -> jax.Array:
        return loss_fn(with_weights(weighted_adapter, weights), *args)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        weights, state = carry
        loss, gradient = jax.value_and_grad(objective)(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), (weights, loss)

    (final, _), (before, losses) = jax.lax.scan(
        step, (initial_weights, optimizer.init(initial_weights)), length=num_steps
    )
    trajectory = jax.tree.map(
        lambda steps, last: jnp.concatenate([steps, last[None]]), before, final
    )
    return trajectory, jnp.append(losses, objective(final))


def _require_uniform_weights(weighted_adapter: Mapping[str, Any]) -> jax.Array:
    """Returns the weights that all paths of a weighted adapter have in common."""
    first, *rest = check_weighted_adapter(weighted_adapter).values()
    if any(not np.array_equal(first.weights, leaf.weights) for leaf in rest) or first.layered:
        raise ValueError(
            "layer_wise=False requires the same weights for all paths, and those of "
            "weighted_adapter differ. Use layer_wise=True, or start from "
            "with_weights(weighted_adapter, weights)."
        )
    return first.weights


def _cma_optimizer(num_weights: int, bound: float, seed: int) -> Any:
    """Returns a CMA-ES optimizer around zero with a sixth of the range as its deviation."""
    try:
        import cmaes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lorahub requires the package cmaes, which is not installed. Run "
            '`pip install "jlora[search]"`.'
        ) from error
    bounds = np.tile([-bound, bound], (num_weights, 1))  # (n, 2)
    return cmaes.CMA(mean=np.zeros(num_weights), sigma=bound / 3, bounds=bounds, seed=seed)
