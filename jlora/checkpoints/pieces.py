"""Weights of a model as pieces that are tensors of a checkpoint, in both directions.

A weight may be one tensor with its axes turned, a stack of the tensors of many layers or experts,
or several tensors side by side. In each case it is a set of boxes, and every box is one tensor:

    weight[starts[0] : starts[0] + box[0], ...] == tensor.transpose(order).reshape(box)
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.checkpoints.tensors import DTYPES, Tensors, listed
from jlora.packed import shardings
from jlora.quantization.leaf import Quantized
from jlora.quantization.rules import axis_of, quantized_weight
from jlora.quantization.schemes import Scheme
from jlora.splitting import fitting

Sharding = jax.sharding.Sharding


class Piece(NamedTuple):
    """One tensor and its place in a weight.

    Attributes:
        key: The tensor's name.
        order: Which axis of the tensor each axis of the box is; those of stacks are left out.
        starts: Where the box begins, one per axis of the weight.
        box: Its shape, one per axis of the weight; 1 for the axes of stacks, which come first.
    """

    key: str
    order: tuple[int, ...]
    starts: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def stacks(self) -> int:
        """How many axes of the weight are stacks."""
        return len(self.box) - len(self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        turned = self.box[self.stacks :]
        return tuple(turned[self.order.index(axis)] for axis in range(len(self.order)))

    def to_box(self, tensor: Any) -> Any:
        """The tensor as the weight lays it out."""
        return tensor.transpose(self.order).reshape(self.box)

    def to_tensor(self, box: Any) -> Any:
        """The inverse of `to_box`."""
        turned = box.reshape(self.box[self.stacks :])
        return turned.transpose(tuple(int(i) for i in np.argsort(self.order)))


class Weight(NamedTuple):
    """A weight of the model.

    Attributes:
        shape: As the model has it.
        pieces: The boxes that fill it.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def whole(key: str, shape: Sequence[int], order: Sequence[int] | None = None) -> Weight:
    """A weight that is one tensor, with its axes in the order given."""
    axes = tuple(order) if order is not None else tuple(range(len(shape)))
    return Weight(tuple(shape), (Piece(key, axes, (0,) * len(shape), tuple(shape)),))


def stacked(weights: Sequence[Weight]) -> Weight:
    """Weights of one shape, one upon the other along a new first axis."""
    pieces = [
        piece._replace(starts=(number, *piece.starts), box=(1, *piece.box))
        for number, weight in enumerate(weights)
        for piece in weight.pieces
    ]
    return Weight((len(weights), *weights[0].shape), tuple(pieces))


def side_by_side(weights: Sequence[Weight], axis: int = -1) -> Weight:
    """Weights joined along an axis."""
    shape = list(weights[0].shape)
    axis %= len(shape)
    pieces, start = [], 0
    for weight in weights:
        for piece in weight.pieces:
            starts = list(piece.starts)
            starts[axis] += start
            pieces.append(piece._replace(starts=tuple(starts)))
        start += weight.shape[axis]
    shape[axis] = start
    return Weight(tuple(shape), tuple(pieces))


def check(tensors: Tensors, weights: Mapping[str, Weight], carried: re.Pattern[str]) -> None:
    """Refuses a checkpoint whose tensors are not those of the weights.

    Args:
        tensors: The checkpoint.
        weights: What the model needs.
        carried: The names of tensors that the model can do without.

    Raises:
        ValueError: Names every tensor that is missing, unknown, or of another shape or dtype.
    """
    pieces = {piece.key: piece for weight in weights.values() for piece in weight.pieces}
    problems = [f"{key} is missing" for key in pieces if key not in tensors.headers]
    problems += [
        f"{key} is unknown"
        for key in tensors.headers
        if key not in pieces and not carried.fullmatch(key)
    ]
    for key, piece in pieces.items():
        header = tensors.headers.get(key)
        if header is None:
            continue
        if header.shape != piece.shape:
            problems.append(f"{key} has shape {header.shape} instead of {piece.shape}")
        if header.dtype not in DTYPES:
            problems.append(f"{key} has dtype {header.dtype}, none of {', '.join(DTYPES)}")
    if problems:
        raise ValueError(
            f"{tensors.where} is not the checkpoint that its config.json describes: "
            f"{listed(problems)}. Use files that one `save_pretrained` wrote."
        )


_LOADED = ("float32", "bfloat16", "float16", "float64")


