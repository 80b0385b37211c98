"""The pair of factors `A B` that most families are built on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax

from jlora.adapters.base import AdapterLeaf
from jlora.initializers import FactorInit
from jlora.interpreter.factored_array import LabeledArray
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight, AxisSizes, promote_to_float32


def init_factors(
    key: jax.Array, weight: AdaptableWeight, init: FactorInit, rank: int, scale: float, dtype: Any
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
    shapes = factor_shapes(weight.axis_sizes, rank)
    return {"a": a.reshape(shapes["a"]).astype(dtype), "b": b.reshape(shapes["b"]).astype(dtype)}


def factor_shapes(groups: AxisSizes, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `a` and `b`."""
    batch, inputs, outputs = groups
    return {"a": (*batch, *inputs, rank), "b": (*batch, rank, *outputs)}


def factor_axes(axes: WeightAxes) -> dict[str, tuple[int | None, ...]]:
    """The weight's axes that those of `a` and `b` run along; None for the rank."""
    batch, inputs, outputs = axes
    return {"a": (*batch, *inputs, None), "b": (*batch, None, *outputs)}


def factor_matrices(leaf: Any) -> tuple[jax.Array, jax.Array]:
    """`a` as (batch, fan_in, rank) and `b` as (batch, rank, fan_out), in float32 or wider."""
    count = math.prod(leaf.axis_sizes.batch)
    return promote_to_float32(leaf.a).reshape(count, -1, leaf.rank), promote_to_float32(
        leaf.b
    ).reshape(count, leaf.rank, -1)


def label_factors(
    leaf: AdapterLeaf, a: Any, b: Any, rank: Hashable = "rank"
) -> tuple[LabeledArray, LabeledArray]:
    """Factors of these shapes with their labels."""
    batch, inputs, outputs = leaf.axes
    return (a, (*batch, *inputs, rank)), (b, (*batch, rank, *outputs))


def apply_rank_gates(leaf: AdapterLeaf, gates: jax.Array, b: jax.Array) -> jax.Array:
    """`diag(gates) B`, for gates (*batch, rank) and `b` (*batch, rank, *outputs)."""
    return gates.reshape(*gates.shape, *[1] * len(leaf.axes.outputs)) * b


def leaf_field_values(leaf: Any) -> dict[str, Any]:
    """All fields of a leaf by name, for one of another family with the same ones."""
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)`."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)
