"""`lora_transform`: adapters around a function of a parameter tree, as pure functions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapters.protocol import (
    AdapterConfig,
    AdapterLeaf,
    Weight,
    places,
)
from jlora.explanation import Explanation, Row
from jlora.factored import control, probe, releases
from jlora.factored.interpreter import evaluate
from jlora.factored.network import Factored, build

PyTree = Any
Adapter = dict[str, Any]
"""One leaf for each adapted weight, keyed by the weight's `/`-joined path."""

Rules = AdapterConfig | Mapping[str, AdapterConfig | None]


class InitFn(Protocol):
    def __call__(
        self, key: jax.Array, params: PyTree, /, *inputs: Any, **kwargs: Any
    ) -> Adapter: ...


class ApplyFn(Protocol):
    def __call__(
        self,
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any: ...


class MergeFn(Protocol):
    def __call__(self, params: PyTree, adapter: Adapter) -> PyTree: ...


class ExplainFn(Protocol):
    def __call__(self, params: PyTree, /, *inputs: Any, **kwargs: Any) -> Explanation: ...


class LoraTransform(NamedTuple):
    """LoRA around one function, as pure functions of parameter trees.

    For every adapter and input, `apply(params, adapter, x) == fn(merge(params, adapter), x)`.
    Train through `apply`, whose gradient never forms an array of a frozen weight's shape; deploy
    what `merge` returns.

    Attributes:
        init: `(key, params, *inputs)` to a fresh adapter. Arrays may be `jax.ShapeDtypeStruct`s.
        apply: `(params, adapter, *inputs, dropout_key=None)` to what `fn` returns. Run it under
            `jax.jit`: it traces `fn` at every call.
        merge: `(params, adapter)` to parameters that `fn` itself takes.
        explain: `(params, *inputs)` to a printable table of every weight and how it is computed.
    """

    init: InitFn
    apply: ApplyFn
    merge: MergeFn
    explain: ExplainFn


def lora_transform(fn: Callable[..., Any], rules: Rules) -> LoraTransform:
    """Adapters around `fn`, which is neither changed nor copied.

    Args:
        fn: `fn(params, *inputs, **kwargs)`: `model.apply` of a Linen module, the function of
            `jlora.from_nnx`, or any traceable function whose first argument is the parameter tree.
            Inputs that are not arrays (`train=False`, strings, None) are static, and outputs that
            are not arrays pass through.
        rules: One adapter config, for every weight that feeds a matrix product or convolution and
            is no embedding table; or an ordered mapping from regular expressions, searched in the
            weight's path, to a config or None (frozen). The first match wins; what matches nothing
            is frozen.

    Raises:
        TypeError: For rules of another type.
        ValueError: For a pattern that does not compile.
    """
    if not callable(fn):
        raise TypeError(
            f"fn={fn!r} cannot be called. Give a function whose first argument is the parameter "
            f"tree, such as model.apply."
        )
    tree.check_rules(rules, lambda node: isinstance(node, AdapterConfig))

    def init(key: jax.Array, params: PyTree, /, *inputs: Any, **kwargs: Any) -> Adapter:
        _check_key("key", key)
        traced = _trace(fn, params, inputs, kwargs)
        plan = _plan(rules, traced)
        for problem in plan.problems:
            raise problem
        return {
            weight.path: config.init(_key_for(key, weight.path), weight)
            for weight, config in plan.adapted
        }

    def apply(
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        if dropout_key is not None:
            _check_key("dropout_key", dropout_key)
        where = places(tree.flatten(params), adapter)  # Before fn could fail on wrong params.
        traced = _trace(fn, params, inputs, kwargs)
        values = list(traced.arrays)
        for path, place in where.items():
            index = traced.param_index[place]
            values[index] = _factored(path, values[index], adapter[path], dropout_key)
        outputs = evaluate(traced.program, values)
        # A constant comes back as a literal of JAX's own.
        return traced.restore([jnp.asarray(control.densify(output)) for output in outputs])

    def explain(params: PyTree, /, *inputs: Any, **kwargs: Any) -> Explanation:
        return _explain(rules, _trace(fn, params, inputs, kwargs))

    return LoraTransform(init, apply, merge, explain)


def merge(params: PyTree, adapter: Adapter) -> PyTree:
    """A new parameter tree with the adapter's updates added: same structure, shapes and types.

    The sum is made in float32 (or wider) and rounded once to the weight's type.

    Args:
        params: The base; it is not changed.
        adapter: What `init` returned, trained.

    Raises:
        ValueError: When the adapter does not fit the parameters.
    """
    flat = tree.flatten(params)
    leaves = list(flat.leaves)
    for path, place in places(flat, adapter).items():
        leaves[place] = _factored(path, jnp.asarray(leaves[place]), adapter[path], None).dense()
    return jax.tree.unflatten(flat.treedef, leaves)


def _factored(path: str, base: Any, leaf: AdapterLeaf, key: jax.Array | None) -> Factored:
    dropout = None
    if key is not None and leaf.dropout > 0:
        batch = leaf.axes.batch
        keys = jax.random.split(_key_for(key, path), tuple(leaf.shape[axis] for axis in batch))
        dropout = (leaf.dropout, keys, batch)
    gains, terms = leaf.expression(base)
    return Factored(base, build(path, leaf.shape, gains=gains, terms=terms, dropout=dropout))


def _check_key(name: str, key: Any) -> None:
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{name}={key!r} is a {type(key).__name__}, not a random key. Give jax.random.key(0)."
        )


def _key_for(key: jax.Array, path: str) -> jax.Array:
    """A key of the weight's own, so that adapting one more weight moves no other draw."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # A key of the old kind.
        key = jax.random.wrap_key_data(key)
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


# --- tracing -------------------------------------------------------------------------------------


class _Traced(NamedTuple):
    """A call of the wrapped function as a program of arrays."""

    program: releases.Program
    flat: tree.Flat  # The parameters.
    param_index: dict[int, int]  # From a leaf of the parameters to the program's input.
    arrays: list[Any]
    restore: Callable[[Sequence[Any]], Any]  # From the program's outputs to the call's.


def _trace(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Traced:
    flat = tree.flatten(params)
    rest, rest_tree = jax.tree.flatten((inputs, kwargs))
    leaves = [*flat.leaves, *rest]
    indices = [i for i, leaf in enumerate(leaves) if tree.is_array(leaf)]
    outputs: dict[str, Any] = {}

    def call(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(indices, arrays, strict=True):
            filled[index] = array
        count = len(flat.leaves)
        own_params = jax.tree.unflatten(flat.treedef, filled[:count])
        own_inputs, own_kwargs = jax.tree.unflatten(rest_tree, filled[count:])
        results, outputs["tree"] = jax.tree.flatten(fn(own_params, *own_inputs, **own_kwargs))
        outputs["static"] = [None if tree.is_array(result) else result for result in results]
        outputs["is_array"] = [tree.is_array(result) for result in results]
        return [result for result in results if tree.is_array(result)]

    arrays = [leaves[index] for index in indices]
    program = releases.trace(call, *arrays)

    def restore(computed: Sequence[Any]) -> Any:
        following = iter(computed)
        results = [
            next(following) if array else static
            for array, static in zip(outputs["is_array"], outputs["static"], strict=True)
        ]
        return jax.tree.unflatten(outputs["tree"], results)

    param_index = {place: i for i, place in enumerate(indices) if place < len(flat.leaves)}
    return _Traced(program, flat, param_index, arrays, restore)


# --- planning ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Which weights a rule adapts, and what is wrong with the rules."""

    adapted: list[tuple[Weight, AdapterConfig]]
    uses: dict[str, list[probe.Use]]
    axes: dict[str, probe.Axes | None]
    problems: list[Exception]


def _plan(rules: Rules, traced: _Traced) -> _Plan:
    flat = traced.flat
    leaves = {flat.paths[place]: flat.leaves[place] for place in traced.param_index}
    weights = {
        index: (flat.paths[place], tuple(flat.leaves[place].shape))
        for place, index in traced.param_index.items()
    }
    uses = probe.uses(traced.program, weights)
    axes = {path: probe.axes_of(uses[path], len(leaf.shape)) for path, leaf in leaves.items()}
    plan = _Plan([], uses, axes, [])

    def weight_at(path: str) -> Weight:
        found = axes[path] or probe.Axes((), (), ())
        known = [use for use in uses[path] if use.roles is not None]
        looked_up = any(use.by == "gather" and probe.is_lookup(use, known) for use in known)
        return Weight(path, leaves[path], found, looked_up)

    if not isinstance(rules, Mapping):
        for path in leaves:
            weight = weight_at(path)
            multiplies = any(use.roles is not None and use.meets_data for use in uses[path])
            if multiplies and not weight.embedding and not _refusal(weight, rules, uses[path]):
                plan.adapted.append((weight, rules))
        if not plan.adapted:
            plan.problems.append(
                ValueError(
                    f"rules={rules!r} adapts nothing: none of the {len(leaves)} weights feeds a "
                    f"matrix product or convolution. lora.explain(params, ...) lists how each is "
                    f"used; a mapping can name an embedding."
                )
            )
        return plan
    assigned = tree.assign(rules, list(leaves))
    plan.problems.extend(ValueError(problem) for problem in assigned.problems)
    for path in leaves:
        pattern, config = assigned.rules.get(path, ("", None))
        if config is None:
            continue
        weight = weight_at(path)
        refusal = _refusal(weight, config, uses[path])
        if refusal is None:
            plan.adapted.append((weight, config))
        else:
            kind = TypeError if not _is_float(weight) else ValueError
            plan.problems.append(
                kind(
                    f"The rule {pattern!r} matches {path!r}, which cannot be adapted by "
                    f"{type(config).__name__}: {refusal}. Narrow the pattern, or put "
                    f"{_narrow(path)!r}: None before it."
                )
            )
    return plan


def _is_float(weight: Weight) -> bool:
    return jnp.issubdtype(weight.value.dtype, jnp.floating)


def _refusal(weight: Weight, config: AdapterConfig, uses: Sequence[probe.Use]) -> str | None:
    if not _is_float(weight):
        return f"its type is {weight.value.dtype}, which has no gradient"
    if not any(use.roles is not None for use in uses):
        by = ", ".join(dict.fromkeys(use.by for use in uses)) or "nothing"
        return f"it feeds no product and no look-up that jlora can follow (it is used by: {by})"
    return config.refusal(weight)


def _narrow(path: str) -> str:
    """The shortest pattern that names leaves like this one: its last key."""
    return path.rsplit("/", 1)[-1] + "$"


def _explain(rules: Rules, traced: _Traced) -> Explanation:
    plan = _plan(rules, traced)
    configs = {weight.path: (weight, config) for weight, config in plan.adapted}
    # What happens to a weight can depend on which others are adapted: of a product of two weights
    # only one can stay factored.
    weights = {
        index: (traced.flat.paths[place], tuple(traced.flat.leaves[place].shape))
        for place, index in traced.param_index.items()
        if traced.flat.paths[place] in configs
    }
    uses = plan.uses | probe.uses(traced.program, weights)
    rows = []
    for place in traced.param_index:
        path, leaf = traced.flat.paths[place], traced.flat.leaves[place]
        parameters, adapter = 0, "frozen"
        if path in configs:
            weight, config = configs[path]
            shaped = jax.eval_shape(lambda w=weight, c=config: c.init(jax.random.key(0), w))
            trained = jax.tree.leaves(shaped)
            parameters = sum(array.size for array in trained)
            rank = getattr(config, "rank", None)
            adapter = type(config).__name__ + (f" rank {rank}" if rank else "")
        rows.append(
            Row(
                path=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                axes=plan.axes[path],
                adapter=adapter,
                parameters=parameters,
                base_parameters=leaf.size,
                factored=tuple(dict.fromkeys(use.by for use in uses[path] if use.dense is None)),
                dense=tuple(dict.fromkeys(use.dense for use in uses[path] if use.dense)),
            )
        )
    return Explanation(tuple(rows), tuple(str(problem) for problem in plan.problems))
