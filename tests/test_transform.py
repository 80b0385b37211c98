"""Rules, initialization, pass-through of arguments, dropout, and errors."""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import case, moved, total
from _support.layer_zoo import normal
from flax import nnx

import jlora
from jlora._tree import flatten_with_paths


class Model(nn.Module):
    """An encoder with every kind of weight that a rule can match."""

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False, mode: str | None = None) -> Any:
        x = nn.Embed(11, 6, name="embed")(tokens)
        for number in range(2):
            y = nn.LayerNorm(name=f"norm_{number}")(x)
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=10, name=f"attention_{number}")(
                y
            )
        x = nn.BatchNorm(use_running_average=not train, name="batch")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return {"logits": nn.Dense(3, name="head")(x), "mode": mode, "steps": 7}


MODEL = Model()
TOKENS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)
CONFIG = jlora.LoRA(rank=2, alpha=4)


def transform(rules: Any = None) -> jlora.LoraTransform:
    return jlora.lora_transform(MODEL.apply, CONFIG if rules is None else rules)


def adapter_for(rules: Any) -> Any:
    return transform(rules).init(jax.random.key(1), PARAMS, TOKENS)


# --- rules ---------------------------------------------------------------------------------------


def test_init_single_config_adapts_products() -> None:
    parts = ("query", "key", "value", "out")
    expected = {f"params/attention_{n}/{part}/kernel" for n in range(2) for part in parts}
    assert set(adapter_for(CONFIG)) == expected | {"params/head/kernel"}


def test_init_first_matching_rule_wins() -> None:
    rules = {
        "bias": None,
        "attention_0/query": jlora.LoRA(rank=1, alpha=1),
        "attention_0": CONFIG,
        "attention_1/(key|out)": CONFIG,
    }
    adapter = adapter_for(rules)
    assert adapter["params/attention_0/query/kernel"].rank == 1
    assert adapter["params/attention_0/key/kernel"].rank == 2
    assert "params/attention_1/query/kernel" not in adapter
    assert not any("bias" in path for path in adapter)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.OptimizedLSTMCell])
def test_init_adapts_recurrent_kernels(cell: Any) -> None:
    model = nn.RNN(cell(5))
    x = jnp.ones((2, 4, 6))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    lora = jlora.lora_transform(model.apply, CONFIG)
    adapter = lora.init(jax.random.key(1), params, x)
    kernels = {path for path in flatten_with_paths(params).paths if path.endswith("kernel")}
    assert set(adapter) == kernels


def test_explain_bias_with_constant_state_is_bias() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda c, row: (jnp.tanh(c @ p["w"] + p["bias"]) @ p["v"] + row, None)
        return jax.lax.scan(step, jnp.zeros((1, 5)), x)[0]

    params = {"w": jnp.ones((5, 6)), "bias": jnp.ones(6), "v": jnp.ones((6, 5))}
    explanation = jlora.lora_transform(fn, CONFIG).explain(params, jnp.ones((4, 1, 5)))
    assert {row.path: row.axes is None for row in explanation.rows} == {
        "bias": True,
        "v": False,
        "w": False,
    }


def test_init_skips_learned_queries() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        latents = p["latents"]
        normed = (latents - latents.mean(-1, keepdims=True)) / latents.std(-1, keepdims=True)
        return jax.nn.softmax((normed @ p["q"]) @ (x @ p["k"]).T) @ x

    params = {"latents": jnp.ones((3, 6)), "q": jnp.ones((6, 5)), "k": jnp.ones((6, 5))}
    lora = jlora.lora_transform(fn, CONFIG)
    assert set(lora.init(jax.random.key(0), params, jnp.ones((4, 6)))) == {"q", "k"}


def test_explain_product_of_weights_names_dense() -> None:
    params = {"a": jnp.ones((6, 5)), "b": jnp.ones((5, 3))}
    fn = lambda p, x: x @ (p["a"] @ p["b"])
    x = jnp.ones((4, 6))
    both = jlora.lora_transform(fn, {"a|b": CONFIG}).explain(params, x)
    assert {row.path: bool(row.dense_reasons) for row in both.rows} == {"a": False, "b": True}
    (_, b) = jlora.lora_transform(fn, {"b": CONFIG}).explain(params, x).rows
    assert b.factored_uses == ("dot_general",)


