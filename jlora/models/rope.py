"""Rotary positions, and the ways in which checkpoints stretch them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of one rotary embedding.

    Attributes:
        frequencies: Radians per token, one for each pair of rotated dimensions. A head's dimensions
            past the pairs are not rotated.
        long_frequencies: Those that replace them once a sequence is longer than `switch_length`.
        switch_length: In tokens.
        attention_scaling: A factor on the rotated queries and keys.

    References:
        Su et al., RoFormer, arXiv:2104.09864, section 3.2.
    """

    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] | None = None
    switch_length: int = 0
    attention_scaling: float = 1.0

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cosines and sines (batch, length, pairs) of positions (batch, length), in float32."""
        frequencies = jnp.array(self.frequencies, jnp.float32)
        if self.long_frequencies is not None:
            long = jnp.array(self.long_frequencies, jnp.float32)
            is_long = jnp.max(positions) + 1 > self.switch_length
            frequencies = jnp.where(is_long, long, frequencies)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * self.attention_scaling, jnp.sin(angles) * self.attention_scaling


def apply_rope(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads (batch, length, heads, dim) turned by a table; dimension `i` pairs with `i + pairs`."""
    cos, sin = (one[:, :, None] for one in cos_sin)
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def rope_from_config(
    parameters: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int
) -> Rope:
    """What a config.json describes.

    Args:
        parameters: `rope_theta`, `rope_type` (or `type`), `partial_rotary_factor`, and what the
            type needs, under the names of transformers.
        head_dim: Width of one head.
        max_position_embeddings: The checkpoint's `max_position_embeddings`.

    Raises:
        ValueError: For a type or a parameter that is not implemented, or one that is missing.
    """
    parameters = {name: value for name, value in parameters.items() if value is not None}
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta")
    dim = int(head_dim * parameters.pop("partial_rotary_factor", 1.0))
    if kind not in _ROPE_TYPES:
        raise ValueError(
            f"rope_type={kind!r} is not implemented; {sorted(_ROPE_TYPES)} are. A model computed with "
            f"other rotary frequencies would be silently wrong."
        )
    make, needed, optional = _ROPE_TYPES[kind]
    missing = [name for name in needed if name not in parameters]
    # Other types' parameters say nothing here: transformers ignores them as well.
    every = {name for _, *groups in _ROPE_TYPES.values() for group in groups for name in group}
    unknown = [name for name in parameters if name not in every]
    if missing or unknown:
        raise ValueError(
            f"rope_type={kind!r} has unknown parameters {unknown} and lacks {missing}. Copy the "
            f"rope parameters from the config.json that the checkpoint came with."
        )
    # In float32, as the checkpoints were trained: positions multiply the rounding errors.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = np.float32(1) / np.float32(theta) ** exponents
    given = {n: parameters[n] for n in (*needed, *optional) if n in parameters}
    return make(
        base, theta=theta, dim=dim, max_position_embeddings=max_position_embeddings, **given
    )


def _build_rope(frequencies: Any, **rest: Any) -> Rope:
    return Rope(frequencies=tuple(float(f) for f in np.asarray(frequencies, np.float32)), **rest)


def _compute_default_rope(inv_freq: np.ndarray, **_: Any) -> Rope:
    return _build_rope(inv_freq)


def _compute_linear_rope(inv_freq: np.ndarray, *, factor: float, **_: Any) -> Rope:
    """Positions divided by a factor (Chen et al., arXiv:2306.15595, section 2.3)."""
    return _build_rope(inv_freq / np.float32(factor))


def _compute_llama3_rope(
    inv_freq: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    **_: Any,
) -> Rope:
    """Long waves divided by a factor, short ones kept, those between interpolated (Llama 3.1)."""
    turns = original_max_position_embeddings * inv_freq / np.float32(2 * math.pi)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return _build_rope((1 - kept) * inv_freq / factor + kept * inv_freq)


def _compute_yarn_rope(
    inv_freq: np.ndarray,
    *,
    theta: float,
    dim: int,
    max_position_embeddings: int,
    original_max_position_embeddings: int | None = None,
    factor: float | None = None,
    attention_factor: float | None = None,
    beta_fast: float = 32,
    beta_slow: float = 1,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> Rope:
    """Interpolation by parts (Peng et al., YaRN, arXiv:2309.00071, sections 3.2 to 3.4)."""
    original = original_max_position_embeddings or max_position_embeddings
    factor = factor or max_position_embeddings / original

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    return _build_rope(
        inv_freq * (1 - interpolated) + inv_freq / factor * interpolated,
        attention_scaling=attention_factor or magnitude(),
    )


def _compute_longrope(
    inv_freq: np.ndarray,
    *,
    max_position_embeddings: int,
    short_factor: list[float],
    long_factor: list[float],
    original_max_position_embeddings: int,
    factor: float | None = None,
    attention_factor: float | None = None,
    **_: Any,
) -> Rope:
    """A factor per frequency, one set for short and one for long sequences (arXiv:2402.13753)."""
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(factors) != inv_freq.size:
            raise ValueError(
                f"{name} has {len(factors)} entries, and a head rotates {inv_freq.size} pairs. Copy it "
                f"from the config.json that the checkpoint came with."
            )
    original = original_max_position_embeddings
    factor = factor or max_position_embeddings / original
    if attention_factor is None:
        grown = 1 + math.log(factor) / math.log(original) if factor > 1 else 1.0
        attention_factor = math.sqrt(grown)
    short, long = (inv_freq / np.array(f, np.float32) for f in (short_factor, long_factor))
    return _build_rope(
        short,
        long_frequencies=tuple(map(float, long)),
        switch_length=original,
        attention_scaling=attention_factor,
    )


# Of each type: how it is made, what it needs and what it may have.
_RopeType = tuple[Callable[..., Rope], tuple[str, ...], tuple[str, ...]]

_ROPE_TYPES: dict[str, _RopeType] = {
    "default": (_compute_default_rope, (), ()),
    "linear": (_compute_linear_rope, ("factor",), ()),
    "llama3": (
        _compute_llama3_rope,
        (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        (),
    ),
    "yarn": (
        _compute_yarn_rope,
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        _compute_longrope,
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
