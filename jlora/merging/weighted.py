"""One adapter trained on top of another."""

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
from jlora.merging._validation import check_adapters
from jlora.merging.combine import (
    concatenate_factors,
    lora_leaf_from_factors,
    require_low_rank_factors,
)

Adapter = Mapping[str, Any]


def weighted_sum(
    adapters: Mapping[str, Adapter], weights: Any = None
) -> dict[str, WeightedSumLeaf]:
    """The adapters joined in one: `W + sum_i w_i delta_i` for every weight that any of them adapts.

    Nothing is lost: the factors lie side by side, so the ranks add up. What training drops at
    random is not dropped from a mix. Change the weights with `with_weights`, find them with
    `fuse` or `fuse_by_gradient`, let them depend on the input with `apply_per_row`, and when they
    are settled turn the mix into plain LoRA with `fold_weights`.

    Args:
        adapters: Trained adapters of one base, by name: of LoRA, or of any family whose change is
            a product of two thin factors, whatever the base.
        weights: A number for each adapter by its name, or (n,) in the order of `adapters`; ones
            when None, which is their sum. JAX sorts the names of a dict that goes through one of
            its functions, `jax.jit` as well as `jax.tree.map`: there, give weights by name.

    Raises:
        ValueError: For no adapters, for those of one weight that do not lie alike, that belong on
            another base or are not finite, and for weights of another shape.
        TypeError: For what is no adapter, and families whose change is no pair of factors.

    References:
        Ilharco et al., task arithmetic, arXiv:2212.04089, section 2.
    """
    names = _validate_adapter_names(adapters)
    check_adapters([adapters[name] for name in names])
    if isinstance(weights, Mapping):
        other = sorted(set(weights) ^ set(names))
        if other:
            raise ValueError(
                f"weights and adapters differ in {other}. Give a weight for each of {list(names)}."
            )
        weights = jnp.stack([jnp.asarray(weights[name], float) for name in names])
    numbers = _as_mixing_weights(np.ones(len(names)) if weights is None else weights, (len(names),))
    joined = {}
    for path in dict.fromkeys(
        path for name in names for path in get_adapter_leaves(adapters[name])
    ):
        there = [name for name in names if path in adapters[name]]
        factors = {name: require_low_rank_factors(name, adapters[name], path) for name in there}
        leaf = adapters[there[0]][path]
        a, b = concatenate_factors(leaf, list(factors.values()))
        joined[path] = WeightedSumLeaf(
            a=a,
            b=b,
            weights=numbers,
            shape=leaf.shape,
            axes=leaf.axes,
            ranks=tuple(factors[name][0].shape[-1] if name in factors else 0 for name in names),
            names=names,
        )
    return joined


def with_weights(weighted_adapter: Adapter, weights: Any) -> dict[str, WeightedSumLeaf]:
    """The mix under other weights; the factors are the same arrays.

    Args:
        weighted_adapter: What `weighted_sum` returned.
        weights: (n,) numbers for every weight of the model; or, layer by layer, a mapping from the
            path of each weight to its (n,), or to (*batch, n) where the weight is a stack.

    Raises:
        TypeError: When `weighted_adapter` is none.
        ValueError: For other paths or shapes, or what is not finite.
    """
    leaves = check_weighted_adapter(weighted_adapter)
    if not isinstance(weights, Mapping):
        numbers = _as_mixing_weights(weights, (len(adapter_names(weighted_adapter)),))
        return {path: _set_leaf_weights(leaf, numbers) for path, leaf in leaves.items()}
    other = sorted(set(weights) ^ set(leaves))
    if other:
        raise ValueError(
            f"weights and the mix differ in the paths {other[:3]} ({len(other)} in all). Give "
            f"weights for each path: {{**weights_of(mix), path: ...}}."
        )
    return {
        path: _set_leaf_weights(
            leaf, _as_mixing_weights(weights[path], *_mixing_weight_shapes(leaf))
        )
        for path, leaf in leaves.items()
    }


def get_weights(weighted_adapter: Adapter) -> dict[str, jax.Array]:
    """The weights of each path of a mix, as `with_weights` takes them."""
    return {path: leaf.weights for path, leaf in check_weighted_adapter(weighted_adapter).items()}


def adapter_names(weighted_adapter: Adapter) -> tuple[str, ...]:
    """The names of a mix's adapters, in the order of its weights."""
    return next(iter(check_weighted_adapter(weighted_adapter).values())).names


def fold_weights(weighted_adapter: Adapter) -> dict[str, LoRALeaf]:
    """The mix as plain LoRA, its weights folded into the factors: the same function."""
    plain = {}
    for path, leaf in check_weighted_adapter(weighted_adapter).items():
        plain[path] = lora_leaf_from_factors(leaf, leaf.a, leaf.fold_weights_into_b())
    return plain


