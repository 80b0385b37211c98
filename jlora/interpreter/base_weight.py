"""The frozen part of an adapted weight: an array, or what the array is made from where it is used.

A packed weight is unpacked inside the product that needs it, and once more in that product's
gradient. What a training step keeps between the two is the packed form, which is there anyway; a
residual of the full weight would take what packing has saved.

References:
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3, on W being dequantised in both passes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora._quantized_array import QuantizedArray, is_unpacked_along_first_axis, maybe_dequantize
from jlora._sharding import num_shards
from jlora.interpreter import _compat


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sources"],
    meta_fields=["compute_fn", "shape", "dtype", "permutation"],
)
@dataclasses.dataclass(frozen=True)
class DeferredArray:
    """A packed weight after moves that the traced program makes with it (a transpose, a slice).

    Attributes:
        sources: Arrays, packed weights and others of this kind.
        compute_fn: From the sources, as arrays, to the array.
        shape: Of the array.
        dtype: Of the array.
        permutation: Where all that was done to the one source is a transpose, its axes in the new order.
    """

    sources: list[Any]
    compute_fn: Callable[[list[Any]], Any]
    shape: tuple[int, ...]
    dtype: Any
    permutation: tuple[int, ...] | None = None


def is_deferred(value: Any) -> bool:
    """Whether a base is yet to be made."""
    return isinstance(value, QuantizedArray | DeferredArray)


def materialize_base(base: Any) -> Any:
    """A base as an array."""
    if isinstance(base, DeferredArray):
        return base.compute_fn([materialize_base(source) for source in base.sources])
    return maybe_dequantize(base)


def abstractify(base: Any) -> Any:
    """Something of the shape and type of a base."""
    return jax.ShapeDtypeStruct(base.shape, base.dtype) if is_deferred(base) else base


def eval_data_movement(eqn: Any, bases: Sequence[Any]) -> list[Any]:
    """The outputs of an equation that moves or scales entries."""
    deferred = [is_deferred(base) for base in bases]
    if not any(deferred):
        return _compat.bind_eqn(eqn, bases)
    if eqn.primitive.name == "optimization_barrier":
        held = [base for base, later in zip(bases, deferred, strict=True) if not later]
        arrays = iter(_compat.bind_eqn(eqn, held))
        return [b if later else next(arrays) for b, later in zip(bases, deferred, strict=True)]
    # A literal is a number of no type, which it would lose on its way into the product.
    sources = [
        base if later else jnp.asarray(base, atom.aval.dtype)
        for base, later, atom in zip(bases, deferred, eqn.invars, strict=True)
    ]

    def make(number: int) -> Callable[[list[Any]], Any]:
        return lambda arrays: _compat.bind_eqn(eqn, arrays)[number]

    order = _get_permutation(eqn, bases)
    return [
        DeferredArray(sources, make(number), out.aval.shape, out.aval.dtype, order)
        for number, out in enumerate(eqn.outvars)
    ]


def _get_permutation(eqn: Any, bases: Sequence[Any]) -> tuple[int, ...] | None:
    """The axes of a packed weight as an equation leaves them, if it only transposes it."""
    base = bases[0]
    if eqn.primitive.name != "transpose" or not isinstance(base, QuantizedArray):
        return None
    return tuple(eqn.params["permutation"])


def eval_base_product(eqn: Any, values: Sequence[Any]) -> Any:
    """The one output of a product."""
    return apply_rematerialized(lambda arrays: _compat.bind_eqn(eqn, arrays)[0], values)


def apply_rematerialized(fn: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    """What a product makes of arrays, some of which are yet to be made."""
    if not any(is_deferred(value) for value in values):
        return fn(list(values))

    # Nothing is saved but the arguments; the gradient makes the weight again.
    @jax.checkpoint
    def again(values: list[Any]) -> Any:
        held = [value for value in values if not is_deferred(value)]
        return fn(
            [materialize_base(_schedule_after(held, v)) if is_deferred(v) else v for v in values]
        )

    return again(list(values))


def _schedule_after(arrays: Sequence[Any], base: Any) -> Any:
    """The base, which cannot be unpacked before the arrays are there: all weights of a model can be
    at once, and are, if nothing tells the compiler to wait.
    """
    return jax.lax.optimization_barrier(jax.lax.stop_gradient((list(arrays), base)))[1]


def make_scannable(base: Any) -> Any:
    """The base as something of which a scan can take one index after another."""
    if isinstance(base, DeferredArray) and base.permutation is not None:
        turned = base.sources[0].transpose(base.permutation)
        base = turned if is_unpacked_along_first_axis(turned) else base
    if isinstance(base, QuantizedArray) and is_unpacked_along_first_axis(base):
        return base
    return materialize_base(base)


def split_for_shard_map(
    base: Any, spec: Sequence[Any], mesh: Any
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """How a base enters a `shard_map`: what is split, how, and from a shard to its base.

    Args:
        base: Of a weight with as many axes as `spec`.
        spec: The mesh axes that each axis of the weight is split over; None where it is whole.
        mesh: Gives their sizes.
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
