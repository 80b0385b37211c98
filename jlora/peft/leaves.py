"""The tensors of a weight's modules, in PEFT's layouts, as the leaf that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.full import Full
from jlora.adapters.protocol import AdapterConfig, AdapterLeaf, Weight
from jlora.adapters.token_rows import TokenRows
from jlora.peft.formats import Fields, Format
from jlora.peft.layouts import Facts, to_leaf
from jlora.peft.sites import Site

Problem = Callable[[str], ValueError]


class Part(NamedTuple):
    """One module's part of an adapter.

    Attributes:
        site: The module.
        fields: Of the config, with its own rank and alpha.
        tensors: By suffix.
    """

    site: Site
    fields: Fields
    tensors: dict[str, np.ndarray]


def leaf_of(form: Format, weight: Weight, parts: Sequence[Part], problem: Problem) -> AdapterLeaf:
    """The leaf of one weight, of which each module may be one entry of a stack.

    Args:
        form: The method.
        weight: What is adapted.
        parts: The modules that it is.
        problem: What is wrong, to the error that says so.
    """
    made: list[Any] = [_config(form, part, weight, problem) for part in parts]
    ranks = [getattr(one, "rank", 0) for one in made]
    scales = [_scale(one) for one in made]
    config = made[int(np.argmax(ranks))]
    if len(set(ranks)) > 1 or len(set(scales)) > 1:
        if not hasattr(config, "rank_stabilized"):
            raise problem(
                f"{weight.path} stacks modules of ranks {sorted(set(ranks))} and scales "
                f"{sorted(set(scales))}, which only LoRA can pad. Load the model unrolled."
            )
        config = dataclasses.replace(config, alpha=max(scales) * max(ranks), rank_stabilized=False)
    leaf = fresh(config, weight)
    # All checked before there is room made for them: a config may claim any rank.
    values = [_arrays(form, leaf, weight, part, problem) for part in parts]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in leaf.shapes().items()}
    if "magnitude" in arrays and len(parts) < int(np.prod(leaf.groups.batch)):
        raise problem(
            f"{weight.path} stacks layers of which not all have a magnitude. Load the model "
            f"unrolled."
        )
    for part, scale, own in zip(parts, scales, values, strict=True):
        for name, value in own.items():
            if name == "b" and scale != _scale(config):
                value = value * np.float32(scale / _scale(config))
            # Ranks past a module's own stay zero on both sides, and get no gradient.
            box = tuple(slice(0, n) for n in value.shape)
            arrays[name][(*part.site.entry, *box)] = value
    filled = {name: jnp.asarray(value) for name, value in arrays.items()}
    return dataclasses.replace(leaf, **filled)


def _config(form: Format, part: Part, weight: Weight, problem: Problem) -> AdapterConfig:
    try:
        config = form.config(part.fields, weight)
    except TypeError as error:
        raise problem(f"its config is wrong: {error}") from error
    reason = config.refusal(weight)
    if reason:
        raise problem(f"{part.site.module} cannot be adapted: {reason}.")
    return config


def _arrays(
    form: Format, leaf: AdapterLeaf, weight: Weight, part: Part, problem: Problem
) -> dict[str, np.ndarray]:
    """One module's arrays in the leaf's layout."""
    inside = leaf.axes.batch[len(part.site.entry) :]
    facts = Facts(leaf.shape, leaf.axes, weight.window, inside)
    wanted = form.tensors(leaf, weight)
    suffixes = {suffix for suffix, _ in wanted.values()}
    missing, extra = suffixes - set(part.tensors), set(part.tensors) - suffixes
    if missing or extra:
        raise problem(
            f"{part.site.module} lacks {sorted(missing)} and has {sorted(extra)}, which its "
            f"config does not speak of."
        )
    own_rank = part.fields.get(form.rank or "")
    arrays = {}
    for name, (suffix, layout) in wanted.items():
        tensor = part.tensors[suffix].astype(np.float32)
        try:
            value = to_leaf(tensor, layout, facts)
        except ValueError as error:
            raise problem(f"{part.site.module}.{suffix} {error}.") from error
        shape = leaf.shapes()[name][len(part.site.entry) :]
        ranks = getattr(leaf, "rank", None)
        expected = tuple(
            own_rank if own_rank is not None and n == ranks and m != n else n
            for n, m in zip(shape, value.shape, strict=True)
        )
        if value.shape != expected:
            raise problem(
                f"{part.site.module}.{suffix} has shape {tensor.shape}, which does not go with "
                f"{form.rank}={own_rank} on a weight of shape {leaf.shape}."
            )
        arrays[name] = value
    return arrays


def _scale(config: Any) -> float:
    """What the product of a config's factors is multiplied by."""
    if not hasattr(config, "alpha") or not hasattr(config, "rank"):
        return 1.0
    root = getattr(config, "rank_stabilized", False)
    return config.alpha / (config.rank**0.5 if root else config.rank)


def fresh(config: AdapterConfig, weight: Weight) -> Any:
    """A leaf of zeros for what replaces the base; for others, shapes that are to be filled."""
    if isinstance(config, Full | TokenRows):
        return config.leaf(jax.random.key(0), weight)
    value = jax.ShapeDtypeStruct(weight.shape, weight.value.dtype)
    return jax.eval_shape(
        lambda array: config.leaf(jax.random.key(0), weight._replace(value=array)), value
    )
