"""Every adapter method against PEFT's results, in data/, which make_peft_data.py writes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from jax import lax

import jlora
from jlora.adapters.fourierft import sample_frequency_indices
from jlora.adapters.lokr import factorization
from jlora.interpreter.factored_array import FactoredArray

DATA = pathlib.Path(__file__).parent / "data"
Arrays = dict[str, np.ndarray]
# float32 sums of at most 60 products of values near one; outputs and weights are below 20.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def load(name: str) -> tuple[Arrays, dict[str, Any]]:
    with safetensors.safe_open(DATA / f"{name}.safetensors", framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return arrays, json.loads(file.metadata()["case"])


# --- layers, from torch's layout -----------------------------------------------------------------


def linear(params: Any, x: Any) -> Any:
    return x @ params["w"] + params.get("b", 0)


def convolution(params: Any, x: Any) -> Any:
    y = lax.conv_general_dilated(
        x, params["w"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    return y + params["b"][:, None, None] if "b" in params else y


def embedding(params: Any, tokens: Any) -> Any:
    return params["w"][tokens]


def flipped(array: np.ndarray) -> np.ndarray:
    return array.T


def same(array: np.ndarray) -> np.ndarray:
    return array


def to_hwio(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0)


FORWARD: dict[str, tuple[Callable[..., Any], Callable[[np.ndarray], np.ndarray]]] = {
    "linear": (linear, flipped),
    "conv2d": (convolution, to_hwio),
    "embedding": (embedding, same),
}


# --- arrays, by family ---------------------------------------------------------------------------


def lora(
    t: Mapping[str, np.ndarray], kind: str, prefix: str = "lora_", end: str = ".weight"
) -> Any:
    if kind == "embedding":
        return {"a": t[f"{prefix}embedding_A"].T, "b": t[f"{prefix}embedding_B"].T}
    a, b = t[f"{prefix}A{end}"], t[f"{prefix}B{end}"]
    if kind == "conv2d":
        return {"a": a.transpose(2, 3, 1, 0), "b": b[:, :, 0, 0].T}
    return {"a": a.T, "b": b.T}


def dora(t: Mapping[str, np.ndarray], kind: str) -> Any:
    return {**lora(t, kind), "magnitude": t["lora_magnitude_vector"].reshape(-1)}


def hira(t: Mapping[str, np.ndarray], kind: str) -> Any:
    return lora(t, kind, "hira_", "")


def adalora(t: Mapping[str, np.ndarray], kind: str) -> Any:
    return {**lora(t, kind, end=""), "s": t["lora_E"][:, 0]}


def loha(t: Mapping[str, np.ndarray], kind: str) -> Any:
    arrays = {}
    for n in (1, 2):
        out_first, in_first = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if f"hada_t{n}" in t:
            arrays |= {f"a{n}": in_first.T, f"b{n}": out_first}
            arrays[f"core{n}"] = t[f"hada_t{n}"].transpose(1, 0, 2, 3)
        elif kind == "conv2d":
            rank = in_first.shape[0]
            arrays[f"a{n}"] = in_first.reshape(rank, 5, 3, 2).transpose(2, 3, 1, 0)
            arrays[f"b{n}"] = out_first.T
        else:
            arrays |= {f"a{n}": in_first.T, f"b{n}": out_first.T}
    return arrays


def lokr(t: Mapping[str, np.ndarray], kind: str) -> Any:
    arrays = {}
    if "lokr_w1" in t:
        arrays["w1"] = t["lokr_w1"].T
    else:
        arrays |= {"a1": t["lokr_w1_b"].T, "b1": t["lokr_w1_a"].T}
    if "lokr_t2" in t:
        arrays |= {"a2": t["lokr_w2_b"].T, "b2": t["lokr_w2_a"]}
        arrays["core2"] = t["lokr_t2"].transpose(1, 0, 2, 3)
    elif "lokr_w2" in t:
        arrays["w2"] = t["lokr_w2"].T
    else:
        b, a = t["lokr_w2_a"], t["lokr_w2_b"]
        if kind == "conv2d":
            a = a.reshape(len(a), -1, 3, 2).transpose(2, 3, 1, 0)
        arrays |= {"a2": a if kind == "conv2d" else a.T, "b2": b.T}
    return arrays


def ia3(t: Mapping[str, np.ndarray], kind: str) -> Any:
    del kind
    return {"l": t["ia3_l"].reshape(-1)}


def config_of(name: str, case: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """jlora's config for a case, and the function that converts its arrays."""
    rank, alpha = case.get("r"), case.get("lora_alpha", case.get("alpha"))
    tucker = bool(case.get("use_effective_conv2d"))
    configs = {
        "lora": lambda: (
            jlora.LoRA(rank=rank, alpha=alpha, use_rslora=case.get("use_rslora", False)),
            lora,
        ),
        "dora": lambda: (jlora.DoRA(rank=rank, alpha=alpha), dora),
        "hira": lambda: (jlora.HiRA(rank=rank), hira),
        "adalora": lambda: (jlora.AdaLoRA(rank=case["init_r"], alpha=alpha), adalora),
        "loha": lambda: (jlora.LoHa(rank=rank, alpha=alpha, tucker=tucker), loha),
        "lokr": lambda: (
            jlora.LoKr(
                rank=rank,
                alpha=alpha,
                tucker=tucker,
                factor=case.get("decompose_factor", -1),
                decompose_both=case.get("decompose_both", False),
            ),
            lokr,
        ),
        "ia3": lambda: (
            jlora.IA3(apply_to="inputs" if "feedforward" in name else "outputs"),
            ia3,
        ),
    }
    return configs[name.split("_")[0]]()


