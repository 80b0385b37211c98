"""Primitives that move a weight's entries, as the same moves on its axes and operands.

A rule takes an equation, the weights among its inputs (None for plain arrays) and the inputs. It
returns the weights among the outputs, whose bases the caller fills in, or None where the move
cannot be made on the operands.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.interpreter import _compat
from jlora.interpreter.factored_array import FactoredArray, bind_on_bases
from jlora.interpreter.primitive_rules import (
    RULES,
    EvalContext,
    OptionalWeights,
    Rule,
    get_base,
    movement_rule,
)
from jlora.interpreter.terms import Axis, AxisGroups, Operand, Term, flat_size, is_longer


@movement_rule("copy", "name", "pvary", "reduce_precision", "sharding_constraint", "reshard")
def _identity_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del eqn, values
    (weight,) = weights
    return None if weight is None else [weight]


@movement_rule("optimization_barrier")
def _optimization_barrier_rule(eqn: Any, weights: OptionalWeights, values: Sequence[Any]) -> Any:
    del eqn, values
    return weights


@movement_rule("stop_gradient")
def _stop_gradient_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del eqn, values
    (weight,) = weights
    return weight and [weight.map(lambda operand: operand.map(lax.stop_gradient))]


@movement_rule("convert_element_type")
def _convert_element_type_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    (weight,) = weights
    # Operands keep their type and are cast at the product, so nothing small is rounded twice.
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return [weight] if floating and weight else None


class ScalarScaling(NamedTuple):
    """An equation that multiplies all of an array by one number.

    Attributes:
        array_side: Number of the input that is the array.
        scalar_side: Number of the input that is the number; None for a negation.
        factor_fn: Function from the number to the factor.
    """

    array_side: int
    scalar_side: int | None
    factor_fn: Callable[[Any], Any]


def match_scalar_scaling(eqn: Any) -> ScalarScaling | None:
    """Returns how an equation scales an array; None when it does not."""
    name, is_scalar = eqn.primitive.name, [atom.aval.shape == () for atom in eqn.invars]
    if name == "neg":
        return ScalarScaling(0, None, lambda _: -1)
    if name in ("mul", "div") and is_scalar[1]:
        return ScalarScaling(0, 1, (lambda x: x) if name == "mul" else lambda x: 1 / x)
    return ScalarScaling(1, 0, lambda x: x) if name == "mul" and is_scalar[0] else None


def scale_weight(weight: FactoredArray, factor: Any, *, base_is_scaled: bool) -> FactoredArray:
    """Returns the weight times a number.

    With `base_is_scaled` the base has been multiplied already. A number that may depend on the
    adapter (a spectral norm) must not be multiplied into it: its gradient would then need the
    gradient of the full weight.
    """
    factor = jnp.asarray(factor)
    if not base_is_scaled:
        return dataclasses.replace(weight, gains=(*weight.gains, Operand(factor, ())))
    return weight.map_terms(lambda term: term.scale(factor))


class ScalingRule(Rule):
    """Products and quotients of a weight and a number."""

    def evaluate(self, context: EvalContext, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
        del context
        scaling = match_scalar_scaling(eqn)
        if scaling is None or [isinstance(v, FactoredArray) for v in values].count(True) != 1:
            return None
        weight, side = values[scaling.array_side], scaling.scalar_side
        if not isinstance(weight, FactoredArray):
            return None
        factor = scaling.factor_fn(None if side is None else values[side])
        is_constant = side is None or _compat.is_literal(eqn.invars[side])
        scaled = scale_weight(weight, factor, base_is_scaled=is_constant)
        if not is_constant:
            return [scaled]
        (base,) = bind_on_bases(eqn, [get_base(value) for value in values])
        return [scaled.with_base(base)]


RULES.update(dict.fromkeys(("neg", "mul", "div"), ScalingRule()))


@movement_rule("transpose")
def _transpose_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    (weight,) = weights
    return weight and [
        weight.with_axis_groups([weight.axis_groups[i] for i in eqn.params["permutation"]])
    ]


@movement_rule("reshape")
def _reshape_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    weight = weights[0]
    if weight is None:
        return None
    order = eqn.params["dimensions"] or range(len(weight.axis_groups))
    moved = weight.with_axis_groups([weight.axis_groups[place] for place in order])
    return _wrap_weight(regroup_axes(moved, eqn.outvars[0].aval.shape))


def _wrap_weight(weight: FactoredArray | None) -> list[FactoredArray] | None:
    return None if weight is None else [weight]


def regroup_axes(weight: FactoredArray, shape: Sequence[int]) -> FactoredArray | None:
    """Returns the weight with its axes grouped into dimensions of these sizes.

    An axis is split where a dimension ends inside it. None where no axis ends with one.
    """
    remaining = list(weight.axes)
    groups: list[tuple[Axis, ...]] = []
    for length in shape:
        group: list[Axis] = []
        while flat_size(group) < length and remaining:
            axis = remaining.pop(0)
            wanted = length // flat_size(group)
            if axis.size > wanted:
                if length % flat_size(group) or axis.size % wanted or axis.is_gathered:
                    return None
                sizes = (wanted, axis.size // wanted)
                parts = tuple(Axis(n, axis.weight_axis) for n in sizes)
                weight = weight.replace_axis(
                    axis,
                    parts,
                    lambda array, dim, sizes=sizes: array.reshape(
                        *array.shape[:dim], *sizes, *array.shape[dim + 1 :]
                    ),
                )
                axis, rest = parts
                remaining.insert(0, rest)
            group.append(axis)
        if flat_size(group) != length:
            return None
        groups.append(tuple(group))
    if flat_size(remaining) != 1 or (remaining and not groups):
        return None
    if remaining:
        # Axes of length one that no new dimension asked for stay with the last.
        groups[-1] = (*groups[-1], *remaining)
    return weight.with_axis_groups(groups)


@movement_rule("squeeze")
def _squeeze_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    (weight,) = weights
    if weight is None:
        return None
    dropped = {place % len(weight.axis_groups) for place in eqn.params["dimensions"]}
    return [squeeze_weight_axes(weight, dropped)]


def squeeze_weight_axes(weight: FactoredArray, places: set[int]) -> FactoredArray:
    """Returns the weight without these dimensions of length one."""
    for place in places:
        for axis in weight.axis_groups[place]:
            weight = weight.replace_axis(axis, (), lambda array, dim: jnp.squeeze(array, dim))
    return weight.with_axis_groups(
        [g for place, g in enumerate(weight.axis_groups) if place not in places]
    )


@movement_rule("broadcast_in_dim")
def _broadcast_in_dim_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    weight = weights[0]
    if weight is None:
        return None
    source = dict(
        zip(eqn.params["broadcast_dimensions"], range(len(weight.axis_groups)), strict=True)
    )
    axes: list[tuple[Axis, ...]] = []
    for place, length in enumerate(eqn.params["shape"]):
        if place in source and flat_size(weight.axis_groups[source[place]]) == length:
            axes.append(weight.axis_groups[source[place]])
        else:
            axes.append(() if length == 1 else (Axis(length),))
    stretched = {
        i
        for place, i in source.items()
        if flat_size(weight.axis_groups[i]) != eqn.params["shape"][place]
    }
    return [squeeze_weight_axes(weight, stretched).with_axis_groups(axes)]


@movement_rule("tile")
def _tile_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    """Copies of the whole weight, along new axes that no operand has."""
    del values
    (weight,) = weights
    if weight is None:
        return None
    copies = [() if n == 1 else (Axis(n),) for n in eqn.params["reps"]]
    groups = zip(copies, weight.axis_groups, strict=True)
    return [weight.with_axis_groups([(*new, *group) for new, group in groups])]


@movement_rule("rev")
def _rev_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    (weight,) = weights
    if weight is None:
        return None
    for place in eqn.params["dimensions"]:
        for axis in weight.axis_groups[place]:
            weight = weight.replace_axis(
                axis,
                (Axis(axis.size, axis.weight_axis, axis.is_gathered),),
                lambda a, i: jnp.flip(a, i),
            )
    return [weight]


@movement_rule("slice")
def _slice_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    (weight,) = weights
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for place, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        weight = weight and slice_weight_axis(
            weight,
            place,
            eqn.outvars[0].aval.shape[place],
            lambda array, dim, kept=(start, limit, stride): lax.slice_in_dim(
                array, *kept, axis=dim
            ),
        )
    return _wrap_weight(weight)


@movement_rule("split")
def _split_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    del values
    (weight,) = weights
    parts, start = [], 0
    for length in map(int, eqn.params["sizes"]):
        part = weight and slice_weight_axis(
            weight,
            eqn.params["axis"],
            length,
            lambda array, dim, kept=(start, start + length): lax.slice_in_dim(
                array, *kept, axis=dim
            ),
        )
        if part is None:
            return None
        parts.append(part)
        start += length
    return parts


@movement_rule("dynamic_slice")
def _dynamic_slice_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    weight = weights[0]
    is_row = weight is not None and _is_row_lookup(eqn, weight, values[1:])
    for place, length in enumerate(eqn.params["slice_sizes"]):
        weight = weight and slice_weight_axis(
            weight,
            place,
            length,
            lambda array, dim, start=values[place + 1], length=length: lax.dynamic_slice_in_dim(
                array, start, length, dim
            ),
        )
    return _wrap_weight(_mark_row(weight) if weight is not None and is_row else weight)


def _mark_row(weight: FactoredArray) -> FactoredArray:
    """Marks the axes of one row that was looked up, since the axis of the rows goes with it."""
    for axis in weight.axes:
        marked = Axis(axis.size, axis.weight_axis, is_gathered=True)
        weight = weight.replace_axis(axis, (marked,), lambda array, dim: array)
    return weight


def _is_row_lookup(eqn: Any, weight: FactoredArray, indices: Sequence[Any]) -> bool:
    """Whether one row is looked up by the inputs of the model (an embedding of one token).

    A matrix is one of a stack (a layer, an expert) instead, and so is what a constant selects; the
    analysis of uses has an empty tuple for that.
    """
    cut = list_looked_up_dimensions(eqn)
    row = [n for place, n in enumerate(weight.shape) if place not in cut and is_longer(n, 1)]
    by_inputs = any(
        not _compat.is_literal(atom) and not (isinstance(index, tuple) and not index)
        for atom, index in zip(eqn.invars[1:], indices, strict=True)
    )
    return by_inputs and len(row) <= 1 and eqn.outvars[0].aval.size == math.prod(row)


def list_looked_up_dimensions(eqn: Any) -> list[int]:
    """Lists the dimensions that a `dynamic_slice` or `gather` makes shorter."""
    sizes = zip(eqn.params["slice_sizes"], eqn.invars[0].aval.shape, strict=True)
    return [place for place, (length, size) in enumerate(sizes) if is_longer(size, length)]


def slice_weight_axis(
    weight: FactoredArray, place: int, length: int, fn: Callable[[Any, int], Any]
) -> FactoredArray | None:
    """Returns the weight with `length` entries of one dimension, those that `fn(array, dim)` keeps.

    None where the dimension is several axes, which no slice of one operand can express.
    """
    group = weight.axis_groups[place]
    if flat_size(group) == length:
        return weight
    # Axes of length one that a reshape merged into this one are not what is cut.
    longer = [axis for axis in group if is_longer(axis.size, 1)] or list(group)
    if len(longer) != 1:
        return None
    (axis,) = longer
    shorter = Axis(length, axis.weight_axis, axis.is_gathered)
    return weight.replace_axis(axis, (shorter,), fn)


@movement_rule("concatenate")
def _concatenate_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    place = eqn.params["dimension"]
    lengths = [atom.aval.shape[place] for atom in eqn.invars]
    total = sum(lengths)
    present = [weight for weight in weights if weight is not None]
    if any(len(group) != 1 for weight in present for group in weight.axis_groups):
        return None
    # Dimensions other than the joined one are the same in every part: one set of axes.
    joined: AxisGroups = tuple(
        (
            Axis(
                total if i == place else axis.size,
                axis.weight_axis,
                any(weight.axis_groups[i][0].is_gathered for weight in present),
            ),
        )
        for i, (axis,) in enumerate(present[0].axis_groups)
    )
    gains: list[Operand] = []
    terms: list[Term] = []
    start = 0
    for weight, length in zip(weights, lengths, strict=True):
        if weight is not None:
            (axis,) = weight.axis_groups[place]
            # Beside this part a gain is one, so it has to run along the joined dimension alone.
            if any(gain.axes not in ((), (axis,)) for gain in weight.gains):
                return None
            if not all(term.can_pad(axis) for term in weight.terms):
                return None
            pad = functools.partial(
                _pad_to_joined_axes,
                weight=weight,
                groups=joined,
                place=place,
                around=(start, total - start - length),
            )
            along = [
                gain if gain.axes else Operand(jnp.repeat(gain.array, length), (axis,))
                for gain in weight.gains
            ]
            gains += [pad(gain, fill=1) for gain in along]
            terms += [term.map(functools.partial(pad, fill=0)) for term in weight.terms]
        start += length
    return [FactoredArray(None, joined, present[0].path, tuple(gains), tuple(terms))]


def _pad_to_joined_axes(
    operand: Operand,
    *,
    weight: FactoredArray,
    groups: AxisGroups,
    place: int,
    around: tuple[int, int],
    fill: int,
) -> Operand:
    """Returns the operand with the joined weight's axes, filled where its other parts are."""
    joined = {old: new for (old,), (new,) in zip(weight.axis_groups, groups, strict=True)}
    padded = weight.axis_groups[place][0]
    widths = [around if axis is padded else (0, 0) for axis in operand.axes]
    array = operand.array
    if any(map(any, widths)):
        array = jnp.pad(array, widths, constant_values=fill)
    return Operand(array, tuple(joined.get(axis, axis) for axis in operand.axes))


