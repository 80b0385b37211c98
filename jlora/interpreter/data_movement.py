"""Rules for equations that move or scale the entries of a weight, applied to its network.

A rule takes an equation, the networks of its inputs (None for plain arrays) and the inputs. It
returns the networks of the outputs, or None where the movement cannot be applied to the operands.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.interpreter.einsum import Axis, Operand, flat_size
from jlora.interpreter.factored_array import AxisGroups, Dropout, TensorNetwork, Term

OptionalNetworks = list[TensorNetwork | None]

MovementRule = Callable[[Any, OptionalNetworks, Sequence[Any]], list[TensorNetwork] | None]

DATA_MOVEMENT_RULES: dict[str, MovementRule] = {}


def register_movement_rule(*primitives: str) -> Callable[[MovementRule], MovementRule]:
    """Returns a decorator that adds a function to `DATA_MOVEMENT_RULES` for these primitives."""

    def register(fn: MovementRule) -> MovementRule:
        DATA_MOVEMENT_RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


@register_movement_rule(
    "copy", "name", "pvary", "reduce_precision", "sharding_constraint", "mesh_cast", "reshard"
)
def _identity_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del eqn, values
    (network,) = networks
    return None if network is None else [network]


@register_movement_rule("optimization_barrier")
def _optimization_barrier_rule(eqn: Any, networks: OptionalNetworks, values: Sequence[Any]) -> Any:
    del eqn, values
    return networks


@register_movement_rule("stop_gradient")
def _stop_gradient_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del eqn, values
    (network,) = networks
    return network and [network.map(lambda operand: operand.map(lax.stop_gradient))]


@register_movement_rule("convert_element_type")
def _convert_element_type_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    # Operands keep their type and are cast at the product, so that no factor is rounded twice.
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return [network] if floating and network else None


class ScalarScaling(NamedTuple):
    """An equation that multiplies an array by a scalar.

    Attributes:
        array_side: Index of the input that is the array.
        scalar_side: Index of the input that is the scalar. None: a negation.
        factor_fn: Function from the scalar (None for a negation) to the factor on the array.
    """

    array_side: int
    scalar_side: int | None
    factor_fn: Callable[[Any], Any]


def match_scalar_scaling(eqn: Any) -> ScalarScaling | None:
    """Returns how an equation scales an array by a scalar, or None for any other equation."""
    name, is_scalar = eqn.primitive.name, [value.aval.shape == () for value in eqn.invars]
    if name == "neg":
        return ScalarScaling(0, None, lambda _: -1)
    if name in ("mul", "div") and is_scalar[1]:
        return ScalarScaling(0, 1, (lambda x: x) if name == "mul" else lambda x: 1 / x)
    return ScalarScaling(1, 0, lambda x: x) if name == "mul" and is_scalar[0] else None


def scale_network(network: TensorNetwork, factor: Any, *, base_is_scaled: bool) -> TensorNetwork:
    """Scales a weight by a scalar.

    Args:
        network: Network of the weight.
        factor: Scalar.
        base_is_scaled: Whether the base is multiplied separately. Must be False for a scalar that
            may depend on the adapter (a spectral norm), whose gradient would otherwise need the
            gradient of the full weight; the scalar then becomes a gain.
    """
    factor = jnp.asarray(factor)
    if not base_is_scaled:
        return dataclasses.replace(network, gains=(*network.gains, Operand(factor, ())))
    terms = tuple(
        dataclasses.replace(
            term,
            operands=(
                term.operands[0].map(lambda array: array * factor.astype(array.dtype)),
                *term.operands[1:],
            ),
        )
        for term in network.terms
    )
    return dataclasses.replace(network, terms=terms)


@register_movement_rule("transpose")
def _transpose_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    return network and [
        network.with_axis_groups([network.axis_groups[i] for i in eqn.params["permutation"]])
    ]


@register_movement_rule("reshape")
def _reshape_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    network = networks[0]
    if network is None:
        return None
    permutation = eqn.params["dimensions"] or range(len(network.axis_groups))
    reordered = network.with_axis_groups([network.axis_groups[axis] for axis in permutation])
    return _wrap_network(regroup_axes(reordered, eqn.outvars[0].aval.shape))


def _wrap_network(network: TensorNetwork | None) -> list[TensorNetwork] | None:
    return None if network is None else [network]


def regroup_axes(network: TensorNetwork, shape: Sequence[int]) -> TensorNetwork | None:
    """Regroups the axes of a network into the array axes of another shape.

    An axis is split where an array axis ends inside it. None is returned where the sizes do not
    divide.
    """
    labels = list(network.axes)
    groups: list[tuple[Axis, ...]] = []
    for length in shape:
        group: list[Axis] = []
        while flat_size(group) < length and labels:
            label = labels.pop(0)
            part_size = length // flat_size(group)
            if label.size > part_size:
                if length % flat_size(group) or label.size % part_size or label.is_gathered:
                    return None
                parts = (
                    Axis(part_size, label.weight_axis),
                    Axis(label.size // part_size, label.weight_axis),
                )
                network = network.replace_axis(
                    label,
                    parts,
                    lambda array, axis, parts=parts: array.reshape(
                        *array.shape[:axis], *(p.size for p in parts), *array.shape[axis + 1 :]
                    ),
                )
                label = parts[0]
                labels.insert(0, parts[1])
            group.append(label)
        if flat_size(group) != length:
            return None
        groups.append(tuple(group))
    if flat_size(labels) != 1 or (labels and not groups):
        return None
    if labels:
        # Axes of length one beyond the last array axis are appended to it.
        groups[-1] = (*groups[-1], *labels)
    return network.with_axis_groups(groups)


@register_movement_rule("squeeze")
def _squeeze_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    if network is None:
        return None
    squeezed = {axis % len(network.axis_groups) for axis in eqn.params["dimensions"]}
    return [squeeze_network_axes(network, squeezed)]


def squeeze_network_axes(network: TensorNetwork, axes: set[int]) -> TensorNetwork:
    """Removes array axes of length one."""
    for axis in axes:
        for label in network.axis_groups[axis]:
            network = network.replace_axis(
                label, (), lambda array, position: jnp.squeeze(array, position)
            )
    return network.with_axis_groups(
        [g for axis, g in enumerate(network.axis_groups) if axis not in axes]
    )


@register_movement_rule("broadcast_in_dim")
def _broadcast_in_dim_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    network = networks[0]
    if network is None:
        return None
    source_axes = dict(
        zip(eqn.params["broadcast_dimensions"], range(len(network.axis_groups)), strict=True)
    )
    groups: list[tuple[Axis, ...]] = []
    for axis, length in enumerate(eqn.params["shape"]):
        if axis in source_axes and flat_size(network.axis_groups[source_axes[axis]]) == length:
            groups.append(network.axis_groups[source_axes[axis]])
        else:
            groups.append(() if length == 1 else (Axis(length),))
    repeated = {
        i
        for axis, i in source_axes.items()
        if flat_size(network.axis_groups[i]) != eqn.params["shape"][axis]
    }
    return [squeeze_network_axes(network, repeated).with_axis_groups(groups)]


@register_movement_rule("rev")
def _rev_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    if network is None:
        return None
    for axis in eqn.params["dimensions"]:
        for label in network.axis_groups[axis]:
            network = network.replace_axis(
                label,
                (Axis(label.size, label.weight_axis, label.is_gathered),),
                lambda a, i: jnp.flip(a, i),
            )
    return [network]


@register_movement_rule("slice")
def _slice_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        network = network and slice_network_axis(
            network,
            axis,
            len(range(start, limit, stride)),
            lambda array, position, bounds=(start, limit, stride): lax.slice_in_dim(
                array, *bounds, axis=position
            ),
        )
    return _wrap_network(network)


@register_movement_rule("split")
def _split_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    parts, start = [], 0
    for length in map(int, eqn.params["sizes"]):
        part = network and slice_network_axis(
            network,
            eqn.params["axis"],
            length,
            lambda array, position, bounds=(start, start + length): lax.slice_in_dim(
                array, *bounds, axis=position
            ),
        )
        if part is None:
            return None
        parts.append(part)
        start += length
    return parts


@register_movement_rule("dynamic_slice")
def _dynamic_slice_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    network = networks[0]
    for axis, length in enumerate(eqn.params["slice_sizes"]):
        network = network and slice_network_axis(
            network,
            axis,
            length,
            lambda array, position, start=values[axis + 1], length=length: lax.dynamic_slice_in_dim(
                array, start, length, position
            ),
        )
    return _wrap_network(network)


def slice_network_axis(
    network: TensorNetwork, axis: int, length: int, fn: Callable[[Any, int], Any]
) -> TensorNetwork | None:
    """Slices one array axis of a weight.

    Args:
        network: Network of the weight.
        axis: Array axis of the weight.
        length: Length of the slice.
        fn: Function `fn(array, axis)` that slices an operand along one of its axes.

    Returns:
        The sliced network, or None where several network axes form the array axis: no slice of an
        operand can express this.
    """
    group = network.axis_groups[axis]
    if flat_size(group) == length:
        return network
    # A reshape may have merged axes of length one into this one; the slice is along the other.
    sliced = [label for label in group if label.size > 1] or list(group)
    if len(sliced) != 1:
        return None
    (label,) = sliced
    return network.replace_axis(label, (Axis(length, label.weight_axis, label.is_gathered),), fn)


@register_movement_rule("concatenate")
def _concatenate_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    axis = eqn.params["dimension"]
    lengths = [value.aval.shape[axis] for value in eqn.invars]
    total = sum(lengths)
    present = [network for network in networks if network is not None]
    if any(len(group) != 1 for network in present for group in network.axis_groups):
        return None
    # Axes other than the concatenated one are common to all parts: one set of labels.
    joined_groups: AxisGroups = tuple(
        (
            Axis(
                total if i == axis else label.size,
                label.weight_axis,
                any(network.axis_groups[i][0].is_gathered for network in present),
            ),
        )
        for i, (label,) in enumerate(present[0].axis_groups)
    )
    gains, terms, start = [], [], 0
    for network, length in zip(networks, lengths, strict=True):
        if network is not None:
            (part_label,) = network.axis_groups[axis]
            # Outside this part the gain is one, so it may have the concatenated axis alone.
            if any(gain.axes not in ((), (part_label,)) for gain in network.gains):
                return None
            if not _can_zero_pad(network, part_label):
                return None
            pad_operand = functools.partial(
                _pad_to_joined_axes,
                network=network,
                axes=joined_groups,
                axis=axis,
                around=(start, total - start - length),
            )
            part_gains = [
                gain if gain.axes else Operand(jnp.repeat(gain.array, length), (part_label,))
                for gain in network.gains
            ]
            gains += [pad_operand(gain, fill=1) for gain in part_gains]
            terms += [term.map(functools.partial(pad_operand, fill=0)) for term in network.terms]
        start += length
    return [TensorNetwork(joined_groups, present[0].path, tuple(gains), tuple(terms))]


def _can_zero_pad(network: TensorNetwork, axis: Axis) -> bool:
    """Whether zero padding along an axis makes every term zero there.

    An operand must have the axis, and dropout keys must not, because they cannot be padded.
    """
    return all(
        any(axis in operand.axes for operand in term.operands)
        and (term.dropout is None or axis not in term.dropout.keys.axes)
        for term in network.terms
    )


def _pad_to_joined_axes(
    operand: Operand,
    *,
    network: TensorNetwork,
    axes: AxisGroups,
    axis: int,
    around: tuple[int, int],
    fill: int,
) -> Operand:
    """Pads an operand of one part to the axes of the concatenated weight.

    Args:
        operand: Operand of the part.
        network: Network of the part.
        axes: Axis groups of the concatenated weight.
        axis: Array axis of the concatenation.
        around: Lengths before and after the part.
        fill: Fill value, zero for terms and one for gains.
    """
    joined_by_label = {old: new for (old,), (new,) in zip(network.axis_groups, axes, strict=True)}
    old = network.axis_groups[axis][0]
    widths = [around if label is old else (0, 0) for label in operand.axes]
    array = operand.array
    if any(widths):
        array = jnp.pad(array, widths, constant_values=fill)
    return Operand(array, tuple(joined_by_label.get(label, label) for label in operand.axes))


@register_movement_rule("pad")
def _pad_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    network = networks[0]
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if network is None or min(low, high) < 0 or inner:
            return None
        if not low and not high:
            continue
        if len(network.axis_groups[axis]) != 1:
            return None
        (label,) = network.axis_groups[axis]
        if network.gains or not _can_zero_pad(network, label):
            return None
        network = network.replace_axis(
            label,
            (Axis(low + label.size + high, label.weight_axis, label.is_gathered),),
            lambda array, position, padding=(low, high): jnp.pad(
                array, [padding if i == position else (0, 0) for i in range(array.ndim)]
            ),
        )
    return _wrap_network(network)


@register_movement_rule("gather")
def _gather_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    """Gathers complete rows along some axes (an embedding table, one expert per token)."""
    network, indices = networks[0], values[1]
    dimension_numbers = eqn.params["dimension_numbers"]
    row_axes = dimension_numbers.start_index_map
    if network is None or networks[1] is not None or dimension_numbers.operand_batching_dims:
        return None
    full_sizes = [1 if axis in row_axes else n for axis, n in enumerate(network.shape)]
    if (
        tuple(eqn.params["slice_sizes"]) != tuple(full_sizes)
        or set(dimension_numbers.collapsed_slice_dims) != set(row_axes)
        or any(len(network.axis_groups[axis]) != 1 for axis in row_axes)
        or network.is_gathered
    ):
        return None
    gathered = [network.axis_groups[axis][0] for axis in row_axes]
    out = eqn.outvars[0].aval.shape
    weight_axis = gathered[0].weight_axis
    batch_dims = [axis for axis in range(len(out)) if axis not in dimension_numbers.offset_dims]
    batch_axes = {axis: Axis(out[axis], weight_axis, is_gathered=True) for axis in batch_dims}
    offset_groups = iter(
        group for axis, group in enumerate(network.axis_groups) if axis not in row_axes
    )
    groups = [
        (batch_axes[axis],) if axis in batch_axes else next(offset_groups)
        for axis in range(len(out))
    ]

    drops_out_of_range = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    products = [term.operands for term in network.terms]
    fill_value = eqn.params["fill_value"]
    # A gain leaves a fill value of zero or NaN unchanged, and no other.
    if fill_value is not None and not (fill_value == 0 or np.isnan(fill_value)):
        products += [(gain,) for gain in network.gains]
    if drops_out_of_range and any(
        all(label not in operand.axes for operand in operands)
        for operands in products
        for label in gathered
    ):
        return None  # A row outside the table would get an update or a gain nevertheless.

    def gather_operand(operand: Operand, fill: int) -> Operand:
        columns = [i for i, label in enumerate(gathered) if label in operand.axes]
        if not columns:
            return operand
        gathered_dims = [operand.axes.index(gathered[i]) for i in columns]
        other_dims = [i for i in range(len(operand.axes)) if i not in gathered_dims]
        array = lax.gather(
            operand.array,
            indices[..., jnp.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(batch_dims), len(batch_dims) + len(other_dims))),
                collapsed_slice_dims=tuple(sorted(gathered_dims)),
                start_index_map=tuple(gathered_dims),
            ),
            slice_sizes=[1 if i in gathered_dims else n for i, n in enumerate(operand.array.shape)],
            # A part of the index columns may repeat even where all columns together do not.
            indices_are_sorted=eqn.params["indices_are_sorted"]
            and len(gathered_dims) == len(row_axes),
            unique_indices=eqn.params["unique_indices"] and len(gathered_dims) == len(row_axes),
            mode=eqn.params["mode"],
            fill_value=fill,
        )
        return Operand(array, (*batch_axes.values(), *(operand.axes[i] for i in other_dims)))

    # Rows outside the table are the fill value of the base. (Its NaN in the operands would make the
    # gradient NaN for rows that the model masks.)
    gains = tuple(gather_operand(gain, 1) for gain in network.gains)
    terms = tuple(
        # One key serves all rows: the input of the product, and so the mask, has an axis for them.
        Term(
            tuple(gather_operand(operand, 0) for operand in term.operands),
            term.dropout
            and Dropout(term.dropout.rate, Operand(term.dropout.keys.array.reshape(-1)[0], ())),
            select=term.select,
        )
        for term in network.terms
    )
    return [TensorNetwork(tuple(groups), network.path, gains, terms)]