def filled(adapter: dict[str, Any], path: str, arrays: Arrays) -> dict[str, Any]:
    """The adapter with the arrays of one leaf replaced by others of the same shapes."""
    leaf = adapter[path]
    shapes = {name: shape for name, shape in leaf.shapes().items() if name in arrays}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    changed = {name: jnp.asarray(array) for name, array in arrays.items()}
    return {**adapter, path: dataclasses.replace(leaf, **changed)}


ONE_LAYER = [
    "lora_linear",
    "lora_rs_linear",
    "lora_embedding",
    "lora_conv2d",
    "dora_linear",
    "dora_embedding",
    "dora_conv2d",
    "adalora",
    "loha_linear",
    "loha_conv2d",
    "loha_conv2d_effective",
    "lokr_linear",
    "lokr_linear_full",
    "lokr_linear_both_decomposed",
    "lokr_conv2d",
    "lokr_conv2d_effective",
    "hira_linear",
    "hira_embedding",
    "hira_conv2d",
    "ia3",
    "ia3_feedforward",
]


@pytest.mark.parametrize("name", ONE_LAYER)
@pytest.mark.thin(3)
def test_apply_and_merge_match_peft(name: str) -> None:
    tensors, fields = load(name)
    kind = next((kind for kind in FORWARD if kind in name), "linear")
    fn, layout = FORWARD[kind]
    params = {"w": jnp.asarray(layout(tensors["base/weight"]))}
    if "base/bias" in tensors:
        params["b"] = jnp.asarray(tensors["base/bias"])
    config, convert = config_of(name, fields)
    own = {key.removeprefix("adapter/"): array for key, array in tensors.items()}
    x = tensors["input"]
    lora_ = jlora.lora_transform(fn, {"w": config})
    adapter = lora_.init(jax.random.key(0), params, x)
    adapter = filled(adapter, "w", convert(own, kind))
    np.testing.assert_allclose(lora_.apply(params, adapter, x), tensors["output"], **FLOAT32)
    merged = lora_.merge(params, adapter)["w"]
    np.testing.assert_allclose(merged, layout(tensors["merged/weight"]), **FLOAT32)


def two_layers(params: Any, x: Any) -> Any:
    """The second layer on the output of the first."""
    for name in ("first", "second"):
        x = x @ params[name] + params.get(f"{name}_bias", 0)
    return x


def two(tensors: Arrays) -> dict[str, Any]:
    params = {name: jnp.asarray(tensors[f"base/{name}/weight"].T) for name in ("first", "second")}
    biases = {
        f"{name}_bias": jnp.asarray(tensors[f"base/{name}/bias"])
        for name in ("first", "second")
        if f"base/{name}/bias" in tensors
    }
    return params | biases


