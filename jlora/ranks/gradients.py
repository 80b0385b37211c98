"""Importance from gradients, each reduced to a few numbers as soon as the backward pass has it."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import tree
from jlora.adapters.protocol import wide
from jlora.ranks.measuring import Asked, Method, Site, in_passes, sites_of
from jlora.ranks.scores import Importance, Scored

PyTree = Any
Statistic = Callable[[jax.Array, jax.Array], jax.Array]
"""`(weight, gradient)`, both in float32 or wider, to what is summed over each matrix's entries."""
Pass = Callable[[PyTree, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""`(params, batch)` to losses and, by path, statistics (examples, *batch) of them."""


@dataclasses.dataclass(frozen=True)
class Gradients(Method):
    """A method whose score is a mean over batches of a sum over a gradient's entries.

    Attributes:
        power: The mean's root is of this power.
        by_example: Whether every row of a batch counts on its own.
    """

    power: ClassVar[int] = 1
    by_example: ClassVar[bool] = False

    @abc.abstractmethod
    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        """What is summed over the entries of a matrix."""

    def normalised(self, total: np.ndarray, site: Site) -> np.ndarray:
        """The mean of such sums as it goes into the score."""
        del site
        return total

    def measure(self, asked: Asked) -> Importance:
        sites = sites_of(asked)
        _check_loss(asked)
        sizes = {path: site.value.size * site.value.dtype.itemsize for path, site in sites.items()}
        passes = [
            jax.jit(pass_of(self, asked.fn, {path: sites[path] for path in paths}))
            for paths in in_passes(sizes, asked.pass_bytes)
        ]
        totals = {path: np.zeros(site.batch) for path, site in sites.items()}
        count = 0
        for number, batch in enumerate(asked.batches):
            examples = 0
            for run in passes:
                losses, found = jax.device_get(run(asked.params, batch))
                _check_finite(number, losses, found)
                examples = len(losses)
                for path, statistics in found.items():
                    totals[path] += np.sum(statistics, axis=0, dtype=np.float64)
            count += examples
        weights = {}
        for path, site in sites.items():
            mean = self.normalised(totals[path] / count, site)
            weights[path] = Scored(site.shape, site.axes, mean ** (1 / self.power))
        return Importance(self.name, weights, count, self.power)


@dataclasses.dataclass(frozen=True)
class GradientNorm(Gradients):
    """The root of the mean over batches of the gradient's squared Frobenius norm."""

    name = "gradient_norm"
    power = 2

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        del weight
        return gradient**2


@dataclasses.dataclass(frozen=True)
class Fisher(Gradients):
    """The trace of the empirical Fisher information: squared gradients of the loss of each example
    (each row of a batch), summed over the weight and averaged over examples.

    `fn` is called on batches of one row, so all arrays of a batch have their rows first.

    References:
        Kirkpatrick et al., Overcoming catastrophic forgetting, arXiv:1612.00796, for the diagonal
        as importance. With the data's own labels it is the empirical one, which is not the Fisher
        information itself: Kunstner et al., arXiv:1905.12558.
    """

    name = "fisher"
    by_example = True

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        del weight
        return gradient**2


@dataclasses.dataclass(frozen=True)
class Sensitivity(Gradients):
    """The mean over batches and over a weight's entries of `|w dL/dw|`: to first order, how far the
    loss moves when an entry is set to zero.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, equation 8, without the smoothing of equation 9.
        He et al., GoRA, arXiv:2502.12171, equation 5, averages gradients before it takes absolute
        values, for which a gradient of the whole model has to be kept; here every batch counts.
    """

    name = "sensitivity"

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.abs(weight * gradient)

    def normalised(self, total: np.ndarray, site: Site) -> np.ndarray:
        return total * math.prod(site.batch) / site.value.size


def pass_of(method: Gradients, fn: Callable[[PyTree, Any], Any], sites: Mapping[str, Site]) -> Pass:
    """One backward pass for a few weights."""

    def one(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = tree.flatten(params)

        def loss(probes: dict[str, jax.Array]) -> jax.Array:
            leaves = list(flat.leaves)
            for path, site in sites.items():
                watched = _watched(method.statistic, site.axes.batch)
                leaves[site.place] = watched(leaves[site.place], probes[path])
            return fn(jax.tree.unflatten(flat.treedef, leaves), batch)

        return jax.value_and_grad(loss)({p: jnp.zeros(s.batch) for p, s in sites.items()})

    def by_batch(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.tree.map(lambda x: x[None], one(params, batch))

    def by_example(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return lax.map(lambda row: one(params, jax.tree.map(lambda x: x[None], row)), batch)

    return by_example if method.by_example else by_batch


def _watched(statistic: Statistic, batch: tuple[int, ...]) -> Callable[..., jax.Array]:
    """The identity of a weight, beside a probe (*batch) whose gradient becomes the statistic of the
    weight's.

    The weight itself is not differentiated, so nothing keeps its gradient once it is reduced.
    """

    @jax.custom_vjp
    def same(weight: jax.Array, probe: jax.Array) -> jax.Array:
        del probe
        return weight

    def forward(
        weight: jax.Array, probe: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return weight, (weight, probe)

    def backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[None, jax.Array]:
        weight, probe = kept
        rest = [axis for axis in range(weight.ndim) if axis not in batch]
        found = statistic(wide(weight), wide(gradient)).sum(rest)
        return None, found.astype(probe.dtype)

    same.defvjp(forward, backward)
    return same


def _check_loss(asked: Asked) -> None:
    out = jax.eval_shape(asked.fn, asked.params, asked.first)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise TypeError(
            f"fn(params, batch) returns {out}, and gradients are those of a scalar. Return the "
            f"loss alone, a float."
        )


def _check_finite(number: int, losses: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    values = {"The loss": losses, **{f"The gradient of {path!r}": v for path, v in found.items()}}
    for what, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(
                f"{what} is NaN or infinite on batch {number} (the first is 0). Leave the batch "
                f"out, or compute in a wider type."
            )
