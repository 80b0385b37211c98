"""Loads a PEFT folder as an adapter and the base that it belongs on."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora._tree import PyTree, is_quantized
from jlora.adapters.base import AdapterConfig, SharedArrays
from jlora.adapters.full import BitFit, FullDelta
from jlora.adapters.trainable_tokens import TrainableTokens
from jlora.checkpoints.safetensors_io import (
    FLOAT_DTYPES,
    format_names,
    open_safetensors,
    read_finite_tensor,
)
from jlora.checkpoints.text_files import name_file_in_errors
from jlora.interpreter.weight import AdaptableWeight
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft import config
from jlora.peft.experts import ExpertTensors, join_expert_modules
from jlora.peft.leaf_conversion import ModuleTensors, leaf_from_modules, make_template_leaf
from jlora.peft.methods import PEFT_METHODS, ConfigFields, PeftMethod
from jlora.peft.name_patterns import share_steps
from jlora.peft.tensor_layouts import (
    ModuleParameter,
    WeightGeometry,
    list_expert_modules,
    list_expert_parameters,
    list_module_parameters,
    tensor_to_leaf,
    weight_region,
)
from jlora.peft.tied_weights import TiedPair, find_tied_pairs, join_tied_tensors
from jlora.peft.top_k_logits import INDICES_SUFFIX, restore_logits
from jlora.rules import trace_weights

KEY_PREFIX = "base_model.model."

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"

# Modules whose complete weight PEFT may write without being asked: the embeddings of tokens, and
# the heads that may share their weights.
_TABLE_NAMES = ("embed_tokens", "lm_head", "word_embeddings")

_TASK_HEAD_NAMES = {name for names in config.TASK_HEADS.values() for name in names}

# Parts of an error that are from the files may be longer.
_MAX_REASON_LETTERS = 2_000

# Modules of torch without parameters, for which `modules_to_save` has no effect.
_MODULE_WITHOUT_PARAMETERS = re.compile(
    r"(?:.*[._])?(?:dropout|drop|drop_path|act|act_fn|activation|activation_fn|rotary_emb|identity)"
)

# Modules of the copies of a saved module that hold a bias: the module, and the path inside it.
_BIAS_COPY = re.compile(r"(.*?)\.(?:modules_to_save(?:\.default)?|original_module)((?:\..+)?)")

# Module of the head in checkpoints of decoders.
HEAD_MODULE = "lm_head"

# Types of indices in the files of VB-LoRA.
_INDEX_DTYPES = ("U8", "I16", "I32", "I64")

TRAINABLE_TOKENS_SUFFIX = "token_adapter.trainable_tokens_delta"


class LoadedAdapter(NamedTuple):
    """The contents of a PEFT folder.

    Attributes:
        params: The base, with the folder's fully trained modules, biases and tokens in place. A
            weight whose values do not change is that of the base; a quantized one that does change
            is an array in the base's dtype.
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


