"""JAX primitives that are defined by a reference function and may have a kernel per device kind.

Every primitive has a static parameter `device`: the device kind whose kernels were selected when
the program was traced. Compiled for another device kind, it runs the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

ReferenceFn = Callable[..., Sequence[Any]]

KernelDevice = Literal["hopper", "tpu"]

_PLATFORMS: dict[KernelDevice, str] = {"hopper": "cuda", "tpu": "tpu"}


def make_primitive(
    name: str, reference: ReferenceFn, kernels: Mapping[KernelDevice, ReferenceFn] | None = None
) -> Primitive:
    """Creates a primitive that equals `reference` under every transformation of JAX.

    `jax.custom_vjp` would suffice for the gradient. A primitive also supports forward mode, `vmap`
    on either side of a derivative, and higher derivatives. Unless other rules are registered,
    batching and differentiation are those of `reference`.

    Args:
        name: Name of the primitive in jaxprs.
        reference: Function from arrays, with static keyword arguments, to a sequence of arrays.
        kernels: Functions with the signature of `reference`, by device kind. Callers that bind the
            primitive with a device kind must check that it supports the arguments.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def reference_fn(*args: Any, device: KernelDevice, **params: Any) -> Sequence[Any]:
        return reference(*args, **params)

    @functools.partial(jax.jit, static_argnums=(1,))
    def bind_jitted(args: Sequence[Any], params: tuple[tuple[str, Any], ...]) -> Any:
        return primitive.bind(*args, **dict(params))

    def impl(*args: Any, **params: Any) -> Any:
        # Without jit, every step of the reference is to be visible.
        if jax.config.values["jax_disable_jit"]:
            return reference_fn(*args, **params)
        return bind_jitted(args, tuple(sorted(params.items())))

    def abstract_eval(*avals: Any, **params: Any) -> Sequence[Any]:
        # Traced, so that all properties of the abstract values (such as shardings) are right.
        return jax.make_jaxpr(functools.partial(reference_fn, **params))(*avals).out_avals

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        indices = [index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
        differentiable = _bind_other_args(
            functools.partial(reference_fn, **params), primals, indices
        )
        _, out = jax.jvp(
            differentiable, [primals[i] for i in indices], [tangents[i] for i in indices]
        )
        return primitive.bind(*primals, **params), out

    primitive.def_impl(impl)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = functools.partial(transpose_linear_args, reference_fn)
    batching.primitive_batchers[primitive] = functools.partial(batch_with_vmap, reference_fn)
    mlir.register_lowering(primitive, mlir.lower_fun(reference_fn, multiple_results=True))
    for device_kind, kernel in (kernels or {}).items():
        lowered = mlir.lower_fun(
            functools.partial(_call_kernel_or_reference, device_kind, kernel, reference), True
        )
        mlir.register_lowering(primitive, lowered, platform=_PLATFORMS[device_kind])
    return primitive


def _call_kernel_or_reference(
    kernel_device: KernelDevice,
    kernel: ReferenceFn,
    reference: ReferenceFn,
    *args: Any,
    device: KernelDevice,
    **params: Any,
) -> Sequence[Any]:
    """Runs the kernel if the primitive was bound for its device kind, else the reference."""
    return kernel(*args, **params) if device == kernel_device else reference(*args, **params)


def batch_with_vmap(
    reference: ReferenceFn, args: Sequence[Any], in_axes: Sequence[Any], **params: Any
) -> Any:
    """Batching rule of a primitive: `jax.vmap` of its reference."""
    out = jax.vmap(functools.partial(reference, **params), list(in_axes))(*args)
    return out, [0] * len(out)


def transpose_linear_args(
    reference: ReferenceFn, cotangents: Sequence[Any], *args: Any, **params: Any
) -> list[Any | None]:
    """Transpose rule of a primitive: `jax.linear_transpose` of its reference."""
    linear_indices = [index for index, value in enumerate(args) if ad.is_undefined_primal(value)]
    shapes = [jax.ShapeDtypeStruct(args[n].aval.shape, args[n].aval.dtype) for n in linear_indices]
    transpose_fn = jax.linear_transpose(
        _bind_other_args(functools.partial(reference, **params), args, linear_indices), *shapes
    )
    results = transpose_fn([ad.instantiate_zeros(value) for value in cotangents])
    out: list[Any | None] = [None] * len(args)
    for index, value in zip(linear_indices, results, strict=True):
        out[index] = value
    return out


def _bind_other_args(fn: ReferenceFn, args: Sequence[Any], indices: Sequence[int]) -> ReferenceFn:
    """Returns the function of the arguments at `indices`, with the others fixed."""

    def bound(*values: Any) -> Sequence[Any]:
        value_by_index = dict(zip(indices, values, strict=True))
        return list(fn(*(value_by_index.get(index, arg) for index, arg in enumerate(args))))

    return bound


def sum_arrays(arrays: Sequence[Any]) -> Any:
    """Returns the sum of arrays of one shape."""
    return functools.reduce(jnp.add, arrays)
