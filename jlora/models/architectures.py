"""From a config.json to `DecoderConfig`, one function per model type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jlora.models.decoder import DecoderConfig, Experts, Kind
from jlora.models.fields import NEVER, Fields, as_value_errors
from jlora.models.parts import ACTIVATIONS
from jlora.models.rope import Rope, rope

# Says nothing about what the forward pass of a decoder computes, or is read where it does.
_HARMLESS = (
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


def decoder_config(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The shape of the decoder that a config.json describes.

    Args:
        raw: The fields of the config.json.
        where: What errors call it.

    Raises:
        ValueError: The model type, or something that a field asks for, is not implemented.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"{where}: model_type={kind!r} is not implemented; {sorted(ARCHITECTURES)} are."
        )
    fields = Fields(raw, where, _HARMLESS)
    for name, only in {**NEVER, "use_bidirectional_attention": False}.items():
        fields.only(name, only)
    with as_value_errors(where):
        config = ARCHITECTURES[kind](fields)
    fields.rest()
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads={config.num_heads} are not shared evenly by "
            f"num_key_value_heads={config.num_kv_heads}. One must divide the other."
        )
    if not isinstance(config.activation, str) or config.activation not in ACTIVATIONS:
        raise ValueError(
            f"{where}: the activation {config.activation!r} is not implemented; "
            f"{sorted(ACTIVATIONS)} are."
        )
    return config


def _common(fields: Fields, **over: Any) -> dict[str, Any]:
    """What every architecture says alike."""
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    if "head_dim" not in over and fields.raw.get("head_dim") is None and width % heads:
        raise ValueError(
            f"{fields.where}: hidden_size={width} does not split into num_attention_heads={heads} "
            f"heads. Give a head_dim, or a width that is a multiple."
        )
    dim = fields.size("head_dim", over.pop("head_dim", width // heads))
    defaults = {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": width,
        "intermediate_size": fields.size("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", heads),
        "head_dim": dim,
        "max_length": fields.size("max_position_embeddings"),
        "activation": fields.get("hidden_act", "silu"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "query_scale": dim**-0.5,
        "tied": fields.flag("tie_word_embeddings", False),
    }
    return {**defaults, **over}


def _rope(fields: Fields, head_dim: int, theta: float = 10_000.0, form: str | None = None) -> Rope:
    """The rotary positions, of transformers 5 (`rope_parameters`) or before.

    Args:
        fields: The config.json.
        head_dim: Width of one head.
        theta: The base where none is given.
        form: Which of several sets of parameters; None where there is but one.
    """
    parameters = dict(fields.raw.get("rope_parameters") or {})
    if form is not None:
        parameters = dict(parameters.get(form) or {})
    parameters = {**(fields.raw.get("rope_scaling") or {}), **parameters}
    given = fields.raw.get("rope_theta")
    parameters.setdefault("rope_theta", theta if given is None else given)
    partial = fields.raw.get("partial_rotary_factor")
    if partial is not None:
        parameters.setdefault("partial_rotary_factor", partial)
    return _checked_rope(fields, parameters, head_dim)


def _checked_rope(fields: Fields, parameters: Mapping[str, Any], head_dim: int) -> Rope:
    try:
        return rope(
            parameters, head_dim=head_dim, max_length=fields.size("max_position_embeddings")
        )
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}") from error


def _alike(fields: Fields, kind: Kind) -> dict[str, Any]:
    """Layers that all attend in one way."""
    return {"kinds": (kind,), "layers": (0,) * fields.size("num_hidden_layers")}


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _mixed(fields: Fields, ropes: Mapping[str, Rope], types: list[str]) -> dict[str, Any]:
    """Layers that see all tokens or a window, as `types` has it where no field says which."""
    count = fields.size("num_hidden_layers")
    types = list(fields.raw.get("layer_types") or types)
    if len(types) != count or not set(types) <= {_FULL, _SLIDING}:
        raise ValueError(
            f"{fields.where}: layer_types={types} are not {count} of {_FULL!r} and {_SLIDING!r}."
        )
    used = [one for one in (_FULL, _SLIDING) if one in types]
    window = fields.size("sliding_window") if _SLIDING in used else None
    kinds = [Kind(window=window if one == _SLIDING else None, rope=ropes[one]) for one in used]
    return {"kinds": tuple(kinds), "layers": tuple(used.index(one) for one in types)}


def _llama(fields: Fields) -> DecoderConfig:
    common = _common(fields)
    bias = fields.flag("attention_bias", False)
    return DecoderConfig(
        **common,
        **_alike(fields, Kind(rope=_rope(fields, common["head_dim"]))),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _mistral(fields: Fields) -> DecoderConfig:
    common = _common(fields)
    window = fields.window("sliding_window", 4096)
    kind = Kind(window=window, rope=_rope(fields, common["head_dim"]))
    return DecoderConfig(**common, **_alike(fields, kind))


def _qwen(fields: Fields, **over: Any) -> DecoderConfig:
    common = _common(fields, **over)
    made = _rope(fields, common["head_dim"])
    count, first = fields.size("num_hidden_layers"), fields.raw.get("max_window_layers", 28)
    slides = fields.flag("use_sliding_window", False)
    types = [_SLIDING if slides and number >= first else _FULL for number in range(count)]
    return DecoderConfig(**common, **_mixed(fields, {_FULL: made, _SLIDING: made}, types))


def _qwen2(fields: Fields) -> DecoderConfig:
    return _qwen(fields, qkv_bias=True)


def _qwen3(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return _qwen(fields, head_dim=128, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _qwen3_moe(fields: Fields) -> DecoderConfig:
    count, step = fields.size("num_hidden_layers"), fields.size("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    bias = fields.flag("attention_bias", False)
    experts = Experts(
        count=fields.size("num_experts", fields.raw.get("num_local_experts", 128)),
        chosen=fields.size("num_experts_per_tok", 8),
        size=fields.size("moe_intermediate_size", 768),
        normalized=fields.flag("norm_topk_prob", False),
    )
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    common = _common(
        fields,
        head_dim=width // heads,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        experts=experts,
        sparse_layers=tuple(n for n in range(count) if n not in dense and (n + 1) % step == 0),
    )
    window = fields.size("sliding_window") if fields.flag("use_sliding_window", False) else None
    kind = Kind(window=window, rope=_rope(fields, common["head_dim"]))
    return DecoderConfig(**common, **_alike(fields, kind))


def _gemma_fields(fields: Fields, **over: Any) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return _common(
        fields,
        **{
            "head_dim": 256,
            "norm_offset": True,
            "qkv_bias": bias,
            "output_bias": bias,
            "embed_scale": math.sqrt(fields.size("hidden_size")),
            "tied": fields.flag("tie_word_embeddings", True),
            **over,
        },
    )


def _gemma(fields: Fields) -> DecoderConfig:
    # The first releases say "gelu" and mean its approximation by a tanh.
    named = fields.get("hidden_activation", None) or fields.get("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if named == "gelu" else named
    common = _gemma_fields(fields, activation=activation)
    return DecoderConfig(**common, **_alike(fields, Kind(rope=_rope(fields, common["head_dim"]))))


def _later_gemma(fields: Fields, **over: Any) -> dict[str, Any]:
    fields.get("hidden_act", None)  # Not what these models read.
    return _gemma_fields(
        fields,
        activation=fields.get("hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        **over,
    )


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A soft cap, of which null says that there is none."""
    fields.read.add(name)
    value = fields.raw.get(name, default)
    return None if value is None else float(value)


