"""A different adapter for every row, on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.h100 import common
from benchmarks.h100.step import decoder, parameters
from jlora import multi_lora
from jlora.models.decoder import init_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
SHAPE = common.Shape(2, 512, 1024, 8, 2, 64, 512, 2, 32)
NAMES = [1, 0, 2, 3, 1, 0, 2, 0]


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "stacked"])
def given(request: pytest.FixtureRequest) -> Any:
    model = decoder(SHAPE, stacked=request.param, remat="nothing")
    params = parameters(model, None)
    tokens = jax.random.randint(jax.random.key(3), (len(NAMES), 64), 0, SHAPE.vocabulary)
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


def close(found: Any, expected: Any) -> None:
    """As near as two orders of summation in bfloat16 are, through two layers of 512 to 1024."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("length", [1, 64], ids=["one_token", "many_tokens"])
def test_rows_are_those_of_their_adapters_and_bare_rows_know_nothing_of_them(
    given: Any, length: int
) -> None:
    model, params, tokens, lora, slots, adapters = given
    tokens = tokens[:, :length]
    index = jnp.array(NAMES)
    run = jax.jit(lambda p, s, i, t: multi_lora.apply_per_example(lora, p, s, i, t))
    found = np.asarray(run(params, slots, index, tokens))
    bare = np.asarray(run(params, slots, jnp.zeros_like(index), tokens))
    base = np.asarray(jax.jit(model.apply)(params, tokens))
    alone = jax.jit(lora.apply)
    for row, number in enumerate(NAMES):
        if number:
            expected = alone(params, adapters[number - 1], tokens[row : row + 1])[0]
            close(found[row], expected)
            apart = np.linalg.norm(found[row] - base[row])
            assert apart > 0.1 * np.linalg.norm(base[row]), "the adapter changes something"
        else:
            # In another program the compiler may choose other kernels for the same products.
            np.testing.assert_array_equal(found[row], bare[row])
            close(found[row], base[row])


def test_decoding_with_a_cache_gives_what_the_whole_text_gives(given: Any) -> None:
    model, params, tokens, lora, slots, _ = given
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
    whole = multi_lora.apply_per_example(lora, params, slots, index, tokens[:, :length])
    close(logits[:, 0], whole[:, -1])
