"""LoftQ: the quantized base plus its adapter is near the original weights."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import BY_NAME, FAMILIES, Case, case, errors, moved, total, widened

import jlora
from jlora._tree import flatten_with_paths
from jlora.interpreter.weight import weight_to_matrices

RNG = np.random.default_rng(0)
# Values that 4-bit blocks represent badly, in no favorable order.
W = RNG.normal(size=(24, 18)).astype(np.float32)
X = RNG.normal(size=(50, 24)).astype(np.float32)
NF4 = jlora.NF4(block_size=6)
RULES = {"w": NF4}
STARTED = ["lora", "lora_fa", "sora", "dora"]
KINDS = [
    "matmul",
    "dense_general",
    "fused_qkv",
    "experts",
    "conv_2d",
    "conv_groups",
    "embed",
    "tied_embedding",
    "linen_scan_remat",
    "linen_scan_axis_one",
]
SMALL = jlora.Int4(block_size=2)  # Coarse, and its blocks fit the small axes of the layers.


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


def fresh(config: Any, weight: Any = W) -> tuple[Any, Any, Any]:
    """Returns the transform of a product, its parameters, and a fresh adapter."""
    params = {"w": jax.device_put(weight)}
    lora = jlora.lora_transform(product, config)
    return lora, params, lora.init(jax.random.key(0), params, X)


def rules_for(one: Case) -> dict[str, Any]:
    return {"|".join(f"^{path}$" for path in one.adapter): SMALL}


def distance(params: Any, other: Any) -> float:
    """Returns the Frobenius norm of the difference of all weights."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    return float(np.sqrt(sum(np.sum((np.float64(a) - np.float64(b)) ** 2) for a, b in pairs)))


@jax.jit
def merge(base: Any, adapter: Any) -> Any:
    return jlora.merge(base, adapter, dequantize=True)


def total_error(params: Any, base: Any, adapter: Any) -> float:
    """Returns `||W - Q - scale A B||`."""
    return distance(merge(base, adapter), params)


# --- the algorithm --------------------------------------------------------------------------------


def quantized(weight: np.ndarray, scheme: Any) -> np.ndarray:
    """Applies the paper's `q_N` and its inverse."""
    return np.asarray(
        jlora.dequantize(jlora.quantize({"w": jnp.asarray(weight)}, {"w": scheme}))["w"]
    )


def algorithm_1(weight: np.ndarray, scheme: Any, rank: int, steps: int, axes: Any) -> Any:
    """Runs algorithm 1 of the paper on a weight as a stack of matrices, with axes as in `axes`.

    Returns:
        Q_T and the product of its A_T and B_T, both laid out like the weight.
    """
    order = [axis for group in axes for axis in group]
    batch, inputs, outputs = ([weight.shape[axis] for axis in group] for group in axes)
    product_ab = np.zeros_like(weight)
    for _ in range(steps):
        base = quantized(weight - product_ab, scheme)
        rest = np.float64(weight - base).transpose(order)
        matrices = rest.reshape(-1, int(np.prod(inputs)), int(np.prod(outputs)))
        parts = []
        for matrix in matrices:
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            root = np.sqrt(s[:rank])
            parts.append((u[:, :rank] * root) @ (root[:, None] * vt[:rank]))
        stacked = np.stack(parts).reshape([*batch, *inputs, *outputs])
        product_ab = stacked.transpose(np.argsort(order)).astype(np.float32)
    return base, product_ab


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.slow
def test_loftq_matches_algorithm_1(steps: int, stabilized: bool) -> None:
    config = jlora.LoRA(rank=4, alpha=3, use_rslora=stabilized)
    _, params, adapter = fresh(config)
    base, initialized = jlora.loftq(params, adapter, RULES, iterations=steps)
    expected, product_ab = algorithm_1(W, NF4, 4, steps, adapter["w"].axes)
    # The codes are equal, so the values are equal up to the rounding of their scales.
    np.testing.assert_allclose(jlora.dequantize(base)["w"], expected, rtol=1e-5, atol=1e-5)
    leaf = initialized["w"]
    scale = 3 / 2 if stabilized else 3 / 4
    np.testing.assert_allclose(scale * leaf.a @ leaf.b, product_ab, rtol=1e-4, atol=1e-5)
    # Both factors have the same singular values, and all other fields are unchanged.
    np.testing.assert_allclose(
        np.linalg.norm(leaf.a, axis=0), np.linalg.norm(leaf.b, axis=1), rtol=1e-4
    )
    same = dataclasses.replace(leaf, a=adapter["w"].a, b=adapter["w"].b, residual=False)
    assert jax.tree.structure(same) == jax.tree.structure(adapter["w"])
    np.testing.assert_array_equal(params["w"], W)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.thin(9)
