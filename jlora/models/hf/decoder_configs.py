"""From a config.json to `DecoderConfig`, one function per model type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jlora.models.decoder_config import DecoderConfig, LayerKind, MoEConfig
from jlora.models.hf.config_reader import REQUIRED_VALUES, ConfigReader, convert_to_value_error
from jlora.models.layers import ACTIVATIONS
from jlora.models.rope import Rope, rope_from_config

# Says nothing about what the forward pass of a decoder computes, or is read where it does.
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
    """The shape of the decoder that a config.json describes.

    Args:
        config_dict: The fields of the config.json.
        location: What errors call it.

    Raises:
        ValueError: The model type, or something that a field asks for, is not implemented.
    """
    kind = config_dict.get("model_type")
    if not isinstance(kind, str) or kind not in DECODER_PARSERS:
        raise ValueError(
            f"{location}: model_type={kind!r} is not implemented; {sorted(DECODER_PARSERS)} are."
        )
    fields = ConfigReader(config_dict, location, _IGNORED_DECODER_FIELDS)
    for name, only in {**REQUIRED_VALUES, "use_bidirectional_attention": False}.items():
        fields.require_value(name, only)
    with convert_to_value_error(location):
        config = DECODER_PARSERS[kind](fields)
    fields.reject_unread_fields()
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"{location}: num_attention_heads={config.num_heads} are not shared evenly by "
            f"num_key_value_heads={config.num_kv_heads}. One must divide the other."
        )
    if not isinstance(config.activation, str) or config.activation not in ACTIVATIONS:
        raise ValueError(
            f"{location}: the activation {config.activation!r} is not implemented; "
            f"{sorted(ACTIVATIONS)} are."
        )
    return config


def _parse_common_fields(reader: ConfigReader, **overrides: Any) -> dict[str, Any]:
    """What every architecture says alike."""
    heads, width = (
        reader.get_positive_int("num_attention_heads"),
        reader.get_positive_int("hidden_size"),
    )
    if "head_dim" not in overrides and reader.config_dict.get("head_dim") is None and width % heads:
        raise ValueError(
            f"{reader.location}: hidden_size={width} does not split into num_attention_heads={heads} "
            f"heads. Give a head_dim, or a width that is a multiple."
        )
    dim = reader.get_positive_int("head_dim", overrides.pop("head_dim", width // heads))
    defaults = {
        "vocab_size": reader.get_positive_int("vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.get_positive_int("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": reader.get_positive_int("num_key_value_heads", heads),
        "head_dim": dim,
        "max_seq_length": reader.get_positive_int("max_position_embeddings"),
        "activation": reader.get("hidden_act", "silu"),
        "norm_eps": reader.get_float("rms_norm_eps", 1e-6),
        "query_scale": dim**-0.5,
        "tie_word_embeddings": reader.get_bool("tie_word_embeddings", False),
    }
    return {**defaults, **overrides}


def _parse_rope(
    reader: ConfigReader,
    head_dim: int,
    default_theta: float = 10_000.0,
    layer_type: str | None = None,
) -> Rope:
    """The rotary positions, of transformers 5 (`rope_parameters`) or before.

    Args:
        reader: The config.json.
        head_dim: Width of one head.
        default_theta: The base where none is given.
        layer_type: Which of several sets of parameters; None where there is but one.
    """
    parameters = dict(reader.config_dict.get("rope_parameters") or {})
    if layer_type is not None:
        parameters = dict(parameters.get(layer_type) or {})
    parameters = {**(reader.config_dict.get("rope_scaling") or {}), **parameters}
    given = reader.config_dict.get("rope_theta")
    parameters.setdefault("rope_theta", default_theta if given is None else given)
    partial = reader.config_dict.get("partial_rotary_factor")
    if partial is not None:
        parameters.setdefault("partial_rotary_factor", partial)
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
    """Layers that all attend in one way."""
    return {
        "layer_kinds": (kind,),
        "layer_kind_ids": (0,) * reader.get_positive_int("num_hidden_layers"),
    }


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _full_and_sliding_layers(
    reader: ConfigReader, ropes: Mapping[str, Rope], layer_types: list[str]
) -> dict[str, Any]:
    """Layers that see all tokens or a window, as `layer_types` has it where no field says which."""
    count = reader.get_positive_int("num_hidden_layers")
    layer_types = list(reader.config_dict.get("layer_types") or layer_types)
    if len(layer_types) != count or not set(layer_types) <= {_FULL, _SLIDING}:
        raise ValueError(
            f"{reader.location}: layer_types={layer_types} are not {count} of {_FULL!r} and {_SLIDING!r}."
        )
    used = [one for one in (_FULL, _SLIDING) if one in layer_types]
    window = reader.get_positive_int("sliding_window") if _SLIDING in used else None
    kinds = [LayerKind(window=window if one == _SLIDING else None, rope=ropes[one]) for one in used]
    return {
        "layer_kinds": tuple(kinds),
        "layer_kind_ids": tuple(used.index(one) for one in layer_types),
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
    made = _parse_rope(reader, common["head_dim"])
    count, first = (
        reader.get_positive_int("num_hidden_layers"),
        reader.config_dict.get("max_window_layers", 28),
    )
    slides = reader.get_bool("use_sliding_window", False)
    types = [_SLIDING if slides and number >= first else _FULL for number in range(count)]
    return DecoderConfig(
        **common, **_full_and_sliding_layers(reader, {_FULL: made, _SLIDING: made}, types)
    )


def _parse_qwen2(reader: ConfigReader) -> DecoderConfig:
    return _parse_qwen_fields(reader, qkv_bias=True)


def _parse_qwen3(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get_bool("attention_bias", False)
    return _parse_qwen_fields(reader, head_dim=128, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _parse_qwen3_moe(reader: ConfigReader) -> DecoderConfig:
    count, step = (
        reader.get_positive_int("num_hidden_layers"),
        reader.get_positive_int("decoder_sparse_step", 1),
    )
    dense = reader.get("mlp_only_layers", [])
    bias = reader.get_bool("attention_bias", False)
    experts = MoEConfig(
        num_experts=reader.get_positive_int(
            "num_experts", reader.config_dict.get("num_local_experts", 128)
        ),
        num_experts_per_tok=reader.get_positive_int("num_experts_per_tok", 8),
        intermediate_size=reader.get_positive_int("moe_intermediate_size", 768),
        norm_topk_prob=reader.get_bool("norm_topk_prob", False),
    )
    width, heads = (
        reader.get_positive_int("hidden_size"),
        reader.get_positive_int("num_attention_heads"),
    )
    common = _parse_common_fields(
        reader,
        head_dim=width // heads,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        moe=experts,
        moe_layers=tuple(n for n in range(count) if n not in dense and (n + 1) % step == 0),
    )
    window = (
        reader.get_positive_int("sliding_window")
        if reader.get_bool("use_sliding_window", False)
        else None
    )
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
    # The first releases say "gelu" and mean its approximation by a tanh.
    named = reader.get("hidden_activation", None) or reader.get("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if named == "gelu" else named
    common = _parse_gemma_fields(reader, activation=activation)
    return DecoderConfig(
        **common, **_uniform_layers(reader, LayerKind(rope=_parse_rope(reader, common["head_dim"])))
    )


def _parse_gemma2_fields(reader: ConfigReader, **overrides: Any) -> dict[str, Any]:
    reader.get("hidden_act", None)  # Not what these models read.
    return _parse_gemma_fields(
        reader,
        activation=reader.get("hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        query_scale=reader.get_float("query_pre_attn_scalar", 256) ** -0.5,
        **overrides,
    )


def _parse_softcap(reader: ConfigReader, name: str, default: float | None) -> float | None:
    """A soft cap, of which null says that there is none."""
    reader.fields_read.add(name)
    value = reader.config_dict.get(name, default)
    return None if value is None else float(value)


def _parse_gemma2(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma2_fields(
        reader,
        attention_softcap=_parse_softcap(reader, "attn_logit_softcapping", 50.0),
        logit_softcap=_parse_softcap(reader, "final_logit_softcapping", 30.0),
    )
    made = _parse_rope(reader, common["head_dim"])
    types = [
        _FULL if n % 2 else _SLIDING for n in range(reader.get_positive_int("num_hidden_layers"))
    ]
    return DecoderConfig(
        **common, **_full_and_sliding_layers(reader, {_FULL: made, _SLIDING: made}, types)
    )


def _parse_gemma3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma2_fields(
        reader,
        qk_norm=True,
        attention_softcap=_parse_softcap(reader, "attn_logit_softcapping", None),
        logit_softcap=_parse_softcap(reader, "final_logit_softcapping", None),
    )
    dim, given = common["head_dim"], reader.config_dict.get("rope_parameters") or {}
    local = dict(given.get(_SLIDING) or {})
    local.setdefault("rope_theta", reader.get("rope_local_base_freq", 10_000.0))
    ropes = {
        _FULL: _parse_rope(reader, dim, 1_000_000.0, _FULL),
        _SLIDING: _rope_from_parameters(reader, local, dim),
    }
    pattern = reader.config_dict.get("sliding_window_pattern") or 6
    count = reader.get_positive_int("num_hidden_layers")
    types = [_SLIDING if (number + 1) % pattern else _FULL for number in range(count)]
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
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("su", "yarn"):  # What the first releases call longrope.
        kind = "longrope"
    parameters = {**scaling, "rope_type": kind}
    parameters.pop("type", None)
    for name, value in (
        ("rope_theta", reader.config_dict.get("rope_theta") or 10_000.0),
        ("partial_rotary_factor", reader.config_dict.get("partial_rotary_factor") or 1.0),
        ("original_max_position_embeddings", original),
    ):
        parameters.setdefault(name, value)
    made = _rope_from_parameters(reader, parameters, common["head_dim"])
    window = reader.get_optional_int("sliding_window", None)
    return DecoderConfig(**common, **_uniform_layers(reader, LayerKind(window=window, rope=made)))


def _parse_smollm3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(
        reader, tie_word_embeddings=reader.get_bool("tie_word_embeddings", True)
    )
    count, every = (
        reader.get_positive_int("num_hidden_layers"),
        reader.get_positive_int("no_rope_layer_interval", 4),
    )
    rotated = reader.get("no_rope_layers", None)
    rotated = [bool((n + 1) % every) for n in range(count)] if rotated is None else rotated
    made = _parse_rope(reader, common["head_dim"], 2_000_000.0)
    slides = reader.get_bool("use_sliding_window", False)
    types = reader.config_dict.get("layer_types") or [
        _SLIDING if slides and not turned else _FULL for turned in rotated
    ]
    every_kind = [
        LayerKind(
            window=reader.get_positive_int("sliding_window") if one == _SLIDING else None,
            rope=made if turned else None,
        )
        for one, turned in zip(types, rotated, strict=True)
    ]
    kinds = list(dict.fromkeys(every_kind))
    bias = reader.get_bool("attention_bias", False)
    return DecoderConfig(
        **common,
        layer_kinds=tuple(kinds),
        layer_kind_ids=tuple(kinds.index(kind) for kind in every_kind),
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
