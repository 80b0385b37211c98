"""`lora_transform`: adapters for a function of a parameter tree, as pure functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora._tree import PyTree
from jlora.adapters.base import (
    AdapterConfig,
    adapt_weight,
    get_adapter_leaves,
    key_for_path,
    weight_indices,
)
from jlora.adapters.layer_layout import match_layer_layout
from jlora.explain import Explanation, build_explanation
from jlora.interpreter.control_flow import sum_losses
from jlora.interpreter.eval_jaxpr import TracedCall, make_context, trace_call
from jlora.interpreter.factored_array import FactoredArray
from jlora.interpreter.primitive_rules import EvalContext
from jlora.rules import Adapter, Rules, abstract_adapter, match_rules


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
        token_mask: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, jax.Array]: ...


class MergeFn(Protocol):
    def __call__(self, params: PyTree, adapter: Adapter, *, dequantize: bool = False) -> PyTree: ...


class ExplainFn(Protocol):
    def __call__(self, params: PyTree, /, *inputs: Any, **kwargs: Any) -> Explanation: ...


class LoraTransform(NamedTuple):
    """Pure functions of parameter trees that adapt one function with LoRA.

    For every adapter that is a change of weights (all but `LoRAMoE`, which routes by the input)
    and every input, `apply(params, adapter, x) == fn(merge(params, adapter), x)`.
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
            not counted. `token_mask`, such as (batch, length), is zero for padding, which the loss
            does not count; None: there is none.
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


