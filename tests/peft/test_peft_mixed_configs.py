"""Adapters whose weights have different configs: PEFT reads the same weights from their folders.

The oracle is PEFT's reading in NumPy (tests/_support/peft_numpy.py); tests/live has PEFT itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from _support.peft_numpy import PeftReading

import jlora
from jlora import peft
from jlora.models.hf.weight_mapping import single_tensor_weight
from jlora.peft.leaf_conversion import make_template_leaf
from jlora.rules import trace_weights

# A name is the end of another one, and the axes' sizes all differ.
LINEAR = {
    "one": ("proj", (12, 8)),
    "two": ("net.proj", (8, 20)),
    "three": ("net.a.proj", (20, 18)),
    "four": ("net.b.x_proj", (18, 6)),
}
WINDOWS = {
    "image": ("net.image", (3, 2, 4, 10)),
    "plane": ("net.plane", (2, 3, 10, 12)),
    "point": ("net.point", (1, 1, 12, 10)),
}
EMBEDDINGS = {"table": ("net.table", (16, 12))}
ORDERS = {2: (1, 0), 4: (3, 2, 0, 1)}


def fn(params: Any, x: Any) -> Any:
    for name in WINDOWS:
        if name in params:
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
    if "table" in params:
        x = params["table"][x]
    for name in LINEAR:
        x = x @ params[name] if name in params else x
    return x


def layers(*groups: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Random weights, their checkpoint tensors, and example inputs."""
    rng = np.random.default_rng(5)
    known = {name: one for group in groups for name, one in group.items()}
    params: dict[str, np.ndarray] = {
        name: np.asarray(rng.normal(size=shape), np.float32) for name, (_, shape) in known.items()
    }
    stored = {
        name: single_tensor_weight(
            f"{module}.weight",
            shape,
            None if name == "table" else tuple(int(i) for i in np.argsort(ORDERS[len(shape)])),
        )
        for name, (module, shape) in known.items()
    }
    first: np.ndarray = next(iter(params.values()))
    x = np.zeros((1, 3, 3, 4) if "image" in params else (1, first.shape[0]), np.float32)
    return params, stored, np.zeros((2,), np.int32) if "table" in params else x


def filled(configs: Mapping[str, Any], params: Any, x: Any, seed: int) -> dict[str, Any]:
    """An adapter of random numbers with a config for each weight."""
    rng = np.random.default_rng(seed)
    weights = trace_weights(fn, params, x)
    adapter: dict[str, Any] = {}

    def fill(leaf: Any) -> Any:
        arrays = {n: np.asarray(rng.normal(size=s), np.float32) for n, s in leaf.shapes().items()}
        return dataclasses.replace(leaf, **arrays)

    for name, config in configs.items():
        adapter[name] = fill(make_template_leaf(config, weights[name]))
    share = getattr(next(iter(adapter.values())), "share", None)
    if share:
        config = next(iter(configs.values()))
        every = list(weights.values())
        adapter[share] = fill(
            jax.eval_shape(lambda k: config.init_shared(k, every), jax.random.key(0))
        )
    return adapter


def merged_by_peft(folder: pathlib.Path, params: Any, stored: Any) -> dict[str, np.ndarray]:
    """Weights that PEFT computes, in the layout of `params`."""
    parts = {name: weight.slices[0] for name, weight in stored.items()}
    modules = {name: part.key.removesuffix(".weight") for name, part in parts.items()}
    base = {
        modules[n]: np.asarray(part.to_tensor(params[n]), np.float64) for n, part in parts.items()
    }
    reading = PeftReading(folder, base, {modules[name] for name in EMBEDDINGS if name in modules})
    return {n: part.to_weight_layout(reading.merged[modules[n]]) for n, part in parts.items()}


def assert_peft_reads_it(
    adapter: Any, params: Any, stored: Any, x: Any, folder: pathlib.Path
) -> dict[str, Any]:
    peft.save(folder, adapter, fn, params, x, checkpoint_mapping=stored)
    theirs = merged_by_peft(folder, params, stored)
    ours = jax.jit(jlora.merge)(params, adapter)
    again = peft.load(folder, fn, params, x, checkpoint_mapping=stored)
    assert set(again.adapter) == set(adapter)
    for name, weight in ours.items():
        size = np.abs(theirs[name]).max()
        # float32 products of up to four factors; AdaLoRA's scale in PEFT has 1e-5 more rank.
        np.testing.assert_allclose(weight, theirs[name], atol=2e-5 * size, err_msg=name)
    return json.loads((folder / "adapter_config.json").read_text())


def pick(rng: np.random.Generator, *values: Any) -> Any:
    return values[rng.integers(len(values))]


