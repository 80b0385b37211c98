"""The names by which users call the weights of a checkpoint, as a pattern for adapter rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jlora import _tree
from jlora.models.hf.load import checkpoint_mapping
from jlora.models.hf.weight_mapping import CheckpointWeight

# The projections inside the layers, without heads, embeddings and the routers of experts.
ALL_LINEAR_PATTERN = r"/layers?(_\d+)?/.*(?<!router)/(kernel|gate_up|down)$"

_NAME_PATTERN = re.compile(r"[\w.-]+")
_NAMES_PATTERN = re.compile(r"[\w.-]+([|,]\s*[\w.-]+)*")


def find_target_pattern(model: Any, targets: str | Sequence[str]) -> str:
    """Returns a pattern of the weights that users name, for the rules of `jlora.lora_transform`.

    Args:
        model: A model of `jlora.models`.
        targets: One target or several. Each is a module of the checkpoint as in PEFT's
            `target_modules`, by its last names (`q_proj`, `self_attn.q_proj`) or by all of them
            (`model.layers.0.self_attn.q_proj`); a module of the model here (`q`); a regular
            expression to search in the paths of its parameters; or one that matches the complete
            names of modules of the checkpoint. `"q_proj|v_proj"` is two names, as is the text of a
            list, `"['q_proj', 'v_proj']"`, and `"all-linear"` all projections inside the layers.

    Raises:
        ValueError: A name matches nothing, a target is not a regular expression, a regular
            expression matches paths here and the names of other modules, or the targets name some
            of the modules that are one weight here, such as one layer of a stack.

    References:
        The matching of module names: PEFT, `LoraConfig.target_modules`.

    Example:
        >>> from jlora import models
        >>> config = models.decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> model = models.Decoder(config, scan_layers=True)
        >>> models.find_target_pattern(model, ["q_proj", "v_proj"])
        '^(params/layers/attention/q/kernel|params/layers/attention/v/kernel)$'
        >>> models.find_target_pattern(model, "(q|v)/kernel")
        '(q|v)/kernel'
    """
    names = _split_names(targets) if isinstance(targets, str) else list(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets={targets!r} must be one name or several, such as 'q_proj'.")
    mappings = checkpoint_mapping(model)
    patterns = []
    named = {path: [False] * len(weight.slices) for path, weight in mappings[0].items()}
    for name in names:
        if name.lower() == "all-linear":  # In any case, as in PEFT.
            patterns.append(ALL_LINEAR_PATTERN)
        elif not _mark_modules(name, mappings, named) and not _mark_matching_modules(
            name, mappings, named
        ):
            patterns.append(name)
    for path, matches in named.items():
        if any(matches) and not all(matches):
            raise ValueError(_format_partial_target(names, path, matches, mappings[0]))
    paths = [path for path, matches in named.items() if all(matches)]
    if paths:
        patterns.append(f"^({'|'.join(map(re.escape, paths))})$")
    return patterns[0] if len(patterns) == 1 else "|".join(f"({p})" for p in patterns)


def _split_names(text: str) -> list[str]:
    """Returns the names in a text such as `q_proj|v_proj` or that of a list; else the text alone.

    A list is in brackets and has commas or quotes, which a set of characters hardly has.
    """
    if _NAMES_PATTERN.fullmatch(text):
        return re.split(r"[|,]\s*", text)
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1].strip().removesuffix(",")
    quoted = [name.strip() for name in inner.split(",")]
    names = [
        name[1:-1] if name[:1] == name[-1:] and name[:1] in ("'", '"') else name for name in quoted
    ]
    is_list = all(map(_NAME_PATTERN.fullmatch, names)) and (len(names) > 1 or names != quoted)
    return names if is_list else [text]


def _mark_modules(
    name: str,
    mappings: Sequence[Mapping[str, CheckpointWeight]],
    named: Mapping[str, list[bool]],
) -> bool:
    """Marks the tensors of the matrices of modules with a name; returns whether there are such."""
    found = False
    for path, matches in named.items():
        for i in range(len(matches)):
            # In the naming of any release of transformers.
            keys = (mapping[path].slices[i].key for mapping in mappings)
            if any(_has_last_names(key, name, "weight") for key in keys):
                matches[i] = found = True
    if found:
        return True
    for path, matches in named.items():
        if _has_last_names(path.replace("/", "."), name, "kernel", "embedding"):
            matches[:] = [True] * len(matches)
            found = True
    return found


def _has_last_names(tensor: str, name: str, *kinds: str) -> bool:
    """Whether a tensor is of one of these kinds, in a module whose name ends with a name."""
    module, _, kind = tensor.rpartition(".")
    return kind in kinds and f".{module}".endswith(f".{name}")


def _mark_matching_modules(
    pattern: str,
    mappings: Sequence[Mapping[str, CheckpointWeight]],
    named: Mapping[str, list[bool]],
) -> bool:
    """Marks the tensors of modules that a regular expression matches as in PEFT, but no path.

    Returns:
        Whether there are such. If not, the rules take the pattern as it is.

    Raises:
        ValueError: It is no regular expression, looks like a name and matches nothing, or matches
            paths and the names of other modules.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"The target {pattern!r} is neither the name of a module nor a regular expression: "
            f"{error}. Escape special characters with a backslash."
        ) from error
    by_name, by_path = set(), set()  # Matrices, as paths with the number of the tensor.
    for path, matches in named.items():
        for i in range(len(matches)):
            keys = [mapping[path].slices[i].key for mapping in mappings]
            modules = [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]
            if any(map(compiled.fullmatch, modules)):
                by_name.add((path, i))
            if modules and compiled.search(path):
                by_path.add((path, i))
    if any(compiled.search(path) for path in mappings[0]):
        matrices = {
            (path, i)
            for path, weight in mappings[0].items()
            for i, part in enumerate(weight.slices)
            if len(part.tensor_shape) > 1
        }
        if by_name & matrices and by_name & matrices != by_path & matrices:
            raise ValueError(_format_two_targets(pattern, by_name, by_path, mappings[0]))
        return False
    for path, i in by_name:
        named[path][i] = True
    if not by_name and _NAMES_PATTERN.fullmatch(pattern):
        raise ValueError(_format_unknown_target(pattern, mappings[0]))
    return bool(by_name)


