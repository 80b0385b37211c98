"""Laws of `apply`, `merge`, `init` and `explain`, for every kind of layer and type."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import BY_NAME, DIFFERENTIABLE, NAMES, case, errors, total, widened
from _support.hlo import weight_shaped_products

import jlora
from jlora.interpreter.factored_array import FactoredArray

# One layer per rule of the interpreter. The rounding of a rule does not depend on the layer around
# it, so the other layers are tested in bfloat16 in the slow group alone.
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

# Sums of at most 60 products of values near one in float32, in another order.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


def in_both_types(names: list[str]) -> list[Any]:
    """Parameters (layer name, type)."""
    wide = [pytest.param(name, "float32", id=f"{name}-float32") for name in names]
    return wide + [
        pytest.param(
            *(name, "bfloat16"),
            id=f"{name}-bfloat16",
            marks=[] if name in ROUNDED else pytest.mark.slow,
        )
        for name in names
    ]


def assert_as_accurate(values: Any, other: Any, truth: Any) -> None:
    """Asserts that `values` are as close to the float32 result as `other`, up to bfloat16 spacing.

    In bfloat16 two orders of rounding differ as much from each other as from the exact result.
    """
    for (error, size), (allowed, _) in zip(
        errors(values, truth), errors(other, truth), strict=True
    ):
        # 2^-8 is the relative spacing of bfloat16; a few roundings follow one another.
        assert error <= 2 * allowed + 6 * 2**-8 * size, (error, allowed, size)


@pytest.mark.parametrize(("name", "dtype"), in_both_types(NAMES))
def test_apply_equals_merge(name: str, dtype: str) -> None:
    one = case(name, dtype)
    merged = jax.jit(one.fn)(one.lora.merge(one.params, one.adapter), *one.inputs)
    if dtype == "float32" and name != "cast":
        chex.assert_trees_all_close(one.output, merged, **FLOAT32)
        return
    wide = case(name, "float32").fn
    truth = jax.jit(wide)(one.lora.merge(widened(one.params), one.adapter), *widened(one.inputs))
    assert_as_accurate(one.output, merged, truth)


@pytest.mark.parametrize("name", [name for name in NAMES if "custom" in name])
def test_apply_without_gradient_equals_merge(name: str) -> None:
    """Under `grad`, JAX evaluates the forward rule of a custom derivative and not its function."""
    one = case(name, "float32")
    apart = one.compiled(one.params, one.adapter, *one.inputs)
    merged = jax.jit(one.fn)(one.lora.merge(one.params, one.adapter), *one.inputs)
    chex.assert_trees_all_close(apart, merged, **FLOAT32)


@pytest.mark.parametrize(("name", "dtype"), in_both_types(DIFFERENTIABLE))
@pytest.mark.thin(2)
def test_apply_gradient_equals_merge(name: str, dtype: str) -> None:
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
    assert_as_accurate(one.gradient, merged, truth)


@pytest.mark.parametrize(("name", "dtype"), in_both_types(NAMES))
def test_init_fresh_adapter_keeps_output(name: str, dtype: str) -> None:
    one = case(name, dtype)
    base = jax.jit(one.fn)(one.params, *one.inputs)
    fresh = one.output_of(one.fresh)
    if dtype == "bfloat16":
        # Adding an exact zero rounds nothing, but the compiler may fuse later operations otherwise.
        chex.assert_trees_all_close(widened(fresh), widened(base), rtol=2**-7, atol=2**-7)
    else:
        chex.assert_trees_all_close(fresh, base, **FLOAT32)
    changes = [error for error, _ in errors(one.output, base)]
    assert max(changes) > 0.01, "an adapter off zero must change the output, or the law is void"


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if not BY_NAME[n].dense])
def test_gradient_compiled_has_no_frozen_part(name: str) -> None:
    one = case(name, "float32")
    leaves = jax.tree.leaves(one.params)
    adapted = {tuple(leaf.shape) for leaf in one.adapter.values()}
    assert adapted <= {leaf.shape for leaf in leaves}
    products = weight_shaped_products(one.program.as_text(), adapted)
    assert not products, products


def test_weight_shaped_products_are_found() -> None:
    for name in ("dense", "conv_2d", "embed", "linen_scan", "kv_einsum", "attention"):
        one = case(name, "float32")
        full = jax.jit(jax.grad(lambda p, *x, fn=one.fn: total(fn(p, *x))))
        text = full.lower(one.params, *one.inputs).compile().as_text()
        assert weight_shaped_products(text, {tuple(leaf.shape) for leaf in one.adapter.values()})


@pytest.mark.parametrize("name", NAMES)
def test_apply_and_merge_mutate_nothing(name: str) -> None:
    one = case(name, "float32")
    before = jax.tree.map(np.array, (one.params, one.adapter))
    merged = one.lora.merge(one.params, one.adapter)
    jax.block_until_ready(one.output)
    chex.assert_trees_all_equal(jax.tree.map(np.array, (one.params, one.adapter)), before)
    chex.assert_trees_all_equal_structs(merged, one.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, one.params)


@pytest.mark.parametrize("name", NAMES)
def test_explain_lists_materialized_weights(name: str) -> None:
    one = case(name, "float32")
    explanation = one.explanation
    adapted = [row for row in explanation.rows if row.trainable_params]
    assert {row.path for row in adapted} == set(one.adapter)
    assert all(bool(row.dense_reasons) == one.layer.dense for row in adapted), adapted
    assert explanation.trainable_params == sum(leaf.size for leaf in jax.tree.leaves(one.adapter))
    assert not explanation.errors


@pytest.mark.parametrize("name", NAMES)
def test_explain_matches_materializations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(name, "float32")
    materialized = set()
    materialize = FactoredArray.materialize

    def spy(factored: FactoredArray) -> Any:
        if not factored.is_gathered:
            materialized.add(factored.path)
        return materialize(factored)

    monkeypatch.setattr(FactoredArray, "materialize", spy)
    jax.eval_shape(lambda: one.lora.apply(one.params, one.adapter, *one.inputs))
    rows = one.explanation.rows
    assert materialized == {row.path for row in rows if row.trainable_params and row.dense_reasons}


@pytest.mark.parametrize(
    "name",
    ["dense", "kv_einsum", "in_custom_vjp_true", "linen_scan_remat", "conv_groups", "weight_norm"],
)
def test_gradient_equals_finite_differences(name: str) -> None:
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
        # The error of central differences is step^2 times the third derivative: 1e-10 times 1e2.
        np.testing.assert_allclose(slope, float((ahead - behind) / (2 * step)), rtol=1e-6)
