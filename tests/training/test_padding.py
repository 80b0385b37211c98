"""Padding counts nowhere: the same examples padded to three lengths give the same numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from _support.training_fixtures import DATA

import jlora
from jlora import importance, models
from jlora.models.hf import load
from jlora.training import objectives
from jlora.training.data import (
    BatchConfig,
    BatchStream,
    TokenizeConfig,
    TokenizedDatasetBuilder,
    TokenSequence,
)
from jlora.training.recipe.sections import (
    ClassificationSection,
    DPOSection,
    OptimizerSection,
)
from jlora.training.train_step import init_train_state, make_optimizer, make_train_step

OPTIONS = OptimizerSection(aux_loss_coef=1.0)
MIXTURE = {
    r"layers?(_\d+)?/.*/kernel$": jlora.LoRAMoE(num_experts=4, rank=2, alpha=4),
}
# The second length is no multiple of the first.
LENGTHS = (8, 13, 16)  # The encoder has 17 positions.
REAL = (8, 3, 5)


@functools.cache
def loaded(kind: str, name: str) -> models.LoadedModel:
    layout = {"scan_layers": True} if kind == "decoders" else {}
    return load.load(DATA / kind / name, dtype="float32", **layout)


def batch(kind: Any, length: int) -> Any:
    """Three examples, and an empty row that completes the batch, as a run gets them."""
    rng = np.random.default_rng(0)
    builder = TokenizedDatasetBuilder(TokenizeConfig(max_seq_length=length))
    for row, size in enumerate(REAL):
        parts = [TokenSequence(rng.integers(5, 30, n), True) for n in (size, max(size - 1, 2))]
        if kind == "classification":
            builder.add_labeled(row, parts[0]._replace(loss_mask=False), row, truncated=False)
        else:
            builder.add(row, *parts[: 2 if kind == "preference" else 1])
    names = ("a", "b", "c") if kind == "classification" else None
    dataset = builder.build(
        label_names=names, sequences_per_example=2 if kind == "preference" else 1
    )
    # One row more than there are examples, in a batch of two passes.
    config = BatchConfig(
        batch_size=2, seq_length=length, packing=False, gradient_accumulation_steps=2
    )
    stream = BatchStream([dataset], config, kind=kind, shuffle=False)
    return next(stream.batches())[1].arrays


@functools.cache
def objective(kind: str) -> tuple[objectives.Objective, Any]:
    if kind == "classification":
        model, params = loaded("encoders", "bert_sequence")
        head = ClassificationSection()
        made = objectives.make_classification_objective(model, MIXTURE, OPTIONS, head, 3)
        return made, params
    model, params = loaded("decoders", "llama")
    if kind == "preference":
        dpo = DPOSection(beta=0.3)
        return objectives.make_dpo_objective(model, MIXTURE, OPTIONS, dpo), params
    return objectives.make_lm_objective(model, MIXTURE, OPTIONS), params


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["language", "preference", "classification"])
def test_train_step_independent_of_padding(kind: str) -> None:
    made, params = objective(kind)
    adapter = made.lora.init(jax.random.key(1), params, *made.example_inputs)
    rng = np.random.default_rng(1)
    move = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype)
    trained, rest = jlora.partition(jax.tree.map(move, adapter))
    optimizer = make_optimizer(OPTIONS, 10)
    state = init_train_state({"adapter": trained}, optimizer)
    step = jax.jit(make_train_step(made.loss_fn, optimizer, None))
    frozen = {"base": params, "adapter": rest, "reference": {}}
    found = []
    for length in LENGTHS:
        _, metrics = step(state, frozen, batch(kind, length), jax.random.key(0))
        named = {**metrics._asdict(), **metrics.extra_metrics}
        found.append({k: float(v) for k, v in named.items() if k != "extra_metrics"})
    assert found[0]["penalty"] > 1
    for other in found[1:]:
        for name, value in found[0].items():
            # Sums in another order, in float32.
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["language", "preference", "classification"])
@pytest.mark.parametrize(
    "method",
    [importance.GradientNorm(), importance.Fisher(), importance.ActivationVariance()],
    ids=lambda method: method.name,
)
def test_importance_independent_of_padding(kind: str, method: Any) -> None:
    made, params = objective(kind)
    frozen = {"adapter": {}, "reference": {}}

    def loss(params: Any, arrays: Any) -> Any:
        sums = made.loss_fn({"adapter": {}}, {**frozen, "base": params}, arrays, None)
        return sums.loss / jax.numpy.maximum(sums.num_targets, 1)

    found = []
    for length in LENGTHS:
        arrays = batch(kind, length)
        passes = [jax.tree.map(lambda x, n=n: x[n], arrays) for n in range(2)]
        found.append(
            importance.measure_importance(
                loss,
                params,
                passes,
                method=method,
                select=r"layers?(_0)?/.*(q|up)/kernel$",
                token_mask=made.token_mask,
            )
        )
    assert found[0].count == (3 if method.name == "fisher" else 2)
    for other in found[1:]:
        assert other.count == found[0].count
        for path, one in found[0].weights.items():
            np.testing.assert_allclose(other.weights[path].scores, one.scores, rtol=1e-4)


def linear(params: Any, x: Any) -> Any:
    return jax.numpy.tanh(x @ params["w"])


def test_input_moments_leave_padding_out() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    x[1, 3] = np.nan  # Whatever padding holds.
    params = {"w": rng.normal(size=(3, 2)).astype(np.float32)}
    config = jlora.LoRA(rank=1, alpha=1)
    real = x[mask == 1]  # (4, 3)
    for one, two in ((x, mask), (x.reshape(10, 3), mask)):
        found = jlora.input_moments(linear, config, params, one, token_mask=jax.device_put(two))
        assert found["w"].num_inputs.tolist() == [4]
        np.testing.assert_allclose(found["w"].input_sum[0], real.sum(0), rtol=1e-5)
        np.testing.assert_allclose(found["w"].outer_product_sum[0], real.T @ real, rtol=1e-5)
    # One input for each row of tokens counts where the row has a token.
    rows = jax.device_put(np.array([[0, 1], [0, 0]]))
    found = jlora.input_moments(linear, config, params, x[:, 0], token_mask=rows)
    np.testing.assert_allclose(found["w"].input_sum[0], x[0, 0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"token_mask has shape \(2, 5\), but the inputs of 'w'"):
        jlora.input_moments(linear, config, params, x[:, :4], token_mask=jax.device_put(mask))
