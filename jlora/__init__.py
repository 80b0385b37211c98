"""LoRA for JAX and Flax: a transform of a function and its parameter tree."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora import initializers as initializers
    from jlora._api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `jlora --help` does not import JAX.
    if importlib.util.find_spec(f"jlora.{name}") is not None:
        return importlib.import_module(f"jlora.{name}")
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    api = importlib.import_module("jlora._api")
    if name == "__all__":
        return [*api.__all__, "__version__"]
    if name not in api.__all__:
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("jlora._api").__all__})
