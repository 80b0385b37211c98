"""From the config.json of an encoder's checkpoint to `EncoderConfig` or `ViTConfig`.

Which head there is says the field `architectures`, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jlora.models.encoder import EncoderConfig
from jlora.models.hf.config_reader import REQUIRED_VALUES, ConfigReader
from jlora.models.vit import ViTConfig

HeadType = Literal["none", "sequence", "tokens", "image"]

# What follows a model's name in `architectures`. The heads of pretraining are no part of the models
# here: such a checkpoint is the encoder alone, and its other tensors are carried along.
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

# Says nothing about what the forward pass of an encoder computes.
_IGNORED_ENCODER_FIELDS = (
    "_num_labels",
    "directionality",
    "encoder_stride",
    "finetuning_task",
    "gradient_checkpointing",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "qa_dropout",
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "sinusoidal_pos_embds",  # Their values are in the checkpoint.
    "tie_weights_",
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
    """The shape of the encoder of texts that a config.json describes.

    Args:
        config_dict: The fields of the config.json.
        location: What errors call it.
        has_pooler: Whether the checkpoint has one; transformers makes up what is missing of it.

    Raises:
        ValueError: The model type, the head, or something that a field asks for, is not
            implemented.
    """
    return _parse_encoder_config(config_dict, location, ENCODER_PARSERS, has_pooler)


def vit_config(
    config_dict: Mapping[str, Any], location: str = "config.json", *, has_pooler: bool = True
) -> ViTConfig:
    """The shape of the vision transformer that a config.json describes.

    Args:
        config_dict: The fields of the config.json.
        location: What errors call it.
        has_pooler: Whether the checkpoint has one.

    Raises:
        ValueError: The model type, the head, or something that a field asks for, is not
            implemented.
    """
    return _parse_encoder_config(config_dict, location, {"vit": _parse_vit}, has_pooler)


def _parse_encoder_config(
    config_dict: Mapping[str, Any], location: str, parsers: Mapping[str, Any], has_pooler: bool
) -> Any:
    kind = config_dict.get("model_type", "")
    if kind not in parsers:
        raise ValueError(
            f"{location}: model_type={kind!r} is not implemented; {sorted(parsers)} are."
        )
    fields = ConfigReader(config_dict, location, _IGNORED_ENCODER_FIELDS)
    for name, only in _ENCODER_REQUIRED_VALUES.items():
        fields.require_value(name, only)
    config = parsers[kind](fields, has_pooler)
    fields.reject_unread_fields()
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"{location}: the width {config.hidden_size} (hidden_size or dim) does not split into "
            f"{config.num_heads} equal heads. Copy both from the config.json that the checkpoint "
            f"came with."
        )
    return config


def _parse_head_type(
    reader: ConfigReader, class_prefix: str, head_suffixes: Mapping[str, HeadType]
) -> HeadType:
    """The head that `architectures` names; none where it names nothing."""
    names = reader.get("architectures", [])
    if not names:
        return "none"
    known: dict[str, HeadType] = {
        class_prefix + ending: head for ending, head in head_suffixes.items()
    }
    if len(names) != 1 or names[0] not in known:
        raise ValueError(
            f"{reader.location}: architectures={names} is not implemented; one of {sorted(known)} is. "
            f"For the encoder without a head, say ['{class_prefix}Model'] in a copy of the folder, without "
            f"the head's tensors."
        )
    return known[names[0]]


def _parse_num_labels(reader: ConfigReader) -> int:
    """Between how many a head chooses; two where nothing says so."""
    names = reader.get("id2label", {})
    return len(names) if names else reader.get_positive_int("num_labels", 2)


def _parse_bert(
    reader: ConfigReader, has_pooler: bool, class_prefix: str = "Bert", **overrides: Any
) -> EncoderConfig:
    """BERT: a pooler, and a head on it or on each token."""
    head = _parse_head_type(reader, class_prefix, _TEXT_HEADS)
    dropout = reader.get_float("hidden_dropout_prob", 0.1)
    config = {
        "vocab_size": reader.get_positive_int("vocab_size"),
        "hidden_size": reader.get_positive_int("hidden_size"),
        "intermediate_size": reader.get_positive_int("intermediate_size"),
        "num_layers": reader.get_positive_int("num_hidden_layers"),
        "num_heads": reader.get_positive_int("num_attention_heads"),
        "max_position_embeddings": reader.get_positive_int("max_position_embeddings"),
        "type_vocab_size": reader.get_positive_int("type_vocab_size", 2),
        "activation": reader.get_activation("hidden_act", "gelu"),
        "norm_eps": reader.get_float("layer_norm_eps", 1e-12),
        "dropout": dropout,
        "attention_dropout": reader.get_float("attention_probs_dropout_prob", 0.1),
        "output_dropout": dropout,
        "pooler_activation": "tanh"
        if head == "sequence" or (head == "none" and has_pooler)
        else None,
        "num_labels": None if head == "none" else _parse_num_labels(reader),
        "is_token_classifier": head == "tokens",
        "classifier_dropout": reader.get_float("classifier_dropout", dropout),
    }
    return EncoderConfig(model_type=reader.config_dict["model_type"], **{**config, **overrides})


def _parse_roberta(
    reader: ConfigReader, has_pooler: bool, class_prefix: str = "Roberta"
) -> EncoderConfig:
    """RoBERTa: positions that padding does not take, and a head with a dense layer of its own."""
    pad = reader.get("pad_token_id", 1)
    if (
        type(pad) is not int
        or not 0 <= pad < reader.get_positive_int("max_position_embeddings") - 1
    ):
        raise ValueError(
            f"{reader.location}: pad_token_id={pad!r} leaves no positions, which count from the "
            f"number after it. Copy it from the config.json that the checkpoint came with."
        )
    config = _parse_bert(reader, has_pooler, class_prefix, pad_token_id=pad)
    if config.num_labels is None or config.is_token_classifier:
        return config
    return dataclasses.replace(config, pooler_dropout=config.classifier_dropout)


def _parse_xlm_roberta(reader: ConfigReader, has_pooler: bool) -> EncoderConfig:
    return _parse_roberta(reader, has_pooler, "XLMRoberta")


def _parse_distilbert(reader: ConfigReader, has_pooler: bool) -> EncoderConfig:
    """DistilBERT: no token types, and a head with a dense layer of its own."""
    head = _parse_head_type(reader, "DistilBert", _TEXT_HEADS)
    dropout = reader.get_float("dropout", 0.1)
    of_texts = reader.get_float("seq_classif_dropout", 0.2)
    return EncoderConfig(
        model_type=reader.config_dict["model_type"],
        vocab_size=reader.get_positive_int("vocab_size"),
        hidden_size=reader.get_positive_int("dim"),
        intermediate_size=reader.get_positive_int("hidden_dim"),
        num_layers=reader.get_positive_int("n_layers"),
        num_heads=reader.get_positive_int("n_heads"),
        max_position_embeddings=reader.get_positive_int("max_position_embeddings"),
        type_vocab_size=0,
        activation=reader.get_activation("activation", "gelu"),
        dropout=dropout,
        attention_dropout=reader.get_float("attention_dropout", 0.1),
        output_dropout=0.0,
        pooler_activation="relu" if head == "sequence" else None,
        num_labels=None if head == "none" else _parse_num_labels(reader),
        is_token_classifier=head == "tokens",
        classifier_dropout=of_texts if head == "sequence" else dropout,
    )


def _parse_vit(reader: ConfigReader, has_pooler: bool) -> ViTConfig:
    head = _parse_head_type(reader, "ViT", _IMAGE_HEADS)
    width = reader.get_positive_int("hidden_size")
    activation = reader.get_activation("pooler_act", "tanh")
    size = reader.get_positive_int("pooler_output_size", width)
    pooled = head == "none" and has_pooler
    return ViTConfig(
        image_size=_parse_height_width(reader, "image_size", 224),
        patch_size=_parse_height_width(reader, "patch_size", 16),
        num_channels=reader.get_positive_int("num_channels", 3),
        hidden_size=width,
        intermediate_size=reader.get_positive_int("intermediate_size"),
        num_layers=reader.get_positive_int("num_hidden_layers"),
        num_heads=reader.get_positive_int("num_attention_heads"),
        qkv_bias=bool(reader.get("qkv_bias", True)),
        activation=reader.get_activation("hidden_act", "gelu"),
        norm_eps=reader.get_float("layer_norm_eps", 1e-12),
        dropout=reader.get_float("hidden_dropout_prob", 0.0),
        attention_dropout=reader.get_float("attention_probs_dropout_prob", 0.0),
        pooler_activation=activation if pooled else None,
        pooler_output_size=size if pooled else 0,
        num_labels=None if head == "none" else _parse_num_labels(reader),
    )


def _parse_height_width(reader: ConfigReader, name: str, default: int) -> tuple[int, int]:
    """Height and width, which one number may stand for."""
    value = reader.get(name, default)
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(
            f"{reader.location}: {name}={value!r} is no size. Copy a positive whole number, or two, "
            f"from the config.json that the checkpoint came with."
        )
    return sides


ENCODER_PARSERS: dict[str, Callable[[ConfigReader, bool], EncoderConfig]] = {
    "bert": _parse_bert,
    "roberta": _parse_roberta,
    "xlm-roberta": _parse_xlm_roberta,
    "distilbert": _parse_distilbert,
}
