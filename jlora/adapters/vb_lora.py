"""VB-LoRA: low-rank factors put together from a bank of vectors that all weights share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    SharedArrays,
    array_field,
    register_family,
)
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRA(AdapterConfig):
    """`W + A B`, the factors cut into pieces that are mixtures of `top_k` vectors of one bank.

    The bank is trained with everything else. It is in the adapter once, under the name `share`.
    As in the paper a fresh adapter changes the model a little, for neither factor is zero.

    Attributes:
        rank: Of `A B`.
        num_vectors: How many the bank has.
        vector_length: Of each; it must divide every weight's inputs and outputs.
        top_k: How many a piece mixes, by the softmax of their logits.
        dropout: Probability of dropping an entry of the input while training.
        share: The name of the bank. Configs that differ need different names.
        dtype: Of all arrays.

    References:
        Li et al., VB-LoRA, arXiv:2405.15179, section 3.
    """

    info = MethodInfo(
        name="VB-LoRA",
        formula="W + A B, their pieces mixtures of top-k vectors of a shared bank",
        num_params_formula="r * (d + k) // b * h",
        recommended_for="tiny files: after training only top-k indices and weights are needed",
        paper="Li et al. 2405.15179",
    )
    supported_kinds = frozenset({"linear"})

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    top_k: int = 2
    dropout: float = 0.0
    share: str = "vb_lora"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vectors", "vector_length", "top_k"):
            _validation.check_positive_int(f"VBLoRA.{name}", getattr(self, name))
        if self.top_k > self.num_vectors:
            raise ValueError(
                f"VBLoRA.top_k={self.top_k} exceeds vectors={self.num_vectors}. Use at most that."
            )

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """As for any family, and where `vector_length` does not divide."""
        reason = super().unsupported_reason(weight)
        if reason is None and (
            weight.fan_in % self.vector_length or weight.fan_out % self.vector_length
        ):
            return (
                f"VBLoRA.length={self.vector_length} does not divide its {weight.fan_in} inputs and "
                f"{weight.fan_out} outputs (their common divisors are those of "
                f"{math.gcd(weight.fan_in, weight.fan_out)})"
            )
        return reason

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> VBLoRALeaf:
        """Logits normal with a deviation of 0.1."""
        _validation.warn_excess_rank(self, self.rank, weight)
        leaf = VBLoRALeaf(
            logits_a=None,  # type: ignore[arg-type]
            logits_b=None,  # type: ignore[arg-type]
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            num_vectors=int(self.num_vectors),
            vector_length=int(self.vector_length),
            top_k=int(self.top_k),
            dropout=float(self.dropout),
            share=self.share,
        )
        keys = jax.random.split(key)
        arrays = {
            name: 0.1 * jax.random.normal(one, shape, self.dtype)
            for one, (name, shape) in zip(keys, leaf.shapes().items(), strict=True)
        }
        return dataclasses.replace(leaf, **arrays)

    def init_shared(self, key: jax.Array, weights: Sequence[AdaptableWeight]) -> VBLoRABank:
        """The bank, uniform in +-0.02."""
        del weights
        shape = (self.num_vectors, self.vector_length)
        bank = jax.random.uniform(key, shape, self.dtype, -0.02, 0.02)
        return VBLoRABank(
            bank=bank, num_vectors=int(self.num_vectors), vector_length=int(self.vector_length)
        )


@register_family("vb_lora_bank")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRABank(SharedArrays):
    """The vectors, (vectors, length)."""

    bank: jax.Array = array_field("bank")
    num_vectors: int
    vector_length: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"bank": (self.num_vectors, self.vector_length)}


@register_family("vb_lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRALeaf(AdapterLeaf):
    """The logits of one weight: `logits_a` (*batch, rank, fan_in / length, vectors) and `logits_b`
    (*batch, rank, fan_out / length, vectors).
    """

    logits_a: jax.Array = array_field("logits")
    logits_b: jax.Array = array_field("logits")
    shape: tuple[int, ...]
    axes: WeightAxes
    rank: int
    num_vectors: int
    vector_length: int
    top_k: int
    dropout: float
    share: str

    def shared_mismatch(self, shared: Any) -> str | None:
        if not isinstance(shared, VBLoRABank):
            return f"it is a {type(shared).__name__}"
        if (shared.num_vectors, shared.vector_length) != (self.num_vectors, self.vector_length):
            return (
                f"its bank is ({shared.num_vectors}, {shared.vector_length}), the part's "
                f"({self.num_vectors}, {self.vector_length})"
            )
        return None

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """The factors, put together."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        bank = context.shared.bank

        def mixed(logits: jax.Array, group: tuple[int, ...]) -> jax.Array:
            best, which = jax.lax.top_k(logits, self.top_k)
            pieces = (jax.nn.softmax(best, -1)[..., None] * bank[which]).sum(-2)
            return pieces.reshape(*sizes.batch, self.rank, *group)

        a = (mixed(self.logits_a, sizes.inputs), (*batch, "rank", *inputs))
        return weight.add(a, (mixed(self.logits_b, sizes.outputs), (*batch, "rank", *outputs)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.axis_sizes
        return {
            name: (*batch, self.rank, math.prod(group) // self.vector_length, self.num_vectors)
            for name, group in (("logits_a", inputs), ("logits_b", outputs))
        }

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        axes = (*self.axes.batch, None, None, None)
        return {"logits_a": axes, "logits_b": axes}
