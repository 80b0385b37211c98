"""Operations of JAX that plain code defines and a device may make in its own way.

Every one has a static fact `device`: the kind of device whose kernels were chosen when the program
was traced. Compiled for another one after all, it is what the plain code says.
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
    """An operation that gives what `reference` does, under every transformation of JAX.

    A primitive, where `jax.custom_vjp` would do for the gradient alone, goes through forward-mode
    derivatives, `vmap` on either side of a derivative, and derivatives of derivatives. Unless other
    rules are put in their place, mapping it over anything maps `reference`, and so does a derivative.

    Args:
        name: As programs show it.
        reference: From arrays, with static keyword arguments, to arrays.
        kernels: The same for kinds of devices, by `KernelDevice`. Whoever binds the operation with that
            device has made sure that it has them.
    """
    made = Primitive(name)
    made.multiple_results = True

    def defined(*args: Any, device: KernelDevice, **facts: Any) -> Sequence[Any]:
        return reference(*args, **facts)

    @functools.partial(jax.jit, static_argnums=(1,))
    def run(args: Sequence[Any], facts: tuple[tuple[str, Any], ...]) -> Any:
        return made.bind(*args, **dict(facts))

    def alone(*args: Any, **facts: Any) -> Any:
        if jax.config.values["jax_disable_jit"]:  # Who looks at every step sees the plain ones.
            return defined(*args, **facts)
        return run(args, tuple(sorted(facts.items())))

    def shapes(*avals: Any, **facts: Any) -> Sequence[Any]:
        # Traced, so that whatever JAX tells of an array (where it lies, say) is right.
        return jax.make_jaxpr(functools.partial(defined, **facts))(*avals).out_avals

    def derivative(primals: Sequence[Any], tangents: Sequence[Any], **facts: Any) -> Any:
        moving = [number for number, t in enumerate(tangents) if type(t) is not ad.Zero]
        of_moving = _bind_other_args(functools.partial(defined, **facts), primals, moving)
        _, out = jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])
        return made.bind(*primals, **facts), out

    made.def_impl(alone)
    made.def_abstract_eval(shapes)
    ad.primitive_jvps[made] = derivative
    ad.primitive_transposes[made] = functools.partial(transpose_linear_args, defined)
    batching.primitive_batchers[made] = functools.partial(batch_with_vmap, defined)
    mlir.register_lowering(made, mlir.lower_fun(defined, multiple_results=True))
    for kind, kernel in (kernels or {}).items():
        lowered = mlir.lower_fun(
            functools.partial(_call_kernel_or_reference, kind, kernel, reference), True
        )
        mlir.register_lowering(made, lowered, platform=_PLATFORMS[kind])
    return made


def _call_kernel_or_reference(
    kernel_device: KernelDevice,
    kernel: ReferenceFn,
    reference: ReferenceFn,
    *args: Any,
    device: KernelDevice,
    **params: Any,
) -> Sequence[Any]:
    """On a platform with a kernel for one kind of device."""
    return kernel(*args, **params) if device == kernel_device else reference(*args, **params)


def batch_with_vmap(
    reference: ReferenceFn, args: Sequence[Any], in_axes: Sequence[Any], **params: Any
) -> Any:
    """What JAX asks of an operation mapped over axes of its inputs, made by its definition."""
    out = jax.vmap(functools.partial(reference, **params), list(in_axes))(*args)
    return out, [0] * len(out)


def transpose_linear_args(
    reference: ReferenceFn, cotangents: Sequence[Any], *args: Any, **params: Any
) -> list[Any | None]:
    """What JAX asks of an operation as a linear function of some of its inputs."""
    unknown = [number for number, one in enumerate(args) if ad.is_undefined_primal(one)]
    shapes = [jax.ShapeDtypeStruct(args[n].aval.shape, args[n].aval.dtype) for n in unknown]
    back = jax.linear_transpose(
        _bind_other_args(functools.partial(reference, **params), args, unknown), *shapes
    )
    found = back([ad.instantiate_zeros(one) for one in cotangents])
    out: list[Any | None] = [None] * len(args)
    for number, value in zip(unknown, found, strict=True):
        out[number] = value
    return out


def _bind_other_args(fn: ReferenceFn, args: Sequence[Any], indices: Sequence[int]) -> ReferenceFn:
    """The function of those arguments alone, the others as they are."""

    def of_some(*values: Any) -> Sequence[Any]:
        given = dict(zip(indices, values, strict=True))
        return list(fn(*(given.get(number, one) for number, one in enumerate(args))))

    return of_some


def sum_arrays(arrays: Sequence[Any]) -> Any:
    """The sum of arrays of one shape."""
    return functools.reduce(jnp.add, arrays)
