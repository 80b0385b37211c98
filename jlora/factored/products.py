"""Equations in which a weight meets an activation: the products that stay factored.

Every product has two functions. `roles` says what each atom of the weight does there (the probe
asks it), or why the product cannot be made from the operands. `multiply` makes it: the base's own
equation, plus `(x A) B` for every term, times the gains.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jlora.factored import balance, releases
from jlora.factored.network import (
    Atom,
    Factored,
    Gate,
    Network,
    Operand,
    Term,
    absorption,
    contract,
    expand,
    fused,
    size,
)

# What a gain nearer to zero is taken for, so that a product can be divided by it.
_LEAST_GAIN = 2.0**-60


class Role(enum.Enum):
    """What an axis of a weight does in a product."""

    INPUT = "input"  # Contracted with the activation.
    WINDOW = "window"  # Contracted too, while a convolution slides over it.
    OUTPUT = "output"  # Appears in the result.
    BATCH = "batch"  # Pairs off with an axis of the activation: one matrix for each index.


class Dense(str):
    """Why a use of a weight needs the dense sum."""


Roles = dict[Atom, Role]


def mixes(network: Network, roles: Roles) -> bool:
    """Whether a gain runs along what is summed over and along what is not, or along a window: then
    neither the activation nor the result can be scaled by it.
    """
    for gain in network.gains:
        along = {roles[atom] for atom in gain.atoms} - {Role.BATCH}
        if along - {Role.OUTPUT} and along - {Role.INPUT}:
            return True
    return False


class Product(NamedTuple):
    """How one primitive multiplies with a weight.

    Attributes:
        roles: `(eqn, side, network)` to the roles of the network's atoms, or why not.
        multiply: `(eqn, bind, side, values)` to the result; `values[side]` is the factored weight.
    """

    roles: Callable[[Any, int, Network], Roles | Dense]
    multiply: Callable[[Any, Callable[..., Any], int, Sequence[Any]], Any]


def side_of(eqn: Any, networks: Sequence[Network | None]) -> int | None:
    """Which input of the product is treated as the weight: the one that is not itself looked up."""
    sides = [side for side, network in enumerate(networks) if network is not None]
    return min(sides, key=lambda side: networks[side].indexed) if sides else None  # type: ignore


def _labelled(shape: Sequence[int], groups: dict[int, tuple[Atom, ...]]) -> list[tuple[Atom, ...]]:
    """Groups of atoms for an activation's axes: those it shares with the weight, or a new atom."""
    return [groups.get(axis, (Atom(length),)) for axis, length in enumerate(shape)]


def _split_axes(array: Any, groups: Sequence[tuple[Atom, ...]]) -> Operand:
    atoms = tuple(atom for group in groups for atom in group)
    return Operand(array.reshape([atom.size for atom in atoms]), atoms)


def _add_terms(
    base: Any,
    factored: Factored,
    x: Operand,
    out: Sequence[Atom],
    precision: Any,
) -> Any:
    """`base` plus the products of `x` with every term, where `out` are the result's atoms."""
    total = base
    for use, term in enumerate(factored.network.terms):
        operands = list(term.operands)
        if term.gate is not None:
            gate = _gate_weights(term.gate, x, out, factored.network.path, precision)
            operands.append(gate)
        dropped = x if term.dropout is None else x.map(functools.partial(term.dropout, use=use))
        update = contract(dropped, operands, out, precision=precision, out_dtype=base.dtype)
        total = total + update.reshape(base.shape)
    return total


