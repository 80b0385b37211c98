"""How the changes of several adapters become one: what is dropped of each, and how they are summed.

A method is these two choices. Pruning is done on one adapter's change of one matrix, (fan_in,
fan_out); consensus on the weighted changes of all, (adapters, fan_in, fan_out).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora import _validation


def magnitude_based_pruning(delta: jax.Array, density: float) -> jax.Array:
    """The change with only its largest entries: `density` of them, at least one."""
    count = max(1, int(density * delta.size))
    _, places = jax.lax.top_k(jnp.abs(delta).ravel(), count)
    kept = jnp.zeros(delta.size, bool).at[places].set(True)
    return jnp.where(kept.reshape(delta.shape), delta, 0)


def random_pruning(delta: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """The change with each entry kept with probability `density`, and then divided by it."""
    kept = jax.random.bernoulli(key, density, delta.shape)
    return jnp.where(kept, delta / density, 0)


def magprune(delta: jax.Array, density: float, epsilon: float, key: jax.Array) -> jax.Array:
    """The change with each entry kept with a probability of its own, and then divided by it.

    Among the inputs of an output the probability grows evenly from `density - epsilon` for the
    smallest magnitude to `density + epsilon` for the largest.
    """
    inputs = delta.shape[-2]
    ranks = jnp.argsort(jnp.argsort(jnp.abs(delta), axis=-2), axis=-2)
    # A single input is in the middle.
    place = ranks / (inputs - 1) if inputs > 1 else jnp.full(delta.shape, 0.5)
    chance = (density - epsilon + 2 * epsilon * place).astype(delta.dtype)
    kept = jax.random.bernoulli(key, chance)
    return jnp.where(kept, delta / chance, 0)


def sum_deltas(weighted: jax.Array) -> jax.Array:
    """The sum of the changes."""
    return weighted.sum(0)


def disjoint_merge(weighted: jax.Array) -> jax.Array:
    """For every entry the mean of those changes that have the sign of the sum.

    A sum of zero counts as positive. A change of zero has no sign and counts nowhere. Where one is
    NaN, so is the result.
    """
    summed = weighted.sum(0)
    elected = jnp.where(summed >= 0, 1, -1)
    agree = jnp.sign(weighted) == elected
    mean = jnp.where(agree, weighted, 0).sum(0) / jnp.maximum(agree.sum(0), 1)
    return jnp.where(jnp.isnan(summed), summed, mean)


class MergeMethod(abc.ABC):
    """A way to combine changes: what is dropped of each, and how what is left is put together.

    Subclasses are frozen dataclasses.
    """

    is_random: ClassVar[bool] = False  # Whether it draws, and so needs a key.

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """One adapter's change of one matrix, (fan_in, fan_out), without what is dropped."""
        del key
        return delta

    @abc.abstractmethod
    def consensus(self, weighted: jax.Array) -> jax.Array:
        """One change, (fan_in, fan_out), of the weighted ones, (adapters, fan_in, fan_out)."""

    def combine(
        self, deltas: jax.Array, weights: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """The combined change of one matrix, (fan_in, fan_out).

        Args:
            deltas: (adapters, fan_in, fan_out).
            weights: (adapters,).
            keys: (adapters,), for a method that draws.
        """
        pruned = jax.vmap(self.prune)(deltas, keys)
        return self.consensus(weights[:, None, None] * pruned)


@dataclasses.dataclass(frozen=True)
class Linear(MergeMethod):
    """`sum_i w_i delta_i`: exact, with nothing dropped.

    Addition, negation and analogies of task arithmetic are weights of 1 and -1.

    References:
        Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
    """

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """The sum."""
        return sum_deltas(weighted)


@dataclasses.dataclass(frozen=True)
class Magnitude(MergeMethod):
    """`sum_i w_i trim(delta_i)`: of each change only its largest entries.

    Attributes:
        density: The share of entries that are kept in each matrix, at least one of them.

    Raises:
        ValueError: For a density that is no share.

    References:
        The trimming of TIES (Yadav et al., arXiv:2306.01708, section 4) alone; PEFT's
        magnitude_prune.
    """

    density: float

    def __post_init__(self) -> None:
        _check_merge_density(self)

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """Its largest entries."""
        del key
        return magnitude_based_pruning(delta, self.density)

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """The sum."""
        return sum_deltas(weighted)


@dataclasses.dataclass(frozen=True)
class TIES(Magnitude):
    """Trim, elect a sign for every entry, and take the mean of those that have it.

    The paper trims the whole model's change at once; here each matrix is trimmed by itself, as in
    PEFT and mergekit. Signs are elected by the weighted changes, as in mergekit, so that a negative
    weight votes against its adapter's sign; the mean is over their number, as in PEFT, so that
    equal weights are the paper's factor on the result.

    Attributes:
        density: The share of entries that are kept in each matrix; the paper's default is 0.2.

    References:
        Yadav et al., TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1.
    """

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """The mean of those with the elected sign."""
        return disjoint_merge(weighted)


@dataclasses.dataclass(frozen=True)
class DARE(MergeMethod):
    """Drop entries at random and rescale the others, so that the expected change is the whole one.

    Attributes:
        density: The probability that an entry is kept, one less the paper's drop rate.
        elect_signs: Whether the consensus is that of TIES (DARE-TIES) and not the sum.

    Raises:
        ValueError: For a density that is no share.
        TypeError: For elect_signs that is no flag.

    References:
        Yu et al., Language Models are Super Mario, arXiv:2311.03099, section 3.
    """

    density: float
    elect_signs: bool = False
    is_random = True

    def __post_init__(self) -> None:
        _check_merge_density(self)
        _validation.check_bool("DARE.elect_signs", self.elect_signs)

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is drawn of it, rescaled."""
        assert key is not None
        return random_pruning(delta, self.density, key)

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """The sum, or the mean of those with the elected sign."""
        return (disjoint_merge if self.elect_signs else sum_deltas)(weighted)


@dataclasses.dataclass(frozen=True)
class DELLA(MergeMethod):
    """Drop entries at random, small ones more often, rescale the others, and elect signs.

    The probabilities are those of the authors' code: even steps in the rank of an entry's magnitude
    among the inputs of its output. Its window size is twice this epsilon.

    Attributes:
        density: The mean probability that an entry is kept.
        epsilon: How far the probabilities of the smallest and the largest are from it.
        elect_signs: Whether the consensus is that of TIES and not the sum.

    Raises:
        ValueError: When a probability would not be above zero and at most one.
        TypeError: For elect_signs that is no flag.

    References:
        Deep et al., DELLA-Merging, arXiv:2406.11617, section 3 (MagPrune, elect, fuse);
        github.com/declare-lab/della.
    """

    density: float
    epsilon: float
    elect_signs: bool = True
    is_random = True

    def __post_init__(self) -> None:
        _check_merge_density(self)
        _validation.check_bool("DELLA.elect_signs", self.elect_signs)
        _validation.check_std("DELLA.epsilon", self.epsilon)
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"DELLA.epsilon={self.epsilon} around density={self.density} gives probabilities "
                f"from {self.density - self.epsilon:g} to {self.density + self.epsilon:g}, which "
                f"must be above 0 and at most 1. Use a smaller epsilon."
            )

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is drawn of it, rescaled."""
        assert key is not None
        return magprune(delta, self.density, self.epsilon, key)

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """The mean of those with the elected sign, or the sum."""
        return (disjoint_merge if self.elect_signs else sum_deltas)(weighted)


def _check_merge_density(method: Magnitude | DARE | DELLA) -> None:
    density = method.density
    if (
        not _validation.is_real_number(density)
        or not math.isfinite(density)
        or not 0 < density <= 1
    ):
        raise ValueError(
            f"{type(method).__name__}.density={density!r} is no share of entries to keep. Use a "
            f"number above 0 and up to 1, such as 0.2."
        )
