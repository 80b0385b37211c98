"""An adapted weight: its frozen base, and the gains and terms beside it.

The weight is `gains * (base + sum of terms)`. A model transposes, reshapes, slices and stacks its
weights before it multiplies with them. All of that is a change of axes, or the same slice or
padding of the terms' operands, so the sum is never formed.

The base of a quantized weight is dequantized inside the product that needs it, and once more in
that product's gradient. A training step keeps the quantized form between the two, which is there
anyway; a residual of the full weight would take the memory that quantization has saved.

References:
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3, on dequantizing W in both passes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora._mesh import num_shards
from jlora._quantized_array import QuantizedArray, is_unpacked_along_first_axis, maybe_dequantize
from jlora.interpreter import _compat
from jlora.interpreter.terms import (
    Axis,
    AxisGroups,
    Operand,
    ProductTerm,
    Term,
    cast,
    flat_size,
    materialize_operands,
)

LabeledArray = tuple[Any, Sequence[Hashable]]  # An array and the label of each dimension.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "gains", "terms"],
    meta_fields=["axis_groups", "path"],
)
@dataclasses.dataclass(frozen=True)
class FactoredArray:
    """An adapted weight at one point of a traced program.

    Attributes:
        base: Frozen array, quantized array, or `DeferredArray`; None where only axes are followed.
        axis_groups: Axes behind each dimension.
        path: Path of the weight in its parameter tree, for messages.
        gains: Factors on the sum of base and terms.
        terms: Updates that are added to the base.
    """

    base: Any
    axis_groups: AxisGroups
    path: str
    gains: tuple[Operand, ...] = ()
    terms: tuple[Term, ...] = ()

    @classmethod
    def from_weight(cls, base: Any, path: str, shape: Sequence[int]) -> FactoredArray:
        """Returns a weight without gains and terms, one axis for each dimension."""
        return cls(base, tuple((Axis(n, axis),) for axis, n in enumerate(shape)), path)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(flat_size(group) for group in self.axis_groups)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for group in self.axis_groups for axis in group)

    @property
    def is_gathered(self) -> bool:
        """Whether rows were looked up with an array of indices, which makes it an activation."""
        return any(axis.is_gathered for axis in self.axes)

    @property
    def is_adapted(self) -> bool:
        return bool(self.gains or self.terms)

    # What adapter leaves build their weights with.

    def with_split_axes(self, sizes: Mapping[int, Sequence[int]]) -> FactoredArray:
        """Returns the weight with dimensions split into axes of these sizes, slowest first."""
        groups = [
            tuple(Axis(n, axis) for n in sizes[axis]) if axis in sizes else group
            for axis, group in enumerate(self.axis_groups)
        ]
        return self.with_axis_groups(groups)

    def label(self, *arrays: LabeledArray) -> tuple[Operand, ...]:
        """Returns arrays as operands of one term.

        A label is the number of the weight's dimension that the array's runs along, or
        `(number, part)` where it is split; every other label is an axis of the term's own.
        """
        labels: dict[Hashable, Axis] = {}
        for place, group in enumerate(self.axis_groups):
            labels |= {place: group[0]} if len(group) == 1 else {}
            labels |= {(place, part): axis for part, axis in enumerate(group)}
        operands = []
        for array, names in arrays:
            for name, length in zip(names, array.shape, strict=True):
                if labels.setdefault(name, Axis(length)).size != length:
                    raise ValueError(
                        f"The label {name!r} of a term of {self.path!r} has length "
                        f"{labels[name].size}, got an array with {length}."
                    )
            operands.append(Operand(array, tuple(labels[name] for name in names)))
        return tuple(operands)

    def add(self, *factors: LabeledArray) -> FactoredArray:
        """Returns the weight plus the product of arrays, summed over the term's own axes."""
        return self.add_term(ProductTerm(self.label(*factors)))

    def add_term(self, term: Term) -> FactoredArray:
        return dataclasses.replace(self, terms=(*self.terms, term))

    def multiply(self, gain: LabeledArray) -> FactoredArray:
        """Returns the weight times an array along some of its dimensions."""
        return dataclasses.replace(self, gains=(*self.gains, *self.label(gain)))

    # What rules for primitives do with it.

    def with_base(self, base: Any) -> FactoredArray:
        return dataclasses.replace(self, base=base)

    def with_axis_groups(self, axis_groups: Sequence[tuple[Axis, ...]]) -> FactoredArray:
        return dataclasses.replace(self, axis_groups=tuple(axis_groups))

    def map(self, fn: Callable[[Operand], Operand]) -> FactoredArray:
        """Returns the weight with `fn` applied to every operand, its axes as they were."""
        return dataclasses.replace(
            self,
            gains=tuple(fn(gain) for gain in self.gains),
            terms=tuple(term.map(fn) for term in self.terms),
        )

    def map_terms(self, fn: Callable[[Term], Term]) -> FactoredArray:
        return dataclasses.replace(self, terms=tuple(fn(term) for term in self.terms))

    def replace_axis(
        self, old: Axis, new: tuple[Axis, ...], fn: Callable[[Any, int], Any]
    ) -> FactoredArray:
        """Returns the weight with axis `old` replaced by `new`.

        Args:
            old: Axis to replace.
            new: Axes in its place; none drops it.
            fn: `(array, dimension)` to the array with the dimension replaced alike.
        """

        def change(operand: Operand) -> Operand:
            if old not in operand.axes:
                return operand
            place = operand.axes.index(old)
            axes = (*operand.axes[:place], *new, *operand.axes[place + 1 :])
            return Operand(fn(operand.array, place), axes)

        groups = [
            tuple(a for axis in group for a in (new if axis is old else (axis,)))
            for group in self.axis_groups
        ]
        return self.map(change).with_axis_groups(groups)

    def fold_in(self, data: Any) -> FactoredArray:
        """Returns the weight with random keys of its own for a use, or a step of a loop."""
        terms = tuple(term.fold_in(data) for term in self.terms)
        if all(new is old for new, old in zip(terms, self.terms, strict=True)):
            return self
        return dataclasses.replace(self, terms=terms)

    def materialize(self) -> Any:
        """Returns the adapted weight as one array of the base's type.

        The sum is computed in float32 or wider and rounded once.

        Raises:
            ValueError: A term depends on the input of a product.
        """
        dtype = jnp.float64 if self.base.dtype == jnp.float64 else jnp.float32
        total = cast(materialize_base(self.base), dtype)
        for term in self.terms:
            total = term.add_materialized(total, self)
        for gain in self.gains:
            total = total * materialize_operands((gain,), self, dtype)
        return cast(total, self.base.dtype)


