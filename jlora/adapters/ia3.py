"""IA3: a learned factor on each of a layer's outputs, or inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.protocol import (
    About,
    AdapterConfig,
    AdapterLeaf,
    Expression,
    Given,
    Weight,
    array,
    family,
)
from jlora.factored.probe import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(AdapterConfig):
    """`W diag(l)`, or `diag(l) W`: the outputs of keys and values, or the inputs of an MLP's last
    layer, scaled.

    A bias is not scaled with the outputs; the paper's models have none.

    Attributes:
        on: "outputs" or "inputs" (for a convolution: its input channels).
        dtype: Of `l`, which starts at one.

    References:
        Liu et al., arXiv:2205.05638, section 3.3.
    """

    about = About(
        name="IA3",
        formula="W diag(l), or diag(l) W",
        parameters="k",
        good_for="a handful of examples; mixing tasks in one batch",
        paper="Liu et al. 2205.05638",
    )
    kinds = frozenset({"linear", "convolution"})

    on: str = "outputs"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in ("outputs", "inputs"):
            raise ValueError(
                f"IA3.on={self.on!r} is no side of a weight. Use 'outputs' (keys, values) or "
                f"'inputs' (the last layer of an MLP)."
            )

    def leaf(self, key: jax.Array, weight: Weight) -> IA3Leaf:
        """Ones."""
        del key
        side = weight.axes.outputs if self.on == "outputs" else weight.channels
        scaled = (*weight.axes.batch, *side)
        shape = tuple(weight.shape[axis] for axis in scaled)
        return IA3Leaf(
            l=jnp.ones(shape, self.dtype), shape=weight.shape, axes=weight.axes, scaled=scaled
        )


@family("ia3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Leaf(AdapterLeaf):
    """The factors `l` of one weight, along its axes `scaled`."""

    l: jax.Array = array("l")  # noqa: E741  The paper's name.
    shape: tuple[int, ...]
    axes: Axes
    scaled: tuple[int, ...]

    def expression(self, given: Given) -> Expression:
        del given
        return Expression(gains=[(self.l, self.scaled)])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"l": tuple(self.shape[axis] for axis in self.scaled)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return {"l": tuple(self.scaled)}
