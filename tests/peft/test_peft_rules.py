"""The rules by which PEFT reads a folder, one test each, and the promises of its config.

tests/live reads folders of the same rules with PEFT itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from _support.peft_numpy import PREFIX, PeftReading

import jlora
from jlora import models, peft
from jlora._quantized_array import maybe_dequantize
from jlora.adapters.full import FullDeltaLeaf
from jlora.models.hf.load import example_inputs
from jlora.peft.leaf_conversion import make_template_leaf
from jlora.rules import trace_weights

MODELS = pathlib.Path(__file__).parent.parent / "models" / "data"
Tensors = dict[str, np.ndarray]


@functools.cache
def base(name: str) -> models.LoadedModel:
    return models.load(MODELS / name, dtype="float32")


@functools.cache
def mapping_of(name: str) -> Any:
    return models.checkpoint_mapping(base(name).model)[0]


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint's tensors, by name."""
    mapping = mapping_of(name)
    return {part.key: part.tensor_shape for w in mapping.values() for part in w.slices}


def random(shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(sum(shape)).normal(size=shape), np.float32)


def factors(name: str, *endings: str, rank: int = 2) -> Tensors:
    """Factors of all linear modules whose names end so."""
    found = {}
    for key, shape in shapes(name).items():
        module = key.removesuffix(".weight")
        if module != key and module.endswith(endings):
            found[f"{module}.lora_A.weight"] = random((rank, shape[1]))
            found[f"{module}.lora_B.weight"] = random((shape[0], rank))
    return found


def stored(name: str, *endings: str) -> Tensors:
    """Random values of all tensors whose names end so."""
    return {key: random(shape) for key, shape in shapes(name).items() if key.endswith(endings)}


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], **config: Any) -> pathlib.Path:
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", **config}
    if fields["peft_type"] in ("LORA", "HIRA"):
        fields = {"r": 2, **fields}
    if fields["peft_type"] == "LORA":
        fields = {"lora_alpha": 4, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    named = {PREFIX + key: np.ascontiguousarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors")
    return folder


def loaded_tensor(params: Any, name: str, key: str) -> np.ndarray:
    """A tensor of the checkpoint with the loaded parameters."""
    flat = {
        "/".join(str(k.key) for k in path): value
        for path, value in jax.tree_util.tree_flatten_with_path(jax.device_get(params))[0]
    }
    return models.make_tensor_getter(mapping_of(name), flat)(key)


# --- promises of the config ---

LLAMA, QWEN, BERT = "decoders/llama", "decoders/qwen2", "encoders/bert_sequence"
QV = ("q_proj", "v_proj")
PROMISES: dict[str, tuple[str, Callable[[], Tensors], dict[str, Any], str]] = {
    "a target": (LLAMA, lambda: factors(LLAMA, "q_proj"), {"target_modules": QV}, "v_proj"),
    "a layer of a target": (
        LLAMA,
        lambda: {k: v for k, v in factors(LLAMA, *QV).items() if ".0." in k},
        {"target_modules": QV},
        "layers.1.self_attn.q_proj",
    ),
    "all-linear": (
        LLAMA,
        lambda: factors(LLAMA, *QV),
        {"target_modules": "all-linear"},
        "layers.0.mlp.down_proj",
    ),
    "a layer that the model lacks": (
        LLAMA,
        lambda: factors(LLAMA, *QV),
        {"target_modules": QV, "layers_to_transform": [0, 1, 7]},
        r"layers_to_transform has \[7\]",
    ),
    "a saved module": (
        LLAMA,
        lambda: factors(LLAMA, *QV),
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        "lacks lm_head.weight",
    ),
    "one of two saved modules": (
        LLAMA,
        lambda: factors(LLAMA, *QV) | stored(LLAMA, "lm_head.weight"),
        {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]},
        "lacks model.embed_tokens.weight",
    ),
    "all norms": (
        LLAMA,
        lambda: factors(LLAMA, *QV) | stored(LLAMA, "model.norm.weight"),
        {"target_modules": QV, "modules_to_save": ["norm"]},
        "lacks model.layers.0.input_layernorm.weight",
    ),
    "the bias of a saved module": (
        BERT,
        lambda: factors(BERT, "query") | stored(BERT, "classifier.weight"),
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        "lacks classifier.bias",
    ),
    "the head of a task": (
        BERT,
        lambda: factors(BERT, "query"),
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        "lacks classifier.bias, classifier.weight",
    ),
    "tokens": (
        LLAMA,
        lambda: factors(LLAMA, *QV),
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [1, 2]}},
        "embed_tokens, for which the file has no rows",
    ),
    "a list of tokens": (
        LLAMA,
        lambda: factors(LLAMA, *QV),
        {"target_modules": QV, "trainable_token_indices": [1, 2]},
        "has tokens, for which the file has no rows",
    ),
    "all biases": (
        QWEN,
        lambda: factors(QWEN, *QV),
        {"target_modules": QV, "bias": "all"},
        "trains the biases of .*k_proj.*, which the file lacks",
    ),
    "the biases of the targets": (
        QWEN,
        lambda: (
            factors(QWEN, *QV) | {"model.layers.0.self_attn.q_proj.base_layer.bias": random((24,))}
        ),
        {"target_modules": QV, "bias": "lora_only"},
        "trains the biases of model.layers.0.self_attn.v_proj, .*, which the file lacks",
    ),
    "a parameter": (
        "decoders/qwen3_moe",
        lambda: factors("decoders/qwen3_moe", "q_proj"),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        "layers.0.mlp.experts.down_proj",
    ),
    "modules of experts": (
        "decoders/qwen3_moe",
        lambda: factors("decoders/qwen3_moe", "q_proj", "0.down_proj"),
        {"target_modules": ["q_proj", "down_proj"]},
        "layers.0.mlp.experts.1.down_proj",
    ),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_load_without_promised_tensor_raises(promise: str, tmp_path: pathlib.Path) -> None:
    name, tensors, fields, message = PROMISES[promise]
    folder = write(tmp_path / "in", tensors(), **fields)
    with pytest.raises(ValueError, match=message):
        peft.load(folder, *base(name))


