"""VB-LoRA: low-rank factors composed from a vector bank that all weights share."""

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
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRA(AdapterConfig):
    """`W + A B`, with factors whose sub-vectors are mixtures of `top_k` vectors of one bank.

    The bank is trainable. It is stored in the adapter once, under the name `share`. As in the paper
    a fresh adapter changes the model a little, because neither factor is zero.

    Attributes:
        rank: Rank of `A B`.
        num_vectors: Number of vectors in the bank.
        vector_length: Length of each vector; a divisor of every weight's inputs and outputs.
        top_k: Number of vectors in each mixture, weighted by the softmax of their logits.
        dropout: Probability of dropping an entry of the input while training.
        share: Name of the bank in the adapter. Different configs need different names.
        dtype: Data type of all arrays.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Li et al., VB-LoRA, arXiv:2405.15179, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> config = jlora.VBLoRA(rank=2, num_vectors=8, vector_length=3)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], config)
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 9))}, jnp.ones((4, 6)))
        >>> adapter["vb_lora"].bank.shape, adapter["w"].logits_a.shape
        ((8, 3), (2, 2, 8))
    """

    info = MethodInfo(
        name="VB-LoRA",
        formula="W + A B, of mixtures of top-k vectors of a shared bank",
        num_params_formula="r * (d + k) // b * h",
        recommended_for="small files: after training only top-k indices and weights are needed",
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
                f"VBLoRA.top_k={self.top_k} exceeds num_vectors={self.num_vectors}. Use at most "
                f"that."
            )

    def unsupported_reason(self, weight: AdaptableWeight) -> str | None:
        """Returns the reason of any method, or that `vector_length` is not a divisor."""
        reason = super().unsupported_reason(weight)
        if reason is None and (
            weight.fan_in % self.vector_length or weight.fan_out % self.vector_length
        ):
            return (
                f"VBLoRA.vector_length={self.vector_length} does not divide its {weight.fan_in} "
                f"inputs and {weight.fan_out} outputs (use a divisor of "
                f"{math.gcd(weight.fan_in, weight.fan_out)})"
            )
        return reason

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> VBLoRALeaf:
        """Returns normal logits with a standard deviation of 0.1."""
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
            name: 0.1 * jax.random.normal(array_key, shape, self.dtype)
            for array_key, (name, shape) in zip(keys, leaf.shapes().items(), strict=True)
        }
        return dataclasses.replace(leaf, **arrays)

    def init_shared(self, key: jax.Array, weights: Sequence[AdaptableWeight]) -> VBLoRABank:
        """Returns the bank, uniform in +-0.02."""
        del weights
        shape = (self.num_vectors, self.vector_length)
        bank = jax.random.uniform(key, shape, self.dtype, -0.02, 0.02)
        return VBLoRABank(
            bank=bank, num_vectors=int(self.num_vectors), vector_length=int(self.vector_length)
        )


@register_family("vb_lora_bank")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRABank(SharedArrays):
    """The shared vector bank.

    Attributes:
        bank: (num_vectors, vector_length).
    """

    bank: jax.Array = array_field("bank")
    num_vectors: int
    vector_length: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"bank": (self.num_vectors, self.vector_length)}


@register_family("vb_lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRALeaf(AdapterLeaf):
    """Logits of one weight over the vector bank.

    Attributes:
        logits_a: (*batch, rank, fan_in / vector_length, num_vectors).
        logits_b: (*batch, rank, fan_out / vector_length, num_vectors).
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
            return f"they are a {type(shared).__name__}"
        if (shared.num_vectors, shared.vector_length) != (self.num_vectors, self.vector_length):
            return (
                f"the bank has shape ({shared.num_vectors}, {shared.vector_length}), and the leaf "
                f"needs ({self.num_vectors}, {self.vector_length})"
            )
        return None

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `W + A B` with the factors composed from the bank."""
        batch, inputs, outputs = self.axes
        sizes = self.axis_sizes
        bank = context.shared.bank

        def compose(logits: jax.Array, group: tuple[int, ...]) -> jax.Array:
            top_logits, indices = jax.lax.top_k(logits, self.top_k)
            sub_vectors = (jax.nn.softmax(top_logits, -1)[..., None] * bank[indices]).sum(-2)
            return sub_vectors.reshape(*sizes.batch, self.rank, *group)

        a = (compose(self.logits_a, sizes.inputs), (*batch, "rank", *inputs))
        b = (compose(self.logits_b, sizes.outputs), (*batch, "rank", *outputs))
        return weight.add(a, b)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.axis_sizes
        return {
            name: (*batch, self.rank, math.prod(group) // self.vector_length, self.num_vectors)
            for name, group in (("logits_a", inputs), ("logits_b", outputs))
        }

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        axes = (*self.axes.batch, None, None, None)
        return {"logits_a": axes, "logits_b": axes}
