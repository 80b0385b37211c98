"""Reads adapter_config.json, checks every field, and matches its targets with a model's modules."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import _tree
from jlora.checkpoints.adapter_file import ADAPTER_FILE
from jlora.checkpoints.safetensors_io import format_names
from jlora.checkpoints.text_files import name_file_in_errors, read_json
from jlora.peft.methods import PEFT_METHODS, PeftMethod
from jlora.peft.name_patterns import (
    LayerPatterns,
    PatternValues,
    check_pattern,
    full_match,
    is_plain_pattern,
)

CONFIG_NAME = "adapter_config.json"

# Fields without influence on the function of a trained adapter.
_IGNORED_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "d_initial",
    "deltaT",
    "beta1",
    "beta2",
    "eva_config",
    "inference_mode",
    "init_weights",
    "init_lora_weights",
    "init_hira_weights",
    "init_ia3_weights",
    "init_logits_std",
    "init_vector_bank_bound",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "module_dropout",
    "orth_reg_weight",
    "peft_type",
    "peft_version",
    "projection_prng_key",
    "qalora_group_size",
    "rank_dropout",
    "rank_dropout_scale",
    "revision",
    "runtime_config",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}

# Fields of all methods, with their defaults.
COMMON_DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "exclude_modules": None,
    "feedforward_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "rank_pattern": {},
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
}


def _is_regex(value: Any) -> bool:
    """Returns True for a valid regular expression."""
    if isinstance(value, str) and is_plain_pattern(value):
        return True
    try:
        return isinstance(value, str) and check_pattern(value) is None
    except ValueError:
        return False


def _is_inner_regex(value: Any) -> bool:
    """Returns True for a regular expression that can be a part of another one."""
    if isinstance(value, str) and is_plain_pattern(value):
        return True
    return isinstance(value, str) and _is_regex(value) and _is_regex(f"(?:{value})")


def _is_list_of(value: Any, item_type: type = str) -> bool:
    return isinstance(value, list) and all(type(one) is item_type for one in value)


def _is_rank_pattern(value: Any) -> bool:
    """Returns True for a mapping from regular expressions to positive finite numbers."""
    return isinstance(value, Mapping) and all(
        _is_inner_regex(key) and type(one) in (int, float) and 0 < one < math.inf
        for key, one in value.items()
    )


def _is_token_indices(value: Any) -> bool:
    """Returns True for a list of token ids, or a mapping from modules to such lists."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    return all(_is_list_of(one, int) and all(token >= 0 for token in one) for one in lists)


def _allow_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_module_selector(value: Any) -> bool:
    return _is_regex(value) or _is_list_of(value)


def _is_dropout_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_bool(value: Any) -> bool:
    return type(value) is bool


# Types of the fields. PEFT itself would fail on other values later, or not at all.
_FIELD_VALIDATORS: dict[str, Callable[[Any], bool]] = {
    "bias": lambda value: value in ("none", "all") or str(value).endswith("_only"),
    "ensure_weight_tying": _is_bool,
    "exclude_modules": _allow_none(_is_module_selector),
    "fan_in_fan_out": _is_bool,
    "feedforward_modules": _allow_none(_is_module_selector),
    "hira_dropout": _is_dropout_rate,
    "layers_pattern": _allow_none(
        lambda value: (
            _is_inner_regex(value) or (_is_list_of(value) and all(map(_is_inner_regex, value)))
        )
    ),
    "layers_to_transform": _allow_none(lambda value: type(value) is int or _is_list_of(value, int)),
    "lora_bias": _is_bool,
    "lora_dropout": _is_dropout_rate,
    "modules_to_save": _allow_none(_is_list_of),
    "save_only_topk_weights": _is_bool,
    "target_modules": _allow_none(_is_module_selector),
    "target_parameters": _allow_none(_is_list_of),
    "task_type": _allow_none(lambda value: isinstance(value, str)),
    "trainable_token_indices": _allow_none(_is_token_indices),
    "use_dora": _is_bool,
    "use_effective_conv2d": _is_bool,
    "use_rslora": _is_bool,
    "decompose_both": _is_bool,
    "decompose_factor": lambda value: type(value) is int,
    "vblora_dropout": _is_dropout_rate,
    "vera_dropout": _is_dropout_rate,
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern", "n_frequency_pattern"),
        lambda value: value == {} or _is_rank_pattern(value),
    ),
}

