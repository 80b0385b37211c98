"""Importance from spectra: of what weights meet, and of the weights themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.adapters.inits import Moments
from jlora.adapters.protocol import wide
from jlora.calibration import input_moments
from jlora.ranks.measuring import Asked, Method, Site, exactly, in_passes, matrices_of, sites_of
from jlora.ranks.scores import Importance, Scored


@dataclasses.dataclass(frozen=True)
class Activation(Method):
    """How the variance of a weight's inputs spreads over directions.

    The spectrum holds each direction's share of all variance, the largest first: what one rank more
    explains when `A` starts along these directions (`jlora.inits.eva`). The score is how many
    directions it is as if there were: all variance over that of the first.

    It is for weights that feed products; convolutions and embeddings are left out.

    Attributes:
        moments: What `jlora.input_moments` returned, if there are some already; they decide which
            weights are scored, and of the batches only shapes are looked at. Else they are taken
            from the batches, which are then gone through once for each pass.
        center: Whether the mean is taken off first, as in `jlora.inits.eva`.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3. The shares are its explained variance
        ratios; here they come from sums of outer products, there from an incremental decomposition.
    """

    name = "activation"

    moments: Mapping[str, Moments] | None = None
    center: bool = True

    def measure(self, asked: Asked) -> Importance:
        if self.moments is not None:
            sites = sites_of(asked._replace(rules=exactly(self.moments)))
            weights = {path: self._scored(path, s, self.moments[path]) for path, s in sites.items()}
            return Importance(self.name, weights)
        shapes = _moments(asked.fn, asked.rules)
        found = jax.eval_shape(shapes, asked.params, asked.first)
        sites = sites_of(asked._replace(rules=exactly(found)))
        sizes = {path: 4 * math.prod(found[path].second.shape) for path in sites}
        passes = in_passes(sizes, asked.pass_bytes)
        batches = asked.batches if len(passes) == 1 else list(asked.batches)
        weights, count = {}, 0
        for paths in passes:
            run = jax.jit(_moments(asked.fn, exactly(paths)))
            sums, count = None, 0
            for batch in batches:
                one = run(asked.params, batch)
                sums = one if sums is None else jax.tree.map(jnp.add, sums, one)
                count += 1
            for path in paths:
                assert sums is not None
                weights[path] = self._scored(path, sites[path], sums[path])
        return Importance(self.name, weights, count)

    def _scored(self, path: str, site: Site, moments: Moments) -> Scored:
        batch, inputs, _ = Scored(site.shape, site.axes, np.zeros(site.batch)).groups
        fan_in = math.prod(inputs)
        expected = (math.prod(batch), fan_in, fan_in)
        if moments.second.shape != expected:
            raise ValueError(
                f"The moments of {path!r} have shape {moments.second.shape}, expected {expected}. "
                f"Take them from the same model."
            )
        if not np.asarray(moments.number).all():
            raise ValueError(
                f"{path!r} met no input on these batches: it is behind a stop_gradient or an "
                f"argmax, or an expert that no token was sent to. Leave it out, or give more "
                f"batches."
            )
        variances = np.asarray(_variances(moments, center=self.center), np.float64)
        if not np.isfinite(variances).all():
            raise ValueError(
                f"The inputs of {path!r} are NaN or infinite on some batch. Leave that batch out."
            )
        variances = np.maximum(variances[..., ::-1], 0)  # Rounding makes some just negative.
        total, first = variances.sum(-1), variances[..., 0]
        spectrum = variances / np.where(total > 0, total, 1)[..., None]
        scores = total / np.where(first > 0, first, 1)
        return Scored(
            site.shape, site.axes, scores.reshape(batch), spectrum.reshape(*batch, fan_in)
        )


def _moments(fn: Callable[..., Any], rules: Any) -> Callable[[Any, Any], dict[str, Moments]]:
    return lambda params, batch: input_moments(fn, rules, params, batch)


@jax.jit(static_argnames="center")
def _variances(moments: Moments, *, center: bool) -> jax.Array:
    """Of a weight's inputs along their principal directions, (batch, fan_in), smallest first."""

    def one(moments: Moments) -> jax.Array:
        number, first, second = moments
        spread = second - jnp.outer(first, first) / number if center else second
        return jnp.linalg.eigvalsh(spread / number)

    return lax.map(one, moments)


@dataclasses.dataclass(frozen=True)
class Condition(Method):
    """The logarithm, to base ten, of a weight's condition number: its largest singular value over
    its smallest.

    Singular values below float32's rounding of the largest count as that; a weight of zeros scores
    zero. Needs no data; exact, so that large matrices take minutes each on a CPU.
    """

    name = "condition"

    def measure(self, asked: Asked) -> Importance:
        return _of_weights(self.name, asked, _condition)


@dataclasses.dataclass(frozen=True)
class StableRank(Method):
    """A weight's stable rank: its squared Frobenius norm over its squared spectral norm.

    Between one and the rank; it is the same for all multiples of a weight. A weight of zeros scores
    zero. Needs no data.

    References:
        Zhang et al., SR-LoRA, arXiv:2507.00327, which takes it as a prior for ranks.
    """

    name = "stable_rank"

    def measure(self, asked: Asked) -> Importance:
        return _of_weights(self.name, asked, _stable_rank)


def _of_weights(name: str, asked: Asked, score: Callable[[jax.Array], jax.Array]) -> Importance:
    weights = {}
    for path, site in sites_of(asked).items():
        scores = np.asarray(_each(matrices_of(site), score), np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{path!r} holds NaN or infinite numbers, and has no spectrum. Load it anew."
            )
        weights[path] = Scored(site.shape, site.axes, scores.reshape(site.batch))
    return Importance(name, weights)


@jax.jit(static_argnames="score")
def _each(matrices: jax.Array, score: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The score of each matrix, one after the other: a decomposition needs room of its own."""
    return lax.map(lambda matrix: score(wide(matrix)), matrices)


def _condition(matrix: jax.Array) -> jax.Array:
    values = jnp.linalg.svd(matrix, compute_uv=False)
    rounding = values[0] * jnp.finfo(values.dtype).eps * max(matrix.shape)
    ratio = values[0] / jnp.maximum(values[-1], rounding)
    return jnp.where(values[0] == 0, 0, jnp.log10(ratio))


def _stable_rank(matrix: jax.Array) -> jax.Array:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    largest = jnp.abs(tall).max()
    # Of numbers around one, whose squares float32 can hold.
    tall = tall / jnp.where(largest == 0, 1, largest)
    exact = lax.Precision.HIGHEST
    squares = jnp.linalg.eigvalsh(jnp.matmul(tall.T, tall, precision=exact))
    return jnp.where(largest == 0, 0, jnp.sum(tall**2) / squares[-1])