@movement_rule("pad")
def _pad_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    weight = weights[0]
    for place, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if weight is None or min(low, high) < 0 or inner:
            return None
        if not low and not high:
            continue
        if len(weight.axis_groups[place]) != 1:
            return None
        (axis,) = weight.axis_groups[place]
        if weight.gains or not all(term.can_pad(axis) for term in weight.terms):
            return None
        weight = weight.replace_axis(
            axis,
            (Axis(low + axis.size + high, axis.weight_axis, axis.is_gathered),),
            lambda array, dim, edges=(low, high): jnp.pad(
                array, [edges if i == dim else (0, 0) for i in range(array.ndim)]
            ),
        )
    return _wrap_weight(weight)


def _is_window(eqn: Any) -> bool:
    """Whether a `gather` cuts one window of several rows, as slices of a symbolic length do."""
    is_filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    sizes = eqn.params["slice_sizes"]
    has_rows = any(is_longer(sizes[place], 1) for place in list_looked_up_dimensions(eqn))
    return eqn.invars[1].aval.ndim == 1 and has_rows and not is_filled


def _cut_window(eqn: Any, weight: FactoredArray, indices: Any) -> FactoredArray | None:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    window: FactoredArray | None = weight
    for column, place in enumerate(numbers.start_index_map):
        window = window and slice_weight_axis(
            window,
            place,
            sizes[place],
            lambda array, dim, column=column, length=sizes[place]: lax.dynamic_slice_in_dim(
                array, indices[column], length, dim
            ),
        )
    return window and squeeze_weight_axes(window, set(numbers.collapsed_slice_dims))