def test_loftq_layer_kinds_match_algorithm_1(name: str, steps: int) -> None:
    one = case(name, "float32")
    base, initialized = jlora.loftq(one.params, one.fresh, rules_for(one), iterations=steps)
    wide = by_path(one.params)
    merged = by_path(jlora.merge(base, initialized, dequantize=True))
    changes = jlora.delta(base, initialized)
    for path, leaf in initialized.items():
        weight = np.asarray(wide[path])
        expected, product_ab = algorithm_1(weight, SMALL, leaf.rank, steps, leaf.axes)
        np.testing.assert_allclose(changes[path], product_ab, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(merged[path], expected + product_ab, rtol=1e-4, atol=1e-5)


def by_path(params: Any) -> dict[str, Any]:
    return dict(zip(flatten_with_paths(params).paths, jax.tree.leaves(params), strict=True))


def test_loftq_rotated_axes_match_algorithm_1() -> None:
    params = {"w": jax.device_put(RNG.normal(size=(5, 3, 6)).astype(np.float32))}
    x = jax.device_put(RNG.normal(size=(3, 4, 6)).astype(np.float32))
    lora = jlora.lora_transform(
        lambda p, x: jnp.einsum("etd,fed->etf", x, p["w"]), jlora.LoRA(rank=2, alpha=3)
    )
    adapter = lora.init(jax.random.key(0), params, x)
    assert adapter["w"].axes == ((1,), (2,), (0,))
    base, initialized = jlora.loftq(params, adapter, {"w": SMALL}, iterations=2)
    expected, product_ab = algorithm_1(np.asarray(params["w"]), SMALL, 2, 2, adapter["w"].axes)
    np.testing.assert_allclose(jlora.dequantize(base)["w"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jlora.delta(base, initialized)["w"], product_ab, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("config", [jlora.DoRA, jlora.LoRAFA, jlora.SoRA])
@pytest.mark.slow
def test_loftq_methods_start_at_same_weight(config: Any) -> None:
    """DoRA's gains are one, so its magnitudes are the norms of the adapted weight."""

    def merged(config: Any) -> Any:
        _, params, adapter = fresh(config(rank=3, alpha=5))
        return jlora.merge(*jlora.loftq(params, adapter, RULES, iterations=2), dequantize=True)["w"]

    np.testing.assert_allclose(merged(config), merged(jlora.LoRA), rtol=1e-5, atol=1e-5)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, "lora") for name in KINDS]
    + [(name, family) for name in ("fused_qkv", "embed", "conv_2d") for family in STARTED[1:]],
)
@pytest.mark.thin(9)
def test_loftq_is_nearer_than_quantize(name: str, family: str) -> None:
    one = case(name, "float32", family)
    plain = jlora.quantize(one.params, rules_for(one))
    alone = distance(jlora.dequantize(plain), one.params)
    base, initialized = jlora.loftq(one.params, one.fresh, rules_for(one))
    assert total_error(one.params, base, initialized) < 0.9 * alone
    # So are the model's outputs, by the factors and with a merged weight.
    wanted = jax.jit(one.fn)(one.params, *one.inputs)
    found = jax.jit(one.lora.apply)(base, initialized, *one.inputs)
    merged = jax.jit(one.fn)(jlora.merge(base, initialized, dequantize=True), *one.inputs)
    for value, true in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(value, true, rtol=1e-4, atol=1e-4)
    assert distance(found, wanted) < distance(
        jax.jit(one.fn)(jlora.dequantize(plain), *one.inputs), wanted
    )
    # One iteration returns the base of jlora.quantize.
    jax.tree.map(np.testing.assert_array_equal, base, plain)


