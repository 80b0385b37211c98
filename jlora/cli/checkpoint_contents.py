"""Contents of a checkpoint folder, a PEFT folder or an adapter file, for `jlora inspect`."""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.checkpoints.adapter_file import lineage_from_metadata
from jlora.checkpoints.lineage import Lineage
from jlora.checkpoints.safetensors_io import (
    ITEM_BYTES,
    open_checkpoint,
    open_safetensors,
    read_json,
)
from jlora.peft.config import CONFIG_NAME, read_peft_config
from jlora.peft.load import KEY_PREFIX, SAFETENSORS_WEIGHTS_NAME


class InspectResult(NamedTuple):
    """What is there.

    Attributes:
        kind: "model", "PEFT adapter" or "jlora adapter".
        details: What is known of it, by name, as texts.
    """

    kind: str
    details: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.details))
        return "\n".join([self.kind, *(f"  {n:{width}}  {v}" for n, v in self.details.items())])


def inspect_path(path: str | os.PathLike[str]) -> InspectResult:
    """What a checkpoint's folder, a folder of PEFT's, or an adapter file of jlora's holds.

    No tensor is read.

    Raises:
        FileNotFoundError: There is nothing of that name, or nothing in it that jlora knows.
        ValueError: A file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return _inspect_adapter_file(path)
    if (path / CONFIG_NAME).is_file():
        return _inspect_peft_folder(path)
    if (path / "config.json").is_file():
        return _inspect_model_folder(path)
    raise FileNotFoundError(
        f"{path} is no adapter file, and as a folder it has neither {CONFIG_NAME} nor config.json."
    )


def _summarize_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Iterable[str]
) -> dict[str, str]:
    """How many numbers and bytes there are, and of which types."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    kinds = list(dtypes)
    total = sum(size * ITEM_BYTES.get(kind, 1) for size, kind in zip(sizes, kinds, strict=True))
    of_each = collections.Counter(kinds)
    return {
        "parameters": f"{sum(sizes):,}",
        "bytes": f"{total:,} ({total / 2**20:.1f} MiB)",
        "types": ", ".join(f"{kind} ({count} tensors)" for kind, count in of_each.most_common()),
    }


def _read_tensor_headers(file: Any) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    keys = sorted(file.keys())
    parts = [file.get_slice(key) for key in keys]
    shapes = {key: tuple(part.get_shape()) for key, part in zip(keys, parts, strict=True)}
    return shapes, [part.get_dtype() for part in parts]


def _inspect_adapter_file(path: Path) -> InspectResult:
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        shapes, dtypes = _read_tensor_headers(file)
    if metadata.get("format") != "jlora":
        raise ValueError(
            f"{path} is no adapter that jlora.save_adapter wrote (its format is "
            f"{metadata.get('format')!r}). Give the folder, if it belongs to one."
        )
    try:
        parts: dict[str, dict[str, Any]] = json.loads(metadata["adapter"])
        families = collections.Counter(str(facts["family"]) for facts in parts.values())
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Copy it anew.") from error
    ranks = collections.Counter(facts.get("rank") for facts in parts.values())
    lineage = lineage_from_metadata(path, metadata)
    content = {"content": metadata["content"]} if "content" in metadata else {}
    facts = {
        "families": _format_value_counts(families),
        "ranks": _format_value_counts(
            collections.Counter({r: n for r, n in ranks.items() if r is not None})
        ),
        "adapted weights": str(len(parts)),
        "targets": _format_value_counts(
            collections.Counter(_mask_layer_numbers(p, "/") for p in parts)
        ),
        **_summarize_tensors(shapes, dtypes),
        **content,
        **_describe_lineage(lineage),
    }
    return InspectResult("jlora adapter", facts)


def _describe_lineage(lineage: Lineage) -> dict[str, str]:
    """What is known of how an adapter was made."""
    known: dict[str, str] = {}
    if lineage.method:
        known["made by"] = lineage.method
    for number, parent in enumerate(lineage.parents, start=1):
        known[f"parent {number}"] = f"{parent.weight:g} x {parent.name} ({parent.content[:12]})"
    if lineage.recipe is not None:
        known["recipe"] = (
            ", ".join(_describe_lineage_recipe(lineage.recipe)) or "told in its metadata"
        )
    return known


def _describe_lineage_recipe(recipe: Mapping[str, Any]) -> list[str]:
    """The base, the data and the output of a recipe, as far as it names them."""
    base, data = recipe.get("model"), recipe.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    listed = train if isinstance(train, list) else []
    sources = [one.get("path") for one in listed if isinstance(one, dict)]
    named = {
        "base": base.get("path") if isinstance(base, dict) else None,
        "data": " and ".join(map(str, sources)),
        "output": recipe.get("output"),
    }
    return [f"{name} {value}" for name, value in named.items() if value]


def _inspect_peft_folder(path: Path) -> InspectResult:
    raw = read_json(path / CONFIG_NAME)
    try:
        fields, form = read_peft_config(path)
        read = "yes, with the model it was made for"
        suffixes = form.suffixes
    except ValueError as error:
        fields, read, suffixes = raw, f"no: {error}", ()
    with open_safetensors(path / SAFETENSORS_WEIGHTS_NAME) as file:
        shapes, dtypes = _read_tensor_headers(file)
    modules = {
        key.removeprefix(KEY_PREFIX).removesuffix(f".{suffix}"): shape
        for key, shape in shapes.items()
        for suffix in suffixes[:1]
        if key.endswith(f".{suffix}")
    }
    ranks = collections.Counter(shape[0] for shape in modules.values() if len(shape) > 1)
    names = ("use_rslora", "use_dora", "bias", "modules_to_save", "trainable_token_indices")
    special = {n: fields[n] for n in names if fields.get(n) not in (None, False, "none", [])}
    facts = {
        "method": str(raw.get("peft_type")),
        "base model": str(raw.get("base_model_name_or_path")),
        "ranks": _format_value_counts(ranks) or str(fields.get("r")),
        "targets": _format_value_counts(
            collections.Counter(_mask_layer_numbers(m, ".") for m in modules)
        )
        or str(fields.get("target_modules")),
        "beside": ", ".join(f"{n}={v}" for n, v in special.items()) or "nothing",
        **_summarize_tensors(shapes, dtypes),
        "jlora reads it": read,
    }
    return InspectResult("PEFT adapter", facts)


def _inspect_model_folder(path: Path) -> InspectResult:
    # Loaded here: models bring in Flax's layers, which adapters alone do not need.
    from jlora.models.hf import load

    raw = read_json(path / "config.json")
    with open_checkpoint(path) as tensors:
        shapes = {key: header.shape for key, header in tensors.headers.items()}
        dtypes = [header.dtype for header in tensors.headers.values()]
        files = {header.file for header in tensors.headers.values()}
    try:
        load.check_loadable(path)
        read = "yes"
    except ValueError as error:
        read = f"no: {error}"
    facts = {
        "model type": str(raw.get("model_type")),
        "architectures": ", ".join(raw.get("architectures") or []),
        "layers": str(raw.get("num_hidden_layers", raw.get("n_layers"))),
        "width": str(raw.get("hidden_size", raw.get("dim"))),
        **_summarize_tensors(shapes, dtypes),
        "files": str(len(files)),
        "jlora reads it": read,
    }
    return InspectResult("model", facts)


def _mask_layer_numbers(name: str, separator: str) -> str:
    """A weight's name with a star for each number, so that layers count as one."""
    return re.sub(rf"(^|[{separator}_])\d+(?=[{separator}]|$)", r"\1*", name)


def _format_value_counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value} x {count}" for value, count in counts.items())