def _gate_weights(
    gate: Gate, x: Operand, out: Sequence[Atom], path: str, precision: Any
) -> Operand:
    """The weight of every choice for every input, and its load-balancing loss handed on.

    The softmax is over the `top_k` best scores alone. The loss is
    `n sum_e (share of inputs that keep e) (mean probability of e)`, one where all are used alike.

    References:
        Jiang et al., Mixtral of Experts, arXiv:2401.04088, section 2.1, for the weights.
        Fedus et al., Switch Transformers, arXiv:2101.03961, section 2.2, for the loss.
    """
    tokens = [atom for atom in x.atoms if atom in out]
    met = [atom for atom in gate.router.atoms if atom in x.atoms and atom not in out]
    unmet = set(gate.router.atoms) - set(x.atoms) - {gate.choices}
    if unmet or size(met) != gate.fan_in:
        raise ValueError(
            f"The mixture on {path!r} meets {size(met)} of the {gate.fan_in} numbers of an input "
            f"at one of its uses (of a part of the weight, its transpose, or a shard), and its "
            f"router has to see all of them. Leave this weight out of the rule."
        )
    router = gate.router.map(lambda array: array.astype(jnp.float32))
    wide = x.map(lambda array: array.astype(jnp.float32))
    scores = contract(wide, [router], [*tokens, gate.choices], precision=precision)
    count = gate.choices.size
    _, best = lax.top_k(scores, gate.top_k)
    kept = jax.nn.one_hot(best, count, dtype=bool).any(-2)
    weights = jax.nn.softmax(scores, axis=-1, where=kept)
    # Each of a stack of matrices has a balance of its own.
    axes = tuple(i for i, atom in enumerate(tokens) if atom not in gate.router.atoms)
    share = lax.stop_gradient(kept.astype(jnp.float32).mean(axes)) / gate.top_k
    balance.add([count * jnp.sum(share * jax.nn.softmax(scores, -1).mean(axes))])
    return Operand(weights, (*tokens, gate.choices))


def _scaled(array: Any, gain: Operand, groups: Sequence[tuple[Atom, ...]]) -> Any:
    """The array, whose axes are these groups, times a gain along some of them.

    The product is made in float32 or wider: a gain that differs little from one would be one in a
    narrow type.
    """
    held = [group for group in groups if set(group) & set(gain.atoms)]
    factor = contract(gain, (), [atom for group in held for atom in group])
    factor = factor.reshape([size(group) if group in held else 1 for group in groups])
    factor = factor.astype(jnp.promote_types(array.dtype, jnp.float32))
    if jnp.finfo(array.dtype).tiny > _LEAST_GAIN:
        return (array.astype(factor.dtype) * factor).astype(array.dtype)
    away = jnp.where(factor < 0, -_LEAST_GAIN, _LEAST_GAIN)
    moved = jnp.where(jnp.abs(factor) < _LEAST_GAIN, away - factor, 0)
    return _times(array, factor + lax.stop_gradient(moved))


@jax.custom_jvp
def _times(array: Any, factor: Any) -> Any:
    """The array times a factor of a type no narrower."""
    return (array.astype(factor.dtype) * factor).astype(array.dtype)


@functools.partial(_times.defjvp, symbolic_zeros=True)
def _times_jvp(primals: Any, tangents: Any) -> Any:
    array, factor = primals
    moved, turned = tangents
    result = _times(array, factor)
    total = None
    if not isinstance(moved, SymbolicZero):
        total = _times(moved, factor)
    if not isinstance(turned, SymbolicZero):
        part = _turned(result, factor, turned)
        total = part if total is None else total + part
    return result, total


# What is kept for the gradient are the arguments, and nothing wider that is made from them.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _turned(result: Any, factor: Any, turn: Any) -> Any:
    """What a change of the factor does, from `_times`' result: that is kept for the gradient of
    what comes next anyway, and so a step need not keep the array too. Only second derivatives lose
    by it: as many digits as the factor is below one.
    """
    return (result.astype(factor.dtype) * (turn / factor)).astype(result.dtype)


