"""A decoder in Flax Linen for the checkpoints of Llama and its many relatives.

What differs between them is data in `DecoderConfig`; `jlora.models.architectures` makes one from a
checkpoint's config.json. Dense kernels are laid out (in, out).

References:
    Touvron et al., LLaMA, arXiv:2302.13971, section 2. The order of operations is that of the
    models in transformers, rounding included, but that rotary positions are applied in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.meta import PARTITION_NAME
from flax.linen import spmd
from flax.linen.dtypes import promote_dtype
from jax import lax

from jlora.kernels.lora_matmul import products_saveable
from jlora.models import attention as attending
from jlora.models.decoder_config import DecoderConfig
from jlora.models.layers import ACTIVATIONS, mark_invalid_ids, partitioned_init, remat_elementwise
from jlora.models.losses import chunked_cross_entropy, compute_logits
from jlora.models.rope import apply_rope

RematPolicy = Literal["none", "save_projections", "full"]

_REMAT_POLICIES: dict[str, Any] = {  # But "none".
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_projections": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, products_saveable
    ),
}


class KVCache(NamedTuple):
    """The keys and values that a decoder has seen.

    Attributes:
        keys: One per layer, (batch, kv_heads, capacity, head_dim); one stacked array if scanned.
        values: Likewise.
        segment_ids: (batch, capacity), 0 where there is no token.
        length: How many slots are taken, the same for every text.
    """

    keys: Any
    values: Any
    segment_ids: jax.Array
    length: jax.Array


class _AttentionContext(NamedTuple):
    """What all layers share."""

    rope_tables: tuple[tuple[jax.Array, jax.Array] | None, ...]  # One per kind.
    query_slots: jax.Array | None  # (1, length), with a cache
    segment_ids: jax.Array | None  # (batch, length)
    key_segment_ids: jax.Array | None  # (batch, capacity), with a cache
    cache_length: jax.Array | None  # Of what the cache holds


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, in float32."""

    eps: float
    offset: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        named = spmd.with_logical_partitioning(init, ("norm",))
        scale: Any = self.param("scale", named, (x.shape[-1],))
        return _rms_normalize(x, scale, self.eps, self.offset)


@remat_elementwise
def _rms_normalize(x: jax.Array, scale: jax.Array, eps: float, offset: bool) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    if offset:
        return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


