"""Every family under strict dtype promotion, where JAX mixes no types by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import FAMILIES, moved

import jlora

PARAMS = {
    "w": jnp.asarray(np.linspace(-1, 1, 66).reshape(6, 11), jnp.bfloat16),
    "table": jnp.asarray(np.linspace(-1, 1, 66).reshape(6, 11), jnp.bfloat16),
}
INPUTS = jnp.ones((2, 6), jnp.bfloat16), np.array([1, 2])


def forward(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    return x @ params["w"] + params["table"][tokens]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.thin(6)
def test_family_under_strict_promotion(name: str) -> None:
    """bfloat16 weights with float32 factors, as trained."""
    rules = {"table" if name == "token_rows" else "w": FAMILIES[name].config}
    lora = jlora.lora_transform(forward, rules)
    adapter = moved(lora.init(jax.random.key(0), PARAMS, *INPUTS))
    expected = lora.apply(PARAMS, adapter, *INPUTS)

    def loss(adapter: Any) -> jax.Array:
        output = lora.apply(PARAMS, adapter, *INPUTS, dropout_key=jax.random.key(1))
        return output.astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lora.init, jax.random.key(0), PARAMS, *INPUTS)
        jax.eval_shape(jax.grad(loss), adapter)
        if FAMILIES[name].merges:
            jax.eval_shape(lora.merge, PARAMS, adapter)
        np.testing.assert_array_equal(lora.apply(PARAMS, adapter, *INPUTS), expected)


@pytest.mark.parametrize(
    "scheme", [jlora.NF4(), jlora.Int8(), jlora.FP8()], ids=lambda scheme: scheme.name
)
def test_quantized_base_under_strict_promotion(scheme: Any) -> None:
    params = jlora.quantize({"w": jnp.ones((64, 6), jnp.bfloat16)}, {"w": scheme})
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DoRA(rank=2, alpha=3))
    x = jnp.ones((2, 64), jnp.bfloat16)
    adapter = lora.init(jax.random.key(0), params, x)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(
            jax.grad(lambda a: lora.apply(params, a, x).astype("float32").sum()), adapter
        )
        jax.eval_shape(lambda: jlora.quantize({"w": jnp.ones((64, 6))}, {"w": scheme}))
