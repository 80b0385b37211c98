"""`jlora export`: adapters in other formats, or merged into their base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jlora.checkpoints.base_digest import BaseDigest


def load_base_and_adapter(base: str | Path, path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """Returns the model, its parameters, and the adapter of a jlora file or a PEFT folder.

    The head of the base gets a weight of its own where a PEFT folder changes the head or the
    embedding alone.

    Raises:
        ValueError: The base is not the one of the adapter's run.
    """
    from jlora import models
    from jlora.checkpoints.adapter_file import check_base_checkpoint
    from jlora.checkpoints.hub import resolve_checkpoint_folder
    from jlora.peft.tied_weights import TiedWeightsError

    check_base_checkpoint(path, resolve_checkpoint_folder(base))
    model, params = models.load(base, **options)
    try:
        return load_adapter_on_base(path, model, params)
    except TiedWeightsError:
        model, params = models.load(base, **options, tie_word_embeddings=False)
        return load_adapter_on_base(path, model, params)


def load_adapter_on_base(path: Path, model: Any, params: Any) -> tuple[Any, Any, Any]:
    """Returns the model, its parameters, and an adapter.

    Args:
        path: Adapter file of jlora, or PEFT folder, which may replace parameters.
        model: The model.
        params: Its parameters, of arrays or of stored weights.
    """
    from jlora import peft
    from jlora.checkpoints.adapter_file import load_adapter

    if path.is_dir():
        loaded = peft.load(path, model, params)
        return model, loaded.params, loaded.adapter
    return model, params, load_adapter(path, params)


class _OpenedAdapter(NamedTuple):
    """Model, stored parameters, adapter, the options of the model, and the base's digest."""

    model: Any
    params: Any
    adapter: Any
    options: dict[str, Any]
    digest: BaseDigest


@contextlib.contextmanager
def _open_base_and_adapter(base: str, path: Path) -> Iterator[_OpenedAdapter]:
    """Yields the same with stored weights."""
    from jlora.models.hf.load import open_model
    from jlora.peft.tied_weights import TiedWeightsError

    digest = check_adapter_bases(base, [path])
    choices: tuple[dict[str, Any], ...] = ({}, {"tie_word_embeddings": False})
    for options in choices:
        with open_model(base, **options) as (model, stored):
            try:
                loaded = load_adapter_on_base(path, model, stored)
            except TiedWeightsError:
                if options:
                    raise
                continue
            yield _OpenedAdapter(*loaded, options, digest)
            return


def check_adapter_bases(base: str | Path, adapters: Sequence[Path]) -> BaseDigest:
    """Returns the digest of a base, after checking that the adapters' runs had the same.

    Raises:
        ValueError: A run had other weights, or another config.json.
    """
    from jlora.checkpoints.adapter_file import check_base_checkpoint
    from jlora.checkpoints.base_digest import BaseDigest
    from jlora.checkpoints.hub import resolve_checkpoint_folder

    folder = resolve_checkpoint_folder(base)
    digest = BaseDigest.from_folder(folder)
    for adapter in adapters:
        check_base_checkpoint(adapter, folder, digest)
    return digest


