"""Terms that an adapter adds to a weight: products of arrays whose axes carry names.

LoRA is one term of two operands, `A[inputs, rank]` and `B[rank, outputs]`. A product of an
activation with it is contracted from the activation on:

    x (t, d)    x A (t, r)    (x A) B (t, k)    with A (d, r) and B (r, k)

so nothing of the weight's shape (d, k) is formed. Other kinds of terms are classes beside the
methods that need them.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# --- axes and operands ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of arrays, equal only to itself.

    Attributes:
        size: Length.
        weight_axis: Number of the original weight's axis that this is, or is a part of; None for
            an axis of the adapter's own, such as the rank.
        is_gathered: Whether it runs over rows that were looked up in that axis.
    """

    size: int
    weight_axis: int | None = None
    is_gathered: bool = False


class AxisSizes(NamedTuple):
    """Lengths of the axes of a weight by role."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class WeightAxes(NamedTuple):
    """Axes of a weight by role: indices of its axes, in increasing order.

    Attributes:
        batch: Axes with one matrix per index, such as the layers of a scan, or experts.
        inputs: Axes contracted with the activation; for an embedding, the axis that is indexed.
        outputs: Axes that appear in the result.

    Example:
        >>> from jlora.adapters import WeightAxes
        >>> WeightAxes(batch=(0,), inputs=(1,), outputs=(2,)).inputs
        (1,)
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> AxisSizes:
        """Returns the lengths of the axes by role."""
        return AxisSizes(*(tuple(shape[axis] for axis in group) for group in self))


AxisGroups = tuple[tuple[Axis, ...], ...]  # One group for each array axis, slowest first.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Operand:
    """An array and the axis behind each of its dimensions."""

    array: Any
    axes: tuple[Axis, ...]

    def map(self, fn: Callable[[Any], Any]) -> Operand:
        return Operand(fn(self.array), self.axes)


def flat_size(axes: Sequence[Axis]) -> int:
    """Returns the number of elements along all the axes together."""
    return math.prod(axis.size for axis in axes)


def is_longer(size: Any, other: Any) -> bool:
    """Whether a length is greater than another; True where a symbolic one may be."""
    try:
        return bool(size > other)
    except jax.errors.InconclusiveDimensionOperation:
        return True


def split_axes(array: Any, groups: Sequence[tuple[Axis, ...]]) -> Operand:
    """Returns the array with each dimension split into the axes of its group."""
    axes = tuple(axis for group in groups for axis in group)
    return Operand(reshape(array, [axis.size for axis in axes]), axes)


def label_dimensions(
    shape: Sequence[int], groups: dict[int, tuple[Axis, ...]]
) -> list[tuple[Axis, ...]]:
    """Returns a group of axes for each dimension: the given one, or a new axis."""
    return [groups.get(place, (Axis(length),)) for place, length in enumerate(shape)]


# `lax` alone: the functions of `jax.numpy` are traced anew at each call, which costs most of the
# time of tracing a deep model.


def reshape(array: Any, shape: Sequence[int]) -> Any:
    """Returns the array in this shape; the array itself where it has it."""
    return array if array.shape == tuple(shape) else lax.reshape(array, tuple(shape))


def cast(array: Any, dtype: Any) -> Any:
    """Returns the array in this type; the array itself where it has it."""
    return array if array.dtype == dtype else lax.convert_element_type(array, dtype)


def transpose(array: Any, permutation: Sequence[int]) -> Any:
    """Returns the array with its dimensions in this order."""
    if list(permutation) == list(range(len(permutation))):
        return array
    return lax.transpose(array, tuple(permutation))


# --- contraction ----------------------------------------------------------------------------------