@pytest.mark.parametrize(
    "ranks",
    # Each rank compiles programs of its own.
    [(1, 6, 17, 18), pytest.param((1, 2, 6, 12, 17, 18), marks=pytest.mark.slow)],
    ids=["some_ranks", "all_ranks"],
)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("config", [jlora.LoRA, jlora.DoRA, jlora.LoRAFA, jlora.SoRA])
@pytest.mark.slow
def test_loftq_error_falls_with_rank_to_zero(
    config: Any, steps: int, ranks: tuple[int, ...]
) -> None:
    distances = []
    for rank in ranks:
        _, params, adapter = fresh(config(rank=rank, alpha=5))
        distances.append(
            total_error(params, *jlora.loftq(params, adapter, RULES, iterations=steps))
        )
    assert distances == sorted(distances, reverse=True)
    assert distances[0] < distance(quantized(W, NF4), W)
    # At full rank the error is float32 rounding of sums of 18 products.
    assert distances[-1] < 1e-5 * np.linalg.norm(W)
    assert distances[-2] > 1e-3


def test_loftq_more_iterations_reduce_error() -> None:
    _, params, adapter = fresh(jlora.LoRA(rank=6, alpha=5))
    found = [
        total_error(params, *jlora.loftq(params, adapter, RULES, iterations=steps))
        for steps in (1, 2, 5)
    ]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("linen_scan_remat", family) for family in STARTED if family != "dora"),
        ("dense", "dora"),
        pytest.param("linen_scan_remat", "dora", marks=pytest.mark.slow),  # Compiles for seconds.
    ],
)
@pytest.mark.slow
def test_loftq_gradient_reaches_every_factor(name: str, family: str) -> None:
    one = case(name, "float32", family)
    base, initialized = jlora.loftq(one.params, one.fresh, rules_for(one), iterations=2)
    dense = jlora.dequantize(base)
    loss = lambda a, params: total(one.lora.apply(params, a, *one.inputs))
    slope = lambda params: jax.jit(jax.grad(loss))(initialized, params)
    gradient, truth = jlora.partition(slope(base))[0], jlora.partition(slope(dense))[0]
    assert all(np.abs(array).max() > 1e-6 for array in jax.tree.leaves(gradient))
    assert max(error / (1 + size) for error, size in errors(gradient, truth)) < 1e-4


@pytest.mark.parametrize("config", [jlora.LoRA, jlora.LoRAFA, jlora.SoRA])
def test_loftq_zero_error_is_still_trainable(config: Any) -> None:
    lora, params, adapter = fresh(config(rank=2, alpha=2), np.zeros_like(W))
    base, initialized = jlora.loftq(params, adapter, RULES)
    np.testing.assert_array_equal(lora.apply(base, initialized, X), 0)
    gradient = jax.jit(jax.grad(lambda a: ((lora.apply(base, a, X) - 1) ** 2).sum()))(initialized)
    assert np.abs(gradient["w"].b).max() > 1e-3


# --- dtypes and unselected weights ----------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_loftq_bfloat16_keeps_dtypes(steps: int) -> None:
    one = case("dense_general", "bfloat16")
    params = widened(one.params, jnp.bfloat16)
    config = dataclasses.replace(FAMILIES["lora"].config, dtype=jnp.bfloat16)
    lora = jlora.lora_transform(one.fn, {BY_NAME["dense_general"].adapted: config})
    adapter = lora.init(jax.random.key(1), params, *one.inputs)
    base, initialized = jlora.loftq(params, adapter, rules_for(one), iterations=steps)
    for path, leaf in initialized.items():
        assert leaf.a.dtype == leaf.b.dtype == jnp.bfloat16, path
    merged = jlora.merge(base, initialized, dequantize=True)
    types = lambda params: jax.tree.map(lambda array: array.dtype, params)
    assert types(merged) == types(params)
    alone = distance(jlora.dequantize(jlora.quantize(params, rules_for(one))), params)
    assert distance(merged, params) < 0.9 * alone