def test_vera_shared_layers_match_peft() -> None:
    tensors, fields = load("vera")
    params = two(tensors)
    config = jlora.VeRA(rank=fields["r"], d_initial=fields["d_initial"])
    vera = jlora.lora_transform(two_layers, {"^(first|second)$": config})
    adapter = jax.jit(vera.init)(jax.random.key(0), params, tensors["input"])
    for name in ("first", "second"):
        arrays = {key: tensors[f"adapter/{name}/vera_lambda_{key}"] for key in ("d", "b")}
        adapter = filled(adapter, name, arrays)
    shared = {"a": tensors["adapter/vera_A"].T, "b": tensors["adapter/vera_B"].T}
    adapter = filled(adapter, "vera", shared)
    compare(vera, params, adapter, tensors)


def test_vb_lora_shared_layers_match_peft() -> None:
    tensors, fields = load("vblora")
    params = two(tensors)
    config = jlora.VBLoRA(
        rank=fields["r"],
        num_vectors=fields["num_vectors"],
        vector_length=fields["vector_length"],
        top_k=fields["topk"],
    )
    vb = jlora.lora_transform(two_layers, {"^(first|second)$": config})
    adapter = jax.jit(vb.init)(jax.random.key(0), params, tensors["input"])
    for name in ("first", "second"):
        b = tensors[f"adapter/{name}/vblora_logits_B"].transpose(1, 0, 2)
        arrays = {"logits_a": tensors[f"adapter/{name}/vblora_logits_A"], "logits_b": b}
        adapter = filled(adapter, name, arrays)
    adapter = filled(adapter, "vb_lora", {"bank": tensors["adapter/vblora_vector_bank"]})
    compare(vb, params, adapter, tensors)


def compare(lora_: Any, params: Any, adapter: Any, tensors: Arrays) -> None:
    x = tensors["input"]
    output = jax.jit(lora_.apply)(params, adapter, x)
    np.testing.assert_allclose(output, tensors["output"], **FLOAT32)
    merged = jax.jit(lora_.merge)(params, adapter)
    for name in ("first", "second"):
        expected = tensors[f"merged/{name}/weight"].T
        np.testing.assert_allclose(merged[name], expected, **FLOAT32)


def test_fourierft_matches_peft() -> None:
    tensors, fields = load("fourierft")
    params = {"w": jnp.asarray(tensors["base/weight"].T), "b": jnp.asarray(tensors["base/bias"])}
    spectrum = tensors["adapter/fourierft_spectrum"]
    config = jlora.FourierFT(
        num_frequencies=len(spectrum), alpha=fields["scaling"], seed=fields["random_loc_seed"]
    )
    ft = jlora.lora_transform(linear, {"w": config})
    x = tensors["input"]
    adapter = ft.init(jax.random.key(0), params, x)
    # PEFT's indices are those of (out, in), the transpose of ours.
    ours = sample_frequency_indices(len(spectrum), fields["random_loc_seed"], *params["w"].shape)
    np.testing.assert_array_equal(ours, tensors["indices"][::-1])
    leaf = dataclasses.replace(adapter["w"], spectrum=jnp.asarray(spectrum))
    np.testing.assert_allclose(ft.apply(params, {"w": leaf}, x), tensors["output"], **FLOAT32)
    merged = ft.merge(params, {"w": leaf})["w"]
    np.testing.assert_allclose(merged, tensors["merged/weight"].T, **FLOAT32)
    # So many entries use the inverse transform; the low-rank form gives the same update.
    zero = FactoredArray.from_weight(jnp.zeros(leaf.shape), "w", leaf.shape)
    dense = zero.add(*leaf._wave_factors()).materialize()
    expected = tensors["merged/weight"].T - tensors["base/weight"].T
    np.testing.assert_allclose(dense, expected, **FLOAT32)


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("pissa", jlora.initializers.pissa()),
        ("pissa_niter", jlora.initializers.pissa(iterations=16)),
        ("olora", jlora.initializers.olora()),
    ],
)
def test_residual_inits_match_peft(name: str, init: Any) -> None:
    tensors, fields = load(name)
    params = {"w": jnp.asarray(tensors["base/weight"].T), "b": jnp.asarray(tensors["base/bias"])}
    config = jlora.LoRA(rank=fields["r"], alpha=fields["lora_alpha"], init=init)
    lora_ = jlora.lora_transform(linear, {"w": config})
    x = tensors["input"]
    adapter = lora_.init(jax.random.key(0), params, x)
    base = jlora.residual_base(params, adapter)
    # The signs of singular vectors are arbitrary; those of their product are not.
    np.testing.assert_allclose(base["w"], tensors["residual/weight"].T, **FLOAT32)
    theirs = tensors["adapter/lora_B.weight"] @ tensors["adapter/lora_A.weight"]
    np.testing.assert_allclose(adapter["w"].a @ adapter["w"].b, theirs.T, **FLOAT32)
    for ours, key in ((adapter["w"].a, "lora_A"), (adapter["w"].b, "lora_B")):
        other = tensors[f"adapter/{key}.weight"].T
        np.testing.assert_allclose(np.abs(ours), np.abs(other), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lora_.apply(base, adapter, x), tensors["output"], **FLOAT32)


