"""Adapter methods against the equations of their papers, written in NumPy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.cases import BY_NAME, case, moved, total
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jlora

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 5)).astype(np.float32)
X = RNG.normal(size=(4, 6)).astype(np.float32)
# float32 against float64: sums of at most 30 products of values near one.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def build(config: Any, w: np.ndarray = W, x: np.ndarray = X) -> tuple[Any, Any, Any]:
    """A transform of one product, its parameters, and an adapter moved off zero."""
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], {"w": config})
    params = {"w": jax.device_put(w)}
    return lora, params, moved(lora.init(jax.random.key(0), params, x))


def float64(*arrays: Any) -> list[np.ndarray]:
    return [np.float64(array) for array in arrays]


# --- LoRA+ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adamw(0.1, weight_decay=0.3)])
def test_lora_optimizer_lr_multiplier_scales_b(inner: Any) -> None:
    _, _, adapter = build(jlora.LoRA(rank=2, alpha=3))
    gradient = jax.tree.map(jnp.sin, adapter)
    plain, plus = jlora.lora_optimizer(inner), jlora.lora_optimizer(inner, lr_multipliers={"b": 16})
    expected, _ = plain.update(gradient, plain.init(adapter), adapter)
    updates, _ = plus.update(gradient, plus.init(adapter), adapter)
    np.testing.assert_array_equal(updates["w"].a, expected["w"].a)
    np.testing.assert_array_equal(updates["w"].b, 16 * expected["w"].b)


def test_lora_optimizer_invalid_multiplier_raises() -> None:
    _, _, adapter = build(jlora.LoRA(rank=2, alpha=3))
    with pytest.raises(ValueError, match=r"lr_multipliers must.*\['a', 'b'\], got \['magnitude'\]"):
        jlora.lora_optimizer(optax.sgd(0.1), lr_multipliers={"magnitude": 2}).init(adapter)
    with pytest.raises(ValueError, match=r"lr_multipliers\['b'\] must be positive, got 0"):
        jlora.lora_optimizer(optax.sgd(0.1), lr_multipliers={"b": 0})
    with pytest.raises(TypeError, match="lr_multipliers and a mapping"):
        jlora.lora_optimizer({"a": optax.sgd(0.1)}, lr_multipliers={"b": 2})


# --- LoRA-FA -------------------------------------------------------------------------------------


def test_lora_fa_backward_saves_no_layer_input() -> None:
    depth, tokens, width, rank = 5, 32, 16, 2

    def model(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            # A step function has no derivative, so only the adapter can need x.
            x = x @ w + lax.stop_gradient(jnp.sign(x))
        return x

    params = [jnp.ones((width, width)) for _ in range(depth)]
    x = jnp.ones((tokens, width))

    def saved_arrays(config: Any) -> list[tuple[int, ...]]:
        """The shapes of the arrays with a token axis that the backward pass saves."""
        lora = jlora.lora_transform(model, config)
        adapter = lora.init(jax.random.key(0), params, x)
        _, pull_back = jax.vjp(lambda adapter: lora.apply(params, adapter, x), adapter)
        return sorted(leaf.shape for leaf in jax.tree.leaves(pull_back) if tokens in leaf.shape)

    ranks = [(tokens, rank)] * depth
    assert saved_arrays(jlora.LoRA(rank=rank, alpha=4)) == ranks + [(tokens, width)] * depth
    assert saved_arrays(jlora.LoRAFA(rank=rank, alpha=4)) == ranks


def test_lora_fa_embedding_has_random_a() -> None:
    lora = jlora.lora_transform(lambda p, t: p["e"][t], {"e": jlora.LoRAFA(rank=2, alpha=1)})
    adapter = lora.init(jax.random.key(0), {"e": jnp.ones((7, 5))}, jnp.arange(3))
    assert np.any(adapter["e"].a)
    np.testing.assert_array_equal(adapter["e"].b, 0)


# --- DoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [False, True])
def test_dora_gradients_match_paper(through: bool) -> None:
    config = jlora.DoRA(rank=2, alpha=3, through_norm=through)
    lora, params, adapter = build(config)

    def reference(arrays: Any) -> jax.Array:
        a, b, m = arrays
        v = params["w"] + 1.5 * a @ b
        norm = jnp.linalg.norm(v, axis=0)
        norm = norm if through else lax.stop_gradient(norm)
        return total(X @ (m * v / norm))

    leaf = adapter["w"]
    expected = jax.jit(jax.grad(reference))((leaf.a, leaf.b, leaf.magnitude))
    got = jax.jit(jax.grad(lambda adapter: total(lora.apply(params, adapter, X))))(adapter)["w"]
    for ours, theirs in zip((got.a, got.b, got.magnitude), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dora_weight_norm_matches_materialized(dtype: str) -> None:
    w = jax.device_put(W.astype(dtype))
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DoRA(rank=2, alpha=3))
    leaf = moved(lora.init(jax.random.key(0), {"w": w}, X.astype(dtype)))["w"]
    a, b = float64(leaf.a, leaf.b)
    expected = np.linalg.norm(np.float64(w) + 1.5 * a @ b, axis=0)
    # In bfloat16 A is split in two parts of 8 bits.
    np.testing.assert_allclose(
        leaf.weight_norm(w)[0], expected, rtol=1e-6 if dtype == "float32" else 1e-4
    )


def test_law_dora_gradients_exact_near_zero_gain() -> None:
    """The gain's gradient is computed from the result, which is zero for a gain of zero."""
    lora, params, adapter = build(jlora.DoRA(rank=2, alpha=3))
    magnitude = np.array(adapter["w"].magnitude)
    magnitude[[0, 1, 3]] = 0.0, 1e-30, -0.4
    adapter = {"w": dataclasses.replace(adapter["w"], magnitude=magnitude)}

    def factored(adapter: Any) -> jax.Array:
        return jnp.sin(lora.apply(params, adapter, X)).sum()

    def dense(adapter: Any) -> jax.Array:
        return jnp.sin(X @ jlora.merge(params, adapter)["w"]).sum()

    one, two = (jax.jit(jax.grad(f))(adapter)["w"] for f in (factored, dense))
    assert np.abs(np.asarray(two.magnitude)[:2]).min() > 0.01
    np.testing.assert_allclose(one.magnitude, two.magnitude, **FLOAT32)
    np.testing.assert_allclose(one.a, two.a, **FLOAT32)
    np.testing.assert_allclose(one.b, two.b, **FLOAT32)
    slope = lambda f: jax.jit(lambda adapter: jax.jvp(f, (adapter,), (adapter,))[1])
    forward = [slope(f)(adapter) for f in (factored, dense)]
    np.testing.assert_allclose(*forward, **FLOAT32)


