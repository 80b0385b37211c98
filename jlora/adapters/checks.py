"""What the fields of adapter configs may hold, in one place: a rank means the same in all."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


def check_fields(config: Any) -> None:
    """Checks every field of a dataclass whose name has a check.

    Raises:
        ValueError: For a value out of its range.
        TypeError: For one of another type.
    """
    for field in dataclasses.fields(config):
        if field.name in CHECKS:
            name = f"{type(config).__name__}.{field.name}"
            CHECKS[field.name](name, getattr(config, field.name))


def is_number(value: Any) -> bool:
    """Whether a value is a real number, which True is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def integer(name: str, value: Any) -> None:
    """A rank as a type: an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; a rank is a count. Use an int of 1 or "
            f"more."
        )


def rank(name: str, value: Any) -> None:
    """A count of at least one."""
    integer(name, value)
    if value < 1:
        raise ValueError(
            f"{name}={value} leaves no room for an update. Use a rank of 1 or more; to leave a "
            f"weight frozen, map its pattern to None."
        )


def count(name: str, value: Any) -> None:
    """A count of at least one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is no count. Use an int of 1 or more.")


def scale(name: str, value: Any) -> None:
    """A positive finite number."""
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"{name}={value!r} gives the update no usable scale. Use a positive finite number, "
            f"such as the rank or twice the rank."
        )


def positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} is out of range. Use a finite number above 0.")


def not_negative(name: str, value: Any) -> None:
    """A finite number, zero or more."""
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} is out of range. Use a finite number, 0.0 or more.")


def rate(name: str, value: Any) -> None:
    """A probability below one."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} is no probability of dropping an input. Use 0.0 (off) up to, but "
            f"not, 1.0."
        )


def deviation(name: str, value: Any) -> None:
    """A finite number, not negative."""
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} is no deviation. Use a finite number, 0.0 or more.")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def float_type(name: str, value: Any) -> None:
    """A type that can hold factors."""
    try:
        floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name}={value!r} cannot hold factors. Use a float, such as jnp.float32.")


def text(name: str, value: Any) -> None:
    """A name that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}={value!r} must be a name, such as the default.")


def initialization(name: str, value: Any) -> None:
    """One of `jlora.inits`."""
    if not callable(getattr(value, "factors", None)):
        raise TypeError(
            f"{name}={value!r} is no initialisation. Use one of jlora.inits, such as "
            f"inits.pissa() or inits.drawn(jax.nn.initializers.normal(0.02))."
        )


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "rank": rank,
    "alpha": scale,
    "dropout": rate,
    "rank_stabilized": flag,
    "dtype": float_type,
    "init": initialization,
    "share": text,
    "std": deviation,
}


def warn_of_waste(config: Any, rank: int, weight: Any) -> None:
    """Warns where a rank exceeds the weight's own."""
    largest = min(weight.fan_in, weight.fan_out)
    if rank > largest:
        warnings.warn(
            f"{type(config).__name__}.rank={rank} on {weight.path!r} exceeds the weight's own rank "
            f"of at most {largest}, so some of it is wasted.",
            stacklevel=5,
        )
