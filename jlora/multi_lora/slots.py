"""Several LoRAs of one model side by side in arrays, of which an index chooses one.

The arrays have room for so many adapters of so high a rank. What is put there is padded with zeros
and brings its scale in `B`, so adding, replacing and removing changes numbers and no shape: nothing
that was compiled is compiled again. The first slot stays empty, and stands for the bare base.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._delta import depends_on_base, low_rank_factors
from jlora.adapters.base import (
    FROZEN,
    AdapterLeaf,
    LeafContext,
    SharedArrays,
    adapt_weight,
    array_field,
    check_adapter,
    register_arrays_pytree,
)
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.terms import (
    Axis,
    Operand,
    ProductTerm,
    Term,
    WeightProduct,
    materialize_operands,
)
from jlora.interpreter.usage import WeightAxes

SLOT_INDEX_KEY = "slot"  # Under which the adapter that is applied has the index.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands", "index"],
    meta_fields=["slot_axis"],
)
@dataclasses.dataclass(frozen=True)
class SelectTerm(Term):
    """One of several updates whose factors are stacked along an axis.

    The selection waits for the product, so that an operation that slices a stack of layers slices
    all updates, and no update is copied as a whole before.

    Attributes:
        operands: Factors of the updates, with the axis of the slots.
        index: Slot of the update, an integer without axes. Slot 0 stands for no update: the value
            that it is added to stays as it is, bit by bit. An index without a slot gives NaN.
        slot_axis: Axis of the slots.
    """

    operands: tuple[Operand, ...]
    index: Operand
    slot_axis: Axis

    def map(self, fn: Callable[[Operand], Operand]) -> SelectTerm:
        operands = tuple(fn(operand) for operand in self.operands)
        return dataclasses.replace(self, operands=operands, index=fn(self.index))

    def add_product(
        self, total: Any, x: Any, product: WeightProduct
    ) -> tuple[Any, Sequence[jax.Array]]:
        return self._add(total, product.multiply(x, self._select(), total)), ()

    def add_materialized(self, total: Any, weight: Any) -> Any:
        return self._add(total, materialize_operands(self._select(), weight, total.dtype))

    def _select(self) -> tuple[Operand, ...]:
        """Returns the operands of the selected update."""
        return tuple(self._select_operand(operand) for operand in self.operands)

    def _select_operand(self, operand: Operand) -> Operand:
        if self.slot_axis not in operand.axes:
            return operand
        place = operand.axes.index(self.slot_axis)
        array = jax.lax.dynamic_index_in_dim(operand.array, self.index.array, place, False)
        return Operand(array, (*operand.axes[:place], *operand.axes[place + 1 :]))

    def _add(self, total: Any, update: Any) -> Any:
        index = self.index.array
        # JAX takes the nearest index in the place of one that does not exist.
        exists = (index >= 0) & (index < self.slot_axis.size)
        return jnp.where(index == 0, total, jnp.where(exists, total + update, jnp.nan))

    def scale(self, factor: Any) -> SelectTerm:
        return dataclasses.replace(self, operands=ProductTerm(self.operands).scale(factor).operands)

    def is_zero_outside(self, axis: Axis) -> bool:
        return ProductTerm(self.operands).is_zero_outside(axis)

    def to_product(self, weight: Any, used_by: str) -> ProductTerm:
        del weight, used_by
        first, *others = self._select()
        one = jnp.ones((), first.array.dtype)
        return ProductTerm((first.map(lambda array: array * self._add(one, 0)), *others))


@register_arrays_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotsLeaf(AdapterLeaf):
    """The factors that several adapters have for one weight.

    Attributes:
        a: (*batch, slots, rank, *inputs), in the order of `axes`.
        b: (*batch, slots, rank, *outputs), with the scale in it.
        shape: The weight's shape.
        axes: What each of the weight's axes does.
        slots: How many adapters there is room for, the bare base counted.
        rank: The highest of them.
    """

    # A scan over layers slices the first axes; a product sums over the last.
    a: jax.Array = array_field("a")  # noqa: RUF009
    b: jax.Array = array_field("b")  # noqa: RUF009
    shape: tuple[int, ...]
    axes: WeightAxes
    slots: int
    rank: int
    share: str = SLOT_INDEX_KEY

    def shared_mismatch(self, shared: Any) -> str | None:
        """Something else than an index."""
        return None if isinstance(shared, SlotIndex) else f"it is a {type(shared).__name__}"

    def adapt(self, weight: FactoredArray, context: LeafContext) -> FactoredArray:
        """Returns `W + A B` of the chosen slot."""
        batch, inputs, outputs = self.axes
        factors = weight.label(
            (self.a, (*batch, "slots", "rank", *inputs)),
            (self.b, (*batch, "slots", "rank", *outputs)),
        )
        slot_axis = factors[0].axes[len(batch)]
        return weight.add_term(SelectTerm(factors, Operand(context.shared.index, ()), slot_axis))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        batch, inputs, outputs = self.axis_sizes
        own = (*batch, self.slots, self.rank)
        return {"a": (*own, *inputs), "b": (*own, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, inputs, outputs = self.axes
        return {"a": (*batch, None, None, *inputs), "b": (*batch, None, None, *outputs)}


@register_arrays_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotIndex(SharedArrays):
    """Which slot is applied: an integer, the same for all weights."""

    index: Any = array_field(FROZEN)  # noqa: RUF009

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"index": ()}


Slots = dict[str, SlotsLeaf]

"""One leaf for each weight that some adapter may adapt, by the weight's path."""


