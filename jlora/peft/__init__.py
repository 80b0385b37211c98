"""Reads and writes adapters in the file format of Hugging Face PEFT."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jlora._tree import PyTree
from jlora.checkpoints.safetensors_io import format_names
from jlora.models.hf.load import checkpoint_mapping as list_checkpoint_mappings
from jlora.models.hf.load import example_inputs, is_head_tied_by_config, tied_modules
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.peft.load import LoadedAdapter, load_peft_folder
from jlora.peft.modules_to_save import list_checkpoint_modules, list_target_names
from jlora.peft.save import TASK_TYPES, convert_to_peft, write_peft_folder
from jlora.peft.vllm import convert_to_vllm
from jlora.rules import trace_weights


def load(
    folder: str | os.PathLike[str],
    model: Any,
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, CheckpointWeight] | None = None,
) -> LoadedAdapter:
    """Loads an adapter that PEFT saved, and the base that it belongs on.

    The folder must match the model completely. Refused are missing and unexpected keys, ranks that
    differ from the config, targets and patterns without a match, and non-finite entries. Layers
    that the model stacks may have different ranks: they are padded with zeros, which stay zero in
    training and which `save` removes. Biases that PEFT's IA3 scales with the outputs are scaled in
    the base. The adapter of a weight that a function does not use is left out with a
    `UserWarning`. An update of the embedding alone or of the head alone needs a
    weight for each: load a base that ties them with `models.load(..., tie_word_embeddings=False)`.
    Trained tokens of the embedding are those of the head as well where config.json of the base ties
    the two, even if the head has a weight of its own, unless the folder has other tokens for it.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        model: Model of `jlora.models.load`, or a function of params and inputs.
        params: The base.
        *inputs: Example inputs of a function, arrays or shapes; none for a model.
        checkpoint_mapping: Tensors of a transformers checkpoint that each weight of a function
            consists of, by the weight's path; None for a model.

    Returns:
        The base with the folder's replacements, and the adapter.

    Raises:
        FileNotFoundError: A file is missing.
        TypeError: `model` is a function without `inputs` or `checkpoint_mapping`.
        ValueError: The folder requires an unsupported feature, or does not fit the model.

    References:
        Mangrulkar et al., PEFT, github.com/huggingface/peft; docs/source/developer_guides/
        checkpoint.md for the file format.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> from jlora.models import single_tensor_weight
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> mapping = {"w": single_tensor_weight("net.proj.weight", (4, 3), (1, 0))}
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/out", adapter, fn, params, x, checkpoint_mapping=mapping)
        ...     loaded = peft.load(f"{folder}/out", fn, params, x, checkpoint_mapping=mapping)
        >>> loaded.adapter["w"].rank
        2
    """
    fn, inputs, mappings = _resolve_model_fn(model, inputs, checkpoint_mapping)
    loaded = load_peft_folder(
        folder,
        fn,
        params,
        inputs,
        mappings,
        tied_modules(model),
        is_head_tied=is_head_tied_by_config(model),
    )
    _check_scaled_embedding(model, loaded.adapter)
    return loaded


def save(
    folder: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    model: Any,
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, CheckpointWeight] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool = True,
    file_format: Literal["peft", "vllm"] = "peft",
) -> None:
    """Saves an adapter as a folder that PEFT or vLLM can load.

    Settings that PEFT has once for all modules, and in which the weights differ, are folded into
    the tensors, such as `use_rslora`; those of training alone, such as the dropout, are refused. A
    head that shares the embedding's weight is a module of its own in PEFT, and is written with the
    same update.

    Args:
        folder: Path of the new folder, which must not exist. It is written atomically.
        adapter: Adapter with LoRA, DoRA, LoRA-FA, DyLoRA (at its full rank), AdaLoRA, LoHa, LoKr,
            HiRA, IA3, VeRA, VB-LoRA or FourierFT; and, in addition, fully trained weights and
            biases and trained tokens.
        model: Model or function, as in `load`.
        params: The base that the adapter belongs on.
        *inputs: Example inputs of a function, as in `load`.
        checkpoint_mapping: Checkpoint tensors of a function's weights, as in `load`.
        base_model_name_or_path: Name or folder of the base in the config; None leaves it out.
        task_type: PEFT task type, such as "CAUSAL_LM"; None for none. With "SEQ_CLS" and
            "TOKEN_CLS", PEFT expects the head in the folder, so it is written even if it was not
            trained.
        save_embedding_layers: True to write the base's embedding table beside an embedding's
            factors, as PEFT does.
        file_format: "peft"; or "vllm" for one rank and one scale of all modules, which is folded
            into `B`, and a separate module for each expert. vLLM does not support DoRA, methods
            other than LoRA, biases and fully trained weights, which are refused: merge them.

    Raises:
        FileExistsError: `folder` exists; it is not modified.
        TypeError: `model` is a function without `inputs` or `checkpoint_mapping`.
        ValueError: The file format does not support a part of the adapter, an entry is not finite,
            or `file_format` or `task_type` is unknown.

    References:
        Mangrulkar et al., PEFT, github.com/huggingface/peft; docs/source/developer_guides/
        checkpoint.md for the file format.

    Example:
        >>> import os, tempfile
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> from jlora.models import single_tensor_weight
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> mapping = {"w": single_tensor_weight("net.proj.weight", (4, 3), (1, 0))}
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/out", adapter, fn, params, x, checkpoint_mapping=mapping)
        ...     sorted(os.listdir(f"{folder}/out"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    fn, inputs, mappings = _resolve_model_fn(model, inputs, checkpoint_mapping)
    weights = trace_weights(fn, params, *inputs)
    if file_format not in ("peft", "vllm"):
        raise ValueError(f"file_format={file_format!r} must be 'peft' or 'vllm'.")
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(f"task_type={task_type!r} must be one of {', '.join(TASK_TYPES)}.")
    _check_scaled_embedding(model, adapter)
    for_vllm = file_format == "vllm"
    tied = tied_modules(model)
    if for_vllm and set(tied.values()) & set(adapter):
        raise ValueError(
            f"vLLM adapts an embedding without the head that shares its weight, and this adapter "
            f"has {format_names(sorted(set(tied.values()) & set(adapter)))}. Merge the adapter and "
            f"serve the merged checkpoint."
        )
    peft_adapter = convert_to_peft(
        adapter,
        params,
        weights,
        mappings[0],
        save_embedding_layers=save_embedding_layers and not for_vllm,
        task_type=None if for_vllm else task_type,  # vLLM does not load a head.
        tied_modules=tied,
        is_head_tied=is_head_tied_by_config(model),
    )
    # With transformers 4, PEFT sees a module for each expert.
    names = [*list_target_names(mappings[0]), *list_checkpoint_modules(mappings[0]), *tied]
    target_names = list(dict.fromkeys(names))
    if for_vllm:
        peft_adapter = convert_to_vllm(peft_adapter)
        target_names = list_checkpoint_modules(mappings[0])
    write_peft_folder(
        folder,
        peft_adapter,
        target_names,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )


def _check_scaled_embedding(model: Any, adapter: Mapping[str, Any]) -> None:
    """Checks that PEFT's adapter of an embedding is scaled with it, which only LoRA's is.

    Raises:
        ValueError: It is not.
    """
    if getattr(getattr(model, "config", None), "embed_scale", None) is None:
        return
    for path, leaf in adapter.items():
        if path.endswith("embed/embedding") and leaf.family in ("hira", "dora"):
            raise ValueError(
                f"The model multiplies its embeddings by {model.config.embed_scale:.4g}, and PEFT "
                f"does not scale the update of an adapter of family {leaf.family!r} on {path!r}, "
                f"so its outputs would differ. Use jlora.LoRA on that weight, or merge the adapter."
            )


def _fn_with_pooler(model: Any) -> Callable[..., Any]:
    """Returns a model's function, of the pooler's output for a pooler without a head.

    The hidden states do not depend on such a pooler, which is a module for PEFT nevertheless.
    """
    c = model.config
    if getattr(c, "pooler_activation", None) is None or c.num_labels is not None:
        return model.apply
    return functools.partial(model.apply, method="pooler_output")


def _resolve_model_fn(
    model: Any, inputs: tuple[Any, ...], checkpoint_mapping: Mapping[str, CheckpointWeight] | None
) -> tuple[Callable[..., Any], tuple[Any, ...], Sequence[Mapping[str, CheckpointWeight]]]:
    """Returns a function of params, its inputs, and its checkpoint mappings, one per spelling."""
    if hasattr(model, "apply"):
        return _fn_with_pooler(model), example_inputs(model), list_checkpoint_mappings(model)
    if not callable(model) or checkpoint_mapping is None or not inputs:
        raise TypeError(
            "model must be a model of jlora.models, or a function of params and inputs with "
            "example inputs and checkpoint_mapping=..., the checkpoint tensors of its weights."
        )
    return model, inputs, (checkpoint_mapping,)


__all__ = [
    "LoadedAdapter",
    "load",
    "save",
]
