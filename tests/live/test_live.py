"""Checkpoints and adapters that jlora saves, loaded by transformers and PEFT.

These run where torch, transformers 5 and peft are installed: `make test-live`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
hf_peft = pytest.importorskip("peft")

import jlora  # noqa: E402
from jlora import models, peft  # noqa: E402
from jlora.models.hf.config_reader import ConfigReader  # noqa: E402
from jlora.models.hf.decoder_configs import DECODER_PARSERS, decoder_config  # noqa: E402
from jlora.models.hf.encoder_configs import encoder_config, vit_config  # noqa: E402
from jlora.peft.config import read_peft_config  # noqa: E402
from jlora.peft.methods import PEFT_METHODS  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

DECODERS = pathlib.Path(__file__).parent.parent / "models" / "data" / "decoders"
NAMES = sorted(folder.name for folder in DECODERS.iterdir() if folder.is_dir())
EVERY = r"(q|k|v|o|qkv|gate|up|gate_up|down)(/kernel)?$"
# float32 through three adapted layers, twice; logits below 20.
CLOSE = {"atol": 5e-5, "rtol": 5e-6}


def theirs(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.float().numpy()


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 44, (2, 8))


def adapted(name: str, rules: Any, scan_layers: bool = False) -> tuple[Any, Any, Any, np.ndarray]:
    model, params = models.load(DECODERS / name, dtype=jnp.float32, scan_layers=scan_layers)
    lora = jlora.lora_transform(model.apply, rules)
    fresh = lora.init(jax.random.key(0), params, jnp.asarray(tokens()))
    leaves, treedef = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    adapter = jax.tree.unflatten(treedef, noisy)
    return model, params, adapter, np.asarray(jax.jit(lora.apply)(params, adapter, tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_save_merged_decoder_in_transformers(name: str, tmp_path: pathlib.Path) -> None:
    scan_layers = name != "qwen3_moe_some"
    rules = {EVERY: jlora.LoRA(rank=2, alpha=4)}
    _, params, adapter, ours = adapted(name, rules, scan_layers)
    merged = jlora.merge(params, adapter)
    models.save(
        tmp_path / "out",
        merged,
        DECODERS / name,
        dtype=jnp.float32,
        scan_layers=scan_layers,
        max_shard_size=4000,
    )
    np.testing.assert_allclose(logits(theirs(tmp_path / "out"), tokens()), ours, **CLOSE)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("llama", {EVERY: jlora.LoRA(rank=3, alpha=5)}),
        ("llama", {"embedding|head|/q": jlora.LoRA(rank=3, alpha=5, use_rslora=True)}),
        ("llama", {EVERY: jlora.DoRA(rank=3, alpha=5), "embedding": jlora.DoRA(rank=2, alpha=3)}),
        ("llama3", {EVERY: jlora.LoRA(rank=3, alpha=5), "bias": jlora.BitFit()}),
        ("llama", {EVERY: jlora.LoRA(rank=3, alpha=5), "head|^params/norm": jlora.FullDelta()}),
        (
            "llama",
            {
                EVERY: jlora.LoRA(rank=3, alpha=5),
                "embedding": jlora.TrainableTokens(token_indices=(3, 40)),
            },
        ),
        ("qwen3_moe", {EVERY: jlora.LoRA(rank=2, alpha=5)}),
        ("qwen3_moe", {r"moe/gate_up$|/q/": jlora.LoRA(rank=2, alpha=5)}),
        ("qwen3_moe", {r"router/kernel$|/q/": jlora.LoRA(rank=2, alpha=5)}),
        ("qwen3_moe", {r"router/kernel$|moe/down$": jlora.LoRA(rank=2, alpha=5, dropout=0.5)}),
        ("phi3", {EVERY: jlora.LoRA(rank=2, alpha=5)}),
        ("gemma3", {r"/q/": jlora.LoRA(rank=2, alpha=5), "norm/scale": jlora.FullDelta()}),
        ("gemma", {r"/q/": jlora.LoRA(rank=2, alpha=5), "^params/norm/scale": jlora.FullDelta()}),
        ("gemma3", {EVERY: jlora.LoRAFA(rank=2, alpha=5)}),
        ("llama", {EVERY: jlora.AdaLoRA(rank=2, alpha=5)}),
        ("llama", {EVERY: jlora.LoHa(rank=2, alpha=5)}),
        ("llama", {EVERY: jlora.LoKr(rank=1, alpha=5, factor=3)}),
        ("llama", {EVERY: jlora.LoKr(rank=1, alpha=5, decompose_both=True)}),
        ("llama", {EVERY: jlora.HiRA(rank=2)}),
        ("llama", {r"/(k|v)/kernel": jlora.IA3(), "down": jlora.IA3(apply_to="inputs")}),
        ("llama", {EVERY: jlora.VeRA(rank=5)}),
        ("llama", {EVERY: jlora.VBLoRA(rank=2, num_vectors=5, vector_length=2)}),
        ("llama", {EVERY: jlora.FourierFT(num_frequencies=7, alpha=20, seed=5)}),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "-".join(type(config).__name__ for config in value.values())
    ),
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_save_decoder_adapter_in_peft(
    name: str, rules: Any, scan_layers: bool, tmp_path: pathlib.Path
) -> None:
    model, params, adapter, ours = adapted(name, rules, scan_layers)
    peft.save(tmp_path / "out", adapter, model, params, task_type="CAUSAL_LM")
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(DECODERS / name), tmp_path / "out")
    np.testing.assert_allclose(logits(wrapped.eval(), tokens()), ours, **CLOSE)


@pytest.mark.parametrize("pattern", [EVERY, r"mlp/down/kernel$", r"layers_0/mlp/(gate|up)/kernel$"])
def test_save_dense_layers_of_mixture(pattern: str, tmp_path: pathlib.Path) -> None:
    rules = {pattern: jlora.LoRA(rank=2, alpha=5, dropout=0.5)}
    model, params, adapter, ours = adapted("qwen3_moe_some", rules)
    peft.save(tmp_path / "out", adapter, model, params, task_type="CAUSAL_LM")
    wrapped = hf_peft.PeftModel.from_pretrained(
        theirs(DECODERS / "qwen3_moe_some"), tmp_path / "out"
    )
    np.testing.assert_allclose(logits(wrapped.eval(), tokens()), ours, **CLOSE)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("llama_linear", {"embed": jlora.LoRA(rank=2, alpha=3)}),
        (
            "llama_linear",
            {
                "embed": jlora.LoRA(rank=2, alpha=3, use_rslora=True),
                "/q/": jlora.LoRA(rank=1, alpha=1),
            },
        ),
        ("gemma3", {"embed|/q/": jlora.LoRA(rank=2, alpha=3)}),
        ("smollm3", {"embed": jlora.FullDelta(), "/q/": jlora.LoRA(rank=2, alpha=3)}),
        ("qwen2_sliding", {"embed": jlora.FullDelta(), "/q/kernel": jlora.HiRA(rank=2)}),
        ("llama_linear", {"embed": jlora.HiRA(rank=2), "/q/": jlora.HiRA(rank=1)}),
        (
            "llama_linear",
            {
                "embed": jlora.TrainableTokens(token_indices=(3, 40)),
                "/q/": jlora.LoRA(rank=2, alpha=3),
            },
        ),
    ],
    ids=["lora", "rslora", "scaled", "full", "full_hira", "hira", "tokens"],
)
def test_save_tied_table_in_peft(name: str, rules: Any, tmp_path: pathlib.Path) -> None:
    model, params, adapter, ours = adapted(name, rules)
    peft.save(tmp_path / "out", adapter, model, params, task_type="CAUSAL_LM")
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(DECODERS / name), tmp_path / "out")
    np.testing.assert_allclose(logits(wrapped.eval(), tokens()), ours, **CLOSE)
    again = peft.load(tmp_path / "out", model, params)
    merged = jlora.merge(again.params, again.adapter)
    np.testing.assert_allclose(np.asarray(model.apply(merged, tokens())), ours, **CLOSE)


def test_save_tokens_of_copied_head_in_peft(tmp_path: pathlib.Path) -> None:
    name, tokens_config = "llama_linear", jlora.TrainableTokens(token_indices=(3, 9))
    model, params = models.load(DECODERS / name, dtype=jnp.float32, tie_word_embeddings=False)
    rules = {"embed": tokens_config, "/q/": jlora.LoRA(rank=2, alpha=3)}
    lora = jlora.lora_transform(model.apply, rules)
    fresh = lora.init(jax.random.key(0), params, jnp.asarray(tokens()))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), fresh)
    ours = np.asarray(lora.apply(params, adapter, tokens()))
    peft.save(tmp_path / "out", adapter, model, params, task_type="CAUSAL_LM")
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(DECODERS / name), tmp_path / "out")
    np.testing.assert_allclose(logits(wrapped.eval(), tokens()), ours, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "is_refused"),
    [
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
        (
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            False,
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9]}},
            False,
        ),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 9]}}, True),
        (
            {
                "target_modules": ["q_proj"],
                "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]},
            },
            False,
        ),
        (
            {
                "target_modules": ["q_proj"],
                "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4, 5]},
            },
            True,
        ),
        (
            {
                "target_modules": ["embed_tokens", "q_proj"],
                "ensure_weight_tying": True,
                "rank_pattern": {"embed_tokens": 3},
                "alpha_pattern": {"embed_tokens": 7},
            },
            True,
        ),
    ],
    ids=str,
)
def test_load_adapter_of_tied_pair(fields: Any, is_refused: bool, tmp_path: pathlib.Path) -> None:
    config = hf_peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields)
    wrapped = hf_peft.get_peft_model(theirs(DECODERS / "llama_linear"), config)
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    expected = logits(wrapped.eval(), tokens())
    wrapped.save_pretrained(tmp_path / "out")
    for options in ({}, {"tie_word_embeddings": False}):
        model, params = models.load(DECODERS / "llama_linear", dtype=jnp.float32, **options)
        if is_refused and not options:
            with pytest.raises(ValueError, match="one weight for .*tie_word_embeddings=False"):
                peft.load(tmp_path / "out", model, params)
            continue
        loaded = peft.load(tmp_path / "out", model, params)
        merged = jlora.merge(loaded.params, loaded.adapter)
        np.testing.assert_allclose(np.asarray(model.apply(merged, tokens())), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"target_modules": "all-linear"}),
        (
            "llama",
            {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": None},
        ),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
        ("llama", {"target_modules": ["lm_head"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "mlp.act_fn"]}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.0.mlp"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight", "lm_head.weight"]}),
        ("llama", {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}),
        ("llama", {"target_modules": r".*(q|v)_proj", "exclude_modules": r".*\.0\..*q_proj"}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["k_proj"]}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
        ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
        ("qwen3_moe", {"target_modules": ["q_proj", "gate"], "use_rslora": True}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("gemma3", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    ],
    ids=str,
)
def test_load_folder_of_peft(name: str, fields: Any, tmp_path: pathlib.Path) -> None:
    config = hf_peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields)
    wrapped = hf_peft.get_peft_model(theirs(DECODERS / name), config)
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    expected = logits(wrapped.eval(), tokens())
    wrapped.save_pretrained(tmp_path / "out")
    for scan_layers in (False, True):
        if scan_layers and "layers_to_transform" in fields:
            continue
        model, params = models.load(DECODERS / name, dtype=jnp.float32, scan_layers=scan_layers)
        loaded = peft.load(tmp_path / "out", model, params)
        merged = jlora.merge(loaded.params, loaded.adapter)
        np.testing.assert_allclose(np.asarray(model.apply(merged, tokens())), expected, **CLOSE)


@pytest.mark.parametrize("method", ["adalora", "loha", "lokr"])
def test_load_ranks_by_layer_of_peft(method: str, tmp_path: pathlib.Path) -> None:
    patterns = {
        "rank_pattern": {"1.self_attn.q_proj": 3},
        "alpha_pattern": {"0.self_attn.q_proj": 7},
    }
    config: Any = {
        "adalora": lambda: hf_peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=9, lora_alpha=6, target_modules=["q_proj"]
        ),
        "loha": lambda: hf_peft.LoHaConfig(r=2, alpha=5, target_modules=["q_proj"], **patterns),
        "lokr": lambda: hf_peft.LoKrConfig(r=2, alpha=5, target_modules=["q_proj"], **patterns),
    }[method]()
    wrapped = hf_peft.get_peft_model(theirs(DECODERS / "llama"), config)
    torch.manual_seed(3)
    pruning = {}
    for name, parameter in wrapped.base_model.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
        if name.endswith("lora_E.default"):
            pruning[name] = [rank != len(pruning) for rank in range(4)]
            parameter.data[len(pruning) - 1] = 0
    if pruning:
        wrapped.peft_config["default"].rank_pattern = pruning
    expected = logits(wrapped.eval(), tokens())
    wrapped.save_pretrained(tmp_path / "out")
    for scan_layers in (False, True):
        model, params = models.load(DECODERS / "llama", dtype=jnp.float32, scan_layers=scan_layers)
        loaded = peft.load(tmp_path / "out", model, params)
        merged = jlora.merge(loaded.params, loaded.adapter)
        np.testing.assert_allclose(np.asarray(model.apply(merged, tokens())), expected, **CLOSE)


def test_load_other_head_in_transformers(tmp_path: pathlib.Path) -> None:
    model = theirs(DECODERS / "llama_linear")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 0.3
    model.save_pretrained(tmp_path / "base", state_dict=tensors)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    ours, params = models.load(tmp_path / "base")
    expected = logits(theirs(tmp_path / "base"), tokens())
    np.testing.assert_allclose(np.asarray(ours.apply(params, tokens())), expected, **CLOSE)


# The config of one weight, from a generator, by PEFT method. No setting that PEFT lacks differs.
MIXED = {
    "LORA": lambda r: jlora.LoRA(
        rank=int(r.integers(1, 4)),
        alpha=float(r.integers(1, 6)),
        use_rslora=bool(r.integers(2)),
    ),
    "DORA": lambda r: jlora.DoRA(
        rank=int(r.integers(1, 4)),
        alpha=float(r.integers(1, 6)),
        use_rslora=bool(r.integers(2)),
    ),
    "ADALORA": lambda r: jlora.AdaLoRA(rank=int(r.integers(1, 4)), alpha=float(r.integers(1, 6))),
    "LOHA": lambda r: jlora.LoHa(rank=int(r.integers(1, 4)), alpha=float(r.integers(1, 6))),
    "LOKR": lambda r: jlora.LoKr(
        rank=1, alpha=float(r.integers(1, 6)), decompose_both=bool(r.integers(2))
    ),
    "HIRA": lambda r: jlora.HiRA(rank=int(r.integers(1, 4))),
    "IA3": lambda r: jlora.IA3(apply_to="inputs" if r.integers(2) else "outputs"),
    "VERA": lambda r: jlora.VeRA(rank=3),
    "VBLORA": lambda r: jlora.VBLoRA(rank=2, num_vectors=5, vector_length=2),
    "FOURIERFT": lambda r: jlora.FourierFT(
        num_frequencies=int(r.integers(2, 9)), alpha=float(r.integers(1, 6)), seed=5
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", MIXED)
def test_save_mixed_configs_in_peft(kind: str, seed: int, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(seed)
    names = [
        f"layers_{n}/{part}/kernel$"
        for n in range(2)
        for part in ("attention/q", "attention/v", "attention/o", "mlp/up", "mlp/down")
    ]
    rules = {name: MIXED[kind](rng) for name in names if rng.random() < 0.7}
    model, params, adapter, ours = adapted("llama", rules)
    peft.save(tmp_path / "out", adapter, model, params, task_type="CAUSAL_LM")
    wrapped = hf_peft.PeftModel.from_pretrained(theirs(DECODERS / "llama"), tmp_path / "out")
    np.testing.assert_allclose(logits(wrapped.eval(), tokens()), ours, **CLOSE)


def test_config_defaults_are_those_of_peft() -> None:
    configs = hf_peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    for name, method in PEFT_METHODS.items():
        options = {"total_step": 1} if name == "ADALORA" else {}
        config = configs[name](**options)
        for field, default in method.defaults.items():
            if field == "is_feedforward":
                continue
            known = getattr(config, field)
            assert known == default or not (known or default), (name, field, known)


@pytest.mark.parametrize("kind", PEFT_METHODS)
def test_config_of_peft_is_known(kind: str, tmp_path: pathlib.Path) -> None:
    options = {"total_step": 1} if kind == "ADALORA" else {}
    config = hf_peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["q"], **options)
    config.save_pretrained(tmp_path)
    fields, method = read_peft_config(tmp_path)
    assert fields["target_modules"] == ["q"]
    assert method is PEFT_METHODS[kind]


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "smollm3",
        "bert",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "vit",
    ],
)
def test_config_every_field_is_read(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of the class of transformers is parsed, without effect, or of one value."""
    config = transformers.AutoConfig.for_model(model_type)
    known = {*config.to_dict(), *config.attribute_map}
    readers: list[ConfigReader] = []
    monkeypatch.setattr(ConfigReader, "warn_unread_fields", lambda self: readers.append(self))
    fields = {**config.to_dict(), "architectures": None}
    if model_type in DECODER_PARSERS:
        decoder_config(fields)
    else:
        (vit_config if model_type == "vit" else encoder_config)(fields)
    assert known - readers[0].fields_read == set()
