"""Scores against NumPy, one batch at a time, and never the gradient of a full model."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support import numpy_model as small

import jlora
from jlora import importance
from jlora.importance import measure, methods

GRADIENT_METHODS = [importance.GradientNorm(), importance.Fisher(), importance.Sensitivity()]
NAMES = ["first", "layers", "experts", "out"]
BATCHES = (3, 3)  # Rows.


def name_of(method: Any) -> str:
    return method.name


def flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def expected(method: Any, params: Any, batches: list[Any]) -> dict[str, np.ndarray]:
    """The method's formula, from gradients of batches or of their examples."""
    if isinstance(method, importance.Fisher):
        batches = [
            {k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["x"]))
        ]
    found = [small.gradients(params, batch) for batch in batches]
    scores = {}
    for name in NAMES:
        g = np.stack([flat(small.by_matrix(name, one[name])) for one in found])
        w = flat(small.by_matrix(name, params[name]))
        scores[name] = {
            "gradient_norm": np.sqrt((g**2).sum(-1).mean(0)),
            "fisher": (g**2).sum(-1).mean(0),
            "sensitivity": np.abs(w * g).mean(-1).mean(0),
        }[method.name]
    return scores


@functools.cache
def measured(method: Any, rows: tuple[int, ...] = BATCHES, pass_bytes: int = 2**30) -> Any:
    return importance.measure_importance(
        small.loss, small.params(), small.batches(*rows), method=method, max_pass_bytes=pass_bytes
    )


@pytest.mark.parametrize(
    ("method", "pass_bytes"),
    [(GRADIENT_METHODS[0], 450), *((method, 2**30) for method in GRADIENT_METHODS)],
)
def test_gradient_methods_match_numpy(method: Any, pass_bytes: int) -> None:
    found = measured(method, pass_bytes=pass_bytes)
    want = expected(method, small.params(), small.batches(*BATCHES))
    assert list(found.weights) == sorted(NAMES)
    assert found.count == (6 if method.name == "fisher" else 2)
    for name in NAMES:
        # Float32 sums of at most 200 squares.
        np.testing.assert_allclose(np.ravel(found.weights[name].scores), want[name], rtol=2e-5)
    shapes = {name: found.weights[name].scores.shape for name in NAMES}
    assert shapes == {"first": (), "layers": (2,), "experts": (3,), "out": ()}


def squares(params: Any, x: jax.Array) -> jax.Array:
    """A loss that compiles fast; the mean over rows."""
    return jnp.mean(jnp.sum(jnp.sin(x @ params["w"]), axis=1))


ONE = {"w": jnp.linspace(-1, 1, 30).reshape(6, 5)}
ROWS = [jnp.sin(jnp.arange(6.0 * n)).reshape(n, 6) for n in (3, 2, 4)]


@pytest.mark.parametrize("method", GRADIENT_METHODS, ids=name_of)
def test_importance_add_equals_all_batches(method: Any) -> None:
    parts = (ROWS[:1], ROWS[1:], ROWS)
    one, two, all_ = (
        importance.measure_importance(squares, ONE, rows, method=method) for rows in parts
    )
    both = one + two
    assert (one.count, both.count, all_.count) == ((3, 9, 9) if method.per_example else (1, 3, 3))
    # The same sums in another order, in float64.
    np.testing.assert_allclose(both.weights["w"].scores, all_.weights["w"].scores, rtol=1e-6)


@pytest.mark.parametrize("method", GRADIENT_METHODS, ids=name_of)
def test_gradient_methods_float16_in_float32(method: Any) -> None:
    fn = lambda p, x: 1e-4 * jnp.sum(x @ p["w"], dtype=jnp.float32)
    params = {"w": jnp.full((6, 5), 1e-3, jnp.float16)}
    found = importance.measure_importance(
        fn, params, [jnp.ones((1, 6), jnp.float16)], method=method
    )
    # Every entry's gradient is 1e-4; its square, and its product with 1e-3, is zero in float16.
    want = {"gradient_norm": 1e-4 * np.sqrt(30), "fisher": 30e-8, "sensitivity": 1e-7}
    np.testing.assert_allclose(found.weights["w"].score, want[method.name], rtol=1e-2)


