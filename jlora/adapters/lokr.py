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
from jlora.interpreter.usage import WeightAxes
from jlora.interpreter.weight import AdaptableWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(AdapterConfig):
    """`W + (alpha / rank) * w1 (x) w2`, with the Kronecker product of two small matrices.

    Inputs and outputs are split in two, `d = d1 d2` and `k = k1 k2`; `w1` is (d1, k1) and `w2`
    (d2, k2), over a convolution's window too. A factor whose longer side exceeds twice the rank is
    itself a product of two: `w2` always, `w1` where `decompose_both` is set. The step multiplies
    with one after the other, which costs little more than nothing.

    Attributes:
        rank: Of the factors that are products.
        alpha: Numerator of the scale put on the update; positive.
        factor: What `d1` and `k1` are, where it divides; by default, and where it does not, the
            largest divisor up to it that is at most the root. -1 sets no bound.
        decompose_both: Whether `w1` may be a product too.
        tucker: Give a convolution's `w2` two factors over its channels alone and a core over its
            window.
        dropout: Probability of dropping an entry of the input while training.
        dtype: Of all factors.

    References:
        Edalati et al., KronA, arXiv:2212.10650, section 3.
        Yeh et al., LyCORIS, arXiv:2309.14859, section 3, whose splits these are.
    """

    info = MethodInfo(
        name="LoKr",
        formula="W + (alpha / r) w1 (x) w2, w2 = a2 b2",
        num_params_formula="d1 * k1 + r * (d2 + k2)",
        recommended_for="few numbers and yet full rank",
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
        """`w1`, or its first factor, zero; all others uniform."""
        channels = tuple(weight.shape[axis] for axis in weight.channel_axes)
        d1 = nearest_factorization(channels, self.factor)
        k1 = nearest_factorization(weight.axis_sizes.outputs, self.factor)
        d2, k2 = math.prod(channels) // d1, weight.fan_out // k1
        window = math.prod(weight.shape[axis] for axis in weight.window)
        second = "whole" if self.rank >= max(d2, k2) / 2 else "pair"
        if second == "pair" and self.tucker and window > 1:
            second = "core"
        leaf = LoKrLeaf(
            shape=weight.shape,
            axes=weight.axes,
            window=weight.window,
            rank=int(self.rank),
            alpha=float(self.alpha),
            w1_shape=(d1, k1),
            decompose_w1=self.decompose_both and self.rank < max(d1, k1) / 2,
            w2_form=second,
            dropout=float(self.dropout),
        )
        fan_in = {
            "w1": d1,
            "b1": self.rank,
            "a1": d1,
            "w2": d2 * window,
            "a2": d2 if second == "core" else d2 * window,
            "b2": k2 if second == "core" else self.rank,
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
    """The first of two numbers whose product is `size`, as LyCORIS chooses it.

    It is `factor` where that divides; else the largest divisor up to it that keeps the sum of the
    two from growing.
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
    """`factorization` of axes taken together, or the nearest number below that cuts them."""
    wanted = factorization(math.prod(sizes), factor)
    candidates = [n for n in range(wanted, 0, -1) if math.prod(sizes) % n == 0]
    return next(n for n in candidates if _split_axes_by_factor(sizes, n) is not None)


def _split_axes_by_factor(sizes: Sequence[int], outer_size: int) -> list[tuple[int, int]] | None:
    """Every axis as a slow and a fast part, the slow parts together `outer_size`; None if none fit."""
    parts = []
    for length in sizes:
        slow = math.gcd(outer_size, length)
        if slow not in (outer_size, length):
            return None
        parts.append((slow, length // slow))
        outer_size //= slow
    return parts


class _AxisSplit(NamedTuple):
    """A group of axes cut in two."""

    outer: list[tuple[Hashable, int]]  # Labels and lengths.
    inner: list[tuple[Hashable, int]]
    splits: dict[int, tuple[int, int]]


def _split_axis_labels(shape: Sequence[int], axes: Sequence[int], outer_size: int) -> _AxisSplit:
    parts = _split_axes_by_factor([shape[axis] for axis in axes], outer_size)
    assert parts is not None
    found = _AxisSplit([], [], {})
    for axis, (slow, fast) in zip(axes, parts, strict=True):
        if slow > 1 and fast > 1:
            found.splits[axis] = (slow, fast)
            found.outer.append(((axis, 0), slow))
            found.inner.append(((axis, 1), fast))
        else:
            (found.outer if slow > 1 else found.inner).append((axis, slow * fast))
    return found


@register_family("lokr")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrLeaf(AdapterLeaf):
    """The factors of one weight, each either whole or a product.

    Attributes:
        w1: (*batch, d1, k1), or `a1` (*batch, d1, rank) and `b1` (*batch, rank, k1).
        w2: (*batch, *window, d2, k2), or `a2` (*batch, *window, d2, rank) and `b2`
            (*batch, rank, k2), or `a2` without a window and `core2` (*batch, rank, rank, *window).
        w1_shape: `d1` and `k1`.
        decompose_w1: Whether `w1` is a product.
        w2_form: What `w2` is: "whole", a "pair", or a pair with a "core".
        window: The axes that a convolution slides over.
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
        """One operand for every factor, over its own parts of the weight's axes."""
        del context
        batch, inputs, outputs = self.axes
        channels = [axis for axis in inputs if axis not in self.window]
        rows = _split_axis_labels(self.shape, channels, self.w1_shape[0])
        columns = _split_axis_labels(self.shape, outputs, self.w1_shape[1])
        window = [(axis, self.shape[axis]) for axis in self.window]
        stack = [(axis, self.shape[axis]) for axis in batch]
        one, two, other = ("rank 1", self.rank), ("rank 2", self.rank), ("rank 3", self.rank)

        def operand(array: jax.Array, *groups: Sequence[tuple[Hashable, int]]) -> LabeledArray:
            axes = [one for group in (stack, *groups) for one in group]
            return array.reshape([length for _, length in axes]), [label for label, _ in axes]

        if self.decompose_w1:
            first = [
                operand(self.a1 * self.scale, rows.outer, [one]),
                operand(self.b1, [one], columns.outer),
            ]
        else:
            first = [operand(self.w1 * self.scale, rows.outer, columns.outer)]
        if self.w2_form == "whole":
            second = [operand(self.w2, window, rows.inner, columns.inner)]
        elif self.w2_form == "pair":
            second = [
                operand(self.a2, window, rows.inner, [two]),
                operand(self.b2, [two], columns.inner),
            ]
        else:
            second = [
                operand(self.a2, rows.inner, [two]),
                operand(self.core2, [two, other], window),
                operand(self.b2, [other], columns.inner),
            ]
        splits: Mapping[int, tuple[int, int]] = {**rows.splits, **columns.splits}
        return weight.with_split_axes(splits).add(*first, *second)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stack, inputs, outputs = self.axis_sizes
        window = tuple(self.shape[axis] for axis in self.window)
        d1, k1 = self.w1_shape
        d2 = math.prod(inputs) // math.prod(window) // d1
        k2, rank = math.prod(outputs) // k1, self.rank
        shapes = {"a1": (*stack, d1, rank), "b1": (*stack, rank, k1)}
        if not self.decompose_w1:
            shapes = {"w1": (*stack, d1, k1)}
        if self.w2_form == "whole":
            return {**shapes, "w2": (*stack, *window, d2, k2)}
        core = {"core2": (*stack, rank, rank, *window)} if self.w2_form == "core" else {}
        over = window if self.w2_form == "pair" else ()
        return {**shapes, "a2": (*stack, *over, d2, rank), "b2": (*stack, rank, k2), **core}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch = self.axes.batch  # Other axes of a factor are parts of the weight's.
        own = {name: len(shape) - len(batch) for name, shape in self.shapes().items()}
        return {name: (*batch, *[None] * count) for name, count in own.items()}
