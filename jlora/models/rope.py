"""Rotary position embeddings (RoPE), and the scalings that checkpoints use for long contexts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._validation import is_nonnegative_float32, is_positive_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of one rotary embedding.

    Attributes:
        frequencies: Radians per token, one for each pair of rotated dimensions. Dimensions of a
            head past the pairs are not rotated.
        long_frequencies: Frequencies of texts longer than `switch_length`. None: `frequencies`
            apply at every length.
        switch_length: Maximum length, in tokens, of texts that use `frequencies`. Unused without
            `long_frequencies`.
        attention_scaling: Factor on the rotated queries and keys.

    References:
        Su et al., RoFormer, arXiv:2104.09864, section 3.2.
    """

    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] | None = None
    switch_length: int = 0
    attention_scaling: float = 1.0

    def cos_sin(
        self, positions: jax.Array, text_lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines (batch, length, pairs).

        Args:
            positions: (batch, length), the position of each token in its text.
            text_lengths: (batch, length), the number of tokens in the text of each token, which
                decides between the frequencies of short and of long texts. Required with
                `long_frequencies`.
        """
        frequencies = jnp.array(self.frequencies, jnp.float32)
        if self.long_frequencies is not None:
            long = jnp.array(self.long_frequencies, jnp.float32)
            assert text_lengths is not None
            is_long = text_lengths[..., None] > self.switch_length
            frequencies = jnp.where(is_long, long, frequencies)  # (batch, length, pairs)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * self.attention_scaling, jnp.sin(angles) * self.attention_scaling


def apply_rope(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates heads (batch, length, heads, dim); dimension `i` is paired with `i + pairs`.

    Args:
        x: Queries or keys.
        cos_sin: Result of `Rope.cos_sin`, each (batch, length, pairs).
    """
    cos, sin = (table[:, :, None] for table in cos_sin)
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def rope_from_config(
    parameters: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int
) -> Rope:
    """Returns the rotary embedding that a config.json describes.

    Args:
        parameters: `rope_theta`, `rope_type` (or `type`), `partial_rotary_factor`, and the
            parameters of the type, under the names of transformers.
        head_dim: Width of one head.
        max_position_embeddings: The field `max_position_embeddings` of the config.json.

    Raises:
        ValueError: The type is not implemented, or a parameter is missing or out of range. Unknown
            parameters are ignored, as in transformers.
    """
    parameters = {name: value for name, value in parameters.items() if value is not None}
    rope_type = parameters.pop("rope_type", parameters.pop("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_type!r} is not implemented, must be one of {sorted(_ROPE_TYPES)}. "
            f"With other rotary frequencies the model's outputs would be silently wrong."
        )
    compute, required, optional = _ROPE_TYPES[rope_type]
    missing = [name for name in required if name not in parameters]
    if missing:
        raise ValueError(
            f"rope_type={rope_type!r} lacks {missing}. Copy the rope parameters from the "
            f"checkpoint's original config.json."
        )
    names = ("rope_theta", "partial_rotary_factor", *required, *optional)
    options = {name: parameters[name] for name in names if name in parameters}
    for name, value in options.items():
        is_valid, expected = _PARAMETER_RANGES.get(name, _POSITIVE)
        if not is_valid(value):
            raise ValueError(
                f"{name}={value!r} must be {expected}. Copy the rope parameters from the "
                f"checkpoint's original config.json."
            )
    theta = options.pop("rope_theta")
    dim = int(head_dim * options.pop("partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2:
        raise ValueError(
            f"Rotary positions of {dim} dimensions (head_dim={head_dim} times "
            f"partial_rotary_factor) must be of an even number of them, at least 2."
        )
    # In float32, as in training: positions multiply the rounding errors.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inv_freq = np.float32(1) / np.float32(theta) ** exponents
        rope = compute(
            inv_freq,
            theta=theta,
            dim=dim,
            max_position_embeddings=max_position_embeddings,
            **options,
        )
        frequencies = np.array([rope.frequencies, rope.long_frequencies or rope.frequencies])
    if not 1e-6 < rope.attention_scaling < 1e6:
        raise ValueError(
            f"The rope parameters {dict(parameters)} multiply queries and keys by "
            f"attention_factor={rope.attention_scaling:g}, which must be between 1e-6 and 1e6. "
            f"Copy them from the checkpoint's original config.json."
        )
    # Written so that NaN is out of range.
    if not (frequencies > 0).all() or not frequencies.max() * max_position_embeddings < _MAX_ANGLE:
        raise ValueError(
            f"The rope parameters {dict(parameters)} make frequencies of {frequencies.min():g} to "
            f"{frequencies.max():g} radians per token, which float32 cannot rotate by. Copy them "
            f"from the checkpoint's original config.json."
        )
    return rope


_MAX_ANGLE = 1e9  # Neighbours in float32 are tens of radians apart there.

# Whether a value of a parameter is valid, and what it must be.
_Range = tuple[Callable[[Any], bool], str]

_POSITIVE: _Range = (is_positive_float32, "a finite number above 0, in the range of float32")
_FACTORS: _Range = (
    lambda value: isinstance(value, list | tuple) and all(map(is_positive_float32, value)),
    "a list of finite numbers above 0",
)
_SCALE: _Range = (
    is_nonnegative_float32,
    "0 or a finite number above 0",
)
_PARAMETER_RANGES: dict[str, _Range] = {  # Of other parameters: _POSITIVE.
    "long_factor": _FACTORS,
    "mscale": _SCALE,
    "mscale_all_dim": _SCALE,
    "original_max_position_embeddings": (
        lambda value: type(value) is int and 0 < value < 2**31,
        "a positive integer",
    ),
    "partial_rotary_factor": (
        lambda value: is_positive_float32(value) and value <= 1,
        "a number above 0 and at most 1",
    ),
    "short_factor": _FACTORS,
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
}


def _build_rope(frequencies: Any, **fields: Any) -> Rope:
    return Rope(frequencies=tuple(float(f) for f in np.asarray(frequencies, np.float32)), **fields)


def _compute_default_rope(inv_freq: np.ndarray, **_: Any) -> Rope:
    return _build_rope(inv_freq)


def _compute_linear_rope(inv_freq: np.ndarray, *, factor: float, **_: Any) -> Rope:
    """Divides positions by a factor (Chen et al., arXiv:2306.15595, section 2.3)."""
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
    """Divides low frequencies by a factor and interpolates to unscaled high ones (Llama 3.1)."""
    if high_freq_factor <= low_freq_factor:
        raise ValueError(
            f"high_freq_factor={high_freq_factor} must be above low_freq_factor="
            f"{low_freq_factor}. Copy both from the checkpoint's original config.json."
        )
    rotations = original_max_position_embeddings * inv_freq / np.float32(2 * math.pi)
    unscaled = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
    unscaled = np.clip(unscaled, 0, 1)
    return _build_rope((1 - unscaled) * inv_freq / factor + unscaled * inv_freq)


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
    """Interpolates by parts (Peng et al., YaRN, arXiv:2309.00071, sections 3.2 to 3.4)."""
    original = original_max_position_embeddings or max_position_embeddings
    factor = factor or max_position_embeddings / original
    if theta <= 1 or beta_fast < beta_slow:
        raise ValueError(
            f"rope_type='yarn' must have rope_theta={theta} above 1 and beta_fast={beta_fast} of "
            f"at least beta_slow={beta_slow}. Copy them from the checkpoint's original config.json."
        )

    def correction_dim(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def get_mscale(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = get_mscale(mscale) / get_mscale(mscale_all_dim)
    return _build_rope(
        inv_freq * (1 - ramp) + inv_freq / factor * ramp,
        attention_scaling=attention_factor or get_mscale(),
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
    """Divides each frequency by a factor, with other factors for long sequences.

    References:
        Ding et al., LongRoPE, arXiv:2402.13753.
    """
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(factors) != inv_freq.size:
            raise ValueError(
                f"{name} must have {inv_freq.size} entries, one per rotated pair of a head, got "
                f"{len(factors)}. Copy it from the checkpoint's original config.json."
            )
    original = original_max_position_embeddings
    factor = factor or max_position_embeddings / original
    if original == 1:
        raise ValueError("original_max_position_embeddings=1 must be at least 2 for longrope.")
    if attention_factor is None:
        growth = 1 + math.log(factor) / math.log(original) if factor > 1 else 1.0
        attention_factor = math.sqrt(growth)
    short, long = (inv_freq / np.array(f, np.float32) for f in (short_factor, long_factor))
    return _build_rope(
        short,
        long_frequencies=tuple(map(float, long)),
        switch_length=original,
        attention_scaling=attention_factor,
    )


# The function of a type, its required parameters and its optional ones.
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
