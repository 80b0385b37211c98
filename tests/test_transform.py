"""Rules, initialisation, pass-through of arguments, dropout, and what is refused."""

from __future__ import annotations

import dataclasses
import math
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


class Model(nn.Module):
    """An encoder with everything a rule can name."""

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


def test_a_bare_config_adapts_products_but_no_embedding_norm_or_bias() -> None:
    parts = ("query", "key", "value", "out")
    expected = {f"params/attention_{n}/{part}/kernel" for n in range(2) for part in parts}
    assert set(adapter_for(CONFIG)) == expected | {"params/head/kernel"}


def test_the_first_matching_rule_wins_and_none_freezes() -> None:
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
def test_a_bare_config_adapts_recurrent_kernels_though_the_state_starts_constant(cell: Any) -> None:
    model = nn.RNN(cell(5))
    x = jnp.ones((2, 4, 6))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    lora = jlora.lora_transform(model.apply, CONFIG)
    adapter = lora.init(jax.random.key(1), params, x)
    kernels = {path for path in jlora.tree.flatten(params).paths if path.endswith("kernel")}
    assert set(adapter) == kernels


def test_a_bias_beside_a_state_that_starts_constant_is_still_a_bias() -> None:
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


def test_a_bare_config_adapts_what_multiplies_learned_queries_but_not_the_queries() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        latents = p["latents"]
        normed = (latents - latents.mean(-1, keepdims=True)) / latents.std(-1, keepdims=True)
        return jax.nn.softmax((normed @ p["q"]) @ (x @ p["k"]).T) @ x

    params = {"latents": jnp.ones((3, 6)), "q": jnp.ones((6, 5)), "k": jnp.ones((6, 5))}
    lora = jlora.lora_transform(fn, CONFIG)
    assert set(lora.init(jax.random.key(0), params, jnp.ones((4, 6)))) == {"q", "k"}


def test_of_a_product_of_two_adapted_weights_explain_names_the_dense_one() -> None:
    params = {"a": jnp.ones((6, 5)), "b": jnp.ones((5, 3))}
    fn = lambda p, x: x @ (p["a"] @ p["b"])
    x = jnp.ones((4, 6))
    both = jlora.lora_transform(fn, {"a|b": CONFIG}).explain(params, x)
    assert {row.path: bool(row.dense_reasons) for row in both.rows} == {"a": False, "b": True}
    (_, b) = jlora.lora_transform(fn, {"b": CONFIG}).explain(params, x).rows
    assert b.factored_uses == ("dot_general",)


def test_an_embedding_can_be_named() -> None:
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
        ({1: CONFIG}, TypeError, ["no string"]),
        ({"kernel": 8}, TypeError, ["maps to 8"]),
        ("kernel", TypeError, ["mapping of regular expressions"]),
        (8, TypeError, ["jlora.LoRA(rank=8, alpha=16)"]),
        (None, ValueError, ["was given no rules"]),
    ],
)
def test_bad_rules_are_refused_with_the_mend(rules: Any, error: Any, parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        jlora.lora_transform(MODEL.apply, rules).init(jax.random.key(1), PARAMS, TOKENS)
    for part in parts:
        assert part in str(caught.value)


def test_a_misspelt_rule_still_lets_explain_list_every_weight() -> None:
    explanation = transform({"atention_0/query": CONFIG}).explain(PARAMS, TOKENS)
    assert "attention_0/query/kernel" in str(explanation)
    assert "refused: The rule 'atention_0/query' matches none" in str(explanation)


def test_an_integer_leaf_is_refused_by_its_type() -> None:
    params = {"table": jnp.arange(12).reshape(3, 4), "w": jnp.ones((4, 5))}
    fn = lambda p, x: x @ p["table"] @ p["w"]
    lora = jlora.lora_transform(fn, {"table": CONFIG})
    with pytest.raises(TypeError, match=r"table.*int32.*no gradient"):
        lora.init(jax.random.key(0), params, jnp.ones((2, 3)))


def test_a_vector_is_refused_because_it_has_no_rank() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["v"], {"v": CONFIG})
    with pytest.raises(ValueError, match=r"'v'.*vector"):
        lora.init(jax.random.key(0), {"v": jnp.ones(4)}, jnp.ones((2, 4)))


