"""config.json files as published with checkpoints of every family that the README names.

Besides the fields of transformers they have those of other libraries and of old releases, which
transformers does not read. Long lists are shortened.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from jlora.models.hf.decoder_configs import decoder_config
from jlora.models.hf.encoder_configs import encoder_config, vit_config

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def sized(*sizes: int | None, **fields: Any) -> dict[str, Any]:
    """The sizes that all decoders have, and other fields."""
    common: dict[str, Any] = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**common, **dict(zip(SIZES, sizes, strict=True)), **fields}


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
QWEN3 = {
    **QWEN2,
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
}
PHI3 = {
    "model_type": "phi3",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
}
NO_ROPE = [1, 1, 1, 0] * 9

DECODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-2-7b-hf": (
        {
            **LLAMA,
            **sized(32000, 4096, 11008, 32, 32, 32, 4096, max_length=4096, pad_token_id=0),
            "_name_or_path": "meta-llama/Llama-2-7b-hf",
        },
        {"head_dim": 128},
    ),
    "Llama-3.1-8B-Instruct": (
        {
            **LLAMA,
            **sized(128256, 4096, 14336, 32, 32, 8, 131072, mlp_bias=False),
            "eos_token_id": [128001, 128008, 128009],
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        {"num_kv_heads": 8},
    ),
    "SmolLM-135M": (
        {
            **LLAMA,
            **sized(49152, 576, 1536, 30, 9, 3, 2048),
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
        },
        {"head_dim": 64},
    ),
    "SmolLM2-135M": (
        {
            **LLAMA,
            **sized(49152, 576, 1536, 30, 9, 3, 8192),
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
        },
        {"tie_word_embeddings": True},
    ),
    "SmolLM2-1.7B-Instruct": (
        {
            **LLAMA,
            **sized(49152, 2048, 8192, 24, 32, 32, 8192),
            "tie_word_embeddings": True,
            "transformers.js_config": {
                "dtype": "q4",
                "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
                "use_external_data_format": {"model.onnx": True},
            },
        },
        {"head_dim": 64},
    ),
    "SmolLM3-3B": (
        {
            **sized(128256, 2048, 11008, 36, 16, 4, 65536),
            "model_type": "smollm3",
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": NO_ROPE,
            "pretraining_tp": 2,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"layer_kind_ids": tuple(1 - flag for flag in NO_ROPE)},
    ),
    "Mistral-7B-v0.3": (
        {
            **sized(32768, 4096, 14336, 32, 32, 8, 32768),
            "model_type": "mistral",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        {"num_kv_heads": 8},
    ),
    "Qwen2.5-7B-Instruct": (
        {**QWEN2, **sized(152064, 3584, 18944, 28, 28, 4, 32768)},
        {"qkv_bias": True},
    ),
    "Qwen3-1.7B-Base": (
        {**QWEN3, **sized(151936, 2048, 6144, 28, 16, 8, 32768), "model_type": "qwen3"},
        {"qk_norm": True, "head_dim": 128},
    ),
    "Qwen3-30B-A3B": (
        {
            **QWEN3,
            **sized(151936, 2048, 6144, 48, 32, 4, 40960),
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        {"moe_layers": tuple(range(48))},
    ),
    "gemma-2b": (
        {
            **sized(256000, 2048, 16384, 18, 8, 1, 8192, head_dim=256),
            "model_type": "gemma",
            "attention_bias": False,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
        {"activation": "gelu_pytorch_tanh"},
    ),
    "gemma-2-9b-it": (
        {**GEMMA2, **sized(256000, 3584, 14336, 42, 16, 8, 8192, head_dim=256)},
        {"logit_softcap": 30.0},
    ),
    "gemma-3-1b-it": (
        {
            **GEMMA2,
            **sized(262144, 1152, 6912, 26, 4, 1, 32768, head_dim=256),
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "eos_token_id": [1, 106],
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {"qk_norm": True, "logit_softcap": None},
    ),
    "Phi-3-mini-4k-instruct": (
        {
            **PHI3,
            **sized(32064, 3072, 8192, 32, 32, 32, 4096),
            "rope_scaling": None,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
        },
        {"fused_projections": True},
    ),
    "Phi-4-mini-instruct": (
        {
            **PHI3,
            **sized(200064, 3072, 8192, 32, 24, 8, 131072),
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.5] * 48,
                "short_factor": [1.0] * 48,
            },
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        {"tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_config_published_is_read(name: str) -> None:
    fields, expected = DECODERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = decoder_config(fields)
    assert len(config.layer_kind_ids) == fields["num_hidden_layers"]
    assert {key: getattr(config, key) for key in expected} == expected


BERT = {
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
}
ROBERTA = {
    **BERT,
    "model_type": "roberta",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {
        **BERT,
        **BASE,
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 30522,
    },
    "all-MiniLM-L6-v2": {
        **BERT,
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "vocab_size": 30522,
    },
    "roberta-base": {
        **ROBERTA,
        **BASE,
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 50265,
    },
    "xlm-roberta-base": {
        **ROBERTA,
        **BASE,
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaForMaskedLM"],
        "output_past": True,
        "vocab_size": 250002,
    },
    "distilbert-base-uncased-finetuned-sst-2-english": {
        "model_type": "distilbert",
        "activation": "gelu",
        "architectures": ["DistilBertForSequenceClassification"],
        "attention_dropout": 0.1,
        "dim": 768,
        "dropout": 0.1,
        "finetuning_task": "sst-2",
        "hidden_dim": 3072,
        "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
        "max_position_embeddings": 512,
        "n_heads": 12,
        "n_layers": 6,
        "output_past": True,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "vocab_size": 30522,
    },
    "vit-base-patch16-224": {
        **BASE,
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "id2label": {"0": "tench", "1": "goldfish"},
        "image_size": 224,
        "label2id": {"tench": 0, "goldfish": 1},
        "layer_norm_eps": 1e-12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "patch_size": 16,
        "qkv_bias": True,
    },
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_config_published_is_read(name: str) -> None:
    fields = ENCODERS[name]
    config = (vit_config if fields["model_type"] == "vit" else encoder_config)(fields)
    assert config.num_layers == fields.get("num_hidden_layers", fields.get("n_layers"))
    assert config.num_labels == (2 if "id2label" in fields else None)


def test_decoder_config_unread_field_is_ignored() -> None:
    fields, _ = DECODERS["SmolLM2-135M"]
    unread = {"residual_multiplier": 0.2, "rope_thetas": [1.0], "is_llama_config": None}
    assert decoder_config({**fields, **unread}) == decoder_config(fields)
    # A later transformers may read it.
    with pytest.warns(UserWarning, match=r"\['residual_multiplier', 'rope_thetas'\] are ignored"):
        decoder_config({**fields, **unread, "transformers_version": "99.0.0"})