def test_init_named_embedding_is_adapted() -> None:
    (leaf,) = adapter_for({"embedding": CONFIG}).values()
    assert leaf.axes == ((), (0,), (1,))
    assert leaf.a.shape == (11, 2)
    assert leaf.b.shape == (2, 6)


@pytest.mark.parametrize(
    ("rules", "error", "parts"),
    [
        ({"atention_0/query": CONFIG}, ValueError, ["none of the", "attention_0/query"]),
        ({"query": CONFIG, "querry": CONFIG}, ValueError, ["'querry'", "query/kernel"]),
        ({"attention": CONFIG}, ValueError, ["bias", "feeds no product", "'bias$': None"]),
        ({"norm_0/scale": CONFIG}, ValueError, ["feeds no product", "used by: mul"]),
        ({"kernel": CONFIG, "query/kernel": CONFIG}, ValueError, ["no effect", "narrower"]),
        ({}, ValueError, ["adapts nothing"]),
        ({"(": CONFIG}, ValueError, ["not a regular expression"]),
        ({1: CONFIG}, TypeError, ["must be a string"]),
        ({"kernel": 8}, TypeError, ["maps to 8"]),
        ({".": None}, ValueError, ["adapts nothing", "no pattern has a config"]),
        ({"all-linear": CONFIG}, ValueError, ["PEFT's word", "Pass the config alone"]),
        ("kernel", TypeError, ["mapping of regular expressions"]),
        (8, TypeError, ["jlora.LoRA(rank=8, alpha=16)"]),
        (None, ValueError, ["was given no rules"]),
    ],
)
def test_init_invalid_rules_raise_with_fix(rules: Any, error: Any, parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        jlora.lora_transform(MODEL.apply, rules).init(jax.random.key(1), PARAMS, TOKENS)
    for part in parts:
        assert part in str(caught.value)


def test_modules_in_place_of_functions_raise() -> None:
    with pytest.raises(TypeError, match=r"Linen module .*lora_transform\(model.apply, rules\)"):
        jlora.lora_transform(MODEL, CONFIG)
    with pytest.raises(TypeError, match=r"NNX module Linear.*jlora.from_nnx\(module\)"):
        jlora.lora_transform(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), CONFIG)


def test_error_of_the_model_has_a_note() -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        transform(CONFIG).explain(TOKENS, PARAMS)
    note = caught.value.__notes__[-1]
    assert "fn(params, ...) with params a ArrayImpl of 1 leaves, 1 inputs" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4, "lora_alpha": 8}, "PEFT's 'r' is the option 'rank' here"),
        ({"rank": 4, "alpha": 8, "target_modules": "q"}, "is a mapping from patterns to configs"),
        ({"rnk": 4, "alpha": 8}, "Its options are rank, alpha, dropout"),
    ],
)
def test_config_of_unknown_options_raises(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        jlora.LoRA(**options)
    with pytest.raises(TypeError, match="LoRA takes its options by name, got 4 without one"):
        jlora.LoRA(4, 8)  # type: ignore[misc]
    config = jlora.IA3()
    assert pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config


def test_explain_misspelt_rule_lists_weights() -> None:
    explanation = transform({"atention_0/query": CONFIG}).explain(PARAMS, TOKENS)
    assert "attention_0/query/kernel" in str(explanation)
    assert "refused: The rule 'atention_0/query' matches none" in str(explanation)


def test_init_integer_weight_raises() -> None:
    params = {"table": jnp.arange(12).reshape(3, 4), "w": jnp.ones((4, 5))}
    fn = lambda p, x: x @ p["table"] @ p["w"]
    lora = jlora.lora_transform(fn, {"table": CONFIG})
    with pytest.raises(TypeError, match=r"table.*int32.*no gradient"):
        lora.init(jax.random.key(0), params, jnp.ones((2, 3)))


def test_init_vector_raises() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["v"], {"v": CONFIG})
    with pytest.raises(ValueError, match=r"'v'.*vector"):
        lora.init(jax.random.key(0), {"v": jnp.ones(4)}, jnp.ones((2, 4)))