def test_law_dora_saves_no_extra_residuals() -> None:
    """Tested in a scan, where the compiler cannot remove saved arrays."""
    layers, rows, width = 3, 64, 32
    x = jax.device_put(np.ones((rows, width), jnp.bfloat16))
    drawn = np.random.default_rng(0).normal(size=(layers, width, width))
    params = {"w": jax.device_put(drawn.astype(jnp.bfloat16))}

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, params["w"])[0]

    def saved_arrays(config: Any) -> list[tuple[tuple[int, ...], str]]:
        lora = jlora.lora_transform(forward, {"w": config})
        adapter = jax.eval_shape(lambda params: lora.init(jax.random.key(1), params, x), params)

        def residuals(adapter: Any) -> Any:
            _, backward = jax.vjp(lambda adapter: lora.apply(params, adapter, x), adapter)
            return jax.tree.leaves(backward)

        arrays = [
            array
            for array in jax.eval_shape(residuals, adapter)
            if array.size >= layers * rows * width
        ]
        assert arrays
        return sorted((array.shape, str(array.dtype)) for array in arrays)

    assert saved_arrays(jlora.DoRA(rank=2, alpha=2)) == saved_arrays(jlora.LoRA(rank=2, alpha=2))


def test_dora_pissa_on_residual_base_is_base() -> None:
    config = jlora.DoRA(rank=2, alpha=3, init=jlora.initializers.pissa())
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
    params = {"w": jax.device_put(W)}
    adapter = lora.init(jax.random.key(0), params, X)
    base = jlora.residual_base(params, adapter)
    np.testing.assert_allclose(lora.apply(base, adapter, X), X @ W, **FLOAT32)


# --- DyLoRA --------------------------------------------------------------------------------------


def test_dylora_step_equals_truncated_rank() -> None:
    config = jlora.DyLoRA(rank=4, alpha=3, min_rank=2)
    lora, params, adapter = build(config)
    a, b, w, x = float64(adapter["w"].a, adapter["w"].b, W, X)
    truncated = {n: x @ (w + 3 / n * a[:, :n] @ b[:n]) for n in (2, 3, 4)}
    seen = set()
    for seed in range(12):
        output = lora.apply(params, adapter, X, dropout_key=jax.random.key(seed))
        fits = [n for n, y in truncated.items() if np.allclose(output, y, **FLOAT32)]
        assert len(fits) == 1
        seen.update(fits)
    assert seen == {2, 3, 4}
    np.testing.assert_allclose(lora.apply(params, adapter, X), truncated[4], **FLOAT32)
    for n in (2, 3, 4):
        short = jlora.truncate_rank(adapter, n)
        plain = jlora.lora_transform(lambda p, x: x @ p["w"], {"w": jlora.LoRA(rank=n, alpha=3)})
        np.testing.assert_allclose(plain.apply(params, short, X), truncated[n], **FLOAT32)


