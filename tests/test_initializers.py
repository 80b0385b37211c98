"""Initializations, input moments and conversions. PEFT's values are in tests/parity."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import BY_NAME, case, moved, total
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jlora
from jlora._delta import svd_of_change
from jlora.adapters.base import adapt_weight
from jlora.initializers import randomized_svd
from jlora.interpreter.weight import weight_to_matrices

RNG = np.random.default_rng(0)
W = (RNG.normal(size=(8, 7)) * 0.7 ** np.arange(7)).astype(np.float32)
X = RNG.normal(size=(20, 8)).astype(np.float32)
PARAMS = {"w": jax.device_put(W)}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # Decompositions of values near one.


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


def init_product(init: Any, rank: int = 2, alpha: float = 3.0) -> tuple[Any, Any]:
    lora = jlora.lora_transform(product, jlora.LoRA(rank=rank, alpha=alpha, init=init))
    return lora, lora.init(jax.random.key(0), PARAMS, X)


def test_gaussian_has_requested_std() -> None:
    params = {"w": jnp.ones((200, 100))}
    for std, expected in ((None, 1 / 50), (0.3, 0.3)):
        config = jlora.LoRA(rank=50, alpha=1, init=jlora.initializers.gaussian(std))
        adapter = jlora.lora_transform(product, config).init(
            jax.random.key(0), params, jnp.ones((1, 200))
        )
        # 10,000 draws: within 3 standard errors.
        np.testing.assert_allclose(np.std(adapter["w"].a), expected, rtol=0.022)
        np.testing.assert_array_equal(adapter["w"].b, 0)


def test_orthogonal_nonzero_factors_zero_product() -> None:
    lora, adapter = init_product(jlora.initializers.orthogonal(), rank=4)
    a, b = np.asarray(adapter["w"].a), np.asarray(adapter["w"].b)
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 2
    np.testing.assert_allclose(a @ b, 0, atol=1e-7)
    np.testing.assert_allclose(lora.apply(PARAMS, adapter, X), X @ W, **FLOAT32)
    with pytest.raises(ValueError, match=r"rank=3 on 'w' is odd"):
        init_product(jlora.initializers.orthogonal(), rank=3)


@pytest.mark.parametrize(
    ("init", "part"),
    [
        (jlora.initializers.pissa(), slice(None, 2)),
        (jlora.initializers.pissa(iterations=8), slice(None, 2)),
        (jlora.initializers.milora(), slice(-2, None)),
    ],
    ids=["pissa", "fast pissa", "milora"],
)
def test_svd_inits_take_singular_triplets(init: Any, part: slice) -> None:
    lora, adapter = init_product(init)
    u, s, vt = np.linalg.svd(np.float64(W))
    taken = (u[:, : len(s)][:, part] * s[part]) @ vt[part]
    leaf = adapter["w"]
    np.testing.assert_allclose(1.5 * leaf.a @ leaf.b, taken, **FLOAT32)
    # Both factors have the same singular values.
    np.testing.assert_allclose(
        np.linalg.norm(leaf.a, axis=0), np.linalg.norm(leaf.b, axis=1), **FLOAT32
    )
    base = jlora.residual_base(PARAMS, adapter)
    np.testing.assert_allclose(base["w"], W - taken, **FLOAT32)
    np.testing.assert_allclose(lora.apply(base, adapter, X), X @ W, **FLOAT32)


def test_randomized_svd_converges_to_exact() -> None:
    matrix = jax.device_put((RNG.normal(size=(60, 40)) * 0.9 ** np.arange(40)).astype(np.float32))
    exact = np.linalg.svd(matrix, compute_uv=False)[:4]
    errors = []
    for iterations in (0, 1, 4):
        u, s, vt = randomized_svd(jax.random.key(0), matrix, 4, iterations, oversampling=2)
        errors.append(float(np.abs(s - exact).max()))
        np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(vt @ vt.T, np.eye(4), atol=1e-5)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3 * exact[0]


STARTS = {
    "pissa": jlora.initializers.pissa(),
    "fast pissa": jlora.initializers.pissa(iterations=4),
    "milora": jlora.initializers.milora(),
    "olora": jlora.initializers.olora(),
    "orthogonal": jlora.initializers.orthogonal(),
    "gaussian": jlora.initializers.gaussian(),
}
KINDS = ["dense_general", "kv_einsum", "linen_scan_axis_one", "conv_2d", "conv_groups", "embed"]


@pytest.mark.parametrize("layer", [*KINDS, "experts"])
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.thin(9)
def test_inits_start_at_base_on_all_layers(name: str, layer: str) -> None:
    made = BY_NAME[layer]
    fn, params, inputs = made.make(jnp.float32)
    config = jlora.LoRA(rank=2, alpha=3, init=STARTS[name])
    lora = jlora.lora_transform(fn, {made.adapted: config})
    adapter = lora.init(jax.random.key(1), params, *inputs)
    assert all(np.any(leaf.a) or layer == "embed" for leaf in adapter.values())
    base = jlora.residual_base(params, adapter) if STARTS[name].residual else params
    apply = jax.jit(lora.apply)
    started = apply(base, adapter, *inputs)
    chex.assert_trees_all_close(started, jax.jit(fn)(params, *inputs), rtol=1e-4, atol=1e-4)
    if not STARTS[name].residual:
        with pytest.raises(ValueError, match="its base is params"):
            jlora.residual_base(params, adapter)
        return
    # After training it is a plain LoRA of twice the rank on the original base.
    trained = moved(adapter)
    plain = jlora.rebase_to_original(trained, adapter)
    assert {leaf.rank for leaf in plain.values()} == {4}
    chex.assert_trees_all_close(
        apply(params, plain, *inputs),
        apply(base, trained, *inputs),
        rtol=1e-4,
        atol=1e-4,
    )


def test_lora_ga_first_step_matches_full_tuning() -> None:
    target = X @ RNG.normal(size=(8, 7)).astype(np.float32)
    loss = lambda params: jnp.mean((product(params, X) - target) ** 2)
    gradient = jax.grad(loss)(PARAMS)
    lora, adapter = init_product(jlora.initializers.lora_ga(gradient), rank=2, alpha=2)
    base = jlora.residual_base(PARAMS, adapter)
    np.testing.assert_allclose(lora.apply(base, adapter, X), X @ W, **FLOAT32)
    ours = lambda a: jnp.mean((lora.apply(base, a, X) - target) ** 2)
    step = jax.grad(ours)(adapter)["w"]
    leaf = adapter["w"]
    # The change by one small step of both factors, against the gradient of the full weight.
    change = np.asarray(leaf.a @ step.b + step.a @ leaf.b)
    full = np.asarray(gradient["w"])
    cosine = (change * full).sum() / np.linalg.norm(change) / np.linalg.norm(full)
    s = np.linalg.svd(full, compute_uv=False)
    best = np.sqrt((s[:4] ** 2).sum() / (s**2).sum())  # Best of all changes of twice the rank.
    np.testing.assert_allclose(cosine, best, rtol=1e-3)
    with pytest.raises(ValueError, match=r"no gradient of 'w' with shape \(8, 7\)"):
        init_product(jlora.initializers.lora_ga({"v": gradient["w"]}))


# --- moments -------------------------------------------------------------------------------------


def single_moments(fn: Any, params: Any, *inputs: Any) -> Any:
    (moments,) = jlora.input_moments(
        fn, {"w$": jlora.LoRA(rank=1, alpha=1)}, params, *inputs
    ).values()
    return moments


def expected_moments(*inputs: np.ndarray) -> tuple[Any, ...]:
    rows = [np.float64(array).reshape(-1, array.shape[-1]) for array in inputs]
    return (
        np.array([len(one) for one in rows]),
        np.stack([one.sum(0) for one in rows]),
        np.stack([one.T @ one for one in rows]),
    )


def test_input_moments_match_inputs() -> None:
    x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    for got, expected in zip(single_moments(product, PARAMS, x), expected_moments(x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    twice = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] @ p["w"]
    params = {**PARAMS, "v": jax.device_put(RNG.normal(size=(7, 8)).astype(np.float32))}
    second = np.tanh(x @ W) @ np.asarray(params["v"])
    expected = expected_moments(np.concatenate([x, second]))
    for got, one in zip(single_moments(twice, params, x), expected, strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-4)


def test_input_moments_scan_is_per_layer() -> None:
    stack = jax.device_put(RNG.normal(size=(3, 6, 6)).astype(np.float32))
    x = RNG.normal(size=(4, 6)).astype(np.float32)

    def scanned(p: Any, x: Any) -> Any:
        body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
        return lax.scan(body, x, p["w"])[0]

    met = [x]
    for w in stack[:-1]:
        met.append(np.tanh(met[-1] @ np.asarray(w)))
    for got, expected in zip(
        single_moments(scanned, {"w": stack}, x), expected_moments(*met), strict=True
    ):
        # Sums of four values below one in float32, which may cancel.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_input_moments_shard_map_sums_shards() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    for got, expected in zip(single_moments(run, PARAMS, X), expected_moments(X), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_eva_directions_have_largest_variance() -> None:
    moments = jlora.input_moments(product, jlora.LoRA(rank=1, alpha=1), PARAMS, X)
    doubled = jax.tree.map(jnp.add, moments, moments)
    for center, shifted in ((True, X - X.mean(0)), (False, X)):
        _, s, vt = np.linalg.svd(np.float64(shifted))
        _, adapter = init_product(jlora.initializers.eva(moments, center=center), rank=3)
        variance = np.linalg.norm(shifted @ np.asarray(adapter["w"].a), axis=0)
        np.testing.assert_allclose(variance, s[:3], rtol=1e-4)
        np.testing.assert_allclose(np.abs(adapter["w"].a.T @ vt[:3].T), np.eye(3), atol=1e-3)
        _, again = init_product(jlora.initializers.eva(doubled, center=center), rank=3)
        np.testing.assert_allclose(again["w"].a, adapter["w"].a, atol=1e-3)
    with pytest.raises(ValueError, match=r"no moments of the inputs of 'w'"):
        init_product(jlora.initializers.eva({}))


def test_input_moments_without_input_raises() -> None:
    hidden = lambda p, x: lax.stop_gradient(x @ p["w"]).sum() + x.sum()
    with pytest.raises(ValueError, match="'w' has no input"):
        jlora.input_moments(hidden, {"w": jlora.LoRA(rank=1, alpha=1)}, PARAMS, X)
    fn, params, inputs = BY_NAME["conv_2d"].make(jnp.float32)
    with pytest.raises(ValueError, match="convolution, and Moments of the inputs is defined for"):
        jlora.input_moments(fn, {"kernel": jlora.LoRA(rank=1, alpha=1)}, params, *inputs)
    with pytest.raises(ValueError, match="returns no floats"):
        jlora.input_moments(
            lambda p, x: (x @ p["w"]).argmax(-1), jlora.LoRA(rank=1, alpha=1), PARAMS, X
        )


# --- conversion ----------------------------------------------------------------------------------


CONVERTED = {
    "lora": 2,
    "vera": None,
    "adalora": 2,
    "loha": 4,
    "lokr": None,
    "hira": None,
    "dora": None,
    "ia3": None,
    "fourierft": 2,
    "vb_lora": 2,
    "full": None,
}


@pytest.mark.parametrize("family", CONVERTED)
@pytest.mark.parametrize("layer", ["kv_einsum", "linen_scan"])
@pytest.mark.thin(9)
def test_to_lora_is_best_approximation(family: str, layer: str) -> None:
    one = case(layer, "float32", family)
    changes = jlora.delta(one.params, one.adapter)
    whole = jlora.to_lora(one.adapter, one.params, CONVERTED[family] or 6)
    low = jlora.to_lora(one.adapter, one.params, 1)
    for path, change in changes.items():
        exact = np.asarray(weight_to_matrices(change, one.adapter[path].axes))
        s = np.linalg.svd(exact, compute_uv=False)
        largest = np.abs(exact).max()
        kept = jlora.delta(one.params, {path: whole.adapter[path]})[path]
        np.testing.assert_allclose(kept, change, atol=1e-4 * (1 + largest))
        np.testing.assert_allclose(whole.energy[path], 1, rtol=1e-5)
        squares = s**2
        np.testing.assert_allclose(low.energy[path], squares[:, 0].sum() / squares.sum(), rtol=1e-4)
        # The error of the best matrix of rank one is the norm of the other singular values.
        ours = jlora.delta(one.params, {path: low.adapter[path]})[path]
        left = np.linalg.norm(np.asarray(ours - change).ravel())
        np.testing.assert_allclose(left, np.sqrt(squares[:, 1:].sum()), rtol=1e-3, atol=1e-4)


def test_svd_from_factors_avoids_weight_size() -> None:
    params = {"w": jax.ShapeDtypeStruct((300, 200), jnp.float32)}
    lora = jlora.lora_transform(product, jlora.AdaLoRA(rank=4, alpha=4))
    adapter = lora.init(jax.random.key(0), params, jax.ShapeDtypeStruct((2, 300), jnp.float32))

    def convert(base: Any) -> Any:
        return svd_of_change(adapter["w"], adapt_weight(adapter, "w", base))

    text = str(jax.make_jaxpr(convert)(jnp.zeros((300, 200))))
    assert "200,4" in text
    assert text.count("300,200") == 1, "only the base itself, which is not used"


def test_conversions_unsupported_raise() -> None:
    one = case("attention", "float32")
    lora = jlora.lora_transform(one.fn, jlora.BitFit())
    biases = lora.init(jax.random.key(0), one.params, *one.inputs)
    with pytest.raises(ValueError, match=r"has no low rank. Merge that part first"):
        jlora.to_lora(biases, one.params, 2)
    with pytest.raises(TypeError, match=r"must be a positive integer, got float"):
        jlora.to_lora(one.adapter, one.params, 2.5)
    with pytest.raises(ValueError, match=r"no AdaLoRA or SoRA leaf"):
        jlora.prune_ranks(one.adapter)
    for convert in (
        jlora.prune_ranks,
        lambda a: jlora.truncate_rank(a, 1),
        lambda a: jlora.delta({}, a),
    ):
        with pytest.raises(TypeError, match="not what init returns"):
            convert(None)
    mixture = case("dense_general", "float32", "mixture")
    with pytest.raises(ValueError, match="routes by the input"):
        jlora.to_lora(mixture.adapter, mixture.params, 2)


def test_rebase_after_prune_and_to_lora_is_exact() -> None:
    config = jlora.SoRA(rank=3, alpha=3, init=jlora.initializers.pissa())
    lora = jlora.lora_transform(product, config)
    fresh = lora.init(jax.random.key(0), PARAMS, X)
    base = jlora.residual_base(PARAMS, fresh)
    trained = moved(fresh)
    expected = lora.apply(base, trained, X)
    for converted in (jlora.prune_ranks(trained), jlora.to_lora(trained, base, 3).adapter):
        plain = jlora.rebase_to_original(converted, fresh)
        np.testing.assert_allclose(lora.apply(PARAMS, plain, X), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="SoRALeaf"):
        jlora.rebase_to_original(trained, fresh)
    empty = jlora.rebase_to_original({}, fresh)
    np.testing.assert_allclose(
        lora.apply(PARAMS, empty, X), X @ np.asarray(base["w"]), rtol=1e-3, atol=1e-3
    )
    _, zero = init_product(jlora.initializers.kaiming_uniform)
    with pytest.raises(ValueError, match="its base is the original one already"):
        jlora.rebase_to_original(zero, zero)


def test_full_delta_float32_on_bfloat16_base() -> None:
    params = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    lora = jlora.lora_transform(product, {"w": jlora.FullDelta()})
    adapter = lora.init(jax.random.key(0), params, X)
    assert adapter["w"].delta.dtype == jnp.float32
    gradient = jax.grad(lambda a: total(lora.apply(params, a, X)))(adapter)
    assert np.any(gradient["w"].delta)