def test_init_model_without_products_raises() -> None:
    lora = jlora.lora_transform(lambda p, x: x * p["scale"], CONFIG)
    with pytest.raises(ValueError, match="None of the 1 weights feeds a matrix product"):
        lora.init(jax.random.key(0), {"scale": jnp.ones(4)}, jnp.ones((2, 4)))
    tied = lambda p, tokens: p["table"][tokens] @ p["table"].T
    params, tokens = {"table": jnp.ones((4, 3))}, jnp.array([1, 2])
    message = "matrix product or convolution, except embeddings such as 'table', which only a map"
    with pytest.raises(ValueError, match=message):
        jlora.lora_transform(tied, CONFIG).init(jax.random.key(0), params, tokens)
    rows = jlora.TrainableTokens(token_indices=(1,))
    with pytest.raises(ValueError, match="None of the 1 weights is an embedding, whose rows"):
        jlora.lora_transform(lambda p, x: x @ p["table"], rows).init(
            jax.random.key(0), params, jnp.ones((2, 4))
        )


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": -1}, ValueError),
        ({"rank": True}, TypeError),
        ({"rank": 2.0}, TypeError),
        ({"rank": "8"}, TypeError),
        ({"alpha": math.nan}, ValueError),
        ({"alpha": math.inf}, ValueError),
        ({"alpha": 0}, ValueError),
        ({"alpha": "1"}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"dropout": -0.1}, ValueError),
        ({"use_rslora": 1}, TypeError),
        ({"init": "pissa"}, TypeError),
        ({"dtype": jnp.int8}, TypeError),
    ],
)
def test_lora_invalid_field_raises_with_fix(fields: dict[str, Any], error: Any) -> None:
    (name,) = fields
    with pytest.raises(error, match=f"LoRA.{name}=.*(Use|Give|must)"):
        jlora.LoRA(**{"rank": 4, "alpha": 8, **fields})


def test_init_excess_rank_warns() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=7, alpha=7))
    with pytest.warns(UserWarning, match=r"rank=7 on 'w' exceeds .* at most 4"):
        lora.init(jax.random.key(0), {"w": jnp.ones((5, 4))}, jnp.ones((2, 5)))


# --- init ----------------------------------------------------------------------------------------


def test_init_shapes_suffice() -> None:
    shapes = jax.eval_shape(lambda: PARAMS)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    real = adapter_for(CONFIG)
    chex.assert_trees_all_equal(transform().init(jax.random.key(1), shapes, tokens), real)
    abstract = jax.eval_shape(lambda: transform().init(jax.random.key(1), shapes, tokens))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, real)


def test_init_a_is_uniform_in_fan_in_bound() -> None:
    fn = lambda p, x: jnp.einsum("bhk,hko->bo", x, p["w"])
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=40, alpha=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = lora.init(jax.random.key(0), {"w": jnp.ones((5, 20, 30))}, jnp.ones((2, 5, 20)))
    a = np.asarray(adapter["w"].a)
    bound = 1 / math.sqrt(100)
    assert a.shape == (5, 20, 40)
    assert np.abs(a).max() <= bound
    # The std of 4000 uniform draws is bound / sqrt(3) to within 3 standard errors (2 %).
    np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.02)
    assert np.abs(a).max() > 0.99 * bound
    np.testing.assert_array_equal(adapter["w"].b, 0)


def test_init_embedding_has_zero_a_normal_b() -> None:
    fn = lambda p, t: p["table"][t]
    lora = jlora.lora_transform(fn, {"table": jlora.LoRA(rank=40, alpha=1)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (leaf,) = lora.init(
            jax.random.key(0), {"table": jnp.ones((9, 100))}, jnp.arange(3)
        ).values()
    np.testing.assert_array_equal(leaf.a, 0)
    # 4000 draws of standard deviation one: within 3 standard errors.
    np.testing.assert_allclose(np.std(leaf.b), 1, rtol=0.04)


def test_init_weights_and_layers_differ() -> None:
    few = adapter_for({"attention_0/query/kernel": CONFIG})
    many = adapter_for({"kernel": CONFIG})
    path = "params/attention_0/query/kernel"
    chex.assert_trees_all_equal(few[path], many[path])
    others = [leaf.a for name, leaf in many.items() if name != path and leaf.a.shape == (6, 2)]
    assert len(others) > 3
    assert not any(np.array_equal(many[path].a, other) for other in others)
    stack = case("linen_scan", "float32").fresh
    for leaf in stack.values():
        assert not np.array_equal(leaf.a[0], leaf.a[1])


def test_from_initializer_gets_matrix_per_layer() -> None:
    seen = []

    def initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        seen.append(shape)
        return jax.random.normal(key, shape, dtype)

    one = case("linen_scan", "float32")
    config = jlora.LoRA(rank=2, alpha=1, init=jlora.initializers.from_initializer(initializer))
    lora = jlora.lora_transform(one.fn, {"Dense_1/kernel": config})
    adapter = lora.init(jax.random.key(0), one.params, *one.inputs)
    assert seen == [(6, 2)]
    assert [leaf.a.shape for leaf in adapter.values()] == [(3, 6, 2)]


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_apply_lora_matches_equation(stabilized: bool, scale: float) -> None:
    config = jlora.LoRA(rank=4, alpha=6, use_rslora=stabilized)
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 5)).astype(np.float32)}
    x = rng.normal(size=(3, 6)).astype(np.float32)
    adapter = moved(lora.init(jax.random.key(0), params, x))
    a, b = np.float64(adapter["w"].a), np.float64(adapter["w"].b)
    expected = x @ (params["w"] + scale * a @ b)
    # float32 against float64: a sum of 6 products.
    np.testing.assert_allclose(lora.apply(params, adapter, x), expected, rtol=1e-5, atol=1e-5)


