"""Sharding on meshes, and equal results on every mesh."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support import train_steps
from _support.cases import BY_NAME, FAMILIES, moved
from flax import linen as nn
from flax.core import meta
from jax.sharding import AxisType, PartitionSpec

import jlora
from jlora import _tree
from jlora.adapters.base import get_adapter_leaves
from jlora.models import attention
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder, EncoderConfig
from jlora.models.hf.decoder_configs import decoder_config
from jlora.models.layers import partitioned_init
from jlora.models.splash_attention import splash_attention
from jlora.models.vit import ViT, ViTConfig
from jlora.training import sharding

SIZES = (
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
)
TOKEN = jax.ShapeDtypeStruct((1, 1), jnp.int32)
LORA = jlora.LoRA(rank=2, alpha=3)


# --- the mesh ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "tensor": -1}, (2, 1, 4)),
        ({"tensor": 2, "fsdp": 2, "data": 2}, (2, 2, 2)),
    ],
)
def test_make_mesh_fills_missing_axes(sizes: Any, shape: Any) -> None:
    mesh = sharding.make_mesh(sizes)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == sharding.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, r"mesh=\{'model': 2\}: unknown axis 'model'. Valid axes: \['da"),
        ({"fsdp": 0}, r"mesh=\{'fsdp': 0\}: fsdp must be a positive integer, or -1 .*, got 0"),
        ({"fsdp": 2.0}, "fsdp must be a positive integer, .*got 2.0"),
        ({"fsdp": -1, "data": -1}, "at most one axis may be -1, got 'fsdp' and 'data'"),
        ({"fsdp": 3}, "has 3 devices, but 8 are available. Use sizes whose product is 8, or -1"),
        ({"data": 2, "fsdp": 2}, "has 4 devices, but 8 are available"),
    ],
)
def test_make_mesh_invalid_sizes_raise(sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_check_batch_size_suggests_valid_sizes() -> None:
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding.check_batch_size(mesh, 8)
    with pytest.raises(ValueError, match=r"10 must .* data=2 \* fsdp=2 = 4 devices. Use 8 or 12"):
        sharding.check_batch_size(mesh, 10)
    with pytest.raises(ValueError, match="Use 4, or move devices to 'tensor'"):
        sharding.check_batch_size(mesh, 3)


def test_make_tree_shardings_indivisible_raises() -> None:
    model = train_steps.decoder({**train_steps.TINY, "intermediate_size": 36}, scan_layers=True)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKEN))
    specs, mesh = sharding.weight_specs(model, TOKEN), sharding.make_mesh({"tensor": 8})
    with pytest.raises(
        ValueError,
        match=r"'params/layers/mlp/down/kernel' of shape \(3, 36, 16\) cannot be sharded: axis 1 "
        r"of length 36 is not divisible by tensor=8. Make tensor a divisor of 36",
    ):
        sharding.make_tree_shardings(mesh, shapes, specs)


# --- weights -------------------------------------------------------------------------------------


def test_weight_specs_follow_axis_names() -> None:
    specs = sharding.weight_specs(train_steps.decoder(scan_layers=True), TOKEN)
    layers = "params/layers"
    assert specs["params/embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["params/head"] == PartitionSpec("fsdp", "tensor")
    assert specs[f"{layers}/attention/q/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs[f"{layers}/attention/o/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{layers}/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{layers}/mlp_norm/scale"] == PartitionSpec(None, None)
    alone = sharding.weight_specs(train_steps.decoder(scan_layers=False), TOKEN)
    assert alone["params/layers_1/mlp/up/kernel"] == PartitionSpec("fsdp", "tensor")


MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
PHI = {
    "model_type": "phi3",
    **{key: MIXTURE[key] for key in list(MIXTURE)[1:8]},
    "original_max_position_embeddings": 64,
}
ENCODER = EncoderConfig(
    model_type="bert",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    max_position_embeddings=32,
    pooler_activation="tanh",
    num_labels=3,
)
VISION = ViTConfig(
    image_size=(8, 8),
    patch_size=(4, 4),
    num_channels=3,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_labels=3,
)
MODELS = {
    "decoder": (train_steps.decoder(scan_layers=True), (TOKEN,)),
    "mixture": (Decoder(decoder_config(MIXTURE), scan_layers=True), (TOKEN,)),
    "fused": (Decoder(decoder_config(PHI)), (TOKEN,)),
    "encoder": (Encoder(ENCODER), (TOKEN, TOKEN)),
    "vision": (ViT(VISION), (jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_weight_specs_split_matrices_over_fsdp(name: str) -> None:
    model, inputs = MODELS[name]
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    flat = _tree.flatten_with_paths(boxed)
    specs = sharding.weight_specs(model, *inputs)
    assert list(specs) == list(flat.paths)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if path.endswith(("kernel", "embedding", "gate_up", "down", "head")):
            assert "fsdp" in specs[path], path
        assert len(specs[path]) <= len(leaf.shape), path


def test_weight_specs_unknown_axis_raises() -> None:
    dense = nn.Dense(4, kernel_init=partitioned_init("embed", "colour"))
    with pytest.raises(ValueError, match=r"'params/kernel' has an axis named 'colour'.*\['batch'"):
        sharding.weight_specs(dense, jax.ShapeDtypeStruct((2, 6), jnp.float32))


# --- adapters ------------------------------------------------------------------------------------

APART = {"lokr", "lokr_tucker", "lokr_pairs", "fourierft", "fourierft_whole", "vb_lora"}
"""Families whose arrays run along no input or output axis of the weight."""


@functools.cache
def fresh(layer: str, family: str) -> dict[str, Any]:
    made = BY_NAME[layer]
    fn, params, inputs = made.make(jnp.dtype("float32"))
    lora = jlora.lora_transform(fn, {made.adapted: FAMILIES[family].config})
    return jax.eval_shape(lora.init, jax.random.key(0), params, *inputs)


def is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def places_of(family: str) -> list[str]:
    if family == "token_rows":
        return ["embed"]
    kernels = [] if "convolution" not in FAMILIES[family].config.supported_kinds else ["conv_2d"]
    return ["kv_einsum", "experts", *kernels]


@pytest.mark.parametrize("family", FAMILIES)
def test_array_axes_have_the_weights_lengths(family: str) -> None:
    for layer in places_of(family):
        for leaf in get_adapter_leaves(fresh(layer, family)).values():
            shapes, named = leaf.shapes(), set()
            for name, axes in leaf.array_axes().items():
                lengths = [
                    n if a is None else leaf.shape[a]
                    for n, a in zip(shapes[name], axes, strict=True)
                ]
                assert tuple(lengths) == shapes[name], (layer, name, axes)
                known = [axis for axis in axes if axis is not None]
                assert len(set(known)) == len(known), (layer, name, axes)
                named |= set(known)
            assert named >= set(leaf.axes.batch), layer
            sides = [set(side) for side in (leaf.axes.inputs, leaf.axes.outputs)]
            assert family in APART or any(named & side for side in sides), layer


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_specs_follow_the_weights(family: str) -> None:
    for layer in places_of(family):
        adapter = fresh(layer, family)
        leaves = get_adapter_leaves(adapter)
        specs = {
            path: PartitionSpec(*(f"axis{axis}" for axis in range(len(leaf.shape))))
            for path, leaf in leaves.items()
        }
        split = sharding.adapter_specs(adapter, specs)
        for path, leaf in leaves.items():
            axes = leaf.array_axes()
            for name in leaf.shapes():
                expected = [None if a is None else f"axis{a}" for a in axes.get(name, ())]
                assert getattr(split[path], name) == PartitionSpec(*expected), (layer, name)
        for name in set(adapter) - set(leaves):  # Arrays that weights share.
            assert set(jax.tree.leaves(split[name], is_leaf=is_spec)) == {PartitionSpec()}


def test_adapter_specs_of_stacked_layers() -> None:
    model = train_steps.decoder(scan_layers=True)
    adapter, specs = tiny(model).adapter, sharding.weight_specs(model, TOKEN)
    split = sharding.adapter_specs(adapter, specs)
    down, up = (split[f"params/layers/mlp/{name}/kernel"] for name in ("down", "up"))
    assert (up.a, up.b) == (PartitionSpec(None, "fsdp", None), PartitionSpec(None, None, "tensor"))
    assert (down.a, down.b) == (
        PartitionSpec(None, "tensor", None),
        PartitionSpec(None, None, "fsdp"),
    )


def test_adapter_specs_other_model_raises() -> None:
    adapter = tiny(train_steps.decoder(scan_layers=True)).adapter
    specs = sharding.weight_specs(train_steps.decoder(scan_layers=False), TOKEN)
    with pytest.raises(ValueError, match=r"No spec for the adapted weight .*Nearest: \['pa"):
        sharding.adapter_specs(adapter, specs)
    with pytest.raises(TypeError, match="is not what init returns"):
        sharding.adapter_specs({"w": jnp.ones(3)}, specs)


@pytest.mark.parametrize("optimizer", ["adamw", "labelled", "factored"])
def test_opt_state_specs_follow_the_parameters(optimizer: str) -> None:
    model = train_steps.decoder(scan_layers=True)
    adapter = tiny(model).adapter
    specs = sharding.adapter_specs(adapter, sharding.weight_specs(model, TOKEN))
    labels = jax.tree.map(lambda x: "small" if x.shape[-1] == 2 else "other", adapter)
    made = {
        "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        "labelled": optax.multi_transform({"small": optax.adam(1), "other": optax.sgd(1)}, labels),
        "factored": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    }[optimizer]
    state = made.init(adapter)
    split = sharding.opt_state_specs(state, adapter, specs)
    arrays = jax.tree.leaves(state)
    flat = jax.tree.leaves(split, is_leaf=is_spec)
    assert len(flat) == len(arrays)
    for array, spec in zip(arrays, flat, strict=True):
        assert len(spec) <= array.ndim
        if optimizer != "factored" and array.ndim:
            assert len([name for name in spec if name]) == 1, (array.shape, spec)


# --- the same step everywhere --------------------------------------------------------------------


class Tiny(NamedTuple):
    """A tiny decoder with an adapter moved off zero, and its gradient function."""

    params: Any
    adapter: Any
    batch: Any
    gradient: Any  # `(params, adapter, batch)` to the loss and the adapter's gradient.


@functools.cache
def tiny(model: Decoder) -> Tiny:
    ids = np.random.default_rng(1).integers(0, 48, (8, 6), np.int32)
    batch = jax.device_put({"input_ids": ids, "targets": np.roll(ids, -1, axis=1)})
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), ids))
    lora = train_steps.transform(model, {"layers.*kernel": LORA}, chunks=2)
    adapter = moved(lora.init(jax.random.key(2), params, batch))

    def gradient(params: Any, adapter: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda adapter: lora.apply(params, adapter, batch))(adapter)

    return Tiny(params, adapter, batch, gradient)


@functools.cache
def alone(model: Decoder) -> Any:
    one = tiny(model)
    return jax.jit(one.gradient)(one.params, one.adapter, one.batch)


def on(mesh: Any, model: Decoder) -> tuple[Any, Any]:
    """The lowered gradient function and its arguments on a mesh."""
    one = tiny(model)
    specs = sharding.weight_specs(model, TOKEN)
    arguments = (
        jax.device_put(one.params, sharding.make_tree_shardings(mesh, one.params, specs)),
        jax.device_put(
            one.adapter,
            sharding.make_tree_shardings(
                mesh, one.adapter, sharding.adapter_specs(one.adapter, specs)
            ),
        ),
        jax.device_put(one.batch, sharding.make_batch_sharding(mesh)),
    )
    with sharding.use_mesh(mesh):
        return jax.jit(one.gradient).lower(*arguments), arguments


@pytest.mark.parametrize("scanned", [False, True], ids=["each", "scanned"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.slow
def test_mesh_keeps_loss_and_gradient(sizes: Any, scanned: bool) -> None:
    model = train_steps.decoder(scan_layers=scanned)
    lowered, arguments = on(sharding.make_mesh(sizes), model)
    loss, gradient = lowered.compile()(*arguments)
    one_loss, one_gradient = alone(model)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
    for path, leaf in one_gradient.items():
        for name in ("a", "b"):
            expected = getattr(leaf, name)
            np.testing.assert_allclose(
                getattr(gradient[path], name),
                expected,
                rtol=1e-4,
                # Sums in another order, of some hundred products in float32.
                atol=2e-5 * float(np.abs(expected).max()),
                err_msg=f"{path} {name}",
            )


def test_use_mesh_applies_constraints() -> None:
    model = train_steps.decoder(scan_layers=True)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    lowered = on(mesh, model)[0].as_text()
    rows = '{"data", "fsdp"}'
    for constraint, what in (
        (f"[{{{rows[1:-1]}}}, {{}}, {{}}]", "residual stream"),
        (f'[{{{rows[1:-1]}}}, {{}}, {{"tensor"}}]', "inside of the feed-forward"),
        (f'[{{{rows[1:-1]}}}, {{}}, {{"tensor"}}, {{}}]', "heads"),
    ):
        assert "sdy.sharding_constraint" in lowered
        found = re.findall(r"sdy\.sharding_constraint .*", lowered)
        assert any(constraint in line for line in found), what
    one = tiny(model)
    plain = jax.jit(one.gradient).lower(one.params, one.adapter, one.batch).as_text()
    assert "sharding_constraint" not in plain


def test_scan_gathers_one_layer_at_a_time() -> None:
    model = train_steps.decoder(scan_layers=True)
    lowered, _ = on(sharding.make_mesh({"fsdp": 8}), model)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", lowered.compile().as_text())
    shapes = {tuple(map(int, dims.split(","))) for dims in gathered}
    assert (16, 40) in shapes  # The feed-forward's kernel is gathered,
    assert not any(len(shape) == 3 and shape[0] == 3 for shape in shapes)  # one layer of three.
    largest = max(math.prod(shape) for shape in shapes)
    assert largest <= 16 * 48  # The head, which is not of a layer.


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 2), (6, 3)], ids=str)
def test_splash_attention_on_a_mesh_is_exact(heads: tuple[int, int]) -> None:
    """Also where no axis of the mesh divides the heads of the keys."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 128, heads[0], 6)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 4, 128, heads[1], 6)), jnp.float32)
    segments = jnp.asarray(np.repeat([[1, 2], [1, 3]] * 2, [50, 78], axis=1), jnp.int32)

    splash = functools.partial(
        splash_attention, scale=0.3, window=None, softcap=None, interpret=True
    )

    def total(arrays: Any, kernel: bool) -> jax.Array:
        if kernel:
            out = attention._run_on_shards(splash, *arrays, segments)
        else:
            out = attention.attend(
                *arrays, scale=0.3, query_segment_ids=segments, implementation="xla"
            )
        return jnp.sin(out).sum()

    want = jax.jit(jax.grad(total), static_argnums=1)((q, k, v), False)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use_mesh(mesh):
        traced = jax.make_jaxpr(total, static_argnums=1)((q, k, v), True)
        got = jax.jit(jax.grad(total), static_argnums=1)((q, k, v), True)
    part = "tensor" if heads == (4, 2) else None
    assert f"P(('data', 'fsdp'), None, {part!r}, None)" in str(traced)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # Of float32, for sums of about 10.


def test_splash_attention_without_axes_is_unsplit() -> None:
    x = jnp.ones((2, 128, 2, 8))
    run = lambda: jax.make_jaxpr(
        lambda x: attention._run_on_shards(lambda q, k, v, ids: q + k + v, x, x, x, None)
    )(x)
    assert "shard_map" not in str(run())
    with jax.set_mesh(sharding.make_mesh({})):
        assert "shard_map" not in str(run())