def test_eva_directions_match_peft() -> None:
    tensors, fields = load("eva")
    params = {"w": jnp.asarray(tensors["base/weight"].T), "b": jnp.asarray(tensors["base/bias"])}
    x = tensors["input"]
    moments = jlora.input_moments(linear, {"w": jlora.LoRA(rank=1, alpha=1)}, params, x)
    init = jlora.initializers.eva(moments)
    config = jlora.LoRA(rank=fields["r"], alpha=fields["lora_alpha"], init=init)
    adapter = jlora.lora_transform(linear, {"w": config}).init(jax.random.key(0), params, x)
    # Eigenvectors of a matrix of 14 squared inputs: the gaps between them are a tenth and more.
    theirs = tensors["adapter/lora_A.weight"].T
    np.testing.assert_allclose(adapter["w"].a, theirs, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(adapter["w"].b, 0)


def test_lora_ga_matches_peft_and_paper() -> None:
    tensors, fields = load("lora_ga")
    rank = fields["r"]
    params = {"w": jnp.asarray(tensors["base/weight"].T), "b": jnp.asarray(tensors["base/bias"])}
    gradient = {"w": tensors["gradient"].T, "b": tensors["base/bias"]}
    init = jlora.initializers.lora_ga(gradient, gamma=16)
    config = jlora.LoRA(rank=rank, alpha=fields["lora_alpha"], init=init)
    lora_ = jlora.lora_transform(linear, {"w": config})
    adapter = lora_.init(jax.random.key(0), params, tensors["input"])
    for ours, theirs in (
        (adapter["w"].a.T, tensors["adapter/lora_A.weight"]),
        (adapter["w"].b, tensors["adapter/lora_B.weight"].T),
    ):
        size = np.linalg.norm(ours, axis=1)
        np.testing.assert_allclose(size, 10**0.25 / 4, rtol=1e-5)
        cosine = (ours * theirs).sum(1) / size / np.linalg.norm(theirs, axis=1)
        np.testing.assert_allclose(np.abs(cosine), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "factor", "first"),
    [(12, 4, 4), (6, 6, 6), (24, 8, 8), (12, -1, 3), (22, 3, 2), (10, 4, 2), (13, -1, 1)],
)
def test_factorization_matches_peft(size: int, factor: int, first: int) -> None:
    assert factorization(size, factor) == first


def test_data_every_case_is_tested() -> None:
    others = {"vera", "vblora", "fourierft", "pissa", "pissa_niter", "olora", "eva", "lora_ga"}
    # A bias that PEFT scales with the outputs, and a random initialization.
    others |= {"ia3_bias", "orthogonal"}
    assert {path.stem for path in DATA.glob("*.safetensors")} == others | set(ONE_LAYER)
    assert all(path.stat().st_size < 50_000 for path in DATA.glob("*.safetensors"))