def load(
    tensors: Tensors,
    weights: Mapping[str, Weight],
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], Sharding | None],
    schemes: Mapping[str, Scheme] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """The weights as arrays on their devices, read one piece at a time.

    The host holds no more than one piece, and of that only what its devices need.

    Args:
        tensors: The checkpoint, checked.
        weights: What to load, by path.
        dtype: Of all weights; each file's own when None.
        sharding: A path and shape to where the weight belongs; JAX's default device when None.
        schemes: How weights are quantised, by path. Of these the devices hold one layer (one
            expert) at a time as it was.

    Raises:
        ValueError: The dtype is none of weights.
    """
    if dtype is not None and jnp.dtype(dtype).name not in _LOADED:
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name} would not hold the weights. Use one of "
            f"{', '.join(_LOADED)}."
        )
    loaded: dict[str, Any] = {}
    for path, weight in weights.items():
        load = _loaded if path not in schemes else functools.partial(_quantized, schemes[path])
        loaded[path] = load(tensors, weight, dtype, functools.partial(sharding, path))
    return loaded


def _loaded(
    tensors: Tensors,
    weight: Weight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> jax.Array:
    dtype, place = _place(tensors, weight, dtype, sharding)
    if len(weight.pieces) == 1:
        return _cast(_box(tensors, weight.pieces[0], place), dtype)
    array = _zeros(jax.ShapeDtypeStruct(weight.shape, dtype), place)
    for piece in weight.pieces:
        box = _box(tensors, piece, fitting(place, piece.box))
        array = _filled(array, box, piece.starts)
    return array


def _zeros(like: Any, places: Any) -> Any:
    zeros = lambda: jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), like)  # noqa: E731
    return jax.jit(zeros, out_shardings=places)()


def _place(
    tensors: Tensors,
    weight: Weight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> tuple[Any, Sharding]:
    """The type that a weight gets, and where it belongs."""
    stored = [DTYPES[tensors.headers[piece.key].dtype] for piece in weight.pieces]
    dtype = jnp.dtype(functools.reduce(jnp.promote_types, stored) if dtype is None else dtype)
    place = sharding(jax.ShapeDtypeStruct(weight.shape, dtype))
    return dtype, place or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _quantized(
    scheme: Scheme,
    tensors: Tensors,
    weight: Weight,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[jax.ShapeDtypeStruct], Sharding | None],
) -> Quantized:
    """A weight that is quantised layer by layer (expert by expert), while it is read."""
    kind, place = _place(tensors, weight, dtype, sharding)
    stacks = weight.pieces[0].stacks
    layers: dict[tuple[int, ...], list[Piece]] = {}
    for piece in weight.pieces:
        at, within = piece.starts[:stacks], (0,) * stacks + piece.starts[stacks:]
        layers.setdefault(at, []).append(piece._replace(starts=within))
    shape = (1,) * stacks + weight.shape[stacks:]
    like = quantized_like(weight, kind, scheme)
    whole = _zeros(like, shardings(like, place))
    for at, pieces in layers.items():
        layer = Weight(shape, tuple(pieces))
        array = _loaded(tensors, layer, kind, lambda _: fitting(place, shape))
        starts = at + (0,) * (len(shape) - stacks)
        one = quantized_weight(array, scheme, like.axis)
        whole = jax.tree.map(lambda rest, part: _filled(rest, part, starts), whole, one)  # noqa: B023
    return whole


def quantized_like(weight: Weight, dtype: jax.typing.DTypeLike, scheme: Scheme) -> Quantized:
    """The shapes of a weight in a scheme, which are those of its layers, stacked."""
    axis = axis_of(weight.shape[weight.pieces[0].stacks :], scheme)
    return quantized_weight(jax.ShapeDtypeStruct(weight.shape, dtype), scheme, axis)


def _box(tensors: Tensors, piece: Piece, place: Sharding) -> jax.Array:
    """A piece on its devices, of which each process reads what its devices hold."""

    def region(index: Any) -> np.ndarray:
        turned = index[piece.stacks :]
        wanted = tuple(turned[piece.order.index(axis)] for axis in range(len(piece.order)))
        part = tensors.read(piece.key, wanted)
        shape = (1,) * piece.stacks + tuple(part.shape[axis] for axis in piece.order)
        return part.transpose(piece.order).reshape(shape)

    return jax.make_array_from_callback(piece.box, place, region)


@functools.partial(jax.jit, static_argnums=1)
def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _filled(array: jax.Array, box: jax.Array, starts: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_update_slice(array, box.astype(array.dtype), starts)


def headers(
    weights: Mapping[str, Weight], dtype_of: Callable[[str], Any]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The dtype and shape of every tensor that the weights make."""
    return {
        piece.key: (dtype_of(piece.key), piece.shape)
        for weight in weights.values()
        for piece in weight.pieces
    }


def maker(weights: Mapping[str, Weight], arrays: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
    """A tensor's name to the tensor, out of the model's arrays; one comes to the host at a time."""
    places = {p.key: (path, p) for path, weight in weights.items() for p in weight.pieces}

    def make(key: str) -> np.ndarray:
        path, piece = places[key]
        box = arrays[path]
        if piece.box != weights[path].shape:
            sizes = zip(piece.starts, piece.box, strict=True)
            box = box[tuple(slice(start, start + size) for start, size in sizes)]
        return piece.to_tensor(np.asarray(jax.device_get(box)))

    return make