def _gemma2(fields: Fields) -> DecoderConfig:
    common = _later_gemma(
        fields,
        attention_softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
    )
    made = _rope(fields, common["head_dim"])
    types = [_FULL if n % 2 else _SLIDING for n in range(fields.size("num_hidden_layers"))]
    return DecoderConfig(**common, **_mixed(fields, {_FULL: made, _SLIDING: made}, types))


def _gemma3(fields: Fields) -> DecoderConfig:
    common = _later_gemma(
        fields,
        qk_norm=True,
        attention_softcap=_cap(fields, "attn_logit_softcapping", None),
        logit_softcap=_cap(fields, "final_logit_softcapping", None),
    )
    dim, given = common["head_dim"], fields.raw.get("rope_parameters") or {}
    local = dict(given.get(_SLIDING) or {})
    local.setdefault("rope_theta", fields.get("rope_local_base_freq", 10_000.0))
    ropes = {
        _FULL: _rope(fields, dim, 1_000_000.0, _FULL),
        _SLIDING: _checked_rope(fields, local, dim),
    }
    pattern = fields.raw.get("sliding_window_pattern") or 6
    count = fields.size("num_hidden_layers")
    types = [_SLIDING if (number + 1) % pattern else _FULL for number in range(count)]
    return DecoderConfig(**common, **_mixed(fields, ropes, types))


def _phi3(fields: Fields) -> DecoderConfig:
    common = _common(fields, fused=True, norm_eps=fields.number("rms_norm_eps", 1e-5))
    scaling = {
        **(fields.raw.get("rope_scaling") or {}),
        **(fields.raw.get("rope_parameters") or {}),
    }
    original = fields.get("original_max_position_embeddings", None)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("su", "yarn"):  # What the first releases call longrope.
        kind = "longrope"
    parameters = {**scaling, "rope_type": kind}
    parameters.pop("type", None)
    for name, value in (
        ("rope_theta", fields.raw.get("rope_theta") or 10_000.0),
        ("partial_rotary_factor", fields.raw.get("partial_rotary_factor") or 1.0),
        ("original_max_position_embeddings", original),
    ):
        parameters.setdefault(name, value)
    made = _checked_rope(fields, parameters, common["head_dim"])
    window = fields.window("sliding_window", None)
    return DecoderConfig(**common, **_alike(fields, Kind(window=window, rope=made)))


def _smollm3(fields: Fields) -> DecoderConfig:
    common = _common(fields, tied=fields.flag("tie_word_embeddings", True))
    count, every = fields.size("num_hidden_layers"), fields.size("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers", None)
    rotated = [bool((n + 1) % every) for n in range(count)] if rotated is None else rotated
    made = _rope(fields, common["head_dim"], 2_000_000.0)
    slides = fields.flag("use_sliding_window", False)
    types = fields.raw.get("layer_types") or [
        _SLIDING if slides and not turned else _FULL for turned in rotated
    ]
    every_kind = [
        Kind(
            window=fields.size("sliding_window") if one == _SLIDING else None,
            rope=made if turned else None,
        )
        for one, turned in zip(types, rotated, strict=True)
    ]
    kinds = list(dict.fromkeys(every_kind))
    bias = fields.flag("attention_bias", False)
    return DecoderConfig(
        **common,
        kinds=tuple(kinds),
        layers=tuple(kinds.index(kind) for kind in every_kind),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


ARCHITECTURES: dict[str, Callable[[Fields], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
}