def contract(
    first: Operand,
    others: Sequence[Operand],
    out_axes: Sequence[Axis],
    *,
    precision: Any = None,
    out_dtype: Any = None,
    cast_operands: bool = True,
) -> Any:
    """Returns the product of all operands, summed over every axis that is not in `out_axes`.

    Starts at `first` (an activation) and contracts one operand at a time, always the one that
    leaves the smallest result, so `x A B` goes through the rank and never forms `A B`.

    Args:
        first: Operand to begin with.
        others: Further operands.
        out_axes: Axes of the result, in order.
        precision: Precision of the products.
        out_dtype: Type of the last product; that of `first` by default.
        cast_operands: Whether operands are cast to the type of `first`.
    """
    current = first
    if others:
        # Axes that are summed over, and those that operands bring, without those that pass through.
        unshared = set(first.axes) ^ set(out_axes)
        remaining = contract_shared(others, unshared, {*first.axes, *out_axes}, precision)
        order = contraction_order(first.axes, [operand.axes for operand in remaining], out_axes)
        for position, (number, left) in enumerate(order, 1):
            is_last = position == len(order)
            if is_last:
                left = [axis for axis in out_axes if axis in left]
            operand = remaining[number]
            if cast_operands:
                operand = Operand(cast(operand.array, current.array.dtype), operand.axes)
            dtype = out_dtype if is_last else None
            current = _contract_pair(current, operand, left, precision, dtype)
    return arrange(current, out_axes, out_dtype)


def arrange(operand: Operand, out_axes: Sequence[Axis], dtype: Any = None) -> Any:
    """Returns the operand's array with these axes: summed over others, repeated along missing."""
    array, axes = operand.array, list(operand.axes)
    summed = [place for place, axis in enumerate(axes) if axis not in out_axes]
    if summed:
        array = jnp.sum(array, axis=tuple(summed))
        axes = [axis for axis in axes if axis in out_axes]
    present = [axis for axis in out_axes if axis in axes]
    array = transpose(array, [axes.index(axis) for axis in present])
    if dtype is not None:
        array = cast(array, dtype)
    if len(present) < len(out_axes):
        places = [place for place, axis in enumerate(out_axes) if axis in axes]
        array = lax.broadcast_in_dim(array, [axis.size for axis in out_axes], places)
    return array


