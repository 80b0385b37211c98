"""Adapters side by side, under weights that can still be changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.adapters.lora import LoRALeaf
from jlora.adapters.mix import MixLeaf
from jlora.adapters.protocol import AdapterLeaf, check_adapter, leaves_of
from jlora.merging.checking import check_adapters
from jlora.merging.pairs import beside, factors_of, plain_lora

Adapter = Mapping[str, Any]


def mixed(adapters: Mapping[str, Adapter], weights: Any = None) -> dict[str, MixLeaf]:
    """The adapters joined in one: `W + sum_i w_i delta_i` for every weight that any of them adapts.

    Nothing is lost: the factors lie side by side, so the ranks add up. What training drops at
    random is not dropped from a mix. Change the weights with `with_weights`, find them with
    `fuse` or `fuse_by_gradient`, let them depend on the input with `apply_per_row`, and when they
    are settled turn the mix into plain LoRA with `fixed`.

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
    names = _names(adapters)
    check_adapters([adapters[name] for name in names])
    if isinstance(weights, Mapping):
        other = sorted(set(weights) ^ set(names))
        if other:
            raise ValueError(
                f"weights and adapters differ in {other}. Give a weight for each of {list(names)}."
            )
        weights = jnp.stack([jnp.asarray(weights[name], float) for name in names])
    numbers = _numbers(np.ones(len(names)) if weights is None else weights, (len(names),))
    joined = {}
    for path in dict.fromkeys(path for name in names for path in leaves_of(adapters[name])):
        there = [name for name in names if path in adapters[name]]
        factors = {name: factors_of(name, adapters[name], path) for name in there}
        leaf = adapters[there[0]][path]
        a, b = beside(leaf, list(factors.values()))
        joined[path] = MixLeaf(
            a=a,
            b=b,
            weights=numbers,
            shape=leaf.shape,
            axes=leaf.axes,
            ranks=tuple(factors[name][0].shape[-1] if name in factors else 0 for name in names),
            names=names,
        )
    return joined


def with_weights(mix: Adapter, weights: Any) -> dict[str, MixLeaf]:
    """The mix under other weights; the factors are the same arrays.

    Args:
        mix: What `mixed` returned.
        weights: (n,) numbers for every weight of the model; or, layer by layer, a mapping from the
            path of each weight to its (n,), or to (*batch, n) where the weight is a stack.

    Raises:
        TypeError: When `mix` is none.
        ValueError: For other paths or shapes, or what is not finite.
    """
    leaves = check_mix(mix)
    if not isinstance(weights, Mapping):
        numbers = _numbers(weights, (len(names_of(mix)),))
        return {path: _weighed(leaf, numbers) for path, leaf in leaves.items()}
    other = sorted(set(weights) ^ set(leaves))
    if other:
        raise ValueError(
            f"weights and the mix differ in the paths {other[:3]} ({len(other)} in all). Give "
            f"weights for each path: {{**weights_of(mix), path: ...}}."
        )
    return {
        path: _weighed(leaf, _numbers(weights[path], *_shapes(leaf)))
        for path, leaf in leaves.items()
    }


def weights_of(mix: Adapter) -> dict[str, jax.Array]:
    """The weights of each path of a mix, as `with_weights` takes them."""
    return {path: leaf.weights for path, leaf in check_mix(mix).items()}


def names_of(mix: Adapter) -> tuple[str, ...]:
    """The names of a mix's adapters, in the order of its weights."""
    return next(iter(check_mix(mix).values())).names


def fixed(mix: Adapter) -> dict[str, LoRALeaf]:
    """The mix as plain LoRA, its weights folded into the factors: the same function."""
    plain = {}
    for path, leaf in check_mix(mix).items():
        plain[path] = plain_lora(leaf, leaf.a, leaf.folded())
    return plain


def check_mix(mix: Any) -> dict[str, MixLeaf]:
    """Its leaves by path, after checking that it is a mix.

    Raises:
        TypeError: When it is none.
        ValueError: When it has no leaves, or leaves of different mixes.
    """
    every = check_adapter(mix)
    leaves = {path: leaf for path, leaf in every.items() if isinstance(leaf, MixLeaf)}
    if len(leaves) != len(mix):
        path = sorted(set(mix) - set(leaves))[0]
        raise TypeError(
            f"mix has a {type(mix[path]).__name__} on {path!r}, which has no weights to set. Give "
            f"what jlora.merging.mixed returned."
        )
    mixes = {leaf.names for leaf in leaves.values()}
    if len(mixes) != 1:
        raise ValueError(
            f"mix has leaves of {len(mixes)} different mixes, so no weights are those of all. Give "
            f"what one call of jlora.merging.mixed returned."
        )
    return leaves


def _names(adapters: Any) -> tuple[str, ...]:
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


def _numbers(weights: Any, *shapes: tuple[int, ...]) -> jax.Array:
    """The weights as floats, of one of the shapes."""
    numbers = jnp.asarray(weights, float)
    if numbers.shape not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"weights have shape {numbers.shape} instead of {expected}. Give one number for each "
            f"adapter."
        )
    check_finite("The weights", numbers)
    return numbers


def _shapes(leaf: MixLeaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count = len(leaf.ranks)
    return (count,), (*leaf.groups.batch, count)


def _weighed(leaf: MixLeaf, weights: jax.Array) -> MixLeaf:
    return dataclasses.replace(leaf, weights=weights, layered=weights.ndim > 1)


def check_finite(what: str, value: Any) -> None:
    """Looks at numbers that are at hand: inside a transformation there are none yet.

    Raises:
        ValueError: For NaN or infinity.
    """
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value, np.float32)).all():
        raise ValueError(
            f"{what} hold NaN or infinity, so every output would. Go back to where they were "
            f"finite."
        )
