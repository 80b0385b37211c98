"""adapter_config.json: read with every field accounted for, and matched with a model's modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import _tree
from jlora.checkpoints.safetensors_io import format_names, read_json
from jlora.peft.methods import PEFT_METHODS, PeftMethod

CONFIG_NAME = "adapter_config.json"

# Says nothing about what an adapter computes once it is trained.
_IGNORED_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "d_initial",
    "deltaT",
    "beta1",
    "beta2",
    "ensure_weight_tying",
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
    "n_frequency_pattern",
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

# What every method's config may say, and what it means here.
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
    """Whether it is a regular expression."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError):
        return False


def _is_list_of(value: Any, item_type: type = str) -> bool:
    return isinstance(value, list) and all(type(one) is item_type for one in value)


def _is_rank_pattern(value: Any) -> bool:
    """Whether it is a mapping from patterns to positive numbers."""
    return isinstance(value, Mapping) and all(
        _is_regex(key) and type(one) in (int, float) and 0 < one < math.inf
        for key, one in value.items()
    )


def _is_token_indices(value: Any) -> bool:
    """Whether it is a list of tokens, or such a list for each module."""
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


# What a field must be; PEFT's own readers would fail on others later, or not at all.
_FIELD_VALIDATORS: dict[str, Callable[[Any], bool]] = {
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "exclude_modules": _allow_none(_is_module_selector),
    "fan_in_fan_out": _is_bool,
    "feedforward_modules": _allow_none(_is_module_selector),
    "hira_dropout": _is_dropout_rate,
    "layers_pattern": _allow_none(lambda value: isinstance(value, str) or _is_list_of(value)),
    "layers_to_transform": _allow_none(lambda value: type(value) is int or _is_list_of(value, int)),
    "lora_dropout": _is_dropout_rate,
    "modules_to_save": _allow_none(_is_list_of),
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
        ("rank_pattern", "alpha_pattern"), lambda value: value == {} or _is_rank_pattern(value)
    ),
}

_SAVE_PRETRAINED_HINT = "Use the two files that one `save_pretrained` wrote."


def read_peft_config(folder: Path) -> tuple[dict[str, Any], PeftMethod]:
    """The fields of a folder's adapter_config.json, with what is left out filled in.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It asks for something that is not implemented, or has a field that is not known.
    """
    path = folder / CONFIG_NAME
    return validate_config(path, read_json(path))


def validate_config(path: Path, raw: Mapping[str, Any]) -> tuple[dict[str, Any], PeftMethod]:
    """The fields of a config that came from a file, as `read_peft_config` returns them.

    Raises:
        ValueError: As there.
    """
    kind = str(raw.get("peft_type", "")).upper()
    if kind not in PEFT_METHODS:
        raise ValueError(
            f"{path}: peft_type={raw.get('peft_type')!r} is not implemented; {sorted(PEFT_METHODS)} are."
        )
    form = PEFT_METHODS[kind]
    fields = {**COMMON_DEFAULTS, **form.defaults}
    unknown = []
    for name, value in raw.items():
        if name in form.supported_values:
            _check_supported_value(path, name, value, form.supported_values[name])
        elif name in fields:
            fields[name] = fields[name] if value is None and fields[name] is not None else value
        elif name not in _IGNORED_FIELDS and value not in (None, False, "", [], {}):
            unknown.append(f"{name}={value!r}")
    if kind == "ADALORA" and fields["rank_pattern"]:
        raise ValueError(
            f"{path}: rank_pattern says that ranks were pruned, and the scale that such an adapter "
            f"was trained with is in no file. Save it without the pattern, or merge it with PEFT."
        )
    for name, value in fields.items():
        if name in _FIELD_VALIDATORS and not _FIELD_VALIDATORS[name](value):
            raise ValueError(
                f"{path}: {name}={value!r} is of another type than PEFT writes. {_SAVE_PRETRAINED_HINT}"
            )
    if unknown:
        raise ValueError(
            f"{path}: {format_names(unknown)} is not known here and may change what the adapter "
            f"computes. If it does not, take it out of the file."
        )
    for name in (form.rank_field, form.alpha_field):
        value: Any = fields.get(name) if name else 1
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"{path}: {name}={value!r} is no positive number. {_SAVE_PRETRAINED_HINT}"
            )
    return fields, form


