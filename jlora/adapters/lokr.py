"""LoKr: the Kronecker product of two small factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

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
from jlora.interpreter.factored_array import FactoredArray, LabeledArray
from jlora.interpreter.terms import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(AdapterConfig):
    """`W + (alpha / rank) * w1 (x) w2`, with the Kronecker product of two small matrices.

    Inputs and outputs are each split in two, `d = d1 d2` and `k = k1 k2`; `w1` is (d1, k1) and `w2`
    (d2, k2), with a convolution's window in `w2`. A factor whose longer side exceeds twice the rank
    is a low-rank product: `w2` always, `w1` where `decompose_both` is set. A step multiplies with
    one factor after the other, which costs little.

    Attributes:
        rank: Rank of the factors that are low-rank products.
        alpha: Numerator of the update's scale; positive.
        factor: Size of `d1` and `k1` where it divides `d` or `k`. Otherwise the size is the largest
            divisor up to it that is at most the square root. -1: no bound.
        decompose_both: Whether `w1` may be a low-rank product too.
        tucker: Whether a convolution's `w2` has two factors over its channels and a core over its
            window.
        dropout: Probability of dropping an entry of the input while training.
        dtype: Data type of all factors.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of another type.

    References:
        Edalati et al., KronA, arXiv:2212.10650, section 3.
        Yeh et al., LyCORIS, arXiv:2309.14859, section 3, for the sizes of the splits.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoKr(rank=1, alpha=1))
        >>> adapter = lora.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, jnp.ones((4, 6)))
        >>> adapter["w"].w1.shape, adapter["w"].a2.shape, adapter["w"].b2.shape
        ((2, 2), (3, 1), (1, 4))
    """

    info = MethodInfo(
        name="LoKr",
        formula="W + (alpha / r) w1 (x) w2, w2 = a2 b2",
        num_params_formula="d1 * k1 + r * (d2 + k2)",
        recommended_for="full rank with few parameters",
        paper="Edalati et al. 2212.10650; Yeh et al. 2309.14859",
    )
    supported_kinds = frozenset({"linear", "convolution"})

    rank: int
    alpha: float
    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        _validation.check_bool("LoKr.decompose_both", self.decompose_both)
        _validation.check_bool("LoKr.tucker", self.tucker)
        if self.factor != -1:
            _validation.check_positive_int("LoKr.factor", self.factor)

    def init_leaf(self, key: jax.Array, weight: AdaptableWeight) -> LoKrLeaf:
        """Returns uniform factors, except `w1`, or its second factor, which is zero."""
        channels = tuple(weight.shape[axis] for axis in weight.channel_axes)
        d1 = nearest_factorization(channels, self.factor)
        k1 = nearest_factorization(weight.axis_sizes.outputs, self.factor)
        d2, k2 = math.prod(channels) // d1, weight.fan_out // k1
        window = math.prod(weight.shape[axis] for axis in weight.window)
        w2_form = "full" if self.rank >= max(d2, k2) / 2 else "low_rank"
        if w2_form == "low_rank" and self.tucker and window > 1:
            w2_form = "core"
        leaf = LoKrLeaf(
            shape=weight.shape,
            axes=weight.axes,
            window=weight.window,
            rank=int(self.rank),
            alpha=float(self.alpha),
            w1_shape=(d1, k1),
            decompose_w1=self.decompose_both and self.rank < max(d1, k1) / 2,
            w2_form=w2_form,
            dropout=float(self.dropout),
        )
        fan_in = {
            "w1": d1,
            "b1": self.rank,
            "a1": d1,
            "w2": d2 * window,
            "a2": d2 if w2_form == "core" else d2 * window,
            "b2": k2 if w2_form == "core" else self.rank,
            "core2": self.rank * window,
        }
        arrays = {
            name: sample_fan_in_uniform(
                jax.random.fold_in(key, number), shape, fan_in[name], self.dtype
            )
            for number, (name, shape) in enumerate(leaf.shapes().items())
        }
        zero = "b1" if leaf.decompose_w1 else "w1"
        arrays[zero] = jnp.zeros_like(arrays[zero])
        return dataclasses.replace(leaf, **arrays)


def factorization(size: int, factor: int = -1) -> int:
    """Returns the smaller of two factors of `size`, as LyCORIS chooses it.

    It is `factor` where that divides `size`; otherwise the largest divisor up to `factor` for which
    the sum of the two factors does not increase.
    """
    if factor > 0 and size % factor == 0:
        return factor
    bound = size if factor < 0 else factor
    best = 1
    for divisor in range(2, bound + 1):
        if size % divisor == 0:
            if divisor + size // divisor > best + size // best:
                break
            best = divisor
    return min(best, size // best)


def nearest_factorization(sizes: Sequence[int], factor: int) -> int:
    """Returns `factorization` of the axes' joint size, or the next lower size that splits them."""
    target = factorization(math.prod(sizes), factor)
    candidates = [n for n in range(target, 0, -1) if math.prod(sizes) % n == 0]
    return next(n for n in candidates if _split_axes_by_factor(sizes, n) is not None)


