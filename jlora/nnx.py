"""Conversion of Flax NNX modules to a function of a parameter tree, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora import _tree
from jlora._tree import PyTree


def from_nnx(module: Any, method: str = "__call__") -> tuple[Callable[..., Any], PyTree]:
    """Splits a module into a pure function and its variables: `(fn, params)`.

    `fn(params, *args, **kwargs)` returns the module's output and does not modify the module.
    Variables that a call updates (batch statistics, the counts of random streams) are those of
    `params` at every call, so put the module in evaluation mode (`module.eval()`) or pass new
    values for them in `params`.

    Args:
        module: A `flax.nnx.Module`, with arrays or (from `nnx.eval_shape`) only shapes.
        method: Name of the method that `fn` calls.

    Returns:
        The function, and the module's variables as its parameter tree.

    Raises:
        TypeError: The module is not an NNX module.
        ValueError: The module has no such method.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from flax import nnx
        >>> fn, params = jlora.from_nnx(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4))
        >>> list(lora.init(jax.random.key(0), params, jnp.ones((3, 6))))
        ['kernel']
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"module must be a flax.nnx.Module, got {type(module).__name__}. For a Linen module "
            f"pass model.apply to lora_transform."
        )
    if not callable(getattr(module, method, None)):
        raise ValueError(f"method={method!r} must be a method of {type(module).__name__}.")
    graph, params = nnx.split(module)

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **kwargs)

    return fn, params


def update_nnx(module: Any, params: PyTree) -> None:
    """Updates a module in place with parameters, such as merged ones.

    Args:
        module: The `flax.nnx.Module` that was given to `from_nnx`.
        params: Parameter tree of `from_nnx`, with new values.

    Raises:
        ValueError: Paths or shapes differ from the module's; the module is not changed then.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from flax import nnx
        >>> module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        >>> fn, params = jlora.from_nnx(module)
        >>> jlora.update_nnx(module, jax.tree.map(jnp.zeros_like, params))
        >>> bool(jnp.any(module.kernel[...]))
        False
    """
    from flax import nnx

    state = _tree.flatten_with_paths(nnx.state(module))
    new = _tree.flatten_with_paths(params)
    module_shapes = _leaf_shapes(state)
    new_shapes = _leaf_shapes(new)
    for path in (*module_shapes, *new_shapes):
        if module_shapes.get(path) != new_shapes.get(path):
            raise ValueError(
                f"params does not fit the module at {path!r}: it has "
                f"{new_shapes.get(path, 'nothing')} there and the module "
                f"{module_shapes.get(path, 'nothing')}. Pass the tree that from_nnx returned, or "
                f"the result of merge for it."
            )
    nnx.update(module, jax.tree.unflatten(state.treedef, new.leaves))


def _leaf_shapes(flat: _tree.FlatTree) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)}
