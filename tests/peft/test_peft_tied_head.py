"""PEFT folders of models that tie the head to the embedding.

PEFT adapts the two modules apart, unless its config says `ensure_weight_tying`. tests/live has the
same cases with PEFT itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from _support.peft_numpy import PREFIX

import jlora
from jlora import models, peft
from jlora.cli import export
from jlora.models.hf.load import example_inputs
from jlora.peft.leaf_conversion import make_template_leaf
from jlora.rules import trace_weights

BASE = pathlib.Path(__file__).parent.parent / "models" / "data" / "decoders" / "llama_linear"
TABLE = safetensors.numpy.load_file(BASE / "model.safetensors")["model.embed_tokens.weight"]
TABLE = TABLE.astype(np.float32)
V, H = TABLE.shape
RNG = np.random.default_rng(0)
A, B = (
    np.asarray(RNG.normal(size=(2, V)), np.float32),
    np.asarray(RNG.normal(size=(H, 2)), np.float32),
)
CHANGED = TABLE + 2 * (B @ A).T
OTHER = np.asarray(RNG.normal(size=(V, H)), np.float32)
EMBED, HEAD = "model.embed_tokens", "lm_head"
PATH = "params/embed/embedding"


@functools.cache
def base(is_tied: bool = True) -> models.LoadedModel:
    options: dict[str, Any] = {} if is_tied else {"tie_word_embeddings": False}
    return models.load(BASE, dtype="float32", **options)


def folder_of(folder: pathlib.Path, tensors: dict[str, np.ndarray], **config: Any) -> pathlib.Path:
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    named = {f"{PREFIX}{key}": np.ascontiguousarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors")
    return folder


def tables(folder: pathlib.Path, is_tied: bool) -> tuple[np.ndarray, np.ndarray]:
    """The embedding and the head with a folder's adapter, laid out as in a checkpoint."""
    loaded = peft.load(folder, *base(is_tied))
    params = loaded.params["params"]
    weights = {"embed": np.array(params["embed"]["embedding"])}
    weights["head"] = weights["embed"] if is_tied else np.array(params["head"]).T
    for path, leaf in loaded.adapter.items():
        name = "head" if path == "params/head" else "embed"
        if leaf.family == "lora":
            delta = leaf.scale * np.asarray(leaf.a) @ np.asarray(leaf.b)
            weights[name] = weights[name] + (delta.T if name == "head" and not is_tied else delta)
            if is_tied:
                weights["head"] = weights["embed"]
    return weights["embed"], weights["head"]


EMBED_FACTORS = {f"{EMBED}.lora_embedding_A": A, f"{EMBED}.lora_embedding_B": B}
HEAD_FACTORS = {f"{HEAD}.lora_A.weight": B.T, f"{HEAD}.lora_B.weight": A.T}
COPIES = {f"{EMBED}.base_layer.weight": TABLE, f"{HEAD}.base_layer.weight": TABLE}