@pytest.mark.parametrize("scheme", [NF4, SMALL, jlora.Int8(block_size=4), jlora.FP8(block_size=3)])
def test_loftq_every_scheme_reduces_error(scheme: Any) -> None:
    _, params, adapter = fresh(jlora.LoRA(rank=6, alpha=5))
    base, initialized = jlora.loftq(params, adapter, {"w": scheme}, iterations=2)
    assert total_error(params, base, initialized) < 0.8 * distance(quantized(W, scheme), W)


def test_loftq_rules_and_adapter_select_weights() -> None:
    params = {name: jax.device_put(RNG.normal(size=(6, 6)).astype(np.float32)) for name in "abcd"}
    fn = lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"]
    rules = {"a|b": jlora.LoRA(rank=2, alpha=2), "d": jlora.FullDelta()}
    lora = jlora.lora_transform(fn, rules)
    adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 6)))
    base, initialized = jlora.loftq(params, adapter, {"d": None, "a|c": NF4})
    assert [isinstance(base[name], jlora.QArray) for name in "abcd"] == [
        True,
        False,
        True,
        False,
    ]
    for name in "bd":
        assert base[name] is params[name]
        assert initialized[name] is adapter[name]
    assert initialized["a"].residual
    expected = jlora.quantize({"c": params["c"]}, {"c": NF4})
    jax.tree.map(np.testing.assert_array_equal, base["c"], expected["c"])


def test_loftq_orthogonal_init_counts_as_fresh() -> None:
    config = jlora.LoRA(rank=4, alpha=4, init=jlora.initializers.orthogonal())
    _, params, adapter = fresh(config)
    _, initialized = jlora.loftq(params, adapter, RULES)
    _, other, usual = fresh(jlora.LoRA(rank=4, alpha=4))
    jax.tree.map(np.testing.assert_array_equal, initialized, jlora.loftq(other, usual, RULES)[1])


# --- the base of the adapter ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_load_adapter_loftq_needs_its_own_base(tmp_path: pathlib.Path, steps: int) -> None:
    _, params, adapter = fresh(jlora.LoRA(rank=6, alpha=5))
    base, initialized = jlora.loftq(params, adapter, RULES, iterations=steps)
    path = tmp_path / "adapter.safetensors"
    jlora.save_adapter(path, moved(initialized), base)
    jax.tree.map(np.testing.assert_array_equal, jlora.load_adapter(path, base), moved(initialized))
    plain = jlora.quantize(params, RULES)
    if steps == 1:
        jlora.load_adapter(path, plain)
    # On the original weights, the adapter would add an error that is not there.
    for other in [params, jlora.dequantize(base), *([plain] if steps > 1 else [])]:
        with pytest.raises(
            ValueError, match=r"needs 'w'.*that was quantized together.*rebase_to_original"
        ):
            jlora.load_adapter(path, other)


@pytest.mark.parametrize("steps", [1, 3])
def test_rebase_to_original_trained_loftq(steps: int) -> None:
    lora, params, adapter = fresh(jlora.LoRA(rank=6, alpha=5))
    base, initialized = jlora.loftq(params, adapter, RULES, iterations=steps)
    trained = moved(initialized)
    plain = jlora.rebase_to_original(trained, initialized)
    change = jlora.delta(base, trained)["w"] - jlora.delta(base, initialized)["w"]
    np.testing.assert_allclose(lora.apply(params, plain, X), X @ (W + change), rtol=1e-4, atol=1e-4)
    assert not plain["w"].residual


# --- refused inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*STARTED, "dora_through_norm"}))
def test_loftq_unsupported_methods_raise(family: str) -> None:
    one = case(
        "embed" if isinstance(FAMILIES[family].config, jlora.TrainableTokens) else "dense_general",
        "float32",
        family,
    )
    name = next(leaf.family for leaf in one.fresh.values() if hasattr(leaf, "axes"))
    message = f"family '{name}'.*Use LoRA, LoRAFA, SoRA or DoRA there, or.*jlora.quantize"
    with pytest.raises(ValueError, match=message):
        jlora.loftq(one.params, one.fresh, {"kernel|embedding": SMALL})


def changed(adapter: Any, **arrays: Any) -> Any:
    return {"w": dataclasses.replace(adapter["w"], **arrays)}