def test_dylora_layers_share_step_rank() -> None:
    fn = lambda p, x: jnp.stack([x @ p["u"], x @ p["v"]])
    params = {"u": jnp.zeros((6, 5)), "v": jnp.zeros((6, 5))}
    lora = jlora.lora_transform(fn, jlora.DyLoRA(rank=5, alpha=1))
    leaf = moved(lora.init(jax.random.key(0), params, X))["u"]
    outputs = [
        lora.apply(params, {"u": leaf, "v": leaf}, X, dropout_key=jax.random.key(seed))
        for seed in range(4)
    ]
    for u, v in outputs:
        np.testing.assert_array_equal(u, v)
    assert not np.array_equal(outputs[0], outputs[1]) or not np.array_equal(outputs[1], outputs[2])


def test_dylora_last_only_trains_last_rank() -> None:
    lora, params, adapter = build(jlora.DyLoRA(rank=4, alpha=3, last_only=True))
    for seed in range(4):
        key = jax.random.key(seed)
        loss = lambda a, key=key: total(lora.apply(params, a, X, dropout_key=key))
        gradient = jax.grad(loss)(adapter)["w"]
        assert (np.abs(gradient.a).sum(0) > 0).sum() == 1
        np.testing.assert_array_equal(np.abs(gradient.a).sum(0) > 0, np.abs(gradient.b).sum(1) > 0)


def test_truncate_rank_untrained_raises() -> None:
    _, _, adapter = build(jlora.DyLoRA(rank=4, alpha=3, min_rank=2))
    with pytest.raises(ValueError, match=r"rank=1 was not trained on 'w': its ranks are 2 to 4"):
        jlora.truncate_rank(adapter, 1)
    _, _, plain = build(jlora.LoRA(rank=4, alpha=3))
    with pytest.raises(ValueError, match=r"no DyLoRA leaf.*jlora.to_lora"):
        jlora.truncate_rank(plain, 2)


# --- SoRA ----------------------------------------------------------------------------------------


def test_soft_threshold_matches_paper() -> None:
    _, _, adapter = build(jlora.SoRA(rank=3, alpha=3))
    gradient = jax.tree.map(jnp.cos, adapter)
    rate, strength = 0.1, 4.0
    optimizer = optax.chain(optax.sgd(rate), jlora.soft_threshold(rate * strength))
    updates, _ = optimizer.update(gradient, optimizer.init(adapter), adapter)
    after = optax.apply_updates(adapter, updates)["w"]
    g, dg = float64(adapter["w"].gate, gradient["w"].gate)
    z = g - rate * dg
    expected = np.where(z > 0.4, z - 0.4, np.where(z < -0.4, z + 0.4, 0))
    np.testing.assert_allclose(after.gate, expected, **FLOAT32)
    assert ((expected == 0) == (np.asarray(after.gate) == 0)).all()
    np.testing.assert_allclose(after.a, adapter["w"].a - rate * gradient["w"].a, **FLOAT32)


def test_soft_threshold_schedule_and_errors() -> None:
    _, _, adapter = build(jlora.SoRA(rank=3, alpha=3))
    shrink = jlora.soft_threshold(lambda step: jnp.where(step == 0, 0.0, 100.0))
    zero = jax.tree.map(jnp.zeros_like, adapter)
    first, state = shrink.update(zero, shrink.init(adapter), adapter)
    np.testing.assert_array_equal(first["w"].gate, 0)
    second, _ = shrink.update(zero, state, adapter)
    np.testing.assert_array_equal(second["w"].gate, -adapter["w"].gate)
    _, _, plain = build(jlora.LoRA(rank=3, alpha=3))
    with pytest.raises(ValueError, match=r"label='gate' must be.*got \['a', 'b'\]"):
        jlora.soft_threshold(0.1).init(plain)
    with pytest.raises(ValueError, match=r"threshold must be 0.0 or more, got -1"):
        jlora.soft_threshold(-1)
    mapped = jlora.lora_optimizer(
        {"a": optax.sgd(0.1), "b": optax.sgd(0.1), "gate": jlora.soft_threshold(100.0)}
    )
    updates, _ = mapped.update(zero, mapped.init(adapter), adapter)
    np.testing.assert_array_equal(updates["w"].gate, -adapter["w"].gate)


