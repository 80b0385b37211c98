"""Layers with an adapter moved off zero, and compiled functions that several tests share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from layers import LAYERS, Layer

import jlora

BY_NAME = {layer.name: layer for layer in LAYERS}
LORA = jlora.LoRA(rank=2, alpha=3)


@dataclasses.dataclass(frozen=True)
class Case:
    layer: Layer
    fn: Any
    params: Any
    inputs: tuple[Any, ...]
    lora: jlora.LoraTransform
    fresh: Any
    adapter: Any  # Moved off zero.

    @functools.cached_property
    def compiled(self) -> Any:
        return jax.jit(self.lora.apply)

    @functools.cached_property
    def output(self) -> Any:
        return self.compiled(self.params, self.adapter, *self.inputs)

    @functools.cached_property
    def gradient(self) -> Any:
        """The compiled gradient with respect to the adapter."""
        run = jax.jit(jax.grad(lambda a, p, *x: total(self.lora.apply(p, a, *x))))
        return run.lower(self.adapter, self.params, *self.inputs).compile()


@functools.cache
def case(name: str, dtype: str) -> Case:
    layer = BY_NAME[name]
    fn, params, inputs = layer.make(jnp.dtype(dtype))
    lora = jlora.lora_transform(fn, {layer.adapted: LORA})
    fresh = lora.init(jax.random.key(1), params, *inputs)
    return Case(layer, fn, params, inputs, lora, fresh, moved(fresh))


def moved(adapter: Any, seed: int = 2) -> Any:
    """The adapter with noise on every array, so that no factor is zero."""
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            leaf + (0.3 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for leaf, key in zip(leaves, keys, strict=True)
        ],
    )


def total(output: Any) -> jax.Array:
    """A scalar that every entry of the output changes, differently."""
    leaves = jax.tree.leaves(output)
    return sum(jnp.sin(jnp.ravel(leaf).astype(jnp.float32)).sum() for leaf in leaves)


def widened(tree: Any, dtype: Any = jnp.float32) -> Any:
    """The same numbers in a wider type."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def errors(values: Any, truth: Any) -> list[tuple[float, float]]:
    """For every leaf, the largest difference and the largest true entry."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(truth), strict=True)
    return [
        (
            float(np.max(np.abs(np.float64(value) - np.float64(true)), initial=0)),
            float(np.max(np.abs(np.float64(true)), initial=0)),
        )
        for value, true in pairs
    ]
