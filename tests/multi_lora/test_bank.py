"""Adapters by name: adding, replacing, removing, and where they wait."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import moved

import jlora
from jlora import multi_lora

# Sums of at most 6 products of numbers near one in float32, in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
X = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)


def forward(params: Any, x: jax.Array, *, twice: bool = False) -> jax.Array:
    y = jnp.tanh(x @ params["first"]) @ params["second"]
    return 2 * y if twice else y


@functools.cache
def given() -> tuple[jlora.LoraTransform, Any, Any]:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(keys[0], (6, 5)),
        "second": jax.random.normal(keys[1], (5, 7)),
    }
    lora = jlora.lora_transform(forward, jlora.LoRA(rank=2, alpha=3))
    return lora, params, lora.init(jax.random.key(1), params, X)


def adapter(seed: int) -> Any:
    return moved(given()[2], seed)


def bank_of(slots: int, **options: Any) -> multi_lora.AdapterBank:
    lora, params, like = given()
    return multi_lora.AdapterBank(lora, params, like, slots=slots, **options)


def check_rows(
    bank: multi_lora.AdapterBank, names: list[str | None], adapters: dict[str, Any]
) -> None:
    lora, params, _ = given()
    found = bank.apply(params, names, X[: len(names)])
    for row, name in enumerate(names):
        held = {} if name is None else adapters[name]
        expected = lora.apply(params, held, X[row : row + 1])
        np.testing.assert_allclose(found[row : row + 1], expected, **FLOAT32)


def test_adding_replacing_and_removing_compile_nothing_anew() -> None:
    bank = bank_of(3)
    held = {"a": adapter(1), "b": adapter(2)}
    for name, one in held.items():
        bank.add(name, one)
    check_rows(bank, ["a", "b", None], held)
    held["a"] = adapter(3)
    bank.replace("a", held["a"])
    check_rows(bank, ["a", "b", None], held)
    bank.remove("b")
    held["c"] = adapter(4)
    bank.add("c", held["c"])
    check_rows(bank, ["c", None, "a"], held)
    check_rows(bank, [None, None, None], held)
    assert bank.stats.compilations == 1
    assert bank.names == ["a", "c"]
    puts = multi_lora.set_slot._cache_size()
    bank.replace("c", adapter(5))
    assert multi_lora.set_slot._cache_size() == puts


def test_what_is_removed_is_unknown_and_its_slot_serves_others() -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    check_rows(bank, ["a", None], {"a": adapter(1)})
    bank.remove("a")
    with pytest.raises(multi_lora.UnknownAdapterError, match="There is no adapter 'a'"):
        bank.apply(given()[1], ["a", None], X[:2])
    bank.add("b", adapter(2))
    check_rows(bank, ["b", "b"], {"b": adapter(2)})


def test_a_name_that_is_not_there_moves_nothing_and_names_the_nearest() -> None:
    bank = bank_of(2)
    bank.add("poems", adapter(1))
    bank.add("prose", adapter(2))
    bank.slots_for(["poems"])
    before = bank.resident
    with pytest.raises(multi_lora.UnknownAdapterError, match=r"'poem'; the nearest are \['poems'"):
        bank.slots_for(["prose", "poem"])
    assert bank.resident == before
    check_rows(bank, ["poems", None], {"poems": adapter(1)})


def test_the_least_recently_used_gives_up_its_slot() -> None:
    bank = bank_of(3)
    held = {name: adapter(number) for number, name in enumerate("abcd")}
    for name, one in held.items():
        bank.add(name, one)
    check_rows(bank, ["a", "b"], held)
    check_rows(bank, ["a", None], held)
    check_rows(bank, ["c", None], held)
    assert set(bank.resident) == {"a", "c"}, "b was used least recently"
    check_rows(bank, ["d", "b"], held)
    assert set(bank.resident) == {"b", "d"}
    counts = bank.stats
    assert (counts.loads, counts.evictions, counts.hits) == (5, 3, 1)


def test_a_batch_never_evicts_what_it_needs_itself() -> None:
    bank = bank_of(3)
    held = {name: adapter(number) for number, name in enumerate("abc")}
    for name, one in held.items():
        bank.add(name, one)
    check_rows(bank, ["a", "b"], held)
    check_rows(bank, ["c", "a"], held)  # a is the oldest, and stays.
    assert set(bank.resident) == {"a", "c"}


def test_more_adapters_than_slots_in_one_batch_are_refused_and_move_nothing() -> None:
    bank = bank_of(3)
    for number, name in enumerate("abc"):
        bank.add(name, adapter(number))
    bank.slots_for(["a", "b"])
    before = bank.resident
    with pytest.raises(
        multi_lora.BankFullError, match="asks for 3 adapters, and the bank has 3 slots"
    ):
        bank.slots_for(["a", "b", "c"])
    assert bank.resident == before


def test_beyond_the_hosts_room_adapters_wait_in_files(tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=2, folder=tmp_path / "shelf")
    held = {name: adapter(number) for number, name in enumerate("abcde")}
    for name, one in held.items():
        bank.add(name, one)
    assert len(list((tmp_path / "shelf").glob("*.safetensors"))) == 3
    for name in "abcdeca":
        check_rows(bank, [name, None], held)
    counts = bank.stats
    assert counts.compilations == 1
    # Each of the five goes to disk once, though they come and go several times.
    assert counts.disk_writes == 5
    assert counts.disk_reads >= 5
    bank.remove("a")
    assert not list((tmp_path / "shelf").glob("a-*"))
    assert bank.names == ["b", "c", "d", "e"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_factors_come_back_from_files(dtype: str, tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path, dtype=dtype)
    for number, name in enumerate("abc"):
        bank.add(name, adapter(number))
    before = [np.asarray(bank.apply(given()[1], [name], X[:1])) for name in "abc"]
    again = [np.asarray(bank.apply(given()[1], [name], X[:1])) for name in "abc"]
    assert bank.stats.disk_reads >= 3
    np.testing.assert_array_equal(before, again)
    assert not np.array_equal(before[0], before[1])


def test_a_full_disk_holds_no_more_on_the_host_however_often_it_is_asked(
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
                bank.apply(given()[1], ["a"], X[:1])
    assert os.replace is replace
    assert not list(tmp_path.glob("*.partial"))
    check_rows(bank, ["a", None], {"a": adapter(1)})
    check_rows(bank, ["b", None], {"b": adapter(2)})


def test_a_replaced_adapter_is_never_read_from_its_old_file(tmp_path: pathlib.Path) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    bank.add("a", adapter(1))
    bank.add("b", adapter(2))  # a goes to disk.
    bank.replace("a", adapter(3))  # b goes to disk, and a's file with it.
    bank.add("c", adapter(4))
    check_rows(bank, ["a", None], {"a": adapter(3)})
    assert len(list(tmp_path.glob("a-*"))) == 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "other"])
def test_a_file_that_is_not_as_it_was_written_is_refused(
    damage: str, tmp_path: pathlib.Path
) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    held = {"a": adapter(1), "b": adapter(2)}
    for name, one in held.items():
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
        bank.apply(given()[1], ["a", None], X[:2])
    # Others still serve, and the name is free again once it is removed.
    check_rows(bank, ["b", None], held)
    bank.remove("a")
    bank.add("a", held["a"])
    check_rows(bank, ["a", None], held)


def test_a_full_disk_leaves_the_bank_as_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(2, max_host_adapters=1, folder=tmp_path)
    bank.add("a", adapter(1))

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            bank.add("b", adapter(2))
    assert bank.names == ["a"]
    check_rows(bank, ["a", None], {"a": adapter(1)})


def test_contents_are_those_of_the_adapters() -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    bank.add("same", adapter(1))
    bank.add("b", adapter(2))
    assert bank.content_hash("a") == bank.content_hash("same") != bank.content_hash("b")
    assert re.fullmatch(r"[0-9a-f]{64}", bank.content_hash("a"))


@pytest.mark.parametrize("name", ["../x", "", ".", "..", "a/b", "a\0b", "x" * 129, "\u0430", 3])
def test_names_that_are_none_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="cannot be an adapter's"):
        bank_of(2).add(name, adapter(1))


def test_a_failed_replacement_leaves_the_old_adapter(tmp_path: pathlib.Path) -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    nan = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), adapter(2))
    with pytest.raises(ValueError, match=r"'a' holds NaN or Inf for 'first' \(2 weights\)"):
        bank.replace("a", nan)
    _, params, _ = given()
    wide = jlora.lora_transform(forward, jlora.LoRA(rank=3, alpha=3)).init(
        jax.random.key(1), params, X
    )
    with pytest.raises(ValueError, match="has rank 3, and the slots hold ranks up to 2"):
        bank.replace("a", wide)
    with pytest.raises(ValueError, match="There is an adapter 'a' already"):
        bank.add("a", adapter(2))
    with pytest.raises(multi_lora.UnknownAdapterError):
        bank.replace("b", adapter(2))
    check_rows(bank, ["a", None], {"a": adapter(1)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (jlora.DoRA(rank=2, alpha=2), "is a DoRALeaf, whose change is no product"),
        (jlora.HiRA(rank=2), "is a HiRALeaf, whose change is no product"),
        (jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa()), "belongs on another base"),
    ],
)
def test_families_that_are_no_pair_are_refused_by_name(config: Any, message: str) -> None:
    _, params, _ = given()
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
def test_families_that_are_a_pair_share_a_bank(config: Any) -> None:
    lora, params, _ = given()
    own = jlora.lora_transform(forward, config)
    other = moved(own.init(jax.random.key(1), params, X))
    bank = bank_of(3, rank=4)
    bank.add("lora", adapter(1))
    bank.add("other", other)
    found = bank.apply(params, ["other", "lora"], X[:2])
    np.testing.assert_allclose(found[:1], own.apply(params, other, X[:1]), **FLOAT32)
    np.testing.assert_allclose(found[1:], lora.apply(params, adapter(1), X[1:2]), **FLOAT32)


def test_adapters_of_other_weights_are_refused() -> None:
    lora, params, like = given()
    bank = multi_lora.AdapterBank(lora, params, {"first": like["first"]}, slots=2)
    with pytest.raises(ValueError, match=r"adapts 'second' \(1 of 2 such\)"):
        bank.add("a", adapter(1))
    bank.add("a", {"first": adapter(1)["first"]})
    check_rows(bank, ["a", None], {"a": {"first": adapter(1)["first"]}})


def test_banks_without_room_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="slots=1 leaves no room"):
        bank_of(1)
    with pytest.raises(ValueError, match="rank=0 leaves no room"):
        bank_of(2, rank=0)
    with pytest.raises(ValueError, match="max_host_adapters=0 leaves no room"):
        bank_of(2, max_host_adapters=0, folder=tmp_path)
    with pytest.raises(ValueError, match="belong together"):
        bank_of(2, max_host_adapters=1)


def test_static_inputs_and_shapes_compile_once_each() -> None:
    _, params, _ = given()
    bank = bank_of(2)
    bank.add("a", adapter(1))
    one = bank.apply(params, ["a", None], X[:2])
    two = bank.apply(params, ["a", None], X[:2], twice=True)
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)  # Times two is exact but for fusion.
    bank.apply(params, [None, "a"], X[:2], twice=True)
    assert bank.stats.compilations == 2


def test_names_of_another_number_than_rows_are_refused() -> None:
    bank = bank_of(2)
    bank.add("a", adapter(1))
    with pytest.raises(ValueError, match="not one of 2 rows"):
        bank.apply(given()[1], ["a", None], X)


def test_a_batch_keeps_what_it_was_given_while_the_bank_goes_on() -> None:
    """A swap between two batches changes neither what the first computes nor what it compiled."""
    lora, params, _ = given()
    bank = bank_of(2)
    bank.add("a", adapter(1))
    before = bank.apply(params, ["a"], X[:1])
    bank.replace("a", adapter(2))
    after = bank.apply(params, ["a"], X[:1])
    np.testing.assert_allclose(before, lora.apply(params, adapter(1), X[:1]), **FLOAT32)
    np.testing.assert_allclose(after, lora.apply(params, adapter(2), X[:1]), **FLOAT32)


@pytest.mark.slow
def test_ten_thousand_swaps_hold_no_memory(tmp_path: pathlib.Path) -> None:
    _, params, _ = given()
    bank = bank_of(2, max_host_adapters=2, folder=tmp_path)
    held = {name: adapter(number) for number, name in enumerate("abc")}
    for name, one in held.items():
        bank.add(name, one)
    arrays, files = [], []
    for turn in range(10_000):
        bank.slots_for(["abc"[turn % 3]])
        if turn in (99, 9_999):
            arrays.append(len(jax.live_arrays()))
            files.append(len(list(tmp_path.iterdir())))
    assert arrays[0] == arrays[1]
    assert files == [3, 3]
    assert bank.stats.loads == 10_000
    check_rows(bank, ["b", None], held)
    assert params
