"""Merging to narrow dtypes, and the report of the rounding loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import FAMILIES, case

import jlora
from jlora.checkpoints.stored_weight import StoredWeight
from jlora.merging import merge_to

KEYS = jax.random.split(jax.random.key(0), 3)
WEIGHT = jax.random.normal(KEYS[0], (96, 80))
X = jnp.ones((1, 96))


def adapter(size: float) -> Any:
    """An update whose norm relative to the weight is `size`."""
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=80, alpha=80))
    leaf = lora.init(jax.random.key(1), {"w": WEIGHT}, X)["w"]
    a, b = jax.random.normal(KEYS[1], leaf.a.shape), jax.random.normal(KEYS[2], leaf.b.shape)
    length = jnp.linalg.norm(a @ b)
    return {"w": dataclasses.replace(leaf, a=a, b=b * size * jnp.linalg.norm(WEIGHT) / length)}


def numpy_report(change: float) -> tuple[float, float, float]:
    base = np.asarray(WEIGHT.astype(jnp.bfloat16), np.float32)
    leaf = adapter(change)["w"]
    wanted = np.asarray(leaf.a @ leaf.b)
    written = np.asarray(jnp.asarray(base + wanted).astype(jnp.bfloat16), np.float32)
    found = written - base
    along = (found * wanted).sum()
    norms = np.linalg.norm(found) * np.linalg.norm(wanted)
    return along / (wanted**2).sum(), along / norms, (found == 0).mean()


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
@pytest.mark.thin(3, 1)
def test_merge_to_dtype_report_agrees_with_numpy(size: float) -> None:
    params = {"w": WEIGHT.astype(jnp.bfloat16)}
    merge = lambda: jlora.merge_to_dtype(params, adapter(size))
    if size < 1e-2:
        with pytest.warns(jlora.UpdateLostWarning, match="1 of 1 updates .* float32"):
            merged = merge()
    else:
        merged = merge()
    kept = merged.report["w"]
    # float32 sums of 7680 products; a rounding may fall to either side.
    np.testing.assert_allclose(kept[:3], numpy_report(size), rtol=2e-3)
    np.testing.assert_allclose(kept.relative_norm, size, rtol=1e-2)  # Of the weight in bfloat16.
    assert merged.params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.params["w"], jlora.merge(params, adapter(size))["w"])
    assert "unchanged" in str(merged)


def test_merge_to_dtype_wider_dtype_is_lossless() -> None:
    params = {"w": WEIGHT.astype(jnp.bfloat16), "n": jnp.arange(3)}
    merged = jlora.merge_to_dtype(params, adapter(1e-4), jnp.float32)
    gain, cosine, unchanged, _ = merged.report["w"]
    np.testing.assert_allclose([gain, cosine], 1, atol=1e-4)  # Of 2^-24 / 1e-4.
    assert unchanged < 0.01
    assert merged.params["w"].dtype == jnp.float32
    assert merged.params["n"].dtype == params["n"].dtype
    leaf = adapter(1e-4)["w"]
    exact = params["w"].astype(jnp.float32) + leaf.a @ leaf.b
    np.testing.assert_allclose(merged.params["w"], exact, atol=1e-6)


def test_merge_to_dtype_zero_update_not_reported() -> None:
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
    fresh = lora.init(jax.random.key(1), {"w": WEIGHT}, X)
    assert jlora.merge_to_dtype({"w": WEIGHT}, fresh).report == {}


@pytest.mark.parametrize("block_bytes", [1 << 26, 100])
@pytest.mark.parametrize("size", [1e-9, 2e-8])
def test_merge_to_dtype_float32_loss_reported(
    size: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base has a spacing of 8, the update is of one size."""
    monkeypatch.setattr(merge_to, "_BLOCK_BYTES", block_bytes)
    base = np.full((4, 6), 1e8, np.float32)
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
    leaf = lora.init(jax.random.key(1), {"w": base}, X[:, :4])["w"]
    b = np.array([[1, 1, 1, 1, 1, 3.5]], np.float32) * np.float32(size * 1e8)
    leaf = dataclasses.replace(leaf, a=np.ones((4, 1), np.float32), b=b)
    with pytest.warns(jlora.UpdateLostWarning, match="1 of 1 updates"):
        merged = jlora.merge_to_dtype({"w": base}, {"w": leaf})
    update = np.broadcast_to(np.float64(b), (4, 6))
    kept = np.float64(np.float32(base + update)) - 1e8
    inner, exact = (kept * update).sum(), (update**2).sum()
    cosine = inner / np.sqrt(exact * (kept**2).sum()) if kept.any() else 0
    wanted = [inner / exact, cosine, (kept == 0).mean(), np.sqrt(exact) / np.linalg.norm(base)]
    np.testing.assert_allclose(merged.report["w"], wanted, rtol=1e-4)


def test_merge_to_dtype_nonfinite_raises() -> None:
    with pytest.raises(ValueError, match=r"'w' has NaN or infinite entries in float16"):
        jlora.merge_to_dtype({"w": WEIGHT}, adapter(1e6), jnp.float16)


MERGED = [name for name in FAMILIES if FAMILIES[name].merges and name != "token_rows"]


@pytest.mark.parametrize("layer", ["dense", "linen_scan"])
@pytest.mark.parametrize("family", MERGED)
@pytest.mark.thin(7)
def test_merge_to_dtype_in_blocks_is_the_merge(
    family: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case(layer, "float32", family)
    whole = jlora.merge_to_dtype(one.params, one.adapter, jnp.float32)
    monkeypatch.setattr(merge_to, "_BLOCK_BYTES", 100)
    blocked = jlora.merge_to_dtype(one.params, one.adapter, jnp.float32)
    # Another order of the additions in a product.
    chex.assert_trees_all_close(blocked.params, whole.params, rtol=2e-6, atol=2e-6)
    assert blocked.report.keys() == whole.report.keys()
    for path, fidelity in whole.report.items():
        np.testing.assert_allclose(blocked.report[path], fidelity, rtol=1e-4, atol=1e-6)


def test_merge_stored_reads_when_needed() -> None:
    reads: list[str] = []

    def stored(name: str, array: Any) -> StoredWeight:
        def read() -> Any:
            reads.append(name)
            return array

        return StoredWeight(array.shape, array.dtype, read)

    base = {"w": WEIGHT.astype(jnp.bfloat16), "n": jnp.ones(3, jnp.bfloat16)}
    params = {name: stored(name, array) for name, array in base.items()}
    merged = merge_to.merge_stored(params, adapter(1e-1), jnp.float32)
    assert not reads
    assert not merged.report
    expected = jlora.merge_to_dtype(base, adapter(1e-1), jnp.float32)
    for name, weight in merged.params.items():
        assert (weight.shape, weight.dtype) == (base[name].shape, jnp.float32)
        np.testing.assert_array_equal(np.asarray(weight), expected.params[name])
    assert sorted(reads) == ["n", "w"]
    assert merged.report == expected.report
