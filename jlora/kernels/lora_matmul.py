"""`x W + (x A) B` as one primitive, whose gradient consists of further primitives.

As plain products, the update costs passes over memory. Its result is written and read again to be
added to the base product, in both directions, and the cotangent is read once for `B` and once for
`A`. The primitives avoid these passes on devices with kernels for them:

    matmul_add    x W + t B          base product plus the last product of the update
    lora_grads    dy Bᵀ and tᵀ dy    all products of the cotangent that the update's gradient needs
    lora_matmul   x W + (x A) B      with the gradient in terms of `matmul_add` and `lora_grads`
    lora_tangent                     derivative of `lora_matmul` with respect to x, A and B
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jlora.kernels import hopper, self_test, tpu
from jlora.kernels._primitive import (
    KernelDevice,
    batch_with_vmap,
    make_primitive,
    sum_arrays,
    transpose_linear_args,
)

KERNEL_DTYPES = (jnp.bfloat16,)

_requested_kernels: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "requested_kernels", default=None
)


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Turns the kernels of jlora off for programs traced inside the context.

    Products with adapted weights are then plain JAX products, as on devices without kernels.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda w, x: x @ w, jlora.LoRA(rank=2, alpha=2))
        >>> w, x = jnp.ones((4, 3)), jnp.ones((2, 4))
        >>> adapter = lora.init(jax.random.key(0), w, x)
        >>> with jlora.kernels.plain_products():
        ...     lora.apply(w, adapter, x).shape
        (2, 3)
    """
    token = _requested_kernels.set("none")
    try:
        yield
    finally:
        _requested_kernels.reset(token)


@contextlib.contextmanager
def tpu_products() -> Iterator[None]:
    """Turns the TPU kernel on for programs traced inside the context.

    The kernel is off by default: it has been compiled ahead of time for TPUs and run in the
    interpreter of Pallas, but not timed on a TPU. It cannot be sharded, so it is for programs on
    one chip. Products whose sizes the kernel does not support stay plain.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda w, x: x @ w, jlora.LoRA(rank=2, alpha=2))
        >>> w, x = (jnp.ones((256, 256), jnp.bfloat16) for _ in range(2))
        >>> adapter = lora.init(jax.random.key(0), w, x)
        >>> with jlora.kernels.tpu_products():
        ...     jaxpr = jax.make_jaxpr(lora.apply)(w, adapter, x)
        >>> "lora_matmul" in str(jaxpr)
        True
    """
    token = _requested_kernels.set("tpu")
    try:
        yield
    finally:
        _requested_kernels.reset(token)


def select_kernel_device(x: Any, w: Any, rank: int, *, transpose_rhs: bool) -> KernelDevice | None:
    """Selects the device kind whose kernels support a product and its gradient.

    Args:
        x: Activation, (..., k), or its shape and type.
        w: Base weight, (k, n), or (n, k) if `transpose_rhs`, or its shape and type.
        rank: Rank of the update.
        transpose_rhs: Whether the contracted axis of `w` is its last.

    Returns:
        The device kind, or None if JAX has no device with kernels for them.
    """
    requested = _requested_kernels.get()
    if requested == "none" or x.dtype != w.dtype or x.dtype not in KERNEL_DTYPES:
        return None
    if jax.sharding.get_abstract_mesh().size > 1:
        return None
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    if not isinstance(m, int):  # A symbolic length, of which no tiles can be made.
        return None
    n = w.shape[0] if transpose_rhs else w.shape[1]
    sizes = (k, n), (n, k)  # The gradient has the transposed product.
    if requested == "tpu":
        return "tpu" if all(tpu.fits_tpu_tiles(m, *k_and_n, rank) for k_and_n in sizes) else None
    if all(
        hopper.fits_hopper_tiles(m, *k_and_n, rank) for k_and_n in sizes
    ) and self_test.kernels_work(rank):
        return "hopper"
    return None


