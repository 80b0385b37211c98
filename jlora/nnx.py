"""Conversion of Flax NNX modules to a function of a parameter tree, and back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jlora import _tree
from jlora._tree import PyTree
from jlora.interpreter._compat import trace_program
from jlora.interpreter.primitive_rules import find_forwarded


def from_nnx(module: Any, method: str = "__call__") -> tuple[Callable[..., Any], PyTree]:
    """Splits a module into a pure function and its variables: `(fn, params)`.

    `fn(params, *args, rngs=None, train=None, **kwargs)` returns the module's output and modifies
    neither `params` nor the module. `params` is a copy: it does not follow later changes of the
    module, nor the module those of `params`. Both hold the same JAX arrays, which cannot change:
    weights are in memory once. A program that takes the memory of one (`donate_argnums`) takes it
    from both; donate `jax.tree.map(jnp.copy, params)` to keep the module.

    `rngs` is a key, or a mapping of keys by the name of a random stream (`{"dropout": key}`):
    random streams of the module start from it, and a method with an argument `rngs` gets a
    `flax.nnx.Rngs` of it. Pass another key at every step. Without it every call that draws random
    numbers draws the same, with a warning.

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
            `flax.nnx.Rngs`, whose counts could not advance, or `rngs` is neither a key nor a
            mapping.
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
    params = jax.tree.map(_copy_if_numpy, params)
    parameter_names = inspect.signature(getattr(module, method)).parameters

    def fn(
        params: PyTree, *args: Any, rngs: Any = None, train: bool | None = None, **kwargs: Any
    ) -> Any:
        _refuse_rngs_objects(args, kwargs)
        _check_keys(rngs)

        def call(replaced: Mapping[str, Any] | None = None) -> _Call:
            module = nnx.merge(graph, params, copy=True)
            options = kwargs
            if train is not None:
                modes = _mode_arguments(train, parameter_names, len(args))
                options = {**modes, **options}
                if not modes:
                    (module.train if train else module.eval)()
            streams: set[str] = set()
            if rngs is not None:
                if "rngs" in parameter_names:
                    keys = nnx.Rngs(**rngs) if isinstance(rngs, Mapping) else nnx.Rngs(rngs)
                    options = {**options, "rngs": keys}
                streams = _reseed(module, rngs, may_be_unused="rngs" in parameter_names)
            if replaced:
                _set_values(module, replaced)
            before = _updatable_values(module, streams)
            output = getattr(module, method)(*args, **options)
            return _Call(output, module, before, _updatable_values(module, streams))

        first = call()
        updated = _find_updated(first, call)
        _warn_of_lost_updates(first.module, updated, can_evaluate=train is not False)
        return first.output

    return fn, params


def update_nnx(module: Any, params: PyTree) -> None:
    """Updates a module in place with parameters, such as merged ones.

    Batch statistics, caches and random states stay those of the module, which may have gone on
    since `from_nnx`; a warning names the first statistic that differs from `params`.
    `flax.nnx.update(module, params)` writes these too.

    Args:
        module: The `flax.nnx.Module` that was given to `from_nnx`.
        params: Parameter tree of `from_nnx`, with new values.

    Raises:
        TypeError: The module is not an NNX module.
        ValueError: Paths, shapes or data types differ from the module's; the module is not changed
            then.

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
    module_types = _leaf_types(state)
    new_types = _leaf_types(new)
    for path in (*module_types, *new_types):
        if module_types.get(path) != new_types.get(path):
            raise ValueError(
                f"params does not fit the module at {path!r}: it has "
                f"{new_types.get(path, 'nothing')} there and the module "
                f"{module_types.get(path, 'nothing')}. Pass the tree that from_nnx returned, or "
                f"the result of merge for it, in the data types of the module."
            )
    # A module from nnx.eval_shape has only shapes, which no value is worse than.
    kept = {
        path: (variable, value)
        for path, (variable, value) in _list_values(
            module, nnx.Any(nnx.BatchStat, nnx.Cache, nnx.RngState, nnx.Intermediate)
        ).items()
        if not isinstance(value, jax.ShapeDtypeStruct)
    }
    values = dict(zip(new.paths, new.leaves, strict=True))
    written = {path: value for path, value in values.items() if path not in kept}
    _set_values(module, {path: _copy_if_numpy(value) for path, value in written.items()})
    differ = [
        path
        for path, (variable, value) in kept.items()
        if not isinstance(variable, nnx.RngState) and _is_same(value, values[path]) is False
    ]
    if differ:
        warnings.warn(
            f"update_nnx leaves {differ[0]!r} ({len(differ)} statistics or caches) as the module "
            f"has it, where params has another value. Call flax.nnx.update(module, params) to "
            f"write it too.",
            stacklevel=2,
        )


class _Call(NamedTuple):
    """One call of a method, with the values that it may update before and after, by path."""

    output: Any
    module: Any
    before: dict[str, tuple[Any, Any]]
    after: dict[str, tuple[Any, Any]]


def _copy_if_numpy(leaf: Any) -> Any:
    """Returns a copy of an array that could be changed in place; others as they are."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


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