def test_a_model_without_products_is_refused() -> None:
    lora = jlora.lora_transform(lambda p, x: x * p["scale"], CONFIG)
    with pytest.raises(ValueError, match="None of the 1 weights feeds a matrix product"):
        lora.init(jax.random.key(0), {"scale": jnp.ones(4)}, jnp.ones((2, 4)))


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
def test_a_config_names_the_field_and_the_mend(fields: dict[str, Any], error: Any) -> None:
    (name,) = fields
    with pytest.raises(error, match=f"LoRA.{name}=.*(Use|Give|must)"):
        jlora.LoRA(**{"rank": 4, "alpha": 8, **fields})


def test_a_rank_above_the_weights_own_warns() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=7, alpha=7))
    with pytest.warns(UserWarning, match=r"rank=7 on 'w' exceeds .* at most 4"):
        lora.init(jax.random.key(0), {"w": jnp.ones((5, 4))}, jnp.ones((2, 5)))


# --- init ----------------------------------------------------------------------------------------


def test_init_needs_shapes_only() -> None:
    shapes = jax.eval_shape(lambda: PARAMS)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    real = adapter_for(CONFIG)
    chex.assert_trees_all_equal(transform().init(jax.random.key(1), shapes, tokens), real)
    abstract = jax.eval_shape(lambda: transform().init(jax.random.key(1), shapes, tokens))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, real)


def test_a_starts_uniform_within_one_over_the_root_of_fan_in() -> None:
    fn = lambda p, x: jnp.einsum("bhk,hko->bo", x, p["w"])
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=40, alpha=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = lora.init(jax.random.key(0), {"w": jnp.ones((5, 20, 30))}, jnp.ones((2, 5, 20)))
    a = np.asarray(adapter["w"].a)
    bound = 1 / math.sqrt(100)
    assert a.shape == (5, 20, 40)
    assert np.abs(a).max() <= bound
    # 4000 uniform draws: their deviation is bound / sqrt(3) to within 3 standard errors (2 %).
    np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.02)
    assert np.abs(a).max() > 0.99 * bound
    np.testing.assert_array_equal(adapter["w"].b, 0)


def test_an_embedding_starts_with_a_zero_and_b_normal() -> None:
    fn = lambda p, t: p["table"][t]
    lora = jlora.lora_transform(fn, {"table": jlora.LoRA(rank=40, alpha=1)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (leaf,) = lora.init(
            jax.random.key(0), {"table": jnp.ones((9, 100))}, jnp.arange(3)
        ).values()
    np.testing.assert_array_equal(leaf.a, 0)
    # 4000 draws of deviation one: within 3 standard errors.
    np.testing.assert_allclose(np.std(leaf.b), 1, rtol=0.04)


def test_every_weight_and_every_layer_of_a_stack_has_its_own_draw() -> None:
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


def test_the_initializer_of_a_is_given_a_matrix_for_each_layer() -> None:
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
def test_the_update_is_the_papers_equation(stabilized: bool, scale: float) -> None:
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


def test_an_identifier_beyond_the_table_leaves_gradients_finite() -> None:
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


def test_what_is_no_key_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="key=0 is a int, not a random key"):
        transform().init(0, PARAMS, TOKENS)
    with pytest.raises(TypeError, match="dropout_key=0"):
        transform().apply(PARAMS, {}, TOKENS, dropout_key=0)


def test_a_weight_without_entries_is_refused() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], {"w": CONFIG})
    with pytest.raises(ValueError, match=r"\(0, 5\) holds no numbers"):
        lora.init(jax.random.key(0), {"w": jnp.ones((0, 5))}, jnp.ones((2, 0)))


# --- arguments -----------------------------------------------------------------------------------


def test_static_values_keywords_and_other_outputs_pass_through() -> None:
    lora, adapter = transform(), moved(adapter_for(CONFIG))
    rngs = {"dropout": jax.random.key(3)}
    output, updates = lora.apply(
        PARAMS, adapter, TOKENS, train=True, mode="probe", mutable=["batch_stats"], rngs=rngs
    )
    assert output["mode"] == "probe"
    assert output["steps"] == 7
    merged, expected = MODEL.apply(
        lora.merge(PARAMS, adapter), TOKENS, True, "probe", mutable=["batch_stats"], rngs=rngs
    )
    # Float32 through four products.
    chex.assert_trees_all_close(
        (output["logits"], updates), (merged["logits"], expected), rtol=2e-5, atol=2e-5
    )


