"""The load-balancing losses of mixtures, gathered from wherever in a program they arise.

Products inside a scan, a checkpoint or a shard_map cannot hand a loss to the caller by themselves:
whoever runs such a program collects what is found inside and returns it as one more output.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp

_found: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("found", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[Any]]:
    """A list that gets every loss found inside the context, and none that is found elsewhere."""
    losses: list[Any] = []
    token = _found.set(losses)
    try:
        yield losses
    finally:
        _found.reset(token)


def add(losses: Iterable[Any]) -> None:
    """Hands losses to whoever collects."""
    found = _found.get()
    if found is not None:
        found.extend(losses)


def with_losses(run: Callable[[], list[Any]]) -> tuple[list[Any], list[Any]]:
    """What `run` returns, and the losses found meanwhile."""
    with collecting() as losses:
        return run(), losses


def total(losses: Iterable[Any]) -> Any:
    """Their sum, a float32; zero when there are none."""
    return sum(losses, start=jnp.zeros((), jnp.float32))