@remat_elementwise
def _gated_activation(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


class Attention(nn.Module):
    """Grouped-query self-attention."""

    config: DecoderConfig
    dtype: Any
    attention_implementation: attending.AttentionImplementation | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kind: Any,
        context: _AttentionContext,
        kv: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=c.qkv_bias)
        if c.fused_projections:
            init = partitioned_init("embed", "qkv")
            qkv = dense(wide + 2 * narrow, name="qkv", kernel_init=init)(x)
            parts = jnp.split(qkv, (wide, wide + narrow), axis=-1)
        else:
            parts = (
                dense(wide, name="q", kernel_init=partitioned_init("embed", "heads"))(x),
                dense(narrow, name="k", kernel_init=partitioned_init("embed", "kv_heads"))(x),
                dense(narrow, name="v", kernel_init=partitioned_init("embed", "kv_heads"))(x),
            )
        query, key, value = (part.reshape(*x.shape[:2], -1, c.head_dim) for part in parts)
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(query)
            key = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(key)
        named = ("batch", "length", "heads", "head_dim")
        query, key, value = (spmd.with_logical_constraint(h, named) for h in (query, key, value))
        branches = [functools.partial(self._attend, number) for number in range(len(c.layer_kinds))]
        if len(branches) == 1 or isinstance(kind, int):
            number = kind if isinstance(kind, int) else 0
            out, kv = branches[number](query, key, value, context, kv)
        else:  # Under a scan, where the layers' kinds are data.
            out, kv = lax.switch(kind, branches, query, key, value, context, kv)
        out = out.reshape(*x.shape[:2], wide)
        init = partitioned_init("heads", "embed")
        dense = nn.Dense(c.hidden_size, c.output_bias, self.dtype, kernel_init=init, name="o")
        return dense(out), kv

    def _attend(
        self,
        kind: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        context: _AttentionContext,
        kv: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """What the queries gather, and the cache with the new keys and values."""
        table = context.rope_tables[kind]
        if table is not None:
            query, key = apply_rope(query, table), apply_rope(key, table)
        if kv is not None:
            assert context.cache_length is not None
            start = (0, 0, context.cache_length, 0)
            keys, values = (
                lax.dynamic_update_slice(held, jnp.swapaxes(new, 1, 2).astype(held.dtype), start)
                for held, new in zip(kv, (key, value), strict=True)
            )
            kv = keys, values
            key, value = (jnp.swapaxes(held, 1, 2).astype(query.dtype) for held in kv)
        out = attending.attend(
            query,
            key,
            value,
            scale=self.config.query_scale,
            query_slots=context.query_slots,
            query_segment_ids=context.segment_ids,
            key_segment_ids=context.key_segment_ids,
            window=self.config.layer_kinds[kind].window,
            softcap=self.config.attention_softcap,
            # Whatever makes weights may do so with a text of one token, which no kernel takes.
            implementation=None if self.is_initializing() else self.attention_implementation,
        )
        return out, kv


class Mlp(nn.Module):
    """The gated feed-forward."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=c.mlp_bias)
        init = partitioned_init("embed", "mlp")
        if c.fused_projections:
            both = dense(2 * c.intermediate_size, name="gate_up", kernel_init=init)(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = dense(c.intermediate_size, name="gate", kernel_init=init)(x)
            up = dense(c.intermediate_size, name="up", kernel_init=init)(x)
        inner = _gated_activation(gate, up, c.activation)
        inner = spmd.with_logical_constraint(inner, ("batch", "length", "mlp"))
        return dense(c.hidden_size, name="down", kernel_init=partitioned_init("mlp", "embed"))(
            inner
        )


class MixtureOfExperts(nn.Module):
    """Every token through the feed-forwards that a router chooses for it.

    References:
        Shazeer et al., arXiv:1701.06538, section 2, without noise: the router's softmax is over all
        experts, and no token is dropped.
    """

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, e = self.config, self.config.moe
        assert e is not None
        router = nn.Dense(
            e.num_experts,
            False,
            self.dtype,
            name="router",
            kernel_init=partitioned_init("embed", "experts"),
        )
        tokens = x.reshape(-1, c.hidden_size)
        chances = jax.nn.softmax(router(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(chances, e.num_experts_per_tok)  # (tokens, chosen)
        if e.norm_topk_prob:
            weights /= weights.sum(axis=-1, keepdims=True)
        # Rows in the order of their experts, so that one product takes all rows of an expert.
        order = jnp.argsort(chosen.reshape(-1))
        rows = tokens[order // e.num_experts_per_tok]
        sizes = jnp.bincount(chosen.reshape(-1), length=e.num_experts).astype(jnp.int32)
        wide = (e.num_experts, c.hidden_size, 2 * e.intermediate_size)
        narrow = (e.num_experts, e.intermediate_size, c.hidden_size)
        init = nn.initializers.lecun_normal(batch_axis=0)
        in_axes, out_axes = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        gate_up = self.param("gate_up", spmd.with_logical_partitioning(init, in_axes), wide)
        down = self.param("down", spmd.with_logical_partitioning(init, out_axes), narrow)
        rows, gate_up, down = promote_dtype(rows, gate_up, down, dtype=self.dtype)
        gate, up = jnp.split(lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
        out = lax.ragged_dot(_gated_activation(gate, up, c.activation), down, sizes)
        out *= weights.reshape(-1)[order][:, None].astype(out.dtype)
        return jnp.zeros_like(tokens).at[order // e.num_experts_per_tok].add(out).reshape(x.shape)


class Block(nn.Module):
    """One layer."""

    config: DecoderConfig
    is_moe: bool
    dtype: Any
    attention_implementation: attending.AttentionImplementation | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kind: Any,
        context: _AttentionContext,
        kv: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_eps, c.norm_offset)
        attention = Attention(c, self.dtype, self.attention_implementation, name="attention")
        out, kv = attention(norm(name="attention_norm")(x), kind, context, kv)
        x = x + (norm(name="post_attention_norm")(out) if c.post_norms else out)
        if self.is_moe:
            feed_forward: Any = MixtureOfExperts(c, self.dtype, name="moe")
        else:
            feed_forward = Mlp(c, self.dtype, name="mlp")
        out = feed_forward(norm(name="mlp_norm")(x))
        x = x + (norm(name="post_mlp_norm")(out) if c.post_norms else out)
        return spmd.with_logical_constraint(x, ("batch", "length", "embed")), kv


class Decoder(nn.Module):
    """The decoder; `model.apply(params, input_ids)` gives its logits.

    Attributes:
        config: Its shape.
        scan_layers: Whether layers are one program over stacked weights, which compiles in the time of
            one layer; else each has weights of its own.
        remat_policy: What the backward pass computes again: "none"; all but the outputs of
            the projections ("save_projections"); all inside a layer ("full").
        dtype: Of the computation; that of the weights when None.
        attention_implementation: Of attention, see `attention.attend`.
    """

    config: DecoderConfig
    scan_layers: bool = False
    remat_policy: RematPolicy = "none"
    dtype: Any = None
    attention_implementation: attending.AttentionImplementation | None = None

    @property
    def can_scan_layers(self) -> bool:
        """Whether the weights of all layers can be stacked."""
        return len(set(self._is_moe_layer)) == 1

    @property
    def _is_moe_layer(self) -> list[bool]:
        return [
            number in self.config.moe_layers for number in range(len(self.config.layer_kind_ids))
        ]

    def setup(self) -> None:
        c = self.config
        block: Any = Block
        if self.remat_policy != "none":
            if self.remat_policy not in _REMAT_POLICIES:
                raise ValueError(
                    f"remat_policy={self.remat_policy!r} must be one of {['none', *_REMAT_POLICIES]}."
                )
            # A scan needs no barrier against undoing the recomputation.
            static = () if self.scan_layers else (2,)
            block = nn.remat(
                Block,
                policy=_REMAT_POLICIES[self.remat_policy],
                prevent_cse=not self.scan_layers,
                static_argnums=static,
            )
        sparse = self._is_moe_layer
        rest = {"dtype": self.dtype, "attention_implementation": self.attention_implementation}
        if self.scan_layers:
            if not self.can_scan_layers:
                raise ValueError(
                    "scan_layers=True stacks the weights of all layers, and some of these are mixtures "
                    "of experts while others are not. Use scan_layers=False."
                )
            axes: Any = (0, nn.broadcast, 0)  # Of the layer's kind, what all share, and its cache.
            scan = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=axes,
                length=len(c.layer_kind_ids),
                metadata_params={PARTITION_NAME: "layers"},
            )
            self.layers: Any = scan(c, sparse[0], **rest)
        else:
            self.layers = [block(c, is_sparse, **rest) for is_sparse in sparse]
        self.embed = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            embedding_init=spmd.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocab", "embed")
            ),
        )
        self.norm = RMSNorm(c.norm_eps, c.norm_offset)
        if not c.tie_word_embeddings:
            shape = (c.hidden_size, c.vocab_size)
            self.head = self.param("head", partitioned_init("embed", "vocab"), shape)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Logits (batch, length, vocabulary) in float32, and with a cache the cache grown.

        Args:
            input_ids: (batch, length) token numbers; one that is no token makes its text NaN.
            attention_mask: (batch, length), 0 or False for padding. Several texts packed into a row have
                numbers 1, 2, ..., and none sees another.
            positions: (batch, length), where in its text each token stands; counted from the first
                token of every text when left out.
            cache: What `init_cache` or a call before returned. Texts must be aligned in it: all
                rows take the same slots, padding included.
        """
        hidden, cache = self._forward(input_ids, attention_mask, positions, cache)
        logits = compute_logits(hidden, self._lm_head_kernel(), self.config.logit_softcap)
        logits = spmd.with_logical_constraint(logits, ("batch", "length", "vocab"))
        return logits if cache is None else (logits, cache)

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The normalised hidden states (batch, length, width), before the head."""
        return self._forward(input_ids, attention_mask, positions, None)[0]

    def losses(
        self,
        input_ids: jax.Array,
        targets: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        chunks: int = 8,
    ) -> jax.Array:
        """Cross entropies (batch, length) of the targets, in nats and float32.

        The logits of all tokens are never held: they are computed for a part of every text at a
        time.

        Args:
            input_ids: As in a call.
            targets: (batch, length), the token that each position should predict.
            attention_mask: As in a call.
            positions: As in a call.
            chunks: Into how many parts texts are cut.
        """
        hidden = self.hidden_states(input_ids, attention_mask, positions)
        return chunked_cross_entropy(
            hidden,
            self._lm_head_kernel(),
            targets,
            chunks=chunks,
            softcap=self.config.logit_softcap,
        )

    def _lm_head_kernel(self) -> jax.Array:
        """The head's kernel (width, vocabulary)."""
        return self.embed.embedding.T if self.config.tie_word_embeddings else self.head

    def _forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        c = self.config
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids has shape {input_ids.shape} instead of (batch, length). Give one text "
                f"as input_ids[None]."
            )
        for name, given in (("attention_mask", attention_mask), ("positions", positions)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {given.shape}, input_ids {input_ids.shape}. Give one entry "
                    f"per token."
                )
        batch, length = input_ids.shape
        segments = None if attention_mask is None else attention_mask.astype(jnp.int32)
        if positions is None:
            if cache is not None:
                raise ValueError("A cache needs positions: (batch, length), one per token.")
            positions = _segment_positions(segments, input_ids.shape)
        tables = tuple(
            kind.rope.cos_sin(positions) if kind.rope else None for kind in c.layer_kinds
        )
        context = _AttentionContext(tables, None, segments, None, None)
        if cache is not None:
            if length > cache.segment_ids.shape[1]:
                raise ValueError(
                    f"{length} tokens do not fit into a cache for {cache.segment_ids.shape[1]}. Make "
                    f"it with a larger capacity."
                )
            segments = jnp.ones((batch, length), jnp.int32) if segments is None else segments
            held = lax.dynamic_update_slice(cache.segment_ids, segments, (0, cache.length))
            slots = cache.length + jnp.arange(length)[None]
            context = _AttentionContext(tables, slots, segments, held, cache.length)
            # JAX would write over the last slots and go on; an id that is none makes NaN.
            input_ids = jnp.where(cache.length + length > held.shape[1], -1, input_ids)
            cache = cache._replace(segment_ids=held, length=cache.length + length)
        x = self.embed(mark_invalid_ids(input_ids, c.vocab_size))
        if c.embed_scale is not None:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        x = spmd.with_logical_constraint(x, ("batch", "length", "embed"))
        if self.scan_layers:
            stacked = None if cache is None else (cache.keys, cache.values)
            x, stacked = self.layers(x, jnp.array(c.layer_kind_ids), context, stacked)
        else:
            pairs: list[Any] = []
            for number, (layer, kind) in enumerate(zip(self.layers, c.layer_kind_ids, strict=True)):
                pair = None if cache is None else (cache.keys[number], cache.values[number])
                x, pair = layer(x, kind, context, pair)
                pairs.append(pair)
            stacked = None if cache is None else tuple(zip(*pairs, strict=True))
        if cache is not None:
            assert stacked is not None
            cache = cache._replace(keys=stacked[0], values=stacked[1])
        return self.norm(x), cache


def init_cache(
    model: Decoder, batch_size: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> KVCache:
    """A cache without tokens.

    Args:
        model: The decoder that it is for.
        batch_size: How many texts.
        capacity: How many slots each has; a call that runs past them returns NaN.
        dtype: Of the keys and values held.
    """
    c = model.config
    # A head's keys lie together: a step reads them as they lie, and copies none.
    shape = (batch_size, c.num_kv_heads, capacity, c.head_dim)
    count = len(c.layer_kind_ids)

    def empty() -> Any:
        if model.scan_layers:
            return jnp.zeros((count, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(count))

    segments = jnp.zeros((batch_size, capacity), jnp.int32)
    return KVCache(empty(), empty(), segments, jnp.zeros((), jnp.int32))


def _segment_positions(segment_ids: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    """Of every token (batch, length), how many of its own segment stand before it in a row."""
    slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is None:
        return slots
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return slots - lax.cummax(jnp.where(segment_ids != before, slots, 0), axis=1)
