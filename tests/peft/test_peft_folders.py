"""PEFT folders: loaded, applied, saved again, and refused if they are wrong.

`data/` was written by make_folders.py with the models of tests/models/data.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import _tree, models, peft
from jlora.interpreter.terms import WeightAxes
from jlora.models.hf import load
from jlora.models.hf.weight_mapping import single_tensor_weight
from jlora.peft.config import COMMON_DEFAULTS, match_target_modules
from jlora.peft.tensor_layouts import (
    TensorLayout,
    WeightGeometry,
    leaf_to_tensor,
    list_module_parameters,
    tensor_to_leaf,
)

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data"
MODELS = HERE.parent / "models" / "data"
NAMES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
COPIES = (".modules_to_save.bias", ".original_module.bias")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def config_of(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


@functools.cache
def base(name: str, scanned: bool = False) -> models.LoadedModel:
    """A decoder by its name alone, any model by its folder and name."""
    folder = MODELS / (name if "/" in name else f"decoders/{name}")
    options = {"scan_layers": True} if scanned else {}
    return models.load(folder, dtype=jnp.float32, **options)


def base_of(name: str, scanned: bool = False) -> models.LoadedModel:
    return base(config_of(DATA / name)["base_model_name_or_path"], scanned)


@functools.cache
def loaded(name: str, scanned: bool = False) -> peft.LoadedAdapter:
    return peft.load(DATA / name, *base_of(name, scanned))


def inputs(name: str) -> tuple[np.ndarray, ...]:
    """Inputs of the base's expected outputs; ids and mask first, for texts."""
    folder = MODELS / config_of(DATA / name)["base_model_name_or_path"]
    tensors = safetensors.numpy.load_file(folder / "expected.safetensors")
    names = ("images", "input_ids", "mask", "attention_mask", "token_type_ids")
    return tuple(tensors[name] for name in names if name in tensors)


def is_decoder(name: str) -> bool:
    return config_of(DATA / name)["base_model_name_or_path"].startswith("decoders/")


BOTH = [
    pytest.param(name, scanned, id=f"{name}-{'scanned' if scanned else 'unrolled'}")
    for name in NAMES
    for scanned in ((False, True) if is_decoder(name) else (False,))
]


@pytest.mark.parametrize(("name", "scanned"), BOTH)
@pytest.mark.thin(9)
def test_load_apply_agrees_with_peft(name: str, scanned: bool) -> None:
    model, _ = base_of(name, scanned)
    params, adapter = loaded(name, scanned)
    given = inputs(name)
    lora = jlora.lora_transform(model.apply)
    out = np.asarray(jax.jit(lora.apply)(params, adapter, *given))
    theirs = safetensors.numpy.load_file(DATA / name / "expected.safetensors")["output"]
    # Outputs at padding are undefined.
    seen = given[1] > 0 if out.ndim == 3 else ...
    # float32: one ulp in every weight moves some of these outputs by 2.5e-5.
    np.testing.assert_allclose(out[seen], theirs[seen], atol=5e-5)


def assert_same_function(model: Any, params: Any, one: Any, other: Any, given: Any) -> None:
    """Compares outputs only where the arrays differ, because a program has to be compiled."""
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)
    if jax.tree.structure(one) != jax.tree.structure(other) or not all(jax.tree.leaves(equal)):
        apply = jax.jit(jlora.lora_transform(model.apply).apply)
        np.testing.assert_allclose(
            apply(params, one, *given), apply(params, other, *given), atol=1e-5
        )


