"""`lora_transform`: adapters around a function of a parameter tree, as pure functions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapters.protocol import (
    AdapterConfig,
    AdapterLeaf,
    expression_of,
    leaves_of,
    places,
    trained_size,
)
from jlora.assigning import Adapter, Rules, abstract_adapter, plan_of
from jlora.explanation import Explanation, Row
from jlora.factored import balance, control, probe
from jlora.factored.interpreter import evaluate
from jlora.factored.network import Factored, build, watching_sums
from jlora.packed import dense, is_packed
from jlora.tracing import Traced, trace

PyTree = Any


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


class ApplyWithBalanceFn(Protocol):
    def __call__(
        self,
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, jax.Array]: ...


class MergeFn(Protocol):
    def __call__(self, params: PyTree, adapter: Adapter, *, dequantize: bool = False) -> PyTree: ...


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
            `jax.jit`: it traces `fn` at every call. The key drops inputs and draws the ranks of a
            step; without it nothing is random.
        apply_with_balance: As `apply`, to `(what fn returns, load-balancing loss)`: a float32, the
            sum over all mixtures of experts, each one where its experts are used alike; zero where
            there are none. Mixtures inside a `while_loop` are not counted.
        merge: `(params, adapter, dequantize=False)` to parameters that `fn` itself takes.
        explain: `(params, *inputs)` to a printable table of every weight and how it is computed.
    """

    init: InitFn
    apply: ApplyFn
    apply_with_balance: ApplyWithBalanceFn
    merge: MergeFn
    explain: ExplainFn


def lora_transform(fn: Callable[..., Any], rules: Rules | None = None) -> LoraTransform:
    """Adapters around `fn`, which is neither changed nor copied.

    Args:
        fn: `fn(params, *inputs, **kwargs)`: `model.apply` of a Linen module, the function of
            `jlora.from_nnx`, or any traceable function whose first argument is the parameter tree.
            Inputs that are not arrays (`train=False`, strings, None) are static, and outputs that
            are not arrays pass through.
        rules: One adapter config, for every weight that feeds a matrix product or convolution and
            is no embedding table; or an ordered mapping from regular expressions, searched in the
            weight's path, to a config or None (frozen). The first match wins; what matches nothing
            is frozen. Left out where adapters are only applied, such as loaded ones.

    Raises:
        TypeError: For rules of another type.
        ValueError: For a pattern that does not compile.
    """
    if not callable(fn):
        raise TypeError(
            f"fn={fn!r} cannot be called. Give a function whose first argument is the parameter "
            f"tree, such as model.apply."
        )
    if rules is not None:
        tree.check_rules(rules, lambda node: isinstance(node, AdapterConfig))

    def init(key: jax.Array, params: PyTree, /, *inputs: Any, **kwargs: Any) -> Adapter:
        _check_key("key", key)
        if rules is None:
            raise ValueError(
                "lora_transform was given no rules, so init does not know what to adapt. Give it a "
                "config, or patterns with configs."
            )
        traced = trace(fn, params, inputs, kwargs)
        plan = plan_of(rules, traced)
        for problem in plan.problems:
            raise problem
        adapter: Adapter = {
            weight.path: config.leaf(_key_for(key, weight.path), weight)
            for weight, config in plan.adapted
        }
        for name, (config, weights) in plan.shared.items():
            adapter[name] = config.shared(_key_for(key, name), weights)
        return adapter

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
        traced = trace(fn, params, inputs, kwargs)
        return traced.restore(_evaluate(traced, where, adapter, dropout_key))

    def apply_with_balance(
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, jax.Array]:
        with balance.collecting() as losses:
            outputs = apply(params, adapter, *inputs, dropout_key=dropout_key, **kwargs)
        return outputs, balance.total(losses)

    def explain(params: PyTree, /, *inputs: Any, **kwargs: Any) -> Explanation:
        return _explain(rules or {}, trace(fn, params, inputs, kwargs))

    return LoraTransform(init, apply, apply_with_balance, merge, explain)


def merge(params: PyTree, adapter: Adapter, *, dequantize: bool = False) -> PyTree:
    """A new parameter tree with the adapter's updates added: same shapes and types.

    The sum is made in float32 (or wider) and rounded once to the weight's type.

    Args:
        params: The base; it is not changed.
        adapter: What `init` returned, trained.
        dequantize: Whether all quantised weights become arrays, adapted or not. They are never
            quantised anew, which would round the update away.

    Raises:
        ValueError: When the adapter does not fit the parameters, or some of them are quantised and
            `dequantize` is off.
    """
    flat = tree.flatten(params)
    where = places(flat, adapter)
    leaves = unpacked(flat, dequantize)
    for path, place in where.items():
        leaves[place] = _factored(path, jnp.asarray(leaves[place]), adapter, None).dense()
    return jax.tree.unflatten(flat.treedef, leaves)


