"""jlora's pytree nodes in programs of `jax.export` and in bytes of `flax.serialization`."""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import FAMILIES
from jax import export

import jlora
from jlora import multi_lora

PARAMS = {"w": np.ones((64, 6), np.float32), "table": np.ones((6, 6), np.float32)}
X, TOKENS = np.ones((2, 64), np.float32), np.array([1, 2])


def forward(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    return x @ params["w"] + params["table"][tokens]


@functools.cache
def make_trees() -> dict[str, Any]:
    """An adapter of every family, quantized weights and slots, of made-up values."""
    trees: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        path = "table" if name == "token_rows" else "w"
        lora = jlora.lora_transform(forward, {path: family.config})
        trees[name] = jax.eval_shape(lora.init, jax.random.key(0), PARAMS, X, TOKENS)
    for scheme in (jlora.NF4(), jlora.NF4(double_quantization=False), jlora.Int8(), jlora.FP8()):
        quantize = functools.partial(jlora.quantize, rules={"w": scheme})
        trees[f"quantized {scheme}"] = jax.eval_shape(quantize, PARAMS)
    trees["slots"] = multi_lora.select_slot(multi_lora.empty_slots(trees["lora"], 2, 4), 1)
    return jax.tree.map(lambda x: (np.arange(x.size) % 7).reshape(x.shape).astype(x.dtype), trees)


def test_export_serializes_every_node() -> None:
    """Argument trees are part of a serialized program, with the static fields of their nodes."""
    trees = make_trees()
    x = jnp.ones((3, 2))
    exported = export.export(jax.jit(lambda trees, x: 2 * x))(trees, x)
    loaded = export.deserialize(exported.serialize())
    assert loaded.in_tree == exported.in_tree == jax.tree.structure(((trees, x), {}))
    np.testing.assert_array_equal(loaded.call(trees, x), 2 * x)


def test_export_of_apply_with_a_symbolic_batch() -> None:
    lora = jlora.lora_transform(forward, jlora.LoRA(rank=2, alpha=4))
    adapter = jax.tree.map(lambda a: a + 0.5, lora.init(jax.random.key(0), PARAMS, X, TOKENS))
    (batch,) = export.symbolic_shape("batch")
    shapes = (
        jax.ShapeDtypeStruct((batch, 64), np.float32),
        jax.ShapeDtypeStruct((batch,), np.int32),
    )
    program = export.export(jax.jit(lora.apply))(PARAMS, adapter, *shapes).serialize()
    for size in (1, 2):
        inputs = X[:size], TOKENS[:size].astype(np.int32)
        actual = export.deserialize(program).call(PARAMS, adapter, *inputs)
        np.testing.assert_allclose(actual, lora.apply(PARAMS, adapter, *inputs), rtol=1e-6)


def test_flax_bytes_restore_every_node() -> None:
    trees = make_trees()
    restored = flax.serialization.from_bytes(
        jax.tree.map(lambda a: jnp.zeros_like(a) + 1, trees), flax.serialization.to_bytes(trees)
    )
    assert jax.tree.structure(restored) == jax.tree.structure(trees)
    chex.assert_trees_all_equal(restored, trees)


def test_flax_bytes_of_another_config_raise() -> None:
    data = flax.serialization.to_bytes(make_trees()["lora"])
    for config in (jlora.LoRA(rank=2, alpha=9), jlora.DoRA(rank=2, alpha=3)):
        lora = jlora.lora_transform(forward, {"w": config})
        target = lora.init(jax.random.key(0), PARAMS, X, TOKENS)
        with pytest.raises(ValueError, match=r"in the state has.*Use a target of the same config"):
            flax.serialization.from_bytes(target, data)