# --- rules ---


def adapted(folder: pathlib.Path, name: str) -> set[str]:
    """Paths with factors."""
    leaves = peft.load(folder, *base(name)).adapter
    return {path for path, leaf in leaves.items() if not isinstance(leaf, FullDeltaLeaf)}


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": []},
        {"layers_to_transform": [], "layers_pattern": []},
        {"layers_to_transform": [0, 1], "layers_pattern": []},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"exclude_modules": []},
        {"modules_to_save": []},
        {"rank_pattern": None, "alpha_pattern": {}},
        {"trainable_token_indices": {}},
        {"target_parameters": []},
        {"target_modules": None},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=str,
)
def test_load_empty_fields_restrict_nothing(fields: Any, tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "in", factors(LLAMA, *QV), **{"target_modules": QV, **fields})
    assert len(adapted(folder, LLAMA)) == 4


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (("0.self_attn.q_proj", "0.self_attn.v_proj"), r"targets model\.layers\.1\..*no tensor"),
        (("q_proj", "0.self_attn.v_proj"), r"targets model\.layers\.1\.self_attn\.v_proj,"),
        (("q_proj",), r"target_modules is null, for which PEFT targets .*'q_proj', 'v_proj'"),
        (("q_proj", "v_proj", "o_proj"), r"tensors for .*o_proj.*does not target"),
        ((), "target_modules is null"),
    ],
    ids=str,
)
def test_load_default_targets_incomplete(
    kept: tuple[str, ...], message: str, tmp_path: pathlib.Path
) -> None:
    norm = {"model.norm.weight": random(shapes(LLAMA)["model.norm.weight"])}
    tensors = {**(factors(LLAMA, *kept) if kept else {}), **norm}
    folder = write(tmp_path / "in", tensors, target_modules=None, modules_to_save=["norm"])
    with pytest.raises(ValueError, match=message):
        peft.load(folder, *base(LLAMA))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_load_pooler_without_head(name: str, tmp_path: pathlib.Path) -> None:
    name = f"encoders/{name}"
    tensors = factors(name, "pooler.dense", "query")
    folder = write(tmp_path / "in", tensors, target_modules=["query", "pooler.dense"])
    model, params = base(name)
    adapter = peft.load(folder, model, params).adapter
    kernel = np.asarray(jlora.merge(params, adapter)["params"]["pooler"]["kernel"])
    update = 2 * tensors["pooler.dense.lora_B.weight"] @ tensors["pooler.dense.lora_A.weight"]
    before = np.asarray(params["params"]["pooler"]["kernel"])
    np.testing.assert_allclose(kernel, before + update.T, atol=1e-5)
    peft.save(tmp_path / "out", adapter, model, params)
    written = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(written) == {PREFIX + key for key in tensors}


def test_load_unused_weight_is_left_out(tmp_path: pathlib.Path) -> None:
    mapping = {
        name: models.single_tensor_weight(f"net.{name}.weight", (3, 3), (1, 0))
        for name in ("used", "spare")
    }
    params, x = {name: np.eye(3, dtype=np.float32) for name in mapping}, np.ones((1, 3), np.float32)
    shape = (2, 3)
    tensors = {
        f"net.{name}.lora_{part}.weight": random(shape if part == "A" else shape[::-1])
        for name in mapping
        for part in "AB"
    }
    folder = write(tmp_path / "in", tensors, target_modules=["used", "spare"])

    def fn(params: Any, x: Any) -> Any:
        return x @ params["used"]

    with pytest.warns(UserWarning, match=r"adapter of net\.spare is left out"):
        loaded = peft.load(folder, fn, params, x, checkpoint_mapping=mapping)
    assert set(loaded.adapter) == {"used"}
    np.testing.assert_array_equal(loaded.params["spare"], params["spare"])


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0], "layers_pattern": "("},
        {"layers_to_transform": [0], "layers_pattern": ["layers", "(?i)h"]},
        {"rank_pattern": {"(?i)q_proj": 3}},
        {"alpha_pattern": {"*": 3}},
    ],
    ids=str,
)
def test_load_invalid_pattern_raises(fields: Any, tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "in", factors(LLAMA, *QV), target_modules=QV, **fields)
    with pytest.raises(ValueError, match=f"{list(fields)[-1]}=.* must have the type"):
        peft.load(folder, *base(LLAMA))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": [f"m{n}" for n in range(50_000)]}, "'m0', which the model does not"),
        ({"target_parameters": [f"m{n}" for n in range(50_000)]}, "'m0', which the model does not"),
        ({"trainable_token_indices": [1] * 50_000}, "has tokens, for which the file has no rows"),
        ({"trainable_token_indices": {"m" * 10**5: [1]}}, "for which the file has no rows"),
    ],
    ids=["names", "parameters", "tokens", "module"],
)
def test_load_of_long_lists_ends_fast(fields: Any, message: str, tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "in", factors(LLAMA, *QV), target_modules=QV, **fields)
    model, params = base(LLAMA)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        peft.load(folder, model, params)
    assert time.process_time() - start < 10  # It was minutes.
    assert len(str(caught.value)) < 3_000