def test_apply_out_of_range_token_finite_grads() -> None:
    params = {"e": normal(7, (7, 5), np.float32)}
    tokens = jnp.array([1, 2, 7])

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        return jnp.where((tokens < 7)[:, None], jnp.take(p["e"], tokens, axis=0), 0.0)

    lora = jlora.lora_transform(fn, {"e": CONFIG})
    adapter = moved(lora.init(jax.random.key(0), params, tokens))
    gradient = jax.grad(lambda a: total(lora.apply(params, a, tokens)))(adapter)
    merged = jax.grad(lambda a: total(fn(jlora.merge(params, a), tokens)))(adapter)
    chex.assert_tree_all_finite(gradient)
    # Float32 sums of three products.
    chex.assert_trees_all_close(gradient, merged, rtol=1e-5, atol=1e-5)


def test_init_and_apply_invalid_key_raises() -> None:
    with pytest.raises(TypeError, match="must be a random key, such as jax.random.key"):
        transform().init(np.ones(2, np.float32), PARAMS, TOKENS)
    with pytest.raises(TypeError, match="key=0 must be a random key, .* got int"):
        transform().init(0, PARAMS, TOKENS)
    with pytest.raises(TypeError, match="dropout_key=0"):
        transform().apply(PARAMS, {}, TOKENS, dropout_key=0)


def test_init_empty_weight_raises() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], {"w": CONFIG})
    with pytest.raises(ValueError, match=r"\(0, 5\) has no elements"):
        lora.init(jax.random.key(0), {"w": jnp.ones((0, 5))}, jnp.ones((2, 0)))


# --- arguments -----------------------------------------------------------------------------------


def test_apply_static_values_pass_through() -> None:
    lora, adapter = transform(), moved(adapter_for(CONFIG))
    rngs = {"dropout": jax.random.key(3)}

    @jax.jit
    def adapted(params: Any, adapter: Any) -> Any:
        output, updates = lora.apply(
            params, adapter, TOKENS, train=True, mode="probe", mutable=["batch_stats"], rngs=rngs
        )
        assert output["mode"] == "probe"
        assert output["steps"] == 7
        return output["logits"], updates

    @jax.jit
    def merged(params: Any, adapter: Any) -> Any:
        output, updates = MODEL.apply(
            lora.merge(params, adapter), TOKENS, True, "probe", mutable=["batch_stats"], rngs=rngs
        )
        return output["logits"], updates

    # Float32 through four products.
    chex.assert_trees_all_close(
        adapted(PARAMS, adapter), merged(PARAMS, adapter), rtol=2e-5, atol=2e-5
    )


def test_apply_returned_params_are_adapted() -> None:
    fn = lambda p, x: (x @ p["w"], p)
    lora = jlora.lora_transform(fn, CONFIG)
    params = {"w": normal(0, (6, 5), np.float32)}
    x = jnp.ones((2, 6))
    adapter = moved(lora.init(jax.random.key(1), params, x))
    _, returned = lora.apply(params, adapter, x)
    chex.assert_trees_all_close(returned, lora.merge(params, adapter), rtol=1e-6)