def test_sensitivity_no_gradient_scores_zero() -> None:
    fn = lambda p, x: jnp.sum((x @ p["used"]) * jax.lax.stop_gradient(x @ p["cut"]))
    params = {"used": jnp.ones((6, 5)), "cut": jnp.ones((6, 5))}
    found = importance.measure_importance(
        fn, params, [jnp.ones((2, 6))], method=importance.Sensitivity()
    )
    assert found.weights["cut"].total == 0 < found.weights["used"].total


def traces(number: int) -> int:
    """How often the loss is traced for so many batches, in two passes each."""
    calls: list[int] = []

    def loss(params: Any, x: jax.Array) -> jax.Array:
        calls.append(1)
        return squares({"w": params["v"] + params["w"]}, x)

    params, method = {**ONE, "v": ONE["w"]}, importance.GradientNorm()
    importance.measure_importance(
        loss, params, iter(ROWS[:1] * number), method=method, max_pass_bytes=1
    )
    return len(calls)


def test_measure_importance_compiles_once() -> None:
    assert traces(1) == traces(4)


def test_group_into_passes_respects_limit() -> None:
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 2, "f": 3}
    passes = measure.group_into_passes(sizes, 7)
    assert passes == [["a", "b"], ["c"], ["d", "e", "f"]]