def check_weighted_adapter(weighted_adapter: Any) -> dict[str, WeightedSumLeaf]:
    """Its leaves by path, after checking that it is a mix.

    Raises:
        TypeError: When it is none.
        ValueError: When it has no leaves, or leaves of different mixes.
    """
    every = check_adapter(weighted_adapter)
    leaves = {path: leaf for path, leaf in every.items() if isinstance(leaf, WeightedSumLeaf)}
    if len(leaves) != len(weighted_adapter):
        path = sorted(set(weighted_adapter) - set(leaves))[0]
        raise TypeError(
            f"mix has a {type(weighted_adapter[path]).__name__} on {path!r}, which has no weights to set. Give "
            f"what jlora.merging.mixed returned."
        )
    mixes = {leaf.names for leaf in leaves.values()}
    if len(mixes) != 1:
        raise ValueError(
            f"mix has leaves of {len(mixes)} different mixes, so no weights are those of all. Give "
            f"what one call of jlora.merging.mixed returned."
        )
    return leaves


def _validate_adapter_names(adapters: Any) -> tuple[str, ...]:
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters={type(adapters).__name__} must map names to adapters, such as "
            f"{{'french': french, 'law': law}}."
        )
    names = tuple(adapters)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapters={list(names)} names nothing to mix. Map texts to adapters.")
    if all(isinstance(leaf, AdapterLeaf) for leaf in adapters.values()):
        raise TypeError(
            f"adapters is one adapter, of {len(names)} weights. Map a name to each whole adapter."
        )
    if not any(adapters.values()):
        raise ValueError("adapters are all empty: they adapt no weight. Give trained adapters.")
    return names


def _as_mixing_weights(weights: Any, *shapes: tuple[int, ...]) -> jax.Array:
    """The weights as floats, of one of the shapes."""
    numbers = jnp.asarray(weights, float)
    if numbers.shape not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"weights have shape {numbers.shape} instead of {expected}. Give one number for each "
            f"adapter."
        )
    check_mixing_finite("The weights", numbers)
    return numbers


def _mixing_weight_shapes(leaf: WeightedSumLeaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count = len(leaf.ranks)
    return (count,), (*leaf.axis_sizes.batch, count)


def _set_leaf_weights(leaf: WeightedSumLeaf, weights: jax.Array) -> WeightedSumLeaf:
    return dataclasses.replace(leaf, weights=weights, layered=weights.ndim > 1)


def check_mixing_finite(name: str, value: Any) -> None:
    """Looks at numbers that are at hand: inside a transformation there are none yet.

    Raises:
        ValueError: For NaN or infinity.
    """
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value, np.float32)).all():
        raise ValueError(
            f"{name} hold NaN or infinity, so every output would. Go back to where they were "
            f"finite."
        )


def compose_adapters(lower: Adapter, upper: Adapter) -> dict[str, Any]:
    """An adapter on top of another: `W + delta_lower + delta_upper`, the lower one frozen.

    Train a task's adapter on a frozen base adapter with it:
    `loss(upper) = ...lora.apply(params, stacked(lower, upper), x)`. It computes what `upper` does
    on `lora.merge(params, lower)`, without a merged copy of the base. No gradient reaches `lower`,
    and nothing of it is dropped at random. Train and save `upper`; `combine` joins the two.

    Args:
        lower: The trained adapter below. Weights that it alone adapts may be of any family that is
            a change of the weight, which a mixture of experts is not.
        upper: The adapter on top. Likewise.

    Raises:
        ValueError: Where both adapt a weight and the two do not lie alike or the upper one has a
            dropout; where both have shared arrays under one name; where either belongs on the base
            of `residual_base`.
        TypeError: Where both adapt a weight and one of them is no pair of factors.
    """
    check_adapters([lower, upper])
    lower = jax.lax.stop_gradient(dict(lower))
    below, above = get_adapter_leaves(lower), get_adapter_leaves(upper)
    shared = sorted((set(lower) - set(below)) & set(upper))
    if shared:
        raise ValueError(
            f"Both adapters have shared arrays under {shared[0]!r}, and one would take the place "
            f"of the other. Merge the lower one into the base: lora.merge(params, lower)."
        )
    joined: dict[str, Any] = {**lower, **upper}
    for path, leaf in below.items():
        if path not in above:
            joined[path] = _disable_dropout(leaf)
            continue
        _check_composable(path, above[path])
        factors = [
            require_low_rank_factors("lower", lower, path),
            require_low_rank_factors("upper", upper, path),
        ]
        joined[path] = lora_leaf_from_factors(leaf, *concatenate_factors(leaf, factors))
    used = {leaf.share for leaf in get_adapter_leaves(joined).values()}
    return {
        name: node for name, node in joined.items() if isinstance(node, AdapterLeaf) or name in used
    }


def _disable_dropout(leaf: Any) -> Any:
    """The leaf without what training draws: dropout, and DyLoRA's ranks."""
    if isinstance(leaf, DyLoRALeaf):
        leaf = dataclasses.replace(leaf, min_rank=leaf.rank)
    return dataclasses.replace(leaf, dropout=0.0) if leaf.dropout else leaf


def _check_composable(path: str, leaf: AdapterLeaf) -> None:
    if isinstance(leaf, DyLoRALeaf):
        raise TypeError(
            f"The upper adapter has a DyLoRALeaf on {path!r}, whose ranks are drawn at each step, "
            f"which those of the lower must not be. Train it on lora.merge(params, lower)."
        )
    if leaf.dropout:
        raise ValueError(
            f"The upper adapter has dropout={leaf.dropout} on {path!r}, which the lower one adapts "
            f"too and whose input it must not drop. Train it on lora.merge(params, lower), or with "
            f"dropout=0.0; jlora.merging.combine joins the two for serving."
        )