def test_apply_empty_adapter_is_base() -> None:
    chex.assert_trees_all_equal(
        transform().apply(PARAMS, {}, TOKENS)["logits"], MODEL.apply(PARAMS, TOKENS)["logits"]
    )


def test_merge_numpy_params_equal_jax() -> None:
    adapter = moved(adapter_for(CONFIG))
    merged = jlora.merge(jax.tree.map(np.asarray, PARAMS), adapter)
    chex.assert_trees_all_equal(merged, jlora.merge(PARAMS, adapter))


def test_apply_and_merge_wrong_adapter_raises() -> None:
    lora, adapter = transform(), adapter_for(CONFIG)
    with pytest.raises(TypeError, match="not what init returns"):
        lora.apply(PARAMS, PARAMS, TOKENS)
    with pytest.raises(ValueError, match=r"'params/attention_0.*nearest paths"):
        lora.apply(PARAMS["params"], adapter, TOKENS)
    other = jax.tree.map(lambda leaf: leaf, PARAMS)
    other["params"]["head"]["kernel"] = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"head/kernel.*\(6, 3\).*\(6, 4\)"):
        jlora.merge(other, adapter)
    turned = dict(adapter)
    leaf = adapter["params/head/kernel"]
    turned["params/head/kernel"] = jax.tree.map(lambda x: x.T, leaf)
    with pytest.raises(ValueError, match=r"'a'.*\(2, 6\), expected \(6, 2\).*It looks transposed"):
        jlora.merge(PARAMS, turned)


def test_apply_model_keywords_do_not_clash() -> None:
    fn = lambda p, x, *, params, key, adapter: x @ p["w"] + params + key + adapter
    lora = jlora.lora_transform(fn, CONFIG)
    own = {"params": jnp.ones(()), "key": jnp.ones(()), "adapter": jnp.ones(())}
    p, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
    adapter = lora.init(jax.random.key(0), p, x, **own)
    # A fresh adapter adds nothing.
    chex.assert_trees_all_close(lora.apply(p, adapter, x, **own), fn(p, x, **own))


def test_flatten_box_around_tree_keeps_keys() -> None:
    box = nn.Partitioned({"u": jnp.ones((6, 5)), "v": jnp.ones((6, 4))}, (None, None))
    assert flatten_with_paths({"b": box}).paths == ("b/value/u", "b/value/v")


def test_merge_duplicate_path_raises() -> None:
    params = {"a/b": {"c": jnp.ones((2, 3))}, "a": {"b/c": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="share the path 'a/b/c'"):
        jlora.merge(params, {})


# --- merging -------------------------------------------------------------------------------------


def test_merge_rounds_once_keeps_dtype_and_boxes() -> None:
    one = case("partitioned", "bfloat16")
    merged = jlora.merge(one.params, one.adapter)
    kernel = one.params["params"]["Dense_0"]["kernel"]
    ((_, leaf),) = one.adapter.items()
    exact = np.float64(kernel.value) + leaf.scale * np.float64(leaf.a) @ np.float64(leaf.b)
    got = merged["params"]["Dense_0"]["kernel"]
    assert isinstance(got, nn.Partitioned)
    assert got.names == kernel.names
    assert got.value.dtype == jnp.bfloat16
    nearest = exact.astype(np.float32).astype(jnp.bfloat16)
    # A float32 sum next to a tie may round the other way, by at most one spacing.
    np.testing.assert_allclose(np.float64(got.value), np.float64(nearest), rtol=2**-8)
    assert (np.asarray(got.value) == nearest).mean() > 0.9


# --- dropout -------------------------------------------------------------------------------------


def dropped(rate: float, name: str = "dense") -> tuple[Any, Any]:
    one = case(name, "float32")
    config = jlora.LoRA(rank=2, alpha=3, dropout=rate)
    lora = jlora.lora_transform(one.fn, {one.layer.adapted: config})
    return lora, moved(lora.init(jax.random.key(1), one.params, *one.inputs))


def test_dropout_without_key_is_off() -> None:
    one = case("dense", "float32")
    lora, adapter = dropped(0.5)
    chex.assert_trees_all_equal(lora.apply(one.params, adapter, *one.inputs), one.output)


def test_dropout_acts_on_input_of_a() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=4, alpha=4, dropout=0.25))
    params = {"w": jnp.zeros((500, 4))}
    x = jnp.ones((40, 500))
    adapter = lora.init(jax.random.key(0), params, x)
    # With A = 1 and B the identity, the output counts the inputs that were not dropped.
    counting = {"w": dataclasses.replace(adapter["w"], a=jnp.ones((500, 4)), b=jnp.eye(4))}
    kept = np.asarray(lora.apply(params, counting, x, dropout_key=jax.random.key(5))) / 500
    # Each entry is a mean of 500 draws of 0 or 4/3: std 0.026, and 0.004 of a mean of 40 rows.
    np.testing.assert_allclose(kept.mean(), 1, atol=0.015)
    assert 0.01 < kept[:, 0].std() < 0.05
    base = lora.apply(
        params, jax.tree.map(jnp.zeros_like, counting), x, dropout_key=jax.random.key(5)
    )
    np.testing.assert_array_equal(base, 0)


