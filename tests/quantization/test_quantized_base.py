"""A quantized base computes as its dequantized base, in every kind of layer and never dense."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import BY_NAME, DIFFERENTIABLE, LAYERS, Case, case, errors, total
from _support.layer_zoo import normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora._quantized_array import get_component_shardings

# The smallest blocks that the axes of the layers allow.
NF4 = jlora.NF4(block_size=2)
SCHEMES = {"nf4": NF4, "int8": jlora.Int8(block_size=4), "fp8": jlora.FP8(block_size=3)}
KINDS = [pytest.param(name, id=name) for name in LAYERS] + [
    pytest.param(name, id=name, marks=pytest.mark.slow)
    for name in sorted(set(DIFFERENTIABLE) - set(LAYERS))
]
# Double quantization packs the last two axes of a weight, and these scan over one of them.
CUT = {"in_scan_stacked_axis_one", "linen_scan_axis_one"}


def quantized(one: Case, scheme: Any = NF4) -> Any:
    names = "|".join(f"^{path}$" for path in one.adapter)
    return jlora.quantize(one.params, {names: scheme})


def differences(values: Any, truth: Any) -> float:
    return max((float(error / (1 + size)) for error, size in errors(values, truth)), default=0.0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.thin(4)
def test_apply_quantized_equals_dequantized(name: str) -> None:
    one = case(name, "float32")
    packed = quantized(one)
    dense = jlora.dequantize(packed)
    assert differences(dense, one.params) > 1e-3  # Something was rounded.

    @jax.jit
    def both(params: Any, adapter: Any) -> Any:
        loss = lambda adapter: total(one.lora.apply(params, adapter, *one.inputs))
        return one.lora.apply(params, adapter, *one.inputs), jax.grad(loss)(adapter)

    output, gradient = both(packed, one.adapter)
    truth, slope = both(dense, one.adapter)
    # The same products of the same values; some are fused differently.
    assert differences(output, truth) < 1e-6
    assert differences(jlora.partition(gradient)[0], jlora.partition(slope)[0]) < 1e-5
    bare = jax.jit(one.lora.apply)(packed, {}, *one.inputs)
    assert differences(bare, jax.jit(one.fn)(dense, *one.inputs)) < 1e-6

    # Residuals hold no dense copy of a weight, and explain reports where one is materialized.
    residual_arrays = residuals(one, packed)
    wide = {tuple(sorted(leaf.shape)) for leaf in one.adapter.values()}
    found = [array.shape for array in residual_arrays if tuple(sorted(array.shape)) in wide]
    rows = {row.path: row for row in one.lora.explain(packed, *one.inputs).rows}
    expected = one.layer.dense or name in CUT
    assert bool(found) <= expected, found
    for path in one.adapter:
        assert rows[path].quantization == "nf4"
        assert bool(rows[path].dense_reasons) == expected or one.layer.dense


def residuals(one: Case, params: Any) -> list[Any]:
    """Returns the float residuals of a gradient with respect to the adapter, as shapes."""
    return grad_residuals(
        lambda params, a: one.lora.apply(params, a, *one.inputs), params, one.adapter
    )


def grad_residuals(apply: Any, params: Any, adapter: Any) -> list[Any]:
    def pull_back(params: Any, adapter: Any) -> Any:
        return jax.vjp(lambda a: total(apply(params, a)), adapter)[1]

    arrays = jax.tree.leaves(jax.eval_shape(pull_back, params, adapter))
    return [array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["fused_qkv", "linen_scan_remat"])
def test_apply_every_scheme_equals_dequantized(name: str, scheme: str) -> None:
    one = case(name, "float32")
    packed = quantized(one, SCHEMES[scheme])
    output = one.compiled(jlora.dequantize(packed), one.adapter, *one.inputs)
    found = jax.jit(one.lora.apply)(packed, one.adapter, *one.inputs)
    assert differences(found, output) < 1e-6


@pytest.mark.parametrize("family", ["dora", "hira", "ia3", "lokr", "vera"])
@pytest.mark.thin(3)
def test_apply_methods_use_dequantized_base(family: str) -> None:
    one = case("linen_scan_remat", "float32", family)
    packed = quantized(one)
    output = one.compiled(jlora.dequantize(packed), one.adapter, *one.inputs)
    found = jax.jit(one.lora.apply)(packed, one.adapter, *one.inputs)
    assert differences(found, output) < 1e-5
    again = jlora.merge(packed, one.adapter, dequantize=True)
    assert differences(jax.jit(one.fn)(again, *one.inputs), output) < 1e-5


# --- memory ---------------------------------------------------------------------------------------

WIDTH, LAYERS_OF_STACK, ROWS = 256, 8, 4


def scanned(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ weight), None

    return jax.lax.scan(layer, x, params["kernel"])[0]


def unrolled(params: Any, x: jax.Array) -> jax.Array:
    for weight in params["kernel"]:
        x = jnp.tanh(x @ weight)
    return x


def stacked(model: Any) -> tuple[Any, Any, Any]:
    """Returns the transform of a model, its parameters and its input."""
    kernel = normal(0, (LAYERS_OF_STACK, WIDTH, WIDTH), np.float32) / 16
    params = {"kernel": list(kernel) if model is unrolled else kernel}
    x = normal(1, (ROWS, WIDTH), np.float32)
    return jlora.lora_transform(model, {"kernel": jlora.LoRA(rank=1, alpha=1)}), params, x


@pytest.mark.parametrize("model", [scanned, unrolled])
@pytest.mark.slow
def test_grad_residuals_have_no_dense_weight(model: Any) -> None:
    lora, params, x = stacked(model)
    adapter = lora.init(jax.random.key(2), params, x)
    apply = lambda params, adapter: lora.apply(params, adapter, x)
    packed = jlora.quantize(params, {"kernel": jlora.NF4()})
    wide = jax.tree.leaves(params)[0].shape
    assert wide not in {array.shape for array in grad_residuals(apply, packed, adapter)}
    # A base that is dequantized before is seen.
    before = lambda packed, adapter: apply(jlora.dequantize(packed), adapter)
    assert wide in {array.shape for array in grad_residuals(before, packed, adapter)}


def test_step_memory_is_below_three_layers() -> None:
    """For layers in a scan; on a CPU, the compiler dequantizes an unrolled model at once."""
    lora, params, x = stacked(scanned)
    packed = jlora.quantize(params, {"kernel": jlora.NF4()})
    adapter = lora.init(jax.random.key(2), params, x)

    def step(params: Any, adapter: Any) -> Any:
        return jax.grad(lambda a: lora.apply(params, a, x).sum())(adapter)

    def temporary(params: Any) -> float:
        compiled = jax.jit(step).lower(params, adapter).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * WIDTH**2)

    layers_held = temporary(packed)
    # One layer in float32, its unpacked codes (a byte each), and small arrays; the stack would be
    # eight.
    assert layers_held < 3, layers_held
    assert temporary(packed) > temporary(params) - 1


# --- sharding and batches -------------------------------------------------------------------------


def test_apply_sharded_quantized_base() -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    weight = normal(0, (64, 32), np.float32)
    packed = jlora.quantize({"w": weight}, {"w": jlora.NF4(block_size=8)})
    where = get_component_shardings(
        packed["w"], NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    )
    placed = {"w": jax.device_put(packed["w"], where)}
    assert placed["w"].codes.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert placed["w"].scales.mean.sharding.spec == PartitionSpec(None, None)
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], {"w": jlora.LoRA(rank=2, alpha=2)})
    x = normal(1, (8, 64), np.float32)
    adapter = lora.init(jax.random.key(2), packed, x)
    apply = jax.jit(lora.apply)
    np.testing.assert_allclose(
        apply(placed, adapter, x), apply(packed, adapter, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
@pytest.mark.parametrize("block", [8, 64])
def test_apply_shard_map_gets_quantized_shards(spec: Any, block: int) -> None:
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])
    weight = normal(0, (64, 32), np.float32)
    packed = jlora.quantize({"w": weight}, {"w": jlora.NF4(block_size=block, axis=-2)})

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(*spec), PartitionSpec(None, spec[0])),
        out_specs=PartitionSpec(None, spec[1]),
    )
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        found = x @ w
        return jax.lax.psum(found, "x") if spec[0] else found

    lora = jlora.lora_transform(lambda p, x: product(p["w"], x), {"w": jlora.LoRA(rank=2, alpha=2)})
    x = normal(1, (8, 64), np.float32)
    adapter = lora.init(jax.random.key(2), packed, x)
    dense = jlora.dequantize(packed)
    np.testing.assert_allclose(
        jax.jit(lora.apply)(packed, adapter, x), x @ dense["w"], rtol=1e-4, atol=1e-4
    )
    # A weight whose blocks would be cut is materialized before it is split; explain reports it.
    (row,) = lora.explain(packed, x).rows
    assert bool(row.dense_reasons) == (block == 64 and spec[0] == "x")


def test_vmap_adapters_share_quantized_base() -> None:
    one = case("dense", "float32")
    packed = quantized(one)
    two = jax.tree.map(lambda array: np.stack([array, 2 * np.asarray(array)]), one.adapter)
    apply = jax.jit(lambda a: one.lora.apply(packed, a, *one.inputs))
    found = jax.jit(jax.vmap(apply))(two)
    for number in range(2):
        each = apply(jax.tree.map(lambda a: a[number], two))  # noqa: B023
        assert differences(jax.tree.map(lambda a: a[number], found), each) < 1e-5  # noqa: B023


# --- merging, files -------------------------------------------------------------------------------


def test_merge_into_quantized_raises() -> None:
    one = case("dense", "float32")
    packed = quantized(one)
    message = r"1 quantized weights, such as '.*'.*Merge into the weights before quantization"
    for merge in (jlora.merge, one.lora.merge, jlora.merge_to_dtype):
        with pytest.raises(ValueError, match=message):
            merge(packed, one.adapter)
    merged = jlora.merge(packed, one.adapter, dequantize=True)
    dense = jlora.dequantize(packed)
    for found in (merged, jlora.merge_to_dtype(packed, one.adapter, dequantize=True).params):
        jax.tree.map(np.testing.assert_array_equal, found, jlora.merge(dense, one.adapter))
    assert jax.tree.structure(merged) == jax.tree.structure(one.params)


def test_residual_base_quantized_raises() -> None:
    weight = {"w": normal(0, (16, 12), np.float32)}
    fn = lambda params, x: x @ params["w"]
    lora = jlora.lora_transform(
        fn, {"w": jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa())}
    )
    x = jnp.ones((1, 16))
    init = jax.jit(lora.init)
    packed = jlora.quantize(weight, {"w": jlora.NF4(block_size=16)})
    with pytest.raises(ValueError, match="residual_base cannot subtract the factors from 'w'"):
        jlora.residual_base(packed, init(jax.random.key(0), packed, x))
    # In the right order the weight is nearer than without the factors.
    adapter = init(jax.random.key(0), weight, x)
    rest = jlora.quantize(jlora.residual_base(weight, adapter), {"w": jlora.NF4(block_size=16)})
    merged = jlora.merge(rest, adapter, dequantize=True)["w"]
    assert jnp.linalg.norm(merged - weight["w"]) < jnp.linalg.norm(
        jlora.dequantize(packed)["w"] - weight["w"]
    )


def test_load_adapter_checks_quantized_base(tmp_path: pathlib.Path) -> None:
    one = case("dense", "float32")
    packed, path = quantized(one), tmp_path / "adapter.safetensors"
    jlora.save_adapter(path, one.adapter, packed)
    for base in (packed, one.params):  # The original base is recognized by quantizing it.
        loaded = jlora.load_adapter(path, base)
        jax.tree.map(np.testing.assert_array_equal, loaded, one.adapter)
    other = jax.tree.map(lambda array: array + 0.1, one.params)
    for base in (other, quantized(one, jlora.Int8(block_size=4)), jlora.dequantize(packed)):
        with pytest.raises(ValueError, match=r"trained on another base|as it is quantized in par"):
            jlora.load_adapter(path, base)
    jlora.save_adapter(path, one.adapter, one.params)
    with pytest.raises(ValueError, match=r"was not trained on .* pass allow_other_base=True"):
        jlora.load_adapter(path, packed)
    jlora.load_adapter(path, packed, allow_other_base=True)


def test_grad_custom_vjp_has_adapter_structure() -> None:
    one = case("in_custom_vjp_true", "float32")
    assert BY_NAME["in_custom_vjp_true"].adapted
    packed = quantized(one)
    gradient = jax.grad(lambda a: total(one.lora.apply(packed, a, *one.inputs)))(one.adapter)
    assert jax.tree.structure(gradient) == jax.tree.structure(one.adapter)


@pytest.mark.parametrize("through_norm", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.slow
def test_dora_dequantizes_one_layer_at_a_time(stacked: bool, through_norm: bool) -> None:
    layers = (5,) if stacked else ()
    params = {"w": normal(0, (*layers, 64, 48), np.float32)}
    x = normal(1, (3, 64), np.float32)

    def model(params: Any, x: jax.Array) -> jax.Array:
        if not stacked:
            return x @ params["w"]
        start = jnp.zeros((3, 48))
        return jax.lax.scan(lambda c, w: (c + jnp.sin(x @ w), None), start, params["w"])[0]

    lora = jlora.lora_transform(model, jlora.DoRA(rank=2, alpha=4, through_norm=through_norm))
    packed = jlora.quantize(params, {"w": jlora.NF4()})
    dense = jlora.dequantize(packed)
    init = jax.jit(lora.init)
    adapter = init(jax.random.key(2), packed, x)
    # Norms from the factors, and norms of the dense weight: both in float32, of 64 entries.
    start = init(jax.random.key(2), dense, x)
    np.testing.assert_allclose(adapter["w"].magnitude, start["w"].magnitude, rtol=1e-6)
    adapter = jax.tree.map(lambda a: np.asarray(a) + np.float32(0.1), adapter)

    def loss(params: Any, a: Any) -> jax.Array:
        return (lora.apply(params, a, x) ** 2).sum()

    found, wanted = (jax.jit(jax.grad(loss, argnums=1))(p, adapter) for p in (packed, dense))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Sums of 64 products in float32, in another order.
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    residual_arrays = grad_residuals(lambda p, a: lora.apply(p, a, x), packed, adapter)
    assert max(array.size for array in residual_arrays) < 64 * 48
    if stacked:
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(packed, adapter))
        assert "f32[5,64,48]" not in text
