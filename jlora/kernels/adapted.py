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

from jlora.kernels import hopper, meeting, tpu, trial
from jlora.kernels.operation import Device, mapped, operation, total, transposed

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


def device_for(x: Any, w: Any, rank: int, *, turned: bool) -> Device | None:
    """The kind of device, among those that JAX computes on, whose kernels make this product and its
    gradient; None if there is none.

    Args:
        x: (..., k), or its shape and type.
        w: (k, n), or (n, k) if turned.
        rank: Of the update.
        turned: Whether W's contracted axis is its last.
    """
    asked = _asked.get()
    if asked == "none" or x.dtype != w.dtype or jax.sharding.get_abstract_mesh().size > 1:
        return None
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    n = w.shape[0] if turned else w.shape[1]
    both = (k, n), (n, k)  # The gradient's product is the transposed one.
    if asked == "tpu":
        return "tpu" if all(tpu.fits(rows, *one, rank, x.dtype) for one in both) else None
    if all(hopper.fits(rows, *one, rank, x.dtype) for one in both) and trial.passed(rank):
        return "hopper"
    return None


def adapted_product(x: Any, w: Any, a: Any, b: Any, *, turned: bool, device: Device) -> jax.Array:
    """`x W + (x A) B` (..., n), in the type of x.

    Args:
        x: (..., k).
        w: (k, n), or (n, k) if turned.
        a: (k, rank).
        b: (rank, n).
        turned: Whether W's contracted axis is its last.
        device: Whose kernels make it where they can.
    """
    return _adapted.bind(x, w, a, b, turned=turned, device=device)[0]


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


def _paired_by(maker: Any, x: Any, w: Any, t: Any, b: Any, *, turned: bool) -> list[Any]:
    out = maker.product(_rows(x), w, _rows(t), b, turned=turned)
    return [out.reshape(*x.shape[:-1], -1)]


_MAKERS: dict[Device, Any] = {"hopper": hopper, "tpu": tpu}
_paired = operation(
    "paired_product",
    _paired_plainly,
    {kind: functools.partial(_paired_by, maker) for kind, maker in _MAKERS.items()},
)


def _met_plainly(dy: Any, t: Any, b: Any) -> list[Any]:
    return [dy @ b.T, _rows(t).T @ _rows(dy)]


def _met_by_hopper(dy: Any, t: Any, b: Any) -> list[Any]:
    if b.shape[0] > meeting.MAX_RANK:
        return _met_plainly(dy, t, b)
    u, db = meeting.meeting(_rows(dy), _rows(t), b)
    return [u.reshape(t.shape), db]


_met = operation("met_cotangent", _met_plainly, {"hopper": _met_by_hopper})


def _adapted_plainly(x: Any, w: Any, a: Any, b: Any, *, turned: bool) -> list[Any]:
    return _paired_plainly(x, w, x @ a, b, turned=turned)


def _adapted_by(maker: Any, x: Any, w: Any, a: Any, b: Any, *, turned: bool) -> list[Any]:
    return _paired_by(maker, x, w, x @ a, b, turned=turned)


_adapted = operation(
    "adapted_product",
    _adapted_plainly,
    {kind: functools.partial(_adapted_by, maker) for kind, maker in _MAKERS.items()},
)


def _derivative(
    primals: Sequence[Any], tangents: Sequence[Any], *, turned: bool, device: Device
) -> Any:
    x, w, a, b = primals
    dx, dw, da, db = (None if type(tangent) is ad.Zero else tangent for tangent in tangents)
    out = _adapted.bind(x, w, a, b, turned=turned, device=device)
    parts = []
    if da is not None and db is not None:
        dx = jnp.zeros_like(x) if dx is None else dx
        parts += _moved.bind(dx, da, db, x, w, x @ a, a, b, turned=turned, device=device)
    else:
        parts += [] if dx is None else _adapted.bind(dx, w, a, b, turned=turned, device=device)
        parts += [] if da is None else [(x @ da) @ b]
        parts += [] if db is None else [(x @ a) @ db]
    parts += [] if dw is None else [_times(x, dw, turned)]
    return out, [total(parts)]


def _adapted_transposed(
    cotangents: Sequence[Any], *args: Any, turned: bool, device: Device
) -> list[Any]:
    """As a linear function of x, by kernels; of any other input, as the plain products."""
    x, w, a, b = args
    (dy,) = cotangents
    if not ad.is_undefined_primal(x) or type(dy) is ad.Zero:
        return transposed(_adapted_plainly, cotangents, *args, turned=turned)
    (dx,) = _adapted.bind(dy, w, b.T, a.T, turned=not turned, device=device)
    return [dx, None, None, None]


def _adapted_mapped(
    args: Sequence[Any], axes: Sequence[Any], *, turned: bool, device: Device
) -> Any:
    x, *weights = args
    if all(axis is None for axis in axes[1:]):  # More rows of x, and one matrix.
        x = jnp.moveaxis(x, axes[0], 0)
        return _adapted.bind(x, *weights, turned=turned, device=device), [0]
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
    cotangents: Sequence[Any], *args: Any, turned: bool, device: Device
) -> list[Any]:
    """As a linear function of what moves: the gradient of the product."""
    dx, da, db, x, w, t, a, b = args
    (dy,) = cotangents
    unmoved = [None] * 5
    if type(dy) is ad.Zero:
        zeros = [ad.Zero(one.aval) if ad.is_undefined_primal(one) else None for one in (dx, da, db)]
        return [*zeros, *unmoved]
    u, to_b = _met.bind(dy, t, b, device=device)
    to_x = None  # Where x is what the model was given.
    if ad.is_undefined_primal(dx):
        (to_x,) = _paired.bind(dy, w, u, a.T, turned=not turned, device=device)
    return [to_x, _rows(x).T @ _rows(u), to_b, *unmoved]


ad.primitive_transposes[_moved] = _moved_transposed
