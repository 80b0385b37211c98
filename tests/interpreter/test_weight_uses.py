"""Weights that models look up, copy and write into arrays: found, and computed as merged ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import moved
from _support.layer_zoo import normal
from flax import linen as nn
from jax import export, lax

import jlora

TABLE = {"table": normal(1, (10, 6), np.float32), "w": normal(2, (6, 4), np.float32)}
EXPERTS = {"experts": normal(1, (5, 6, 4), np.float32), "router": normal(2, (6, 5), np.float32)}
MATRIX = {"w": normal(2, (6, 4), np.float32)}
STACK = {"w": normal(1, (3, 6, 6), np.float32), "bias": normal(2, (3, 6), np.float32)}
X = normal(3, (3, 6), np.float32)
EMBED, ROWS = nn.Embed(10, 6), {"embedding": TABLE["table"]}
TOKEN, TOKENS = jnp.int32(3), jnp.array([1, 2, 5])


class Case(NamedTuple):
    """A model, and the axes (batch, inputs, outputs) of each weight that plain LoRA adapts."""

    fn: Callable[..., Any]
    params: dict[str, jax.Array]
    inputs: tuple[Any, ...]
    axes: dict[str, tuple[tuple[int, ...], ...]]
    embeddings: tuple[str, ...] = ()


def pick_row(table: jax.Array, token: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(table, token, 0, keepdims=False)


def top_experts(p: Any, x: jax.Array) -> jax.Array:
    gates, chosen = lax.top_k(x @ p["router"], 2)
    return jnp.einsum("nd,nkdf,nk->nf", x, p["experts"][chosen], gates)


def top_experts_by_token(p: Any, x: jax.Array) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        gates, chosen = lax.top_k(x @ p["router"], 2)
        return gates @ jax.vmap(lambda i: x @ p["experts"][i])(chosen)

    return jax.vmap(one)(x)


def loop_over_layers(p: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i] + p["bias"][i]), x)


@jax.custom_batching.custom_vmap
def product(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


@product.def_vmap
def _(size: int, batched: Any, w: jax.Array, x: jax.Array) -> tuple[jax.Array, bool]:
    del size, batched
    return x @ w, True


QUERIES = {
    "latents": normal(1, (4, 6), np.float32),
    "wq": normal(2, (6, 4), np.float32),
    "bq": normal(3, (4,), np.float32),
    "wk": normal(4, (6, 4), np.float32),
}
PAIR = {"v": normal(1, (6, 4), np.float32), "w": normal(2, (6, 4), np.float32)}
POSITIONS = {"table": normal(1, (10, 6), np.float32), "w": normal(2, (6, 4), np.float32)}


def latent_queries(p: Any, x: jax.Array) -> jax.Array:
    queries = p["latents"] @ p["wq"] + p["bq"]
    return jax.nn.softmax(jnp.einsum("qd,sd->qs", queries, x @ p["wk"])) @ x


def spectral_norm(p: Any, x: jax.Array) -> jax.Array:
    """One step of a power iteration whose first product is with another weight."""
    v = p["u"] @ p["w"].T
    v = v / jnp.linalg.norm(v)
    u = v @ p["w"]
    sigma = v @ p["w"] @ (u / jnp.linalg.norm(u))
    return x @ (p["w"] / sigma)


W = {"w": ((), (0,), (1,))}
LAYERS = {"w": ((0,), (1,), (2,))}
ROUTED = {"experts": ((0,), (1,), (2,)), "router": ((), (0,), (1,))}
ORDER = np.array([3, 1, 0, 2])

CASES = {
    "row": Case(lambda p, t: p["table"][t] @ p["w"], TABLE, (TOKEN,), W, ("table",)),
    "row_by_index": Case(
        lambda p, t: pick_row(p["table"], t) @ p["w"], TABLE, (TOKEN,), W, ("table",)
    ),
    "row_in_vmap": Case(
        lambda p, t: jax.vmap(lambda i: pick_row(p["table"], i) @ p["w"])(t),
        TABLE,
        (TOKENS,),
        W,
        ("table",),
    ),
    "row_in_scan": Case(
        lambda p, t: lax.scan(lambda c, i: (c + p["table"][i], p["table"][i] @ p["w"]), 0.0 * X, t),
        TABLE,
        (TOKENS,),
        W,
        ("table",),
    ),
    "row_by_take": Case(  # A row outside the table is NaN.
        lambda p, t: (
            jnp.nan_to_num(jnp.take(p["table"], t, 0) + jnp.take(p["table"], 99, 0)) @ p["w"]
        ),
        TABLE,
        (TOKEN,),
        W,
        ("table",),
    ),
    "row_by_take_in_scan": Case(
        lambda p, t: lax.scan(lambda c, i: (c + jnp.take(p["table"], i, 0), None), 0.0 * X[0], t),
        TABLE,
        (TOKENS,),
        {},
        ("table",),
    ),
    "row_of_embed": Case(
        lambda p, t: EMBED.apply({"params": p}, t), ROWS, (TOKEN,), {}, ("embedding",)
    ),
    "row_or_last": Case(
        lambda p, t: p["table"].at[t].get(mode="clip") @ p["w"], TABLE, (TOKEN,), W, ("table",)
    ),
    "row_or_a_constant": Case(
        lambda p, t: p["table"].at[t + 50].get(mode="fill", fill_value=3.0) @ p["w"],
        TABLE,
        (TOKEN,),
        W,
        ("table",),
    ),
    "entries_of_rows": Case(
        lambda p, t: p["table"][t[:, None], np.arange(6)] @ p["w"], TABLE, (TOKENS,), W, ("table",)
    ),
    "rows_without_padding": Case(
        lambda p, t: p["table"].at[0].set(0.0)[t] @ p["w"], TABLE, (TOKENS - 1,), W, ("table",)
    ),
    "rows_of_unit_length": Case(
        lambda p, t: (p["table"] / jnp.linalg.norm(p["table"], axis=1, keepdims=True))[t] @ p["w"],
        TABLE,
        (TOKEN,),
        W,
        ("table",),
    ),
    "expert_without_the_first": Case(
        lambda p, x, t: jnp.einsum("nd,ndf->nf", x, p["experts"].at[0].set(0.0)[t]),
        EXPERTS,
        (X, TOKENS - 1),
        {"experts": ((0,), (1,), (2,))},
    ),
    "rows_of_candidates": Case(
        lambda p, x, t: jnp.einsum("nd,cd->nc", x, p["table"][t]),
        TABLE,
        (X, TOKENS),
        {},
        ("table",),
    ),
    "top_experts": Case(top_experts, EXPERTS, (X,), ROUTED),
    "top_experts_by_token": Case(top_experts_by_token, EXPERTS, (X,), ROUTED),
    "one_expert": Case(
        lambda p, x, i: x @ p["experts"][i], EXPERTS, (X, TOKEN), {"experts": ((0,), (1,), (2,))}
    ),
    "loop_over_layers": Case(loop_over_layers, STACK, (X,), LAYERS),
    "latent_queries": Case(
        latent_queries, QUERIES, (X,), dict.fromkeys(("wk", "wq"), ((), (0,), (1,)))
    ),
    "spectral_norm": Case(spectral_norm, {"u": PAIR["v"][0], "w": PAIR["w"]}, (X,), W),
    "cond_in_vmap": Case(
        lambda p, x: jax.vmap(
            lambda x: lax.cond(x.sum() > 0, lambda x: x @ p["v"], lambda x: x @ p["w"], x)
        )(x),
        PAIR,
        (X,),
        dict.fromkeys(PAIR, ((), (0,), (1,))),
    ),
    "chosen_by_data": Case(
        lambda p, x: x @ jnp.where(x.sum() > 0, p["v"], p["w"]),
        PAIR,
        (X,),
        dict.fromkeys(PAIR, ((), (0,), (1,))),
    ),
    "rows_from_an_offset": Case(
        lambda p, x, i: (x + lax.dynamic_slice_in_dim(p["table"], i, 3)) @ p["w"],
        POSITIONS,
        (X, TOKEN),
        W,
        ("table",),
    ),
    "first_rows": Case(lambda p, x: (x + p["table"][:3]) @ p["w"], POSITIONS, (X,), W, ("table",)),
    "normalized_by_map": Case(
        lambda p, x: lax.fori_loop(
            0, 3, lambda i, x: x @ lax.map(lambda w: w / jnp.linalg.norm(w), p["w"])[i], x
        ),
        STACK,
        (X,),
        LAYERS,
    ),
    "mean_of_a_stack": Case(
        lambda p, x: x @ p["w"].mean(0), STACK, (X,), {"w": ((), (0, 1), (2,))}
    ),
    "tile": Case(lambda p, x: x @ jnp.tile(p["w"], (1, 2)), MATRIX, (X,), W),
    "tile_inputs": Case(
        lambda p, x: jnp.concatenate([x, x], 1) @ jnp.tile(p["w"], (2, 1)), MATRIX, (X,), W
    ),
    "columns_in_order": Case(lambda p, x: x @ p["w"][:, ORDER], MATRIX, (X,), W),
    "written_into_zeros": Case(
        lambda p, x: x @ jnp.zeros((6, 8)).at[:, 2:6].set(p["w"]), MATRIX, (X,), W
    ),
    "added_to_zeros": Case(
        lambda p, x: x @ jnp.zeros((6, 8)).at[:, :4].add(p["w"]), MATRIX, (X,), W
    ),
    "update_slice": Case(
        lambda p, x: x @ lax.dynamic_update_slice(jnp.ones((6, 8)), p["w"], (0, 1)), MATRIX, (X,), W
    ),
    "row_overwritten": Case(lambda p, x: x @ p["w"].at[0].set(0.0), MATRIX, (X,), W),
    "stacked_twice": Case(
        lambda p, x: jnp.einsum("nd,kdf->nkf", x, jnp.stack([p["w"], 2 * p["w"]])), MATRIX, (X,), W
    ),
    "custom_vmap": Case(lambda p, x: product(p["w"], x), MATRIX, (X,), W),
    "associative_scan": Case(
        lambda p, x: x @ lax.associative_scan(jnp.matmul, p["w"])[-1], STACK, (X,), LAYERS
    ),
}


def merge_with_numpy(params: Any, adapter: Any) -> Any:
    """`W + alpha / r A B`, where the axes of the weights are batch, inputs, outputs."""
    merged = dict(params)
    for path, leaf in adapter.items():
        batch = len(leaf.axes.batch)
        a = np.reshape(leaf.a, (*leaf.shape[:batch], -1, 2))
        b = np.reshape(leaf.b, (*leaf.shape[:batch], 2, -1))
        merged[path] = params[path] + 2 * (a @ b).reshape(leaf.shape)
    return merged


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thin(2)
def test_weight_uses_are_followed(name: str) -> None:
    fn, params, inputs, axes, embeddings = CASES[name]
    config = jlora.LoRA(rank=2, alpha=4)
    rules = dict.fromkeys([*axes, *embeddings], config)
    if axes:  # The same are found without a mapping, which would name the embeddings.
        plain = jlora.lora_transform(fn, config).init(jax.random.key(0), params, *inputs)
        assert {path: tuple(leaf.axes) for path, leaf in plain.items()} == axes
    lora = jlora.lora_transform(fn, rules)
    adapter = moved(lora.init(jax.random.key(0), params, *inputs))
    assert {path for path, leaf in adapter.items() if tuple(leaf.axes) == ((), (0,), (1,))} >= {
        *embeddings
    }
    expected = fn(merge_with_numpy(params, adapter), *inputs)
    actual = lora.apply(params, adapter, *inputs)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tile", "top_experts", "top_experts_by_token", "custom_vmap"])
def test_followed_uses_stay_factored(name: str) -> None:
    fn, params, inputs, axes, _ = CASES[name]
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4), allow_materialize=False)
    adapter = lora.init(jax.random.key(0), params, *inputs)
    jax.eval_shape(lora.apply, params, adapter, *inputs)
    rows = {row.path: row for row in lora.explain(params, *inputs).rows}
    assert all(rows[path].dense_reasons == () for path in axes)


@pytest.mark.parametrize(
    ("name", "path", "reasons"),
    [
        ("row_by_take", "table", ()),
        ("row_of_embed", "embedding", ()),
        ("rows_without_padding", "table", ("scatter",)),
        ("expert_without_the_first", "experts", ("scatter",)),
    ],
)
def test_explain_of_a_lookup(name: str, path: str, reasons: tuple[str, ...]) -> None:
    fn, params, inputs, _, _ = CASES[name]
    rules = {path: jlora.LoRA(rank=2, alpha=4)}
    lora = jlora.lora_transform(fn, rules)
    (row,) = [row for row in lora.explain(params, *inputs).rows if row.path == path]
    assert row.dense_reasons == reasons
    strict = jlora.lora_transform(fn, rules, allow_materialize=False)
    adapter = lora.init(jax.random.key(0), params, *inputs)
    if not reasons:
        jax.eval_shape(strict.apply, params, adapter, *inputs)
        return
    with pytest.raises(ValueError, match=f"'{path}' would be materialized for {reasons[0]}"):
        jax.eval_shape(strict.apply, params, adapter, *inputs)


def of_texts(p: Any, tokens: jax.Array) -> jax.Array:
    """Embeddings with positions, a bias in each row, and a tied head over all tokens at once."""
    batch, length = tokens.shape
    x = p["table"][tokens] + p["positions"][:length]
    x = x @ p["w"] + jnp.broadcast_to(p["bias"], (batch, length, 4))
    return x.reshape(batch * length, 4) @ p["w"].T @ p["table"].T


TEXTS = {**TABLE, "positions": normal(3, (9, 6), np.float32), "bias": normal(4, (4,), np.float32)}


def test_symbolic_lengths_are_followed() -> None:
    batch, length = export.symbolic_shape("b, n", constraints=["n <= 9"])
    shapes = jax.ShapeDtypeStruct((batch, length), np.int32)
    tokens = np.array([[1, 2, 5], [0, 9, 3]], np.int32)
    config = jlora.LoRA(rank=2, alpha=4)
    rules = {"table|positions|w$": config, "bias": jlora.BitFit()}
    lora = jlora.lora_transform(of_texts, rules)
    adapter = lora.init(jax.random.key(0), TEXTS, shapes)
    chex.assert_trees_all_equal(adapter, lora.init(jax.random.key(0), TEXTS, tokens))
    rows, expected = (lora.explain(TEXTS, x).rows for x in (shapes, tokens))
    assert rows == expected
    adapter = moved(adapter)
    program = export.export(jax.jit(lora.apply))(TEXTS, adapter, shapes)
    for inputs in (tokens, tokens[:1, :1]):
        merged = of_texts(lora.merge(TEXTS, adapter), inputs)
        np.testing.assert_allclose(
            program.call(TEXTS, adapter, inputs), merged, rtol=1e-4, atol=1e-4
        )


def sum_over_batch(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda c, row: (c + row @ p["w"], None), jnp.zeros((4,), x.dtype), x)[0]


@pytest.mark.parametrize("fn", [sum_over_batch, lambda p, x: x[None] @ p["w"]])
def test_symbolic_batch_in_loops_and_kernels(fn: Callable[..., Any]) -> None:
    # Kernels, which are for bfloat16, have a fixed number of tiles.
    params = {"w": jnp.asarray(MATRIX["w"], jnp.bfloat16)}
    x = jnp.asarray(X, jnp.bfloat16)
    shape = jax.ShapeDtypeStruct((export.symbolic_shape("b")[0], 6), jnp.bfloat16)
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4))
    adapter = moved(lora.init(jax.random.key(0), params, shape))
    assert lora.explain(params, shape).rows == lora.explain(params, x).rows
    program = export.export(jax.jit(lora.apply))(params, adapter, shape)
    expected = jax.jit(lora.apply)(params, adapter, x)
    np.testing.assert_array_equal(program.call(params, adapter, x), expected)


def test_loop_counter_is_no_lookup() -> None:
    explained = jlora.lora_transform(loop_over_layers, jlora.LoRA(rank=2, alpha=4))
    (bias,) = [row for row in explained.explain(STACK, X).rows if row.path == "bias"]
    assert bias.factored_uses == ()


@pytest.mark.parametrize("name", ["row", "top_experts"])
def test_gradient_of_looked_up_weights(name: str) -> None:
    fn, params, inputs, axes, embeddings = CASES[name]
    rules = dict.fromkeys([*axes, *embeddings], jlora.LoRA(rank=2, alpha=4))
    lora = jlora.lora_transform(fn, rules)
    adapter = moved(lora.init(jax.random.key(0), params, *inputs))

    def loss(adapter: Any, *, merged: bool) -> jax.Array:
        if merged:
            return jnp.sum(fn(lora.merge(params, adapter), *inputs) ** 2)
        return jnp.sum(lora.apply(params, adapter, *inputs) ** 2)

    actual, expected = (jax.grad(lambda a, m=m: loss(a, merged=m))(adapter) for m in (False, True))
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-4)
