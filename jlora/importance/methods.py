"""Importance methods: gradients, variance of inputs, and singular values of the weights.

Each gradient is reduced to its statistics as soon as the backward pass has computed it.
"""

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

# From `(weight, gradient)`, both in float32 or wider, to the terms summed over a matrix's entries.
StatisticFn = Callable[[jax.Array, jax.Array], jax.Array]

# From `(params, batch)` to losses and, by path, their statistics, (examples, *batch).
BackwardPassFn = Callable[[PyTree, Any], tuple[jax.Array, dict[str, jax.Array]]]


_NO_TOKENS = "No batch has a token that counts: token_mask is zero everywhere. Use other batches."


@dataclasses.dataclass(frozen=True)
class GradientMethod(ImportanceMethod):
    """Base of methods whose score is a mean over batches of a sum over a gradient's entries.

    Attributes:
        power: Power of the score that the mean is; its root is the score.
        per_example: Means over examples instead of batches.
    """

    power: ClassVar[int] = 1
    per_example: ClassVar[bool] = False

    @abc.abstractmethod
    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        """Returns the terms that are summed over the entries of a matrix."""

    def normalize(self, total: np.ndarray, target: TargetWeight) -> np.ndarray:
        """Returns the value that enters the score, from the mean of such sums."""
        del target
        return total

    def measure(self, request: MeasureRequest) -> Importance:
        targets = find_target_weights(request)
        _check_importance_loss(request)
        sizes = {
            path: target.value.size * target.value.dtype.itemsize
            for path, target in targets.items()
        }
        passes = [
            jax.jit(make_backward_pass(self, request.fn, {path: targets[path] for path in paths}))
            for paths in group_into_passes(sizes, request.max_pass_bytes)
        ]
        totals = {path: np.zeros(target.batch) for path, target in targets.items()}
        count = 0
        for i, batch in enumerate(request.batches):
            num_examples = 0
            for backward_pass in passes:
                losses, statistics = jax.device_get(backward_pass(request.params, batch))
                _check_gradients_finite(i, losses, statistics)
                counted = _examples_with_tokens(request, batch, len(losses))
                num_examples = int(counted.sum())
                for path, values in statistics.items():
                    totals[path] += np.sum(values[counted], axis=0, dtype=np.float64)
            count += num_examples
        if not count:
            raise ValueError(_NO_TOKENS)
        weights = {}
        for path, target in targets.items():
            mean = self.normalize(totals[path] / count, target)
            weights[path] = WeightScore(target.shape, target.axes, mean ** (1 / self.power))
        return Importance(self.name, weights, count, self.power)


@dataclasses.dataclass(frozen=True)
class GradientNorm(GradientMethod):
    """Root of the mean over batches of the gradient's squared Frobenius norm.

    Example:
        >>> import jlora
        >>> jlora.importance.GradientNorm().power
        2
    """

    name = "gradient_norm"
    power = 2

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        del weight
        return gradient**2


@dataclasses.dataclass(frozen=True)
class Fisher(GradientMethod):
    """Trace of the empirical Fisher information, averaged over examples.

    It is the sum over the weight of squared gradients of each example's loss. `fn` is called on
    batches of one example, so the first axis of every array in a batch must be that of examples.

    References:
        Kirkpatrick et al., Overcoming catastrophic forgetting, arXiv:1612.00796, for the diagonal
        as importance. With the data's own labels it is the empirical one, which is not the Fisher
        information itself: Kunstner et al., arXiv:1905.12558.

    Example:
        >>> import jlora
        >>> jlora.importance.Fisher().per_example
        True
    """

    name = "fisher"
    per_example = True

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        del weight
        return gradient**2