# Config of one weight from a generator, by family, and the layers that PEFT can adapt.
FAMILIES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "lora": (
        lambda r: pick(r, jlora.LoRA, jlora.LoRAFA, jlora.DyLoRA)(
            rank=pick(r, 1, 2, 3), alpha=pick(r, 1, 2.5, 4), use_rslora=pick(r, True, False)
        ),
        (LINEAR, EMBEDDINGS),
    ),
    "lora_windows": (
        lambda r: jlora.LoRA(
            rank=pick(r, 1, 2), alpha=pick(r, 1, 2.5), use_rslora=pick(r, True, False)
        ),
        (WINDOWS,),
    ),
    "dora": (
        lambda r: jlora.DoRA(
            rank=pick(r, 1, 2, 3), alpha=pick(r, 1, 2.5), use_rslora=pick(r, True, False)
        ),
        (LINEAR, EMBEDDINGS),
    ),
    "adalora": (
        lambda r: jlora.AdaLoRA(rank=pick(r, 1, 2, 3), alpha=pick(r, 1, 2.5, 4)),
        (LINEAR,),
    ),
    "loha": (
        lambda r: jlora.LoHa(
            rank=pick(r, 1, 2), alpha=pick(r, 1, 2.5), tucker=pick(r, True, False)
        ),
        (WINDOWS,),
    ),
    "lokr": (
        lambda r: jlora.LoKr(
            rank=pick(r, 1, 2), alpha=pick(r, 1, 2.5), decompose_both=pick(r, True, False)
        ),
        (LINEAR,),
    ),
    "lokr_windows": (
        lambda r: jlora.LoKr(
            rank=1,
            alpha=pick(r, 1, 2.5),
            factor=2,
            tucker=pick(r, True, False),
            decompose_both=pick(r, True, False),
        ),
        (WINDOWS,),
    ),
    "hira": (lambda r: jlora.HiRA(rank=pick(r, 1, 2, 3)), (LINEAR, EMBEDDINGS)),
    "ia3": (lambda r: jlora.IA3(apply_to=pick(r, "inputs", "outputs")), (LINEAR,)),
    "vera": (lambda r: jlora.VeRA(rank=3, d_initial=pick(r, 0.1, 0.2)), (LINEAR,)),
    "vb_lora": (lambda r: jlora.VBLoRA(rank=2, num_vectors=4, vector_length=2), (LINEAR,)),
    "fourierft": (
        lambda r: jlora.FourierFT(
            num_frequencies=pick(r, 2, 3, 5), alpha=pick(r, 100.0, 250.0), seed=3
        ),
        ({name: one for name, one in LINEAR.items() if name != "one"},),
    ),
}


def check_random_adapter(family: str, seed: int, folder: pathlib.Path) -> None:
    make_config, groups = FAMILIES[family]
    params, stored, x = layers(*groups)
    rng = np.random.default_rng(seed)
    adapted = [name for name in params if rng.random() < 0.8] or list(params)[:1]
    configs = {name: make_config(rng) for name in adapted}
    adapter = filled(configs, params, x, seed)
    assert_peft_reads_it(adapter, params, stored, x, folder / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_save_mixed_configs_in_peft(family: str, tmp_path: pathlib.Path) -> None:
    check_random_adapter(family, 1, tmp_path)


def test_save_frequencies_of_alike_names_raise(tmp_path: pathlib.Path) -> None:
    params, stored, x = layers(LINEAR)
    numbers = {"one": 2, "two": 3, "three": 3}
    configs = {name: jlora.FourierFT(num_frequencies=n) for name, n in numbers.items()}
    adapter = filled(configs, params, x, 0)
    with pytest.raises(ValueError, match="n_frequency of .* apart"):
        peft.save(tmp_path / "out", adapter, fn, params, x, checkpoint_mapping=stored)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            {"two": jlora.LoRA(rank=1, alpha=1, dropout=0.5), "three": jlora.LoRA(rank=1, alpha=1)},
            r"one lora_dropout for all modules, and this adapter has \[0, 0.5\]",
        ),
        (
            {
                "two": jlora.FourierFT(num_frequencies=2, seed=1),
                "three": jlora.FourierFT(num_frequencies=2, seed=2),
            },
            r"one random_loc_seed for all modules, and this adapter has \[1, 2\]",
        ),
        (
            {
                "two": jlora.VBLoRA(rank=1, num_vectors=4, vector_length=2, top_k=1),
                "three": jlora.VBLoRA(rank=1, num_vectors=4, vector_length=2, top_k=2),
            },
            "one topk for all modules",
        ),
        (
            {"two": jlora.LoKr(rank=1, alpha=1, factor=2), "three": jlora.LoKr(rank=1, alpha=1)},
            "splits all weights by one decompose_factor",
        ),
    ],
    ids=["dropout", "seed", "topk", "factor"],
)
def test_save_settings_that_differ_raise(
    configs: Any, message: str, tmp_path: pathlib.Path
) -> None:
    params, stored, x = layers(LINEAR)
    adapter = filled(configs, params, x, 0)
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "out", adapter, fn, params, x, checkpoint_mapping=stored)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize("family", FAMILIES)
def test_save_many_mixed_configs_in_peft(family: str, seed: int, tmp_path: pathlib.Path) -> None:
    check_random_adapter(family, seed, tmp_path)
