"""Contents of a checkpoint folder, a PEFT folder or an adapter file, for `jlora inspect`."""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.checkpoints.adapter_file import ADAPTER_FILE, lineage_from_metadata
from jlora.checkpoints.lineage import Lineage
from jlora.checkpoints.safetensors_io import (
    ITEM_BYTES,
    open_checkpoint,
    open_safetensors,
)
from jlora.checkpoints.text_files import (
    check_regular_file,
    name_file_in_errors,
    parse_json,
    read_json,
)
from jlora.cli.terminal import escape_control_characters
from jlora.peft.config import CONFIG_NAME, read_peft_config
from jlora.peft.load import KEY_PREFIX, SAFETENSORS_WEIGHTS_NAME


class InspectResult(NamedTuple):
    """Contents of a checkpoint or adapter; prints as a table.

    Attributes:
        kind: "model", "PEFT adapter" or "jlora adapter".
        details: Properties as texts, by name.
    """

    kind: str
    details: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.details))
        lines = [self.kind, *(f"  {n:{width}}  {v}" for n, v in self.details.items())]
        return escape_control_characters("\n".join(lines))


def inspect_path(path: str | os.PathLike[str]) -> InspectResult:
    """Returns the contents of a checkpoint folder, a PEFT folder, or a jlora adapter file.

    Only headers are read, no tensors.

    Raises:
        FileNotFoundError: If there is no such file or folder, or it is none of these.
        ValueError: If a file is damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a safetensors file, or it is damaged. Inspect an adapter file, or the "
            f"folder of a checkpoint or PEFT adapter."
        )
    for file, inspect_file in (
        (path, _inspect_adapter_file),
        (path / CONFIG_NAME, _inspect_peft_folder),
        (path / "config.json", _inspect_model_folder),
    ):
        if os.path.lexists(file) and not file.is_dir():
            check_regular_file(file)
            with name_file_in_errors(file):
                return inspect_file(path)
    mend = "" if path.exists() else " It does not exist."
    if (path / ADAPTER_FILE).is_file():
        mend = f" Inspect {path / ADAPTER_FILE}, an adapter of jlora."
    raise FileNotFoundError(
        f"{path} is neither an adapter file nor a folder with {CONFIG_NAME} or config.json.{mend}"
    )


def _summarize_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Iterable[str]
) -> dict[str, str]:
    """Returns the number of parameters and bytes, and the types of the tensors."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    dtypes = list(dtypes)
    total = sum(size * ITEM_BYTES.get(dtype, 1) for size, dtype in zip(sizes, dtypes, strict=True))
    counts = collections.Counter(dtypes)
    return {
        "parameters": f"{sum(sizes):,}",
        "bytes": f"{total:,} ({total / 2**20:.1f} MiB)",
        "types": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in counts.most_common()),
    }


