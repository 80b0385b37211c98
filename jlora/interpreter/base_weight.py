"""Frozen base weights: an array, or a quantized weight that is dequantized where it is used.

A quantized weight is dequantized inside the product that needs it, and again in the gradient of
that product. Between the two, a training step keeps the quantized form, which is in memory anyway;
a residual of the dequantized weight would cost the memory that quantization saves.

References:
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3: W is dequantized in both passes.
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
    """A quantized weight after data movement in the traced program (a transpose, a slice).

    Attributes:
        sources: Inputs of the computation: arrays, quantized arrays and deferred arrays.
        compute_fn: Function from the materialized sources to the array.
        shape: Shape of the array.
        dtype: Type of the array.
        permutation: Axes of the only source in their new order, if the array is its transpose.
            None: any other computation.
    """

    sources: list[Any]
    compute_fn: Callable[[list[Any]], Any]
    shape: tuple[int, ...]
    dtype: Any
    permutation: tuple[int, ...] | None = None


def is_deferred(value: Any) -> bool:
    """Whether a base is quantized or deferred, so that an array has yet to be computed from it."""
    return isinstance(value, QuantizedArray | DeferredArray)


def materialize_base(base: Any) -> Any:
    """Returns a base as an array."""
    if isinstance(base, DeferredArray):
        return base.compute_fn([materialize_base(source) for source in base.sources])
    return maybe_dequantize(base)


def abstractify(base: Any) -> Any:
    """Returns the shape and type of a deferred base, and any other value unchanged."""
    return jax.ShapeDtypeStruct(base.shape, base.dtype) if is_deferred(base) else base


def eval_data_movement(eqn: Any, bases: Sequence[Any]) -> list[Any]:
    """Evaluates an equation that moves or scales entries, deferred where an input is deferred."""
    deferred = [is_deferred(base) for base in bases]
    if not any(deferred):
        return _compat.bind_eqn(eqn, bases)
    if eqn.primitive.name == "optimization_barrier":
        present = [base for base, defer in zip(bases, deferred, strict=True) if not defer]
        arrays = iter(_compat.bind_eqn(eqn, present))
        return [b if defer else next(arrays) for b, defer in zip(bases, deferred, strict=True)]
    # A literal is a Python number, so it would lose its type before it reaches the product.
    sources = [
        base if defer else jnp.asarray(base, atom.aval.dtype)
        for base, defer, atom in zip(bases, deferred, eqn.invars, strict=True)
    ]

    def select_output(index: int) -> Callable[[list[Any]], Any]:
        return lambda arrays: _compat.bind_eqn(eqn, arrays)[index]

    permutation = _get_permutation(eqn, bases)
    return [
        DeferredArray(sources, select_output(index), out.aval.shape, out.aval.dtype, permutation)
        for index, out in enumerate(eqn.outvars)
    ]


def _get_permutation(eqn: Any, bases: Sequence[Any]) -> tuple[int, ...] | None:
    """Returns the axis permutation of an equation that transposes a quantized weight, else None."""
    base = bases[0]
    if eqn.primitive.name != "transpose" or not isinstance(base, QuantizedArray):
        return None
    return tuple(eqn.params["permutation"])


def eval_base_product(eqn: Any, values: Sequence[Any]) -> Any:
    """Evaluates a product with one output, without residuals of dequantized weights."""
    return apply_rematerialized(lambda arrays: _compat.bind_eqn(eqn, arrays)[0], values)


def apply_rematerialized(fn: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    """Calls `fn` on arrays; the gradient recomputes the deferred ones instead of storing them."""
    if not any(is_deferred(value) for value in values):
        return fn(list(values))

    # Only the arguments are saved; the gradient dequantizes the weight again.
    @jax.checkpoint
    def rematerialized(values: list[Any]) -> Any:
        arrays = [value for value in values if not is_deferred(value)]
        return fn(
            [materialize_base(_schedule_after(arrays, v)) if is_deferred(v) else v for v in values]
        )

    return rematerialized(list(values))


def _schedule_after(arrays: Sequence[Any], base: Any) -> Any:
    """Returns the base with a scheduling dependency on the arrays.

    Without it the compiler may dequantize all weights of a model at once, because none of them
    depends on an activation.
    """
    return jax.lax.optimization_barrier(jax.lax.stop_gradient((list(arrays), base)))[1]


def make_scannable(base: Any) -> Any:
    """Returns the base in a form that a scan can slice along the first axis.

    It stays quantized if no packing runs along that axis, and is materialized otherwise.
    """
    if isinstance(base, DeferredArray) and base.permutation is not None:
        transposed = base.sources[0].transpose(base.permutation)
        base = transposed if is_unpacked_along_first_axis(transposed) else base
    if isinstance(base, QuantizedArray) and is_unpacked_along_first_axis(base):
        return base
    return materialize_base(base)


def split_for_shard_map(
    base: Any, spec: Sequence[Any], mesh: Any
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Prepares a base as an input of `jax.shard_map`.

    Args:
        base: Base of a weight with as many axes as `spec`.
        spec: Mesh axes that each axis of the weight is sharded over. None: not sharded.
        mesh: Mesh that has these axes.

    Returns:
        The arrays to shard, their partition specs, and a function from a shard to its base.
    """
    if isinstance(base, QuantizedArray):
        sharded = base.shard([num_shards(entry, mesh) for entry in spec])
        if sharded is not None:
            arrays, treedef = jax.tree.flatten(sharded)
            specs = [
                PartitionSpec(*(e if n > 1 else None for n, e in zip(a.shape, spec, strict=True)))
                for a in arrays
            ]
            return arrays, specs, lambda shard: jax.tree.unflatten(treedef, shard)
    return materialize_base(base), PartitionSpec(*spec), lambda shard: shard