@dataclasses.dataclass(frozen=True)
class Sensitivity(GradientMethod):
    """Mean over batches and entries of `|w dL/dw|`.

    To first order, it is the change of the loss when an entry is set to zero.

    References:
        Zhang et al., AdaLoRA, arXiv:2303.10512, equation 8, without the smoothing of equation 9.
        He et al., GoRA, arXiv:2502.12171, equation 5, averages gradients before it takes absolute
        values, which needs a gradient of the full model in memory; here every batch counts.

    Example:
        >>> import jlora
        >>> jlora.importance.Sensitivity().name
        'sensitivity'
    """

    name = "sensitivity"

    def statistic(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.abs(weight * gradient)

    def normalize(self, total: np.ndarray, target: TargetWeight) -> np.ndarray:
        return total * math.prod(target.batch) / target.value.size


def _examples_with_tokens(request: MeasureRequest, batch: Any, num_examples: int) -> np.ndarray:
    """Returns which examples of a batch (or whether the batch as one) have a token that counts."""
    if request.token_mask is None:
        return np.ones(num_examples, bool)
    mask = np.asarray(request.token_mask(batch)) != 0
    return mask.reshape(num_examples, -1).any(axis=1)


def make_backward_pass(
    method: GradientMethod, fn: Callable[[PyTree, Any], Any], targets: Mapping[str, TargetWeight]
) -> BackwardPassFn:
    """Returns one backward pass for a few weights."""

    def run(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = _tree.flatten_with_paths(params)

        def loss(probes: dict[str, jax.Array]) -> jax.Array:
            leaves = list(flat.leaves)
            for path, target in targets.items():
                tap = _make_gradient_tap(method.statistic, target.axes.batch)
                leaves[target.leaf_index] = tap(leaves[target.leaf_index], probes[path])
            return fn(jax.tree.unflatten(flat.treedef, leaves), batch)

        return jax.value_and_grad(loss)({p: jnp.zeros(t.batch) for p, t in targets.items()})

    def by_batch(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.tree.map(lambda x: x[None], run(params, batch))

    def by_example(params: PyTree, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return lax.map(lambda example: run(params, jax.tree.map(lambda x: x[None], example)), batch)

    return by_example if method.per_example else by_batch


def _make_gradient_tap(
    statistic: StatisticFn, batch_axes: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Returns the identity of `(weight, probe)` whose probe gradient is the weight's statistic.

    The probe has shape (*batch). The weight itself is not differentiated, so nothing keeps its
    gradient once it is reduced.
    """

    @jax.custom_vjp
    def identity(weight: jax.Array, probe: jax.Array) -> jax.Array:
        del probe
        return weight

    def forward(
        weight: jax.Array, probe: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return weight, (weight, probe)

    def backward(
        residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
    ) -> tuple[None, jax.Array]:
        weight, probe = residuals
        matrix_axes = [axis for axis in range(weight.ndim) if axis not in batch_axes]
        terms = statistic(promote_to_float32(weight), promote_to_float32(gradient))
        return None, terms.sum(matrix_axes).astype(probe.dtype)

    identity.defvjp(forward, backward)
    return identity


def _check_importance_loss(request: MeasureRequest) -> None:
    out = jax.eval_shape(request.fn, request.params, request.first_batch)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise TypeError(
            f"fn(params, batch) must return a scalar float to differentiate, got {out}. Return the "
            f"loss alone."
        )


def _check_gradients_finite(
    batch_index: int, losses: np.ndarray, statistics: Mapping[str, np.ndarray]
) -> None:
    values = {
        "The loss": losses,
        **{f"The gradient of {path!r}": v for path, v in statistics.items()},
    }
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(
                f"{name} is NaN or infinite on batch {batch_index} (the first is 0). Leave the "
                f"batch out, or compute in a wider dtype."
            )


@dataclasses.dataclass(frozen=True)
class ActivationVariance(ImportanceMethod):
    """Spread of the variance of a weight's inputs over their principal directions.

    The spectrum holds each direction's share of the variance, in descending order: the variance
    that one more rank explains when `A` starts along these directions (`jlora.initializers.eva`).
    The score is an effective number of directions: all variance over that of the first direction.

    It is for weights of matrix products; convolutions and embeddings are left out.

    Attributes:
        moments: Result of `jlora.input_moments`, which then selects the weights to score; only
            shapes of the batches are used. None: moments are computed from the batches, which are
            iterated once per pass.
        center: Subtraction of the mean, as in `jlora.initializers.eva`.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3. The shares are its explained variance
        ratios; here they come from sums of outer products, there from an incremental decomposition.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((3, 2))}
        >>> x = jnp.array([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0]])
        >>> scores = jlora.importance.measure_importance(
        ...     lambda p, x: x @ p["w"], params, [x], method=jlora.importance.ActivationVariance()
        ... )
        >>> [round(float(share), 3) for share in scores.weights["w"].spectrum]
        [0.8, 0.2, 0.0]
    """

    name = "activation"

    moments: Mapping[str, InputMoments] | None = None
    center: bool = True

    def measure(self, request: MeasureRequest) -> Importance:
        if self.moments is not None:
            targets = find_target_weights(request._replace(rules=rules_for_paths(self.moments)))
            weights = {
                path: self._score_weight(path, target, self.moments[path])
                for path, target in targets.items()
            }
            return Importance(self.name, weights)
        shapes = jax.eval_shape(
            _make_moments_fn(request, request.rules), request.params, request.first_batch
        )
        targets = find_target_weights(request._replace(rules=rules_for_paths(shapes)))
        sizes = {path: 4 * math.prod(shapes[path].outer_product_sum.shape) for path in targets}
        passes = group_into_passes(sizes, request.max_pass_bytes)
        batches = request.batches if len(passes) == 1 else list(request.batches)
        weights, count = {}, 0
        for paths in passes:
            compute_moments = jax.jit(_make_moments_fn(request, rules_for_paths(paths)))
            sums, count = None, 0
            for batch in batches:
                if not _examples_with_tokens(request, batch, 1).all():
                    continue
                moments = compute_moments(request.params, batch)
                sums = moments if sums is None else jax.tree.map(jnp.add, sums, moments)
                count += 1
            if sums is None:
                raise ValueError(_NO_TOKENS)
            for path in paths:
                weights[path] = self._score_weight(path, targets[path], sums[path])
        return Importance(self.name, weights, count)

    def _score_weight(self, path: str, target: TargetWeight, moments: InputMoments) -> WeightScore:
        batch, inputs, _ = WeightScore(target.shape, target.axes, np.zeros(target.batch)).axis_sizes
        fan_in = math.prod(inputs)
        expected = (math.prod(batch), fan_in, fan_in)
        if moments.outer_product_sum.shape != expected:
            raise ValueError(
                f"The moments of {path!r} must have shape {expected}, got "
                f"{moments.outer_product_sum.shape}. Take them from the same model."
            )
        if not np.asarray(moments.num_inputs).all():
            raise ValueError(
                f"{path!r} has no input on these batches: it is behind a stop_gradient or an "
                f"argmax, or belongs to an expert that no token was routed to. Leave it out, or "
                f"use more batches."
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
    request: MeasureRequest, rules: Any
) -> Callable[[Any, Any], dict[str, InputMoments]]:
    def compute(params: Any, batch: Any) -> dict[str, InputMoments]:
        mask = None if request.token_mask is None else request.token_mask(batch)
        return input_moments(request.fn, rules, params, batch, token_mask=mask)

    return compute


@jax.jit(static_argnames="center")
def _principal_variances(moments: InputMoments, *, center: bool) -> jax.Array:
    """Returns variances of inputs along principal directions, (batch, fan_in), ascending."""

    def eigenvalues(moments: InputMoments) -> jax.Array:
        count, total, outer = moments
        scatter = outer - jnp.outer(total, total) / count if center else outer
        return jnp.linalg.eigvalsh(scatter / count)

    return lax.map(eigenvalues, moments)


@dataclasses.dataclass(frozen=True)
class ConditionNumber(ImportanceMethod):
    """Base-10 logarithm of a weight's condition number: largest over smallest singular value.

    Singular values below float32's rounding of the largest are replaced by it. A weight of zeros
    scores zero. Needs no data; it is exact, so that large matrices take minutes each on a CPU.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.diag(jnp.array([100.0, 1.0]))}
        >>> method = jlora.importance.ConditionNumber()
        >>> scores = jlora.importance.measure_importance(
        ...     fn, params, [jnp.ones((1, 2))], method=method
        ... )
        >>> round(scores.weights["w"].score, 3)
        2.0
    """

    name = "condition"

    def measure(self, request: MeasureRequest) -> Importance:
        return _measure_weight_spectra(self.name, request, _log10_condition_number)


@dataclasses.dataclass(frozen=True)
class StableRank(ImportanceMethod):
    """Stable rank of a weight: its squared Frobenius norm over its squared spectral norm.

    It is between one and the rank, and the same for all multiples of a weight. A weight of zeros
    scores zero. Needs no data.

    References:
        Zhang et al., SR-LoRA, arXiv:2507.00327, which takes it as a prior for ranks.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.diag(jnp.array([2.0, 2.0, 1.0]))}
        >>> method = jlora.importance.StableRank()
        >>> scores = jlora.importance.measure_importance(
        ...     fn, params, [jnp.ones((1, 3))], method=method
        ... )
        >>> round(scores.weights["w"].score, 3)
        2.25
    """

    name = "stable_rank"

    def measure(self, request: MeasureRequest) -> Importance:
        return _measure_weight_spectra(self.name, request, _stable_rank)


def _measure_weight_spectra(
    method_name: str, request: MeasureRequest, score: Callable[[jax.Array], jax.Array]
) -> Importance:
    weights = {}
    for path, target in find_target_weights(request).items():
        scores = np.asarray(_score_each_matrix(weight_as_matrices(target), score), np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{path!r} holds NaN or infinite values, and has no spectrum. Load it again."
            )
        weights[path] = WeightScore(target.shape, target.axes, scores.reshape(target.batch))
    return Importance(method_name, weights)


@jax.jit(static_argnames="score")
def _score_each_matrix(matrices: jax.Array, score: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Scores matrices one after the other, since a decomposition needs memory of its own."""
    return lax.map(lambda matrix: score(promote_to_float32(matrix)), matrices)


def _log10_condition_number(matrix: jax.Array) -> jax.Array:
    values = jnp.linalg.svd(matrix, compute_uv=False)
    rounding = values[0] * jnp.finfo(values.dtype).eps * max(matrix.shape)
    ratio = values[0] / jnp.maximum(values[-1], rounding)
    return jnp.where(values[0] == 0, 0, jnp.log10(ratio))


def _stable_rank(matrix: jax.Array) -> jax.Array:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    largest = jnp.abs(tall).max()
    # Scaled to values of at most one, whose squares float32 can represent.
    tall = tall / jnp.where(largest == 0, 1, largest)
    exact = lax.Precision.HIGHEST
    squares = jnp.linalg.eigvalsh(jnp.matmul(tall.T, tall, precision=exact))
    return jnp.where(largest == 0, 0, jnp.sum(tall**2) / squares[-1])