def _read_tensor_headers(file: Any) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Returns the shapes by key, and the types in the order of the keys."""
    keys = sorted(file.keys())
    slices = [file.get_slice(key) for key in keys]
    shapes = {key: tuple(header.get_shape()) for key, header in zip(keys, slices, strict=True)}
    return shapes, [header.get_dtype() for header in slices]


def _inspect_adapter_file(path: Path) -> InspectResult:
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        shapes, dtypes = _read_tensor_headers(file)
    if metadata.get("format") != "jlora":
        raise ValueError(
            f"{path} is not an adapter written by jlora.save_adapter (its format is "
            f"{metadata.get('format')!r}). If it belongs to a folder, inspect the folder."
        )
    weights: dict[str, dict[str, Any]] = parse_json(
        metadata["adapter"], f"{path}: 'adapter' in its metadata"
    )
    families = collections.Counter(str(weight["family"]) for weight in weights.values())
    ranks = collections.Counter(
        str(weight["rank"]) for weight in weights.values() if weight.get("rank") is not None
    )
    targets = collections.Counter(_mask_layer_numbers(weight_path, "/") for weight_path in weights)
    content = {"content": metadata["content"]} if "content" in metadata else {}
    details = {
        "families": _format_value_counts(families),
        "ranks": _format_value_counts(ranks),
        "adapted weights": str(len(weights)),
        "targets": _format_value_counts(targets),
        **_summarize_tensors(shapes, dtypes),
        **content,
        **_describe_lineage(lineage_from_metadata(path, metadata)),
    }
    return InspectResult("jlora adapter", details)


def _describe_lineage(lineage: Lineage) -> dict[str, str]:
    """Returns the known origins of an adapter."""
    details: dict[str, str] = {}
    if lineage.method:
        details["method"] = lineage.method
    for number, parent in enumerate(lineage.parents, start=1):
        details[f"parent {number}"] = f"{parent.weight:g} x {parent.name} ({parent.content[:12]})"
    if lineage.recipe is not None:
        details["recipe"] = ", ".join(_describe_lineage_recipe(lineage.recipe)) or "in the metadata"
    return details


def _describe_lineage_recipe(recipe: Mapping[str, Any]) -> list[str]:
    """Returns the base, the data and the output of a recipe, if present."""
    base, data = recipe.get("model"), recipe.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    sources = train if isinstance(train, list) else []
    values = {
        "base": base.get("path") if isinstance(base, dict) else None,
        "data": " and ".join(str(s.get("path")) for s in sources if isinstance(s, dict)),
        "output": recipe.get("output"),
    }
    return [f"{name} {value}" for name, value in values.items() if value]


def _inspect_peft_folder(path: Path) -> InspectResult:
    raw = read_json(path / CONFIG_NAME)
    try:
        fields, method = read_peft_config(path)
        loadable = "yes, with its base model"
        suffixes = method.suffixes
    except ValueError as error:
        fields, loadable, suffixes = raw, f"no: {error}", ()
    with open_safetensors(path / SAFETENSORS_WEIGHTS_NAME) as file:
        shapes, dtypes = _read_tensor_headers(file)
    modules = {
        key.removeprefix(KEY_PREFIX).removesuffix(f".{suffix}"): shape
        for key, shape in shapes.items()
        for suffix in suffixes[:1]
        if key.endswith(f".{suffix}")
    }
    ranks = collections.Counter(shape[0] for shape in modules.values() if len(shape) > 1)
    targets = collections.Counter(_mask_layer_numbers(module, ".") for module in modules)
    names = ("use_rslora", "use_dora", "bias", "modules_to_save", "trainable_token_indices")
    options = {n: fields[n] for n in names if fields.get(n) not in (None, False, "none", [])}
    details = {
        "method": str(raw.get("peft_type")),
        "base model": str(raw.get("base_model_name_or_path")),
        "ranks": _format_value_counts(ranks) or str(fields.get("r")),
        "targets": _format_value_counts(targets) or str(fields.get("target_modules")),
        "options": ", ".join(f"{n}={v}" for n, v in options.items()) or "none",
        **_summarize_tensors(shapes, dtypes),
        "loads in jlora": loadable,
    }
    return InspectResult("PEFT adapter", details)


def _inspect_model_folder(path: Path) -> InspectResult:
    # A late import: models import Flax's layers, which adapters do not need.
    from jlora.models.hf import load

    raw = read_json(path / "config.json")
    with open_checkpoint(path) as tensors:
        shapes = {key: header.shape for key, header in tensors.headers.items()}
        dtypes = [header.dtype for header in tensors.headers.values()]
        files = {header.file for header in tensors.headers.values()}
    try:
        load.check_loadable(path)
        loadable = "yes"
    except ValueError as error:
        loadable = f"no: {error}"
    details = {
        "model type": str(raw.get("model_type")),
        "architectures": ", ".join(map(str, raw.get("architectures") or [])),
        "layers": str(raw.get("num_hidden_layers", raw.get("n_layers"))),
        "width": str(raw.get("hidden_size", raw.get("dim"))),
        **_summarize_tensors(shapes, dtypes),
        "files": str(len(files)),
        "loads in jlora": loadable,
    }
    return InspectResult("model", details)


def _mask_layer_numbers(name: str, separator: str) -> str:
    """Returns a weight's name with a star for each number, so that all layers have one name."""
    return re.sub(rf"(^|[{separator}_])\d+(?=[{separator}]|$)", r"\1*", name)


def _format_value_counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value} x {count}" for value, count in counts.items())
