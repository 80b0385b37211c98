"""What a file holds, and checkpoints in other formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jlora.cli.opening import check_new, layout_of, with_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """What a checkpoint's folder, a folder of PEFT's or an adapter file holds.

    Attributes:
        path: The folder or file; a recipe, with --importance.
        importance: Print how much each weight matters instead: gradient_norm, fisher, sensitivity
            or activation on a recipe's data; condition or stable_rank of a recipe's base or a
            checkpoint's folder.
        batches: On how many of a recipe's batches that is measured; 8 when left out.
        budget: Print the recipe's rules too, with ranks that train at most so many numbers.
        overrides: What is said otherwise than the recipe, as `--section.field value`.
    """

    path: Path
    importance: str | None = None
    batches: int | None = None
    budget: int | None = None
    overrides: tuple[str, ...] = ()
    example = "jlora inspect my-adapter/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportMerged:
    """Merge an adapter into its base and write a Hugging Face folder.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: File of jlora.save_adapter, or folder of PEFT's.
        out: The new folder.
        dtype: Of the weights; those of the base when left out.
        shard_gb: Size of a file, in 10^9 bytes.
    """

    base: str
    adapter: Path
    out: Path
    dtype: str | None = None
    shard_gb: float = 5.0
    example = "jlora export merged base/ adapter.safetensors merged/ --dtype bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPeft:
    """Write an adapter as a folder that PEFT, or vLLM, reads.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: File of jlora.save_adapter.
        out: The new folder.
        vllm: Write what vLLM takes, or say why it cannot be.
        task: One of PEFT's task types.
        base_name: The base's name for the folder's readers; its path when left out.
    """

    base: str
    adapter: Path
    out: Path
    vllm: bool = False
    task: str | None = None
    base_name: str | None = None
    example = "jlora export peft base/ adapter.safetensors peft-adapter/ --task CAUSAL_LM"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportAdapter:
    """Write a folder of PEFT's as one adapter file of jlora's.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: Folder of PEFT's.
        out: The new file.
    """

    base: str
    adapter: Path
    out: Path
    example = "jlora export adapter base/ peft-adapter/ adapter.safetensors"


def inspect(options: Inspect) -> None:
    """Prints what is there, or how much each weight matters."""
    from jlora.cli import importance
    from jlora.inspection import inspect

    rest = {"--batches": options.batches, "--budget": options.budget}
    if options.importance is None:
        importance.refuse_without({**rest, " ".join(options.overrides): options.overrides})
        print(inspect(options.path))
        return
    importance.show(
        options.path,
        options.importance,
        batches=options.batches,
        budget=options.budget,
        overrides=options.overrides,
    )


def export_merged(options: ExportMerged) -> None:
    """Writes the merged checkpoint and prints what rounding leaves of each change."""
    from jlora import models
    from jlora.checkpoints.adapter_file import schemes_of
    from jlora.merging.export import merge_to

    check_new(options.out)
    _, params, adapter = with_adapter(options.base, options.adapter)
    merged = merge_to(params, adapter, options.dtype)
    models.save(
        options.out,
        merged.params,
        options.base,
        dtype=options.dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        **layout_of(options.adapter),
    )
    print(merged)
    schemes = [] if options.adapter.is_dir() else schemes_of(options.adapter)
    if schemes:
        print(
            f"The adapter was trained on weights quantised as {', '.join(schemes)}, and is merged "
            f"into the original ones, which it was not measured on. The export of its recipe "
            f"merges into the dequantized ones: --export.merged true --resume."
        )
    print(f"Wrote {options.out}.")


def export_peft(options: ExportPeft) -> None:
    """Writes the folder."""
    from jlora import peft

    check_new(options.out)
    model, params, adapter = with_adapter(options.base, options.adapter)
    peft.save(
        options.out,
        adapter,
        model,
        params,
        base_model=options.base_name or options.base,
        task=options.task,
        reader="vllm" if options.vllm else "peft",
    )
    print(f"Wrote {options.out}.")


def export_adapter(options: ExportAdapter) -> None:
    """Writes the file."""
    import jax

    from jlora import models, peft
    from jlora.checkpoints.adapter_file import save_adapter

    check_new(options.out)
    model, params = models.load(options.base)
    loaded = peft.load(options.adapter, model, params)
    same = jax.tree.map(lambda one, two: one is two, loaded.params, params)
    if not jax.tree.all(same):
        raise ValueError(
            f"{options.adapter} also replaces weights of the base, which an adapter file has no "
            f"room for. Use jlora export merged."
        )
    save_adapter(options.out, loaded.adapter, params)
    print(f"Wrote {options.out}.")