def deep(count: int) -> tuple[Callable[..., jax.Array], dict[str, jax.Array], jax.Array]:
    """As many layers, each apart, whose weights are far larger than their inputs."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for number in range(count):
            x = jnp.tanh(x @ params[f"w{number}"])
        return jnp.sum(x)

    keys = jax.random.split(jax.random.key(0), count)
    return (
        fn,
        {f"w{n}": jax.random.normal(k, (64, 64)) / 8 for n, k in enumerate(keys)},
        jnp.ones((2, 64)),
    )


def test_backward_pass_memory_is_below_a_third() -> None:
    fn, params, x = deep(16)
    whole = sum(array.nbytes for array in params.values())
    asked = measure.MeasureRequest(fn, params, [x], x, measure.PLACEHOLDER_CONFIG, 2**30)
    run = methods.make_backward_pass(
        importance.GradientNorm(), fn, measure.find_target_weights(asked)
    )
    memory = jax.jit(run).lower(params, x).compile().memory_analysis()
    plain = jax.jit(jax.grad(fn)).lower(params, x).compile().memory_analysis()
    assert plain.output_size_in_bytes >= whole
    # Sixteen sums and the loss; and at a time the gradients of a few of the sixteen.
    assert memory.output_size_in_bytes < 1024
    assert memory.temp_size_in_bytes < whole / 3


# --- activations ----------------------------------------------------------------------------------


@functools.cache
def activations(center: bool = True, pass_bytes: int = 2**30) -> Any:
    return importance.measure_importance(
        small.model,
        small.params(),
        iter(small.batches(*BATCHES)),
        method=importance.ActivationVariance(center=center),
        max_pass_bytes=pass_bytes,
    )


@pytest.mark.parametrize(("center", "pass_bytes"), [(True, 200), (True, 2**30), (False, 2**30)])
def test_activation_variance_matches_numpy(center: bool, pass_bytes: int) -> None:
    weight_inputs = [small.inputs(small.params(), batch) for batch in small.batches(*BATCHES)]
    found = activations(center, pass_bytes)
    assert list(found.weights) == sorted(NAMES)
    for name in NAMES:
        x = np.concatenate([one[name] for one in weight_inputs], axis=1)
        x = x - x.mean(axis=1, keepdims=True) if center else x
        variances = np.linalg.svd(x, compute_uv=False) ** 2
        shares = variances / variances.sum(-1, keepdims=True)
        one = found.weights[name]
        assert one.spectrum is not None
        # Eigenvalues of float32 moments.
        np.testing.assert_allclose(one.spectrum.reshape(shares.shape), shares, atol=1e-5)
        np.testing.assert_allclose(
            np.ravel(one.scores), variances.sum(-1) / variances[:, 0], rtol=1e-4
        )


def test_activation_variance_reuses_moments() -> None:
    fn = lambda p, x: jnp.sin(x @ p["w"]) @ p["v"]
    params = {**ONE, "v": jnp.ones((5, 4))}
    rules = {"w": jlora.LoRA(rank=1, alpha=1)}
    run = jax.jit(lambda x: jlora.input_moments(fn, rules, params, x))
    moments = [run(x) for x in ROWS]
    summed = jax.tree.map(lambda *parts: sum(parts), *moments)
    shapes = jax.eval_shape(lambda: ROWS[0])
    given = importance.measure_importance(
        fn, params, [shapes], method=importance.ActivationVariance(moments=summed)
    )
    assert list(given.weights) == ["w"]
    taken = importance.measure_importance(fn, params, ROWS, method=importance.ActivationVariance())
    assert list(taken.weights) == ["v", "w"]
    np.testing.assert_allclose(  # Eigenvalues of float32 moments, summed otherwise.
        given.weights["w"].spectrum, taken.weights["w"].spectrum, atol=1e-5
    )


def test_activation_variance_no_input_raises() -> None:
    fn = lambda p, x: x @ p["w"] + jax.lax.stop_gradient(x @ p["cut"])
    params = {"w": jnp.ones((6, 5)), "cut": jnp.ones((6, 5))}
    with pytest.raises(ValueError, match="'cut' has no input"):
        importance.measure_importance(
            fn, params, [jnp.ones((2, 6))], method=importance.ActivationVariance()
        )


# --- the weights themselves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [importance.ConditionNumber(), importance.StableRank()], ids=name_of
)
def test_data_free_methods_match_numpy(method: Any) -> None:
    params = small.params()
    shapes = jax.eval_shape(lambda: small.batches(2)[0])
    found = importance.measure_importance(small.model, params, [shapes], method=method)
    for name in NAMES:
        matrices = small.by_matrix(name, params[name])
        if name == "layers":
            matrices = np.swapaxes(matrices, -1, -2)
        matrices = matrices.reshape(len(matrices), matrices.shape[1], -1)
        s = np.linalg.svd(matrices, compute_uv=False)
        want = {
            "condition": np.log10(s[:, 0] / s[:, -1]),
            "stable_rank": (s**2).sum(-1) / s[:, 0] ** 2,
        }[method.name]
        # Singular values in float32 of matrices whose condition is below 1e3.
        np.testing.assert_allclose(np.ravel(found.weights[name].scores), want, rtol=1e-4)
    assert found.count == 0


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_stable_rank_is_scale_invariant(size: float) -> None:
    params = {"w": size * jnp.eye(6, 5)}
    found = importance.measure_importance(
        lambda p, x: x @ p["w"], params, [jnp.ones((2, 6))], method=importance.StableRank()
    )
    np.testing.assert_allclose(found.weights["w"].score, 5, rtol=1e-6)


def test_data_free_methods_singular_is_finite() -> None:
    params = {"zero": jnp.zeros((6, 5)), "one": jnp.ones((6, 5))}
    fn = lambda p, x: x @ p["zero"] + x @ p["one"]
    for method, want in ((importance.ConditionNumber(), 6.1), (importance.StableRank(), 1.0)):
        found = importance.measure_importance(fn, params, [jnp.ones((2, 6))], method=method).weights
        assert found["zero"].score == 0
        # Float32's rounding, 1.2e-7, times the longer side.
        assert found["one"].score == pytest.approx(want, abs=0.1)


# --- selection and errors -------------------------------------------------------------------------


def test_measure_importance_select_patterns() -> None:
    shapes = jax.eval_shape(lambda: small.batches(2)[0])
    take = functools.partial(
        importance.measure_importance,
        small.model,
        small.params(),
        [shapes],
        method=importance.StableRank(),
    )
    assert list(take().weights) == sorted(NAMES)
    assert list(take(select="embed|out").weights) == ["embed", "out"]
    some = take(select={"out": None, ".*(out|first)$": jlora.DoRA(rank=3, alpha=1)})
    assert list(some.weights) == ["first"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": small.batches(2)[0]}, "looks like one batch"),
        ({"batches": jnp.ones((2, 4, 6))}, "looks like one batch"),
        ({"method": "fisher"}, "must be a method of jlora.importance"),
        ({"select": "nothing"}, "matches none of the 6 weights"),
        ({"select": "bias"}, "cannot be adapted"),
        ({"fn": small.model}, "a scalar"),
        ({"max_pass_bytes": 0}, "must be a positive integer"),
        ({"params": jax.eval_shape(small.params)}, "got only a shape"),
    ],
)
def test_measure_importance_bad_inputs_raise(changes: dict[str, Any], match: str) -> None:
    given = {"fn": small.loss, "params": small.params(), "batches": small.batches(2)}
    given = {**given, "method": importance.GradientNorm(), **changes}
    with pytest.raises((ValueError, TypeError), match=match):
        importance.measure_importance(
            given.pop("fn"), given.pop("params"), given.pop("batches"), **given
        )


@pytest.mark.parametrize(
    "method", [*GRADIENT_METHODS, importance.ActivationVariance()], ids=name_of
)
def test_measure_importance_nan_batch_raises(method: Any) -> None:
    batches = [ROWS[0], ROWS[0].at[1, 2].set(jnp.nan)]
    with pytest.raises(ValueError, match="on batch 1|NaN or infinite on some batch"):
        importance.measure_importance(squares, ONE, batches, method=method)


def test_data_free_methods_nan_weight_raises() -> None:
    params = {"w": jnp.ones((6, 5)).at[0, 0].set(jnp.nan)}
    for method in (importance.ConditionNumber(), importance.StableRank()):
        with pytest.raises(ValueError, match="'w' holds NaN"):
            importance.measure_importance(
                lambda p, x: x @ p["w"], params, [jnp.ones((2, 6))], method=method
            )


def test_measure_importance_quantized_raises() -> None:
    params = jlora.quantize({"w": jnp.ones((64, 64))}, {"w": jlora.Int8()})
    fn = lambda p, x: jnp.sum(jlora.lora_transform(lambda p, x: x @ p["w"]).apply(p, {}, x))
    with pytest.raises(ValueError, match=r"'w' is quantized .*jlora.dequantize"):
        importance.measure_importance(
            fn, params, [jnp.ones((2, 64))], method=importance.GradientNorm()
        )


# --- as a thing -----------------------------------------------------------------------------------


def test_importance_str_is_a_sorted_table() -> None:
    found = measured(importance.GradientNorm())
    lines = str(found).splitlines()
    order = [line.split()[0] for line in lines[2:-1]]
    assert order == sorted(NAMES, key=lambda name: -found.weights[name].score)
    layers = next(line.split() for line in lines if line.startswith("layers"))
    scores = found.weights["layers"].scores
    assert layers[1] == "2x5x5"
    assert layers[2:3] + layers[4:] == [
        f"{x:.4g}" for x in (scores.mean(), scores.min(), scores.max())
    ]
    assert lines[-1] == "4 weights, measured on 2 batches."
    shares = [float(line.split()[3].rstrip("%")) for line in lines[2:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.3)  # Each is rounded to a tenth.


@pytest.mark.parametrize(
    "method", [importance.Fisher(), importance.ActivationVariance()], ids=name_of
)
def test_importance_json_roundtrips(method: Any) -> None:
    found = activations() if method.name == "activation" else measured(method)
    again = importance.Importance.from_json(found.to_json())
    assert (again.method, again.count, again.power) == (found.method, found.count, found.power)
    for name, one in found.weights.items():
        other = again.weights[name]
        assert (other.shape, other.axes) == (one.shape, one.axes)
        chex.assert_trees_all_equal((other.scores, other.spectrum), (one.scores, one.spectrum))


def test_importance_from_json_bad_text_raises() -> None:
    good = json.loads(measured(importance.GradientNorm()).to_json())
    short = {**good["weights"]["layers"], "scores": [1.0]}
    negative = {**good["weights"]["first"], "scores": -1.0}
    texts = [
        "{",
        "[]",
        json.dumps({**good, "format": "other"}),
        json.dumps({**good, "weights": {"layers": short}}),
        json.dumps({**good, "weights": {"first": negative}}),
        json.dumps({**good, "weights": {"first": {**negative, "axes": [[], [0], [0]]}}}),
    ]
    for text in texts:
        with pytest.raises(ValueError, match=r"must be from Importance.to_json"):
            importance.Importance.from_json(text)


def test_importance_add_mismatch_raises() -> None:
    norm = measured(importance.GradientNorm())
    some = importance.measure_importance(squares, ONE, ROWS[:1], method=importance.GradientNorm())
    with pytest.raises(ValueError, match="different weights, such as 'experts'"):
        norm + some
    with pytest.raises(ValueError, match="do not add up"):
        norm + measured(importance.Fisher())
    still = importance.measure_importance(squares, ONE, ROWS, method=importance.StableRank())
    with pytest.raises(ValueError, match="do not add up"):
        still + still
    with pytest.raises(TypeError, match="only be added to an Importance, got int"):
        norm + 1


def test_importance_plot_writes_png(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "importance.png"
    measured(importance.GradientNorm()).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
