"""Encoders against the outputs of transformers for the same checkpoints.

make_encoder_data.py wrote `data/encoders/`: weights that bfloat16 represents exactly, inputs, and
hidden states or logits in float32 and bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import jlora
from jlora import _tree
from jlora.models import mean_pool
from jlora.models.encoder import Mlp
from jlora.models.hf import load, save
from jlora.models.hf.encoder_configs import encoder_config, vit_config

DATA = pathlib.Path(__file__).parent / "data" / "encoders"
NAMES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
TEXTS = [name for name in NAMES if not name.startswith("vit")]
BASES = ["bert", "distilbert", "roberta", "vit"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "images")
Edit = Callable[[dict[str, np.ndarray]], Any]


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    return load_file(DATA / name / "expected.safetensors")


@functools.cache
def loaded(name: str, dtype: str = "float32") -> load.LoadedModel:
    return load.load(DATA / name, dtype=dtype)


def inputs(name: str) -> list[np.ndarray]:
    return [expected(name)[key] for key in INPUTS if key in expected(name)]


def seen(name: str, output: Any) -> np.ndarray:
    """The output without that of padding."""
    output, mask = np.float32(output), expected(name).get("attention_mask")
    return output if mask is None or output.ndim < 3 else output[mask > 0]


def raw(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "config.json").read_text())


def edited(folder: pathlib.Path, edit: Edit, name: str = "bert") -> pathlib.Path:
    """A copy of a checkpoint with its tensors edited in place."""
    shutil.copytree(DATA / name, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configured(folder: pathlib.Path, name: str = "bert", **changes: Any) -> pathlib.Path:
    """A copy of a checkpoint with other entries in its config; None takes an entry out."""
    shutil.copytree(DATA / name, folder)
    config = raw(name) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def contents(folder: pathlib.Path) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """The metadata, and each tensor's dtype, shape and bytes."""
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in set(file.keys())}
        return file.metadata(), {
            key: (str(tensor.dtype), tensor.shape, tensor.tobytes())
            for key, tensor in tensors.items()
        }


