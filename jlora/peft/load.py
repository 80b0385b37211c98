"""A folder that PEFT wrote, as an adapter and the base that it belongs on."""

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
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.peft import config as configs
from jlora.peft.leaf_conversion import ModuleTensors, leaf_from_modules, make_template_leaf
from jlora.peft.methods import ConfigFields, PeftMethod
from jlora.peft.tensor_layouts import (
    ModuleParameter,
    WeightGeometry,
    list_module_parameters,
    tensor_to_leaf,
)
from jlora.rules import trace_weights

KEY_PREFIX = "base_model.model."

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"

CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS")

TRAINABLE_TOKENS_SUFFIX = "token_adapter.trainable_tokens_delta"


class LoadedAdapter(NamedTuple):
    """What a folder of PEFT's holds.

    Attributes:
        params: The base, with what the folder replaces: modules that were trained whole, biases,
            rows of tokens.
        adapter: What is added to it. What was trained whole has differences of zero here, so that
            training goes on with it.
    """

    params: PyTree
    adapter: dict[str, Any]


def load_peft_folder(
    folder: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    checkpoint_mappings: Sequence[Mapping[str, Stored]],
) -> LoadedAdapter:
    """See `jlora.peft.load`; of the `checkpoint_mappings` that one is used which knows most of the names."""
    folder = Path(folder)
    fields, form = configs.read_peft_config(folder)
    tensors = _read_peft_tensors(folder)
    stored = max(checkpoint_mappings, key=lambda one: _count_known_names(one, tensors))
    reader = _PeftFolderReader(folder, fields, form, tensors, stored)
    used = trace_weights(fn, params, *inputs)
    adapter = reader.build_adapter(used)
    replaced = reader.collect_replacements(used)
    reader.check_all_consumed()
    for path, config in replaced.trainable_configs.items():
        # Where factors are trained as well, what replaces the base stays as it is.
        adapter.setdefault(path, make_template_leaf(config, used[path]))
    flat = _tree.flatten_with_paths(params)
    leaves = [
        jnp.asarray(replaced.arrays[path], leaf.dtype) if path in replaced.arrays else leaf
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    return LoadedAdapter(jax.tree.unflatten(flat.treedef, leaves), adapter)


def _count_known_names(checkpoint_mapping: Mapping[str, Stored], names: Iterable[str]) -> int:
    """How many names begin with a module's."""
    modules = {site.module for site in list_module_parameters(checkpoint_mapping)}

    def is_known(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))

    return sum(map(is_known, names))


def _read_peft_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The file's tensors by name, without the prefix that all have.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, empty, or holds another dtype or what is not finite.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}, and files that end in .bin are not opened, since they can "
            f"run code. Load it in PEFT and save it anew."
        )
    found = {}
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 -- it is no mapping
            found[key.removeprefix(KEY_PREFIX)] = read_finite_tensor(file, key, path)
    if not found:
        raise ValueError(f"{path} holds no tensor. Save the adapter anew.")
    return found


class _BaseReplacements(NamedTuple):
    """What a file says in the base's place."""

    arrays: dict[str, np.ndarray]  # By path, of those weights of which something is replaced.
    trainable_configs: dict[str, AdapterConfig]  # How training goes on with it.


