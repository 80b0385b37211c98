"""A decoder-only language model in Flax Linen for the checkpoints of the Llama family.

`DecoderConfig` holds the differences between architectures; `jlora.models.hf.decoder_configs` reads
one from a checkpoint's config.json. Dense kernels are laid out (in, out).

References:
    Touvron et al., LLaMA, arXiv:2302.13971, section 2. The order of operations is that of the
    models in transformers, rounding included, except that rotary positions are applied in float32.
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
from jlora.models.attention import AttentionImplementation, attend, make_case
from jlora.models.attention_kernels import AttentionCase, TextLayout
from jlora.models.decoder_config import DecoderConfig
from jlora.models.layers import (
    ACTIVATIONS,
    has_layout,
    mark_invalid_ids,
    partitioned_init,
    remat_elementwise,
)
from jlora.models.losses import chunked_cross_entropy, compute_logits
from jlora.models.rope import apply_rope

RematPolicy = Literal["none", "save_projections", "full"]

_REMAT_POLICIES: dict[str, Any] = {  # All except "none".
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_projections": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, products_saveable
    ),
}


class KVCache(NamedTuple):
    """Keys and values of the tokens that a decoder has processed.

    Attributes:
        keys: One array per layer, (batch, kv_heads, capacity, head_dim). With `scan_layers`, one
            array with a leading axis of layers.
        values: Same layout as `keys`.
        input_ids: (batch, capacity) token ids.
        segment_ids: (batch, capacity), 0 in slots without a token.
        positions: (batch, capacity), the position of each token in its text.
        length: Number of slots in use, the same for every text.

    Example:
        A prefill of three tokens, then one step:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> model = models.Decoder(config)
        >>> prompt = jnp.array([[3, 5, 2]])
        >>> params = jax.jit(model.init)(jax.random.key(0), prompt)
        >>> cache = models.init_cache(model, batch_size=1, capacity=8)
        >>> step = jax.jit(model.apply)
        >>> logits, cache = step(params, prompt, None, jnp.array([[0, 1, 2]]), cache)
        >>> logits, cache = step(params, jnp.array([[7]]), None, jnp.array([[3]]), cache)
        >>> int(cache.length)
        4
    """

    keys: Any
    values: Any
    input_ids: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    length: jax.Array


class _AttentionContext(NamedTuple):
    """Inputs of the attention that all layers share."""

    rope_tables: tuple[tuple[jax.Array, jax.Array] | None, ...]  # One per kind of layer.
    positions: jax.Array  # (batch, length)
    segment_ids: jax.Array | None  # (batch, length)
    # None without a cache:
    query_slots: jax.Array | None = None  # (1, length)
    key_segment_ids: jax.Array | None = None  # (batch, capacity)
    key_positions: jax.Array | None = None  # (batch, capacity)
    cache_length: jax.Array | None = None  # Slots in use before this call


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, in float32."""

    eps: float
    offset: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale: Any = self.param("scale", partitioned_init("norm", init=init), (x.shape[-1],))
        return _rms_normalize(x, scale, self.eps, self.offset)


@remat_elementwise
def _rms_normalize(x: jax.Array, scale: jax.Array, eps: float, offset: bool) -> jax.Array:
    normed = x.astype(jnp.float32)
    normed *= lax.rsqrt(jnp.mean(normed**2, axis=-1, keepdims=True) + eps)
    if offset:
        return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


