"""Kernels on a Hopper GPU: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.kernels import hopper, lora_matmul, self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
# Relative to the norm of a result: its rounding to bfloat16, and that of a factor before it.
BOUND = 2.0**-8


def array(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def wide(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array.astype(jnp.float32)).astype(np.float64)


def relative_error(result: Any, expected: Any) -> float:
    expected = np.asarray(expected)
    return float(np.linalg.norm(wide(result) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_kernels_work_on_this_gpu(rank: int) -> None:
    assert self_test.kernels_work(rank)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n", "rank"),
    [(256, 64, 128, 16), (768, 192, 640, 8), (2048, 1024, 512, 64), (512, 4096, 256, 24)],
)
def test_hopper_matmul_add_equals_numpy(
    m: int, k: int, n: int, rank: int, transpose_rhs: bool
) -> None:
    x, t, b = array(0, m, k), array(1, m, rank), array(2, rank, n)
    w = array(3, n, k) if transpose_rhs else array(3, k, n)
    out = jax.jit(hopper.hopper_matmul_add, static_argnames="transpose_rhs")(
        x, w, t, b, transpose_rhs=transpose_rhs
    )
    matrix = wide(w).T if transpose_rhs else wide(w)
    assert relative_error(out, wide(x) @ matrix + wide(t) @ wide(b)) < BOUND


@pytest.mark.parametrize(
    ("m", "n", "rank"), [(256, 128, 16), (768, 640, 8), (4096, 2048, 32), (8192, 8192, 16)]
)
def test_lora_grads_equals_numpy(m: int, n: int, rank: int) -> None:
    dy, t, b = array(0, m, n), array(1, m, rank), array(2, rank, n)
    u, db = jax.jit(hopper.lora_grads)(dy, t, b)
    assert relative_error(u, wide(dy) @ wide(b).T) < BOUND
    assert relative_error(db, wide(t).T @ wide(dy)) < BOUND


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["in"]) @ params["out"].T


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("config", [jlora.LoRA(rank=8, alpha=16), jlora.DoRA(rank=8, alpha=16)])
def test_apply_and_gradient_equal_plain(config: Any, quantized: bool) -> None:
    params = {"in": 0.05 * array(0, 256, 512), "out": 0.05 * array(1, 128, 512)}
    if quantized:
        params = jlora.quantize(params, {".*": jlora.NF4()})
    x = array(2, 4, 64, 256)
    lora = jlora.lora_transform(model, config)
    adapter = lora.init(jax.random.key(3), params, x)
    adapter = jax.tree.map(
        lambda a: a + 0.05 * jax.random.normal(jax.random.key(4), a.shape), adapter
    )

    def loss(adapter: Any, x: jax.Array) -> jax.Array:
        return (lora.apply(params, adapter, x).astype(jnp.float32) ** 2).mean()

    assert "lora_matmul" in str(jax.make_jaxpr(loss)(adapter, x))
    result = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(adapter, x)
    with lora_matmul.plain_products():
        expected = jax.jit(jax.value_and_grad(lambda a, x: loss(a, x), argnums=(0, 1)))(adapter, x)
    for one, two in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        # Both round the same sums to bfloat16 four times, at different points.
        assert relative_error(one, wide(two)) < 4 * BOUND
