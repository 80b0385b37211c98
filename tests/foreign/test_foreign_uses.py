"""Uses of these models beside a forward pass: dropout, caches, generation, training, sharding, and
updates of the package's own module."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _support.cases import moved, total
from foreign_models import (
    BATCH,
    BERT,
    FOREIGN,
    HEAD,
    HEADS,
    LENGTH,
    LORA,
    QWEN3,
    WIDTH,
    foreign_case,
    from_transformers,
    from_tunix,
    tokens,
)
from test_foreign_laws import GRADIENT, close

import jlora

pytestmark = FOREIGN


def test_apply_model_dropout_drops_same_entries() -> None:
    one = foreign_case("gpt2", "lora")

    def run(fn: Any, *trees: Any) -> Any:
        train = lambda key, *trees: fn(*trees, *one.inputs, train=True, dropout_rng=key)
        return jax.jit(train)(jax.random.key(3), *trees)

    ours = run(one.lora.apply, one.params, one.adapter)
    close(ours, run(one.fn, one.lora.merge(one.params, one.adapter)))
    assert not np.allclose(ours.logits, one.output.logits, atol=0.1), "nothing was dropped"


def test_apply_adapter_dropout() -> None:
    one = foreign_case("gpt2", "lora")
    config = jlora.LoRA(rank=3, alpha=4, dropout=0.5)
    lora = jlora.lora_transform(one.fn, config)
    adapter = moved(lora.init(jax.random.key(1), one.params, *one.inputs))
    run = jax.jit(lambda key: lora.apply(one.params, adapter, *one.inputs, dropout_key=key).logits)
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=0.1)


def test_rules_none_excludes_unused_pooler() -> None:
    made = from_transformers("FlaxBertModel", "BertConfig", (tokens(),), **BERT)
    encode = lambda params, x: made.fn(params, x).last_hidden_state
    lora = jlora.lora_transform(encode, {"pooler": None, "kernel$": LORA})
    adapter = moved(lora.init(jax.random.key(1), made.params, *made.inputs))
    assert len(adapter) == 12  # Six kernels in each of two layers.
    output = jax.jit(lora.apply)(made.params, adapter, *made.inputs)
    close(output, encode(lora.merge(made.params, adapter), *made.inputs))


# --- caches and generation -----------------------------------------------------------------------


def test_apply_gpt2_with_cache() -> None:
    one = foreign_case("gpt2", "lora")
    module = one.layer.module
    attended = jnp.ones((BATCH, LENGTH), int)

    def in_two_steps(params: Any, x: jax.Array) -> jax.Array:
        cache = module.init_cache(BATCH, LENGTH)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
        logits = []
        for part in (slice(0, 4), slice(4, LENGTH)):
            output = module(
                x[:, part],
                params=params,
                past_key_values=cache,
                attention_mask=attended,
                position_ids=positions[:, part],
            )
            cache = output.past_key_values
            logits.append(output.logits)
        return jnp.concatenate(logits, axis=1)

    lora = jlora.lora_transform(in_two_steps, {one.layer.adapted: LORA})
    close(jax.jit(lora.apply)(one.params, one.adapter, *one.inputs), one.output.logits)


def test_apply_qwen3_with_cache() -> None:
    one = foreign_case("qwen3", "lora")
    x, positions, _, mask = one.inputs
    cache = one.layer.module.init_cache(BATCH, LENGTH, jnp.float32)
    run = jax.jit(one.lora.apply)
    logits = []
    for part in (slice(0, 4), slice(4, LENGTH)):
        step, cache = run(
            one.params, one.adapter, x[:, part], positions[:, part], cache, mask[:, part]
        )
        logits.append(step)
    close(jnp.concatenate(logits, axis=1), one.output[0])
    assert int(cache["layer_1"]["end_index"][0]) == LENGTH


def test_generate_equals_merged_model() -> None:
    """The package's own loop, of a length that is not known, with its cache."""
    one = foreign_case("gpt2", "lora")

    def generate(params: Any, x: jax.Array) -> jax.Array:
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return one.layer.module.generate(x, params=params, **options).sequences

    lora = jlora.lora_transform(generate, {one.layer.adapted: LORA})
    written = jax.jit(lora.apply)(one.params, one.adapter, *one.inputs)
    merged = generate(one.lora.merge(one.params, one.adapter), *one.inputs)
    np.testing.assert_array_equal(written, merged)
    assert not np.array_equal(written, generate(one.params, *one.inputs))
    rows = lora.explain(one.params, *one.inputs).rows
    assert not [row.path for row in rows if row.dense_reasons and row.adapter != "frozen"]


# --- training, sharding, and back ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_training_lowers_loss_and_freezes_base(name: str) -> None:
    one = foreign_case(name, "lora")
    before = jax.tree.map(np.array, one.params)
    wanted = tokens(seed=1)
    optimizer = jlora.lora_optimizer(optax.adam(1e-2))

    def loss(adapter: Any) -> jax.Array:
        logits = jax.tree.leaves(one.lora.apply(one.params, adapter, *one.inputs))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    @jax.jit
    def step(adapter: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    adapter, state, values = one.fresh, optimizer.init(one.fresh), []
    for _ in range(30):
        adapter, state, value = step(adapter, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0], values
    chex.assert_trees_all_equal(one.params, before)


def test_update_nnx_with_merged_params() -> None:
    one = foreign_case("qwen3", "lora")
    module = from_tunix("qwen3", "Qwen3", **QWEN3).module
    close(module(*one.inputs), one.fn(one.params, *one.inputs))  # Made from the same seed.
    jlora.update_nnx(module, one.lora.merge(one.params, one.adapter))
    close(module(*one.inputs), one.output)


def test_apply_params_sharded_by_tunix() -> None:
    one = foreign_case("qwen3", "lora")
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    # The package draws every shard by itself, and so copies of one shard differ: only where it puts
    # them is of use here.
    places = jax.tree.map(
        lambda leaf: leaf.sharding, from_tunix("qwen3", "Qwen3", mesh=mesh, **QWEN3).params
    )
    params = jax.device_put(one.params, places)
    query = params["layers"][0]["attn"]["q_proj"]["w"].get_value()
    assert query.addressable_shards[0].data.shape == (WIDTH // 2, HEADS // 2, HEAD)
    close(jax.jit(one.lora.apply)(params, one.adapter, *one.inputs), one.output)
    slope = jax.jit(jax.grad(lambda a, p: total(one.lora.apply(p, a, *one.inputs))))
    close(slope(one.adapter, params), one.gradient, GRADIENT)
