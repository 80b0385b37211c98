"""LoHa: the Hadamard product of two low-rank updates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _validation
from jlora.adapters import low_rank
from jlora.adapters.base import (
    AdapterConfig,
    AdapterLeaf,
    LeafContext,
    MethodInfo,
    array_field,
    register_family,
)
from jlora.initializers import sample_fan_in_uniform
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(AdapterConfig):
    """`W + (alpha / rank) * (A1 B1) o (A2 B2)`, an update of rank up to `rank ** 2`.

    It is computed as a low-rank update whose factors are the products of all pairs of columns of
    `A1` and `A2`, and of rows of `B1` and `B2`, so a step costs as much as LoRA's of rank
    `rank ** 2`.

    Attributes:
        rank: Rank of each of the two products.
        alpha: Numerator of the update's scale; positive.
        dropout: Probability of dropping an entry of the input while training.
        tucker: Whether a convolution has two factors over its channels and a core over its window,
            which is smaller. Other weights, and windows of one element, have no core.
        dtype: Data type of all factors.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Hyeon-Woo et al., FedPara, arXiv:2108.06098, propositions 1 and 3.
        Yeh et al., LyCORIS, arXiv:2309.14859, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoHa(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, jnp.ones((4, 6)))
        >>> adapter["w"].a1.shape, adapter["w"].b2.shape
        ((6, 2), (2, 5))
    """

    info = MethodInfo(
        name="LoHa",
        formula="W + (alpha / r) (A1 B1) o (A2 B2)",
        num_params_formula="2 * r * (d + k)",
        recommended_for="ranks up to r^2 for twice LoRA's parameters; images",
        paper="Hyeon-Woo et al. 2108.06098; Yeh et al. 2309.14859",
    )
    supported_kinds = frozenset({"linear", "convolution"})

    rank: int
    alpha: float
    dropout: float = 0.0
    tucker: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_bool("LoHa.tucker", self.tucker)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoHaLeaf:
        """Returns uniform factors, except `a2`, which is zero."""
        fields = {
            "shape": weight.shape,
            "axes": weight.axes,
            "rank": int(self.rank),
            "alpha": float(self.alpha),
            "dropout": float(self.dropout),
        }
        window = math.prod(weight.shape[axis] for axis in weight.window)
        with_core = self.tucker and window > 1
        cls = LoHaTuckerLeaf if with_core else LoHaLeaf
        if with_core:
            fields["window"] = weight.window
        channels = math.prod(weight.shape[axis] for axis in weight.channel_axes)
        fan_in = {"a": channels if with_core else weight.fan_in, "b": self.rank}
        fan_in["core"] = self.rank * window
        shapes = cls.compute_shapes(weight.shape, weight.axes, self.rank, fields.get("window", ()))
        arrays = {}
        for number, (name, shape) in enumerate(shapes.items()):
            array_key = jax.random.fold_in(key, number)
            arrays[name] = sample_fan_in_uniform(array_key, shape, fan_in[name[:-1]], self.dtype)
        arrays["a2"] = jnp.zeros_like(arrays["a2"])
        return cls(**arrays, **fields)


@register_family("loha")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaLeaf(AdapterLeaf):
    """Factors of one weight.

    Attributes:
        a1: (*batch, *inputs, rank), like `a2`.
        b1: (*batch, rank, *outputs), like `b2`.
    """

    a1: jax.Array = array_field("a")
    b1: jax.Array = array_field("b")
    a2: jax.Array = array_field("a")
    b2: jax.Array = array_field("b")
    shape: tuple[int, ...]
    axes: WeightAxes
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        return low_rank.lora_scaling(self.rank, self.alpha)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns all four factors as one term, with one rank axis per pair."""
        del context
        b1 = low_rank.scale_factor(self.b1, self.scale)
        first = low_rank.label_factors(self, self.a1, b1, "rank 1")
        second = low_rank.label_factors(self, self.a2, self.b2, "rank 2")
        return weight.add(*first, *second)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.compute_shapes(self.shape, self.axes, self.rank, ())

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        pair = low_rank.factor_axes(self.axes)
        return {f"{name}{number}": pair[name] for number in (1, 2) for name in ("a", "b")}

    @staticmethod
    def compute_shapes(
        shape: tuple[int, ...], axes: WeightAxes, rank: int, window: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Returns the arrays' shapes for a weight of this shape; only cores use `window`."""
        del window
        pair = low_rank.factor_shapes(axes.sizes(shape), rank)
        return {f"{name}{number}": pair[name] for number in (1, 2) for name in ("a", "b")}


@register_family("loha_tucker")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaTuckerLeaf(LoHaLeaf):
    """Factors of a convolution kernel in Tucker form.

    Attributes:
        a1: (*batch, *channels, rank), like `a2`.
        b1: (*batch, rank, *outputs), like `b2`.
        core1: (*batch, rank of a, rank of b, *window), like `core2`.
        window: Input axes of the kernel that the convolution slides over.
    """

    core1: jax.Array = array_field("core")
    core2: jax.Array = array_field("core")
    window: tuple[int, ...]

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns LoHa's update after contracting each `a` with its core."""
        contracted = dataclasses.replace(
            self,
            a1=self._contract_core(self.a1, self.core1),
            a2=self._contract_core(self.a2, self.core2),
        )
        return LoHaLeaf.adapt(contracted, weight, context)

    def _contract_core(self, a: jax.Array, core: jax.Array) -> jax.Array:
        batch, inputs, _ = self.axes
        channels = [axis for axis in inputs if axis not in self.window]
        rank_a, rank_b = len(self.shape), len(self.shape) + 1
        return jnp.einsum(
            a, [*batch, *channels, rank_a],
            core, [*batch, rank_a, rank_b, *self.window],
            [*batch, *inputs, rank_b],
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.compute_shapes(self.shape, self.axes, self.rank, self.window)

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        channels = tuple(axis for axis in self.axes.inputs if axis not in self.window)
        pair = low_rank.factor_axes(self.axes._replace(inputs=channels))
        core = (*self.axes.batch, None, None, *self.window)
        pairs = {f"{name}{number}": pair[name] for number in (1, 2) for name in ("a", "b")}
        return {**pairs, "core1": core, "core2": core}

    @staticmethod
    def compute_shapes(
        shape: tuple[int, ...], axes: WeightAxes, rank: int, window: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Returns the arrays' shapes for a convolution kernel of this shape."""
        channels = axes._replace(inputs=tuple(n for n in axes.inputs if n not in window))
        shapes = LoHaLeaf.compute_shapes(shape, channels, rank, ())
        batch = tuple(shape[axis] for axis in axes.batch)
        core = (*batch, rank, rank, *(shape[axis] for axis in window))
        return {**shapes, "core1": core, "core2": core}
