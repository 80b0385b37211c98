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

from jlora import _tree
from jlora._tree import PyTree
from jlora.importance.calibration import input_moments
from jlora.importance.measure import (
    ImportanceMethod,
    MeasureRequest,
    TargetWeight,
    find_target_weights,
    group_into_passes,
    rules_for_paths,
    weight_as_matrices,
)
from jlora.importance.scores import Importance, WeightScore
from jlora.initializers import InputMoments
from jlora.interpreter.weight import promote_to_float32

StatisticFn = Callable[[jax.Array, jax.Array], jax.Array]

"""`(weight, gradient)`, both in float32 or wider, to what is summed over each matrix's entries."""

BackwardPassFn = Callable[[PyTree, Any], tuple[jax.Array, dict[str, jax.Array]]]

"""`(params, batch)` to losses and, by path, statistics (examples, *batch) of them."""


@dataclasses.dataclass(frozen=True)
class GradientMethod(ImportanceMethod):
    """A method whose score is a mean over batches of a sum over a gradient's entries.

    Attributes:
        power: The mean's root is of this power.
        per_example: Whether every row of a batch counts on its own.
    """

    power: ClassVar[int] = 1
    per_example: ClassVar[bool] = False

    @abc.abstractmethod
    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        """What is summed over the entries of a matrix."""

    def normalize(self, total: np.ndarray, target: TargetWeight) -> np.ndarray:
        """The mean of such sums as it goes into the score."""
        del target
        return total

    def measure(self, request: MeasureRequest) -> Importance:
        sites = find_target_weights(request)
        _check_importance_loss(request)
        sizes = {path: site.value.size * site.value.dtype.itemsize for path, site in sites.items()}
        passes = [
            jax.jit(make_backward_pass(self, request.fn, {path: sites[path] for path in paths}))
            for paths in group_into_passes(sizes, request.max_pass_bytes)
        ]
        totals = {path: np.zeros(site.batch) for path, site in sites.items()}
        count = 0
        for number, batch in enumerate(request.batches):
            examples = 0
            for run in passes:
                losses, found = jax.device_get(run(request.params, batch))
                _check_gradients_finite(number, losses, found)
                examples = len(losses)
                for path, statistics in found.items():
                    totals[path] += np.sum(statistics, axis=0, dtype=np.float64)
            count += examples
        weights = {}
        for path, site in sites.items():
            mean = self.normalize(totals[path] / count, site)
            weights[path] = WeightScore(site.shape, site.axes, mean ** (1 / self.power))
        return Importance(self.name, weights, count, self.power)


@dataclasses.dataclass(frozen=True)
class GradientNorm(GradientMethod):
    """The root of the mean over batches of the gradient's squared Frobenius norm."""

    name = "gradient_norm"
    power = 2

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        del weight
        return gradient**2


@dataclasses.dataclass(frozen=True)
class Fisher(GradientMethod):
    """The trace of the empirical Fisher information: squared gradients of the loss of each example
    (each row of a batch), summed over the weight and averaged over examples.

    `fn` is called on batches of one row, so all arrays of a batch have their rows first.

    References:
        Kirkpatrick et al., Overcoming catastrophic forgetting, arXiv:1612.00796, for the diagonal
        as importance. With the data's own labels it is the empirical one, which is not the Fisher
        information itself: Kunstner et al., arXiv:1905.12558.
    """

    name = "fisher"
    per_example = True

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        del weight
        return gradient**2


@dataclasses.dataclass(frozen=True)
class Sensitivity(GradientMethod):
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

    def normalize(self, total: np.ndarray, target: TargetWeight) -> np.ndarray:
        return total * math.prod(target.batch) / target.value.size


