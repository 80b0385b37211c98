"""Product rule of `conv_general_dilated`, where the weight is the kernel of a convolution."""

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
    role_by_axis = {out_axis: AxisRole.OUTPUT, in_axis: AxisRole.INPUT}
    return {
        label: role_by_axis.get(axis, AxisRole.WINDOW)
        for axis, group in enumerate(network.axis_groups)
        for label in group
    }


def _eval_conv(eqn: Any, bind: Callable[..., Any], side: int, values: Sequence[Any]) -> Any:
    """Convolves with the base, and adds the convolution with every term."""
    x, factored = values
    network: TensorNetwork = factored.network.apply_selections()
    conv_terms = _ConvolutionTerms(eqn, network)
    x_groups = label_activation_axes(
        x.shape,
        {conv_terms.channel_axis: (Axis(conv_terms.feature_groups), *conv_terms.input_axes)},
    )
    out_groups = label_activation_axes(
        eqn.outvars[0].aval.shape, {conv_terms.feature_axis: conv_terms.output_axes}
    )

    def apply_product(x: Any) -> Any:
        total = bind(x, factored.base)
        for index, term in enumerate(network.terms):
            image = x if term.dropout is None else term.dropout(x, index)
            update = (
                conv_terms.convolve_grouped
                if conv_terms.feature_groups > 1
                else conv_terms.convolve_factored
            )
            total = total + update(image, term, total.dtype)
        return total

    return apply_with_gains(network.gains, x, x_groups, out_groups, apply_product)


class _ConvolutionTerms:
    """Convolutions of an image with the terms of a factored kernel, as the equation prescribes.

    Attributes:
        channel_axis: Channel axis of the image.
        feature_axis: Feature axis of the result.
        feature_groups: Number of feature groups.
        input_axes: Axes of the network for the input channels of the kernel.
        output_axes: Axes of the network for the output channels of the kernel.
    """

    def __init__(self, eqn: Any, network: TensorNetwork) -> None:
        dimension_numbers = eqn.params["dimension_numbers"]
        self._eqn, self._network = eqn, network
        self._precision = eqn.params["precision"]
        self._out_axis, self._in_axis, *window_axes = dimension_numbers.rhs_spec
        # Axes of the image and of the result as (batch, *window, features).
        self._image_axes = (
            dimension_numbers.lhs_spec[0],
            *dimension_numbers.lhs_spec[2:],
            dimension_numbers.lhs_spec[1],
        )
        self._result_axes = (
            dimension_numbers.out_spec[0],
            *dimension_numbers.out_spec[2:],
            dimension_numbers.out_spec[1],
        )
        self.channel_axis, self.feature_axis = (
            dimension_numbers.lhs_spec[1],
            dimension_numbers.out_spec[1],
        )
        self.feature_groups = eqn.params["feature_group_count"]
        self.input_axes = network.axis_groups[self._in_axis]
        self.output_axes = network.axis_groups[self._out_axis]
        self._window_axes = [label for axis in window_axes for label in network.axis_groups[axis]]

    def convolve_factored(self, image: Any, term: Term, dtype: Any) -> Any:
        """Convolves with the operand that has the window, then multiplies with the others.

        For LoRA this is a convolution with `A` into the rank and a product with `B`. Channels that
        this operand lacks (those of the other Kronecker factor) are moved into the batch.
        """
        operands = self._contract_operands(term)
        windowed = [o for o in operands if set(self._window_axes) & set(o.axes)]
        present = {axis for operand in operands for axis in operand.axes}
        if len(windowed) != 1 or not present >= {
            *self._window_axes,
            *self.input_axes,
            *self.output_axes,
        }:
            return self._convolve_materialized(image, term, dtype)
        (window_operand,) = windowed
        others = [operand for operand in operands if operand is not window_operand]
        convolved = [axis for axis in self.input_axes if axis in window_operand.axes]
        batched = [axis for axis in self.input_axes if axis not in window_operand.axes]
        new_axes = [
            axis for axis in window_operand.axes if axis not in (*self._window_axes, *convolved)
        ]

        image = jnp.transpose(image, self._image_axes)
        batch, *window, _ = (Axis(length) for length in image.shape)
        image = split_axes(image, [(batch,), *((p,) for p in window), self.input_axes])
        array = contract(image, (), [batch, *batched, *window, *convolved])
        array = array.reshape(-1, *(p.size for p in window), flat_size(convolved))
        array = jnp.transpose(array, _invert_permutation(self._image_axes))
        hidden = self._convolve(
            array, self._reshape_to_kernel(window_operand, convolved, new_axes), 1, None
        )
        hidden = jnp.transpose(hidden, self._result_axes)
        window = [Axis(length) for length in hidden.shape[1:-1]]
        axes = (batch, *batched, *window, *new_axes)
        update = contract(
            Operand(hidden.reshape([axis.size for axis in axes]), axes),
            others,
            [batch, *window, *self.output_axes],
            precision=self._precision,
            out_dtype=dtype,
        )
        update = update.reshape(batch.size, *(p.size for p in window), flat_size(self.output_axes))
        return jnp.transpose(update, _invert_permutation(self._result_axes))

    def convolve_grouped(self, image: Any, term: Term, dtype: Any) -> Any:
        """Convolves in feature groups, each of which has the same `A`.

        The update `A B` has this form: an output channel sees the input channels of its group.
        """
        ends = {*self._window_axes, *self.input_axes}
        operands = self._contract_operands(term)
        window_operands = [operand for operand in operands if ends & set(operand.axes)]
        others = [operand for operand in operands if not ends & set(operand.axes)]
        if (
            len(window_operands) != 1
            or not others
            or set(window_operands[0].axes) & set(self.output_axes)
        ):
            return self._convolve_materialized(image, term, dtype)
        new_axes = [axis for axis in window_operands[0].axes if axis not in ends]
        kernel = jnp.concatenate(
            [self._reshape_to_kernel(window_operands[0], self.input_axes, new_axes)]
            * self.feature_groups,
            self._out_axis,
        )
        hidden = jnp.moveaxis(
            self._convolve(image, kernel, self.feature_groups, None), self.feature_axis, -1
        )
        output_factor = contract(
            others[0], others[1:], [*new_axes, *self.output_axes], precision=self._precision
        )
        update = jnp.einsum(
            "...gr,rgo->...go",
            hidden.reshape(*hidden.shape[:-1], self.feature_groups, flat_size(new_axes)),
            output_factor.reshape(flat_size(new_axes), self.feature_groups, -1).astype(
                hidden.dtype
            ),
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
        """Convolves with a term materialized as a kernel, where its operands are inseparable."""
        kernel = materialize_operands(term.operands, self._network, jnp.float32)
        return self._convolve(image, kernel, self.feature_groups, dtype)

    def _reshape_to_kernel(
        self, operand: Operand, in_axes: Sequence[Axis], out_axes: Sequence[Axis]
    ) -> Any:
        """Lays out the operand as a kernel of this convolution from `in_axes` to `out_axes`."""
        ends = {self._in_axis: tuple(in_axes), self._out_axis: tuple(out_axes)}
        groups = [ends.get(axis, group) for axis, group in enumerate(self._network.axis_groups)]
        array = contract(operand, (), [label for group in groups for label in group])
        return array.reshape([flat_size(group) for group in groups])

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
