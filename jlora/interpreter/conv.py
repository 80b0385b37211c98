"""`conv_general_dilated`: a weight as the kernel of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.interpreter import _compat
from jlora.interpreter.factored_array import FactoredArray, call_with_bases
from jlora.interpreter.primitive_rules import RULES, AxisRole, AxisRoles, DenseReason, ProductRule
from jlora.interpreter.terms import (
    Axis,
    Operand,
    WeightProduct,
    arrange,
    contract,
    contract_shared,
    flat_size,
    label_dimensions,
    materialize_operands,
    reshape,
    split_axes,
)


def _conv_axis_roles(eqn: Any, side: int, weight: FactoredArray) -> AxisRoles | DenseReason:
    if side != 1:
        return DenseReason("weight convolved as the image, not as the kernel")
    if eqn.params["batch_group_count"] != 1:
        return DenseReason("convolution with batch groups")
    if weight.is_gathered:
        return DenseReason("looked-up rows, which are an activation")
    out_place, in_place, *_ = eqn.params["dimension_numbers"].rhs_spec
    known = {out_place: AxisRole.OUTPUT, in_place: AxisRole.INPUT}
    return {
        axis: known.get(place, AxisRole.WINDOW)
        for place, group in enumerate(weight.axis_groups)
        for axis in group
    }


class ConvProduct(WeightProduct):
    """A convolution of an image with a weight as its kernel."""

    routing_error = "by a convolution, which has no single input"

    def __init__(self, eqn: Any, weight: FactoredArray, image_shape: Sequence[int]) -> None:
        numbers = eqn.params["dimension_numbers"]
        self._eqn, self._weight, self.path = eqn, weight, weight.path
        self.precision = eqn.params["precision"]
        self._out_place, self._in_place, *window = numbers.rhs_spec
        # The dimensions of images and of results, features last.
        self._image_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        self._result_order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        self._feature_place = numbers.out_spec[1]
        self._num_groups = eqn.params["feature_group_count"]
        self._inputs = weight.axis_groups[self._in_place]
        self._outputs = weight.axis_groups[self._out_place]
        self._window = [axis for place in window for axis in weight.axis_groups[place]]
        channels = (Axis(self._num_groups), *self._inputs)
        self.x_groups = label_dimensions(image_shape, {numbers.lhs_spec[1]: channels})
        self.out_groups = label_dimensions(
            eqn.outvars[0].aval.shape, {self._feature_place: self._outputs}
        )

    def multiply_base(self, x: Any, base: Any) -> Any:
        return call_with_bases(lambda arrays: _compat.bind_eqn(self._eqn, arrays)[0], [x, base])

    def multiply(self, x: Any, operands: Sequence[Operand], result: Any) -> Any:
        multiply = self._multiply_grouped if self._num_groups > 1 else self._multiply_factored
        ends = {*self._window, *self._inputs, *self._outputs}
        return multiply(x, contract_shared(operands, ends, (), self.precision), result.dtype)

    def _multiply_factored(self, image: Any, operands: Sequence[Operand], dtype: Any) -> Any:
        """Convolves with the operand that holds the window; the others are products.

        LoRA's is a convolution with `A` into the rank and a product with `B`. Channels that the
        window does not see (those of the other Kronecker factor) are part of the batch.
        """
        windowed = [o for o in operands if set(self._window) & set(o.axes)]
        present = {axis for operand in operands for axis in operand.axes}
        if len(windowed) != 1 or not present >= {*self._window, *self._inputs, *self._outputs}:
            return self._multiply_materialized(image, operands, dtype)
        (kernel,) = windowed
        others = [operand for operand in operands if operand is not kernel]
        channels = [axis for axis in self._inputs if axis in kernel.axes]
        waiting = [axis for axis in self._inputs if axis not in kernel.axes]
        features = [axis for axis in kernel.axes if axis not in (*self._window, *channels)]

        image = jnp.transpose(image, self._image_order)
        batch, *places, _ = (Axis(length) for length in image.shape)
        labeled = split_axes(image, [(batch,), *((p,) for p in places), self._inputs])
        array = arrange(labeled, [batch, *waiting, *places, *channels])
        array = array.reshape(-1, *(p.size for p in places), flat_size(channels))
        array = jnp.transpose(array, _invert_permutation(self._image_order))
        hidden = self._convolve(array, self._to_kernel(kernel, channels, features), 1, None)
        hidden = jnp.transpose(hidden, self._result_order)
        places = [Axis(length) for length in hidden.shape[1:-1]]
        axes = (batch, *waiting, *places, *features)
        update = contract(
            Operand(reshape(hidden, [axis.size for axis in axes]), axes),
            others,
            [batch, *places, *self._outputs],
            precision=self.precision,
            out_dtype=dtype,
        )
        update = update.reshape(batch.size, *(p.size for p in places), flat_size(self._outputs))
        return jnp.transpose(update, _invert_permutation(self._result_order))

    def _multiply_grouped(self, image: Any, operands: Sequence[Operand], dtype: Any) -> Any:
        """Convolves every group of input channels with the same `A`.

        The update of each output channel is that of `A B`.
        """
        ends = {*self._window, *self._inputs}
        near = [operand for operand in operands if ends & set(operand.axes)]
        others = [operand for operand in operands if not ends & set(operand.axes)]
        if len(near) != 1 or not others or set(near[0].axes) & set(self._outputs):
            return self._multiply_materialized(image, operands, dtype)
        features = [axis for axis in near[0].axes if axis not in ends]
        kernel = jnp.concatenate(
            [self._to_kernel(near[0], self._inputs, features)] * self._num_groups, self._out_place
        )
        hidden = self._convolve(image, kernel, self._num_groups, None)
        hidden = jnp.moveaxis(hidden, self._feature_place, -1)
        last = contract(
            others[0], others[1:], [*features, *self._outputs], precision=self.precision
        )
        update = jnp.einsum(
            "...gr,rgo->...go",
            hidden.reshape(*hidden.shape[:-1], self._num_groups, flat_size(features)),
            last.reshape(flat_size(features), self._num_groups, -1).astype(hidden.dtype),
            precision=self.precision,
            preferred_element_type=dtype,
        )
        update = update.reshape(*hidden.shape[:-1], flat_size(self._outputs))
        return jnp.moveaxis(update, -1, self._feature_place)

    def _multiply_materialized(self, image: Any, operands: Sequence[Operand], dtype: Any) -> Any:
        """Convolves with a term that is one array over the whole kernel."""
        kernel = materialize_operands(operands, self._weight, jnp.float32)
        return self._convolve(image, kernel, self._num_groups, dtype)

    def _to_kernel(
        self, operand: Operand, in_axes: Sequence[Axis], out_axes: Sequence[Axis]
    ) -> Any:
        """Returns the operand laid out as this convolution's kernel, with these channels."""
        ends = {self._in_place: tuple(in_axes), self._out_place: tuple(out_axes)}
        groups = [ends.get(place, g) for place, g in enumerate(self._weight.axis_groups)]
        array = arrange(operand, [axis for group in groups for axis in group])
        return reshape(array, [flat_size(group) for group in groups])

    def _convolve(self, image: Any, kernel: Any, num_groups: int, dtype: Any) -> Any:
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        return lax.conv_general_dilated(
            image,
            kernel.astype(image.dtype),
            **{name: self._eqn.params[name] for name in names},
            feature_group_count=num_groups,
            precision=self.precision,
            preferred_element_type=dtype,
        )


def _invert_permutation(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=lambda place: permutation[place])


def _make_conv_product(
    eqn: Any, side: int, weight: FactoredArray, values: Sequence[Any]
) -> tuple[WeightProduct, Any]:
    del side
    return ConvProduct(eqn, weight, values[0].shape), values[0]


RULES["conv_general_dilated"] = ProductRule(_conv_axis_roles, _make_conv_product)