def make_backward_pass(
    method: GradientMethod, fn: Callable[[PyTree, Any], Any], targets: Mapping[str, TargetWeight]
) -> BackwardPassFn:
    """One backward pass for a few weights."""

    def one(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = _tree.flatten_with_paths(params)

        def loss(probes: dict[str, jax.Array]) -> jax.Array:
            leaves = list(flat.leaves)
            for path, site in targets.items():
                watched = _make_gradient_tap(method.statistic, site.axes.batch)
                leaves[site.leaf_index] = watched(leaves[site.leaf_index], probes[path])
            return fn(jax.tree.unflatten(flat.treedef, leaves), batch)

        return jax.value_and_grad(loss)({p: jnp.zeros(s.batch) for p, s in targets.items()})

    def by_batch(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.tree.map(lambda x: x[None], one(params, batch))

    def by_example(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return lax.map(lambda row: one(params, jax.tree.map(lambda x: x[None], row)), batch)

    return by_example if method.per_example else by_batch


def _make_gradient_tap(
    statistic: StatisticFn, batch_axes: tuple[int, ...]
) -> Callable[..., jax.Array]:
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
        rest = [axis for axis in range(weight.ndim) if axis not in batch_axes]
        found = statistic(promote_to_float32(weight), promote_to_float32(gradient)).sum(rest)
        return None, found.astype(probe.dtype)

    same.defvjp(forward, backward)
    return same


def _check_importance_loss(request: MeasureRequest) -> None:
    out = jax.eval_shape(request.fn, request.params, request.first_batch)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise TypeError(
            f"fn(params, batch) returns {out}, and gradients are those of a scalar. Return the "
            f"loss alone, a float."
        )


def _check_gradients_finite(
    batch_index: int, losses: np.ndarray, statistics: Mapping[str, np.ndarray]
) -> None:
    values = {
        "The loss": losses,
        **{f"The gradient of {path!r}": v for path, v in statistics.items()},
    }
    for what, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(
                f"{what} is NaN or infinite on batch {batch_index} (the first is 0). Leave the batch "
                f"out, or compute in a wider type."
            )


@dataclasses.dataclass(frozen=True)
class ActivationVariance(ImportanceMethod):
    """How the variance of a weight's inputs spreads over directions.

    The spectrum holds each direction's share of all variance, the largest first: what one rank more
    explains when `A` starts along these directions (`jlora.initializers.eva`). The score is how many
    directions it is as if there were: all variance over that of the first.

    It is for weights that feed products; convolutions and embeddings are left out.

    Attributes:
        moments: What `jlora.input_moments` returned, if there are some already; they decide which
            weights are scored, and of the batches only shapes are looked at. Else they are taken
            from the batches, which are then gone through once for each pass.
        center: Whether the mean is taken off first, as in `jlora.initializers.eva`.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3. The shares are its explained variance
        ratios; here they come from sums of outer products, there from an incremental decomposition.
    """

    name = "activation"

    moments: Mapping[str, InputMoments] | None = None
    center: bool = True

    def measure(self, request: MeasureRequest) -> Importance:
        if self.moments is not None:
            sites = find_target_weights(request._replace(rules=rules_for_paths(self.moments)))
            weights = {
                path: self._score_weight(path, s, self.moments[path]) for path, s in sites.items()
            }
            return Importance(self.name, weights)
        shapes = _make_moments_fn(request.fn, request.rules)
        found = jax.eval_shape(shapes, request.params, request.first_batch)
        sites = find_target_weights(request._replace(rules=rules_for_paths(found)))
        sizes = {path: 4 * math.prod(found[path].outer_product_sum.shape) for path in sites}
        passes = group_into_passes(sizes, request.max_pass_bytes)
        batches = request.batches if len(passes) == 1 else list(request.batches)
        weights, count = {}, 0
        for paths in passes:
            run = jax.jit(_make_moments_fn(request.fn, rules_for_paths(paths)))
            sums, count = None, 0
            for batch in batches:
                one = run(request.params, batch)
                sums = one if sums is None else jax.tree.map(jnp.add, sums, one)
                count += 1
            for path in paths:
                assert sums is not None
                weights[path] = self._score_weight(path, sites[path], sums[path])
        return Importance(self.name, weights, count)

    def _score_weight(self, path: str, target: TargetWeight, moments: InputMoments) -> WeightScore:
        batch, inputs, _ = WeightScore(target.shape, target.axes, np.zeros(target.batch)).axis_sizes
        fan_in = math.prod(inputs)
        expected = (math.prod(batch), fan_in, fan_in)
        if moments.outer_product_sum.shape != expected:
            raise ValueError(
                f"The moments of {path!r} have shape {moments.outer_product_sum.shape}, expected {expected}. "
                f"Take them from the same model."
            )
        if not np.asarray(moments.num_inputs).all():
            raise ValueError(
                f"{path!r} met no input on these batches: it is behind a stop_gradient or an "
                f"argmax, or an expert that no token was sent to. Leave it out, or give more "
                f"batches."
            )
        variances = np.asarray(_principal_variances(moments, center=self.center), np.float64)
        if not np.isfinite(variances).all():
            raise ValueError(
                f"The inputs of {path!r} are NaN or infinite on some batch. Leave that batch out."
            )
        variances = np.maximum(variances[..., ::-1], 0)  # Rounding makes some just negative.
        total, first = variances.sum(-1), variances[..., 0]
        spectrum = variances / np.where(total > 0, total, 1)[..., None]
        scores = total / np.where(first > 0, first, 1)
        return WeightScore(
            target.shape, target.axes, scores.reshape(batch), spectrum.reshape(*batch, fan_in)
        )


def _make_moments_fn(
    fn: Callable[..., Any], rules: Any
) -> Callable[[Any, Any], dict[str, InputMoments]]:
    return lambda params, batch: input_moments(fn, rules, params, batch)


@jax.jit(static_argnames="center")
def _principal_variances(moments: InputMoments, *, center: bool) -> jax.Array:
    """Of a weight's inputs along their principal directions, (batch, fan_in), smallest first."""

    def one(moments: InputMoments) -> jax.Array:
        number, first, second = moments
        spread = second - jnp.outer(first, first) / number if center else second
        return jnp.linalg.eigvalsh(spread / number)

    return lax.map(one, moments)


@dataclasses.dataclass(frozen=True)
class ConditionNumber(ImportanceMethod):
    """The logarithm, to base ten, of a weight's condition number: its largest singular value over
    its smallest.

    Singular values below float32's rounding of the largest count as that; a weight of zeros scores
    zero. Needs no data; exact, so that large matrices take minutes each on a CPU.
    """

    name = "condition"

    def measure(self, request: MeasureRequest) -> Importance:
        return _measure_weight_spectra(self.name, request, _log10_condition_number)


@dataclasses.dataclass(frozen=True)
class StableRank(ImportanceMethod):
    """A weight's stable rank: its squared Frobenius norm over its squared spectral norm.

    Between one and the rank; it is the same for all multiples of a weight. A weight of zeros scores
    zero. Needs no data.

    References:
        Zhang et al., SR-LoRA, arXiv:2507.00327, which takes it as a prior for ranks.
    """

    name = "stable_rank"

    def measure(self, request: MeasureRequest) -> Importance:
        return _measure_weight_spectra(self.name, request, _stable_rank)


def _measure_weight_spectra(
    method_name: str, request: MeasureRequest, score: Callable[[jax.Array], jax.Array]
) -> Importance:
    weights = {}
    for path, site in find_target_weights(request).items():
        scores = np.asarray(_score_each_matrix(weight_as_matrices(site), score), np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{path!r} holds NaN or infinite numbers, and has no spectrum. Load it anew."
            )
        weights[path] = WeightScore(site.shape, site.axes, scores.reshape(site.batch))
    return Importance(method_name, weights)


@jax.jit(static_argnames="score")
def _score_each_matrix(matrices: jax.Array, score: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The score of each matrix, one after the other: a decomposition needs room of its own."""
    return lax.map(lambda matrix: score(promote_to_float32(matrix)), matrices)


def _log10_condition_number(matrix: jax.Array) -> jax.Array:
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