@pytest.mark.parametrize("layer", ["dense_general", "linen_scan"])
@pytest.mark.parametrize("family", ["sora", "adalora"])
def test_prune_ranks_preserves_outputs(family: str, layer: str) -> None:
    one = case(layer, "float32", family)
    name = "gate" if family == "sora" else "s"

    def close_some(leaf: Any) -> Any:
        gates = np.array(getattr(leaf, name))
        gates[..., 0] = 0
        return dataclasses.replace(leaf, **{name: jax.device_put(gates)})

    adapter = {path: close_some(leaf) for path, leaf in one.adapter.items()}
    pruned = jlora.prune_ranks(adapter)
    assert {leaf.rank for leaf in pruned.values()} == {1}
    before = one.compiled(one.params, adapter, *one.inputs)
    np.testing.assert_allclose(
        jax.jit(one.lora.apply)(one.params, pruned, *one.inputs), before, rtol=1e-4, atol=1e-4
    )
    closed = {p: dataclasses.replace(v, **{name: 0 * getattr(v, name)}) for p, v in adapter.items()}
    assert jlora.prune_ranks(closed) == {}


def test_prune_ranks_stack_has_largest_rank() -> None:
    one = case("linen_scan", "float32", "sora")
    path = next(iter(one.adapter))
    gates = np.array([[0.0, 0.5], [0.0, 0.0], [0.7, 0.0]], np.float32)
    adapter = {path: dataclasses.replace(one.adapter[path], gate=gates)}
    pruned = jlora.prune_ranks(adapter)
    assert pruned[path].rank == 1
    change, kept = jlora.delta(one.params, adapter)[path], jlora.delta(one.params, pruned)[path]
    np.testing.assert_allclose(kept, change, **FLOAT32)


# --- AdaLoRA -------------------------------------------------------------------------------------


def test_adalora_rank_allocator_matches_paper() -> None:
    settings = {"total_steps": 12, "warmup_steps": 3, "final_steps": 2, "interval": 2}
    target, beta1, beta2, rate = 1, 0.8, 0.7, 0.05
    params = {"u": np.ones((6, 5), np.float32), "v": np.ones((2, 6, 4), np.float32)}
    fn = lambda p, x: (
        (x @ p["u"]).sum() + jnp.einsum("etd,edf->etf", jnp.stack([x, x]), p["v"]).sum()
    )
    lora = jlora.lora_transform(fn, {"u|v": jlora.AdaLoRA(rank=4, alpha=4)})
    adapter = moved(lora.init(jax.random.key(0), params, X))
    optimizer = jlora.adalora_rank_allocator(
        jlora.lora_optimizer(optax.sgd(rate)),
        target_rank=target,
        beta1=beta1,
        beta2=beta2,
        **settings,
    )
    state = optimizer.init(adapter)
    update = jax.jit(optimizer.update)

    ours = {path: {n: np.float64(getattr(adapter[path], n)) for n in "asb"} for path in adapter}
    mean = {path: {n: 0 * ours[path][n] for n in "asb"} for path in adapter}
    spread = {path: {n: 0 * ours[path][n] for n in "asb"} for path in adapter}
    kept: Any = None
    total_count, last_count = 4 * 3, 3
    counts = []
    for step in range(1, 13):
        rng = np.random.default_rng(step)
        gradient = jax.tree.map(
            lambda x, rng=rng: jax.device_put(rng.normal(size=x.shape).astype(np.float32)), adapter
        )
        updates, state = update(gradient, state, adapter)
        # Equations 8 to 11 of the paper.
        scores = {}
        for path in ours:
            for n in "asb":
                now = np.abs(ours[path][n] * np.float64(getattr(gradient[path], n)))
                mean[path][n] = beta1 * mean[path][n] + (1 - beta1) * now
                unsure = np.abs(now - mean[path][n])
                spread[path][n] = beta2 * spread[path][n] + (1 - beta2) * unsure
            s = {n: mean[path][n] * spread[path][n] for n in "asb"}
            scores[path] = s["s"] + s["a"].mean(-2) + s["b"].mean(-1)
            for n in "asb":
                ours[path][n] = ours[path][n] - rate * np.float64(getattr(gradient[path], n))
        # Equation 12, and the selection of the ranks.
        left = (1 - (step - 3) / (12 - 3 - 2)) ** 3 if 3 <= step <= 10 else float(step < 3)
        budget = round(last_count + (total_count - last_count) * left)
        if 3 < step <= 10 and (step % 2 == 0 or step == 10):
            flat = np.concatenate([scores[path].ravel() for path in ours])
            edge = np.sort(flat)[::-1][budget - 1]
            kept = {path: scores[path] >= edge for path in ours}
            enforce = True
        else:
            enforce = step > 10
        if enforce:
            for path in ours:
                ours[path]["s"] = ours[path]["s"] * kept[path]
        adapter = optax.apply_updates(adapter, updates)
        for path in ours:
            for n in "asb":
                np.testing.assert_allclose(
                    getattr(adapter[path], n), ours[path][n], rtol=1e-4, atol=1e-5
                )
        counts.append(sum(int((adapter[path].s != 0).sum()) for path in adapter))
    assert counts[:3] == [12, 12, 12]
    assert counts[-3:] == [3, 3, 3]
    assert sorted({leaf.rank for leaf in jlora.prune_ranks(adapter).values()})[-1] <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_rank": 0}, "target_rank must be positive, got 0"),
        ({"warmup_steps": 10}, "leaves no step"),
        ({"interval": 0}, "interval must be 1"),
    ],
)
def test_adalora_rank_allocator_invalid_raises(changes: Any, message: str) -> None:
    fits = {"target_rank": 1, "total_steps": 10, "warmup_steps": 1, "final_steps": 1}
    with pytest.raises(ValueError, match=message):
        jlora.adalora_rank_allocator(optax.sgd(0.1), **{**fits, **changes})
    optimizer = jlora.adalora_rank_allocator(optax.sgd(0.1), **fits)
    with pytest.raises(ValueError, match=r"needs an AdaLoRA leaf.*jlora.AdaLoRA"):
        optimizer.init(build(jlora.LoRA(rank=2, alpha=1))[2])
    with pytest.raises(
        ValueError, match=r"target_rank=9 must be at most the adapter's rank, got 2"
    ):
        jlora.adalora_rank_allocator(optax.sgd(0.1), **{**fits, "target_rank": 9}).init(
            build(jlora.AdaLoRA(rank=2, alpha=1))[2]
        )