def widest_dtype(*dtypes: Any) -> Any:
    """Returns the narrowest type that holds all of these, in strict dtype promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _contract_pair(
    a: Operand, b: Operand, left: Sequence[Axis], precision: Any, dtype: Any
) -> Operand:
    """Returns the product of two operands, summed over the axes that are not left."""
    a, b = (
        Operand(arrange(one, kept), tuple(kept))
        for one, other in ((a, b), (b, a))
        for kept in [[axis for axis in one.axes if axis in left or axis in other.axes]]
    )
    common = widest_dtype(a.array.dtype, b.array.dtype)
    left_array, right_array = cast(a.array, common), cast(b.array, common)
    contracting = [axis for axis in a.axes if axis in b.axes and axis not in left]
    if not contracting:
        product = lax.mul(arrange(Operand(left_array, a.axes), left), arrange(b, left, common))
        return Operand(cast(product, dtype or common), tuple(left))
    batch = [axis for axis in a.axes if axis in b.axes and axis in left]
    sides = [(left_array, a.axes), (right_array, b.axes)]
    free = [[x for x in axes if x not in batch and x not in contracting] for _, axes in sides]
    if [*batch, *free[1], *free[0]] == list(left):  # Saves a transpose of the result.
        sides, free = sides[::-1], free[::-1]
    (lhs, lhs_axes), (rhs, rhs_axes) = sides
    contracted, batched = (
        (tuple(lhs_axes.index(x) for x in axes), tuple(rhs_axes.index(x) for x in axes))
        for axes in (contracting, batch)
    )
    numbers = (contracted, batched)
    product = lax.dot_general(
        lhs, rhs, numbers, precision=precision, preferred_element_type=dtype or common
    )
    axes = [*batch, *free[0], *free[1]]
    return Operand(transpose(product, [axes.index(axis) for axis in left]), tuple(left))


def contract_shared(
    operands: Sequence[Operand],
    unshared_axes: Iterable[Axis],
    needed_axes: Iterable[Axis],
    precision: Any = None,
) -> list[Operand]:
    """Returns the operands, multiplied until no two share one of `unshared_axes`.

    Where several operands share an axis of the weight (a Hadamard product), an activation is
    contracted with their product: with one after the other it would keep that axis between them,
    or make it before the last of them is contracted. The pair with the smallest result goes first.

    Args:
        operands: Factors of one product.
        unshared_axes: Axes that no two operands may share.
        needed_axes: Axes that something other than these operands still needs.
        precision: Precision of the products.
    """
    unshared_axes, needed_axes = set(unshared_axes), set(needed_axes)
    remaining = list(operands)
    while any(sum(axis in operand.axes for operand in remaining) > 1 for axis in unshared_axes):
        pairs = [
            (i, j)
            for j, second in enumerate(remaining)
            for i, first in enumerate(remaining[:j])
            if set(first.axes) & set(second.axes)
        ]

        def axes_left(pair: tuple[int, int]) -> list[Axis]:
            first, second = (remaining[i].axes for i in pair)  # noqa: B023
            rest = [o.axes for i, o in enumerate(remaining) if i not in pair]  # noqa: B023
            return _axes_left(first, second, rest, [*unshared_axes, *needed_axes])

        best = min(pairs, key=lambda pair: flat_size(axes_left(pair)))
        first, second = (remaining[i] for i in best)
        out = axes_left(best)
        array = contract(first, [second], out, precision=precision, cast_operands=False)
        remaining = [operand for i, operand in enumerate(remaining) if i not in best]
        remaining.append(Operand(array, tuple(out)))
    return remaining


def contraction_order(
    first: Sequence[Axis], operands: Sequence[Sequence[Axis]], out_axes: Sequence[Axis]
) -> list[tuple[int, list[Axis]]]:
    """Returns the order to contract operands in, and the axes that are left after each.

    The next one always leaves the smallest result. An operand that shares no axis goes last: with
    it the result would be an outer product.
    """
    order: list[tuple[int, list[Axis]]] = []
    current, remaining = list(first), list(range(len(operands)))
    while remaining:

        def axes_left(number: int) -> list[Axis]:
            rest = [operands[other] for other in remaining if other != number]  # noqa: B023
            return _axes_left(current, operands[number], rest, out_axes)  # noqa: B023

        if len(remaining) == 1:
            best = remaining[0]
        else:
            best = min(
                remaining,
                key=lambda n: (set(current).isdisjoint(operands[n]), flat_size(axes_left(n))),
            )
        current, remaining = axes_left(best), [n for n in remaining if n != best]
        order.append((best, current))
    return order


def _axes_left(
    a: Sequence[Axis], b: Sequence[Axis], rest: Sequence[Sequence[Axis]], out: Iterable[Axis]
) -> list[Axis]:
    """Returns the axes of a product of two operands that `rest` or the result still needs."""
    needed = {axis for axes in rest for axis in axes} | set(out)
    return [axis for axis in dict.fromkeys((*a, *b)) if axis in needed]


# --- terms ----------------------------------------------------------------------------------------


class WeightProduct(abc.ABC):
    """One use of a weight by a primitive, as its terms need to know it.

    Attributes:
        path: Path of the weight, for errors.
        x_groups: Axes behind each dimension of the activation.
        out_groups: Axes behind each dimension of the result.
        precision: Precision of the product.
        routing_error: Reason why a term cannot depend on the input here; None where it can.
    """

    path: str
    x_groups: Sequence[tuple[Axis, ...]]
    out_groups: Sequence[tuple[Axis, ...]]
    precision: Any = None
    routing_error: str | None = None

    @property
    def out_axes(self) -> list[Axis]:
        return [axis for group in self.out_groups for axis in group]

    @abc.abstractmethod
    def multiply_base(self, x: Any, base: Any) -> Any:
        """Returns the product of the activation with the frozen base."""

    @abc.abstractmethod
    def multiply(self, x: Any, operands: Sequence[Operand], result: Any) -> Any:
        """Returns the product of the activation with operands, like `result` in shape and type."""

    def trace_key(self) -> Hashable | None:
        """Returns a key that products share which differ in their axes alone.

        None where the product holds arrays, or is not worth a key.
        """
        return None

    def multiply_fused(self, x: Any, weight: Any) -> Any:
        """Returns the product with base and terms in one kernel, or None where there is none."""
        del x, weight

    def label_gain(self, gain: Operand) -> Operand:
        """Returns a gain with the axes that it has in this product."""
        return gain


class Term(abc.ABC):
    """Something that is added to a weight. Subclasses are frozen dataclasses and pytrees."""

    @abc.abstractmethod
    def map(self, fn: Callable[[Operand], Operand]) -> Term:
        """Returns the term with `fn` applied to every operand."""

    @abc.abstractmethod
    def add_product(
        self, total: Any, x: Any, product: WeightProduct
    ) -> tuple[Any, Sequence[jax.Array]]:
        """Returns the sum of `total` and the product with this term, and auxiliary losses."""

    @abc.abstractmethod
    def add_materialized(self, total: Any, weight: Any) -> Any:
        """Returns the sum of an array like the weight and this term.

        Raises:
            ValueError: The term depends on the input of a product.
        """

    @abc.abstractmethod
    def scale(self, factor: Any) -> Term:
        """Returns the term times a number."""

    @abc.abstractmethod
    def is_zero_outside(self, axis: Axis) -> bool:
        """Returns whether the term is zero wherever its operands are zero along the axis."""

    @abc.abstractmethod
    def to_product(self, weight: Any, used_by: str) -> ProductTerm | None:
        """Returns the term as a product of operands, for rules that differentiate such products.

        Raises:
            ValueError: It is none, since it depends on the input.
        """

    def can_pad(self, axis: Axis) -> bool:
        """Returns whether padding its operands with zeros along the axis pads the term."""
        return self.is_zero_outside(axis)

    def prepare_input(self, x: Any, product: WeightProduct) -> Any:
        """Returns the activation that base and terms are multiplied with."""
        del product
        return x

    def with_dropout(self, dropout: Dropout) -> Term:
        """Returns the term with its input dropped."""
        return DropoutTerm(self, dropout)

    def with_token_mask(self, token_mask: jax.Array) -> Term:
        """Returns the term with a mask of its inputs, for terms with statistics of them."""
        del token_mask
        return self

    def fold_in(self, data: Any) -> Term:
        """Returns the term with random keys of its own for a use, or a step of a loop."""
        del data
        return self

    def gather(self, look_up: Callable[[Operand], Operand]) -> Term:
        """Returns the term of rows that are looked up in the weight."""
        return self.map(look_up)


def fit_token_mask(token_mask: jax.Array, shape: Sequence[int], path: str) -> jax.Array:
    """Returns a mask of tokens in the shape that a product's inputs have, as float32.

    Args:
        token_mask: Mask of the tokens of a batch, such as (batch, length).
        shape: Sizes of the inputs' axes that are not contracted: those of the mask; the first of
            them, such as (batch,), where an input counts if any of its tokens does; or all of them
            in one.
        path: Path of the weight, for the error.

    Raises:
        ValueError: The shape is none of these.
    """
    mask = (token_mask != 0).astype(jnp.float32)
    shape = tuple(shape)
    if shape == mask.shape[: len(shape)]:
        return mask.max(tuple(range(len(shape), mask.ndim)))
    if shape == (mask.size,):
        return mask.reshape(shape)
    raise ValueError(
        f"token_mask has shape {mask.shape}, but the inputs of {path!r} are {shape}, so its tokens "
        f"cannot be assigned to them. Leave this weight out of the rules."
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ProductTerm(Term):
    """A product of operands, summed over the axes that the weight does not have."""

    operands: tuple[Operand, ...]

    def map(self, fn: Callable[[Operand], Operand]) -> ProductTerm:
        return ProductTerm(tuple(fn(operand) for operand in self.operands))

    def add_product(
        self, total: Any, x: Any, product: WeightProduct
    ) -> tuple[Any, Sequence[jax.Array]]:
        return total + product.multiply(x, self.operands, total), ()

    def add_materialized(self, total: Any, weight: Any) -> Any:
        return total + materialize_operands(self.operands, weight, total.dtype)

    def scale(self, factor: Any) -> ProductTerm:
        first, *others = self.operands
        return ProductTerm((first.map(lambda array: array * cast(factor, array.dtype)), *others))

    def is_zero_outside(self, axis: Axis) -> bool:
        return any(axis in operand.axes for operand in self.operands)

    def to_product(self, weight: Any, used_by: str) -> ProductTerm:
        del weight, used_by
        return self


def materialize_operands(operands: Sequence[Operand], weight: Any, dtype: Any) -> Any:
    """Returns the product of the operands as one array with the shape of the weight.

    Args:
        operands: Factors of the product.
        weight: A `FactoredArray`, for its axes.
        dtype: Type of the result and of the products.
    """
    # A merge must not lose small updates to the short products of a TPU or GPU.
    exact = lax.Precision.HIGHEST
    wide = [operand.map(lambda array: cast(array, dtype)) for operand in operands]
    first, *others = contract_shared(wide, weight.axes, weight.axes, exact)
    return reshape(contract(first, others, weight.axes, precision=exact), weight.shape)


# --- dropout --------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["rate", "index"]
)
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of the input of a term.

    Attributes:
        rate: Probability of dropping an entry.
        keys: Random keys, one for every index of the weight's batch axes (layers, experts).
        index: Number of the term among those of its weight, which drop different entries.
    """

    rate: float
    keys: Operand
    index: int

    def __call__(self, x: Any) -> Any:
        # Batch axes that the product itself carries leave several keys here. The input then has
        # those axes too, so one key draws an independent mask for each.
        key = jax.random.fold_in(self.keys.array.reshape(-1)[0], self.index)
        is_kept = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(is_kept, x / (1 - self.rate), jnp.zeros_like(x))

    def map(self, fn: Callable[[Operand], Operand]) -> Dropout:
        return dataclasses.replace(self, keys=fn(self.keys))

    def fold_in(self, data: Any) -> Dropout:
        def fold(keys: Any) -> Any:
            folded = jax.vmap(lambda key: jax.random.fold_in(key, data))(keys.reshape(-1))
            return folded.reshape(keys.shape)

        return dataclasses.replace(self, keys=self.keys.map(fold))

    def gather(self) -> Dropout:
        """Returns the dropout for looked-up rows.

        One key serves all rows: the input has an axis for them, and so a mask for each.
        """
        return dataclasses.replace(self, keys=Operand(self.keys.array.reshape(-1)[0], ()))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["term", "dropout"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class DropoutTerm(Term):
    """A term whose input is dropped."""

    term: Term
    dropout: Dropout

    def map(self, fn: Callable[[Operand], Operand]) -> DropoutTerm:
        return DropoutTerm(self.term.map(fn), self.dropout.map(fn))

    def add_product(
        self, total: Any, x: Any, product: WeightProduct
    ) -> tuple[Any, Sequence[jax.Array]]:
        return self.term.add_product(total, self.dropout(x), product)

    def add_materialized(self, total: Any, weight: Any) -> Any:
        # As in the reference, a look-up has no input to drop.
        if not weight.is_gathered:
            raise ValueError(
                f"Dropout of the adapter on {weight.path!r} cannot be applied: this weight is not "
                f"only used by products (lora.explain lists its uses), so it has no input to drop. "
                f"Set dropout=0.0 in its config, or omit dropout_key."
            )
        return self.term.add_materialized(total, weight)

    def scale(self, factor: Any) -> DropoutTerm:
        return DropoutTerm(self.term.scale(factor), self.dropout)

    def is_zero_outside(self, axis: Axis) -> bool:
        return self.term.is_zero_outside(axis)

    def can_pad(self, axis: Axis) -> bool:
        return self.term.can_pad(axis) and axis not in self.dropout.keys.axes

    def to_product(self, weight: Any, used_by: str) -> ProductTerm | None:
        raise ValueError(
            f"Dropout of the adapter on {weight.path!r} cannot be applied inside a function with a "
            f"custom derivative ({used_by}), whose rule would use the input without dropout. Set "
            f"dropout=0.0 in the config of this weight."
        )

    def prepare_input(self, x: Any, product: WeightProduct) -> Any:
        return self.term.prepare_input(x, product)

    def with_token_mask(self, token_mask: jax.Array) -> DropoutTerm:
        term = self.term.with_token_mask(token_mask)
        return self if term is self.term else DropoutTerm(term, self.dropout)

    def fold_in(self, data: Any) -> DropoutTerm:
        return DropoutTerm(self.term.fold_in(data), self.dropout.fold_in(data))

    def gather(self, look_up: Callable[[Operand], Operand]) -> DropoutTerm:
        return DropoutTerm(self.term.gather(look_up), self.dropout.gather())
