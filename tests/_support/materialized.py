"""Records which adapted weights are materialized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jlora.interpreter.factored_array import FactoredArray


@contextlib.contextmanager
def record_materialized() -> Iterator[list[str]]:
    """A list of the paths of weights that are materialized inside the context."""
    paths: list[str] = []
    materialize = FactoredArray.materialize

    def recording(weight: FactoredArray) -> Any:
        if not weight.is_gathered:
            paths.append(weight.path)
        return materialize(weight)

    with mock.patch.object(FactoredArray, "materialize", recording):
        yield paths