def assert_same(one: Any, two: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


# --- outputs of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *(pytest.param(name, True, id=f"{name}-jit") for name in NAMES),
        # Eager execution compiles every operation, and differs between models in nothing else.
        *(
            pytest.param(
                name,
                False,
                id=f"{name}-eager",
                marks=[] if name in ("bert_sequence", "vit") else pytest.mark.slow,
            )
            for name in NAMES
        ),
    ],
)
@pytest.mark.thin(3)
def test_encoder_outputs_match_transformers(name: str, compiled: bool) -> None:
    model, params = loaded(name)
    apply = jax.jit(model.apply) if compiled else model.apply
    ours, theirs = apply(params, *inputs(name)), expected(name)["output"]
    assert ours.shape == theirs.shape
    # Both round to float32, 2e-7 of outputs up to 4, in each of some thirty products.
    np.testing.assert_allclose(seen(name, ours), seen(name, theirs), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(3)
def test_encoder_bfloat16_as_near_as_transformers(name: str) -> None:
    model, params = loaded(name, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    output = jax.jit(model.apply)(params, *inputs(name))
    assert output.dtype == jnp.bfloat16
    exact, theirs = (seen(name, expected(name)[key]) for key in ("output", "output_bfloat16"))
    # Their own distance from float32 is what rounding to bfloat16 costs. Twice that, because the
    # two round in other places; and three times for the logits of no more than eight texts, of
    # which one may be unlucky.
    bound = (2 if output.ndim == 3 else 3) * np.sqrt(np.mean((theirs - exact) ** 2))
    assert np.sqrt(np.mean((seen(name, output) - exact) ** 2)) < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(3)
def test_encoder_dtype_bfloat16_rounds_weights(name: str) -> None:
    model, params = loaded(name)
    halved, rounded = loaded(name, "bfloat16")
    output = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, *inputs(name))
    assert output.dtype == jnp.bfloat16
    # bfloat16 holds these weights exactly, so that the two are one computation.
    assert_same(output, jax.jit(halved.apply)(rounded, *inputs(name)))


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_pooler_output_matches_transformers(name: str) -> None:
    model, params = loaded(name)
    pooled = model.apply(params, *inputs(name), method="pooler_output")
    # As above; the activation makes them smaller.
    np.testing.assert_allclose(pooled, expected(name)["pooled"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["bert_tokens", "distilbert", "vit_image"])
def test_pooler_output_without_pooler_raises(name: str) -> None:
    model, params = loaded(name)
    with pytest.raises(ValueError, match="no pooler, because its checkpoint has none. Use"):
        model.apply(params, *inputs(name), method="pooler_output")


def test_hidden_states_with_head_are_same(tmp_path: pathlib.Path) -> None:
    def headless(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.startswith("classifier")]:
            del tensors[key]

    for name, base in (("bert_sequence", "BertModel"), ("vit_image", "ViTModel")):
        model, params = loaded(name)
        folder = edited(tmp_path / name, headless, name)
        (folder / "config.json").write_text(json.dumps(raw(name) | {"architectures": [base]}))
        alone, own = load.load(folder, dtype=jnp.float32)
        hidden = model.apply(params, *inputs(name), method="hidden_states")
        np.testing.assert_array_equal(alone.apply(own, *inputs(name)), hidden)


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_encoder_padding_ids_change_nothing(name: str) -> None:
    model, params = loaded(name)
    apply = jax.jit(model.apply)
    ids, mask, *types = inputs(name)
    scribbled = np.where(mask, ids, 999)  # Padding may be any id, past the vocabulary too.
    assert (scribbled != ids).any()
    outputs = [seen(name, apply(params, some, mask, *types)) for some in (ids, scribbled)]
    np.testing.assert_array_equal(*outputs)


def test_encoder_boolean_mask_is_same() -> None:
    model, params = loaded("bert")
    ids, mask, types = inputs("bert")
    assert_same(model.apply(params, ids, mask > 0, types), model.apply(params, ids, mask, types))


def test_encoder_token_types_default_to_zero() -> None:
    model, params = loaded("bert")
    ids, mask, types = inputs("bert")
    without = model.apply(params, ids, mask)
    assert_same(without, model.apply(params, ids, mask, np.zeros_like(types)))
    assert np.abs(without - model.apply(params, ids, mask, types)).max() > 0.1


def test_roberta_positions_skip_padding() -> None:
    model, params = loaded("roberta")
    ids, mask = inputs("roberta")
    assert (ids[mask > 0] == 1).any()  # Nor a padding token inside a text.
    left = [
        np.stack([np.roll(row, -length) for row, length in zip(a, mask.sum(1), strict=True)])
        for a in (ids, mask)
    ]
    output = model.apply(params, *left)
    # Sums over the same keys in another order.
    np.testing.assert_allclose(
        output[left[1] > 0], seen("roberta", expected("roberta")["output"]), atol=5e-6
    )


def test_load_xlm_roberta_is_roberta(tmp_path: pathlib.Path) -> None:
    folder = configured(
        tmp_path / "copy",
        "roberta_sequence",
        model_type="xlm-roberta",
        architectures=["XLMRobertaForSequenceClassification"],
    )
    model, params = load.load(folder, dtype=jnp.float32)
    config = dataclasses.replace(model.config, model_type="roberta")
    assert config == loaded("roberta_sequence").model.config
    assert_same(params, loaded("roberta_sequence").params)


DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
)
# A checkpoint, a field, and in how many places of its two layers transformers has that dropout.
PLACES = [
    ("bert", "hidden_dropout_prob", 1 + 2 * 2),
    ("bert", "attention_probs_dropout_prob", 2),
    ("bert_sequence", "hidden_dropout_prob", 1 + 2 * 2 + 1),
    ("bert_sequence", "classifier_dropout", 1),
    ("bert_tokens", "classifier_dropout", 1),
    ("roberta_sequence", "classifier_dropout", 2),
    ("roberta_tokens", "classifier_dropout", 1),
    ("distilbert", "dropout", 1 + 2),
    ("distilbert", "attention_dropout", 2),
    ("distilbert_sequence", "seq_classif_dropout", 1),
    ("distilbert_tokens", "dropout", 1 + 2 + 1),
    ("vit", "hidden_dropout_prob", 1 + 2 * 2),
    ("vit", "attention_probs_dropout_prob", 2),
]


@pytest.mark.parametrize(("name", "field", "places"), PLACES)
@pytest.mark.thin(3)
@pytest.mark.thin(4)
def test_dropout_is_in_place_and_follows_key(
    name: str, field: str, places: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {other: 0.0 for other in DROPOUTS if other in raw(name)}
    folder = configured(tmp_path / "copy", name, **off | {field: 0.3})
    model, params = load.load(folder, dtype=jnp.float32)
    drawn, bernoulli = [], jax.random.bernoulli

    def counted(*args: Any, **kwargs: Any) -> jax.Array:
        drawn.append(args)
        return bernoulli(*args, **kwargs)

    @jax.jit
    def dropped(key: jax.Array) -> jax.Array:
        return model.apply(params, *inputs(name), deterministic=False, rngs={"dropout": key})

    monkeypatch.setattr(jax.random, "bernoulli", counted)
    first, second = (dropped(jax.random.key(seed)) for seed in (1, 2))
    assert len(drawn) == places
    assert_same(first, dropped(jax.random.key(1)))
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first - jax.jit(model.apply)(params, *inputs(name))).max() > 0.1


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_pytorch_tanh": lambda x: ACTIVATIONS["gelu_new"](x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_encoder_config_selects_activation(name: str) -> None:
    config = encoder_config(raw("bert") | {"hidden_act": name})
    weights = jax.tree.map(np.float64, loaded("bert").params["params"]["layer_0"]["mlp"])
    x = np.random.default_rng(0).normal(size=(3, 4, config.hidden_size))
    inner = ACTIVATIONS[name](x @ weights["up"]["kernel"] + weights["up"]["bias"])
    out = x + inner @ weights["down"]["kernel"] + weights["down"]["bias"]
    normed = (out - out.mean(-1, keepdims=True)) / out.std(-1, keepdims=True)
    np.testing.assert_allclose(
        Mlp(config).apply({"params": weights}, jnp.float32(x), deterministic=True),
        normed * weights["norm"]["scale"] + weights["norm"]["bias"],
        atol=5e-6,  # Sums of 28 products in float32; the two gelus differ by 5e-4.
    )


def test_mean_pool_ignores_padding() -> None:
    hidden, mask = expected("bert")["output"], expected("bert")["attention_mask"]
    texts = [text[:length] for text, length in zip(hidden, mask.sum(1), strict=True)]
    means = [text.mean(axis=0) for text in texts]
    np.testing.assert_allclose(mean_pool(hidden, mask), means, atol=1e-6)  # Sums of 11 values.


def test_mean_pool_only_padding_is_zero() -> None:
    pooled = mean_pool(jnp.ones((2, 3, 4)), jnp.array([[0, 0, 0], [1, 1, 0]]))
    np.testing.assert_array_equal(pooled, [[0.0] * 4, [1.0] * 4])


def test_mean_pool_bfloat16_counts_past_256() -> None:
    hidden = jnp.full((1, 509, 2), 1.5, jnp.bfloat16)
    pooled = mean_pool(hidden, jnp.ones((1, 509), jnp.bfloat16))
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, [[1.5, 1.5]])