@pytest.mark.parametrize("config", [jlora.LoRA, jlora.DoRA, jlora.LoRAFA, jlora.SoRA])
def test_loftq_trained_adapter_raises(config: Any) -> None:
    _, params, adapter = fresh(config(rank=2, alpha=2))
    b = adapter["w"].b
    for trained in (b + 1e-4, b.at[0, 0].set(1e-9), b.at[0, 0].set(jnp.nan)):
        with pytest.raises(ValueError, match=r"not fresh from init.*Call it before training"):
            jlora.loftq(params, changed(adapter, b=trained), RULES)


def test_loftq_trained_magnitude_or_gate_raises() -> None:
    _, params, dora = fresh(jlora.DoRA(rank=2, alpha=2))
    _, _, sora = fresh(jlora.SoRA(rank=2, alpha=2))
    magnitude = dora["w"].magnitude.at[3].multiply(1.01)
    for adapter in (changed(dora, magnitude=magnitude), changed(sora, gate=jnp.array([1.0, 0.5]))):
        with pytest.raises(ValueError, match="not fresh from init"):
            jlora.loftq(params, adapter, RULES)


def test_loftq_residual_init_raises() -> None:
    _, params, pissa = fresh(jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa()))
    _, _, usual = fresh(jlora.LoRA(rank=2, alpha=2))
    twice = jlora.loftq(params, usual, RULES)[1]
    for adapter in (pissa, twice):
        with pytest.raises(
            ValueError, match=r"Only one of these can change.*initializers.kaiming_uniform"
        ):
            jlora.loftq(params, adapter, RULES)


def test_loftq_bad_inputs_raise() -> None:
    _, params, adapter = fresh(jlora.LoRA(rank=2, alpha=2))
    for iterations in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"loftq: iterations=.* must be a positive integer"):
            jlora.loftq(params, adapter, RULES, iterations=iterations)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'w', which is already quantized"):
        jlora.loftq(jlora.quantize(params, RULES), adapter, RULES)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="'w' holds NaN or Inf"):
            jlora.loftq({"w": params["w"].at[2, 3].set(bad)}, adapter, RULES)
    with pytest.raises(ValueError, match="'v' matches none"):
        jlora.loftq(params, adapter, {"v": NF4})
    with pytest.raises(ValueError, match=r"none of the 1 adapted weights, such as 'w'"):
        jlora.loftq({**params, "v": params["w"]}, adapter, {"v": NF4})
    with pytest.raises(ValueError, match=r"none of the 0 adapted weights"):
        jlora.loftq(params, {}, RULES)
    with pytest.raises(TypeError, match="not what init returns"):
        jlora.loftq(params, None, RULES)  # type: ignore[arg-type]
    shapes = jax.eval_shape(lambda p: p, params)
    with pytest.raises(TypeError, match="needs the values of 'w'"):
        jlora.loftq(shapes, adapter, RULES)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda p: jlora.loftq(p, adapter, RULES)[0])(params)
    with pytest.warns(UserWarning, match="exceeds the weight's own rank"):
        _, _, large = fresh(jlora.LoRA(rank=19, alpha=2))
    with pytest.raises(ValueError, match="rank=19 on 'w' must be at most 18"):
        jlora.loftq(params, large, RULES)


def test_loftq_stack_is_decomposed_by_layer() -> None:
    """Each layer has the factors of a separate decomposition."""
    one = case("linen_scan_remat", "float32")
    base, initialized = jlora.loftq(one.params, one.fresh, rules_for(one))
    packed = jlora.dequantize(base)
    dense, kept = by_path(one.params), by_path(packed)
    for path, leaf in initialized.items():
        error = np.asarray(weight_to_matrices(dense[path] - kept[path], leaf.axes))
        assert len(error) > 1
        change = np.asarray(weight_to_matrices(jlora.delta(packed, {path: leaf})[path], leaf.axes))
        for matrix, part in zip(error, change, strict=True):
            s = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(
                np.linalg.norm(matrix - part), np.linalg.norm(s[leaf.rank :]), rtol=1e-3, atol=1e-5
            )