def test_a_function_that_returns_its_parameters_returns_them_adapted() -> None:
    fn = lambda p, x: (x @ p["w"], p)
    lora = jlora.lora_transform(fn, CONFIG)
    params = {"w": normal(0, (6, 5), np.float32)}
    x = jnp.ones((2, 6))
    adapter = moved(lora.init(jax.random.key(1), params, x))
    _, returned = lora.apply(params, adapter, x)
    chex.assert_trees_all_close(returned, lora.merge(params, adapter), rtol=1e-6)


def test_no_adapter_at_all_is_the_base() -> None:
    chex.assert_trees_all_equal(
        transform().apply(PARAMS, {}, TOKENS)["logits"], MODEL.apply(PARAMS, TOKENS)["logits"]
    )


def test_numpy_parameters_are_taken() -> None:
    adapter = moved(adapter_for(CONFIG))
    merged = jlora.merge(jax.tree.map(np.asarray, PARAMS), adapter)
    chex.assert_trees_all_equal(merged, jlora.merge(PARAMS, adapter))


def test_what_is_no_adapter_or_does_not_fit_is_refused() -> None:
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


def test_a_model_may_have_arguments_of_our_names() -> None:
    fn = lambda p, x, *, params, key, adapter: x @ p["w"] + params + key + adapter
    lora = jlora.lora_transform(fn, CONFIG)
    own = {"params": jnp.ones(()), "key": jnp.ones(()), "adapter": jnp.ones(())}
    p, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
    adapter = lora.init(jax.random.key(0), p, x, **own)
    # A fresh adapter adds nothing.
    chex.assert_trees_all_close(lora.apply(p, adapter, x, **own), fn(p, x, **own))


def test_a_box_around_a_tree_keeps_the_trees_keys() -> None:
    box = nn.Partitioned({"u": jnp.ones((6, 5)), "v": jnp.ones((6, 4))}, (None, None))
    assert jlora.tree.flatten({"b": box}).paths == ("b/value/u", "b/value/v")


def test_two_leaves_of_one_path_are_refused() -> None:
    params = {"a/b": {"c": jnp.ones((2, 3))}, "a": {"b/c": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="share the path 'a/b/c'"):
        jlora.merge(params, {})


# --- merging -------------------------------------------------------------------------------------


def test_a_merge_is_rounded_once_and_keeps_type_and_boxes() -> None:
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
    # A float32 sum next to a tie may round the other way: never by more than one spacing.
    np.testing.assert_allclose(np.float64(got.value), np.float64(nearest), rtol=2**-8)
    assert (np.asarray(got.value) == nearest).mean() > 0.9


# --- dropout -------------------------------------------------------------------------------------


def dropped(rate: float, name: str = "dense") -> tuple[Any, Any]:
    one = case(name, "float32")
    config = jlora.LoRA(rank=2, alpha=3, dropout=rate)
    lora = jlora.lora_transform(one.fn, {one.layer.adapted: config})
    return lora, moved(lora.init(jax.random.key(1), one.params, *one.inputs))


def test_no_key_means_no_dropout() -> None:
    one = case("dense", "float32")
    lora, adapter = dropped(0.5)
    chex.assert_trees_all_equal(lora.apply(one.params, adapter, *one.inputs), one.output)


def test_dropout_acts_on_the_input_of_a_alone() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=4, alpha=4, dropout=0.25))
    params = {"w": jnp.zeros((500, 4))}
    x = jnp.ones((40, 500))
    adapter = lora.init(jax.random.key(0), params, x)
    # With A = 1 and B the identity, the output counts what was kept.
    counting = {"w": dataclasses.replace(adapter["w"], a=jnp.ones((500, 4)), b=jnp.eye(4))}
    kept = np.asarray(lora.apply(params, counting, x, dropout_key=jax.random.key(5))) / 500
    # Each entry is a mean of 500 draws of 0 or 4/3: deviation 0.026, the mean of 40 rows 0.004.
    np.testing.assert_allclose(kept.mean(), 1, atol=0.015)
    assert 0.01 < kept[:, 0].std() < 0.05
    base = lora.apply(
        params, jax.tree.map(jnp.zeros_like, counting), x, dropout_key=jax.random.key(5)
    )
    np.testing.assert_array_equal(base, 0)


