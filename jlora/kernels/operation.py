"""Operations of JAX that plain code defines and a device may make in its own way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Plain = Callable[..., Sequence[Any]]


def operation(
    name: str, plain: Plain, by_hopper: Plain | None = None, by_tpu: Plain | None = None
) -> Primitive:
    """An operation that gives what `plain` does, under every transformation of JAX.

    A primitive, where `jax.custom_vjp` would do for the gradient alone, goes through forward-mode
    derivatives, `vmap` on either side of a derivative, and derivatives of derivatives. Unless other
    rules are put in their place, mapping it over anything maps `plain`, and so does a derivative.

    Args:
        name: As programs show it.
        plain: From arrays, with static keyword arguments, to arrays.
        by_hopper: The same on NVIDIA GPUs that `jlora.kernels.hopper` is made for; whoever binds
            the operation has made sure that there is one.
        by_tpu: The same on TPUs.
    """
    made = Primitive(name)
    made.multiple_results = True

    @functools.partial(jax.jit, static_argnums=(1,))
    def run(args: Sequence[Any], facts: tuple[tuple[str, Any], ...]) -> Any:
        return made.bind(*args, **dict(facts))

    def alone(*args: Any, **facts: Any) -> Any:
        if jax.config.values["jax_disable_jit"]:  # Who looks at every step sees the plain ones.
            return plain(*args, **facts)
        return run(args, tuple(sorted(facts.items())))

    def shapes(*avals: Any, **facts: Any) -> Sequence[Any]:
        # Traced, so that whatever JAX tells of an array (where it lies, say) is right.
        return jax.make_jaxpr(functools.partial(plain, **facts))(*avals).out_avals

    def derivative(primals: Sequence[Any], tangents: Sequence[Any], **facts: Any) -> Any:
        given = [t if type(t) is not ad.Zero else None for t in tangents]
        moving = [number for number, tangent in enumerate(given) if tangent is not None]

        def of_moving(*values: Any) -> Sequence[Any]:
            held = list(primals)
            for number, value in zip(moving, values, strict=True):
                held[number] = value
            return list(plain(*held, **facts))

        _, out = jax.jvp(of_moving, [primals[n] for n in moving], [given[n] for n in moving])
        return made.bind(*primals, **facts), out

    made.def_impl(alone)
    made.def_abstract_eval(shapes)
    ad.primitive_jvps[made] = derivative
    batching.primitive_batchers[made] = functools.partial(mapped, plain)
    mlir.register_lowering(made, mlir.lower_fun(plain, multiple_results=True))
    for platform, fn in (("cuda", by_hopper), ("tpu", by_tpu)):
        if fn is not None:
            lowered = mlir.lower_fun(fn, multiple_results=True)
            mlir.register_lowering(made, lowered, platform=platform)
    return made


def mapped(plain: Plain, args: Sequence[Any], axes: Sequence[Any], **facts: Any) -> Any:
    """What JAX asks of an operation mapped over axes of its inputs, made by its definition."""
    out = jax.vmap(functools.partial(plain, **facts), list(axes))(*args)
    return out, [0] * len(out)


def total(parts: Sequence[Any]) -> Any:
    """The sum of arrays of one shape."""
    return functools.reduce(jnp.add, parts)