def _observed(x: Operand, network: Network, inputs: Sequence[Atom]) -> Any:
    """The activation, whose backward pass hands its moments to the network's observed arrays.

    Those are the count of inputs, their sum, and the sum of their outer products, for each of the
    weight's matrices. What reaches them is no derivative of anything.
    """
    count, first, second = network.observed
    ordered = [atom for atom in first.atoms if atom in inputs]
    if size(ordered) ** 2 * count.array.size != second.array.size:
        raise ValueError(
            f"The moments of the inputs of {network.path!r} cannot be taken: one of its uses meets "
            f"a part of them, or others (its transpose). Leave it out of the rules."
        )
    matrices = [atom for atom in first.atoms if atom in x.atoms and atom not in inputs]
    tokens = [atom for atom in x.atoms if atom not in (*matrices, *inputs)]

    @jax.custom_vjp
    def meet(array: Any, sums: list[Any]) -> Any:
        del sums
        return array

    def backward(array: Any, cotangent: Any) -> tuple[Any, list[Any]]:
        rows = contract(Operand(array, x.atoms), (), [*matrices, *tokens, *ordered])
        rows = rows.reshape(size(matrices), size(tokens), size(ordered)).astype(jnp.float32)
        outer = jnp.einsum("bti,btj->bij", rows, rows, precision=lax.Precision.HIGHEST)
        # A one for each input, made from it so that it varies over the same shards.
        ones = jnp.where(rows[:, :, 0] == 0, 1.0, 1.0)
        sums = [ones.sum(1), rows.sum(1), outer]
        axes = releases.varying(rows)
        if axes:
            sums = lax.psum(sums, axes)
        shaped = [
            value.reshape(operand.array.shape).astype(operand.array.dtype)
            for value, operand in zip(sums, network.observed, strict=True)
        ]
        return cotangent, shaped

    meet.defvjp(lambda array, sums: (array, array), backward)
    return meet(x.array, [operand.array for operand in network.observed])


def _product_dtype(x: Any, base: Any, result: Any) -> Any:
    """The type to multiply in: the operands' own, unless they differ or are of 8 bits, which are
    scaled for the base and not for the factors.
    """
    if x.dtype == base.dtype and x.dtype.itemsize > 1:
        return x.dtype
    if min(x.dtype.itemsize, base.dtype.itemsize) > 1:
        return max((x.dtype, base.dtype), key=lambda dtype: dtype.itemsize)
    return result.dtype


def _with_gains(
    gains: Sequence[Operand],
    x: Any,
    x_groups: Sequence[tuple[Atom, ...]],
    out_groups: Sequence[tuple[Atom, ...]],
    product: Callable[[Any], Any],
) -> Any:
    """What `product` makes of `x`, with every gain on the result, or on `x` where it runs along
    what is summed over.
    """
    out_atoms = {atom for group in out_groups for atom in group}
    after = [gain for gain in gains if set(gain.atoms) <= out_atoms]
    for gain in gains:
        if not set(gain.atoms) <= out_atoms:
            x = _scaled(x, gain, x_groups)
    result = product(x)
    for gain in after:
        result = _scaled(result, gain, out_groups)
    return result


# --- dot_general ---------------------------------------------------------------------------------


def _dot_sides(eqn: Any, side: int) -> tuple[tuple[int, ...], ...]:
    """(weight's contracting, weight's batch, other's contracting, other's batch) axes."""
    contracting, batch = eqn.params["dimension_numbers"]
    return contracting[side], batch[side], contracting[1 - side], batch[1 - side]


def _dot_roles(eqn: Any, side: int, network: Network) -> Roles | Dense:
    contracting, batch, _, _ = _dot_sides(eqn, side)
    roles = {}
    for axis, group in enumerate(network.axes):
        role = Role.INPUT if axis in contracting else Role.BATCH if axis in batch else Role.OUTPUT
        roles.update(dict.fromkeys(group, role))
    if any(atom.indexed and role is not Role.BATCH for atom, role in roles.items()):
        return Dense("looked-up rows, which are an activation")
    if not jnp.issubdtype(eqn.invars[1 - side].aval.dtype, jnp.floating):
        return Dense(f"product with {eqn.invars[1 - side].aval.dtype}")
    return roles


