"""`lora_transform`: adapters around a function of a parameter tree, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora._evaluate import _evaluate_adapted, _fold_in_path, _make_factored_array
from jlora._quantized_array import is_quantized, maybe_dequantize
from jlora._tree import PyTree
from jlora.adapters.base import AdapterConfig, weight_indices
from jlora.explain import Explanation, _build_explanation
from jlora.interpreter import terms
from jlora.interpreter.eval_jaxpr import trace_call
from jlora.rules import Adapter, Rules, match_rules


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


class ApplyWithAuxLossFn(Protocol):
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
        apply_with_aux_loss: As `apply`, to `(what fn returns, load-balancing loss)`: a float32, the
            sum over all mixtures of experts, each one where its experts are used alike; zero where
            there are none. Mixtures inside a `while_loop` are not counted.
        merge: `(params, adapter, dequantize=False)` to parameters that `fn` itself takes.
        explain: `(params, *inputs)` to a printable table of every weight and how it is computed.
    """

    init: InitFn
    apply: ApplyFn
    apply_with_aux_loss: ApplyWithAuxLossFn
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
        _tree.check_rules(rules, lambda node: isinstance(node, AdapterConfig))

    def init(key: jax.Array, params: PyTree, /, *inputs: Any, **kwargs: Any) -> Adapter:
        _check_prng_key("key", key)
        if rules is None:
            raise ValueError(
                "lora_transform was given no rules, so init does not know what to adapt. Give it a "
                "config, or patterns with configs."
            )
        traced = trace_call(fn, params, inputs, kwargs)
        plan = match_rules(rules, traced)
        for problem in plan.errors:
            raise problem
        adapter: Adapter = {
            weight.path: config.init_leaf(_fold_in_path(key, weight.path), weight)
            for weight, config in plan.adapted
        }
        for name, (config, weights) in plan.shared.items():
            adapter[name] = config.init_shared(_fold_in_path(key, name), weights)
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
            _check_prng_key("dropout_key", dropout_key)
        where = weight_indices(
            _tree.flatten_with_paths(params), adapter
        )  # Before fn could fail on wrong params.
        traced = trace_call(fn, params, inputs, kwargs)
        return traced.unflatten_outputs(_evaluate_adapted(traced, where, adapter, dropout_key))

    def apply_with_aux_loss(
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, jax.Array]:
        with terms.collect_aux_losses() as losses:
            outputs = apply(params, adapter, *inputs, dropout_key=dropout_key, **kwargs)
        return outputs, terms.sum_aux_losses(losses)

    def explain(params: PyTree, /, *inputs: Any, **kwargs: Any) -> Explanation:
        return _build_explanation(rules or {}, trace_call(fn, params, inputs, kwargs))

    return LoraTransform(init, apply, apply_with_aux_loss, merge, explain)


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
    flat = _tree.flatten_with_paths(params)
    where = weight_indices(flat, adapter)
    leaves = materialize_leaves(flat, dequantize)
    for path, place in where.items():
        leaves[place] = _make_factored_array(
            path, jnp.asarray(leaves[place]), adapter, None
        ).materialize()
    return jax.tree.unflatten(flat.treedef, leaves)


def materialize_leaves(flat: _tree.FlatTree, dequantize: bool) -> list[Any]:
    """The leaves of parameters that an adapter is to be merged into, as arrays.

    Raises:
        ValueError: Some are quantised, and `dequantize` is off.
    """
    packed = [
        path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if is_quantized(leaf)
    ]
    if packed and not dequantize:
        raise ValueError(
            f"params holds {len(packed)} quantised weights, such as {packed[0]!r}, and an update "
            f"cannot be added to their codes. Merge into the weights that were quantised, or with "
            f"dequantize=True into arrays of what they stand for."
        )
    return [maybe_dequantize(leaf) for leaf in flat.leaves]


def _check_prng_key(name: str, key: Any) -> None:
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{name}={key!r} is a {type(key).__name__}, not a random key. Give jax.random.key(0)."
        )
