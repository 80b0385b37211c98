"""Conversion of Flax NNX modules to a function of a parameter tree, and back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jlora import _tree
from jlora._tree import PyTree


def from_nnx(module: Any, method: str = "__call__") -> tuple[Callable[..., Any], PyTree]:
    """Splits a module into a pure function and its variables: `(fn, params)`.

    `fn(params, *args, rngs=None, train=None, **kwargs)` returns the module's output and modifies
    neither `params` nor the module. `params` is a copy: it does not follow later changes of the
    module, nor the module those of `params`.

    `rngs` is a key, or a mapping of keys by the name of a random stream (`{"dropout": key}`):
    random streams of the module start from it, and a method with an argument `rngs` gets a
    `flax.nnx.Rngs` of it. Pass another key at every step. Without it every call draws the same
    numbers, with a warning.

    `train` is True for training mode and False for evaluation mode (`module.train()` and
    `module.eval()`); None keeps the mode in which the module was given. A method with an argument
    `train`, `training`, `is_training`, `deterministic` or `use_running_average` gets that instead.

    Variables that a call updates, such as batch statistics and caches, are those of `params` again
    at the next call, with a warning: evaluation mode uses the stored statistics.

    Args:
        module: A `flax.nnx.Module`, with arrays or (from `nnx.eval_shape`) only shapes.
        method: Name of the method that `fn` calls.

    Returns:
        The function, and a copy of the module's variables as its parameter tree.

    Raises:
        TypeError: The module is not an NNX module. From `fn`: an argument contains a
            `flax.nnx.Rngs`, whose counts could not advance.
        ValueError: The module has no such method. From `fn`: it has no random stream of that name.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from flax import nnx
        >>> fn, params = jlora.from_nnx(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4))
        >>> list(lora.init(jax.random.key(0), params, jnp.ones((3, 6))))
        ['kernel']

        Random numbers and the mode are arguments of every call:

        >>> fn, params = jlora.from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        >>> x = jnp.ones((2, 64))
        >>> bool((fn(params, x, train=False) == x).all())
        True
        >>> first, second = (fn(params, x, train=True, rngs=jax.random.key(i)) for i in range(2))
        >>> bool((first == second).all())
        False
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
    # The variables of the split state are the module's own.
    params = _copy_variables(params)
    parameter_names = inspect.signature(getattr(module, method)).parameters

    def fn(
        params: PyTree, *args: Any, rngs: Any = None, train: bool | None = None, **kwargs: Any
    ) -> Any:
        _refuse_rngs_objects(args, kwargs)
        module = nnx.merge(graph, params, copy=True)
        if train is not None:
            modes = _mode_arguments(train, parameter_names, len(args))
            kwargs = {**modes, **kwargs}
            if not modes:
                (module.train if train else module.eval)()
        if rngs is not None:
            if "rngs" in parameter_names:
                kwargs["rngs"] = nnx.Rngs(**rngs) if isinstance(rngs, Mapping) else nnx.Rngs(rngs)
            _reseed(module, rngs, may_be_unused="rngs" in parameter_names)
        before = _updated_values(module)
        output = getattr(module, method)(*args, **kwargs)
        _warn_of_lost_updates(module, before, has_new_rngs=rngs is not None)
        return output

    return fn, params


def update_nnx(module: Any, params: PyTree) -> None:
    """Updates a module in place with parameters, such as merged ones.

    Args:
        module: The `flax.nnx.Module` that was given to `from_nnx`.
        params: Parameter tree of `from_nnx`, with new values.

    Raises:
        TypeError: The module is not an NNX module.
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

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"module must be a flax.nnx.Module, got {type(module).__name__}. Call "
            f"update_nnx(module, params)."
        )
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


def _copy_variables(state: PyTree) -> PyTree:
    """Returns a state of new variables. JAX's arrays are immutable, NumPy's are copied."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, state)