@share_steps()
def load_peft_folder(
    folder: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    checkpoint_mappings: Sequence[Mapping[str, CheckpointWeight]],
    tied_modules: Mapping[str, str] = types.MappingProxyType({}),
    *,
    is_head_tied: bool | None = None,
) -> LoadedAdapter:
    """Implements `jlora.peft.load`.

    Args:
        folder: Folder that PEFT saved.
        fn: Function of params and inputs.
        params: The base.
        inputs: Example inputs, arrays or shapes.
        checkpoint_mappings: Checkpoint tensors of the weights, one mapping for each spelling of the
            names. The spelling that matches most names in the file is used.
        tied_modules: Path of the weight that each tied module shares, by module.
        is_head_tied: Whether the base's config.json ties the head to the embedding, even if the
            head has a weight of its own here; None if that is unknown.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder requires an unsupported feature, or does not fit the model.
    """
    folder = Path(folder)
    fields, method = config.read_peft_config(folder)
    tensors = _read_peft_tensors(folder)
    mapping = max(checkpoint_mappings, key=lambda one: _count_known_names(one, tensors))
    reader = _PeftFolderReader(folder, fields, method, tensors, mapping, is_head_tied)
    weights = trace_weights(fn, params, *inputs)
    with name_file_in_errors(folder / config.CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME):
        reader.restore_logits()
        reader.join_tied_modules(tied_modules, weights)
        reader.check_separated_head()
        adapter = reader.build_adapter(weights)
        replacements = reader.collect_replacements(weights)
        reader.check_all_consumed()
    for path, trainable_config in replacements.trainable_configs.items():
        # A weight with trained factors keeps those; its replacement stays frozen.
        adapter.setdefault(path, make_template_leaf(trainable_config, weights[path]))
    flat = _tree.flatten_with_paths(params)
    leaves = [
        _replace_leaf(leaf, replacements.arrays.get(path))
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    return LoadedAdapter(jax.tree.unflatten(flat.treedef, leaves), adapter)


def _replace_leaf(leaf: Any, array: np.ndarray | None) -> Any:
    """Returns the replacement of a weight; the weight itself if the values are the same."""
    if array is None or np.array_equal(jax.device_get(maybe_dequantize(leaf)), array):
        return leaf
    replacement = array.astype(leaf.dtype)
    # A quantized weight consists of arrays of other shapes, which have shardings of their own.
    sharding = None if is_quantized(leaf) else getattr(leaf, "sharding", None)
    return jax.device_put(replacement, sharding)


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
    if not os.path.lexists(path) and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} must have {SAFETENSORS_WEIGHTS_NAME}. Files that end in .bin are not "
            f"opened, since they can run code. Load the adapter in PEFT and save it again."
        )
    tensors = {}
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 -- the file is not a mapping
            dtypes = _INDEX_DTYPES if key.endswith(INDICES_SUFFIX) else tuple(FLOAT_DTYPES)
            name = key.removeprefix(KEY_PREFIX)
            tensors[name] = read_finite_tensor(file, key, path, dtypes)
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
        target_parameters: Entries of `target_parameters`.
        remaining: Tensors that are not consumed yet, by name.
        checkpoint_mapping: Checkpoint tensors of the model's weights.
        parameters: Parameters of the model's modules, by module and name.
        modules: Names of the model's modules.
        tied_pairs: Pairs of modules that are one weight of the model.
        expert_modules: Parameter, index and projection of each module that a checkpoint has for one
            expert, by the name of the module.
        expert_parameters: Weights of those modules, by module and name.
        num_experts: Number of experts of each parameter of experts.
        bias_gains: Biases that PEFT's IA3 scales with the outputs, and their gains.
        bias_updates: Biases to which the file adds, and the updates.
        adapted_modules: Names of the modules with factors.
        is_head_tied: Whether config.json ties the head to the embedding; None if unknown.
        is_head_changed_by_tokens: Whether the head has the trained tokens of the embedding.
    """

    def __init__(
        self,
        folder: Path,
        fields: dict[str, Any],
        method: PeftMethod,
        tensors: dict[str, np.ndarray],
        checkpoint_mapping: Mapping[str, CheckpointWeight],
        is_head_tied: bool | None,
    ) -> None:
        self.folder, self.fields, self.method = folder, fields, method
        self.target_parameters = frozenset(fields["target_parameters"] or [])
        self.is_head_tied = is_head_tied
        self.is_head_changed_by_tokens = False
        self.remaining, self.checkpoint_mapping = tensors, checkpoint_mapping
        self.parameters = {
            (parameter.module, parameter.name): parameter
            for parameter in list_module_parameters(checkpoint_mapping)
        }
        self.modules = list(dict.fromkeys(module for module, _ in self.parameters))
        # Parameter, number and projection of each module of one expert.
        self.expert_modules = list_expert_modules(checkpoint_mapping)
        self.expert_parameters = list_expert_parameters(checkpoint_mapping)
        self.num_experts = collections.Counter(
            key for key, _, projection in self.expert_modules.values() if projection != "up_proj"
        )
        self.tied_pairs: list[TiedPair] = []
        self.bias_updates: list[tuple[ModuleParameter, np.ndarray]] = []
        self.adapted_modules: set[str] = set()
        self.bias_gains: list[tuple[ModuleParameter, np.ndarray]] = []

    def make_error(self, reason: str) -> ValueError:
        if len(reason) > _MAX_REASON_LETTERS:
            reason = f"{reason[:_MAX_REASON_LETTERS]}..."
        return ValueError(
            f"{self.folder / config.CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}: {reason} Use "
            f"the two files of one `save_pretrained` call, with the "
            f"model of the adapter."
        )

    def restore_logits(self) -> None:
        """Puts logits in the place of their largest ones.

        Raises:
            ValueError: These do not fit the config.
        """
        bank = self.remaining.get("base_model.vblora_vector_bank")
        if self.fields.get("save_only_topk_weights") and bank is not None:
            self.remaining = restore_logits(self.remaining, len(bank), self.make_error)

    def join_tied_modules(
        self, tied_modules: Mapping[str, str], weights: Mapping[str, AdaptableWeight]
    ) -> None:
        """Removes tensors of modules that are one weight with another module.

        Raises:
            ValueError: The file has another update for the module than for the other one.
        """
        self.tied_pairs = find_tied_pairs(tied_modules, self.parameters)
        for pair in self.tied_pairs:
            names = (pair.head, pair.embedding.module)
            if not any(name.startswith(tuple(f"{n}." for n in names)) for name in self.remaining):
                continue
            base = np.asarray(jax.device_get(maybe_dequantize(weights[pair.embedding.path].value)))
            assert pair.embedding.tensor_slice is not None
            head_fields, fields = (
                config.fields_for_module(self.fields, self.method, name) for name in names
            )
            join_tied_tensors(
                self.folder,
                pair,
                self.remaining,
                pair.embedding.tensor_slice.to_tensor(base),
                (self._factor_scale(fields), self._factor_scale(head_fields)),
                bool(self.fields.get("ensure_weight_tying")),
            )

    def _factor_scale(self, fields: ConfigFields) -> float:
        """Returns the factor that the config puts before the product of two factors."""
        if not self.method.alpha_field or not self.method.rank_field:
            return 1.0
        power = 0.5 if fields.get("use_rslora") else 1
        return fields[self.method.alpha_field] / fields[self.method.rank_field] ** power

    def check_separated_head(self) -> None:
        """Checks that a head with a weight of its own has the tensors that the config promises.

        Raises:
            ValueError: The config gives it the embedding's update (`ensure_weight_tying`), and the
                file does not have that for the head.
        """
        if not self._is_separated_head_tied():
            return
        saved = {name.rpartition(".")[2] for name in self.fields["modules_to_save"] or []}
        expected = {"lora_A.weight", "lora_B.weight"}
        for name in list(self.remaining):
            module, _, suffix = name.rpartition(".")
            if module.rpartition(".")[2] != "embed_tokens":
                continue
            wanted = set()
            if suffix in ("lora_embedding_A", "lora_embedding_B"):
                wanted = {f"{HEAD_MODULE}.{one}" for one in expected}
            elif suffix == "weight" and saved & set(_TABLE_NAMES):
                wanted = {f"{HEAD_MODULE}.weight"}
            missing = sorted(wanted - set(self.remaining))
            if missing:
                raise self.make_error(
                    f"the file lacks {format_names(missing)}, and ensure_weight_tying=True gives "
                    f"{HEAD_MODULE} the update of {module}. A base loaded without "
                    f"tie_word_embeddings=False does not need them."
                )

    def _is_separated_head_tied(self) -> bool:
        """Returns True if a head with a weight of its own has the embedding's update in PEFT."""
        return (
            bool(self.fields.get("ensure_weight_tying"))
            and self.is_head_tied is not False
            and (HEAD_MODULE, "weight") in self.parameters
        )

    def _tie_head_rank(self, fields: dict[str, Any], rank: int) -> None:
        """Gives a head with the embedding's factors their rank, with the scale of its own fields.

        PEFT looks up the head's alpha and rank in the patterns, but its factors are those of the
        embedding, whose rank may have a pattern of its own.
        """
        embeddings = [m for m in self.modules if m.rpartition(".")[2] == "embed_tokens"]
        ranks = {
            config.fields_for_module(self.fields, self.method, module)["r"] for module in embeddings
        }
        if ranks == {rank} and rank != fields["r"]:
            scale = self._factor_scale(fields)
            fields["r"] = rank
            fields["lora_alpha"] = scale * rank ** (0.5 if fields["use_rslora"] else 1)

    # --- factors ----------------------------------------------------------------------------------

    def build_adapter(self, weights: Mapping[str, AdaptableWeight]) -> dict[str, Any]:
        """Returns the leaves of the PEFT method, without replacements of the base."""
        by_path: dict[str, list[ModuleTensors]] = {}
        for module in self._collect_modules(weights):
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

    def _collect_modules(self, weights: Mapping[str, AdaptableWeight]) -> list[ModuleTensors]:
        """Consumes the tensors of each module and checks them against the config."""
        by_parameter: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        by_expert: dict[str, dict[str, np.ndarray]] = {}
        for name in list(self.remaining):
            module, suffix = self._split_suffix(name)
            if module is None:
                continue
            if module in self.expert_modules:
                tensors = by_expert.setdefault(module, {})
            else:
                tensors = by_parameter.setdefault(self._find_parameter(module, name), {})
            tensors[suffix] = self.remaining.pop(name)
        parameters = [self.parameters[key] for key in by_parameter]
        self._check_targets(parameters, by_expert, weights)
        modules = []
        unused = []
        for parameter, tensors in zip(parameters, by_parameter.values(), strict=True):
            name = parameter.module
            if not weights[parameter.path].primitives:
                self.adapted_modules.add(name)
                unused.append(name)
                continue
            is_parameter = self._is_target_parameter(parameter)
            if is_parameter:
                name = f"{parameter.module}.{parameter.name}"
                if weights[parameter.path].kind == "embedding" and "lora_A.weight" in tensors:
                    # PEFT adapts a parameter as (outputs, inputs), whatever its module.
                    a, b = tensors.pop("lora_A.weight"), tensors.pop("lora_B.weight", None)
                    tensors["lora_embedding_B"] = a.T
                    if b is not None:
                        tensors["lora_embedding_A"] = b.T
            fields = config.fields_for_module(self.fields, self.method, name)
            fields["is_feedforward"] = config.is_feedforward(self.fields, parameter.module)
            has_pair = parameter.module == HEAD_MODULE and "lora_A.weight" in tensors
            if has_pair and self._is_separated_head_tied():
                self._tie_head_rank(fields, len(tensors["lora_A.weight"]))
            bias = self.parameters.get((parameter.module, "bias"))
            if "ia3_l" in tensors and bias and not fields["is_feedforward"]:
                self.bias_gains.append((bias, tensors["ia3_l"].astype(np.float32)))
            self.adapted_modules.add(parameter.module)
            if self._is_pruned_away(name, tensors):
                continue
            if self.fields.get("lora_bias"):
                self._collect_factor_bias(parameter, fields, tensors)
            modules.append(ModuleTensors(parameter, fields, tensors))
        if by_expert:
            modules += self._join_experts(by_expert)
        if unused:
            warnings.warn(
                f"{self.folder}: the adapter of {format_names(sorted(unused))} is left out, since "
                f"the model's function does not use the weight, so that it changes no output.",
                stacklevel=2,
            )
        return modules

    def _is_pruned_away(self, module: str, tensors: Mapping[str, np.ndarray]) -> bool:
        """Returns True for a module of which AdaLoRA keeps no rank.

        Raises:
            ValueError: The file has values for it.
        """
        ranks = self.fields.get(config.PRUNED_RANKS, {})
        if ranks.get(module) != 0:
            return False
        if any(tensor.size for tensor in tensors.values()):
            raise self.make_error(f"rank_pattern keeps no rank of {module}, which has values.")
        return True

    def _collect_factor_bias(
        self, parameter: ModuleParameter, fields: ConfigFields, tensors: dict[str, np.ndarray]
    ) -> None:
        """Consumes the bias of `B` (`lora_bias`), which is added to the module's own bias."""
        value = tensors.pop("lora_B.bias", None)
        bias = self.parameters.get((parameter.module, "bias"))
        if value is None:
            raise self.make_error(
                f"{parameter.module} lacks lora_B.bias, which lora_bias=True adds."
            )
        if bias is None:
            raise self.make_error(
                f"{parameter.module} has lora_B.bias, and the model has no bias there to add it to."
            )
        scale = fields["lora_alpha"] / fields["r"] ** (0.5 if fields["use_rslora"] else 1)
        self.bias_updates.append((bias, value.astype(np.float32) * np.float32(scale)))

    def _join_experts(self, by_expert: Mapping[str, dict[str, np.ndarray]]) -> list[ModuleTensors]:
        """Joins the tensors of one module for each expert to those of the experts' parameters."""
        groups: dict[tuple[str, str], list[ExpertTensors]] = {}
        for module, tensors in by_expert.items():
            key, index, projection = self.expert_modules[module]
            fields = config.fields_for_module(self.fields, self.method, module)
            expert = ExpertTensors(module, index, projection, fields, tensors)
            groups.setdefault(key, []).append(expert)
        return [
            join_expert_modules(
                self.parameters[key], experts, self.num_experts[key], self.make_error
            )
            for key, experts in groups.items()
        ]

    def _is_target_parameter(self, parameter: ModuleParameter) -> bool:
        """Returns True if an entry of `target_parameters` names a parameter."""
        endings = config.name_endings(f"{parameter.module}.{parameter.name}")
        return not self.target_parameters.isdisjoint(endings)

    def _check_targets(
        self,
        parameters: Sequence[ModuleParameter],
        by_expert: Collection[str],
        weights: Mapping[str, AdaptableWeight],
    ) -> None:
        """Checks that the config targets exactly the parameters with tensors in the file."""
        found = {p.module for p in parameters if p.name == "weight"} | set(by_expert)
        fields = dict(self.fields)
        if fields["target_modules"] is None and not fields["target_parameters"]:
            fields["target_modules"] = self._default_targets(found)
        candidates = [module for module, name in self.parameters if name == "weight"]
        heads = [pair.head for pair in self.tied_pairs]
        # PEFT has no other method for experts.
        is_lora = self.method is PEFT_METHODS["LORA"]
        expert_modules = list(self.expert_modules) if is_lora else []
        targets = config.match_target_modules(fields, [*candidates, *heads, *expert_modules])
        for pair in self.tied_pairs:
            if pair.head in targets:  # Its update is that of the embedding.
                targets = (targets - {pair.head}) | {pair.embedding.module}
        if self.fields.get("ensure_weight_tying"):
            targets |= found & {HEAD_MODULE}  # PEFT adds the head to the embedding.
        required = targets
        if config.is_all_linear(self.fields):
            required = {module for module in targets if self._is_linear(module, weights)}
        elif self.fields["target_parameters"]:
            # Modules of experts that transformers 5 has joined are parameters.
            required = targets - set(expert_modules)
        whole = [parameter for parameter in self.parameters.values() if parameter.name != "bias"]
        wanted = {p for p in whole if self._is_target_parameter(p)}
        missing = sorted(
            required - found | {f"{p.module}.{p.name}" for p in wanted - set(parameters)}
        )
        if missing:
            raise self.make_error(
                f"the config targets {format_names(missing)}, for which the file has no tensor."
            )
        extra = sorted(found - targets - {p.module for p in wanted})
        if extra:
            raise self.make_error(
                f"the file has tensors for {format_names(extra)}, which the config does not target."
            )
        endings = {e for p in wanted for e in config.name_endings(f"{p.module}.{p.name}")}
        for target in self.fields["target_parameters"] or []:
            if target not in endings:
                raise self.make_error(
                    f"target_parameters has {_tree.shorten(target)}, which the model does not have."
                )
        # PEFT ignores the entries for modules that it does not adapt.
        names = {*self.modules, *heads, *self.expert_modules}
        names |= {f"{parameter.module}.{parameter.name}" for parameter in whole}
        config.check_rank_patterns(self.fields, self.method, names)

    def _default_targets(self, found: Collection[str]) -> list[str]:
        """Returns the targets that PEFT has for a model where the config names none.

        Raises:
            ValueError: PEFT has none, or others than the modules of the file.
        """
        endings = {ending for module in self.modules for ending in config.name_endings(module)}
        choices = [list(one) for one in self.method.default_targets if endings.issuperset(one)]
        for choice in choices:
            if all(any(module.endswith(f".{name}") for module in found) for name in choice):
                return choice
        names = sorted({module.rpartition(".")[2] for module in found})
        default = "has no default for this model"
        if choices:
            default = f"targets {' or '.join(map(str, choices))}"
        raise self.make_error(
            f"target_modules is null, for which PEFT {default}, and the file has tensors for "
            f"{names}. If those are all of its modules, list them in target_modules."
        )

    def _is_linear(self, module: str, weights: Mapping[str, AdaptableWeight]) -> bool:
        """Returns True for a module of PEFT's `all-linear`: not a head, an expert or a router."""
        parameter = self.parameters.get((module, "weight"))
        if parameter is None or module == HEAD_MODULE or parameter.tensor_slice is None:
            return False
        return weights[parameter.path].kind == "linear" and "/router/" not in parameter.path

    def _split_suffix(self, name: str) -> tuple[str | None, str]:
        """Returns a tensor's module and suffix; None and "" for a tensor of another kind."""
        name = name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        for suffix in self.method.suffixes:
            if name.endswith(f".{suffix}"):
                return name[: -len(suffix) - 1], suffix
            first, dot, last = suffix.partition(".")
            if re.search(rf"\.{first}\.[^.]+{re.escape(dot + last)}$", name):
                raise self.make_error(
                    f"{name!r} has the name of an adapter after {first}, as in a model's memory: "
                    f"the file was not written by `save_pretrained`. Remove that part of the keys."
                )
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
        targeted = [key for key in candidates if self._is_target_parameter(self.parameters[key])]
        if len(targeted) == 1 and not is_inner:
            return targeted[0]
        if len(targeted) != 2:
            raise self.make_error(
                f"target_parameters={_tree.shorten(sorted(self.target_parameters))} must name the "
                f"parameters of the experts."
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
        has_biases = self.fields["bias"] != "none"
        saved_names, heads = config.saved_module_names(self.fields)
        if self.fields.get("ensure_weight_tying") and f"{HEAD_MODULE}.weight" in self.remaining:
            saved_names.append(HEAD_MODULE)  # PEFT adds the head to the embedding.
        names = set(self.remaining)
        saved = config.SavedModules([*saved_names, *heads])
        replaced: set[tuple[str, str]] = set()
        tokens: set[str] = set()
        for name in list(self.remaining):
            module, _, parameter_name = name.rpartition(".")
            if name.endswith(f".{TRAINABLE_TOKENS_SUFFIX}"):
                module = name.removesuffix(f".{TRAINABLE_TOKENS_SUFFIX}")
                self._replace_token_embeddings(
                    replacements, weights, module, self.remaining.pop(name), names
                )
                tokens.add(module)
                continue
            copied = _BIAS_COPY.fullmatch(module)
            if copied and has_biases and f"{copied[1]}{copied[2]}.{parameter_name}" in names:
                self.remaining.pop(name)  # PEFT writes a saved module's bias three times.
                continue
            is_wrapped = module.endswith(".base_layer")
            module = module.removesuffix(".base_layer").removesuffix(".token_adapter")
            is_saved = bool(saved.matches(module))
            is_trained_bias = parameter_name == "bias" and has_biases
            # PEFT writes complete embeddings and heads whose vocabulary was resized.
            is_table = module.rpartition(".")[2] in _TABLE_NAMES
            key = (module, parameter_name)
            parameter = self.parameters.get(key) or self.expert_parameters.get(key)
            # A copy of the full embedding beside its factors is the base's, possibly resized.
            if parameter is None or not (is_saved or is_wrapped or is_trained_bias or is_table):
                continue
            self._replace_slice(replacements, weights, parameter, self.remaining.pop(name))
            replaced.add((module, parameter_name))
            if is_saved or is_trained_bias:
                is_bias = parameter_name == "bias" and weights[parameter.path].kind == "bias"
                replacements.trainable_configs[parameter.path] = (
                    BitFit() if is_bias else FullDelta()
                )
        # After the biases that the file replaces.
        for bias, gains in self.bias_gains:
            self._change_bias(replacements, weights, bias, np.multiply, gains)
        for bias, update in self.bias_updates:
            self._change_bias(replacements, weights, bias, np.add, update)
        by_parameter: dict[tuple[str, str], set[tuple[str, str]]] = {}
        for module, (key, *_) in self.expert_modules.items():
            by_parameter.setdefault(key, set()).add((module, "weight"))
        replaced |= {key for key, experts in by_parameter.items() if experts <= replaced}
        self._check_saved_modules(saved_names, heads, replaced)
        self._check_tokens(tokens)
        if has_biases:
            self._check_biases(replaced)
        return replacements

    def _check_saved_modules(
        self,
        saved_names: Sequence[str],
        heads: Sequence[str],
        replaced: Collection[tuple[str, str]],
    ) -> None:
        """Checks that the file has all parameters of the modules that are trained completely."""
        saved = config.SavedModules([*saved_names, *heads])
        places = [(key[0], key) for key in self.parameters]
        places += [
            (pair.head, (pair.embedding.module, pair.embedding.name)) for pair in self.tied_pairs
        ]
        found: set[str] = set()
        promised: set[tuple[str, str]] = set()
        for module, key in places:
            names = saved.matches(module)
            found |= names
            promised |= {key} if names else set()
        for saved_name in saved_names:
            if saved_name in found or saved_name in heads:
                continue
            if saved_name in _TASK_HEAD_NAMES and self.fields["task_type"] in config.TASK_HEADS:
                continue  # PEFT adds all usual names of a head to the config.
            if not _MODULE_WITHOUT_PARAMETERS.fullmatch(saved_name):
                raise self.make_error(
                    f"modules_to_save has {_tree.shorten(saved_name)}, which the model does not "
                    f"have."
                )
        missing = sorted(f"{module}.{name}" for module, name in promised - set(replaced))
        if missing:
            raise self.make_error(
                f"the file lacks {format_names(missing)}, which modules_to_save or "
                f"task_type promise."
            )

    def _check_tokens(self, found: Collection[str]) -> None:
        """Checks that the file has the tokens that the config names."""
        indices = self.fields["trainable_token_indices"]
        if not indices:
            return
        names = list(indices) if isinstance(indices, Mapping) else [None]
        for name in names:
            is_head = name is not None and HEAD_MODULE.endswith(name)
            is_found = any(name is None or module.endswith(name) for module in found)
            if not is_found and not (is_head and self.is_head_changed_by_tokens):
                raise self.make_error(
                    f"trainable_token_indices={_tree.shorten(indices)} has "
                    f"{name[:200] if name else 'tokens'}, for which the file has no rows."
                )

    def _check_biases(self, replaced: Collection[tuple[str, str]]) -> None:
        """Checks that the file has the biases of the config's mode."""
        biases = {module for module, name in self.parameters if name == "bias"}
        names, heads = config.saved_module_names(self.fields)
        saved = config.SavedModules([*names, *heads])
        biases = {module for module in biases if not saved.contains(module)}
        if self.fields["bias"] != "all":
            biases &= self.adapted_modules
        missing = sorted(module for module in biases if (module, "bias") not in replaced)
        if missing:
            raise self.make_error(
                f"bias={self.fields['bias']!r} trains the biases of {format_names(missing)}, which "
                f"the file lacks."
            )

    def _replace_slice(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        parameter: ModuleParameter,
        tensor: np.ndarray,
    ) -> None:
        """Replaces the slice of a weight that one tensor fills."""
        target = _writable_weight(replacements, weights, parameter)
        part = parameter.tensor_slice
        # The tensor of all experts is (experts, out, in), and the weight (experts, in, out).
        shape = (
            part.tensor_shape if part else np.swapaxes(target[parameter.stack_index], 1, 2).shape
        )
        if tensor.shape != shape:
            raise self.make_error(
                f"{parameter.module}.{parameter.name} has shape {tensor.shape} instead of {shape}. "
                f"If the vocabulary was resized, resize that of the base as well."
            )
        region = weight_region(part) if part else parameter.stack_index
        values = part.to_weight_layout(tensor) if part else np.swapaxes(tensor, 1, 2)
        target[region] = values.astype(target.dtype)

    def _change_bias(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        parameter: ModuleParameter,
        change: Callable[[np.ndarray, np.ndarray], np.ndarray],
        values: np.ndarray,
    ) -> None:
        """Changes a bias of the base, which jlora's adapter on the weight does not."""
        assert parameter.tensor_slice is not None
        if values.size != math.prod(parameter.tensor_slice.tensor_shape):
            raise self.make_error(
                f"{parameter.module} has {values.size} numbers for a bias of shape "
                f"{parameter.tensor_slice.tensor_shape}."
            )
        target = _writable_weight(replacements, weights, parameter)
        region = weight_region(parameter.tensor_slice)
        changes = parameter.tensor_slice.to_weight_layout(values.reshape(-1))
        target[region] = change(target[region].astype(np.float32), changes).astype(target.dtype)

    def _replace_token_embeddings(
        self,
        replacements: _BaseReplacements,
        weights: Mapping[str, AdaptableWeight],
        module: str,
        tensor: np.ndarray,
        names: Collection[str],
    ) -> None:
        """Replaces the trained tokens of an embedding or a head.

        Args:
            replacements: Replaced weights, to which these are added.
            weights: Weights of the base, by path.
            module: Module with the tokens.
            tensor: Values of the tokens.
            names: Names of all tensors of the file.
        """
        parameter = self.parameters.get((module, "weight"))
        indices = self._token_indices(module)
        if parameter is None or not isinstance(indices, list) or len(indices) != len(tensor):
            raise self.make_error(
                f"{module} has {len(tensor)} trained tokens, which does not match "
                f"trainable_token_indices={_tree.shorten(self.fields['trainable_token_indices'])}."
            )
        assert parameter.tensor_slice is not None
        shape = parameter.tensor_slice.tensor_shape
        if tensor.shape[1:] != shape[1:] or max(indices) >= shape[0]:
            raise self.make_error(
                f"{module} has trained tokens of shape {tensor.shape} for the indices "
                f"{_tree.shorten(indices)} of an embedding of shape {shape}."
            )
        head = self.parameters.get((HEAD_MODULE, "weight"))
        changed = [parameter]
        if self._changes_head_tokens(weights, parameter, names):
            self.is_head_changed_by_tokens = True
            changed += [head] if head else []  # A tied head has no parameter of its own.
        for one in changed:
            assert one.tensor_slice is not None
            target = _writable_weight(replacements, weights, one)
            region = weight_region(one.tensor_slice)
            table = one.tensor_slice.to_tensor(target[region])
            table[indices] = tensor.astype(target.dtype)
            target[region] = one.tensor_slice.to_weight_layout(table)
        if weights[parameter.path].kind == "embedding":
            trainable_config = TrainableTokens(token_indices=tuple(indices))
            replacements.trainable_configs[parameter.path] = trainable_config

    def _token_indices(self, module: str) -> list[int] | None:
        """Returns the trained tokens that the config names for a module."""
        indices = self.fields["trainable_token_indices"]
        if isinstance(indices, Mapping):
            return next((rows for name, rows in indices.items() if module.endswith(name)), None)
        return None if module == HEAD_MODULE else indices

    def _changes_head_tokens(
        self,
        weights: Mapping[str, AdaptableWeight],
        embedding: ModuleParameter,
        names: Collection[str],
    ) -> bool:
        """Returns True if PEFT puts the trained tokens of an embedding into the head as well.

        It does so where config.json ties the two, unless the head has other tokens of its own.

        Raises:
            ValueError: The head has the same tokens of its own, or the tie is unknown.
        """
        if embedding.module == HEAD_MODULE or self.is_head_tied is False:
            return False
        head_indices = self._token_indices(HEAD_MODULE)
        if head_indices not in (None, self._token_indices(embedding.module)):
            return False
        has_own_rows = f"{HEAD_MODULE}.{TRAINABLE_TOKENS_SUFFIX}" in names
        if self.is_head_tied:
            if has_own_rows:
                raise self.make_error(
                    f"the file has trained tokens of {HEAD_MODULE}, and PEFT gives it those of "
                    f"{embedding.module}, since config.json of the base ties the two. The adapter "
                    f"belongs to a base with tie_word_embeddings=false in its config.json."
                )
            return True
        head = self.parameters.get((HEAD_MODULE, "weight"))
        if head is None or head.path == embedding.path or has_own_rows:
            return False
        if head_indices is not None:
            return True  # PEFT leaves out the rows of a head that it ties.
        if is_same_table(weights, head, embedding):
            raise self.make_error(
                f"{embedding.module} has trained tokens, and {HEAD_MODULE} the same weight: PEFT "
                f"changes both or the embedding alone, by the config.json of the base. Load the "
                f"base with jlora.models.load, or pass a checkpoint_mapping with one weight for "
                f"both if they are tied, and one without {HEAD_MODULE} if not."
            )
        return False

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
        value = maybe_dequantize(weights[parameter.path].value)
        replacements.arrays[parameter.path] = np.array(jax.device_get(value))
    return replacements.arrays[parameter.path]


def is_same_table(
    weights: Mapping[str, AdaptableWeight], head: ModuleParameter, embedding: ModuleParameter
) -> bool:
    """Returns True if a head has the values of an embedding, as where a checkpoint ties them."""
    tables = []
    for parameter in (head, embedding):
        assert parameter.tensor_slice is not None
        value = np.asarray(jax.device_get(maybe_dequantize(weights[parameter.path].value)))
        tables.append(
            parameter.tensor_slice.to_tensor(value[weight_region(parameter.tensor_slice)])
        )
    return np.array_equal(*tables)
