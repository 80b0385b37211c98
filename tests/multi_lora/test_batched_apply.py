"""Every row of a batch with the adapter of its own slot."""

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
# Layers whose inputs have rows along their first axis.
BY_ROW = ["dense", "dense_general", "linen_scan_remat", "tied_embedding", "conv_2d", "in_jit"]


@pytest.fixture(params=["apart", "stacked"])
def layers(request: pytest.FixtureRequest) -> Setting:
    """With layers apart and in a stack, in float32."""
    return setting(request.param == "stacked", "float32")


@pytest.fixture
def apart() -> Setting:
    """With layers apart, in float32."""
    return setting(False, "float32")


def slots_of(fresh: Any, adapters: list[Any], rank: int = 3) -> multi_lora.Slots:
    """Slots 1, 2, ... with these adapters."""
    slots = multi_lora.empty_slots(fresh, len(adapters) + 1, rank)
    for number, adapter in enumerate(adapters, 1):
        slots = multi_lora.set_slot(slots, number, multi_lora.pad_to_slot(adapter, slots))
    return slots


@pytest.mark.parametrize("name", BY_ROW)
def test_law_a_row_is_that_of_its_adapter_alone(name: str) -> None:
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
        held = one.fresh if slot == 0 else adapters[int(slot) - 1]
        expected = one.compiled(one.params, held, row[None])
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, n=number: np.asarray(leaf)[n : n + 1], rows),
            expected,
            **FLOAT32,
        )


@pytest.mark.parametrize("length", [1, 9], ids=["few_tokens", "many_tokens"])
def test_rows_of_a_decoder_are_those_of_their_adapters(layers: Setting, length: int) -> None:
    tokens = layers.tokens(len(NAMES), length)
    found = layers.shared.apply(layers.params, NAMES, tokens)
    np.testing.assert_allclose(found, layers.expected(NAMES, tokens), **FLOAT32)


@pytest.mark.parametrize(
    ("scanned", "dtype", "length"),
    [
        *((scanned, "float32", length) for scanned in (False, True) for length in (1, 9)),
        (False, "bfloat16", 1),
        pytest.param(False, "bfloat16", 9, marks=pytest.mark.slow),
        pytest.param(True, "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param(True, "bfloat16", 9, marks=pytest.mark.slow),
    ],
)
def test_law_rows_of_the_bare_base_are_those_of_the_base_to_the_bit(
    scanned: bool, dtype: str, length: int
) -> None:
    given = setting(scanned, dtype)
    tokens = given.tokens(len(NAMES), length)
    found = np.asarray(given.shared.apply(given.params, NAMES, tokens))
    base = np.asarray(given.bare(given.params, tokens))
    bare = [row for row, name in enumerate(NAMES) if name is None]
    np.testing.assert_array_equal(found[bare].view(np.uint32), base[bare].view(np.uint32))
    assert (found[0] != base[0]).any()


def test_whatever_lies_in_the_first_slot_changes_nothing() -> None:
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


def test_other_orders_of_a_batch_gives_the_same_rows(apart: Setting) -> None:
    bank = apart.shared
    names: list[str | None] = ["a", "b", None, "c", "a", None]
    tokens = apart.tokens(6, 9)
    found = np.asarray(bank.apply(apart.params, names, tokens))
    for order in itertools.islice(itertools.permutations(range(6)), 0, None, 60):
        turned = bank.apply(apart.params, [names[n] for n in order], tokens[list(order)])
        np.testing.assert_array_equal(turned, found[list(order)])


@pytest.mark.parametrize("length", [1, 9])
def test_law_a_nan_adapter_reaches_only_its_own_rows(layers: Setting, length: int) -> None:
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


@pytest.mark.parametrize("wrong", [-1, 4, 10**6])
@pytest.mark.parametrize("length", [1, 9])
def test_a_slot_that_is_not_there_gives_nan_and_nobody_elses_adapter(
    apart: Setting, wrong: int, length: int
) -> None:
    slots, index = apart.shared.slots_for(["a", None, "c"])
    index[1] = wrong
    tokens = apart.tokens(3, length)
    run = jax.jit(lambda s, i: multi_lora.apply_per_example(apart.lora, apart.params, s, i, tokens))
    found = np.asarray(run(slots, index))
    assert np.isnan(found[1]).all()
    expected = apart.expected(["a", None, "c"], tokens)
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], **FLOAT32)
    with pytest.raises(ValueError, match=rf"index\[1\]={wrong} is none of the slots 0 to 3"):
        multi_lora.check_slot_index(index, slots)


def test_one_slot_for_all_rows_is_an_adapter_as_any(apart: Setting) -> None:
    slots, (slot,) = apart.shared.slots_for(["b"])
    tokens = apart.tokens(2, 9)
    found = jax.jit(apart.lora.apply)(apart.params, multi_lora.select_slot(slots, slot), tokens)
    np.testing.assert_allclose(found, apart.expected(["b", "b"], tokens), **FLOAT32)
    merged = apart.lora.merge(apart.params, multi_lora.select_slot(slots, slot))
    chex.assert_trees_all_close(
        merged, apart.lora.merge(apart.params, apart.adapters["b"]), rtol=1e-6, atol=1e-6
    )  # The scale is multiplied in before the product instead of after it.