# --- bases ----------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sources"],
    meta_fields=["compute_fn", "shape", "dtype", "permutation"],
)
@dataclasses.dataclass(frozen=True)
class DeferredArray:
    """A quantized base after operations of the traced program (a transpose, a slice).

    Attributes:
        sources: Arrays, quantized arrays and other deferred ones.
        compute_fn: Function of the sources as arrays.
        shape: Shape of its result.
        dtype: Type of its result.
        permutation: Order of the one source's axes, where `compute_fn` only transposes it.
    """

    sources: list[Any]
    compute_fn: Callable[[list[Any]], Any]
    shape: tuple[int, ...]
    dtype: Any
    permutation: tuple[int, ...] | None = None


def is_deferred(base: Any) -> bool:
    """Returns whether a base is still to be dequantized."""
    return isinstance(base, QuantizedArray | DeferredArray)


def materialize_base(base: Any) -> Any:
    """Returns a base as an array."""
    if isinstance(base, DeferredArray):
        return base.compute_fn([materialize_base(source) for source in base.sources])
    return maybe_dequantize(base) if isinstance(base, QuantizedArray) else base


def abstractify(base: Any) -> Any:
    """Returns a base, or the shape and type of one that is still to be dequantized."""
    return jax.ShapeDtypeStruct(base.shape, base.dtype) if is_deferred(base) else base


def bind_on_bases(eqn: Any, bases: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that moves or scales entries, on bases."""
    deferred = [is_deferred(base) for base in bases]
    if not any(deferred):
        return _compat.bind_eqn(eqn, bases)
    if eqn.primitive.name == "optimization_barrier":
        arrays = [base for base, later in zip(bases, deferred, strict=True) if not later]
        outputs = iter(_compat.bind_eqn(eqn, arrays))
        return [b if later else next(outputs) for b, later in zip(bases, deferred, strict=True)]
    # A literal is a number without a type, which it would lose on its way into the product.
    sources = [
        base if later else jnp.asarray(base, atom.aval.dtype)
        for base, later, atom in zip(bases, deferred, eqn.invars, strict=True)
    ]

    def compute_output(number: int) -> Callable[[list[Any]], Any]:
        return lambda arrays: _compat.bind_eqn(eqn, arrays)[number]

    permutation = None
    if eqn.primitive.name == "transpose" and isinstance(bases[0], QuantizedArray):
        permutation = tuple(eqn.params["permutation"])
    return [
        DeferredArray(sources, compute_output(n), out.aval.shape, out.aval.dtype, permutation)
        for n, out in enumerate(eqn.outvars)
    ]


def call_with_bases(fn: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    """Returns `fn` of values, of which bases are dequantized inside it.

    Nothing is saved for the gradient but the arguments; it dequantizes the bases again.
    """
    if not any(is_deferred(value) for value in values):
        return fn(list(values))

    @jax.checkpoint
    def call(values: list[Any]) -> Any:
        arrays = [value for value in values if not is_deferred(value)]
        return fn(
            [
                materialize_base(_schedule_after(arrays, value)) if is_deferred(value) else value
                for value in values
            ]
        )

    return call(list(values))


def _schedule_after(arrays: Sequence[Any], base: Any) -> Any:
    """Returns the base, which cannot be dequantized before the arrays exist.

    All bases of a model could be at once, and the compiler does it unless it has to wait.
    """
    return lax.optimization_barrier(lax.stop_gradient((list(arrays), base)))[1]


def make_scannable(base: Any) -> Any:
    """Returns the base in a form that a scan can slice along the first axis."""
    if isinstance(base, DeferredArray) and base.permutation is not None:
        transposed = base.sources[0].transpose(base.permutation)
        base = transposed if is_unpacked_along_first_axis(transposed) else base
    if isinstance(base, QuantizedArray) and is_unpacked_along_first_axis(base):
        return base
    return materialize_base(base)


def split_for_shard_map(
    base: Any, spec: Sequence[Any], mesh: Any
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Returns the arrays of a base, their specs, and the function from shards to a base.

    Args:
        base: Base of a weight with as many dimensions as `spec`.
        spec: Mesh axes that each dimension is split over; None where it is not.
        mesh: Mesh with the sizes of its axes.
    """
    if isinstance(base, QuantizedArray):
        part = base.shard([num_shards(entry, mesh) for entry in spec])
        if part is not None:
            arrays, treedef = jax.tree.flatten(part)
            specs = [
                PartitionSpec(*(e if n > 1 else None for n, e in zip(a.shape, spec, strict=True)))
                for a in arrays
            ]
            return arrays, specs, lambda shard: jax.tree.unflatten(treedef, shard)
    return materialize_base(base), PartitionSpec(*spec), lambda shard: shard