@remat_elementwise
def _gated_activation(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


class Attention(nn.Module):
    """Grouped-query self-attention."""

    config: DecoderConfig
    dtype: Any
    attention_implementation: AttentionImplementation | None
    text_layout: TextLayout

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kind: Any,
        context: _AttentionContext,
        kv: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=c.qkv_bias)
        if c.fused_projections:
            init = partitioned_init("embed", "qkv")
            qkv = dense(q_size + 2 * kv_size, name="qkv", kernel_init=init)(x)
            projections = jnp.split(qkv, (q_size, q_size + kv_size), axis=-1)
        else:
            projections = (
                dense(q_size, name="q", kernel_init=partitioned_init("embed", "heads"))(x),
                dense(kv_size, name="k", kernel_init=partitioned_init("embed", "kv_heads"))(x),
                dense(kv_size, name="v", kernel_init=partitioned_init("embed", "kv_heads"))(x),
            )
        # (batch, length, heads, head_dim)
        query, key, value = (h.reshape(*x.shape[:2], -1, c.head_dim) for h in projections)
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(query)
            key = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(key)
        axes = ("batch", "length", "heads", "head_dim")
        query, key, value = (spmd.with_logical_constraint(h, axes) for h in (query, key, value))
        branches = [functools.partial(self._attend, index) for index in range(len(c.layer_kinds))]
        if len(branches) == 1 or isinstance(kind, int):
            index = kind if isinstance(kind, int) else 0
            out, kv = branches[index](query, key, value, context, kv)
        else:  # Under a scan, the layers' kinds are data.
            out, kv = lax.switch(kind, branches, query, key, value, context, kv)
        out = out.reshape(*x.shape[:2], q_size)
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
        """Returns the attention outputs, and the layer's cache with the new keys and values."""
        table = context.rope_tables[kind]
        if table is not None:
            query, key = apply_rope(query, table), apply_rope(key, table)
        if kv is not None:
            assert context.cache_length is not None
            start = (0, 0, context.cache_length, 0)
            keys, values = (
                lax.dynamic_update_slice(cached, jnp.swapaxes(x, 1, 2).astype(cached.dtype), start)
                for cached, x in zip(kv, (key, value), strict=True)
            )
            kv = keys, values
            key, value = (jnp.swapaxes(cached, 1, 2).astype(query.dtype) for cached in kv)
        out = attend(
            query,
            key,
            value,
            scale=self.config.query_scale,
            query_slots=context.query_slots,
            query_segment_ids=context.segment_ids,
            key_segment_ids=context.key_segment_ids,
            query_positions=None if kv is None else context.positions,
            key_positions=context.key_positions,
            window=self.config.layer_kinds[kind].window,
            softcap=self.config.attention_softcap,
            text_layout=self.text_layout,
            # Initialization may use a text of one token, which no fused kernel takes.
            implementation=None if self.is_initializing() else self.attention_implementation,
        )
        return out, kv


