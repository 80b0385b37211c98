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
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jlora.kernels import hopper, meeting, tpu, trial
from jlora.kernels.operation import mapped, operation, total

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("asked", default=None)


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """What is traced inside uses no kernels of jlora's own, as on devices that have none."""
    token = _asked.set("none")
    try:
        yield
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def tpu_products() -> Iterator[None]:
    """What is traced inside uses the product for TPUs, when it runs on one chip of them.

    It has to be asked for: it is compiled ahead of time for TPUs, and run in JAX's interpreter, but
    nobody has timed it on one. In a program for several chips it would not be split over them.
    """
    token = _asked.set("tpu")
    try:
        yield
    finally:
        _asked.reset(token)


def fits(x: Any, w: Any, rank: int, *, turned: bool) -> bool:
    """Whether kernels make this product and its gradient on the device that JAX computes on.

    Args:
        x: (..., k), or its shape and type.
        w: (k, n), or (n, k) if turned.
        rank: Of the update.
        turned: Whether W's contracted axis is its last.
    """
    asked = _asked.get()
    if asked == "none" or x.dtype != w.dtype:
        return False
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    n = w.shape[0] if turned else w.shape[1]
    both = (k, n), (n, k)  # The gradient's product is the transposed one.
    if asked == "tpu":
        return all(tpu.fits(rows, *one, rank, x.dtype) for one in both)
    return all(hopper.fits(rows, *one, rank, x.dtype) for one in both) and trial.passed()


def adapted_product(x: Any, w: Any, a: Any, b: Any, *, turned: bool) -> jax.Array:
    """`x W + (x A) B` (..., n), in the type of x.

    Args:
        x: (..., k).
        w: (k, n), or (n, k) if turned.
        a: (k, rank).
        b: (rank, n).
        turned: Whether W's contracted axis is its last.
    """
    return _adapted.bind(x, w, a, b, turned=turned)[0]


def products_saveable(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint` that keeps products with adapted weights."""
    return primitive is _adapted


def _times(x: Any, w: Any, turned: bool) -> jax.Array:
    """`x W`."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1 if turned else 0,)), ((), ())))


def _rows(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def _paired_plainly(x: Any, w: Any, t: Any, b: Any, *, turned: bool) -> list[Any]:
    return [_times(x, w, turned) + t @ b]


def _paired_by_hopper(x: Any, w: Any, t: Any, b: Any, *, turned: bool) -> list[Any]:
    out = hopper.product(_rows(x), w, _rows(t), b, turned=turned)
    return [out.reshape(*x.shape[:-1], -1)]


def _paired_by_tpu(x: Any, w: Any, t: Any, b: Any, *, turned: bool) -> list[Any]:
    out = tpu.product(_rows(x), w, _rows(t), b, turned=turned)
    return [out.reshape(*x.shape[:-1], -1)]


_paired = operation("paired_product", _paired_plainly, _paired_by_hopper, _paired_by_tpu)


def _met_plainly(dy: Any, t: Any, b: Any) -> list[Any]:
    return [dy @ b.T, _rows(t).T @ _rows(dy)]


def _met_by_hopper(dy: Any, t: Any, b: Any) -> list[Any]:
    u, db = meeting.meeting(_rows(dy), _rows(t), b)
    return [u.reshape(t.shape), db]


_met = operation("met_cotangent", _met_plainly, _met_by_hopper)


def _adapted_plainly(x: Any, w: Any, a: Any, b: Any, *, turned: bool) -> list[Any]:
    return _paired_plainly(x, w, x @ a, b, turned=turned)


def _adapted_by_hopper(x: Any, w: Any, a: Any, b: Any, *, turned: bool) -> list[Any]:
    return _paired_by_hopper(x, w, x @ a, b, turned=turned)


def _adapted_by_tpu(x: Any, w: Any, a: Any, b: Any, *, turned: bool) -> list[Any]:
    return _paired_by_tpu(x, w, x @ a, b, turned=turned)


_adapted = operation("adapted_product", _adapted_plainly, _adapted_by_hopper, _adapted_by_tpu)


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], *, turned: bool) -> Any:
    x, w, a, b = primals
    dx, dw, da, db = (None if type(tangent) is ad.Zero else tangent for tangent in tangents)
    out = _adapted.bind(x, w, a, b, turned=turned)
    parts = []
    if da is not None and db is not None:
        dx = jnp.zeros_like(x) if dx is None else dx
        parts += _moved.bind(dx, da, db, x, w, x @ a, a, b, turned=turned)
    else:
        parts += [] if dx is None else _adapted.bind(dx, w, a, b, turned=turned)
        parts += [] if da is None else [(x @ da) @ b]
        parts += [] if db is None else [(x @ a) @ db]
    parts += [] if dw is None else [_times(x, dw, turned)]
    return out, [total(parts)]


def _adapted_transposed(
    cotangents: Sequence[Any], x: Any, w: Any, a: Any, b: Any, *, turned: bool
) -> list[Any]:
    """As a linear function of x alone."""
    assert ad.is_undefined_primal(x)
    (dy,) = cotangents
    if type(dy) is ad.Zero:
        return [ad.Zero(x.aval), None, None, None]
    (dx,) = _adapted.bind(dy, w, b.T, a.T, turned=not turned)
    return [dx, None, None, None]


def _adapted_mapped(args: Sequence[Any], axes: Sequence[Any], *, turned: bool) -> Any:
    x, *weights = args
    if all(axis is None for axis in axes[1:]):  # More rows of x, and one matrix.
        return _adapted.bind(jnp.moveaxis(x, axes[0], 0), *weights, turned=turned), [0]
    return mapped(_adapted_plainly, args, axes, turned=turned)


batching.primitive_batchers[_adapted] = _adapted_mapped
ad.primitive_jvps[_adapted] = _derivative
ad.primitive_transposes[_adapted] = _adapted_transposed


def _moved_plainly(
    dx: Any, da: Any, db: Any, x: Any, w: Any, t: Any, a: Any, b: Any, *, turned: bool
) -> list[Any]:
    """What moving x, A and B does to the product, where `t` is `x A`."""
    return [total([*_adapted_plainly(dx, w, a, b, turned=turned), (x @ da) @ b, t @ db])]


_moved = operation("moved_product", _moved_plainly)


def _moved_transposed(
    cotangents: Sequence[Any],
    dx: Any,
    da: Any,
    db: Any,
    x: Any,
    w: Any,
    t: Any,
    a: Any,
    b: Any,
    *,
    turned: bool,
) -> list[Any]:
    """As a linear function of what moves: the gradient of the product."""
    (dy,) = cotangents
    unmoved = [None] * 5
    if type(dy) is ad.Zero:
        zeros = [ad.Zero(one.aval) if ad.is_undefined_primal(one) else None for one in (dx, da, db)]
        return [*zeros, *unmoved]
    u, to_b = _met.bind(dy, t, b)
    to_x = None  # Where x is what the model was given.
    if ad.is_undefined_primal(dx):
        (to_x,) = _paired.bind(dy, w, u, a.T, turned=not turned)
    return [to_x, _rows(x).T @ _rows(u), to_b, *unmoved]


ad.primitive_transposes[_moved] = _moved_transposed
