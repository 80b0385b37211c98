"""Batches in which each example has the adapter of its own slot."""

from __future__ import annotations

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import case, moved, total
from _support.layer_zoo import normal
from _support.many_decoders import Setting, setting
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora import models, multi_lora

# Sums of at most 64 products of numbers near one in float32, in another order, through two layers.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
NAMES = ["c", None, "a", "b", "c", None]
# Layers whose inputs have the batch along their first axis.
BATCH_FIRST = ["dense", "dense_general", "linen_scan_remat", "tied_embedding", "conv_2d", "in_jit"]


@pytest.fixture(params=["separate", "scanned"])
def layers(request: pytest.FixtureRequest) -> Setting:
    """The decoder with separate and with scanned layers, in float32."""
    return setting(request.param == "scanned", "float32")


@pytest.fixture
def given(request: pytest.FixtureRequest) -> Setting:
    """The decoder of (scanned, dtype)."""
    return setting(*request.param)


@pytest.fixture
def separate() -> Setting:
    """The decoder with separate layers, in float32."""
    return setting(False, "float32")


def slots_of(fresh: Any, adapters: list[Any], rank: int = 3) -> multi_lora.Slots:
    """Slots 1, 2, ... with these adapters."""
    slots = multi_lora.empty_slots(fresh, len(adapters) + 1, rank)
    for number, adapter in enumerate(adapters, 1):
        slots = multi_lora.set_slot(slots, number, multi_lora.pad_to_slot(adapter, slots))
    return slots


@pytest.mark.parametrize("name", BATCH_FIRST)
def test_law_apply_per_example_matches_each_alone(name: str) -> None:
    one = case(name, "float32")
    adapters = [moved(one.fresh, seed) for seed in (3, 4)]
    slots = slots_of(one.fresh, adapters)
    (x,) = one.inputs
    x = np.concatenate([x, np.roll(x, 1, -1)])[:4]
    index = np.array([2, 0, 1, 2][: len(x)], np.int32)
    rows = jax.jit(lambda s, i, x: multi_lora.apply_per_example(one.lora, one.params, s, i, x))(
        slots, index, x
    )
    for number, (slot, row) in enumerate(zip(index, x, strict=True)):
        adapter = one.fresh if slot == 0 else adapters[int(slot) - 1]
        expected = one.compiled(one.params, adapter, row[None])
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, n=number: np.asarray(leaf)[n : n + 1], rows),
            expected,
            **FLOAT32,
        )


@pytest.mark.parametrize("length", [1, 9], ids=["few_tokens", "many_tokens"])
@pytest.mark.slow
def test_bank_apply_decoder_matches_each_alone(layers: Setting, length: int) -> None:
    tokens = layers.tokens(len(NAMES), length)
    found = layers.shared.apply(layers.params, NAMES, tokens)
    np.testing.assert_allclose(found, layers.expected(NAMES, tokens), **FLOAT32)


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ((False, "float32"), 1),
        ((True, "float32"), 9),
        pytest.param((False, "float32"), 9, marks=pytest.mark.slow),
        pytest.param((True, "float32"), 1, marks=pytest.mark.slow),
        pytest.param((False, "bfloat16"), 1, marks=pytest.mark.slow),
        pytest.param((False, "bfloat16"), 9, marks=pytest.mark.slow),
        pytest.param((True, "bfloat16"), 1, marks=pytest.mark.slow),
        pytest.param((True, "bfloat16"), 9, marks=pytest.mark.slow),
    ],
    indirect=["given"],
)
def test_law_apply_slot_zero_is_base_bitwise(given: Setting, length: int) -> None:
    tokens = given.tokens(len(NAMES), length)
    found = np.asarray(given.shared.apply(given.params, NAMES, tokens))
    base = np.asarray(given.bare(given.params, tokens))
    bare = [row for row, name in enumerate(NAMES) if name is None]
    np.testing.assert_array_equal(found[bare].view(np.uint32), base[bare].view(np.uint32))
    assert (found[0] != base[0]).any()


def test_apply_ignores_contents_of_slot_zero() -> None:
    fn = lambda p, x: x @ p["w"]
    params = {"w": np.full((6, 5), 0.5, np.float32)}
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
    x = normal(1, (2, 6), np.float32)
    fresh = lora.init(jax.random.key(0), params, x)
    slots = slots_of(fresh, [moved(fresh)])
    for value in (jnp.nan, 1.0):
        filled = multi_lora.pad_to_slot(
            jax.tree.map(lambda a, v=value: np.full(a.shape, v, a.dtype), fresh), slots
        )
        slots = multi_lora.set_slot(slots, 0, filled)
        rows = multi_lora.apply_per_example(lora, params, slots, jnp.array([0, 1]), x)
        np.testing.assert_array_equal(rows[0], fn(params, x)[0])


