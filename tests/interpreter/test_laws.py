"""The laws, for every kind of layer and type."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import BY_NAME, DIFFERENTIABLE, NAMES, case, errors, total, widened
from _support.hlo import weight_shaped_products
from _support.materialized import record_materialized

import jlora

# One layer per rule of the interpreter: how a rule rounds is no matter of what is around it, so the
# other layers are in bfloat16 in the slow group alone.
ROUNDED = {
    "dense_general",
    "fused_qkv",
    "concatenated_inputs",
    "experts",
    "ragged_experts",
    "cast",
    "in_custom_vjp_true",
    "in_shard_map",
    "weight_norm",
    "linen_scan_remat",
    "embed",
    "tied_embedding",
    "conv_2d",
}
assert set(NAMES) >= ROUNDED

# Sums of at most 60 products of numbers near one in float32, in another order.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


def in_both_types(names: list[str]) -> list[Any]:
    """A layer's name and a type."""
    wide = [pytest.param(name, "float32", id=f"{name}-float32") for name in names]
    return wide + [
        pytest.param(
            *(name, "bfloat16"),
            id=f"{name}-bfloat16",
            marks=[] if name in ROUNDED else pytest.mark.slow,
        )
        for name in names
    ]


def assert_as_right(values: Any, other: Any, truth: Any) -> None:
    """In bfloat16 two orders of rounding are no nearer to each other than to the truth, so `values`
    must come as near to the float32 result as `other` does, up to the type's own spacing."""
    for (error, size), (allowed, _) in zip(
        errors(values, truth), errors(other, truth), strict=True
    ):
        # 2^-8 is bfloat16's relative spacing; a handful of roundings follow one another.
        assert error <= 2 * allowed + 6 * 2**-8 * size, (error, allowed, size)


@pytest.mark.parametrize(("name", "dtype"), in_both_types(NAMES))
def test_law_apply_and_merge_agree(name: str, dtype: str) -> None:
    one = case(name, dtype)
    merged = jax.jit(one.fn)(one.lora.merge(one.params, one.adapter), *one.inputs)
    if dtype == "float32" and name != "cast":
        chex.assert_trees_all_close(one.output, merged, **FLOAT32)
        return
    wide = case(name, "float32").fn
    truth = jax.jit(wide)(one.lora.merge(widened(one.params), one.adapter), *widened(one.inputs))
    assert_as_right(one.output, merged, truth)


@pytest.mark.parametrize(("name", "dtype"), in_both_types(DIFFERENTIABLE))
def test_law_gradients_of_apply_and_merge_agree(name: str, dtype: str) -> None:
    one = case(name, dtype)

    def through_merge(fn: Any, params: Any, inputs: Any) -> Any:
        loss = lambda adapter: total(fn(jlora.merge(params, adapter), *inputs))
        return jax.jit(jax.grad(loss))(one.adapter)

    merged = through_merge(one.fn, one.params, one.inputs)
    if dtype == "float32" and name != "cast":
        chex.assert_trees_all_close(one.gradient, merged, **FLOAT32)
        return
    wide = case(name, "float32").fn
    truth = through_merge(wide, widened(one.params), widened(one.inputs))
    assert_as_right(one.gradient, merged, truth)


@pytest.mark.parametrize(("name", "dtype"), in_both_types(NAMES))
def test_law_a_fresh_adapter_changes_nothing(name: str, dtype: str) -> None:
    one = case(name, dtype)
    base = jax.jit(one.fn)(one.params, *one.inputs)
    fresh = one.output_of(one.fresh)
    if dtype == "bfloat16":
        # Adding an exact zero rounds nothing, but the compiler may fuse what follows otherwise.
        chex.assert_trees_all_close(widened(fresh), widened(base), rtol=2**-7, atol=2**-7)
    else:
        chex.assert_trees_all_close(fresh, base, **FLOAT32)
    moved = [error for error, _ in errors(one.output, base)]
    assert max(moved) > 0.01, "an adapter off zero must change the output, or the law says nothing"


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if not BY_NAME[n].dense])
def test_law_frozen_is_absent_from_the_compiled_gradient(name: str) -> None:
    one = case(name, "float32")
    flat = jax.tree.leaves(one.params)
    adapted = {tuple(leaf.shape) for leaf in one.adapter.values()}
    assert adapted <= {leaf.shape for leaf in flat}
    found = weight_shaped_products(one.program.as_text(), adapted)
    assert not found, found


