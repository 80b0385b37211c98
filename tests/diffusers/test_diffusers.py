"""LoRA files of diffusers and kohya: loaded, applied, saved, converted and refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jlora
from jlora import diffusers
from jlora.models.hf.weight_mapping import single_tensor_weight, stack_weights

BLOCK = "down_blocks.0.attentions.0"
ATTN = f"{BLOCK}.transformer_blocks.0.attn1"
MODULES = {
    "conv": "conv_in",
    "one": f"{BLOCK}.proj_in",
    "q": f"{ATTN}.to_q",
    "o": f"{ATTN}.to_out.0",
}
SHAPES = {"conv": (3, 2, 4, 6), "one": (1, 1, 6, 5), "q": (5, 7), "o": (7, 9)}
ORDERS = {4: (2, 3, 1, 0), 2: (1, 0)}
STORED = {
    name: single_tensor_weight(f"{MODULES[name]}.weight", shape, ORDERS[len(shape)])
    for name, shape in SHAPES.items()
}
RANKS = {"conv": 2, "one": 3, "q": 4, "o": 1}
ALPHAS = {"conv": 3.0, "one": 0.5, "q": 4.0, "o": 2.0}
X = np.random.default_rng(1).normal(size=(2, 4, 5, 4)).astype(np.float32)
KEYS = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "unet.{}.alpha"),
    "older": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "unet.{}.alpha"),
    "linear": (
        "unet.{}.lora_linear_layer.down.weight",
        "unet.{}.lora_linear_layer.up.weight",
        "unet.{}.alpha",
    ),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}
DOWN = "lora_unet_conv_in.lora_down.weight"
UP = DOWN.replace("down", "up")
ALPHA = "lora_unet_conv_in.alpha"


def unet(params: Any, x: Any) -> Any:
    for name in ("conv", "one"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return jnp.tanh(x @ params["q"]) @ params["o"]


def random_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


PARAMS = random_params()


def factors(dtype: Any = np.float32) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Down and up of every weight, as torch has them."""
    rng = np.random.default_rng(2)
    made = {}
    for name, shape in SHAPES.items():
        *window, inputs, outputs = shape
        down = rng.normal(size=(RANKS[name], inputs, *window)).astype(dtype)
        up = rng.normal(size=(outputs, RANKS[name], *[1] * len(window))).astype(dtype)
        made[name] = down, up
    return made


