"""Hand-made adapter leaves of every layout, and their weight updates in NumPy float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.adapters.full import BitFitLeaf, FullDeltaLeaf
from jlora.adapters.lora import LoRALeaf
from jlora.interpreter.terms import WeightAxes

# Shape and axis roles of the weight, by layout.
LAYOUTS: dict[str, tuple[tuple[int, ...], WeightAxes]] = {
    "plain": ((6, 5), WeightAxes((), (0,), (1,))),
    "transposed": ((5, 6), WeightAxes((), (1,), (0,))),
    "stacked": ((4, 6, 5), WeightAxes((0,), (1,), (2,))),
    "heads_out": ((6, 2, 4), WeightAxes((), (0,), (1, 2))),
    "heads_in": ((2, 4, 5), WeightAxes((), (0, 1), (2,))),
    "experts_in_the_middle": ((5, 3, 6, 2), WeightAxes((1,), (2, 3), (0,))),
}


def matrices(array: Any, axes: WeightAxes) -> np.ndarray:
    """Reshapes an array with the layout of a weight to (batch, fan_in, fan_out) in float64."""
    array = np.asarray(array, np.float64)
    lengths = [int(np.prod([array.shape[axis] for axis in group])) for group in axes]
    return array.transpose([axis for group in axes for axis in group]).reshape(lengths)


def change(leaf: Any) -> np.ndarray:
    """Update of the weight, (batch, fan_in, fan_out) in float64."""
    if isinstance(leaf, FullDeltaLeaf):
        return matrices(leaf.delta, leaf.axes)
    assert type(leaf) is LoRALeaf
    batch, inputs, outputs = (
        int(np.prod([leaf.shape[axis] for axis in group])) for group in leaf.axes
    )
    a = np.asarray(leaf.a, np.float64).reshape(batch, inputs, leaf.rank)
    b = np.asarray(leaf.b, np.float64).reshape(batch, leaf.rank, outputs)
    root = np.sqrt(leaf.rank) if leaf.use_rslora else leaf.rank
    return leaf.alpha / root * a @ b


def lora(layout: str, seed: int, rank: int = 2, alpha: float = 3.0, **facts: Any) -> LoRALeaf:
    """LoRA leaf with random factors from NumPy."""
    shape, axes = LAYOUTS[layout]
    batch, inputs, outputs = ([shape[axis] for axis in group] for group in axes)
    rng = np.random.default_rng(seed)
    return LoRALeaf(
        a=np.float32(rng.normal(size=(*batch, *inputs, rank))),  # type: ignore[arg-type]
        b=np.float32(rng.normal(size=(*batch, rank, *outputs))),  # type: ignore[arg-type]
        shape=shape,
        axes=axes,
        rank=rank,
        alpha=alpha,
        **facts,
    )


def bias(seed: int, size: int = 5) -> BitFitLeaf:
    """BitFit leaf with a random update."""
    delta = np.float32(np.random.default_rng(seed).normal(size=size))
    return BitFitLeaf(delta=delta, shape=(size,), axes=WeightAxes((), (), ()))  # type: ignore[arg-type]
