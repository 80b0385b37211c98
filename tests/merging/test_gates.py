"""Routing weights against NumPy, and batches with weights of each example."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import case, moved

import jlora
from jlora.merging.routing import apply_routed, fit_router, routing_weights
from jlora.merging.weighted import weighted_sum, with_weights

RNG = np.random.default_rng(0)
PROMPTS = {name: RNG.normal(size=(rows, 5)) for name, rows in [("b", 4), ("c", 1), ("a", 6)]}
EMBEDDING = RNG.normal(size=(7, 5))


@functools.cache
def mix_of(name: str) -> dict[str, Any]:
    one = case(name, "float32")
    return weighted_sum({adapter: moved(one.fresh, seed) for seed, adapter in enumerate("abc", 3)})


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_routing_weights_are_softmax_of_cosines() -> None:
    gate = fit_router(PROMPTS, mix_of("dense"), temperature=0.25)
    centroids = np.stack([unit(unit(PROMPTS[name]).mean(0)) for name in "abc"])
    # float32 against float64: sums of 5 products, divided by 0.25 before the exponential.
    np.testing.assert_allclose(gate.centroids, centroids, rtol=1e-6, atol=1e-6)
    expected = softmax(unit(EMBEDDING) @ centroids.T / 0.25)
    found = jax.jit(routing_weights)(gate, EMBEDDING)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Neither the length of a prompt's embedding nor that of an input's matters.
    longer = {name: 3 * rows for name, rows in PROMPTS.items()}
    again = routing_weights(fit_router(longer, mix_of("dense"), temperature=0.25), 0.5 * EMBEDDING)
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)


def test_routing_weights_top_k_renormalizes() -> None:
    gate = fit_router(PROMPTS, mix_of("dense"))
    scores = unit(EMBEDDING) @ np.float64(gate.centroids).T / 0.1
    for k in (1, 2, 3):
        least = np.sort(scores, axis=-1)[:, [-k]]
        expected = softmax(np.where(scores >= least, scores, -np.inf))
        found = routing_weights(gate, EMBEDDING, top_k=k)
        # Cosines of float32 over 0.1: their last digits count ten times.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert ((np.asarray(found) > 0).sum(-1) == k).all()


def test_routing_weights_zero_input_is_uniform() -> None:
    gate = fit_router(PROMPTS, mix_of("dense"))
    rows = jnp.asarray(EMBEDDING).at[2].set(0)
    np.testing.assert_allclose(routing_weights(gate, rows)[2], np.full(3, 1 / 3), rtol=1e-6)
    loss = lambda gate, rows: (routing_weights(gate, rows)[:, 0] ** 2).sum()
    for slope in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(gate, rows)):
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_routing_weights_narrow_dtype_is_widened(dtype: Any) -> None:
    near, far = np.eye(2, 4), -np.eye(2, 4)
    gate = fit_router({"a": near, "b": far, "c": far}, mix_of("dense"))
    rows = jnp.asarray([[300, 200, 0, 100], [-300, 4, 8, 0]], dtype)
    found = routing_weights(gate, rows)
    np.testing.assert_array_equal(found, routing_weights(gate, rows.astype(jnp.float32)))
    assert np.argmax(found, axis=1).tolist()[0] == 0
    assert found[0, 0] > 0.9 > 0.1 > found[1, 0]


def test_router_can_be_trained() -> None:
    """Trains centroids and temperature, starting from identical prompts."""
    alike = dict.fromkeys("abc", PROMPTS["a"])
    gate = fit_router(alike, mix_of("dense"))
    labels = np.arange(7) % 3
    loss = lambda gate: -jnp.log(routing_weights(gate, EMBEDDING))[np.arange(7), labels].mean()
    step = jax.jit(lambda gate: jax.tree.map(lambda p, g: p - 0.3 * g, gate, jax.grad(loss)(gate)))
    np.testing.assert_allclose(loss(gate), np.log(3), rtol=1e-6)
    trained = functools.reduce(lambda gate, _: step(gate), range(60), gate)
    assert loss(trained) < 0.1
    assert trained.log_temperature != gate.log_temperature


@pytest.mark.parametrize("name", ["dense_general", "linen_scan_remat"])
def test_law_apply_routed_equals_single_examples(name: str) -> None:
    one, mix = case(name, "float32"), mix_of(name)
    (x,) = one.inputs
    rows = np.array([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])[: len(x)]
    run = jax.jit(lambda weights, x: apply_routed(one.lora, one.params, mix, weights, x))
    together = run(rows, x)
    alone = jax.jit(lambda w, x: one.lora.apply(one.params, with_weights(mix, w), x))
    for i, weights in enumerate(rows):
        # Sums of at most 60 products in float32, in another order.
        chex.assert_trees_all_close(
            together[i], alone(weights, x[i : i + 1])[0], rtol=2e-5, atol=2e-5
        )
    chex.assert_trees_all_close(together[1], one.fn(one.params, x)[1], rtol=2e-5, atol=2e-5)


def test_apply_routed_shares_base_and_factors() -> None:
    one, mix = case("dense_general", "float32"), mix_of("dense_general")
    run = lambda weights, x: apply_routed(one.lora, one.params, mix, weights, x)
    text = str(jax.make_jaxpr(run)(jnp.ones((3, 3)), *one.inputs))
    (leaf,) = mix.values()
    for array in (leaf.a, leaf.b, np.empty(leaf.shape)):
        shape = ",".join(map(str, array.shape))
        assert f"f32[3,{shape}]" not in text, "a row must not repeat it"
        assert f"f32[{shape}]" in text


def test_apply_routed_gradient_reaches_router() -> None:
    one, mix = case("dense_general", "float32"), mix_of("dense_general")
    gate = fit_router(PROMPTS, mix)
    embedding = EMBEDDING[:3]

    def loss(gate: Any) -> jax.Array:
        weights = routing_weights(gate, embedding)
        return (apply_routed(one.lora, one.params, mix, weights, *one.inputs) ** 2).sum()

    slope = jax.jit(jax.grad(loss))(gate).log_temperature
    at = lambda step: float(
        jax.jit(loss)(dataclasses.replace(gate, log_temperature=gate.log_temperature + step))
    )
    # A difference of float32 sums of size 100 over a step of 0.02.
    np.testing.assert_allclose(slope, (at(0.01) - at(-0.01)) / 0.02, rtol=2e-2)
    assert abs(slope) > 0.1


def test_apply_routed_passes_keywords_and_flags() -> None:
    def fn(params: Any, x: Any, *, double: bool, shift: Any = None) -> Any:
        y = x @ params["w"]
        y = 2 * y if double else y
        return {"y": y if shift is None else y + shift["by"]}

    params = {"w": jax.device_put(RNG.normal(size=(6, 5)).astype(np.float32))}
    x = jax.device_put(RNG.normal(size=(4, 6)).astype(np.float32))
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
    shift = {"by": jnp.arange(4.0)[:, None]}
    fresh = lora.init(jax.random.key(0), params, x, double=True)
    mix = weighted_sum({"a": moved(fresh)})
    weights = np.arange(4.0)[:, None]
    found = apply_routed(lora, params, mix, weights, x, double=True, shift=shift)["y"]
    change = np.asarray(jlora.delta(params, mix)["w"])
    expected = 2 * x @ params["w"] + 2 * weights * (x @ change) + shift["by"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # As above.


def test_fit_router_bad_embeddings_raise() -> None:
    mix = mix_of("dense")
    for changes, message in [
        ({"d": EMBEDDING}, r"differ in \['d'\]"),
        ({"a": EMBEDDING[0]}, r"embeddings\['a'\] must have .*got shape \(5,\)"),
        ({"a": EMBEDDING[:0]}, r"embeddings\['a'\] must have .*got shape \(0, 5\)"),
        ({"b": EMBEDDING[:, :4]}, r"'b'\] must .*got shape \(7, 4\); .*'a'\] has shape \(6, 5\)"),
        ({"b": np.full((2, 5), np.nan)}, r"embeddings\['b'\] must be finite, got NaN"),
        ({"c": np.array([[1.0] * 5, [-1.0] * 5])}, r"embeddings\['c'\] has a mean of zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_router({**PROMPTS, **changes}, mix)
    with pytest.raises(ValueError, match="temperature=0 must be a finite number"):
        fit_router(PROMPTS, mix, temperature=0)


def test_apply_routed_bad_shapes_raise() -> None:
    one, mix = case("dense_general", "float32"), mix_of("dense_general")
    gate = fit_router(PROMPTS, mix)
    for embedding, message in [
        (EMBEDDING[0], r"shape \(batch, 5\), .*got shape \(5,\)"),
        (EMBEDDING[:, :4], r"shape \(7, 4\)"),
        (np.full((2, 5), np.inf), "embedding must be finite, got NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            routing_weights(gate, embedding)
    for k, message in [
        (4, "top_k=4 must be at most the number of adapters, 3"),
        (0, "top_k=0 must be a positive integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            routing_weights(gate, EMBEDDING, top_k=k)
    (x,) = one.inputs
    for weights, inputs, message in [
        (np.ones(3), (x,), r"shape \(batch, 3\), got shape \(3,\)"),
        (np.ones((3, 2)), (x,), r"shape \(batch, 3\), got shape \(3, 2\)"),
        (np.full((3, 3), np.nan), (x,), "weights must be finite, got NaN"),
        (np.ones((4, 3)), (x,), r"batch of 4 of the weights, got shapes \[\(3, 4, 6\)\]"),
        (np.ones((3, 3)), (), r"shapes \[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_routed(one.lora, one.params, mix, weights, *inputs)
    mean = jlora.lora_transform(lambda p, x: one.fn(p, x).mean())
    with pytest.raises(ValueError, match=r"got shape \(\) for a batch of one"):
        apply_routed(mean, one.params, mix, np.ones((3, 3)), x)
