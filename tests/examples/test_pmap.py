"""The example of pmap and shard_map: eight devices train as one does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import pmap


@pytest.mark.slow
def test_pmap_and_shard_map_match_one_device() -> None:
    assert jax.local_device_count() == 8
    x = jax.random.normal(jax.random.key(0), (64, 16))
    y = jnp.sin(x[:, :8])
    params = pmap.MODEL.init(jax.random.key(1), x)
    adapter = pmap.LORA.init(jax.random.key(2), params, x)

    @jax.jit
    def step(adapter: pmap.Tree, state: pmap.Tree) -> tuple[pmap.Tree, pmap.Tree, jax.Array]:
        loss, gradient = jax.value_and_grad(pmap.loss_of)(adapter, params, x, y)
        updates, state = pmap.OPTIMIZER.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    alone, state, losses = adapter, pmap.OPTIMIZER.init(adapter), []
    for _ in range(5):
        alone, state, loss = step(alone, state)
        losses.append(float(loss))
    for run in (pmap.with_pmap, pmap.with_shard_map):
        found, theirs = run(adapter, params, x, y, steps=5)
        np.testing.assert_allclose(theirs, losses, rtol=1e-5)  # Means in another order.
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            # Adam divides small gradients by their size: rounding moves a step of 1e-2 a little.
            np.testing.assert_allclose(one, two, atol=2e-4)
    assert losses[-1] < losses[0]
