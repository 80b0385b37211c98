"""The pair of factors `A B` that most families are built on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax

from jlora.adapters.inits import Initialization
from jlora.adapters.protocol import AdapterLeaf, Groups, Weight, wide
from jlora.factored.network import Labelled
from jlora.factored.probe import Axes


def draw(
    key: jax.Array, weight: Weight, init: Initialization, rank: int, scale: float, dtype: Any
) -> dict[str, jax.Array]:
    """Fresh `a` (*batch, *inputs, rank) and `b` (*batch, rank, *outputs) for a weight.

    Args:
        key: Draws whatever is random.
        weight: What they will adapt.
        init: How.
        rank: The length of the axis they share.
        scale: What their product is multiplied by.
        dtype: Of both.
    """
    a, b = init.factors(key, weight, rank, scale)
    shapes = shapes_of(weight.groups, rank)
    return {"a": a.reshape(shapes["a"]).astype(dtype), "b": b.reshape(shapes["b"]).astype(dtype)}


def shapes_of(groups: Groups, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `a` and `b`."""
    batch, inputs, outputs = groups
    return {"a": (*batch, *inputs, rank), "b": (*batch, rank, *outputs)}


def axes_of(axes: Axes) -> dict[str, tuple[int | None, ...]]:
    """The weight's axes that those of `a` and `b` run along; None for the rank."""
    batch, inputs, outputs = axes
    return {"a": (*batch, *inputs, None), "b": (*batch, None, *outputs)}


def as_matrices(leaf: Any) -> tuple[jax.Array, jax.Array]:
    """`a` as (batch, fan_in, rank) and `b` as (batch, rank, fan_out), in float32 or wider."""
    count = math.prod(leaf.groups.batch)
    return wide(leaf.a).reshape(count, -1, leaf.rank), wide(leaf.b).reshape(count, leaf.rank, -1)


def labelled(
    leaf: AdapterLeaf, a: Any, b: Any, rank: Hashable = "rank"
) -> tuple[Labelled, Labelled]:
    """Factors of these shapes with their labels."""
    batch, inputs, outputs = leaf.axes
    return (a, (*batch, *inputs, rank)), (b, (*batch, rank, *outputs))


def gated(leaf: AdapterLeaf, gates: jax.Array, b: jax.Array) -> jax.Array:
    """`diag(gates) B`, for gates (*batch, rank) and `b` (*batch, rank, *outputs)."""
    return gates.reshape(*gates.shape, *[1] * len(leaf.axes.outputs)) * b


def facts_of(leaf: Any) -> dict[str, Any]:
    """All fields of a leaf by name, for one of another family with the same ones."""
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}


def scale_of(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)`."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
