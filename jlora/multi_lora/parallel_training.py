"""Several adapters trained at once on one base: one batch, in which each has rows of its own.

All have the same rules, so they are one pytree whose arrays have a first axis that counts them.
What is computed for one is mapped over that axis; the base is not, and its products are those of
one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jlora._tree import PyTree


class ParallelStepFn(Protocol):
    def __call__(
        self, adapters: PyTree, state: PyTree, *batch: PyTree
    ) -> tuple[PyTree, PyTree, jax.Array]: ...


class ParallelTrainer(NamedTuple):
    """Training of several adapters at once, as pure functions.

    For every adapter the result is that of a run of its own, up to rounding: losses, gradients,
    their clipping and the optimizer's state are all its own. A NaN stays with its adapter.

    Attributes:
        init: `(adapters)` to the optimizer's state, each array with the adapters' axis first.
        step: `(adapters, state, *batch)` to the new two and the losses (adapters,), those of
            before the step. Run it under `jax.jit`.
    """

    init: Callable[[PyTree], PyTree]
    step: ParallelStepFn


def stack_adapters(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adapters of the same rules as one, the first axis of whose arrays counts them.

    Raises:
        ValueError: When there are none, or they differ in more than their numbers.
    """
    if not adapters:
        raise ValueError("stack got no adapters. Give one or more of the same rules.")
    structure = jax.tree.structure(adapters[0])
    for number, adapter in enumerate(adapters):
        if jax.tree.structure(adapter) != structure:
            raise ValueError(
                f"Adapter {number} differs from the first in more than its numbers: in its "
                f"weights, family, rank or alpha. Initialise all with the same rules; adapters of "
                f"several ranks can share a batch in jlora.multi_lora.AdapterBank."
            )
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *adapters)


def unstack_adapters(adapters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a stack, one by one."""
    count = _count_stacked_adapters(adapters)
    return [jax.tree.map(lambda array, n=n: array[n], dict(adapters)) for n in range(count)]


def train_in_parallel(
    loss_fn: Callable[..., jax.Array], optimizer: optax.GradientTransformation
) -> ParallelTrainer:
    """Steps of several adapters at once.

    Args:
        loss_fn: `(adapter, *batch)` of one adapter and its own rows to a number, as for one alone.
        optimizer: For one adapter; each gets a state of its own. Numbers that are to differ
            between adapters, such as learning rates, are in the state of
            `optax.inject_hyperparams`, with the adapters' axis.
    """
    extended = optax.with_extra_args_support(optimizer)

    def init(adapters: PyTree) -> PyTree:
        return jax.vmap(extended.init)(adapters)

    def step(adapters: PyTree, state: PyTree, *batch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
        count = _count_stacked_adapters(adapters)
        for number, leaf in enumerate(jax.tree.leaves(batch)):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != count:
                raise ValueError(
                    f"Leaf {number} of the batch has shape {jnp.shape(leaf)}, and its first axis "
                    f"must count the {count} adapters: each has rows of its own. Reshape (rows, "
                    f"...) to ({count}, rows / {count}, ...), or repeat what all share."
                )
        # Gradients of the sum, because reverse mode inside a map would run once for each adapter.
        losses, pull_back = jax.vjp(lambda adapters: jax.vmap(loss_fn)(adapters, *batch), adapters)
        (gradients,) = pull_back(jnp.ones_like(losses))
        updates, state = jax.vmap(extended.update)(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, losses

    return ParallelTrainer(init, step)


def _count_stacked_adapters(adapters: Mapping[str, Any]) -> int:
    counts = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(adapters)}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"The arrays have first axes of {sorted(map(str, counts))}, so they are no stack of "
            f"adapters. Make one with jlora.multi_lora.stack."
        )
    (count,) = counts
    assert count is not None
    return count
