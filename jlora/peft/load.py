"""Loads a PEFT folder as an adapter and the base that it belongs on."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora._tree import PyTree
from jlora.adapters.base import AdapterConfig, SharedArrays
from jlora.adapters.full import BitFit, FullDelta
from jlora.adapters.trainable_tokens import TrainableTokens
from jlora.checkpoints.safetensors_io import format_names, open_safetensors, read_finite_tensor
from jlora.checkpoints.text_files import name_file_in_errors
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft import config
from jlora.peft.leaf_conversion import ModuleTensors, leaf_from_modules, make_template_leaf
from jlora.peft.methods import ConfigFields, PeftMethod
from jlora.peft.tensor_layouts import (
    ModuleParameter,
    WeightGeometry,
    list_module_parameters,
    tensor_to_leaf,
    weight_region,
)
from jlora.rules import trace_weights

KEY_PREFIX = "base_model.model."

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"

CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS")

TRAINABLE_TOKENS_SUFFIX = "token_adapter.trainable_tokens_delta"


class LoadedAdapter(NamedTuple):
    """The contents of a PEFT folder.

    Attributes:
        params: The base, with the folder's fully trained modules, biases and tokens in place.
        adapter: Adapter on `params`. Fully trained weights have updates of zero, so that training
            can continue with them.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora.peft import LoadedAdapter
        >>> loaded = LoadedAdapter(params={"w": jnp.ones(2)}, adapter={})
        >>> params, adapter = loaded
    """

    params: PyTree
    adapter: dict[str, Any]


def load_peft_folder(
    folder: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    checkpoint_mappings: Sequence[Mapping[str, CheckpointWeight]],
) -> LoadedAdapter:
    """Implements `jlora.peft.load`.

    Args:
        folder: Folder that PEFT saved.
        fn: Function of params and inputs.
        params: The base.
        inputs: Example inputs, arrays or shapes.
        checkpoint_mappings: Checkpoint tensors of the weights, one mapping for each spelling of the
            names. The spelling that matches most names in the file is used.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder requires an unsupported feature, or does not fit the model.
    """
    folder = Path(folder)
    fields, method = config.read_peft_config(folder)
    tensors = _read_peft_tensors(folder)
    mapping = max(checkpoint_mappings, key=lambda one: _count_known_names(one, tensors))
    reader = _PeftFolderReader(folder, fields, method, tensors, mapping)
    weights = trace_weights(fn, params, *inputs)
    with name_file_in_errors(folder / config.CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME):
        adapter = reader.build_adapter(weights)
        replacements = reader.collect_replacements(weights)
        reader.check_all_consumed()
    for path, trainable_config in replacements.trainable_configs.items():
        # A weight with trained factors keeps those; its replacement stays frozen.
        adapter.setdefault(path, make_template_leaf(trainable_config, weights[path]))
    flat = _tree.flatten_with_paths(params)
    leaves = [
        jnp.asarray(replacements.arrays[path], leaf.dtype) if path in replacements.arrays else leaf
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    return LoadedAdapter(jax.tree.unflatten(flat.treedef, leaves), adapter)


def _count_known_names(
    checkpoint_mapping: Mapping[str, CheckpointWeight], names: Iterable[str]
) -> int:
    """Returns the number of names that start with the name of a module."""
    modules = {parameter.module for parameter in list_module_parameters(checkpoint_mapping)}

    def is_known(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))

    return sum(map(is_known, names))


def _read_peft_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads the file's tensors by name, without their common prefix.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or empty, or has an unsupported dtype or a non-finite entry.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} must have {SAFETENSORS_WEIGHTS_NAME}. Files that end in .bin are not "
            f"opened, since they can run code. Load the adapter in PEFT and save it again."
        )
    tensors = {}
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 -- the file is not a mapping
            tensors[key.removeprefix(KEY_PREFIX)] = read_finite_tensor(file, key, path)
    if not tensors:
        raise ValueError(f"{path} has no tensors. Save the adapter again.")
    return tensors


class _BaseReplacements(NamedTuple):
    """Weights of the base that the file replaces.

    Attributes:
        arrays: Values of the weights with replaced entries, by path.
        trainable_configs: Config to continue training a replaced weight with, by path.
    """

    arrays: dict[str, np.ndarray]
    trainable_configs: dict[str, AdapterConfig]


class _PeftFolderReader:
    """Consumes the tensors of a file one by one, so that unused ones can be reported.

    Attributes:
        folder: The folder, for errors.
        fields: Fields of the config.
        method: PEFT method of the adapter.
        remaining: Tensors that are not consumed yet, by name.
        checkpoint_mapping: Checkpoint tensors of the model's weights.
        parameters: Parameters of the model's modules, by module and name.
        modules: Names of the model's modules.
        bias_gains: Biases that PEFT's IA3 scales with the outputs, and their gains.
    """

    def __init__(
        self,
        folder: Path,
        fields: dict[str, Any],
        method: PeftMethod,
        tensors: dict[str, np.ndarray],
        checkpoint_mapping: Mapping[str, CheckpointWeight],
    ) -> None:
        self.folder, self.fields, self.method = folder, fields, method
        self.remaining, self.checkpoint_mapping = tensors, checkpoint_mapping
        self.parameters = {
            (parameter.module, parameter.name): parameter
            for parameter in list_module_parameters(checkpoint_mapping)
        }
        self.modules = list(dict.fromkeys(module for module, _ in self.parameters))
        self.bias_gains: list[tuple[ModuleParameter, np.ndarray]] = []

    def make_error(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.folder / config.CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}: {reason} Use "
            f"the two files of one `save_pretrained` call, with the "
            f"model of the adapter."
        )

    # --- factors ----------------------------------------------------------------------------------

    def build_adapter(self, weights: Mapping[str, AdaptableWeight]) -> dict[str, Any]:
        """Returns the leaves of the PEFT method, without replacements of the base."""
        by_path: dict[str, list[ModuleTensors]] = {}
        for module in self._collect_modules():
            by_path.setdefault(module.parameter.path, []).append(module)
        adapter: dict[str, Any] = {}
        for path, modules in by_path.items():
            adapter[path] = leaf_from_modules(self.method, weights[path], modules, self.make_error)
        if self.method.shared_tensors and by_path:
            name = next(leaf.share for leaf in adapter.values())
            adapter[name] = self._build_shared_arrays(
                [(weights[path], modules[0].fields) for path, modules in by_path.items()]
            )
        return adapter

    def _collect_modules(self) -> list[ModuleTensors]:
        """Consumes the tensors of each module and checks them against the config."""
        by_parameter: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for name in list(self.remaining):
            module, suffix = self._split_suffix(name)
            if module is None:
                continue
            tensors = by_parameter.setdefault(self._find_parameter(module, name), {})
            tensors[suffix] = self.remaining.pop(name)
        parameters = [self.parameters[key] for key in by_parameter]
        self._check_targets(parameters)
        modules = []
        for parameter, tensors in zip(parameters, by_parameter.values(), strict=True):
            name = parameter.module
            if parameter.name != "weight":
                name = f"{parameter.module}.{parameter.name}"
            fields = config.fields_for_module(self.fields, self.method, name)
            fields["is_feedforward"] = config.is_feedforward(self.fields, parameter.module)
            modules.append(ModuleTensors(parameter, fields, tensors))
            bias = self.parameters.get((parameter.module, "bias"))
            if "ia3_l" in tensors and bias and not fields["is_feedforward"]:
                self.bias_gains.append((bias, tensors["ia3_l"].astype(np.float32)))
        return modules

    def _check_targets(self, parameters: Sequence[ModuleParameter]) -> None:
        """Checks that the config targets exactly the parameters with tensors in the file."""
        candidates = [module for module, name in self.parameters if name == "weight"]
        targets = config.match_target_modules(self.fields, candidates)
        modules = {parameter.module for parameter in parameters if parameter.name == "weight"}
        if self.fields["target_modules"] != "all-linear":
            missing, extra = sorted(targets - modules), sorted(modules - targets)
            if missing:
                raise self.make_error(
                    f"the config targets {format_names(missing)}, for which the file has no tensor."
                )
            if extra:
                raise self.make_error(
                    f"the file has tensors for {format_names(extra)}, which the config does not "
                    f"target."
                )
        experts = [f"{p.module}.{p.name}" for p in parameters if p.name != "weight"]
        for target in self.fields["target_parameters"] or []:
            if not any(name == target or name.endswith(f".{target}") for name in experts):
                raise self.make_error(
                    f"target_parameters has {target!r}, for which the file has no tensor."
                )
        config.check_rank_patterns(self.fields, [*(p.module for p in parameters), *experts])

    def _split_suffix(self, name: str) -> tuple[str | None, str]:
        """Returns a tensor's module and suffix; None and "" for a tensor of another kind."""
        for suffix in self.method.suffixes:
            if name.endswith(f".{suffix}"):
                return name[: -len(suffix) - 1], suffix
        return None, ""

    def _find_parameter(self, module: str, name: str) -> tuple[str, str]:
        """Returns the module and the parameter name that a tensor belongs to."""
        if (module, "weight") in self.parameters:
            return module, "weight"
        outer = module.removesuffix(".base_layer")
        experts = [k for k in self.parameters if k[0] == outer and k[1] not in ("weight", "bias")]
        if experts:
            return self._find_expert_parameter(experts, module != outer)
        raise self.make_error(
            f"{name} belongs to the module {module!r}, which the model does not have. The nearest "
            f"are {_tree.closest_matches(module, tuple(self.modules))}."
        )

    def _find_expert_parameter(
        self, candidates: list[tuple[str, str]], is_inner: bool
    ) -> tuple[str, str]:
        """Selects one of a module's two expert parameters.

        PEFT wraps a module with two adapted parameters twice; the first parameter is the inner one.
        """
        targets = self.fields["target_parameters"] or []
        targeted = [
            key for key in candidates if any(f"{key[0]}.{key[1]}".endswith(t) for t in targets)
        ]
        if len(targeted) == 1 and not is_inner:
            return targeted[0]
        if len(targeted) != 2:
            raise self.make_error(
                f"target_parameters={targets} must name the parameters of the experts."
            )
        # In the order of the module: gate and up before down.
        return sorted(targeted, key=lambda key: key[1] == "down_proj")[0 if is_inner else 1]

    def _build_shared_arrays(
        self, weights_with_fields: list[tuple[AdaptableWeight, ConfigFields]]
    ) -> SharedArrays:
        """Returns the arrays that all modules share."""
        first_weight, first_fields = weights_with_fields[0]
        adapter_config = self.method.make_config(first_fields, first_weight)
        weights = [weight for weight, _ in weights_with_fields]
        abstract: Any = jax.eval_shape(
            lambda key: adapter_config.init_shared(key, weights), jax.random.key(0)
        )
        no_axes = first_weight.axes._replace(batch=(), inputs=(), outputs=())
        geometry = WeightGeometry((), no_axes, (), ())
        values = {}
        for name, (key, layout) in self.method.shared_tensors.items():
            if key not in self.remaining:
                raise self.make_error(
                    f"it lacks {key}, which all modules share and only torch's generator could "
                    f"draw again. Save the adapter with save_projection=True."
                )
            tensor = self.remaining.pop(key).astype(np.float32)
            values[name] = jnp.asarray(tensor_to_leaf(tensor, layout, geometry))
        if "fan_in" in {field.name for field in dataclasses.fields(abstract)}:
            a, b = values["a"], values["b"]
            values |= {"fan_in": a.shape[0], "fan_out": b.shape[1]}
        shared = dataclasses.replace(abstract, **values)
        shapes = {name: tuple(getattr(shared, name).shape) for name in self.method.shared_tensors}
        if shapes != shared.shapes():
            raise self.make_error(
                f"the arrays that all modules share must have shapes {shared.shapes()}, got "
                f"{shapes}."
            )
        return shared

    # --- replacements of the base -----------------------------------------------------------------

    def collect_replacements(self, weights: Mapping[str, AdaptableWeight]) -> _BaseReplacements:
        """Consumes the tensors that replace weights of the base."""
        replacements = _BaseReplacements({}, {})
        token_indices = self.fields["trainable_token_indices"]
        has_biases = self.fields["bias"] != "none"
        saved_names = self.fields["modules_to_save"] or []
        for parameter, gains in self.bias_gains:
            self._scale_bias(replacements, weights, parameter, gains)
        names = set(self.remaining)
        for name in list(self.remaining):
            module, _, parameter_name = name.rpartition(".")
            if name.endswith(f".{TRAINABLE_TOKENS_SUFFIX}"):
                module = name.removesuffix(f".{TRAINABLE_TOKENS_SUFFIX}")
                self._replace_token_embeddings(
                    replacements, weights, module, token_indices, self.remaining.pop(name)
                )
                continue
            copied = re.fullmatch(r"(.*)\.(modules_to_save|original_module)", module)
            if copied and has_biases and f"{copied[1]}.{parameter_name}" in names:
                self.remaining.pop(name)  # PEFT writes a saved module's bias three times.
                continue
            is_wrapped = module.endswith(".base_layer")
            module = module.removesuffix(".base_layer").removesuffix(".token_adapter")
            is_saved = any(_is_saved_module(module, saved_name) for saved_name in saved_names)
            is_trained_bias = parameter_name == "bias" and has_biases
            parameter = self.parameters.get((module, parameter_name))
            # A copy of the full embedding beside its factors is the base's, possibly resized.
            if parameter is None or not (is_saved or is_wrapped or is_trained_bias):
                continue
            self._replace_slice(replacements, weights, parameter, self.remaining.pop(name))
            if is_saved or is_trained_bias:
                is_bias = weights[parameter.path].kind == "bias"
                replacements.trainable_configs[parameter.path] = (
                    BitFit() if is_bias else FullDelta()
                )
        for saved_name in saved_names:
            # PEFT itself adds the usual names of heads for tasks that have one.
            is_classification = self.fields["task_type"] in CLASSIFICATION_TASKS
            if saved_name in ("classifier", "score") and is_classification:
                continue
            if not any(_is_saved_module(module, saved_name) for module in self.modules):
                raise self.make_error(
                    f"modules_to_save has {saved_name!r}, which the model does not have."
                )
        return replacements

    def _replace_slice(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        parameter: ModuleParameter,
        tensor: np.ndarray,
    ) -> None:
        """Replaces the slice of a weight that one tensor fills."""
        assert parameter.tensor_slice is not None
        if tensor.shape != parameter.tensor_slice.tensor_shape:
            raise self.make_error(
                f"{parameter.module}.{parameter.name} has shape {tensor.shape} instead of "
                f"{parameter.tensor_slice.tensor_shape}. If the vocabulary was resized, resize "
                f"that of the base as well."
            )
        target = _writable_weight(replacements, weights, parameter)
        values = parameter.tensor_slice.to_weight_layout(tensor)
        target[weight_region(parameter.tensor_slice)] = values.astype(target.dtype)

    def _scale_bias(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        parameter: ModuleParameter,
        gains: np.ndarray,
    ) -> None:
        """Scales a bias by the gains of its outputs: PEFT's IA3 scales biases, jlora's does not."""
        assert parameter.tensor_slice is not None
        target = _writable_weight(replacements, weights, parameter)
        region = weight_region(parameter.tensor_slice)
        weight_gains = parameter.tensor_slice.to_weight_layout(gains.reshape(-1))
        target[region] = (target[region].astype(np.float32) * weight_gains).astype(target.dtype)

    def _replace_token_embeddings(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        module: str,
        token_indices: Any,
        tensor: np.ndarray,
    ) -> None:
        """Replaces the trained tokens of an embedding."""
        parameter = self.parameters.get((module, "weight"))
        indices = token_indices
        if isinstance(token_indices, Mapping):
            indices = next((r for m, r in token_indices.items() if module.endswith(m)), None)
        if parameter is None or not isinstance(indices, list) or len(indices) != len(tensor):
            raise self.make_error(
                f"{module} has {len(tensor)} trained tokens, which does not match "
                f"trainable_token_indices={token_indices}."
            )
        target = _writable_weight(replacements, weights, parameter)
        if tensor.shape[1:] != target.shape[1:] or max(indices) >= len(target):
            raise self.make_error(
                f"{module} has trained tokens of shape {tensor.shape} for the indices {indices} of "
                f"an embedding of shape {target.shape}."
            )
        target[indices] = tensor.astype(target.dtype)
        trainable_config = TrainableTokens(token_indices=tuple(indices))
        replacements.trainable_configs[parameter.path] = trainable_config

    def check_all_consumed(self) -> None:
        """Checks that no tensor of the file is unused.

        Raises:
            ValueError: A tensor is unused.
        """
        if self.remaining:
            raise self.make_error(
                f"the tensors {format_names(sorted(self.remaining))} are unexpected: neither the "
                f"config nor the model has a place for them."
            )


def _writable_weight(
    replacements: _BaseReplacements,
    weights: Mapping[str, AdaptableWeight],
    parameter: ModuleParameter,
) -> np.ndarray:
    """Returns the replacement of a parameter's weight, which starts as a copy of the base."""
    if parameter.path not in replacements.arrays:
        replacements.arrays[parameter.path] = np.array(weights[parameter.path].value)
    return replacements.arrays[parameter.path]


def _is_saved_module(module: str, saved_name: str) -> bool:
    """Returns True if an entry of `modules_to_save` matches a module or one of its parents.

    PEFT compares the ends of names, without a dot before them.
    """
    ends = (position for position, letter in enumerate(f"{module}.") if letter == ".")
    return any(module[:end].endswith(saved_name) for end in ends)