def test_a_base_product_is_that_of_the_whole_batch_and_factors_are_not_copied_whole(
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
    held = next(iter(slots.values()))
    if held.axes.batch:  # A stack's factors are chosen from layer by layer.
        count, *_ = held.axis_sizes.batch
        rows_of_all = f"f32[3,{count},{held.rank},"
        assert rows_of_all not in text


def test_gradients_of_slots_are_those_of_each_adapter(apart: Setting) -> None:
    slots, index = apart.shared.slots_for(NAMES)
    tokens = apart.tokens(len(NAMES), 5)
    weights = jnp.arange(1.0, 1 + len(NAMES))

    def loss(slots: Any) -> jax.Array:
        out = multi_lora.apply_per_example(apart.lora, apart.params, slots, index, tokens)
        return (weights * jnp.sin(out).sum((1, 2))).sum()

    found = jax.jit(jax.grad(loss))(slots)
    rows = [row for row, name in enumerate(NAMES) if name == "c"]

    def alone(adapter: Any) -> jax.Array:
        out = apart.lora.apply(apart.params, adapter, tokens[rows])
        return (weights[np.array(rows)] * jnp.sin(out).sum((1, 2))).sum()

    expected = jax.jit(jax.grad(alone))(apart.adapters["c"])
    slot = index[NAMES.index("c")]
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path].a[slot].T, leaf.a, rtol=1e-4, atol=1e-4)
        # The slots have the scale in B, so its gradient is that of B over the scale.
        own = np.asarray(leaf.b) / apart.adapters["c"][path].scale
        np.testing.assert_allclose(found[path].b[slot], own, rtol=1e-4, atol=1e-4)
        assert not np.asarray(found[path].a[0]).any(), "the bare base has no gradient"


@pytest.mark.parametrize(
    "scanned", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["apart", "stacked"]
)
def test_texts_are_written_with_each_rows_adapter(scanned: bool) -> None:
    layers = setting(scanned, "float32")
    model, params = layers.model, layers.params
    slots, index = layers.shared.slots_for(["a", None, "c"])
    prompts = layers.tokens(3, 3)
    axes = multi_lora.infer_batch_axes(lambda rows: models.init_cache(model, rows, 3 + 5))

    def by_row(given: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        return multi_lora.apply_per_example(
            layers.lora,
            given["base"],
            given["slots"],
            given["index"],
            *(ids, mask, positions, cache),
            batch_axes=(0, 0, 0, axes),
        )

    given = {"base": params, "slots": slots, "index": index}
    found = models.generate(model, given, prompts, max_new_tokens=5, apply=by_row)
    for row, name in enumerate(["a", None, "c"]):
        apply = lambda p, *args: layers.lora.apply(p["base"], p["adapter"], *args)
        adapter = {} if name is None else layers.adapters[name]
        alone = models.generate(
            model,
            {"base": params, "adapter": adapter},
            prompts[row : row + 1],
            max_new_tokens=5,
            apply=apply,
        )
        np.testing.assert_array_equal(found.tokens[row], alone.tokens[0])


def test_rows_can_be_split_over_devices(apart: Setting) -> None:
    slots, index = apart.shared.slots_for(["a", None, "c", "b"])
    tokens = apart.tokens(4, 5)
    on = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(on, PartitionSpec("data"))
    run = jax.jit(lambda s, i, t: multi_lora.apply_per_example(apart.lora, apart.params, s, i, t))
    found = run(slots, jax.device_put(index, split), jax.device_put(tokens, split))
    expected = apart.expected(["a", None, "c", "b"], tokens)
    np.testing.assert_allclose(found, expected, **FLOAT32)
    assert found.sharding.spec[0] == "data"


def test_rows_of_inputs_that_do_not_fit_are_refused(apart: Setting) -> None:
    slots, index = apart.shared.slots_for(["a", "b"])
    run = lambda *inputs, **options: multi_lora.apply_per_example(
        apart.lora, apart.params, slots, *inputs, **options
    )
    with pytest.raises(ValueError, match=r"its axis 0 is not one of 2 rows"):
        run(index, apart.tokens(3, 4))
    with pytest.raises(ValueError, match=r"not one slot for each row"):
        run(np.float32([0.0, 1.0]), apart.tokens(2, 4))
    with pytest.raises(ValueError, match=r"its axis 2 is not one"):
        run(index, apart.tokens(2, 4), batch_axes=2)


def test_an_output_whose_rows_cannot_be_told_is_refused() -> None:
    fn = lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T
    params = {"w": jnp.ones((6, 5))}
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
    fresh = lora.init(jax.random.key(0), params, jnp.ones((3, 6)))
    slots = slots_of(fresh, [fresh])
    with pytest.raises(ValueError, match="along several axes"):
        multi_lora.apply_per_example(lora, params, slots, jnp.array([0, 1, 1]), jnp.ones((3, 6)))


def test_what_all_rows_share_and_other_axes_are_kept() -> None:
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
