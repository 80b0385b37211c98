"""VB-LoRA: low-rank factors put together from a bank of vectors that all weights share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters import checks
from jlora.adapters.protocol import (
    About,
    AdapterConfig,
    AdapterLeaf,
    Expression,
    Given,
    SharedArrays,
    Weight,
    array,
    family,
)
from jlora.factored.probe import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRA(AdapterConfig):
    """`W + A B`, the factors cut into pieces that are mixtures of `top_k` vectors of one bank.

    The bank is trained with everything else. It is in the adapter once, under the name `share`.
    As in the paper a fresh adapter changes the model a little, for neither factor is zero.

    Attributes:
        rank: Of `A B`.
        vectors: How many the bank has.
        length: Of each; it must divide every weight's inputs and outputs.
        top_k: How many a piece mixes, by the softmax of their logits.
        dropout: Probability of dropping an entry of the input while training.
        share: The name of the bank. Configs that differ need different names.
        dtype: Of all arrays.

    References:
        Li et al., VB-LoRA, arXiv:2405.15179, section 3.
    """

    about = About(
        name="VB-LoRA",
        formula="W + A B, their pieces mixtures of top-k vectors of a shared bank",
        parameters="r * (d + k) // b * h",
        good_for="tiny files: after training only top-k indices and weights are needed",
        paper="Li et al. 2405.15179",
    )
    kinds = frozenset({"linear"})

    rank: int = 4
    vectors: int = 256
    length: int = 256
    top_k: int = 2
    dropout: float = 0.0
    share: str = "vb_lora"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vectors", "length", "top_k"):
            checks.count(f"VBLoRA.{name}", getattr(self, name))
        if self.top_k > self.vectors:
            raise ValueError(
                f"VBLoRA.top_k={self.top_k} exceeds vectors={self.vectors}. Use at most that."
            )

    def refusal(self, weight: Weight) -> str | None:
        """As for any family, and where `length` does not divide."""
        reason = super().refusal(weight)
        if reason is None and (weight.fan_in % self.length or weight.fan_out % self.length):
            return (
                f"VBLoRA.length={self.length} does not divide its {weight.fan_in} inputs and "
                f"{weight.fan_out} outputs (their common divisors are those of "
                f"{math.gcd(weight.fan_in, weight.fan_out)})"
            )
        return reason

    def leaf(self, key: jax.Array, weight: Weight) -> VBLoRALeaf:
        """Logits normal with a deviation of 0.1."""
        checks.warn_of_waste(self, self.rank, weight)
        leaf = VBLoRALeaf(
            logits_a=None,  # type: ignore[arg-type]
            logits_b=None,  # type: ignore[arg-type]
            shape=weight.shape,
            axes=weight.axes,
            rank=int(self.rank),
            vectors=int(self.vectors),
            length=int(self.length),
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

    def shared(self, key: jax.Array, weights: Sequence[Weight]) -> VBLoRABank:
        """The bank, uniform in +-0.02."""
        del weights
        shape = (self.vectors, self.length)
        bank = jax.random.uniform(key, shape, self.dtype, -0.02, 0.02)
        return VBLoRABank(bank=bank, vectors=int(self.vectors), length=int(self.length))


@family("vb_lora_bank")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRABank(SharedArrays):
    """The vectors, (vectors, length)."""

    bank: jax.Array = array("bank")
    vectors: int
    length: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"bank": (self.vectors, self.length)}


@family("vb_lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRALeaf(AdapterLeaf):
    """The logits of one weight: `logits_a` (*batch, rank, fan_in / length, vectors) and `logits_b`
    (*batch, rank, fan_out / length, vectors).
    """

    logits_a: jax.Array = array("logits")
    logits_b: jax.Array = array("logits")
    shape: tuple[int, ...]
    axes: Axes
    rank: int
    vectors: int
    length: int
    top_k: int
    dropout: float
    share: str

    def misfit(self, shared: Any) -> str | None:
        if not isinstance(shared, VBLoRABank):
            return f"it is a {type(shared).__name__}"
        if (shared.vectors, shared.length) != (self.vectors, self.length):
            return (
                f"its bank is ({shared.vectors}, {shared.length}), the part's "
                f"({self.vectors}, {self.length})"
            )
        return None

    def expression(self, given: Given) -> Expression:
        """The factors, put together."""
        batch, inputs, outputs = self.axes
        sizes = self.groups
        bank = given.shared.bank

        def mixed(logits: jax.Array, group: tuple[int, ...]) -> jax.Array:
            best, which = jax.lax.top_k(logits, self.top_k)
            pieces = (jax.nn.softmax(best, -1)[..., None] * bank[which]).sum(-2)
            return pieces.reshape(*sizes.batch, self.rank, *group)

        a = (mixed(self.logits_a, sizes.inputs), (*batch, "rank", *inputs))
        return Expression(
            terms=[[a, (mixed(self.logits_b, sizes.outputs), (*batch, "rank", *outputs))]]
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.groups
        return {
            name: (*batch, self.rank, math.prod(group) // self.length, self.vectors)
            for name, group in (("logits_a", inputs), ("logits_b", outputs))
        }

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        axes = (*self.axes.batch, None, None, None)
        return {"logits_a": axes, "logits_b": axes}