@movement_rule("gather")
def _gather_rule(
    eqn: Any, weights: OptionalWeights, values: Sequence[Any]
) -> list[FactoredArray] | None:
    """Whole rows looked up along some dimensions (an embedding table, one expert per token)."""
    weight, indices = weights[0], values[1]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if weight is None or weights[1] is not None or numbers.operand_batching_dims:
        return None
    if _is_window(eqn):
        return _wrap_weight(_cut_window(eqn, weight, indices))
    # An index into a dimension that is taken whole has no effect (a batch of `dynamic_slice`).
    is_clipped = eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP
    rows = {
        place: column
        for column, place in enumerate(numbers.start_index_map)
        if not (is_clipped and sizes[place] == weight.shape[place])
    }
    row_sizes = [1 if place in rows else n for place, n in enumerate(weight.shape)]
    if (
        tuple(sizes) != tuple(row_sizes)
        or any(len(weight.axis_groups[place]) != 1 for place in rows)
        or any(weight.shape[place] != 1 for place in {*numbers.collapsed_slice_dims} - {*rows})
        or weight.is_gathered
    ):
        return None
    if not rows:
        rows = {
            place: i for i, place in enumerate(numbers.start_index_map) if row_sizes[place] == 1
        }
    if not rows:
        return None
    looked_up = [weight.axis_groups[place][0] for place in rows]
    index_columns = list(rows.values())
    out_shape = eqn.outvars[0].aval.shape
    weight_axis = looked_up[0].weight_axis
    batch = {
        place: Axis(length, weight_axis, is_gathered=True)
        for place, length in enumerate(out_shape)
        if place not in numbers.offset_dims
    }
    offsets = iter(
        () if place in rows else group
        for place, group in enumerate(weight.axis_groups)
        if place not in numbers.collapsed_slice_dims
    )
    groups = [
        (batch[place],) if place in batch else next(offsets) for place in range(len(out_shape))
    ]

    # A row outside the table must get neither an update nor a gain on the base's filling.
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        filling = eqn.params["fill_value"]
        gains_change_it = filling is not None and not (filling == 0 or np.isnan(filling))
        for axis in looked_up:
            if not all(term.is_zero_outside(axis) for term in weight.terms):
                return None
            if gains_change_it and not all(axis in gain.axes for gain in weight.gains):
                return None

    def look_up(operand: Operand, fill: int) -> Operand:
        columns = [i for i, axis in enumerate(looked_up) if axis in operand.axes]
        if not columns:
            return operand
        own = [operand.axes.index(looked_up[i]) for i in columns]
        rest = [i for i in range(len(operand.axes)) if i not in own]
        has_all = len(own) == len(rows)  # Some columns alone may repeat where all of them do not.
        array = lax.gather(
            operand.array,
            indices[..., jnp.array([index_columns[i] for i in columns])],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(batch), len(batch) + len(rest))),
                collapsed_slice_dims=tuple(sorted(own)),
                start_index_map=tuple(own),
            ),
            slice_sizes=[1 if i in own else n for i, n in enumerate(operand.array.shape)],
            indices_are_sorted=eqn.params["indices_are_sorted"] and has_all,
            unique_indices=eqn.params["unique_indices"] and has_all,
            mode=eqn.params["mode"],
            fill_value=fill,
        )
        return Operand(array, (*batch.values(), *(operand.axes[i] for i in rest)))

    # Filling operands with the base's NaN would also put NaN into the gradient of rows that the
    # model masks.
    gains = tuple(look_up(gain, 1) for gain in weight.gains)
    terms = tuple(term.gather(functools.partial(look_up, fill=0)) for term in weight.terms)
    found = FactoredArray(None, tuple(groups), weight.path, gains, terms)
    is_row = not batch and _is_row_lookup(eqn, weight, values[1:])
    return [_mark_row(found) if is_row else found]
