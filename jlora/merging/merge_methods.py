"""Merge methods: pruning of each adapter's update, and a consensus of the pruned updates.

Pruning takes one adapter's update of one matrix, (fan_in, fan_out). Consensus takes the weighted
updates of all adapters, (adapters, fan_in, fan_out).
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
    """Zeroes all but the largest fraction `density` of the entries, at least one."""
    count = max(1, int(density * delta.size))
    _, largest = jax.lax.top_k(jnp.abs(delta).ravel(), count)
    mask = jnp.zeros(delta.size, bool).at[largest].set(True)
    return jnp.where(mask.reshape(delta.shape), delta, 0)


def random_pruning(delta: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Keeps each entry with probability `density` and divides it by that probability."""
    mask = jax.random.bernoulli(key, density, delta.shape)
    return jnp.where(mask, delta / density, 0)


def magprune(delta: jax.Array, density: float, epsilon: float, key: jax.Array) -> jax.Array:
    """Keeps each entry with a probability of its own and divides it by that probability.

    Among the inputs of an output, the probability grows in even steps from `density - epsilon` for
    the smallest magnitude to `density + epsilon` for the largest.
    """
    inputs = delta.shape[-2]
    ranks = jnp.argsort(jnp.argsort(jnp.abs(delta), axis=-2), axis=-2)
    # A single input is in the middle.
    quantile = ranks / (inputs - 1) if inputs > 1 else jnp.full(delta.shape, 0.5)
    probability = (density - epsilon + 2 * epsilon * quantile).astype(delta.dtype)
    mask = jax.random.bernoulli(key, probability)
    return jnp.where(mask, delta / probability, 0)


def sum_deltas(weighted: jax.Array) -> jax.Array:
    """Returns the sum of the updates, (fan_in, fan_out)."""
    return weighted.sum(0)


def disjoint_merge(weighted: jax.Array) -> jax.Array:
    """Returns, for each entry, the mean of the updates that have the sign of their sum.

    A sum of zero counts as positive. An update of zero has no sign and does not count. NaN in any
    update is NaN in the result.
    """
    total = weighted.sum(0)
    elected = jnp.where(total >= 0, 1, -1)
    agree = jnp.sign(weighted) == elected
    mean = jnp.where(agree, weighted, 0).sum(0) / jnp.maximum(agree.sum(0), 1)
    return jnp.where(jnp.isnan(total), total, mean)


