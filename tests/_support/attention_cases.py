"""A case of attention, from which tests make others."""

from __future__ import annotations

from jlora.models.attention_kernels import AttentionCase

ATTENTION_CASE = AttentionCase(
    dtype="bfloat16",
    length=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    text_layout="packed",
    causal=True,
    window=None,
    softcap=None,
)
