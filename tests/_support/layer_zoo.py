"""Layers for the tests of the laws, as users write them without jlora.

All axis sizes differ, so that transposed factors are found.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jlora


@dataclasses.dataclass(frozen=True)
class Layer:
    """A forward function with parameters and inputs.

    Attributes:
        name: Name of the layer.
        make: Function from a type to the forward function, its parameters and its inputs.
        adapted: Pattern of the weights to adapt.
        dense: Whether the weight is expected to be materialized.
    """

    name: str
    make: Callable[[Any], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    adapted: str
    dense: bool = False


LAYERS: list[Layer] = []


def layer(adapted: str = "w", dense: bool = False) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        LAYERS.append(Layer(make.__name__, make, adapted, dense))
        return make

    return register


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def weight(shape: tuple[int, ...], dtype: Any, seed: int = 7) -> jax.Array:
    fan = int(np.prod(shape[:-1]))
    drawn = np.random.default_rng(seed).normal(size=shape) / np.sqrt(fan)
    return jax.device_put(drawn.astype(dtype))


def integers(shape: tuple[int, ...], end: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(1).integers(0, end, shape, np.int32))


def drawn_like(shapes: Any, dtype: Any) -> Any:
    """Parameters of these shapes: biases of zero, scales of one, and random weights."""

    def draw(seed: int, path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype))
        if "bias" in name:
            return jax.device_put(np.zeros(leaf.shape, dtype))
        if "scale" in name or "sigma" in name:
            return jax.device_put(np.ones(leaf.shape, dtype))
        return weight(leaf.shape, dtype, 100 + seed)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(treedef, [draw(n, *leaf) for n, leaf in enumerate(leaves)])


def plain(fn: Callable[..., Any], shape: tuple[int, ...], x: tuple[int, ...]) -> Any:
    def make(dtype: Any) -> Any:
        return fn, {"w": weight(shape, dtype)}, (normal(1, x, dtype),)

    return make


def linen(module: Callable[[Any], nn.Module], x: tuple[int, ...], integer: int = 0) -> Any:
    def make(dtype: Any) -> Any:
        model = module(dtype)
        inputs = integers(x, integer) if integer else normal(1, x, dtype)
        shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
        return model.apply, drawn_like(shapes, dtype), (inputs,)

    return make


def add(name: str, make: Any, adapted: str = "w", dense: bool = False) -> None:
    LAYERS.append(Layer(name, make, adapted, dense))


# Hand-written products.
add("matmul", plain(lambda p, x: x @ p["w"], (6, 5), (2, 4, 6)))
add("transposed", plain(lambda p, x: x @ p["w"].T, (5, 6), (2, 4, 6)))
add("matrix_first", plain(lambda p, x: p["w"] @ x, (5, 6), (6, 4)))
add("cast", plain(lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(x.dtype), (6, 5), (4, 6)))
add("scaled", plain(lambda p, x: x @ (-p["w"] * 0.5 / x[0, 0]), (6, 5), (4, 6)))
add(
    "kv_einsum",
    plain(lambda p, x: jnp.einsum("CKDH,BSD->CBSKH", p["w"], x), (2, 3, 6, 5), (2, 4, 6)),
)
add(
    "contracting_reversed",
    plain(
        lambda p, x: lax.dot_general(x, p["w"], (((2, 1), (0, 1)), ((), ()))), (4, 3, 5), (2, 3, 4)
    ),
)
add("experts", plain(lambda p, x: jnp.einsum("etd,edf->tef", x, p["w"]), (3, 6, 5), (3, 4, 6)))
add(
    "stacked_on_the_last_axis",
    plain(lambda p, x: jnp.einsum("etd,dfe->tef", x, p["w"]), (6, 5, 3), (3, 4, 6)),
)
add("gate_and_up", plain(lambda p, x: (x @ p["w"][0]) * (x @ p["w"][1]), (2, 6, 5), (4, 6)))
add("unit_axis", plain(lambda p, x: x @ p["w"][0], (1, 6, 5), (4, 6)))
add(
    "fused_qkv",
    plain(lambda p, x: sum(x @ part for part in jnp.split(p["w"], 3, axis=1)), (6, 15), (4, 6)),
)
add(
    "strided_slices",
    plain(lambda p, x: (x @ p["w"][:, ::2]) * (x[:, ::2] @ p["w"][1::2, 1::2]), (6, 10), (4, 6)),
)
add("flipped", plain(lambda p, x: x @ jnp.flip(p["w"], 0)[:, ::-1], (6, 5), (4, 6)))
add(
    "heads_split_off",
    plain(lambda p, x: jnp.einsum("td,dhk->htk", x, p["w"].reshape(6, 2, 5)), (6, 10), (4, 6)),
)
add("heads_merged", plain(lambda p, x: x @ p["w"].reshape(6, 5), (2, 3, 5), (4, 6)))
add(
    "flattened_and_unflattened",
    plain(lambda p, x: x @ p["w"].reshape(-1).reshape(3, 2, 10).reshape(6, 10), (6, 10), (4, 6)),
)
add(
    "broadcast_over_groups",
    plain(
        lambda p, x: jnp.einsum("gtd,gdf->gtf", x, jnp.broadcast_to(p["w"], (3, 6, 5))),
        (6, 5),
        (3, 4, 6),
    ),
)
add(
    "concatenated_outputs",
    plain(
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((6, 3), x.dtype), p["w"]], 1),
        (6, 5),
        (4, 6),
    ),
)
add(
    "concatenated_inputs",
    plain(lambda p, x: x @ jnp.concatenate([p["w"], 2 * p["w"]], 0), (6, 5), (4, 12)),
)
add("used_twice", plain(lambda p, x: (x @ p["w"]) @ p["w"].T, (6, 5), (4, 6)))
add(
    "weight_norm",
    plain(
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)), (6, 5), (4, 6)
    ),
    dense=True,
)
add(
    "expert_per_row",
    plain(
        lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][jnp.array([2, 0, 1, 2])]), (3, 6, 5), (4, 6)
    ),
)
add(
    "ragged_experts",
    plain(lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([3, 0, 4])), (3, 6, 5), (7, 6)),
)


add(
    "padded_vocabulary",
    plain(lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 3))), (6, 5), (4, 6)),
)
add(
    "unit_axis_merged_and_cut",
    plain(lambda p, x: x @ p["w"].reshape(6, 5)[:, 1:4], (1, 6, 5), (4, 6)),
)


@layer()
def look_up_with_a_filling(dtype: Any) -> Any:
    fn = lambda p, t: jnp.take(p["w"], t, axis=0, mode="fill", fill_value=1.5)
    return (
        fn,
        {"w": weight((7, 5), dtype)},
        (jax.device_put(np.array([[0, 6, 7], [3, 9, 2]], np.int32)),),
    )


@layer(adapted="^(e|k)$")
def looked_up_rows_joined(dtype: Any) -> Any:
    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        return jnp.concatenate([p["e"][tokens[0]], p["e2"][tokens[1]]], -1) @ p["k"]

    shapes = {"e": (7, 5), "e2": (8, 3), "k": (8, 6)}
    params = {name: weight(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return fn, params, (jax.device_put(np.array([[0, 6, 5, 1], [3, 7, 2, 2]], np.int32)),)


# Weights in inner programs.
add("in_jit", plain(lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x), (6, 5), (4, 6)))
add(
    "in_cond",
    plain(
        lambda p, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: (x + 1) @ w, p["w"]),
        (6, 5),
        (4, 6),
    ),
)
add(
    "in_while_weight_carried",
    plain(
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, p["w"]))[
            0
        ],
        (6, 6),
        (4, 6),
    ),
)
add(
    "in_scan_stacked_axis_one",
    plain(
        lambda p, x: lax.scan(
            lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.moveaxis(p["w"], 1, 0)
        ),
        (6, 3, 6),
        (4, 6),
    ),
)
add(
    "in_scan_over_time",
    plain(
        lambda p, x: lax.scan(
            lambda c, step: (jnp.tanh(c + step @ p["w"]), step @ p["w"]),
            jnp.zeros((2, 5), x.dtype),
            x,
        ),
        (6, 5),
        (4, 2, 6),
    ),
)
add(
    "layers_by_index",
    plain(
        lambda p, x: lax.scan(
            lambda c, i: (jnp.tanh(c @ lax.dynamic_index_in_dim(p["w"], i, 0, False)), None),
            x,
            jnp.arange(3),
        )[0],
        (3, 6, 6),
        (4, 6),
    ),
)
add(
    "scan_remat_scan",
    plain(
        lambda p, x: lax.scan(
            jax.checkpoint(
                lambda c, outer: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), c, outer)
            ),
            x,
            p["w"],
        )[0],
        (2, 3, 6, 6),
        (4, 6),
    ),
)


add(
    "scans_over_both_axes_in_turn",
    plain(
        lambda p, x: lax.scan(
            lambda c, outer: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), c, outer),
            x,
            jnp.moveaxis(p["w"], 1, 0),
        )[0],
        (2, 3, 6, 6),
        (4, 6),
    ),
)


@layer()
def in_custom_vjp(dtype: Any, factor: float = 2) -> Any:
    @jax.custom_vjp
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("btd,df->btf", x, w)

    def forward(w: jax.Array, x: jax.Array) -> Any:
        return product(w, x), (w, x)

    def backward(saved: Any, dy: jax.Array) -> Any:
        w, x = saved
        # Twice the true gradient of w: a custom rule must be kept.
        return factor * jnp.einsum("btf,btd->df", dy, x), jnp.einsum("btf,df->btd", dy, w)

    product.defvjp(forward, backward)
    return plain(lambda p, x: product(p["w"], x), (6, 5), (2, 4, 6))(dtype)


@layer(dense=True)
def through_an_identity_with_a_rule(dtype: Any) -> Any:
    @jax.custom_vjp
    def doubled_gradient(w: jax.Array) -> jax.Array:
        return w

    doubled_gradient.defvjp(lambda w: (w, None), lambda _, dw: (2 * dw,))
    return plain(lambda p, x: x @ doubled_gradient(p["w"]), (6, 5), (4, 6))(dtype)


add(
    "changed_by_a_loop",
    plain(
        lambda p, x: lax.fori_loop(
            0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[0].T @ c[0]), (x, p["w"])
        )[0],
        (6, 6),
        (4, 6),
    ),
    dense=True,
)
add(
    "picked_by_cond",
    plain(
        lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda w: w[0], lambda w: w[1], p["w"]),
        (2, 6, 5),
        (4, 6),
    ),
    dense=True,
)
add("in_custom_vjp_true", functools.partial(in_custom_vjp, factor=1))


@layer()
def in_custom_jvp(dtype: Any) -> Any:
    @jax.custom_jvp
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    @product.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        return x @ w, x @ dw + dx @ w

    return plain(lambda p, x: product(p["w"], x), (6, 5), (4, 6))(dtype)


@layer()
def in_shard_map(dtype: Any) -> Any:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    columns = PartitionSpec(None, "model")
    run = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(columns, PartitionSpec()), out_specs=columns
    )
    return plain(lambda p, x: run(p["w"], x), (6, 5), (4, 6))(dtype)


# Flax Linen.
add("dense", linen(lambda d: nn.Dense(5, dtype=d), (2, 4, 6)), "kernel")
add("dense_general", linen(lambda d: nn.DenseGeneral((2, 5), dtype=d), (3, 4, 6)), "kernel")
add(
    "attention",
    linen(
        lambda d: nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10, dtype=d), (3, 4, 6)
    ),
    "kernel",
)
add("linen_einsum", linen(lambda d: nn.Einsum((6, 2, 5), "btd,dhk->bhtk"), (3, 4, 6)), "kernel")
add("embed", linen(lambda d: nn.Embed(7, 5, dtype=d), (3, 4), integer=7), "embedding")
add(
    "conv_1d",
    linen(lambda d: nn.Conv(5, (3,), strides=2, kernel_dilation=2, dtype=d), (2, 9, 6)),
    "kernel",
)
add(
    "conv_2d",
    linen(
        lambda d: nn.Conv(5, (3, 2), strides=(2, 1), padding=((1, 0), (0, 2)), dtype=d),
        (2, 7, 8, 6),
    ),
    "kernel",
)
add("conv_3d", linen(lambda d: nn.Conv(5, (3, 2, 1), dtype=d), (2, 4, 5, 3, 6)), "kernel")
add(
    "conv_groups",
    linen(lambda d: nn.Conv(10, (3,), feature_group_count=2, dtype=d), (2, 7, 6)),
    "kernel",
)
add(
    "conv_depthwise",
    linen(lambda d: nn.Conv(6, (3,), feature_group_count=6, dtype=d), (2, 7, 6)),
    "kernel",
)
add(
    "conv_transposed",
    linen(lambda d: nn.ConvTranspose(5, (3,), strides=(2,), dtype=d), (2, 7, 6)),
    "kernel",
)
add(
    "conv_torch_layout",
    plain(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        ),
        (5, 6, 3, 2),
        (2, 6, 7, 8),
    ),
)
add(
    "lstm",
    linen(lambda d: nn.RNN(nn.OptimizedLSTMCell(5, dtype=d)), (2, 4, 6)),
    "kernel",
)


class Tied(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(7, 6, dtype=self.dtype)
        return embed.attend(jnp.tanh(embed(tokens)))


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + nn.Dense(6, dtype=self.dtype)(nn.gelu(nn.Dense(5, dtype=self.dtype)(y))), None


class Stack(nn.Module):
    dtype: Any
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return layers(self.dtype)(x, None)[0]


class Normed(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.SpectralNorm(nn.Dense(5, dtype=self.dtype))(x, update_stats=False)


class Ensemble(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return dense(5, dtype=self.dtype)(x)


class ConvEnsemble(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = nn.vmap(
            nn.Conv,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return conv(5, (3,), dtype=self.dtype)(x)


class Partitioned(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
        return nn.Dense(5, kernel_init=init, dtype=self.dtype)(x)


add("tied_embedding", linen(Tied, (3, 4), integer=7), "embedding")
add("linen_scan", linen(Stack, (2, 4, 6)), "kernel")
add("linen_scan_remat", linen(functools.partial(Stack, remat=True), (2, 4, 6)), "kernel")
add("linen_scan_axis_one", linen(functools.partial(Stack, axis=1), (2, 4, 6)), "kernel")
add("linen_jit", linen(lambda d: nn.jit(Block)(d), (2, 4, 6)), "kernel")
add("spectral_norm", linen(Normed, (4, 6)), "^params/.*kernel$")
add("linen_vmap", linen(Ensemble, (4, 6)), "kernel")
add("linen_vmap_conv", linen(ConvEnsemble, (2, 7, 6)), "kernel")
add("partitioned", linen(Partitioned, (4, 6)), "kernel$")


# Flax NNX.
def nnx_layer(module: Callable[[Any, nnx.Rngs], nnx.Module], x: tuple[int, ...]) -> Any:
    def make(dtype: Any) -> Any:
        fn, shapes = jlora.from_nnx(nnx.eval_shape(lambda: module(dtype, nnx.Rngs(0))))
        return fn, drawn_like(shapes, dtype), (normal(1, x, dtype),)

    return make


class NnxStack(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, dtype=dtype, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer: nnx.Linear, x: jax.Array) -> jax.Array:
            return jnp.tanh(layer(x))

        return forward(self.layers, x)


class NnxBlocks(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            2, 6, qkv_features=10, decode=False, dtype=dtype, rngs=rngs
        )
        self.mlps = nnx.List([nnx.Linear(6, 6, dtype=dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attention(x)
        for mlp in self.mlps:
            x = nnx.remat(lambda m, x: jnp.tanh(m(x)))(mlp, x)
        return x


add("nnx_linear", nnx_layer(lambda d, r: nnx.Linear(6, 5, dtype=d, rngs=r), (4, 6)), "kernel")
add("nnx_conv", nnx_layer(lambda d, r: nnx.Conv(6, 5, 3, dtype=d, rngs=r), (2, 7, 6)), "kernel")
add(
    "nnx_einsum",
    nnx_layer(lambda d, r: nnx.Einsum("td,dhk->htk", (6, 2, 5), (2, 5), dtype=d, rngs=r), (4, 6)),
    "kernel",
)
add("nnx_scan", nnx_layer(NnxStack, (4, 6)), "kernel")
add("nnx_blocks", nnx_layer(NnxBlocks, (3, 4, 6)), "kernel")


# Complete trees and programs.
@layer(adapted="^(0/lin/~/w|1)$")
def odd_keys(dtype: Any) -> Any:
    params = [{"lin/~": {"w": weight((6, 5), dtype)}}, weight((5, 3), dtype)]
    return lambda p, x: jnp.tanh(x @ p[0]["lin/~"]["w"]) @ p[1], params, (normal(1, (4, 6), dtype),)


@layer()
def generate(dtype: Any) -> Any:
    """Prefill, then a decoding loop with the same tied embedding, as in generate."""

    def forward(p: Any, tokens: jax.Array) -> Any:
        prefill = jnp.take(p["w"], tokens, axis=0).sum(1)

        def step(state: Any) -> Any:
            i, hidden, _ = state
            logits = hidden @ p["w"].T
            # Not the argmax of the logits, because a tie in bfloat16 would change the text.
            following = (jnp.argmin(tokens, -1) + i) % 7
            return i + 1, jnp.tanh(hidden + p["w"][following]), logits

        logits = jnp.zeros((3, 7), dtype)
        return lax.while_loop(lambda s: s[0] < 3, step, (0, prefill, logits))[2]

    return forward, {"w": weight((7, 6), dtype)}, (integers((3, 4), 7),)


NAMES = [each.name for each in LAYERS]