@pytest.mark.parametrize("name", ["dropout", "embeddings.dropout", "intermediate_act_fn"])
def test_load_saved_module_without_parameters(name: str, tmp_path: pathlib.Path) -> None:
    tensors = factors(BERT, "query") | stored(BERT, "classifier.weight", "classifier.bias")
    saved = {"modules_to_save": ["classifier", name]}
    folder = write(tmp_path / "in", tensors, target_modules=["query"], **saved)
    assert len(adapted(folder, BERT)) == 2
    folder = write(tmp_path / "other", tensors, target_modules=["query"], modules_to_save=["act.x"])
    with pytest.raises(ValueError, match=r"'act\.x', which the model does not have"):
        adapted(folder, BERT)


def test_load_layers_select_listed_layers(tmp_path: pathlib.Path) -> None:
    tensors = {k: v for k, v in factors(LLAMA, *QV).items() if ".1." in k}
    folder = write(tmp_path / "in", tensors, target_modules=QV, layers_to_transform=1)
    assert len(adapted(folder, LLAMA)) == 2
    full = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    folder = write(tmp_path / "full", tensors, target_modules=full, layers_to_transform=[0])
    assert len(adapted(folder, LLAMA)) == 2  # Complete names are in no list of layers.
    mixed = {"target_modules": [*full, "k_proj"], "layers_to_transform": [0, 1]}
    folder = write(tmp_path / "mixed", {**tensors, **factors(LLAMA, "k_proj")}, **mixed)
    assert len(adapted(folder, LLAMA)) == 4
    folder = write(tmp_path / "other", tensors, **mixed, layers_pattern="block")
    with pytest.raises(ValueError, match=r"has \[0, 1\], and the targets are in the layers \[\]"):
        adapted(folder, LLAMA)


@pytest.mark.parametrize(
    ("task", "name"), [("SEQ_CLS", BERT), ("TOKEN_CLS", "encoders/bert_tokens")]
)
def test_load_head_of_task_is_implicit(task: str, name: str, tmp_path: pathlib.Path) -> None:
    head = stored(name, "classifier.weight", "classifier.bias")
    tensors = factors(name, "query") | head
    folder = write(tmp_path / "in", tensors, target_modules=["query"], task_type=task)
    loaded = peft.load(folder, *base(name))
    for key, value in head.items():
        np.testing.assert_array_equal(loaded_tensor(loaded.params, name, key), value)
    assert isinstance(loaded.adapter["params/classifier/kernel"], FullDeltaLeaf)


ROBERTA = "encoders/roberta_sequence"


@pytest.mark.parametrize("target", [["query", "dense"], "all-linear", r".*(query|dense)"])
def test_load_targets_leave_out_saved_modules(target: Any, tmp_path: pathlib.Path) -> None:
    endings = ("query", "dense", "key", "value") if target == "all-linear" else ("query", "dense")
    tensors = factors(ROBERTA, *endings)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier")}
    tensors |= stored(
        ROBERTA,
        "classifier.dense.weight",
        "classifier.dense.bias",
        "out_proj.weight",
        "out_proj.bias",
    )
    folder = write(tmp_path / "in", tensors, target_modules=target, task_type="SEQ_CLS")
    assert not any("pooler" in path or "classifier" in path for path in adapted(folder, ROBERTA))


def test_load_biases_of_a_saved_container(tmp_path: pathlib.Path) -> None:
    head = [f"classifier.{part}.{name}" for part in ("dense", "out_proj") for name in PARTS]
    trained = {key: random(shapes(ROBERTA)[key]) for key in head}
    tensors = factors(ROBERTA, "query") | trained
    for key, value in trained.items():
        if key.endswith("bias"):  # As PEFT writes them with `bias="all"`.
            inner = key.removeprefix("classifier.")
            tensors[f"classifier.modules_to_save.default.{inner}"] = value
            tensors[f"classifier.original_module.{inner}"] = np.zeros_like(value)
    tensors |= stored(ROBERTA, *[key for key in shapes(ROBERTA) if is_body_bias(key)])
    folder = write(
        tmp_path / "in", tensors, target_modules=["query"], bias="all", task_type="SEQ_CLS"
    )
    loaded = peft.load(folder, *base(ROBERTA))
    for key, value in trained.items():
        np.testing.assert_array_equal(loaded_tensor(loaded.params, ROBERTA, key), value)


