"""One training step: gradients of the adapter alone, summed, normalised, clipped and applied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jlora.optim.offloading import offload
from jlora.training.optimizer import Optimizing

PyTree = Any


class Sums(NamedTuple):
    """What a loss function measured on some rows; divided by `weight`, each is a mean.

    Attributes:
        loss: In nats.
        weight: How many tokens, pairs or texts count.
        others: Further sums by name.
    """

    loss: jax.Array
    weight: jax.Array
    others: dict[str, jax.Array]


class LossFn(Protocol):
    """`(trained, frozen, batch, key)` to sums over the rows of one forward pass."""

    def __call__(
        self, trained: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array | None
    ) -> Sums: ...


class State(NamedTuple):
    """What a step replaces.

    Attributes:
        trained: `{"adapter": ...}`, and a `"head"` if the task adds one.
        optimizer: Its state.
        step: How many steps were made, skipped ones too.
        updates: How many of them changed something.
        skipped: How many steps in a row, the last one included, were not finite.
    """

    trained: PyTree
    optimizer: PyTree
    step: jax.Array
    updates: jax.Array
    skipped: jax.Array


class Measured(NamedTuple):
    """What one step measured.

    Attributes:
        loss: The mean over all that counts.
        weight: How many tokens, pairs or texts counted.
        gradient_norm: Before clipping.
        learning_rate: That was used.
        finite: Whether loss and gradient were. If not, the step changed nothing.
        skipped: How many steps in a row were not.
        others: Further means.
    """

    loss: jax.Array
    weight: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    skipped: jax.Array
    others: dict[str, jax.Array]


Step = Callable[[State, PyTree, PyTree, jax.Array], tuple[State, Measured]]


def initial(trained: PyTree, optimizing: Optimizing) -> State:
    """The state before the first step."""
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return State(trained, optimizing.transform.init(trained), *zeros)


def step_of(loss: LossFn, optimizing: Optimizing, clip_norm: float | None) -> Step:
    """The function `(state, frozen, batch, key)` to the next state and what was measured.

    Compile it with the state donated. A step whose loss or gradient is NaN or infinite leaves all
    but its counts as they were.

    Args:
        loss: Of the rows of one forward pass.
        optimizing: What makes steps of gradients.
        clip_norm: Gradients of a larger global norm are scaled down to it.
    """
    made_by = _skipping(optimizing.transform)
    if optimizing.offloaded:
        made_by = offload(made_by)

    def step(state: State, frozen: PyTree, batch: PyTree, key: jax.Array) -> tuple[State, Measured]:
        sums, gradient = _accumulated(
            loss, state.trained, frozen, batch, jax.random.fold_in(key, state.step)
        )
        weight = jnp.maximum(sums.weight, 1)
        mean = sums.loss / weight
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        norm = optax.tree.norm(gradient)
        # Looked at before clipping, which would make zeros of what is beside an infinite entry.
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        if clip_norm is not None:
            factor = jnp.minimum(1, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        updates, optimizer = made_by.update(gradient, state.optimizer, state.trained, finite=finite)
        moved = optax.apply_updates(state.trained, updates)
        trained = _chosen(finite, moved, state.trained)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        measured = Measured(
            loss=mean,
            weight=sums.weight,
            gradient_norm=norm,
            learning_rate=jnp.asarray(optimizing.schedule(state.updates)),
            finite=finite,
            skipped=skipped,
            others={name: value / weight for name, value in sums.others.items()},
        )
        made = state.updates + finite.astype(jnp.int32)
        return State(trained, optimizer, state.step + 1, made, skipped), measured

    return step


def _skipping(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose state stays as it was where it is told `finite=False`."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        updates, new = transform.update(updates, state, params)
        return updates, _chosen(extra["finite"], new, state)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _chosen(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _accumulated(
    loss: LossFn, trained: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array
) -> tuple[Sums, PyTree]:
    """The sums over all passes of a batch, whose arrays have them as first axis, and the gradient.

    The gradient is that of the sum of losses: the passes may hold different numbers of tokens, and
    a mean of their means would give each token of a short one more say.
    """

    def one(trained: PyTree, part: PyTree, key: jax.Array) -> tuple[jax.Array, Sums]:
        sums = loss(trained, frozen, part, key)
        return sums.loss, sums

    gradient_of = jax.grad(one, has_aux=True)
    passes = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda array: array[0], batch)
    if passes == 1:
        gradient, sums = gradient_of(trained, first, jax.random.fold_in(key, 0))
        return sums, gradient

    def add(carry: Any, given: tuple[PyTree, jax.Array]) -> tuple[Any, None]:
        part, number = given
        made = gradient_of(trained, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, made), None

    shapes = jax.eval_shape(gradient_of, trained, first, key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (gradient, sums), _ = lax.scan(add, zeros, (batch, jnp.arange(passes)))
    return sums, gradient


def evaluation_of(loss: LossFn) -> Callable[[PyTree, PyTree, PyTree], Sums]:
    """The function `(trained, frozen, batch)` to the sums over a batch.

    Nothing is dropped, and penalties do not count.
    """

    def evaluate(trained: PyTree, frozen: PyTree, batch: PyTree) -> Sums:
        def one(_: None, part: PyTree) -> tuple[None, Sums]:
            sums = loss(trained, frozen, part, None)
            others = dict(sums.others)
            return None, Sums(sums.loss - others.pop("penalty", 0), sums.weight, others)

        _, sums = lax.scan(one, None, batch)
        return jax.tree.map(lambda array: array.sum(axis=0), sums)

    return evaluate
