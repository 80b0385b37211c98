"""DoRA: separate magnitude and direction of a weight, with a low-rank update of the direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _validation
from jlora._quantized_array import QuantizedArray, is_unpacked_along_first_axis
from jlora._tree import is_quantized
from jlora.adapters import low_rank
from jlora.adapters.base import (
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.adapters.lora import LoRA, LoRALeaf
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import (
    AdaptableWeight,
    as_divisor,
    promote_to_float32,
    weight_to_matrices,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """`m (W + s A B) / ||W + s A B||`, with one norm per output and a trainable `m`.

    All fields but `through_norm` are those of `LoRA`.

    Attributes:
        through_norm: Whether gradients also pass through the norm. The paper leaves that out
            (section 4.3), at no cost in accuracy.

    Raises:
        ValueError: A value is out of range. From `init`: the norm of a column is not finite.
        TypeError: A value is of another type. From `init`: only the shapes of the parameters are
            known, but `m` starts as the weight's norm.

    References:
        Liu et al., DoRA, arXiv:2402.09353, sections 4.1 and 4.3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.DoRA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 5))}, jnp.ones((3, 4)))
        >>> print(adapter["w"].magnitude)  # The norm of each column of four ones.
        [2. 2. 2. 2. 2.]
    """

    info = MethodInfo(
        name="DoRA",
        formula="m (W + s A B) / norm(W + s A B), s = alpha / r",
        num_params_formula="r * (d + k) + k",
        recommended_for="low ranks, where it is closer to full fine-tuning than LoRA",
        paper="Liu et al. 2402.09353",
    )

    through_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_bool("DoRA.through_norm", self.through_norm)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> DoRALeaf:
        """Returns factors from `init`, and the norms of the weight with their update."""
        lora_leaf = super().init_leaf(key, weight)
        fields = low_rank.leaf_field_values(lora_leaf)
        if is_quantized(weight.value) and not lora_leaf.residual:
            leaf = DoRALeaf(**fields, magnitude=jnp.zeros(()), through_norm=self.through_norm)
            sizes = weight.axis_sizes
            norm = leaf.weight_norm(weight.value).reshape(*sizes.batch, *sizes.outputs)
            _check_magnitude(weight.path, norm)
            return dataclasses.replace(leaf, magnitude=norm)
        matrices = weight.to_matrices("DoRA")
        if not lora_leaf.residual:  # The residual base plus the update is the original weight.
            a, b = low_rank.factor_matrices(lora_leaf)
            matrices = matrices + lora_leaf.scale * a @ b
        batch, _, outputs = weight.axis_sizes
        # Not narrower than float32: training changes it by little compared with the norm.
        magnitude = _column_norms(matrices).reshape(*batch, *outputs)
        _check_magnitude(weight.path, magnitude)
        return DoRALeaf(**fields, magnitude=magnitude, through_norm=self.through_norm)


def _materialized_weight_norm(leaf: DoRALeaf, base: QuantizedArray) -> jax.Array:
    return leaf.weight_norm(base.dequantize())


def _stacked_weight_norms(leaf: DoRALeaf, base: QuantizedArray) -> jax.Array:
    """Returns the norms of a stack of weights, (batch, fan_out); dequantizes one at a time."""
    entry_axes = WeightAxes(*(tuple(axis - 1 for axis in group if axis) for group in leaf.axes))
    fields = {"shape": leaf.shape[1:], "axes": entry_axes, "magnitude": jnp.zeros(())}

    def entry_norm(entry: tuple[Any, Any, Any]) -> jax.Array:
        a, b, weight = entry
        return dataclasses.replace(leaf, a=a, b=b, **fields).weight_norm(weight)

    norms = jax.lax.map(entry_norm, (leaf.a, leaf.b, base))
    return norms.reshape(-1, norms.shape[-1])


def _column_norms(matrices: jax.Array) -> jax.Array:
    """Returns the norms over the inputs, (batch, fan_out); no square over- or underflows."""
    size = as_divisor(jnp.abs(matrices).max(-2, keepdims=True))
    return jnp.linalg.norm(matrices / size, axis=-2) * size[:, 0]


def _check_magnitude(path: str, magnitude: jax.Array) -> None:
    """Raises ValueError for a norm that is not finite; under a trace it stays NaN."""
    if not isinstance(magnitude, Tracer) and not jnp.isfinite(magnitude).all():
        raise ValueError(
            f"DoRA needs the norms of the columns of {path!r}, and one is not finite in "
            f"{magnitude.dtype}. Adapt this weight with LoRA, or leave it frozen."
        )


def _transposed_product(a: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns `A^T W`, (batch, rank, fan_out), with the precision of `A`; `W` may be bfloat16."""
    if matrices.dtype != jnp.bfloat16:
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("nir,nio->nro", a, promote_to_float32(matrices), precision=highest)
    # Two bfloat16 parts of A keep 16 of its 24 bits, and W is not copied into a wider type.
    high = a.astype(jnp.bfloat16)
    low = (a - high.astype(a.dtype)).astype(jnp.bfloat16)
    parts = jnp.concatenate([high, low], -1)
    product = jnp.einsum("nir,nio->nro", parts, matrices, preferred_element_type=jnp.float32)
    return product[:, : a.shape[-1]] + product[:, a.shape[-1] :]