# --- inputs that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most"), [("bert", 17), ("distilbert_sequence", 17), ("roberta", 15)]
)
@pytest.mark.thin(3)
def test_encoder_too_long_text_raises(name: str, most: int) -> None:
    model, params = loaded(name)
    tokens = np.full((2, most + 1), 3, np.int32)
    message = f"at most {most} tokens .* got length {most + 1}. Truncate the texts"
    with pytest.raises(ValueError, match=message):
        model.apply(params, tokens, tokens)
    longest = model.apply(params, tokens[:, :most], tokens[:, :most])
    assert np.isfinite(longest).all()


IDS = np.full((2, 7), 3, np.int32)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("bert", (IDS, IDS[:, :1]), r"mask has shape \(2, 1\), input_ids \(2, 7\). Pass one mask"),
        (
            "bert",
            (IDS[0], IDS[0]),
            r"input_ids must have shape .* got \(7,\). .* input_ids\[None\]",
        ),
        ("bert", (IDS, IDS, IDS[:1]), r"token_type_ids has shape \(1, 7\), input_ids \(2, 7\)"),
        ("distilbert", (IDS, IDS, IDS), "this encoder has no token types. Leave it out"),
    ],
)
def test_encoder_mismatched_shapes_raise(name: str, given: tuple[Any, ...], message: str) -> None:
    model, params = loaded(name)
    with pytest.raises(ValueError, match=message):
        model.apply(params, *given)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_encoder_invalid_token_is_nan(name: str) -> None:
    model, params = loaded(name)
    hidden = model.apply(params, np.array([[3, 44], [3, 43]]), np.ones((2, 2), np.int32))
    np.testing.assert_array_equal(np.isnan(hidden).all(axis=(1, 2)), [True, False])