# Ranks of the modules that AdaLoRA has pruned, by their names.
PRUNED_RANKS = "pruned_ranks"

_SAVE_PRETRAINED_HINT = "Use the two files of one `save_pretrained` call."

# The longest real files name each module of each expert some times, in a few MB.
_MAX_CONFIG_BYTES = 20_000_000

# Fields with regular expressions. One in `target_modules` and `exclude_modules` is a text.
_PATTERN_FIELDS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern", "layers_pattern")

# Letters of all regular expressions of a config, with those for the parsing of each one.
_MAX_PATTERN_LETTERS = 200_000

_LETTERS_PER_PATTERN = 100


def read_peft_config(folder: Path) -> tuple[dict[str, Any], PeftMethod]:
    """Reads a folder's adapter_config.json.

    Returns:
        The fields, with defaults for missing ones, and the PEFT method.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The config requires an unsupported feature, or has an unknown field.
    """
    path = folder / CONFIG_NAME
    if not os.path.lexists(path) and (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is not a PEFT folder: it has no {CONFIG_NAME}. Pass "
            f"{folder / ADAPTER_FILE}, an adapter of jlora."
        )
    others = [one.parent.name for one in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    if not os.path.lexists(path) and others:
        raise FileNotFoundError(
            f"{path} is missing. PEFT saves an adapter that is not called 'default' in a folder of "
            f"its name: pass {folder / others[0]}."
        )
    raw = read_json(path, _MAX_CONFIG_BYTES)
    with name_file_in_errors(path):
        return validate_config(path, raw)


def validate_config(path: Path, raw: Mapping[str, Any]) -> tuple[dict[str, Any], PeftMethod]:
    """Validates the fields of a config that was read from a file.

    Args:
        path: Path of the file in the errors.
        raw: Fields of the file.

    Returns:
        The fields, with defaults for missing ones, and the PEFT method.

    Raises:
        ValueError: The config requires an unsupported feature, or has an unknown field.
    """
    if "peft_type" not in raw and ("fine_tune_type" in raw or "lora_parameters" in raw):
        raise ValueError(
            f"{path} is of MLX ({_format_field('fine_tune_type', raw.get('fine_tune_type'))}), and "
            f"not of PEFT. "
            f"Convert the adapter to PEFT's format, or fuse it into its base with mlx_lm.fuse."
        )
    peft_type = str(raw.get("peft_type", "")).upper()
    if peft_type not in PEFT_METHODS:
        raise ValueError(
            f"{path}: {_format_field('peft_type', raw.get('peft_type'))} is not supported. It must "
            f"be one of {sorted(PEFT_METHODS)}."
        )
    method = PEFT_METHODS[peft_type]
    fields = {**COMMON_DEFAULTS, **method.defaults}
    unknown = []
    for name, value in raw.items():
        if name in method.supported_values:
            _check_supported_value(path, name, value, method.supported_values[name])
        elif name in fields:
            fields[name] = fields[name] if value is None and fields[name] is not None else value
        elif name not in _IGNORED_FIELDS and value not in (None, False, "", [], {}):
            unknown.append(_format_field(name, value))
    if peft_type == "ADALORA":
        fields[PRUNED_RANKS] = _count_kept_ranks(path, fields)
        fields["rank_pattern"] = {}
    _check_number_of_patterns(path, fields)
    for name, value in fields.items():
        if name in _FIELD_VALIDATORS and not _FIELD_VALIDATORS[name](value):
            raise ValueError(
                f"{path}: {_format_field(name, value)} must have the type that PEFT writes. "
                f"{_SAVE_PRETRAINED_HINT}"
            )
    if unknown:
        raise ValueError(
            f"{path}: unknown field {format_names(unknown)}, which may change the function of the "
            f"adapter. If it does not, remove it from the file."
        )
    for name in (method.rank_field, method.alpha_field):
        value: Any = fields.get(name) if name else 1
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"{path}: {_format_field(str(name), value)} must be a positive number. "
                f"{_SAVE_PRETRAINED_HINT}"
            )
    for name in method.patterns.values():
        fields[name] = PatternValues(fields[name])
    return fields, method


