"""The product for TPUs, compiled ahead of time for one chip."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.kernels import lora_matmul
from jlora.planning import tpu_topology

# The compiler for TPUs takes ten CPU seconds to start.
pytestmark = pytest.mark.slow

pytest.importorskip("libtpu")

ROWS, WIDTH, INNER = 1024, 512, 2048


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["in"]) @ params["out"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    chip = tpu_topology.get_tpu_topology("v5e:2x2").devices[0]
    where = jax.sharding.SingleDeviceSharding(chip)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    params = {"in": shape(WIDTH, INNER), "out": shape(INNER, WIDTH)}
    x = shape(ROWS, WIDTH)
    lora = jlora.lora_transform(model, jlora.LoRA(rank=16, alpha=16))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), adapter)

    def loss(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
        return lora.apply(params, adapter, x).astype(jnp.float32).sum()

    found = {}
    for name, context in (("tpu", lora_matmul.tpu_products), ("plain", lora_matmul.plain_products)):
        with context():
            # A new function, because JAX caches the traces of earlier ones.
            gradient = jax.grad(lambda a, p, x: loss(a, p, x), argnums=(0, 2))
            found[name] = jax.jit(gradient).lower(adapter, params, x).compile().as_text()
    return found


def test_products_and_gradients_use_the_kernel(texts: dict[str, str]) -> None:
    # Forward the first alone: the second's result is summed, and nothing needs it.
    assert texts["tpu"].count('custom_call_target="tpu_custom_call"') == 3
    assert "tpu_custom_call" not in texts["plain"]