class PaddedFactors(NamedTuple):
    """The factors of one adapter for one weight, as they lie in a slot.

    Attributes:
        a: (*batch, rank, *inputs).
        b: (*batch, rank, *outputs).
    """

    a: np.ndarray
    b: np.ndarray


def empty_slots(
    like: Mapping[str, Any], slots: int, rank: int, dtypes: Mapping[str, Any] | Any = jnp.float32
) -> Slots:
    """Slots without adapters.

    Args:
        like: An adapter, or its shapes: which weights can be adapted, and what their axes do.
        slots: How many adapters there is room for, the bare base counted.
        rank: The highest that an adapter can have.
        dtypes: Of the factors: one, or one for each path.

    Raises:
        ValueError: When there is room for none, or a weight's change is no product of factors.
    """
    if slots < 2:
        raise ValueError(
            f"slots={slots} leaves no room for an adapter beside the bare base, which is the "
            f"first. Use 2 or more."
        )
    if rank < 1:
        raise ValueError(f"rank={rank} leaves no room for an update. Use 1 or more.")
    made: Slots = {}
    for path, leaf in check_adapter(like).items():
        if not leaf.axes.inputs or not leaf.axes.outputs:
            raise ValueError(
                f"like adapts {path!r}, which feeds no product, and slots hold factors of "
                f"products. Leave it out, and keep such changes in a base of their own."
            )
        dtype = dtypes[path] if isinstance(dtypes, Mapping) else dtypes
        held = SlotsLeaf(
            a=jnp.zeros(()),
            b=jnp.zeros(()),
            shape=leaf.shape,
            axes=leaf.axes,
            slots=slots,
            rank=rank,
        )
        zeros = {name: jnp.zeros(shape, dtype) for name, shape in held.shapes().items()}
        made[path] = dataclasses.replace(held, **zeros)
    return made


def select_slot(slots: Slots, index: Any) -> dict[str, Any]:
    """The adapter of one slot, as `lora.apply` takes it.

    Args:
        slots: Of all adapters.
        index: Which one. Zero is the bare base, whose results are those of the base to the bit;
            where there is no such slot, results are NaN and never another adapter's.
    """
    return {**slots, SLOT_INDEX_KEY: SlotIndex(index=jnp.asarray(index, jnp.int32))}