def _format_field(name: str, value: Any) -> str:
    """Returns a field for an error message, with a bounded length."""
    return f"{name[:100]}={_tree.shorten(value)}"


def _count_kept_ranks(path: Path, fields: Mapping[str, Any]) -> dict[str, int]:
    """Returns the rank of each module in AdaLoRA's `rank_pattern`, which marks the ranks it keeps.

    Raises:
        ValueError: The field is not a mapping from singular values to marks of all ranks.
    """
    pattern, ranks = fields["rank_pattern"], {}
    is_mapping = isinstance(pattern, Mapping)
    for name, kept in pattern.items() if is_mapping else ():
        module, _, parameter = name.removesuffix(".default").rpartition(".")
        if parameter == "lora_E" and _is_list_of(kept, bool) and len(kept) == fields["init_r"]:
            ranks[module] = sum(kept)
    if not is_mapping or len(ranks) != len(pattern):
        raise ValueError(
            f"{path}: {_format_field('rank_pattern', pattern)} must have a list of "
            f"init_r={_tree.shorten(fields['init_r'], 20)} times true or false for the lora_E of "
            f"each module. {_SAVE_PRETRAINED_HINT}"
        )
    return ranks


def _check_number_of_patterns(path: Path, fields: Mapping[str, Any]) -> None:
    letters = 0
    for name in _PATTERN_FIELDS:
        value = fields.get(name)
        patterns = value if isinstance(value, list | Mapping) else ()
        letters += sum(
            len(one) + _LETTERS_PER_PATTERN
            for one in patterns
            if isinstance(one, str) and not is_plain_pattern(one)
        )
    if letters > _MAX_PATTERN_LETTERS:
        raise ValueError(
            f"{path}: rank_pattern and the like have too many or too long regular expressions. "
            f"List the names of the modules instead."
        )


def _check_supported_value(path: Path, name: str, value: Any, supported: Any) -> None:
    allowed = supported if isinstance(supported, tuple) else (supported,)
    # The type is compared as well, since 1 == True and a number of steps is not a bool.
    if not any(value == one and type(value) is type(one) for one in allowed):
        if not allowed[0] and value in (None, False, [], {}):
            return  # Another spelling of "off".
        raise ValueError(
            f"{path}: {_format_field(name, value)} is not supported. It must be "
            f"{' or '.join(map(repr, allowed))}; the adapter would lack the feature otherwise."
        )


# Modules that PEFT trains completely in a task, if the model has them.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Value of `target_modules` of a folder that has nothing but saved modules or tokens.
_NO_TARGET_MODULES = "dummy-target-modules"


def is_all_linear(fields: Mapping[str, Any]) -> bool:
    """Returns True if a config targets all linear modules."""
    target = fields["target_modules"]
    return isinstance(target, str) and target.lower() == "all-linear"


