"""Weights that stay in a file, or are not computed yet, until their values are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class StoredWeight(jax.ShapeDtypeStruct):
    """Abstract value of a weight that can be read; nothing keeps what was read.

    Functions that only need shapes take it like any abstract value. NumPy reads it.

    Attributes:
        read: Function that returns the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], Any]) -> None:
        super().__init__(shape, dtype)
        self.read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the array, for NumPy."""
        return np.array(jax.device_get(self.read()), dtype=dtype, copy=copy)


def read_weight(leaf: Any) -> Any:
    """Returns a leaf of a parameter tree, which is read if it is stored."""
    return leaf.read() if isinstance(leaf, StoredWeight) else leaf