@pytest.mark.parametrize(("name", "scanned"), BOTH)
@pytest.mark.thin(9, 1)
def test_save_writes_the_tensors_of_peft(name: str, scanned: bool, tmp_path: pathlib.Path) -> None:
    model, _ = base_of(name, scanned)
    params, adapter = loaded(name, scanned)
    task = config_of(DATA / name)["task_type"]
    if name == "roberta_tokens":  # Its modules have biases, which PEFT's IA3 scales too.
        with pytest.raises(ValueError, match="scales the bias of .*key with its outputs"):
            peft.save(tmp_path / "ours", adapter, model, params, task_type=task)
        return
    peft.save(tmp_path / "ours", adapter, model, params, task_type=task)
    ours = safetensors.numpy.load_file(tmp_path / "ours" / TENSORS)
    theirs = safetensors.numpy.load_file(DATA / name / TENSORS)
    # With all biases PEFT writes those of a saved module three times.
    theirs = {k: v for k, v in theirs.items() if not k.endswith(COPIES)}
    assert set(ours) == set(theirs)
    # Stacked layers have one scale, so those of other scales have theirs in their factors.
    exact = not (scanned and name == "lora_patterns")
    for key in theirs:
        assert ours[key].shape == theirs[key].shape, key
        if exact:
            np.testing.assert_array_equal(ours[key], theirs[key].astype(ours[key].dtype), key)
    again = peft.load(tmp_path / "ours", model, params)
    assert_same_function(model, params, adapter, again.adapter, inputs(name))
    written, known = config_of(tmp_path / "ours"), config_of(DATA / name)
    for field in ("bias", "peft_type", "task_type", "r", "init_r", "use_rslora", "use_dora"):
        if field in written and field in known:
            assert written[field] == known[field], field
    assert written.get("target_parameters") == known.get("target_parameters")
    # PEFT adds the usual names of heads, whether there are such or not.
    assert set(written["modules_to_save"] or []) == set(known.get("modules_to_save") or [])
    modules = list(
        {site.module for site in list_module_parameters(models.checkpoint_mapping(model)[0])}
    )
    ours, theirs = (
        match_target_modules({**COMMON_DEFAULTS, **fields}, modules) for fields in (written, known)
    )
    assert ours == theirs
    assert written.get("trainable_token_indices") == known.get("trainable_token_indices")


@pytest.mark.parametrize("name", ["lora_saved", "lora_biases", "lora_tokens"])
def test_load_replaces_base_and_trains_on(name: str) -> None:
    model, before = base_of(name)
    params, adapter = loaded(name)
    lora = jlora.lora_transform(model.apply)
    ids, mask = inputs(name)
    loss = lambda a: jnp.sin(lora.apply(params, a, ids, mask)).sum()
    gradient = jax.jit(jax.grad(loss))(adapter)
    new = {p for p, leaf in adapter.items() if leaf.family in ("full", "bias", "trainable_tokens")}
    assert len(new) == {"lora_saved": 2, "lora_biases": 4, "lora_tokens": 1}[name]
    for path in new:
        assert not np.asarray(adapter[path].delta).any()
        assert np.abs(gradient[path].delta).max() > 1e-3
    flat = dict(zip(*_tree.flatten_with_paths(params)[:2], strict=True))
    old = dict(zip(*_tree.flatten_with_paths(before)[:2], strict=True))
    changed = {path for path in flat if np.asarray(flat[path] != old[path]).any()}
    assert changed == new


def test_load_stacked_ranks_are_padded() -> None:
    model, _ = base_of("lora_patterns", scanned=True)
    params, adapter = loaded("lora_patterns", scanned=True)
    leaf = adapter["params/layers/attention/q/kernel"]
    assert leaf.rank == 4
    lora = jlora.lora_transform(model.apply)
    ids, mask = inputs("lora_patterns")
    loss = lambda a: jnp.sin(lora.apply(params, a, ids, mask)).sum()
    gradient = jax.jit(jax.grad(loss))(adapter)["params/layers/attention/q/kernel"]
    assert not np.asarray(leaf.a)[0, :, 2:].any()
    assert not np.asarray(gradient.a)[0, :, 2:].any()
    assert not np.asarray(gradient.b)[0, 2:].any()
    assert np.asarray(gradient.a)[1].any(axis=0).all()


# --- adapters of jlora ---


def trained(config: Any, pattern: str = r"(q|v|down)/kernel", name: str = "llama") -> Any:
    model, params = base(name)
    lora = jlora.lora_transform(model.apply, {pattern: config})
    fresh = lora.init(jax.random.key(3), params, jnp.ones((1, 2), jnp.int32))
    return jax.tree.map(lambda x: x + 0.1, fresh)