def lora_matmul(
    x: Any, w: Any, a: Any, b: Any, *, transpose_rhs: bool, device: KernelDevice
) -> jax.Array:
    """Computes `x W + (x A) B` (..., n) in the type of `x`.

    Args:
        x: Activation, (..., k).
        w: Base weight, (k, n), or (n, k) if `transpose_rhs`.
        a: Factor `A`, (k, rank).
        b: Factor `B`, (rank, n).
        transpose_rhs: Whether the contracted axis of `w` is its last.
        device: Device kind whose kernels are used when the program is compiled for it.
    """
    return _lora_matmul_p.bind(x, w, a, b, transpose_rhs=transpose_rhs, device=device)[0]


def products_saveable(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy for `jax.checkpoint` that saves fused products with adapted weights.

    The policies of JAX do not know these primitives, so combine them with this one.

    Example:
        >>> import jax, jlora
        >>> policy = jax.checkpoint_policies.save_from_both_policies(
        ...     jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        ...     jlora.kernels.products_saveable,
        ... )
        >>> step = jax.checkpoint(lambda x: x**2, policy=policy)
    """
    return primitive is _lora_matmul_p


def _base_matmul(x: Any, w: Any, transpose_rhs: bool) -> jax.Array:
    """Computes `x W`."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1 if transpose_rhs else 0,)), ((), ())))


def _flatten_batch(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def _matmul_add_reference(x: Any, w: Any, t: Any, b: Any, *, transpose_rhs: bool) -> list[Any]:
    return [_base_matmul(x, w, transpose_rhs) + t @ b]


def _matmul_add_with_kernel(
    kernel: Any, x: Any, w: Any, t: Any, b: Any, *, transpose_rhs: bool
) -> list[Any]:
    out = kernel(_flatten_batch(x), w, _flatten_batch(t), b, transpose_rhs=transpose_rhs)
    return [out.reshape(*x.shape[:-1], -1)]


# Looked up at the call, so that a test can replace a kernel.
_MATMUL_ADD_KERNELS: dict[KernelDevice, Any] = {
    "hopper": lambda *args, **kwargs: hopper.hopper_matmul_add(*args, **kwargs),
    "tpu": lambda *args, **kwargs: tpu.tpu_matmul_add(*args, **kwargs),
}

_matmul_add_p = make_primitive(
    "matmul_add",
    _matmul_add_reference,
    {
        kind: functools.partial(_matmul_add_with_kernel, kernel)
        for kind, kernel in _MATMUL_ADD_KERNELS.items()
    },
)


def _lora_grads_reference(dy: Any, t: Any, b: Any) -> list[Any]:
    return [dy @ b.T, _flatten_batch(t).T @ _flatten_batch(dy)]


def _lora_grads_on_hopper(dy: Any, t: Any, b: Any) -> list[Any]:
    if b.shape[0] > hopper.MAX_LORA_GRADS_RANK:
        return _lora_grads_reference(dy, t, b)
    u, db = hopper.lora_grads(_flatten_batch(dy), _flatten_batch(t), b)
    return [u.reshape(t.shape), db]


_lora_grads_p = make_primitive(
    "lora_grads", _lora_grads_reference, {"hopper": _lora_grads_on_hopper}
)


def _lora_matmul_reference(x: Any, w: Any, a: Any, b: Any, *, transpose_rhs: bool) -> list[Any]:
    return _matmul_add_reference(x, w, x @ a, b, transpose_rhs=transpose_rhs)


def _lora_matmul_with_kernel(
    kernel: Any, x: Any, w: Any, a: Any, b: Any, *, transpose_rhs: bool
) -> list[Any]:
    return _matmul_add_with_kernel(kernel, x, w, x @ a, b, transpose_rhs=transpose_rhs)


_lora_matmul_p = make_primitive(
    "lora_matmul",
    _lora_matmul_reference,
    {
        kind: functools.partial(_lora_matmul_with_kernel, kernel)
        for kind, kernel in _MATMUL_ADD_KERNELS.items()
    },
)


def _lora_matmul_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, transpose_rhs: bool, device: KernelDevice
) -> Any:
    x, w, a, b = primals
    dx, dw, da, db = (None if type(tangent) is ad.Zero else tangent for tangent in tangents)
    out = _lora_matmul_p.bind(x, w, a, b, transpose_rhs=transpose_rhs, device=device)
    parts = []
    if da is not None and db is not None:
        dx = jnp.zeros_like(x) if dx is None else dx
        parts += _lora_tangent_p.bind(
            dx, da, db, x, w, x @ a, a, b, transpose_rhs=transpose_rhs, device=device
        )
    else:
        parts += (
            []
            if dx is None
            else _lora_matmul_p.bind(dx, w, a, b, transpose_rhs=transpose_rhs, device=device)
        )
        parts += [] if da is None else [(x @ da) @ b]
        parts += [] if db is None else [(x @ a) @ db]
    parts += [] if dw is None else [_base_matmul(x, dw, transpose_rhs)]
    return out, [sum_arrays(parts)]


def _lora_matmul_transpose(
    cotangents: Sequence[Any], *args: Any, transpose_rhs: bool, device: KernelDevice
) -> list[Any]:
    """Transposes by kernels with respect to x, by plain products with respect to other inputs."""
    x, w, a, b = args
    (dy,) = cotangents
    if not ad.is_undefined_primal(x) or type(dy) is ad.Zero:
        return transpose_linear_args(
            _lora_matmul_reference, cotangents, *args, transpose_rhs=transpose_rhs
        )
    (dx,) = _lora_matmul_p.bind(dy, w, b.T, a.T, transpose_rhs=not transpose_rhs, device=device)
    return [dx, None, None, None]


def _lora_matmul_batcher(
    args: Sequence[Any], axes: Sequence[Any], *, transpose_rhs: bool, device: KernelDevice
) -> Any:
    x, *weights = args
    if all(axis is None for axis in axes[1:]):  # A larger batch with the same matrices.
        x = jnp.moveaxis(x, axes[0], 0)
        return _lora_matmul_p.bind(x, *weights, transpose_rhs=transpose_rhs, device=device), [0]
    return batch_with_vmap(_lora_matmul_reference, args, axes, transpose_rhs=transpose_rhs)


batching.primitive_batchers[_lora_matmul_p] = _lora_matmul_batcher

ad.primitive_jvps[_lora_matmul_p] = _lora_matmul_jvp

ad.primitive_transposes[_lora_matmul_p] = _lora_matmul_transpose


def _lora_tangent_reference(
    dx: Any, da: Any, db: Any, x: Any, w: Any, t: Any, a: Any, b: Any, *, transpose_rhs: bool
) -> list[Any]:
    """Computes the tangent of the product for tangents of x, A and B, where `t` is `x A`."""
    return [
        sum_arrays(
            [
                *_lora_matmul_reference(dx, w, a, b, transpose_rhs=transpose_rhs),
                (x @ da) @ b,
                t @ db,
            ]
        )
    ]


_lora_tangent_p = make_primitive("lora_tangent", _lora_tangent_reference)


def _lora_tangent_transpose(
    cotangents: Sequence[Any], *args: Any, transpose_rhs: bool, device: KernelDevice
) -> list[Any]:
    """Transposes with respect to the tangents: the gradient of the product."""
    dx, da, db, x, w, t, a, b = args
    (dy,) = cotangents
    no_cotangents = [None] * 5
    if type(dy) is ad.Zero:
        zeros = [
            ad.Zero(tangent.aval) if ad.is_undefined_primal(tangent) else None
            for tangent in (dx, da, db)
        ]
        return [*zeros, *no_cotangents]
    u, b_grad = _lora_grads_p.bind(dy, t, b, device=device)
    x_grad = None  # For an x that is an input of the model.
    if ad.is_undefined_primal(dx):
        (x_grad,) = _matmul_add_p.bind(
            dy, w, u, a.T, transpose_rhs=not transpose_rhs, device=device
        )
    return [x_grad, _flatten_batch(x).T @ _flatten_batch(u), b_grad, *no_cotangents]


ad.primitive_transposes[_lora_tangent_p] = _lora_tangent_transpose
