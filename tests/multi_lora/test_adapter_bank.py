"""AdapterBank: adding, replacing and removing adapters, eviction to the host and to files."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import moved
from safetensors.numpy import save_file

import jlora
from jlora import multi_lora
from jlora.multi_lora.host_cache import CachedAdapter, HostCache
from jlora.multi_lora.slots import PaddedFactors

# Sums of at most 6 products of numbers near one in float32, in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
X = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)


def forward(params: Any, x: jax.Array, *, twice: bool = False) -> jax.Array:
    y = jnp.tanh(x @ params["first"]) @ params["second"]
    return 2 * y if twice else y


@functools.cache
def make_model() -> tuple[jlora.LoraTransform, Any, Any]:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(keys[0], (6, 5)),
        "second": jax.random.normal(keys[1], (5, 7)),
    }
    lora = jlora.lora_transform(forward, jlora.LoRA(rank=2, alpha=3))
    return lora, params, lora.init(jax.random.key(1), params, X)


def adapter(seed: int) -> Any:
    return moved(make_model()[2], seed)


def bank_of(slots: int, **options: Any) -> multi_lora.AdapterBank:
    lora, params, like = make_model()
    return multi_lora.AdapterBank(lora, params, like, slots=slots, **options)


def check_outputs(
    bank: multi_lora.AdapterBank, names: list[str | None], adapters: dict[str, Any]
) -> None:
    lora, params, _ = make_model()
    outputs = bank.apply(params, names, X[: len(names)])
    for row, name in enumerate(names):
        adapter = {} if name is None else adapters[name]
        expected = lora.apply(params, adapter, X[row : row + 1])
        np.testing.assert_allclose(outputs[row : row + 1], expected, **FLOAT32)


def test_bank_changes_recompile_nothing() -> None:
    bank = bank_of(3)
    adapters = {"a": adapter(1), "b": adapter(2)}
    for name, one in adapters.items():
        bank.add(name, one)
    check_outputs(bank, ["a", "b", None], adapters)
    adapters["a"] = adapter(3)
    bank.replace("a", adapters["a"])
    check_outputs(bank, ["a", "b", None], adapters)
    bank.remove("b")
    adapters["c"] = adapter(4)
    bank.add("c", adapters["c"])
    check_outputs(bank, ["c", None, "a"], adapters)
    check_outputs(bank, [None, None, None], adapters)
    assert bank.stats.compilations == 1
    assert bank.names == ["a", "c"]
    puts = multi_lora.set_slot._cache_size()
    bank.replace("c", adapter(5))
    assert multi_lora.set_slot._cache_size() == puts


def test_remove_frees_slot_and_name() -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    check_outputs(bank, ["a", None], {"a": adapter(1)})
    bank.remove("a")
    with pytest.raises(multi_lora.UnknownAdapterError, match="Unknown adapter 'a'"):
        bank.apply(make_model()[1], ["a", None], X[:2])
    bank.add("b", adapter(2))
    check_outputs(bank, ["b", "b"], {"b": adapter(2)})


def test_slots_for_unknown_name_suggests_nearest() -> None:
    bank = bank_of(2)
    bank.add("poems", adapter(1))
    bank.add("prose", adapter(2))
    bank.slots_for(["poems"])
    before = bank.resident
    with pytest.raises(multi_lora.UnknownAdapterError, match=r"'poem'. Nearest: \['poems'"):
        bank.slots_for(["prose", "poem"])
    assert bank.resident == before
    check_outputs(bank, ["poems", None], {"poems": adapter(1)})


def test_slots_for_evicts_least_recently_used() -> None:
    bank = bank_of(3)
    adapters = {name: adapter(number) for number, name in enumerate("abcd")}
    for name, one in adapters.items():
        bank.add(name, one)
    check_outputs(bank, ["a", "b"], adapters)
    check_outputs(bank, ["a", None], adapters)
    check_outputs(bank, ["c", None], adapters)
    assert set(bank.resident) == {"a", "c"}, "b was used least recently"
    check_outputs(bank, ["d", "b"], adapters)
    assert set(bank.resident) == {"b", "d"}
    counts = bank.stats
    assert (counts.loads, counts.evictions, counts.hits) == (5, 3, 1)


def test_slots_for_never_evicts_own_batch() -> None:
    bank = bank_of(3)
    adapters = {name: adapter(number) for number, name in enumerate("abc")}
    for name, one in adapters.items():
        bank.add(name, one)
    check_outputs(bank, ["a", "b"], adapters)
    check_outputs(bank, ["c", "a"], adapters)  # a is the oldest, and stays.
    assert set(bank.resident) == {"a", "c"}


def test_slots_for_too_many_adapters_raises() -> None:
    bank = bank_of(3)
    for number, name in enumerate("abc"):
        bank.add(name, adapter(number))
    bank.slots_for(["a", "b"])
    before = bank.resident
    with pytest.raises(multi_lora.BankFullError, match="uses 3 adapters, but slots=3"):
        bank.slots_for(["a", "b", "c"])
    assert bank.resident == before


def test_host_cache_over_limit_evicts_to_files(tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=2, folder=tmp_path / "cache")
    adapters = {name: adapter(number) for number, name in enumerate("abcde")}
    for name, one in adapters.items():
        bank.add(name, one)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    for name in "abcdeca":
        check_outputs(bank, [name, None], adapters)
    counts = bank.stats
    assert counts.compilations == 1
    # Each of the five goes to disk once, though they come and go several times.
    assert counts.disk_writes == 5
    assert counts.disk_reads >= 5
    bank.remove("a")
    assert not list((tmp_path / "cache").glob("a-*"))
    assert bank.names == ["b", "c", "d", "e"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_host_cache_narrow_dtype_roundtrips(dtype: str, tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path, dtype=dtype)
    for number, name in enumerate("abc"):
        bank.add(name, adapter(number))
    first = [np.asarray(bank.apply(make_model()[1], [name], X[:1])) for name in "abc"]
    second = [np.asarray(bank.apply(make_model()[1], [name], X[:1])) for name in "abc"]
    assert bank.stats.disk_reads >= 3
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_load_with_full_disk_keeps_host_limit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    bank.add("a", adapter(1))
    bank.add("b", adapter(2))  # a goes to disk.
    replace = os.replace

    def full(source: Any, target: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                bank.apply(make_model()[1], ["a"], X[:1])
    assert os.replace is replace
    assert not list(tmp_path.glob("*.partial"))
    check_outputs(bank, ["a", None], {"a": adapter(1)})
    check_outputs(bank, ["b", None], {"b": adapter(2)})


def test_replace_evicted_adapter_drops_old_file(tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    bank.add("a", adapter(1))
    bank.add("b", adapter(2))  # a goes to disk.
    bank.replace("a", adapter(3))  # b goes to disk, and a's file with it.
    bank.add("c", adapter(4))
    check_outputs(bank, ["a", None], {"a": adapter(3)})
    assert len(list(tmp_path.glob("a-*"))) == 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "other"])
def test_load_damaged_file_raises(damage: str, tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    adapters = {"a": adapter(1), "b": adapter(2)}
    for name, one in adapters.items():
        bank.add(name, one)
    (path,) = tmp_path.glob("a-*")
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(whole[:-1])
    else:
        other = bank_of(2, max_host_adapters=1, folder=tmp_path / "other")
        other.add("a", adapter(3))
        other.add("b", adapter(2))
        (source,) = (tmp_path / "other").glob("a-*")
        path.write_bytes(source.read_bytes())
    bank.slots_for(["b"])
    with pytest.raises((ValueError, FileNotFoundError), match=r"the adapter 'a'"):
        bank.apply(make_model()[1], ["a", None], X[:2])
    # Others still serve, and the name is free again once it is removed.
    check_outputs(bank, ["b", None], adapters)
    bank.remove("a")
    bank.add("a", adapters["a"])
    check_outputs(bank, ["a", None], adapters)


def test_add_with_full_disk_changes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    bank.add("a", adapter(1))

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            bank.add("b", adapter(2))
    assert bank.names == ["a"]
    check_outputs(bank, ["a", None], {"a": adapter(1)})


def test_content_hash_depends_on_arrays_alone() -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    bank.add("same", adapter(1))
    bank.add("b", adapter(2))
    assert bank.content_hash("a") == bank.content_hash("same") != bank.content_hash("b")
    assert re.fullmatch(r"[0-9a-f]{64}", bank.content_hash("a"))


@pytest.mark.parametrize("name", ["../x", "", ".", "..", "a/b", "a\0b", "x" * 129, "\u0430", 3])
def test_add_invalid_name_raises(name: Any) -> None:
    with pytest.raises(ValueError, match="is not a valid adapter name"):
        bank_of(2).add(name, adapter(1))


def test_replace_failure_keeps_old_adapter(tmp_path: pathlib.Path) -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    nan = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), adapter(2))
    with pytest.raises(ValueError, match=r"'a' has NaN or Inf in .* 'first' \(2 weights\)"):
        bank.replace("a", nan)
    _, params, _ = make_model()
    wide = jlora.lora_transform(forward, jlora.LoRA(rank=3, alpha=3)).init(
        jax.random.key(1), params, X
    )
    with pytest.raises(ValueError, match="has rank 3, but the slots hold ranks up to 2"):
        bank.replace("a", wide)
    with pytest.raises(ValueError, match="name='a' is in use"):
        bank.add("a", adapter(2))
    with pytest.raises(multi_lora.UnknownAdapterError):
        bank.replace("b", adapter(2))
    check_outputs(bank, ["a", None], {"a": adapter(1)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (jlora.DoRA(rank=2, alpha=2), "is a DoRALeaf, whose update is not a product"),
        (jlora.HiRA(rank=2), "is a HiRALeaf, whose update is not a product"),
        (jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa()), "belongs on another base"),
    ],
)
def test_add_unsupported_family_raises(config: Any, message: str) -> None:
    _, params, _ = make_model()
    other = jlora.lora_transform(forward, config).init(jax.random.key(1), params, X)
    with pytest.raises(ValueError, match=message):
        bank_of(2).add("a", other)


@pytest.mark.parametrize(
    "config",
    [
        jlora.LoRAFA(rank=2, alpha=2),
        jlora.AdaLoRA(rank=2, alpha=2),
        jlora.SoRA(rank=2, alpha=2),
        jlora.VeRA(rank=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_add_supported_family_matches_apply(config: Any) -> None:
    lora, params, _ = make_model()
    own = jlora.lora_transform(forward, config)
    other = moved(own.init(jax.random.key(1), params, X))
    bank = bank_of(3, rank=4)
    bank.add("lora", adapter(1))
    bank.add("other", other)
    found = bank.apply(params, ["other", "lora"], X[:2])
    np.testing.assert_allclose(found[:1], own.apply(params, other, X[:1]), **FLOAT32)
    np.testing.assert_allclose(found[1:], lora.apply(params, adapter(1), X[1:2]), **FLOAT32)


def test_add_other_weights_raises() -> None:
    lora, params, like = make_model()
    bank = multi_lora.AdapterBank(lora, params, {"first": like["first"]}, slots=2)
    with pytest.raises(ValueError, match=r"adapts 'second' \(1 of 2 such\)"):
        bank.add("a", adapter(1))
    bank.add("a", {"first": adapter(1)["first"]})
    check_outputs(bank, ["a", None], {"a": {"first": adapter(1)["first"]}})


def test_bank_without_room_raises(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="slots=1 must be 2 or more"):
        bank_of(1)
    with pytest.raises(ValueError, match="rank=0 must be 1 or more"):
        bank_of(2, rank=0)
    with pytest.raises(ValueError, match="max_host_adapters=0 must be 1 or more"):
        bank_of(2, max_host_adapters=0, folder=tmp_path)
    with pytest.raises(ValueError, match="must be given together"):
        bank_of(2, max_host_adapters=1)


def test_bank_apply_static_inputs_compile_once() -> None:
    _, params, _ = make_model()
    bank = bank_of(2)
    bank.add("a", adapter(1))
    one = bank.apply(params, ["a", None], X[:2])
    two = bank.apply(params, ["a", None], X[:2], twice=True)
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)  # Times two is exact but for fusion.
    bank.apply(params, [None, "a"], X[:2], twice=True)
    assert bank.stats.compilations == 2


def test_bank_apply_equal_static_inputs() -> None:
    """1, 1.0 and True are equal and hash alike, and so are 0.0 and -0.0."""
    params = {"w": np.full((4, 4), 0.5, np.float32)}
    fn = lambda params, x, by: jnp.sign(1 / (x @ params["w"]).astype(type(by)) * by) * 2 * by
    x = np.ones((2, 4), np.float32)
    lora = jlora.lora_transform(fn, jlora.LoRA(rank=1, alpha=1))
    bank = multi_lora.AdapterBank(lora, params, lora.init(jax.random.key(0), params, x, 1), slots=2)
    for by in (1, 1.0, True, 0.0, -0.0):
        actual, expected = bank.apply(params, [None, None], x, by), fn(params, x, by)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
    assert bank.stats.compilations == 5


def test_bank_methods_refuse_traces() -> None:
    """A compiled program would keep the adapters of its first call, or a bank keep its tracers."""
    _, params, _ = make_model()
    bank = bank_of(2)
    bank.add("a", adapter(1))
    before = bank.apply(params, ["a"], X[:1])
    calls = {
        "AdapterBank.apply": lambda x: bank.apply(params, ["a"], x),
        "AdapterBank.slots_for": lambda x: bank.slots_for([None]) and x,
        "AdapterBank.add": lambda x: bank.add("b", jax.tree.map(lambda y: y + x.sum(), adapter(2))),
        "AdapterBank.remove": lambda x: bank.remove("a"),
        "AdapterBank was": lambda x: bank_of(2),
        "AdapterBank.names": lambda x: x * len(bank.names),
        "AdapterBank.resident": lambda x: x * bank.resident["a"],
        "AdapterBank.stats": lambda x: x * bank.stats.hits,
        "AdapterBank.content_hash": lambda x: x * len(bank.content_hash("a")),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=f"{message}.*traced function.*bank.slots_for"):
            jax.jit(call)(X[:1])
    for transform in (jax.vmap, jax.grad):  # Only their inputs are traced.
        with pytest.raises(TypeError, match="AdapterBank.apply"):
            transform(lambda x: bank.apply(params, ["a"], x[None]).sum())(X[0])
    assert bank.names == ["a"]
    np.testing.assert_array_equal(bank.apply(params, ["a"], X[:1]), before)


def test_slots_for_batch_outlives_later_loads() -> None:
    lora, params, _ = make_model()
    bank = bank_of(2)
    for name, number in (("a", 1), ("b", 2)):
        bank.add(name, adapter(number))
    batch = bank.slots_for(["a"])
    bank.slots_for(["b"])
    bank.apply(params, ["a"], X[:1])
    bank.replace("a", adapter(3))
    actual = multi_lora.apply_per_example(lora, params, *batch, X[:1])
    np.testing.assert_allclose(actual, lora.apply(params, adapter(1), X[:1]), **FLOAT32)


@pytest.mark.parametrize("next_call", ["apply", "slots_for", "replace"])
def test_slots_for_donated_load_anew(next_call: str) -> None:
    lora, params, _ = make_model()
    bank, adapters = bank_of(3), {"a": adapter(1), "b": adapter(2)}
    for name, one in adapters.items():
        bank.add(name, one)
    slots, _ = bank.slots_for(iter(["a", "b"]))
    take = jax.jit(lambda slots: jax.tree.map(lambda x: 2 * x, slots), donate_argnums=0)
    take(slots)
    assert jax.tree.leaves(slots)[0].is_deleted()
    if next_call == "replace":
        adapters["a"] = adapter(3)
        bank.replace("a", adapters["a"])
    if next_call == "slots_for":
        outputs = multi_lora.apply_per_example(lora, params, *bank.slots_for(["b"]), X[:1])
        np.testing.assert_allclose(outputs, lora.apply(params, adapters["b"], X[:1]), **FLOAT32)
    check_outputs(bank, ["a", None, "b"], adapters)
    assert sorted(bank.resident.values()) == [1, 2]


def test_slots_for_threads_get_their_adapters() -> None:
    lora, params, _ = make_model()
    bank = bank_of(2)
    names = {"a": 1, "b": 2, "c": 3}
    expected = {}
    for name, number in names.items():
        bank.add(name, adapter(number))
        expected[name] = lora.apply(params, adapter(number), X[:1])
    step = jax.jit(
        lambda slots, index: multi_lora.apply_per_example(lora, params, slots, index, X[:1])
    )

    def serve(name: str) -> None:
        for _ in range(20):
            np.testing.assert_allclose(step(*bank.slots_for([name])), expected[name], **FLOAT32)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(serve, names))


def test_bank_of_wrong_types_raises() -> None:
    lora, params, _ = make_model()
    with pytest.raises(TypeError, match="must be the result of jlora.lora_transform"):
        multi_lora.AdapterBank(lora.apply, params, adapter(1), slots=2)
    bank = bank_of(2)
    bank.add("a", adapter(1))
    with pytest.raises(TypeError, match=r"names='a' must be a sequence.*\['a'\]"):
        bank.apply(params, "a", X[:1])


def test_bank_apply_wrong_name_count_raises() -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    with pytest.raises(ValueError, match="its axis 0 must have size 2"):
        bank.apply(make_model()[1], ["a", None], X)


def test_replace_leaves_earlier_outputs() -> None:
    """Replacing between two batches does not change the outputs of the first."""
    lora, params, _ = make_model()
    bank = bank_of(2)
    bank.add("a", adapter(1))
    before = bank.apply(params, ["a"], X[:1])
    bank.replace("a", adapter(2))
    after = bank.apply(params, ["a"], X[:1])
    np.testing.assert_allclose(before, lora.apply(params, adapter(1), X[:1]), **FLOAT32)
    np.testing.assert_allclose(after, lora.apply(params, adapter(2), X[:1]), **FLOAT32)


@pytest.mark.slow
def test_slots_for_10000_swaps_leak_nothing(tmp_path: pathlib.Path) -> None:
    _, params, _ = make_model()
    bank = bank_of(2, max_host_adapters=2, folder=tmp_path)
    adapters = {name: adapter(number) for number, name in enumerate("abc")}
    for name, one in adapters.items():
        bank.add(name, one)
    arrays, files = [], []
    for turn in range(10_000):
        bank.slots_for(["abc"[turn % 3]])
        if turn in (99, 9_999):
            arrays.append(len(jax.live_arrays()))
            files.append(len(list(tmp_path.glob("*.safetensors"))))
    assert arrays[0] == arrays[1]
    assert files == [3, 3]
    assert bank.stats.loads == 10_000
    check_outputs(bank, ["b", None], adapters)
    assert params


@pytest.mark.parametrize(
    "name", ["z" * 10_000, "tenant-0001-adaptor", "x\n" * 3000, "\ud800" * 500]
)
def test_unknown_name_costs_little(name: str) -> None:
    bank = bank_of(2)
    bank.add("tenant-0", adapter(1))
    held = bank._host_cache._in_memory["tenant-0"]
    for number in range(1, 50_000):
        bank._host_cache._in_memory[f"tenant-{number:05}-adapter"] = held
    start = time.process_time()
    with pytest.raises(multi_lora.UnknownAdapterError) as caught:
        bank.slots_for([name])
    assert time.process_time() - start < 0.2
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="not a valid adapter name") as refused:
        bank.add(name + "!", adapter(1))
    assert len(str(refused.value)) < 400


def test_files_end_with_their_bank(tmp_path: pathlib.Path) -> None:
    zeros = np.zeros((2, 2), np.float32)
    factors = {"w": PaddedFactors(*[zeros] * len(PaddedFactors._fields))}

    def fill(cache: HostCache) -> set[str]:
        for name in "abc":
            cache.add(name, CachedAdapter(name * 64, factors))
        return {path.name for path in tmp_path.iterdir()}

    own = {f"a-{'a' * 16}.safetensors", f"b-{'b' * 16}.safetensors"}
    foreign = {f"mine-{'a' * 16}.safetensors", f"x-{'c' * 16}.safetensors", ".notes.partial"}
    for name in foreign:
        (tmp_path / name).write_bytes(b"of the user")
    save_file({"w/a": zeros}, tmp_path / f"x-{'c' * 16}.safetensors", {"content": "a" * 64})
    cache = HostCache(1, tmp_path)
    assert fill(cache) == own | foreign | {".jlora.lock"}
    kept = {name: (tmp_path / name).read_bytes() for name in own}
    del cache
    assert {path.name for path in tmp_path.iterdir()} == foreign
    # The process of a bank was killed, also while it wrote a file.
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / f".c-{'c' * 16}.safetensors.partial").write_bytes(b"half")
    cache = HostCache(1, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == foreign | {".jlora.lock"}
    del cache
