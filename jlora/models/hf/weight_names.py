"""Tensor names of Hugging Face checkpoints for the weights of decoders, encoders and ViTs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora import _tree
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder
from jlora.models.hf.weight_mapping import (
    CheckpointWeight,
    concatenate_weights,
    single_tensor_weight,
    stack_weights,
)
from jlora.models.vit import ViT

# Names of a layer's modules in a checkpoint, after `model.layers.{index}.`.
_DECODER_MODULE_NAMES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/qkv": "self_attn.qkv_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/gate_up": "mlp.gate_up_proj",
    "mlp/down": "mlp.down_proj",
    "moe/router": "mlp.gate",
    "mlp_norm": "post_attention_layernorm",
}

# With post-norms, the same names stand for other norms.
_POST_NORM_MODULE_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}

PARAM_SUFFIXES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}


def eval_param_shapes(
    model: nn.Module, *inputs: jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of every parameter, by path, without logical axis names.

    Args:
        model: Model, whose parameters are not allocated.
        *inputs: Abstract values of the inputs. None are needed for one token.
    """
    inputs = inputs or (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    flat = _tree.flatten_with_paths(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    return dict(zip(flat.paths, flat.leaves, strict=True))


def map_decoder_weights(model: Decoder) -> dict[str, CheckpointWeight]:
    """Returns the tensors that each weight of a decoder consists of, by path.

    Kernels (in, out) are tensors (out, in). Stacked layers and experts are many tensors. The gate
    and up kernels of an expert are concatenated.
    """
    config, weights = model.config, {}
    names = {**_DECODER_MODULE_NAMES, **(_POST_NORM_MODULE_NAMES if config.post_norms else {})}
    for path, leaf in eval_param_shapes(model).items():
        parts = path.split("/")[1:]  # Without the name of the collection.
        if parts[0] == "layers":
            layers = [
                _map_layer_weight(names, index, parts[1:], leaf.shape[1:])
                for index in range(len(config.layer_kind_ids))
            ]
            weights[path] = stack_weights(layers)
        elif parts[0].startswith("layers_"):
            index = int(parts[0].removeprefix("layers_"))
            weights[path] = _map_layer_weight(names, index, parts[1:], leaf.shape)
        elif parts == ["embed", "embedding"]:
            weights[path] = single_tensor_weight("model.embed_tokens.weight", leaf.shape)
        elif parts == ["norm", "scale"]:
            weights[path] = single_tensor_weight("model.norm.weight", leaf.shape)
        else:
            assert parts == ["head"], path
            weights[path] = single_tensor_weight("lm_head.weight", leaf.shape, (1, 0))
    return weights


def _map_layer_weight(
    module_names: Mapping[str, str], layer_index: int, path_parts: list[str], shape: tuple[int, ...]
) -> CheckpointWeight:
    """Returns the tensors of one weight of a layer."""
    prefix = f"model.layers.{layer_index}."
    if path_parts[0] == "moe" and len(path_parts) == 2:  # The kernels of the experts.
        num_experts, in_size, out_size = shape

        def kernel(expert: int, name: str, width: int) -> CheckpointWeight:
            key = f"{prefix}mlp.experts.{expert}.{name}.weight"
            return single_tensor_weight(key, (in_size, width), (1, 0))

        if path_parts[1] == "down":
            return stack_weights([kernel(e, "down_proj", out_size) for e in range(num_experts)])
        half = out_size // 2
        return stack_weights(
            [
                concatenate_weights([kernel(e, "gate_proj", half), kernel(e, "up_proj", half)])
                for e in range(num_experts)
            ]
        )
    key = f"{prefix}{module_names['/'.join(path_parts[:-1])]}.{PARAM_SUFFIXES[path_parts[-1]]}"
    return single_tensor_weight(key, shape, (1, 0) if path_parts[-1] == "kernel" else None)


KeyRenames = tuple[tuple[str, str], ...]  # Patterns and their replacements.


class CheckpointNaming(NamedTuple):
    """Tensor names in the checkpoints of one model type.

    Attributes:
        prefix: Prefix of all names except those of a head. Checkpoints without a head omit it.
        module_names: Names of modules, and of weights outside modules, after the prefix, by path.
        head_names: Complete names of the modules of a head for texts or images, by path.
        passthrough_pattern: Names of tensors that the model does not use.
        alternative_renames: Renames from these names to those of other releases.
    """

    prefix: str
    module_names: Mapping[str, str]
    head_names: Mapping[str, str]
    passthrough_pattern: re.Pattern[str]
    alternative_renames: KeyRenames = ()

    @property
    def key_renamers(self) -> tuple[Callable[[str], str], ...]:
        """Functions from names with the prefix to each form that a checkpoint may have."""
        strip_prefix = ((rf"^{re.escape(self.prefix)}", ""),)
        alternative = self.alternative_renames
        forms = ((), strip_prefix, alternative, strip_prefix + alternative)
        return tuple(functools.partial(_apply_key_renames, renames) for renames in forms)

    def has_pooler(self, names: Iterable[str]) -> bool:
        """Whether a pooler is among the tensor names of a checkpoint."""
        pooler = re.compile(rf"({re.escape(self.prefix)})?pooler\.dense\..*")
        return any(pooler.fullmatch(name) for name in names)


def map_encoder_weights(model: Encoder, naming: CheckpointNaming) -> dict[str, CheckpointWeight]:
    """Returns the tensor of each weight of a text encoder, by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    head_names: Mapping[str, str] = {}
    if model.config.num_labels is not None:
        head_names = naming.head_names
        if model.config.is_token_classifier:
            head_names = {"classifier": "classifier"}
    return _map_module_weights(eval_param_shapes(model, tokens, tokens), naming, head_names)


def map_vit_weights(model: ViT, naming: CheckpointNaming) -> dict[str, CheckpointWeight]:
    """Returns the tensor of each weight of a vision transformer, by path."""
    c = model.config
    images = jax.ShapeDtypeStruct((1, *c.image_size, c.num_channels), jnp.float32)
    return _map_module_weights(eval_param_shapes(model, images), naming, naming.head_names)


# Axis of the tensor for each axis of a Flax kernel, by number of axes: (in, out) of (out, in), and
# (height, width, in, out) of (out, in, height, width).
_KERNEL_AXIS_ORDERS = {2: (1, 0), 4: (2, 3, 1, 0)}


def _map_module_weights(
    param_shapes: Mapping[str, jax.ShapeDtypeStruct],
    naming: CheckpointNaming,
    head_names: Mapping[str, str],
) -> dict[str, CheckpointWeight]:
    modules = {path: naming.prefix + name for path, name in naming.module_names.items()} | dict(
        head_names
    )
    weights = {}
    for path, leaf in param_shapes.items():
        indices = re.findall(r"layer_(\d+)/", path)
        template = re.sub(r"layer_\d+/", "layer_{}/", path.removeprefix("params/"))
        module, _, param = template.rpartition("/")
        if template in modules:
            key = modules[template]
        else:
            key = f"{modules[module]}.{PARAM_SUFFIXES[param]}"
        axis_order = _KERNEL_AXIS_ORDERS[len(leaf.shape)] if param == "kernel" else None
        weights[path] = single_tensor_weight(key.format(*indices), leaf.shape, axis_order)
    return weights


def _apply_key_renames(renames: KeyRenames, key: str) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


_BERT_MODULE_NAMES = {
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

_DISTILBERT_MODULE_NAMES = {
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

_VIT_MODULE_NAMES = {
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

# TensorFlow's names, which the first releases used.
_LEGACY_NORM_RENAMES = (
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
)

# Files have the names above; transformers 5 has these names in memory.
_VIT_IN_MEMORY_RENAMES = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)

_ROBERTA_NAMING = CheckpointNaming(
    "roberta.",
    _BERT_MODULE_NAMES,
    {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
    re.compile(r"(roberta\.)?(pooler\..*|embeddings\.position_ids)|lm_head\..*"),
    _LEGACY_NORM_RENAMES,
)

CHECKPOINT_NAMINGS = {
    "bert": CheckpointNaming(
        "bert.",
        _BERT_MODULE_NAMES,
        {"classifier": "classifier"},
        re.compile(r"(bert\.)?(pooler\..*|embeddings\.position_ids)|cls\..*"),
        _LEGACY_NORM_RENAMES,
    ),
    "roberta": _ROBERTA_NAMING,
    "xlm-roberta": _ROBERTA_NAMING,
    "distilbert": CheckpointNaming(
        "distilbert.",
        _DISTILBERT_MODULE_NAMES,
        {"pooler": "pre_classifier", "classifier": "classifier"},
        re.compile(
            r"(distilbert\.)?embeddings\.position_ids"
            r"|vocab_(transform|layer_norm|projector)\..*"
        ),
    ),
    "vit": CheckpointNaming(
        "vit.",
        _VIT_MODULE_NAMES,
        {"classifier": "classifier"},
        re.compile(r"(vit\.)?(pooler\..*|embeddings\.mask_token)|decoder\..*"),
        _VIT_IN_MEMORY_RENAMES,
    ),
}
