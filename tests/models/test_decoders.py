"""Decoders against the outputs of transformers for the same checkpoints.

make_decoder_data.py wrote `data/decoders/`: weights that bfloat16 represents exactly, logits in
float32 and bfloat16, and the tokens of greedy generation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import tracemalloc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import jlora
from jlora import _tree, models
from jlora.models import attention, rope
from jlora.models.decoder import Decoder
from jlora.models.generate import SamplingParams, generate, sample_tokens
from jlora.models.hf import load, save
from jlora.models.hf.decoder_configs import decoder_config
from jlora.models.hf.weight_names import eval_param_shapes, map_decoder_weights
from jlora.models.losses import chunked_cross_entropy

DATA = pathlib.Path(__file__).parent / "data" / "decoders"
NAMES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
LAYOUTS = [
    pytest.param(name, scanned, id=f"{name}-{'scanned' if scanned else 'unrolled'}")
    for name in NAMES
    for scanned in (False, True)
    if not (scanned and name == "qwen3_moe_some")  # Its layers differ.
]
KNOWN = ("llama", "gemma2", "qwen3_moe", "phi3")
# All layouts of these four in the default group, and of the others in the slow one.
KNOWN_LAYOUTS = [
    layout
    if layout.values[0] in KNOWN
    else pytest.param(*layout.values, id=layout.id, marks=pytest.mark.slow)
    for layout in LAYOUTS
]
# Twice what one ulp in every weight moves a logit of these by; others are below 2e-5.
SENSITIVE = {"llama": 4e-5, "llama3": 4e-5, "qwen3_moe_some": 1e-4}


def slow(*values: Any) -> Any:
    """Parameters of a case in the slow group."""
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    """Inputs, and the outputs of transformers."""
    return safetensors.numpy.load_file(DATA / name / "expected.safetensors")


@functools.cache
def loaded(name: str, scanned: bool = False, dtype: str = "float32") -> load.LoadedModel:
    return load.load(DATA / name, dtype=dtype, scan_layers=scanned)


@functools.cache
def logits(name: str, scanned: bool = False, dtype: str = "float32") -> np.ndarray:
    """The logits of all tokens except padding."""
    known, (model, params) = expected(name), loaded(name, scanned, dtype)
    out = jax.jit(model.apply)(params, known["input_ids"], known["mask"])
    return np.asarray(out)[known["mask"] > 0]


def shifted(adapter: Any, by: float = 0.1) -> Any:
    """The adapter moved off zero."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x) + np.float32(by)), adapter)


def raw(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "config.json").read_text())


# --- outputs of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scanned"), LAYOUTS)
@pytest.mark.thin(3)
def test_logits_match_transformers(name: str, scanned: bool) -> None:
    theirs = expected(name)["logits"][expected(name)["mask"] > 0]
    # Both round to float32, 1e-7 of logits up to 5, in each of some thirty products.
    np.testing.assert_allclose(logits(name, scanned), theirs, atol=SENSITIVE.get(name, 2e-5))


@pytest.mark.parametrize(("name", "scanned"), KNOWN_LAYOUTS)
@pytest.mark.thin(3)
def test_logits_bfloat16_as_near_as_transformers(name: str, scanned: bool) -> None:
    known = expected(name)
    seen = known["mask"] > 0
    exact, theirs = known["logits"][seen], known["logits_bfloat16"][seen]
    ours = logits(name, scanned, "bfloat16")
    # Their own distance from float32 is what rounding to bfloat16 costs; twice that, because the
    # two round in other places, and with so few logits one error weighs much.
    bound = 2 * np.sqrt(np.mean((theirs - exact) ** 2))
    assert np.sqrt(np.mean((ours - exact) ** 2)) < bound


@pytest.mark.parametrize("name", ["llama", "gemma2", slow("qwen3_moe")])  # Two kinds of attention.
def test_logits_float16_are_near_float32(name: str) -> None:
    # Float16 rounds by 5e-4 of each entry, in some thirty products.
    error = np.abs(logits(name, True, "float16") - logits(name, True)).max()
    assert error < 5e-3 * np.abs(logits(name, True)).max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "scanned"), KNOWN_LAYOUTS)
@pytest.mark.thin(3)
def test_generate_matches_transformers(name: str, scanned: bool, side: str) -> None:
    known, (model, params) = expected(name), loaded(name, scanned)
    ids, mask = known["input_ids"], known["mask"]
    if side == "left":
        ids, mask = (
            np.stack([np.roll(row, -length) for row, length in zip(a, mask.sum(1), strict=True)])
            for a in (ids, mask)
        )
    new = known["tokens"].shape[1]
    written = generate(
        model, params, ids, mask, max_new_tokens=new, sampling=SamplingParams(eos_token_ids=(2,))
    )
    np.testing.assert_array_equal(written.tokens, known["tokens"])
    ended = [list(row).index(2) + 1 if 2 in row else new for row in known["tokens"]]
    np.testing.assert_array_equal(written.lengths, ended)


@pytest.mark.parametrize("name", ["llama", slow("gemma2")])
def test_generate_float16_matches_transformers(name: str) -> None:
    known, (model, params) = expected(name), loaded(name, True, "float16")
    ids, mask, new = known["input_ids"], known["mask"], known["tokens"].shape[1]
    sampling = SamplingParams(eos_token_ids=(2,))
    written = generate(model, params, ids, mask, max_new_tokens=new, sampling=sampling)
    np.testing.assert_array_equal(written.tokens, known["tokens"])


def test_generate_data_has_early_end() -> None:
    assert any(2 in expected(name)["tokens"] for name in NAMES)


# --- configs --------------------------------------------------------------------------------------