def test_bank_apply_permuted_batch_same_outputs(separate: Setting) -> None:
    bank = separate.shared
    names: list[str | None] = ["a", "b", None, "c", "a", None]
    tokens = separate.tokens(6, 9)
    found = np.asarray(bank.apply(separate.params, names, tokens))
    for order in itertools.islice(itertools.permutations(range(6)), 0, None, 60):
        permuted = bank.apply(separate.params, [names[n] for n in order], tokens[list(order)])
        np.testing.assert_array_equal(permuted, found[list(order)])


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.thin(3)
def test_law_nan_adapter_stays_in_its_examples(layers: Setting, length: int) -> None:
    broken = jax.tree.map(np.array, layers.adapters["a"])
    for leaf in jax.tree.leaves(broken):
        leaf[..., 0] = np.nan
    layers.shared.add("broken", broken, allow_nonfinite=True)
    tokens = layers.tokens(len(NAMES), length)
    names = ["broken" if name == "a" else name for name in NAMES]
    try:
        found = np.asarray(layers.shared.apply(layers.params, names, tokens))
    finally:
        layers.shared.remove("broken")
    own = np.array([name == "a" for name in NAMES])
    assert np.isnan(found[own]).all()
    np.testing.assert_allclose(found[~own], layers.expected(NAMES, tokens)[~own], **FLOAT32)


@pytest.mark.parametrize("length", [1, 9])
def test_apply_nonexistent_slot_gives_nan(separate: Setting, length: int) -> None:
    slots, index = separate.shared.slots_for(["a", None, "c"])
    tokens = separate.tokens(3, length)
    expected = separate.expected(["a", None, "c"], tokens)
    run = jax.jit(
        lambda s, i: multi_lora.apply_per_example(separate.lora, separate.params, s, i, tokens)
    )
    for wrong in (-1, 4, 10**6):
        index[1] = wrong
        found = np.asarray(run(slots, index))
        assert np.isnan(found[1]).all()
        np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], **FLOAT32)
        message = rf"index\[1\]={wrong} must be one of the slots 0 to 3"
        with pytest.raises(ValueError, match=message):
            multi_lora.check_slot_index(index, slots)


def test_select_slot_applies_and_merges(separate: Setting) -> None:
    slots, (slot,) = separate.shared.slots_for(["b"])
    tokens = separate.tokens(2, 9)
    found = jax.jit(separate.lora.apply)(
        separate.params, multi_lora.select_slot(slots, slot), tokens
    )
    np.testing.assert_allclose(found, separate.expected(["b", "b"], tokens), **FLOAT32)
    merged = separate.lora.merge(separate.params, multi_lora.select_slot(slots, slot))
    chex.assert_trees_all_close(
        merged, separate.lora.merge(separate.params, separate.adapters["b"]), rtol=1e-6, atol=1e-6
    )  # The scale is multiplied in before the product instead of after it.


@pytest.mark.slow
def test_apply_repeats_neither_base_nor_factors(
    layers: Setting,
) -> None:
    slots, index = layers.shared.slots_for(["a", "b", "c"])
    tokens = layers.tokens(3, 1)
    text = str(
        jax.make_jaxpr(lambda p, s, i, t: multi_lora.apply_per_example(layers.lora, p, s, i, t))(
            layers.params, slots, index, tokens
        )
    )
    for leaf in jax.tree.leaves(layers.params):
        repeated = ",".join(map(str, (3, *leaf.shape)))
        assert f"f32[{repeated}]" not in text, "a weight is repeated for every row"
    leaf = next(iter(slots.values()))
    if leaf.axes.batch:  # Factors of scanned layers are selected layer by layer.
        count, *_ = leaf.axis_sizes.batch
        all_factors = f"f32[3,{count},{leaf.rank},"
        assert all_factors not in text


@pytest.mark.slow
def test_apply_gradients_match_each_adapter(separate: Setting) -> None:
    slots, index = separate.shared.slots_for(NAMES)
    tokens = separate.tokens(len(NAMES), 5)
    weights = jnp.arange(1.0, 1 + len(NAMES))

    def loss(slots: Any) -> jax.Array:
        out = multi_lora.apply_per_example(separate.lora, separate.params, slots, index, tokens)
        return (weights * jnp.sin(out).sum((1, 2))).sum()

    found = jax.jit(jax.grad(loss))(slots)
    rows = [row for row, name in enumerate(NAMES) if name == "c"]

    def alone(adapter: Any) -> jax.Array:
        out = separate.lora.apply(separate.params, adapter, tokens[rows])
        return (weights[np.array(rows)] * jnp.sin(out).sum((1, 2))).sum()

    expected = jax.jit(jax.grad(alone))(separate.adapters["c"])
    slot = index[NAMES.index("c")]
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path].a[slot].T, leaf.a, rtol=1e-4, atol=1e-4)
        # The slots have the scale in B, so its gradient is that of B over the scale.
        own = np.asarray(leaf.b) / separate.adapters["c"][path].scale
        np.testing.assert_allclose(found[path].b[slot], own, rtol=1e-4, atol=1e-4)
        assert not np.asarray(found[path].a[0]).any(), "the bare base has no gradient"