def _check_supported_value(path: Path, name: str, value: Any, supported: Any) -> None:
    allowed = supported if isinstance(supported, tuple) else (supported,)
    # 1 == True, and a number of steps is no flag.
    if not any(value == one and type(value) is type(one) for one in allowed):
        if not allowed[0] and value in (None, False, [], {}):
            return  # Nothing, in other words.
        raise ValueError(
            f"{path}: {name}={value!r} is not implemented, only "
            f"{' or '.join(map(repr, allowed))}. What it does would be missing from the adapter."
        )


def match_target_modules(fields: Mapping[str, Any], modules: Sequence[str]) -> set[str]:
    """Those of a model's modules that `target_modules` and its like name, as PEFT matches them.

    Raises:
        ValueError: An entry matches no module.
    """
    target = fields["target_modules"] or []
    if target == "all-linear":
        return set(modules)
    chosen = {module for module in modules if _matches_target(target, module)}
    if fields["exclude_modules"]:
        chosen = {
            module for module in chosen if not _matches_target(fields["exclude_modules"], module)
        }
    layers = fields["layers_to_transform"]
    if layers is not None and not isinstance(target, str):
        wanted = {layers} if isinstance(layers, int) else set(layers)
        pattern = fields["layers_pattern"]
        named = [pattern] if isinstance(pattern, str) else pattern
        between = "|".join(map(re.escape, named)) if named else r"[^.]*"
        numbers = {m: re.match(rf".*?\.?(?:{between})\.(\d+)\.", m) for m in chosen}
        chosen = {m for m in chosen if (found := numbers[m]) and int(found[1]) in wanted}
    entries = [target] if isinstance(target, str) else target
    for entry in entries:
        hit = [
            m for m in modules if _matches_target(entry if isinstance(target, str) else [entry], m)
        ]
        if not hit:
            raise ValueError(
                f"target_modules has {entry!r}, which matches none of the model's "
                f"{len(modules)} modules. The nearest are {_tree.closest_matches(entry, tuple(modules))}. "
                f"This adapter belongs to another model."
            )
    return chosen


def _matches_target(target: str | Iterable[str], module: str) -> bool:
    """Whether a module is one of those that a pattern, or a list of endings, means."""
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == entry or module.endswith(f".{entry}") for entry in target)


def is_feedforward(fields: Mapping[str, Any], module: str) -> bool:
    """Whether IA3 scales the module's inputs."""
    return bool(fields["feedforward_modules"]) and _matches_target(
        fields["feedforward_modules"], module
    )


def fields_for_module(fields: Mapping[str, Any], method: PeftMethod, module: str) -> dict[str, Any]:
    """The fields with a module's own rank and alpha, of the first pattern that it matches."""
    own = dict(fields)
    for name, pattern in (
        (method.rank_field, "rank_pattern"),
        (method.alpha_field, "alpha_pattern"),
    ):
        for key, value in fields[pattern].items():
            if name and re.match(rf"(.*\.)?({key})$", module):
                own[name] = value
                break
    return own


def check_rank_patterns(fields: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Refuses a pattern of ranks or alphas that matches no module.

    Raises:
        ValueError: Names it.
    """
    modules = list(modules)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in fields[name]:
            if not any(re.match(rf"(.*\.)?({key})$", module) for module in modules):
                raise ValueError(
                    f"{name} has {key!r}, which matches none of the adapter's {len(modules)} "
                    f"modules. {_SAVE_PRETRAINED_HINT}"
                )