def test_the_search_for_weight_shaped_products_finds_them_where_they_are() -> None:
    for name in ("dense", "conv_2d", "embed", "linen_scan", "kv_einsum", "attention"):
        one = case(name, "float32")
        full = jax.jit(jax.grad(lambda p, *x, fn=one.fn: total(fn(p, *x))))
        text = full.lower(one.params, *one.inputs).compile().as_text()
        assert weight_shaped_products(text, {tuple(leaf.shape) for leaf in one.adapter.values()})


@pytest.mark.parametrize("name", NAMES)
def test_law_nothing_is_mutated(name: str) -> None:
    one = case(name, "float32")
    before = jax.tree.map(np.array, (one.params, one.adapter))
    merged = one.lora.merge(one.params, one.adapter)
    jax.block_until_ready(one.output)
    chex.assert_trees_all_equal(jax.tree.map(np.array, (one.params, one.adapter)), before)
    chex.assert_trees_all_equal_structs(merged, one.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, one.params)


@pytest.mark.parametrize("name", NAMES)
def test_law_explain_says_what_is_dense(name: str) -> None:
    one = case(name, "float32")
    explanation = one.explanation
    adapted = [row for row in explanation.rows if row.trainable_params]
    assert {row.path for row in adapted} == set(one.adapter)
    assert all(bool(row.dense_reasons) == one.layer.dense for row in adapted), adapted
    assert explanation.trainable_params == sum(leaf.size for leaf in jax.tree.leaves(one.adapter))
    assert not explanation.errors


@pytest.mark.parametrize("name", NAMES)
def test_law_explain_is_what_happens(name: str) -> None:
    one = case(name, "float32")
    with record_materialized() as seen:
        jax.eval_shape(lambda: one.lora.apply(one.params, one.adapter, *one.inputs))
    rows = one.explanation.rows
    assert set(seen) == {row.path for row in rows if row.trainable_params and row.dense_reasons}


@pytest.mark.parametrize(
    "name",
    ["dense", "kv_einsum", "in_custom_vjp_true", "linen_scan_remat", "conv_groups", "weight_norm"],
)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    with jax.enable_x64(True):
        layer = BY_NAME[name]
        fn, params, inputs = layer.make(jnp.dtype("float64"))
        config = jlora.LoRA(rank=2, alpha=3, dtype=jnp.float64)
        lora = jlora.lora_transform(fn, {layer.adapted: config})
        adapter = lora.init(jax.random.key(1), params, *inputs)
        leaves, treedef = jax.tree.flatten(adapter)
        rng = np.random.default_rng(0)
        point = [leaf + 0.3 * rng.normal(size=leaf.shape) for leaf in leaves]
        direction = [rng.normal(size=leaf.shape) for leaf in leaves]

        @jax.jit
        def loss(leaves: Any) -> jax.Array:
            output = lora.apply(params, jax.tree.unflatten(treedef, leaves), *inputs)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(output))

        step = 1e-5
        ahead, behind = (
            loss([x + sign * step * d for x, d in zip(point, direction, strict=True)])
            for sign in (1, -1)
        )
        gradient = jax.grad(loss)(point)
        slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        # Central differences err by step^2 times the third derivative, about 1e-10 times 1e2.
        np.testing.assert_allclose(slope, float((ahead - behind) / (2 * step)), rtol=1e-6)
