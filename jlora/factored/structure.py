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

from jlora.factored.contraction import Atom, Operand, size
from jlora.factored.network import Axes, Dropout, Network, Term

Networks = list[Network | None]
Rule = Callable[[Any, Networks, Sequence[Any]], list[Network] | None]

RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


@rule("copy", "name", "pvary", "reduce_precision", "sharding_constraint", "mesh_cast", "reshard")
def _same(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del eqn, values
    (network,) = networks
    return None if network is None else [network]


@rule("optimization_barrier")
def _barrier(eqn: Any, networks: Networks, values: Sequence[Any]) -> Any:
    del eqn, values
    return networks


@rule("stop_gradient")
def _stop_gradient(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del eqn, values
    (network,) = networks
    return network and [network.map(lambda operand: operand.map(lax.stop_gradient))]


@rule("convert_element_type")
def _convert(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    (network,) = networks
    # Operands keep their type and are cast at the product, so nothing small is rounded twice.
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return [network] if floating and network else None


class Scaling(NamedTuple):
    """An equation that multiplies all of an array by one number.

    Attributes:
        side: Which input is the array.
        number: Which input is the number; None for a negation.
        factor: From the number to what it multiplies by.
    """

    side: int
    number: int | None
    factor: Callable[[Any], Any]


def scaling(eqn: Any) -> Scaling | None:
    """How an equation scales an array; None when it does not."""
    name, scalar = eqn.primitive.name, [value.aval.shape == () for value in eqn.invars]
    if name == "neg":
        return Scaling(0, None, lambda _: -1)
    if name in ("mul", "div") and scalar[1]:
        return Scaling(0, 1, (lambda x: x) if name == "mul" else lambda x: 1 / x)
    return Scaling(1, 0, lambda x: x) if name == "mul" and scalar[0] else None


def scaled(network: Network, factor: Any, *, base_too: bool) -> Network:
    """The network of the weight times a number.

    With `base_too` the base has been multiplied already. Where the number may depend on the adapter
    (a spectral norm) it must not be: the number's gradient would then need the gradient of the full
    weight.
    """
    factor = jnp.asarray(factor)
    if not base_too:
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


@rule("transpose")
def _transpose(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    (network,) = networks
    return network and [network.with_axes([network.axes[i] for i in eqn.params["permutation"]])]


@rule("reshape")
def _reshape(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    network = networks[0]
    if network is None:
        return None
    order = eqn.params["dimensions"] or range(len(network.axes))
    moved = network.with_axes([network.axes[axis] for axis in order])
    return _one(regroup(moved, eqn.outvars[0].aval.shape))


def _one(network: Network | None) -> list[Network] | None:
    return None if network is None else [network]


def regroup(network: Network, shape: Sequence[int]) -> Network | None:
    """The network with its atoms grouped into axes of these sizes, splitting atoms where an axis
    ends inside one; None where no whole atom fits.
    """
    atoms = list(network.atoms)
    axes: list[tuple[Atom, ...]] = []
    for length in shape:
        group: list[Atom] = []
        while size(group) < length and atoms:
            atom = atoms.pop(0)
            wanted = length // size(group)
            if atom.size > wanted:
                if length % size(group) or atom.size % wanted or atom.indexed:
                    return None
                parts = (Atom(wanted, atom.root), Atom(atom.size // wanted, atom.root))
                network = network.replace_atom(
                    atom,
                    parts,
                    lambda array, axis, parts=parts: array.reshape(
                        *array.shape[:axis], *(p.size for p in parts), *array.shape[axis + 1 :]
                    ),
                )
                atom = parts[0]
                atoms.insert(0, parts[1])
            group.append(atom)
        if size(group) != length:
            return None
        axes.append(tuple(group))
    if size(atoms) != 1 or (atoms and not axes):
        return None
    if atoms:
        # Axes of length one that no new axis asked for ride along with the last.
        axes[-1] = (*axes[-1], *atoms)
    return network.with_axes(axes)


@rule("squeeze")
def _squeeze(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    (network,) = networks
    if network is None:
        return None
    dropped = {axis % len(network.axes) for axis in eqn.params["dimensions"]}
    return [drop(network, dropped)]


def drop(network: Network, dropped: set[int]) -> Network:
    """The network without these axes of length one."""
    for axis in dropped:
        for atom in network.axes[axis]:
            network = network.replace_atom(atom, (), lambda array, place: jnp.squeeze(array, place))
    return network.with_axes([g for axis, g in enumerate(network.axes) if axis not in dropped])


@rule("broadcast_in_dim")
def _broadcast(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    network = networks[0]
    if network is None:
        return None
    source = dict(zip(eqn.params["broadcast_dimensions"], range(len(network.axes)), strict=True))
    axes: list[tuple[Atom, ...]] = []
    for axis, length in enumerate(eqn.params["shape"]):
        if axis in source and size(network.axes[source[axis]]) == length:
            axes.append(network.axes[source[axis]])
        else:
            axes.append(() if length == 1 else (Atom(length),))
    stretched = {
        i for axis, i in source.items() if size(network.axes[i]) != eqn.params["shape"][axis]
    }
    return [drop(network, stretched).with_axes(axes)]


@rule("rev")
def _reverse(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    (network,) = networks
    if network is None:
        return None
    for axis in eqn.params["dimensions"]:
        for atom in network.axes[axis]:
            network = network.replace_atom(
                atom, (Atom(atom.size, atom.root, atom.indexed),), lambda a, i: jnp.flip(a, i)
            )
    return [network]


@rule("slice")
def _slice(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    (network,) = networks
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        network = network and cut(
            network,
            axis,
            len(range(start, limit, stride)),
            lambda array, place, kept=(start, limit, stride): lax.slice_in_dim(
                array, *kept, axis=place
            ),
        )
    return _one(network)


@rule("split")
def _split(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    del values
    (network,) = networks
    parts, start = [], 0
    for length in map(int, eqn.params["sizes"]):
        part = network and cut(
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


@rule("dynamic_slice")
def _dynamic_slice(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    network = networks[0]
    for axis, length in enumerate(eqn.params["slice_sizes"]):
        network = network and cut(
            network,
            axis,
            length,
            lambda array, place, start=values[axis + 1], length=length: lax.dynamic_slice_in_dim(
                array, start, length, place
            ),
        )
    return _one(network)


def cut(network: Network, axis: int, length: int, fn: Callable[[Any, int], Any]) -> Network | None:
    """The network with `length` entries of one axis kept by `fn(array, axis)`; None where the
    axis is several atoms, which no slice of one operand can express.
    """
    group = network.axes[axis]
    if size(group) == length:
        return network
    # Axes of length one that a reshape merged into this one are not what is cut.
    longer = [atom for atom in group if atom.size > 1] or list(group)
    if len(longer) != 1:
        return None
    (atom,) = longer
    return network.replace_atom(atom, (Atom(length, atom.root, atom.indexed),), fn)


@rule("concatenate")
def _concatenate(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    axis = eqn.params["dimension"]
    lengths = [value.aval.shape[axis] for value in eqn.invars]
    total = sum(lengths)
    present = [network for network in networks if network is not None]
    if any(len(group) != 1 for network in present for group in network.axes):
        return None
    # Entries other than the joined axis's are the same places in every part: one set of atoms.
    joined: Axes = tuple(
        (
            Atom(
                total if i == axis else atom.size,
                atom.root,
                any(network.axes[i][0].indexed for network in present),
            ),
        )
        for i, (atom,) in enumerate(present[0].axes)
    )
    gains, terms, start = [], [], 0
    for network, length in zip(networks, lengths, strict=True):
        if network is not None:
            (place,) = network.axes[axis]
            # Beside this part a gain is one, so it must lie along the joined axis alone.
            if any(gain.atoms not in ((), (place,)) for gain in network.gains):
                return None
            if not _ends(network, place):
                return None
            moved = functools.partial(
                _pad,
                network=network,
                axes=joined,
                axis=axis,
                around=(start, total - start - length),
            )
            along = [
                gain if gain.atoms else Operand(jnp.repeat(gain.array, length), (place,))
                for gain in network.gains
            ]
            gains += [moved(gain, fill=1) for gain in along]
            terms += [term.map(functools.partial(moved, fill=0)) for term in network.terms]
        start += length
    return [Network(joined, present[0].path, tuple(gains), tuple(terms))]


def _ends(network: Network, atom: Atom) -> bool:
    """Whether every term can be made zero beyond this atom: an operand must hold it, and no random
    keys, which cannot be padded.
    """
    return all(
        any(atom in operand.atoms for operand in term.operands)
        and (term.dropout is None or atom not in term.dropout.keys.atoms)
        for term in network.terms
    )


def _pad(
    operand: Operand, *, network: Network, axes: Axes, axis: int, around: tuple[int, int], fill: int
) -> Operand:
    """The operand in the joined weight's atoms, filled where other parts of it lie."""
    renamed = {old: new for (old,), (new,) in zip(network.axes, axes, strict=True)}
    old = network.axes[axis][0]
    widths = [around if atom is old else (0, 0) for atom in operand.atoms]
    array = operand.array
    if any(widths):
        array = jnp.pad(array, widths, constant_values=fill)
    return Operand(array, tuple(renamed.get(atom, atom) for atom in operand.atoms))


@rule("pad")
def _pad_edges(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
    network = networks[0]
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if network is None or min(low, high) < 0 or inner:
            return None
        if not low and not high:
            continue
        if len(network.axes[axis]) != 1:
            return None
        (atom,) = network.axes[axis]
        if network.gains or not _ends(network, atom):
            return None
        network = network.replace_atom(
            atom,
            (Atom(low + atom.size + high, atom.root, atom.indexed),),
            lambda array, place, edges=(low, high): jnp.pad(
                array, [edges if i == place else (0, 0) for i in range(array.ndim)]
            ),
        )
    return _one(network)


@rule("gather")
def _gather(eqn: Any, networks: Networks, values: Sequence[Any]) -> list[Network] | None:
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
        or any(len(network.axes[axis]) != 1 for axis in rows)
        or network.indexed
    ):
        return None
    looked_up = [network.axes[axis][0] for axis in rows]
    out = eqn.outvars[0].aval.shape
    root = looked_up[0].root
    places = [axis for axis in range(len(out)) if axis not in numbers.offset_dims]
    batch = {axis: Atom(out[axis], root, indexed=True) for axis in places}
    offsets = iter(group for axis, group in enumerate(network.axes) if axis not in rows)
    axes = [(batch[axis],) if axis in batch else next(offsets) for axis in range(len(out))]

    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    products = [term.operands for term in network.terms]
    filling = eqn.params["fill_value"]
    if filling is not None and not (filling == 0 or np.isnan(filling)):  # A gain changes others.
        products += [(gain,) for gain in network.gains]
    if fills and any(
        all(atom not in operand.atoms for operand in operands)
        for operands in products
        for atom in looked_up
    ):
        return None  # A row outside the table would get an update, or a gain, all the same.

    def look_up(operand: Operand, fill: int) -> Operand:
        columns = [i for i, atom in enumerate(looked_up) if atom in operand.atoms]
        if not columns:
            return operand
        own = [operand.atoms.index(looked_up[i]) for i in columns]
        kept = [i for i in range(len(operand.atoms)) if i not in own]
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
        return Operand(array, (*batch.values(), *(operand.atoms[i] for i in kept)))

    # Rows outside the table are the base's filling alone. (Filling operands with its NaN would also
    # put NaN into the gradient of rows that the model masks.)
    gains = tuple(look_up(gain, 1) for gain in network.gains)
    terms = tuple(
        # One key serves all rows: what they multiply has an axis for them, and so a mask for each.
        Term(
            tuple(look_up(operand, 0) for operand in term.operands),
            term.dropout
            and Dropout(term.dropout.rate, Operand(term.dropout.keys.array.reshape(-1)[0], ())),
            pick=term.pick,
        )
        for term in network.terms
    )
    return [Network(tuple(axes), network.path, gains, terms)]
