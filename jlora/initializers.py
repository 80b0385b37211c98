"""Initializations of the factors of a low-rank update.

For a weight as a stack of matrices (fan_in, fan_out), an initialization returns the factors `A`
(fan_in, rank) and `B` (rank, fan_out). Most start with `A B = 0`. The others (PiSSA, OLoRA, MiLoRA,
LoRA-GA) have `residual` set: the initial model equals the original one only on the base that
`jlora.residual_base` returns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _tree, _validation
from jlora.interpreter.weight import (
    AdaptableWeight,
    divide_by_size,
    promote_to_float32,
    weight_to_matrices,
)

# `(key, shape, dtype)` to an array, as in `jax.nn.initializers`.
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


class Factors(NamedTuple):
    """Initial factors of one weight.

    Attributes:
        a: (batch, fan_in, rank).
        b: (batch, rank, fan_out).
    """

    a: jax.Array
    b: jax.Array


@dataclasses.dataclass(frozen=True)
class FactorInit:
    """An initialization of low-rank factors, the value of a config's `init`.

    Attributes:
        name: Display name.
        factors: `(key, weight, rank, scale)` to `Factors`; `scale` is the factor on `A B`.
        residual: Whether `A B` does not start at zero, so that it has to be subtracted from the
            base (`jlora.residual_base`).

    Example:
        >>> import jlora
        >>> jlora.LoRA(rank=2, alpha=4).init
        initializers.kaiming_uniform
    """

    name: str
    factors: Callable[[jax.Array, AdaptableWeight, int, float], Factors]
    residual: bool = False

    def __repr__(self) -> str:
        return f"initializers.{self.name}"


def _sample_per_matrix(
    key: jax.Array, weight: AdaptableWeight, sample: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns one sample for each of the weight's matrices, stacked."""
    return jax.vmap(sample)(jax.random.split(key, math.prod(weight.axis_sizes.batch)))


def _factor_b_shape(weight: AdaptableWeight, rank: int) -> tuple[int, int, int]:
    return math.prod(weight.axis_sizes.batch), rank, weight.fan_out


def from_initializer(initializer: Initializer, name: str = "from_initializer") -> FactorInit:
    """Returns an initialization with `A` from an initializer and `B` zero.

    For embeddings `A` is zero and `B` normal, as in LoRA's reference code.

    Args:
        initializer: Function `(key, shape, dtype)` that samples a matrix (fan_in, rank); it is
            called once for each layer of a stack.
        name: Display name.

    Raises:
        TypeError: `initializer` is not callable.

    Example:
        >>> import jax, jlora
        >>> normal = jax.nn.initializers.normal(0.02)
        >>> jlora.LoRA(rank=2, alpha=4, init=jlora.initializers.from_initializer(normal)).init
        initializers.from_initializer
    """
    if not callable(initializer):
        raise TypeError(
            f"initializers.from_initializer: initializer={initializer!r} must be a function (key, "
            f"shape, dtype), such as jax.nn.initializers.normal(0.02)."
        )

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del scale
        if weight.kind == "embedding":
            # One key samples a stack, with different values for each matrix.
            b = jax.random.normal(key, _factor_b_shape(weight, rank))
            return Factors(jnp.zeros((b.shape[0], weight.fan_in, rank)), b)
        matrix = (weight.fan_in, rank)
        sample = lambda matrix_key: initializer(matrix_key, matrix, jnp.float32)  # noqa: E731
        a = _sample_per_matrix(key, weight, sample)
        return Factors(a, jnp.zeros(_factor_b_shape(weight, rank)))

    return FactorInit(name, factors)


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Samples a matrix (fan_in, rank) uniformly from +-1/sqrt(fan_in), as LoRA's code does `A`.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1, and its reference code, which calls
        Kaiming's uniform with a = sqrt(5). (`jax.nn.initializers.he_uniform` is sqrt(6) wider.)

    Example:
        >>> import jax
        >>> uniform_fan_in(jax.random.key(0), (6, 2)).shape
        (6, 2)
    """
    return sample_fan_in_uniform(key, shape, shape[-2], dtype)


def sample_fan_in_uniform(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any
) -> jax.Array:
    """Samples uniformly from +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


