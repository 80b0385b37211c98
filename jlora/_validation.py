"""Checks of config fields and arguments, shared so that a field means the same everywhere."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

_FLOAT32 = np.finfo(np.float32)


def check_fields(config: Any) -> None:
    """Checks the fields of a dataclass that have a check in `FIELD_CHECKS`.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has another type.
    """
    for field in dataclasses.fields(config):
        if field.name in FIELD_CHECKS:
            name = f"{type(config).__name__}.{field.name}"
            FIELD_CHECKS[field.name](name, getattr(config, field.name))


def is_real_number(value: Any) -> bool:
    """Whether a value is a real number; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_positive_float32(value: Any) -> bool:
    """Whether a value is a positive number in float32's range: not rounded to zero or infinity."""
    return is_real_number(value) and float(_FLOAT32.tiny) <= value <= float(_FLOAT32.max)


def is_nonnegative_float32(value: Any) -> bool:
    """Whether a value is zero, or a positive number in float32's range."""
    return is_real_number(value) and (value == 0 or is_positive_float32(value))


def check_integer(name: str, value: Any) -> None:
    """Raises TypeError unless a rank is an integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be a positive integer, got {type(value).__name__}.")


def check_rank(name: str, value: Any) -> None:
    """Raises unless a rank is a positive integer."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(
            f"{name}={value} must be at least 1. To leave a weight frozen, map its pattern to None."
        )


def check_positive_int(name: str, value: Any) -> None:
    """Raises ValueError unless a value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer, such as 1.")


def check_scale(name: str, value: Any) -> None:
    """Raises ValueError unless a scale is positive and finite in float32."""
    if not is_positive_float32(value):
        raise ValueError(
            f"{name}={value!r} must be a positive finite number in the range of float32, such as "
            f"the rank or twice the rank."
        )


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless a value is positive and finite in float32."""
    if not is_positive_float32(value):
        raise ValueError(
            f"{name}={value!r} must be a finite number above 0, in the range of float32."
        )


def check_nonnegative(name: str, value: Any) -> None:
    """Raises ValueError unless a value is zero, or positive and finite in float32."""
    if not is_nonnegative_float32(value):
        raise ValueError(
            f"{name}={value!r} must be a finite number, 0.0 or more, in the range of float32."
        )


def check_dropout_rate(name: str, value: Any) -> None:
    """Raises ValueError unless a value is a probability below one."""
    if not is_real_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} must be a probability below 1.0. Use 0.0 for no dropout."
        )


def check_std(name: str, value: Any) -> None:
    """Raises ValueError unless a standard deviation is zero, or positive and finite in float32."""
    if not is_nonnegative_float32(value):
        raise ValueError(
            f"{name}={value!r} must be a standard deviation: a finite number, 0.0 or more, in the "
            f"range of float32."
        )


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError unless a value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def check_float_dtype(name: str, value: Any) -> None:
    """Raises TypeError unless a value is a floating-point type."""
    try:
        floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name}={value!r} must be a floating-point type, such as jnp.float32.")


def check_nonempty_string(name: str, value: Any) -> None:
    """Raises TypeError unless a value is a nonempty string."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}={value!r} must be a nonempty string, such as the default.")


def check_factor_init(name: str, value: Any) -> None:
    """Raises TypeError unless a value is an initializer of `jlora.initializers`."""
    if not callable(getattr(value, "factors", None)):
        raise TypeError(
            f"{name}={value!r} must be one of jlora.initializers, such as initializers.pissa() or "
            f"initializers.from_initializer(jax.nn.initializers.normal(0.02))."
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
    """Warns if the rank of an adapter exceeds the largest rank that the weight can have."""
    max_rank = min(weight.fan_in, weight.fan_out)
    if rank > max_rank:
        warnings.warn(
            f"{type(config).__name__}.rank={rank} on {weight.path!r} exceeds the weight's own rank "
            f"of at most {max_rank}, so part of it is redundant.",
            stacklevel=5,
        )
