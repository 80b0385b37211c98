"""The encoder computes what transformers computes, and its checkpoints survive the round trip."""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jlora.models import bert

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "checkpoint"
Edit = Callable[[dict[str, np.ndarray]], Any]


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    """Inputs and the outputs of transformers, see make_bert_data.py."""
    return load_file(DATA / "outputs.safetensors")


def edited(folder: Path, edit: Edit) -> Path:
    """A copy of the checkpoint with its tensors edited in place."""
    shutil.copytree(CHECKPOINT, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    """A copy of the checkpoint with other entries in its config; None takes an entry out."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def contents(folder: Path) -> tuple[dict[str, str] | None, dict[str, tuple[str, bytes]]]:
    """The metadata, and each tensor's dtype and bytes."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in set(file.keys())}
        return file.metadata(), {k: (str(t.dtype), t.tobytes()) for k, t in tensors.items()}


# The forward pass


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_hidden_states_equal_those_of_transformers(batch, compiled):
    model, params = bert.load_encoder(CHECKPOINT)
    apply = jax.jit(model.apply) if compiled else model.apply
    inputs = batch["input_ids"], batch["attention_mask"]
    # The reference is float64. Hidden states of up to 3.6 are off by 4 float32 roundings (9e-7).
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
    close(apply(params, *inputs, batch["token_type_ids"]), batch["hidden"])
    close(apply(params, *inputs), batch["hidden_without_types"])


def test_what_stands_at_padding_changes_no_token(batch):
    model, params = bert.load_encoder(CHECKPOINT)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    scribbled = np.where(mask, ids, 5)
    assert (scribbled != ids).any()
    tokens = mask.astype(bool)
    np.testing.assert_array_equal(
        model.apply(params, scribbled, mask)[tokens], model.apply(params, ids, mask)[tokens]
    )


def test_a_boolean_mask_means_the_same_as_ones_and_zeros(batch):
    model, params = bert.load_encoder(CHECKPOINT)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    np.testing.assert_array_equal(
        model.apply(params, ids, mask.astype(bool)), model.apply(params, ids, mask)
    )


@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_obeys_the_key(place, batch, tmp_path):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, params = bert.load_encoder(configured(tmp_path / "copy", **off | {place: 0.3}))
    inputs = batch["input_ids"], batch["attention_mask"]

    def dropped(seed: int) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(params, *inputs, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert jnp.abs(dropped(1) - dropped(2)).max() > 0.1
    assert jnp.abs(dropped(1) - model.apply(params, *inputs)).max() > 0.1


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_pytorch_tanh": lambda x: ACTIVATIONS["gelu_new"](x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_config_chooses_the_activation(name, tmp_path):
    model, params = bert.load_encoder(configured(tmp_path / "copy", hidden_act=name))
    weights = jax.tree.map(np.float64, params["params"]["layer_0"]["mlp"])
    x = np.random.default_rng(0).normal(size=(3, 4, model.config.hidden_size))
    inner = ACTIVATIONS[name](x @ weights["up"]["kernel"] + weights["up"]["bias"])
    out = x + inner @ weights["down"]["kernel"] + weights["down"]["bias"]
    normed = (out - out.mean(-1, keepdims=True)) / out.std(-1, keepdims=True)
    np.testing.assert_allclose(
        bert.Mlp(model.config).apply({"params": weights}, jnp.float32(x), deterministic=True),
        normed * weights["norm"]["scale"] + weights["norm"]["bias"],
        atol=5e-6,  # Sums of 28 products in float32; the two gelus differ by 5e-4.
    )


def test_mean_pool_averages_the_tokens_and_not_the_padding(batch):
    hidden = jnp.float32(batch["hidden"])
    pooled = bert.mean_pool(hidden, batch["attention_mask"])
    lengths = batch["attention_mask"].sum(axis=1)
    expected = [text[:length].mean(axis=0) for text, length in zip(hidden, lengths, strict=True)]
    np.testing.assert_allclose(pooled, expected, atol=1e-6)  # Sums of at most 11 values.


def test_mean_pool_of_padding_only_is_zero():
    pooled = bert.mean_pool(jnp.ones((2, 3, 4)), jnp.array([[0, 0, 0], [1, 1, 0]]))
    np.testing.assert_array_equal(pooled, [[0.0] * 4, [1.0] * 4])


def test_mean_pool_is_float32_because_bfloat16_does_not_count_to_509():
    hidden = jnp.full((1, 509, 2), 1.5, jnp.bfloat16)
    pooled = bert.mean_pool(hidden, jnp.ones((1, 509), jnp.bfloat16))
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, [[1.5, 1.5]])


def test_input_past_the_last_position_is_refused():
    model, params = bert.load_encoder(CHECKPOINT)
    tokens = np.ones((2, 18), np.int32)
    with pytest.raises(ValueError, match=r"length 18 run past max_position_embeddings=17"):
        model.apply(params, tokens, tokens)


def test_a_mask_of_another_shape_is_refused():
    model, params = bert.load_encoder(CHECKPOINT)
    with pytest.raises(ValueError, match=r"shape \(2, 1\), input_ids \(2, 7\)"):
        model.apply(params, np.ones((2, 7), np.int32), np.ones((2, 1), np.int32))


def test_a_token_outside_the_vocabulary_makes_its_text_nan_and_no_other():
    model, params = bert.load_encoder(CHECKPOINT)
    hidden = model.apply(params, np.array([[3, 53], [3, 52]]), np.ones((2, 2), np.int32))
    np.testing.assert_array_equal(jnp.isnan(hidden).all(axis=(1, 2)), [True, False])


# Checkpoints


def old_spelling(tensors: dict[str, np.ndarray]) -> None:
    """Names as in bert-base-uncased, with a prefix, gamma and beta, buffers and a training head."""
    for key in list(tensors):
        name = re.sub("LayerNorm.weight$", "LayerNorm.gamma", key)
        tensors["bert." + re.sub("LayerNorm.bias$", "LayerNorm.beta", name)] = tensors.pop(key)
    tensors["bert.embeddings.position_ids"] = np.arange(17)[None]
    tensors["cls.predictions.bias"] = np.arange(53, dtype=np.float32)


def narrowed(tensors: dict[str, np.ndarray], dtype: Any) -> None:
    tensors.update({key: tensor.astype(dtype) for key, tensor in tensors.items()})


FORMS: dict[str, Edit] = {
    "as saved": lambda tensors: None,
    "old spelling": old_spelling,
    "bfloat16": functools.partial(narrowed, dtype=jnp.bfloat16),
    "float16": functools.partial(narrowed, dtype=np.float16),
}


@pytest.mark.parametrize("form", FORMS)
def test_law_a_loaded_checkpoint_is_saved_bit_for_bit(form, tmp_path):
    source = edited(tmp_path / "source", FORMS[form])
    _, params = bert.load_encoder(source)
    bert.save_encoder(tmp_path / "saved", params, source)
    assert contents(tmp_path / "saved") == contents(source)
    _, again = bert.load_encoder(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_old_and_new_spelling_load_the_same_weights(tmp_path):
    _, params = bert.load_encoder(CHECKPOINT)
    _, old = bert.load_encoder(edited(tmp_path / "old", old_spelling))
    jax.tree.map(np.testing.assert_array_equal, old, params)


def test_every_weight_is_saved_under_its_own_name(tmp_path):
    """A different number added to each weight shows a swapped pair, which a round trip hides."""
    _, params = bert.load_encoder(CHECKPOINT)
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 10 * (number + 1) for number, leaf in enumerate(leaves)]
    bert.save_encoder(tmp_path / "saved", jax.tree.unflatten(structure, moved), CHECKPOINT)
    before, after = (load_file(f / "model.safetensors") for f in (CHECKPOINT, tmp_path / "saved"))
    shifts = {key: (after[key] - before[key]).round().astype(int) // 10 for key in before}
    assert {key for key, shift in shifts.items() if not shift.any()} == {
        "pooler.dense.bias",
        "pooler.dense.weight",
    }
    numbers = [shift.flat[0] for shift in shifts.values() if (shift == shift.flat[0]).all()]
    assert sorted(numbers) == [0, 0, *range(1, len(leaves) + 1)]


def test_variables_have_the_dtype_that_was_asked_for(batch):
    model, params = bert.load_encoder(CHECKPOINT, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    hidden = model.apply(params, batch["input_ids"], batch["attention_mask"])
    assert hidden.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: states of up to 3.6 carry some 10 roundings of 0.008.
    np.testing.assert_allclose(np.float32(hidden), batch["hidden_without_types"], rtol=0, atol=0.1)


def test_config_and_tokenizer_are_copied_and_other_weights_are_not(tmp_path):
    source = edited(tmp_path / "source", FORMS["as saved"])
    (source / "1_Pooling").mkdir()
    copied = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json"}
    for name in copied | {"pytorch_model.bin", "tf_model.h5"}:
        (source / name).write_text(name)
    bert.save_encoder(tmp_path / "saved", bert.load_encoder(source)[1], source)
    saved = {p.relative_to(tmp_path / "saved").as_posix() for p in (tmp_path / "saved").rglob("*")}
    assert saved == copied | {"1_Pooling", "config.json", "model.safetensors"}
    for name in copied | {"config.json"}:
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()


def test_the_weights_are_as_readable_as_the_config(tmp_path):
    bert.save_encoder(tmp_path / "saved", bert.load_encoder(CHECKPOINT)[1], CHECKPOINT)
    modes = {file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1


# Refusals


QUERY = "encoder.layer.1.attention.self.query.weight"
BAD_TENSORS: dict[str, tuple[Edit, str]] = {
    "unknown tensor": (
        lambda tensors: tensors.update({"classifier.weight": np.ones((3, 20), np.float32)}),
        r"config.json describes: classifier.weight is unknown. Use the two files",
    ),
    "layer past the config's": (
        lambda tensors: tensors.update({"encoder.layer.2.output.dense.bias": tensors[QUERY][0]}),
        r"encoder.layer.2.output.dense.bias is unknown",
    ),
    "missing tensor": (
        lambda tensors: tensors.pop(QUERY),
        rf"describes: {QUERY} is missing. Use",
    ),
    "wrong shape": (
        lambda tensors: tensors.update({QUERY: tensors[QUERY][:19]}),
        rf"{QUERY} has shape \(19, 20\) instead of \(20, 20\)",
    ),
    "transposed": (
        lambda tensors: tensors.update(
            {"encoder.layer.0.output.dense.weight": np.ones((28, 20), np.float32)}
        ),
        r"encoder.layer.0.output.dense.weight has shape \(28, 20\) instead of \(20, 28\)",
    ),
    "whole numbers": (
        lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.int8)}),
        rf"{QUERY} has dtype I8, which is none of F16, BF16, F32",
    ),
    "one weight twice": (
        lambda tensors: tensors.update({f"bert.{QUERY}": tensors[QUERY]}),
        rf"{QUERY} is unknown",
    ),
    "many problems": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "layer.1" in key],
        r"is missing; and 10 more. Use",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_file_that_is_not_the_configs_is_refused_by_the_tensors_name(name, tmp_path):
    edit, message = BAD_TENSORS[name]
    with pytest.raises(ValueError, match=message):
        bert.load_encoder(edited(tmp_path / "copy", edit))


@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 34_967])
def test_a_truncated_file_is_refused(kept_bytes, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*Copy it anew"):
        bert.load_encoder(tmp_path / "copy")


def test_a_folder_without_safetensors_is_refused_and_its_pickle_left_alone(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"missing. One safetensors file is read, neither"):
        bert.load_encoder(tmp_path / "copy")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "roberta"}, r"model_type='roberta' is not implemented"),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        r"position_embedding_type='relative_key' is not.* position_embedding_type='absolute'",
    ),
    "a decoder": ({"is_decoder": True}, r"is_decoder=True is not implemented"),
    "cross attention": ({"add_cross_attention": True}, r"add_cross_attention=True"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, r"pruned_heads=\{'0': \[1\]\}"),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}"),
    "activation": (
        {"hidden_act": "mish"},
        r"hidden_act='mish' is not.* one of \['gelu', 'gelu_new'",
    ),
    "no width": ({"hidden_size": None}, r"config.json has no \['hidden_size'\]. Copy"),
    "no layers": ({"num_hidden_layers": 0}, r"num_hidden_layers=0 is no size"),
    "a size in words": ({"vocab_size": "53"}, r"vocab_size='53' is no size"),
    "odd heads": ({"num_attention_heads": 3}, r"hidden_size=20 does not split into num_attention"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_is_not_implemented_is_refused_by_its_entry(name, tmp_path):
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        bert.load_encoder(configured(tmp_path / "copy", **changes))


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON \(.*Copy it anew"):
        bert.BertConfig.from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_destination_is_refused_and_kept(kind, tmp_path):
    destination = tmp_path / "saved"
    if kind == "folder":
        destination.mkdir()
    elif kind == "file":
        destination.write_text("mine")
    else:
        destination.symlink_to(tmp_path / "nowhere")
    before = destination.lstat()
    with pytest.raises(FileExistsError, match=r"saved' exists and is left as it was. Choose"):
        bert.save_encoder(destination, bert.load_encoder(CHECKPOINT)[1], CHECKPOINT)
    assert destination.lstat() == before
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize(
    ("value", "form"),
    [(np.nan, "as saved"), (np.inf, "as saved"), (7e4, "float16")],
    ids=["NaN", "Inf", "overflow of the file's dtype"],
)
def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(value, form, tmp_path):
    source = edited(tmp_path / "source", FORMS[form])
    _, params = bert.load_encoder(source)
    bias = params["params"]["layer_1"]["mlp"]["up"]["bias"]
    params["params"]["layer_1"]["mlp"]["up"]["bias"] = bias.at[3].set(value)
    with pytest.raises(ValueError, match=r"layer_1/mlp/up/bias holds NaN or Inf in the source's"):
        bert.save_encoder(tmp_path / "saved", params, source)
    assert list(tmp_path.iterdir()) == [source]


BAD_PARAMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown": (
        lambda tree: tree["layer_0"].update(adapter=jnp.ones(3)),
        r"layer_0/adapter is unknown",
    ),
    "missing": (
        lambda tree: tree["layer_0"]["mlp"].pop("up"),
        r"layer_0/mlp/up/bias is missing; layer_0/mlp/up/kernel is missing",
    ),
    "shape": (
        lambda tree: tree["embeddings"]["word"].update(embedding=jnp.ones((54, 20))),
        r"embeddings/word/embedding has shape \(54, 20\) instead of \(53, 20\)",
    ),
    "transposed": (
        lambda tree: tree["layer_1"]["mlp"]["up"].update(kernel=jnp.ones((28, 20))),
        r"layer_1/mlp/up/kernel has shape \(28, 20\) instead of \(20, 28\)",
    ),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_params_that_are_not_the_sources_are_refused_by_path(name, tmp_path):
    edit, message = BAD_PARAMS[name]
    _, params = bert.load_encoder(CHECKPOINT)
    edit(params["params"])
    with pytest.raises(ValueError, match=message):
        bert.save_encoder(tmp_path / "saved", params, CHECKPOINT)
    assert not list(tmp_path.iterdir())


def test_params_without_their_collection_are_refused(tmp_path):
    _, params = bert.load_encoder(CHECKPOINT)
    with pytest.raises(ValueError, match=r"embeddings/norm/bias is missing.*\{'params': \.\.\.\}"):
        bert.save_encoder(tmp_path / "saved", params["params"], CHECKPOINT)


def test_a_save_that_fails_midway_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        bert.save_encoder(tmp_path / "saved", bert.load_encoder(CHECKPOINT)[1], CHECKPOINT)
    assert not list(tmp_path.iterdir())
