"""From the config.json of an encoder's checkpoint to `EncoderConfig` or `ViTConfig`.

Which head there is says the field `architectures`, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jlora.models.encoder import EncoderConfig
from jlora.models.fields import NEVER, Fields
from jlora.models.vit import ViTConfig

Head = Literal["none", "sequence", "tokens", "image"]

# What follows a model's name in `architectures`. The heads of pretraining are no part of the models
# here: such a checkpoint is the encoder alone, and its other tensors are carried along.
_OF_TEXTS: dict[str, Head] = {
    "Model": "none",
    "ForPreTraining": "none",
    "ForMaskedLM": "none",
    "ForNextSentencePrediction": "none",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
}
_OF_IMAGES: dict[str, Head] = {
    "Model": "none",
    "ForMaskedImageModeling": "none",
    "ForImageClassification": "image",
}

# Says nothing about what the forward pass of an encoder computes.
_HARMLESS = (
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
_NEVER: dict[str, Any] = {
    **NEVER,
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
}


def encoder_config(
    raw: Mapping[str, Any], where: str = "config.json", *, pooler: bool = True
) -> EncoderConfig:
    """The shape of the encoder of texts that a config.json describes.

    Args:
        raw: The fields of the config.json.
        where: What errors call it.
        pooler: Whether the checkpoint has one; transformers makes up what is missing of it.

    Raises:
        ValueError: The model type, the head, or something that a field asks for, is not
            implemented.
    """
    return _config(raw, where, ENCODERS, pooler)


def vit_config(
    raw: Mapping[str, Any], where: str = "config.json", *, pooler: bool = True
) -> ViTConfig:
    """The shape of the vision transformer that a config.json describes.

    Args:
        raw: The fields of the config.json.
        where: What errors call it.
        pooler: Whether the checkpoint has one.

    Raises:
        ValueError: The model type, the head, or something that a field asks for, is not
            implemented.
    """
    return _config(raw, where, {"vit": _vit}, pooler)


def _config(raw: Mapping[str, Any], where: str, known: Mapping[str, Any], pooler: bool) -> Any:
    kind = raw.get("model_type", "")
    if kind not in known:
        raise ValueError(f"{where}: model_type={kind!r} is not implemented; {sorted(known)} are.")
    fields = Fields(raw, where, _HARMLESS)
    for name, only in _NEVER.items():
        fields.only(name, only)
    config = known[kind](fields, pooler)
    fields.rest()
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"{where}: the width {config.hidden_size} (hidden_size or dim) does not split into "
            f"{config.num_heads} equal heads. Copy both from the config.json that the checkpoint "
            f"came with."
        )
    return config


def _head(fields: Fields, stem: str, heads: Mapping[str, Head]) -> Head:
    """The head that `architectures` names; none where it names nothing."""
    names = fields.get("architectures", [])
    if not names:
        return "none"
    known: dict[str, Head] = {stem + ending: head for ending, head in heads.items()}
    if len(names) != 1 or names[0] not in known:
        raise ValueError(
            f"{fields.where}: architectures={names} is not implemented; one of {sorted(known)} is. "
            f"For the encoder without a head, say ['{stem}Model'] in a copy of the folder, without "
            f"the head's tensors."
        )
    return known[names[0]]


def _labels(fields: Fields) -> int:
    """Between how many a head chooses; two where nothing says so."""
    names = fields.get("id2label", {})
    return len(names) if names else fields.size("num_labels", 2)


def _bert(fields: Fields, pooler: bool, stem: str = "Bert", **over: Any) -> EncoderConfig:
    """BERT: a pooler, and a head on it or on each token."""
    head = _head(fields, stem, _OF_TEXTS)
    dropout = fields.number("hidden_dropout_prob", 0.1)
    config = {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": fields.size("hidden_size"),
        "intermediate_size": fields.size("intermediate_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": fields.size("num_attention_heads"),
        "positions": fields.size("max_position_embeddings"),
        "types": fields.size("type_vocab_size", 2),
        "activation": fields.activation("hidden_act", "gelu"),
        "norm_eps": fields.number("layer_norm_eps", 1e-12),
        "dropout": dropout,
        "attention_dropout": fields.number("attention_probs_dropout_prob", 0.1),
        "output_dropout": dropout,
        "pooler": "tanh" if head == "sequence" or (head == "none" and pooler) else None,
        "labels": None if head == "none" else _labels(fields),
        "per_token": head == "tokens",
        "head_dropout": fields.number("classifier_dropout", dropout),
    }
    return EncoderConfig(model_type=fields.raw["model_type"], **{**config, **over})


def _roberta(fields: Fields, pooler: bool, stem: str = "Roberta") -> EncoderConfig:
    """RoBERTa: positions that padding does not take, and a head with a dense layer of its own."""
    pad = fields.get("pad_token_id", 1)
    if type(pad) is not int or not 0 <= pad < fields.size("max_position_embeddings") - 1:
        raise ValueError(
            f"{fields.where}: pad_token_id={pad!r} leaves no positions, which count from the "
            f"number after it. Copy it from the config.json that the checkpoint came with."
        )
    config = _bert(fields, pooler, stem, pad_token=pad)
    if config.labels is None or config.per_token:
        return config
    return dataclasses.replace(config, pooler_dropout=config.head_dropout)


def _xlm_roberta(fields: Fields, pooler: bool) -> EncoderConfig:
    return _roberta(fields, pooler, "XLMRoberta")


def _distilbert(fields: Fields, pooler: bool) -> EncoderConfig:
    """DistilBERT: no token types, and a head with a dense layer of its own."""
    head = _head(fields, "DistilBert", _OF_TEXTS)
    dropout = fields.number("dropout", 0.1)
    of_texts = fields.number("seq_classif_dropout", 0.2)
    return EncoderConfig(
        model_type=fields.raw["model_type"],
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("dim"),
        intermediate_size=fields.size("hidden_dim"),
        num_layers=fields.size("n_layers"),
        num_heads=fields.size("n_heads"),
        positions=fields.size("max_position_embeddings"),
        types=0,
        activation=fields.activation("activation", "gelu"),
        dropout=dropout,
        attention_dropout=fields.number("attention_dropout", 0.1),
        output_dropout=0.0,
        pooler="relu" if head == "sequence" else None,
        labels=None if head == "none" else _labels(fields),
        per_token=head == "tokens",
        head_dropout=of_texts if head == "sequence" else dropout,
    )


def _vit(fields: Fields, pooler: bool) -> ViTConfig:
    head = _head(fields, "ViT", _OF_IMAGES)
    width = fields.size("hidden_size")
    activation = fields.activation("pooler_act", "tanh")
    size = fields.size("pooler_output_size", width)
    pooled = head == "none" and pooler
    return ViTConfig(
        image_size=_sides(fields, "image_size", 224),
        patch_size=_sides(fields, "patch_size", 16),
        num_channels=fields.size("num_channels", 3),
        hidden_size=width,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=fields.size("num_attention_heads"),
        qkv_bias=bool(fields.get("qkv_bias", True)),
        activation=fields.activation("hidden_act", "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        dropout=fields.number("hidden_dropout_prob", 0.0),
        attention_dropout=fields.number("attention_probs_dropout_prob", 0.0),
        pooler=activation if pooled else None,
        pooler_size=size if pooled else 0,
        labels=None if head == "none" else _labels(fields),
    )


def _sides(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """Height and width, which one number may stand for."""
    value = fields.get(name, default)
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(
            f"{fields.where}: {name}={value!r} is no size. Copy a positive whole number, or two, "
            f"from the config.json that the checkpoint came with."
        )
    return sides


ENCODERS: dict[str, Callable[[Fields, bool], EncoderConfig]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _xlm_roberta,
    "distilbert": _distilbert,
}
