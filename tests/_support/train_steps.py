"""Decoders of any size and their LoRA training step, for tests of meshes and plans."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

import jlora
from jlora.models.decoder import Decoder
from jlora.models.decoder_config import DecoderConfig, LayerKind
from jlora.models.rope import rope_from_config
from jlora.training import sharding

# All axis sizes differ; a batch of 8 and a width of 16 can be sharded over 8 devices.
TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 4,
    "num_layers": 3,
}


def decoder(size: dict[str, int] = TINY, **fields: Any) -> Decoder:
    """A Llama decoder."""
    dim = size["head_dim"]
    kind = LayerKind(
        rope=rope_from_config({"rope_theta": 5e5}, head_dim=dim, max_position_embeddings=8192)
    )
    config = DecoderConfig(
        **{name: value for name, value in size.items() if name != "num_layers"},
        layer_kind_ids=(0,) * size["num_layers"],
        layer_kinds=(kind,),
        max_seq_length=8192,
        query_scale=dim**-0.5,
    )
    return Decoder(config, **fields)


class Step(NamedTuple):
    """A training step, and the shapes and shardings of its arguments."""

    run: Any  # Jitted; donates the adapter and the optimizer state.
    weights: Any
    adapter: Any
    optimizer: Any
    batch: Any

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.weights, self.adapter, self.optimizer, self.batch

    @property
    def groups(self) -> dict[str, Any]:
        return dict(zip(("weights", "adapter", "optimizer", "batch"), self.arguments, strict=True))


def transform(model: Decoder, rules: Any, chunks: int = 8) -> jlora.LoraTransform:
    """LoRA around the mean loss of a batch."""

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        ids, targets = batch["input_ids"], batch["targets"]
        return model.apply(params, ids, targets, method="losses", chunks=chunks).mean()  # type: ignore

    return jlora.lora_transform(loss, rules)


def step(
    model: Decoder, mesh: Any, *, rows: int, length: int, rank: int, dtype: Any, chunks: int = 8
) -> Step:
    """A step of AdamW with LoRA on every kernel of the layers, without allocated arrays."""
    lora = transform(model, {"layers.*kernel": jlora.LoRA(rank=rank, alpha=2 * rank)}, chunks)
    optimizer = optax.adamw(1e-4)
    sharding.check_batch_size(mesh, rows)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    weights = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), token))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), weights)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"input_ids": ids, "targets": ids}
    adapter = jax.eval_shape(lora.init, jax.random.key(0), weights, batch)
    state = jax.eval_shape(optimizer.init, adapter)

    def run(weights: Any, adapter: Any, state: Any, batch: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda a: lora.apply(weights, a, batch))(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    weight_specs = sharding.weight_specs(model, token)
    adapter_specs = sharding.adapter_specs(adapter, weight_specs)
    state_specs = sharding.opt_state_specs(state, adapter, adapter_specs)
    batch_shardings = jax.tree.map(lambda _: sharding.make_batch_sharding(mesh), batch)
    shardings = [
        sharding.make_tree_shardings(mesh, weights, weight_specs),
        sharding.make_tree_shardings(mesh, adapter, adapter_specs),
        sharding.make_tree_shardings(mesh, state, state_specs),
        batch_shardings,
    ]
    arguments = [
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, tree_shardings
        )
        for tree, tree_shardings in zip((weights, adapter, state, batch), shardings, strict=True)
    ]
    jitted = jax.jit(run, donate_argnums=(1, 2), out_shardings=(*shardings[1:3], None))
    return Step(jitted, *arguments)
