"""LoRA in the single files of Stable Diffusion and its kin: diffusers' and kohya's, both ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jlora._tree import PyTree
from jlora.diffusers.load import load_lora_file
from jlora.diffusers.save import ModelAdapter, check_model_prefix, write_lora_file
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.rules import trace_weights


def load(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, Stored],
    prefix: str = "unet",
) -> dict[str, Any]:
    """The LoRA that a file of diffusers or of kohya's sd-scripts has for one model.

    Every tensor of the model has a place, or the file is refused; those of other models, which
    have other prefixes, are left alone. The update is `alpha / rank * up @ down`. Where the file
    has no alpha, neither as a tensor nor in diffusers' metadata, it is the rank.

    Args:
        path: A .safetensors file. Its names may be diffusers' of any release, or kohya's, whose
            underscores are resolved with the modules of `checkpoint_mapping`.
        fn: A function of params and inputs.
        params: The base.
        *inputs: Example inputs, arrays or shapes.
        checkpoint_mapping: Which tensors of diffusers' checkpoint the weights are, by the weights' paths.
        prefix: Which of the file's models it is: "unet", "text_encoder", "text_encoder_2", or what
            else the keys of diffusers begin with.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or no safetensors, has nothing for this prefix, holds what
            is not plain LoRA, or does not fit the model.
    """
    check_model_prefix(prefix)
    return load_lora_file(path, trace_weights(fn, params, *inputs), checkpoint_mapping, prefix)


def save(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, Stored],
    prefix: str = "unet",
    file_format: Literal["diffusers", "kohya"] = "diffusers",
) -> None:
    """Writes the adapter of one model as a file that diffusers reads, or kohya's sd-scripts.

    Args:
        path: Must not exist yet; it appears whole or not at all. diffusers looks for
            pytorch_lora_weights.safetensors.
        adapter: LoRA, LoRA-FA or DyLoRA (at its full rank). Dropout is not written.
        fn: As in `load`.
        params: The base that the adapter belongs on.
        *inputs: As in `load`.
        checkpoint_mapping: As in `load`.
        prefix: As in `load`.
        file_format: "diffusers" writes each module's alpha into the metadata, where older releases
            do not look: they take the rank for it. "kohya" writes it as a tensor.

    Raises:
        FileExistsError: There is something of that name; it is left as it was.
        ValueError: The style has no form for a part of the adapter, or it is not finite.
    """
    save_pipeline(
        path,
        {prefix: ModelAdapter(adapter, fn, params, inputs, checkpoint_mapping)},
        file_format=file_format,
    )


def save_pipeline(
    path: str | os.PathLike[str],
    model_adapters: Mapping[str, ModelAdapter],
    *,
    file_format: Literal["diffusers", "kohya"] = "diffusers",
) -> None:
    """Writes the adapters of several models into one file; else as `save`.

    Args:
        path: As in `save`.
        model_adapters: By prefix. Beside a "text_encoder_2" kohya's name for "text_encoder" is `lora_te1`,
            and `lora_te` without.
        file_format: As in `save`.

    Raises:
        FileExistsError: As in `save`.
        ValueError: As in `save`.
    """
    if file_format not in ("diffusers", "kohya"):
        raise ValueError(f"style={file_format!r} is neither 'diffusers' nor 'kohya'.")
    write_lora_file(path, model_adapters, file_format)


__all__ = [
    "ModelAdapter",
    "load",
    "save",
    "save_pipeline",
]
