"""What differs between the releases of JAX that jlora supports (0.10.2 to 0.12).

JAX's public surface for looking into a traced program is `jax.make_jaxpr` and `jax.extend.core`;
the parameters of its equations are documented nowhere and change. All of that is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import AxisType


class TracedProgram(NamedTuple):
    """A traced program, the arrays it closes over, and which of its values are wanted."""

    jaxpr: Any
    consts: Sequence[Any]
    outputs: Sequence[Any]

    @property
    def inputs(self) -> list[Any]:
        return list(self.jaxpr.invars)


def program_from_jaxpr(jaxpr: Any) -> TracedProgram:
    """The program of an equation's parameter, which may be open (0.10's remat) or closed."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return TracedProgram(inner, tuple(getattr(jaxpr, "consts", ())), tuple(inner.outvars))


def trace_program(fn: Callable[..., Any], *args: Any) -> TracedProgram:
    """The program that a function of arrays (or shapes) runs."""
    return program_from_jaxpr(jax.make_jaxpr(fn)(*args))


def bind_eqn(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation on other values, under the context it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*values, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def get_varying_axes(array: Any) -> tuple[str, ...]:
    """The mesh axes over which shards of an array may differ, inside a shard_map that tracks it."""
    kind = getattr(jax.typeof(array), "manual_axis_type", None)
    return tuple(getattr(kind, "varying", ()))


def has_explicit_sharding(array: Any) -> bool:
    """Whether an array's type says how it lies on a mesh (explicit axes)."""
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    return any(kind == AxisType.Explicit for kind in getattr(mesh, "axis_types", ()))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant written into it."""
    return isinstance(atom, core.Literal)


class ScanInputCounts(NamedTuple):
    """The inputs of a scan: constants first, then carries, then what is scanned over."""

    num_consts: int
    num_carry: int


def count_scan_inputs(eqn: Any) -> ScanInputCounts:
    """How many constants and carries a scan has; they became trees in JAX 0.12."""
    if "num_consts" in eqn.params:
        return ScanInputCounts(eqn.params["num_consts"], eqn.params["num_carry"])
    # A tree of the inputs' roles, to be filled with the inputs themselves.
    consts, carry, _ = eqn.params["ft_in"].update(eqn.invars).unpack()
    return ScanInputCounts(len(list(consts)), len(list(carry)))
