"""DoRA: magnitude and direction of a weight apart, the direction with a low-rank update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation
from jlora._quantized_array import QuantizedArray, is_quantized, is_unpacked_along_first_axis
from jlora.adapters import low_rank
from jlora.adapters.base import (
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight, promote_to_float32, weight_to_matrices


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

    info = MethodInfo(
        name="DoRA",
        formula="m (W + s A B) / norm(W + s A B), s = alpha / r",
        num_params_formula="r * (d + k) + k",
        recommended_for="low ranks, where it is nearer to full fine-tuning than LoRA",
        paper="Liu et al. 2402.09353",
    )

    through_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_bool("DoRA.through_norm", self.through_norm)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> DoRALeaf:
        """Factors as `init` makes them, and the norms of what they make."""
        made = super().init_leaf(key, weight)
        facts = low_rank.leaf_field_values(made)
        if is_quantized(weight.value) and not made.residual:
            start = DoRALeaf(**facts, magnitude=jnp.zeros(()), through_norm=self.through_norm)
            sizes = weight.axis_sizes
            norm = start.weight_norm(weight.value).reshape(*sizes.batch, *sizes.outputs)
            return dataclasses.replace(start, magnitude=norm)
        matrices = weight.to_matrices("DoRA")
        if not made.residual:  # A residual base gives way to the factors: their sum is the weight.
            a, b = low_rank.factor_matrices(made)
            matrices = matrices + made.scale * a @ b
        batch, _, outputs = weight.axis_sizes
        # Not narrower than float32: what is trained is how little it differs from the norm.
        magnitude = jnp.linalg.norm(matrices, axis=-2).reshape(*batch, *outputs)
        return DoRALeaf(**facts, magnitude=magnitude, through_norm=self.through_norm)


def _materialized_weight_norm(leaf: DoRALeaf, base: QuantizedArray) -> jax.Array:
    return leaf.weight_norm(base.dequantize())


def _stacked_weight_norms(leaf: DoRALeaf, base: QuantizedArray) -> jax.Array:
    """The norms of all entries of a stack, (batch, fan_out), with one of these unpacked."""
    later = WeightAxes(*(tuple(axis - 1 for axis in group if axis) for group in leaf.axes))
    facts = {"shape": leaf.shape[1:], "axes": later, "magnitude": jnp.zeros(())}

    def of_one(held: tuple[Any, Any, Any]) -> jax.Array:
        a, b, entry = held
        return dataclasses.replace(leaf, a=a, b=b, **facts).weight_norm(entry)

    norms = jax.lax.map(of_one, (leaf.a, leaf.b, base))
    return norms.reshape(-1, norms.shape[-1])


def _transposed_product(a: jax.Array, matrices: jax.Array) -> jax.Array:
    """`A^T W`, (batch, rank, fan_out), as exact as `A`, for a `W` that may be of a narrow type."""
    if matrices.dtype != jnp.bfloat16:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("nir,nio->nro", a, promote_to_float32(matrices), precision=exact)
    # Two narrow parts of A keep 16 of its 24 bits, and W need not be copied into a wider type.
    high = a.astype(jnp.bfloat16)
    low = (a - high.astype(a.dtype)).astype(jnp.bfloat16)
    parts = jnp.concatenate([high, low], -1)
    product = jnp.einsum("nir,nio->nro", parts, matrices, preferred_element_type=jnp.float32)
    return product[:, : a.shape[-1]] + product[:, a.shape[-1] :]


@register_family("dora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRALeaf(LoRALeaf):
    """The factors and magnitudes of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        magnitude: (*batch, *outputs).
    """

    magnitude: jax.Array = array_field("magnitude")
    through_norm: bool = False

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """`g (W + s A B)` with `g = m / norm`, a factor on each output."""
        batch, _, outputs = self.axes
        norm = self.weight_norm(weight.base)
        if not self.through_norm:
            norm = jax.lax.stop_gradient(norm)
        sizes = self.axis_sizes
        gain = self.magnitude / norm.reshape(*sizes.batch, *sizes.outputs)
        factors = low_rank.label_factors(self, self.a, self.b * self.scale)
        return weight.add(*factors).multiply((gain, (*batch, *outputs)))

    def weight_norm(self, base: Any) -> jax.Array:
        """`||W + s A B||` over what makes each output, (batch, fan_out), without the sum.

        It is the root of `||w||^2 + 2 s (A^T W) . b + s^2 b^T (A^T A) b` for every output's columns
        `w` and `b`: nothing here is larger than the factors. A packed base is unpacked one after
        another of what it is a stack of, and again in the gradient.
        """
        if is_quantized(base):
            stacked = self.axes.batch[:1] == (0,) and is_unpacked_along_first_axis(base)
            norms = _stacked_weight_norms if stacked else _materialized_weight_norm
            return jax.checkpoint(norms)(self, base)
        matrices = weight_to_matrices(base, self.axes)
        a, b = low_rank.factor_matrices(self)
        exact = jax.lax.Precision.HIGHEST
        crossed = _transposed_product(a, matrices)
        gram = jnp.einsum("nir,nis->nrs", a, a, precision=exact)
        met = jnp.einsum("nrs,nso->nro", gram, b, precision=exact)
        squared = (promote_to_float32(matrices) ** 2).sum(-2)
        squared += ((2 * self.scale * crossed + self.scale**2 * met) * b).sum(-2)
        # A column of zeros has no direction; and rounding may leave a square below zero.
        tiny = jnp.finfo(squared.dtype).tiny
        return jnp.sqrt(jnp.maximum(squared, tiny))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.axis_sizes
        return {**super().shapes(), "magnitude": (*batch, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {**super().array_axes(), "magnitude": (*batch, *outputs)}
