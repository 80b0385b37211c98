"""Equations that move a weight's entries about, as the same moves on its network.

A rule takes an equation, the networks of its inputs (None for plain arrays) and the inputs, and
returns the networks of its outputs, or None where the move cannot be made on the operands.
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
    # Operands keep their type and are cast at the product, so nothing small is rounded twice.
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return [network] if floating and network else None


class ScalarScaling(NamedTuple):
    """An equation that multiplies all of an array by one number.

    Attributes:
        array_side: Which input is the array.
        scalar_side: Which input is the number; None for a negation.
        factor_fn: From the number to what it multiplies by.
    """

    array_side: int
    scalar_side: int | None
    factor_fn: Callable[[Any], Any]


def match_scalar_scaling(eqn: Any) -> ScalarScaling | None:
    """How an equation scales an array; None when it does not."""
    name, scalar = eqn.primitive.name, [value.aval.shape == () for value in eqn.invars]
    if name == "neg":
        return ScalarScaling(0, None, lambda _: -1)
    if name in ("mul", "div") and scalar[1]:
        return ScalarScaling(0, 1, (lambda x: x) if name == "mul" else lambda x: 1 / x)
    return ScalarScaling(1, 0, lambda x: x) if name == "mul" and scalar[0] else None


def scale_network(network: TensorNetwork, factor: Any, *, base_is_scaled: bool) -> TensorNetwork:
    """The network of the weight times a number.

    With `base_is_scaled` the base has been multiplied already. Where the number may depend on the adapter
    (a spectral norm) it must not be: the number's gradient would then need the gradient of the full
    weight.
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
    order = eqn.params["dimensions"] or range(len(network.axis_groups))
    moved = network.with_axis_groups([network.axis_groups[axis] for axis in order])
    return _wrap_network(regroup_axes(moved, eqn.outvars[0].aval.shape))


def _wrap_network(network: TensorNetwork | None) -> list[TensorNetwork] | None:
    return None if network is None else [network]


