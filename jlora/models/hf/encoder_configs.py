"""Parsers from an encoder's config.json to `EncoderConfig` or `ViTConfig`.

The field `architectures` determines the head, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jlora.models.encoder import EncoderConfig
from jlora.models.hf.config_reader import (
    MAX_LAYERS,
    REQUIRED_VALUES,
    ConfigReader,
    convert_to_value_error,
)
from jlora.models.vit import ViTConfig

HeadType = Literal["none", "sequence", "tokens", "image"]

# Suffixes of the class names in `architectures`. The models here have no pretraining heads: such a
# checkpoint is read as the encoder alone, and `save` copies the other tensors unchanged.
_TEXT_HEADS: dict[str, HeadType] = {
    "Model": "none",
    "ForPreTraining": "none",
    "ForMaskedLM": "none",
    "ForNextSentencePrediction": "none",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
}

_IMAGE_HEADS: dict[str, HeadType] = {
    "Model": "none",
    "ForMaskedImageModeling": "none",
    "ForImageClassification": "image",
}

# Fields of transformers that do not affect the forward pass of an encoder.
_IGNORED_ENCODER_FIELDS = (
    "encoder_stride",
    "num_labels",
    "pooler_act",
    "qa_dropout",
    "sinusoidal_pos_embds",  # Their values are in the checkpoint.
    "tie_word_embeddings",
)

_ENCODER_REQUIRED_VALUES: dict[str, Any] = {
    **REQUIRED_VALUES,
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
}


def encoder_config(
    config_dict: Mapping[str, Any], location: str = "config.json", *, has_pooler: bool = True
) -> EncoderConfig:
    """Returns the configuration of the text encoder that a config.json describes.

    Args:
        config_dict: Fields of the config.json.
        location: Name of the config.json in error messages.
        has_pooler: The checkpoint has a pooler. A config.json does not contain this: transformers
            initializes a missing pooler at random.

    Raises:
        ValueError: The model type, the head, or the value of a field is not implemented.
    """
    return _parse_encoder_config(config_dict, location, ENCODER_PARSERS, has_pooler)


def vit_config(
    config_dict: Mapping[str, Any], location: str = "config.json", *, has_pooler: bool = True
) -> ViTConfig:
    """Returns the configuration of the vision transformer that a config.json describes.

    Args:
        config_dict: Fields of the config.json.
        location: Name of the config.json in error messages.
        has_pooler: The checkpoint has a pooler.

    Raises:
        ValueError: The model type, the head, or the value of a field is not implemented.
    """
    return _parse_encoder_config(config_dict, location, {"vit": _parse_vit}, has_pooler)


def _parse_encoder_config(
    config_dict: Mapping[str, Any], location: str, parsers: Mapping[str, Any], has_pooler: bool
) -> Any:
    model_type = config_dict.get("model_type")
    if not isinstance(model_type, str) or model_type not in parsers:
        raise ValueError(
            f"{location}: model_type={model_type!r} is not implemented, must be one of "
            f"{sorted(parsers)}."
        )
    reader = ConfigReader(config_dict, location, _IGNORED_ENCODER_FIELDS)
    for name, value in _ENCODER_REQUIRED_VALUES.items():
        reader.require_value(name, value)
    with convert_to_value_error(location):
        config = parsers[model_type](reader, has_pooler)
    reader.warn_unread_fields()
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"{location}: the width {config.hidden_size} (hidden_size or dim) must be a multiple "
            f"of the number of heads, got {config.num_heads} heads. Copy both from the "
            f"checkpoint's original config.json."
        )
    return config


def _parse_head_type(
    reader: ConfigReader, class_prefix: str, head_suffixes: Mapping[str, HeadType]
) -> HeadType:
    """Returns the head that `architectures` names; "none" where it is missing or empty."""
    names = reader.get("architectures", [])
    if not names:
        return "none"
    heads: dict[str, HeadType] = {
        class_prefix + suffix: head for suffix, head in head_suffixes.items()
    }
    if len(names) != 1 or names[0] not in heads:
        raise ValueError(
            f"{reader.location}: architectures={names} is not implemented, must be one of "
            f"{sorted(heads)}. For the encoder without a head, set ['{class_prefix}Model'] in a "
            f"copy of the folder, and remove the tensors of the head."
        )
    return heads[names[0]]


def _parse_num_labels(reader: ConfigReader) -> int:
    """Returns the number of classes of a head; two by default, as in transformers."""
    counts: dict[str, int] = {}
    if reader.get_dict("id2label"):
        counts["the number of labels in id2label"] = len(reader.get_dict("id2label"))
    for name in ("num_labels", "_num_labels"):
        if reader.get(name, None) is not None:
            counts[name] = reader.get_positive_int(name)
    reader.require_equal(counts)
    return next(iter(counts.values()), 2)


def _parse_bert(
    reader: ConfigReader, has_pooler: bool, class_prefix: str = "Bert", **overrides: Any
) -> EncoderConfig:
    """Parses BERT: a pooler, and a head on it or on each token."""
    head = _parse_head_type(reader, class_prefix, _TEXT_HEADS)
    dropout = reader.get_rate("hidden_dropout_prob", 0.1)
    uses_pooler = head == "sequence" or (head == "none" and has_pooler)
    config = {
        "vocab_size": reader.get_positive_int("vocab_size"),
        "hidden_size": reader.get_positive_int("hidden_size"),
        "intermediate_size": reader.get_positive_int("intermediate_size"),
        "num_layers": reader.get_positive_int("num_hidden_layers", maximum=MAX_LAYERS),
        "num_heads": reader.get_positive_int("num_attention_heads"),
        "max_position_embeddings": reader.get_positive_int("max_position_embeddings"),
        "type_vocab_size": reader.get_positive_int("type_vocab_size", 2),
        "activation": reader.get_activation("hidden_act", "gelu"),
        "norm_eps": reader.get_float("layer_norm_eps", 1e-12),
        "dropout": dropout,
        "attention_dropout": reader.get_rate("attention_probs_dropout_prob", 0.1),
        "output_dropout": dropout,
        "pooler_activation": "tanh" if uses_pooler else None,
        "num_labels": None if head == "none" else _parse_num_labels(reader),
        "is_token_classifier": head == "tokens",
        "classifier_dropout": reader.get_rate("classifier_dropout", dropout),
    }
    return EncoderConfig(model_type=reader.config_dict["model_type"], **{**config, **overrides})


def _parse_roberta(
    reader: ConfigReader, has_pooler: bool, class_prefix: str = "Roberta"
) -> EncoderConfig:
    """Parses RoBERTa: positions that padding does not take, and a head with a dense layer."""
    pad_token_id = reader.get("pad_token_id", 1)
    num_positions = reader.get_positive_int("max_position_embeddings")
    if type(pad_token_id) is not int or not 0 <= pad_token_id < num_positions - 1:
        raise ValueError(
            f"{reader.location}: pad_token_id={pad_token_id!r} leaves no positions, which start at "
            f"pad_token_id + 1. Copy it from the checkpoint's original config.json."
        )
    config = _parse_bert(reader, has_pooler, class_prefix, pad_token_id=pad_token_id)
    if config.num_labels is None or config.is_token_classifier:
        return config
    return dataclasses.replace(config, pooler_dropout=config.classifier_dropout)


def _parse_xlm_roberta(reader: ConfigReader, has_pooler: bool) -> EncoderConfig:
    return _parse_roberta(reader, has_pooler, "XLMRoberta")


def _parse_distilbert(reader: ConfigReader, has_pooler: bool) -> EncoderConfig:
    """Parses DistilBERT: no token types, and a head with a dense layer."""
    for name, alias in (
        ("dim", "hidden_size"),
        ("n_heads", "num_attention_heads"),
        ("n_layers", "num_hidden_layers"),
    ):
        reader.get_same(name, alias)
    head = _parse_head_type(reader, "DistilBert", _TEXT_HEADS)
    dropout = reader.get_rate("dropout", 0.1)
    sequence_dropout = reader.get_rate("seq_classif_dropout", 0.2)
    return EncoderConfig(
        model_type=reader.config_dict["model_type"],
        vocab_size=reader.get_positive_int("vocab_size"),
        hidden_size=reader.get_positive_int("dim"),
        intermediate_size=reader.get_positive_int("hidden_dim"),
        num_layers=reader.get_positive_int("n_layers", maximum=MAX_LAYERS),
        num_heads=reader.get_positive_int("n_heads"),
        max_position_embeddings=reader.get_positive_int("max_position_embeddings"),
        type_vocab_size=0,
        activation=reader.get_activation("activation", "gelu"),
        dropout=dropout,
        attention_dropout=reader.get_rate("attention_dropout", 0.1),
        output_dropout=0.0,
        pooler_activation="relu" if head == "sequence" else None,
        num_labels=None if head == "none" else _parse_num_labels(reader),
        is_token_classifier=head == "tokens",
        classifier_dropout=sequence_dropout if head == "sequence" else dropout,
    )


def _parse_vit(reader: ConfigReader, has_pooler: bool) -> ViTConfig:
    head = _parse_head_type(reader, "ViT", _IMAGE_HEADS)
    hidden_size = reader.get_positive_int("hidden_size")
    pooler_activation = reader.get_activation("pooler_act", "tanh")
    pooler_output_size = reader.get_positive_int("pooler_output_size", hidden_size)
    uses_pooler = head == "none" and has_pooler
    return ViTConfig(
        image_size=_parse_height_width(reader, "image_size", 224),
        patch_size=_parse_height_width(reader, "patch_size", 16),
        num_channels=reader.get_positive_int("num_channels", 3),
        hidden_size=hidden_size,
        intermediate_size=reader.get_positive_int("intermediate_size"),
        num_layers=reader.get_positive_int("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=reader.get_positive_int("num_attention_heads"),
        qkv_bias=reader.get_bool("qkv_bias", True),
        activation=reader.get_activation("hidden_act", "gelu"),
        norm_eps=reader.get_float("layer_norm_eps", 1e-12),
        dropout=reader.get_rate("hidden_dropout_prob", 0.0),
        attention_dropout=reader.get_rate("attention_probs_dropout_prob", 0.0),
        pooler_activation=pooler_activation if uses_pooler else None,
        pooler_output_size=pooler_output_size if uses_pooler else 0,
        num_labels=None if head == "none" else _parse_num_labels(reader),
    )


def _parse_height_width(reader: ConfigReader, name: str, default: int) -> tuple[int, int]:
    """Returns a field that must be a height and width, or one integer for both."""
    value = reader.get(name, default)
    size = tuple(value) if isinstance(value, list) else (value, value)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(
            f"{reader.location}: {name}={value!r} must be a positive integer, or a list of two. "
            f"Copy it from the checkpoint's original config.json."
        )
    return size


ENCODER_PARSERS: dict[str, Callable[[ConfigReader, bool], EncoderConfig]] = {
    "bert": _parse_bert,
    "roberta": _parse_roberta,
    "xlm-roberta": _parse_xlm_roberta,
    "distilbert": _parse_distilbert,
}