def test_dropout_differs_by_key_weight_and_layer() -> None:
    def fn(p: Any, x: jax.Array) -> Any:
        layers = jax.lax.scan(lambda c, w: (c, x @ w), x, p["stack"])[1]
        steps = jax.lax.scan(lambda c, _: (c, x @ p["shared"]), x, None, length=2)[1]
        return {"single": x @ p["single"], "layers": layers, "steps": steps}

    params = {
        "single": jnp.zeros((50, 3)),
        "shared": jnp.zeros((50, 3)),
        "stack": jnp.zeros((2, 50, 3)),
    }
    x = jnp.ones((4, 50))
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1, dropout=0.5))
    adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, x))
    run = jax.jit(lambda key: lora.apply(params, adapter, x, dropout_key=key))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    masks = [one["single"], other["single"], *one["layers"], *one["steps"]]
    for i, mask in enumerate(masks):
        assert not any(np.array_equal(mask, other) for other in masks[i + 1 :]), i


def test_dropout_two_uses_differ() -> None:
    params, x = {"w": jnp.zeros((50, 3))}, jnp.ones((4, 50))
    fn = lambda p, x: (x @ p["w"], x @ p["w"])
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1, dropout=0.5))
    adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, x))
    one, other = lora.apply(params, adapter, x, dropout_key=jax.random.key(1))
    assert not np.array_equal(one, other)


def test_dropout_lookup_is_not_dropped() -> None:
    one = case("embed", "float32")
    lora, adapter = dropped(0.5, "embed")
    key = jax.random.key(0)
    with_key = lora.apply(one.params, adapter, *one.inputs, dropout_key=key)
    chex.assert_trees_all_close(with_key, one.output, rtol=1e-6, atol=1e-6)


def test_dropout_gathered_experts_by_row() -> None:
    fn = lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][jnp.array([2, 0, 2, 2])])
    params, x = {"w": jnp.zeros((3, 50, 4))}, jnp.ones((4, 50))
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1, dropout=0.5))
    adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, x))
    kept = lora.apply(params, adapter, x, dropout_key=jax.random.key(1))[:, 0] / 2
    # Sums of fifty draws of 0 or 1 (after the rescaling by two): mean 25, std 3.5.
    np.testing.assert_array_less(np.abs(kept - 25), 5 * 3.5)
    assert len(set(np.asarray(kept).tolist())) > 1


def test_dropout_gradient_matches_differences() -> None:
    lora, adapter = dropped(0.5)
    one = case("dense", "float32")
    key = jax.random.key(4)
    loss = lambda a: total(lora.apply(one.params, a, *one.inputs, dropout_key=key))
    direction = moved(jax.tree.map(jnp.zeros_like, adapter), 6)
    shifted = lambda t: loss(jax.tree.map(lambda a, d: a + t * d, adapter, direction))
    slope = (shifted(1e-2) - shifted(-1e-2)) / 2e-2
    exact = jax.jvp(loss, (adapter,), (direction,))[1]
    # Central differences in float32: 1e-7 * |loss| / 1e-2 of rounding, 1e-4 of curvature.
    np.testing.assert_allclose(slope, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("weight_norm", "not only used by products"), ("in_custom_vjp", "custom_vjp")],
)
def test_dropout_without_known_input_raises(name: str, reason: str) -> None:
    one = case(name, "float32")
    lora, adapter = dropped(0.5, name)
    with pytest.raises(ValueError, match=rf"Dropout .*'w'.*{reason}"):
        lora.apply(one.params, adapter, *one.inputs, dropout_key=jax.random.key(0))
