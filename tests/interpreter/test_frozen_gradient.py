"""FLOPs and arrays of the gradient of a complete model, as counted by the compiler."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.hlo import weight_shaped_products
from _support.tiny_transformers import TOKENS, WIDTH, make

import jlora

RANK = 4


def loss(output: jax.Array) -> jax.Array:
    return jnp.square(output).mean()


@functools.cache
def compile_programs(kind: str) -> tuple[Any, Any, Any]:
    """Adapter, its compiled gradient, and the floor: forward pass and activation gradients."""
    model = make(kind)
    config = jlora.LoRA(rank=RANK, alpha=RANK)
    lora = jlora.lora_transform(model.forward, {model.adapted: config})
    adapter = jax.eval_shape(lora.init, jax.random.key(1), model.params, TOKENS)
    step = jax.jit(jax.grad(lambda a, p: loss(lora.apply(p, a, TOKENS))))
    embedded = jax.ShapeDtypeStruct((*TOKENS.shape, WIDTH), jnp.float32)
    floor = jax.jit(jax.grad(lambda x, p: loss(model.body(p, x))))
    return (
        adapter,
        step.lower(adapter, model.params).compile(),
        floor.lower(embedded, model.params).compile(),
    )


@pytest.fixture(params=["linen", "scanned", "nnx"])
def kind(request: pytest.FixtureRequest) -> str:
    """Kind of the transformer, whose programs are compiled before the test."""
    compile_programs(request.param)
    return request.param


def flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def adapter_flops(adapter: Any) -> float:
    """FLOPs of the products with A and B.

    Per token and entry of a factor: 2 in the forward pass, and 4 for the gradients of factor and
    activation.
    """
    total = 0
    for path, leaf in adapter.items():
        # The compiler counts the body of a scan once.
        layers = leaf.a.shape[0] if leaf.axes.batch else 1
        looked_up = "embedding" in path
        entries = leaf.b.size if looked_up else leaf.a.size + leaf.b.size
        total += 6 * TOKENS.size * entries / layers
    return total


def test_gradient_flops_have_no_frozen_part(kind: str) -> None:
    adapter, step, floor = compile_programs(kind)
    np.testing.assert_allclose(flops(step), flops(floor) + adapter_flops(adapter), rtol=0.02)


def test_gradient_has_no_weight_shaped_product(kind: str) -> None:
    adapter, step, _ = compile_programs(kind)
    shapes = {leaf.shape for leaf in adapter.values()}
    assert len(shapes) == 5
    assert not weight_shaped_products(step.as_text(), shapes)


def test_checks_full_fine_tuning_fails_both(kind: str) -> None:
    """Without this, the checks could be void."""
    adapter, step, floor = compile_programs(kind)
    model = make(kind)
    full = jax.jit(jax.grad(lambda p: loss(model.forward(p, TOKENS)), allow_int=True))
    program = full.lower(model.params).compile()
    assert flops(program) > 1.3 * flops(floor)
    assert flops(program) > 1.1 * flops(step)
    assert weight_shaped_products(program.as_text(), {leaf.shape for leaf in adapter.values()})


def test_optimizer_has_no_frozen_moments() -> None:
    adapter, _, _ = compile_programs("scanned")
    state = jax.eval_shape(jlora.lora_optimizer(optax.adam(1e-3)).init, adapter)
    entries = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert entries == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapter))
