"""Offloading on a GPU: it frees device memory and computes the same."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jlora

pytestmark = pytest.mark.gpu
# Activations take several times the memory of the moments.
WIDTH, LAYERS, ROWS, PASSES = 4096, 6, 16384, 3


@pytest.fixture(autouse=True)
def on_a_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU; set JAX_PLATFORMS=cuda where there is one")


def parameters() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    drawn = [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]
    return jax.device_put(drawn, place)


def step(optimizer: Any, scanned: bool, params: Any, state: Any, batch: jax.Array) -> Any:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def add(total: Any, x: jax.Array) -> Any:
        return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

    if scanned:
        gradient = lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)[0]
    else:
        gradient = jax.grad(loss)(params, batch[0])
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def compiled(optimizer: Any, scanned: bool) -> tuple[Any, Any, Any, jax.Array]:
    params = parameters()
    state = optimizer.init(params)
    batch = jax.random.normal(jax.random.key(1), (PASSES, ROWS, WIDTH))
    places = jax.tree.map(lambda array: array.sharding, (params, state))
    run = jax.jit(
        functools.partial(step, optimizer, scanned), donate_argnums=(0, 1), out_shardings=places
    )
    return run.lower(params, state, batch).compile(), params, state, batch


def on_device(program: Any) -> int:
    """Peak bytes in device memory; the value from JAX includes host memory."""
    stats = program.memory_analysis()
    return stats.peak_memory_in_bytes - stats.host_argument_size_in_bytes


@pytest.mark.parametrize("scanned", [False, True], ids=["one pass", "scan"])
def test_offload_step_is_exact_and_saves_memory(scanned: bool) -> None:
    ends, peaks = [], []
    for optimizer in (optax.adam(1e-3), jlora.offload(optax.adam(1e-3))):
        program, params, state, batch = compiled(optimizer, scanned)
        for _ in range(3):
            params, state = program(params, state, batch)
        ends.append(jax.tree.map(np.asarray, (params, state)))
        peaks.append(on_device(program))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"pinned_host"}
    for one, two in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), strict=True):
        assert one.tobytes() == two.tobytes()
    moments = 2 * LAYERS * WIDTH * WIDTH * 4
    # All but the part in device memory during the update: on an H100 it saves two thirds.
    assert peaks[0] - peaks[1] > 0.5 * moments


@pytest.mark.parametrize("passes", [1, 3])
def test_check_offload_passes(passes: int) -> None:
    params = parameters()
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jlora.offload(transform).init(params)
    jlora.check_offload(transform, params, state, accumulation_steps=passes)
