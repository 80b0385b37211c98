"""Weights near zero and near the largest of their type, scales that a narrow type does not hold."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from _support.cases import FAMILIES

import jlora
from jlora import initializers
from jlora.adapters.dora import DoRALeaf
from jlora.checkpoints.safetensors_io import serialize_safetensors
from jlora.interpreter.terms import WeightAxes

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(8, 6)).astype(np.float32)
INPUTS = RNG.normal(size=(3, 8)).astype(np.float32)
# Outputs still fit with the last, whose columns have entries past 2^126.
SIZES = [1e-25, 1.0, 1e19, 3e37]


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


def look_up(params: Any, x: Any) -> Any:
    return params["w"][jnp.arange(x.shape[0])]


def relative_error(values: Any, truth: Any) -> float:
    values, truth = np.asarray(values, np.float64), np.asarray(truth, np.float64)
    return float(np.abs(values - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.thin(2)
def test_apply_any_weight_size_is_right(family: str) -> None:
    fn = look_up if family == "token_rows" else product
    lora = jlora.lora_transform(fn, {"w": FAMILIES[family].config})

    @jax.jit
    def run(weight: Any) -> Any:
        params = {"w": weight}
        fresh = lora.init(jax.random.key(0), params, INPUTS)
        labels = jlora.param_labels(fresh)
        shift = lambda leaf, label: leaf if label == "frozen" else leaf + 0.3
        adapter = jax.tree.map(shift, fresh, labels)
        merged = lora.merge(params, adapter) if FAMILIES[family].merges else None
        return (
            (fn(params, INPUTS), lora.apply(params, fresh, INPUTS)),
            (merged and fn(merged, INPUTS), lora.apply(params, adapter, INPUTS)),
        )

    for size in SIZES:
        (base, fresh), (merged, adapted) = run(WEIGHT * np.float32(size))
        # Rounding of float32 in sums of eight products.
        if FAMILIES[family].starts_at_base:
            assert relative_error(fresh, base) < 1e-5
        assert np.isfinite(adapted).all()
        if merged is not None:
            assert relative_error(adapted, merged) < 1e-5
    assert not np.any(run(np.zeros_like(WEIGHT))[0][1]) or not FAMILIES[family].starts_at_base


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_dora_norm_any_column_size_is_right(dtype: Any) -> None:
    sizes = np.array([1e-25, 1e-10, 0.1, 1, 1e19, 3e37], np.float32)
    weight = (WEIGHT * sizes).astype(dtype)
    a = RNG.normal(size=(8, 2)).astype(np.float32)
    b = (RNG.normal(size=(2, 6)) * sizes).astype(np.float32)
    leaf = DoRALeaf(
        a=a,
        b=b,
        magnitude=np.ones(6, np.float32),
        shape=(8, 6),
        axes=WeightAxes((), (0,), (1,)),
        rank=2,
        alpha=3.0,
    )
    truth = np.linalg.norm(np.float64(weight) + 1.5 * np.float64(a) @ np.float64(b), axis=0)
    norm = jax.jit(lambda leaf, w: leaf.weight_norm(w))(leaf, weight)[0]
    np.testing.assert_allclose(norm, truth, rtol=2e-5)  # A's two bfloat16 parts keep 16 bits.


@pytest.mark.parametrize("through_norm", [False, True])
def test_dora_gradients_any_column_size(through_norm: bool) -> None:
    rng = np.random.default_rng(1)
    sizes = np.array([1e-34, 1e-28, 1e-20, 1, 1e19, 1e30], np.float32)
    weight = WEIGHT * sizes
    lora = jlora.lora_transform(
        product, {"w": jlora.DoRA(rank=2, alpha=3, through_norm=through_norm)}
    )
    leaf = lora.init(jax.random.key(0), {"w": weight}, INPUTS)["w"]
    b = (rng.normal(size=(2, 6)) * sizes).astype(np.float32)
    leaf = dataclasses.replace(leaf, b=b, magnitude=leaf.magnitude * np.float32(1.5))
    seen = rng.normal(size=(3, 6)) / sizes  # Each column has a loss of about one.

    def loss(leaf: Any, weight: Any) -> Any:
        return (lora.apply({"w": weight}, {"w": leaf}, INPUTS) * seen.astype(np.float32)).sum()

    got, of_weight = jax.jit(jax.grad(loss, argnums=(0, 1)))(leaf, weight)
    a, b, m, x, w = (np.float64(v) for v in (leaf.a, b, leaf.magnitude, INPUTS, weight))
    v = w + 1.5 * a @ b
    norm = np.linalg.norm(v, axis=0)
    of_v = m / norm * (x.T @ seen)
    if through_norm:
        of_v -= m * ((x @ v) * seen).sum(0) / norm**2 * (v / norm)
    # Sums of eight products, of which some cancel.
    np.testing.assert_allclose(got.b * sizes, 1.5 * a.T @ of_v * sizes, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.a, 1.5 * of_v @ b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_weight * sizes, of_v * sizes, rtol=1e-4, atol=1e-5)
    expected = ((x @ v) * seen).sum(0) / norm
    np.testing.assert_allclose(got.magnitude * sizes, expected * sizes, rtol=1e-4, atol=1e-5)


def test_dora_norm_beyond_float32_raises() -> None:
    lora = jlora.lora_transform(product, jlora.DoRA(rank=2, alpha=4))
    params = {"w": np.full((8, 6), 3e38, np.float32)}  # Times the root of 8.
    with pytest.raises(ValueError, match="norms of the columns of 'w', and one is not finite"):
        lora.init(jax.random.key(0), params, INPUTS)


@pytest.mark.parametrize("init", ["pissa", "pissa_fast", "milora", "olora"])
def test_init_any_weight_size_is_right(init: str) -> None:
    start = initializers.pissa(4) if init == "pissa_fast" else getattr(initializers, init)()
    lora = jlora.lora_transform(product, jlora.LoRA(rank=2, alpha=4, init=start))

    @jax.jit
    def run(params: Any) -> Any:
        adapter = lora.init(jax.random.key(0), params, INPUTS)
        return lora.apply(jlora.residual_base(params, adapter), adapter, INPUTS)

    for size in SIZES:
        weight = WEIGHT * np.float32(size)
        # Rounding of float32 in a decomposition of 8 by 6.
        assert relative_error(run({"w": weight}), np.float64(INPUTS) @ np.float64(weight)) < 1e-5


CONFIGS = [
    config
    for config in (family.config for family in FAMILIES.values())
    if any(field.name == "alpha" for field in dataclasses.fields(config))
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("alpha", [1e39, 1e300, 1e-46])
def test_config_alpha_beyond_float32_raises(config: Any, alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha=.* must be a positive finite number in the range"):
        dataclasses.replace(config, alpha=alpha)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda x: initializers.gaussian(std=x), 1e39),
        (lambda x: initializers.orthogonal(std=x), 1e39),
        (lambda x: jlora.FourierFT(num_frequencies=2, alpha=1, std=x), 1e39),
        (lambda x: jlora.VeRA(rank=2, d_initial=x), 1e39),
        (lambda x: jlora.VeRA(rank=2, d_initial=x, dtype=jnp.float16), 1e6),
        (lambda x: jlora.models.SamplingParams(temperature=x), 1e39),
        (lambda x: jlora.models.SamplingParams(temperature=x), 1e-46),
    ],
)
def test_number_beyond_its_type_raises(make: Any, value: float) -> None:
    with pytest.raises(ValueError, match=f"={value}".replace("+", "[+]")):
        make(value)


def test_load_adapter_alpha_beyond_float32_raises(tmp_path: pathlib.Path) -> None:
    lora = jlora.lora_transform(product, jlora.LoRA(rank=2, alpha=4))
    path = tmp_path / "adapter.safetensors"
    jlora.save_adapter(path, lora.init(jax.random.key(0), {"w": WEIGHT}, INPUTS), {"w": WEIGHT})
    with safetensors.safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata["adapter"] = metadata["adapter"].replace('"alpha": 4.0', '"alpha": 1e300')
    path.write_bytes(serialize_safetensors(tensors, metadata))
    with pytest.raises(ValueError, match="invalid description of 'w': .*alpha=1e\\+300"):
        jlora.load_adapter(path, {"w": WEIGHT})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.thin(3)
def test_narrow_arrays_hold_large_alpha(config: Any) -> None:
    """The scale is beyond float16, and its product with a fresh factor is not."""
    config = dataclasses.replace(config, alpha=1e6, dtype=jnp.float16)
    if hasattr(config, "std"):
        config = dataclasses.replace(config, std=0.0)
    lora = jlora.lora_transform(product, config)
    params = {"w": WEIGHT}
    fresh = lora.init(jax.random.key(0), params, INPUTS)
    np.testing.assert_allclose(lora.apply(params, fresh, INPUTS), INPUTS @ WEIGHT, rtol=1e-3)


def test_fourierft_float16_scale_is_not_lost() -> None:
    """The scale, alpha / (256 * 128), is below the least normal number of float16."""
    config = jlora.FourierFT(num_frequencies=3, alpha=1, seed=3)
    base = np.zeros((256, 128), np.float16)
    x = RNG.normal(size=(4, 256)).astype(np.float16)
    lora = jlora.lora_transform(product, {"w": config})
    adapter = lora.init(jax.random.key(0), {"w": base}, x)
    adapter = jax.tree.map(lambda s: np.array([300.0, -200.0, 400.0], np.float32), adapter)
    wide = lora.apply({"w": base.astype(np.float32)}, adapter, x.astype(np.float32))
    # Rounding of float16, 1e-3, in sums of 256.
    assert relative_error(lora.apply({"w": base}, adapter, x), wide) < 5e-3


@pytest.mark.parametrize("size", SIZES)
def test_merge_and_combine_any_size_are_right(size: float) -> None:
    size = np.float32(size)
    params = {"w": WEIGHT * size}
    lora = jlora.lora_transform(product, jlora.LoRA(rank=2, alpha=2))
    leaf = lora.init(jax.random.key(0), params, INPUTS)["w"]
    a, b = RNG.normal(size=(8, 2)).astype(np.float32), RNG.normal(size=(2, 6)).astype(np.float32)
    root = np.sqrt(size)
    adapter = {"w": dataclasses.replace(leaf, a=a * root, b=b * root)}
    (fidelity,) = jlora.merge_to_dtype(params, adapter).report.values()
    ratio = np.linalg.norm(a @ b) / np.linalg.norm(WEIGHT)
    np.testing.assert_allclose(list(fidelity), [1, 1, 0, ratio], rtol=1e-4, atol=1e-4)
    # The first singular triplet of the update.
    u, s, vt = np.linalg.svd(np.float64(a) @ np.float64(b))
    combined = jlora.merging.combine_adapters([adapter], rank=1).adapter["w"]
    found = np.float64(combined.a) @ np.float64(combined.b)
    assert relative_error(found, np.float64(size) * s[0] * np.outer(u[:, 0], vt[0])) < 1e-5
    base, fitted = jlora.loftq({"w": params["w"]}, {"w": leaf}, {"w": jlora.Int8(block_size=8)})
    near = np.float64(base["w"].dequantize()) + np.float64(fitted["w"].a) @ np.float64(
        fitted["w"].b
    )
    quantized = np.float64(base["w"].dequantize())
    assert np.abs(near - params["w"]).max() < np.abs(quantized - params["w"]).max()
