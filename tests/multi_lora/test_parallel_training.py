"""Parallel training of several adapters, compared with training each alone."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.cases import moved

import jlora
from jlora import multi_lora

K = 3
X = np.random.default_rng(0).standard_normal((K, 4, 6)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((K, 4, 7)).astype(np.float32)
# Sums of at most 6 products in float32 in another order, and four steps of Adam, which divides by
# the root of small squares.
STEPS = {"rtol": 1e-4, "atol": 1e-5}


def forward(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"]) @ params["second"]


@functools.cache
def make_model() -> tuple[jlora.LoraTransform, Any, list[Any]]:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(keys[0], (6, 5)),
        "second": jax.random.normal(keys[1], (5, 7)),
    }
    lora = jlora.lora_transform(forward, jlora.LoRA(rank=2, alpha=3))
    fresh = lora.init(jax.random.key(1), params, X[0])
    return lora, params, [moved(fresh, seed) for seed in range(K)]


def loss(adapter: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    lora, params, _ = make_model()
    return ((lora.apply(params, adapter, x) - y) ** 2).mean()


def run_alone(adapter: Any, optimizer: Any, x: Any, y: Any, steps: int) -> tuple[Any, list[float]]:
    state = optimizer.init(adapter)
    losses = []
    for _ in range(steps):
        value, gradient = jax.value_and_grad(loss)(adapter, x, y)
        updates, state = optimizer.update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        losses.append(float(value))
    return adapter, losses


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2),
        # A norm over all adapters together would scale each by the others' gradients.
        optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5)),
        jlora.lora_optimizer(optax.adam(1e-2), lr_multipliers={"b": 4.0}),
    ],
    ids=["adamw", "clipped", "lora_plus"],
)
@pytest.mark.slow
def test_law_parallel_step_matches_separate_runs(optimizer: Any) -> None:
    _, _, adapters = make_model()
    trainer = multi_lora.train_in_parallel(loss, optimizer)
    step = jax.jit(trainer.step)
    stacked = multi_lora.stack_adapters(adapters)
    state = trainer.init(stacked)
    losses = []
    for _ in range(4):
        stacked, state, values = step(stacked, state, X, Y)
        losses.append(np.asarray(values))
    for number, ended in enumerate(multi_lora.unstack_adapters(stacked)):
        alone, own = run_alone(adapters[number], optimizer, X[number], Y[number], 4)
        chex.assert_trees_all_close(ended, alone, **STEPS)
        np.testing.assert_allclose([values[number] for values in losses], own, rtol=1e-5)


def test_parallel_step_nan_stays_in_its_adapter() -> None:
    _, _, adapters = make_model()
    trainer = multi_lora.train_in_parallel(loss, optax.adam(1e-2))
    stacked = multi_lora.stack_adapters(adapters)
    y = Y.copy()
    y[1, 0, 0] = np.nan
    step = jax.jit(trainer.step)
    broken, state, losses = step(stacked, trainer.init(stacked), X, y)
    broken, _, _ = step(broken, state, X, y)
    assert np.isnan(np.asarray(losses)).tolist() == [False, True, False]
    for number, ended in enumerate(multi_lora.unstack_adapters(broken)):
        if number == 1:
            continue
        alone, _ = run_alone(adapters[number], optax.adam(1e-2), X[number], Y[number], 2)
        chex.assert_trees_all_close(ended, alone, **STEPS)


def test_parallel_step_learning_rates_may_differ() -> None:
    _, _, adapters = make_model()
    rates = jnp.array([1e-1, 1e-2, 0.0])
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    trainer = multi_lora.train_in_parallel(loss, optimizer)
    stacked = multi_lora.stack_adapters(adapters)
    state = trainer.init(stacked)
    state = state._replace(hyperparams={**state.hyperparams, "learning_rate": rates})
    ended, _, _ = jax.jit(trainer.step)(stacked, state, X, Y)
    for number, one in enumerate(multi_lora.unstack_adapters(ended)):
        own = optax.sgd(float(rates[number]))
        alone, _ = run_alone(adapters[number], own, X[number], Y[number], 1)
        chex.assert_trees_all_close(one, alone, **STEPS)


def test_parallel_step_does_not_repeat_the_base() -> None:
    _, params, adapters = make_model()
    trainer = multi_lora.train_in_parallel(loss, optax.sgd(0.1))
    stacked = multi_lora.stack_adapters(adapters)
    text = str(jax.make_jaxpr(trainer.step)(stacked, trainer.init(stacked), X, Y))
    for leaf in params.values():
        shape = ",".join(map(str, leaf.shape))
        assert f"f32[{K},{shape}]" not in text, "a weight, or its gradient, for each adapter"


def test_stack_adapters_invalid_raises() -> None:
    lora, params, adapters = make_model()
    other = jlora.lora_transform(forward, jlora.LoRA(rank=3, alpha=3)).init(
        jax.random.key(0), params, X[0]
    )
    with pytest.raises(ValueError, match=r"adapters\[1\] must have the weights"):
        multi_lora.stack_adapters([adapters[0], other])
    with pytest.raises(ValueError, match=r"adapters=\[\] must have one adapter or more"):
        multi_lora.stack_adapters([])
    with pytest.raises(ValueError, match="of a stack of adapters must have a first axis"):
        multi_lora.unstack_adapters(adapters[0])
    trainer = multi_lora.train_in_parallel(loss, optax.sgd(0.1))
    stacked = multi_lora.stack_adapters(adapters)
    with pytest.raises(ValueError, match=r"Leaf 1 of the batch .* got shape \(12, 7\)"):
        trainer.step(stacked, trainer.init(stacked), X, Y.reshape(12, 7))
    assert lora


def test_unstack_adapters_inverts_stack() -> None:
    _, _, adapters = make_model()
    for one, again in zip(
        adapters, multi_lora.unstack_adapters(multi_lora.stack_adapters(adapters)), strict=True
    ):
        chex.assert_trees_all_equal(one, again)
        assert jax.tree.structure(one) == jax.tree.structure(again)