@pytest.mark.parametrize(
    "scanned", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["separate", "scanned"]
)
@pytest.mark.slow
def test_generate_with_slots_matches_each_alone(scanned: bool) -> None:
    layers = setting(scanned, "float32")
    model, params = layers.model, layers.params
    slots, index = layers.shared.slots_for(["a", None, "c"])
    prompts = layers.tokens(3, 3)
    axes = multi_lora.infer_batch_axes(lambda rows: models.init_cache(model, rows, 3 + 5))

    def apply_with_slots(given: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        return multi_lora.apply_per_example(
            layers.lora,
            given["base"],
            given["slots"],
            given["index"],
            *(ids, mask, positions, cache),
            batch_axes=(0, 0, 0, axes),
        )

    given = {"base": params, "slots": slots, "index": index}
    found = models.generate(model, given, prompts, max_new_tokens=5, apply=apply_with_slots)
    apply = lambda p, *args: layers.lora.apply(p["base"], p["adapter"], *args)
    for row, name in enumerate(["a", None, "c"]):
        prompt = prompts[row : row + 1]
        if name is None:
            alone = models.generate(model, params, prompt, max_new_tokens=5)
        else:
            given = {"base": params, "adapter": layers.adapters[name]}
            alone = models.generate(model, given, prompt, max_new_tokens=5, apply=apply)
        np.testing.assert_array_equal(found.tokens[row], alone.tokens[0])


@pytest.mark.slow
def test_apply_sharded_batch_matches_each_alone(separate: Setting) -> None:
    slots, index = separate.shared.slots_for(["a", None, "c", "b"])
    tokens = separate.tokens(4, 5)
    on = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(on, PartitionSpec("data"))
    run = jax.jit(
        lambda s, i, t: multi_lora.apply_per_example(separate.lora, separate.params, s, i, t)
    )
    found = run(slots, jax.device_put(index, split), jax.device_put(tokens, split))
    expected = separate.expected(["a", None, "c", "b"], tokens)
    np.testing.assert_allclose(found, expected, **FLOAT32)
    assert found.sharding.spec[0] == "data"


def test_apply_wrong_batch_size_raises(separate: Setting) -> None:
    slots, index = separate.shared.slots_for(["a", "b"])
    run = lambda *inputs, **options: multi_lora.apply_per_example(
        separate.lora, separate.params, slots, *inputs, **options
    )
    with pytest.raises(ValueError, match=r"its axis 0 must have size 2"):
        run(index, separate.tokens(3, 4))
    with pytest.raises(ValueError, match=r"one slot for each example"):
        run(np.float32([0.0, 1.0]), separate.tokens(2, 4))
    with pytest.raises(ValueError, match=r"its axis 2 must have size 2"):
        run(index, separate.tokens(2, 4), batch_axes=2)


def test_apply_ambiguous_output_axis_raises() -> None:
    fn = lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T
    params = {"w": jnp.ones((6, 5))}
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
    fresh = lora.init(jax.random.key(0), params, jnp.ones((3, 6)))
    slots = slots_of(fresh, [fresh])
    with pytest.raises(ValueError, match="differ along several axes"):
        multi_lora.apply_per_example(lora, params, slots, jnp.array([0, 1, 1]), jnp.ones((3, 6)))


def test_apply_shared_inputs_and_other_batch_axes() -> None:
    def fn(p: Any, x: jax.Array, scale: jax.Array, flag: bool) -> dict[str, jax.Array]:
        assert flag is True
        y = jnp.einsum("tbd,dk->tbk", x, p["w"]) * scale
        return {"y": y, "shared": scale + 1}

    params = {"w": normal(0, (6, 5), np.float32)}
    x = normal(1, (4, 2, 6), np.float32)
    scale = jnp.arange(5.0)
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
    adapter = moved(lora.init(jax.random.key(2), params, x, scale, True))
    slots = slots_of(adapter, [adapter])
    axes = (1, None, None)
    found = multi_lora.apply_per_example(
        lora, params, slots, jnp.array([0, 1]), x, scale, True, batch_axes=axes
    )
    expected = lora.apply(params, adapter, x, scale, True)["y"]
    np.testing.assert_allclose(found["y"][:, 1], expected[:, 1], **FLOAT32)
    np.testing.assert_array_equal(found["y"][:, 0], fn(params, x, scale, True)["y"][:, 0])
    assert found["y"].shape == (4, 2, 5)
    np.testing.assert_array_equal(found["shared"], scale + 1)
    assert np.isfinite(total(found))
