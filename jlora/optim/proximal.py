"""The proximal step of SoRA's gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.optim.labels import labels

PyTree = Any


class ThresholdState(NamedTuple):
    """How many steps were made."""

    step: jax.Array


def soft_threshold(
    threshold: float | optax.Schedule, label: str = "gate"
) -> optax.GradientTransformation:
    """A last transformation that pulls arrays of one label towards zero, and to it when near.

    After it, an array is `sign(z) max(|z| - threshold, 0)` of the `z` it would have become. That is
    the proximal step for a penalty on absolute values: with a learning rate of `lr` and a penalty
    of `strength * |g|`, chain it after the optimizer with a threshold of `lr * strength`.

    Args:
        threshold: How far a step pulls; or a schedule of it.
        label: Of the arrays, as `jlora.labels` has it.

    Raises:
        ValueError: For a negative threshold; from `init`, when the tree has no such label.

    References:
        Ding et al., SoRA, arXiv:2311.11696, equations 7 and 8.
    """
    if not callable(threshold) and not threshold >= 0:
        raise ValueError(f"threshold={threshold} would push away from zero. Use 0.0 or more.")

    def init(params: PyTree) -> ThresholdState:
        present = set(jax.tree.leaves(labels(params)))
        if label not in present:
            raise ValueError(
                f"soft_threshold found no array labelled {label!r}; the tree has "
                f"{sorted(present)}. Give rules with jlora.SoRA, or another label."
            )
        return ThresholdState(jnp.int32(0))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, ThresholdState]:
        if params is None:
            raise ValueError("soft_threshold needs params: call update(updates, state, params).")
        width = threshold(state.step) if callable(threshold) else threshold

        def shrink(name: str, change: jax.Array, array: jax.Array) -> jax.Array:
            if name != label:
                return change
            reached = array + change
            return jnp.sign(reached) * jnp.maximum(jnp.abs(reached) - width, 0) - array

        shrunk = jax.tree.map(shrink, labels(params), updates, params)
        return shrunk, ThresholdState(state.step + 1)

    return optax.GradientTransformation(init, update)
