"""Serialization of jlora's pytree nodes by `jax.export` and by `flax.serialization`.

Both have registries of node classes. A node's arrays go where every array goes; its static fields
are written as JSON beside them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.serialization
import jax.export

STATIC_KEY = "static"  # Of the static fields in the state dict of a node.


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def register_serialization(
    cls: type,
    array_fields: Sequence[str],
    static_fields: Sequence[str],
    *,
    decoders: Mapping[str, Callable[[Any], Any]] | None = None,
    encoders: Mapping[str, Callable[[Any], Any]] | None = None,
) -> None:
    """Registers a dataclass of the pytree with `jax.export` and `flax.serialization`.

    Restoring with Flax takes the structure from a target, whose static fields must be those of the
    bytes: an adapter of another alpha is an error.

    Args:
        cls: Class, which `jax.tree_util.register_dataclass` has registered.
        array_fields: Fields that are children of the pytree.
        static_fields: All other fields, in the order of the registration.
        decoders: Functions from a JSON value, with tuples for lists, to a static field's value.
        encoders: Functions from a static field's value to a JSON value.
    """
    decoders, encoders = decoders or {}, encoders or {}

    def encode(values: Sequence[Any]) -> str:
        fields = zip(static_fields, values, strict=True)
        return json.dumps({name: encoders.get(name, lambda v: v)(value) for name, value in fields})

    def serialize_static(values: Any) -> bytes:
        return encode(values).encode()

    def deserialize_static(data: bytes | bytearray) -> tuple[Any, ...]:
        fields = json.loads(bytes(data))
        return tuple(
            decoders.get(name, lambda v: v)(_to_tuples(fields[name])) for name in static_fields
        )

    def to_state_dict(node: Any) -> dict[str, Any]:
        arrays = {name: getattr(node, name) for name in array_fields}
        state: dict[str, Any] = {
            name: flax.serialization.to_state_dict(array)
            for name, array in arrays.items()
            if array is not None
        }
        if static_fields:
            state[STATIC_KEY] = encode([getattr(node, name) for name in static_fields])
        return state

    def from_state_dict(target: Any, state: dict[str, Any]) -> Any:
        expected = to_state_dict(target)
        if state.keys() != expected.keys() or state.get(STATIC_KEY) != expected.get(STATIC_KEY):
            raise ValueError(
                f"The {cls.__name__} in the state has {_describe(state)}, and that of the target "
                f"{_describe(expected)}. Use a target of the same config."
            )
        arrays = {
            name: flax.serialization.from_state_dict(getattr(target, name), state[name], name)
            for name in expected
            if name != STATIC_KEY
        }
        rest = {name: getattr(target, name) for name in static_fields}
        missing = dict.fromkeys(name for name in array_fields if name not in arrays)
        return cls(**missing, **arrays, **rest)

    # A class that is defined again (in a notebook) cannot take the place of the first.
    with contextlib.suppress(ValueError):
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"{cls.__module__}.{cls.__qualname__}",
            serialize_auxdata=serialize_static,
            deserialize_auxdata=deserialize_static,
        )
    flax.serialization.register_serialization_state(
        cls, to_state_dict, from_state_dict, override=True
    )


def _describe(state: Mapping[str, Any]) -> str:
    arrays = sorted(name for name in state if name != STATIC_KEY)
    return f"the arrays {arrays} and the fields {state.get(STATIC_KEY, '{}')}"