class _PeftFolderReader:
    """Takes the tensors of a file one after the other, so that what is left over is known."""

    def __init__(
        self,
        folder: Path,
        fields: dict[str, Any],
        method: PeftMethod,
        tensors: dict[str, np.ndarray],
        checkpoint_mapping: Mapping[str, Stored],
    ) -> None:
        self.folder, self.fields, self.method = folder, fields, method
        self.remaining, self.checkpoint_mapping = tensors, checkpoint_mapping
        self.parameters = {
            (site.module, site.name): site for site in list_module_parameters(checkpoint_mapping)
        }
        self.modules = list(dict.fromkeys(module for module, _ in self.parameters))
        self.bias_gains: list[
            tuple[ModuleParameter, np.ndarray]
        ] = []  # Biases that are scaled with outputs.

    def make_error(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.folder}: {reason} Use the two files that one `save_pretrained` wrote, with the "
            f"model that they were made for."
        )

    def build_adapter(self, weights: Mapping[str, AdaptableWeight]) -> dict[str, Any]:
        """The leaves of the method itself."""
        parts = self._collect_modules()
        by_path: dict[str, list[ModuleTensors]] = {}
        for part in parts:
            by_path.setdefault(part.parameter.path, []).append(part)
        adapter: dict[str, Any] = {}
        for path, some in by_path.items():
            adapter[path] = leaf_from_modules(self.method, weights[path], some, self.make_error)
        if self.method.shared_tensors and by_path:
            name = next(leaf.share for leaf in adapter.values())
            some = [(weights[path], parts[0].fields) for path, parts in by_path.items()]
            adapter[name] = self._build_shared_arrays(some)
        return adapter

    def _collect_modules(self) -> list[ModuleTensors]:
        """What the file has for each module, after checking it against the config."""
        found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for name in list(self.remaining):
            module, suffix = self._split_suffix(name)
            if module is None:
                continue
            found.setdefault(self._find_parameter(module, name), {})[suffix] = self.remaining.pop(
                name
            )
        sites = [self.parameters[key] for key in found]
        modules = [site.module for site in sites]
        candidates = [module for module, parameter in self.parameters if parameter == "weight"]
        chosen = configs.match_target_modules(self.fields, candidates)
        plain = {site.module for site in sites if site.name == "weight"}
        if self.fields["target_modules"] != "all-linear":
            missing, extra = sorted(chosen - plain), sorted(plain - chosen)
            if missing:
                raise self.make_error(
                    f"the config targets {format_names(missing)}, for which the file has no tensor."
                )
            if extra:
                raise self.make_error(
                    f"the file has tensors for {format_names(extra)}, which the config does not target."
                )
        joined = [f"{s.module}.{s.name}" for s in sites if s.name != "weight"]
        for target in self.fields["target_parameters"] or []:
            if not any(name == target or name.endswith(f".{target}") for name in joined):
                raise self.make_error(
                    f"target_parameters has {target!r}, and no tensor belongs to it."
                )
        configs.check_rank_patterns(self.fields, [*modules, *joined])
        parts = []
        for site, tensors in zip(sites, found.values(), strict=True):
            name = site.module if site.name == "weight" else f"{site.module}.{site.name}"
            own = configs.fields_for_module(self.fields, self.method, name)
            own["is_feedforward"] = configs.is_feedforward(self.fields, site.module)
            parts.append(ModuleTensors(site, own, tensors))
            bias = self.parameters.get((site.module, "bias"))
            if "ia3_l" in tensors and bias and not own["is_feedforward"]:
                self.bias_gains.append((bias, tensors["ia3_l"].astype(np.float32)))
        return parts

    def _split_suffix(self, name: str) -> tuple[str | None, str]:
        """A tensor's module and suffix, where it is one of the method's own."""
        for suffix in self.method.suffixes:
            if name.endswith(f".{suffix}"):
                return name[: -len(suffix) - 1], suffix
        return None, ""

    def _find_parameter(self, module: str, name: str) -> tuple[str, str]:
        """The site of a module that a tensor names."""
        if (module, "weight") in self.parameters:
            return module, "weight"
        outer = module.removesuffix(".base_layer")
        both = [k for k in self.parameters if k[0] == outer and k[1] not in ("weight", "bias")]
        if both:
            return self._find_expert_parameter(both, module != outer)
        raise self.make_error(
            f"{name} belongs to a module {module!r} that the model has not. The nearest are "
            f"{_tree.closest_matches(module, tuple(self.modules))}."
        )

    def _find_expert_parameter(
        self, candidates: list[tuple[str, str]], is_inner: bool
    ) -> tuple[str, str]:
        """Of a module's two parameters the one meant: wrapped twice, the first is inside."""
        targets = self.fields["target_parameters"] or []
        wanted = [
            key for key in candidates if any(f"{key[0]}.{key[1]}".endswith(t) for t in targets)
        ]
        if len(wanted) == 1 and not is_inner:
            return wanted[0]
        if len(wanted) != 2:
            raise self.make_error(
                f"target_parameters={targets} do not say which parameters are meant."
            )
        # In the order of the module: gate and up before down.
        return sorted(wanted, key=lambda key: key[1] == "down_proj")[0 if is_inner else 1]

    # --- leaves -----------------------------------------------------------------------------------

    def _build_shared_arrays(
        self, weights_with_fields: list[tuple[AdaptableWeight, ConfigFields]]
    ) -> SharedArrays:
        """What all modules share."""
        config = self.method.make_config(weights_with_fields[0][1], weights_with_fields[0][0])
        weights = [weight for weight, _ in weights_with_fields]
        abstract: Any = jax.eval_shape(
            lambda key: config.init_shared(key, weights), jax.random.key(0)
        )
        values = {}
        for name, (key, layout) in self.method.shared_tensors.items():
            if key not in self.remaining:
                raise self.make_error(
                    f"it lacks {key}, which all modules share and which only torch's generator "
                    f"could draw anew. Save the adapter with save_projection=True."
                )
            tensor = self.remaining.pop(key).astype(np.float32)
            facts = WeightGeometry(
                (), weights[0].axes._replace(batch=(), inputs=(), outputs=()), (), ()
            )
            values[name] = jnp.asarray(tensor_to_leaf(tensor, layout, facts))
        if "fan_in" in {field.name for field in dataclasses.fields(abstract)}:
            a, b = values["a"], values["b"]
            values |= {"fan_in": a.shape[0], "fan_out": b.shape[1]}
        shared = dataclasses.replace(abstract, **values)
        shapes = {name: tuple(getattr(shared, name).shape) for name in self.method.shared_tensors}
        if shapes != shared.shapes():
            raise self.make_error(f"what all modules share has shapes {shapes}.")
        return shared

    # --- what replaces the base -------------------------------------------------------------------

    def collect_replacements(self, weights: Mapping[str, AdaptableWeight]) -> _BaseReplacements:
        """The tensors that stand in the base's place."""
        found = _BaseReplacements({}, {})
        rows = self.fields["trainable_token_indices"]
        biases = self.fields["bias"] != "none"
        saved = self.fields["modules_to_save"] or []
        for site, gains in self.bias_gains:
            self._scale_bias(found, weights, site, gains)
        before = set(self.remaining)
        for name in list(self.remaining):
            module, _, parameter = name.rpartition(".")
            if name.endswith(f".{TRAINABLE_TOKENS_SUFFIX}"):
                module = name.removesuffix(f".{TRAINABLE_TOKENS_SUFFIX}")
                self._replace_token_embeddings(
                    found, weights, module, rows, self.remaining.pop(name)
                )
                continue
            copied = re.fullmatch(r"(.*)\.(modules_to_save|original_module)", module)
            if copied and biases and f"{copied[1]}.{parameter}" in before:
                self.remaining.pop(name)  # PEFT writes a saved module's bias three times.
                continue
            wrapped = module.endswith(".base_layer")
            module = module.removesuffix(".base_layer").removesuffix(".token_adapter")
            whole = any(_is_saved_module(module, one) for one in saved)
            site = self.parameters.get((module, parameter))
            # A copy of the whole embedding beside its factors is the base's, resized perhaps.
            if site is None or not (whole or wrapped or (parameter == "bias" and biases)):
                continue
            self._replace_slice(found, weights, site, self.remaining.pop(name))
            if whole or (parameter == "bias" and biases):
                bias = weights[site.path].kind == "bias"
                found.trainable_configs[site.path] = BitFit() if bias else FullDelta()
        for one in saved:
            # PEFT itself adds the usual names of heads for tasks that have one.
            if one in ("classifier", "score") and self.fields["task_type"] in CLASSIFICATION_TASKS:
                continue
            if not any(_is_saved_module(module, one) for module in self.modules):
                raise self.make_error(f"modules_to_save has {one!r}, which the model has not.")
        return found

    def _replace_slice(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        parameter: ModuleParameter,
        tensor: np.ndarray,
    ) -> None:
        """One tensor in its place."""
        assert parameter.tensor_slice is not None
        if tensor.shape != parameter.tensor_slice.tensor_shape:
            raise self.make_error(
                f"{parameter.module}.{parameter.name} has shape {tensor.shape} instead of "
                f"{parameter.tensor_slice.tensor_shape}. If the vocabulary was resized, resize the base too."
            )
        base = weights[parameter.path].value
        target = replacements.arrays.setdefault(parameter.path, np.array(base))
        ends = zip(
            parameter.tensor_slice.start_indices, parameter.tensor_slice.slice_sizes, strict=True
        )
        box = tuple(slice(start, start + size) for start, size in ends)
        target[box] = parameter.tensor_slice.to_weight_layout(tensor).astype(target.dtype)

    def _scale_bias(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        parameter: ModuleParameter,
        gains: np.ndarray,
    ) -> None:
        """A bias with the gains that PEFT's IA3 puts on it too; jlora's is on weights alone."""
        assert parameter.tensor_slice is not None
        target = replacements.arrays.setdefault(
            parameter.path, np.array(weights[parameter.path].value)
        )
        ends = zip(
            parameter.tensor_slice.start_indices, parameter.tensor_slice.slice_sizes, strict=True
        )
        box = tuple(slice(start, start + size) for start, size in ends)
        scaled = target[box].astype(np.float32) * parameter.tensor_slice.to_weight_layout(
            gains.reshape(-1)
        )
        target[box] = scaled.astype(target.dtype)

    def _replace_token_embeddings(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        module: str,
        token_indices: Any,
        tensor: np.ndarray,
    ) -> None:
        """Some rows of an embedding."""
        site = self.parameters.get((module, "weight"))
        given = token_indices
        if isinstance(token_indices, Mapping):
            given = next((r for m, r in token_indices.items() if module.endswith(m)), None)
        if site is None or not isinstance(given, list) or len(given) != len(tensor):
            raise self.make_error(
                f"{module} has {len(tensor)} rows of tokens, and trainable_token_indices={token_indices}."
            )
        target = replacements.arrays.setdefault(site.path, np.array(weights[site.path].value))
        if tensor.shape[1:] != target.shape[1:] or max(given) >= len(target):
            raise self.make_error(
                f"{module} has rows of shape {tensor.shape} for the tokens {given} of a table of "
                f"shape {target.shape}."
            )
        target[given] = tensor.astype(target.dtype)
        replacements.trainable_configs[site.path] = TrainableTokens(token_indices=tuple(given))

    def check_all_consumed(self) -> None:
        """Refuses what is left over."""
        if self.remaining:
            raise self.make_error(
                f"the tensors {format_names(sorted(self.remaining))} belong to nothing that the config and "
                f"the model have."
            )


def _is_saved_module(module: str, saved_name: str) -> bool:
    """Whether a module, or one that it is part of, has a name that PEFT saves it by.

    PEFT compares the ends of names, without a dot before them.
    """
    ends = (place for place, letter in enumerate(f"{module}.") if letter == ".")
    return any(module[:end].endswith(saved_name) for end in ends)