class MergeMethod(abc.ABC):
    """Base class of merge methods: `prune` for one update, `consensus` for the weighted updates.

    Subclasses are frozen dataclasses.

    Attributes:
        is_random: True for a method that draws random numbers and so requires a key.

    Example:
        >>> import dataclasses
        >>> import jax.numpy as jnp
        >>> from jlora.merging import MergeMethod
        >>> @dataclasses.dataclass(frozen=True)
        ... class Median(MergeMethod):
        ...     def consensus(self, weighted):
        ...         return jnp.median(weighted, axis=0)
        >>> Median().combine(jnp.array([[[1.0]], [[2.0]], [[9.0]]]), jnp.ones(3)).item()
        2.0
    """

    is_random: ClassVar[bool] = False

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """Prunes one adapter's update of one matrix, (fan_in, fan_out)."""
        del key
        return delta

    @abc.abstractmethod
    def consensus(self, weighted: jax.Array) -> jax.Array:
        """Reduces weighted updates, (adapters, fan_in, fan_out), to one, (fan_in, fan_out)."""

    def combine(
        self, deltas: jax.Array, weights: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """Returns the combined update of one matrix, (fan_in, fan_out).

        Args:
            deltas: Updates, (adapters, fan_in, fan_out).
            weights: Mixing weights, (adapters,).
            keys: Random keys, (adapters,); None for a method that is not random.
        """
        pruned = jax.vmap(self.prune)(deltas, keys)
        return self.consensus(weights[:, None, None] * pruned)


@dataclasses.dataclass(frozen=True)
class Linear(MergeMethod):
    """Task arithmetic: `sum_i w_i delta_i`, exact and without pruning.

    Addition, negation and analogies of task arithmetic are weights of 1 and -1.

    References:
        Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.merging import Linear
        >>> Linear().combine(jnp.array([[[1.0, 2.0]], [[3.0, 5.0]]]), jnp.array([1.0, -1.0]))
        Array([[-2., -3.]], dtype=float32)
    """

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """Returns the sum of the updates."""
        return sum_deltas(weighted)


@dataclasses.dataclass(frozen=True)
class Magnitude(MergeMethod):
    """Magnitude pruning: `sum_i w_i trim(delta_i)`, with the largest entries of each update.

    Attributes:
        density: Fraction of the entries kept in each matrix, above 0 and up to 1; at least one
            entry is kept.

    Raises:
        ValueError: `density` is out of its range.

    References:
        The trimming of TIES (Yadav et al., arXiv:2306.01708, section 4) alone; PEFT's
        magnitude_prune.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.merging import Magnitude
        >>> Magnitude(density=0.5).combine(jnp.array([[[1.0, -3.0]]]), jnp.ones(1))
        Array([[ 0., -3.]], dtype=float32)
    """

    density: float

    def __post_init__(self) -> None:
        _check_merge_density(self)

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """Zeroes all but the largest entries."""
        del key
        return magnitude_based_pruning(delta, self.density)

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """Returns the sum of the updates."""
        return sum_deltas(weighted)


@dataclasses.dataclass(frozen=True)
class TIES(Magnitude):
    """TIES: trims, elects a sign for each entry, and averages the updates with that sign.

    The paper trims the update of the complete model at once. Here each matrix is trimmed by
    itself, as in PEFT and mergekit. Signs are elected by the weighted updates, as in mergekit, so
    that a negative weight votes against its adapter's sign. The mean divides by the number of
    agreeing updates, as in PEFT, so that equal weights are the paper's factor on the result.

    Attributes:
        density: Fraction of the entries kept in each matrix, above 0 and up to 1; the paper's
            default is 0.2.

    Raises:
        ValueError: `density` is out of its range.

    References:
        Yadav et al., TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.merging import TIES
        >>> TIES(density=1.0).combine(jnp.array([[[2.0, -3.0]], [[4.0, 1.0]]]), jnp.ones(2))
        Array([[ 3., -3.]], dtype=float32)
    """

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """Returns the mean of the updates with the elected sign."""
        return disjoint_merge(weighted)


@dataclasses.dataclass(frozen=True)
class DARE(MergeMethod):
    """DARE: drops entries at random and rescales the rest, which preserves the expected update.

    Attributes:
        density: Probability of keeping an entry, above 0 and up to 1: one minus the paper's drop
            rate.
        elect_signs: True for the consensus of TIES (DARE-TIES); False for the sum.

    Raises:
        ValueError: `density` is out of its range.
        TypeError: `elect_signs` is not a bool.

    References:
        Yu et al., Language Models are Super Mario, arXiv:2311.03099, section 3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora.merging import DARE
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> DARE(density=1.0).combine(jnp.array([[[1.0, -3.0]]]), jnp.ones(1), keys)
        Array([[ 1., -3.]], dtype=float32)
    """

    density: float
    elect_signs: bool = False
    is_random = True

    def __post_init__(self) -> None:
        _check_merge_density(self)
        _validation.check_bool("DARE.elect_signs", self.elect_signs)

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """Keeps random entries, rescaled by their probability."""
        assert key is not None
        return random_pruning(delta, self.density, key)

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """Returns the sum, or with `elect_signs` the mean of the updates with the elected sign."""
        return (disjoint_merge if self.elect_signs else sum_deltas)(weighted)


@dataclasses.dataclass(frozen=True)
class DELLA(MergeMethod):
    """DELLA: drops entries at random, small ones more often, rescales the rest, and elects signs.

    The probabilities are those of the authors' code: even steps in the rank of an entry's
    magnitude among the inputs of its output. The authors' window size is twice this epsilon.

    Attributes:
        density: Mean probability of keeping an entry, above 0 and up to 1.
        epsilon: Difference between `density` and the probability of the smallest entry, and of the
            largest entry.
        elect_signs: True for the consensus of TIES; False for the sum.

    Raises:
        ValueError: A probability would be 0 or less, or above 1.
        TypeError: `elect_signs` is not a bool.

    References:
        Deep et al., DELLA-Merging, arXiv:2406.11617, section 3 (MagPrune, elect, fuse);
        github.com/declare-lab/della.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora.merging import DELLA
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> DELLA(density=0.5, epsilon=0.3).combine(jnp.ones((2, 6, 5)), jnp.ones(2), keys).shape
        (6, 5)
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
                f"DELLA.epsilon={self.epsilon}: the probabilities must be above 0 and at most 1, "
                f"got {self.density - self.epsilon:g} to "
                f"{self.density + self.epsilon:g}. Use a smaller epsilon."
            )

    def prune(self, delta: jax.Array, key: jax.Array | None) -> jax.Array:
        """Keeps random entries, rescaled by their probability."""
        assert key is not None
        return magprune(delta, self.density, self.epsilon, key)

    def consensus(self, weighted: jax.Array) -> jax.Array:
        """Returns the mean of the updates with the elected sign, or else the sum."""
        return (disjoint_merge if self.elect_signs else sum_deltas)(weighted)


def _check_merge_density(method: Magnitude | DARE | DELLA) -> None:
    density = method.density
    if (
        not _validation.is_real_number(density)
        or not math.isfinite(density)
        or not 0 < density <= 1
    ):
        raise ValueError(
            f"{type(method).__name__}.density={density!r} must be a fraction of the entries, above "
            f"0 and up to 1. Use a number such as 0.2."
        )
