"""Training of several adapters at once on one base, each with its own examples of the batch.

The adapters are initialized with the same rules, so that they can be stacked to one pytree whose
arrays have a leading adapter axis. The computation of one adapter is mapped over that axis. The
base is not mapped, and its products are those of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jlora._tree import PyTree


class ParallelStepFn(Protocol):
    """Signature of `ParallelTrainer.step`."""

    def __call__(
        self, adapters: PyTree, state: PyTree, *batch: PyTree
    ) -> tuple[PyTree, PyTree, jax.Array]: ...


class ParallelTrainer(NamedTuple):
    """Training of several adapters at once, as pure functions.

    For every adapter the result is that of a separate run, up to rounding: losses, gradients,
    gradient clipping and optimizer state are computed for each adapter alone. NaN in one adapter
    does not reach another.

    Attributes:
        init: Function `(adapters) -> state`: the optimizer state, each array of which has the
            adapter axis first.
        step: Function `(adapters, state, *batch) -> (adapters, state, losses)`, with losses of
            shape (adapters,), computed before the update. Run it under `jax.jit`.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import optax
        >>> from jlora import multi_lora
        >>> loss = lambda adapter, x: ((x @ adapter["w"]) ** 2).mean()
        >>> trainer = multi_lora.train_in_parallel(loss, optax.sgd(0.1))
        >>> adapters, x = {"w": np.ones((2, 3), np.float32)}, np.ones((2, 4, 3), np.float32)
        >>> adapters, state, losses = jax.jit(trainer.step)(adapters, trainer.init(adapters), x)
        >>> losses.tolist()
        [9.0, 9.0]
    """

    init: Callable[[PyTree], PyTree]
    step: ParallelStepFn


def stack_adapters(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns adapters of the same rules as one, whose arrays have the adapter axis first.

    Args:
        adapters: One or more adapters that differ in nothing but the values of their arrays.

    Raises:
        ValueError: There are no adapters, or they differ in weights, family, rank or alpha.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((1, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapters = [lora.init(jax.random.key(seed), params, x) for seed in (0, 1)]
        >>> multi_lora.stack_adapters(adapters)["w"].a.shape
        (2, 3, 2)
    """
    if not adapters:
        raise ValueError("adapters=[] must have one adapter or more, all of the same rules.")
    structure = jax.tree.structure(adapters[0])
    for number, adapter in enumerate(adapters):
        if jax.tree.structure(adapter) != structure:
            raise ValueError(
                f"adapters[{number}] must have the weights, family, rank and alpha of adapters[0]. "
                f"Initialize all with the same rules; adapters of several ranks can share a batch "
                f"in jlora.multi_lora.AdapterBank."
            )
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *adapters)


def unstack_adapters(adapters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the adapters of a stack as a list.

    Args:
        adapters: Result of `stack_adapters`, or of training steps on it.

    Raises:
        ValueError: The arrays do not have a first axis of one size.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((1, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapters = [lora.init(jax.random.key(seed), params, x) for seed in (0, 1)]
        >>> len(multi_lora.unstack_adapters(multi_lora.stack_adapters(adapters)))
        2
    """
    count = _count_stacked_adapters(adapters)
    return [jax.tree.map(lambda array, n=n: array[n], dict(adapters)) for n in range(count)]


def train_in_parallel(
    loss_fn: Callable[..., jax.Array], optimizer: optax.GradientTransformation
) -> ParallelTrainer:
    """Returns functions that train several adapters at once.

    Args:
        loss_fn: Function `(adapter, *batch)` from one adapter and its own examples to a scalar
            loss, as for training it alone.
        optimizer: Optimizer of one adapter; each adapter gets its own state. Hyperparameters that
            differ between adapters, such as learning rates, belong into the state of
            `optax.inject_hyperparams`, with the adapter axis.

    Returns:
        Pure functions. `step` raises ValueError for a batch whose arrays do not have the adapter
        axis first.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import optax
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((2, 4, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapters = [lora.init(jax.random.key(seed), params, x[0]) for seed in (0, 1)]
        >>> loss = lambda adapter, x: (lora.apply(params, adapter, x) ** 2).mean()
        >>> trainer = multi_lora.train_in_parallel(loss, optax.sgd(0.1))
        >>> stacked = multi_lora.stack_adapters(adapters)
        >>> stacked, state, losses = jax.jit(trainer.step)(stacked, trainer.init(stacked), x)
        >>> losses.shape
        (2,)
    """
    extended = optax.with_extra_args_support(optimizer)

    def init(adapters: PyTree) -> PyTree:
        return jax.vmap(extended.init)(adapters)

    def step(adapters: PyTree, state: PyTree, *batch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
        count = _count_stacked_adapters(adapters)
        for number, leaf in enumerate(jax.tree.leaves(batch)):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != count:
                raise ValueError(
                    f"Leaf {number} of the batch must have a first axis of size {count}, one entry "
                    f"for each adapter, got shape {jnp.shape(leaf)}. Reshape (batch, ...) to "
                    f"({count}, batch / {count}, ...), or repeat arrays that all adapters share."
                )
        # Gradients of the summed loss: reverse mode inside the map would run once an adapter.
        losses, pull_back = jax.vjp(lambda adapters: jax.vmap(loss_fn)(adapters, *batch), adapters)
        (gradients,) = pull_back(jnp.ones_like(losses))
        updates, state = jax.vmap(extended.update)(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, losses

    return ParallelTrainer(init, step)


def _count_stacked_adapters(adapters: Mapping[str, Any]) -> int:
    counts = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(adapters)}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"The arrays of a stack of adapters must have a first axis of one size, got "
            f"{sorted(map(str, counts))}. Stack adapters with jlora.multi_lora.stack_adapters."
        )
    (count,) = counts
    assert count is not None
    return count