@register_family("dora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRALeaf(LoRALeaf):
    """Factors and magnitudes of one weight.

    Attributes:
        a: (*batch, *inputs, rank), in the order of `axes`.
        b: (*batch, rank, *outputs).
        magnitude: (*batch, *outputs).
    """

    magnitude: jax.Array = array_field("magnitude")
    through_norm: bool = False

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `g (W + s A B)` with `g = m / norm`, a factor on each output."""
        batch, _, outputs = self.axes
        norm = self.weight_norm(weight.base)
        sizes = self.axis_sizes
        norm = norm.reshape(*sizes.batch, *sizes.outputs)
        fixed = jax.lax.stop_gradient(norm)
        gain = self.magnitude / fixed
        if self.through_norm:  # The gradient squares what it divides by, which here is one.
            gain = gain * (norm / fixed) ** -1
        factors = low_rank.label_factors(self, self.a, low_rank.scale_factor(self.b, self.scale))
        return weight.add(*factors).multiply((gain, (*batch, *outputs)))

    def weight_norm(self, base: Any) -> jax.Array:
        """Returns `||W + s A B||` over the inputs of each output, (batch, fan_out).

        It is the root of `||w||^2 + 2 s (A^T W) . b + s^2 b^T (A^T A) b` for every output's columns
        `w` and `b`, so no update of the weight's size is formed. `w` and `b` are divided by the
        largest entry of both, and `A` by its own, so that no square over- or underflows. The
        entries of a quantized stack are dequantized one after another, and again in the gradient.
        """
        if is_quantized(base):
            stacked = self.axes.batch[:1] == (0,) and is_unpacked_along_first_axis(base)
            norms = _stacked_weight_norms if stacked else _materialized_weight_norm
            return jax.checkpoint(norms)(self, base)
        matrices = weight_to_matrices(base, self.axes)
        # (batch, 1, fan_out)
        largest = jnp.abs(jax.lax.stop_gradient(matrices)).max(-2, keepdims=True)
        largest = promote_to_float32(largest)
        a, b = low_rank.factor_matrices(self)
        size_a = as_divisor(jax.lax.stop_gradient(jnp.abs(a).max((-2, -1), keepdims=True)))
        a, b = a / size_a, b * self.scale * size_a
        size_b = jax.lax.stop_gradient(jnp.abs(b).max(-2, keepdims=True))
        size = as_divisor(jnp.maximum(largest, size_b))  # (batch, 1, fan_out)
        b = b / size
        highest = jax.lax.Precision.HIGHEST
        # W is not copied to divide its columns: the middle of their sizes divides all of them.
        most = largest.max(-1, keepdims=True)
        least = jnp.where(largest > 0, largest, most).min(-1, keepdims=True)
        middle = jnp.sqrt(least) * jnp.sqrt(most)
        middle = jnp.clip(middle, 1e-30, 1e30)  # (batch, 1, 1)
        cross = _transposed_product(a / middle, matrices)  # (batch, rank, fan_out)
        cross = cross * (middle / size)
        gram = jnp.einsum("nir,nis->nrs", a, a, precision=highest)  # (batch, rank, rank)
        gram_b = jnp.einsum("nrs,nso->nro", gram, b, precision=highest)  # (batch, rank, fan_out)
        squared = ((promote_to_float32(matrices) / size) ** 2).sum(-2)
        squared += ((2 * cross + gram_b) * b).sum(-2)
        # A column of zeros has no direction, and rounding can make a square negative.
        tiny = jnp.finfo(squared.dtype).tiny
        return jnp.sqrt(jnp.maximum(squared, tiny)) * size[:, 0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, _, outputs = self.axis_sizes
        return {**super().shapes(), "magnitude": (*batch, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, _, outputs = self.axes
        return {**super().array_axes(), "magnitude": (*batch, *outputs)}