def check_output_is_new(out: Path) -> None:
    """Raises before the work begins if an output exists or has no parent folder."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} already exists and is not overwritten. Use another name.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a folder. Create it to write {out.name}.")


FORMATS = ("hf", "peft", "vllm", "jlora")
# Formats of options that not every format has.
_FORMATS_BY_OPTION = {
    "dtype": ("hf",),
    "shard_gb": ("hf",),
    "task": ("peft", "vllm"),
    "base_name": ("peft", "vllm"),
}
_DEFAULT_SHARD_GB = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export an adapter to another format, or merged into its base.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: Adapter file of jlora, or PEFT folder.
        out: New folder; a new file with --format jlora.
        format: hf (merged Hugging Face checkpoint), peft (PEFT folder), vllm (PEFT folder that
            vLLM loads) or jlora (adapter file).
        dtype: Type of the merged weights, for hf; that of the base by default.
        shard_gb: Maximum size of a file in 10^9 bytes, for hf; 5 by default.
        task: PEFT task type, such as CAUSAL_LM, for peft and vllm.
        base_name: Name of the base in the config, for peft and vllm; its path by default.
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
    """Writes the adapter, or the merged checkpoint, in the requested format.

    Raises:
        ValueError: If the format is unknown, or an option does not apply to it.
        FileExistsError: If the output exists.
        OutputInUseError: If another process is writing it.
    """
    from jlora.checkpoints.output_lock import lock_output

    if options.format not in FORMATS:
        raise ValueError(f"format={options.format!r} must be one of {', '.join(FORMATS)}.")
    for name, formats in _FORMATS_BY_OPTION.items():
        if getattr(options, name) is not None and options.format not in formats:
            raise ValueError(
                f"--{name.replace('_', '-')} applies only to --format {' and '.join(formats)}, got "
                f"--format {options.format}. Leave it out."
            )
    check_output_is_new(options.out)
    with lock_output(options.out):
        check_output_is_new(options.out)  # Another process may just have written it.
        if options.format == "hf":
            _export_hf(options)
        elif options.format == "jlora":
            _export_jlora(options)
        else:
            _export_peft(options)
    print(f"Wrote {options.out}.")


def _export_hf(options: ExportOptions) -> None:
    """Writes the merged checkpoint, and prints how much of each update remains after rounding."""
    from jlora import models
    from jlora.checkpoints.adapter_file import read_quantization_schemes
    from jlora.checkpoints.safetensors_io import replace_folder_atomically
    from jlora.merging.merge_to import merge_stored, warn_lost_updates
    from jlora.training.prompt_format import read_prompt_format

    with (
        _open_base_and_adapter(options.base, options.adapter) as opened,
        replace_folder_atomically(options.out) as folder,
    ):
        prompt_format = read_prompt_format(options.adapter, opened.model)
        merged = merge_stored(opened.params, opened.adapter, options.dtype)
        models.save(
            folder,
            merged.params,
            options.base,
            dtype=options.dtype,
            max_shard_size=int((options.shard_gb or _DEFAULT_SHARD_GB) * 1e9),
            **opened.options,
        )
        if prompt_format is not None:
            prompt_format.write_to_merged(folder)
    warn_lost_updates(merged.report)
    print(merged)
    schemes = [] if options.adapter.is_dir() else read_quantization_schemes(options.adapter)
    if schemes:
        print(
            f"The adapter was trained on weights quantized as {', '.join(schemes)}, but is merged "
            f"into the original weights, on which it was not evaluated. To merge into the "
            f"dequantized weights, use its recipe: jlora train --export.merged true --resume."
        )


def _export_peft(options: ExportOptions) -> None:
    """Writes the PEFT folder."""
    from jlora import peft
    from jlora.checkpoints.safetensors_io import replace_folder_atomically
    from jlora.training.prompt_format import read_prompt_format

    with (
        _open_base_and_adapter(options.base, options.adapter) as opened,
        replace_folder_atomically(options.out) as folder,
    ):
        prompt_format = read_prompt_format(options.adapter, opened.model)
        peft.save(
            folder,
            opened.adapter,
            opened.model,
            opened.params,
            base_model_name_or_path=options.base_name or options.base,
            task_type=options.task,
            file_format="vllm" if options.format == "vllm" else "peft",
        )
        opened.digest.write_beside_peft(folder)
        if prompt_format is not None:
            prompt_format.write_beside_peft(folder)


def _export_jlora(options: ExportOptions) -> None:
    """Writes the adapter file."""
    from jlora import peft
    from jlora.models.hf.load import open_model
    from jlora.training.prompt_format import read_prompt_format, save_adapter_and_format

    if not options.adapter.is_dir():
        raise ValueError(
            f"{options.adapter} must be a PEFT folder for --format jlora. An adapter file of jlora "
            f"can be exported to hf, peft or vllm."
        )
    digest = check_adapter_bases(options.base, [options.adapter])
    with open_model(options.base) as (model, params):
        prompt_format = read_prompt_format(options.adapter, model)
        loaded = peft.load(options.adapter, model, params)
        if replaces_base_weights(loaded.params, params):
            raise ValueError(
                f"{options.adapter} also replaces weights of the base, which an adapter file "
                f"cannot contain. Use --format hf."
            )
        save_adapter_and_format(options.out, loaded.adapter, params, prompt_format, digest)


def replaces_base_weights(loaded_params: Any, params: Any) -> bool:
    """Returns True if `peft.load` replaced parameters of the base, as with modules_to_save."""
    import jax

    same = jax.tree.map(lambda loaded, original: loaded is original, loaded_params, params)
    return not jax.tree.all(same)