class Mlp(nn.Module):
    """Gated feed-forward."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=c.mlp_bias)
        init = partitioned_init("embed", "mlp")
        if c.fused_projections:
            gate_up = dense(2 * c.intermediate_size, name="gate_up", kernel_init=init)(x)
            gate, up = jnp.split(gate_up, 2, axis=-1)
        else:
            gate = dense(c.intermediate_size, name="gate", kernel_init=init)(x)
            up = dense(c.intermediate_size, name="up", kernel_init=init)(x)
        inner = _gated_activation(gate, up, c.activation)
        inner = spmd.with_logical_constraint(inner, ("batch", "length", "mlp"))
        down_init = partitioned_init("mlp", "embed")
        return dense(c.hidden_size, name="down", kernel_init=down_init)(inner)


class MixtureOfExperts(nn.Module):
    """Feed-forward experts, of which a router chooses a few for each token.

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
        probabilities = jax.nn.softmax(router(tokens).astype(jnp.float32), axis=-1)
        weights, experts = lax.top_k(probabilities, e.num_experts_per_tok)  # (tokens, top_k)
        if e.norm_topk_prob:
            weights /= weights.sum(axis=-1, keepdims=True)
        # Tokens sorted by expert, so that one ragged product takes all tokens of an expert.
        order = jnp.argsort(experts.reshape(-1))  # (tokens * top_k,)
        rows = tokens[order // e.num_experts_per_tok]
        group_sizes = jnp.bincount(experts.reshape(-1), length=e.num_experts).astype(jnp.int32)
        init = functools.partial(partitioned_init, init=nn.initializers.lecun_normal(batch_axis=0))
        in_shape = (e.num_experts, c.hidden_size, 2 * e.intermediate_size)
        out_shape = (e.num_experts, e.intermediate_size, c.hidden_size)
        gate_up: Any = self.param("gate_up", init("experts", "embed", "mlp"), in_shape)
        down: Any = self.param("down", init("experts", "mlp", "embed"), out_shape)
        rows, gate_up, down = promote_dtype(rows, gate_up, down, dtype=self.dtype)
        gate, up = jnp.split(lax.ragged_dot(rows, gate_up, group_sizes), 2, axis=-1)
        out = lax.ragged_dot(_gated_activation(gate, up, c.activation), down, group_sizes)
        out *= weights.reshape(-1)[order][:, None].astype(out.dtype)
        return jnp.zeros_like(tokens).at[order // e.num_experts_per_tok].add(out).reshape(x.shape)


class Block(nn.Module):
    """A layer: attention and feed-forward, each with its residual connection."""

    config: DecoderConfig
    is_moe: bool
    dtype: Any
    attention_implementation: AttentionImplementation | None
    text_layout: TextLayout

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
        attention = Attention(
            c, self.dtype, self.attention_implementation, self.text_layout, name="attention"
        )
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
    """A decoder-only language model; `model.apply(params, input_ids)` returns logits.

    Attributes:
        config: Sizes and architecture.
        scan_layers: Scans one layer over stacked weights, which compiles in the time of one layer.
            False: each layer has separate weights.
        remat_policy: Activations that the backward pass recomputes: "none"; all inside a layer
            except the outputs of the projections ("save_projections"); all inside a layer ("full").
        dtype: dtype of the computation. None: that of the weights.
        attention_implementation: Kernel of the attention, see `jlora.models.attention.attend`.
            None: the fastest that applies.
        text_layout: Order of the texts in a row, which kernels without an array of all pairs of
            tokens need on a GPU: "packed" for texts behind each other, numbered in their order;
            "padded" for one text a row with padding behind it. The outputs of a row that is laid
            out otherwise are NaN. "any": any order. It has no effect with a cache.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> model = models.Decoder(config)
        >>> input_ids = jnp.array([[3, 5, 2]])
        >>> params = jax.jit(model.init)(jax.random.key(0), input_ids)
        >>> model.apply(params, input_ids).shape
        (1, 3, 32)
    """

    config: DecoderConfig
    scan_layers: bool = False
    remat_policy: RematPolicy = "none"
    dtype: Any = None
    attention_implementation: AttentionImplementation | None = None
    text_layout: TextLayout = "any"

    def attention_cases(self, length: int, dtype: Any) -> list[AttentionCase]:
        """Returns the cases of attention of the layers, for rows with segments and no cache.

        Args:
            length: Number of tokens of a row.
            dtype: dtype of the queries.
        """
        c = self.config
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        query = shape((1, length, c.num_heads, c.head_dim))
        key = shape((1, length, c.num_kv_heads, c.head_dim))
        windows = dict.fromkeys(kind.window for kind in c.layer_kinds)
        make = functools.partial(make_case, query, key, text_layout=self.text_layout, causal=True)
        return [make(window=window, softcap=c.attention_softcap) for window in windows]

    @property
    def can_scan_layers(self) -> bool:
        """Whether the weights of all layers can be stacked."""
        return len(set(self._is_moe_layer)) == 1

    @property
    def _is_moe_layer(self) -> list[bool]:
        num_layers = len(self.config.layer_kind_ids)
        return [index in self.config.moe_layers for index in range(num_layers)]

    def setup(self) -> None:
        c = self.config
        block: Any = Block
        if self.remat_policy != "none":
            if self.remat_policy not in _REMAT_POLICIES:
                raise ValueError(
                    f"remat_policy={self.remat_policy!r} must be one of "
                    f"{['none', *_REMAT_POLICIES]}."
                )
            # A scan needs no barrier against undoing the recomputation.
            static = () if self.scan_layers else (2,)
            block = nn.remat(
                Block,
                policy=_REMAT_POLICIES[self.remat_policy],
                prevent_cse=not self.scan_layers,
                static_argnums=static,
            )
        is_moe = self._is_moe_layer
        options = {
            "dtype": self.dtype,
            "attention_implementation": self.attention_implementation,
            "text_layout": self.text_layout,
        }
        if self.scan_layers:
            if not self.can_scan_layers:
                raise ValueError(
                    "scan_layers=True stacks the weights of all layers, but some layers are "
                    "mixtures of experts and others are not. Use scan_layers=False."
                )
            axes: Any = (0, nn.broadcast, 0)  # For kind, context and kv.
            scan = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=axes,
                length=len(c.layer_kind_ids),
                metadata_params={PARTITION_NAME: "layers"},
            )
            self.layers: Any = scan(c, is_moe[0], **options)
        else:
            self.layers = [block(c, layer_is_moe, **options) for layer_is_moe in is_moe]
        self.embed = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            embedding_init=partitioned_init("vocab", "embed", init=nn.initializers.normal(0.02)),
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
        """Returns logits (batch, length, vocabulary) in float32; with a cache, also the new cache.

        Args:
            input_ids: (batch, length) token ids. An id outside the vocabulary makes its text NaN;
                padding may have any id.
            attention_mask: (batch, length), 0 or False for padding. Texts packed into one row have
                ids 1, 2, ..., and do not attend to each other. None: no padding.
            positions: (batch, length), the position of each token in its text. None: counted from
                the first token of every text.
            cache: The result of `init_cache` or of an earlier call. All texts use the same slots,
                padding included. A call that runs past its capacity returns NaN. Where a text
                outgrows the first frequencies of its rotary positions (longrope), the call computes
                all keys and values again. None: no cache.

        Raises:
            ValueError: The shapes do not fit together, or a cache comes without positions.
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
        """Returns the normalized hidden states (batch, length, width), before the head.

        Args:
            input_ids: As in a call.
            attention_mask: As in a call.
            positions: As in a call.
        """
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
        """Returns the cross entropies (batch, length) of the targets, in nats and float32.

        The logits of all tokens are never in memory at once: they are computed for one chunk of
        every text at a time.

        Args:
            input_ids: As in a call.
            targets: (batch, length), the token that each position should predict. One outside the
                vocabulary has the loss NaN.
            attention_mask: As in a call.
            positions: As in a call.
            chunks: Number of chunks that texts are split into.
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
        """Returns the kernel of the head (width, vocabulary)."""
        return self.embed.embedding.T if self.config.tie_word_embeddings else self.head

    def _forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must have shape (batch, length), got {input_ids.shape}. Pass a single "
                f"text as input_ids[None]."
            )
        for name, array in (("attention_mask", attention_mask), ("positions", positions)):
            if array is not None and array.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {array.shape}, input_ids {input_ids.shape}. Pass one entry "
                    f"per token."
                )
        segment_ids = None if attention_mask is None else attention_mask.astype(jnp.int32)
        if positions is None:
            if cache is not None:
                raise ValueError("A cache needs positions: (batch, length), one per token.")
            positions = _segment_positions(segment_ids, input_ids.shape)
        if segment_ids is not None:  # Padding may be any id.
            input_ids = jnp.where(segment_ids == 0, 0, input_ids)
        if cache is None:
            if segment_ids is not None:  # An invalid id makes NaN.
                is_right = has_layout(segment_ids, self.text_layout)
                input_ids = jnp.where(is_right[:, None], input_ids, -1)
            lengths = self._text_lengths(positions, segment_ids)
            context = _AttentionContext(
                self._rope_tables(positions, lengths), positions, segment_ids
            )
            return self._run_layers(input_ids, context, None)[0], None
        if segment_ids is None:
            segment_ids = jnp.ones(input_ids.shape, jnp.int32)
        return self._forward_cached(input_ids, segment_ids, positions, cache)

    def _forward_cached(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """Returns the hidden states of tokens behind those of a cache, and the longer cache."""
        length, capacity = input_ids.shape[1], cache.segment_ids.shape[1]
        if length > capacity:
            raise ValueError(
                f"{length} tokens do not fit into a cache of capacity {capacity}. Build it with a "
                f"larger capacity."
            )
        # JAX would overwrite the last slots and continue; an invalid id makes NaN.
        input_ids = jnp.where(cache.length + length > capacity, -1, input_ids)
        cached = {
            name: lax.dynamic_update_slice(
                getattr(cache, name), new.astype(jnp.int32), (0, cache.length)
            )
            for name, new in (
                ("input_ids", input_ids),
                ("segment_ids", segment_ids),
                ("positions", positions),
            )
        }
        updated = cache._replace(**cached, length=cache.length + length)
        lengths = self._text_lengths(updated.positions, updated.segment_ids)

        def extend_cache(module: Decoder, kv: Any) -> Any:
            new = functools.partial(
                lax.dynamic_slice_in_dim, start_index=cache.length, slice_size=length, axis=1
            )
            context = _AttentionContext(
                rope_tables=module._rope_tables(
                    positions, None if lengths is None else new(lengths)
                ),
                positions=positions,
                segment_ids=segment_ids,
                query_slots=cache.length + jnp.arange(length)[None],
                key_segment_ids=updated.segment_ids,
                key_positions=updated.positions,
                cache_length=cache.length,
            )
            return module._run_layers(input_ids, context, kv)

        def recompute_cache(module: Decoder, kv: Any) -> Any:
            context = _AttentionContext(
                rope_tables=module._rope_tables(updated.positions, lengths),
                positions=updated.positions,
                segment_ids=updated.segment_ids,
                query_slots=jnp.arange(capacity)[None],
                key_segment_ids=updated.segment_ids,
                key_positions=updated.positions,
                cache_length=jnp.zeros((), jnp.int32),
            )
            hidden, kv = module._run_layers(updated.input_ids, context, kv)
            return lax.dynamic_slice_in_dim(hidden, cache.length, length, axis=1), kv

        kv = (cache.keys, cache.values)
        switches = [length for length in self._switch_lengths if length < capacity]
        if switches and not self.is_initializing():
            # All keys and values of a text change when its length selects other frequencies.
            before = self._text_lengths(cache.positions, cache.segment_ids)
            assert before is not None
            assert lengths is not None
            # Slots that are filled now have no keys yet.
            is_kept = (jnp.arange(capacity) < cache.length) & (cache.segment_ids > 0)
            crosses = [((before > switch) != (lengths > switch)) & is_kept for switch in switches]
            crosses = functools.reduce(jnp.logical_or, crosses).any()
            hidden, kv = nn.cond(crosses, recompute_cache, extend_cache, self, kv)
        else:
            hidden, kv = extend_cache(self, kv)
        return hidden, updated._replace(keys=kv[0], values=kv[1])

    @property
    def _switch_lengths(self) -> list[int]:
        """Lengths of texts past which a kind of layer has other rotary frequencies."""
        ropes = [kind.rope for kind in self.config.layer_kinds if kind.rope is not None]
        return sorted({rope.switch_length for rope in ropes if rope.long_frequencies is not None})

    def _text_lengths(
        self, positions: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array | None:
        """Returns (batch, length), one more than the last position in the segment of each token.

        None if no layer depends on it.
        """
        if not self._switch_lengths:
            return None
        if segment_ids is None:
            return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
        # The compiler fuses the comparison of all pairs into the maximum.
        same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (batch, length, length)
        return jnp.where(same, positions[:, None, :], 0).max(axis=2) + 1

    def _rope_tables(
        self, positions: jax.Array, lengths: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array] | None, ...]:
        """Returns the cosines and sines of each kind of layer."""
        return tuple(
            kind.rope.cos_sin(positions, lengths) if kind.rope else None
            for kind in self.config.layer_kinds
        )

    def _run_layers(self, input_ids: jax.Array, context: _AttentionContext, kv: Any) -> Any:
        """Returns the normalized hidden states, and the keys and values with the new ones."""
        c = self.config
        x = self.embed(mark_invalid_ids(input_ids, c.vocab_size))
        if c.embed_scale is not None:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        x = spmd.with_logical_constraint(x, ("batch", "length", "embed"))
        if self.scan_layers:
            x, kv = self.layers(x, jnp.array(c.layer_kind_ids), context, kv)
            return self.norm(x), kv
        layer_kvs: list[Any] = []
        for index, (layer, kind) in enumerate(zip(self.layers, c.layer_kind_ids, strict=True)):
            x, layer_kv = layer(
                x, kind, context, None if kv is None else (kv[0][index], kv[1][index])
            )
            layer_kvs.append(layer_kv)
        return self.norm(x), None if kv is None else tuple(zip(*layer_kvs, strict=True))


def init_cache(
    model: Decoder, batch_size: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> KVCache:
    """Returns an empty cache of keys and values.

    Args:
        model: The decoder that will use the cache.
        batch_size: Number of texts.
        capacity: Number of slots per text, one for each token of prompt and continuation. A call
            that runs past them returns NaN.
        dtype: dtype of the cached keys and values.

    Example:
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> cache = models.init_cache(models.Decoder(config), batch_size=2, capacity=8)
        >>> len(cache.keys), cache.keys[0].shape, int(cache.length)
        (2, (2, 2, 8, 4), 0)
    """
    c = model.config
    # The keys of a head are contiguous, so that a step reads them without a copy.
    shape = (batch_size, c.num_kv_heads, capacity, c.head_dim)
    num_layers = len(c.layer_kind_ids)

    def zeros() -> Any:
        if model.scan_layers:
            return jnp.zeros((num_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))

    def empty() -> jax.Array:
        return jnp.zeros((batch_size, capacity), jnp.int32)

    return KVCache(zeros(), zeros(), empty(), empty(), empty(), jnp.zeros((), jnp.int32))


def _segment_positions(segment_ids: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    """Returns (batch, length), the number of tokens before each one in its run of one segment."""
    slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is None:
        return slots
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return slots - lax.cummax(jnp.where(segment_ids != previous, slots, 0), axis=1)