def test_orthogonal_regularizer_matches_paper() -> None:
    _, _, adapter = build(jlora.AdaLoRA(rank=3, alpha=3))
    a, b = float64(adapter["w"].a, adapter["w"].b)
    expected = ((a.T @ a - np.eye(3)) ** 2).sum() + ((b @ b.T - np.eye(3)) ** 2).sum()
    np.testing.assert_allclose(
        jlora.orthogonal_regularizer({"adapter": adapter}), expected, rtol=1e-5
    )
    with pytest.raises(ValueError, match="needs an AdaLoRA leaf"):
        jlora.orthogonal_regularizer(build(jlora.LoRA(rank=2, alpha=1))[2])


def test_subspace_overlap_matches_inputs() -> None:
    _, _, one = build(jlora.LoRA(rank=3, alpha=3))
    other = moved(build(jlora.LoRA(rank=2, alpha=3))[2], 7)
    a, b = float64(one["w"].a, other["w"].a)
    np.testing.assert_allclose(
        jlora.subspace_overlap(one, other), ((a.T @ b) ** 2).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
        jlora.subspace_overlap(one, other, other), 2 * ((a.T @ b) ** 2).sum(), rtol=1e-5
    )
    gradient = jax.grad(lambda other: jlora.subspace_overlap(one, other))(other)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))
    with pytest.raises(ValueError, match="must share a LoRA weight.*none of its 1 weights"):
        jlora.subspace_overlap(one, {"x": other["w"]})


def test_weight_decay_mask_selects_factors() -> None:
    _, _, adapter = build(jlora.DoRA(rank=2, alpha=3))
    mask = jlora.weight_decay_mask(adapter)["w"]
    assert (mask.a, mask.b, mask.magnitude) == (True, True, False)
    zero = jax.tree.map(jnp.zeros_like, adapter)
    for wrap in (lambda optimizer: optimizer, jlora.lora_optimizer):
        optimizer = wrap(optax.adamw(0.1, weight_decay=0.5, mask=jlora.weight_decay_mask))
        updates, _ = optimizer.update(zero, optimizer.init(adapter), adapter)
        np.testing.assert_allclose(updates["w"].a, -0.05 * adapter["w"].a, rtol=1e-6)
        np.testing.assert_array_equal(updates["w"].magnitude, 0)


# --- LoRAMoE -------------------------------------------------------------------------------------


def gates(x: np.ndarray, router: np.ndarray, top_k: int) -> tuple[np.ndarray, float]:
    """Mixtral's gate and the load-balancing loss of Switch Transformers, in NumPy."""
    scores = x @ router
    weights = np.zeros_like(scores)
    for row, score in enumerate(scores):
        best = np.argsort(-score)[:top_k]
        weights[row, best] = np.exp(score[best]) / np.exp(score[best]).sum()
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    share = (weights > 0).mean(0) / top_k
    return weights, len(router.T) * float((share * probabilities.mean(0)).sum())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_lora_moe_matches_equation_and_aux_loss(top_k: int) -> None:
    lora, params, adapter = build(jlora.LoRAMoE(num_experts=3, rank=2, alpha=3, top_k=top_k))
    a, b, router, w, x = float64(adapter["w"].a, adapter["w"].b, adapter["w"].router, W, X)
    weights, balance = gates(x, router, top_k)
    updates = np.einsum("ti,eir,ero->teo", x, a, b)
    expected = x @ w + 1.5 * np.einsum("te,teo->to", weights, updates)
    output, loss = lora.apply_with_aux_loss(params, adapter, X)
    np.testing.assert_allclose(output, expected, **FLOAT32)
    np.testing.assert_allclose(loss, balance, rtol=1e-5)
    np.testing.assert_array_equal(lora.apply(params, adapter, X), output)