def regroup_axes(network: TensorNetwork, shape: Sequence[int]) -> TensorNetwork | None:
    """The network with its atoms grouped into axes of these sizes, splitting atoms where an axis
    ends inside one; None where no whole atom fits.
    """
    atoms = list(network.axes)
    axes: list[tuple[Axis, ...]] = []
    for length in shape:
        group: list[Axis] = []
        while flat_size(group) < length and atoms:
            atom = atoms.pop(0)
            wanted = length // flat_size(group)
            if atom.size > wanted:
                if length % flat_size(group) or atom.size % wanted or atom.is_gathered:
                    return None
                parts = (
                    Axis(wanted, atom.weight_axis),
                    Axis(atom.size // wanted, atom.weight_axis),
                )
                network = network.replace_axis(
                    atom,
                    parts,
                    lambda array, axis, parts=parts: array.reshape(
                        *array.shape[:axis], *(p.size for p in parts), *array.shape[axis + 1 :]
                    ),
                )
                atom = parts[0]
                atoms.insert(0, parts[1])
            group.append(atom)
        if flat_size(group) != length:
            return None
        axes.append(tuple(group))
    if flat_size(atoms) != 1 or (atoms and not axes):
        return None
    if atoms:
        # Axes of length one that no new axis asked for ride along with the last.
        axes[-1] = (*axes[-1], *atoms)
    return network.with_axis_groups(axes)


@register_movement_rule("squeeze")
def _squeeze_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    if network is None:
        return None
    dropped = {axis % len(network.axis_groups) for axis in eqn.params["dimensions"]}
    return [squeeze_network_axes(network, dropped)]


def squeeze_network_axes(network: TensorNetwork, axes: set[int]) -> TensorNetwork:
    """The network without these axes of length one."""
    for axis in axes:
        for atom in network.axis_groups[axis]:
            network = network.replace_axis(atom, (), lambda array, place: jnp.squeeze(array, place))
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
    source = dict(
        zip(eqn.params["broadcast_dimensions"], range(len(network.axis_groups)), strict=True)
    )
    axes: list[tuple[Axis, ...]] = []
    for axis, length in enumerate(eqn.params["shape"]):
        if axis in source and flat_size(network.axis_groups[source[axis]]) == length:
            axes.append(network.axis_groups[source[axis]])
        else:
            axes.append(() if length == 1 else (Axis(length),))
    stretched = {
        i
        for axis, i in source.items()
        if flat_size(network.axis_groups[i]) != eqn.params["shape"][axis]
    }
    return [squeeze_network_axes(network, stretched).with_axis_groups(axes)]


@register_movement_rule("rev")
def _rev_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    del values
    (network,) = networks
    if network is None:
        return None
    for axis in eqn.params["dimensions"]:
        for atom in network.axis_groups[axis]:
            network = network.replace_axis(
                atom,
                (Axis(atom.size, atom.weight_axis, atom.is_gathered),),
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
            lambda array, place, kept=(start, limit, stride): lax.slice_in_dim(
                array, *kept, axis=place
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
            lambda array, place, kept=(start, start + length): lax.slice_in_dim(
                array, *kept, axis=place
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
            lambda array, place, start=values[axis + 1], length=length: lax.dynamic_slice_in_dim(
                array, start, length, place
            ),
        )
    return _wrap_network(network)


def slice_network_axis(
    network: TensorNetwork, axis: int, length: int, fn: Callable[[Any, int], Any]
) -> TensorNetwork | None:
    """The network with `length` entries of one axis kept by `fn(array, axis)`; None where the
    axis is several atoms, which no slice of one operand can express.
    """
    group = network.axis_groups[axis]
    if flat_size(group) == length:
        return network
    # Axes of length one that a reshape merged into this one are not what is cut.
    longer = [atom for atom in group if atom.size > 1] or list(group)
    if len(longer) != 1:
        return None
    (atom,) = longer
    return network.replace_axis(atom, (Axis(length, atom.weight_axis, atom.is_gathered),), fn)


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
    # Entries other than the joined axis's are the same places in every part: one set of atoms.
    joined: AxisGroups = tuple(
        (
            Axis(
                total if i == axis else atom.size,
                atom.weight_axis,
                any(network.axis_groups[i][0].is_gathered for network in present),
            ),
        )
        for i, (atom,) in enumerate(present[0].axis_groups)
    )
    gains, terms, start = [], [], 0
    for network, length in zip(networks, lengths, strict=True):
        if network is not None:
            (place,) = network.axis_groups[axis]
            # Beside this part a gain is one, so it must lie along the joined axis alone.
            if any(gain.axes not in ((), (place,)) for gain in network.gains):
                return None
            if not _can_zero_pad(network, place):
                return None
            moved = functools.partial(
                _pad_to_joined_axes,
                network=network,
                axes=joined,
                axis=axis,
                around=(start, total - start - length),
            )
            along = [
                gain if gain.axes else Operand(jnp.repeat(gain.array, length), (place,))
                for gain in network.gains
            ]
            gains += [moved(gain, fill=1) for gain in along]
            terms += [term.map(functools.partial(moved, fill=0)) for term in network.terms]
        start += length
    return [TensorNetwork(joined, present[0].path, tuple(gains), tuple(terms))]


def _can_zero_pad(network: TensorNetwork, axis: Axis) -> bool:
    """Whether every term can be made zero beyond this atom: an operand must hold it, and no random
    keys, which cannot be padded.
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
    """The operand in the joined weight's atoms, filled where other parts of it lie."""
    renamed = {old: new for (old,), (new,) in zip(network.axis_groups, axes, strict=True)}
    old = network.axis_groups[axis][0]
    widths = [around if atom is old else (0, 0) for atom in operand.axes]
    array = operand.array
    if any(widths):
        array = jnp.pad(array, widths, constant_values=fill)
    return Operand(array, tuple(renamed.get(atom, atom) for atom in operand.axes))


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
        (atom,) = network.axis_groups[axis]
        if network.gains or not _can_zero_pad(network, atom):
            return None
        network = network.replace_axis(
            atom,
            (Axis(low + atom.size + high, atom.weight_axis, atom.is_gathered),),
            lambda array, place, edges=(low, high): jnp.pad(
                array, [edges if i == place else (0, 0) for i in range(array.ndim)]
            ),
        )
    return _wrap_network(network)


@register_movement_rule("gather")
def _gather_rule(
    eqn: Any, networks: OptionalNetworks, values: Sequence[Any]
) -> list[TensorNetwork] | None:
    """Whole rows looked up along some axes (an embedding table, one expert per token)."""
    network, indices = networks[0], values[1]
    numbers = eqn.params["dimension_numbers"]
    rows = numbers.start_index_map
    if network is None or networks[1] is not None or numbers.operand_batching_dims:
        return None
    whole = [1 if axis in rows else n for axis, n in enumerate(network.shape)]
    if (
        tuple(eqn.params["slice_sizes"]) != tuple(whole)
        or set(numbers.collapsed_slice_dims) != set(rows)
        or any(len(network.axis_groups[axis]) != 1 for axis in rows)
        or network.is_gathered
    ):
        return None
    looked_up = [network.axis_groups[axis][0] for axis in rows]
    out = eqn.outvars[0].aval.shape
    root = looked_up[0].weight_axis
    places = [axis for axis in range(len(out)) if axis not in numbers.offset_dims]
    batch = {axis: Axis(out[axis], root, is_gathered=True) for axis in places}
    offsets = iter(group for axis, group in enumerate(network.axis_groups) if axis not in rows)
    axes = [(batch[axis],) if axis in batch else next(offsets) for axis in range(len(out))]

    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    products = [term.operands for term in network.terms]
    filling = eqn.params["fill_value"]
    if filling is not None and not (filling == 0 or np.isnan(filling)):  # A gain changes others.
        products += [(gain,) for gain in network.gains]
    if fills and any(
        all(atom not in operand.axes for operand in operands)
        for operands in products
        for atom in looked_up
    ):
        return None  # A row outside the table would get an update, or a gain, all the same.

    def look_up(operand: Operand, fill: int) -> Operand:
        columns = [i for i, atom in enumerate(looked_up) if atom in operand.axes]
        if not columns:
            return operand
        own = [operand.axes.index(looked_up[i]) for i in columns]
        kept = [i for i in range(len(operand.axes)) if i not in own]
        array = lax.gather(
            operand.array,
            indices[..., jnp.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(places), len(places) + len(kept))),
                collapsed_slice_dims=tuple(sorted(own)),
                start_index_map=tuple(own),
            ),
            slice_sizes=[1 if i in own else n for i, n in enumerate(operand.array.shape)],
            # Some columns alone may repeat where all of them did not.
            indices_are_sorted=eqn.params["indices_are_sorted"] and len(own) == len(rows),
            unique_indices=eqn.params["unique_indices"] and len(own) == len(rows),
            mode=eqn.params["mode"],
            fill_value=fill,
        )
        return Operand(array, (*batch.values(), *(operand.axes[i] for i in kept)))

    # Rows outside the table are the base's filling alone. (Filling operands with its NaN would also
    # put NaN into the gradient of rows that the model masks.)
    gains = tuple(look_up(gain, 1) for gain in network.gains)
    terms = tuple(
        # One key serves all rows: what they multiply has an axis for them, and so a mask for each.
        Term(
            tuple(look_up(operand, 0) for operand in term.operands),
            term.dropout
            and Dropout(term.dropout.rate, Operand(term.dropout.keys.array.reshape(-1)[0], ())),
            select=term.select,
        )
        for term in network.terms
    )
    return [TensorNetwork(tuple(axes), network.path, gains, terms)]
