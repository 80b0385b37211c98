"""Lineage and content hash of adapters, which identify an adapter independently of its file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora import _validation
from jlora.adapters.base import check_adapter, get_array_fields, static_field_values
from jlora.adapters.layer_layout import unstack_layers
from jlora.checkpoints.text_files import parse_json


@dataclasses.dataclass(frozen=True)
class ParentAdapter:
    """An adapter that another one was merged from.

    Attributes:
        name: Name at the time of the merge, such as the name of its file.
        content: Its `content_hash`.
        weight: Factor on its weight update.

    Raises:
        ValueError: The weight is not finite, or the content is not a content hash.
        TypeError: A field has another type.

    Example:
        >>> from jlora.checkpoints import ParentAdapter
        >>> ParentAdapter(name="math.safetensors", content="0" * 64, weight=0.5).weight
        0.5
    """

    name: str
    content: str
    weight: float

    def __post_init__(self) -> None:
        _validation.check_nonempty_string("ParentAdapter.name", self.name)
        check_content_hash("ParentAdapter.content", self.content)
        if not _validation.is_real_number(self.weight) or not math.isfinite(self.weight):
            raise ValueError(
                f"ParentAdapter.weight={self.weight!r} must be a finite number, the factor on the "
                f"weight update."
            )


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Origin of an adapter.

    Attributes:
        parents: Adapters that it was merged from; empty for a trained adapter.
        method: Method that produced it; empty if unknown.
        recipe: Recipe of the training run, of JSON values. None: there was no recipe.

    Raises:
        TypeError: A field has another type.
        ValueError: The recipe has values that JSON cannot represent.

    Example:
        >>> from jlora.checkpoints import Lineage
        >>> lineage = Lineage(method="trained", recipe={"seed": 0})
        >>> Lineage.from_json(lineage.to_json()) == lineage
        True
    """

    parents: tuple[ParentAdapter, ...] = ()
    method: str = ""
    recipe: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.parents, tuple) or not all(
            isinstance(parent, ParentAdapter) for parent in self.parents
        ):
            raise TypeError(
                f"Lineage.parents={self.parents!r} must be a tuple of ParentAdapter, or () if "
                f"there are none."
            )
        if not isinstance(self.method, str):
            raise TypeError(f"Lineage.method={self.method!r} must be a str, '' if it is unknown.")
        if self.recipe is not None and not isinstance(self.recipe, dict):
            raise TypeError(f"Lineage.recipe={self.recipe!r} must be a dict or None.")
        try:
            json.dumps(self.recipe, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Lineage.recipe must contain only JSON values: {error}. Use "
                f'recipe.model_dump(mode="json").'
            ) from error

    def to_json(self) -> str:
        """Returns the lineage as JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Lineage:
        """Returns the lineage in a JSON text from an untrusted file.

        Args:
            text: JSON, as `to_json` returns it.

        Raises:
            ValueError: The text is not a lineage.
        """
        try:
            fields = dict(parse_json(text, "the lineage"))
            parents = tuple(ParentAdapter(**parent) for parent in fields.pop("parents", ()))
            return cls(parents=parents, **fields)
        except (TypeError, ValueError, OverflowError, RecursionError, AttributeError) as error:
            raise ValueError(f"the lineage is damaged: {error}") from error


def content_hash(adapter: Mapping[str, Any]) -> str:
    """Returns a hash of an adapter's content: its families, their static fields and all arrays.

    It does not depend on the order of the dict or on whether layers are stacked, and is the same
    after saving and loading.

    Args:
        adapter: Adapter, as `init` returns it or trained.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: `adapter` is not an adapter.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora.checkpoints import content_hash
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> len(content_hash(adapter))
        64
    """
    check_adapter(adapter)
    adapter = unstack_layers(adapter)
    return compute_content_hash(describe_adapter(adapter), adapter_arrays(adapter))


def adapter_arrays(adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of an adapter by `path/field`, on this host."""
    return {
        f"{path}/{field.name}": np.asarray(jax.device_get(getattr(node, field.name)), order="C")
        for path, node in adapter.items()
        for field in get_array_fields(node)
        if getattr(node, field.name) is not None
    }


def describe_adapter(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the family and the static fields of every leaf of an adapter, by path, for JSON."""
    return {
        path: {"family": node.family, **static_field_values(node)} for path, node in adapter.items()
    }


def compute_content_hash(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the content hash of a description and of arrays by name."""
    content = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        content.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        content.update(array.tobytes())
    return content.hexdigest()


def check_content_hash(name: str, value: Any) -> None:
    """Raises an error unless a value is a content hash.

    Raises:
        ValueError: The value is not a string of 64 hexadecimal digits.
    """
    is_hexadecimal = isinstance(value, str) and set(value) <= set("0123456789abcdef")
    if not is_hexadecimal or len(value) != hashlib.sha256().digest_size * 2:
        raise ValueError(
            f"{name}={value!r} must be a content hash of 64 hexadecimal digits. Use the result of "
            f"content_hash."
        )