def unpacked(flat: tree.Flat, dequantize: bool) -> list[Any]:
    """The leaves of parameters that an adapter is to be merged into, as arrays.

    Raises:
        ValueError: Some are quantised, and `dequantize` is off.
    """
    packed = [path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if is_packed(leaf)]
    if packed and not dequantize:
        raise ValueError(
            f"params holds {len(packed)} quantised weights, such as {packed[0]!r}, and an update "
            f"cannot be added to their codes. Merge into the weights that were quantised, or with "
            f"dequantize=True into arrays of what they stand for."
        )
    return [dense(leaf) for leaf in flat.leaves]


def _evaluate(
    traced: Traced, where: Mapping[str, int], adapter: Adapter, key: jax.Array | None
) -> list[Any]:
    """The outputs of the traced program with adapted weights in it."""
    values: list[Any] = list(traced.arrays)
    for path, place in where.items():
        index = traced.param_index[place]
        factored = _factored(path, values[index], adapter, key)
        values[index] = factored.dense() if adapter[path].whole else factored
    for place, index in traced.param_index.items():
        if is_packed(values[index]):  # It needs no adapter to be followed to where it is used.
            path, shape = traced.flat.paths[place], values[index].shape
            values[index] = Factored(values[index], build(path, shape))
    # A constant comes back as a literal of JAX's own.
    outputs = evaluate(traced.program, values)
    return [jnp.asarray(control.densify(output)) for output in outputs]


def _factored(path: str, base: Any, adapter: Adapter, key: jax.Array | None) -> Factored:
    leaf, dropout = adapter[path], None
    if key is not None and leaf.dropout > 0:
        batch = leaf.axes.batch
        keys = jax.random.split(_key_for(key, path), tuple(leaf.shape[axis] for axis in batch))
        dropout = (leaf.dropout, keys, batch)
    expression = expression_of(adapter, path, base, key)
    return Factored(base, build(path, leaf.shape, **expression._asdict(), dropout=dropout))


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


# --- explaining ----------------------------------------------------------------------------------


def _explain(rules: Rules, traced: Traced) -> Explanation:
    plan = plan_of(rules, traced)
    configs = {weight.path: config for weight, config in plan.adapted}
    # What happens to a weight can depend on which others are adapted: of a product of two weights
    # only one can stay factored.
    weights = {
        index: (traced.flat.paths[place], tuple(traced.flat.leaves[place].shape))
        for place, index in traced.param_index.items()
        if traced.flat.paths[place] in configs
    }
    uses = plan.uses | probe.uses(traced.program, weights)
    adapter = abstract_adapter(plan)
    try:
        summed = _summed(traced, adapter)
    except ValueError as error:  # A mixture where no input is known.
        plan.problems.append(error)
        summed = set()
    rows = []
    for place in traced.param_index:
        path, leaf = traced.flat.paths[place], traced.flat.leaves[place]
        made = adapter.get(path)
        dense = tuple(dict.fromkeys(use.dense for use in uses[path] if use.dense))
        if made is not None:
            because = "trained whole" if made.whole else "cut across the update's own axes"
            dense = (dense if not made.whole and dense else (because,)) if path in summed else ()
        elif is_packed(leaf) and path in summed:
            dense = dense or ("cut across its blocks",)
        whole = made is not None and made.whole
        factored = [use.by for use in uses[path] if use.dense is None and not whole]
        rows.append(
            Row(
                path=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                axes=plan.axes[path],
                adapter="frozen" if made is None else _named(configs[path], made),
                parameters=0 if made is None else trained_size(made),
                base_parameters=leaf.size,
                factored=tuple(dict.fromkeys(factored)),
                dense=dense,
                stored=str(leaf) if is_packed(leaf) else "",
                bits=leaf.bits if is_packed(leaf) else 0.0,
            )
        )
    shared = {name: trained_size(adapter[name]) for name in plan.shared}
    return Explanation(tuple(rows), tuple(str(problem) for problem in plan.problems), shared)


def _named(config: AdapterConfig, leaf: AdapterLeaf) -> str:
    rank = getattr(config, "rank", None)
    name = type(config).__name__ + (f" rank {rank}" if rank else "")
    return name + (", full-size" if leaf.weight_sized and not leaf.whole else "")


def _summed(traced: Traced, adapter: Adapter) -> set[str]:
    """The paths of weights whose dense sum `apply` forms."""
    places_of = {path: place for place, path in enumerate(traced.flat.paths)}
    where = {path: places_of[path] for path in leaves_of(adapter)}
    with watching_sums() as summed:
        jax.eval_shape(
            lambda arrays, adapter: _evaluate(traced._replace(arrays=arrays), where, adapter, None),
            traced.arrays,
            adapter,
        )
    return set(summed)
