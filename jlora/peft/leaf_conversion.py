"""Converts the PEFT tensors of a weight's modules to one adapter leaf."""

from __future__ import annotations

import dataclasses
import math
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

# Fields of configs that the modules of one weight have to agree in.
_FIELDS_OF_STACKS = ("apply_to", "num_frequencies")

# Arrays that are one, and not zero, where a layer of a stack is not adapted.
_GAINS = {"l"}

# Arrays without a value for a layer of a stack that is not adapted.
_NEEDED_OF_ALL = {"magnitude", "logits_a"}

# Arrays in which an update with an alpha is linear: the first of them that a leaf has takes the
# scales of a stack whose modules differ.
_SCALED = ("b", "b1", "w1")

ErrorFactory = Callable[[str], ValueError]


class ModuleTensors(NamedTuple):
    """The tensors of one module of a PEFT adapter, as read.

    Attributes:
        parameter: Parameter of the module.
        fields: Fields of the config, with the module's own rank and alpha.
        tensors: Tensors, by the suffix of their names.
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
    """Converts the modules of one weight to its leaf; each may be one entry of a stack.

    Args:
        method: PEFT method of the adapter.
        weight: Weight that the modules adapt.
        modules: Modules that the weight consists of.
        make_error: Function from a reason to the error to raise.

    Raises:
        ValueError: A tensor or the config does not fit the weight.
    """
    configs: list[Any] = [
        _make_module_config(method, module, weight, make_error) for module in modules
    ]
    for name in _FIELDS_OF_STACKS:
        values = {getattr(config, name, None) for config in configs}
        if len(values) > 1:
            raise make_error(
                f"{weight.path} stacks modules, which differ in {name}: "
                f"{sorted(map(str, values))}. Load the model with scan_layers=False."
            )
    ranks = [getattr(config, "rank", 0) for config in configs]
    scales = [_config_scaling(config) for config in configs]
    config = configs[int(np.argmax(ranks))]
    if len(set(ranks)) > 1 or len(set(scales)) > 1:
        forms = {frozenset(module.tensors) for module in modules}
        if not hasattr(config, "alpha") or len(forms) > 1:
            raise make_error(
                f"{weight.path} stacks modules of ranks {sorted(set(ranks))} and scales "
                f"{sorted(set(scales))}, whose tensors cannot be one stack. Load the model with "
                f"scan_layers=False."
            )
        plain = {"use_rslora": False} if hasattr(config, "use_rslora") else {}
        config = dataclasses.replace(config, alpha=max(scales) * max(ranks), **plain)
    leaf = make_template_leaf(config, weight)
    scaled = next((name for name in _SCALED if name in leaf.shapes()), None)
    # All modules are checked before memory is allocated, since a config may claim any rank.
    module_arrays = [_module_arrays(method, leaf, weight, module, make_error) for module in modules]
    arrays = {
        name: np.full(shape, 1 if name in _GAINS else 0, np.float32)
        for name, shape in leaf.shapes().items()
    }
    num_stacked = len(modules[0].parameter.stack_index)
    if len(modules) < math.prod(leaf.axis_sizes.batch[:num_stacked]):
        needed = sorted(_NEEDED_OF_ALL & set(arrays))
        if needed:
            raise make_error(
                f"{weight.path} stacks layers, and not all of them have {needed[0]}. Load the "
                f"model with scan_layers=False."
            )
    for module, scale, values in zip(modules, scales, module_arrays, strict=True):
        for name, value in values.items():
            if name == scaled and scale != _config_scaling(config):
                value = value * np.float32(scale / _config_scaling(config))
            # Ranks past a module's own stay zero in both factors, and get no gradient.
            region = tuple(slice(0, n) for n in value.shape)
            arrays[name][(*module.parameter.stack_index, *region)] = value
    return dataclasses.replace(leaf, **{name: jnp.asarray(value) for name, value in arrays.items()})


def _make_module_config(
    method: PeftMethod, module: ModuleTensors, weight: AdaptableWeight, make_error: ErrorFactory
) -> AdapterConfig:
    try:
        config = method.make_config(module.fields, weight)
    except TypeError as error:
        raise make_error(f"its config is invalid: {error}") from error
    reason = config.unsupported_reason(weight) or method.unsupported_reason(weight)
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
    """Returns one module's arrays in the leaf's layout, without the stack axes."""
    stacked_axes = leaf.axes.batch[len(module.parameter.stack_index) :]
    geometry = WeightGeometry(leaf.shape, leaf.axes, weight.window, stacked_axes)
    layouts = method.tensor_layouts(leaf, weight)
    suffixes = {suffix for suffix, _ in layouts.values()}
    missing, extra = suffixes - set(module.tensors), set(module.tensors) - suffixes
    if missing or extra:
        raise make_error(
            f"{module.parameter.module} lacks {sorted(missing)} and has {sorted(extra)}, which "
            f"does not match its config."
        )
    module_rank = module.fields.get(method.rank_field or "")
    leaf_rank = getattr(leaf, "rank", None)
    arrays = {}
    for name, (suffix, layout) in layouts.items():
        tensor = module.tensors[suffix].astype(np.float32)
        try:
            value = tensor_to_leaf(tensor, layout, geometry)
        except ValueError as error:
            raise make_error(f"{module.parameter.module}.{suffix} {error}.") from error
        shape = leaf.shapes()[name][len(module.parameter.stack_index) :]
        expected = tuple(
            module_rank if module_rank is not None and n == leaf_rank and m != n else n
            for n, m in zip(shape, value.shape, strict=True)
        )
        if value.shape != expected:
            raise make_error(
                f"{module.parameter.module}.{suffix} has shape {tensor.shape}, which does not "
                f"match {method.rank_field}={module_rank} on a weight of shape {leaf.shape}."
            )
        arrays[name] = value
    return arrays


def _config_scaling(config: Any) -> float:
    """Returns the scale of the product of a config's factors; 1 for a config without alpha."""
    if not hasattr(config, "alpha") or not hasattr(config, "rank"):
        return 1.0
    use_rslora = getattr(config, "use_rslora", False)
    return config.alpha / (config.rank**0.5 if use_rslora else config.rank)


def make_template_leaf(config: AdapterConfig, weight: AdaptableWeight) -> Any:
    """Returns a leaf of zeros for a full update or tokens, and a leaf of shapes for other configs.

    A full update and trained tokens start at zero, since `load` puts their values into the base.
    """
    if isinstance(config, FullDelta | TrainableTokens):
        return config.init_leaf(jax.random.key(0), weight)
    value = jax.ShapeDtypeStruct(weight.shape, weight.value.dtype)
    return jax.eval_shape(
        lambda array: config.init_leaf(jax.random.key(0), weight._replace(value=array)), value
    )
