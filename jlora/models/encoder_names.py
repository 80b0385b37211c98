"""Which tensors of a Hugging Face checkpoint the weights of an encoder are."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.checkpoints.pieces import Weight, whole
from jlora.models.encoder import Encoder
from jlora.models.names import LEAVES, shapes
from jlora.models.vit import ViT

Renaming = tuple[tuple[str, str], ...]  # Patterns, and what is put in their places.


class Naming(NamedTuple):
    """How the checkpoints of one model type name their tensors.

    Attributes:
        prefix: Of all names but a head's. Checkpoints without a head leave it out.
        modules: Of each module, or weight that is no module's, the name after the prefix.
        head: Of the modules of a head for texts or images, the whole names.
        carried: The names of tensors that the model does not compute with.
        also: From these names to those that other releases wrote.
    """

    prefix: str
    modules: Mapping[str, str]
    head: Mapping[str, str]
    carried: re.Pattern[str]
    also: Renaming = ()

    @property
    def spellings(self) -> tuple[Callable[[str], str], ...]:
        """From the names with their prefix to each form that a checkpoint may have."""
        bare = ((rf"^{re.escape(self.prefix)}", ""),)
        forms = ((), bare, self.also, bare + self.also)
        return tuple(functools.partial(_renamed, form) for form in forms)

    def has_pooler(self, names: Iterable[str]) -> bool:
        """Whether a pooler is among the names of a checkpoint's tensors."""
        pooler = re.compile(rf"({re.escape(self.prefix)})?pooler\.dense\..*")
        return any(pooler.fullmatch(name) for name in names)


def encoder_weights(model: Encoder, naming: Naming) -> dict[str, Weight]:
    """Of every weight of an encoder of texts, by path, the tensor of a checkpoint that it is."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    head = {}
    if model.config.labels is not None:
        head = {"classifier": "classifier"} if model.config.per_token else naming.head
    return _weights(shapes(model, tokens, tokens), naming, head)


def vit_weights(model: ViT, naming: Naming) -> dict[str, Weight]:
    """Of every weight of a vision transformer, by path, the tensor of a checkpoint that it is."""
    c = model.config
    images = jax.ShapeDtypeStruct((1, *c.image_size, c.num_channels), jnp.float32)
    return _weights(shapes(model, images), naming, naming.head)


# Of the axes of a kernel in Flax, which axis of the tensor each is: (in, out) of (out, in), and
# (height, width, in, out) of (out, in, height, width).
_ORDERS = {2: (1, 0), 4: (2, 3, 1, 0)}


def _weights(
    shapes: Mapping[str, jax.ShapeDtypeStruct], naming: Naming, head: Mapping[str, str]
) -> dict[str, Weight]:
    modules = {path: naming.prefix + name for path, name in naming.modules.items()} | dict(head)
    found = {}
    for path, leaf in shapes.items():
        numbers = re.findall(r"layer_(\d+)/", path)
        own = re.sub(r"layer_\d+/", "layer_{}/", path.removeprefix("params/"))
        module, _, kind = own.rpartition("/")
        name = modules[own] if own in modules else f"{modules[module]}.{LEAVES[kind]}"
        order = _ORDERS[len(leaf.shape)] if kind == "kernel" else None
        found[path] = whole(name.format(*numbers), leaf.shape, order)
    return found


def _renamed(renaming: Renaming, key: str) -> str:
    for pattern, replacement in renaming:
        key = re.sub(pattern, replacement, key)
    return key


_BERT = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layer_{}/attention/query": "encoder.layer.{}.attention.self.query",
    "layer_{}/attention/key": "encoder.layer.{}.attention.self.key",
    "layer_{}/attention/value": "encoder.layer.{}.attention.self.value",
    "layer_{}/attention/output": "encoder.layer.{}.attention.output.dense",
    "layer_{}/attention/norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layer_{}/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layer_{}/mlp/down": "encoder.layer.{}.output.dense",
    "layer_{}/mlp/norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
_DISTILBERT = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layer_{}/attention/query": "transformer.layer.{}.attention.q_lin",
    "layer_{}/attention/key": "transformer.layer.{}.attention.k_lin",
    "layer_{}/attention/value": "transformer.layer.{}.attention.v_lin",
    "layer_{}/attention/output": "transformer.layer.{}.attention.out_lin",
    "layer_{}/attention/norm": "transformer.layer.{}.sa_layer_norm",
    "layer_{}/mlp/up": "transformer.layer.{}.ffn.lin1",
    "layer_{}/mlp/down": "transformer.layer.{}.ffn.lin2",
    "layer_{}/mlp/norm": "transformer.layer.{}.output_layer_norm",
}
_VIT = {
    "embeddings/class": "embeddings.cls_token",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/patch": "embeddings.patch_embeddings.projection",
    "layer_{}/attention_norm": "encoder.layer.{}.layernorm_before",
    "layer_{}/attention/query": "encoder.layer.{}.attention.attention.query",
    "layer_{}/attention/key": "encoder.layer.{}.attention.attention.key",
    "layer_{}/attention/value": "encoder.layer.{}.attention.attention.value",
    "layer_{}/attention/output": "encoder.layer.{}.attention.output.dense",
    "layer_{}/mlp_norm": "encoder.layer.{}.layernorm_after",
    "layer_{}/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layer_{}/mlp/down": "encoder.layer.{}.output.dense",
    "norm": "layernorm",
    "pooler": "pooler.dense",
}
# TensorFlow's names, which the first releases kept.
_OLD_NORMS = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))
# Files have the names above; in memory transformers 5 has these.
_VIT_IN_MEMORY = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
_ROBERTA = Naming(
    "roberta.",
    _BERT,
    {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
    re.compile(r"(roberta\.)?(pooler\..*|embeddings\.position_ids)|lm_head\..*"),
    _OLD_NORMS,
)
NAMINGS = {
    "bert": Naming(
        "bert.",
        _BERT,
        {"classifier": "classifier"},
        re.compile(r"(bert\.)?(pooler\..*|embeddings\.position_ids)|cls\..*"),
        _OLD_NORMS,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Naming(
        "distilbert.",
        _DISTILBERT,
        {"pooler": "pre_classifier", "classifier": "classifier"},
        re.compile(
            r"(distilbert\.)?embeddings\.position_ids"
            r"|vocab_(transform|layer_norm|projector)\..*"
        ),
    ),
    "vit": Naming(
        "vit.",
        _VIT,
        {"classifier": "classifier"},
        re.compile(r"(vit\.)?(pooler\..*|embeddings\.mask_token)|decoder\..*"),
        _VIT_IN_MEMORY,
    ),
}