def _mode_arguments(
    train: bool, parameter_names: Iterable[str], num_positional: int
) -> dict[str, bool]:
    """Returns the arguments by which a method takes the mode, except those given by position."""
    return {
        name: train == _TRAINS_IF_TRUE[name]
        for name in list(parameter_names)[num_positional:]
        if name in _TRAINS_IF_TRUE
    }


# Names by which methods of Flax take the mode, and whether True means training.
_TRAINS_IF_TRUE = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def _refuse_rngs_objects(*arguments: Any) -> None:
    from flax import nnx

    def is_rngs(node: Any) -> bool:
        return isinstance(node, nnx.Rngs | nnx.RngStream)

    if any(map(is_rngs, jax.tree.leaves(arguments, is_leaf=is_rngs))):
        raise TypeError(
            "A flax.nnx.Rngs is no argument of a pure function: its counts would stay where they "
            "are, so that every call draws the same numbers. Pass keys as rngs=, such as "
            "rngs={'dropout': key}, another one at every step."
        )


def _reseed(module: Any, rngs: Any, *, may_be_unused: bool) -> None:
    """Starts the module's random streams from a key, or from keys by the names of streams."""
    from flax import nnx

    streams = {
        node.key.tag for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)
    }
    if not isinstance(rngs, Mapping):
        names = sorted(streams)
        rngs = dict(zip(names, jax.random.split(rngs, len(names)), strict=True)) if names else {}
    unknown = [] if may_be_unused else [name for name in rngs if name not in streams]
    if unknown:
        raise ValueError(
            f"rngs has a key for {unknown[0]!r}, but the random streams of "
            f"{type(module).__name__} are {sorted(streams)}. Pass keys for those, or one key for "
            f"all of them."
        )
    nnx.reseed(module, policy="match_shape", **rngs)


def _updated_values(module: Any) -> dict[str, tuple[type, Any]]:
    """Values that a call may update, with the types of their variables, by path."""
    from flax import nnx

    kept = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey, nnx.Intermediate))
    state = nnx.state(module, kept)
    variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    flat = _tree.flatten_with_paths(state)
    return {
        path: (type(variable), leaf)
        for path, variable, leaf in zip(flat.paths, variables, flat.leaves, strict=True)
    }


def _warn_of_lost_updates(
    module: Any, before: Mapping[str, tuple[type, Any]], *, has_new_rngs: bool
) -> None:
    """Warns if a call updated variables of the module, which `fn` does not return."""
    from flax import nnx

    after = _updated_values(module)
    changed = {
        path: kind
        for path, (kind, value) in after.items()
        if path not in before or before[path][1] is not value
    }
    # A transform of NNX writes counts and statistics back that did not change, so the mode of their
    # layer decides too.
    by_mode = [path for path, kind in changed.items() if kind in (nnx.BatchStat, nnx.RngCount)]
    others = {path: kind for path, kind in changed.items() if path not in by_mode}
    if others:
        path, kind = next(iter(others.items()))
        warnings.warn(
            f"A call updated the {kind.__name__} {path!r} ({len(others)} such variables), and the "
            f"update is lost: fn is pure and returns the output alone. Take a method that returns "
            f"the new value, and pass it in params.",
            stacklevel=3,
        )
    for parts, node in nnx.iter_graph(module):
        path = "/".join(map(str, parts))
        if not any(f"/{name}".startswith(f"/{path}/") or not path for name in by_mode):
            continue
        where = f"The {type(node).__name__} {path!r}" if path else f"The {type(node).__name__}"
        if getattr(node, "use_running_average", None) is False:
            warnings.warn(
                f"{where} is in training mode: it normalizes by the batch, and its running "
                f"statistics stay those of params. Pass train=False for evaluation mode.",
                stacklevel=3,
            )
        rate = getattr(node, "rate", getattr(node, "dropout_rate", 0))
        if not has_new_rngs and rate and getattr(node, "deterministic", None) is False:
            warnings.warn(
                f"{where} is in training mode and draws the same numbers at every call. Pass "
                f"rngs=key, another one at every step, or train=False for evaluation mode.",
                stacklevel=3,
            )


def _leaf_shapes(flat: _tree.FlatTree) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)}