@pytest.mark.parametrize(
    "config",
    [
        jlora.LoRA(rank=3, alpha=5, dropout=0.25),
        jlora.LoRA(rank=3, alpha=5, use_rslora=True),
        jlora.LoRAFA(rank=2, alpha=5),
        jlora.DyLoRA(rank=2, alpha=5),
        jlora.DoRA(rank=2, alpha=5),
        jlora.AdaLoRA(rank=2, alpha=5),
        jlora.LoHa(rank=2, alpha=5),
        jlora.LoKr(rank=1, alpha=5, factor=3),
        jlora.HiRA(rank=2),
        jlora.IA3(),
        jlora.VeRA(rank=5),
        jlora.VBLoRA(rank=2, num_vectors=5, vector_length=2),
        jlora.FourierFT(num_frequencies=7, alpha=20, seed=5),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.thin(3)
def test_save_load_computes_the_same_function(config: Any, tmp_path: pathlib.Path) -> None:
    model, params = base("llama")
    adapter = trained(config)
    peft.save(
        tmp_path / "out",
        adapter,
        model,
        params,
        base_model_name_or_path="base",
        task_type="CAUSAL_LM",
    )
    again = peft.load(tmp_path / "out", model, params).adapter
    ids, mask = inputs("lora")
    apply = jax.jit(jlora.lora_transform(model.apply).apply)
    one, two = (apply(params, a, ids, mask) for a in (adapter, again))
    np.testing.assert_allclose(one, two, atol=1e-6)  # The same numbers, in the same order.
    written = config_of(tmp_path / "out")
    assert written["base_model_name_or_path"] == "base"
    assert written["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    if hasattr(config, "dropout") and config.dropout:
        assert written["lora_dropout"] == config.dropout


def test_save_load_function_with_mapping(tmp_path: pathlib.Path) -> None:
    def fn(params: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.einsum("bhwc,cnd->bhwnd", y, params["heads"]) @ params["out"]

    shapes = {"conv": (3, 2, 4, 6), "heads": (6, 2, 5), "out": (5, 7)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    stored = {
        "conv": single_tensor_weight("net.conv.weight", shapes["conv"], (2, 3, 1, 0)),
        "heads": single_tensor_weight("net.heads.weight", shapes["heads"]),
        "out": single_tensor_weight("net.out.weight", shapes["out"], (1, 0)),
    }
    x = jnp.ones((1, 5, 5, 4))
    for config in (jlora.LoRA(rank=2, alpha=3), jlora.DoRA(rank=2, alpha=3), jlora.HiRA(rank=2)):
        lora = jlora.lora_transform(fn, config)
        adapter = jax.tree.map(lambda a: a + 0.1, lora.init(jax.random.key(1), params, x))
        folder = tmp_path / type(config).__name__
        peft.save(folder, adapter, fn, params, x, checkpoint_mapping=stored)
        tensors = safetensors.numpy.load_file(folder / TENSORS)
        a = "hira_A" if isinstance(config, jlora.HiRA) else "lora_A.weight"
        b = a.replace("A", "B")
        assert tensors[f"{PREFIX}net.conv.{a}"].shape == (2, 4, 3, 2)
        assert tensors[f"{PREFIX}net.conv.{b}"].shape == (6, 2, 1, 1)
        assert tensors[f"{PREFIX}net.heads.{b}"].shape == (10, 2)
        again = peft.load(folder, fn, params, x, checkpoint_mapping=stored).adapter
        assert jax.tree.all(jax.tree.map(lambda m, n: (m == n).all(), adapter, again))
    with pytest.raises(TypeError, match="example inputs and checkpoint_mapping"):
        peft.load(folder, fn, params)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: trained(jlora.SoRA(rank=2, alpha=2)), r"does not support \['sora'\].*to_lora"),
        (lambda: trained(jlora.LoRAMoE(num_experts=2, rank=1, alpha=2)), "does not support"),
        (
            lambda: trained(jlora.LoRA(rank=2, alpha=2)) | trained(jlora.HiRA(rank=2), "up/kernel"),
            "must have one method",
        ),
        (
            lambda: (
                trained(jlora.LoRA(rank=2, alpha=2)) | trained(jlora.DoRA(rank=2, alpha=2), "up/")
            ),
            "must have one method",
        ),
        (
            lambda: trained(jlora.LoRA(rank=2, alpha=2, init=jlora.initializers.pissa())),
            "rebase_to_original",
        ),
        (lambda: trained(jlora.FullDelta(), "norm/scale"), "must have factors of a PEFT method"),
        (
            lambda: jax.tree.map(lambda x: x * jnp.nan, trained(jlora.LoRA(rank=2, alpha=2))),
            "has NaN or infinite",
        ),
    ],
)
def test_save_unsupported_adapter_raises(
    adapter: Callable[[], Any], message: str, tmp_path: pathlib.Path
) -> None:
    model, params = base("llama")
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "out", adapter(), model, params)
    assert not list(tmp_path.iterdir())


def test_save_some_biases_raise(tmp_path: pathlib.Path) -> None:
    model, params = base("llama3")
    lora = jlora.lora_transform(
        model.apply,
        {"q/kernel": jlora.LoRA(rank=2, alpha=2), "layers_0/.*/v/bias": jlora.BitFit()},
    )
    adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="PEFT trains all biases, or those of the adapted modules"):
        peft.save(tmp_path / "out", adapter, model, params)