PARTS = ("weight", "bias")


def is_body_bias(key: str) -> bool:
    return key.endswith(".bias") and not key.startswith("classifier")


@pytest.mark.parametrize("peft_type", ["LORA", "HIRA", "IA3"])
def test_load_saved_container_of_each_family(peft_type: str, tmp_path: pathlib.Path) -> None:
    saved = {key: random(s) for key, s in shapes(LLAMA).items() if ".0.mlp." in key}
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    modules.append("model.layers.1.mlp.up_proj")
    tensors: Tensors = dict(saved)
    for module in modules:
        out, inp = shapes(LLAMA)[f"{module}.weight"]
        if peft_type == "IA3":
            tensors[f"{module}.ia3_l"] = random((out, 1))
            continue
        ends = ("lora_A.weight", "lora_B.weight") if peft_type == "LORA" else ("hira_A", "hira_B")
        tensors |= {
            f"{module}.{ends[0]}": random((2, inp)),
            f"{module}.{ends[1]}": random((out, 2)),
        }
    folder = write(
        tmp_path / "in",
        tensors,
        peft_type=peft_type,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["layers.0.mlp"],
    )
    loaded = peft.load(folder, *base(LLAMA))
    for key, value in saved.items():
        np.testing.assert_array_equal(loaded_tensor(loaded.params, LLAMA, key), value)
    assert len(adapted(folder, LLAMA)) == 3


def test_load_hira_ignores_rank_pattern(tmp_path: pathlib.Path) -> None:
    tensors = {
        key.replace("lora_", "hira_").removesuffix(".weight"): value
        for key, value in factors(LLAMA, "q_proj").items()
    }
    fields = {"peft_type": "HIRA", "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}}
    folder = write(tmp_path / "in", tensors, **fields)
    leaves = peft.load(folder, *base(LLAMA)).adapter
    assert {leaf.rank for leaf in leaves.values()} == {2}


def test_load_complete_tables_are_the_base(tmp_path: pathlib.Path) -> None:
    tables = stored(LLAMA, "embed_tokens.weight", "lm_head.weight")
    folder = write(tmp_path / "in", factors(LLAMA, *QV) | tables, target_modules=QV)
    loaded = peft.load(folder, *base(LLAMA))
    for key, value in tables.items():
        np.testing.assert_array_equal(loaded_tensor(loaded.params, LLAMA, key), value)
    assert len(loaded.adapter) == 4  # Nothing but the factors is trained on.


def test_load_pattern_of_other_modules_is_unused(tmp_path: pathlib.Path) -> None:
    tensors = {k: v for k, v in factors(LLAMA, "q_proj").items() if ".1." in k}
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    patterns = {"alpha_pattern": {"0.self_attn.q_proj": 9}, "rank_pattern": {".*up_proj": 5}}
    folder = write(tmp_path / "in", tensors, **fields, **patterns)
    (leaf,) = peft.load(folder, *base(LLAMA)).adapter.values()
    assert (leaf.rank, leaf.alpha) == (2, 4)
    folder = write(tmp_path / "other", tensors, **fields, rank_pattern={"2.self_attn.q_proj": 5})
    with pytest.raises(ValueError, match="'2.self_attn.q_proj', which matches none of the model's"):
        peft.load(folder, *base(LLAMA))


def test_load_resized_words_of_encoder(tmp_path: pathlib.Path) -> None:
    table = stored(BERT, "word_embeddings.weight")
    folder = write(tmp_path / "in", factors(BERT, "query") | table, target_modules=["query"])
    loaded = peft.load(folder, *base(BERT))
    for key, value in table.items():
        np.testing.assert_array_equal(loaded_tensor(loaded.params, BERT, key), value)
    assert len(loaded.adapter) == 2


def test_load_equal_copies_leave_the_base(tmp_path: pathlib.Path) -> None:
    model, params = base(LLAMA)
    tensors = factors(LLAMA, "q_proj", "lm_head")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        copy = f"{key.removesuffix('.weight')}.base_layer.weight"
        tensors[copy] = loaded_tensor(params, LLAMA, key)
    folder = write(tmp_path / "in", tensors, target_modules=["q_proj", "lm_head"])
    loaded = peft.load(folder, model, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, loaded.params, params))


