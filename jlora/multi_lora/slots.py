"""Slots: several low-rank adapters of one model stacked in arrays, one of which an index selects.

The arrays have a fixed number of slots and a fixed rank. An adapter is padded with zeros to that
rank, and its scale is multiplied into `B`. Adding, replacing and removing an adapter therefore
changes values but no shapes, so that no compiled program is compiled again. Slot 0 stays empty and
stands for the bare base.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
    WeightAxes,
    WeightProduct,
    materialize_operands,
)

SLOT_INDEX_KEY = "slot"  # Key of the slot index in the adapter that is applied.


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
    """The factors of several adapters for one weight.

    Attributes:
        a: (*batch, slots, rank, *inputs), in the order of `axes`.
        b: (*batch, slots, rank, *outputs), with the scale multiplied in.
        shape: Shape of the weight.
        axes: Role of each axis of the weight.
        slots: Number of slots, including slot 0 for the bare base.
        rank: Highest rank that an adapter can have.
        share: Key of the slot index in the adapter.
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
        """Returns why the shared value is not a slot index; None if it is one."""
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
        leading = (*batch, self.slots, self.rank)
        return {"a": (*leading, *inputs), "b": (*leading, *outputs)}

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        batch, inputs, outputs = self.axes
        return {"a": (*batch, None, None, *inputs), "b": (*batch, None, None, *outputs)}


@register_arrays_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotIndex(SharedArrays):
    """The slot that is applied: an integer, the same for all weights."""

    index: Any = array_field(FROZEN)  # noqa: RUF009

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"index": ()}


Slots = dict[str, SlotsLeaf]

"""Mapping from the path of each weight that an adapter may adapt to the factors of all slots."""


class PaddedFactors(NamedTuple):
    """The factors of one adapter for one weight, padded to the shape of a slot.

    Attributes:
        a: (*batch, rank, *inputs).
        b: (*batch, rank, *outputs), with the scale multiplied in.
    """

    a: np.ndarray
    b: np.ndarray


def empty_slots(
    like: Mapping[str, Any], slots: int, rank: int, dtypes: Mapping[str, Any] | Any = jnp.float32
) -> Slots:
    """Returns slots without adapters.

    Args:
        like: An adapter, or its shapes, whose paths and axes are those of the weights that any
            adapter may adapt.
        slots: Number of slots, including slot 0 for the bare base; 2 or more.
        rank: Highest rank that an adapter can have; 1 or more.
        dtypes: Type of the factors: one for all, or one for each path.

    Returns:
        Zeros, one leaf for each weight.

    Raises:
        ValueError: `slots` or `rank` leaves no room for an adapter, or the update of a weight is
            not a product of factors.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> slots = multi_lora.empty_slots(adapter, slots=4, rank=8)
        >>> slots["w"].a.shape, slots["w"].b.shape
        ((4, 8, 3), (4, 8, 2))
    """
    if slots < 2:
        raise ValueError(
            f"slots={slots} must be 2 or more: slot 0 is the bare base, and every adapter needs "
            f"another."
        )
    if rank < 1:
        raise ValueError(f"rank={rank} must be 1 or more, the highest rank of any adapter.")
    result: Slots = {}
    for path, leaf in check_adapter(like).items():
        if not leaf.axes.inputs or not leaf.axes.outputs:
            raise ValueError(
                f"like must adapt only weights of products, got {path!r}, which is used in none: "
                f"slots hold the two factors of an update. Remove it, and keep its updates in the "
                f"base."
            )
        dtype = dtypes[path] if isinstance(dtypes, Mapping) else dtypes
        slots_leaf = SlotsLeaf(
            a=jnp.zeros(()),
            b=jnp.zeros(()),
            shape=leaf.shape,
            axes=leaf.axes,
            slots=slots,
            rank=rank,
        )
        zeros = {name: jnp.zeros(shape, dtype) for name, shape in slots_leaf.shapes().items()}
        result[path] = dataclasses.replace(slots_leaf, **zeros)
    return result


def select_slot(slots: Slots, index: Any) -> dict[str, Any]:
    """Returns one slot as an adapter for `lora.apply` and `lora.merge`.

    Args:
        slots: Factors of all adapters.
        index: Integer, concrete or traced. For 0 results are those of the bare base, bit for bit.
            For a slot that does not exist they are NaN, never those of another adapter.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((1, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> slots = multi_lora.empty_slots(adapter, slots=2, rank=2)
        >>> bool((lora.apply(params, multi_lora.select_slot(slots, 0), x) == x @ params["w"]).all())
        True
    """
    return {**slots, SLOT_INDEX_KEY: SlotIndex(index=jnp.asarray(index, jnp.int32))}


