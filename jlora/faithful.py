"""Functions whose own derivative is that of their body, made in a cheaper way."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_MARK = "the rule is the derivative of the body"


def marked(array: jax.Array) -> jax.Array:
    """An argument of a `jax.custom_jvp` or `jax.custom_vjp` as it is, which tells jlora that the
    rule gives nothing but the derivative of the function's body.

    Other rules are kept where an adapted weight meets one. In this one's place the body itself is
    differentiated, through the factors.
    """
    return checkpoint_name(array, _MARK)


def is_faithful(jaxpr: Any) -> bool:
    """Whether the body of a function has a marked argument."""
    return any(eqn.primitive.name == "name" and eqn.params["name"] == _MARK for eqn in jaxpr.eqns)
