"""`conv_general_dilated`: a weight as the kernel of a convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.factored.contraction import Atom, Operand, contract, fused, size
from jlora.factored.network import Network, Term, expand
from jlora.factored.roles import Dense, Product, Role, Roles
from jlora.factored.terms import labelled, split_axes, with_gains


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
    network: Network = factored.network.plain()
    form = _Convolution(eqn, network)
    x_groups = labelled(x.shape, {form.channel: (Atom(form.groups), *form.inputs)})
    out_groups = labelled(eqn.outvars[0].aval.shape, {form.feature: form.outputs})

    def product(x: Any) -> Any:
        total = bind(x, factored.base)
        for use, term in enumerate(network.terms):
            image = x if term.dropout is None else term.dropout(x, use)
            update = form.grouped if form.groups > 1 else form.windowed
            total = total + update(image, term, total.dtype)
        return total

    return with_gains(network.gains, x, x_groups, out_groups, product)


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
        image = split_axes(image, [(images,), *((p,) for p in places), self.inputs])
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


PRODUCT = Product(_conv_roles, _conv)
