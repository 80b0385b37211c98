"""`x W + (x A) B` as one operation, with the gradient that training asks for as others.

Written as plain products, the update costs passes over memory: its result is written and read to be
added to the base's, in both directions, and the cotangent is read once for `B` and once for what
goes on to `A`. The operations here leave those out on devices with kernels for them. They are

    paired   x W + t B          the base's product and the update's last one
    met      dy Bᵀ and tᵀ dy    all that the update's gradient needs of a cotangent
    adapted  x W + (x A) B      whose derivative is `moved`, and whose gradient `paired` and `met`
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

_requested_kernels: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "requested_kernels", default=None
)


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """What is traced inside uses no kernels of jlora's own, as on devices that have none."""
    token = _requested_kernels.set("none")
    try:
        yield
    finally:
        _requested_kernels.reset(token)


@contextlib.contextmanager
def tpu_products() -> Iterator[None]:
    """What is traced inside uses the product for TPUs, when it runs on one chip of them.

    It has to be asked for: it is compiled ahead of time for TPUs, and run in JAX's interpreter, but
    nobody has timed it on one. In a program for several chips it would not be split over them.
    """
    token = _requested_kernels.set("tpu")
    try:
        yield
    finally:
        _requested_kernels.reset(token)


def select_kernel_device(x: Any, w: Any, rank: int, *, transpose_rhs: bool) -> KernelDevice | None:
    """The kind of device, among those that JAX computes on, whose kernels make this product and its
    gradient; None if there is none.

    Args:
        x: (..., k), or its shape and type.
        w: (k, n), or (n, k) if transpose_rhs.
        rank: Of the update.
        transpose_rhs: Whether W's contracted axis is its last.
    """
    asked = _requested_kernels.get()
    if asked == "none" or x.dtype != w.dtype or jax.sharding.get_abstract_mesh().size > 1:
        return None
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    n = w.shape[0] if transpose_rhs else w.shape[1]
    both = (k, n), (n, k)  # The gradient's product is the transposed one.
    if asked == "tpu":
        return "tpu" if all(tpu.fits_tpu_tiles(rows, *one, rank, x.dtype) for one in both) else None
    if all(
        hopper.fits_hopper_tiles(rows, *one, rank, x.dtype) for one in both
    ) and self_test.kernels_work(rank):
        return "hopper"
    return None


def lora_matmul(
    x: Any, w: Any, a: Any, b: Any, *, transpose_rhs: bool, device: KernelDevice
) -> jax.Array:
    """`x W + (x A) B` (..., n), in the type of x.

    Args:
        x: (..., k).
        w: (k, n), or (n, k) if transpose_rhs.
        a: (k, rank).
        b: (rank, n).
        transpose_rhs: Whether W's contracted axis is its last.
        device: Whose kernels make it where they can.
    """
    return _lora_matmul_p.bind(x, w, a, b, transpose_rhs=transpose_rhs, device=device)[0]


def products_saveable(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint` that keeps products with adapted weights."""
    return primitive is _lora_matmul_p


def _base_matmul(x: Any, w: Any, transpose_rhs: bool) -> jax.Array:
    """`x W`."""
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


# Looked up late, so that a test can put another kernel in the place of one.
_MATMUL_ADD_KERNELS: dict[KernelDevice, Any] = {
    "hopper": lambda *args, **kwargs: hopper.hopper_matmul_add(*args, **kwargs),
    "tpu": lambda *args, **kwargs: tpu.tpu_matmul_add(*args, **kwargs),
}

_matmul_add_p = make_primitive(
    "matmul_add",
    _matmul_add_reference,
    {
        kind: functools.partial(_matmul_add_with_kernel, maker)
        for kind, maker in _MATMUL_ADD_KERNELS.items()
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
        kind: functools.partial(_lora_matmul_with_kernel, maker)
        for kind, maker in _MATMUL_ADD_KERNELS.items()
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
    """As a linear function of x, by kernels; of any other input, as the plain products."""
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
    if all(axis is None for axis in axes[1:]):  # More rows of x, and one matrix.
        x = jnp.moveaxis(x, axes[0], 0)
        return _lora_matmul_p.bind(x, *weights, transpose_rhs=transpose_rhs, device=device), [0]
    return batch_with_vmap(_lora_matmul_reference, args, axes, transpose_rhs=transpose_rhs)


batching.primitive_batchers[_lora_matmul_p] = _lora_matmul_batcher

ad.primitive_jvps[_lora_matmul_p] = _lora_matmul_jvp

ad.primitive_transposes[_lora_matmul_p] = _lora_matmul_transpose


def _lora_tangent_reference(
    dx: Any, da: Any, db: Any, x: Any, w: Any, t: Any, a: Any, b: Any, *, transpose_rhs: bool
) -> list[Any]:
    """What moving x, A and B does to the product, where `t` is `x A`."""
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
    """As a linear function of what moves: the gradient of the product."""
    dx, da, db, x, w, t, a, b = args
    (dy,) = cotangents
    unmoved = [None] * 5
    if type(dy) is ad.Zero:
        zeros = [ad.Zero(one.aval) if ad.is_undefined_primal(one) else None for one in (dx, da, db)]
        return [*zeros, *unmoved]
    u, to_b = _lora_grads_p.bind(dy, t, b, device=device)
    to_x = None  # Where x is what the model was given.
    if ad.is_undefined_primal(dx):
        (to_x,) = _matmul_add_p.bind(dy, w, u, a.T, transpose_rhs=not transpose_rhs, device=device)
    return [to_x, _flatten_batch(x).T @ _flatten_batch(u), to_b, *unmoved]


ad.primitive_transposes[_lora_tangent_p] = _lora_tangent_transpose
