"""Where an adapter comes from, and which adapter it is, whatever its file is called."""

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


@dataclasses.dataclass(frozen=True)
class ParentAdapter:
    """An adapter that another was made of.

    Attributes:
        name: What it was called then, such as its file's name.
        content: Its `content_hash`.
        weight: What its change was multiplied by.

    Raises:
        ValueError: For a weight that is not finite, or a content that is no such hash.
        TypeError: For a field of another type.
    """

    name: str
    content: str
    weight: float

    def __post_init__(self) -> None:
        _validation.check_nonempty_string("Parent.name", self.name)
        check_content_hash("Parent.content", self.content)
        if not _validation.is_real_number(self.weight) or not math.isfinite(self.weight):
            raise ValueError(f"Parent.weight={self.weight!r} is no finite number.")


@dataclasses.dataclass(frozen=True)
class Lineage:
    """How an adapter was made.

    Attributes:
        parents: The adapters it was made of; none where it was trained.
        method: What made it, as a text; empty where that is unknown.
        recipe: The training run's recipe, of values that JSON can hold; None where there was none.

    Raises:
        TypeError: For a field of another type.
        ValueError: For a recipe that JSON cannot hold.
    """

    parents: tuple[ParentAdapter, ...] = ()
    method: str = ""
    recipe: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.parents, tuple) or not all(
            isinstance(parent, ParentAdapter) for parent in self.parents
        ):
            raise TypeError(f"Lineage.parents={self.parents!r} is no tuple of Parent.")
        if not isinstance(self.method, str):
            raise TypeError(f"Lineage.method={self.method!r} is no text.")
        if self.recipe is not None and not isinstance(self.recipe, dict):
            raise TypeError(f"Lineage.recipe={self.recipe!r} is neither a dict nor None.")
        try:
            json.dumps(self.recipe, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Lineage.recipe holds what JSON does not: {error}. Give what "
                f'recipe.model_dump(mode="json") makes.'
            ) from error

    def to_json(self) -> str:
        """The lineage as a text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Lineage:
        """The lineage of such a text, which anybody may have written.

        Raises:
            ValueError: When it is none.
        """
        try:
            held = dict(json.loads(text))
            parents = tuple(ParentAdapter(**parent) for parent in held.pop("parents", ()))
            return cls(parents=parents, **held)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"the lineage is damaged: {error}") from error


def content_hash(adapter: Mapping[str, Any]) -> str:
    """A hash of all that an adapter is: its families, their facts, and every number.

    It does not depend on the order of the dict, and is the same after saving and loading.

    Args:
        adapter: What `init` returned, trained.

    Raises:
        TypeError: When it is no adapter.
    """
    check_adapter(adapter)
    return compute_content_hash(describe_adapter(adapter), adapter_arrays(adapter))


def adapter_arrays(adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an adapter, by the path of the weight and their own name."""
    return {
        f"{path}/{field.name}": np.asarray(jax.device_get(getattr(node, field.name)), order="C")
        for path, node in adapter.items()
        for field in get_array_fields(node)
        if getattr(node, field.name) is not None
    }


def describe_adapter(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The family and the facts of every part of an adapter, by path, as JSON can hold them."""
    return {
        path: {"family": node.family, **static_field_values(node)} for path, node in adapter.items()
    }


def compute_content_hash(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The content hash, of a description and the arrays by name."""
    content = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        content.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        content.update(array.tobytes())
    return content.hexdigest()


def check_content_hash(name: str, value: Any) -> None:
    """Refuses what is no content hash.

    Raises:
        ValueError: It is another text, or no text.
    """
    hexadecimal = isinstance(value, str) and set(value) <= set("0123456789abcdef")
    if not hexadecimal or len(value) != hashlib.sha256().digest_size * 2:
        raise ValueError(f"{name}={value!r} is no content hash. Give what content_hash returns.")
