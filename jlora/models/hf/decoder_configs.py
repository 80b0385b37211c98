"""Parsers from a decoder's config.json to `DecoderConfig`, one function per model type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jlora.models.decoder_config import DecoderConfig, LayerKind, MoEConfig
from jlora.models.hf.config_reader import REQUIRED_VALUES, ConfigReader, convert_to_value_error
from jlora.models.layers import ACTIVATIONS
from jlora.models.rope import Rope, rope_from_config

# Fields that do not affect the forward pass of a decoder, or that parsers read from `config_dict`.
_IGNORED_DECODER_FIELDS = (
    "_sliding_window_pattern",
    "add_cross_attention",
    "attention_dropout",
    "embd_pdrop",
    "hidden_dropout",
    "is_decoder",
    "is_encoder_decoder",
    "layer_types",
    "max_window_layers",
    "num_local_experts",
    "output_router_logits",
    "partial_rotary_factor",
    "pretraining_tp",
    "resid_pdrop",
    "rope_interleaved",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "sliding_window",
    "sliding_window_pattern",
    "unsloth_fixed",
    "unsloth_version",
    "vocab_size",
)


def decoder_config(config_dict: Mapping[str, Any], location: str = "config.json") -> DecoderConfig:
    """Returns the configuration of the decoder that a config.json describes.

    Args:
        config_dict: Fields of the config.json.
        location: Name of the config.json in error messages.

    Raises:
        ValueError: The model type or the value of a field is not implemented.

    Example:
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> config.num_kv_heads, config.head_dim
        (2, 4)
    """
    model_type = config_dict.get("model_type")
    if not isinstance(model_type, str) or model_type not in DECODER_PARSERS:
        raise ValueError(
            f"{location}: model_type={model_type!r} is not implemented, must be one of "
            f"{sorted(DECODER_PARSERS)}."
        )
    reader = ConfigReader(config_dict, location, _IGNORED_DECODER_FIELDS)
    for name, value in {**REQUIRED_VALUES, "use_bidirectional_attention": False}.items():
        reader.require_value(name, value)
    with convert_to_value_error(location):
        config = DECODER_PARSERS[model_type](reader)
    reader.reject_unread_fields()
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"{location}: num_attention_heads={config.num_heads} must be a multiple of "
            f"num_key_value_heads={config.num_kv_heads}."
        )
    if not isinstance(config.activation, str) or config.activation not in ACTIVATIONS:
        raise ValueError(
            f"{location}: the activation {config.activation!r} is not implemented, must be one of "
            f"{sorted(ACTIVATIONS)}."
        )
    return config


def _parse_common_fields(reader: ConfigReader, **overrides: Any) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` that all architectures spell alike."""
    num_heads = reader.get_positive_int("num_attention_heads")
    hidden_size = reader.get_positive_int("hidden_size")
    has_head_dim = "head_dim" in overrides or reader.config_dict.get("head_dim") is not None
    if not has_head_dim and hidden_size % num_heads:
        raise ValueError(
            f"{reader.location}: hidden_size={hidden_size} must be a multiple of "
            f"num_attention_heads={num_heads}. Otherwise set head_dim."
        )
    default_head_dim = overrides.pop("head_dim", hidden_size // num_heads)
    head_dim = reader.get_positive_int("head_dim", default_head_dim)
    defaults = {
        "vocab_size": reader.get_positive_int("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": reader.get_positive_int("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": reader.get_positive_int("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "max_seq_length": reader.get_positive_int("max_position_embeddings"),
        "activation": reader.get("hidden_act", "silu"),
        "norm_eps": reader.get_float("rms_norm_eps", 1e-6),
        "query_scale": head_dim**-0.5,
        "tie_word_embeddings": reader.get_bool("tie_word_embeddings", False),
    }
    return {**defaults, **overrides}


def _parse_rope(
    reader: ConfigReader,
    head_dim: int,
    default_theta: float = 10_000.0,
    layer_type: str | None = None,
) -> Rope:
    """Returns the rotary positions of a config.json of transformers 5 or earlier.

    Transformers 5 has `rope_parameters`, earlier releases `rope_theta` and `rope_scaling`.

    Args:
        reader: Reader of the config.json.
        head_dim: Width of one head.
        default_theta: Base of the frequencies where the config.json has none.
        layer_type: Key of `rope_parameters` where layer types have separate sets of parameters.
            None: there is one set.
    """
    parameters = dict(reader.config_dict.get("rope_parameters") or {})
    if layer_type is not None:
        parameters = dict(parameters.get(layer_type) or {})
    parameters = {**(reader.config_dict.get("rope_scaling") or {}), **parameters}
    theta = reader.config_dict.get("rope_theta")
    parameters.setdefault("rope_theta", default_theta if theta is None else theta)
    partial_rotary_factor = reader.config_dict.get("partial_rotary_factor")
    if partial_rotary_factor is not None:
        parameters.setdefault("partial_rotary_factor", partial_rotary_factor)
    return _rope_from_parameters(reader, parameters, head_dim)


def _rope_from_parameters(
    reader: ConfigReader, parameters: Mapping[str, Any], head_dim: int
) -> Rope:
    try:
        return rope_from_config(
            parameters,
            head_dim=head_dim,
            max_position_embeddings=reader.get_positive_int("max_position_embeddings"),
        )
    except ValueError as error:
        raise ValueError(f"{reader.location}: {error}") from error


def _uniform_layers(reader: ConfigReader, kind: LayerKind) -> dict[str, Any]:
    """Returns the fields of layers that are all of one kind."""
    return {
        "layer_kinds": (kind,),
        "layer_kind_ids": (0,) * reader.get_positive_int("num_hidden_layers"),
    }


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _full_and_sliding_layers(
    reader: ConfigReader, ropes: Mapping[str, Rope], layer_types: list[str]
) -> dict[str, Any]:
    """Returns the fields of layers with full attention or a sliding window.

    Args:
        reader: Reader of the config.json.
        ropes: Rotary positions of each layer type.
        layer_types: Types of the layers, unless the config.json has a field `layer_types`.
    """
    num_layers = reader.get_positive_int("num_hidden_layers")
    layer_types = list(reader.config_dict.get("layer_types") or layer_types)
    if len(layer_types) != num_layers or not set(layer_types) <= {_FULL, _SLIDING}:
        raise ValueError(
            f"{reader.location}: layer_types={layer_types} must have {num_layers} entries, each "
            f"{_FULL!r} or {_SLIDING!r}."
        )
    used = [layer_type for layer_type in (_FULL, _SLIDING) if layer_type in layer_types]
    windows = {_SLIDING: reader.get_positive_int("sliding_window")} if _SLIDING in used else {}
    return {
        "layer_kinds": tuple(LayerKind(window=windows.get(t), rope=ropes[t]) for t in used),
        "layer_kind_ids": tuple(used.index(layer_type) for layer_type in layer_types),
    }


def _parse_llama(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(reader)
    bias = reader.get_bool("attention_bias", False)
    return DecoderConfig(
        **common,
        **_uniform_layers(reader, LayerKind(rope=_parse_rope(reader, common["head_dim"]))),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.get_bool("mlp_bias", False),
    )


def _parse_mistral(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(reader)
    window = reader.get_optional_int("sliding_window", 4096)
    kind = LayerKind(window=window, rope=_parse_rope(reader, common["head_dim"]))
    return DecoderConfig(**common, **_uniform_layers(reader, kind))


def _parse_qwen_fields(reader: ConfigReader, **overrides: Any) -> DecoderConfig:
    common = _parse_common_fields(reader, **overrides)
    rope = _parse_rope(reader, common["head_dim"])
    num_layers = reader.get_positive_int("num_hidden_layers")
    first_sliding = reader.config_dict.get("max_window_layers", 28)
    use_window = reader.get_bool("use_sliding_window", False)
    types = [_SLIDING if use_window and i >= first_sliding else _FULL for i in range(num_layers)]
    return DecoderConfig(
        **common, **_full_and_sliding_layers(reader, {_FULL: rope, _SLIDING: rope}, types)
    )


def _parse_qwen2(reader: ConfigReader) -> DecoderConfig:
    return _parse_qwen_fields(reader, qkv_bias=True)


def _parse_qwen3(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get_bool("attention_bias", False)
    return _parse_qwen_fields(reader, head_dim=128, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _parse_qwen3_moe(reader: ConfigReader) -> DecoderConfig:
    num_layers = reader.get_positive_int("num_hidden_layers")
    moe_step = reader.get_positive_int("decoder_sparse_step", 1)
    dense_layers = reader.get("mlp_only_layers", [])
    moe_layers = [i for i in range(num_layers) if i not in dense_layers and (i + 1) % moe_step == 0]
    bias = reader.get_bool("attention_bias", False)
    moe = MoEConfig(
        num_experts=reader.get_positive_int(
            "num_experts", reader.config_dict.get("num_local_experts", 128)
        ),
        num_experts_per_tok=reader.get_positive_int("num_experts_per_tok", 8),
        intermediate_size=reader.get_positive_int("moe_intermediate_size", 768),
        norm_topk_prob=reader.get_bool("norm_topk_prob", False),
    )
    hidden_size = reader.get_positive_int("hidden_size")
    common = _parse_common_fields(
        reader,
        head_dim=hidden_size // reader.get_positive_int("num_attention_heads"),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        moe=moe,
        moe_layers=tuple(moe_layers),
    )
    use_window = reader.get_bool("use_sliding_window", False)
    window = reader.get_positive_int("sliding_window") if use_window else None
    kind = LayerKind(window=window, rope=_parse_rope(reader, common["head_dim"]))
    return DecoderConfig(**common, **_uniform_layers(reader, kind))


def _parse_gemma_fields(reader: ConfigReader, **overrides: Any) -> dict[str, Any]:
    bias = reader.get_bool("attention_bias", False)
    return _parse_common_fields(
        reader,
        **{
            "head_dim": 256,
            "norm_offset": True,
            "qkv_bias": bias,
            "output_bias": bias,
            "embed_scale": math.sqrt(reader.get_positive_int("hidden_size")),
            "tie_word_embeddings": reader.get_bool("tie_word_embeddings", True),
            **overrides,
        },
    )


def _parse_gemma(reader: ConfigReader) -> DecoderConfig:
    # In the first releases, "gelu" stands for its approximation by a tanh.
    name = reader.get("hidden_activation", None) or reader.get("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if name == "gelu" else name
    common = _parse_gemma_fields(reader, activation=activation)
    kind = LayerKind(rope=_parse_rope(reader, common["head_dim"]))
    return DecoderConfig(**common, **_uniform_layers(reader, kind))


def _parse_gemma2_fields(reader: ConfigReader, **overrides: Any) -> dict[str, Any]:
    reader.get("hidden_act", None)  # Marked as read: these models use hidden_activation instead.
    return _parse_gemma_fields(
        reader,
        activation=reader.get("hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        query_scale=reader.get_float("query_pre_attn_scalar", 256) ** -0.5,
        **overrides,
    )


def _parse_softcap(reader: ConfigReader, name: str, default: float | None) -> float | None:
    """Returns a soft cap; null in the config.json means no cap, unlike a missing field."""
    reader.fields_read.add(name)
    value = reader.config_dict.get(name, default)
    return None if value is None else float(value)


def _parse_gemma2(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma2_fields(
        reader,
        attention_softcap=_parse_softcap(reader, "attn_logit_softcapping", 50.0),
        logit_softcap=_parse_softcap(reader, "final_logit_softcapping", 30.0),
    )
    rope = _parse_rope(reader, common["head_dim"])
    num_layers = reader.get_positive_int("num_hidden_layers")
    types = [_FULL if i % 2 else _SLIDING for i in range(num_layers)]
    return DecoderConfig(
        **common, **_full_and_sliding_layers(reader, {_FULL: rope, _SLIDING: rope}, types)
    )


def _parse_gemma3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma2_fields(
        reader,
        qk_norm=True,
        attention_softcap=_parse_softcap(reader, "attn_logit_softcapping", None),
        logit_softcap=_parse_softcap(reader, "final_logit_softcapping", None),
    )
    head_dim, parameters = common["head_dim"], reader.config_dict.get("rope_parameters") or {}
    local = dict(parameters.get(_SLIDING) or {})
    local.setdefault("rope_theta", reader.get("rope_local_base_freq", 10_000.0))
    ropes = {
        _FULL: _parse_rope(reader, head_dim, 1_000_000.0, _FULL),
        _SLIDING: _rope_from_parameters(reader, local, head_dim),
    }
    pattern = reader.config_dict.get("sliding_window_pattern") or 6
    num_layers = reader.get_positive_int("num_hidden_layers")
    types = [_SLIDING if (i + 1) % pattern else _FULL for i in range(num_layers)]
    return DecoderConfig(**common, **_full_and_sliding_layers(reader, ropes, types))


def _parse_phi3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(
        reader, fused_projections=True, norm_eps=reader.get_float("rms_norm_eps", 1e-5)
    )
    scaling = {
        **(reader.config_dict.get("rope_scaling") or {}),
        **(reader.config_dict.get("rope_parameters") or {}),
    }
    original = reader.get("original_max_position_embeddings", None)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type in ("su", "yarn"):  # Names of longrope in the first releases.
        rope_type = "longrope"
    parameters = {**scaling, "rope_type": rope_type}
    parameters.pop("type", None)
    for name, value in (
        ("rope_theta", reader.config_dict.get("rope_theta") or 10_000.0),
        ("partial_rotary_factor", reader.config_dict.get("partial_rotary_factor") or 1.0),
        ("original_max_position_embeddings", original),
    ):
        parameters.setdefault(name, value)
    rope = _rope_from_parameters(reader, parameters, common["head_dim"])
    window = reader.get_optional_int("sliding_window", None)
    return DecoderConfig(**common, **_uniform_layers(reader, LayerKind(window=window, rope=rope)))


def _parse_smollm3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(
        reader, tie_word_embeddings=reader.get_bool("tie_word_embeddings", True)
    )
    num_layers = reader.get_positive_int("num_hidden_layers")
    interval = reader.get_positive_int("no_rope_layer_interval", 4)
    # In spite of its name, no_rope_layers has 1 for layers with rotary positions, and 0 without.
    has_rope = reader.get("no_rope_layers", None)
    if has_rope is None:
        has_rope = [bool((i + 1) % interval) for i in range(num_layers)]
    rope = _parse_rope(reader, common["head_dim"], 2_000_000.0)
    use_window = reader.get_bool("use_sliding_window", False)
    types = reader.config_dict.get("layer_types") or [
        _SLIDING if use_window and not layer_has_rope else _FULL for layer_has_rope in has_rope
    ]
    layers = [
        LayerKind(
            window=reader.get_positive_int("sliding_window") if layer_type == _SLIDING else None,
            rope=rope if layer_has_rope else None,
        )
        for layer_type, layer_has_rope in zip(types, has_rope, strict=True)
    ]
    kinds = list(dict.fromkeys(layers))
    bias = reader.get_bool("attention_bias", False)
    return DecoderConfig(
        **common,
        layer_kinds=tuple(kinds),
        layer_kind_ids=tuple(kinds.index(kind) for kind in layers),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.get_bool("mlp_bias", False),
    )


DECODER_PARSERS: dict[str, Callable[[ConfigReader], DecoderConfig]] = {
    "llama": _parse_llama,
    "mistral": _parse_mistral,
    "qwen2": _parse_qwen2,
    "qwen3": _parse_qwen3,
    "qwen3_moe": _parse_qwen3_moe,
    "gemma": _parse_gemma,
    "gemma2": _parse_gemma2,
    "gemma3_text": _parse_gemma3,
    "phi3": _parse_phi3,
    "smollm3": _parse_smollm3,
}