def test_save_biases_of_other_methods_raise(tmp_path: pathlib.Path) -> None:
    model, params = base("llama3")
    rules = {"q/kernel": jlora.HiRA(rank=2), "bias": jlora.BitFit()}
    lora = jlora.lora_transform(model.apply, rules)
    adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="HIRA does not support trained biases"):
        peft.save(tmp_path / "out", adapter, model, params)


def test_save_existing_folder_raises(tmp_path: pathlib.Path) -> None:
    model, params = base("llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="left as it was"):
        peft.save(tmp_path / "out", trained(jlora.LoRA(rank=2, alpha=2)), model, params)


# --- wrong folders ---


def spoilt(
    tmp_path: pathlib.Path,
    name: str,
    config: Callable[[dict[str, Any]], Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> pathlib.Path:
    """A copy of a folder with its config or its tensors changed."""
    folder = tmp_path / "spoilt"
    shutil.copytree(DATA / name, folder)
    if config:
        fields = config_of(folder)
        config(fields)
        (folder / CONFIG).write_text(json.dumps(fields))
    if tensors:
        arrays = safetensors.numpy.load_file(folder / TENSORS)
        tensors(arrays)
        safetensors.numpy.save_file(arrays, folder / TENSORS)
    return folder


Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update(changes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora", put(peft_type="LOTUS"), "peft_type='LOTUS' is not supported"),
        ("lora", put(peft_type=None), "peft_type=None is not supported"),
        ("lora", put(r=0), "r=0 must be a positive number"),
        ("lora", put(r=-3), "r=-3 must be a positive number"),
        ("lora", put(r=True), "r=True must be a positive number"),
        ("lora", put(r="3"), "r='3' must be a positive number"),
        ("lora", put(r=4), r"does not match r=4|instead of"),
        ("lora", put(lora_alpha=0), "lora_alpha=0 must be a positive number"),
        ("lora", put(lora_alpha=float("nan")), "lora_alpha=nan|alpha"),
        ("lora", put(target_modules=["q_proj"]), "which the config does not target"),
        ("lora", put(target_modules=["q_proj", "qq_proj"]), r"'qq_proj', which matches none"),
        ("lora", put(target_modules=r".*\.nothing"), r"nothing', which matches none"),
        ("lora", put(exclude_modules=["q_proj"]), "which the config does not target"),
        ("lora", put(layers_to_transform=[1]), "which the config does not target"),
        ("lora", put(rank_pattern={"z_proj": 3}), "rank_pattern has 'z_proj', which matches none"),
        ("lora", put(alpha_pattern={"z": 3}), "alpha_pattern has 'z', which matches none"),
        ("lora", put(rank_pattern={"q_proj": 2}), "does not match r=2"),
        ("lora", put(rank_pattern=[1]), r"rank_pattern=\[1\] must have the type"),
        ("lora", put(use_dora=True), r"lacks \['lora_magnitude_vector'\]"),
        ("dora", put(use_dora=False), r"has \['lora_magnitude_vector'\]"),
        ("lora", put(lora_bias=True), "lacks lora_B.bias, which lora_bias=True adds"),
        ("lora", put(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
        ("lora", put(layer_replication=[[0, 1]]), "layer_replication=.* is not supported"),
        ("lora", put(use_qalora=True), "use_qalora=True is not supported"),
        ("lora", put(new_method={"gain": 2}), "unknown field new_method="),
        ("lora", put(modules_to_save=["nothing"]), "'nothing', which the model does not have"),
        ("lora_saved", put(modules_to_save=["norm"]), "lacks .*input_layernorm.weight"),
        ("lora_saved", put(modules_to_save=None), "model.norm.weight are unexpected"),
        ("lora_biases", put(bias="none"), None),
        ("lora_tokens", put(trainable_token_indices={"embed_tokens": [1]}), "has 3 trained tokens"),
        ("lora_tokens", put(trainable_token_indices=None), "has 3 trained tokens"),
        (
            "lora_experts",
            put(target_parameters=["mlp.experts.down_proj"]),
            "must name the parameters of the experts",
        ),
        ("adalora", put(rank_pattern={"q": [True, False]}), "rank_pattern=.* must have a list of"),
        ("vera", put(save_projection=False), "save_projection=False is not supported"),
        ("lora", put(auto_mapping={"base_model_class": "x", "parent_library": "os"}), None),
        ("lora", put(base_model_name_or_path="https://elsewhere/model"), None),
    ],
)
def test_load_wrong_config_raises(
    name: str, change: Any, message: str | None, tmp_path: pathlib.Path
) -> None:
    folder = spoilt(tmp_path, name, config=change)
    if message is None:
        assert peft.load(folder, *base_of(name)).adapter
        return
    with pytest.raises(ValueError, match=message):
        peft.load(folder, *base_of(name))


def renamed(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def transposed(key: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({key: np.ascontiguousarray(tensors[key].T)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora", lambda t: t.pop(f"{Q0}.lora_A.weight"), r"lacks \['lora_A.weight'\]"),
        (
            "lora",
            lambda t: (t.pop(f"{Q0}.lora_A.weight"), t.pop(f"{Q0}.lora_B.weight")),
            "no tensor",
        ),
        ("lora", lambda t: t.clear(), "has no tensors"),
        (
            "lora",
            renamed(
                f"{Q0}.lora_A.weight", f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"
            ),
            "layers.7.self_attn.q_proj', which the model does not have. The nearest",
        ),
        ("lora", transposed(f"{Q0}.lora_A.weight"), r"has shape \(12, 3\).*It looks transposed"),
        (
            "lora",
            lambda t: t.update({f"{Q0}.lora_A.weight": np.ones((3, 11), np.float32)}),
            r"q_proj.lora_A.weight has shape \(3, 11\) instead of \(any, 12\)",
        ),
        (
            "lora",
            lambda t: t.update({f"{Q0}.lora_B.weight": np.ones((12, 2), np.float32)}),
            r"does not match r=3",
        ),
        (
            "lora",
            lambda t: t.update({f"{Q0}.lora_A.weight": np.full((3, 12), np.nan, np.float32)}),
            "q_proj.lora_A.weight holds NaN or Inf",
        ),
        (
            "lora",
            lambda t: t.update({f"{Q0}.lora_A.weight": np.ones((3, 12), np.int8)}),
            "has dtype I8",
        ),
        ("lora", lambda t: t.update({f"{Q0}.more": np.ones(3, np.float32)}), "are unexpected"),
        (
            "lora",
            lambda t: t.update({f"{PREFIX}model.norm.weight": np.ones((12,), np.float32)}),
            "model.norm.weight.* are unexpected",
        ),
        (
            "lora_saved",
            lambda t: t.update({f"{PREFIX}lm_head.weight": np.ones((45, 12), np.float32)}),
            r"lm_head.weight has shape \(45, 12\) instead of \(44, 12\).*resize",
        ),
        ("vera", lambda t: t.pop("base_model.vera_A"), "lacks base_model.vera_A"),
        ("vblora", lambda t: t.pop("base_model.vblora_vector_bank"), "lacks base_model.vblora"),
        (
            "vblora",
            lambda t: t.update({"base_model.vblora_vector_bank": np.ones((3, 2), np.float32)}),
            "shapes",
        ),
    ],
)
def test_load_wrong_tensors_raise(
    name: str, change: Any, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        peft.load(spoilt(tmp_path, name, tensors=change), *base_of(name))


def keep_top_k(tensors: dict[str, np.ndarray]) -> None:
    """Replaces the logits of VB-LoRA as PEFT's `save_only_topk_weights` does."""
    for key in [key for key in tensors if "vblora_logits" in key]:
        logits = tensors.pop(key).astype(np.float64)
        indices = np.argsort(-logits, axis=-1)[..., :2]
        weights = np.exp(np.take_along_axis(logits, indices, -1))
        weights /= weights.sum(-1, keepdims=True)
        tensors[f"{key}_topk_indices"] = indices.astype(np.uint8)
        tensors[f"{key}_topk_weights"] = np.ascontiguousarray(weights[..., :-1], np.float32)


def test_load_top_k_weights_agrees_with_logits(tmp_path: pathlib.Path) -> None:
    assert config_of(DATA / "vblora")["topk"] == 2
    folder = spoilt(tmp_path, "vblora", put(save_only_topk_weights=True), keep_top_k)
    params, adapter = peft.load(folder, *base_of("vblora"))
    merge = jax.jit(jlora.merge)
    theirs = jax.tree.leaves(merge(*loaded("vblora")))
    for ours, other in zip(jax.tree.leaves(merge(params, adapter)), theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))


VB_KEY = f"{Q0}.vblora_logits_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{VB_KEY}_topk_weights"), "lacks _topk_indices or _topk_weights"),
        (lambda t: t.update({f"{VB_KEY}_topk_weights": t[f"{VB_KEY}_topk_weights"] + 1}), "sum of"),
        (lambda t: t[f"{VB_KEY}_topk_indices"].fill(1), "different indices"),
        (lambda t: t[f"{VB_KEY}_topk_indices"].fill(200), "below num_vectors"),
        (lambda t: t.update({f"{VB_KEY}_topk_weights": np.ones(2, np.float32)}), "one number less"),
        (
            lambda t: t.update({"base_model.vblora_vector_bank": np.ones((10**7, 2), np.float32)}),
            "more than the 100,000,000",
        ),
    ],
    ids=["no weights", "weights", "equal", "range", "shape", "size"],
)
def test_load_wrong_top_k_weights_raise(change: Any, message: str, tmp_path: pathlib.Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        keep_top_k(tensors)
        change(tensors)

    folder = spoilt(tmp_path, "vblora", put(save_only_topk_weights=True), spoil)
    with pytest.raises(ValueError, match=message):
        peft.load(folder, *base_of("vblora"))


def test_load_adapter_of_another_model_raises() -> None:
    with pytest.raises(ValueError, match="which the model does not have|instead of"):
        peft.load(DATA / "lora_fused", *base("llama"))
    with pytest.raises(ValueError, match="instead of"):
        peft.load(DATA / "lora_biases", *base("qwen3"))


def test_load_pickle_raises(tmp_path: pathlib.Path) -> None:
    folder = spoilt(tmp_path, "lora")
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="Files that end in .bin are not opened"):
        peft.load(folder, *base_of("lora"))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        peft.load(folder, *base_of("lora"))
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        peft.load(tmp_path / "nothing", *base_of("lora"))


# --- layouts ---


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (TensorLayout("i r", "r c w"), (2, 4, 3, 5)),
        (TensorLayout("i r", "r c*w"), (2, 60)),
        (TensorLayout("r o", "o r 1"), (6, 2, 1, 1)),
        (TensorLayout("o", "u o 1"), (1, 6, 1, 1)),
        (TensorLayout("q r w", "r q w"), (2, 7, 3, 5)),
        (TensorLayout("w x r", "r x*w"), (2, 30)),
    ],
)
def test_tensor_layout_roundtrip(layout: TensorLayout, shape: tuple[int, ...]) -> None:
    facts = WeightGeometry((3, 5, 4, 6), WeightAxes((), (0, 1, 2), (3,)), (0, 1), ())
    tensor = np.arange(np.prod(shape)).reshape(shape)
    array = tensor_to_leaf(tensor, layout, facts)
    np.testing.assert_array_equal(leaf_to_tensor(array, layout, facts), tensor)