@pytest.mark.parametrize(("name", "types"), [("bert", 2), ("roberta", 1)])
def test_encoder_invalid_token_type_is_nan(name: str, types: int) -> None:
    model, params = loaded(name)
    given = np.array([[0, types], [0, types - 1]])
    hidden = model.apply(params, IDS[:, :2], IDS[:, :2], given)
    np.testing.assert_array_equal(np.isnan(hidden).all(axis=(1, 2)), [True, False])


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        (
            (2, 12, 8, 3),
            "float32",
            ValueError,
            r"shape \(batch, 8, 12, 3\), .* got \(2, 12, 8, 3\)",
        ),
        ((2, 3, 8, 12), "float32", ValueError, "put the channels last"),
        ((8, 12, 3), "float32", ValueError, r"got \(8, 12, 3\)"),
        ((2, 8, 12, 3), "uint8", TypeError, "dtype uint8, which is not scaled. Scale"),
    ],
)
def test_vit_invalid_images_raise(
    shape: tuple[int, ...], dtype: str, error: Any, message: str
) -> None:
    model, params = loaded("vit")
    with pytest.raises(error, match=message):
        model.apply(params, np.zeros(shape, dtype))


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (
            "bert",
            {
                "params/embeddings/word/embedding": (44, 20),
                "params/embeddings/norm/scale": (20,),
                "params/layer_0/attention/query/kernel": (20, 20),
                "params/layer_1/attention/norm/bias": (20,),
                "params/layer_1/mlp/up/kernel": (20, 28),
                "params/pooler/kernel": (20, 20),
            },
        ),
        ("bert_tokens", {"params/classifier/kernel": (20, 5)}),
        (
            "roberta_sequence",
            {"params/pooler/kernel": (20, 20), "params/classifier/kernel": (20, 3)},
        ),
        (
            "distilbert_sequence",
            {"params/pooler/bias": (18,), "params/classifier/kernel": (18, 2)},
        ),
        (
            "vit",
            {
                "params/embeddings/class": (1, 1, 20),
                "params/embeddings/patch/kernel": (4, 3, 3, 20),
                "params/embeddings/position": (1, 9, 20),
                "params/layer_0/attention_norm/scale": (20,),
                "params/layer_1/mlp/down/kernel": (28, 20),
                "params/norm/bias": (20,),
                "params/pooler/kernel": (20, 10),
            },
        ),
        ("vit_image", {"params/classifier/kernel": (20, 4)}),
    ],
)
def test_load_encoder_has_paths(name: str, paths: dict[str, tuple[int, ...]]) -> None:
    flat = _tree.flatten_with_paths(loaded(name).params)
    shapes = {path: leaf.shape for path, leaf in zip(flat.paths, flat.leaves, strict=True)}
    assert paths.items() <= shapes.items()


@pytest.mark.parametrize("name", NAMES)
def test_encoder_axes_have_logical_names(name: str) -> None:
    model, params = loaded(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs(name))
    specs = nn.get_partition_spec(variables)
    assert jax.tree.structure(nn.unbox(variables)) == jax.tree.structure(params)

    def check(path: Any, spec: Any, leaf: jax.Array) -> None:
        if leaf.ndim > 1 or path[-1].key == "scale":  # Biases have none.
            assert len(spec) == leaf.ndim, path
            assert all(axis or size == 1 for axis, size in zip(spec, leaf.shape, strict=True)), path

    jax.tree_util.tree_map_with_path(
        check, specs, params, is_leaf=lambda spec: isinstance(spec, jax.sharding.PartitionSpec)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(4)
@pytest.mark.thin(4)
def test_lora_encoder_stays_factored(name: str) -> None:
    model, params = loaded(name)
    lora = jlora.lora_transform(model.apply, jlora.LoRA(rank=2, alpha=4))
    adapter = lora.init(jax.random.key(0), params, *inputs(name))
    unused = {"params/pooler/kernel"} if name in BASES else set()
    paths = _tree.flatten_with_paths(params).paths
    assert set(adapter) == {path for path in paths if path.endswith("kernel")} - unused
    adapter = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), adapter)
    explained = lora.explain(params, *inputs(name))
    assert not any(row.dense_reasons for row in explained.rows if row.adapter != "frozen")
    assert not explained.errors
    out = seen(name, jax.jit(lora.apply)(params, adapter, *inputs(name)))
    merge_and_apply = lambda p, a, *inputs: model.apply(lora.merge(p, a), *inputs)
    merged = seen(name, jax.jit(merge_and_apply)(params, adapter, *inputs(name)))
    # The update's sums of up to 28 products are made in another order.
    np.testing.assert_allclose(out, merged, atol=2e-5)
    assert np.abs(out - seen(name, expected(name)["output"])).max() > 0.1