def before_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4.57 writes it."""
    old = {
        name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")
    }
    old["torch_dtype"] = config["dtype"]
    parameters = config["rope_parameters"]
    if config["model_type"] == "gemma3_text":
        old["rope_theta"] = parameters["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    else:
        old["rope_theta"] = parameters["rope_theta"]
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    if "partial_rotary_factor" in scaling:
        old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    old["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    if "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    return old


@pytest.mark.parametrize("name", NAMES)
def test_decoder_config_transformers_4_is_same(name: str) -> None:
    assert decoder_config(before_transformers_5(raw(name))) == decoder_config(raw(name))


def test_decoder_config_ignores_generation() -> None:
    spelled = {"top_k": 50, "top_p": 1.0, "temperature": 1.0, "num_beams": 1, "typical_p": 1.0}
    assert decoder_config({**raw("llama"), **spelled}) == decoder_config(raw("llama"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "t5"}, "model_type='t5' is not implemented"),
        ("llama", {"hidden_act": "swishy"}, "activation 'swishy' is not implemented"),
        ("llama", {"rope_parameters": {"rope_type": "3d", "rope_theta": 1.0}}, "rope_type='3d'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"lacks \['factor'\]"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "warp": 2}}, r"lacks \['factor'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.* not implemented"),
        ("llama", {"num_key_value_heads": 2}, "num_attention_heads=3 must be a multiple"),
        ("llama", {"head_dim": None, "hidden_size": 13}, "hidden_size=13 must be a multiple"),
        ("llama", {"hidden_size": 0}, "hidden_size=0 must be a positive integer"),
        ("llama", {"vocab_size": "44"}, "vocab_size='44' must be a positive integer"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types=.* must have 3 entries"),
        (
            "phi3",
            {"rope_parameters": {**raw("phi3")["rope_parameters"], "long_factor": [1.0]}},
            "long_factor must have 2 entries, .* got 1",
        ),
    ],
)
def test_decoder_config_unsupported_raises(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config({**raw(name), **change})


def old(name: str, **changes: Any) -> dict[str, Any]:
    return {**before_transformers_5(raw(name)), **changes}


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]}
# Fields of one setting that differ.
CONFLICTS: dict[str, dict[str, Any]] = {
    "theta": {**raw("llama"), "rope_theta": 10.0},
    "scaling": {**raw("phi3"), "rope_scaling": {"short_factor": [1.0, 1.4]}},
    "type": old("llama", rope_scaling={"type": "linear", "rope_type": "llama3", "factor": 2.0}),
    "partial": {**raw("phi3"), "partial_rotary_factor": 1.0},
    "original": old("phi3", rope_scaling={**LONGROPE, "original_max_position_embeddings": 16}),
    "local theta": {**raw("gemma3"), "rope_local_base_freq": 11.0},
    "experts": {**raw("qwen3_moe"), "num_experts": 3, "num_local_experts": 4},
    "activation": {**raw("gemma2"), "hidden_act": "silu"},
    "first activation": {**raw("gemma"), "hidden_act": "gelu", "hidden_activation": "silu"},
    "default original": {
        **{k: v for k, v in raw("phi3").items() if k != "original_max_position_embeddings"},
        "rope_parameters": {**raw("phi3")["rope_parameters"]},
    },
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_decoder_config_conflict_raises(case: str) -> None:
    with pytest.raises(ValueError, match="two values of one setting. Keep the one"):
        decoder_config(CONFLICTS[case])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2_sliding", {"max_window_layers": 28}),  # As transformers writes it.
        ("qwen2_sliding", {"max_window_layers": 0}),
        ("gemma3", {"sliding_window_pattern": 3}),
        ("smollm3", {"no_rope_layer_interval": 4}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 4}),
    ],
)
def test_decoder_config_list_of_layers_wins(name: str, change: dict[str, Any]) -> None:
    assert decoder_config({**raw(name), **change}) == decoder_config(raw(name))


@pytest.mark.parametrize("use_window", [None, False])
def test_decoder_config_no_window_raises(use_window: bool | None) -> None:
    config = {**raw("qwen2_sliding"), "use_sliding_window": use_window}
    with pytest.raises(ValueError, match="which have no window with use_sliding_window=false"):
        decoder_config(config)


def test_decoder_config_mistral_layer_types() -> None:
    types = ["full_attention", "sliding_attention"]
    mixed = decoder_config({**raw("mistral"), "layer_types": types})
    assert [mixed.layer_kinds[kind].window for kind in mixed.layer_kind_ids] == [None, 4]
    uniform = decoder_config(raw("mistral"))
    assert [uniform.layer_kinds[kind].window for kind in uniform.layer_kind_ids] == [4, 4]
    bare = {name: value for name, value in raw("mistral").items() if name != "sliding_window"}
    assert decoder_config(bare).layer_kinds[0].window == 4096
    with pytest.raises(ValueError, match="sliding_window=None must be a positive integer"):
        decoder_config({**raw("mistral"), "layer_types": types, "sliding_window": None})


WHOLE_HEADS = [name for name in NAMES if name not in ("phi3", "qwen2", "llama3", "llama_linear")]


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_decoder_config_partial_factor_ignored(name: str) -> None:
    nested = raw(name)
    groups = [nested["rope_parameters"]]
    if name == "gemma3":
        groups = [groups[0]["sliding_attention"]]
    for group in groups:
        group["partial_rotary_factor"] = 0.25
    assert decoder_config(nested) == decoder_config(raw(name))
    if name != "gemma3":  # Its full attention has frequencies of another type.
        for config in (raw(name), old(name)):
            changed = {**config, "partial_rotary_factor": 0.5}
            assert decoder_config(changed) == decoder_config(raw(name))


@pytest.mark.parametrize("name", ["qwen2", "llama3", "llama_linear", "gemma3"])
def test_decoder_config_partial_factor_raises(name: str) -> None:
    config = {**raw(name), "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor=0.5 is not .* rotates whole heads"):
        decoder_config(config)
    assert decoder_config({**config, "partial_rotary_factor": 1.0}) == decoder_config(raw(name))


def test_phi3_original_length_has_default() -> None:
    config = old("phi3", rope_scaling=LONGROPE, max_position_embeddings=8192)
    del config["original_max_position_embeddings"]
    assert decoder_config(config).layer_kinds[0].rope.switch_length == 4096


BAD_NUMBERS = [float("nan"), float("inf"), -1.0, 1e308, "4", [4], True]
NUMBERS = [
    *(("llama_linear", f"rope_parameters.{field}") for field in ("rope_theta", "factor")),
    *(
        ("llama3", f"rope_parameters.{field}")
        for field in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    ),
    *(
        ("qwen2", f"rope_parameters.{field}")
        for field in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    ),
    *(("phi3", f"rope_parameters.{field}") for field in ("partial_rotary_factor", "long_factor")),
    *(
        ("gemma2", field)
        for field in (
            *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
            *("rms_norm_eps", "sliding_window", "num_hidden_layers", "head_dim", "vocab_size"),
        )
    ),
    ("qwen2_sliding", "max_window_layers"),
    ("qwen3_moe", "num_experts_per_tok"),
    ("qwen3_moe", "mlp_only_layers"),
    ("gemma3", "sliding_window_pattern"),
    ("smollm3", "no_rope_layers"),
]


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_decoder_config_bad_number_raises(name: str, field: str) -> None:
    group, _, key = field.rpartition(".")
    for value in BAD_NUMBERS:
        config = raw(name)
        (config[group] if group else config)[key] = value
        with pytest.raises(ValueError, match=rf"config.json: .*{key}"):
            decoder_config(config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most"),
        ("llama", {"head_dim": 5}, "an even number"),
        ("llama", {"rope_parameters": {"rope_theta": 1e-30}}, "which float32 cannot rotate by"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters=.* must be an object"),
        ("gemma2", {"final_logit_softcapping": 2e38}, "softcapping=2e.38 must be at most 1e.06"),
        (
            "qwen2",
            {"rope_parameters": {**raw("qwen2")["rope_parameters"], "attention_factor": 1e30}},
            "attention_factor=1e[+]30, which must be between",
        ),
        ("gemma3", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters.full_att.* missing"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be at most 4"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "must be indices of the 2 layers"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0 must be a positive"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "must have 3 entries"),
        (
            "llama3",
            {"rope_parameters": {**raw("llama3")["rope_parameters"], "low_freq_factor": 4.0}},
            "high_freq_factor=4.0 must be above",
        ),
    ],
)
def test_decoder_config_out_of_range_raises(
    name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config({**raw(name), **change})


def test_longrope_past_switch_uses_long_factors() -> None:
    made = rope.rope_from_config(
        {
            "rope_theta": 100.0,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0],
            "long_factor": [2.0, 5.0],
            "original_max_position_embeddings": 8,
        },
        head_dim=4,
        max_position_embeddings=16,
    )
    base = 100.0 ** (-np.array([0, 2]) / 4)
    amplitude = np.sqrt(1 + np.log(2) / np.log(8))  # arXiv:2402.13753, as transformers has it
    for length, factors in ((8, [1, 1]), (9, [2, 5])):
        positions = np.arange(length)[None]
        cos, sin = made.cos_sin(jnp.asarray(positions), jnp.full((1, length), length))
        angles = positions[..., None] * base / factors
        # Angles up to 9 in float32.
        np.testing.assert_allclose(cos, amplitude * np.cos(angles), atol=2e-6)
        np.testing.assert_allclose(sin, amplitude * np.sin(angles), atol=2e-6)


def test_cache_is_recomputed_at_the_switch_alone() -> None:
    model, params = loaded("phi3")  # Other frequencies past 8 tokens.
    step = jax.jit(model.apply)
    ids = np.random.default_rng(3).integers(3, 44, (1, 11))
    slots = np.arange(11)[None]
    cache = models.init_cache(model, 1, 12)
    cache = step(params, ids[:, :7], None, slots[:, :7], cache)[1]
    for length in range(7, 11):
        new = slice(length, length + 1)
        # Stays in the first slot unless the keys are computed anew.
        marked = jax.tree.map(lambda keys: keys.at[:, :, 0].add(1), cache.keys)
        known = cache._replace(keys=marked)
        keys = step(params, ids[:, new], None, slots[:, new], known)[1].keys
        pairs = zip(jax.tree.leaves(keys), jax.tree.leaves(marked), strict=True)
        is_kept = all(np.array_equal(one[:, :, 0], other[:, :, 0]) for one, other in pairs)
        assert is_kept == (length != 8), length
        cache = step(params, ids[:, new], None, slots[:, new], cache)[1]


# --- attention ------------------------------------------------------------------------------------


# Of these, phi3 turns with other frequencies past 8 tokens of one text.
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "phi3", *map(slow, ("qwen3_moe", "gemma3", "smollm3"))]
)
def test_decoder_packed_texts_are_separate(name: str) -> None:
    model, params = loaded(name)
    apply = jax.jit(model.apply)
    rng = np.random.default_rng(1)
    (first, other), second = rng.integers(3, 44, (2, 1, 10)), rng.integers(3, 44, (1, 6))
    segments = jnp.array([[1] * 10 + [2] * 6])
    packed = apply(params, np.concatenate([first, second], axis=1), segments)
    changed = apply(params, np.concatenate([other, second], axis=1), segments)
    np.testing.assert_array_equal(packed[:, 10:], changed[:, 10:])
    assert np.abs(packed[:, :10] - changed[:, :10]).max() > 0.1
    # Alone, with positions of its own; sums in another order, so rounding differs.
    alone = apply(params, second)
    np.testing.assert_allclose(packed[:, 10:], alone, atol=2e-5)


# Other frequencies past 8 tokens of a text (phi3), and windows of 5 and 4 tokens.
@pytest.mark.parametrize("name", ["phi3", "mistral"])
def test_decoder_row_is_same_among_longer(name: str) -> None:
    model, params = loaded(name)
    apply = jax.jit(model.apply)
    rng = np.random.default_rng(2)
    short, long = rng.integers(3, 44, (1, 4)), rng.integers(3, 44, (1, 12))
    alone = apply(params, short)
    for start in (0, 8):  # Padding on the right, and on the left.
        ids = np.full((2, 12), 99)  # Padding may be any id.
        mask = np.zeros((2, 12), np.int32)
        ids[0, start : start + 4], mask[0, start : start + 4] = short, 1
        ids[1], mask[1] = long, 1
        among = apply(params, ids, mask)
        # Sums in another order; logits are below 10.
        np.testing.assert_allclose(among[:1, start : start + 4], alone, atol=2e-5)
        np.testing.assert_allclose(among[1:], apply(params, long), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "scanned"), [slow("phi3", False), ("phi3", True), ("mistral", True)]
)
def test_decoder_steps_match_no_cache(name: str, scanned: bool) -> None:
    """Texts of 3 and 6 tokens, padded on the right, grow to 9 and 12 tokens in a cache."""
    model, params = loaded(name, scanned)
    apply = jax.jit(model.apply)
    texts = np.random.default_rng(3).integers(3, 44, (2, 12))
    starts = np.array([[3], [6]])
    mask = np.arange(6) < starts
    ids = np.where(mask, texts[:, :6], 99)
    cache = models.init_cache(model, 2, 12)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    _, cache = apply(params, ids, mask.astype(np.int32), positions, cache)
    stepped = []
    for step in range(6):
        new = np.take_along_axis(texts, starts + step, axis=1)
        out, cache = apply(params, new, np.ones((2, 1), np.int32), starts + step, cache)
        stepped.append(out[:, 0])
    lengths = np.concatenate([starts + step + 1 for step in range(6)])  # (12, 1)
    seen = (np.arange(12) < lengths).astype(np.int32)
    whole = np.asarray(apply(params, np.tile(texts, (6, 1)), seen))
    # Sums in another order; logits are below 10.
    np.testing.assert_allclose(
        np.concatenate(stepped), whole[np.arange(12), lengths[:, 0] - 1], atol=4e-5
    )


# --- the model as a function ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", slow("gemma2")])  # The second: tied, with a soft cap.
@pytest.mark.slow
def test_losses_chunked_match_logits(name: str) -> None:
    model, params = loaded(name)
    known = expected(name)
    ids, mask = jnp.asarray(known["input_ids"]), jnp.asarray(known["mask"])
    targets = jnp.roll(ids, -1, axis=1)

    def whole(params: Any) -> Any:
        out = model.apply(params, ids, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(out, targets)
        return (losses * mask).sum(), losses

    def parts(params: Any) -> Any:
        # 44 tokens in 5 parts: the last one is shorter.
        losses = model.apply(params, ids, targets, mask, chunks=5, method="losses")
        return (losses * mask).sum(), losses

    gradient, losses = jax.jit(jax.grad(whole, has_aux=True))(params)
    compiled = jax.jit(jax.grad(parts, has_aux=True)).lower(params).compile()
    ours, our_losses = compiled(params)
    seen = np.asarray(mask) > 0
    np.testing.assert_allclose(our_losses[seen], losses[seen], atol=1e-5)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        scale = float(jnp.abs(two).max())
        np.testing.assert_allclose(one, two, atol=1e-5 * (1 + scale))
    assert "[2,9,44]" not in compiled.as_text()
    assert "[18,44]" not in compiled.as_text()


@pytest.mark.parametrize("name", [slow("llama"), "gemma2"])  # The second has a soft cap.
@pytest.mark.slow
def test_losses_frozen_head_gradient_matches(name: str) -> None:
    model, params = loaded(name)
    ids = jnp.asarray(expected(name)["input_ids"])
    frozen, trained = dict(params["params"]), {"layers_0": params["params"]["layers_0"]}
    frozen.pop("layers_0")

    def loss(trained: Any) -> jax.Array:
        every = {"params": {**frozen, **trained}}
        losses = model.apply(every, ids, jnp.roll(ids, -1, 1), chunks=3, method="losses")
        # Each token's loss with a factor of its own.
        return (losses * jnp.arange(1.0, 1 + losses.size).reshape(losses.shape)).mean()  # type: ignore

    found = jax.jit(jax.grad(loss))(trained)["layers_0"]
    head = {key: params["params"][key] for key in ("embed", "head") if key in params["params"]}
    wanted = jax.jit(jax.grad(loss))({**trained, **head})["layers_0"]
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.abs(two).max())
        np.testing.assert_allclose(one, two, atol=1e-5 * (1 + scale))
    # Each part's logits are made once.
    products = [
        line
        for line in str(jax.make_jaxpr(jax.grad(loss))(trained)).splitlines()
        if "dot_general[" in line and ",44]" in line
    ]
    assert len(products) == 1, products


def test_cross_entropy_residuals_keep_dtype() -> None:
    hidden = jnp.ones((2, 9, 16), jnp.bfloat16)
    head, targets = jnp.ones((16, 44), jnp.bfloat16), jnp.zeros((2, 9), jnp.int32)
    _, pull_back = jax.vjp(lambda x: chunked_cross_entropy(x, head, targets, chunks=3), hidden)
    kept = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull_back)}
    assert ((2, 9, 16), "bfloat16") in kept
    assert not {kind for shape, kind in kept if len(shape) == 3 and shape[-1] > 1} - {"bfloat16"}


@pytest.mark.parametrize("wanted", [None, 0, (0, 1)], ids=["losses", "frozen head", "trained head"])
def test_cross_entropy_chunks_bound_memory(wanted: Any) -> None:
    width, vocabulary = 16, 4096
    shapes = [
        jax.ShapeDtypeStruct((2, 250, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((2, 250), jnp.int32),
    ]

    def held(chunks: int) -> int:
        loss = lambda x, w, targets: chunked_cross_entropy(x, w, targets, chunks=chunks).sum()
        made = loss if wanted is None else jax.grad(loss, wanted)
        return jax.jit(made).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 2 * 250 * vocabulary
    assert held(1) > logits  # One sees them where they are.
    # Those of a sixteenth, their gradient, and a head's gradient and its copy.
    assert held(16) < 2 * logits / 16 + 4 * width * vocabulary * 4


@pytest.mark.parametrize(("name", "path"), [("llama", "head"), slow("gemma2", "embed/embedding")])
def test_losses_adapted_head_stays_factored(name: str, path: str) -> None:
    model, params = loaded(name)
    ids = jnp.asarray(expected(name)["input_ids"])

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        targets = jnp.roll(ids, -1, 1)
        return model.apply(params, ids, targets, chunks=3, method="losses").mean()  # type: ignore

    lora = jlora.lora_transform(loss, {path: jlora.LoRA(rank=2, alpha=4)})
    (row,) = [row for row in lora.explain(params, ids).rows if row.trainable_params]
    assert not row.dense_reasons
    adapter = shifted(lora.init(jax.random.key(0), params, ids), 0.05)
    text = str(jax.make_jaxpr(jax.grad(lambda a: lora.apply(params, a, ids)))(adapter))
    for shape in ("12,44", "44,12"):
        assert f":f32[{shape}] = dot_general" not in text
    merged = lambda a: loss(lora.merge(params, a), ids)
    found, wanted = (
        jax.jit(jax.value_and_grad(one))(adapter)
        for one in (lambda a: lora.apply(params, a, ids), merged)
    )
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * (1 + float(jnp.abs(two).max())))


def test_losses_invalid_target_is_nan() -> None:
    model, params = loaded("llama")
    ids = jnp.array([[3, 4, 5]])
    run = jax.jit(lambda ids, targets: model.apply(params, ids, targets, method="losses"))
    losses = run(ids, jnp.array([[4, 44, -1]]))
    np.testing.assert_array_equal(np.isnan(losses), [[False, True, True]])


@functools.cache
def gradient(policy: str, scanned: bool) -> tuple[list[np.ndarray], int]:
    """The gradient with a remat policy, and the number of products in its program."""
    model, params = loaded("gemma3", scanned)
    ids = expected("gemma3")["input_ids"]
    model = dataclasses.replace(model, remat_policy=policy)
    traced = jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, ids)).sum())).trace(params)
    found = traced.lower().compile()(params)
    return [np.asarray(x) for x in jax.tree.leaves(found)], str(traced.jaxpr).count("dot_general[")


@pytest.mark.parametrize("policy", ["save_projections", "full"])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.slow
def test_remat_policy_keeps_gradient(policy: str, scanned: bool) -> None:
    for one, two in zip(gradient("none", scanned)[0], gradient(policy, scanned)[0], strict=True):
        # The compiler fuses the two programs in other ways.
        np.testing.assert_allclose(one, two, atol=1e-5 * (1 + float(np.abs(one).max())))
    # Values that are not stored are multiplied again: with "save_projections" those of attention.
    counts = [gradient(name, scanned)[1] for name in ("none", "save_projections", "full")]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_scan_layers_residuals_keep_dtype(name: str) -> None:
    model, params = loaded(name, True, "bfloat16")
    ids = expected(name)["input_ids"]
    hidden = lambda layers: model.apply(
        {"params": {**params["params"], "layers": layers}}, ids, method="hidden_states"
    )
    layers = params["params"]["layers"]
    pull_back = jax.eval_shape(lambda layers: jax.vjp(hidden, layers)[1], layers)
    activations = [
        (leaf.shape, leaf.dtype.name)
        for leaf in jax.tree.leaves(pull_back)
        # Of every layer, for every token, a row as wide as the model or its feed-forward.
        if leaf.shape[1:3] == ids.shape and leaf.ndim == 4
    ]
    assert activations
    assert {kind for _, kind in activations} == {"bfloat16"}


def test_load_invalid_options_raise() -> None:
    ids = jnp.ones((1, 3), jnp.int32)
    model, params = loaded("llama")
    with pytest.raises(ValueError, match="remat_policy='some'"):
        dataclasses.replace(model, remat_policy="some").init(jax.random.key(0), ids)
    with pytest.raises(ValueError, match="dtype=int8 must be one of fl"):
        load.load(DATA / "llama", dtype="int8")
    with pytest.raises(ValueError, match="some layers are mixtures"):
        load.load(DATA / "qwen3_moe_some", scan_layers=True)
    with pytest.raises(ValueError, match="A cache needs positions"):
        model.apply(params, ids, cache=models.init_cache(model, 1, 4))


@pytest.mark.parametrize("scanned", [False, True])
def test_decoder_invalid_id_or_slot_is_nan(scanned: bool) -> None:
    model, params = loaded("llama", scanned)
    apply = jax.jit(model.apply)
    for token in (44, -1, -100):
        out = apply(params, jnp.array([[3, token, 5], [6, 7, 8]]))
        np.testing.assert_array_equal(jnp.isnan(out).all(axis=2), [[1, 1, 1], [0, 0, 0]])
    cache = models.init_cache(model, 1, 4)
    ids = jnp.array([[3, 4, 5]])
    first, cache = apply(params, ids, None, jnp.arange(3)[None], cache)
    second, _ = apply(params, ids[:, :1], None, jnp.array([[3]]), cache)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    third, _ = apply(params, ids[:, :2], None, jnp.array([[3, 4]]), cache)
    assert np.isnan(third).all()


def test_decoder_mismatched_shapes_raise() -> None:
    model, params = loaded("llama")
    ids = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(
        ValueError, match=r"input_ids must have shape \(batch, length\), got \(3,\)"
    ):
        model.apply(params, ids[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), input_ids \(2, 3\)"):
        model.apply(params, ids, ids[:1])
    with pytest.raises(ValueError, match=r"positions has shape \(3,\)"):
        model.apply(params, ids, None, ids[0])
    with pytest.raises(ValueError, match="3 tokens do not fit into a cache of capacity 2"):
        model.apply(params, ids, None, ids, models.init_cache(model, 2, 2))
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="key_segment_ids without query_segment_ids"):
        attention.attend(x, x, x, scale=1.0, key_segment_ids=jnp.ones((1, 4), jnp.int32))


@pytest.mark.parametrize("scanned", [False, True])
def test_decoder_axes_have_logical_names(scanned: bool) -> None:
    for name in NAMES:
        if scanned and name == "qwen3_moe_some":
            continue
        model = Decoder(decoder_config(raw(name)), scan_layers=scanned)
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
        specs = jax.tree.leaves(
            nn.get_partition_spec(variables), is_leaf=lambda s: isinstance(s, tuple)
        )
        flat = _tree.flatten_with_paths(nn.unbox(variables))
        assert len(specs) == len(flat.leaves)
        for path, leaf, spec in zip(flat.paths, flat.leaves, specs, strict=True):
            if path.endswith("bias"):
                continue
            assert len(spec) == len(leaf.shape), (name, path)
            assert None not in spec, (name, path)


@pytest.mark.parametrize(
    ("name", "scanned"),
    [
        *(slow("llama", False), ("llama", True), ("gemma2", False), slow("gemma2", True)),
        *(slow("qwen3_moe", False), ("qwen3_moe", True)),
    ],
)
@pytest.mark.thin(2)
def test_lora_decoder_stays_factored(name: str, scanned: bool) -> None:
    model, params = loaded(name, scanned)
    ids, mask = expected(name)["input_ids"], expected(name)["mask"]
    rules = {r"(q|k|v|o|gate|up|down|gate_up|router)(/kernel)?$": jlora.LoRA(rank=2, alpha=4)}
    lora = jlora.lora_transform(model.apply, rules)
    adapter = lora.init(jax.random.key(0), params, ids, mask)
    adapter = shifted(adapter)
    explained = lora.explain(params, ids, mask)
    assert not any(row.dense_reasons for row in explained.rows if row.adapter != "frozen")
    out = jax.jit(lora.apply)(params, adapter, ids, mask)
    merge_and_apply = lambda p, a, *inputs: model.apply(lora.merge(p, a), *inputs)
    merged = jax.jit(merge_and_apply)(params, adapter, ids, mask)
    seen = np.asarray(mask) > 0
    np.testing.assert_allclose(out[seen], merged[seen], atol=1e-4)  # Logits up to 20.
    assert np.abs(np.asarray(out)[seen] - logits(name, scanned)).max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "phi3"])  # The second computes its cache again.
@pytest.mark.slow
def test_generate_adapted_matches_merged(name: str) -> None:
    model, params = loaded(name, True)
    lora = jlora.lora_transform(model.apply, jlora.LoRA(rank=2, alpha=4))
    ids = expected(name)["input_ids"][:1, :6]
    adapter = lora.init(jax.random.key(0), params, ids)
    adapter = shifted(adapter)
    adapted = lambda p, *args: lora.apply(p[0], p[1], *args)
    ours = generate(model, (params, adapter), ids, max_new_tokens=5, apply=adapted)
    merged = generate(model, jax.jit(lora.merge)(params, adapter), ids, max_new_tokens=5)
    base = generate(model, params, ids, max_new_tokens=5)
    np.testing.assert_array_equal(ours.tokens, merged.tokens)
    assert (np.asarray(ours.tokens) != base.tokens).any()


@pytest.mark.slow
def test_generate_slots_past_switch_match_alone() -> None:
    """Rows with adapters of their own, whose texts outgrow the first rotary frequencies."""
    model, params = loaded("phi3", True)
    lora = jlora.lora_transform(model.apply, jlora.LoRA(rank=2, alpha=4))
    known = expected("phi3")
    ids, mask = known["input_ids"][:, :6], np.array([[1] * 6, [1] * 4 + [0] * 2])
    fresh = lora.init(jax.random.key(0), params, ids)
    adapters = [shifted(fresh), shifted(fresh, -0.2)]
    bank = jlora.multi_lora.AdapterBank(lora, params, fresh, slots=3, dtype=jnp.float32)
    for name, adapter in zip("ab", adapters, strict=True):
        bank.add(name, adapter)
    slots, index = bank.slots_for(["a", "b"])
    axes = jlora.multi_lora.infer_batch_axes(lambda rows: models.init_cache(model, rows, 6 + 7))

    def apply_slots(given: Any, *args: Any) -> Any:
        return jlora.multi_lora.apply_per_example(
            lora, given[0], given[1], given[2], *args, batch_axes=(0, 0, 0, axes)
        )

    given = (params, slots, index)
    ours = generate(model, given, ids, mask, max_new_tokens=7, apply=apply_slots).tokens
    apply = lambda p, *args: lora.apply(p[0], p[1], *args)
    for row, adapter in enumerate(adapters):
        text = ids[row : row + 1, : mask[row].sum()]
        alone = generate(model, (params, adapter), text, max_new_tokens=7, apply=apply)
        np.testing.assert_array_equal(ours[row], alone.tokens[0])


# --- generation -----------------------------------------------------------------------------------


def test_sample_tokens_follows_probabilities() -> None:
    chances = np.array([0.5, 0.25, 0.15, 0.1])
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(**options: Any) -> np.ndarray:
        sampling = SamplingParams(**options)
        draw = jax.vmap(
            lambda key: sample_tokens(jnp.log(jnp.asarray(chances))[None], key, sampling)[0]
        )
        return np.bincount(draw(keys), minlength=4) / 4000

    def near(found: np.ndarray, want: Any) -> None:
        want = np.array(want) / np.sum(want)
        # Four standard deviations of a share of 4000 draws.
        np.testing.assert_array_less(
            abs(found - want), 4 * np.sqrt(want * (1 - want) / 4000) + 1e-9
        )

    near(shares(temperature=1.0), chances)
    near(shares(temperature=0.5), chances**2)
    near(shares(temperature=1.0, top_k=2), [0.5, 0.25, 0, 0])
    near(shares(temperature=1.0, top_p=0.7), [0.5, 0.25, 0, 0])  # 0.5 alone is less than 0.7.
    near(shares(temperature=1.0, top_p=0.76), [0.5, 0.25, 0.15, 0])
    near(shares(temperature=1.0, top_p=0.01), [1, 0, 0, 0])
    near(shares(), [1, 0, 0, 0])


def test_generate_padding_may_be_any_id() -> None:
    model, params = loaded("llama")
    known = expected("llama")
    ids = np.where(known["mask"], known["input_ids"], 99)
    tokens = generate(model, params, ids, known["mask"], max_new_tokens=3).tokens
    np.testing.assert_array_equal(tokens[:, :1], known["tokens"][:, :1])


@pytest.mark.parametrize("value", [-1, [2, "3"], True, "2"])
def test_eos_token_ids_invalid_raise(value: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert models.eos_token_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id="):
        models.eos_token_ids(tmp_path)


def test_generate_second_prompt_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, params = loaded("llama")
    ids = expected("llama")["input_ids"]
    generate(model, params, ids, max_new_tokens=3)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        generate(dataclasses.replace(model), params, ids[::-1], max_new_tokens=3)
    assert "_generate" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 60}, "exceed the model's max_seq_length=64"),
        ({"input_ids": np.zeros((2, 0), int)}, "with at least one token"),
        ({"attention_mask": np.array([[1, 1, 0], [0, 0, 0]])}, r"prompts \[1\] have no tokens"),
        ({"attention_mask": np.ones((2, 4))}, r"attention_mask has shape \(2, 4\)"),
        ({"sampling": SamplingParams(temperature=1.0)}, "needs a random key"),
        (
            {"input_ids": np.array([[3, 4], [5, 44]])},
            r"input_ids\[1, 1\]=44 is outside",
        ),
        ({"input_ids": np.array([[3, -1]])}, r"input_ids\[0, 1\]=-1 is outside"),
        ({"input_ids": np.array([[3, 2**32 + 3]])}, r"input_ids\[0, 1\]=4294967299 is outside"),
        ({"input_ids": np.array([[3.0]])}, "input_ids must be integers, got float64"),
    ],
)
def test_generate_invalid_arguments_raise(change: dict[str, Any], message: str) -> None:
    model, params = loaded("llama")
    given = {"input_ids": np.full((2, 5), 3), "max_new_tokens": 2, **change}
    if "attention_mask" in change:
        given["input_ids"] = np.full((2, 3), 3)
    with pytest.raises(ValueError, match=message):
        generate(model, params, **given)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"eos_token_ids": (2, -1)},
        {"pad_token_id": 0.5},
    ],
)
def test_sampling_params_invalid_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams.{next(iter(options))}="):
        SamplingParams(**options)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scanned"),
    [b if b.values[1] else a for a, b in zip(LAYOUTS, KNOWN_LAYOUTS, strict=True)],
)
@pytest.mark.thin(3)
def test_save_loaded_is_bitwise_equal(name: str, scanned: bool, tmp_path: pathlib.Path) -> None:
    _, params = load.load(DATA / name, scan_layers=scanned)
    written = tmp_path / "written"
    save.save(written, params, DATA / name, scan_layers=scanned, max_shard_size=3000)
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    ours: dict[str, np.ndarray] = {}
    for file in sorted(written.glob("*.safetensors")):
        ours |= safetensors.numpy.load_file(file)
    theirs = safetensors.numpy.load_file(DATA / name / "model.safetensors")
    assert set(ours) == set(theirs) == set(index["weight_map"])
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        np.testing.assert_array_equal(ours[key].view(np.uint16), tensor.view(np.uint16), key)
    assert (written / "config.json").read_text() == (DATA / name / "config.json").read_text()
    again = load.load(written, scan_layers=scanned).params
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_save_dtype_updates_config(tmp_path: pathlib.Path) -> None:
    _, params = loaded("llama")
    save.save(tmp_path / "wide", params, DATA / "llama", dtype=jnp.float32)
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert written == {**raw("llama"), "dtype": "float32"}
    tensors = safetensors.numpy.load_file(tmp_path / "wide" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    _, again = load.load(tmp_path / "wide")
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)


def changed(tmp_path: pathlib.Path, change: Any, name: str = "llama") -> pathlib.Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    folder = tmp_path / "changed"
    shutil.copytree(DATA / name, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_load_other_tensors_raises_with_names(tmp_path: pathlib.Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(12, np.float32)
        gate = "model.layers.1.mlp.gate_proj.weight"
        tensors[gate] = np.ascontiguousarray(tensors[gate].T)
        tensors["lm_head.weight"] = np.ones((44, 12), np.int32)

    with pytest.raises(ValueError, match="not the checkpoint") as caught:
        load.load(changed(tmp_path, change))
    for part in (
        "model.norm.weight is missing",
        "model.layers.0.self_attn.q_proj.bias is unknown",
        "model.layers.1.mlp.gate_proj.weight has shape (12, 18) instead of (18, 12)",
        "lm_head.weight has dtype I32",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field"), [("llama", "num_hidden_layers"), ("qwen3_moe", "num_local_experts")]
)
def test_load_fewer_layers_raises_at_once(name: str, field: str, tmp_path: pathlib.Path) -> None:
    shutil.copytree(DATA / name, tmp_path / "copy")
    # Of so many a model would not be built in this test's time.
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**raw(name), field: 1_000_000}))
    message = f"config.json: {field}=1000000, but the files .* only"
    with pytest.raises(ValueError, match=message):
        load.load(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**raw(name), field: 9_000}))
    with pytest.raises(ValueError, match=message.replace("1000000", "9000")):
        models.model_from_config(tmp_path / "copy")


def test_load_base_model_names(tmp_path: pathlib.Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    folder = changed(tmp_path, change, "gemma")
    model, params = load.load(folder, dtype=jnp.float32)
    known = expected("gemma")
    out = jax.jit(model.apply)(params, known["input_ids"], known["mask"])
    np.testing.assert_array_equal(np.asarray(out)[known["mask"] > 0], logits("gemma"))
    save.save(tmp_path / "written", params, folder)
    keys = safetensors.numpy.load_file(tmp_path / "written" / "model.safetensors")
    assert "norm.weight" in keys
    assert "layers.0.self_attn.rotary_emb.inv_freq" in keys


def test_save_tied_head_copies_embedding(tmp_path: pathlib.Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder = changed(tmp_path, change, "gemma")
    _, params = load.load(folder)
    moved = jax.tree.map(lambda x: x * 2, params)
    save.save(tmp_path / "written", moved, folder)
    written = safetensors.numpy.load_file(tmp_path / "written" / "model.safetensors")
    table = np.asarray(moved["params"]["embed"]["embedding"])
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(written[key], table)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has neither"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
        (
            lambda f: (f / "config.json").write_text("[1]"),
            ValueError,
            "must contain a JSON object, got list",
        ),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (
            lambda f: (f / "config.json").write_text("[" * 100_000),
            ValueError,
            "is not JSON",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            FileNotFoundError,
            "pytorch_model.bin are not opened",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-1]
            ),
            ValueError,
            "is damaged",
        ),
    ],
)
def test_load_damaged_folder_raises(
    spoil: Any, error: Any, message: str, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(DATA / "llama", folder)
    spoil(folder)
    with pytest.raises(error, match=message):
        load.load(folder)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../model.safetensors"}, "weight_map must map"),
        ({"a": 3}, "weight_map must map"),
        ("none", "weight_map must map"),
        ({"a": "one.safetensors"}, r"disagree about"),
    ],
)
def test_load_wrong_index_raises(places: Any, message: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(DATA / "llama", folder)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load.load(folder)


def test_save_is_atomic_and_never_replaces(tmp_path: pathlib.Path) -> None:
    model, params = loaded("llama")
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="left as it was"):
        save.save(there, params, DATA / "llama")
    assert (there / "mine").read_text() == "kept"
    broken = jax.tree.map(lambda x: x, params)
    broken["params"]["norm"]["scale"] = broken["params"]["norm"]["scale"].at[3].set(jnp.inf)
    with pytest.raises(ValueError, match=r"model.norm.weight holds NaN or Inf"):
        save.save(tmp_path / "new", broken, DATA / "llama")
    huge = jax.tree.map(lambda x: x * 1e6, params)
    with pytest.raises(ValueError, match="holds NaN or Inf in float16"):
        save.save(tmp_path / "new", huge, DATA / "llama", dtype=jnp.float16)
    with pytest.raises(ValueError, match="dtype=int8 must be one of float16, bfloat16, float32"):
        save.save(tmp_path / "new", params, DATA / "llama", dtype=jnp.int8)
    del broken["params"]["norm"]
    broken["params"]["extra"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"params/extra is unknown, params/norm/scale is missing"):
        save.save(tmp_path / "new", broken, DATA / "llama")
    with pytest.raises(ValueError, match="options that it was loaded with"):
        save.save(tmp_path / "new", params, DATA / "llama", scan_layers=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    del model


@pytest.mark.parametrize(
    ("name", "scanned"),
    [
        *(slow("llama", False), ("llama", True), slow("gemma2", False), slow("gemma2", True)),
        *(("qwen3_moe", False), slow("qwen3_moe", True)),
    ],
)
def test_load_sharding_places_weights(name: str, scanned: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        axes = [None] * len(leaf.shape)
        if path.endswith(("kernel", "head", "embedding", "gate_up", "moe/down")):
            axes[-2:] = ["data", "model"]  # 12 and 18 by 4 and 2
            if leaf.shape[-2] % 4:
                axes[-2] = None
        return jax.sharding.NamedSharding(mesh, spec(*axes))

    model, params = load.load(DATA / name, dtype=jnp.float32, sharding=place, scan_layers=scanned)
    _, plain = loaded(name, scanned)
    for path, one in zip(eval_param_shapes(model), jax.tree.leaves(params), strict=True):
        assert one.sharding.is_equivalent_to(place(path, one).with_memory_kind(None), one.ndim)
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, two)
    known = expected(name)
    out = np.asarray(jax.jit(model.apply)(params, known["input_ids"], known["mask"]))
    np.testing.assert_allclose(out[known["mask"] > 0], logits(name, scanned), atol=1e-5)


def test_load_host_memory_is_one_tensor(tmp_path: pathlib.Path) -> None:
    config = {**raw("llama"), "hidden_size": 256, "intermediate_size": 1024}
    config |= {"num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 64}
    folder = tmp_path / "larger"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = Decoder(decoder_config(config), scan_layers=True)
    sizes = eval_param_shapes(model)
    tensors = {}
    for weight in map_decoder_weights(model).values():
        for piece in weight.slices:
            tensors[piece.key] = np.zeros(piece.tensor_shape, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    largest = max(tensor.nbytes for tensor in tensors.values())
    total = sum(leaf.size * 4 for leaf in sizes.values())
    assert total > 20 * largest
    del tensors
    load.load(folder, scan_layers=True)  # Compiles what puts tensors into their stacks.
    # On a CPU the devices' arrays are the host's too, but NumPy did not make them: the tracer
    # counts what passes through the host.
    tracemalloc.start()
    params = load.load(folder, scan_layers=True).params
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    jax.block_until_ready(params)
    assert peak < 2.2 * largest + 2**20, (peak, largest)
