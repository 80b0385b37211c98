"""Weighted sums of adapters against NumPy, and adapters on top of each other."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import LORA, case, moved, total

import jlora
from jlora import _tree
from jlora.adapters.weighted_sum import WeightedSumLeaf
from jlora.merging.weighted import (
    adapter_names,
    compose_adapters,
    fold_weights,
    get_weights,
    weighted_sum,
    with_weights,
)

SLOW = ["stacked_on_the_last_axis", "conv_2d", "tied_embedding", "ragged_experts"]
LAYERS = [
    *["dense_general", "experts", "linen_scan_remat", "embed"],
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]
WEIGHTS = [0.75, -1.25, 0.5]
# float32 against float64: sums of at most 60 products of numbers near one.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


@functools.cache
def parts(name: str) -> dict[str, Any]:
    """Three adapters of one layer, of different families and ranks."""
    one = case(name, "float32")

    def trained(config: Any, seed: int) -> Any:
        lora = jlora.lora_transform(one.fn, {one.layer.adapted: config})
        return moved(lora.init(jax.random.key(seed), one.params, *one.inputs), seed)

    return {
        "first": trained(LORA, 3),
        "second": trained(jlora.LoRAFA(rank=1, alpha=2), 4),
        "third": trained(jlora.SoRA(rank=3, alpha=2, use_rslora=True), 5),
    }


def change(leaf: Any) -> np.ndarray:
    """`scale * A diag(g) B` in float64, laid out like the weight."""
    batch, inputs, outputs = leaf.axes
    rank = leaf.a.shape[-1]
    label, scale = len(leaf.shape), leaf.alpha / rank
    if leaf.use_rslora:
        scale = leaf.alpha / np.sqrt(rank)
    gate = np.float64(getattr(leaf, "gate", np.ones((*leaf.axis_sizes.batch, rank))))
    a, b = np.float64(leaf.a), np.float64(leaf.b)
    labels = [[*batch, *inputs, label], [*batch, label], [*batch, label, *outputs]]
    operands = [item for pair in zip([a, gate, b], labels, strict=True) for item in pair]
    return scale * np.einsum(*operands, list(range(label)))


def summed(params: Any, adapters: dict[str, Any], weights: Any) -> Any:
    """The base plus the weighted updates, in float64."""
    flat = _tree.flatten_with_paths(params)
    leaves = []
    for path, base in zip(flat.paths, flat.leaves, strict=True):
        sum_ = np.float64(base)
        for weight, adapter in zip(weights, adapters.values(), strict=True):
            if path in adapter:
                # One weight for all, or one for each matrix of a stack on the first axes.
                by_layer = np.reshape(
                    weight, np.shape(weight) + (1,) * (base.ndim - np.ndim(weight))
                )
                sum_ = sum_ + by_layer * change(adapter[path])
        leaves.append(sum_)
    return jax.tree.unflatten(flat.treedef, leaves)


def narrow(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.mark.parametrize("name", LAYERS)
def test_law_weighted_sum_equals_sum_of_deltas(name: str) -> None:
    one, adapters = case(name, "float32"), parts(name)
    mix = weighted_sum(adapters, WEIGHTS)
    expected = summed(one.params, adapters, WEIGHTS)
    chex.assert_trees_all_close(one.lora.merge(one.params, mix), narrow(expected), **FLOAT32)
    run = jax.jit(one.lora.apply)
    output = run(one.params, mix, *one.inputs)
    dense = jax.jit(one.fn)(narrow(expected), *one.inputs)
    # Rounding errors add up over the layers.
    chex.assert_trees_all_close(output, dense, rtol=1e-4, atol=1e-4)
    # Plain LoRA of it is the same function.
    chex.assert_trees_all_close(
        one.compiled(one.params, fold_weights(mix), *one.inputs), output, **FLOAT32
    )


def test_weighted_sum_default_weights_are_one() -> None:
    adapters = parts("dense_general")
    chex.assert_trees_all_equal(weighted_sum(adapters), weighted_sum(adapters, [1, 1, 1]))


def test_weighted_sum_weights_by_name_any_order() -> None:
    one, adapters = case("dense", "float32"), parts("dense")
    backwards = {name: adapters[name] for name in reversed(adapters)}
    weights = dict(zip(adapters, WEIGHTS, strict=True))
    want = summed(one.params, adapters, WEIGHTS)
    for make in (weighted_sum, jax.jit(weighted_sum)):  # jit sorts the names.
        found = jlora.merge(one.params, make(backwards, weights))
        chex.assert_trees_all_close(found, want, **FLOAT32)
    with pytest.raises(ValueError, match=r"differ in \['third'\]. Pass a weight for each of"):
        weighted_sum(adapters, {"first": 1.0, "second": 1.0})


@pytest.mark.parametrize("name", ["dense_general", "experts", "linen_scan_remat"])
def test_law_with_weights_vmap_equals_each_alone(name: str) -> None:
    one, mix = case(name, "float32"), weighted_sum(parts(name))
    rows = jnp.array([WEIGHTS, [0.0, 0.0, 1.0], [2.0, 0.5, -1.0], [0.0, 0.0, 0.0]])
    run = jax.jit(
        lambda weights: one.lora.apply(one.params, with_weights(mix, weights), *one.inputs)
    )
    together = jax.jit(jax.vmap(run))(rows)
    for row, output in enumerate(together):
        chex.assert_trees_all_close(output, run(rows[row]), **FLOAT32)
    chex.assert_trees_all_close(together[3], one.fn(one.params, *one.inputs), **FLOAT32)


@pytest.mark.parametrize("name", ["dense_general", "experts"])
def test_with_weights_vmap_shares_factors(name: str) -> None:
    one, mix = case(name, "float32"), weighted_sum(parts(name))
    run = jax.vmap(lambda w: one.lora.apply(one.params, with_weights(mix, w), *one.inputs))
    text = str(jax.make_jaxpr(run)(jnp.ones((7, 3))))
    (leaf,) = mix.values()
    for array in (leaf.a, leaf.b, np.empty(leaf.shape)):
        shape = ",".join(map(str, array.shape))
        assert f"f32[7,{shape}]" not in text, "a row must not repeat it"
        assert f"f32[{shape}]" in text


def test_weighted_sum_gradient_is_of_weights_only() -> None:
    one, adapters = case("transposed", "float32"), parts("transposed")
    mix = weighted_sum(adapters, WEIGHTS)
    (x,) = one.inputs
    loss = lambda mix: total(one.lora.apply(one.params, mix, x))
    (slope,) = jax.jit(jax.grad(loss))(mix).values()
    w = summed(one.params, adapters, WEIGHTS)["w"]
    cotangent = np.cos(np.float64(x) @ w.T)
    expected = [
        (cotangent * (np.float64(x) @ change(adapter["w"]).T)).sum()
        for adapter in adapters.values()
    ]
    # A sum of 40 entries, each from products as above.
    np.testing.assert_allclose(slope.weights, expected, rtol=1e-4, atol=1e-4)
    assert not slope.a.any()
    assert not slope.b.any()
    assert set(jax.tree.leaves(jlora.param_labels(mix))) == {"frozen", "mixing_weights"}


def test_weighted_sum_adapters_of_different_paths() -> None:
    one = case("attention", "float32")
    first, second = moved(one.fresh, 3), moved(one.fresh, 4)
    paths = list(first)
    adapters = {
        "first": {path: first[path] for path in paths[:3]},
        "second": {path: second[path] for path in paths[1:]},
    }
    mix = weighted_sum(adapters, [0.5, 2.0])
    assert [mix[path].ranks for path in (paths[0], paths[1], paths[3])] == [(2, 0), (2, 2), (0, 2)]
    expected = summed(one.params, adapters, [0.5, 2.0])
    chex.assert_trees_all_close(one.lora.merge(one.params, mix), narrow(expected), **FLOAT32)


def test_law_with_weights_layer_wise_on_a_stack() -> None:
    one, adapters = case("linen_scan_remat", "float32"), parts("linen_scan_remat")
    mix = weighted_sum(adapters)
    rng = np.random.default_rng(0)
    by_path = {path: rng.normal(size=(*leaf.axis_sizes.batch, 3)) for path, leaf in mix.items()}
    assert {numbers.ndim for numbers in by_path.values()} == {2}
    layered = with_weights(mix, by_path)
    found = jlora.delta(one.params, layered)
    for path, numbers in by_path.items():
        leaf = mix[path]
        assert leaf.axes.batch == (0,)
        sum_ = sum(
            numbers[:, i].reshape(-1, *[1] * (len(leaf.shape) - 1)) * change(adapter[path])
            for i, adapter in enumerate(adapters.values())
        )
        np.testing.assert_allclose(found[path], sum_, **FLOAT32)
    plain = jlora.delta(one.params, fold_weights(layered))
    chex.assert_trees_all_close(plain, found, **FLOAT32)
    run = jax.jit(one.lora.apply)
    chex.assert_trees_all_close(
        run(one.params, layered, *one.inputs),
        one.compiled(one.params, fold_weights(layered), *one.inputs),
        **FLOAT32,
    )
    # One number for all layers of a path is that number for each.
    alike = {path: np.broadcast_to(WEIGHTS, numbers.shape) for path, numbers in by_path.items()}
    short = dict.fromkeys(by_path, WEIGHTS)
    chex.assert_trees_all_equal(
        jlora.delta(one.params, with_weights(mix, alike)),
        jlora.delta(one.params, with_weights(mix, short)),
    )


def test_get_weights_roundtrip_is_identity() -> None:
    mix = weighted_sum(parts("linen_scan_remat"), WEIGHTS)
    chex.assert_trees_all_equal(with_weights(mix, get_weights(mix)), mix)
    assert adapter_names(mix) == ("first", "second", "third")


def test_with_weights_does_not_recompile() -> None:
    one, mix = case("dense_general", "float32"), weighted_sum(parts("dense_general"))
    traces = []

    @jax.jit
    def run(mix: Any) -> Any:
        traces.append(1)
        return one.lora.apply(one.params, mix, *one.inputs)

    for weights in ([1, 2, 3], WEIGHTS, np.zeros(3)):
        run(with_weights(mix, weights))
    assert len(traces) == 1


def test_rank_weights_nan_stays_with_its_adapter() -> None:
    """A product with zeros and ones would spread it to all."""
    (leaf,) = weighted_sum(parts("dense_general")).values()
    gates = dataclasses.replace(leaf, weights=jnp.array([1, np.nan, 2])).rank_weights
    np.testing.assert_array_equal(np.isnan(gates), np.repeat([False, True, False], leaf.ranks))


def test_weighted_sum_nested_and_to_lora() -> None:
    one, adapters = case("dense_general", "float32"), parts("dense_general")
    inner = weighted_sum({"first": adapters["first"], "second": adapters["second"]}, [2, 3])
    outer = weighted_sum({"inner": inner, "third": adapters["third"]}, [0.5, -1])
    expected = summed(one.params, adapters, [1.0, 1.5, -1.0])
    chex.assert_trees_all_close(one.lora.merge(one.params, outer), narrow(expected), **FLOAT32)
    converted = jlora.to_lora(weighted_sum(adapters, WEIGHTS), one.params, 6)
    np.testing.assert_allclose(
        jlora.merge(one.params, converted.adapter)["params"]["kernel"],
        summed(one.params, adapters, WEIGHTS)["params"]["kernel"],
        **FLOAT32,
    )


@pytest.mark.parametrize("name", ["experts", "linen_scan_remat"])
def test_law_save_adapter_weighted_sum_roundtrip(name: str, tmp_path: pathlib.Path) -> None:
    one, mix = case(name, "float32"), weighted_sum(parts(name), WEIGHTS)
    by_path = {p: np.full((*leaf.axis_sizes.batch, 3), 0.5) for p, leaf in mix.items()}
    for adapter in (mix, with_weights(mix, by_path)):
        jlora.save_adapter(tmp_path / "mix.safetensors", adapter, one.params)
        loaded = jlora.load_adapter(tmp_path / "mix.safetensors", one.params)
        chex.assert_trees_all_equal_structs(loaded, adapter)
        chex.assert_trees_all_equal(loaded, adapter)


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layered": 1}, TypeError, "layered=1 must be"),
        ({"names": ("a", "b", 3)}, TypeError, "must be strings"),
        ({"names": ("a", "b")}, ValueError, "must be 3 different names"),
        ({"names": ("a", "b", "a")}, ValueError, "must be 3 different names"),
        ({"ranks": (2, -1, 5)}, ValueError, "must be integers of 0 or more"),
        ({"ranks": (2, 1.0, 3)}, ValueError, "must be integers of 0 or more"),
        ({"ranks": (0, 0, 0)}, ValueError, "leave no adapter"),
    ],
)
def test_leaf_validate_wrong_metadata_raises(changes: Any, error: Any, message: str) -> None:
    (leaf,) = weighted_sum(parts("dense_general")).values()
    leaf.validate()
    with pytest.raises(error, match=message):
        dataclasses.replace(leaf, **changes).validate()


def test_weighted_sum_bad_adapters_raise() -> None:
    adapters = parts("dense_general")
    one = adapters["first"]
    (path,) = one
    for bad, error, message in [
        ({}, ValueError, r"adapters=\[\] must be a mapping from names"),
        ({1: one}, ValueError, r"adapters=\[1\] must be a mapping from names"),
        ([one], TypeError, "must be a mapping from names to adapters, got list"),
        (one, TypeError, "got a single adapter of 1 weights"),
        ({"a": {}}, ValueError, "All adapters are empty"),
        ({"a": one, "b": 3}, TypeError, "int"),
    ]:
        with pytest.raises(error, match=message):
            weighted_sum(bad)
    with pytest.raises(ValueError, match=r"must have shape \(3,\), .*got shape \(2,\)"):
        weighted_sum(adapters, [1, 2])
    with pytest.raises(ValueError, match="weights must be finite, got NaN"):
        weighted_sum(adapters, [1, np.nan, 2])
    nan = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.inf), one)
    with pytest.raises(ValueError, match=rf"adapters\[1\]\['{path}'\].a has NaN or infinite"):
        weighted_sum({"a": one, "b": nan})
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
    with pytest.raises(ValueError, match=r"has shape \(3, 6, 2\).*like a stack of adapters"):
        weighted_sum({"a": one, "b": stack})


def test_weighted_sum_different_weights_raise() -> None:
    first, second = parts("transposed")["first"], parts("matmul")["first"]
    with pytest.raises(
        ValueError, match=r"different weights under the path 'w'.*\(5, 6\).*\(6, 5\)"
    ):
        weighted_sum({"a": first, "b": second})
    (leaf,) = first.values()
    turned = dataclasses.replace(leaf, axes=type(leaf.axes)((), (0,), (1,)), a=leaf.b.T, b=leaf.a.T)
    with pytest.raises(ValueError, match="different weights under the path 'w'"):
        weighted_sum({"a": first, "b": {"w": turned}})


def test_weighted_sum_other_low_rank_families() -> None:
    one = case("dense", "float32")
    vera = case("dense", "float32", "vera")  # Rank 11 of a weight (6, 5): not thin.
    with pytest.raises(TypeError, match=r"'b' has a VeRALeaf"):
        weighted_sum({"a": one.adapter, "b": vera.adapter})
    thin = jlora.lora_transform(one.fn, {"kernel": jlora.VeRA(rank=3)})
    third = moved(thin.init(jax.random.key(0), one.params, *one.inputs))
    adalora = {**case("dense", "float32", "adalora").adapter}
    mix = weighted_sum({"a": one.adapter, "b": adalora, "c": third}, [2, -1, 0.5])
    changes = [jlora.delta(one.params, each) for each in (one.adapter, adalora, third)]
    (path,) = mix
    expected = 2 * changes[0][path] - changes[1][path] + 0.5 * changes[2][path]
    np.testing.assert_allclose(jlora.delta(one.params, mix)[path], expected, **FLOAT32)


def test_weighted_sum_without_factors_raises() -> None:
    one = case("dense", "float32", "dora")
    with pytest.raises(TypeError, match=r"'a' has a DoRALeaf.*jlora.to_lora"):
        weighted_sum({"a": one.adapter})
    pissa = jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa())
    lora = jlora.lora_transform(one.fn, {"kernel": pissa})
    taken = lora.init(jax.random.key(0), one.params, *one.inputs)
    with pytest.raises(ValueError, match="jlora.rebase_to_original"):
        weighted_sum({"a": taken})


def test_with_weights_wrong_paths_or_shapes_raise() -> None:
    mix = weighted_sum(parts("attention"))
    path, *rest = mix
    with pytest.raises(TypeError, match="must have mixing weights on each path, got a LoRALeaf on"):
        with_weights({**mix, path: parts("attention")["first"][path]}, WEIGHTS)
    with pytest.raises(ValueError, match=f"differ in .*'{path}'"):
        with_weights(mix, dict.fromkeys(rest, WEIGHTS))
    with pytest.raises(ValueError, match=r"must have shape \(3,\), .*got shape \(2,\)\."):
        with_weights(mix, {p: [1, 2] for p in mix})
    other = {name: weighted_sum({"a": parts("attention")["first"]})[name] for name in rest}
    with pytest.raises(ValueError, match="leaves of 2 different ones"):
        get_weights({path: mix[path], **other})
    with pytest.raises(ValueError, match="leaves of 0 different ones"):
        adapter_names({})
    stack = weighted_sum(parts("linen_scan_remat"))
    with pytest.raises(
        ValueError, match=r"must have shape \(3,\) or \(3, 3\)|must have shape \(3,\) or"
    ):
        with_weights(stack, {p: np.ones((leaf.shape[0] + 1, 3)) for p, leaf in stack.items()})


# Composition


@pytest.mark.parametrize("name", ["dense_general", "linen_scan_remat", "tied_embedding"])
def test_law_compose_equals_upper_on_merged_lower(name: str) -> None:
    one, adapters = case(name, "float32"), parts(name)
    lower, upper = adapters["third"], adapters["first"]
    merged = one.lora.merge(one.params, lower)

    def on_top(upper: Any, lower: Any) -> jax.Array:
        return total(one.lora.apply(one.params, compose_adapters(lower, upper), *one.inputs))

    def on_merged(upper: Any) -> jax.Array:
        return total(one.lora.apply(merged, upper, *one.inputs))

    before = jax.tree.map(np.array, lower)
    value, (slope, of_lower) = jax.jit(jax.value_and_grad(on_top, (0, 1)))(upper, lower)
    expected, expected_slope = jax.jit(jax.value_and_grad(on_merged))(upper)
    # Sums of some hundred entries, each as exact as above.
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-3)
    chex.assert_trees_all_close(slope, expected_slope, rtol=1e-3, atol=1e-3)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 0.1
    chex.assert_trees_all_equal(of_lower, jax.tree.map(np.zeros_like, lower))
    chex.assert_trees_all_equal(lower, before)


def test_compose_adapters_different_paths() -> None:
    one = case("attention", "float32")
    paths = list(one.adapter)
    lower = jlora.lora_transform(one.fn, {paths[0]: jlora.DoRA(rank=2, alpha=3)}).init(
        jax.random.key(0), one.params, *one.inputs
    )
    lower = {**moved(lower), paths[1]: moved(one.fresh, 4)[paths[1]]}
    upper = {path: one.adapter[path] for path in paths[1:]}
    both = compose_adapters(lower, upper)
    merged = jlora.merge(one.params, lower)
    chex.assert_trees_all_close(
        jlora.merge(one.params, both), jlora.merge(merged, upper), **FLOAT32
    )
    assert set(both) == set(paths)


def test_compose_adapters_dropout_of_lower_is_off() -> None:
    one = case("attention", "float32")
    paths = list(one.adapter)
    dropping = {p: dataclasses.replace(leaf, dropout=0.5) for p, leaf in one.adapter.items()}
    upper = {path: one.adapter[path] for path in paths[1:]}
    both = compose_adapters(dropping, upper)
    assert {leaf.dropout for leaf in both.values()} == {0.0}
    with pytest.raises(ValueError, match=r"dropout=0.5 on .*lora.merge\(params, lower\)"):
        compose_adapters(one.adapter, dropping)
    alone = compose_adapters({paths[0]: one.adapter[paths[0]]}, {paths[1]: dropping[paths[1]]})
    assert alone[paths[1]].dropout == 0.5


@pytest.mark.slow
def test_compose_adapters_dylora_is_full_rank() -> None:
    one = case("attention", "float32")
    lora = jlora.lora_transform(one.fn, {one.layer.adapted: jlora.DyLoRA(rank=2, alpha=3)})
    lower = moved(lora.init(jax.random.key(3), one.params, *one.inputs))
    paths = list(lower)
    upper = {path: one.adapter[path] for path in paths[1:]}
    both = compose_adapters(lower, upper)
    assert both[paths[0]].family == "dylora"
    drawn = [
        one.lora.apply(one.params, both, *one.inputs, dropout_key=jax.random.key(seed))
        for seed in range(4)
    ]
    wanted = one.lora.apply(jlora.merge(one.params, lower), upper, *one.inputs)
    for found in drawn:
        chex.assert_trees_all_close(found, wanted, **FLOAT32)


def test_compose_adapters_incompatible_raises() -> None:
    one = case("dense", "float32")
    dylora, vera = (case("dense", "float32", name).adapter for name in ("dylora", "vera"))
    with pytest.raises(TypeError, match="ranks are drawn at each step"):
        compose_adapters(one.adapter, dylora)
    with pytest.raises(ValueError, match="shared arrays of the name 'vera'"):
        compose_adapters(vera, vera)
    thin = jlora.lora_transform(one.fn, {"kernel": jlora.VeRA(rank=3)})
    shared = thin.init(jax.random.key(0), one.params, *one.inputs)
    assert set(compose_adapters(shared, one.adapter)) == set(one.adapter)
    with pytest.raises(TypeError, match="'lower' has a DoRALeaf"):
        compose_adapters(case("dense", "float32", "dora").adapter, one.adapter)


def test_weighted_sum_leaf_rank_and_size() -> None:
    (leaf,) = weighted_sum(parts("dense_general")).values()
    assert isinstance(leaf, WeightedSumLeaf)
    assert leaf.rank == 6
    assert jlora.adapters.base.count_trainable_elements(leaf) == 3
