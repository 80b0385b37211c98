"""Data-parallel LoRA with `jax.pmap` and `jax.shard_map`.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/pmap.py

Each device has its part of the batch, and gradients are averaged over the devices. New code is
shorter with `jax.jit` and shardings, as in `jlora train`; this example is for programs that use
either of these two transforms.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

import jlora

Tree = Any

MODEL = nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(8)])
LORA = jlora.lora_transform(MODEL.apply, {"kernel": jlora.LoRA(rank=4, alpha=8)})
OPTIMIZER = jlora.lora_optimizer(optax.adam(1e-2))


def loss_of(adapter: Tree, params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean squared error of a batch."""
    return jnp.mean((LORA.apply(params, adapter, x) - y) ** 2)


def step(
    adapter: Tree, state: Tree, params: Tree, x: jax.Array, y: jax.Array
) -> tuple[Tree, Tree, jax.Array]:
    """Runs one device's part of a step, with loss and gradient averaged over the devices.

    Only the adapter has gradients, so only those are communicated.
    """
    loss, gradient = jax.value_and_grad(loss_of)(adapter, params, x, y)
    loss, gradient = jax.lax.pmean((loss, gradient), axis_name="devices")
    updates, state = OPTIMIZER.update(gradient, state, adapter)
    return optax.apply_updates(adapter, updates), state, loss


def with_pmap(
    adapter: Tree, params: Tree, x: jax.Array, y: jax.Array, steps: int
) -> tuple[Tree, list[float]]:
    """Returns the adapter after some steps, and their losses; each device has a full copy."""
    count = jax.local_device_count()
    run = jax.pmap(step, axis_name="devices", in_axes=(0, 0, None, 0, 0), donate_argnums=(0, 1))
    copies = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * count), tree)  # noqa: E731
    rows = lambda a: a.reshape(count, -1, *a.shape[1:])  # noqa: E731
    replicated, state = copies(adapter), copies(OPTIMIZER.init(adapter))
    losses = []
    for _ in range(steps):
        replicated, state, loss = run(replicated, state, params, rows(x), rows(y))
        losses.append(float(loss[0]))
    return jax.tree.map(lambda a: a[0], replicated), losses


def with_shard_map(
    adapter: Tree, params: Tree, x: jax.Array, y: jax.Array, steps: int
) -> tuple[Tree, list[float]]:
    """Returns the same with `jax.shard_map` under `jax.jit`."""
    mesh = Mesh(jax.devices(), ("devices",))
    replicated, rows = PartitionSpec(), PartitionSpec("devices")
    # Without check_vma, gradients stay per device until `pmean`, as under pmap.
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    run = jax.jit(
        shard(
            step,
            in_specs=(replicated, replicated, replicated, rows, rows),
            out_specs=(replicated, replicated, replicated),
        )
    )
    state = OPTIMIZER.init(adapter)
    losses = []
    for _ in range(steps):
        adapter, state, loss = run(adapter, state, params, x, y)
        losses.append(float(loss))
    return adapter, losses


def main() -> None:
    """Trains with each and prints the losses."""
    x = jax.random.normal(jax.random.key(0), (64, 16))
    y = jnp.sin(x[:, :8])
    params = MODEL.init(jax.random.key(1), x)
    adapter = LORA.init(jax.random.key(2), params, x)
    for name, run in (("pmap", with_pmap), ("shard_map", with_shard_map)):
        _, losses = run(adapter, params, x, y, steps=50)
        print(f"{name}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")


if __name__ == "__main__":
    main()
