"""The training step: accumulation, normalization, clipping and skipped steps."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.training_fixtures import DATA as MODELS

import jlora
from jlora import models
from jlora.models.hf import load
from jlora.training import objectives
from jlora.training.recipe.sections import (
    ClassificationSection,
    DPOSection,
    OptimizerSection,
    RankBudgetSection,
)
from jlora.training.train_step import (
    LossSums,
    ScheduledOptimizer,
    TrainState,
    init_train_state,
    make_eval_step,
    make_lr_schedule,
    make_optimizer,
    make_train_step,
)

RULES = {r"layers/.*/kernel$": jlora.LoRA(rank=2, alpha=4)}
KEY = jax.random.key(7)
PLAIN = OptimizerSection()
DATA, ENCODERS = MODELS / "decoders", MODELS / "encoders"


class Text(NamedTuple):
    """As jlora.training.data makes it: a first axis of passes, then rows."""

    tokens: Any
    targets: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any


@functools.cache
def decoder() -> models.LoadedModel:
    return load.load(DATA / "llama", dtype="float32", scan_layers=True)


def moved(tree: Any, size: float = 0.1) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(3)
    drawn = [x + size * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, drawn)


def text(rows: int, length: int, real: list[int], passes: int = 1, seed: int = 0) -> Text:
    """Rows of so many real tokens each; the first of a row is a prompt and not learned."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 40, (rows, length)).astype(np.int32)
    segments = (np.arange(length) < np.array(real)[:, None]).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1) * (np.arange(length) < np.array(real)[:, None] - 1)
    learn = (targets > 0) & (np.arange(length) > 0)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments
    arrays = (tokens * segments, targets, learn.astype(np.float32), segments, positions)
    return Text(*(jnp.asarray(x.reshape(passes, rows // passes, length)) for x in arrays))


class Setting(NamedTuple):
    """A task with its weights, off the start."""

    task: objectives.Objective
    state: TrainState
    frozen: Any
    optimizing: ScheduledOptimizer


def setting(task: objectives.Objective, params: Any, options: OptimizerSection = PLAIN) -> Setting:
    adapter = moved(task.lora.init(jax.random.key(1), params, *task.example_inputs))
    trained, rest = jlora.partition(adapter)
    tree = {"adapter": trained}
    if task.init_head is not None:
        tree["head"] = moved(task.init_head(KEY))
    made = make_optimizer(options, 10)
    frozen = {"base": params, "adapter": rest, "reference": {}}
    return Setting(task, init_train_state(tree, made), frozen, made)


@functools.cache
def language() -> Setting:
    model, params = decoder()
    return setting(objectives.make_lm_objective(model, RULES, PLAIN), params)


def stepped(given: Setting, batch: Any, clip: float | None = None) -> Any:
    step = jax.jit(make_train_step(given.task.loss_fn, given.optimizing, clip))
    return step(given.state, given.frozen, batch, KEY)


def evaluate_of(given: Setting) -> Any:
    return jax.jit(make_eval_step(given.task.loss_fn))


def adapter_of(given: Setting) -> Any:
    return jlora.combine(given.state.trainable["adapter"], given.frozen["adapter"])


# --- metrics --------------------------------------------------------------------------------------


def cross_entropies(batch: Text, logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log, np.asarray(batch.targets[0])[..., None], axis=-1)[..., 0]


@pytest.mark.slow
def test_train_step_loss_is_the_mean() -> None:
    given, batch = language(), text(3, 7, [7, 4, 2])
    model, params = decoder()
    merged = jlora.merge(
        params, jlora.combine(given.state.trainable["adapter"], given.frozen["adapter"])
    )
    logits = model.apply(merged, batch.tokens[0], batch.segment_ids[0], batch.positions[0])
    errors, learn = cross_entropies(batch, np.asarray(logits)), np.asarray(batch.loss_mask[0])
    _, measured = stepped(given, batch)
    assert measured.num_targets == learn.sum() == 5 + 2
    # Float32 against float64 on logits up to 5.
    np.testing.assert_allclose(measured.loss, (errors * learn).sum() / learn.sum(), rtol=2e-6)

    def mean(trained: Any) -> jax.Array:
        merged = jlora.merge(params, jlora.combine(trained, given.frozen["adapter"]))
        logits = model.apply(merged, batch.tokens[0], batch.segment_ids[0], batch.positions[0])
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets[0])
        return (errors * learn).sum() / learn.sum()

    gradient = jax.grad(mean)(given.state.trainable["adapter"])
    np.testing.assert_allclose(measured.gradient_norm, optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.slow
def test_train_step_accumulation_equals_one_batch() -> None:
    given = language()
    real = [7, 6, 2, 0]
    whole, whole_measured = stepped(given, text(4, 7, real))
    parts, parts_measured = stepped(given, text(4, 7, real, passes=2))
    np.testing.assert_allclose(parts_measured.loss, whole_measured.loss, rtol=1e-6)
    np.testing.assert_allclose(
        parts_measured.gradient_norm, whole_measured.gradient_norm, rtol=1e-5
    )
    for one, two in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        # Adam's first steps are of the learning rate's size; sums in another order move 1e-6 of it.
        np.testing.assert_allclose(one, two, atol=2e-7, rtol=1e-5)


@pytest.mark.slow
def test_train_step_ignores_padding_rows() -> None:
    given = language()
    one, first = stepped(given, text(2, 7, [7, 3]))
    padded = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=1), text(2, 7, [7, 3])
    )
    two, second = stepped(given, padded)
    assert first.num_targets == second.num_targets
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-7, rtol=1e-5)


def test_eval_step_equals_train_loss() -> None:
    given, batch = language(), text(4, 7, [7, 6, 2, 0], passes=2)
    sums = jax.jit(make_eval_step(given.task.loss_fn))(given.state.trainable, given.frozen, batch)
    _, measured = stepped(given, batch)
    np.testing.assert_allclose(sums.loss / sums.num_targets, measured.loss, rtol=1e-6)


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_step_clips_the_gradient() -> None:
    given = language()
    plain = given._replace(
        optimizing=ScheduledOptimizer(
            optax.with_extra_args_support(optax.sgd(1.0)), lambda step: 1.0
        )
    )
    plain = plain._replace(state=init_train_state(given.state.trainable, plain.optimizing))
    batch = text(3, 7, [7, 4, 2])
    free, measured = stepped(plain, batch)
    held, _ = stepped(plain, batch, clip=float(measured.gradient_norm) / 4)
    loose, _ = stepped(plain, batch, clip=float(measured.gradient_norm) * 4)
    start = jax.tree.leaves(plain.state.trainable)
    for old, a, b, c in zip(
        start, *(jax.tree.leaves(s.trainable) for s in (free, held, loose)), strict=True
    ):
        np.testing.assert_allclose((b - old) * 4, a - old, atol=1e-6)
        np.testing.assert_allclose(c, a, atol=1e-7)
    norm = optax.tree.norm(jax.tree.map(jnp.subtract, free.trainable, plain.state.trainable))
    np.testing.assert_allclose(norm, measured.gradient_norm, rtol=1e-5)


@jax.custom_jvp
def spoilt(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Zero, with a gradient that is given."""
    return 0 * x


spoilt.defjvp(lambda given, moved: (0 * given[0], given[1] * moved[0]))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.slow
def test_train_step_nonfinite_is_skipped(fault: str, value: float) -> None:
    given = language()
    loss = given.task.loss_fn

    def broken(trainable: Any, frozen: Any, batch: Text, key: Any) -> Any:
        sums = loss(trainable, frozen, batch, key)
        bad = batch.tokens[0, 0] == 41
        if fault == "loss":
            return sums._replace(loss=jnp.where(bad, value, sums.loss))
        # The gradient of one entry alone, at a finite loss.
        entry = jax.tree.leaves(trainable)[0].ravel()[0]
        return sums._replace(loss=sums.loss + spoilt(entry, jnp.where(bad, value, 0)))

    step = jax.jit(make_train_step(broken, given.optimizing, 1.0))
    good = text(2, 7, [7, 3])
    bad = good._replace(tokens=good.tokens.at[0, 0, 0].set(41))
    state, first = step(given.state, given.frozen, good, KEY)
    after, measured = step(state, given.frozen, bad, KEY)
    assert first.is_finite
    assert not measured.is_finite
    for one, two in zip(
        jax.tree.leaves((after.trainable, after.opt_state)),
        jax.tree.leaves((state.trainable, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    assert (after.step, after.update_count, after.consecutive_skips) == (2, 1, 1)
    again, _ = step(after, given.frozen, bad, KEY)
    assert again.consecutive_skips == 2
    healed, _ = step(again, given.frozen, good, KEY)
    assert (healed.update_count, healed.consecutive_skips) == (2, 0)


@pytest.mark.parametrize("fault", ["update", "state", "sum"])
def test_train_step_nonfinite_result_is_skipped(fault: str) -> None:
    # Loss and gradient are finite, and the update, the moments or the new weights are not.
    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> LossSums:
        del frozen, key
        moved = trainable["w"] - jax.lax.stop_gradient(trainable["w"])
        return LossSums((moved * batch).sum(), jnp.float32(1), {})

    def update(gradient: Any, state: Any, params: Any = None) -> Any:
        bad = gradient["w"] > 1
        if fault == "state":
            return gradient, state + jnp.where(bad, jnp.inf, 1)
        size = {"update": jnp.nan, "sum": 3e38}[fault]
        return {"w": jnp.where(bad, size, gradient["w"])}, state + 1

    transform = optax.GradientTransformation(lambda params: jnp.zeros(3), update)
    optimizer = ScheduledOptimizer(optax.with_extra_args_support(transform), lambda step: 1.0)
    state = init_train_state({"w": jnp.full(3, 2e38)}, optimizer)
    step = jax.jit(make_train_step(loss, optimizer, None))
    for size, finite in ((1.0, True), (2.0, False), (1.0, True)):
        after, metrics = step(state, {}, jnp.full((1, 3), size), KEY)
        assert jnp.isfinite(metrics.loss + metrics.gradient_norm)
        assert metrics.is_finite == finite
        if not finite:
            np.testing.assert_array_equal(after.trainable["w"], state.trainable["w"])
            np.testing.assert_array_equal(after.opt_state, state.opt_state)
            assert after.consecutive_skips == 1
        state = after


def test_train_step_keeps_frozen_factors() -> None:
    model, params = decoder()
    rules = {r"layers/.*/kernel$": jlora.LoRAFA(rank=2, alpha=4)}
    given = setting(objectives.make_lm_objective(model, rules, PLAIN), params)
    assert {leaf.a is None for leaf in given.state.trainable["adapter"].values()} == {True}
    state, measured = stepped(given, text(2, 7, [7, 3]))
    assert measured.gradient_norm > 0
    for old, new in zip(
        jax.tree.leaves(given.state.trainable), jax.tree.leaves(state.trainable), strict=True
    ):
        assert (old != new).any()


@pytest.mark.slow
def test_train_step_dropout_by_step_and_pass() -> None:
    model, params = decoder()
    rules = {r"layers/.*/kernel$": jlora.LoRA(rank=2, alpha=4, dropout=0.5)}
    given = setting(objectives.make_lm_objective(model, rules, PLAIN), params)
    one = text(2, 7, [7, 3])
    step = jax.jit(make_train_step(given.task.loss_fn, given.optimizing, None))
    later = given.state._replace(step=jnp.int32(1))
    first = step(given.state, given.frozen, one, KEY)[1].loss
    assert first != step(later, given.frozen, one, KEY)[1].loss
    assert first == step(given.state, given.frozen, one, KEY)[1].loss
    # Passes that dropped the same would have one mean, however many there are.
    losses = []
    for passes in (2, 3):
        same = jax.tree.map(functools.partial(jnp.repeat, repeats=passes, axis=0), one)
        losses.append(step(given.state, given.frozen, same, KEY)[1].loss)
    assert abs(losses[0] - losses[1]) > 1e-4 * first
    sums = evaluate_of(given)(given.state.trainable, given.frozen, one)
    drawn = setting(objectives.make_lm_objective(model, RULES, PLAIN), params)  # The same draws.
    clean = evaluate_of(drawn)(drawn.state.trainable, drawn.frozen, one)
    np.testing.assert_allclose(sums.loss, clean.loss, rtol=1e-6)


# --- other tasks ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_dpo_objective_matches_numpy() -> None:
    model, params = decoder()
    asked = DPOSection(beta=0.3, label_smoothing=0.1)
    given = setting(objectives.make_dpo_objective(model, RULES, PLAIN, asked), params)
    flat = text(6, 7, [7, 5, 4, 6, 0, 0])
    batch = jax.tree.map(lambda x: x.reshape(1, 3, 2, 7), flat)
    _, measured = stepped(given, batch)
    found = []
    for weights in (jlora.merge(params, adapter_of(given)), params):
        logits = model.apply(weights, flat.tokens[0], flat.segment_ids[0], flat.positions[0])
        errors = cross_entropies(flat, np.asarray(logits)) * np.asarray(flat.loss_mask[0])
        found.append(-errors.sum(axis=1).reshape(3, 2)[:2])  # The last pair is padding.
    policy, reference = found
    margin = 0.3 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    want = -0.9 * np.log(sigmoid(margin)) - 0.1 * np.log(sigmoid(-margin))
    assert measured.num_targets == 2
    # Differences of sums of float32 losses up to 30.
    np.testing.assert_allclose(measured.loss, want.mean(), atol=5e-6)
    np.testing.assert_allclose(measured.extra_metrics["margin"], margin.mean(), atol=5e-6)
    np.testing.assert_allclose(measured.extra_metrics["accuracy"], (margin > 0).mean())


def test_dpo_objective_initial_loss_is_log_2() -> None:
    model, params = decoder()
    task = objectives.make_dpo_objective(model, RULES, PLAIN, DPOSection())
    fresh, rest = jlora.partition(task.lora.init(jax.random.key(1), params, *task.example_inputs))
    batch = jax.tree.map(lambda x: x.reshape(1, 2, 2, 7), text(4, 7, [7, 5, 4, 6]))
    frozen = {"base": params, "adapter": rest, "reference": {}}
    sums = jax.jit(make_eval_step(task.loss_fn))({"adapter": fresh}, frozen, batch)
    np.testing.assert_allclose(sums.loss / sums.num_targets, np.log(2), rtol=1e-5)


def test_dpo_reference_is_the_checkpoint() -> None:
    # On the residual base of PiSSA, the reference is the checkpoint and not the residual.
    model, params = decoder()
    config = jlora.LoRA(rank=2, alpha=4, init=jlora.initializers.pissa())
    rules = {
        r"layers/mlp/up/kernel$": config,
        r"layers/mlp/down/kernel$": jlora.LoRA(rank=2, alpha=4),
    }
    task = objectives.make_dpo_objective(model, rules, PLAIN, DPOSection())
    fresh = task.lora.init(jax.random.key(1), params, *task.example_inputs)
    initial = {path: leaf for path, leaf in fresh.items() if "up" in path}
    batch = jax.tree.map(lambda x: x.reshape(1, 2, 2, 7), text(4, 7, [7, 5, 4, 6]))
    base = jlora.residual_base(params, initial)
    frozen = {"base": base, "adapter": jlora.partition(fresh)[1], "reference": initial}
    sums = jax.jit(make_eval_step(task.loss_fn))(
        {"adapter": jlora.partition(fresh)[0]}, frozen, batch
    )
    np.testing.assert_allclose(sums.loss / sums.num_targets, np.log(2), rtol=1e-5)


class Labelled(NamedTuple):
    tokens: Any
    attention_mask: Any
    token_type_ids: Any
    labels: Any
    example_mask: Any


def labelled() -> Labelled:
    rng = np.random.default_rng(5)
    mask = (np.arange(6) < np.array([6, 3, 4, 0])[:, None]).astype(np.int32)
    tokens = rng.integers(5, 30, (4, 6)).astype(np.int32) * mask
    arrays = tokens, mask, 0 * mask, np.array([2, 0, 1, 0]), np.array([1.0, 1, 1, 0], np.float32)
    return Labelled(*(jnp.asarray(x)[None] for x in arrays))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.slow
def test_classification_objective_matches_numpy(pooling: Any) -> None:
    model, params = load.load(ENCODERS / "distilbert", dtype="float32")
    asked = ClassificationSection(pooling=pooling, label_smoothing=0.1)
    rules = {r"layer_\d+/.*/kernel$": jlora.LoRA(rank=2, alpha=4)}
    given = setting(objectives.make_classification_objective(model, rules, PLAIN, asked, 3), params)
    batch = labelled()
    _, measured = stepped(given, batch)
    merged = jlora.merge(params, adapter_of(given))
    hidden = np.asarray(model.apply(merged, batch.tokens[0], batch.attention_mask[0]), np.float64)[
        :3
    ]
    lengths = [6, 3, 4]
    pooled = {
        "mean": [h[:n].mean(axis=0) for h, n in zip(hidden, lengths, strict=True)],
        "first": hidden[:, 0],
        "last": [h[n - 1] for h, n in zip(hidden, lengths, strict=True)],
    }[pooling]
    head = jax.tree.map(np.asarray, given.state.trainable["head"])
    scores = np.stack(pooled) @ head["kernel"] + head["bias"]
    log = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    targets = np.eye(3)[[2, 0, 1]] * 0.9 + 0.1 / 3
    assert measured.num_targets == 3
    np.testing.assert_allclose(measured.loss, -(targets * log).sum(axis=1).mean(), rtol=1e-5)
    right = (scores.argmax(axis=1) == [2, 0, 1]).mean()
    np.testing.assert_allclose(measured.extra_metrics["accuracy"], right, rtol=1e-6)


@pytest.mark.slow
def test_classification_objective_keeps_own_head() -> None:
    model, params = load.load(ENCODERS / "bert_sequence", dtype="float32")
    labels = model.config.num_labels
    rules = {
        r"layer_\d+/.*/kernel$": jlora.LoRA(rank=2, alpha=4),
        "classifier": jlora.FullDelta(),
    }
    task = objectives.make_classification_objective(
        model, rules, PLAIN, ClassificationSection(), labels
    )
    given = setting(task, params)
    assert set(given.state.trainable) == {"adapter"}
    _, measured = stepped(given, labelled())
    assert measured.gradient_norm > 0
    with pytest.raises(ValueError, match=f"head has {labels} labels, but the data has 9"):
        objectives.make_classification_objective(model, rules, PLAIN, ClassificationSection(), 9)
    with pytest.raises(ValueError, match="needs a decoder, got a model of type Encoder"):
        objectives.make_lm_objective(model, rules, PLAIN)


# --- rates and families ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_make_lr_schedule_warms_up_and_decays(kind: Any) -> None:
    options = OptimizerSection(
        learning_rate=3.0, schedule=kind, warmup_ratio=0.25, min_lr_ratio=0.1
    )
    rates = np.array([make_lr_schedule(options, 40)(step) for step in range(41)])
    np.testing.assert_allclose(rates[:10], 3 * np.arange(1, 11) / 11, rtol=1e-6)
    through = np.arange(31) / 30
    falls = {
        "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * through)) / 2,
        "linear": 1 - 0.9 * through,
        "constant": np.ones(31),
    }[kind]
    np.testing.assert_allclose(rates[10:], 3 * falls, rtol=1e-5)


def test_make_lr_schedule_one_step_is_peak() -> None:
    assert make_lr_schedule(OptimizerSection(learning_rate=3.0, warmup_ratio=0.5), 1)(0) == 3.0


@pytest.mark.slow
def test_weight_decay_skips_heads() -> None:
    model, params = load.load(ENCODERS / "distilbert", dtype="float32")
    rules = {r"layer_\d+/.*/kernel$": jlora.LoRA(rank=2, alpha=4)}
    found = []
    for decay in (0.0, 0.5):
        options = OptimizerSection(weight_decay=decay, warmup_ratio=0.0)
        task = objectives.make_classification_objective(
            model, rules, options, ClassificationSection(), 3
        )
        given = setting(task, params, options)
        found.append((given, stepped(given, labelled())[0].trainable))
    (given, plain), (_, decayed) = found
    rate = 2e-4
    for name in ("a", "b"):
        path = next(iter(plain["adapter"]))
        old = getattr(given.state.trainable["adapter"][path], name)
        moved = getattr(plain["adapter"][path], name) - getattr(decayed["adapter"][path], name)
        np.testing.assert_allclose(moved, rate * 0.5 * old, atol=1e-7)
    np.testing.assert_array_equal(plain["head"]["kernel"], decayed["head"]["kernel"])


@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        (
            jlora.AdaLoRA(rank=3, alpha=3),
            OptimizerSection(
                budget=RankBudgetSection(target_rank=1, warmup_ratio=0.0), orth_reg_weight=0.5
            ),
            "orth_reg_weight",
        ),
        (
            jlora.LoRAMoE(num_experts=3, rank=2, alpha=4),
            OptimizerSection(aux_loss_coef=0.5),
            "aux_loss_coef",
        ),
    ],
    ids=["adalora", "mixture"],
)
@pytest.mark.slow
def test_lm_objective_adds_regularizers(family: Any, options: Any, name: str) -> None:
    model, params = decoder()
    rules = {r"layers/.*/(q|up)/kernel$": family}
    batch = text(2, 7, [7, 3])
    given = setting(objectives.make_lm_objective(model, rules, options), params, options)
    _, measured = stepped(given, batch)
    free = options.model_copy(update={name: 0.0})
    _, without = stepped(
        setting(objectives.make_lm_objective(model, rules, free), params, free), batch
    )
    assert measured.extra_metrics["penalty"] > 0
    np.testing.assert_allclose(
        measured.loss - without.loss, measured.extra_metrics["penalty"], rtol=1e-5, atol=1e-6
    )
    sums = make_eval_step(given.task.loss_fn)(given.state.trainable, given.frozen, batch)
    if name == "orth_reg_weight":  # A mixture draws nothing, so its evaluation is the same.
        np.testing.assert_allclose(sums.loss / sums.num_targets, without.loss, rtol=1e-5)


def test_make_optimizer_thresholds_sora_gates() -> None:
    model, params = decoder()
    rules = {r"layers/.*/(q|up)/kernel$": jlora.SoRA(rank=3, alpha=3)}
    options = OptimizerSection(learning_rate=0.1, warmup_ratio=0.0, l1_gate=50.0)
    task = objectives.make_lm_objective(model, rules, options)
    trained, rest = jlora.partition(task.lora.init(jax.random.key(1), params, *task.example_inputs))
    made = make_optimizer(options, 10, has_gates=True)
    state = init_train_state({"adapter": trained}, made)
    step = jax.jit(make_train_step(task.loss_fn, made, 1.0))
    state, _ = step(state, {"base": params, "adapter": rest}, text(2, 7, [7, 3]), KEY)
    # A gate of one, a step of 0.1 at most, and a pull of 5.
    assert not any(leaf.gate.any() for leaf in state.trainable["adapter"].values())