def lora_transform(
    fn: Callable[..., Any], rules: Rules | None = None, *, allow_materialize: bool = True
) -> LoraTransform:
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
        allow_materialize: Whether an adapted weight may be materialized where a use of it cannot
            stay factored. If False, `init` and `apply` raise a ValueError that names the weight and
            the use. Weights of `FullDelta`, whose update has full size anyway, are exempt.

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
            f"fn={_tree.shorten(fn)} must be a function whose first argument is the parameter "
            f"tree, such as model.apply."
        )
    if _is_module(fn, "flax.linen"):
        raise TypeError(
            f"fn must be a function of a parameter tree, got the Linen module "
            f"{type(fn).__name__}. Pass its apply: lora_transform(model.apply, rules)."
        )
    if _is_module(fn, "flax.nnx"):
        raise TypeError(
            f"fn must be a function of a parameter tree, got the NNX module {type(fn).__name__}. "
            f"Convert it: fn, params = jlora.from_nnx(module)."
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
            weight.path: config.init_leaf(key_for_path(key, weight.path), weight)
            for weight, config in plan.adapted
        }
        for name, (config, weights) in plan.shared.items():
            adapter[name] = config.init_shared(key_for_path(key, name), weights)
        if not allow_materialize:
            find_materialized(traced, abstract_adapter(plan), allow_materialize=False)
        return adapter

    def evaluate(
        params: PyTree,
        adapter: Adapter,
        inputs: tuple[Any, ...],
        dropout_key: jax.Array | None,
        kwargs: dict[str, Any],
        token_mask: jax.Array | None = None,
    ) -> tuple[Any, list[jax.Array]]:
        """Returns the outputs of `fn` for the adapted weights, and auxiliary losses."""
        if dropout_key is not None:
            _check_prng_key("dropout_key", dropout_key)
        # Before fn could fail on wrong params.
        indices = weight_indices(_tree.flatten_with_paths(params), adapter)
        traced = trace_call(fn, params, inputs, kwargs)
        context = make_context(allow_materialize=allow_materialize, token_mask=token_mask)
        outputs = evaluate_adapted(context, traced, indices, adapter, dropout_key)
        return traced.unflatten_outputs(outputs), context.losses

    def apply(
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        return evaluate(params, adapter, inputs, dropout_key, kwargs)[0]

    def apply_with_aux_loss(
        params: PyTree,
        adapter: Adapter,
        /,
        *inputs: Any,
        dropout_key: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, jax.Array]:
        outputs, losses = evaluate(params, adapter, inputs, dropout_key, kwargs, token_mask)
        return outputs, sum_losses(losses)

    def explain(params: PyTree, /, *inputs: Any, **kwargs: Any) -> Explanation:
        traced = trace_call(fn, params, inputs, kwargs)
        return build_explanation(rules or {}, traced, find_materialized, allow_materialize)

    return LoraTransform(init, apply, apply_with_aux_loss, merge, explain)


def merge(params: PyTree, adapter: Adapter, *, dequantize: bool = False) -> PyTree:
    """Returns a new parameter tree with the adapter's updates added, of the same shapes and types.

    The sum is computed in float32 (or wider) and rounded once to the weight's type. Beyond that
    type's range it is infinite, without an error; `merge_to_dtype` raises one.

    Args:
        params: The base; it is not changed.
        adapter: Trained adapter, for layers that are stacked or separate.
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
    if not set(flat.paths).issuperset(get_adapter_leaves(adapter)):
        adapter = match_layer_layout(adapter, params)
    indices = weight_indices(flat, adapter)
    check_not_quantized(flat, dequantize)
    leaves = [maybe_dequantize(leaf) for leaf in flat.leaves]
    for path, index in indices.items():
        leaves[index] = adapt_weight(adapter, path, jnp.asarray(leaves[index])).materialize()
    return jax.tree.unflatten(flat.treedef, leaves)


def check_not_quantized(flat: _tree.FlatTree, dequantize: bool) -> None:
    """Checks that an adapter can be merged into the leaves of parameters.

    Args:
        flat: Flattened parameters.
        dequantize: Whether quantized leaves will be dequantized.

    Raises:
        ValueError: Some leaves are quantized, and `dequantize` is False.
    """
    quantized = [
        path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if _tree.is_quantized(leaf)
    ]
    if quantized and not dequantize:
        raise ValueError(
            f"params has {len(quantized)} quantized weights, such as {quantized[0]!r}, and an "
            f"update cannot be added to quantized codes. Merge into the weights before "
            f"quantization, or pass dequantize=True to merge into dequantized arrays."
        )


def evaluate_adapted(
    context: EvalContext,
    traced: TracedCall,
    indices: Mapping[str, int],
    adapter: Adapter,
    dropout_key: jax.Array | None,
) -> list[Any]:
    """Returns the outputs of a traced call with adapted weights in it.

    Args:
        context: Collects auxiliary losses and materialized weights.
        traced: The call.
        indices: Number of each adapted weight among the leaves of the parameters.
        adapter: The adapter.
        dropout_key: Random key of the step; None outside training.
    """
    values: list[Any] = list(traced.input_arrays)
    for path, place in indices.items():
        index = traced.param_index[place]
        weight = adapt_weight(adapter, path, values[index], dropout_key)
        if adapter[path].is_full:
            context.materialized.append(path)
            values[index] = weight.materialize()
        else:
            values[index] = weight
    for place, index in traced.param_index.items():
        # Followed to where it is used, even without an adapter.
        if _tree.is_quantized(values[index]):
            path, shape = traced.flat_params.paths[place], values[index].shape
            values[index] = FactoredArray.from_weight(values[index], path, shape)
    outputs = context.evaluate(traced.program, values)
    # A constant comes back as a literal of JAX's own.
    return [jnp.asarray(context.materialize(output, "an output")) for output in outputs]


def find_materialized(
    traced: TracedCall, adapter: Adapter, *, allow_materialize: bool = True
) -> set[str]:
    """Returns the paths of the weights that `apply` materializes.

    Raises:
        ValueError: There are some, and `allow_materialize` is off.
    """
    places = {path: place for place, path in enumerate(traced.flat_params.paths)}
    indices = {path: places[path] for path in get_adapter_leaves(adapter)}
    context = make_context(allow_materialize=allow_materialize)
    jax.eval_shape(
        lambda arrays, adapter: evaluate_adapted(
            context, traced._replace(input_arrays=arrays), indices, adapter, None
        ),
        traced.input_arrays,
        adapter,
    )
    return set(context.materialized)


def _is_module(fn: Any, package: str) -> bool:
    """Whether a value is a module of a package of Flax, which is not imported for the question."""
    return package in sys.modules and isinstance(fn, sys.modules[package].Module)


def _check_prng_key(name: str, key: Any) -> None:
    is_key = isinstance(key, jax.Array | np.ndarray) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == np.uint32
    )
    if not is_key:
        raise TypeError(
            f"{name}={_tree.shorten(key)} must be a random key, such as jax.random.key(0), got "
            f"{type(key).__name__}."
        )
