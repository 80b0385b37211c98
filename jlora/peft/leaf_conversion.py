"""The tensors of a weight's modules, in PEFT's layouts, as the leaf that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.base import AdapterConfig, AdapterLeaf
from jlora.adapters.full import FullDelta
from jlora.adapters.trainable_tokens import TrainableTokens
from jlora.interpreter.weight import AdaptableWeight
from jlora.peft.methods import ConfigFields, PeftMethod
from jlora.peft.tensor_layouts import ModuleParameter, WeightGeometry, tensor_to_leaf

ErrorFactory = Callable[[str], ValueError]


class ModuleTensors(NamedTuple):
    """One module's part of an adapter.

    Attributes:
        parameter: The module.
        fields: Of the config, with its own rank and alpha.
        tensors: By suffix.
    """

    parameter: ModuleParameter
    fields: ConfigFields
    tensors: dict[str, np.ndarray]


def leaf_from_modules(
    method: PeftMethod,
    weight: AdaptableWeight,
    modules: Sequence[ModuleTensors],
    make_error: ErrorFactory,
) -> AdapterLeaf:
    """The leaf of one weight, of which each module may be one entry of a stack.

    Args:
        method: The method.
        weight: What is adapted.
        modules: The modules that it is.
        make_error: What is wrong, to the error that says so.
    """
    made: list[Any] = [_make_module_config(method, part, weight, make_error) for part in modules]
    ranks = [getattr(one, "rank", 0) for one in made]
    scales = [_config_scaling(one) for one in made]
    config = made[int(np.argmax(ranks))]
    if len(set(ranks)) > 1 or len(set(scales)) > 1:
        if not hasattr(config, "use_rslora"):
            raise make_error(
                f"{weight.path} stacks modules of ranks {sorted(set(ranks))} and scales "
                f"{sorted(set(scales))}, which only LoRA can pad. Load the model unrolled."
            )
        config = dataclasses.replace(config, alpha=max(scales) * max(ranks), use_rslora=False)
    leaf = make_template_leaf(config, weight)
    # All checked before there is room made for them: a config may claim any rank.
    values = [_module_arrays(method, leaf, weight, part, make_error) for part in modules]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in leaf.shapes().items()}
    if "magnitude" in arrays and len(modules) < int(np.prod(leaf.axis_sizes.batch)):
        raise make_error(
            f"{weight.path} stacks layers of which not all have a magnitude. Load the model "
            f"unrolled."
        )
    for part, scale, own in zip(modules, scales, values, strict=True):
        for name, value in own.items():
            if name == "b" and scale != _config_scaling(config):
                value = value * np.float32(scale / _config_scaling(config))
            # Ranks past a module's own stay zero on both sides, and get no gradient.
            box = tuple(slice(0, n) for n in value.shape)
            arrays[name][(*part.parameter.stack_index, *box)] = value
    filled = {name: jnp.asarray(value) for name, value in arrays.items()}
    return dataclasses.replace(leaf, **filled)


def _make_module_config(
    method: PeftMethod, module: ModuleTensors, weight: AdaptableWeight, make_error: ErrorFactory
) -> AdapterConfig:
    try:
        config = method.make_config(module.fields, weight)
    except TypeError as error:
        raise make_error(f"its config is wrong: {error}") from error
    reason = config.unsupported_reason(weight)
    if reason:
        raise make_error(f"{module.parameter.module} cannot be adapted: {reason}.")
    return config


def _module_arrays(
    method: PeftMethod,
    leaf: AdapterLeaf,
    weight: AdaptableWeight,
    module: ModuleTensors,
    make_error: ErrorFactory,
) -> dict[str, np.ndarray]:
    """One module's arrays in the leaf's layout."""
    inside = leaf.axes.batch[len(module.parameter.stack_index) :]
    facts = WeightGeometry(leaf.shape, leaf.axes, weight.window, inside)
    wanted = method.tensor_layouts(leaf, weight)
    suffixes = {suffix for suffix, _ in wanted.values()}
    missing, extra = suffixes - set(module.tensors), set(module.tensors) - suffixes
    if missing or extra:
        raise make_error(
            f"{module.parameter.module} lacks {sorted(missing)} and has {sorted(extra)}, which its "
            f"config does not speak of."
        )
    own_rank = module.fields.get(method.rank_field or "")
    arrays = {}
    for name, (suffix, layout) in wanted.items():
        tensor = module.tensors[suffix].astype(np.float32)
        try:
            value = tensor_to_leaf(tensor, layout, facts)
        except ValueError as error:
            raise make_error(f"{module.parameter.module}.{suffix} {error}.") from error
        shape = leaf.shapes()[name][len(module.parameter.stack_index) :]
        ranks = getattr(leaf, "rank", None)
        expected = tuple(
            own_rank if own_rank is not None and n == ranks and m != n else n
            for n, m in zip(shape, value.shape, strict=True)
        )
        if value.shape != expected:
            raise make_error(
                f"{module.parameter.module}.{suffix} has shape {tensor.shape}, which does not go with "
                f"{method.rank_field}={own_rank} on a weight of shape {leaf.shape}."
            )
        arrays[name] = value
    return arrays


def _config_scaling(config: Any) -> float:
    """What the product of a config's factors is multiplied by."""
    if not hasattr(config, "alpha") or not hasattr(config, "rank"):
        return 1.0
    root = getattr(config, "use_rslora", False)
    return config.alpha / (config.rank**0.5 if root else config.rank)


def make_template_leaf(config: AdapterConfig, weight: AdaptableWeight) -> Any:
    """A leaf of zeros for what replaces the base; for others, shapes that are to be filled."""
    if isinstance(config, FullDelta | TrainableTokens):
        return config.init_leaf(jax.random.key(0), weight)
    value = jax.ShapeDtypeStruct(weight.shape, weight.value.dtype)
    return jax.eval_shape(
        lambda array: config.init_leaf(jax.random.key(0), weight._replace(value=array)), value
    )
