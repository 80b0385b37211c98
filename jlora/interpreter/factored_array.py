"""An adapted weight in factored form: its frozen base and a small tensor network.

An adapted weight is `gains * (base + sum of terms)`. Every term is a product of small arrays
(operands) with labeled axes; LoRA is one term, `A[in, r] B[r, out]`. A model transposes, reshapes,
slices and stacks its weights before it multiplies with them. Each of these is relabeling, slicing
or padding of operands, so the weight need not be materialized.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpreter import base_weight
from jlora.interpreter.einsum import Axis, Operand, contract, contract_shared, flat_size

AxisGroups = tuple[tuple[Axis, ...], ...]  # One group of axes per array axis, slowest first.

LabeledArray = tuple[Any, Sequence[Hashable]]  # An array and one label per axis.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the input of a term.

    Attributes:
        rate: Probability of dropping an entry.
        keys: Random keys, one per index of the weight's batch axes (layers, experts).
    """

    rate: float
    keys: Operand

    def __call__(self, x: Any, use_index: int) -> Any:
        # Several keys are left here by batch axes of the product. The input then has those axes
        # too, so one key draws an independent mask for each index.
        key = self.keys.array.reshape(-1)[0]
        keep = jax.random.bernoulli(jax.random.fold_in(key, use_index), 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["router"],
    meta_fields=["expert_axis", "top_k", "fan_in"],
)
@dataclasses.dataclass(frozen=True)
class TopKRouting:
    """Top-k routing over the experts of a term.

    Attributes:
        router: Weights from the input to one score per expert.
        expert_axis: Axis of the experts, which operands of the term have too.
        top_k: Number of experts per input.
        fan_in: Size of a complete input, on which the router is defined.
    """

    router: Operand
    expert_axis: Axis
    top_k: int
    fan_in: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["slot_axis"]
)
@dataclasses.dataclass(frozen=True)
class SelectTerm:
    """Selection of one of several updates that are stacked along an axis of the operands.

    The selection is applied at the product. So a slice of a stack of layers slices all updates, and
    no complete update is copied.

    Attributes:
        index: Index of the update, an integer scalar. Index 0 adds no update and leaves the result
            bitwise unchanged. An index out of range makes the result NaN.
        slot_axis: Axis of the operands along which updates are stacked.
    """

    index: Operand
    slot_axis: Axis

    def select(self, operand: Operand) -> Operand:
        """Selects the part of an operand that belongs to the update."""
        if self.slot_axis not in operand.axes:
            return operand
        axis = operand.axes.index(self.slot_axis)
        array = jax.lax.dynamic_index_in_dim(operand.array, self.index.array, axis, keepdims=False)
        return Operand(array, (*operand.axes[:axis], *operand.axes[axis + 1 :]))

    def add(self, total: Any, update: Any) -> Any:
        """Adds the update to the total, and nothing for index 0."""
        index = self.index.array
        # JAX clamps an index out of range instead of raising.
        exists = (index >= 0) & (index < self.slot_axis.size)
        return jnp.where(index == 0, total, jnp.where(exists, total + update, jnp.nan))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands", "dropout", "routing", "select"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """A product of operands, added to the base.

    A term with routing depends on the input, so it cannot be materialized.

    Attributes:
        operands: Factors of the product.
        dropout: Dropout on the input. None: no dropout.
        routing: Routing over experts. None: no experts.
        select: Selection among stacked updates. None: one update.
    """

    operands: tuple[Operand, ...]
    dropout: Dropout | None = None
    routing: TopKRouting | None = None
    select: SelectTerm | None = None

    def map(self, fn: Callable[[Operand], Operand]) -> Term:
        """Applies a function to every operand, including dropout keys, router and index."""
        dropout, routing = self.dropout, self.routing
        if dropout is not None:
            dropout = Dropout(dropout.rate, fn(dropout.keys))
        if routing is not None:
            routing = dataclasses.replace(routing, router=fn(routing.router))
        select = self.select and dataclasses.replace(self.select, index=fn(self.select.index))
        return Term(tuple(fn(operand) for operand in self.operands), dropout, routing, select)

    @property
    def selected_operands(self) -> tuple[Operand, ...]:
        """Operands of the selected update."""
        if self.select is None:
            return self.operands
        return tuple(self.select.select(operand) for operand in self.operands)

    def add(self, total: Any, update: Any) -> Any:
        """Adds to a total the update that the selected operands have computed."""
        return total + update if self.select is None else self.select.add(total, update)

    def apply_selection(self) -> Term:
        """Applies the selection, for uses that do not support one."""
        if self.select is None:
            return self
        first, *others = self.selected_operands
        one = jnp.ones((), first.array.dtype)
        first = first.map(lambda array: array * self.select.add(one, 0))  # type: ignore[union-attr]
        return dataclasses.replace(self, operands=(first, *others), select=None)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gains", "terms", "moment_taps"],
    meta_fields=["axis_groups", "path"],
)
@dataclasses.dataclass(frozen=True)
class TensorNetwork:
    """An adapted weight without its base.

    Attributes:
        axis_groups: Axes that form each array axis of the weight at this point of the program.
        path: Path of the weight in the parameter tree, for messages.
        gains: Factors on the sum of base and terms. Empty: one.
        terms: Products added to the base.
        moment_taps: Arrays whose gradients are the moments of the inputs of the weight.
    """

    axis_groups: AxisGroups
    path: str
    gains: tuple[Operand, ...] = ()
    terms: tuple[Term, ...] = ()
    moment_taps: tuple[Operand, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight at this point of the program."""
        return tuple(flat_size(group) for group in self.axis_groups)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes of the weight, in order."""
        return tuple(axis for group in self.axis_groups for axis in group)

    @property
    def is_gathered(self) -> bool:
        """Whether rows were gathered with an array of indices, so that it is an activation."""
        return any(axis.is_gathered for axis in self.axes)

    def with_axis_groups(self, axis_groups: Sequence[tuple[Axis, ...]]) -> TensorNetwork:
        """Returns the network with other axis groups."""
        return dataclasses.replace(self, axis_groups=tuple(axis_groups))

    def map(self, fn: Callable[[Operand], Operand]) -> TensorNetwork:
        """Applies a function to every operand; the axis groups stay."""
        return dataclasses.replace(
            self,
            gains=tuple(fn(gain) for gain in self.gains),
            terms=tuple(term.map(fn) for term in self.terms),
            moment_taps=tuple(fn(operand) for operand in self.moment_taps),
        )

    def apply_selections(self) -> TensorNetwork:
        """Applies the selections of all terms."""
        return dataclasses.replace(self, terms=tuple(term.apply_selection() for term in self.terms))

    def replace_axis(
        self, old: Axis, new: tuple[Axis, ...], fn: Callable[[Any, int], Any]
    ) -> TensorNetwork:
        """Replaces an axis in all operands and groups.

        Args:
            old: Axis to replace.
            new: Axes in its place.
            fn: Function `fn(array, axis)` that converts arrays with this axis.
        """

        def replace_in_operand(operand: Operand) -> Operand:
            if old not in operand.axes:
                return operand
            axis = operand.axes.index(old)
            axes = (*operand.axes[:axis], *new, *operand.axes[axis + 1 :])
            return Operand(fn(operand.array, axis), axes)

        axis_groups = [
            tuple(a for label in group for a in (new if label is old else (label,)))
            for group in self.axis_groups
        ]
        return self.map(replace_in_operand).with_axis_groups(axis_groups)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "network"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class FactoredArray:
    """An adapted weight in factored form.

    Attributes:
        base: Base at this point of the program: an array, a quantized or a deferred array.
        network: Network of the adapter.
    """

    base: Any
    network: TensorNetwork

    def materialize(self) -> Any:
        """Returns the adapted weight as one array in the type of the base.

        It is computed in float32 or wider and rounded once.

        Raises:
            ValueError: If a term has dropout or routing, which need the input of a product.
        """
        for term in self.network.terms:
            if term.routing is not None:
                raise ValueError(
                    f"LoRAMoE on {self.network.path!r} routes by the input, so it cannot be merged "
                    f"into one weight or used outside a product (lora.explain lists the uses of "
                    f"each weight). Call apply with the separate adapter, or exclude this weight "
                    f"from the adapter rules."
                )
            # As in the reference, dropout does not apply to embedding look-ups.
            if term.dropout is not None and not self.network.is_gathered:
                raise ValueError(
                    f"Dropout of the adapter on {self.network.path!r} cannot be applied: this "
                    f"weight is not only used by products (lora.explain lists its uses), so it has "
                    f"no input to drop. Set dropout=0.0 in its config, or omit dropout_key."
                )
        notify_materialized(self.network)
        dtype = jnp.float64 if self.base.dtype == jnp.float64 else jnp.float32
        total = base_weight.materialize_base(self.base).astype(dtype)
        for term in self.network.terms:
            total = term.add(
                total, materialize_operands(term.selected_operands, self.network, dtype)
            )
        for gain in self.network.gains:
            total = total * materialize_operands((gain,), self.network, dtype)
        return total.astype(self.base.dtype)


def notify_materialized(network: TensorNetwork) -> None:
    """Reports to `record_materialized` that a weight is materialized."""
    watched = _materialized_paths.get()
    if watched is not None and not network.is_gathered:
        watched.append(network.path)


_materialized_paths: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "materialized_paths", default=None
)


@contextlib.contextmanager
def record_materialized() -> Iterator[list[str]]:
    """Yields a list that collects the paths of weights materialized inside the context."""
    paths: list[str] = []
    token = _materialized_paths.set(paths)
    try:
        yield paths
    finally:
        _materialized_paths.reset(token)


def build_tensor_network(
    path: str,
    shape: Sequence[int],
    *,
    gains: Sequence[LabeledArray] = (),
    terms: Sequence[Sequence[LabeledArray]] = (),
    splits: Mapping[int, Sequence[int]] = types.MappingProxyType({}),
    routing: tuple[LabeledArray, Hashable, int] | None = None,
    selection: tuple[Any, Hashable] | None = None,
    moment_taps: Sequence[LabeledArray] = (),
    dropout: tuple[float, Any, Sequence[int]] | None = None,
) -> TensorNetwork:
    """Builds the network of a weight.

    Args:
        path: Path of the weight in the parameter tree.
        shape: Shape of the weight.
        gains: Factors on the adapted weight, each with labels of its axes.
        terms: Operands of every term, each with labels of its axes. The label of a weight axis is
            its index; labels of other axes, such as ranks, are shared by operands that contract
            over them.
        splits: Weight axes that operands have as several axes, slowest first, with their sizes.
            Part `i` of axis `n` has the label `(n, i)`.
        routing: Router with its labels, label of the expert axis, and number of experts per input.
            None: no routing.
        selection: Integer scalar and label of the slot axis. None: no selection.
        moment_taps: Arrays for the moments of the inputs, each with labels of its axes.
        dropout: Rate, array of random keys, and weight axes of the keys. None: no dropout.
    """
    axis_by_label: dict[Hashable, Axis] = {
        axis: Axis(n, weight_axis=axis) for axis, n in enumerate(shape) if axis not in splits
    }
    axis_by_label |= {
        (axis, part): Axis(n, weight_axis=axis)
        for axis, sizes in splits.items()
        for part, n in enumerate(sizes)
    }

    def make_group(axis: int) -> tuple[Axis, ...]:
        parts = range(len(splits.get(axis, ())))
        return tuple(axis_by_label[axis, part] for part in parts) or (axis_by_label[axis],)

    def make_operand(array: Any, labels: Sequence[Hashable]) -> Operand:
        for label, length in zip(labels, array.shape, strict=True):
            axis_by_label.setdefault(label, Axis(length))
            assert axis_by_label[label].size == length, (
                path,
                label,
                length,
                axis_by_label[label].size,
            )
        return Operand(array, tuple(axis_by_label[label] for label in labels))

    term_dropout = (
        None if dropout is None else Dropout(dropout[0], make_operand(dropout[1], dropout[2]))
    )
    term_operands = [tuple(make_operand(*pair) for pair in term) for term in terms]
    term_routing = None
    if routing is not None:
        router, label, top_k = routing
        # The batch axes are those that every operand has.
        shared = set.intersection(
            *(set(array_labels) for term in terms for _, array_labels in term)
        )
        inputs = [axis for axis in router[1] if axis != label and axis not in shared]
        fan_in = math.prod(axis_by_label[axis].size for axis in inputs)
        term_routing = TopKRouting(make_operand(*router), axis_by_label[label], top_k, fan_in)
    term_selection = (
        None
        if selection is None
        else SelectTerm(Operand(selection[0], ()), axis_by_label[selection[1]])
    )
    return TensorNetwork(
        axis_groups=tuple(make_group(axis) for axis in range(len(shape))),
        path=path,
        gains=tuple(make_operand(*gain) for gain in gains),
        terms=tuple(
            Term(operands, term_dropout, term_routing, term_selection) for operands in term_operands
        ),
        moment_taps=tuple(make_operand(*tap) for tap in moment_taps),
    )


def materialize_operands(operands: Sequence[Operand], network: TensorNetwork, dtype: Any) -> Any:
    """Multiplies operands into one array with the layout of the weight."""
    # The default precision of TPU and GPU products would lose digits of a trained update.
    exact = jax.lax.Precision.HIGHEST
    first, *others = contract_shared(
        [operand.map(lambda array: array.astype(dtype)) for operand in operands],
        network.axes,
        network.axes,
        exact,
    )
    return contract(first, others, network.axes, precision=exact).reshape(network.shape)
