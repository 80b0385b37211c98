"""Adapters in PEFT's file format, both ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jlora._tree import PyTree
from jlora.models.hf import load as load_module
from jlora.models.hf.load import example_inputs
from jlora.models.hf.weight_mapping import CheckpointWeight as Stored
from jlora.peft import modules_to_save, vllm
from jlora.peft.load import LoadedAdapter, load_peft_folder
from jlora.peft.save import TASK_TYPES, convert_to_peft, write_peft_folder
from jlora.rules import trace_weights


def load(
    folder: str | os.PathLike[str],
    model: Any,
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, Stored] | None = None,
) -> LoadedAdapter:
    """The adapter of a folder that PEFT wrote, and the base that it belongs on.

    Everything in the folder has a place, or it is refused: keys that are left over or missing,
    ranks that are not the config's, targets and patterns that match nothing, numbers that are not
    finite. Layers that a model stacks may have different ranks; they are padded with zeros, which
    training leaves alone and `save` takes off again. Biases that PEFT's IA3 scales with the outputs
    are scaled in the base.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        model: What `jlora.models.load` returned; or a function of params and inputs.
        params: The base.
        *inputs: For a function: example inputs, arrays or shapes.
        checkpoint_mapping: For a function: which tensors of a checkpoint of transformers its weights are.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder asks for what is not implemented, or does not fit the model.
    """
    fn, inputs, spellings = _resolve_model_fn(model, inputs, checkpoint_mapping)
    return load_peft_folder(folder, fn, params, inputs, spellings)


def save(
    folder: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    model: Any,
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, Stored] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool = True,
    file_format: Literal["peft", "vllm"] = "peft",
) -> None:
    """Writes an adapter as a folder that PEFT reads, or vLLM.

    Args:
        folder: Must not exist yet; it appears whole or not at all.
        adapter: LoRA, DoRA, LoRA-FA, DyLoRA (at its full rank), AdaLoRA, LoHa, LoKr, HiRA, IA3,
            VeRA, VB-LoRA or FourierFT, beside weights, biases and token rows trained whole.
        model: As in `load`.
        params: The base that the adapter belongs on.
        *inputs: As in `load`.
        checkpoint_mapping: As in `load`.
        base_model_name_or_path: Name or folder of the base, for the readers of the config.
        task_type: One of PEFT's task types, such as "CAUSAL_LM". With "SEQ_CLS" and "TOKEN_CLS" PEFT
            expects the head in the folder, so it is written even where it was not trained.
        save_embedding_layers: Whether the base's own table is written beside an embedding's factors, as PEFT
            does.
        file_format: "vllm" writes what vLLM takes: of all modules one rank and one scale, which is
            folded into `B`, and every expert as a module of its own. What it does not take (DoRA
            and methods other than LoRA, biases, what is trained whole) is refused; merge it.

    Raises:
        FileExistsError: There is something of that name; it is left as it was.
        ValueError: The reader has no form for a part of the adapter, or it is not finite.
    """
    fn, inputs, spellings = _resolve_model_fn(model, inputs, checkpoint_mapping)
    used = trace_weights(fn, params, *inputs)
    if file_format not in ("peft", "vllm"):
        raise ValueError(f"reader={file_format!r} is neither 'peft' nor 'vllm'.")
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(f"task={task_type!r} is none of PEFT's: {', '.join(TASK_TYPES)}.")
    for_vllm = file_format == "vllm"
    own_tables = save_embedding_layers and not for_vllm
    known_task = None if for_vllm else task_type  # vLLM takes no head.
    whole = convert_to_peft(
        adapter, params, used, spellings[0], save_embedding_layers=own_tables, task_type=known_task
    )
    modules = modules_to_save.list_module_names(spellings[0])
    if for_vllm:
        whole = vllm.convert_to_vllm(whole)
        modules = [module.parameter.module for module in whole.modules]
    write_peft_folder(
        folder, whole, modules, base_model_name_or_path=base_model_name_or_path, task_type=task_type
    )


def _resolve_model_fn(
    model: Any, inputs: tuple[Any, ...], checkpoint_mapping: Mapping[str, Stored] | None
) -> tuple[Callable[..., Any], tuple[Any, ...], Sequence[Mapping[str, Stored]]]:
    """A function of params, its inputs, and the tensors that its weights are, in all spellings."""
    if hasattr(model, "apply"):
        return model.apply, example_inputs(model), load_module.checkpoint_mapping(model)
    if not callable(model) or checkpoint_mapping is None or not inputs:
        raise TypeError(
            "model must be one of jlora.models, or a function of params and inputs with example "
            "inputs and stored=..., which says what tensors of a checkpoint its weights are."
        )
    return model, inputs, (checkpoint_mapping,)


__all__ = [
    "LoadedAdapter",
    "load",
    "save",
]
