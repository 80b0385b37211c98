"""`apply` under the transformations of JAX, on eight CPU devices."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import case, moved, total
from _support.layer_zoo import normal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.interpreter import _compat

COMPOSED = ["dense_general", "conv_groups", "linen_scan_remat", "tied_embedding", "experts"]
# Sums of at most 60 products of values near one in float32, in another order.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def inputs_like(one: Any, count: int) -> Any:
    """Other inputs of the same kind."""
    return [tuple(jnp.roll(x, shift, -1) for x in one.inputs) for shift in range(count)]


@pytest.mark.parametrize("name", COMPOSED)
def test_vmap_over_adapters_equals_single_calls(name: str) -> None:
    one = case(name, "float32")
    adapters = [moved(one.fresh, seed) for seed in (3, 4, 5)]
    apart = [one.compiled(one.params, adapter, *one.inputs) for adapter in adapters]
    run = jax.jit(jax.vmap(one.lora.apply, in_axes=(None, 0, *(None for _ in one.inputs))))
    together = run(one.params, stacked(adapters), *one.inputs)
    chex.assert_trees_all_close(together, stacked(apart), **FLOAT32)


@pytest.mark.parametrize("name", COMPOSED)
def test_vmap_over_both_pairs_them(name: str) -> None:
    one = case(name, "float32")
    adapters = [moved(one.fresh, seed) for seed in (3, 4, 5)]
    inputs = inputs_like(one, 3)
    apart = [one.compiled(one.params, a, *x) for a, x in zip(adapters, inputs, strict=True)]
    run = jax.jit(jax.vmap(one.lora.apply, in_axes=(None, 0, *(0 for _ in one.inputs))))
    together = run(one.params, stacked(adapters), *stacked(inputs))
    chex.assert_trees_all_close(together, stacked(apart), **FLOAT32)
    over_inputs = jax.jit(jax.vmap(one.lora.apply, in_axes=(None, None, *(0 for _ in one.inputs))))
    same = over_inputs(one.params, adapters[0], *stacked(inputs))
    alone = [one.compiled(one.params, adapters[0], *x) for x in inputs]
    chex.assert_trees_all_close(same, stacked(alone), **FLOAT32)


def test_map_ragged_experts_equals_single_calls() -> None:
    one = case("ragged_experts", "float32")
    (x,) = one.inputs
    with pytest.raises(NotImplementedError, match="ragged_dot vmap"):
        jax.vmap(lambda x: one.fn(one.params, x))(jnp.stack([x, x]))
    adapters = [moved(one.fresh, seed) for seed in (3, 4, 5)]
    apart = [one.compiled(one.params, adapter, x) for adapter in adapters]
    run = lambda adapter: one.lora.apply(one.params, adapter, x)
    chex.assert_trees_all_close(jax.lax.map(run, stacked(adapters)), stacked(apart), **FLOAT32)


def test_vmap_over_adapters_shares_base_product() -> None:
    one = case("dense", "float32")
    adapters = stacked([moved(one.fresh, seed) for seed in range(5)])
    run = jax.vmap(one.lora.apply, in_axes=(None, 0, None))
    text = str(jax.make_jaxpr(run)(one.params, adapters, *one.inputs))
    kernel = "f32[6,5]"
    assert kernel in text
    assert "f32[5,6,5]" not in text, "the base must not be repeated for every adapter"


def test_scan_of_checkpoint_equals_unrolled() -> None:
    one = case("attention", "float32")
    (x,) = one.inputs
    params, adapter = one.params, one.adapter
    step = jax.checkpoint(lambda a, c: jnp.tanh(one.lora.apply(params, a, c)))

    def looped(a: Any) -> jax.Array:
        return total(jax.lax.scan(lambda c, _: (step(a, c), None), x, None, length=2)[0])

    def unrolled(a: Any) -> jax.Array:
        once = jnp.tanh(one.lora.apply(params, a, x))
        return total(jnp.tanh(one.lora.apply(params, a, once)))

    chex.assert_trees_all_close(
        jax.jit(jax.grad(looped))(adapter), jax.jit(jax.grad(unrolled))(adapter), **FLOAT32
    )


def test_jvp_equals_reverse_mode() -> None:
    one = case("linen_scan_remat", "float32")
    loss = lambda a: total(one.lora.apply(one.params, a, *one.inputs))
    direction = moved(jax.tree.map(jnp.zeros_like, one.adapter), 9)
    _, forward = jax.jit(lambda a, d: jax.jvp(loss, (a,), (d,)))(one.adapter, direction)
    reverse = one.gradient
    dotted = sum(
        float((g * d).sum())
        for g, d in zip(jax.tree.leaves(reverse), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(forward, dotted, rtol=1e-4)  # A sum of 100 float32 products.


@pytest.mark.parametrize("name", ["dense", "linen_scan_remat", "conv_2d", "nnx_blocks"])
def test_jit_swapped_adapter_does_not_retrace(name: str) -> None:
    one = case(name, "float32")
    traces = []

    @jax.jit
    def run(params: Any, adapter: Any, *inputs: Any) -> Any:
        traces.append(name)
        return one.lora.apply(params, adapter, *inputs)

    run(one.params, one.fresh, *one.inputs)
    run(one.params, one.adapter, *one.inputs)
    run(one.params, moved(one.fresh, 8), *one.inputs)
    assert len(traces) == 1


def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.parametrize("name", ["dense_general", "linen_scan_remat", "tied_embedding"])
def test_apply_sharded_inputs_equal_unsharded(name: str) -> None:
    one = case(name, "float32")
    device_mesh = mesh((2, 4), ("model", "data"))

    def shard(leaf: jax.Array) -> jax.Array:
        sharded_axes = [i for i, n in enumerate(leaf.shape) if n % 2 == 0][-1:]
        spec = ["model" if i in sharded_axes else None for i in range(leaf.ndim)]
        return jax.device_put(leaf, NamedSharding(device_mesh, PartitionSpec(*spec)))

    params = jax.tree.map(shard, one.params)
    inputs = [
        jax.device_put(jnp.concatenate([x] * 4), NamedSharding(device_mesh, PartitionSpec("data")))
        for x in one.inputs
    ]
    expected = one.compiled(
        one.params, one.adapter, *(jnp.concatenate([x] * 4) for x in one.inputs)
    )
    output = one.compiled(params, one.adapter, *inputs)
    chex.assert_trees_all_close(output, expected, **FLOAT32)
    merged = jlora.merge(params, one.adapter)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf.sharding, merged),
        jax.tree.map(lambda leaf: leaf.sharding, params),
    )


def test_pmap_gradient_equals_one_device() -> None:
    one = case("dense", "float32")
    x = normal(5, (8, 2, 4, 6), np.float32)

    def gradient(params: Any, adapter: Any, x: jax.Array) -> Any:
        local = jax.grad(lambda a: total(one.lora.apply(params, a, x)))(adapter)
        return jax.lax.psum(local, "devices")

    parallel = jax.pmap(gradient, axis_name="devices", in_axes=(None, None, 0))
    expected = jax.grad(lambda a: sum(total(one.lora.apply(one.params, a, row)) for row in x))
    each = parallel(one.params, one.adapter, x)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[3], each), expected(one.adapter), **FLOAT32
    )


def test_apply_pmean_inside_keeps_axis() -> None:
    fn = lambda p, x: jax.lax.pmean(x @ p["w"], "devices")
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
    params = {"w": normal(0, (6, 5), np.float32)}
    x = normal(1, (8, 3, 6), np.float32)
    plain = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
    adapter = moved(plain.init(jax.random.key(2), params, x[0]))
    out = jax.pmap(lora.apply, axis_name="devices", in_axes=(None, None, 0))(params, adapter, x)
    expected = plain.apply(params, adapter, x).mean(0)
    chex.assert_trees_all_close(out[0], expected, **FLOAT32)


@pytest.mark.parametrize(("rows", "columns"), [("model", None), (None, "model")])
def test_shard_map_inside_shards_factors(rows: str | None, columns: str | None) -> None:
    device_mesh = mesh((4,), ("model",))
    spec = PartitionSpec(rows, columns)

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w
        return jax.lax.psum(y, "model") if rows else y

    run = jax.shard_map(
        product,
        mesh=device_mesh,
        in_specs=(spec, PartitionSpec(None, rows)),
        out_specs=PartitionSpec(None, columns),
    )
    params = {"w": normal(0, (8, 12), np.float32)}
    x = normal(1, (3, 8), np.float32)
    lora = jlora.lora_transform(lambda p, x: run(p["w"], x), jlora.LoRA(rank=2, alpha=2))
    adapter = moved(lora.init(jax.random.key(2), params, x))
    expected = x @ jlora.merge(params, adapter)["w"]
    chex.assert_trees_all_close(jax.jit(lora.apply)(params, adapter, x), expected, **FLOAT32)
    gradient = jax.jit(jax.grad(lambda a: total(lora.apply(params, a, x))))(adapter)
    through_merge = jax.grad(lambda a: total(x @ jlora.merge(params, a)["w"]))(adapter)
    chex.assert_trees_all_close(gradient, through_merge, **FLOAT32)


def test_shard_map_mesh_axes_are_ordered() -> None:
    """Sets of names have another order in each process, and a program must not."""
    device_mesh = mesh((2, 2, 2), ("zeta", "eta", "alpha"))
    orders = []

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        orders.append(_compat.get_varying_axes(x))
        return x @ w

    spec = PartitionSpec(("eta", "alpha", "zeta"))
    run = jax.shard_map(product, mesh=device_mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
    params, x = {"w": normal(0, (6, 5), np.float32)}, normal(1, (8, 6), np.float32)
    config = jlora.LoRAMoE(num_experts=4, rank=2, alpha=2)
    lora = jlora.lora_transform(lambda p, x: run(p["w"], x), config)
    adapter = lora.init(jax.random.key(2), params, x)
    (eqn,) = [
        eqn
        for eqn in jax.make_jaxpr(lora.apply_with_aux_loss)(params, adapter, x).eqns
        if eqn.primitive.name == "shard_map"
    ]
    assert eqn.params["out_specs"][-1] == PartitionSpec(device_mesh.axis_names)
    assert set(orders) == {("alpha", "eta", "zeta")}


def test_shard_map_around_equals_apply() -> None:
    one = case("dense", "float32")
    device_mesh = mesh((8,), ("data",))
    x = normal(5, (8, 4, 6), np.float32)
    run = jax.shard_map(
        lambda p, a, x: one.lora.apply(p, a, x),
        mesh=device_mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    expected = one.lora.apply(one.params, one.adapter, x)
    chex.assert_trees_all_close(jax.jit(run)(one.params, one.adapter, x), expected, **FLOAT32)


def test_hvp_equals_merge() -> None:
    one = case("dense", "float32")
    loss = lambda a: total(one.lora.apply(one.params, a, *one.inputs))
    direction = moved(jax.tree.map(jnp.zeros_like, one.adapter), 9)
    forward = jax.jvp(jax.grad(loss), (one.adapter,), (direction,))[1]
    merged = lambda a: total(one.fn(jlora.merge(one.params, a), *one.inputs))
    expected = jax.jvp(jax.grad(merged), (one.adapter,), (direction,))[1]
    chex.assert_trees_all_close(forward, expected, rtol=1e-4, atol=1e-4)