def test_aux_loss_is_one_when_balanced() -> None:
    x = np.eye(6, dtype=np.float32)
    lora, params, adapter = build(jlora.LoRAMoE(num_experts=3, rank=1, alpha=1, top_k=1), x=x)
    router = np.tile(np.eye(3, dtype=np.float32), (2, 1))
    alike = {"w": dataclasses.replace(adapter["w"], router=router)}
    run = jax.jit(jax.value_and_grad(lambda a: lora.apply_with_aux_loss(params, a, x)[1]))
    np.testing.assert_allclose(run(alike)[0], 1, rtol=1e-6)
    further = router + np.array([3, 0, 0], np.float32)
    worse, gradient = run({"w": dataclasses.replace(adapter["w"], router=further)})
    assert worse > 1.5
    gradient = gradient["w"]
    assert (
        gradient.router[:, 0] > 0
    ).all()  # Decreases the score of the expert that all inputs use.
    np.testing.assert_array_equal(gradient.a, 0)


def test_lora_moe_ties_use_only_top_k() -> None:
    lora, params, adapter = build(jlora.LoRAMoE(num_experts=3, rank=2, alpha=2, top_k=2))
    leaf = dataclasses.replace(adapter["w"], router=np.zeros((6, 3), np.float32))
    updates = np.einsum("ti,eir,ero->teo", X, leaf.a, leaf.b)
    output = lora.apply(params, {"w": leaf}, X)
    np.testing.assert_allclose(output, X @ W + (updates[:, 0] + updates[:, 1]) / 2, **FLOAT32)


def aux_loss_of(fn: Any, params: Any, x: Any) -> float:
    lora = jlora.lora_transform(fn, {"w": jlora.LoRAMoE(num_experts=3, rank=2, alpha=3)})
    adapter = moved(jax.jit(lora.init)(jax.random.key(0), params, x))

    def balance(adapter: Any) -> Any:
        output, loss = lora.apply_with_aux_loss(params, adapter, x)
        return loss, (output, lora.apply(params, adapter, x))

    (loss, outputs), gradient = jax.jit(jax.value_and_grad(balance, has_aux=True))(adapter)
    assert np.any(gradient["w"].router)
    np.testing.assert_allclose(*outputs, **FLOAT32)
    return float(loss)


def unrolled(p: Any, x: Any) -> Any:
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


def scanned(p: Any, x: Any) -> Any:
    body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return lax.scan(body, x, p["w"])[0]


def in_cond(p: Any, x: Any) -> Any:
    for i in range(3):
        # The other branch has no mixture.
        x = lax.cond(x.sum() < 1e9, lambda w, x: jnp.tanh(x @ w), lambda w, x: x, p["w"][i], x)
    return x


def mapped(p: Any, x: Any) -> Any:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        unrolled, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )  # fmt: skip
    return run(p, x)


THREE_LAYERS = np.random.default_rng(4).normal(size=(3, 6, 6)).astype(np.float32)


@functools.cache
def unrolled_aux_loss() -> float:
    return aux_loss_of(unrolled, {"w": jax.device_put(THREE_LAYERS)}, jax.device_put(X))


@pytest.mark.parametrize(
    "fn",
    [scanned, in_cond, mapped, jax.jit(unrolled)],
    ids=["scan", "cond", "shard_map", "jit"],
)
def test_aux_loss_same_in_all_control_flow(fn: Any) -> None:
    assert unrolled_aux_loss() > 2  # Three mixtures, each near one.
    loss = aux_loss_of(fn, {"w": jax.device_put(THREE_LAYERS)}, jax.device_put(X))
    np.testing.assert_allclose(loss, unrolled_aux_loss(), rtol=1e-5)


@pytest.mark.parametrize("fn", [unrolled, scanned, in_cond], ids=lambda fn: fn.__name__)
def test_aux_loss_leaves_padding_out(fn: Any) -> None:
    lora = jlora.lora_transform(fn, {"w": jlora.LoRAMoE(num_experts=3, rank=2, alpha=3)})
    params, x = {"w": jax.device_put(THREE_LAYERS)}, np.asarray(X)
    adapter = moved(jax.jit(lora.init)(jax.random.key(0), params, x))
    padded = np.concatenate([x, np.full_like(x, 3.0)])
    mask = jax.device_put(np.repeat([1, 0], len(x)))
    run = jax.jit(
        jax.value_and_grad(lambda a, x, m: lora.apply_with_aux_loss(params, a, x, token_mask=m)[1])
    )
    loss, gradient = run(adapter, x, None)
    masked, masked_gradient = run(adapter, padded, mask)
    np.testing.assert_allclose(masked, loss, rtol=1e-5)
    np.testing.assert_allclose(
        masked_gradient["w"].router, gradient["w"].router, atol=1e-6, rtol=1e-4
    )
    assert abs(run(adapter, padded, None)[0] - loss) > 1e-3


