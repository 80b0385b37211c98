"""Mixing weights fitted to a few examples, against least squares in NumPy."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.cases import case, moved

import jlora
from jlora.merging.lorahub import fit_weights, lorahub
from jlora.merging.weighted import fold_weights, get_weights, weighted_sum, with_weights

needs_cmaes = pytest.mark.skipif(
    importlib.util.find_spec("cmaes") is None,
    reason='needs `pip install "jlora[search]"`',
)
WANTED = np.array([0.75, -1.0, 0.25])


@functools.cache
def task() -> tuple[Any, Any, Any, Any]:
    """A layer, three weighted adapters, a loss and its arguments: outputs of other weights, with
    noise that no weights explain.
    """
    one = case("dense_general", "float32")
    mix = weighted_sum(
        {name: moved(one.fresh, seed) for seed, name in enumerate("abc", 3)}, [0, 0, 0]
    )
    wanted = one.lora.apply(one.params, with_weights(mix, WANTED), *one.inputs)
    goal = wanted + 0.1 * jax.random.normal(jax.random.key(0), wanted.shape)

    @jax.jit
    def loss(adapter: Any, params: Any, x: Any, goal: Any) -> jax.Array:
        return ((one.lora.apply(params, adapter, x) - goal) ** 2).mean()

    return one, mix, loss, (one.params, *one.inputs, goal)


@functools.cache
def least_squares() -> tuple[np.ndarray, float]:
    """The best weights and their loss, by NumPy in float64."""
    one, mix, _, (params, x, goal) = task()
    each = [
        np.float64(one.lora.apply(params, with_weights(mix, row), x) - one.fn(params, x)).ravel()
        for row in np.eye(3)
    ]
    rest = np.float64(goal - one.fn(params, x)).ravel()
    weights, (squares,), *_ = np.linalg.lstsq(np.stack(each, 1), rest, rcond=None)
    return weights, squares / rest.size


@needs_cmaes
@pytest.mark.slow
def test_lorahub_finds_least_squares() -> None:
    _, mix, loss, arguments = task()
    weights, least = least_squares()
    found = lorahub(loss, mix, *arguments, num_trials=250, l1_penalty=0.0)
    assert found.loss < least + 1e-3
    np.testing.assert_allclose(found.weights, weights, atol=0.05)  # As far as 1e-3 of loss allows.
    np.testing.assert_allclose(
        get_weights(found.adapter)["params/kernel"], found.weights, rtol=1e-6
    )
    assert len(found.history) == 250
    assert found.history[0] > least + 0.3
    assert found.loss == min(found.history)


@needs_cmaes
def test_lorahub_history_and_bound_are_exact() -> None:
    _, mix, loss, arguments = task()
    tried = []

    def watched(adapter: Any, *arguments: Any) -> jax.Array:
        tried.append(np.float64(get_weights(adapter)["params/kernel"]))
        return loss(adapter, *arguments)

    found = lorahub(watched, mix, *arguments, num_trials=40, bound=0.3, l1_penalty=0.1, seed=1)
    assert not tried[0].any(), "the bare base comes first"
    assert 0.25 < np.abs(tried).max() <= 0.3
    values = [float(loss(with_weights(mix, row), *arguments)) for row in tried]
    expected = np.array(values) + 0.1 * np.abs(tried).mean(1)
    # The weights passed through float32.
    np.testing.assert_allclose(found.history, expected, rtol=1e-5)
    best = int(expected.argmin())
    np.testing.assert_allclose(found.weights, tried[best], rtol=1e-6)
    np.testing.assert_allclose(found.loss, values[best], rtol=1e-6)


@needs_cmaes
def test_lorahub_seed_determines_result() -> None:
    _, mix, loss, arguments = task()
    first, again, other = (
        lorahub(loss, mix, *arguments, num_trials=12, seed=seed).history for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@needs_cmaes
def test_lorahub_compiles_loss_once() -> None:
    one, mix, _, arguments = task()
    traces = []

    @jax.jit
    def loss(adapter: Any, params: Any, x: Any, goal: Any) -> jax.Array:
        traces.append(1)
        return ((one.lora.apply(params, adapter, x) - goal) ** 2).mean()

    lorahub(loss, mix, *arguments, num_trials=9)
    assert len(traces) == 1


@needs_cmaes
def test_lorahub_overflow_counts_as_worst() -> None:
    _, mix, _, _ = task()

    def loss(adapter: Any) -> float:
        weights = np.asarray(get_weights(adapter)["params/kernel"])
        return float("nan") if weights[0] < 0 else round(abs(1 - weights.sum()), 1)

    found = lorahub(loss, mix, num_trials=40, l1_penalty=0.0)
    assert found.loss <= 0.2
    assert found.weights[0] >= 0
    assert np.isinf(found.history).any()


@needs_cmaes
def test_lorahub_single_adapter_single_trial() -> None:
    one, _, loss, arguments = task()
    mix = weighted_sum({"only": moved(one.fresh, 3)})
    assert lorahub(loss, mix, *arguments, num_trials=12).weights.shape == (1,)
    assert lorahub(loss, mix, *arguments, num_trials=1).weights == [0.0]


@needs_cmaes
def test_lorahub_bad_options_raise() -> None:
    _, mix, loss, arguments = task()
    for options, message in [
        ({"num_trials": 0}, "num_trials=0 must be a positive integer"),
        ({"bound": 0}, "bound=0 must be a finite number above 0"),
        ({"l1_penalty": -1}, "l1_penalty=-1 must be a finite number, 0.0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            lorahub(loss, mix, *arguments, **options)
    with pytest.raises(ValueError, match="loss=nan of the base alone must be finite"):
        lorahub(lambda adapter: float("nan"), mix)


def test_lorahub_without_cmaes_names_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mix, loss, arguments = task()
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ModuleNotFoundError, match=r"cmaes, which is not .*jlora\[search\]"):
        lorahub(loss, mix, *arguments)


# By gradients


def test_fit_weights_finds_least_squares() -> None:
    _, mix, loss, arguments = task()
    weights, least = least_squares()
    found = fit_weights(loss, mix, *arguments, num_steps=300, optimizer=optax.adam(0.05))
    # Adam's last steps are of some 1e-4 around the least.
    np.testing.assert_allclose(found.weights, weights, atol=2e-3)
    np.testing.assert_allclose(found.loss, least, rtol=1e-3)
    assert len(found.history) == 301
    np.testing.assert_allclose(found.history[0], loss(mix, *arguments), rtol=1e-5)
    output = jlora.merge(arguments[0], fold_weights(found.adapter))["params"]["kernel"]
    chex.assert_trees_all_close(
        output, jlora.merge(arguments[0], found.adapter)["params"]["kernel"], rtol=1e-5, atol=1e-5
    )


def test_fit_weights_one_step_is_optimizers() -> None:
    _, mix, loss, arguments = task()
    slope = jax.grad(lambda w: loss(with_weights(mix, w), *arguments))(jnp.zeros(3))
    found = fit_weights(loss, mix, *arguments, num_steps=1, optimizer=optax.sgd(0.01))
    np.testing.assert_allclose(found.weights, -0.01 * np.asarray(slope), rtol=1e-5)
    # A step too far is not returned: the start was better.
    far = fit_weights(loss, mix, *arguments, num_steps=1, optimizer=optax.sgd(100.0))
    assert not far.weights.any()
    assert far.loss == far.history[0] < far.history[1]


def test_fit_weights_new_data_does_not_recompile() -> None:
    one, mix, _, (params, x, goal) = task()
    traces = []

    def loss(adapter: Any, params: Any, x: Any, goal: Any) -> jax.Array:
        traces.append(1)
        return ((one.lora.apply(params, adapter, x) - goal) ** 2).mean()

    optimizer = optax.sgd(0.1)
    fit_weights(loss, mix, params, x, goal, num_steps=2, optimizer=optimizer)
    count = len(traces)
    fit_weights(loss, mix, params, x, goal + 1, num_steps=2, optimizer=optimizer)
    assert len(traces) == count


def test_fit_weights_layer_wise_fits_better() -> None:
    one = case("attention", "float32")
    mix = weighted_sum({name: moved(one.fresh, seed) for seed, name in enumerate("ab", 3)})
    by_path = {path: [0.5 * i, 1 - 0.5 * i] for i, path in enumerate(mix)}
    goal = one.lora.apply(one.params, with_weights(mix, by_path), *one.inputs)
    loss = lambda adapter: ((one.lora.apply(one.params, adapter, *one.inputs) - goal) ** 2).mean()
    options: Any = {"num_steps": 150, "optimizer": optax.adam(0.03)}
    together = fit_weights(loss, mix, **options)
    apart = fit_weights(loss, mix, **options, layer_wise=True)
    assert apart.loss < 0.1 * together.loss
    assert set(apart.weights) == set(mix)
    again = fit_weights(loss, apart.adapter, **options, layer_wise=True)
    assert again.history[0] == pytest.approx(apart.loss, rel=1e-4)  # Where the first left off.
    with pytest.raises(ValueError, match="requires the same weights for all paths"):
        fit_weights(loss, apart.adapter, **options)


def test_fit_weights_has_no_factor_gradient() -> None:
    _, mix, loss, arguments = task()
    (leaf,) = mix.values()
    step = lambda w: jax.grad(lambda w: loss(with_weights(mix, w), *arguments))(w)
    text = jax.jit(step).lower(jnp.zeros(3)).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line or "custom-call" in line]
    assert products
    a = f"f32[{','.join(map(str, leaf.a.shape))}]"
    flat_b = f"f32[{leaf.b.shape[0]},{np.prod(leaf.b.shape[1:])}]"
    for shape in (a, flat_b):
        made = [line for line in products if line.split("=")[1].strip().startswith(shape)]
        assert not made, made


def test_fit_weights_bad_options_raise() -> None:
    _, mix, loss, arguments = task()
    with pytest.raises(ValueError, match="num_steps=0 must be a positive integer"):
        fit_weights(loss, mix, *arguments, num_steps=0, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="loss=nan must be finite"):
        fit_weights(
            lambda adapter: jnp.nan * get_weights(adapter)["params/kernel"].sum(),
            mix,
            num_steps=2,
            optimizer=optax.sgd(0.1),
        )