def test_load_factor_bias_is_added(tmp_path: pathlib.Path) -> None:
    tensors, expected = factors(QWEN, "q_proj"), {}
    for key in [key for key in shapes(QWEN) if key.endswith("q_proj.bias")]:
        update = random(shapes(QWEN)[key])
        tensors[key.replace(".bias", ".lora_B.bias")] = update
        expected[key] = loaded_tensor(base(QWEN).params, QWEN, key) + 4 / 2**0.5 * update
    fields = {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}
    loaded = peft.load(write(tmp_path / "in", tensors, **fields), *base(QWEN))
    for key, value in expected.items():
        # One float32 product and sum.
        np.testing.assert_allclose(loaded_tensor(loaded.params, QWEN, key), value, atol=1e-6)
    replaced = {key.replace(".bias", ".base_layer.bias"): v for key, v in expected.items()}
    folder = write(tmp_path / "both", tensors | replaced, bias="lora_only", **fields)
    loaded = peft.load(folder, *base(QWEN))
    for key, value in expected.items():
        update = value - loaded_tensor(base(QWEN).params, QWEN, key)
        twice = loaded_tensor(loaded.params, QWEN, key)
        np.testing.assert_allclose(twice, value + update, atol=1e-6)
    tensors = factors(LLAMA, "q_proj")
    tensors |= {k.replace("B.weight", "B.bias"): v[:, 0] for k, v in tensors.items() if "B.w" in k}
    with pytest.raises(ValueError, match="the model has no bias there"):
        peft.load(write(tmp_path / "none", tensors, **fields), *base(LLAMA))


def test_load_magnitude_of_a_module(tmp_path: pathlib.Path) -> None:
    tensors = factors(LLAMA, "q_proj")
    magnitudes = {
        key.replace("lora_B", "lora_magnitude_vector"): value[:, 0]
        for key, value in tensors.items()
        if "lora_B" in key
    }
    fields = {"target_modules": ["q_proj"], "use_dora": True}
    folder = write(tmp_path / "in", tensors | magnitudes, **fields)
    leaf = peft.load(folder, *base(LLAMA)).adapter["params/layers_0/attention/q/kernel"]
    key = "model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    np.testing.assert_array_equal(leaf.magnitude, magnitudes[key])


def test_load_feedforward_matches_without_dot(tmp_path: pathlib.Path) -> None:
    tensors = {}
    for key, shape in shapes(LLAMA).items():
        if key.endswith("down_proj.weight"):
            tensors[key.replace("weight", "ia3_l")] = random((1, shape[1]))
    folder = write(
        tmp_path / "in",
        tensors,
        peft_type="IA3",
        target_modules=["down_proj"],
        feedforward_modules=["n_proj"],
    )
    assert len(adapted(folder, LLAMA)) == 2


def test_load_frequencies_by_module(tmp_path: pathlib.Path) -> None:
    numbers = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.q_proj": 5}
    tensors = {f"{module}.fourierft_spectrum": random((n,)) for module, n in numbers.items()}
    folder = write(
        tmp_path / "in",
        tensors,
        peft_type="FOURIERFT",
        n_frequency=5,
        n_frequency_pattern={"layers.0.self_attn.q_proj": 3},
        target_modules=["q_proj"],
    )
    adapter = peft.load(folder, *base(LLAMA)).adapter
    assert [leaf.num_frequencies for leaf in adapter.values()] == [3, 5]


def test_load_target_parameter_of_a_matrix(tmp_path: pathlib.Path) -> None:
    tensors = factors(LLAMA, "q_proj", "embed_tokens")
    folder = write(
        tmp_path / "in",
        tensors,
        target_modules=[],
        target_parameters=["self_attn.q_proj.weight", "embed_tokens.weight"],
        alpha_pattern={"q_proj.weight": 6},
    )
    adapter = peft.load(folder, *base(LLAMA)).adapter
    assert adapter["params/layers_0/attention/q/kernel"].scale == 3
    leaf = adapter["params/embed/embedding"]
    name = "model.embed_tokens"
    expected = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    np.testing.assert_allclose(np.asarray(leaf.a) @ np.asarray(leaf.b), expected, atol=1e-5)


def test_load_only_saved_modules(tmp_path: pathlib.Path) -> None:
    folder = write(
        tmp_path / "in",
        stored(LLAMA, "lm_head.weight"),
        target_modules="dummy-target-modules",
        modules_to_save=["lm_head"],
    )
    assert set(peft.load(folder, *base(LLAMA)).adapter) == {"params/head"}


# --- folders of other writers ---


def test_load_key_with_adapter_name_raises(tmp_path: pathlib.Path) -> None:
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in factors(LLAMA, *QV).items()}
    folder = write(tmp_path / "in", tensors, target_modules=QV)
    with pytest.raises(ValueError, match="lora_A.default.weight' has the name of an adapter"):
        peft.load(folder, *base(LLAMA))