# --- for vLLM ---


def merged_by_vllm(folder: pathlib.Path, key: str) -> np.ndarray:
    """The update of a linear module in vLLM: one rank and alpha for all modules."""
    fields = config_of(folder)
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    a, b = (tensors[f"{PREFIX}{key}.lora_{name}.weight"] for name in "AB")
    assert a.shape[0] == b.shape[1] == fields["r"]
    assert not fields["use_rslora"]
    return fields["lora_alpha"] / fields["r"] * b @ a


@pytest.mark.parametrize("name", ["lora", "lora_rs", "lora_patterns", "lora_experts"])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.thin(3)
def test_save_vllm_is_the_same_update(name: str, scanned: bool, tmp_path: pathlib.Path) -> None:
    model, _ = base_of(name, scanned)
    params, adapter = loaded(name, scanned)
    peft.save(tmp_path / "out", adapter, model, params, file_format="vllm")
    fields = config_of(tmp_path / "out")
    assert fields["bias"] == "none"
    assert fields["modules_to_save"] is None
    assert not fields.get("rank_pattern")
    assert not fields.get("alpha_pattern")
    assert not fields.get("target_parameters")
    changes = jlora.delta(params, adapter)
    stored = models.checkpoint_mapping(model)[0]
    seen = 0
    for path, change in changes.items():
        for piece in stored[path].slices:
            key = piece.key.removesuffix(".weight")
            ends = zip(piece.start_indices, piece.slice_sizes, strict=True)
            box = np.asarray(change)[tuple(slice(s, s + n) for s, n in ends)]
            # float32 products of at most four numbers.
            np.testing.assert_allclose(
                merged_by_vllm(tmp_path / "out", key), piece.to_tensor(box), atol=1e-5
            )
            seen += 1
    assert 2 * seen == len(safetensors.numpy.load_file(tmp_path / "out" / TENSORS))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "vLLM does not support DoRA"),
        ("hira", "vLLM supports only LoRA"),
        ("lora_saved", "also has .*lm_head.weight"),
        ("lora_biases", "also has .*bias"),
        ("lora_tokens", "also has .*trainable_tokens"),
    ],
)
def test_save_vllm_unsupported_raises(name: str, message: str, tmp_path: pathlib.Path) -> None:
    params, adapter = loaded(name)
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "out", adapter, base_of(name).model, params, file_format="vllm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "task", "modules"),
    [
        ("bert_sequence", "SEQ_CLS", {"classifier"}),
        ("bert_tokens", "TOKEN_CLS", {"classifier"}),
        ("roberta_sequence", "SEQ_CLS", {"classifier.dense", "classifier.out_proj"}),
        ("distilbert_sequence", "SEQ_CLS", {"pre_classifier", "classifier"}),
    ],
)
def test_save_classification_task_writes_head(
    name: str, task: str, modules: set[str], tmp_path: pathlib.Path
) -> None:
    model, params = base(f"encoders/{name}")
    shapes = load.example_inputs(model)
    lora = jlora.lora_transform(model.apply, {"query/kernel": jlora.LoRA(rank=2, alpha=3)})
    adapter = lora.init(jax.random.key(0), params, *shapes)
    peft.save(tmp_path / "out", adapter, model, params, task_type=task)
    written = safetensors.numpy.load_file(tmp_path / "out" / TENSORS)
    heads = {key for key in written if "lora_" not in key}
    assert heads == {f"{PREFIX}{m}.{end}" for m in modules for end in ("weight", "bias")}
    again = peft.load(tmp_path / "out", model, params).adapter
    jax.tree.map(np.testing.assert_array_equal, {p: again[p] for p in adapter}, adapter)


def test_save_factors_on_task_head_raise(tmp_path: pathlib.Path) -> None:
    model, params = base("encoders/bert_sequence")
    shapes = load.example_inputs(model)
    lora = jlora.lora_transform(model.apply, {"classifier/kernel": jlora.LoRA(rank=2, alpha=3)})
    adapter = lora.init(jax.random.key(0), params, *shapes)
    with pytest.raises(ValueError, match="task_type='SEQ_CLS': PEFT fully trains the head"):
        peft.save(tmp_path / "out", adapter, model, params, task_type="SEQ_CLS")


def test_save_unknown_format_or_task_raises(tmp_path: pathlib.Path) -> None:
    model, params = base_of("lora")
    adapter = loaded("lora").adapter
    with pytest.raises(ValueError, match="file_format='vlm' must be"):
        peft.save(tmp_path / "out", adapter, model, params, file_format="vlm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task_type='CHAT' must be one of CAUSAL_LM, SEQ_2_SEQ_LM"):
        peft.save(tmp_path / "out", adapter, model, params, task_type="CHAT")
    assert not list(tmp_path.iterdir())
