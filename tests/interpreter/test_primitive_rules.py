"""Rules that users register, `allow_materialize=False`, and programs that products share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import moved
from _support.hlo import weight_shaped_products
from _support.materialized import record_materialized
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jlora
from jlora import multi_lora
from jlora.interpreter import _compat
from jlora.interpreter.eval_jaxpr import make_context
from jlora.interpreter.factored_array import FactoredArray

# Axis lengths that all differ, so that a mixed-up axis changes a shape.
X, W = (
    jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    for shape in ((7, 6), (5, 6))
)
PARAMS = {"w": W}


def make_primitive(name: str) -> Primitive:
    """A primitive `x W^T * factor` and `sum(x)`, as a kernel of somebody else would be."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    def compute(x: Any, w: Any, *, factor: float) -> list[Any]:
        return [factor * (x @ w.T), x.sum()]

    primitive.def_impl(compute)
    primitive.def_abstract_eval(
        lambda x, w, factor: [
            jax.core.ShapedArray((x.shape[0], w.shape[0]), x.dtype),
            jax.core.ShapedArray((), x.dtype),
        ]
    )
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=True))
    return primitive


def make_model(primitive: Primitive) -> Any:
    def model(params: Any, x: Any) -> Any:
        product, total = primitive.bind(x, params["w"], factor=0.5)
        return jnp.tanh(product) + total

    return model


@pytest.fixture(scope="module")
def registered() -> Any:
    primitive = make_primitive("test_matmul_registered")

    @jlora.register_rule(primitive)
    def rule(x: Any, w: Any, *, factor: float) -> list[Any]:
        return [factor * (x @ w.T), x.sum()]

    return make_model(primitive)


def test_register_rule_keeps_the_weight_factored(registered: Any) -> None:
    lora = jlora.lora_transform(registered, jlora.LoRA(rank=2, alpha=3))
    adapter = moved(lora.init(jax.random.key(0), PARAMS, X))
    with record_materialized() as paths:
        output = jax.jit(lora.apply)(PARAMS, adapter, X)
    assert not paths
    assert "factored" in str(lora.explain(PARAMS, X))
    expected = registered(lora.merge(PARAMS, adapter), X)
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)


