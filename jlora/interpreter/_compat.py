"""Differences between the JAX releases that jlora supports (0.10.2 to 0.12).

JAX's public interface to traced programs is `jax.make_jaxpr` and `jax.extend.core`. The parameters
of equations are undocumented and change between releases, so this module alone handles them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import AxisType


class TracedProgram(NamedTuple):
    """A traced program.

    Attributes:
        jaxpr: The open jaxpr.
        consts: Arrays that the program closes over, one per constant variable of the jaxpr.
        outputs: Variables whose values are returned; those of the jaxpr, or a selection.
    """

    jaxpr: Any
    consts: Sequence[Any]
    outputs: Sequence[Any]

    @property
    def inputs(self) -> list[Any]:
        return list(self.jaxpr.invars)


def program_from_jaxpr(jaxpr: Any) -> TracedProgram:
    """Returns the program of an equation's parameter, an open (remat in 0.10) or closed jaxpr."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return TracedProgram(inner, tuple(getattr(jaxpr, "consts", ())), tuple(inner.outvars))


def trace_program(fn: Callable[..., Any], *args: Any) -> TracedProgram:
    """Traces a function of arrays or of `jax.ShapeDtypeStruct`."""
    return program_from_jaxpr(jax.make_jaxpr(fn)(*args))


def bind_eqn(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation on other values, in the context that it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*values, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def make_eqn_key(eqn: Any) -> Hashable:
    """Returns a key that equations share which `bind_eqn` evaluates alike."""
    return eqn.primitive.name, tuple(sorted(eqn.params.items())), eqn.ctx


def get_varying_axes(array: Any) -> tuple[str, ...]:
    """Returns the mesh axes over which an array varies, inside a shard_map that tracks this.

    They are sorted, because the order of a set differs between the processes of a run.
    """
    kind = getattr(jax.typeof(array), "manual_axis_type", None)
    return tuple(sorted(getattr(kind, "varying", ())))


def has_explicit_sharding(array: Any) -> bool:
    """Whether the sharding is part of an array's type (explicit mesh axes)."""
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    return any(kind == AxisType.Explicit for kind in getattr(mesh, "axis_types", ()))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a literal constant."""
    return isinstance(atom, core.Literal)


class ScanInputCounts(NamedTuple):
    """Input counts of a scan, whose inputs are constants, then carries, then scanned arrays."""

    num_consts: int
    num_carry: int


def count_scan_inputs(eqn: Any) -> ScanInputCounts:
    """Counts the constants and carries of a scan; JAX 0.12 keeps them as trees."""
    if "num_consts" in eqn.params:
        return ScanInputCounts(eqn.params["num_consts"], eqn.params["num_carry"])
    # A tree with the structure of the inputs, filled here with the inputs themselves.
    consts, carry, _ = eqn.params["ft_in"].update(eqn.invars).unpack()
    return ScanInputCounts(len(list(consts)), len(list(carry)))