def _dot(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    factored, x = values[side], values[1 - side]
    network: Network = factored.network
    contracting, batch, x_contracting, x_batch = _dot_sides(eqn, side)
    shared = dict(zip(x_contracting, contracting, strict=True)) | dict(
        zip(x_batch, batch, strict=True)
    )
    groups = _labelled(
        eqn.invars[1 - side].aval.shape, {i: network.axes[w] for i, w in shared.items()}
    )
    free = [group for axis, group in enumerate(groups) if axis not in shared]
    own = [g for axis, g in enumerate(network.axes) if axis not in (*contracting, *batch)]
    lhs_free, rhs_free = (own, free) if side == 0 else (free, own)
    out_groups = [*(network.axes[axis] for axis in batch), *lhs_free, *rhs_free]

    out = [atom for group in out_groups for atom in group]

    def product(x: Any) -> Any:
        result = bind(factored.base, x) if side == 0 else bind(x, factored.base)
        x = jnp.asarray(x).astype(_product_dtype(x, factored.base, result))
        return _add_terms(result, factored, _split_axes(x, groups), out, eqn.params["precision"])

    if network.observed:
        contracted = [atom for axis in x_contracting for atom in groups[axis]]
        x = _observed(_split_axes(jnp.asarray(x), groups), network, contracted).reshape(x.shape)
    return _with_gains(network.gains, x, groups, out_groups, product)


# --- ragged_dot ----------------------------------------------------------------------------------

# One weight matrix for each group of rows: lhs (m, k), rhs (groups, k, n).
_RAGGED = ((((1,), (1,)), ((), ())), (0,), (0,))


def _ragged_roles(eqn: Any, side: int, network: Network) -> Roles | Dense:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    form = (
        (tuple(map(tuple, contracting)), tuple(map(tuple, batch))),
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    if side != 1 or form != _RAGGED or eqn.params["group_offset"] is not None or network.indexed:
        return Dense("ragged product of another form than (rows, in) x (groups, in, out)")
    group, inputs, outputs = network.axes
    return (
        dict.fromkeys(group, Role.BATCH)
        | dict.fromkeys(inputs, Role.INPUT)
        | dict.fromkeys(outputs, Role.OUTPUT)
    )


def _ragged(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    """Rows times the matrix of their group, one operand of a term after another."""
    x, factored, group_sizes = values
    network: Network = factored.network
    if any(term.gate is not None for term in network.terms):
        raise ValueError(
            f"The mixture on {network.path!r} cannot be used by lax.ragged_dot, whose rows have "
            f"experts already. Leave this weight out of the rule."
        )
    form = _GroupedRows(network, x.shape[0], group_sizes, eqn.params["precision"])

    def product(x: Any) -> Any:
        total = bind(x, factored.base, group_sizes)
        for use, term in enumerate(network.terms):
            rows = x if term.dropout is None else term.dropout(x, use)
            total = total + form.update(rows, term, total.dtype).reshape(total.shape)
        return total

    gains = [form.by_row(gain) for gain in network.gains]
    x_groups, out_groups = [(form.row,), form.inputs], [(form.row,), form.outputs]
    return _with_gains(gains, x, x_groups, out_groups, product)


class _GroupedRows:
    """The products of rows, sorted by group, with the terms of a stack of one matrix per group."""

    def __init__(self, network: Network, rows: int, group_sizes: Any, precision: Any) -> None:
        self.row = Atom(rows)
        self._group, self.inputs, self.outputs = network.axes
        self._group_sizes = group_sizes
        self._precision = precision

    @functools.cached_property
    def _group_of_row(self) -> Any:
        # Rows of no group get the last, and what they meet is made zero.
        numbers = jnp.arange(size(self._group))
        return jnp.repeat(numbers, self._group_sizes, total_repeat_length=self.row.size)

    def _is_grouped(self, operand: Operand) -> bool:
        return bool(set(self._group) & set(operand.atoms))

    def _stacked(self, operand: Operand, *groups: Sequence[Atom]) -> Any:
        """The operand with its groups first, and one axis for each of these lists of atoms."""
        array = contract(operand, (), [*self._group, *(atom for atoms in groups for atom in atoms)])
        return array.reshape(size(self._group), *(size(atoms) for atoms in groups))

    def by_row(self, operand: Operand) -> Operand:
        """The operand with its entries for each row's group."""
        if not self._is_grouped(operand):
            return operand
        rest = [atom for atom in operand.atoms if atom not in self._group]
        array = self._stacked(operand, *([atom] for atom in rest))
        return Operand(array[self._group_of_row], (self.row, *rest))

    def update(self, rows: Any, term: Term, dtype: Any) -> Any:
        """What a term adds to the result, (rows, outputs)."""
        current, zeroed = _split_axes(rows, [(self.row,), self.inputs]), False
        ends = {*self.inputs, *self.outputs}
        operands = fused(term.operands, ends, self._group, self._precision)
        shared = [[a for a in operand.atoms if a not in self._group] for operand in operands]
        for number, kept in absorption(current.atoms, shared, [self.row, *self.outputs]):
            operand = operands[number].map(lambda array: array.astype(rows.dtype))
            met = [atom for atom in operand.atoms if atom in current.atoms]
            if self._is_grouped(operand) and met and not set(met) & set(kept):
                current, zeroed = self._times(current, operand, met), True
                continue
            array = contract(current, [self.by_row(operand)], kept, precision=self._precision)
            current = Operand(array, tuple(kept))
        update = contract(current, (), [self.row, *self.outputs], out_dtype=dtype)
        if zeroed:
            return update
        # The product with the base gives rows of no group zeros, and so must this.
        used = jnp.arange(self.row.size) < self._group_sizes.sum()
        return jnp.where(used.reshape(-1, *[1] * len(self.outputs)), update, 0)

    def _times(self, current: Operand, operand: Operand, summed: Sequence[Atom]) -> Operand:
        """The product with one matrix for each group, axes that it lacks counted as rows."""
        fresh = [a for a in operand.atoms if a not in (*self._group, *summed)]
        middle = [a for a in current.atoms if a is not self.row and a not in summed]
        rows = contract(current, (), [self.row, *middle, *summed]).reshape(-1, size(summed))
        array = lax.ragged_dot(
            rows,
            self._stacked(operand, summed, fresh),
            self._group_sizes * size(middle),
            precision=self._precision,
        )
        atoms = (self.row, *middle, *fresh)
        return Operand(array.reshape([atom.size for atom in atoms]), atoms)


# --- conv_general_dilated ------------------------------------------------------------------------


def _conv_roles(eqn: Any, side: int, network: Network) -> Roles | Dense:
    if side != 1:
        return Dense("weight convolved as the image, not as the kernel")
    if eqn.params["batch_group_count"] != 1:
        return Dense("convolution with batch groups")
    if network.indexed:
        return Dense("looked-up rows, which are an activation")
    out_axis, in_axis, *_ = eqn.params["dimension_numbers"].rhs_spec
    known = {out_axis: Role.OUTPUT, in_axis: Role.INPUT}
    return {
        atom: known.get(axis, Role.WINDOW)
        for axis, group in enumerate(network.axes)
        for atom in group
    }


def _conv(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    """A convolution with the base, plus for every term one with what holds its window."""
    x, factored = values
    network: Network = factored.network
    form = _Convolution(eqn, network)
    x_groups = _labelled(x.shape, {form.channel: (Atom(form.groups), *form.inputs)})
    out_groups = _labelled(eqn.outvars[0].aval.shape, {form.feature: form.outputs})

    def product(x: Any) -> Any:
        total = bind(x, factored.base)
        for use, term in enumerate(network.terms):
            image = x if term.dropout is None else term.dropout(x, use)
            update = form.grouped if form.groups > 1 else form.windowed
            total = total + update(image, term, total.dtype)
        return total

    return _with_gains(network.gains, x, x_groups, out_groups, product)


class _Convolution:
    """The products of an image with the terms of a kernel, convolved as an equation says."""

    def __init__(self, eqn: Any, network: Network) -> None:
        numbers = eqn.params["dimension_numbers"]
        self._eqn, self._network = eqn, network
        self._precision = eqn.params["precision"]
        self._out_axis, self._in_axis, *window_axes = numbers.rhs_spec
        # The axes of images and of results, features last.
        self._image_axes = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        self._result_axes = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        self.channel, self.feature = numbers.lhs_spec[1], numbers.out_spec[1]
        self.groups = eqn.params["feature_group_count"]
        self.inputs = network.axes[self._in_axis]
        self.outputs = network.axes[self._out_axis]
        self._window = [atom for axis in window_axes for atom in network.axes[axis]]

    def windowed(self, image: Any, term: Term, dtype: Any) -> Any:
        """The operands that hold the window convolve, and what follows are products.

        LoRA's is a convolution with `A` into the rank and a product with `B`. Channels that the
        window has nothing to do with (those of the other Kronecker factor) wait in the batch.
        """
        operands = self._fused(term)
        windowed = [o for o in operands if set(self._window) & set(o.atoms)]
        held = {atom for operand in operands for atom in operand.atoms}
        if len(windowed) != 1 or not held >= {*self._window, *self.inputs, *self.outputs}:
            return self._dense(image, term, dtype)
        (near,) = windowed
        others = [operand for operand in operands if operand is not near]
        taken = [atom for atom in self.inputs if atom in near.atoms]
        waiting = [atom for atom in self.inputs if atom not in near.atoms]
        made = [atom for atom in near.atoms if atom not in (*self._window, *taken)]

        image = jnp.transpose(image, self._image_axes)
        images, *places, _ = (Atom(length) for length in image.shape)
        image = _split_axes(image, [(images,), *((p,) for p in places), self.inputs])
        array = contract(image, (), [images, *waiting, *places, *taken])
        array = array.reshape(-1, *(p.size for p in places), size(taken))
        array = jnp.transpose(array, _inverse(self._image_axes))
        hidden = self._convolve(array, self._kernel(near, taken, made), 1, None)
        hidden = jnp.transpose(hidden, self._result_axes)
        places = [Atom(length) for length in hidden.shape[1:-1]]
        atoms = (images, *waiting, *places, *made)
        update = contract(
            Operand(hidden.reshape([atom.size for atom in atoms]), atoms),
            others,
            [images, *places, *self.outputs],
            precision=self._precision,
            out_dtype=dtype,
        )
        update = update.reshape(images.size, *(p.size for p in places), size(self.outputs))
        return jnp.transpose(update, _inverse(self._result_axes))

    def grouped(self, image: Any, term: Term, dtype: Any) -> Any:
        """With feature groups every group of input channels has the same `A`, as the update of
        each output channel in `A B` says.
        """
        ends = {*self._window, *self.inputs}
        operands = self._fused(term)
        near = [operand for operand in operands if ends & set(operand.atoms)]
        others = [operand for operand in operands if not ends & set(operand.atoms)]
        if len(near) != 1 or not others or set(near[0].atoms) & set(self.outputs):
            return self._dense(image, term, dtype)
        made = [atom for atom in near[0].atoms if atom not in ends]
        kernel = jnp.concatenate(
            [self._kernel(near[0], self.inputs, made)] * self.groups, self._out_axis
        )
        hidden = jnp.moveaxis(self._convolve(image, kernel, self.groups, None), self.feature, -1)
        last = contract(others[0], others[1:], [*made, *self.outputs], precision=self._precision)
        update = jnp.einsum(
            "...gr,rgo->...go",
            hidden.reshape(*hidden.shape[:-1], self.groups, size(made)),
            last.reshape(size(made), self.groups, -1).astype(hidden.dtype),
            precision=self._precision,
            preferred_element_type=dtype,
        )
        return jnp.moveaxis(
            update.reshape(*hidden.shape[:-1], size(self.outputs)), -1, self.feature
        )

    def _fused(self, term: Term) -> list[Operand]:
        ends = {*self._window, *self.inputs, *self.outputs}
        return fused(term.operands, ends, (), self._precision)

    def _dense(self, image: Any, term: Term, dtype: Any) -> Any:
        """A term that is one array over the whole kernel."""
        kernel = expand(term.operands, self._network, jnp.float32)
        return self._convolve(image, kernel, self.groups, dtype)

    def _kernel(self, near: Operand, taken: Sequence[Atom], made: Sequence[Atom]) -> Any:
        """The operand laid out as this convolution's kernel, from these channels to those."""
        ends = {self._in_axis: tuple(taken), self._out_axis: tuple(made)}
        axes = [ends.get(axis, group) for axis, group in enumerate(self._network.axes)]
        array = contract(near, (), [atom for group in axes for atom in group])
        return array.reshape([size(group) for group in axes])

    def _convolve(self, image: Any, kernel: Any, groups: int, dtype: Any) -> Any:
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        return lax.conv_general_dilated(
            image,
            kernel.astype(image.dtype),
            **{name: self._eqn.params[name] for name in names},
            feature_group_count=groups,
            precision=self._precision,
            preferred_element_type=dtype,
        )


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=lambda axis: permutation[axis])


RULES: dict[str, Product] = {
    "dot_general": Product(_dot_roles, _dot),
    "ragged_dot_general": Product(_ragged_roles, _ragged),
    "conv_general_dilated": Product(_conv_roles, _conv),
}
