"""Which tensors of a Hugging Face checkpoint the weights of a decoder are."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora import tree
from jlora.checkpoints.pieces import Weight, side_by_side, stacked, whole
from jlora.models.decoder import Decoder

# Of a layer's modules: the name in a checkpoint, after `model.layers.{number}.`.
_MODULES = {
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
# Where what attention and feed-forward return is normalised too, the names mean other norms.
_WITH_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}


def shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of every weight, by path, without its axes' names.

    Args:
        model: Of which no weight is made.
        inputs: What it is called with; one token when left out.
    """
    inputs = inputs or (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    flat = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    return dict(zip(flat.paths, flat.leaves, strict=True))


def decoder_weights(model: Decoder) -> dict[str, Weight]:
    """Of every weight of the decoder, by path, the tensors of a checkpoint that it is.

    Kernels (in, out) are tensors (out, in); stacked layers and experts are many tensors; experts
    have their gate and up kernels side by side.
    """
    config, found = model.config, {}
    names = {**_MODULES, **(_WITH_POST_NORMS if config.post_norms else {})}
    for path, leaf in shapes(model).items():
        parts = path.split("/")[1:]  # Without the collection's name.
        if parts[0] == "layers":
            layers = range(len(config.layers))
            one = [_of_layer(names, number, parts[1:], leaf.shape[1:]) for number in layers]
            found[path] = stacked(one)
        elif parts[0].startswith("layers_"):
            number = int(parts[0].removeprefix("layers_"))
            found[path] = _of_layer(names, number, parts[1:], leaf.shape)
        elif parts == ["embed", "embedding"]:
            found[path] = whole("model.embed_tokens.weight", leaf.shape)
        elif parts == ["norm", "scale"]:
            found[path] = whole("model.norm.weight", leaf.shape)
        else:
            assert parts == ["head"], path
            found[path] = whole("lm_head.weight", leaf.shape, (1, 0))
    return found


def _of_layer(
    names: Mapping[str, str], number: int, parts: list[str], shape: tuple[int, ...]
) -> Weight:
    """One weight of a layer."""
    layer = f"model.layers.{number}."
    if parts[0] == "moe" and len(parts) == 2:  # The experts' own kernels.
        experts, rows, columns = shape

        def kernel(expert: int, name: str, width: int) -> Weight:
            return whole(f"{layer}mlp.experts.{expert}.{name}.weight", (rows, width), (1, 0))

        if parts[1] == "down":
            return stacked([kernel(expert, "down_proj", columns) for expert in range(experts)])
        half = columns // 2
        return stacked(
            [
                side_by_side([kernel(e, "gate_proj", half), kernel(e, "up_proj", half)])
                for e in range(experts)
            ]
        )
    key = f"{layer}{names['/'.join(parts[:-1])]}.{LEAVES[parts[-1]]}"
    return whole(key, shape, (1, 0) if parts[-1] == "kernel" else None)