def test_aux_loss_mask_in_shard_map_raises() -> None:
    params, x = {"w": jax.device_put(THREE_LAYERS)}, jax.device_put(X)
    lora = jlora.lora_transform(mapped, {"w": jlora.LoRAMoE(num_experts=3, rank=2, alpha=3)})
    adapter = lora.init(jax.random.key(0), params, x)
    with pytest.raises(ValueError, match="token_mask cannot be applied to 'w' in a shard_map"):
        lora.apply_with_aux_loss(params, adapter, x, token_mask=jax.device_put(np.ones(len(X))))


def test_aux_loss_without_moe_is_zero() -> None:
    one = case("linen_scan_remat", "float32")
    output, loss = one.lora.apply_with_aux_loss(one.params, one.adapter, *one.inputs)
    assert loss == 0
    np.testing.assert_allclose(output, one.output, **FLOAT32)


def test_lora_moe_without_known_input_raises() -> None:
    config = jlora.LoRAMoE(num_experts=3, rank=2, alpha=3)
    for name, message in (("weight_norm", "is materialized"), ("ragged_experts", "already routed")):
        fn, params, inputs = BY_NAME[name].make(jnp.float32)
        with pytest.raises(ValueError, match=message):
            jlora.lora_transform(fn, {"w": config}).init(jax.random.key(0), params, *inputs)
    fn, params, inputs = BY_NAME["in_custom_vjp"].make(jnp.float32)
    lora = jlora.lora_transform(fn, {"w": config})
    adapter = lora.init(jax.random.key(0), params, *inputs)
    with pytest.raises(ValueError, match="custom derivative"):
        lora.apply(params, adapter, *inputs)
    assert "refused: LoRAMoE on 'w'" in str(lora.explain(params, *inputs))


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        jlora.DoRA(rank=6, alpha=6, dropout=0.5),
        jlora.VeRA(rank=6, dropout=0.5),
        jlora.AdaLoRA(rank=5, alpha=5, dropout=0.5),
        jlora.LoHa(rank=2, alpha=2, dropout=0.5),
        jlora.LoKr(rank=1, alpha=1, dropout=0.5),
        jlora.HiRA(rank=2, dropout=0.5),
        jlora.FourierFT(num_frequencies=3, alpha=5, dropout=0.5),
        jlora.VBLoRA(rank=2, num_vectors=3, vector_length=1, dropout=0.5),
        jlora.LoRAMoE(num_experts=2, top_k=2, rank=2, alpha=2, dropout=0.5),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.filterwarnings("ignore:.*exceeds the weight's own rank")
@pytest.mark.thin(2)
def test_dropout_acts_on_update_input(config: Any) -> None:
    x = np.eye(6, dtype=np.float32)
    lora, params, adapter = build(config, x=x)
    apply = jax.jit(lora.apply)
    whole = apply(params, adapter, x)
    plain = {p: dataclasses.replace(v) for p, v in adapter.items()}
    np.testing.assert_array_equal(apply(params, plain, x), whole)
    drop = jax.jit(lambda key: lora.apply(params, adapter, x, dropout_key=key))
    outputs = np.stack([drop(jax.random.key(seed)) for seed in range(300)])
    assert not np.array_equal(outputs[0], outputs[1])
    # Each row of the update is either doubled or zero, so the mean is the full update: within 4
    # standard errors of a coin's mean, 4 / sqrt(300).
    update = np.asarray(whole) - base_output(adapter, params, x)
    seen = outputs - base_output(adapter, params, x)
    np.testing.assert_allclose(seen.mean(0), update, rtol=0.25, atol=0.25 * np.abs(update).max())
    doubled = np.isclose(seen, 2 * update, rtol=1e-3, atol=1e-4).all(-1)
    gone = np.isclose(seen, 0, atol=1e-4).all(-1)
    assert (doubled | gone).all()


