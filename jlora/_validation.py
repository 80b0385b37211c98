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
        if field.name in FIELD_CHECKS:
            name = f"{type(config).__name__}.{field.name}"
            FIELD_CHECKS[field.name](name, getattr(config, field.name))


def is_real_number(value: Any) -> bool:
    """Whether a value is a real number, which True is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integer(name: str, value: Any) -> None:
    """A rank as a type: an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; a rank is a count. Use an int of 1 or "
            f"more."
        )


def check_rank(name: str, value: Any) -> None:
    """A count of at least one."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(
            f"{name}={value} leaves no room for an update. Use a rank of 1 or more; to leave a "
            f"weight frozen, map its pattern to None."
        )


def check_positive_int(name: str, value: Any) -> None:
    """A count of at least one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is no count. Use an int of 1 or more.")


def check_scale(name: str, value: Any) -> None:
    """A positive finite number."""
    if not is_real_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"{name}={value!r} gives the update no usable scale. Use a positive finite number, "
            f"such as the rank or twice the rank."
        )


def check_positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    if not is_real_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} is out of range. Use a finite number above 0.")


def check_nonnegative(name: str, value: Any) -> None:
    """A finite number, zero or more."""
    if not is_real_number(value) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} is out of range. Use a finite number, 0.0 or more.")


def check_dropout_rate(name: str, value: Any) -> None:
    """A probability below one."""
    if not is_real_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} is no probability of dropping an input. Use 0.0 (off) up to, but "
            f"not, 1.0."
        )


def check_std(name: str, value: Any) -> None:
    """A finite number, not negative."""
    if not is_real_number(value) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} is no deviation. Use a finite number, 0.0 or more.")


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def check_float_dtype(name: str, value: Any) -> None:
    """A type that can hold factors."""
    try:
        floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name}={value!r} cannot hold factors. Use a float, such as jnp.float32.")


def check_nonempty_string(name: str, value: Any) -> None:
    """A name that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}={value!r} must be a name, such as the default.")


def check_factor_init(name: str, value: Any) -> None:
    """One of `jlora.initializers`."""
    if not callable(getattr(value, "factors", None)):
        raise TypeError(
            f"{name}={value!r} is no initialisation. Use one of jlora.initializers, such as "
            f"initializers.pissa() or initializers.from_initializer(jax.nn.initializers.normal(0.02))."
        )


FIELD_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "rank": check_rank,
    "alpha": check_scale,
    "dropout": check_dropout_rate,
    "use_rslora": check_bool,
    "dtype": check_float_dtype,
    "init": check_factor_init,
    "share": check_nonempty_string,
    "std": check_std,
}


def warn_excess_rank(config: Any, rank: int, weight: Any) -> None:
    """Warns where a rank exceeds the weight's own."""
    largest = min(weight.fan_in, weight.fan_out)
    if rank > largest:
        warnings.warn(
            f"{type(config).__name__}.rank={rank} on {weight.path!r} exceeds the weight's own rank "
            f"of at most {largest}, so some of it is wasted.",
            stacklevel=5,
        )