def test_register_rule_gradient_is_the_merged(registered: Any) -> None:
    lora = jlora.lora_transform(registered, jlora.LoRA(rank=2, alpha=3))
    adapter = moved(lora.init(jax.random.key(0), PARAMS, X))
    grad = jax.jit(jax.grad(lambda adapter: (lora.apply(PARAMS, adapter, X) ** 2).sum()))

    def merged_loss(adapter: Any) -> Any:  # The primitive itself has no derivative.
        weight = lora.merge(PARAMS, adapter)["w"]
        return ((jnp.tanh(0.5 * (X @ weight.T)) + X.sum()) ** 2).sum()

    for ours, theirs in zip(
        jax.tree.leaves(grad(adapter)), jax.tree.leaves(jax.grad(merged_loss)(adapter)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    assert not weight_shaped_products(grad.lower(adapter).compile().as_text(), {W.shape})


def test_primitive_without_rule_is_materialized() -> None:
    model = make_model(make_primitive("test_matmul_unknown"))
    lora = jlora.lora_transform(model, {"w": jlora.FullDelta()})
    with pytest.raises(ValueError, match="'w'"):
        jlora.lora_transform(model, {"w": jlora.LoRA(rank=2, alpha=3)}).init(
            jax.random.key(0), PARAMS, X
        )
    adapter = moved(lora.init(jax.random.key(0), PARAMS, X))
    expected = model(lora.merge(PARAMS, adapter), X)
    np.testing.assert_allclose(lora.apply(PARAMS, adapter, X), expected, rtol=2e-5, atol=2e-5)


def test_register_rule_wrong_outputs_raise() -> None:
    primitive = make_primitive("test_matmul_wrong")
    jlora.register_rule("test_matmul_wrong")(lambda x, w, *, factor: [x @ w.T])
    lora = jlora.lora_transform(make_model(primitive), jlora.LoRA(rank=2, alpha=3))
    with pytest.raises(ValueError, match=r"'test_matmul_wrong' returned .*float32\[7, 5\]; the"):
        lora.init(jax.random.key(0), PARAMS, X)


@pytest.mark.parametrize(
    ("primitive", "error", "message"),
    [
        (3, TypeError, "primitive=3 must be a jax.extend.core.Primitive or its name"),
        ("dot_general", ValueError, "jlora has a rule for the primitive 'dot_general'"),
    ],
)
def test_register_rule_bad_primitive_raises(primitive: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        jlora.register_rule(primitive)


def test_register_rule_not_a_function_raises() -> None:
    with pytest.raises(TypeError, match="'test_no_function' must be a function .*, got 3"):
        jlora.register_rule("test_no_function")(3)  # pyright: ignore[reportArgumentType]


def test_register_rule_again_replaces_the_users() -> None:
    primitive = make_primitive("test_matmul_twice")
    jlora.register_rule(primitive)(lambda x, w, *, factor: [0 * (x @ w.T), x.sum()])
    jlora.register_rule(primitive)(lambda x, w, *, factor: [factor * (x @ w.T), x.sum()])
    model = make_model(primitive)
    lora = jlora.lora_transform(model, jlora.LoRA(rank=2, alpha=3))
    adapter = lora.init(jax.random.key(0), PARAMS, X)
    np.testing.assert_allclose(lora.apply(PARAMS, adapter, X), model(PARAMS, X), rtol=2e-5)


# --- allow_materialize ----------------------------------------------------------------------------


def product_and_norm(params: Any, x: Any) -> Any:
    """A model that needs the weight itself besides its product."""
    return x @ params["w"].T / jnp.sqrt(jnp.sum(params["w"] ** 2))


def test_allow_materialize_false_names_the_weight() -> None:
    lora = jlora.lora_transform(
        product_and_norm, jlora.LoRA(rank=2, alpha=3), allow_materialize=False
    )
    with pytest.raises(ValueError, match=r"weight 'w' would be materialized for .*explain shows"):
        lora.init(jax.random.key(0), PARAMS, X)
    allowed = jlora.lora_transform(product_and_norm, jlora.LoRA(rank=2, alpha=3))
    adapter = allowed.init(jax.random.key(0), PARAMS, X)
    with pytest.raises(ValueError, match="weight 'w' would be materialized"):
        lora.apply(PARAMS, adapter, X)


def test_explain_lists_forbidden_materializations() -> None:
    config = jlora.LoRA(rank=2, alpha=3)
    explanation = jlora.lora_transform(product_and_norm, config).explain(PARAMS, X)
    assert not explanation.errors
    forbidden = jlora.lora_transform(product_and_norm, config, allow_materialize=False)
    (error,) = forbidden.explain(PARAMS, X).errors
    assert "weight 'w' would be materialized" in error
    assert forbidden.explain(PARAMS, X).rows == explanation.rows


def test_allow_materialize_false_keeps_factored() -> None:
    def model(params: Any, x: Any) -> Any:
        frozen = jnp.sqrt(jnp.sum(params["scale"] ** 2))  # Not adapted, so it may be used densely.
        return jnp.tanh(x @ params["w"].T) * frozen

    params = {**PARAMS, "scale": jnp.arange(4.0)}
    rules = {"w": jlora.LoRA(rank=2, alpha=3)}
    strict = jlora.lora_transform(model, rules, allow_materialize=False)
    adapter = moved(strict.init(jax.random.key(0), params, X))
    expected = jlora.lora_transform(model, rules).apply(params, adapter, X)
    np.testing.assert_array_equal(strict.apply(params, adapter, X), expected)


def test_allow_materialize_false_spares_full() -> None:
    lora = jlora.lora_transform(product_and_norm, {"w": jlora.FullDelta()}, allow_materialize=False)
    adapter = moved(lora.init(jax.random.key(0), PARAMS, X))
    expected = product_and_norm(lora.merge(PARAMS, adapter), X)
    np.testing.assert_allclose(lora.apply(PARAMS, adapter, X), expected, rtol=2e-5, atol=2e-5)


# --- programs shared between equal products -------------------------------------------------------


def test_products_of_equal_shapes_stay_apart() -> None:
    """A square weight, with factors of the same shapes along other axes."""
    rng = np.random.default_rng(3)
    w, x = (jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(2))
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 2), (2, 4)))
    program = _compat.trace_program(lambda w, x: x @ w, w, x)
    weight = FactoredArray.from_weight(w, "w", w.shape)
    terms = {
        "as A B": weight.add((a, (0, "r")), (b, ("r", 1))),
        "transposed": weight.add((a, (1, "r")), (b, ("r", 0))),
        "as a Hadamard product": weight.add((a, (0, "r")), (b, ("r", 0)), (w, (0, 1))),
        "scaled": weight.add((a, (0, "r")), (b, ("r", 1))).multiply((a[:, 0], (1,))),
        "scaled by entry": weight.add((a, (0, "r")), (b, ("r", 1))).multiply((w, (0, 1))),
    }
    for name, adapted in terms.items():
        (output,) = make_context().evaluate(program, [adapted, x])
        np.testing.assert_allclose(output, x @ adapted.materialize(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "config", [jlora.LoRA(rank=2, alpha=2), jlora.LoRAMoE(num_experts=4, rank=2, alpha=2), None]
)
def test_equal_products_are_traced_once(config: Any) -> None:
    """Also those whose terms name an axis: that of the experts, or of the slots."""

    def model(params: Any, x: Any) -> Any:
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    params = [jnp.eye(6)] * 5
    lora = jlora.lora_transform(model, config or jlora.LoRA(rank=2, alpha=2))
    adapter = lora.init(jax.random.key(0), params, X)
    if config is None:
        adapter = multi_lora.select_slot(multi_lora.empty_slots(adapter, 3, 2), 1)
    jaxpr = jax.make_jaxpr(lora.apply)(params, adapter, X)
    bodies = [
        eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.params.get("name") == "_lora_product"
    ]
    assert len(bodies) == 5
    assert len({id(body) for body in bodies}) == 1