def base_output(adapter: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """The output of the base alone, with DoRA's gains on it."""
    leaf = adapter["w"]
    product = x @ np.asarray(params["w"])
    if hasattr(leaf, "magnitude"):
        product = product * np.asarray(leaf.magnitude / leaf.weight_norm(params["w"])[0])
    return product


# --- products of several operands ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["loha", "hira", "lokr", "vera"])
def test_contraction_intermediates_stay_small(family: str) -> None:
    tokens, fan_in, fan_out = 31, 24, 20
    configs = {
        "loha": jlora.LoHa(rank=3, alpha=1),
        "hira": jlora.HiRA(rank=3),
        "lokr": jlora.LoKr(rank=1, alpha=1),
        "vera": jlora.VeRA(rank=3),
    }
    lora, params, adapter = build(
        configs[family], np.ones((fan_in, fan_out), np.float32), np.ones((tokens, fan_in))
    )
    run = lambda a, x: lora.apply(params, a, x)
    jaxpr = jax.make_jaxpr(run)(adapter, jnp.ones((tokens, fan_in)))
    largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
    # In operand order the largest array has tokens x rank x outputs, or inputs x rank x outputs.
    assert largest <= tokens * fan_in


def test_dora_bfloat16_small_gain_is_kept() -> None:
    w = jax.device_put(RNG.normal(size=(16, 8)).astype(jnp.bfloat16))
    x = jax.device_put(RNG.normal(size=(500, 16)).astype(jnp.bfloat16))
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DoRA(rank=2, alpha=1))
    adapter = jax.jit(lora.init)(jax.random.key(0), {"w": w}, x)
    leaf = adapter["w"]
    # Half of bfloat16's spacing at one is 0.0039, so a gain in that type would still be one.
    moved = dataclasses.replace(leaf, magnitude=1.003 * leaf.magnitude)
    before, after = (np.float64(lora.apply({"w": w}, {"w": one}, x)) for one in (leaf, moved))
    # Outputs change by one spacing or not at all; 4,000 of them by 0.003 on average.
    ratio = (before * after).sum() / (before**2).sum()
    np.testing.assert_allclose(ratio, 1.003, atol=1e-3)


@pytest.mark.parametrize("config", [jlora.IA3(), jlora.DoRA(rank=2, alpha=3)], ids=repr)
def test_gain_on_mixed_axes_matches_merge(config: Any) -> None:
    params = {"w": jax.device_put(RNG.normal(size=(3, 6, 5)).astype(np.float32))}
    x = jax.device_put(RNG.normal(size=(3, 4, 6)).astype(np.float32))

    def fn(p: Any, x: Any) -> Any:
        batched = jnp.einsum("etd,edf->etf", x, p["w"])
        return batched + jnp.einsum("ed,edf->f", x[:, 0], p["w"])  # Here e is contracted.

    lora = jlora.lora_transform(fn, {"w": config})
    adapter = moved(lora.init(jax.random.key(0), params, x))
    assert lora.explain(params, x).rows[0].dense_reasons
    merged = jax.jit(fn)(lora.merge(params, adapter), x)
    np.testing.assert_allclose(
        jax.jit(lora.apply)(params, adapter, x), merged, rtol=1e-4, atol=1e-4
    )


def test_lora_moe_partial_input_raises() -> None:
    halves = lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:]
    config = jlora.LoRAMoE(num_experts=3, rank=2, alpha=3)
    lora = jlora.lora_transform(halves, {"w": config})
    params = {"w": jax.device_put(W)}
    adapter = lora.init(jax.random.key(0), params, X)
    with pytest.raises(ValueError, match=r"gets 2 of the 6 input features"):
        lora.apply(params, adapter, X)
    assert "refused: LoRAMoE on 'w' gets 2 of the 6" in str(lora.explain(params, X))


def test_aux_loss_stack_sums_each_layer() -> None:
    x = np.ones((2, 4, 6), np.float32)
    fn = lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])
    config = jlora.LoRAMoE(num_experts=2, rank=1, alpha=1, top_k=1)
    lora = jlora.lora_transform(fn, {"w": config})
    params = {"w": np.ones((2, 6, 5), np.float32)}
    adapter = jax.jit(lora.init)(jax.random.key(0), params, x)
    router = np.zeros((2, 6, 2), np.float32)
    router[0, :, 0] = router[1, :, 1] = 5
    leaf = dataclasses.replace(adapter["w"], router=router)
    _, loss = jax.jit(lora.apply_with_aux_loss)(params, {"w": leaf}, x)
    # Each layer routes all inputs to one of its two experts: a loss of two per layer.
    np.testing.assert_allclose(loss, 4, rtol=1e-5)


def test_lora_moe_ties_below_best_keep_best() -> None:
    lora, params, adapter = build(jlora.LoRAMoE(num_experts=3, rank=2, alpha=2, top_k=2))
    router = np.tile(np.array([1, 1, 2], np.float32), (6, 1))
    x = np.ones((1, 6), np.float32)
    leaf = dataclasses.replace(adapter["w"], router=router)
    updates = np.einsum("ti,eir,ero->teo", x, leaf.a, leaf.b)
    share = 1 / (1 + np.exp(-6.0))  # Scores 12 and 6.
    expected = x @ W + share * updates[:, 2] + (1 - share) * updates[:, 0]
    np.testing.assert_allclose(lora.apply(params, {"w": leaf}, x), expected, **FLOAT32)