def _check_keys(rngs: Any) -> None:
    if not (rngs is None or isinstance(rngs, Mapping | jax.Array | np.ndarray)):
        raise TypeError(
            f"rngs={_tree.shorten(rngs)} must be a key or a mapping of keys by the name of a "
            f"random stream. Pass jax.random.key(seed)."
        )


def _reseed(module: Any, rngs: Any, *, may_be_unused: bool) -> set[str]:
    """Starts the module's random streams from a key, or from keys by the names of streams.

    Returns:
        The names of the streams that were started.
    """
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
    return streams & set(rngs)


def _list_values(module: Any, kind: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the variables of a kind with their values, by path."""
    from flax import nnx

    state = nnx.state(module, kind)
    flat = _tree.flatten_with_paths(state)
    variables = [
        variable
        for variable in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        for _ in jax.tree.leaves(variable, is_leaf=_tree.is_quantized)
    ]
    return dict(zip(flat.paths, zip(variables, flat.leaves, strict=True), strict=True))


def _set_values(module: Any, values: Mapping[str, Any]) -> None:
    """Sets values of a module by path."""
    from flax import nnx

    flat = _tree.flatten_with_paths(nnx.state(module))
    leaves = [values.get(path, leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(flat.treedef, leaves))


def _updatable_values(module: Any, started: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Returns what a call may update and `fn` does not return, but for streams started anew."""
    from flax import nnx

    kept = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey, nnx.Intermediate))
    return {
        path: (variable, value)
        for path, (variable, value) in _list_values(module, kept).items()
        if not (isinstance(variable, nnx.RngCount) and variable.tag in started)
    }


def _is_same(value: Any, other: Any) -> bool | None:
    """Whether two arrays have the same bytes; None while they are traced."""
    if value is other:
        return True
    if isinstance(value, Tracer) or isinstance(other, Tracer):
        return None
    if value.dtype != other.dtype or value.shape != other.shape:
        return False
    return np.asarray(value).tobytes() == np.asarray(other).tobytes()


def _find_updated(call: _Call, call_again: Callable[[Mapping[str, Any]], _Call]) -> dict[str, Any]:
    """Returns the variables whose values a call changed, by path.

    Transforms of NNX write all variables back, also those that did not change. Under a trace these
    are other tracers, so the call is traced once more, to see which inputs it returns.

    Args:
        call: The call.
        call_again: The same call from other values by path.
    """
    updated, unsure = {}, []
    for path, (variable, value) in call.after.items():
        same = _is_same(call.before[path][1], value) if path in call.before else False
        if same is None:
            unsure.append(path)
        elif not same:
            updated[path] = variable
    if unsure:

        def run(values: list[Any]) -> list[Any]:
            after = call_again(dict(zip(unsure, values, strict=True))).after
            return [after[path][1] for path in unsure]

        try:
            program = trace_program(run, [call.before[path][1] for path in unsure])
            forwarded = find_forwarded(program)
        except jax.errors.ConcretizationTypeError:  # Of values that are known outside this trace.
            forwarded = {}
        for index, path in enumerate(unsure):
            if forwarded.get(index) != index:
                updated[path] = call.after[path][0]
    return updated


def _warn_of_lost_updates(module: Any, updated: Mapping[str, Any], *, can_evaluate: bool) -> None:
    """Warns if a call updated variables of the module, which `fn` does not return.

    Args:
        module: The module after the call.
        updated: The variables that the call changed, by path.
        can_evaluate: Whether evaluation mode is still to be tried.
    """
    from flax import nnx

    modules = {
        "/".join(map(str, parts)): node
        for parts, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
    }
    advice = ", or train=False for evaluation mode" if can_evaluate else ""
    messages, others = [], {}
    for path, variable in updated.items():
        place = path
        while place not in modules:  # The module itself has the path "".
            place = place.rpartition("/")[0]
        owner = modules[place]
        where = f"The {type(owner).__name__} {place!r}" if place else f"The {type(owner).__name__}"
        if isinstance(variable, nnx.RngCount):
            if isinstance(owner, nnx.RNN) and not getattr(owner.cell, "carry_init", None):
                continue  # A first state of zeros, for which RNN takes a key.
            is_training = getattr(owner, "deterministic", None) is False
            messages.append(
                f"{where} {'is in training mode and ' if is_training else ''}draws the same "
                f"numbers at every call. Pass rngs=key, another one at every step{advice}."
            )
        elif isinstance(variable, nnx.BatchStat) and hasattr(owner, "use_running_average"):
            messages.append(
                f"{where} is in training mode: it normalizes by the batch, and its running "
                f"statistics stay those of params. Pass train=False for evaluation mode."
            )
        else:
            others[path] = variable
    if others:
        path, variable = next(iter(others.items()))
        messages.append(
            f"A call updated the {type(variable).__name__} {path!r} ({len(others)} such "
            f"variables), and the update is lost: fn is pure and returns the output alone. Take a "
            f"method that returns the new value, and pass it in params."
        )
    for message in dict.fromkeys(messages):
        warnings.warn(message, stacklevel=3)


def _leaf_types(flat: _tree.FlatTree) -> dict[str, str]:
    return {
        path: f"{getattr(leaf, 'dtype', type(leaf).__name__)} of shape {np.shape(leaf)}"
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    }
