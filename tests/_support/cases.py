"""Layers with an adapter moved off zero, and compiled functions shared by several tests."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from _support.layer_zoo import LAYERS, Layer

BY_NAME = {layer.name: layer for layer in LAYERS}
LORA = jlora.LoRA(rank=2, alpha=3)


@dataclasses.dataclass(frozen=True)
class Family:
    """An adapter method as tested by the laws.

    Attributes:
        config: Config that fits the layers, such that each of its arrays affects the output.
        starts_at_base: Whether a fresh adapter keeps the output of the base, as in its paper.
        merges: Whether the method can be merged into the weight.
    """

    config: Any
    starts_at_base: bool = True
    merges: bool = True


FAMILIES = {
    "lora": Family(LORA),
    "lora_fa": Family(jlora.LoRAFA(rank=2, alpha=3)),
    "dora": Family(jlora.DoRA(rank=2, alpha=3)),
    "dora_through_norm": Family(jlora.DoRA(rank=2, alpha=3, through_norm=True)),
    "vera": Family(jlora.VeRA(rank=11)),
    "adalora": Family(jlora.AdaLoRA(rank=2, alpha=3)),
    "dylora": Family(jlora.DyLoRA(rank=2, alpha=3)),
    "sora": Family(jlora.SoRA(rank=2, alpha=3)),
    "loha": Family(jlora.LoHa(rank=2, alpha=3)),
    "loha_tucker": Family(jlora.LoHa(rank=2, alpha=3, tucker=True)),
    "lokr": Family(jlora.LoKr(rank=1, alpha=3)),
    "lokr_tucker": Family(jlora.LoKr(rank=1, alpha=3, tucker=True, factor=2)),
    "lokr_pairs": Family(jlora.LoKr(rank=1, alpha=3, decompose_both=True)),
    "hira": Family(jlora.HiRA(rank=2)),
    # A frequency that does not cancel in the sum of the three parts of fused_qkv.
    "fourierft": Family(jlora.FourierFT(num_frequencies=1, alpha=5, seed=32), starts_at_base=False),
    "fourierft_whole": Family(jlora.FourierFT(num_frequencies=9, alpha=5, std=0)),
    "ia3": Family(jlora.IA3()),
    "ia3_inputs": Family(jlora.IA3(apply_to="inputs")),
    "vb_lora": Family(jlora.VBLoRA(rank=2, num_vectors=4, vector_length=1), starts_at_base=False),
    "full": Family(jlora.FullDelta()),
    "token_rows": Family(jlora.TrainableTokens(token_indices=(5, 1, 2, 4))),
    "mixture": Family(jlora.LoRAMoE(num_experts=4, rank=2, alpha=3), merges=False),
}


@dataclasses.dataclass(frozen=True)
class Case:
    layer: Layer
    fn: Any
    params: Any
    inputs: tuple[Any, ...]
    lora: jlora.LoraTransform
    fresh: Any
    adapter: Any  # Moved off zero.
    differentiable: bool = True

    @functools.cached_property
    def compiled(self) -> Any:
        """Jitted `apply`, for any shapes."""
        return jax.jit(self.lora.apply)

    @functools.cached_property
    def program(self) -> Any:
        """Compiled program of the adapter's gradient and the output, for the shapes of this case.

        Called as `program(adapter, params, *inputs)`.
        """

        def loss(adapter: Any, params: Any, *inputs: Any) -> Any:
            output = self.lora.apply(params, adapter, *inputs)
            return total(output), output

        run = jax.jit(jax.grad(loss, has_aux=True))
        return run.lower(self.adapter, self.params, *self.inputs).compile()

    def output_of(self, adapter: Any) -> Any:
        """Computes the output with another adapter of the same shapes."""
        if not self.differentiable:
            return self.compiled(self.params, adapter, *self.inputs)
        return self.program(adapter, self.params, *self.inputs)[1]

    @functools.cached_property
    def output(self) -> Any:
        return self.output_of(self.adapter)

    @functools.cached_property
    def explanation(self) -> jlora.Explanation:
        return self.lora.explain(self.params, *self.inputs)

    @functools.cached_property
    def gradient(self) -> Any:
        """The gradient at the adapter."""
        return self.program(self.adapter, self.params, *self.inputs)[0]


@functools.cache
def made(name: str, dtype: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """Function, parameters and inputs of a layer, shared by all methods."""
    return BY_NAME[name].make(jnp.dtype(dtype))


@functools.cache
def base_output(name: str, dtype: str) -> Any:
    """Output of a layer without an adapter."""
    fn, params, inputs = made(name, dtype)
    return jax.jit(fn)(params, *inputs)


@functools.lru_cache(256)  # The cases that several laws of test_laws.py use.
def case(name: str, dtype: str, family: str = "lora") -> Case:
    layer = BY_NAME[name]
    fn, params, inputs = made(name, dtype)
    lora = jlora.lora_transform(fn, {layer.adapted: FAMILIES[family].config})
    fresh = lora.init(jax.random.key(1), params, *inputs)
    differentiable = name != "generate"  # A loop of unknown length has no reverse mode.
    return Case(layer, fn, params, inputs, lora, fresh, moved(fresh), differentiable)


def moved(adapter: Any, seed: int = 2) -> Any:
    """Adds noise to every trainable array of an adapter, so that no factor is zero."""
    rng = np.random.default_rng(seed)

    def add_noise(leaf: Any, label: str) -> Any:
        if label == "frozen":
            return leaf
        initial = np.asarray(leaf)
        return jax.device_put(
            initial + (0.3 * rng.normal(size=initial.shape)).astype(initial.dtype)
        )

    return jax.tree.map(add_noise, adapter, jlora.param_labels(adapter))


def total(output: Any) -> jax.Array:
    """Scalar that depends on every entry of the output in its own way."""
    leaves = jax.tree.leaves(output)
    return sum(jnp.sin(jnp.ravel(leaf).astype(jnp.float32)).sum() for leaf in leaves)


def widened(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Casts floating-point leaves to a wider type."""
    return jax.tree.map(
        lambda leaf: (
            jax.device_put(np.asarray(leaf).astype(dtype))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        tree,
    )


def errors(values: Any, truth: Any) -> list[tuple[float, float]]:
    """Largest absolute error and largest absolute true entry of every leaf."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(truth), strict=True)
    return [
        (
            float(np.max(np.abs(np.float64(value) - np.float64(true)), initial=0)),
            float(np.max(np.abs(np.float64(true)), initial=0)),
        )
        for value, true in pairs
    ]


NAMES = list(BY_NAME)


# A loop of unknown length has no reverse mode.
DIFFERENTIABLE = [name for name in NAMES if name != "generate"]
# One layer for each way in which models use weights; the others are in the slow group.
LAYERS = [
    "dense_general",
    "fused_qkv",
    "experts",
    "in_custom_vjp_true",
    "in_shard_map",
    "weight_norm",
    "linen_scan_remat",
    "embed",
    "tied_embedding",
    "conv_2d",
]
