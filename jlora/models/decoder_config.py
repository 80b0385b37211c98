"""jlora.models.decoder_config."""

from __future__ import annotations

import dataclasses

from jlora.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """How a layer attends.

    Attributes:
        window: How many tokens back it sees, itself included; all when None.
        rope: Its rotary positions; it has none when None.
    """

    window: int | None = None
    rope: Rope | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in the feed-forward's place.

    Attributes:
        num_experts: How many experts.
        num_experts_per_tok: How many each token goes through.
        intermediate_size: Width inside one expert.
        norm_topk_prob: Whether the weights of those chosen sum to one.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of one decoder.

    Attributes:
        vocab_size: How many tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward.
        num_heads: Of the queries; a multiple of `num_kv_heads`.
        num_kv_heads: Of the keys and values.
        head_dim: Width of one head.
        layer_kinds: The ways in which layers attend.
        layer_kind_ids: Of each layer, which of `layer_kinds` it is.
        moe_layers: The numbers of the layers that are mixtures of experts.
        moe: Those mixtures.
        max_seq_length: How many tokens a checkpoint was made for.
        activation: Inside the feed-forward, one of `ACTIVATIONS`.
        norm_eps: Added to the mean square.
        norm_offset: Whether norms multiply with one plus their scale, in float32 (Gemma).
        qkv_bias: Whether the query, key and value products have biases.
        output_bias: Whether the attention's output product has one.
        mlp_bias: Whether those of the feed-forward have.
        fused_projections: Whether query, key and value are one product, and gate and up another (Phi-3).
        qk_norm: Whether each head's queries and keys are normalised.
        post_norms: Whether what attention and feed-forward return is normalised (Gemma 2 and 3).
        embed_scale: Factor on the embedded tokens.
        query_scale: Factor on the attention scores.
        attention_softcap: Bound that a tanh puts on the attention scores.
        logit_softcap: Bound that a tanh puts on the logits.
        tie_word_embeddings: Whether the head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...]
    layer_kind_ids: tuple[int, ...]
    max_seq_length: int
    query_scale: float
    moe_layers: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