def merged(scales: Mapping[str, float], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The base with the published update, without jlora."""
    sums = {}
    for name, (down, up) in factors(dtype).items():
        down, up = down.astype(np.float64), up.astype(np.float64)
        if down.ndim == 4:
            delta = np.einsum("or,rihw->hwio", up[:, :, 0, 0], down)
        else:
            delta = (up @ down).T
        sums[name] = (PARAMS[name] + scales[name] * delta).astype(np.float32)
    return sums


def tensors(style: str, alpha: bool = True, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    found = {}
    for name, (down, up) in factors(dtype).items():
        module = MODULES[name].replace(".", "_") if style == "kohya" else MODULES[name]
        of_down, of_up, of_alpha = (key.format(module) for key in KEYS[style])
        found |= {of_down: down, of_up: up}
        if alpha:
            found[of_alpha] = np.asarray(ALPHAS[name], np.float32)
    return found


def written(
    folder: pathlib.Path, content: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> pathlib.Path:
    path = folder / "lora.safetensors"
    safetensors.numpy.save_file(dict(content), path, metadata=metadata)
    return path


def loaded(path: pathlib.Path, **options: Any) -> dict[str, Any]:
    return diffusers.load(path, unet, PARAMS, X, **{"checkpoint_mapping": STORED, **options})


def saved(path: pathlib.Path, adapter: Any, **options: Any) -> dict[str, np.ndarray]:
    diffusers.save(path, adapter, unet, PARAMS, X, **{"checkpoint_mapping": STORED, **options})
    return safetensors.numpy.load_file(path)


def assert_adds(adapter: Any, scales: Mapping[str, float], dtype: Any = np.float32) -> None:
    out = jlora.lora_transform(unet).apply(PARAMS, adapter, X)
    # float32 sums of at most 24 products, four layers deep; outputs up to 100.
    np.testing.assert_allclose(out, unet(merged(scales, dtype), X), rtol=1e-4, atol=1e-3)


SCALES = {name: ALPHAS[name] / RANKS[name] for name in SHAPES}
ONES = dict.fromkeys(SHAPES, 1.0)


def trained(config: Any = None, seed: int = 3) -> dict[str, Any]:
    lora = jlora.lora_transform(unet, config or jlora.LoRA(rank=2, alpha=3))
    adapter = lora.init(jax.random.key(seed), PARAMS, X)
    return jax.tree.map(lambda a: a + 0.1, adapter)


def assert_same(one: Any, two: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("style", KEYS)
@pytest.mark.parametrize("alpha", [True, False])
def test_load_agrees_with_published_formula(
    style: str, alpha: bool, tmp_path: pathlib.Path
) -> None:
    adapter = loaded(written(tmp_path, tensors(style, alpha)))
    assert_adds(adapter, SCALES if alpha else ONES)
    assert {name: leaf.rank for name, leaf in adapter.items()} == RANKS


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_load_half_precision(dtype: Any, tmp_path: pathlib.Path) -> None:
    adapter = loaded(written(tmp_path, tensors("kohya", dtype=dtype)))
    assert_adds(adapter, SCALES, dtype)


def test_load_integer_alpha_of_one_axis(tmp_path: pathlib.Path) -> None:
    content = tensors("kohya") | {ALPHA: np.array([6], np.int64)}
    assert loaded(written(tmp_path, content))["conv"].scale == 3


def test_load_attention_processor_keys(tmp_path: pathlib.Path) -> None:
    new, old = tensors("diffusers", alpha=False), {}
    for name, last in (("q", "to_q"), ("o", "to_out")):
        for letter, end in (("A", "down"), ("B", "up")):
            value = new.pop(f"unet.{MODULES[name]}.lora_{letter}.weight")
            old[f"unet.{ATTN}.processor.{last}_lora.{end}.weight"] = value
    assert_adds(loaded(written(tmp_path, new | old)), ONES)


def test_load_text_encoder_processor_keys(tmp_path: pathlib.Path) -> None:
    attn = "text_model.encoder.layers.0.self_attn"
    stored = {"w": single_tensor_weight(f"{attn}.out_proj.weight", (5, 7), (1, 0))}
    params = {"w": PARAMS["q"]}
    down, up = factors()["q"]
    start = f"text_encoder.{attn}.to_out_lora"
    path = written(tmp_path, {f"{start}.down.weight": down, f"{start}.up.weight": up})
    fn = lambda p, x: x @ p["w"]
    x = np.ones((2, 5), np.float32)
    adapter = diffusers.load(path, fn, params, x, checkpoint_mapping=stored, prefix="text_encoder")
    out = jlora.lora_transform(fn).apply(params, adapter, x)
    # float32 sums of 5 products.
    np.testing.assert_allclose(out, x @ (params["w"] + (up @ down).T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("root", [False, True])
def test_load_alpha_from_metadata(root: bool, tmp_path: pathlib.Path) -> None:
    fields = {
        "r": 2,
        "lora_alpha": 3.0,
        "rank_pattern": {m: RANKS[n] for n, m in MODULES.items() if n != "conv"},
        "alpha_pattern": {m: ALPHAS[n] for n, m in MODULES.items() if n != "conv"},
        "use_rslora": root,
    }
    content = {f"unet.{name}": value for name, value in fields.items()}
    content["text_encoder.r"] = 9
    metadata = {"lora_adapter_metadata": json.dumps(content)}
    path = written(tmp_path, tensors("diffusers", alpha=False), metadata)
    power = 0.5 if root else 1
    assert_adds(loaded(path), {name: ALPHAS[name] / RANKS[name] ** power for name in SHAPES})


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_law_save_load_roundtrip(style: Any, tmp_path: pathlib.Path) -> None:
    adapter = loaded(written(tmp_path, tensors("diffusers")))
    path = tmp_path / "new" / "ours.safetensors"
    content = saved(path, adapter, file_format=style)
    assert_same(loaded(path), adapter)
    theirs = tensors(style, alpha=style == "kohya")
    assert set(content) == set(theirs)
    for key, value in theirs.items():
        assert content[key].shape == value.shape, key
        np.testing.assert_array_equal(content[key], value)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_law_conversion_between_formats_is_exact(tmp_path: pathlib.Path) -> None:
    adapter = loaded(written(tmp_path, tensors("kohya")))
    saved(tmp_path / "a", adapter)
    saved(tmp_path / "b", loaded(tmp_path / "a"), file_format="kohya")
    assert_same(loaded(tmp_path / "b"), adapter)
    assert_adds(loaded(tmp_path / "a"), SCALES)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "config",
    [
        jlora.LoRA(rank=3, alpha=2, use_rslora=True),
        jlora.LoRAFA(rank=2, alpha=3),
        jlora.DyLoRA(rank=2, alpha=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_save_lora_families_as_lora(config: Any, style: Any, tmp_path: pathlib.Path) -> None:
    adapter = trained(config)
    saved(tmp_path / "a", adapter, file_format=style)
    apply = jlora.lora_transform(unet).apply
    again = loaded(tmp_path / "a")
    assert {leaf.family for leaf in again.values()} == {"lora"}
    # kohya's alpha is in float32; outputs up to 100.
    one, two = (apply(PARAMS, a, X) for a in (adapter, again))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4)


def test_stacked_weight_has_one_module_per_layer(tmp_path: pathlib.Path) -> None:
    layers = [single_tensor_weight(f"blocks.{n}.to_q.weight", (5, 5), (1, 0)) for n in range(3)]
    stored = {"w": stack_weights(layers)}
    rng = np.random.default_rng(4)
    params = {"w": rng.normal(size=(3, 5, 5)).astype(np.float32)}
    x = rng.normal(size=(2, 5)).astype(np.float32)

    def fn(params: Any, x: Any) -> Any:
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, params["w"])[0]

    content, sums = {}, params["w"].copy()
    for n, rank in ((0, 2), (2, 3)):
        down, up = rng.normal(size=(rank, 5)), rng.normal(size=(5, rank))
        content[f"lora_unet_blocks_{n}_to_q.lora_down.weight"] = down.astype(np.float32)
        content[f"lora_unet_blocks_{n}_to_q.lora_up.weight"] = up.astype(np.float32)
        content[f"lora_unet_blocks_{n}_to_q.alpha"] = np.float32(1)
        sums[n] += (up @ down).T / rank
    path = written(tmp_path, {k: np.asarray(v) for k, v in content.items()})
    adapter = diffusers.load(path, fn, params, x, checkpoint_mapping=stored)
    out = jlora.lora_transform(fn).apply(params, adapter, x)
    # float32 through three layers of tanh.
    np.testing.assert_allclose(out, fn({"w": sums}, x), atol=1e-5)
    diffusers.save(
        tmp_path / "a", adapter, fn, params, x, checkpoint_mapping=stored, file_format="kohya"
    )
    ours = safetensors.numpy.load_file(tmp_path / "a")
    assert {k: v.shape for k, v in ours.items()} == {k: np.shape(v) for k, v in content.items()}
    again = diffusers.load(tmp_path / "a", fn, params, x, checkpoint_mapping=stored)
    out = jlora.lora_transform(fn).apply(params, again, x)
    np.testing.assert_allclose(out, fn({"w": sums}, x), atol=1e-5)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_save_pipeline_of_several_models(style: Any, tmp_path: pathlib.Path) -> None:
    prefixes = ("unet", "text_encoder", "text_encoder_2")
    adapters = {prefix: trained(seed=n) for n, prefix in enumerate(prefixes)}
    parts = {
        prefix: diffusers.ModelAdapter(adapter, unet, PARAMS, (X,), STORED)
        for prefix, adapter in adapters.items()
    }
    diffusers.save_pipeline(tmp_path / "a", parts, file_format=style)
    for prefix, adapter in adapters.items():
        assert_same(loaded(tmp_path / "a", prefix=prefix), adapter)
    heads = {key.split("_conv_in")[0] for key in safetensors.numpy.load_file(tmp_path / "a")}
    if style == "kohya":
        assert {"lora_unet", "lora_te1", "lora_te2"} <= heads
    alone = saved(tmp_path / "b", adapters["unet"], prefix="text_encoder", file_format="kohya")
    assert all(key.startswith("lora_te_") for key in alone)


def test_load_ignores_other_prefixes(tmp_path: pathlib.Path) -> None:
    others = {
        "text_encoder.x.lora_A.weight": np.full((2, 3), np.nan, np.float32),
        "lora_te_x.hada_w1_a": np.ones((2, 3), np.int8),
    }
    assert_adds(loaded(written(tmp_path, tensors("kohya") | others)), SCALES)


def test_save_alpha_pattern_of_nested_names(tmp_path: pathlib.Path) -> None:
    # As PEFT matches its patterns, the name `to_q` is also every other module's that ends so.
    stored = dict(STORED, q=single_tensor_weight("to_q.weight", (5, 7), (1, 0)))
    stored["o"] = single_tensor_weight("block.to_q.weight", (7, 9), (1, 0))
    adapter = {n: leaf for n, leaf in trained().items() if n in "qo"}
    adapter["q"] = dataclasses.replace(adapter["q"], alpha=7.0)
    adapter |= {"conv": trained()["conv"]}
    saved(tmp_path / "a", adapter, checkpoint_mapping=stored)
    assert_same(loaded(tmp_path / "a", checkpoint_mapping=stored), adapter)


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {k: v for k, v in content.items() if k != key}


def given(key: str, change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: (
        content | {key: change(content[key]) if callable(change) else np.asarray(change)}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(DOWN), "conv_in lacks down"),
        (without(UP), "conv_in lacks up"),
        (given(DOWN, lambda a: a[:1]), "ranks 1 in down and 2 in up"),
        (given(DOWN, lambda a: a.T.copy()), r"down of conv_in has shape .* It looks transposed"),
        (given(UP, lambda a: a.T.copy()), r"up of conv_in has shape .* It looks transposed"),
        (
            given(UP, lambda a: a[:-1]),
            r"up of conv_in has shape \(5, 2, 1, 1\) instead of \(6, ",
        ),
        (given(DOWN, np.float32(1)), r"down of conv_in has shape \(\)"),
        (given(DOWN, lambda a: a * np.float32(np.nan)), "conv_in.lora_down.weight holds NaN"),
        (given(UP, lambda a: a.astype(np.int8)), "has dtype I8, none of F16, BF16, F32"),
        (given(ALPHA, 0.0), "alpha of conv_in must be positive, got 0.0"),
        (given(ALPHA, [1.0, 2.0]), r"alpha of conv_in must be one number, got shape \(2,\)"),
        (given(ALPHA, np.float32("inf")), "conv_in.alpha holds NaN or Inf"),
        (given("lora_unet_conv_in.dora_scale", np.ones((6, 1))), "conv_in.dora_scale is of DoRA"),
        (given("lora_unet_conv_in.hada_w1_a", np.ones((6, 1))), "is of LoHa"),
        (given("lora_unet_conv_in.lokr_w1", np.ones((6, 1))), "is of LoKr"),
        (given("lora_unet_conv_in.lora_mid.weight", np.ones((2, 2))), "with a core"),
        (given("lora_unet_conv_in.other", np.ones(1)), "must be a factor or the alpha of LoRA"),
        (given("unet.conv_in.lora_magnitude_vector", np.ones(6)), "is of DoRA"),
        (given("unet.conv_in.lora_A.bias", np.ones(6)), "must be a factor or the alpha of LoRA"),
        (given("unet.conv_in.lora_A.weight", np.ones(6)), "must be the only tensor for down"),
        (
            given("unet.conv_on.lora_A.weight", np.ones(6)),
            "'conv_on', which the model does not have.*_in",
        ),
        (
            given("lora_unet_conv_on.lora_up.weight", np.ones(6)),
            "a module that the model does not have.*nearest.*'conv_in'",
        ),
        (
            given("lora_unet_input_blocks_1_1_proj_in.alpha", 1.0),
            "names of the original Stable Diffusion",
        ),
        (lambda content: {"lora_te_x.alpha": np.ones(1)}, "no tensor for prefix='unet'.*lora_te_x"),
        (lambda content: {}, "no tensor for prefix='unet'.*none"),
    ],
)
def test_load_wrong_tensors_raise(change: Any, message: str, tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, change(tensors("kohya")))
    with pytest.raises(ValueError, match=message):
        loaded(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must contain a JSON object"),
        ('{"unet.r": 5}', "has rank 2, and the metadata has r=5"),
        ('{"unet.use_dora": true}', "method in its metadata is DoRA"),
        ('{"unet.peft_type": "LOHA"}', "method in its metadata is LOHA"),
        ('{"unet.lora_alpha": 0}', "must be a positive number"),
        ('{"unet.init_lora_weights": "pissa"}', "is not supported"),
        ('{"unet.r": 2, "unet.rank_pattern": {"nowhere": 3}}', "nowhere.*matches none"),
    ],
)
def test_load_wrong_metadata_raises(text: str, message: str, tmp_path: pathlib.Path) -> None:
    content = tensors("diffusers", alpha=False)
    content = {key: value for key, value in content.items() if "conv_in" in key}
    path = written(tmp_path, content, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        loaded(path)


def test_load_alpha_in_two_places_raises(tmp_path: pathlib.Path) -> None:
    metadata = {"lora_adapter_metadata": '{"unet.r": 2}'}
    with pytest.raises(ValueError, match="alpha in its metadata or in tensors, got both"):
        loaded(written(tmp_path, tensors("diffusers"), metadata))


def test_load_not_safetensors_raises(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, tensors("kohya"))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-5])
    for name in ("lora.pt", "lora.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="damaged"):
        loaded(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"lora\.pt is not opened.*can run code"):
        loaded(tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="damaged"):
        loaded(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        loaded(tmp_path / "none.safetensors")


def test_kohya_ambiguous_names_raise(tmp_path: pathlib.Path) -> None:
    stored = dict(STORED, q=single_tensor_weight("conv.in.weight", (5, 7), (1, 0)))
    with pytest.raises(ValueError, match=r"any of \['conv_in', 'conv.in'\]"):
        loaded(written(tmp_path, tensors("kohya")), checkpoint_mapping=stored)
    with pytest.raises(ValueError, match="have the same name, lora_unet_conv_in"):
        saved(tmp_path / "a", trained(), checkpoint_mapping=stored, file_format="kohya")
    assert saved(tmp_path / "a", trained(), checkpoint_mapping=stored)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: trained(jlora.DoRA(rank=2, alpha=2)), "'dora' on 'conv'.*jlora.to_lora"),
        (lambda: trained(jlora.LoHa(rank=2, alpha=2)), "'loha' on .*jlora.to_lora"),
        (dict, "got no weights"),
        (
            lambda: trained(jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa())),
            "rebase_to_original",
        ),
        (lambda: jax.tree.map(lambda a: a * jnp.nan, trained()), "has NaN or infinite"),
    ],
)
def test_save_unsupported_adapter_raises(
    adapter: Any, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        saved(tmp_path / "a", adapter())
    assert not list(tmp_path.iterdir())


def test_bad_arguments_raise(tmp_path: pathlib.Path) -> None:
    path, adapter = tmp_path / "a", trained()
    with pytest.raises(ValueError, match="file_format='other' must be"):
        saved(path, adapter, file_format="other")
    with pytest.raises(ValueError, match="prefix='prior' must be one of .*file_format='kohya'"):
        saved(path, adapter, prefix="prior", file_format="kohya")
    with pytest.raises(ValueError, match="prefix='unet.' must be the name"):
        loaded(path, prefix="unet.")
    with pytest.raises(
        ValueError, match="checkpoint_mapping has nowhere, which params does not have"
    ):
        loaded(
            written(tmp_path, tensors("kohya")),
            checkpoint_mapping=STORED | {"nowhere": STORED["q"]},
        )


def test_embedding_raises(tmp_path: pathlib.Path) -> None:
    fn = lambda p, ids: p["table"][ids]
    params, ids = {"table": np.ones((9, 5), np.float32)}, np.array([1, 2])
    stored = {"table": single_tensor_weight("embed.weight", (9, 5))}
    rule = {"table": jlora.LoRA(rank=2, alpha=2)}
    adapter = jlora.lora_transform(fn, rule).init(jax.random.key(0), params, ids)
    with pytest.raises(ValueError, match="table cannot be written: its kind is embedding"):
        diffusers.save(tmp_path / "a", adapter, fn, params, ids, checkpoint_mapping=stored)
    content = {"unet.embed.lora_A.weight": np.ones((2, 9), np.float32)}
    with pytest.raises(ValueError, match="embed cannot be adapted: its kind is embedding"):
        diffusers.load(written(tmp_path, content), fn, params, ids, checkpoint_mapping=stored)


def test_save_existing_file_raises(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a"
    path.write_text("kept")
    with pytest.raises(FileExistsError, match="left as it was"):
        saved(path, trained())
    assert path.read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