kaiming_uniform = from_initializer(uniform_fan_in, "kaiming_uniform")


def gaussian(std: float | None = None) -> FactorInit:
    """Returns an initialization with a normal `A` and a zero `B`.

    Args:
        std: Standard deviation of `A`. None: `1 / rank`, as in PEFT.

    Raises:
        ValueError: `std` is negative or not finite in float32.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.

    Example:
        >>> import jlora
        >>> jlora.LoRA(rank=2, alpha=4, init=jlora.initializers.gaussian(std=0.02)).init
        initializers.gaussian
    """
    if std is not None:
        _validation.check_std("initializers.gaussian: std", std)

    def sample(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * (1 / shape[-1] if std is None else std)

    return from_initializer(sample, "gaussian")


def orthogonal(std: float = 0.1) -> FactorInit:
    """Returns an initialization with two non-zero factors whose product `A B` is zero.

    The factors are in orthogonal halves of the rank.

    Args:
        std: Standard deviation of their entries before the projection to the halves.

    Raises:
        ValueError: `std` is negative or not finite in float32. From `init`: the rank is odd.

    References:
        PEFT's `init_lora_weights="orthogonal"`, whose factor of a tenth is `std`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.LoRA(rank=2, alpha=4, init=jlora.initializers.orthogonal())
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> leaf = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))["w"]
        >>> bool(jnp.any(leaf.a)), bool(jnp.allclose(leaf.a @ leaf.b, 0, atol=1e-6))
        (True, True)
    """
    _validation.check_std("initializers.orthogonal: std", std)

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del scale
        if rank % 2:
            raise ValueError(
                f"initializers.orthogonal halves the rank, and rank={rank} on {weight.path!r} is "
                f"odd. Use an even rank."
            )

        def init_matrix(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            key_q, key_a, key_b = jax.random.split(key, 3)
            q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
            a = jax.random.normal(key_a, (weight.fan_in, rank // 2)) @ q[0::2]
            b = q[1::2].T @ jax.random.normal(key_b, (rank // 2, weight.fan_out))
            return std * a, std * b

        keys = jax.random.split(key, math.prod(weight.axis_sizes.batch))
        return Factors(*jax.vmap(init_matrix)(keys))

    return FactorInit("orthogonal", factors)


def pissa(iterations: int | None = None) -> FactorInit:
    """Returns an initialization with the principal part: the first `rank` singular triplets.

    Args:
        iterations: Power iterations of a randomized decomposition, which is many times faster on
            a large matrix; 4 are usually enough. None: exact decomposition.

    Raises:
        ValueError: `iterations` is not positive. From `init`: the rank exceeds the weight's.
        TypeError: From `init`: only the shapes of the parameters are known.

    References:
        Meng et al., PiSSA, arXiv:2404.02948, section 3 and, for the fast form, appendix B.
        Halko et al., arXiv:0909.4061, algorithm 4.4.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.LoRA(rank=1, alpha=1, init=jlora.initializers.pissa())
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> params = {"w": jnp.outer(jnp.arange(4.0), jnp.arange(3.0))}  # Of rank one.
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((2, 4)))
        >>> bool(jnp.allclose(jlora.residual_base(params, adapter)["w"], 0, atol=1e-5))
        True
    """
    if iterations is not None:
        _validation.check_positive_int("initializers.pissa: iterations", iterations)

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        matrices, size = divide_by_size(weight.to_matrices("initializers.pissa"))
        _check_init_rank("pissa", weight, rank)
        if iterations is None:
            u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
        else:
            keys = jax.random.split(key, matrices.shape[0])
            decompose = functools.partial(randomized_svd, rank=rank, iterations=iterations)
            u, s, vt = jax.vmap(decompose)(keys, matrices)
        s = s[..., :rank] / scale
        return _split_singular_values(u[..., :rank], s, vt[..., :rank, :], size)

    return FactorInit("pissa", factors, residual=True)


def milora() -> FactorInit:
    """Returns an initialization with the minor part: the last `rank` singular triplets.

    Raises:
        ValueError: From `init`: the rank exceeds the weight's.
        TypeError: From `init`: only the shapes of the parameters are known.

    References:
        Wang et al., MiLoRA, arXiv:2406.09044, section 3.

    Example:
        >>> import jlora
        >>> jlora.LoRA(rank=2, alpha=4, init=jlora.initializers.milora()).init.residual
        True
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key
        _check_init_rank("milora", weight, rank)
        matrices, size = divide_by_size(weight.to_matrices("initializers.milora"))
        u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
        s = s[..., -rank:] / scale
        return _split_singular_values(u[..., -rank:], s, vt[..., -rank:, :], size)

    return FactorInit("milora", factors, residual=True)


def olora() -> FactorInit:
    """Returns an initialization with an orthonormal `B` from the weight's QR decomposition.

    `B` has the first columns of `Q`, for the weight as (out, in).

    Raises:
        ValueError: From `init`: the rank exceeds the weight's.
        TypeError: From `init`: only the shapes of the parameters are known.

    References:
        Büyükakyüz, OLoRA, arXiv:2406.01775, section 3.

    Example:
        >>> import jlora
        >>> jlora.LoRA(rank=2, alpha=4, init=jlora.initializers.olora()).init.residual
        True
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key, scale
        _check_init_rank("olora", weight, rank)
        matrices, size = divide_by_size(weight.to_matrices("initializers.olora"))
        q, r = jnp.linalg.qr(jnp.swapaxes(matrices, -1, -2))
        a, b = r[..., :rank, :] * size, q[..., :, :rank]
        return Factors(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2))

    return FactorInit("olora", factors, residual=True)


def _split_singular_values(u: jax.Array, s: jax.Array, vt: jax.Array, size: jax.Array) -> Factors:
    """Returns `A` and `B` of the product `u diag(s) vt size`."""
    root = jnp.sqrt(s) * jnp.sqrt(size[..., 0])  # (batch, rank)
    return Factors(u * root[..., None, :], root[..., :, None] * vt)


def _check_init_rank(name: str, weight: AdaptableWeight, rank: int) -> None:
    largest = min(weight.fan_in, weight.fan_out)
    if rank > largest:
        raise ValueError(
            f"initializers.{name} takes {rank} directions of {weight.path!r}, which has "
            f"{largest}. Use a lower rank for it."
        )


def randomized_svd(
    key: jax.Array, matrix: jax.Array, rank: int, iterations: int = 4, oversampling: int = 8
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximates the first `rank` singular triplets.

    Args:
        key: Random key of the sampled directions.
        matrix: (m, n).
        rank: Number of triplets.
        iterations: Number of power iterations; each widens the gap between the leading singular
            values and the others.
        oversampling: Number of additional sampled directions.

    Returns:
        `u` (m, rank), `s` (rank,) and `vt` (rank, n).

    References:
        Halko et al., arXiv:0909.4061, algorithms 4.4 and 5.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> u, s, vt = randomized_svd(jax.random.key(0), jnp.diag(jnp.array([3.0, 2.0, 1.0])), 1)
        >>> round(float(s[0]), 4)
        3.0
    """
    samples = min(rank + oversampling, *matrix.shape)
    q, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], samples), matrix.dtype))
    for _ in range(iterations):
        row_basis, _ = jnp.linalg.qr(matrix.T @ q)
        q, _ = jnp.linalg.qr(matrix @ row_basis)
    u, s, vt = jnp.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


class InputMoments(NamedTuple):
    """Sums over the inputs of a weight, one for each of its matrices.

    Attributes:
        num_inputs: Number of inputs, (batch,).
        input_sum: Sum of the inputs, (batch, fan_in).
        outer_product_sum: Sum of their outer products, (batch, fan_in, fan_in).
    """

    num_inputs: jax.Array
    input_sum: jax.Array
    outer_product_sum: jax.Array


def eva(moments: Mapping[str, InputMoments], *, center: bool = True) -> FactorInit:
    """Returns an initialization with `A` along the inputs' directions of largest variance.

    `B` is zero.

    Args:
        moments: Result of `jlora.input_moments` for a calibration batch, by path.
        center: Whether the mean is subtracted first, as in the reference code.

    Raises:
        ValueError: From `init`: a weight has no moments, or of another shape, or the rank exceeds
            the number of its inputs.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3.2.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.ones((3, 5))}, jnp.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
        >>> moments = jlora.input_moments(fn, jlora.LoRA(rank=1, alpha=1), params, x)
        >>> config = jlora.LoRA(rank=1, alpha=1, init=jlora.initializers.eva(moments))
        >>> adapter = jlora.lora_transform(fn, config).init(jax.random.key(0), params, x)
        >>> jnp.round(adapter["w"].a[:, 0], 3).tolist()
        [0.0, 1.0, 0.0]
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key, scale
        if weight.path not in moments:
            raise ValueError(
                f"initializers.eva has no moments of the inputs of {weight.path!r}. It has those "
                f"of {len(moments)} weights; the nearest are "
                f"{_tree.closest_matches(weight.path, list(moments))}. Pass the same rules to "
                f"jlora.input_moments."
            )
        if rank > weight.fan_in:
            raise ValueError(
                f"initializers.eva takes {rank} directions of the inputs of {weight.path!r}, which "
                f"have {weight.fan_in}. Use a lower rank."
            )
        num_inputs, input_sum, scatter = moments[weight.path]
        expected = (math.prod(weight.axis_sizes.batch), weight.fan_in, weight.fan_in)
        if scatter.shape != expected:
            raise ValueError(
                f"initializers.eva has moments of {weight.path!r} of shape {scatter.shape}, "
                f"expected {expected}. Compute them with the same model."
            )
        if center:
            outer = input_sum[..., :, None] * input_sum[..., None, :]  # (batch, fan_in, fan_in)
            scatter = scatter - outer / jnp.maximum(num_inputs, 1)[..., None, None]
        _, vectors = jnp.linalg.eigh(scatter)  # In ascending order of the eigenvalues.
        a = vectors[..., ::-1][..., :rank]
        # The sign of an eigenvector is arbitrary: the largest entry of each is made positive.
        largest = jnp.take_along_axis(a, jnp.abs(a).argmax(-2, keepdims=True), -2)
        return Factors(a * jnp.sign(largest), jnp.zeros(_factor_b_shape(weight, rank)))

    return FactorInit("eva", factors)


def lora_ga(grads: Any, *, gamma: float = 16.0) -> FactorInit:
    """Returns an initialization whose first training step approximates that of full fine-tuning.

    Args:
        grads: Gradients of the loss with respect to the parameters, in the parameters' structure.
        gamma: Square of the divisor of the factors' size, `fan_out^(1/4) / sqrt(gamma)`; positive.

    Raises:
        ValueError: `gamma` is not positive. From `init`: twice the rank exceeds the weight's, or a
            weight has no gradient of its shape.

    References:
        Wang et al., LoRA-GA, arXiv:2407.05000, algorithm 1, as in its reference code: both factors
        have the same scale, without singular values.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
        >>> grads = jax.grad(lambda p: (fn(p, x) ** 2).sum())(params)
        >>> config = jlora.LoRA(rank=1, alpha=1, init=jlora.initializers.lora_ga(grads))
        >>> adapter = jlora.lora_transform(fn, config).init(jax.random.key(0), params, x)
        >>> adapter["w"].residual
        True
    """
    _validation.check_scale("initializers.lora_ga: gamma", gamma)
    flat = _tree.flatten_with_paths(grads)
    by_path = dict(zip(flat.paths, flat.leaves, strict=True))

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key, scale
        if weight.path not in by_path or tuple(by_path[weight.path].shape) != weight.shape:
            raise ValueError(
                f"initializers.lora_ga has no gradient of {weight.path!r} with shape "
                f"{weight.shape}. Pass jax.grad(loss)(params), with the same outer keys as the "
                f"params of init."
            )
        _check_init_rank("lora_ga", weight, 2 * rank)
        matrices = promote_to_float32(weight_to_matrices(by_path[weight.path], weight.axes))
        matrices, _ = divide_by_size(matrices)
        u, _, vt = jnp.linalg.svd(matrices, full_matrices=False)
        size = weight.fan_out**0.25 / math.sqrt(gamma)
        return Factors(size * u[..., :rank], size * vt[..., rank : 2 * rank, :])

    return FactorInit("lora_ga", factors, residual=True)
