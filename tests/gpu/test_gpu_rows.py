"""A different adapter for every example of a batch, on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support import train_steps
from flax.core import meta

import jlora
from jlora import multi_lora
from jlora.models.decoder import init_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
SIZE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "num_layers": 2,
}
NAMES = [1, 0, 2, 3, 1, 0, 2, 0]


def random_params(model: Any) -> Any:
    """Random matrices in bfloat16, and norm scales of one."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), token))
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, jnp.bfloat16)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module", params=[False, True], ids=["layers", "scan_layers"])
def setting(request: pytest.FixtureRequest) -> Any:
    model = train_steps.decoder(SIZE, scan_layers=request.param, dtype=jnp.bfloat16)
    params = random_params(model)
    tokens = jax.random.randint(jax.random.key(3), (len(NAMES), 64), 0, SIZE["vocab_size"])
    lora = jlora.lora_transform(model.apply, {r"layers.*kernel": jlora.LoRA(rank=16, alpha=16)})
    like = lora.init(jax.random.key(0), params, tokens)
    slots = multi_lora.empty_slots(like, 4, 16, jnp.bfloat16)
    adapters = []
    for number in range(1, 4):
        keys = iter(jax.random.split(jax.random.key(number), 99))
        noise = lambda leaf, keys=keys: 0.02 * jax.random.normal(next(keys), leaf.shape)
        adapters.append(jax.tree.map(noise, like))
        slots = multi_lora.set_slot(slots, number, multi_lora.pad_to_slot(adapters[-1], slots))
    return model, params, tokens, lora, slots, adapters


def close(result: Any, expected: Any) -> None:
    """Asserts equality up to the order of bfloat16 sums in two layers of width 512 to 1024."""
    result, expected = (np.asarray(x, np.float32) for x in (result, expected))
    assert np.linalg.norm(result - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("length", [1, 64], ids=["one_token", "many_tokens"])
def test_apply_per_example_equals_single_calls(setting: Any, length: int) -> None:
    model, params, tokens, lora, slots, adapters = setting
    tokens = tokens[:, :length]
    index = jnp.array(NAMES)
    run = jax.jit(lambda p, s, i, t: multi_lora.apply_per_example(lora, p, s, i, t))
    outputs = np.asarray(run(params, slots, index, tokens))
    bare = np.asarray(run(params, slots, jnp.zeros_like(index), tokens))
    base = np.asarray(jax.jit(model.apply)(params, tokens))
    alone = jax.jit(lora.apply)
    for row, number in enumerate(NAMES):
        if number:
            expected = alone(params, adapters[number - 1], tokens[row : row + 1])[0]
            close(outputs[row], expected)
            apart = np.linalg.norm(outputs[row] - base[row])
            assert apart > 0.1 * np.linalg.norm(base[row]), "the adapter must change the output"
        else:
            # In another program the compiler may choose other kernels for the same products.
            np.testing.assert_array_equal(outputs[row], bare[row])
            close(outputs[row], base[row])


def test_decode_with_cache_equals_full_text(setting: Any) -> None:
    model, params, tokens, lora, slots, _ = setting
    index, length = jnp.array(NAMES), 8
    axes = multi_lora.infer_batch_axes(lambda rows: init_cache(model, rows, length, jnp.bfloat16))
    ones = jnp.ones((len(NAMES), 1), jnp.int32)

    @jax.jit
    def step(cache: Any, token: Any, place: Any) -> Any:
        inputs = (token, ones, place * ones, cache)
        return multi_lora.apply_per_example(
            lora, params, slots, index, *inputs, batch_axes=(0, 0, 0, axes)
        )

    cache = init_cache(model, len(NAMES), length, jnp.bfloat16)
    for place in range(length):
        logits, cache = step(cache, tokens[:, place : place + 1], place)
    full = multi_lora.apply_per_example(lora, params, slots, index, tokens[:, :length])
    close(logits[:, 0], full[:, -1])
