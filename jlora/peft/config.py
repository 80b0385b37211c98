"""adapter_config.json: read with every field accounted for, and matched with a model's modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import tree
from jlora.checkpoints.tensors import listed, read_json
from jlora.peft.formats import FORMATS, Format

CONFIG = "adapter_config.json"
# Says nothing about what an adapter computes once it is trained.
_HARMLESS = {
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
COMMON: dict[str, Any] = {
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


def _is_pattern(value: Any) -> bool:
    """Whether it is a regular expression."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError):
        return False


def _is_list(value: Any, kind: type = str) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _is_ranks(value: Any) -> bool:
    """Whether it is a mapping from patterns to positive numbers."""
    return isinstance(value, Mapping) and all(
        _is_pattern(key) and type(one) in (int, float) and 0 < one < math.inf
        for key, one in value.items()
    )


def _is_rows(value: Any) -> bool:
    """Whether it is a list of tokens, or such a list for each module."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    return all(_is_list(one, int) and all(token >= 0 for token in one) for one in lists)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_modules(value: Any) -> bool:
    return _is_pattern(value) or _is_list(value)


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_flag(value: Any) -> bool:
    return type(value) is bool


# What a field must be; PEFT's own readers would fail on others later, or not at all.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "exclude_modules": _or_none(_is_modules),
    "fan_in_fan_out": _is_flag,
    "feedforward_modules": _or_none(_is_modules),
    "hira_dropout": _is_rate,
    "layers_pattern": _or_none(lambda value: isinstance(value, str) or _is_list(value)),
    "layers_to_transform": _or_none(lambda value: type(value) is int or _is_list(value, int)),
    "lora_dropout": _is_rate,
    "modules_to_save": _or_none(_is_list),
    "target_modules": _or_none(_is_modules),
    "target_parameters": _or_none(_is_list),
    "task_type": _or_none(lambda value: isinstance(value, str)),
    "trainable_token_indices": _or_none(_is_rows),
    "use_dora": _is_flag,
    "use_effective_conv2d": _is_flag,
    "use_rslora": _is_flag,
    "decompose_both": _is_flag,
    "decompose_factor": lambda value: type(value) is int,
    "vblora_dropout": _is_rate,
    "vera_dropout": _is_rate,
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"), lambda value: value == {} or _is_ranks(value)
    ),
}
_AS_GIVEN = "Use the two files that one `save_pretrained` wrote."


def read_config(folder: Path) -> tuple[dict[str, Any], Format]:
    """The fields of a folder's adapter_config.json, with what is left out filled in.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It asks for something that is not implemented, or has a field that is not known.
    """
    path = folder / CONFIG
    return checked(path, read_json(path))


def checked(path: Path, raw: Mapping[str, Any]) -> tuple[dict[str, Any], Format]:
    """The fields of a config that came from a file, as `read_config` returns them.

    Raises:
        ValueError: As there.
    """
    kind = str(raw.get("peft_type", "")).upper()
    if kind not in FORMATS:
        raise ValueError(
            f"{path}: peft_type={raw.get('peft_type')!r} is not implemented; {sorted(FORMATS)} are."
        )
    form = FORMATS[kind]
    fields = {**COMMON, **form.defaults}
    unknown = []
    for name, value in raw.items():
        if name in form.only:
            _only(path, name, value, form.only[name])
        elif name in fields:
            fields[name] = fields[name] if value is None and fields[name] is not None else value
        elif name not in _HARMLESS and value not in (None, False, "", [], {}):
            unknown.append(f"{name}={value!r}")
    if kind == "ADALORA" and fields["rank_pattern"]:
        raise ValueError(
            f"{path}: rank_pattern says that ranks were pruned, and the scale that such an adapter "
            f"was trained with is in no file. Save it without the pattern, or merge it with PEFT."
        )
    for name, value in fields.items():
        if name in _TYPES and not _TYPES[name](value):
            raise ValueError(
                f"{path}: {name}={value!r} is of another type than PEFT writes. {_AS_GIVEN}"
            )
    if unknown:
        raise ValueError(
            f"{path}: {listed(unknown)} is not known here and may change what the adapter "
            f"computes. If it does not, take it out of the file."
        )
    for name in (form.rank, form.alpha):
        value: Any = fields.get(name) if name else 1
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{path}: {name}={value!r} is no positive number. {_AS_GIVEN}")
    return fields, form


def _only(path: Path, name: str, value: Any, only: Any) -> None:
    allowed = only if isinstance(only, tuple) else (only,)
    # 1 == True, and a number of steps is no flag.
    if not any(value == one and type(value) is type(one) for one in allowed):
        if not allowed[0] and value in (None, False, [], {}):
            return  # Nothing, in other words.
        raise ValueError(
            f"{path}: {name}={value!r} is not implemented, only "
            f"{' or '.join(map(repr, allowed))}. What it does would be missing from the adapter."
        )


def targeted(fields: Mapping[str, Any], modules: Sequence[str]) -> set[str]:
    """Those of a model's modules that `target_modules` and its like name, as PEFT matches them.

    Raises:
        ValueError: An entry matches no module.
    """
    target = fields["target_modules"] or []
    if target == "all-linear":
        return set(modules)
    chosen = {module for module in modules if _named(target, module)}
    if fields["exclude_modules"]:
        chosen = {module for module in chosen if not _named(fields["exclude_modules"], module)}
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
        hit = [m for m in modules if _named(entry if isinstance(target, str) else [entry], m)]
        if not hit:
            raise ValueError(
                f"target_modules has {entry!r}, which matches none of the model's "
                f"{len(modules)} modules. The nearest are {tree.nearest(entry, tuple(modules))}. "
                f"This adapter belongs to another model."
            )
    return chosen


def _named(target: str | Iterable[str], module: str) -> bool:
    """Whether a module is one of those that a pattern, or a list of endings, means."""
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == entry or module.endswith(f".{entry}") for entry in target)


def is_feedforward(fields: Mapping[str, Any], module: str) -> bool:
    """Whether IA3 scales the module's inputs."""
    return bool(fields["feedforward_modules"]) and _named(fields["feedforward_modules"], module)


def own_fields(fields: Mapping[str, Any], form: Format, module: str) -> dict[str, Any]:
    """The fields with a module's own rank and alpha, of the first pattern that it matches."""
    own = dict(fields)
    for name, pattern in ((form.rank, "rank_pattern"), (form.alpha, "alpha_pattern")):
        for key, value in fields[pattern].items():
            if name and re.match(rf"(.*\.)?({key})$", module):
                own[name] = value
                break
    return own


def check_patterns(fields: Mapping[str, Any], modules: Iterable[str]) -> None:
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
                    f"modules. {_AS_GIVEN}"
                )