def test_load_sharding_places_weights() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    small = ("params/classifier/kernel", "params/pooler/kernel")

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        spec = ["model", *[None] * (len(leaf.shape) - 2), "data"] if path.endswith("kernel") else []
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    for name in ("bert_tokens", "vit"):
        placed = load.load(
            DATA / name,
            dtype=jnp.float32,
            sharding=lambda path, leaf: None if path in small else place(path, leaf),
        )
        assert_same(placed.params, loaded(name).params)
        kernel = placed.params["params"]["layer_1"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (10, 7)


# --- configs --------------------------------------------------------------------------------------


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("bert", {"model_type": "deberta"}, "model_type='deberta' is not implemented"),
    "relative positions": (
        "bert",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type='relative_key' is not implemented, only 'absolute'",
    ),
    "a decoder": ("bert", {"is_decoder": True}, "is_decoder=True is not implemented"),
    "cross attention": ("roberta", {"add_cross_attention": True}, "add_cross_attention=True"),
    "pruned heads": ("distilbert", {"pruned_heads": {"0": [1]}}, r"pruned_heads=\{'0': \[1\]\}"),
    "quantised": ("vit", {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits'"),
    "activation": (
        "bert",
        {"hidden_act": "mish"},
        r"hidden_act='mish' is not implemented, must be one of \['gelu', 'gelu_new'",
    ),
    "the pooler's activation": ("vit", {"pooler_act": "cube"}, "pooler_act='cube' is not impl"),
    "dropout": ("bert", {"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 must be at least"),
    "text for a list": ("bert", {"architectures": 3}, "a field has the wrong type"),
    "two widths": ("distilbert", {"hidden_size": 8}, "dim=18 and hidden_size=8 are two values"),
    "two counts": (
        "bert_tokens",
        {"id2label": {"0": "a"}, "num_labels": 2},
        "and num_labels=2 are two",
    ),
    "no width": (
        "bert",
        {"hidden_size": None},
        "hidden_size=None must be a positive integer. Copy",
    ),
    "no layers": ("distilbert", {"n_layers": 0}, "n_layers=0 must be a positive integer"),
    "a size in words": ("bert", {"vocab_size": "53"}, "vocab_size='53' must be a positive integer"),
    "odd heads": (
        "bert",
        {"num_attention_heads": 3},
        "width 20 .* must be a multiple .* got 3 heads",
    ),
    "epsilon": (
        "bert",
        {"layer_norm_eps": "small"},
        "layer_norm_eps='small' must be a finite number",
    ),
    "patches": (
        "vit",
        {"patch_size": [4]},
        r"patch_size=\[4\] must be a positive integer, or a list of two. Copy",
    ),
    "padding": ("roberta", {"pad_token_id": 16}, "pad_token_id=16 leaves no positions"),
    "no padding": ("roberta", {"pad_token_id": -1}, "pad_token_id=-1 leaves no positions"),
    "another head": (
        "bert",
        {"architectures": ["BertForQuestionAnswering"]},
        r"architectures=\['BertForQuestionAnswering'\] is not.*'BertForTokenClassification'.*"
        r"without a head, set \['BertModel'\]",
    ),
    "another model's head": (
        "distilbert",
        {"architectures": ["BertForSequenceClassification"]},
        r"\['BertForSequenceClassification'\] is not implemented, must be one of \['DistilBertFor",
    ),
    "a head for texts on images": (
        "vit",
        {"architectures": ["ViTForTokenClassification"]},
        r"one of \['ViTForImageClassification', 'ViTForMaskedImageModeling', 'ViTModel'\]",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_encoder_config_unsupported_raises(case: str, tmp_path: pathlib.Path) -> None:
    name, changes, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load.load(configured(tmp_path / "copy", name, **changes))


OLD_CONFIGS: dict[str, dict[str, Any]] = {
    # As in all-MiniLM-L6-v2, bert-base-chinese and a cross encoder.
    "bert": {
        "gradient_checkpointing": True,
        "position_embedding_type": "absolute",
        "directionality": "bidi",
        "pooler_type": "first_token_transform",
        "sentence_transformers": {"version": "4.1.0"},
    },
    "roberta": {"output_past": True, "finetuning_task": "mnli", "pad_token_id": None},
    "distilbert": {"tie_weights_": True, "sinusoidal_pos_embds": True},
    "vit": {"encoder_stride": 16, "qkv_bias": None, "num_channels": None},
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_encoder_config_ignores_other_fields(name: str) -> None:
    config: Any = vit_config if name == "vit" else encoder_config
    old = raw(name) | OLD_CONFIGS[name]
    assert config(old) == config(raw(name))
    assert config({key: old[key] for key in old if key != "architectures"}) == config(raw(name))


def test_load_encoder_decoder_option_raises() -> None:
    with pytest.raises(
        TypeError,
        match=r"Unknown options \['scan_layers'\] of Encoder, which has \['text_layout'\]",
    ):
        load.load(DATA / "bert", scan_layers=True)


# --- files ----------------------------------------------------------------------------------------

PREFIXES = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert.", "vit": "vit."}


def prefix(name: str) -> str:
    return PREFIXES[name.partition("_")[0]]


def with_prefix(name: str, tensors: dict[str, np.ndarray]) -> None:
    """The keys of a base model as those of a model that has a head."""
    for key in list(tensors):
        tensors[prefix(name) + key] = tensors.pop(key)


def without_prefix(name: str, tensors: dict[str, np.ndarray]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix(prefix(name))] = tensors.pop(key)


def old_norms(name: str, tensors: dict[str, np.ndarray]) -> None:
    """Layer norms as in bert-base-uncased."""
    for key in list(tensors):
        old = re.sub("LayerNorm.weight$", "LayerNorm.gamma", key)
        tensors[re.sub("LayerNorm.bias$", "LayerNorm.beta", old)] = tensors.pop(key)


def in_memory(name: str, tensors: dict[str, np.ndarray]) -> None:
    """The keys of `ViTModel.state_dict()` in transformers 5."""
    parts = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "layernorm_before",
        "layernorm_after": "layernorm_after",
    }
    for key in list(tensors):
        found = re.fullmatch(r"(vit\.)?encoder\.layer\.(\d+)\.(.*)\.(weight|bias)", key)
        if found:
            start, number, part, leaf = found.groups(default="")
            tensors[f"{start}layers.{number}.{parts[part]}.{leaf}"] = tensors.pop(key)


def in_dtype(dtype: Any, name: str, tensors: dict[str, np.ndarray]) -> None:
    tensors.update({key: tensor.astype(dtype) for key, tensor in tensors.items()})


SPELLINGS = {
    "as saved": lambda name, tensors: None,
    "prefix": with_prefix,
    "no prefix": without_prefix,
    "old norms": old_norms,
    "old norms, prefix": lambda *args: (with_prefix(*args), old_norms(*args)),
    "in memory": in_memory,
    "in memory, prefix": lambda *args: (with_prefix(*args), in_memory(*args)),
    "in memory, no prefix": lambda *args: (without_prefix(*args), in_memory(*args)),
}
WRITTEN = [
    *((name, spelling) for name in BASES for spelling in ("as saved", "prefix")),
    *((name, spelling) for name in NAMES if "_" in name for spelling in ("as saved", "no prefix")),
    *((name, f"old norms{more}") for name in ("bert", "roberta") for more in ("", ", prefix")),
    *(("vit", spelling) for spelling in ("in memory", "in memory, prefix")),
    *(("vit_image", spelling) for spelling in ("in memory", "in memory, no prefix")),
]
CARRIED = {
    "bert": {
        "embeddings.position_ids": np.arange(17)[None],
        "cls.predictions.bias": np.arange(44, dtype=np.float32),
        "cls.predictions.transform.LayerNorm.gamma": np.ones(20, np.float32),
    },
    "bert_tokens": {"bert.pooler.dense.bias": np.ones(20, np.float32)},
    "roberta": {"lm_head.layer_norm.bias": np.ones(20, np.float16)},
    "roberta_sequence": {
        "roberta.pooler.dense.weight": np.ones((20, 20), np.float32),
        "roberta.embeddings.position_ids": np.arange(17)[None],
    },
    "distilbert": {"vocab_projector.bias": np.ones(44, np.float32)},
    "vit": {"embeddings.mask_token": np.ones((1, 1, 20)), "decoder.0.bias": np.ones(3)},
    "vit_image": {"vit.pooler.dense.bias": np.ones(20, np.float32)},
}


@pytest.mark.parametrize(("name", "spelling"), WRITTEN)
@pytest.mark.thin(4)
def test_save_each_naming_is_bitwise_equal(
    name: str, spelling: str, tmp_path: pathlib.Path
) -> None:
    edit = functools.partial(SPELLINGS[spelling], name)
    source = edited(tmp_path / "source", edit, name)
    _, params = load.load(source)
    assert_same(params, loaded(name, "bfloat16").params)
    save.save(tmp_path / "saved", params, source)
    assert contents(tmp_path / "saved") == contents(source)
    assert_same(load.load(tmp_path / "saved").params, params)


@pytest.mark.parametrize("name", CARRIED)
def test_save_copies_tensors_of_other_heads(name: str, tmp_path: pathlib.Path) -> None:
    source = edited(tmp_path / "source", lambda tensors: tensors.update(CARRIED[name]), name)
    _, params = load.load(source)
    assert_same(params, loaded(name, "bfloat16").params)
    save.save(tmp_path / "saved", params, source)
    assert contents(tmp_path / "saved") == contents(source)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_save_other_dtype_is_bitwise_equal(dtype: Any, tmp_path: pathlib.Path) -> None:
    source = edited(tmp_path / "source", functools.partial(in_dtype, dtype, "bert"))
    _, params = load.load(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    save.save(tmp_path / "saved", params, source)
    assert contents(tmp_path / "saved") == contents(source)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
def test_load_base_model_without_pooler(name: str, tmp_path: pathlib.Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]

    source = edited(tmp_path / "source", drop, name)
    model, params = load.load(source, dtype=jnp.float32)
    assert "pooler" not in params["params"]
    whole, its = loaded(name)
    assert_same(model.apply(params, *inputs(name)), whole.apply(its, *inputs(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(3)
def test_save_writes_each_weight_to_its_name(name: str, tmp_path: pathlib.Path) -> None:
    """A different number added to each weight shows a swapped pair, which a round trip hides."""
    _, params = loaded(name)
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 10 * (number + 1) for number, leaf in enumerate(leaves)]
    save.save(
        tmp_path / "saved", jax.tree.unflatten(structure, moved), DATA / name, dtype=jnp.float32
    )
    before, after = (load_file(f / "model.safetensors") for f in (DATA / name, tmp_path / "saved"))
    shifts = {key: np.unique(np.round(after[key] - np.float32(before[key]))) for key in before}
    assert {len(shift) for shift in shifts.values()} == {1}
    found = sorted(int(shift[0]) for shift in shifts.values())
    assert found == [10 * (number + 1) for number in range(len(leaves))]


def test_save_copies_config_and_tokenizer(tmp_path: pathlib.Path) -> None:
    source = edited(tmp_path / "source", lambda tensors: None)
    (source / "expected.safetensors").unlink()
    folders = {"1_Pooling", "2_Dense", "additional_chat_templates"}
    for folder in folders:
        (source / folder).mkdir()
    copied = {
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt"),
        *("generation_config.json", "chat_template.jinja", "chat_template.json"),
        *(
            "sentencepiece.bpe.model",
            "spiece.model",
            "tokenizer.model.v3",
            "processor_config.json",
            "bpe.codes",
        ),
        *("special_tokens_map.json", "added_tokens.json", "modules.json", "LICENSE"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        "additional_chat_templates/tool_use.jinja",
    }
    others = {"pytorch_model.bin", "tf_model.h5", "pytorch_model.bin.index.json", "README.md"}
    for file in copied | others | {"adapter_config.json", "modeling.py", "training_args.bin"}:
        (source / file).write_text(file)
    save.save(tmp_path / "saved", load.load(source).params, source)
    saved = {p.relative_to(tmp_path / "saved").as_posix() for p in (tmp_path / "saved").rglob("*")}
    assert saved == copied | folders | {"config.json", "model.safetensors"}
    for file in copied | {"config.json"}:
        assert (tmp_path / "saved" / file).read_bytes() == (source / file).read_bytes()
    modes = {file.stat().st_mode for file in (tmp_path / "saved").iterdir() if file.is_file()}
    assert len(modes) == 1  # safetensors alone would keep the weights to their owner.


# --- files that are refused -----------------------------------------------------------------------

QUERY = "encoder.layer.1.attention.self.query.weight"
DOWN = "encoder.layer.0.output.dense.weight"


def transposed(key: str, tensors: dict[str, np.ndarray]) -> None:
    tensors[key] = np.ascontiguousarray(tensors[key].T)


BAD_TENSORS: dict[str, tuple[Edit, str]] = {
    "unknown tensor": (
        lambda tensors: tensors.update({"classifier.weight": np.ones((3, 20), np.float32)}),
        r"config.json describes: classifier.weight is unknown. Use files",
    ),
    "layer past the config's": (
        lambda tensors: tensors.update({"encoder.layer.2.output.dense.bias": tensors[QUERY][0]}),
        r"encoder.layer.2.output.dense.bias is unknown",
    ),
    "missing tensor": (
        lambda tensors: tensors.pop(QUERY),
        rf"describes: {QUERY} is missing. Use",
    ),
    "half a pooler": (
        lambda tensors: tensors.pop("pooler.dense.bias"),
        r"describes: pooler.dense.bias is missing. Use",
    ),
    "wrong shape": (
        lambda tensors: tensors.update({QUERY: tensors[QUERY][:19]}),
        rf"{QUERY} has shape \(19, 20\) instead of \(20, 20\)",
    ),
    "transposed": (
        functools.partial(transposed, DOWN),
        rf"{DOWN} has shape \(28, 20\) instead of \(20, 28\)",
    ),
    "whole numbers": (
        lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.int8)}),
        rf"{QUERY} has dtype I8, none of F16, BF16, F32",
    ),
    "one weight twice": (
        lambda tensors: tensors.update({f"bert.{QUERY}": tensors[QUERY]}),
        rf"describes: bert.{QUERY} is unknown",
    ),
    "another model's head": (
        lambda tensors: tensors.update({"lm_head.bias": np.ones(44, np.float32)}),
        r"lm_head.bias is unknown",
    ),
    "many problems": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "layer.0" in key],
        r"is missing, and 10 more. Use",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_load_other_tensors_raises_with_names(case: str, tmp_path: pathlib.Path) -> None:
    edit, message = BAD_TENSORS[case]
    with pytest.raises(ValueError, match=message):
        load.load(edited(tmp_path / "copy", edit))


def test_load_missing_head_tensor_raises(tmp_path: pathlib.Path) -> None:
    source = edited(
        tmp_path / "copy", lambda tensors: tensors.pop("bert.pooler.dense.weight"), "bert_sequence"
    )
    with pytest.raises(ValueError, match="describes: bert.pooler.dense.weight is missing. Use"):
        load.load(source)


def test_load_patch_kernel_layout_raises(tmp_path: pathlib.Path) -> None:
    key = "embeddings.patch_embeddings.projection.weight"
    source = edited(tmp_path / "copy", functools.partial(transposed, key), "vit")
    with pytest.raises(ValueError, match=r"shape \(3, 4, 3, 20\) instead of \(20, 3, 4, 3\)"):
        load.load(source)


@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 10_000])
def test_load_truncated_file_raises(kept_bytes: int, tmp_path: pathlib.Path) -> None:
    shutil.copytree(DATA / "bert", tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*Copy it again"):
        load.load(tmp_path / "copy")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_save_existing_folder_raises(kind: str, tmp_path: pathlib.Path) -> None:
    destination = tmp_path / "saved"
    if kind == "folder":
        destination.mkdir()
    elif kind == "file":
        destination.write_text("mine")
    else:
        destination.symlink_to(tmp_path / "nowhere")
    before = destination.lstat()
    with pytest.raises(FileExistsError, match=r"saved' exists and is left as it was. Choose"):
        save.save(destination, loaded("bert").params, DATA / "bert")
    assert destination.lstat() == before
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, "bfloat16"), (np.inf, "bfloat16"), (7e4, "float16")],
    ids=["NaN", "Inf", "overflow of the file's dtype"],
)
def test_save_nonfinite_raises_and_writes_nothing(
    value: float, dtype: str, tmp_path: pathlib.Path
) -> None:
    source = edited(tmp_path / "source", functools.partial(in_dtype, jnp.dtype(dtype), "bert"))
    params = load.load(source, dtype=jnp.float32).params
    up = params["params"]["layer_1"]["mlp"]["up"]
    up["bias"] = up["bias"].at[3].set(value)
    message = f"encoder.layer.1.intermediate.dense.bias holds NaN or Inf in {dtype}"
    with pytest.raises(ValueError, match=message):
        save.save(tmp_path / "saved", params, source)
    assert list(tmp_path.iterdir()) == [source]


BAD_PARAMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown": (
        lambda tree: tree["layer_0"].update(adapter=jnp.ones(3)),
        r"layer_0/adapter is unknown",
    ),
    "missing": (
        lambda tree: tree["layer_0"]["mlp"].pop("up"),
        r"layer_0/mlp/up/bias is missing, params/layer_0/mlp/up/kernel is missing",
    ),
    "shape": (
        lambda tree: tree["embeddings"]["word"].update(embedding=jnp.ones((54, 20))),
        r"embeddings/word/embedding has shape \(54, 20\) instead of \(44, 20\)",
    ),
    "transposed": (
        lambda tree: tree["layer_1"]["mlp"]["up"].update(kernel=jnp.ones((28, 20))),
        r"layer_1/mlp/up/kernel has shape \(28, 20\) instead of \(20, 28\)",
    ),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_save_other_params_raises_with_paths(case: str, tmp_path: pathlib.Path) -> None:
    edit, message = BAD_PARAMS[case]
    params = load.load(DATA / "bert").params
    edit(params["params"])
    with pytest.raises(ValueError, match=message):
        save.save(tmp_path / "saved", params, DATA / "bert")
    assert not list(tmp_path.iterdir())


def test_save_params_without_collection_raises(tmp_path: pathlib.Path) -> None:
    params = loaded("bert").params["params"]
    with pytest.raises(ValueError, match=r"embeddings/norm/bias is unknown.*result of `load`"):
        save.save(tmp_path / "saved", params, DATA / "bert")


def test_save_failure_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save.save(tmp_path / "saved", loaded("bert").params, DATA / "bert")
    assert not list(tmp_path.iterdir())
