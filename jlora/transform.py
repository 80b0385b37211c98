"""`lora_transform`: adapters for a function of a parameter tree, as pure functions."""

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
    """Pure functions of parameter trees that adapt one function with LoRA.

    For every adapter and input, `apply(params, adapter, x) == fn(merge(params, adapter), x)`.
    Train through `apply`, whose gradient never forms an array of a frozen weight's shape; deploy
    the result of `merge`.

    Attributes:
        init: `(key, params, *inputs)` to a fresh adapter. Arrays may be `jax.ShapeDtypeStruct`s.
        apply: `(params, adapter, *inputs, dropout_key=None)` to the outputs of `fn`. It traces `fn`
            at every call, so call it under `jax.jit`. The key is that of dropout and of randomly
            drawn ranks; without it nothing is random.
        apply_with_aux_loss: Like `apply`, to `(outputs, load-balancing loss)`. The loss is a
            float32: the sum over all LoRA mixtures of experts, each of which contributes one where
            its experts are used equally; zero without mixtures. Mixtures inside a `while_loop` are
            not counted.
        merge: `(params, adapter, dequantize=False)` to merged parameters for `fn`.
        explain: `(params, *inputs)` to a printable table of every weight and how it is computed.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((4, 6))
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> output = jax.jit(lora.apply)(params, adapter, x)
        >>> bool(jnp.allclose(output, fn(lora.merge(params, adapter), x)))
        True
    """

    init: InitFn
    apply: ApplyFn
    apply_with_aux_loss: ApplyWithAuxLossFn
    merge: MergeFn
    explain: ExplainFn


def lora_transform(fn: Callable[..., Any], rules: Rules | None = None) -> LoraTransform:
    """Returns pure functions that initialize, apply, merge and explain adapters of `fn`.

    `fn` itself is neither changed nor copied.

    Args:
        fn: Function `fn(params, *inputs, **kwargs)`: `model.apply` of a Linen module, the function
            of `jlora.from_nnx`, or any traceable function whose first argument is the parameter
            tree. Inputs that are not arrays (`train=False`, strings, None) are static, and outputs
            that are not arrays pass through.
        rules: One adapter config, for every weight that feeds a matrix product or convolution and
            is not an embedding table; or an ordered mapping from regular expressions, searched in
            the weight's path, to a config or None (frozen). The first match wins; weights without a
            match are frozen. None: adapters are only applied, such as loaded ones.

    Raises:
        TypeError: `fn` is not callable, or the rules are of another type.
        ValueError: A pattern is not a regular expression.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> rules = {"up": jlora.LoRA(rank=2, alpha=4)}
        >>> adapter = jlora.lora_transform(fn, rules).init(
        ...     jax.random.key(0), params, jnp.ones((3, 4))
        ... )
        >>> list(adapter)
        ['up']
    """
    if not callable(fn):
        raise TypeError(
            f"fn={fn!r} must be a function whose first argument is the parameter tree, such as "
            f"model.apply."
        )
    if rules is not None:
        _tree.check_rules(rules, lambda node: isinstance(node, AdapterConfig))

    def init(key: jax.Array, params: PyTree, /, *inputs: Any, **kwargs: Any) -> Adapter:
        _check_prng_key("key", key)
        if rules is None:
            raise ValueError(
                "init needs rules, but lora_transform was given no rules. Pass a config, or a "
                "mapping from patterns to configs, to lora_transform."
            )
        traced = trace_call(fn, params, inputs, kwargs)
        plan = match_rules(rules, traced)
        if plan.errors:
            raise plan.errors[0]
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
        # Before fn can fail on params that do not fit the adapter.
        indices = weight_indices(_tree.flatten_with_paths(params), adapter)
        traced = trace_call(fn, params, inputs, kwargs)
        return traced.unflatten_outputs(_evaluate_adapted(traced, indices, adapter, dropout_key))

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
    """Returns a new parameter tree with the adapter's updates added, of the same shapes and types.

    The sum is computed in float32 (or wider) and rounded once to the weight's type.

    Args:
        params: The base; it is not changed.
        adapter: Trained adapter.
        dequantize: Whether all quantized weights become arrays, adapted or not. They are never
            quantized again, which would round the update away.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: The adapter does not fit the parameters, or some of them are quantized and
            `dequantize` is False.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((6, 5))}, jnp.ones((4, 6))
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=4))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> jlora.merge(params, adapter)["w"].shape
        (6, 5)
    """
    flat = _tree.flatten_with_paths(params)
    indices = weight_indices(flat, adapter)
    leaves = materialize_leaves(flat, dequantize)
    for path, index in indices.items():
        factored = _make_factored_array(path, jnp.asarray(leaves[index]), adapter, None)
        leaves[index] = factored.materialize()
    return jax.tree.unflatten(flat.treedef, leaves)


def materialize_leaves(flat: _tree.FlatTree, dequantize: bool) -> list[Any]:
    """Returns the leaves of parameters as arrays, to merge an adapter into them.

    Args:
        flat: Flattened parameters.
        dequantize: Whether quantized leaves are dequantized.

    Raises:
        ValueError: Some leaves are quantized, and `dequantize` is False.
    """
    quantized = [
        path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if is_quantized(leaf)
    ]
    if quantized and not dequantize:
        raise ValueError(
            f"params has {len(quantized)} quantized weights, such as {quantized[0]!r}, and an "
            f"update cannot be added to quantized codes. Merge into the weights before "
            f"quantization, or pass dequantize=True to merge into dequantized arrays."
        )
    return [maybe_dequantize(leaf) for leaf in flat.leaves]


def _check_prng_key(name: str, key: Any) -> None:
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{name}={key!r} must be a random key, such as jax.random.key(0), got "
            f"{type(key).__name__}."
        )
