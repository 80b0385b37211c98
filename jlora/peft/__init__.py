"""Adapters in PEFT's file format, both ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jlora.assigning import weights_of
from jlora.checkpoints.pieces import Weight as Stored
from jlora.models import folders
from jlora.peft import reading, vllm, writing
from jlora.peft.reading import LoadedAdapter as LoadedAdapter

PyTree = Any


def load(
    folder: str | os.PathLike[str],
    model: Any,
    params: PyTree,
    *inputs: Any,
    stored: Mapping[str, Stored] | None = None,
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
        stored: For a function: which tensors of a checkpoint of transformers its weights are.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder asks for what is not implemented, or does not fit the model.
    """
    fn, inputs, spellings = _described(model, inputs, stored)
    return reading.read(folder, fn, params, inputs, spellings)


def save(
    folder: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    model: Any,
    params: PyTree,
    *inputs: Any,
    stored: Mapping[str, Stored] | None = None,
    base_model: str | None = None,
    task: str | None = None,
    embeddings: bool = True,
    reader: Literal["peft", "vllm"] = "peft",
) -> None:
    """Writes an adapter as a folder that PEFT reads, or vLLM.

    Args:
        folder: Must not exist yet; it appears whole or not at all.
        adapter: LoRA, DoRA, LoRA-FA, DyLoRA (at its full rank), AdaLoRA, LoHa, LoKr, HiRA, IA3,
            VeRA, VB-LoRA or FourierFT, beside weights, biases and token rows trained whole.
        model: As in `load`.
        params: The base that the adapter belongs on.
        *inputs: As in `load`.
        stored: As in `load`.
        base_model: Name or folder of the base, for the readers of the config.
        task: One of PEFT's task types, such as "CAUSAL_LM". With "SEQ_CLS" and "TOKEN_CLS" PEFT
            expects the head in the folder, so it is written even where it was not trained.
        embeddings: Whether the base's own table is written beside an embedding's factors, as PEFT
            does.
        reader: "vllm" writes what vLLM takes: of all modules one rank and one scale, which is
            folded into `B`, and every expert as a module of its own. What it does not take (DoRA
            and methods other than LoRA, biases, what is trained whole) is refused; merge it.

    Raises:
        FileExistsError: There is something of that name; it is left as it was.
        ValueError: The reader has no form for a part of the adapter, or it is not finite.
    """
    fn, inputs, spellings = _described(model, inputs, stored)
    used = weights_of(fn, params, *inputs)
    if reader not in ("peft", "vllm"):
        raise ValueError(f"reader={reader!r} is neither 'peft' nor 'vllm'.")
    if task is not None and task not in writing.TASKS:
        raise ValueError(f"task={task!r} is none of PEFT's: {', '.join(writing.TASKS)}.")
    for_vllm = reader == "vllm"
    own_tables = embeddings and not for_vllm
    known_task = None if for_vllm else task  # vLLM takes no head.
    whole = writing.taken_apart(
        adapter, params, used, spellings[0], embeddings=own_tables, task=known_task
    )
    modules = writing.modules_of(spellings[0])
    if for_vllm:
        whole = vllm.converted(whole)
        modules = [module.site.module for module in whole.modules]
    writing.write(folder, whole, modules, base_model=base_model, task=task)


def _described(
    model: Any, inputs: tuple[Any, ...], stored: Mapping[str, Stored] | None
) -> tuple[Callable[..., Any], tuple[Any, ...], Sequence[Mapping[str, Stored]]]:
    """A function of params, its inputs, and the tensors that its weights are, in all spellings."""
    if hasattr(model, "apply"):
        return model.apply, folders.example_inputs(model), folders.stored_weights(model)
    if not callable(model) or stored is None or not inputs:
        raise TypeError(
            "model must be one of jlora.models, or a function of params and inputs with example "
            "inputs and stored=..., which says what tensors of a checkpoint its weights are."
        )
    return model, inputs, (stored,)
