"""Reads and writes LoRA files of Stable Diffusion and related models: diffusers and kohya."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jlora._tree import PyTree
from jlora.diffusers.load import load_lora_file
from jlora.diffusers.save import ModelAdapter, check_model_prefix, write_lora_file
from jlora.models.hf.weight_mapping import CheckpointWeight
from jlora.rules import trace_weights


def load(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, CheckpointWeight],
    prefix: str = "unet",
) -> dict[str, Any]:
    """Loads the LoRA of one model from a file of diffusers or kohya's sd-scripts.

    Every tensor with the model's prefix must match the model. Tensors with other prefixes, of other
    models, are ignored. The update is `alpha / rank * up @ down`. Alpha is the rank if the file has
    it neither as a tensor nor in the metadata of diffusers.

    Args:
        path: Path of the .safetensors file. The keys may be those of any release of diffusers, or
            those of kohya, whose underscores are resolved with the modules of
            `checkpoint_mapping`.
        fn: Function of params and inputs.
        params: The base.
        *inputs: Example inputs, arrays or shapes.
        checkpoint_mapping: Tensors of the diffusers checkpoint that each weight consists of, by
            the weight's path.
        prefix: Prefix of the model in the file: "unet", "text_encoder", "text_encoder_2", or
            another one in keys of diffusers.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or not safetensors; it has no tensor for the prefix; it has
            a method other than LoRA; or it does not fit the model.

    References:
        huggingface/diffusers, src/diffusers/loaders; kohya-ss/sd-scripts, networks/lora.py.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import diffusers
        >>> from jlora.models import single_tensor_weight
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> mapping = {"w": single_tensor_weight("mid.to_q.weight", (4, 3), (1, 0))}
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/pytorch_lora_weights.safetensors"
        ...     diffusers.save(path, adapter, fn, params, x, checkpoint_mapping=mapping)
        ...     loaded = diffusers.load(path, fn, params, x, checkpoint_mapping=mapping)
        >>> loaded["w"].rank
        2
    """
    check_model_prefix(prefix)
    return load_lora_file(path, trace_weights(fn, params, *inputs), checkpoint_mapping, prefix)


def save(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    checkpoint_mapping: Mapping[str, CheckpointWeight],
    prefix: str = "unet",
    file_format: Literal["diffusers", "kohya"] = "diffusers",
) -> None:
    """Saves the adapter of one model as a file for diffusers or kohya's sd-scripts.

    Args:
        path: Path of the new file, which must not exist. It is written atomically. The default name
            in diffusers is pytorch_lora_weights.safetensors.
        adapter: Adapter with LoRA, LoRA-FA or DyLoRA (at its full rank). Dropout is not written.
        fn: Function of params and inputs, as in `load`.
        params: The base that the adapter belongs on.
        *inputs: Example inputs, as in `load`.
        checkpoint_mapping: Checkpoint tensors of the weights, as in `load`.
        prefix: Prefix of the model, as in `load`.
        file_format: "diffusers" writes each module's alpha into the metadata, which older releases
            of diffusers ignore: they use the rank as alpha. "kohya" writes alpha as a tensor.

    Raises:
        FileExistsError: `path` exists; it is not modified.
        ValueError: The file format does not support a part of the adapter, an entry is not finite,
            or `file_format` or `prefix` is unknown.

    References:
        huggingface/diffusers, src/diffusers/loaders; kohya-ss/sd-scripts, networks/lora.py.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import diffusers
        >>> from jlora.models import single_tensor_weight
        >>> from safetensors.numpy import load_file
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> mapping = {"w": single_tensor_weight("mid.to_q.weight", (4, 3), (1, 0))}
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/lora.safetensors"
        ...     options = {"checkpoint_mapping": mapping, "file_format": "kohya"}
        ...     diffusers.save(path, adapter, fn, params, x, **options)
        ...     load_file(path)["lora_unet_mid_to_q.alpha"]
        array(2., dtype=float32)
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
    """Saves the adapters of several models as one file.

    Args:
        path: Path of the new file, as in `save`.
        model_adapters: Adapters, by the prefix of the model. The kohya prefix of "text_encoder" is
            `lora_te1` if there is a "text_encoder_2", and `lora_te` otherwise.
        file_format: "diffusers" or "kohya", as in `save`.

    Raises:
        FileExistsError: `path` exists; it is not modified.
        ValueError: As in `save`.

    References:
        huggingface/diffusers, src/diffusers/loaders; kohya-ss/sd-scripts, networks/lora.py.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import diffusers
        >>> from jlora.models import single_tensor_weight
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 4))
        >>> mapping = {"w": single_tensor_weight("mid.to_q.weight", (4, 3), (1, 0))}
        >>> lora = jlora.lora_transform(fn, jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> unet = diffusers.ModelAdapter(adapter, fn, params, (x,), mapping)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     diffusers.save_pipeline(f"{folder}/lora.safetensors", {"unet": unet})
    """
    if file_format not in ("diffusers", "kohya"):
        raise ValueError(f"file_format={file_format!r} must be 'diffusers' or 'kohya'.")
    write_lora_file(path, model_adapters, file_format)


__all__ = [
    "ModelAdapter",
    "load",
    "save",
    "save_pipeline",
]