def _split_axes_by_factor(sizes: Sequence[int], outer_size: int) -> list[tuple[int, int]] | None:
    """Splits every axis into an outer and an inner size; None when that is impossible.

    The product of the outer sizes is `outer_size`.
    """
    parts = []
    for length in sizes:
        outer = math.gcd(outer_size, length)
        if outer not in (outer_size, length):
            return None
        parts.append((outer, length // outer))
        outer_size //= outer
    return parts


class _AxisSplit(NamedTuple):
    """A group of axes that is split in two.

    Attributes:
        outer: Labels and sizes of the outer axes.
        inner: Labels and sizes of the inner axes.
        splits: Outer and inner size of each axis that is itself split.
    """

    outer: list[tuple[Hashable, int]]
    inner: list[tuple[Hashable, int]]
    splits: dict[int, tuple[int, int]]


def _split_axis_labels(shape: Sequence[int], axes: Sequence[int], outer_size: int) -> _AxisSplit:
    parts = _split_axes_by_factor([shape[axis] for axis in axes], outer_size)
    assert parts is not None
    split = _AxisSplit([], [], {})
    for axis, (outer, inner) in zip(axes, parts, strict=True):
        if outer > 1 and inner > 1:
            split.splits[axis] = (outer, inner)
            split.outer.append(((axis, 0), outer))
            split.inner.append(((axis, 1), inner))
        else:
            (split.outer if outer > 1 else split.inner).append((axis, outer * inner))
    return split


@register_family("lokr")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrLeaf(AdapterLeaf):
    """Factors of one weight, each a matrix or a low-rank product.

    Attributes:
        w1: (*batch, d1, k1), or `a1` (*batch, d1, rank) and `b1` (*batch, rank, k1).
        w2: (*batch, *window, d2, k2), or `a2` (*batch, *window, d2, rank) and `b2`
            (*batch, rank, k2), or `a2` without a window and `core2` (*batch, rank, rank, *window).
        w1_shape: `d1` and `k1`.
        decompose_w1: Whether `w1` is a low-rank product.
        w2_form: Form of `w2`: a "full" matrix, a "low_rank" product, or such a product with a
            "core".
        window: Input axes of the weight that a convolution slides over.
    """

    w1: Any = array_field("w1", optional=True)
    a1: Any = array_field("w1", optional=True)
    b1: Any = array_field("w1", optional=True)
    w2: Any = array_field("w2", optional=True)
    a2: Any = array_field("w2", optional=True)
    b2: Any = array_field("w2", optional=True)
    core2: Any = array_field("w2", optional=True)
    shape: tuple[int, ...]
    axes: WeightAxes
    window: tuple[int, ...]
    rank: int
    alpha: float
    w1_shape: tuple[int, int]
    decompose_w1: bool
    w2_form: str
    dropout: float

    @property
    def scale(self) -> float:
        return low_rank.lora_scaling(self.rank, self.alpha)

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns one operand per factor, over its parts of the weight's axes."""
        del context
        batch, inputs, outputs = self.axes
        channels = [axis for axis in inputs if axis not in self.window]
        rows = _split_axis_labels(self.shape, channels, self.w1_shape[0])
        columns = _split_axis_labels(self.shape, outputs, self.w1_shape[1])
        window = [(axis, self.shape[axis]) for axis in self.window]
        batch_axes = [(axis, self.shape[axis]) for axis in batch]
        rank_1, rank_2, rank_3 = ((f"rank {number}", self.rank) for number in (1, 2, 3))

        def operand(array: jax.Array, *groups: Sequence[tuple[Hashable, int]]) -> LabeledArray:
            axes = [axis for group in (batch_axes, *groups) for axis in group]
            return array.reshape([length for _, length in axes]), [label for label, _ in axes]

        if self.decompose_w1:
            first = [
                operand(low_rank.scale_factor(self.a1, self.scale), rows.outer, [rank_1]),
                operand(self.b1, [rank_1], columns.outer),
            ]
        else:
            first = [operand(low_rank.scale_factor(self.w1, self.scale), rows.outer, columns.outer)]
        if self.w2_form == "full":
            second = [operand(self.w2, window, rows.inner, columns.inner)]
        elif self.w2_form == "low_rank":
            second = [
                operand(self.a2, window, rows.inner, [rank_2]),
                operand(self.b2, [rank_2], columns.inner),
            ]
        else:
            second = [
                operand(self.a2, rows.inner, [rank_2]),
                operand(self.core2, [rank_2, rank_3], window),
                operand(self.b2, [rank_3], columns.inner),
            ]
        splits: Mapping[int, tuple[int, int]] = {**rows.splits, **columns.splits}
        return weight.with_split_axes(splits).add(*first, *second)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.axis_sizes
        window = tuple(self.shape[axis] for axis in self.window)
        d1, k1 = self.w1_shape
        d2 = math.prod(inputs) // math.prod(window) // d1
        k2, rank = math.prod(outputs) // k1, self.rank
        shapes = {"a1": (*batch, d1, rank), "b1": (*batch, rank, k1)}
        if not self.decompose_w1:
            shapes = {"w1": (*batch, d1, k1)}
        if self.w2_form == "full":
            return {**shapes, "w2": (*batch, *window, d2, k2)}
        core = {"core2": (*batch, rank, rank, *window)} if self.w2_form == "core" else {}
        a2_window = window if self.w2_form == "low_rank" else ()
        return {**shapes, "a2": (*batch, *a2_window, d2, rank), "b2": (*batch, rank, k2), **core}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch = self.axes.batch  # A factor's other axes are parts of the weight's axes.
        return {
            name: (*batch, *[None] * (len(shape) - len(batch)))
            for name, shape in self.shapes().items()
        }
