"""Weighted sums of adapters with trainable mixing weights, and one adapter on top of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.adapters.base import AdapterLeaf, check_adapter, get_adapter_leaves
from jlora.adapters.dylora import DyLoRALeaf
from jlora.adapters.lora import LoRALeaf
from jlora.adapters.weighted_sum import WeightedSumLeaf
from jlora.merging._validation import check_adapters, unify_layer_layouts
from jlora.merging.combine import (
    concatenate_factors,
    lora_leaf_from_factors,
    require_low_rank_factors,
)

Adapter = Mapping[str, Any]


def weighted_sum(
    adapters: Mapping[str, Adapter], weights: Any = None
) -> dict[str, WeightedSumLeaf]:
    """Joins adapters into one with mixing weights: `W + sum_i w_i delta_i` for each weight.

    The factors are concatenated, so the ranks add up and the sum is exact. The result has no
    dropout. Set the mixing weights with `with_weights`, fit them with `lorahub` or `fit_weights`,
    or let them depend on the input with `apply_routed`. `fold_weights` converts the result to
    plain LoRA once the weights are final.

    Args:
        adapters: Trained adapters of one base, by name: LoRA, or any family whose update is a
            product of two thin factors that does not depend on the base.
        weights: Mixing weight of each adapter, by name or (n,) in the order of `adapters`; ones
            when None, for the sum of the updates. JAX sorts the keys of a dict that passes through
            one of its functions, `jax.jit` as well as `jax.tree.map`: pass weights by name there.

    Returns:
        The weighted adapter, whose only trainable arrays are the mixing weights.

    Raises:
        ValueError: There are no adapters; adapters have different shapes or axes for a weight,
            belong on a residual base or have a non-finite entry; or `weights` has the wrong shape.
        TypeError: An entry is not an adapter, or the update of its family is not a product of two
            thin factors.

    References:
        Ilharco et al., task arithmetic, arXiv:2212.04089, section 2.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> mix = weighted_sum({"law": adapter, "news": adapter}, {"law": 0.5, "news": 0.25})
        >>> mix["w"].weights
        Array([0.5 , 0.25], dtype=float32)
    """
    names = _validate_adapter_names(adapters)
    check_adapters([adapters[name] for name in names])
    matched = unify_layer_layouts([adapters[name] for name in names])
    adapters = dict(zip(names, matched, strict=True))
    check_adapters(matched)
    if isinstance(weights, Mapping):
        other = sorted(set(weights) ^ set(names))
        if other:
            raise ValueError(
                f"weights must have the names of adapters, and the two differ in {other}. Pass a "
                f"weight for each of {list(names)}."
            )
        weights = jnp.stack([jnp.asarray(weights[name], float) for name in names])
    mixing_weights = _as_mixing_weights(
        np.ones(len(names)) if weights is None else weights, (len(names),)
    )
    joined = {}
    for path in dict.fromkeys(
        path for name in names for path in get_adapter_leaves(adapters[name])
    ):
        factors = {
            name: require_low_rank_factors(name, adapters[name], path)
            for name in names
            if path in adapters[name]
        }
        leaf = adapters[next(iter(factors))][path]
        a, b = concatenate_factors(leaf, list(factors.values()))
        joined[path] = WeightedSumLeaf(
            a=a,
            b=b,
            weights=mixing_weights,
            shape=leaf.shape,
            axes=leaf.axes,
            ranks=tuple(factors[name][0].shape[-1] if name in factors else 0 for name in names),
            names=names,
        )
    return joined


def with_weights(weighted_adapter: Adapter, weights: Any) -> dict[str, WeightedSumLeaf]:
    """Returns a weighted adapter with other mixing weights and the same arrays of factors.

    Args:
        weighted_adapter: Result of `weighted_sum`.
        weights: Mixing weights, (n,), for all weights of the model; or layer-wise, a mapping from
            the path of each weight to (n,), or to (*batch, n) where the weight is a stack.

    Raises:
        TypeError: `weighted_adapter` is not a weighted adapter.
        ValueError: The paths or a shape are wrong, or an entry is not finite.

    References:
        Layer-wise weights: Yang et al., AdaMerging, arXiv:2310.02575.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import weighted_sum, with_weights
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> mix = weighted_sum({"law": lora.init(jax.random.key(0), params, x)})
        >>> with_weights(mix, [0.5])["w"].weights
        Array([0.5], dtype=float32)
    """
    leaves = check_weighted_adapter(weighted_adapter)
    if not isinstance(weights, Mapping):
        mixing_weights = _as_mixing_weights(weights, (len(adapter_names(weighted_adapter)),))
        return {path: _set_leaf_weights(leaf, mixing_weights) for path, leaf in leaves.items()}
    other = sorted(set(weights) ^ set(leaves))
    if other:
        raise ValueError(
            f"weights must have the paths of weighted_adapter, and the two differ in {other[:3]} "
            f"({len(other)} paths). Pass weights for each path: "
            f"{{**get_weights(weighted_adapter), path: ...}}."
        )
    return {
        path: _set_leaf_weights(
            leaf, _as_mixing_weights(weights[path], *_mixing_weight_shapes(leaf))
        )
        for path, leaf in leaves.items()
    }


def get_weights(weighted_adapter: Adapter) -> dict[str, jax.Array]:
    """Returns the mixing weights of each path, in the form that `with_weights` accepts.

    Args:
        weighted_adapter: Result of `weighted_sum`.

    Raises:
        TypeError: `weighted_adapter` is not a weighted adapter.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import get_weights, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> get_weights(weighted_sum({"law": lora.init(jax.random.key(0), params, x)}))
        {'w': Array([1.], dtype=float32)}
    """
    return {path: leaf.weights for path, leaf in check_weighted_adapter(weighted_adapter).items()}


def adapter_names(weighted_adapter: Adapter) -> tuple[str, ...]:
    """Returns the names of the adapters, in the order of the mixing weights.

    Args:
        weighted_adapter: Result of `weighted_sum`.

    Raises:
        TypeError: `weighted_adapter` is not a weighted adapter.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import adapter_names, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> adapter_names(weighted_sum({"law": lora.init(jax.random.key(0), params, x)}))
        ('law',)
    """
    return next(iter(check_weighted_adapter(weighted_adapter).values())).names


def fold_weights(weighted_adapter: Adapter) -> dict[str, LoRALeaf]:
    """Converts a weighted adapter to plain LoRA that computes the same function.

    Args:
        weighted_adapter: Result of `weighted_sum`.

    Returns:
        LoRA leaves of scale one, with the mixing weights folded into `b`.

    Raises:
        TypeError: `weighted_adapter` is not a weighted adapter.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import fold_weights, weighted_sum
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> fold_weights(weighted_sum({"law": adapter, "news": adapter}))["w"].rank
        2
    """
    plain = {}
    for path, leaf in check_weighted_adapter(weighted_adapter).items():
        plain[path] = lora_leaf_from_factors(leaf, leaf.a, leaf.fold_weights_into_b())
    return plain


def check_weighted_adapter(weighted_adapter: Any) -> dict[str, WeightedSumLeaf]:
    """Returns the leaves of a weighted adapter by path, after checking its type.

    Raises:
        TypeError: `weighted_adapter` is not a weighted adapter.
        ValueError: It has no leaves, or leaves of different weighted adapters.
    """
    all_leaves = check_adapter(weighted_adapter)
    leaves = {path: leaf for path, leaf in all_leaves.items() if isinstance(leaf, WeightedSumLeaf)}
    if len(leaves) != len(weighted_adapter):
        path = sorted(set(weighted_adapter) - set(leaves))[0]
        raise TypeError(
            f"weighted_adapter must have mixing weights on each path, got a "
            f"{type(weighted_adapter[path]).__name__} on {path!r}. Pass the result of "
            f"jlora.merging.weighted_sum."
        )
    name_tuples = {leaf.names for leaf in leaves.values()}
    if len(name_tuples) != 1:
        raise ValueError(
            f"weighted_adapter must have leaves of one weighted adapter, got leaves of "
            f"{len(name_tuples)} different ones. Pass the result of one call of "
            f"jlora.merging.weighted_sum."
        )
    return leaves


def _validate_adapter_names(adapters: Any) -> tuple[str, ...]:
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters must be a mapping from names to adapters, got {type(adapters).__name__}. "
            f"Pass a dict, such as {{'french': french, 'law': law}}."
        )
    names = tuple(adapters)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"adapters={list(names)} must be a mapping from names (str) to at least one adapter."
        )
    if all(isinstance(leaf, AdapterLeaf) for leaf in adapters.values()):
        raise TypeError(
            f"adapters must be a mapping from names to adapters, got a single adapter of "
            f"{len(names)} weights. Pass {{name: adapter}}."
        )
    if not any(adapters.values()):
        raise ValueError("All adapters are empty: they adapt no weight. Pass trained adapters.")
    return names


def _as_mixing_weights(weights: Any, *shapes: tuple[int, ...]) -> jax.Array:
    """Returns the weights as floating point, after checking that they have one of the shapes."""
    array = jnp.asarray(weights, float)
    if array.shape not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"weights must have shape {expected}, one number for each adapter, got shape "
            f"{array.shape}."
        )
    check_mixing_finite("weights", array)
    return array


def _mixing_weight_shapes(leaf: WeightedSumLeaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    num_adapters = len(leaf.ranks)
    return (num_adapters,), (*leaf.axis_sizes.batch, num_adapters)


def _set_leaf_weights(leaf: WeightedSumLeaf, weights: jax.Array) -> WeightedSumLeaf:
    return dataclasses.replace(leaf, weights=weights, layered=weights.ndim > 1)


def check_mixing_finite(name: str, value: Any) -> None:
    """Checks that concrete values are finite; traced values are not checked.

    Raises:
        ValueError: An entry is NaN or infinite.
    """
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value, np.float32)).all():
        raise ValueError(
            f"{name} must be finite, got NaN or infinite entries, which would spread to every "
            f"output."
        )


def compose_adapters(lower: Adapter, upper: Adapter) -> dict[str, Any]:
    """Composes an adapter with a frozen one below it: `W + delta_lower + delta_upper`.

    Use it to train a task adapter on top of a frozen base adapter:
    `loss(upper) = ...lora.apply(params, compose_adapters(lower, upper), x)`. The result equals that
    of `upper` on `lora.merge(params, lower)`, without a merged copy of the base. `lower` gets no
    gradient and no dropout. Train and save `upper`; `combine_adapters` joins the two.

    Args:
        lower: Trained adapter below. On weights that it alone adapts, it may be of any family with
            a weight update, which excludes a mixture of experts.
        upper: Adapter on top, likewise.

    Returns:
        The composed adapter, for `lora.apply`.

    Raises:
        ValueError: Both adapt a weight, and they differ in its shape or axes or the upper one has
            dropout; both have shared arrays of one name; or either belongs on the base of
            `residual_base`.
        TypeError: Both adapt a weight, and the update of one is not a product of two thin factors.

    References:
        Pfeiffer et al., MAD-X, arXiv:2005.00052, for a task adapter stacked on a frozen language
        adapter.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora.merging import compose_adapters
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=1))
        >>> lower, upper = (lora.init(jax.random.key(seed), params, x) for seed in (0, 1))
        >>> lora.apply(params, compose_adapters(lower, upper), x).shape
        (1, 3)
    """
    check_adapters([lower, upper])
    lower, upper = unify_layer_layouts([lower, upper])
    check_adapters([lower, upper])
    lower = jax.lax.stop_gradient(dict(lower))
    lower_leaves, upper_leaves = get_adapter_leaves(lower), get_adapter_leaves(upper)
    shared_names = sorted((set(lower) - set(lower_leaves)) & set(upper))
    if shared_names:
        raise ValueError(
            f"Both adapters have shared arrays of the name {shared_names[0]!r}, and only one can "
            f"be used. Merge the lower adapter into the base: lora.merge(params, lower)."
        )
    composed: dict[str, Any] = {**lower, **upper}
    for path, leaf in lower_leaves.items():
        if path not in upper_leaves:
            composed[path] = _disable_dropout(leaf)
            continue
        _check_composable(path, upper_leaves[path])
        factors = [
            require_low_rank_factors("lower", lower, path),
            require_low_rank_factors("upper", upper, path),
        ]
        composed[path] = lora_leaf_from_factors(leaf, *concatenate_factors(leaf, factors))
    used = {leaf.share for leaf in get_adapter_leaves(composed).values()}
    return {
        name: node
        for name, node in composed.items()
        if isinstance(node, AdapterLeaf) or name in used
    }


def _disable_dropout(leaf: Any) -> Any:
    """Returns the leaf without random draws in training: dropout, and the ranks of DyLoRA."""
    if isinstance(leaf, DyLoRALeaf):
        leaf = dataclasses.replace(leaf, min_rank=leaf.rank)
    return dataclasses.replace(leaf, dropout=0.0) if leaf.dropout else leaf


def _check_composable(path: str, leaf: AdapterLeaf) -> None:
    if isinstance(leaf, DyLoRALeaf):
        raise TypeError(
            f"The upper adapter has a DyLoRALeaf on {path!r}, whose ranks are drawn at each step; "
            f"the ranks of the lower adapter must not be. Train the upper adapter on "
            f"lora.merge(params, lower)."
        )
    if leaf.dropout:
        raise ValueError(
            f"The upper adapter has dropout={leaf.dropout} on {path!r}, which the lower adapter "
            f"adapts too; dropout must not apply to the lower adapter's input. Train the upper "
            f"adapter on lora.merge(params, lower), or with dropout=0.0. "
            f"jlora.merging.combine_adapters joins the two for serving."
        )
