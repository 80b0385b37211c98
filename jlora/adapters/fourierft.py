"""FourierFT: an update with few entries in its spectrum."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _validation
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray, LabeledArray
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(AdapterConfig):
    """`W + alpha * Re(ifft2(S))`, with `num_frequencies` entries of `S` trained and the others zero.

    Which entries is drawn from `seed`, the same for all weights of one shape. Few frequencies are
    computed through their waves, a low-rank update of twice their number; many through the inverse
    transform, as one more product with an array of the weight's size.

    Attributes:
        num_frequencies: How many entries; the paper uses 200 to 1000.
        alpha: The scale put on the update.
        seed: Draws which entries.
        std: The deviation of the entries at the start. As in the paper it is one, so a fresh
            adapter changes the model a little; 0.0 starts at the base.
        dropout: Probability of dropping an entry of the input while training.
        dtype: Of the entries.

    References:
        Gao et al., FourierFT, arXiv:2405.03003, section 3.
    """

    info = MethodInfo(
        name="FourierFT",
        formula="W + alpha Re(ifft2(S)), n entries of S trained",
        num_params_formula="n",
        recommended_for="the fewest numbers that depend on no width",
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
        _validation.check_positive_int("FourierFT.frequencies", self.num_frequencies)
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"FourierFT.seed={self.seed!r} is no seed. Use an int of 0 or more, below 2^32."
            )

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """As for any family, and where there are fewer entries than wanted."""
        entries = weight.fan_in * weight.fan_out
        if self.num_frequencies > entries:
            return f"FourierFT.frequencies={self.num_frequencies}, and it has {entries} entries"
        return super().unsupported_reason(weight)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> FourierFTLeaf:
        """Entries drawn normal."""
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
    """The rows and columns of the entries that are trained, in a spectrum (fan_in, fan_out).

    They are the first of `torch.randperm(fan_in * fan_out)` with this seed, of the transpose, as in
    PEFT, whose files do not hold them.
    """
    total = fan_in * fan_out
    # Both libraries' generators are MT19937 and seeded alike.
    draws = np.random.RandomState(seed).randint(0, 2**32, num_frequencies, dtype=np.uint32)
    moved: dict[int, int] = {}
    chosen = np.empty(num_frequencies, np.int64)
    # Fisher and Yates' shuffle, of which only what is displaced is kept.
    for place, draw in enumerate(draws):
        other = place + int(draw) % (total - place) if place < total - 1 else place
        chosen[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    columns, rows = np.divmod(chosen, fan_in)
    return rows, columns


@register_family("fourierft")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTLeaf(AdapterLeaf):
    """The entries of one weight's spectrum, (*batch, frequencies)."""

    spectrum: jax.Array = array_field("spectrum")
    shape: tuple[int, ...]
    axes: WeightAxes
    num_frequencies: int
    seed: int
    alpha: float
    dropout: float

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Through the waves where that is less work for a step than a product of full size.

        For every token a step multiplies four times with each wave's two parts on both sides,
        against three times with the whole update.
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
                f"frequencies={self.num_frequencies} and seed={self.seed} choose none of {entries}"
            )

    def _frequency_indices(self) -> tuple[np.ndarray, np.ndarray]:
        """The row and column of each entry."""
        sizes = self.axis_sizes
        return sample_frequency_indices(
            self.num_frequencies, self.seed, math.prod(sizes.inputs), math.prod(sizes.outputs)
        )

    def _wave_factors(self) -> list[LabeledArray]:
        """`Re(e^{i(a + b)}) = cos a cos b - sin a sin b`, one pair of products for each entry."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        rows, columns = self._frequency_indices()

        def angles(places: np.ndarray, length: int) -> Any:
            # Modulo a turn while still integers, so that no phase is rounded.
            steps = np.outer(np.arange(length), places) % length
            return jnp.asarray(2 * np.pi * steps / length, jnp.float32)

        a, b = angles(rows, fan_in), angles(columns, fan_out)
        near = jnp.stack([jnp.cos(a), jnp.sin(a)], -1)
        far = jnp.stack([jnp.cos(b), -jnp.sin(b)], -1)
        scale = self.alpha / (fan_in * fan_out)
        waves = ("wave", "part")
        return [
            (near.reshape(*sizes.inputs, -1, 2), (*inputs, *waves)),
            (self.spectrum * scale, (*batch, "wave")),
            (far.reshape(*sizes.outputs, -1, 2), (*outputs, *waves)),
        ]

    def _update(self) -> list[LabeledArray]:
        """The whole update."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        fan_in, fan_out = math.prod(sizes.inputs), math.prod(sizes.outputs)
        rows, columns = self._frequency_indices()
        spectrum = jnp.zeros((*sizes.batch, fan_in, fan_out), self.spectrum.dtype)
        spectrum = spectrum.at[..., rows, columns].set(self.spectrum)
        update = self.alpha * jnp.fft.ifft2(spectrum).real.astype(self.spectrum.dtype)
        update = update.reshape(*sizes.batch, *sizes.inputs, *sizes.outputs)
        return [(update, (*batch, *inputs, *outputs))]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"spectrum": (*self.axis_sizes.batch, self.num_frequencies)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"spectrum": (*self.axes.batch, None)}
