"""Adapters of stacked and of separate layers: one form in files, and each loads on the other's."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from _support.cases import FAMILIES, moved

import jlora
from jlora import merging, models, multi_lora
from jlora.adapters import match_layer_layout
from jlora.checkpoints import content_hash

LLAMA = pathlib.Path(__file__).parent.parent / "models" / "data" / "decoders" / "llama"
IDS = np.array([[3, 5, 2, 9], [7, 1, 8, 30]])
KERNELS = r"(q|v|down)/kernel$"


@functools.cache
def loaded(stacked: bool, dtype: str = "float32") -> Any:
    return models.load(LLAMA, dtype=dtype, scan_layers=stacked)


def adapted(stacked: bool, rules: Any) -> Any:
    """An adapter moved off zero."""
    model, params = loaded(stacked)
    return moved(jlora.lora_transform(model.apply, rules).init(jax.random.key(0), params, IDS))


def logits(stacked: bool, adapter: Any) -> np.ndarray:
    model, params = loaded(stacked)
    lora = jlora.lora_transform(model.apply)
    return np.asarray(jax.jit(lora.apply)(params, adapter, IDS))


def assert_same(adapter: Any, other: Any) -> None:
    assert jax.tree.structure(adapter) == jax.tree.structure(other)
    for value, expected in zip(jax.tree.leaves(adapter), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(value, expected)


LINEAR = sorted(set(FAMILIES) - {"token_rows"})  # Of an embedding, which is in no layer.


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.thin(8)
def test_match_layer_layout_keeps_function(family: str) -> None:
    stack = adapted(True, {KERNELS: FAMILIES[family].config})
    separate = match_layer_layout(stack, loaded(False).params)
    assert any("layers_1/attention/q/kernel" in path for path in separate)
    # The same sums in another program.
    np.testing.assert_allclose(logits(False, separate), logits(True, stack), atol=2e-5)
    assert_same(match_layer_layout(separate, loaded(True).params), stack)
    assert content_hash(separate) == content_hash(stack)


def test_match_layer_layout_fitting_is_unchanged() -> None:
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config, "norm/scale": jlora.FullDelta()})
    assert all(
        match_layer_layout(stack, loaded(True).params)[path] is stack[path] for path in stack
    )


def test_save_adapter_layouts_write_same_bytes(tmp_path: pathlib.Path) -> None:
    rules = {KERNELS: jlora.LoRA(rank=2, alpha=4), "norm/scale": jlora.FullDelta()}
    stack = adapted(True, rules)
    separate = match_layer_layout(stack, loaded(False).params)
    for name, adapter, stacked in (("stack", stack, True), ("separate", separate, False)):
        jlora.save_adapter(tmp_path / name, adapter, loaded(stacked).params)
    assert (tmp_path / "stack").read_bytes() == (tmp_path / "separate").read_bytes()
    with safetensors.safe_open(tmp_path / "stack", "numpy") as file:
        assert "params/layers_1/attention/q/kernel/a" in file.keys()  # noqa: SIM118
        assert file.get_tensor("params/layers_1/attention/q/kernel/a").shape == (12, 2)
    assert_same(jlora.load_adapter(tmp_path / "stack", loaded(True).params), stack)
    assert_same(jlora.load_adapter(tmp_path / "stack", loaded(False).params), separate)


def test_load_adapter_other_layer_raises(tmp_path: pathlib.Path) -> None:
    """One layer of the stack has other values."""
    jlora.save_adapter(
        tmp_path / "a", adapted(False, {KERNELS: FAMILIES["lora"].config}), loaded(False).params
    )
    params = jax.tree.map(lambda x: x, loaded(True).params)
    kernel = params["params"]["layers"]["mlp"]["down"]["kernel"]
    params["params"]["layers"]["mlp"]["down"]["kernel"] = kernel.at[1].multiply(2)
    with pytest.raises(ValueError, match=r"layers_1/mlp/down/kernel' \(1 of 6 adapted"):
        jlora.load_adapter(tmp_path / "a", params)
    jlora.load_adapter(tmp_path / "a", params, allow_other_base=True)


@pytest.mark.slow
def test_load_adapter_quantized_layouts_match(tmp_path: pathlib.Path) -> None:
    """An adapter of a quantized stack loads on separate layers, quantized or not."""
    bases = {
        stacked: models.load(LLAMA, scan_layers=stacked, quantize={KERNELS: jlora.Int8()}).params
        for stacked in (True, False)
    }
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config})
    jlora.save_adapter(tmp_path / "a", stack, bases[True])
    assert_same(jlora.load_adapter(tmp_path / "a", bases[True]), stack)
    separate = match_layer_layout(stack, bases[False])
    assert_same(jlora.load_adapter(tmp_path / "a", bases[False]), separate)
    plain = models.load(LLAMA, scan_layers=False).params
    assert_same(jlora.load_adapter(tmp_path / "a", plain), separate)


def test_stack_layers_of_other_ranks_is_padded() -> None:
    rules = {
        "layers_0/attention/q": jlora.LoRA(rank=3, alpha=3),
        "layers_1/attention/q": jlora.LoRA(rank=1, alpha=5),
        "layers_1/attention/v": jlora.LoRA(rank=2, alpha=4),  # Layer 0 has none.
    }
    separate = adapted(False, rules)
    stack = match_layer_layout(separate, loaded(True).params)
    assert stack["params/layers/attention/q/kernel"].rank == 3
    np.testing.assert_allclose(logits(True, stack), logits(False, separate), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_stack_layers_narrow_factors_keep_size(dtype: Any, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    bases = {False: {f"layers_{i}": {"w": np.zeros((6, 5), np.float32)} for i in range(2)}}
    bases[True] = {"layers": {"w": np.zeros((2, 6, 5), np.float32)}}
    separate, expected = {}, []
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=1))
    fresh = lora.init(jax.random.key(0), bases[False]["layers_0"], np.ones((1, 6)))["w"]
    for i, alpha in enumerate((1e-3, 1e3)):
        a = jnp.asarray(rng.normal(size=(6, 2)), dtype)
        b = jnp.asarray(rng.normal(size=(2, 5)) / 50, dtype)
        separate[f"layers_{i}/w"] = dataclasses.replace(fresh, a=a, b=b, alpha=alpha)
        expected.append(alpha / 2 * np.float64(a) @ np.float64(b))
    stack = match_layer_layout(separate, bases[True])
    jlora.save_adapter(tmp_path / "a", stack, bases[True])
    for adapter in (stack, jlora.load_adapter(tmp_path / "a", bases[True])):
        merged = jlora.merge(bases[True], adapter)["layers"]["w"]
        for found, wanted in zip(np.asarray(merged), expected, strict=True):
            assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
    # Rounding of a narrow product, and of its sum of six.
    x = rng.normal(size=(3, 6)).astype(dtype)
    run = jlora.lora_transform(lambda p, x: jnp.stack([x @ w for w in p["layers"]["w"]]))
    narrow = jax.tree.map(lambda w: w.astype(dtype), bases[True])
    outputs = np.float64(run.apply(narrow, stack, x))
    for found, wanted in zip(outputs, expected, strict=True):
        exact = np.float64(x) @ wanted
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"layers_1/attention/q": jlora.DoRA(rank=1, alpha=1)},
            r"the layers \[0\] have no adapter",
        ),
        (
            {
                "layers_0/attention/q": jlora.LoRA(rank=1, alpha=1),
                "layers_1/attention/q": jlora.IA3(),
            },
            "their methods or settings differ. Load the model with",
        ),
    ],
)
def test_stack_layers_that_differ_raises(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"attention/q/kernel' cannot be stacked: {message}"):
        match_layer_layout(adapted(False, rules), loaded(True).params)


def test_stack_layers_past_the_stack_raises() -> None:
    separate = adapted(False, {"layers_1/attention/q": FAMILIES["lora"].config})
    path, leaf = next(iter(separate.items()))
    past = {path.replace("layers_1", "layers_7"): leaf}
    with pytest.raises(ValueError, match=r"layers \[7\] of shapes .* which stacks 2 layers"):
        match_layer_layout(past, loaded(True).params)


def test_merge_and_combine_take_both_layouts() -> None:
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config})
    separate = match_layer_layout(stack, loaded(False).params)
    for stacked in (True, False):
        params = loaded(stacked).params
        fits, other = (stack, separate) if stacked else (separate, stack)
        assert_same(jlora.merge(params, other), jlora.merge(params, fits))
        assert_same(
            jlora.merge_to_dtype(params, other).params, jlora.merge_to_dtype(params, fits).params
        )
        mixed = merging.combine_adapters([stack, separate], [1.0, 2.0], params=params)
        assert set(mixed.adapter) == set(fits)
    mixed = merging.combine_adapters([stack, separate], [1.0, 2.0])
    thrice = jlora.merge(
        loaded(False).params,
        separate
        | {
            path: dataclasses.replace(leaf, alpha=3 * leaf.alpha) for path, leaf in separate.items()
        },
    )
    merged = jlora.merge(loaded(False).params, mixed.adapter)
    for value, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(thrice), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)  # Sums of float32.


def test_bank_takes_both_layouts() -> None:
    model, params = loaded(True)
    stack = adapted(True, {KERNELS: FAMILIES["lora"].config})
    lora = jlora.lora_transform(model.apply)
    bank = multi_lora.AdapterBank(lora, params, stack, slots=3)
    bank.add("stack", stack)
    bank.add("separate", match_layer_layout(stack, loaded(False).params))
    assert bank.content_hash("stack") == bank.content_hash("separate")
    out = bank.apply(params, ["stack", "separate"], np.stack([IDS[0], IDS[0]]))
    np.testing.assert_array_equal(out[0], out[1])