def pad_to_slot(adapter: Mapping[str, Any], slots: Slots) -> dict[str, PaddedFactors]:
    """An adapter's factors as they lie in a slot, on the host; zeros for weights that it leaves
    alone.

    Args:
        adapter: Of LoRA, or of a family whose change is one product of thin factors without regard
            to the weight's numbers.
        slots: What it has to fit.

    Raises:
        ValueError: When it adapts other weights, has a higher rank, or is of another kind.
    """
    leaves = check_adapter(adapter)
    other = [path for path in leaves if path not in slots]
    if other:
        raise ValueError(
            f"The adapter adapts {other[0]!r} ({len(other)} of {len(leaves)} such), for which "
            f"these slots have no place: they hold {len(slots)} weights, such as "
            f"{next(iter(slots))!r}. Make slots like an adapter of all weights that any of them "
            f"adapts."
        )
    made = {}
    for path, held in slots.items():
        empty_slot = {
            name: np.zeros(_drop_slots_axis(held, shape), getattr(held, name).dtype)
            for name, shape in held.shapes().items()
        }
        made[path] = PaddedFactors(**empty_slot)
        if path in leaves:
            _fill_slot_factors(
                made[path], held, *_extract_thin_factors(adapter, path, leaves[path], held)
            )
    return made


def _drop_slots_axis(slots_leaf: SlotsLeaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    batch = len(slots_leaf.axes.batch)
    return (*shape[:batch], *shape[batch + 1 :])


def _extract_thin_factors(
    adapter: Mapping[str, Any], path: str, leaf: AdapterLeaf, slots_leaf: SlotsLeaf
) -> tuple[np.ndarray, np.ndarray]:
    """The adapter's `a` (batch, fan_in, m) and `b` (batch, m, fan_out), scale in it."""
    if (leaf.shape, leaf.axes) != (slots_leaf.shape, slots_leaf.axes):
        raise ValueError(
            f"The adapter on {path!r} is for a weight of shape {leaf.shape} with axes {leaf.axes}, "
            f"and the slots are for {slots_leaf.shape} with {slots_leaf.axes}. Give adapters of one model."
        )
    if getattr(leaf, "residual", False):
        raise ValueError(
            f"The adapter on {path!r} was taken out of its base, so it belongs on another base "
            f"than its neighbours. Put in what jlora.rebase_to_original makes of it."
        )
    factors = None
    if not depends_on_base(adapter, path):
        factors = low_rank_factors(leaf, adapt_weight(adapter, path, None), allow_full_rank=True)
    if factors is None:
        raise ValueError(
            f"The adapter on {path!r} is a {type(leaf).__name__}, whose change is no product of "
            f"two thin factors. Put in the nearest LoRA: jlora.to_lora(adapter, params, rank)."
        )
    a, b = (np.asarray(jax.device_get(factor)) for factor in factors)
    if a.shape[-1] > slots_leaf.rank:
        raise ValueError(
            f"The adapter on {path!r} has rank {a.shape[-1]}, and the slots hold ranks up to "
            f"{slots_leaf.rank}. Make slots of a higher rank, or cut the adapter with jlora.to_lora."
        )
    return a, b


def _fill_slot_factors(
    out: PaddedFactors, slots_leaf: SlotsLeaf, a: np.ndarray, b: np.ndarray
) -> None:
    """Writes thin factors into a padded pair."""
    batch = math.prod(slots_leaf.axis_sizes.batch)
    rank = a.shape[-1]
    out.a.reshape(batch, slots_leaf.rank, -1)[:, :rank] = np.swapaxes(a, -1, -2)
    out.b.reshape(batch, slots_leaf.rank, -1)[:, :rank] = b


@functools.partial(jax.jit, donate_argnums=0)
def set_slot(slots: Slots, index: Any, factors: Mapping[str, PaddedFactors]) -> Slots:
    """The slots with an adapter in one of them. The old ones are given up to the new.

    Args:
        slots: Donated.
        index: Which one, from 1. It is not checked.
        factors: What `pad_to_slot` made.
    """
    made = {}
    for path, held in slots.items():
        axis = len(held.axes.batch)
        a, b = (
            jax.lax.dynamic_update_index_in_dim(old, jnp.asarray(new, old.dtype), index, axis)
            for old, new in ((held.a, factors[path].a), (held.b, factors[path].b))
        )
        made[path] = dataclasses.replace(held, a=a, b=b)
    return made