def saved_module_names(fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the names in `modules_to_save`, and those that PEFT adds for the task."""
    names = list(fields["modules_to_save"] or [])
    heads = TASK_HEADS.get(str(fields["task_type"]).removeprefix("TaskType."), ())
    return names, [head for head in heads if head not in names]


class SavedModules:
    """The entries of `modules_to_save`, and the modules that they match.

    Args:
        names: The entries, and the heads that PEFT adds for the task.

    Example:
        >>> from jlora.peft.config import SavedModules
        >>> saved = SavedModules(["norm", "score"])
        >>> saved.matches("model.final_norm"), saved.contains("model.final_norm")
        ({'norm'}, False)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.lengths = sorted({len(name) for name in self.names})

    def matches(self, module: str) -> set[str]:
        """Returns the entries that match a module or one of its parents.

        PEFT compares the ends of names, without a dot before them.
        """
        ends = (place for place, letter in enumerate(f"{module}.") if letter == ".")
        return {
            module[end - length : end]
            for end in ends
            for length in self.lengths
            if length <= end and module[end - length : end] in self.names
        }

    def contains(self, module: str) -> bool:
        """Returns True if PEFT does not adapt a module because one around it is saved."""
        parts = module.split(".")
        return any(
            ".".join(parts[start:end]) in self.names
            for end in range(1, len(parts) + 1)
            for start in range(end)
        )


def match_target_modules(fields: Mapping[str, Any], modules: Sequence[str]) -> set[str]:
    """Returns the modules that a config targets, matched as PEFT matches them.

    The fields are `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform` and
    `layers_pattern`.

    Raises:
        ValueError: An entry of `target_modules` matches no module, or an entry of
            `layers_to_transform` no layer.
    """
    target = fields["target_modules"] or []
    if target == _NO_TARGET_MODULES:
        return set()
    if not isinstance(target, str):
        target = dict.fromkeys(target)  # Names in their order, which are looked up fast.
    excluded = fields["exclude_modules"]
    if excluded and not isinstance(excluded, str):
        excluded = dict.fromkeys(excluded)
    saved = SavedModules(itertools.chain(*saved_module_names(fields)))
    candidates = [
        module
        for module in modules
        if not (excluded and _matches_target(excluded, module)) and not saved.contains(module)
    ]
    if is_all_linear(fields):
        return set(candidates)
    if isinstance(target, str):
        matched = {target} if any(full_match(target, module) for module in modules) else set()
    else:
        matched = {ending for module in modules for ending in name_endings(module)}
    for entry in [target] if isinstance(target, str) else target:
        if entry not in matched:
            raise ValueError(
                f"target_modules has {_tree.shorten(entry)}, which matches none of the model's "
                f"{len(modules)} modules. The nearest are "
                f"{_tree.closest_matches(entry, tuple(modules))}. This adapter belongs to another "
                f"model."
            )
    selected = {module for module in candidates if _matches_target(target, module)}
    layers = fields["layers_to_transform"]
    if isinstance(target, str) or layers is None or layers == []:
        return selected
    # A module that is listed with its complete name is selected in every layer.
    patterns = fields["layers_pattern"] or []
    layer_patterns = LayerPatterns([patterns] if isinstance(patterns, str) else patterns)
    indices = {module: layer_patterns.layer_number(module) for module in selected - set(target)}
    wanted = {layers} if isinstance(layers, int) else set(layers)
    missing = sorted(wanted - set(indices.values()))
    if missing and indices:
        found = sorted({index for index in indices.values() if index is not None})
        raise ValueError(
            f"layers_to_transform has [{_format_numbers(missing)}], and the targets are in the "
            f"layers [{_format_numbers(found)}]. This adapter belongs to another model, or "
            f"layers_pattern is not the name of its list of layers."
        )
    return {module for module in selected if module in target or indices[module] in wanted}


def _format_numbers(numbers: list[int]) -> str:
    return format_names([_tree.shorten(number, 20) for number in numbers])


def _matches_target(target: str | Container[str], module: str) -> bool:
    """Returns True if a module matches a regular expression, or ends in a name of a list."""
    if isinstance(target, str):
        return full_match(target, module)
    return any(ending in target for ending in name_endings(module))


def name_endings(module: str) -> Iterator[str]:
    """Yields the name of a module, and its parts after each dot."""
    yield module
    yield from (module[place + 1 :] for place, letter in enumerate(module) if letter == ".")


def is_feedforward(fields: Mapping[str, Any], module: str) -> bool:
    """Returns True if IA3 scales the module's inputs and not its outputs.

    PEFT compares the ends of names, without a dot before them.
    """
    entries = fields["feedforward_modules"] or []
    if isinstance(entries, str):
        return full_match(entries, module)
    return module.endswith(tuple(entries))


def fields_for_module(fields: Mapping[str, Any], method: PeftMethod, module: str) -> dict[str, Any]:
    """Returns the fields with a module's own values, from the first pattern that matches it."""
    module_fields = dict(fields)
    for name, field in method.patterns.items():
        values = _pattern_values(fields, field)
        pattern = values.first_match(module)
        if pattern is not None:
            module_fields[name] = values[pattern]
    kept = fields.get(PRUNED_RANKS, {}).get(module)
    if kept is not None and method.alpha_field:
        # The scale is that of the training, with all ranks.
        module_fields["init_r"] = kept
        module_fields[method.alpha_field] = fields[method.alpha_field] * kept / fields["init_r"]
    return module_fields


def _pattern_values(fields: Mapping[str, Any], field: str) -> PatternValues:
    values = fields[field]
    return values if isinstance(values, PatternValues) else PatternValues(values)


def build_pattern(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Returns the pattern with which `fields_for_module` gives each module its value.

    PEFT uses the first key that a name ends in, so longer keys come first, and a module whose name
    ends in the name of another one has a key of its own.

    Args:
        values: Value of each module, by its name.
        common: Value of modules that no key matches.
    """
    others = {module for module, value in values.items() if value != common}
    listed = [
        module
        for module in values
        if module in others or any(module.endswith(f".{other}") for other in others)
    ]
    listed.sort(key=len, reverse=True)
    return {re.sub(r"[^\w.-]", r"\\\g<0>", module): values[module] for module in listed}


def build_selector(
    selected: Iterable[str], module_names: Sequence[str], num_parts: int = 1
) -> list[str] | str:
    """Returns the value of `target_modules` that matches exactly the selected modules.

    It is a list of the shortest names. Where a module's complete name is also the end of another
    name, it is a regular expression.

    Args:
        selected: Names of the modules to match.
        module_names: Names of all modules.
        num_parts: Number of parts between dots that a short name has.
    """
    wanted = set(selected)

    def matches(entry: str) -> set[str]:
        return {name for name in module_names if _matches_target([entry], name)}

    names = set()
    for name in wanted:
        ending = ".".join(name.split(".")[-num_parts:])
        names.add(ending if matches(ending) <= wanted else name)
    if all(matches(name) <= wanted for name in names):
        return sorted(names)
    return "|".join(map(re.escape, sorted(wanted)))


def check_rank_patterns(
    fields: Mapping[str, Any], method: PeftMethod, modules: Iterable[str]
) -> None:
    """Checks that each entry of `rank_pattern` and the like matches a module.

    Args:
        fields: Fields of the config.
        method: PEFT method of the adapter.
        modules: Names of the model's modules, adapted or not.

    Raises:
        ValueError: An entry matches no module.
    """
    modules = list(modules)
    for name in method.patterns.values():
        unmatched = _pattern_values(fields, name).first_unmatched(modules)
        if unmatched is not None:
            raise ValueError(
                f"{name} has {_tree.shorten(unmatched)}, which matches none of the model's "
                f"{len(modules)} modules. {_SAVE_PRETRAINED_HINT}"
            )
    unknown = sorted(set(fields.get(PRUNED_RANKS, ())) - set(modules))
    if unknown:
        raise ValueError(
            f"rank_pattern has {_tree.shorten(unknown[0])}, which is none of the model's "
            f"{len(modules)} modules. {_SAVE_PRETRAINED_HINT}"
        )
