"""Flax NNX modules as a function of a parameter tree, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora import _tree
from jlora._tree import PyTree


def from_nnx(module: Any, method: str = "__call__") -> tuple[Callable[..., Any], PyTree]:
    """A pure function of the module's variables, and those variables: `(fn, params)`.

    `fn(params, *args, **kwargs)` is what the module would return. The module is not touched by it:
    variables that a call updates (batch statistics, the counts of random streams) are those of
    `params` at every call, so put the module in evaluation mode (`module.eval()`) or pass new
    values for them in `params`.

    Args:
        module: A `flax.nnx.Module`, with arrays or (from `nnx.eval_shape`) only shapes.
        method: The method that `fn` calls.

    Raises:
        TypeError: When it is no NNX module.
        ValueError: When it has no such method.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"from_nnx got a {type(module).__name__}, not a flax.nnx.Module. For a Linen module "
            f"give model.apply to lora_transform."
        )
    if not callable(getattr(module, method, None)):
        raise ValueError(f"method={method!r} is none of {type(module).__name__}'s methods.")
    graph, params = nnx.split(module)

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **kwargs)

    return fn, params


def update_nnx(module: Any, params: PyTree) -> None:
    """Puts parameters, such as merged ones, into the module they were taken from.

    Raises:
        ValueError: When paths or shapes differ from the module's; it is then left as it was.
    """
    from flax import nnx

    own = _tree.flatten_with_paths(nnx.state(module))
    new = _tree.flatten_with_paths(params)
    mine = {p: np.shape(leaf) for p, leaf in zip(own.paths, own.leaves, strict=True)}
    theirs = {p: np.shape(leaf) for p, leaf in zip(new.paths, new.leaves, strict=True)}
    for path in (*mine, *theirs):
        if mine.get(path) != theirs.get(path):
            raise ValueError(
                f"params does not fit the module at {path!r}: it has {theirs.get(path, 'nothing')} "
                f"there and the module {mine.get(path, 'nothing')}. Pass the tree that from_nnx "
                f"returned, or what merge made of it."
            )
    nnx.update(module, jax.tree.unflatten(own.treedef, new.leaves))
