"""LoKr: the Kronecker product of two small factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters import checks, pair
from jlora.adapters.inits import within
from jlora.adapters.protocol import (
    About,
    AdapterConfig,
    AdapterLeaf,
    Expression,
    Given,
    Weight,
    array,
    family,
)
from jlora.factored.network import Labelled
from jlora.factored.probe import Axes


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

    about = About(
        name="LoKr",
        formula="W + (alpha / r) w1 (x) w2, w2 = a2 b2",
        parameters="d1 * k1 + r * (d2 + k2)",
        good_for="few numbers and yet full rank",
        paper="Edalati et al. 2212.10650; Yeh et al. 2309.14859",
    )
    kinds = frozenset({"linear", "convolution"})

    rank: int
    alpha: float
    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.flag("LoKr.decompose_both", self.decompose_both)
        checks.flag("LoKr.tucker", self.tucker)
        if self.factor != -1:
            checks.count("LoKr.factor", self.factor)

    def leaf(self, key: jax.Array, weight: Weight) -> LoKrLeaf:
        """`w1`, or its first factor, zero; all others uniform."""
        channels = tuple(weight.shape[axis] for axis in weight.channels)
        d1 = split(channels, self.factor)
        k1 = split(weight.groups.outputs, self.factor)
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
            first=(d1, k1),
            pair1=self.decompose_both and self.rank < max(d1, k1) / 2,
            form2=second,
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
            name: within(jax.random.fold_in(key, number), shape, fan_in[name], self.dtype)
            for number, (name, shape) in enumerate(leaf.shapes().items())
        }
        zero = "b1" if leaf.pair1 else "w1"
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


def split(sizes: Sequence[int], factor: int) -> int:
    """`factorization` of axes taken together, or the nearest number below that cuts them."""
    wanted = factorization(math.prod(sizes), factor)
    candidates = [n for n in range(wanted, 0, -1) if math.prod(sizes) % n == 0]
    return next(n for n in candidates if _cut(sizes, n) is not None)


def _cut(sizes: Sequence[int], first: int) -> list[tuple[int, int]] | None:
    """Every axis as a slow and a fast part, the slow parts together `first`; None if none fit."""
    parts = []
    for length in sizes:
        slow = math.gcd(first, length)
        if slow not in (first, length):
            return None
        parts.append((slow, length // slow))
        first //= slow
    return parts


class _Split(NamedTuple):
    """A group of axes cut in two."""

    slow: list[tuple[Hashable, int]]  # Labels and lengths.
    fast: list[tuple[Hashable, int]]
    splits: dict[int, tuple[int, int]]


def _labels(shape: Sequence[int], axes: Sequence[int], first: int) -> _Split:
    parts = _cut([shape[axis] for axis in axes], first)
    assert parts is not None
    found = _Split([], [], {})
    for axis, (slow, fast) in zip(axes, parts, strict=True):
        if slow > 1 and fast > 1:
            found.splits[axis] = (slow, fast)
            found.slow.append(((axis, 0), slow))
            found.fast.append(((axis, 1), fast))
        else:
            (found.slow if slow > 1 else found.fast).append((axis, slow * fast))
    return found


@family("lokr")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrLeaf(AdapterLeaf):
    """The factors of one weight, each either whole or a product.

    Attributes:
        w1: (*batch, d1, k1), or `a1` (*batch, d1, rank) and `b1` (*batch, rank, k1).
        w2: (*batch, *window, d2, k2), or `a2` (*batch, *window, d2, rank) and `b2`
            (*batch, rank, k2), or `a2` without a window and `core2` (*batch, rank, rank, *window).
        first: `d1` and `k1`.
        pair1: Whether `w1` is a product.
        form2: What `w2` is: "whole", a "pair", or a pair with a "core".
        window: The axes that a convolution slides over.
    """

    w1: Any = array("w1", optional=True)
    a1: Any = array("w1", optional=True)
    b1: Any = array("w1", optional=True)
    w2: Any = array("w2", optional=True)
    a2: Any = array("w2", optional=True)
    b2: Any = array("w2", optional=True)
    core2: Any = array("w2", optional=True)
    shape: tuple[int, ...]
    axes: Axes
    window: tuple[int, ...]
    rank: int
    alpha: float
    first: tuple[int, int]
    pair1: bool
    form2: str
    dropout: float

    @property
    def scale(self) -> float:
        return pair.scale_of(self.rank, self.alpha)

    def expression(self, given: Given) -> Expression:
        """One operand for every factor, over its own parts of the weight's axes."""
        del given
        batch, inputs, outputs = self.axes
        channels = [axis for axis in inputs if axis not in self.window]
        rows = _labels(self.shape, channels, self.first[0])
        columns = _labels(self.shape, outputs, self.first[1])
        window = [(axis, self.shape[axis]) for axis in self.window]
        stack = [(axis, self.shape[axis]) for axis in batch]
        one, two, other = ("rank 1", self.rank), ("rank 2", self.rank), ("rank 3", self.rank)

        def operand(array: jax.Array, *groups: Sequence[tuple[Hashable, int]]) -> Labelled:
            axes = [one for group in (stack, *groups) for one in group]
            return array.reshape([length for _, length in axes]), [label for label, _ in axes]

        if self.pair1:
            first = [
                operand(self.a1 * self.scale, rows.slow, [one]),
                operand(self.b1, [one], columns.slow),
            ]
        else:
            first = [operand(self.w1 * self.scale, rows.slow, columns.slow)]
        if self.form2 == "whole":
            second = [operand(self.w2, window, rows.fast, columns.fast)]
        elif self.form2 == "pair":
            second = [
                operand(self.a2, window, rows.fast, [two]),
                operand(self.b2, [two], columns.fast),
            ]
        else:
            second = [
                operand(self.a2, rows.fast, [two]),
                operand(self.core2, [two, other], window),
                operand(self.b2, [other], columns.fast),
            ]
        splits: Mapping[int, tuple[int, int]] = {**rows.splits, **columns.splits}
        return Expression(terms=[[*first, *second]], splits=splits)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stack, inputs, outputs = self.groups
        window = tuple(self.shape[axis] for axis in self.window)
        d1, k1 = self.first
        d2 = math.prod(inputs) // math.prod(window) // d1
        k2, rank = math.prod(outputs) // k1, self.rank
        shapes = {"a1": (*stack, d1, rank), "b1": (*stack, rank, k1)}
        if not self.pair1:
            shapes = {"w1": (*stack, d1, k1)}
        if self.form2 == "whole":
            return {**shapes, "w2": (*stack, *window, d2, k2)}
        core = {"core2": (*stack, rank, rank, *window)} if self.form2 == "core" else {}
        over = window if self.form2 == "pair" else ()
        return {**shapes, "a2": (*stack, *over, d2, rank), "b2": (*stack, rank, k2), **core}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch = self.axes.batch  # Other axes of a factor are parts of the weight's.
        own = {name: len(shape) - len(batch) for name, shape in self.shapes().items()}
        return {name: (*batch, *[None] * count) for name, count in own.items()}