def _format_two_targets(
    pattern: str,
    by_name: set[tuple[str, int]],
    by_path: set[tuple[str, int]],
    mapping: Mapping[str, CheckpointWeight],
) -> str:
    first = min(path for path, _ in by_path)
    path, i = min(by_name - by_path or by_name)
    module = mapping[path].slices[i].key.rpartition(".")[0]
    return (
        f"The target {pattern!r} has two meanings: searched in the paths of the parameters it "
        f"matches {first!r}, and as PEFT matches it, with the complete names of modules, "
        f"{module!r} and not the same weights. Give a list of names, such as "
        f"[{module.rpartition('.')[2]!r}], or a path, such as {re.escape(first) + '$'!r}."
    )


def _format_partial_target(
    names: Sequence[str],
    path: str,
    matches: Sequence[bool],
    mapping: Mapping[str, CheckpointWeight],
) -> str:
    keys = [part.key for part in mapping[path].slices]
    missing = next(key for key, is_named in zip(keys, matches, strict=True) if not is_named)
    apart = " or keep the layers apart (scan_layers=False)," if "/layers/" in path else ""
    return (
        f"The targets {list(names)} name {sum(matches)} of the {len(matches)} tensors that are one "
        f"weight here, {path!r}. Name all of them, such as {missing.rpartition('.')[0]!r} too,"
        f"{apart} or take none of them."
    )


def _format_unknown_target(name: str, mapping: Mapping[str, CheckpointWeight]) -> str:
    tensors = (part.key for weight in mapping.values() for part in weight.slices)
    modules = {tensor.rpartition(".")[0].rpartition(".")[2] for tensor in tensors} - {""}
    nearest = difflib.get_close_matches(name, sorted(modules), n=2, cutoff=0)
    return (
        f"The target {name!r} matches nothing. The nearest modules of the checkpoint are "
        f"{nearest}, and the nearest paths of weights "
        f"{_tree.closest_matches(name, mapping)}. 'all-linear' takes all projections inside the "
        f"layers."
    )
