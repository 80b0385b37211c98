"""DoRA: magnitude and direction of a weight apart, the direction with a low-rank update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters import checks, pair
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.adapters.protocol import (
    About,
    Expression,
    Given,
    Weight,
    array,
    as_matrices,
    family,
    wide,
)
from jlora.factored.probe import Axes
from jlora.packed import Packed, is_packed, sliceable


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """`m (W + s A B) / ||W + s A B||`, the norm that of what makes one output, `m` trained.

    Attributes:
        rank: As in `LoRA`, like all other fields but the next.
        through_norm: Whether gradients also pass through the norm. The paper leaves that out
            (section 4.3), at no cost in accuracy.

    Raises:
        TypeError: From `init`, where only the shapes of the parameters are known: `m` starts as the
            weight's own norm.

    References:
        Liu et al., DoRA, arXiv:2402.09353, sections 4.1 and 4.3.
    """

    about = About(
        name="DoRA",
        formula="m (W + s A B) / norm(W + s A B), s = alpha / r",
        parameters="r * (d + k) + k",
        good_for="low ranks, where it is nearer to full fine-tuning than LoRA",
        paper="Liu et al. 2402.09353",
    )

    through_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.flag("DoRA.through_norm", self.through_norm)

    def leaf(self, key: jax.Array, weight: Weight) -> DoRALeaf:
        """Factors as `init` makes them, and the norms of what they make."""
        made = super().leaf(key, weight)
        facts = pair.facts_of(made)
        if is_packed(weight.value) and not made.residual:
            start = DoRALeaf(**facts, magnitude=jnp.zeros(()), through_norm=self.through_norm)
            sizes = weight.groups
            norm = start.norm(weight.value).reshape(*sizes.batch, *sizes.outputs)
            return dataclasses.replace(start, magnitude=norm)
        matrices = weight.matrices("DoRA")
        if not made.residual:  # A residual base gives way to the factors: their sum is the weight.
            a, b = pair.as_matrices(made)
            matrices = matrices + made.scale * a @ b
        batch, _, outputs = weight.groups
        # Not narrower than float32: what is trained is how little it differs from the norm.
        magnitude = jnp.linalg.norm(matrices, axis=-2).reshape(*batch, *outputs)
        return DoRALeaf(**facts, magnitude=magnitude, through_norm=self.through_norm)


def _norm_of_array(leaf: DoRALeaf, base: Packed) -> jax.Array:
    return leaf.norm(base.dense())


def _norms_of_stack(leaf: DoRALeaf, base: Packed) -> jax.Array:
    """The norms of all entries of a stack, (batch, fan_out), with one of these unpacked."""
    later = Axes(*(tuple(axis - 1 for axis in group if axis) for group in leaf.axes))
    facts = {"shape": leaf.shape[1:], "axes": later, "magnitude": jnp.zeros(())}

    def of_one(held: tuple[Any, Any, Any]) -> jax.Array:
        a, b, entry = held
        return dataclasses.replace(leaf, a=a, b=b, **facts).norm(entry)

    norms = jax.lax.map(of_one, (leaf.a, leaf.b, base))
    return norms.reshape(-1, norms.shape[-1])


def _transposed_product(a: jax.Array, matrices: jax.Array) -> jax.Array:
    """`A^T W`, (batch, rank, fan_out), as exact as `A`, for a `W` that may be of a narrow type."""
    if matrices.dtype != jnp.bfloat16:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("nir,nio->nro", a, wide(matrices), precision=exact)
    # Two narrow parts of A keep 16 of its 24 bits, and W need not be copied into a wider type.
    high = a.astype(jnp.bfloat16)
    low = (a - high.astype(a.dtype)).astype(jnp.bfloat16)
    parts = jnp.concatenate([high, low], -1)
    product = jnp.einsum("nir,nio->nro", parts, matrices, preferred_element_type=jnp.float32)
    return product[:, : a.shape[-1]] + product[:, a.shape[-1] :]


@family("dora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRALeaf(LoRALeaf):
    """The factors and magnitudes of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        magnitude: (*batch, *outputs).
    """

    magnitude: jax.Array = array("magnitude")
    through_norm: bool = False

    def expression(self, given: Given) -> Expression:
        """`g (W + s A B)` with `g = m / norm`, a factor on each output."""
        batch, _, outputs = self.axes
        norm = self.norm(given.base)
        if not self.through_norm:
            norm = jax.lax.stop_gradient(norm)
        sizes = self.groups
        gain = self.magnitude / norm.reshape(*sizes.batch, *sizes.outputs)
        return Expression(
            gains=[(gain, (*batch, *outputs))],
            terms=[pair.labelled(self, self.a, self.b * self.scale)],
        )

    def norm(self, base: Any) -> jax.Array:
        """`||W + s A B||` over what makes each output, (batch, fan_out), without the sum.

        It is the root of `||w||^2 + 2 s (A^T W) . b + s^2 b^T (A^T A) b` for every output's columns
        `w` and `b`: nothing here is larger than the factors. A packed base is unpacked one after
        another of what it is a stack of, and again in the gradient.
        """
        if is_packed(base):
            stacked = self.axes.batch[:1] == (0,) and sliceable(base)
            norms = _norms_of_stack if stacked else _norm_of_array
            return jax.checkpoint(norms)(self, base)
        matrices = as_matrices(base, self.axes)
        a, b = pair.as_matrices(self)
        exact = jax.lax.Precision.HIGHEST
        crossed = _transposed_product(a, matrices)
        gram = jnp.einsum("nir,nis->nrs", a, a, precision=exact)
        met = jnp.einsum("nrs,nso->nro", gram, b, precision=exact)
        squared = (wide(matrices) ** 2).sum(-2)
        squared += ((2 * self.scale * crossed + self.scale**2 * met) * b).sum(-2)
        # A column of zeros has no direction; and rounding may leave a square below zero.
        tiny = jnp.finfo(squared.dtype).tiny
        return jnp.sqrt(jnp.maximum(squared, tiny))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.groups
        return {**super().shapes(), "magnitude": (*batch, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {**super().array_axes(), "magnitude": (*batch, *outputs)}