def test_dropout_differs_by_key_weight_layer_and_step() -> None:
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


def test_two_uses_of_one_weight_drop_different_inputs() -> None:
    params, x = {"w": jnp.zeros((50, 3))}, jnp.ones((4, 50))
    fn = lambda p, x: (x @ p["w"], x @ p["w"])
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1, dropout=0.5))
    adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, x))
    one, other = lora.apply(params, adapter, x, dropout_key=jax.random.key(1))
    assert not np.array_equal(one, other)


def test_a_look_up_has_no_input_to_drop() -> None:
    one = case("embed", "float32")
    lora, adapter = dropped(0.5, "embed")
    key = jax.random.key(0)
    with_key = lora.apply(one.params, adapter, *one.inputs, dropout_key=key)
    chex.assert_trees_all_close(with_key, one.output, rtol=1e-6, atol=1e-6)


def test_experts_looked_up_for_each_row_drop_inputs_row_by_row() -> None:
    fn = lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][jnp.array([2, 0, 2, 2])])
    params, x = {"w": jnp.zeros((3, 50, 4))}, jnp.ones((4, 50))
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1, dropout=0.5))
    adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, x))
    kept = lora.apply(params, adapter, x, dropout_key=jax.random.key(1))[:, 0] / 2
    # Sums of fifty draws of 0 or 1 (after the rescaling by two): 25 with a deviation of 3.5.
    np.testing.assert_array_less(np.abs(kept - 25), 5 * 3.5)
    assert len(set(np.asarray(kept).tolist())) > 1


def test_dropout_gradient_is_that_of_the_dropped_function() -> None:
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
    ("name", "reason"), [("weight_norm", "more than products"), ("in_custom_vjp", "custom_vjp")]
)
def test_dropout_where_no_input_is_known_is_refused(name: str, reason: str) -> None:
    one = case(name, "float32")
    lora, adapter = dropped(0.5, name)
    with pytest.raises(ValueError, match=rf"dropout .*'w'.*{reason}"):
        lora.apply(one.params, adapter, *one.inputs, dropout_key=jax.random.key(0))


# --- NNX -----------------------------------------------------------------------------------------


def test_merged_parameters_go_back_into_an_nnx_module() -> None:
    module = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), jnp.tanh)
    fn, params = jlora.from_nnx(module)
    x = normal(1, (3, 6), np.float32)
    chex.assert_trees_all_equal(fn(params, x), module(x))
    lora = jlora.lora_transform(fn, CONFIG)
    adapter = moved(lora.init(jax.random.key(1), params, x))
    assert set(adapter) == {"layers/0/kernel"}
    expected = lora.apply(params, adapter, x)
    jlora.update_nnx(module, lora.merge(params, adapter))
    chex.assert_trees_all_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_an_nnx_module_is_shaped_before_anything_is_allocated() -> None:
    build = lambda: nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    fn, shapes = jlora.from_nnx(nnx.eval_shape(build))
    lora = jlora.lora_transform(fn, CONFIG)
    x = jax.ShapeDtypeStruct((3, 6), jnp.float32)
    adapter = lora.init(jax.random.key(0), shapes, x)
    assert adapter["kernel"].a.shape == (6, 2)


def test_what_is_no_nnx_module_or_does_not_fit_is_refused() -> None:
    module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="model.apply"):
        jlora.from_nnx(MODEL)
    with pytest.raises(ValueError, match="method='encode'"):
        jlora.from_nnx(module, method="encode")
    _, other = jlora.from_nnx(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    before = np.asarray(module.kernel[...])
    with pytest.raises(ValueError, match=r"'bias'.*\(4,\).*\(5,\)"):
        jlora.update_nnx(module, other)
    np.testing.assert_array_equal(module.kernel[...], before)


def test_a_method_other_than_call_can_be_wrapped() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))

        def encode(self, x: jax.Array) -> jax.Array:
            return self.linear(x)

    fn, params = jlora.from_nnx(Two(), method="encode")
    assert fn(params, jnp.ones((2, 6))).shape == (2, 5)