def pad_to_slot(adapter: Mapping[str, Any], slots: Slots) -> dict[str, PaddedFactors]:
    """Returns an adapter's factors on the host, padded with zeros to the shape of a slot.

    Weights that the adapter does not adapt get zeros.

    Args:
        adapter: Adapter of LoRA, or of another family whose update is one product of two thin
            factors that does not depend on the base weight.
        slots: Slots that the factors have to fit.

    Raises:
        ValueError: The adapter adapts other weights, has a higher rank, or is of a family whose
            update is not such a product.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> slots = multi_lora.empty_slots(adapter, slots=4, rank=8)
        >>> multi_lora.pad_to_slot(adapter, slots)["w"].a.shape
        (8, 3)
    """
    leaves = check_adapter(adapter)
    missing = [path for path in leaves if path not in slots]
    if missing:
        raise ValueError(
            f"The adapter adapts {missing[0]!r} ({len(missing)} of {len(leaves)} such), which is "
            f"not among the {len(slots)} weights of these slots, such as {next(iter(slots))!r}. "
            f"Build the slots from an adapter of all weights that any adapter adapts."
        )
    result = {}
    for path, slots_leaf in slots.items():
        padded = {
            name: np.zeros(_drop_slots_axis(slots_leaf, shape), getattr(slots_leaf, name).dtype)
            for name, shape in slots_leaf.shapes().items()
        }
        result[path] = PaddedFactors(**padded)
        if path in leaves:
            a, b = _extract_thin_factors(adapter, path, leaves[path], slots_leaf)
            _fill_slot_factors(result[path], slots_leaf, a, b)
    return result


def _drop_slots_axis(slots_leaf: SlotsLeaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    batch = len(slots_leaf.axes.batch)
    return (*shape[:batch], *shape[batch + 1 :])


def _extract_thin_factors(
    adapter: Mapping[str, Any], path: str, leaf: AdapterLeaf, slots_leaf: SlotsLeaf
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `a` (batch, fan_in, m) and `b` (batch, m, fan_out) with the scale multiplied in."""
    if (leaf.shape, leaf.axes) != (slots_leaf.shape, slots_leaf.axes):
        raise ValueError(
            f"The adapter on {path!r} must be for a weight of shape {slots_leaf.shape} with axes "
            f"{slots_leaf.axes}, as the slots are, got {leaf.shape} with {leaf.axes}. Use adapters "
            f"of one model."
        )
    if getattr(leaf, "residual", False):
        raise ValueError(
            f"The adapter on {path!r} was subtracted from its base at initialization, so it "
            f"belongs on another base than the other adapters. Convert it with "
            f"jlora.rebase_to_original first."
        )
    factors = None
    if not depends_on_base(adapter, path):
        factors = low_rank_factors(leaf, adapt_weight(adapter, path, None), allow_full_rank=True)
    if factors is None:
        raise ValueError(
            f"The adapter on {path!r} is a {type(leaf).__name__}, whose update is not a product of "
            f"two thin factors. Convert it to the nearest LoRA with jlora.to_lora(adapter, params, "
            f"rank)."
        )
    a, b = (np.asarray(jax.device_get(factor)) for factor in factors)
    if a.shape[-1] > slots_leaf.rank:
        raise ValueError(
            f"The adapter on {path!r} has rank {a.shape[-1]}, but the slots hold ranks up to "
            f"{slots_leaf.rank}. Build slots of a higher rank, or reduce the adapter's with "
            f"jlora.to_lora."
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
    """Returns the slots with an adapter in one of them.

    Args:
        slots: Factors of all adapters. Their buffers are donated: do not use them afterwards.
        index: Slot to write, 1 or more; not checked.
        factors: Result of `pad_to_slot`.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> slots = multi_lora.empty_slots(adapter, slots=2, rank=2)
        >>> slots = multi_lora.set_slot(slots, 1, multi_lora.pad_to_slot(adapter, slots))
        >>> bool((slots["w"].a[1] == adapter["w"].a.T).all())
        True
    """
    result = {}
    for path, leaf in slots.items():
        axis = len(leaf.axes.batch)
        a, b = (
            jax.lax.dynamic_update_index_in_dim(old, jnp.asarray(new, old.dtype), index, axis)
            for old, new in ((leaf.a, factors[path].a), (leaf.b, factors[path].b))
        )
        result[path] = dataclasses.replace(leaf, a=a, b=b)
    return result


copy_and_set_slot = jax.jit(inspect.unwrap(set_slot))  # The given slots stay usable.