# Tensors, config fields, and the embedding and the head in PEFT.
SAME = {
    "factors of both": (
        {**EMBED_FACTORS, **HEAD_FACTORS, **COPIES},
        {"target_modules": ["embed_tokens", "lm_head"]},
        (CHANGED, CHANGED),
    ),
    "tied by the config": (
        {**EMBED_FACTORS, **HEAD_FACTORS, **COPIES},
        {"target_modules": [EMBED, "embed_tokens"], "ensure_weight_tying": True},
        (CHANGED, CHANGED),
    ),
    "both replaced": (
        {f"{EMBED}.weight": OTHER, f"{HEAD}.weight": OTHER},
        {"target_modules": [], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        (OTHER, OTHER),
    ),
    "both saved": (
        {f"{EMBED}.weight": OTHER, f"{HEAD}.weight": OTHER},
        {"target_modules": [], "modules_to_save": ["embed_tokens", "lm_head"]},
        (OTHER, OTHER),
    ),
}
APART = {
    "embedding alone": (
        {**EMBED_FACTORS, f"{EMBED}.base_layer.weight": TABLE},
        {"target_modules": ["embed_tokens"]},
        (CHANGED, TABLE),
        "only model.embed_tokens",
    ),
    "head alone": (HEAD_FACTORS, {"target_modules": ["lm_head"]}, (TABLE, CHANGED), "only lm_head"),
    "other alphas": (
        {**EMBED_FACTORS, **HEAD_FACTORS},
        {"target_modules": ["embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 8}},
        (CHANGED, TABLE + 4 * (B @ A).T),
        "each alone",
    ),
    "rank of the embedding": (
        {**EMBED_FACTORS, **HEAD_FACTORS},
        {
            "target_modules": [EMBED],
            "ensure_weight_tying": True,
            "r": 1,
            "rank_pattern": {"embed_tokens": 2},
        },
        (CHANGED, TABLE + 4 * (B @ A).T),
        "each alone",
    ),
    "rank-stabilized": (
        {**EMBED_FACTORS, **HEAD_FACTORS},
        {
            "target_modules": [EMBED],
            "ensure_weight_tying": True,
            "use_rslora": True,
            "r": 1,
            "rank_pattern": {"embed_tokens": 2},
            "lora_alpha": 2,
            "alpha_pattern": {"embed_tokens": 4},
        },
        (TABLE + 4 / np.sqrt(2) * (B @ A).T, TABLE + 2 * (B @ A).T),
        "each alone",
    ),
    "embedding saved": (
        {f"{EMBED}.weight": OTHER},
        {"target_modules": [], "modules_to_save": ["embed_tokens"]},
        (OTHER, TABLE),
        "only model.embed_tokens",
    ),
    "saved with drift": (
        {f"{EMBED}.weight": OTHER, f"{HEAD}.weight": CHANGED},
        {"target_modules": [], "modules_to_save": ["embed_tokens", "lm_head"]},
        (OTHER, CHANGED),
        "each alone",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_load_same_update_of_tied_pair(case: str, tmp_path: pathlib.Path) -> None:
    tensors, fields, expected = SAME[case]
    folder = folder_of(tmp_path / "in", tensors, **fields)
    for is_tied in (True, False):
        for ours, theirs in zip(tables(folder, is_tied), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32 sums of two products.


@pytest.mark.parametrize("case", APART)
def test_load_updates_of_tied_pair_apart(case: str, tmp_path: pathlib.Path) -> None:
    tensors, fields, expected, message = APART[case]
    folder = folder_of(tmp_path / "in", tensors, **fields)
    with pytest.raises(ValueError, match=f"{message}.*tie_word_embeddings=False"):
        peft.load(folder, *base())
    for ours, theirs in zip(tables(folder, is_tied=False), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["tied by the config", "both replaced"])
def test_load_promised_head_missing(case: str, tmp_path: pathlib.Path) -> None:
    tensors, fields, expected = SAME[case]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    folder = folder_of(tmp_path / "in", kept, **fields)
    with pytest.raises(ValueError, match=r"lacks lm_head.*ensure_weight_tying=True gives lm_head"):
        peft.load(folder, *base(is_tied=False))
    np.testing.assert_allclose(tables(folder, is_tied=True)[0], expected[0], atol=1e-5)


def base_with_head(folder: pathlib.Path, head: np.ndarray, is_tied: bool) -> models.LoadedModel:
    """The base with a stored head, and the field of config.json that ties it."""
    folder.mkdir()
    tensors = safetensors.numpy.load_file(BASE / "model.safetensors")
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    fields = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": is_tied}))
    return models.load(folder, dtype="float32")


def rows_of(loaded: peft.LoadedAdapter) -> tuple[np.ndarray, np.ndarray]:
    """The embedding and the head of a base with replaced rows."""
    params = loaded.params["params"]
    return np.array(params["embed"]["embedding"]), np.array(params["head"]).T


Q = "model.layers.0.self_attn.q_proj"
Q_FACTORS = {
    f"{Q}.lora_A.weight": np.ones((2, H), np.float32),
    f"{Q}.lora_B.weight": np.zeros((H, 2), np.float32),
}
TOKENS = "token_adapter.trainable_tokens_delta"
ROWS, HEAD_ROWS = OTHER[:2], OTHER[2:4]


def tokens_folder(folder: pathlib.Path, indices: Any, has_head: bool) -> pathlib.Path:
    """A folder with rows of tokens."""
    rows = {f"{EMBED}.{TOKENS}": ROWS} | ({f"{HEAD}.{TOKENS}": HEAD_ROWS} if has_head else {})
    fields = {"target_modules": [Q], "trainable_token_indices": indices}
    return folder_of(folder, {**Q_FACTORS, **rows}, **fields)


@pytest.mark.filterwarnings("ignore:.*differs from model.embed_tokens")
@pytest.mark.parametrize(
    ("is_tied", "shift", "head_indices", "has_rows", "changed"),
    [
        (False, 0, None, False, None),
        (False, 1, None, False, None),
        (False, 0, [3, 9], True, HEAD_ROWS),
        (True, 1, None, False, ROWS),
        (True, 1, [3, 9], False, ROWS),
        (True, 1, [4, 5], True, HEAD_ROWS),
    ],
)
def test_load_tokens_follow_config_tie(
    is_tied: bool,
    shift: int,
    head_indices: Any,
    has_rows: bool,
    changed: Any,
    tmp_path: pathlib.Path,
) -> None:
    model, params = base_with_head(tmp_path / "base", TABLE + shift, is_tied)
    head_entry = {} if head_indices is None else {HEAD: head_indices}
    indices = {"embed_tokens": [3, 9], **head_entry}
    folder = tokens_folder(tmp_path / "in", indices, has_rows)
    embedding, head = rows_of(peft.load(folder, model, params))
    expected_embedding, expected_head = TABLE.copy(), TABLE + shift
    expected_embedding[[3, 9]] = ROWS
    if changed is not None:
        expected_head[head_indices or [3, 9]] = changed
    np.testing.assert_array_equal(embedding, expected_embedding)
    np.testing.assert_array_equal(head, expected_head)


@pytest.mark.parametrize(
    ("head_indices", "has_rows"), [(None, False), ([3, 9], False), ([4, 5], True)]
)
def test_load_tokens_of_copied_head(
    head_indices: Any, has_rows: bool, tmp_path: pathlib.Path
) -> None:
    indices = {"embed_tokens": [3, 9], **({} if head_indices is None else {HEAD: head_indices})}
    folder = tokens_folder(tmp_path / "in", indices, has_rows)
    embedding, head = rows_of(peft.load(folder, *base(is_tied=False)))
    expected = TABLE.copy()
    expected[[3, 9]] = ROWS
    np.testing.assert_array_equal(embedding, expected)
    if has_rows:
        expected = TABLE.copy()
        expected[head_indices] = HEAD_ROWS
        with pytest.raises(ValueError, match="only lm_head.*tie_word_embeddings=False"):
            peft.load(folder, *base())
    np.testing.assert_array_equal(head, expected)


def test_load_tokens_of_both_refused(tmp_path: pathlib.Path) -> None:
    indices = {"embed_tokens": [3, 9], HEAD: [3, 9]}
    folder = tokens_folder(tmp_path / "in", indices, has_head=True)
    with pytest.raises(ValueError, match="PEFT gives it those of model.embed_tokens"):
        peft.load(folder, *base(is_tied=False))
    folder = tokens_folder(tmp_path / "other", {**indices, HEAD: [4, 5]}, has_head=False)
    for is_tied in (True, False):
        with pytest.raises(ValueError, match="has lm_head, for which the file has no rows"):
            peft.load(folder, *base(is_tied=is_tied))


def test_load_tokens_of_function(tmp_path: pathlib.Path) -> None:
    def fn(params: Any, tokens: Any) -> Any:
        return (params["table"][tokens] @ params["q"]) @ params["head"]

    eye = np.eye(H, dtype=np.float32)
    mapping = {
        "table": models.single_tensor_weight(f"{EMBED}.weight", (V, H)),
        "q": models.single_tensor_weight(f"{Q}.weight", (H, H), (1, 0)),
        "head": models.single_tensor_weight("lm_head.weight", (H, V), (1, 0)),
    }
    inputs = np.zeros(2, np.int32)
    folder = tokens_folder(tmp_path / "in", [3, 9], has_head=False)
    params = {"table": TABLE, "q": eye, "head": TABLE.T}
    with pytest.raises(ValueError, match="PEFT changes both or the embedding alone"):
        peft.load(folder, fn, params, inputs, checkpoint_mapping=mapping)
    params = {"table": TABLE, "q": eye, "head": OTHER.T}
    loaded = peft.load(folder, fn, params, inputs, checkpoint_mapping=mapping)
    np.testing.assert_array_equal(loaded.params["head"], OTHER.T)
    np.testing.assert_array_equal(loaded.params["table"][np.array([3, 9])], ROWS)


def filled(config: Any) -> dict[str, Any]:
    """An adapter of the table with random numbers."""
    model, params = base()
    weight = trace_weights(model.apply, params, *example_inputs(model))[PATH]
    leaf = make_template_leaf(config, weight)
    arrays = {
        name: np.asarray(RNG.normal(size=shape), np.float32)
        for name, shape in leaf.shapes().items()
    }
    return {PATH: dataclasses.replace(leaf, **arrays)}


@pytest.mark.parametrize("prefix", ["lora_", "hira_"])
def test_save_tied_table_adapts_both(prefix: str, tmp_path: pathlib.Path) -> None:
    is_lora = prefix == "lora_"
    config = jlora.LoRA(rank=2, alpha=3) if is_lora else jlora.HiRA(rank=2)
    adapter = filled(config)
    peft.save(tmp_path / "out", adapter, *base())
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    end = ".weight" if is_lora else ""
    embed = (
        tensors[f"{PREFIX}{EMBED}.{prefix}embedding_B"]
        @ (tensors[f"{PREFIX}{EMBED}.{prefix}embedding_A"])
    )
    head = tensors[f"{PREFIX}{HEAD}.{prefix}B{end}"] @ tensors[f"{PREFIX}{HEAD}.{prefix}A{end}"]
    ours = np.asarray(adapter[PATH].a) @ np.asarray(adapter[PATH].b)
    np.testing.assert_allclose(embed.T, ours, atol=1e-5)
    np.testing.assert_allclose(head, ours, atol=1e-5)
    assert fields["target_modules"] == ["embed_tokens", "lm_head"]
    assert fields.get("ensure_weight_tying", False) is is_lora
    again = peft.load(tmp_path / "out", *base()).adapter
    np.testing.assert_array_equal(again[PATH].a, adapter[PATH].a)


def test_save_tied_table_trained_whole(tmp_path: pathlib.Path) -> None:
    adapter = filled(jlora.FullDelta())
    q = "params/layers_0/attention/q/kernel"
    model, params = base()
    weight = trace_weights(model.apply, params, *example_inputs(model))[q]
    adapter[q] = jlora.LoRA(rank=1, alpha=1).init_leaf(jax.random.key(0), weight)
    peft.save(tmp_path / "out", adapter, model, params)
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = TABLE + np.asarray(adapter[PATH].delta)
    for module in (EMBED, HEAD):
        np.testing.assert_allclose(tensors[f"{PREFIX}{module}.weight"], expected, atol=1e-6)
    assert fields["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert fields["ensure_weight_tying"] is True


@pytest.mark.parametrize(("tokens", "others"), [((3, 9), [0]), ((0,), [1])])
def test_save_tokens_of_embedding_alone(
    tokens: tuple[int, ...], others: list[int], tmp_path: pathlib.Path
) -> None:
    model, params = base(is_tied=False)
    weights = trace_weights(model.apply, params, *example_inputs(model))
    q = "params/layers_0/attention/q/kernel"
    leaf = make_template_leaf(jlora.TrainableTokens(token_indices=tokens), weights[PATH])
    delta = OTHER[: len(tokens)]
    lora = jlora.LoRA(rank=1, alpha=1)
    adapter = {
        PATH: dataclasses.replace(leaf, delta=delta),
        q: lora.init_leaf(jax.random.key(0), weights[q]),
    }
    peft.save(tmp_path / "out", adapter, model, params)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # Other tokens of the head: PEFT then leaves its rows of the trained tokens alone.
    assert fields["trainable_token_indices"] == {"embed_tokens": list(tokens), HEAD: others}
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors[f"{PREFIX}{HEAD}.{TOKENS}"], TABLE[others])
    embedding, head = rows_of(peft.load(tmp_path / "out", model, params))
    np.testing.assert_array_equal(head, TABLE)
    np.testing.assert_allclose(embedding[list(tokens)], TABLE[list(tokens)] + delta, atol=1e-6)
    adapter["params/head"] = lora.init_leaf(jax.random.key(0), weights["params/head"])
    with pytest.raises(ValueError, match="PEFT cannot leave the rows of the head 'params/head'"):
        peft.save(tmp_path / "other", adapter, model, params)


def test_save_tied_table_unsupported_raises(tmp_path: pathlib.Path) -> None:
    adapter = filled(jlora.DoRA(rank=1, alpha=1))
    with pytest.raises(ValueError, match="adapters of the two would differ, with lora_embedding_A"):
        peft.save(tmp_path / "out", adapter, *base())
    adapter = filled(jlora.LoRA(rank=1, alpha=1))
    with pytest.raises(ValueError, match="vLLM adapts an embedding without the head"):
        peft.save(tmp_path / "out", adapter, *base(), file_format="vllm")
    assert not list(tmp_path.iterdir())


def test_save_tied_use_of_a_function(tmp_path: pathlib.Path) -> None:
    def fn(params: Any, tokens: Any) -> Any:
        return params["table"][tokens] @ params["table"].T

    params, tokens = {"table": np.ones((5, 3), np.float32)}, np.zeros(2, np.int32)
    mapping = {"table": models.single_tensor_weight("embed_tokens.weight", (5, 3))}
    weight = trace_weights(fn, params, tokens)["table"]
    for config in (jlora.LoRA(rank=1, alpha=1), jlora.FullDelta(), jlora.HiRA(rank=1)):
        leaf = make_template_leaf(config, weight)
        arrays = {name: np.ones(shape, np.float32) for name, shape in leaf.shapes().items()}
        adapter = {"table": dataclasses.replace(leaf, **arrays)}
        folder = tmp_path / config.info.name
        if isinstance(config, jlora.LoRA):
            peft.save(folder, adapter, fn, params, tokens, checkpoint_mapping=mapping)
            config_fields = json.loads((folder / "adapter_config.json").read_text())
            assert config_fields["ensure_weight_tying"] is True
            continue
        with pytest.raises(ValueError, match="would change the embedding alone|must have factors"):
            peft.save(folder, adapter, fn, params, tokens, checkpoint_mapping=mapping)


@pytest.mark.parametrize("config", [jlora.HiRA(rank=1), jlora.DoRA(rank=1, alpha=1)])
def test_save_on_scaled_embedding_raises(config: Any, tmp_path: pathlib.Path) -> None:
    folder = BASE.parent / "gemma"
    model, params = models.load(folder, dtype="float32", tie_word_embeddings=False)
    weight = trace_weights(model.apply, params, *example_inputs(model))[PATH]
    leaf = make_template_leaf(config, weight)
    arrays = {name: np.ones(shape, np.float32) for name, shape in leaf.shapes().items()}
    with pytest.raises(ValueError, match="does not scale the update"):
        peft.save(tmp_path / "out", {PATH: dataclasses.replace(leaf, **arrays)}, model, params)


@pytest.mark.parametrize("case", ["embedding alone", "saved with drift"])
def test_export_hf_unties_updates_apart(case: str, tmp_path: pathlib.Path) -> None:
    tensors, fields, (embedding, head), _ = APART[case]
    folder = folder_of(tmp_path / "in", tensors, **fields)
    options = export.ExportOptions(
        base=str(BASE), adapter=folder, out=tmp_path / "out", dtype="float32"
    )
    export.run_export(options)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    # The base and the replaced tables are bfloat16, of eight bits.
    np.testing.assert_allclose(written[f"{EMBED}.weight"], embedding, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(written[f"{HEAD}.weight"], head, rtol=2**-8, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