def test_load_folder_of_mlx_raises(tmp_path: pathlib.Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    with pytest.raises(ValueError, match=r"is of MLX \(fine_tune_type='lora'\)"):
        peft.load(tmp_path, *base(LLAMA))


def test_load_folder_around_a_named_adapter(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "chat", factors(LLAMA, *QV), target_modules=QV)
    with pytest.raises(FileNotFoundError, match="in a folder of its name: pass .*chat"):
        peft.load(tmp_path, *base(LLAMA))


# --- one module for each expert ---

MOE = "decoders/qwen3_moe"


@pytest.mark.parametrize("same_a", [False, True], ids=["apart", "shared"])
def test_load_one_module_for_each_expert(same_a: bool, tmp_path: pathlib.Path) -> None:
    tensors = factors(MOE, "gate_proj", "up_proj", "down_proj")
    rng = np.random.default_rng(3)
    tensors = {
        key: np.asarray(rng.normal(size=value.shape), np.float32) for key, value in tensors.items()
    }
    if same_a:
        for key in [key for key in tensors if "up_proj.lora_A" in key]:
            tensors[key] = tensors[key.replace("up_proj", "gate_proj")]
    fields: dict[str, Any] = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    key = "model.layers.0.mlp.experts.1.up_proj"
    if not same_a:  # One expert has a rank and an alpha of its own.
        fields |= {"rank_pattern": {key: 1}, "alpha_pattern": {key: 5}}
        tensors[f"{key}.lora_A.weight"] = tensors[f"{key}.lora_A.weight"][:1]
        tensors[f"{key}.lora_B.weight"] = tensors[f"{key}.lora_B.weight"][:, :1]
    model, params = base(MOE)
    loaded = peft.load(write(tmp_path / "in", tensors, **fields), model, params)
    assert loaded.adapter["params/layers_0/moe/gate_up"].rank == (2 if same_a else 4)
    merged = jax.device_get(jax.jit(jlora.merge)(loaded.params, loaded.adapter))
    for name in shapes(MOE):
        module = name.removesuffix(".weight")
        value = loaded_tensor(params, MOE, name)
        if ".experts." in name:
            scale = 5 if module == key and not same_a else 2
            update = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            value = value + scale * update
        # float32 sums of at most four products.
        np.testing.assert_allclose(loaded_tensor(merged, MOE, name), value, atol=2e-5, err_msg=name)


def test_load_what_save_wrote_for_vllm(tmp_path: pathlib.Path) -> None:
    tensors = factors(MOE, "q_proj", "gate_proj", "up_proj", "down_proj")
    fields = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    model, params = base(MOE)
    first = peft.load(write(tmp_path / "in", tensors, **fields), model, params).adapter
    peft.save(tmp_path / "vllm", first, model, params, file_format="vllm")
    again = peft.load(tmp_path / "vllm", model, params).adapter
    for path, leaf in first.items():
        product, other = (
            np.asarray(one.a) @ np.asarray(one.b) * one.scale for one in (leaf, again[path])
        )
        np.testing.assert_allclose(product, other, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.replace("lora_B.weight", "lora_magnitude_vector"), "an expert can only have"),
        (None, "which do not match r=3"),
    ],
)
def test_load_wrong_expert_raises(change: Any, message: str, tmp_path: pathlib.Path) -> None:
    tensors = factors(MOE, "down_proj")
    if change:
        tensors = {change(key): value for key, value in tensors.items()}
    folder = write(tmp_path / "in", tensors, target_modules=["down_proj"], r=2 if change else 3)
    with pytest.raises(ValueError, match=message):
        peft.load(folder, *base(MOE))


# --- replaced weights, however the base has them ---


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.thin(4)
def test_load_replaces_weights_of_any_base(
    is_quantized: bool, scan_layers: bool, tmp_path: pathlib.Path
) -> None:
    quantize = {"down/kernel": jlora.NF4(), "embed": jlora.Int8()} if is_quantized else None
    model, params = models.load(
        MODELS / LLAMA, dtype="float32", scan_layers=scan_layers, quantize=quantize
    )
    whole = stored(LLAMA, "1.mlp.down_proj.weight", "lm_head.weight", "0.input_layernorm.weight")
    rows = random((2, 12))
    tokens = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    folder = write(
        tmp_path / "in",
        factors(LLAMA, *QV) | whole | tokens,
        target_modules=QV,
        modules_to_save=["1.mlp.down_proj", "lm_head", "0.input_layernorm"],
        trainable_token_indices={"embed_tokens": [3, 9]},
    )
    loaded = peft.load(folder, model, params)
    mapping = models.checkpoint_mapping(model)[0]
    flat = {
        "/".join(str(k.key) for k in path): maybe_dequantize(value)
        for path, value in jax.tree_util.tree_flatten_with_path(
            loaded.params, is_leaf=lambda x: hasattr(x, "dequantize")
        )[0]
    }
    get = models.make_tensor_getter(mapping, jax.device_get(flat))
    for key, value in whole.items():
        np.testing.assert_array_equal(get(key), value)
    np.testing.assert_array_equal(get("model.embed_tokens.weight")[[3, 9]], rows)
    # The other layer of a stack is as it was.
    other = "model.layers.0.mlp.down_proj.weight"
    before = jax.tree.map(maybe_dequantize, params, is_leaf=lambda x: hasattr(x, "dequantize"))
    old = models.make_tensor_getter(
        mapping,
        {
            "/".join(str(k.key) for k in path): np.asarray(value)
            for path, value in jax.tree_util.tree_flatten_with_path(before)[0]
        },
    )
    np.testing.assert_array_equal(get(other), old(other))


