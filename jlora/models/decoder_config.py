"""Configuration of decoder-only language models."""

from __future__ import annotations

import dataclasses

from jlora.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Attention pattern and positions of a layer.

    Attributes:
        window: Number of tokens that a token attends to, itself included. None: all.
        rope: Rotary positions. None: the layer has no positions (NoPE).

    Example:
        >>> from jlora.models import LayerKind
        >>> LayerKind(window=4).rope is None
        True
    """

    window: int | None = None
    rope: Rope | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Configuration of the mixture of experts that replaces the feed-forward.

    Attributes:
        num_experts: Number of experts per layer.
        num_experts_per_tok: Number of experts that process each token.
        intermediate_size: Width inside one expert.
        norm_topk_prob: Normalizes the weights of the chosen experts to a sum of one.

    Example:
        >>> from jlora.models import MoEConfig
        >>> MoEConfig(
        ...     num_experts=8, num_experts_per_tok=2, intermediate_size=64, norm_topk_prob=True
        ... ).num_experts
        8
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Configuration of a `Decoder`.

    `jlora.models.hf.decoder_configs` reads one from a checkpoint's config.json.

    Attributes:
        vocab_size: Number of tokens in the vocabulary.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward.
        num_heads: Number of query heads; a multiple of `num_kv_heads`.
        num_kv_heads: Number of key and value heads.
        head_dim: Width of one head.
        layer_kinds: The distinct kinds of layers.
        layer_kind_ids: The index into `layer_kinds` of each layer.
        max_seq_length: Number of tokens that the checkpoint was trained for.
        query_scale: Factor on the attention scores.
        moe_layers: Indices of the layers that are mixtures of experts.
        moe: Configuration of these mixtures. None: there are none.
        activation: Activation of the feed-forward, a key of `jlora.models.layers.ACTIVATIONS`.
        norm_eps: Epsilon that norms add to the mean square.
        norm_offset: Norms multiply by one plus their scale, in float32 (Gemma).
        qkv_bias: The query, key and value projections have biases.
        output_bias: The output projection of the attention has a bias.
        mlp_bias: The projections of the feed-forward have biases.
        fused_projections: Query, key and value are one projection, gate and up another (Phi-3).
        qk_norm: The queries and keys of each head are normalized.
        post_norms: The outputs of attention and feed-forward are normalized (Gemma 2 and 3).
        embed_scale: Factor on the embedded tokens. None: no factor.
        attention_softcap: Bound on the attention scores, applied by a tanh. None: no bound.
        logit_softcap: Bound on the logits, applied by a tanh. None: no bound.
        tie_word_embeddings: The head shares the weight of the embedding.
        has_separated_head: config.json ties the head to the embedding, and the head has a weight of
            its own here: a copy, or the stored head that differs. The outputs do not depend on it.

    Example:
        >>> from jlora import models
        >>> from jlora.models import LayerKind
        >>> config = models.DecoderConfig(
        ...     vocab_size=32,
        ...     hidden_size=8,
        ...     intermediate_size=16,
        ...     num_heads=2,
        ...     num_kv_heads=1,
        ...     head_dim=4,
        ...     layer_kinds=(LayerKind(), LayerKind(window=4)),
        ...     layer_kind_ids=(0, 1, 1),
        ...     max_seq_length=16,
        ...     query_scale=0.5,
        ... )
        >>> len(config.layer_kind_ids)
        3
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
    has_separated_head: bool = False
