"""FourierFT: an update with few non-zero entries in its spectrum."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _validation
from jlora.adapters import low_rank
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray, LabeledArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(AdapterConfig):
    """`W + alpha * Re(ifft2(S))`, with `num_frequencies` trainable entries of `S`, the others zero.

    The positions of the entries are drawn from `seed`, the same for all weights of one shape. Few
    frequencies are computed as plane waves, a low-rank update of twice their number; many through
    the inverse transform, as one more product with an array of the weight's size.

    Attributes:
        num_frequencies: Number of trainable entries; the paper uses 200 to 1000.
        alpha: Scale of the update; positive.
        seed: Random seed of the entries' positions; from 0 to 2^32 - 1.
        std: Standard deviation of the initial entries. It is one in the paper, so a fresh adapter
            changes the model a little; 0.0 starts at the base.
        dropout: Probability of dropping an entry of the input while training.
        dtype: Data type of the entries.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Gao et al., FourierFT, arXiv:2405.03003, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.FourierFT(num_frequencies=3)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].spectrum.shape
        (3,)
    """

    info = MethodInfo(
        name="FourierFT",
        formula="W + alpha Re(ifft2(S)), n entries of S trained",
        num_params_formula="n",
        recommended_for="few parameters, independent of the layer's width",
        paper="Gao et al. 2405.03003",
    )
    supported_kinds = frozenset({"linear"})

    num_frequencies: int
    alpha: float = 300.0
    seed: int = 2024
    std: float = 1.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_positive_int("FourierFT.num_frequencies", self.num_frequencies)
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"FourierFT.seed={self.seed!r} must be an int from 0 to 2^32 - 1.")

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns the reason of any method, or that the weight has too few entries."""
        entries = weight.fan_in * weight.fan_out
        if self.num_frequencies > entries:
            return f"FourierFT.num_frequencies={self.num_frequencies} exceeds its {entries} entries"
        return super().unsupported_reason(weight)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> FourierFTLeaf:
        """Returns normal entries."""
        shape = (*weight.axis_sizes.batch, self.num_frequencies)
        return FourierFTLeaf(
            spectrum=self.std * jax.random.normal(key, shape, self.dtype),
            shape=weight.shape,
            axes=weight.axes,
            num_frequencies=int(self.num_frequencies),
            seed=int(self.seed),
            alpha=float(self.alpha),
            dropout=float(self.dropout),
        )


@functools.lru_cache(maxsize=256)
def sample_frequency_indices(
    num_frequencies: int, seed: int, fan_in: int, fan_out: int
) -> tuple[Any, Any]:
    """Returns the rows and columns of the trainable entries in a spectrum (fan_in, fan_out).

    They are the first of `torch.randperm(fan_in * fan_out)` with this seed, of the transpose, as in
    PEFT, whose files do not store them.
    """
    total = fan_in * fan_out
    # NumPy's and torch's generators are both MT19937 with the same seeding.
    draws = np.random.RandomState(seed).randint(0, 2**32, num_frequencies, dtype=np.uint32)
    displaced: dict[int, int] = {}
    chosen = np.empty(num_frequencies, np.int64)
    # The Fisher-Yates shuffle; only displaced entries are stored.
    for position, draw in enumerate(draws):
        other = position + int(draw) % (total - position) if position < total - 1 else position
        chosen[position] = displaced.get(other, other)
        displaced[other] = displaced.get(position, position)
    columns, rows = np.divmod(chosen, fan_in)
    return rows, columns


@register_family("fourierft")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTLeaf(AdapterLeaf):
    """Spectrum of one weight's update.

    Attributes:
        spectrum: Trainable entries, (*batch, num_frequencies).
    """

    spectrum: jax.Array = array_field("spectrum")
    shape: tuple[int, ...]
    axes: WeightAxes
    num_frequencies: int
    seed: int
    alpha: float
    dropout: float

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns the low-rank form where a step costs less with it than with the full update.

        For every token a step takes four products with each wave's two parts on both sides, against
        three products with the full update.
        """
        del context
        factors = self._update() if self.is_weight_sized else self._wave_factors()
        return weight.add(*factors)

    @property
    def is_weight_sized(self) -> bool:
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        return 8 * self.num_frequencies * (fan_in + fan_out) >= 6 * fan_in * fan_out

    def validate(self) -> None:
        super().validate()
        entries = math.prod(self.axis_sizes.inputs) * math.prod(self.axis_sizes.outputs)
        if (
            self.num_frequencies > entries
            or type(self.seed) is not int
            or not 0 <= self.seed < 2**32
        ):
            raise ValueError(
                f"num_frequencies={self.num_frequencies} must be at most the weight's {entries} "
                f"entries, and seed={self.seed} an int from 0 to 2^32 - 1"
            )

    def _frequency_indices(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows and columns of the entries."""
        sizes = self.axis_sizes
        return sample_frequency_indices(
            self.num_frequencies, self.seed, math.prod(sizes.inputs), math.prod(sizes.outputs)
        )

    def _wave_factors(self) -> list[LabeledArray]:
        """Returns two products per entry: `Re(e^{i(a + b)}) = cos a cos b - sin a sin b`."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        rows, columns = self._frequency_indices()

        def angles(frequencies: np.ndarray, length: int) -> Any:
            # Reduced modulo a full turn as integers, so that no phase is rounded.
            steps = np.outer(np.arange(length), frequencies) % length
            return jnp.asarray(2 * np.pi * steps / length, jnp.float32)

        a, b = angles(rows, fan_in), angles(columns, fan_out)
        in_waves = jnp.stack([jnp.cos(a), jnp.sin(a)], -1)  # (fan_in, num_frequencies, 2)
        out_waves = jnp.stack([jnp.cos(b), -jnp.sin(b)], -1)  # (fan_out, num_frequencies, 2)
        # The scale, alpha / (fan_in fan_out), is less than float16 has on large weights; its parts
        # are not.
        in_waves, out_waves = in_waves / fan_in, out_waves / fan_out
        waves = ("wave", "part")
        return [
            (in_waves.reshape(*sizes.inputs, -1, 2), (*inputs, *waves)),
            (low_rank.scale_factor(self.spectrum, self.alpha), (*batch, "wave")),
            (out_waves.reshape(*sizes.outputs, -1, 2), (*outputs, *waves)),
        ]

    def _update(self) -> list[LabeledArray]:
        """Returns the materialized update."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        rows, columns = self._frequency_indices()
        values = low_rank.scale_factor(self.spectrum, self.alpha)
        spectrum = jnp.zeros((*sizes.batch, fan_in, fan_out), values.dtype)
        update = jnp.fft.ifft2(spectrum.at[..., rows, columns].set(values)).real
        update = update.reshape(*sizes.batch, *sizes.inputs, *sizes.outputs)
        return [(update, (*batch, *inputs, *outputs))]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"spectrum": (*self.axis_sizes.batch, self.num_frequencies)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"spectrum": (*self.axes.batch, None)}