@pytest.mark.parametrize("is_joined", [True, False], ids=["joined", "single"])
def test_load_replaces_experts(is_joined: bool, tmp_path: pathlib.Path) -> None:
    whole = stored(MOE, "gate_proj.weight", "up_proj.weight", "down_proj.weight", "mlp.gate.weight")
    whole = {key: value for key, value in whole.items() if "layers.1." in key}
    tensors = dict(whole)
    if is_joined:  # As transformers 5 has them: (experts, out, in).
        start = "model.layers.1.mlp.experts"
        experts = range(4)
        gate, up, down = (
            np.stack([tensors.pop(f"{start}.{e}.{n}_proj.weight") for e in experts])
            for n in ("gate", "up", "down")
        )
        tensors |= {f"{start}.gate_up_proj": np.concatenate([gate, up], 1)}
        tensors |= {f"{start}.down_proj": down}
    folder = write(
        tmp_path / "in",
        factors(MOE, "q_proj") | tensors,
        target_modules=["q_proj"],
        modules_to_save=["1.mlp"],
    )
    loaded = peft.load(folder, *base(MOE))
    for key, value in whole.items():
        np.testing.assert_array_equal(loaded_tensor(loaded.params, MOE, key), value)


# --- written names ---


def filled(name: str, configs: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter of random numbers, with a config for each path."""
    model, params = base(name)
    weights = trace_weights(model.apply, params, *example_inputs(model))
    rng = np.random.default_rng(4)
    adapter = {}
    for path, config in configs.items():
        leaf = make_template_leaf(config, weights[path])
        arrays = {
            n: np.asarray(rng.normal(size=shape), np.float32) for n, shape in leaf.shapes().items()
        }
        adapter[path] = dataclasses.replace(leaf, **arrays)
    return adapter


def saved(folder: pathlib.Path, name: str, adapter: Any, **options: Any) -> tuple[Any, Tensors]:
    """Config and tensors of a folder that `save` wrote."""
    peft.save(folder, adapter, *base(name), **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def test_save_dense_layer_of_a_mixture(tmp_path: pathlib.Path) -> None:
    name, path = "decoders/qwen3_moe_some", "params/layers_0/mlp/down/kernel"
    adapter = filled(name, {path: jlora.LoRA(rank=2, alpha=3, dropout=0.5)})
    config, tensors = saved(tmp_path / "out", name, adapter)
    # By `target_modules`, PEFT with transformers 5 would adapt the experts instead.
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["mlp.down_proj.weight"]
    assert config["lora_dropout"] == 0
    key = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[key], adapter[path].a.T)
    again = peft.load(tmp_path / "out", *base(name)).adapter
    np.testing.assert_array_equal(again[path].b, adapter[path].b)
    config, _ = saved(tmp_path / "vllm", name, adapter, file_format="vllm")
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match="adapts .*down_proj as parameters"):
        saved(tmp_path / "no", name, filled(name, {path: jlora.DoRA(rank=2, alpha=3)}))


def test_save_router_of_a_mixture(tmp_path: pathlib.Path) -> None:
    path = "params/layers_0/moe/router/kernel"
    adapter = filled(MOE, {path: jlora.LoRA(rank=2, alpha=3)})
    config, tensors = saved(tmp_path / "out", MOE, adapter)
    assert config["target_parameters"] == ["model.layers.0.mlp.gate.weight"]
    key = f"{PREFIX}model.layers.0.mlp.gate.lora_B.weight"
    np.testing.assert_array_equal(tensors[key], adapter[path].b.T)
    assert set(peft.load(tmp_path / "out", *base(MOE)).adapter) == {path}


def test_save_experts_unsupported_raises(tmp_path: pathlib.Path) -> None:
    path = "params/layers_0/moe/down"
    for config in (jlora.DoRA(rank=1, alpha=1), jlora.HiRA(rank=1), jlora.LoKr(rank=1, alpha=1)):
        with pytest.raises(ValueError, match="PEFT supports only LoRA on experts and routers"):
            saved(tmp_path / "out", MOE, filled(MOE, {path: config}))


def test_save_gemma_norm_is_a_norm(tmp_path: pathlib.Path) -> None:
    name, norm = "decoders/gemma3", "params/layers_1/mlp_norm/scale"
    q = "params/layers_0/attention/q/kernel"
    adapter = filled(name, {q: jlora.LoRA(rank=2, alpha=3), norm: jlora.FullDelta()})
    config, tensors = saved(tmp_path / "out", name, adapter)
    module = "model.layers.1.pre_feedforward_layernorm"
    assert config["bias"] == "none"
    assert config["modules_to_save"] == ["1.pre_feedforward_layernorm"]
    expected = loaded_tensor(base(name).params, name, f"{module}.weight") + adapter[norm].delta
    np.testing.assert_allclose(tensors[f"{PREFIX}{module}.weight"], expected, atol=1e-6)
    again = peft.load(tmp_path / "out", *base(name))
    assert again.adapter[norm].family == "full"
    np.testing.assert_allclose(again.params["params"]["layers_1"]["mlp_norm"]["scale"], expected)


def kronecker_sizes(size: int) -> tuple[int, int]:
    """The two factors of a size that differ least, the smaller one first."""
    small = max(n for n in range(1, size + 1) if size % n == 0 and n * n <= size)
    return small, size // small


def hadamard_tensors(module: str, shape: tuple[int, ...], rank: int) -> Tensors:
    return {
        f"{module}.hada_w{n}_{side}": random((shape[0], rank) if side == "a" else (rank, shape[1]))
        for n in (1, 2)
        for side in "ab"
    }


def kronecker_tensors(module: str, shape: tuple[int, ...], rank: int) -> Tensors:
    (out, rest), (inp, channels) = map(kronecker_sizes, shape)
    if rank >= max(rest, channels) / 2:
        return {
            f"{module}.lokr_w1": random((out, inp)),
            f"{module}.lokr_w2": random((rest, channels)),
        }
    return {
        f"{module}.lokr_w1": random((out, inp)),
        f"{module}.lokr_w2_a": random((rest, rank)),
        f"{module}.lokr_w2_b": random((rank, channels)),
    }


STACKS = [("LOHA", (2, 3)), ("LOHA", (2, 2)), ("LOKR", (1, 1)), ("LOKR", (3, 2)), ("LOKR", (1, 2))]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(("method", "ranks"), STACKS)
def test_load_patterns_of_stacked_layers(
    method: str, ranks: tuple[int, int], scan_layers: bool, tmp_path: pathlib.Path
) -> None:
    make = hadamard_tensors if method == "LOHA" else kronecker_tensors
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    tensors: Tensors = {}
    for module, rank in zip(modules, ranks, strict=True):
        tensors |= make(module, shapes(LLAMA)[f"{module}.weight"], rank)
    folder = write(
        tmp_path / "in",
        tensors,
        **({"decompose_factor": -1, "decompose_both": False} if method == "LOKR" else {}),
        peft_type=method,
        use_effective_conv2d=False,
        target_modules=["q_proj"],
        r=2,
        alpha=4,
        rank_pattern={f"{number}.self_attn.q_proj": rank for number, rank in enumerate(ranks)},
        alpha_pattern={"layers.0.self_attn.q_proj": 7},
    )
    model, params = models.load(MODELS / LLAMA, dtype="float32", scan_layers=scan_layers)
    if scan_layers and method == "LOKR" and ranks == (1, 2):  # A product of factors, and a matrix.
        with pytest.raises(ValueError, match=r"tensors cannot be one stack\. Load .*scan_layers=F"):
            peft.load(folder, model, params)
        return
    assert_peft_merges_same(folder, model, params)


def assert_peft_merges_same(folder: pathlib.Path, model: Any, params: Any) -> None:
    """Checks the query projections of the Llama against PEFT's equations."""
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    loaded = peft.load(folder, model, params)
    merged = jax.device_get(jax.jit(jlora.merge)(loaded.params, loaded.adapter))
    flat = {
        "/".join(str(k.key) for k in path): value
        for path, value in jax.tree_util.tree_flatten_with_path(merged)[0]
    }
    get = models.make_tensor_getter(models.checkpoint_mapping(model)[0], flat)
    file = safetensors.numpy.load_file(MODELS / LLAMA / "model.safetensors")
    theirs = PeftReading(folder, {m: file[f"{m}.weight"] for m in modules}, set()).merged
    for module in modules:
        np.testing.assert_allclose(get(f"{module}.weight"), theirs[module], atol=1e-4)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("counts", [(1, 3), (4, 2), (0, 2)], ids=str)
def test_load_pruned_adalora(
    counts: tuple[int, int], scan_layers: bool, tmp_path: pathlib.Path
) -> None:
    tensors, pattern = {}, {}
    for number, kept in enumerate(counts):
        module = f"model.layers.{number}.self_attn.q_proj"
        width = shapes(LLAMA)[f"{module}.weight"][0]
        pattern[f"{module}.lora_E"] = [rank < kept for rank in range(4)]
        tensors[f"{module}.lora_A"] = random((kept, width))
        tensors[f"{module}.lora_E"] = random((kept, 1))
        tensors[f"{module}.lora_B"] = random((width, kept))
    fields = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    fields |= {"r": 16, "use_rslora": True}  # Of LoRA, which PEFT does not read here.
    folder = write(tmp_path / "in", tensors, **fields, rank_pattern=pattern)
    model, params = models.load(MODELS / LLAMA, dtype="float32", scan_layers=scan_layers)
    assert_peft_merges_same(folder, model, params)


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("q_proj.lora_E", [True, False], "'q_proj', which is none of the model's"),
        ("model.layers.0.self_attn.q_proj.lora_E", [True], "init_r=2 times true or false"),
        ("model.layers.0.self_attn.q_proj.lora_E", [1, 0], "init_r=2 times true or false"),
        ("model.layers.0.self_attn.q_proj.lora_A", [True, False], "init_r=2 times true or false"),
        ("model.layers.0.self_attn.q_proj.lora_E", 2, "init_r=2 times true or false"),
        ("model.layers.0.self_attn.q_proj.lora_E", [False, False], "keeps no rank of"),
    ],
)
def test_load_wrong_pruning_raises(
    name: str, kept: Any, message: str, tmp_path: pathlib.Path
) -> None:
    tensors = {
        f"model.layers.{number}.self_attn.q_proj.lora_{part}": random(shape)
        for number in (0, 1)
        for part, shape in (("A", (2, 12)), ("E", (2, 1)), ("B", (12, 2)))
    }
    fields = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    folder = write(tmp_path / "in", tensors, **fields, rank_pattern={name: kept})
    with pytest.raises(ValueError, match=message):
        peft.load(folder, *base(LLAMA))
