"""A weight as its frozen array and a small tensor network beside it.

An adapted weight is `gains * (base + sum of terms)`, where every term is a product of small arrays
(operands) whose axes carry labels (atoms): LoRA is one term, `A[in, r] B[r, out]`. A model
transposes, reshapes, slices and stacks its weights before it multiplies with them; all of that is
relabelling, slicing or padding of operands, so the dense sum is never needed.
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

AxisGroups = tuple[tuple[Axis, ...], ...]  # One group of atoms per axis, slowest first.

LabeledArray = tuple[Any, Sequence[Hashable]]  # An array and the label of each of its axes.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drops entries of a term's input with probability `rate`.

    Attributes:
        keys: Random keys, one for every index of the weight's batch axes (layers, experts).
    """

    rate: float
    keys: Operand

    def __call__(self, x: Any, use: int) -> Any:
        # Batch axes that the product itself carries leave several keys here: x then has those axes
        # too, so one key draws an independent mask for each.
        key = self.keys.array.reshape(-1)[0]
        kept = jax.random.bernoulli(jax.random.fold_in(key, use), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["router"],
    meta_fields=["expert_axis", "top_k", "fan_in"],
)
@dataclasses.dataclass(frozen=True)
class TopKRouting:
    """Weighs the entries along one axis of a term by the input: a mixture.

    Attributes:
        router: From the input to a score for each choice.
        expert_axis: The axis that is chosen along; operands of the term hold it too.
        top_k: How many choices every input keeps.
        fan_in: How many numbers the whole of an input has, which the router has to see.
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
    """Takes one of several updates that operands hold side by side.

    The choice waits for the product, so that what slices a stack of layers slices all updates, and
    no update is copied whole before.

    Attributes:
        index: Which one, an integer without axes. The first stands for none at all: what it is
            added to stays as it is, bit by bit. Where there is no such update, the sum is NaN.
        slot_axis: The axis of operands that it counts along.
    """

    index: Operand
    slot_axis: Axis

    def select(self, operand: Operand) -> Operand:
        """The operand's part that is chosen."""
        if self.slot_axis not in operand.axes:
            return operand
        axis = operand.axes.index(self.slot_axis)
        array = jax.lax.dynamic_index_in_dim(operand.array, self.index.array, axis, keepdims=False)
        return Operand(array, (*operand.axes[:axis], *operand.axes[axis + 1 :]))

    def add(self, total: Any, update: Any) -> Any:
        """The sum, with nothing added for the first."""
        index = self.index.array
        # JAX takes the nearest index in the place of one that is not there.
        exists = (index >= 0) & (index < self.slot_axis.size)
        return jnp.where(index == 0, total, jnp.where(exists, total + update, jnp.nan))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands", "dropout", "routing", "select"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """A product of operands, added to the weight.

    A term with a gate depends on the input, so it is part of no dense weight.
    """

    operands: tuple[Operand, ...]
    dropout: Dropout | None = None
    routing: TopKRouting | None = None
    select: SelectTerm | None = None

    def map(self, fn: Callable[[Operand], Operand]) -> Term:
        dropout, gate = self.dropout, self.routing
        if dropout is not None:
            dropout = Dropout(dropout.rate, fn(dropout.keys))
        if gate is not None:
            gate = dataclasses.replace(gate, router=fn(gate.router))
        pick = self.select and dataclasses.replace(self.select, index=fn(self.select.index))
        return Term(tuple(fn(operand) for operand in self.operands), dropout, gate, pick)

    @property
    def selected_operands(self) -> tuple[Operand, ...]:
        """Its operands, of several updates the one that is chosen."""
        if self.select is None:
            return self.operands
        return tuple(self.select.select(operand) for operand in self.operands)

    def add(self, total: Any, update: Any) -> Any:
        """The sum of anything and what this term's operands made of the same."""
        return total + update if self.select is None else self.select.add(total, update)

    def apply_selection(self) -> Term:
        """The same with the choice made, for uses that know of none."""
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
    """Everything about an adapted weight but its base array.

    Attributes:
        axis_groups: The atoms of each axis, as the traced program sees the weight at this point.
        path: Where the weight came from, for messages.
        gains: Factors on the sum of base and terms; none means one.
        terms: What is added to the base.
        moment_taps: Arrays whose gradients products make to be moments of what the weight meets.
    """

    axis_groups: AxisGroups
    path: str
    gains: tuple[Operand, ...] = ()
    terms: tuple[Term, ...] = ()
    moment_taps: tuple[Operand, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(flat_size(group) for group in self.axis_groups)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(atom for group in self.axis_groups for atom in group)

    @property
    def is_gathered(self) -> bool:
        """Whether rows were looked up with an array of indices, which makes it an activation."""
        return any(atom.is_gathered for atom in self.axes)

    def with_axis_groups(self, axis_groups: Sequence[tuple[Axis, ...]]) -> TensorNetwork:
        return dataclasses.replace(self, axis_groups=tuple(axis_groups))

    def map(self, fn: Callable[[Operand], Operand]) -> TensorNetwork:
        """The network with `fn` applied to every operand, its axes as they were."""
        return dataclasses.replace(
            self,
            gains=tuple(fn(gain) for gain in self.gains),
            terms=tuple(term.map(fn) for term in self.terms),
            moment_taps=tuple(fn(operand) for operand in self.moment_taps),
        )

    def apply_selections(self) -> TensorNetwork:
        """The network with every choice among updates made."""
        return dataclasses.replace(self, terms=tuple(term.apply_selection() for term in self.terms))

    def replace_axis(
        self, old: Axis, new: tuple[Axis, ...], fn: Callable[[Any, int], Any]
    ) -> TensorNetwork:
        """The network with `old` replaced by `new` everywhere, `fn(array, axis)` doing the same to
        the arrays that hold it.
        """

        def change(operand: Operand) -> Operand:
            if old not in operand.axes:
                return operand
            axis = operand.axes.index(old)
            atoms = (*operand.axes[:axis], *new, *operand.axes[axis + 1 :])
            return Operand(fn(operand.array, axis), atoms)

        axes = [
            tuple(a for atom in group for a in (new if atom is old else (atom,)))
            for group in self.axis_groups
        ]
        return self.map(change).with_axis_groups(axes)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "network"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class FactoredArray:
    """An adapted weight: its base as the traced program sees it, and its network."""

    base: Any
    network: TensorNetwork

    def materialize(self) -> Any:
        """The adapted weight as one array of the base's type.

        The sum is made in float32 or wider and rounded once.

        Raises:
            ValueError: When a term has a dropout or a gate, which need the input of a product.
        """
        for term in self.network.terms:
            if term.routing is not None:
                raise ValueError(
                    f"The mixture on {self.network.path!r} weighs its experts by the input, so no "
                    f"single weight computes the same, and none can be merged or used outside "
                    f"a product (lora.explain shows by what each is used). Keep it apart and call "
                    f"apply, or leave this weight out of the rule."
                )
            # As in the reference, a look-up has no input to drop.
            if term.dropout is not None and not self.network.is_gathered:
                raise ValueError(
                    f"The dropout of the adapter on {self.network.path!r} cannot be applied: this "
                    f"weight is used by more than products (lora.explain shows by what), so its "
                    f"input is unknown. Give its rule dropout=0.0, or leave out dropout_key."
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
    """Tells who watches that the dense sum of a weight is formed."""
    watched = _materialized_paths.get()
    if watched is not None and not network.is_gathered:
        watched.append(network.path)


_materialized_paths: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "sums", default=None
)


@contextlib.contextmanager
def record_materialized() -> Iterator[list[str]]:
    """A list of the paths of weights whose dense sum is formed inside the context."""
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
    """The network of a weight of this shape.

    Args:
        path: Where the weight is in its tree.
        shape: The weight's shape.
        gains: Arrays with a label per axis: the number of one of the weight's axes.
        terms: Products of such arrays. A label that is not an axis number is summed over.
        splits: Axes of the weight that arrays see as several, slowest first, with their sizes.
            Part `i` of axis `n` has the label `(n, i)`.
        routing: For every term, a router, the label of what it chooses from, and how many it keeps.
        selection: For every term, an integer and the label that it chooses one index of.
        moment_taps: Arrays whose gradients products make to be moments of what the weight meets.
        dropout: A rate, an array of random keys, and the weight's axes that the keys run over.
    """
    atoms: dict[Hashable, Axis] = {
        axis: Axis(n, weight_axis=axis) for axis, n in enumerate(shape) if axis not in splits
    }
    atoms |= {
        (axis, part): Axis(n, weight_axis=axis)
        for axis, sizes in splits.items()
        for part, n in enumerate(sizes)
    }

    def group(axis: int) -> tuple[Axis, ...]:
        parts = range(len(splits.get(axis, ())))
        return tuple(atoms[axis, part] for part in parts) or (atoms[axis],)

    def operand(array: Any, labels: Sequence[Hashable]) -> Operand:
        for label, length in zip(labels, array.shape, strict=True):
            atoms.setdefault(label, Axis(length))
            assert atoms[label].size == length, (path, label, length, atoms[label].size)
        return Operand(array, tuple(atoms[label] for label in labels))

    drop = None if dropout is None else Dropout(dropout[0], operand(dropout[1], dropout[2]))
    products = [tuple(operand(*pair) for pair in term) for term in terms]
    chosen = None
    if routing is not None:
        router, label, top_k = routing
        # Batch axes are those that every operand of the mixture has.
        shared = set.intersection(*(set(one) for term in terms for _, one in term))
        inputs = [axis for axis in router[1] if axis != label and axis not in shared]
        fan_in = math.prod(atoms[axis].size for axis in inputs)
        chosen = TopKRouting(operand(*router), atoms[label], top_k, fan_in)
    taken = (
        None if selection is None else SelectTerm(Operand(selection[0], ()), atoms[selection[1]])
    )
    return TensorNetwork(
        axis_groups=tuple(group(axis) for axis in range(len(shape))),
        path=path,
        gains=tuple(operand(*gain) for gain in gains),
        terms=tuple(Term(operands, drop, chosen, taken) for operands in products),
        moment_taps=tuple(operand(*one) for one in moment_taps),
    )


def materialize_operands(operands: Sequence[Operand], network: TensorNetwork, dtype: Any) -> Any:
    """The product of the operands as a dense array laid out like the weight."""
    # A merge must not lose what training found to the short products of a TPU or GPU.
    exact = jax.lax.Precision.HIGHEST
    first, *others = contract_shared(
        [operand.map(lambda array: array.astype(dtype)) for operand in operands],
        network.axes,
        network.axes,
        exact,
    )
    return contract(first, others, network.axes, precision=exact).reshape(network.shape)
