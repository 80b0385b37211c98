"""Parsers from a decoder's config.json to `DecoderConfig`, one function per model type."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any

from jlora.models.decoder_config import DecoderConfig, LayerKind, MoEConfig
from jlora.models.hf.config_reader import (
    MAX_LAYERS,
    REQUIRED_VALUES,
    ConfigReader,
    convert_to_value_error,
)
from jlora.models.layers import ACTIVATIONS
from jlora.models.rope import Rope, rope_from_config

# Fields of transformers that do not affect the forward pass of a decoder, or only with others.
_IGNORED_DECODER_FIELDS = (
    "_sliding_window_pattern",
    "attention_dropout",
    "embd_pdrop",
    "output_router_logits",
    "pretraining_tp",
    "resid_pdrop",
    "router_aux_loss_coef",
    "sliding_window",
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
    reader.warn_unread_fields()
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


def _num_layers(reader: ConfigReader) -> int:
    return reader.get_positive_int("num_hidden_layers", maximum=MAX_LAYERS)


def _parse_rope(
    reader: ConfigReader,
    head_dim: int,
    default_theta: float = 10_000.0,
    *,
    layer_type: str | None = None,
    theta_name: str = "rope_theta",
    scaling_name: str = "rope_scaling",
    aliases: Mapping[str, str] = types.MappingProxyType({}),
    partial: bool = False,
    default_original_length: int | None = None,
) -> Rope:
    """Returns the rotary positions of a config.json of transformers 5 or earlier.

    Transformers 5 has `rope_parameters`, earlier releases `rope_theta`, `rope_scaling` and others.
    Where a setting is in several of them, they have to be equal. All but the families with
    `partial` rotate whole heads: for them, transformers does not read `partial_rotary_factor` with
    the default frequencies, and with others it makes too few to run.

    Args:
        reader: Reader of the config.json.
        head_dim: Width of one head.
        default_theta: Base of the frequencies where the config.json has none.
        layer_type: Key of `rope_parameters` where layer types have separate sets of parameters.
            None: there is one set.
        theta_name: Field of earlier releases with the base of the frequencies.
        scaling_name: Field of earlier releases with the other parameters. Empty: there is none.
        aliases: Other names of the rope types.
        partial: Whether the family can rotate a part of each head, by `partial_rotary_factor`.
        default_original_length: Value of the field `original_max_position_embeddings` where it is
            missing, even if `rope_parameters` has another. None: the field has no default.
    """
    parameters = reader.get_dict("rope_parameters")
    location = "rope_parameters"
    if layer_type is not None and parameters:
        location = f"rope_parameters.{layer_type}"
        if not isinstance(parameters.get(layer_type), dict):
            raise ValueError(
                f"{reader.location}: {location} is missing. rope_parameters must have an object "
                f"for each type of layers."
            )
        parameters = dict(parameters[layer_type])
    sources = {location: parameters}
    if scaling_name:
        sources[scaling_name] = reader.get_dict(scaling_name)
    # Settings by name, with the value in each place that has one.
    settings: dict[str, dict[str, Any]] = {}
    for place, values in sources.items():
        for name, value in values.items():
            if name in ("type", "rope_type") and isinstance(value, str):
                value = aliases.get(value, value)
            if value is not None:
                setting = "rope_type" if name == "type" else name
                settings.setdefault(setting, {})[f"{place}.{name}"] = value
    names = {
        "rope_theta": theta_name,
        "original_max_position_embeddings": "original_max_position_embeddings",
        "partial_rotary_factor": "partial_rotary_factor",
    }
    if not partial and set(settings.get("rope_type", {}).values()) <= {"default"}:
        del names["partial_rotary_factor"]
        settings.pop("partial_rotary_factor", None)
    for setting, name in names.items():
        value = reader.get(name, None)
        if value is not None:
            settings.setdefault(setting, {})[name] = value
        elif setting == "original_max_position_embeddings" and default_original_length:
            settings.setdefault(setting, {})[f"the default of {name}"] = default_original_length
    for values in settings.values():
        reader.require_equal(values)
    if not partial:
        for name, value in settings.get("partial_rotary_factor", {}).items():
            if value != 1:
                raise ValueError(
                    f"{reader.location}: {name}={value!r} is not implemented for model_type="
                    f"{reader.config_dict.get('model_type')!r}, which rotates whole heads: only 1. "
                    f"Copy the rope parameters from the checkpoint's original config.json."
                )
    merged = {name: next(iter(values.values())) for name, values in settings.items()}
    try:
        return rope_from_config(
            {"rope_theta": default_theta, **merged},
            head_dim=head_dim,
            max_position_embeddings=reader.get_positive_int("max_position_embeddings"),
        )
    except ValueError as error:
        raise ValueError(f"{reader.location}: {error}") from error


def _uniform_layers(reader: ConfigReader, kind: LayerKind) -> dict[str, Any]:
    """Returns the fields of layers that are all of one kind."""
    return {
        "layer_kinds": (kind,),
        "layer_kind_ids": (0,) * _num_layers(reader),
    }


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _full_and_sliding_layers(
    reader: ConfigReader,
    ropes: Mapping[str, Rope],
    layer_types: list[str],
    default_window: int | None = None,
) -> dict[str, Any]:
    """Returns the fields of layers with full attention or a sliding window.

    Args:
        reader: Reader of the config.json.
        ropes: Rotary positions of each layer type.
        layer_types: Types of the layers, unless the config.json has a field `layer_types`.
        default_window: Window if the config.json has no field `sliding_window`.
    """
    layer_types = _parse_layer_types(reader, layer_types)
    used = [layer_type for layer_type in (_FULL, _SLIDING) if layer_type in layer_types]
    windows = {}
    if _SLIDING in used:
        windows[_SLIDING] = reader.get_positive_int("sliding_window", default_window)
    return {
        "layer_kinds": tuple(LayerKind(window=windows.get(t), rope=ropes[t]) for t in used),
        "layer_kind_ids": tuple(used.index(layer_type) for layer_type in layer_types),
    }


def _parse_layer_types(reader: ConfigReader, default: list[str]) -> list[str]:
    """Returns the field `layer_types`, or else the default.

    As in transformers, the list holds where other fields give another one: a saved config.json also
    has their defaults.
    """
    layer_types = reader.get_list("layer_types")
    if not layer_types:
        return default
    if len(layer_types) != len(default) or not all(t in (_FULL, _SLIDING) for t in layer_types):
        raise ValueError(
            f"{reader.location}: layer_types={layer_types} must have {len(default)} entries, each "
            f"{_FULL!r} or {_SLIDING!r}."
        )
    return layer_types


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
    rope = _parse_rope(reader, common["head_dim"])
    # With `layer_types`, transformers reads the config.json as one of Ministral.
    layer_types = [_FULL if window is None else _SLIDING] * _num_layers(reader)
    default_window = None if "sliding_window" in reader.config_dict else 4096
    ropes = {_FULL: rope, _SLIDING: rope}
    layers = _full_and_sliding_layers(reader, ropes, layer_types, default_window)
    return DecoderConfig(**common, **layers)


def _parse_qwen_fields(reader: ConfigReader, **overrides: Any) -> DecoderConfig:
    common = _parse_common_fields(reader, **overrides)
    rope = _parse_rope(reader, common["head_dim"])
    first_sliding = reader.get("max_window_layers", 28)
    if type(first_sliding) is not int or first_sliding < 0:
        raise ValueError(
            f"{reader.location}: max_window_layers={first_sliding!r} must be an integer of at "
            f"least 0. Copy it from the checkpoint's original config.json."
        )
    use_window = reader.get_bool("use_sliding_window", False)
    layer_types = [
        _SLIDING if use_window and i >= first_sliding else _FULL for i in range(_num_layers(reader))
    ]
    if not use_window and _SLIDING in _parse_layer_types(reader, layer_types):
        raise ValueError(
            f"{reader.location}: layer_types has layers of {_SLIDING!r}, which have no window with "
            f"use_sliding_window=false. Set it to true, or all layer_types to {_FULL!r}, as the "
            f"model was trained."
        )
    ropes = {_FULL: rope, _SLIDING: rope}
    return DecoderConfig(**common, **_full_and_sliding_layers(reader, ropes, layer_types))


def _parse_qwen2(reader: ConfigReader) -> DecoderConfig:
    return _parse_qwen_fields(reader, qkv_bias=True)


def _parse_qwen3(reader: ConfigReader) -> DecoderConfig:
    bias = reader.get_bool("attention_bias", False)
    return _parse_qwen_fields(reader, head_dim=128, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _parse_qwen3_moe(reader: ConfigReader) -> DecoderConfig:
    num_layers = _num_layers(reader)
    moe_step = reader.get_positive_int("decoder_sparse_step", 1)
    dense_layers = reader.get_list("mlp_only_layers", []) or []
    if not all(type(i) is int and 0 <= i < num_layers for i in dense_layers):
        raise ValueError(
            f"{reader.location}: mlp_only_layers={dense_layers} must be indices of the "
            f"{num_layers} layers, from 0. Copy it from the checkpoint's original config.json."
        )
    moe_layers = [i for i in range(num_layers) if i not in dense_layers and (i + 1) % moe_step == 0]
    bias = reader.get_bool("attention_bias", False)
    names = ("num_experts", "num_local_experts")
    reader.get_same(*names)
    name = next((name for name in names if reader.get(name, None) is not None), names[0])
    num_experts = reader.get_positive_int(name, 128, maximum=MAX_LAYERS)
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=reader.get_positive_int("num_experts_per_tok", 8, maximum=num_experts),
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


def _parse_gemma_activation(reader: ConfigReader, default: str | None = None) -> str:
    """Returns the activation, which has one name in the first releases and another in later ones.

    In the first releases, "gelu" stands for its approximation by a tanh.

    Args:
        reader: Reader of the config.json.
        default: Value of `hidden_activation` where it is missing. None: that of `hidden_act`.
    """
    names = {
        "hidden_activation": reader.get("hidden_activation", default),
        "hidden_act": reader.get("hidden_act", None),
    }
    tanh = "gelu_pytorch_tanh"
    values = {n: tanh if name == "gelu" else name for n, name in names.items() if name is not None}
    reader.require_equal(values)
    return next(iter(values.values()), tanh)


def _parse_gemma(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma_fields(reader, activation=_parse_gemma_activation(reader))
    kind = LayerKind(rope=_parse_rope(reader, common["head_dim"]))
    return DecoderConfig(**common, **_uniform_layers(reader, kind))


def _parse_gemma2_fields(reader: ConfigReader, **overrides: Any) -> dict[str, Any]:
    return _parse_gemma_fields(
        reader,
        activation=_parse_gemma_activation(reader, "gelu_pytorch_tanh"),
        post_norms=True,
        query_scale=reader.get_positive_float("query_pre_attn_scalar", 256) ** -0.5,
        **overrides,
    )


def _parse_softcap(reader: ConfigReader, name: str, default: float | None) -> float | None:
    """Returns a soft cap; null in the config.json means no cap, unlike a missing field."""
    reader.fields_read.add(name)
    if default is not None and name not in reader.config_dict:
        return default
    if reader.config_dict.get(name) is None:
        return None
    return reader.get_positive_float(name, 1.0, maximum=1e6)  # A larger one changes nothing.


def _parse_gemma2(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma2_fields(
        reader,
        attention_softcap=_parse_softcap(reader, "attn_logit_softcapping", 50.0),
        logit_softcap=_parse_softcap(reader, "final_logit_softcapping", 30.0),
    )
    rope = _parse_rope(reader, common["head_dim"])
    layer_types = [_FULL if i % 2 else _SLIDING for i in range(_num_layers(reader))]
    ropes = {_FULL: rope, _SLIDING: rope}
    return DecoderConfig(**common, **_full_and_sliding_layers(reader, ropes, layer_types))


def _parse_gemma3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_gemma2_fields(
        reader,
        qk_norm=True,
        attention_softcap=_parse_softcap(reader, "attn_logit_softcapping", None),
        logit_softcap=_parse_softcap(reader, "final_logit_softcapping", None),
    )
    head_dim = common["head_dim"]
    ropes = {
        _FULL: _parse_rope(reader, head_dim, 1_000_000.0, layer_type=_FULL),
        _SLIDING: _parse_rope(
            reader,
            head_dim,
            layer_type=_SLIDING,
            theta_name="rope_local_base_freq",
            scaling_name="",
        ),
    }
    pattern = reader.get_positive_int("sliding_window_pattern", 6)
    layer_types = [_SLIDING if (i + 1) % pattern else _FULL for i in range(_num_layers(reader))]
    return DecoderConfig(**common, **_full_and_sliding_layers(reader, ropes, layer_types))


def _parse_phi3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(
        reader, fused_projections=True, norm_eps=reader.get_float("rms_norm_eps", 1e-5)
    )
    # Names of longrope in the first releases.
    aliases = {"su": "longrope", "yarn": "longrope"}
    rope = _parse_rope(
        reader, common["head_dim"], aliases=aliases, partial=True, default_original_length=4096
    )
    window = reader.get_optional_int("sliding_window", None)
    return DecoderConfig(**common, **_uniform_layers(reader, LayerKind(window=window, rope=rope)))


def _parse_smollm3(reader: ConfigReader) -> DecoderConfig:
    common = _parse_common_fields(
        reader, tie_word_embeddings=reader.get_bool("tie_word_embeddings", True)
    )
    num_layers = _num_layers(reader)
    interval = reader.get_positive_int("no_rope_layer_interval", 4)
    # In spite of its name, no_rope_layers has 1 for layers with rotary positions, and 0 without.
    derived = [int((i + 1) % interval != 0) for i in range(num_layers)]
    has_rope = reader.get_list("no_rope_layers", derived) or []
    if len(has_rope) != num_layers or not all(flag in (0, 1) for flag in has_rope):
        raise ValueError(
            f"{reader.location}: no_rope_layers={has_rope} must have {num_layers} entries, 1 for "
            f"layers with rotary positions and 0 for others."
        )
    rope = _parse_rope(reader, common["head_dim"], 2_000_000.0)
    use_window = reader.get_bool("use_sliding_window", False)
    layer_types = _parse_layer_types(
        reader,
        [_SLIDING if use_window and not layer_has_rope else _FULL for layer_has_rope in has_rope],
    )
    layers = [
        LayerKind(
            window=reader.get_positive_int("sliding_window") if layer_type == _SLIDING else None,
            rope=rope if layer_has_rope else None,
        )
        for layer_type, layer_has_rope in zip(layer_types, has_rope, strict=True)
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
