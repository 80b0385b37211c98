"""The pair of low-rank factors `A B` that most adapter methods use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.base import AdapterLeaf
from jlora.initializers import FactorInit
from jlora.interpreter.factored_array import LabeledArray
from jlora.interpreter.terms import WeightAxes, cast, widest_dtype
from jlora.interpreter.weight import AdaptableWeight, AxisSizes, promote_to_float32


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """Returns `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def init_factors(
    key: jax.Array, weight: AdaptableWeight, init: FactorInit, rank: int, scale: float, dtype: Any
) -> dict[str, jax.Array]:
    """Returns fresh `a` (*batch, *inputs, rank) and `b` (*batch, rank, *outputs) for a weight.

    Args:
        key: Random key of the initialization.
        weight: The weight to adapt.
        init: The initialization.
        rank: Size of the axis that the factors share.
        scale: Factor on the product of the two.
        dtype: Data type of both.
    """
    a, b = init.factors(key, weight, rank, scale)
    shapes = factor_shapes(weight.axis_sizes, rank)
    return {"a": a.reshape(shapes["a"]).astype(dtype), "b": b.reshape(shapes["b"]).astype(dtype)}


def factor_shapes(groups: AxisSizes, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of `a` and `b`."""
    batch, inputs, outputs = groups
    return {"a": (*batch, *inputs, rank), "b": (*batch, rank, *outputs)}


def factor_axes(axes: WeightAxes) -> dict[str, tuple[int | None, ...]]:
    """Returns the weight's axes that those of `a` and `b` run along; None for the rank."""
    batch, inputs, outputs = axes
    return {"a": (*batch, *inputs, None), "b": (*batch, None, *outputs)}


def factor_matrices(leaf: Any) -> tuple[jax.Array, jax.Array]:
    """Returns `a` as (batch, fan_in, rank), `b` as (batch, rank, fan_out), in float32 or wider."""
    count = math.prod(leaf.axis_sizes.batch)
    a, b = promote_to_float32(leaf.a), promote_to_float32(leaf.b)
    return a.reshape(count, -1, leaf.rank), b.reshape(count, leaf.rank, -1)


def scale_factor(array: jax.Array, scale: Any) -> jax.Array:
    """Returns an array times the scale of an update, in float32 or wider.

    A scale may be outside the range of a narrower type although the product with it is not.
    """
    return cast(array, widest_dtype(array.dtype, jnp.float32)) * scale


def label_factors(
    leaf: AdapterLeaf, a: Any, b: Any, rank: Hashable = "rank"
) -> tuple[LabeledArray, LabeledArray]:
    """Returns factors of these shapes with their labels."""
    batch, inputs, outputs = leaf.axes
    return (a, (*batch, *inputs, rank)), (b, (*batch, rank, *outputs))


def apply_rank_gates(leaf: AdapterLeaf, gates: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `diag(gates) B`, for gates (*batch, rank) and `b` (*batch, rank, *outputs)."""
    return gates.reshape(*gates.shape, *[1] * len(leaf.axes.outputs)) * b


def leaf_field_values(leaf: Any) -> dict[str, Any]:
    """Returns all fields of a leaf by name, to build a leaf of another method from them."""
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
