"""How the factors of a low-rank update start.

An initialisation makes, for a weight as a stack of matrices (fan_in, fan_out), the factors `A`
(fan_in, rank) and `B` (rank, fan_out). Most start with `A B = 0`. Those that start elsewhere
(PiSSA, OLoRA, MiLoRA, LoRA-GA) have `residual` set: the model starts where it was only on the base
that `jlora.residual_base` makes.
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
from jlora.interpreter.weight import AdaptableWeight, promote_to_float32, weight_to_matrices

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

"""`(key, shape, dtype)` to an array, as in `jax.nn.initializers`."""


class Factors(NamedTuple):
    """`a` (batch, fan_in, rank) and `b` (batch, rank, fan_out)."""

    a: jax.Array
    b: jax.Array


@dataclasses.dataclass(frozen=True)
class FactorInit:
    """A way to make the first factors.

    Attributes:
        name: What it is called.
        factors: `(key, weight, rank, scale)` to `Factors`; `scale` is what `A B` is multiplied by.
        residual: Whether `A B` starts off zero, so that the base has to give way.
    """

    name: str
    factors: Callable[[jax.Array, AdaptableWeight, int, float], Factors]
    residual: bool = False

    def __repr__(self) -> str:
        return f"inits.{self.name}"


def _sample_per_matrix(
    key: jax.Array, weight: AdaptableWeight, sample: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """What `sample` draws for each of the weight's matrices, stacked."""
    return jax.vmap(sample)(jax.random.split(key, math.prod(weight.axis_sizes.batch)))


def _factor_b_shape(weight: AdaptableWeight, rank: int) -> tuple[int, int, int]:
    return math.prod(weight.axis_sizes.batch), rank, weight.fan_out


