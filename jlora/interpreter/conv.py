"""`conv_general_dilated`: a weight as the kernel of a convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.interpreter.dot_products import AxisRole, AxisRoles, DenseReason, ProductRule
from jlora.interpreter.einsum import Axis, Operand, contract, contract_shared, flat_size
from jlora.interpreter.factored_array import TensorNetwork, Term, materialize_operands
from jlora.interpreter.terms import apply_with_gains, label_activation_axes, split_axes


def _conv_axis_roles(eqn: Any, side: int, network: TensorNetwork) -> AxisRoles | DenseReason:
    if side != 1:
        return DenseReason("weight convolved as the image, not as the kernel")
    if eqn.params["batch_group_count"] != 1:
        return DenseReason("convolution with batch groups")
    if network.is_gathered:
        return DenseReason("looked-up rows, which are an activation")
    out_axis, in_axis, *_ = eqn.params["dimension_numbers"].rhs_spec
    known = {out_axis: AxisRole.OUTPUT, in_axis: AxisRole.INPUT}
    return {
        atom: known.get(axis, AxisRole.WINDOW)
        for axis, group in enumerate(network.axis_groups)
        for atom in group
    }


def _eval_conv(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    """A convolution with the base, plus for every term one with what holds its window."""
    x, factored = values
    network: TensorNetwork = factored.network.apply_selections()
    form = _ConvolutionTerms(eqn, network)
    x_groups = label_activation_axes(
        x.shape, {form.channel_axis: (Axis(form.feature_groups), *form.input_axes)}
    )
    out_groups = label_activation_axes(
        eqn.outvars[0].aval.shape, {form.feature_axis: form.output_axes}
    )

    def product(x: Any) -> Any:
        total = bind(x, factored.base)
        for use, term in enumerate(network.terms):
            image = x if term.dropout is None else term.dropout(x, use)
            update = form.convolve_grouped if form.feature_groups > 1 else form.convolve_factored
            total = total + update(image, term, total.dtype)
        return total

    return apply_with_gains(network.gains, x, x_groups, out_groups, product)


class _ConvolutionTerms:
    """The products of an image with the terms of a kernel, convolved as an equation says."""

    def __init__(self, eqn: Any, network: TensorNetwork) -> None:
        numbers = eqn.params["dimension_numbers"]
        self._eqn, self._network = eqn, network
        self._precision = eqn.params["precision"]
        self._out_axis, self._in_axis, *window_axes = numbers.rhs_spec
        # The axes of images and of results, features last.
        self._image_axes = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        self._result_axes = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        self.channel_axis, self.feature_axis = numbers.lhs_spec[1], numbers.out_spec[1]
        self.feature_groups = eqn.params["feature_group_count"]
        self.input_axes = network.axis_groups[self._in_axis]
        self.output_axes = network.axis_groups[self._out_axis]
        self._window_axes = [atom for axis in window_axes for atom in network.axis_groups[axis]]

    def convolve_factored(self, image: Any, term: Term, dtype: Any) -> Any:
        """The operands that hold the window convolve, and what follows are products.

        LoRA's is a convolution with `A` into the rank and a product with `B`. Channels that the
        window has nothing to do with (those of the other Kronecker factor) wait in the batch.
        """
        operands = self._contract_operands(term)
        windowed = [o for o in operands if set(self._window_axes) & set(o.axes)]
        held = {atom for operand in operands for atom in operand.axes}
        if len(windowed) != 1 or not held >= {
            *self._window_axes,
            *self.input_axes,
            *self.output_axes,
        }:
            return self._convolve_materialized(image, term, dtype)
        (near,) = windowed
        others = [operand for operand in operands if operand is not near]
        taken = [atom for atom in self.input_axes if atom in near.axes]
        waiting = [atom for atom in self.input_axes if atom not in near.axes]
        made = [atom for atom in near.axes if atom not in (*self._window_axes, *taken)]

        image = jnp.transpose(image, self._image_axes)
        images, *places, _ = (Axis(length) for length in image.shape)
        image = split_axes(image, [(images,), *((p,) for p in places), self.input_axes])
        array = contract(image, (), [images, *waiting, *places, *taken])
        array = array.reshape(-1, *(p.size for p in places), flat_size(taken))
        array = jnp.transpose(array, _invert_permutation(self._image_axes))
        hidden = self._convolve(array, self._reshape_to_kernel(near, taken, made), 1, None)
        hidden = jnp.transpose(hidden, self._result_axes)
        places = [Axis(length) for length in hidden.shape[1:-1]]
        atoms = (images, *waiting, *places, *made)
        update = contract(
            Operand(hidden.reshape([atom.size for atom in atoms]), atoms),
            others,
            [images, *places, *self.output_axes],
            precision=self._precision,
            out_dtype=dtype,
        )
        update = update.reshape(images.size, *(p.size for p in places), flat_size(self.output_axes))
        return jnp.transpose(update, _invert_permutation(self._result_axes))

    def convolve_grouped(self, image: Any, term: Term, dtype: Any) -> Any:
        """With feature groups every group of input channels has the same `A`, as the update of
        each output channel in `A B` says.
        """
        ends = {*self._window_axes, *self.input_axes}
        operands = self._contract_operands(term)
        near = [operand for operand in operands if ends & set(operand.axes)]
        others = [operand for operand in operands if not ends & set(operand.axes)]
        if len(near) != 1 or not others or set(near[0].axes) & set(self.output_axes):
            return self._convolve_materialized(image, term, dtype)
        made = [atom for atom in near[0].axes if atom not in ends]
        kernel = jnp.concatenate(
            [self._reshape_to_kernel(near[0], self.input_axes, made)] * self.feature_groups,
            self._out_axis,
        )
        hidden = jnp.moveaxis(
            self._convolve(image, kernel, self.feature_groups, None), self.feature_axis, -1
        )
        last = contract(
            others[0], others[1:], [*made, *self.output_axes], precision=self._precision
        )
        update = jnp.einsum(
            "...gr,rgo->...go",
            hidden.reshape(*hidden.shape[:-1], self.feature_groups, flat_size(made)),
            last.reshape(flat_size(made), self.feature_groups, -1).astype(hidden.dtype),
            precision=self._precision,
            preferred_element_type=dtype,
        )
        return jnp.moveaxis(
            update.reshape(*hidden.shape[:-1], flat_size(self.output_axes)), -1, self.feature_axis
        )

    def _contract_operands(self, term: Term) -> list[Operand]:
        ends = {*self._window_axes, *self.input_axes, *self.output_axes}
        return contract_shared(term.operands, ends, (), self._precision)

    def _convolve_materialized(self, image: Any, term: Term, dtype: Any) -> Any:
        """A term that is one array over the whole kernel."""
        kernel = materialize_operands(term.operands, self._network, jnp.float32)
        return self._convolve(image, kernel, self.feature_groups, dtype)

    def _reshape_to_kernel(
        self, operand: Operand, in_axes: Sequence[Axis], out_axes: Sequence[Axis]
    ) -> Any:
        """The operand laid out as this convolution's kernel, from these channels to those."""
        ends = {self._in_axis: tuple(in_axes), self._out_axis: tuple(out_axes)}
        axes = [ends.get(axis, group) for axis, group in enumerate(self._network.axis_groups)]
        array = contract(operand, (), [atom for group in axes for atom in group])
        return array.reshape([flat_size(group) for group in axes])

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


def _invert_permutation(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=lambda axis: permutation[axis])


CONV_RULE = ProductRule(_conv_axis_roles, _eval_conv)
