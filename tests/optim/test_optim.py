"""Optimizers by label, and partitions."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from _support.cases import case, total

import jlora


def arrays(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def combined() -> tuple[Any, Any]:
    one = case("attention", "float32")
    return one, {"base": one.params, "adapter": one.fresh, "head": {"kernel": jnp.ones((6, 3))}}


def test_param_labels_cover_every_array() -> None:
    _, tree = combined()
    labels = jlora.param_labels(tree)
    assert set(jax.tree.leaves(labels["base"])) == {"frozen"}
    assert labels["head"] == {"kernel": "full"}
    for leaf in labels["adapter"].values():
        assert (leaf.a, leaf.b) == ("a", "b")


def test_lora_optimizer_frozen_base_is_unchanged() -> None:
    one, tree = combined()
    optimizer = jlora.lora_optimizer(optax.adam(1e-2))
    state = optimizer.init(tree)
    trained = arrays(tree["adapter"]) + arrays(tree["head"])
    # Adam keeps two moments of the trainable arrays, and step counts.
    assert arrays([x for x in jax.tree.leaves(state) if x.ndim]) == 2 * trained

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        def loss(tree: Any) -> jax.Array:
            output = one.lora.apply(tree["base"], tree["adapter"], *one.inputs)
            return total(output @ tree["head"]["kernel"])

        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    after = tree
    for _ in range(3):
        after, state = step(after, state)
    chex.assert_trees_all_equal(after["base"], tree["base"])
    for before, now in zip(
        jax.tree.leaves((tree["adapter"], tree["head"])),
        jax.tree.leaves((after["adapter"], after["head"])),
        strict=True,
    ):
        assert not np.array_equal(before, now)


def test_lora_optimizer_single_equals_transform() -> None:
    one = case("attention", "float32")
    gradient = one.gradient
    plain, ours = optax.adamw(1e-2), jlora.lora_optimizer(optax.adamw(1e-2))
    expected, _ = plain.update(gradient, plain.init(one.adapter), one.adapter)
    updates, _ = ours.update(gradient, ours.init(one.adapter), one.adapter)
    chex.assert_trees_all_equal(updates, expected)


def test_lora_optimizer_per_label_transforms() -> None:
    one = case("attention", "float32")
    optimizer = jlora.lora_optimizer({"a": optax.sgd(1.0), "b": optax.sgd(16.0)})
    gradient = jax.tree.map(jnp.ones_like, one.adapter)
    updates, _ = optimizer.update(gradient, optimizer.init(one.adapter), one.adapter)
    for leaf in updates.values():
        np.testing.assert_array_equal(leaf.a, -1)
        np.testing.assert_array_equal(leaf.b, -16)


@pytest.mark.parametrize(
    ("transforms", "error", "message"),
    [
        ({"a": optax.sgd(1.0)}, ValueError, r"\['a'\].*\['a', 'b'\]"),
        (
            {"a": optax.sgd(1.0), "b": optax.sgd(1.0), "c": optax.sgd(1.0)},
            ValueError,
            r"exactly one for each",
        ),
        (0.1, TypeError, r"optax.adamw.*got 0.1"),
        ({"a": 0.1}, TypeError, r"optax.adamw.*got 0.1"),
    ],
)
def test_lora_optimizer_wrong_labels_raise(transforms: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        jlora.lora_optimizer(transforms).init(case("attention", "float32").adapter)


def test_param_labels_weight_named_base_trained() -> None:
    fn = lambda p, x: x @ p["base"]
    params, x = {"base": jnp.ones((6, 5))}, jnp.ones((2, 6))
    adapter = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2)).init(
        jax.random.key(0), params, x
    )
    assert set(jax.tree.leaves(jlora.param_labels(adapter))) == {"a", "b"}


def test_lora_optimizer_passes_extra_args() -> None:
    one = case("attention", "float32")
    optimizer = jlora.lora_optimizer(optax.contrib.reduce_on_plateau())
    state = optimizer.init(one.adapter)
    updates, _ = optimizer.update(one.adapter, state, one.adapter, value=1.0)
    chex.assert_trees_all_close(updates, one.adapter)


def test_combine_inverts_partition() -> None:
    one = case("attention", "float32")
    trained, rest = jlora.partition(one.adapter, lambda label: label == "b")
    assert arrays(trained) == sum(leaf.b.size for leaf in one.adapter.values())
    assert arrays(trained) + arrays(rest) == arrays(one.adapter)
    chex.assert_trees_all_equal(jlora.combine(trained, rest), one.adapter)
    chex.assert_trees_all_equal(jlora.combine(rest, trained), one.adapter)
    everything, nothing = jlora.partition(one.adapter)
    assert arrays(nothing) == 0
    chex.assert_trees_all_equal(everything, one.adapter)


def test_partition_commutes_with_grad() -> None:
    one = case("attention", "float32")
    trained, rest = jlora.partition(one.adapter, lambda label: label == "b")
    loss = lambda b: total(one.lora.apply(one.params, jlora.combine(b, rest), *one.inputs))
    whole = one.gradient
    expected, _ = jlora.partition(whole, lambda label: label == "b")
    # Float32 through six products, fused otherwise.
    chex.assert_trees_all_close(jax.jit(jax.grad(loss))(trained), expected, rtol=2e-5, atol=2e-5)


def test_combine_bad_parts_raise() -> None:
    one = case("attention", "float32")
    trained, _ = jlora.partition(one.adapter, lambda label: label == "b")
    with pytest.raises(ValueError, match=r"array 'a' .*jlora.combine"):
        one.lora.apply(one.params, trained, *one.inputs)
    with pytest.raises(ValueError, match="2 of the 2 parts"):
        jlora.combine(one.adapter, one.adapter)
    with pytest.raises(ValueError, match="0 of the 2 parts"):
        jlora.combine(trained, trained)


def adapter_and_base() -> tuple[Any, Any, Any]:
    params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
    return lora, params, lora.init(jax.random.key(0), params, x)


@pytest.mark.parametrize("quantized", [False, True])
def test_lora_optimizer_unseen_base_raises(quantized: bool) -> None:
    _, params, adapter = adapter_and_base()
    if quantized:
        params = jlora.quantize(params, {"w": jlora.Int8()})
    optimizer = jlora.lora_optimizer(optax.sgd(0.1))
    for tree in ({"params": params, "adapter": adapter}, (params, adapter)):
        with pytest.raises(ValueError, match=r"the adapted weight 'w' at .* Put the base under"):
            optimizer.init(tree)
    optimizer.init({"base": params, "adapter": adapter})
    # A head of the same shape is not the weight.
    optimizer.init({"head": jnp.ones((6, 5)), "adapter": adapter})


def test_lora_optimizer_drops_float0() -> None:
    lora, params, adapter = adapter_and_base()
    base = jlora.quantize(params, {"w": jlora.Int8()})
    tree, x = {"base": base, "adapter": adapter}, jnp.ones((2, 6))
    loss = lambda t: lora.apply(t["base"], t["adapter"], x).sum()
    gradient = jax.grad(loss, allow_int=True)(tree)
    assert jax.dtypes.float0 in {leaf.dtype for leaf in jax.tree.leaves(gradient)}
    optimizer = jlora.lora_optimizer(optax.sgd(0.1))
    updates, _ = optimizer.update(gradient, optimizer.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    jax.tree.map(np.testing.assert_array_equal, after["base"], base)
    assert (after["adapter"]["w"].b != adapter["w"].b).any()