def from_initializer(initializer: Initializer, name: str = "drawn") -> FactorInit:
    """`A` from an initializer, `B` zero; for embeddings `A` zero and `B` normal, as in the
    reference.

    Args:
        initializer: Draws a matrix (fan_in, rank), one for each layer of a stack.
        name: What it is called.
    """
    if not callable(initializer):
        raise TypeError(
            f"initializers.from_initializer got {initializer!r}. Give a function (key, shape, dtype), such as "
            f"jax.nn.initializers.normal(0.02)."
        )

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del scale
        if weight.kind == "embedding":
            # One key draws all of a stack, as numbers of their own.
            b = jax.random.normal(key, _factor_b_shape(weight, rank))
            return Factors(jnp.zeros((b.shape[0], weight.fan_in, rank)), b)
        matrix = (weight.fan_in, rank)
        a = _sample_per_matrix(key, weight, lambda one: initializer(one, matrix, jnp.float32))
        return Factors(a, jnp.zeros(_factor_b_shape(weight, rank)))

    return FactorInit(name, factors)


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in) for a matrix (fan_in, rank), as the reference initialises `A`.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1, and its reference code, which calls
        Kaiming's uniform with a = sqrt(5). (`jax.nn.initializers.he_uniform` is sqrt(6) wider.)
    """
    return sample_fan_in_uniform(key, shape, shape[-2], dtype)


def sample_fan_in_uniform(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any
) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


kaiming_uniform = from_initializer(uniform_fan_in, "kaiming_uniform")


def gaussian(std: float | None = None) -> FactorInit:
    """`A` normal, `B` zero.

    Args:
        std: The deviation of `A`; by default `1 / rank`, as PEFT has it.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
    """

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * (1 / shape[-1] if std is None else std)

    return from_initializer(draw, "gaussian")


def orthogonal(std: float = 0.1) -> FactorInit:
    """Both factors off zero, in orthogonal halves of the rank, so that `A B` is zero all the same.

    Args:
        std: The deviation of their entries before they are turned into their halves.

    Raises:
        ValueError: From `init`, for an odd rank.

    References:
        PEFT's `init_lora_weights="orthogonal"`, whose factor of a tenth is `std`.
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del scale
        if rank % 2:
            raise ValueError(
                f"initializers.orthogonal halves the rank, and rank={rank} on {weight.path!r} is odd. Use "
                f"an even rank."
            )

        def make(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            turn, left, right = jax.random.split(key, 3)
            q, _ = jnp.linalg.qr(jax.random.normal(turn, (rank, rank)))
            a = jax.random.normal(left, (weight.fan_in, rank // 2)) @ q[0::2]
            b = q[1::2].T @ jax.random.normal(right, (rank // 2, weight.fan_out))
            return std * a, std * b

        return Factors(*jax.vmap(make)(jax.random.split(key, math.prod(weight.axis_sizes.batch))))

    return FactorInit("orthogonal", factors)


def pissa(iterations: int | None = None) -> FactorInit:
    """The principal part of the weight: its first `rank` singular triplets.

    Args:
        iterations: Power iterations of a randomized decomposition, which is many times faster on
            a large matrix; 4 are usually enough. By default the decomposition is exact.

    References:
        Meng et al., PiSSA, arXiv:2404.02948, section 3 and, for the fast form, section 5.3.
        Halko et al., arXiv:0909.4061, algorithm 4.4.
    """
    if iterations is not None:
        _validation.check_positive_int("initializers.pissa: iterations", iterations)

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        matrices = weight.to_matrices("initializers.pissa")
        _check_init_rank("pissa", weight, rank)
        if iterations is None:
            u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
        else:
            keys = jax.random.split(key, matrices.shape[0])
            decompose = functools.partial(randomized_svd, rank=rank, iterations=iterations)
            u, s, vt = jax.vmap(decompose)(keys, matrices)
        return _split_singular_values(u[..., :rank], s[..., :rank] / scale, vt[..., :rank, :])

    return FactorInit("pissa", factors, residual=True)


def milora() -> FactorInit:
    """The minor part of the weight: its last `rank` singular triplets.

    References:
        Wang et al., MiLoRA, arXiv:2406.09044, section 3.
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key
        _check_init_rank("milora", weight, rank)
        u, s, vt = jnp.linalg.svd(weight.to_matrices("initializers.milora"), full_matrices=False)
        return _split_singular_values(u[..., -rank:], s[..., -rank:] / scale, vt[..., -rank:, :])

    return FactorInit("milora", factors, residual=True)


def olora() -> FactorInit:
    """Orthonormal `B`: the first columns of the QR decomposition of the weight as (out, in).

    References:
        Büyükakyüz, OLoRA, arXiv:2406.01775, section 3.
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key, scale
        _check_init_rank("olora", weight, rank)
        matrices = weight.to_matrices("initializers.olora")
        q, r = jnp.linalg.qr(jnp.swapaxes(matrices, -1, -2))
        a, b = r[..., :rank, :], q[..., :, :rank]
        return Factors(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2))

    return FactorInit("olora", factors, residual=True)


def _split_singular_values(u: jax.Array, s: jax.Array, vt: jax.Array) -> Factors:
    root = jnp.sqrt(s)
    return Factors(u * root[..., None, :], root[..., :, None] * vt)


def _check_init_rank(name: str, weight: AdaptableWeight, rank: int) -> None:
    largest = min(weight.fan_in, weight.fan_out)
    if rank > largest:
        raise ValueError(
            f"inits.{name} takes {rank} directions of {weight.path!r}, which has {largest}. Use a "
            f"rank of at most {largest} there."
        )


def randomized_svd(
    key: jax.Array, matrix: jax.Array, rank: int, iterations: int = 4, oversampling: int = 8
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first `rank` singular triplets, nearly: `u` (m, rank), `s` (rank,), `vt` (rank, n).

    Args:
        key: Draws the directions that are tried.
        matrix: (m, n).
        rank: How many.
        iterations: Each sharpens the gap between what is wanted and what is not.
        oversampling: How many directions more are tried.

    References:
        Halko et al., arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    tried = min(rank + oversampling, *matrix.shape)
    q, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], tried), matrix.dtype))
    for _ in range(iterations):
        back, _ = jnp.linalg.qr(matrix.T @ q)
        q, _ = jnp.linalg.qr(matrix @ back)
    u, s, vt = jnp.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


class InputMoments(NamedTuple):
    """Sums over the inputs that a weight met, one for each of its matrices.

    Attributes:
        num_inputs: How many inputs, (batch,).
        input_sum: Their sum, (batch, fan_in).
        outer_product_sum: The sum of their outer products, (batch, fan_in, fan_in).
    """

    num_inputs: jax.Array
    input_sum: jax.Array
    outer_product_sum: jax.Array


def eva(moments: Mapping[str, InputMoments], *, center: bool = True) -> FactorInit:
    """`A` along the directions in which a weight's inputs vary most, `B` zero.

    Args:
        moments: What `jlora.input_moments` returned for a calibration batch, by path.
        center: Whether the mean is taken off first. The reference code does.

    Raises:
        ValueError: From `init`, for a weight without moments.

    References:
        Paischer et al., EVA, arXiv:2410.07170, section 3.2.
    """

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key, scale
        if weight.path not in moments:
            raise ValueError(
                f"initializers.eva has no moments of the inputs of {weight.path!r}; it has those of "
                f"{_tree.closest_matches(weight.path, list(moments))} and {len(moments)} in all. Give "
                f"jlora.input_moments the same rules."
            )
        if rank > weight.fan_in:
            raise ValueError(
                f"initializers.eva takes {rank} directions of the inputs of {weight.path!r}, which have "
                f"{weight.fan_in}. Use a lower rank."
            )
        number, first, second = moments[weight.path]
        expected = (math.prod(weight.axis_sizes.batch), weight.fan_in, weight.fan_in)
        if second.shape != expected:
            raise ValueError(
                f"initializers.eva has moments of {weight.path!r} of shape {second.shape}, expected "
                f"{expected}. Take them from the same model."
            )
        spread = second
        if center:
            outer = first[..., :, None] * first[..., None, :]
            spread = second - outer / jnp.maximum(number, 1)[..., None, None]
        _, vectors = jnp.linalg.eigh(spread)  # Smallest first.
        a = vectors[..., ::-1][..., :rank]
        largest = jnp.take_along_axis(a, jnp.abs(a).argmax(-2, keepdims=True), -2)
        return Factors(a * jnp.sign(largest), jnp.zeros(_factor_b_shape(weight, rank)))

    return FactorInit("eva", factors)


def lora_ga(grads: Any, *, gamma: float = 16.0) -> FactorInit:
    """Factors whose first step is the one that full fine-tuning would take.

    Args:
        grads: Of the loss with respect to the parameters, in a tree like them.
        gamma: How much smaller the factors are than `fan_out^(1/4)`, squared.

    Raises:
        ValueError: From `init`, when twice the rank exceeds the weight's, or the gradient lacks it.

    References:
        Wang et al., LoRA-GA, arXiv:2407.05000, algorithm 1, as its reference code has it: both
        factors are scaled alike and neither by singular values.
    """
    _validation.check_scale("initializers.lora_ga: gamma", gamma)
    flat = _tree.flatten_with_paths(grads)
    by_path = dict(zip(flat.paths, flat.leaves, strict=True))

    def factors(key: jax.Array, weight: AdaptableWeight, rank: int, scale: float) -> Factors:
        del key, scale
        if weight.path not in by_path or tuple(by_path[weight.path].shape) != weight.shape:
            raise ValueError(
                f"initializers.lora_ga has no gradient of {weight.path!r} with shape {weight.shape}. Give "
                f"jax.grad(loss)(params), with the outer keys that init is given."
            )
        _check_init_rank("lora_ga", weight, 2 * rank)
        matrices = promote_to_float32(weight_to_matrices(by_path[weight.path], weight.axes))
        u, _, vt = jnp.linalg.svd(matrices, full_matrices=False)
        size = weight.fan_out**0.25 / math.sqrt(gamma)
        return Factors(size * u[..., :rank], size * vt[..., rank : 2 * rank, :])

    return FactorInit("lora_ga", factors, residual=True)
