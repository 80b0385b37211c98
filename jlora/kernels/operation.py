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

Plain = Callable[..., Sequence[Any]]
Device = Literal["hopper", "tpu"]
_PLATFORMS: dict[Device, str] = {"hopper": "cuda", "tpu": "tpu"}


def operation(name: str, plain: Plain, kernels: Mapping[Device, Plain] | None = None) -> Primitive:
    """An operation that gives what `plain` does, under every transformation of JAX.

    A primitive, where `jax.custom_vjp` would do for the gradient alone, goes through forward-mode
    derivatives, `vmap` on either side of a derivative, and derivatives of derivatives. Unless other
    rules are put in their place, mapping it over anything maps `plain`, and so does a derivative.

    Args:
        name: As programs show it.
        plain: From arrays, with static keyword arguments, to arrays.
        kernels: The same for kinds of devices, by `Device`. Whoever binds the operation with that
            device has made sure that it has them.
    """
    made = Primitive(name)
    made.multiple_results = True

    def defined(*args: Any, device: Device, **facts: Any) -> Sequence[Any]:
        return plain(*args, **facts)

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
        of_moving = _of_some(functools.partial(defined, **facts), primals, moving)
        _, out = jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])
        return made.bind(*primals, **facts), out

    made.def_impl(alone)
    made.def_abstract_eval(shapes)
    ad.primitive_jvps[made] = derivative
    ad.primitive_transposes[made] = functools.partial(transposed, defined)
    batching.primitive_batchers[made] = functools.partial(mapped, defined)
    mlir.register_lowering(made, mlir.lower_fun(defined, multiple_results=True))
    for kind, kernel in (kernels or {}).items():
        lowered = mlir.lower_fun(functools.partial(_made, kind, kernel, plain), True)
        mlir.register_lowering(made, lowered, platform=_PLATFORMS[kind])
    return made


def _made(
    kind: Device, kernel: Plain, plain: Plain, *args: Any, device: Device, **facts: Any
) -> Sequence[Any]:
    """On a platform with a kernel for one kind of device."""
    return kernel(*args, **facts) if device == kind else plain(*args, **facts)


def mapped(plain: Plain, args: Sequence[Any], axes: Sequence[Any], **facts: Any) -> Any:
    """What JAX asks of an operation mapped over axes of its inputs, made by its definition."""
    out = jax.vmap(functools.partial(plain, **facts), list(axes))(*args)
    return out, [0] * len(out)


def transposed(
    plain: Plain, cotangents: Sequence[Any], *args: Any, **facts: Any
) -> list[Any | None]:
    """What JAX asks of an operation as a linear function of some of its inputs."""
    unknown = [number for number, one in enumerate(args) if ad.is_undefined_primal(one)]
    shapes = [jax.ShapeDtypeStruct(args[n].aval.shape, args[n].aval.dtype) for n in unknown]
    back = jax.linear_transpose(_of_some(functools.partial(plain, **facts), args, unknown), *shapes)
    found = back([ad.instantiate_zeros(one) for one in cotangents])
    out: list[Any | None] = [None] * len(args)
    for number, value in zip(unknown, found, strict=True):
        out[number] = value
    return out


def _of_some(plain: Plain, args: Sequence[Any], numbers: Sequence[int]) -> Plain:
    """The function of those arguments alone, the others as they are."""

    def of_some(*values: Any) -> Sequence[Any]:
        given = dict(zip(numbers, values, strict=True))
        return list(plain(*(given.get(number, one) for number, one in enumerate(args))))

    return of_some


def total(parts: Sequence[Any]) -> Any:
    """The sum of arrays of one shape."""
    return functools.reduce(jnp.add, parts)
