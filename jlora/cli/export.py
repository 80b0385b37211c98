"""What a file holds, and checkpoints in other formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


def load_base_and_adapter(base: str | Path, path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The model, its weights, and the adapter of either format."""
    from jlora import models, peft
    from jlora.checkpoints.adapter_file import load_adapter

    model, params = models.load(base, **infer_layer_layout(path), **options)
    if path.is_dir():
        loaded = peft.load(path, model, params)
        return model, loaded.params, loaded.adapter
    return model, params, load_adapter(path, params)


def infer_layer_layout(path: Path) -> dict[str, Any]:
    """How the layers lie in the base that an adapter is for: in one stack, or each apart."""
    from jlora.checkpoints.adapter_file import adapted_weight_paths

    if path.is_dir():
        return {}
    stacked = any("/layers/" in weight for weight in adapted_weight_paths(path))
    return {"scan_layers": True} if stacked else {}


def check_output_is_new(out: Path) -> None:
    """Refuses to write where something is, before the work begins."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and is left as it was. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{out.parent} is no folder that {out.name} could be put in. Make it."
        )


FORMATS = ("hf", "peft", "vllm", "jlora")
# The formats that each of these options is for.
_FORMATS_BY_OPTION = {
    "dtype": ("hf",),
    "shard_gb": ("hf",),
    "task": ("peft", "vllm"),
    "base_name": ("peft", "vllm"),
}
_SHARD_GB = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write an adapter in another format, or merged into its base.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: Adapter file of jlora, or PEFT folder.
        out: New folder, or new file for jlora.
        format: hf: merged Hugging Face checkpoint; peft: PEFT folder; vllm: PEFT folder with what
            vLLM loads; jlora: adapter file.
        dtype: hf: dtype of the weights; that of the base by default.
        shard_gb: hf: maximum size of a file in 10^9 bytes; 5 by default.
        task: peft, vllm: PEFT task type, such as CAUSAL_LM.
        base_name: peft, vllm: name of the base in the config; its path by default.
    """

    base: str
    adapter: Path
    out: Path
    format: str = "hf"
    dtype: str | None = None
    shard_gb: float | None = None
    task: str | None = None
    base_name: str | None = None
    example = "jlora export base/ adapter.safetensors merged/ --format hf --dtype bfloat16"


def run_export(options: ExportOptions) -> None:
    """Writes the adapter, or the merged checkpoint, in the format asked for."""
    if options.format not in FORMATS:
        raise ValueError(f"format={options.format!r} must be one of {', '.join(FORMATS)}.")
    for name, formats in _FORMATS_BY_OPTION.items():
        if getattr(options, name) is not None and options.format not in formats:
            raise ValueError(
                f"--{name.replace('_', '-')} applies to --format {' and '.join(formats)}, got "
                f"--format {options.format}. Leave it out."
            )
    check_output_is_new(options.out)
    {"hf": _export_hf, "peft": _export_peft, "vllm": _export_peft, "jlora": _export_jlora}[
        options.format
    ](options)


def _export_hf(options: ExportOptions) -> None:
    """Writes the merged checkpoint and prints what rounding leaves of each change."""
    from jlora import models
    from jlora.checkpoints.adapter_file import read_quantization_schemes
    from jlora.merging.merge_to import merge_to_dtype

    _, params, adapter = load_base_and_adapter(options.base, options.adapter)
    merged = merge_to_dtype(params, adapter, options.dtype)
    models.save(
        options.out,
        merged.params,
        options.base,
        dtype=options.dtype,
        max_shard_size=int((options.shard_gb or _SHARD_GB) * 1e9),
        **infer_layer_layout(options.adapter),
    )
    print(merged)
    schemes = [] if options.adapter.is_dir() else read_quantization_schemes(options.adapter)
    if schemes:
        print(
            f"The adapter was trained on weights quantised as {', '.join(schemes)}, and is merged "
            f"into the original ones, which it was not measured on. The export of its recipe "
            f"merges into the dequantized ones: --export.merged true --resume."
        )
    print(f"Wrote {options.out}.")


def _export_peft(options: ExportOptions) -> None:
    """Writes the folder."""
    from jlora import peft

    model, params, adapter = load_base_and_adapter(options.base, options.adapter)
    peft.save(
        options.out,
        adapter,
        model,
        params,
        base_model_name_or_path=options.base_name or options.base,
        task_type=options.task,
        file_format="vllm" if options.format == "vllm" else "peft",
    )
    print(f"Wrote {options.out}.")


def _export_jlora(options: ExportOptions) -> None:
    """Writes the file."""
    import jax

    from jlora import models, peft
    from jlora.checkpoints.adapter_file import save_adapter

    model, params = models.load(options.base)
    loaded = peft.load(options.adapter, model, params)
    same = jax.tree.map(lambda one, two: one is two, loaded.params, params)
    if not jax.tree.all(same):
        raise ValueError(
            f"{options.adapter} also replaces weights of the base, which an adapter file has no "
            f"room for. Use --format hf."
        )
    save_adapter(options.out, loaded.adapter, params)
    print(f"Wrote {options.out}.")
