"""Saving of parameters as Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora import _tree
from jlora._tree import PyTree
from jlora.checkpoints import hub
from jlora.checkpoints.safetensors_io import (
    FLOAT_DTYPES,
    TensorSpec,
    create_folder_atomically,
    format_names,
    open_checkpoint,
    write_shards,
)
from jlora.checkpoints.text_files import check_regular_file, read_json
from jlora.models.hf import weight_mapping
from jlora.models.hf.load import (
    match_checkpoint_names,
    match_stored_tensors,
    read_checkpoint_format,
)
from jlora.models.hf.weight_mapping import CheckpointWeight

MAX_SHARD_SIZE = 5_000_000_000

# Endings of the files that accompany the weights and do not depend on them: configs of the model,
# generation, tokenizer and processor, vocabularies, chat templates.
_COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".codes", ".tiktoken")

_COMPANION_PREFIXES = ("LICENSE", "tokenizer", "vocab")

# Files with such a name that describe other weights.
_OTHER_WEIGHTS_PATTERN = re.compile(r".*\.index\.json|adapter_.*|trainer_state\.json|README.*")


def save(
    folder: str | os.PathLike[str],
    params: PyTree,
    source: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    **options: Any,
) -> None:
    """Saves `params` as a Hugging Face checkpoint, together with the other files of `source`.

    The write is atomic: the folder appears complete or not at all.

    Args:
        folder: Folder to create.
        params: Parameters as `load` returns them, merged or trained.
        source: Checkpoint that they were loaded from. Its configs, tokenizer files and chat
            templates are copied, and so are tensors that the model does not use. Where `params`
            have a head of their own and the config ties it, the copy of the config does not.
        dtype: dtype of the files. None: that of each tensor in the source.
        max_shard_size: Maximum size of a file, in bytes. A single larger tensor has a larger file.
        **options: Options that `params` were loaded with.

    Raises:
        FileExistsError: `folder` exists; it remains unchanged.
        ValueError: `params` do not have the names and shapes of the source's weights, or are not
            finite.

    Example:
        A checkpoint of zeros, loaded and saved again in bfloat16:

        >>> import json, pathlib, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> from jlora import models
        >>> config = dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...               num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
        >>> source = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (source / "config.json").write_text(json.dumps(config))
        >>> weights = models.checkpoint_mapping(models.model_from_config(source))[0].values()
        >>> shapes = {part.key: part.tensor_shape for w in weights for part in w.slices}
        >>> tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        >>> save_file(tensors, source / "model.safetensors")
        >>> params = models.load(source).params
        >>> models.save(source / "bfloat16", params, source, dtype="bfloat16")
        >>> sorted(path.name for path in (source / "bfloat16").iterdir())
        ['config.json', 'model.safetensors']
    """
    source = hub.resolve_checkpoint_folder(source)
    arrays = _flatten_model_params(params)
    with open_checkpoint(source) as reader, create_folder_atomically(folder) as partial_folder:
        checkpoint_format = read_checkpoint_format(source, reader, options)
        weights = match_checkpoint_names(checkpoint_format, reader)
        stored = match_stored_tensors(checkpoint_format, reader)
        weight_mapping.check_checkpoint_tensors(
            reader, stored, checkpoint_format.passthrough_pattern
        )
        stored_keys = {
            part.key: stored_part.key
            for path, weight in weights.items()
            for part, stored_part in zip(weight.slices, stored[path].slices, strict=True)
        }
        _check_params_match_source(arrays, weights)
        specs = weight_mapping.output_tensor_specs(
            weights,
            lambda key: _resolve_save_dtype(reader.headers[stored_keys[key]].dtype, dtype),
        )
        tied_keys = {
            key: original
            for key, original in checkpoint_format.tied_keys.items()
            if key in reader.headers
        }
        specs |= {key: specs[original] for key, original in tied_keys.items()}
        copied = {key: header for key, header in reader.headers.items() if key not in specs}
        get_weight_tensor = weight_mapping.make_tensor_getter(weights, arrays)

        def get_tensor(key: str) -> np.ndarray:
            if key in copied:
                return reader.read_bytes(key)
            with np.errstate(over="ignore"):  # An overflow raises an error below.
                tensor = get_weight_tensor(tied_keys.get(key, key))
                tensor = tensor.astype(specs[key][0], order="C", copy=False)
            if not _is_finite(tensor):
                raise ValueError(
                    f"{key} holds NaN or Inf in {tensor.dtype}; nothing was written. Export an "
                    f"earlier checkpoint, or use a dtype of a wider range."
                )
            return tensor

        tensor_specs = {
            key: TensorSpec.from_array(jax.ShapeDtypeStruct(shape, kind))
            for key, (kind, shape) in specs.items()
        }
        tensor_specs |= {
            key: TensorSpec(header.dtype, header.shape, header.num_bytes)
            for key, header in copied.items()
        }
        write_shards(
            partial_folder,
            tensor_specs,
            get_tensor,
            metadata=reader.metadata or {"format": "pt"},
            max_shard_size=max_shard_size,
        )
        _copy_companion_files(source, partial_folder)
        config_path = partial_folder / "config.json"
        if dtype is not None:
            _write_config_dtype(config_path, np.dtype(dtype).name)
        if checkpoint_format.is_untied:
            _write_config_fields(config_path, tie_word_embeddings=False)


def _is_finite(tensor: np.ndarray) -> bool:
    """Returns whether all entries are finite, without temporary arrays of the tensor's size."""
    entries = tensor.reshape(-1)
    starts = range(0, entries.size, _CHECKED_ENTRIES)
    return all(np.isfinite(entries[start : start + _CHECKED_ENTRIES]).all() for start in starts)


# Entries that are checked at a time.
_CHECKED_ENTRIES = 1 << 22


def _flatten_model_params(params: PyTree) -> dict[str, Any]:
    flat = _tree.flatten_with_paths(params)
    return dict(zip(flat.paths, flat.leaves, strict=True))


def _resolve_save_dtype(stored_dtype: str, requested_dtype: jax.typing.DTypeLike | None) -> Any:
    dtype = FLOAT_DTYPES[stored_dtype] if requested_dtype is None else np.dtype(requested_dtype)
    if dtype not in FLOAT_DTYPES.values():
        names = ", ".join(known.name for known in FLOAT_DTYPES.values())
        raise ValueError(f"dtype={dtype} must be one of {names}, the types of checkpoints.")
    return dtype


def _check_params_match_source(
    arrays: Mapping[str, Any], weights: Mapping[str, CheckpointWeight]
) -> None:
    problems = [f"{path} is unknown" for path in arrays if path not in weights]
    problems += [f"{path} is missing" for path in weights if path not in arrays]
    problems += [
        f"{path} has shape {arrays[path].shape} instead of {weight.shape}"
        for path, weight in weights.items()
        if path in arrays and tuple(arrays[path].shape) != weight.shape
    ]
    if problems:
        raise ValueError(
            f"params must have the names and shapes of the source's weights: "
            f"{format_names(problems)}. Pass the result of `load`, merged but not reshaped, and "
            f"the options that it was loaded with."
        )


def _write_config_dtype(config_path: Path, dtype_name: str) -> None:
    """Sets the dtype in a config.json, because readers round the weights to it."""
    config_dict = read_json(config_path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config_dict] or ["dtype"]
    _write_config_fields(config_path, **dict.fromkeys(keys, dtype_name))


def _write_config_fields(config_path: Path, **fields: Any) -> None:
    text = json.dumps({**read_json(config_path), **fields}, indent=2)
    config_path.write_text(text + "\n", encoding="utf-8")


def _copy_companion_files(source: Path, folder: Path) -> None:
    """Copies the files that accompany the weights.

    Modules after the model, such as the pooling of a sentence encoder, are copied with theirs.
    """
    files = [
        file
        for file in source.iterdir()
        if (file.suffix in _COMPANION_SUFFIXES or file.name.startswith(_COMPANION_PREFIXES))
        and not _OTHER_WEIGHTS_PATTERN.fullmatch(file.name)
    ]
    for subfolder in ("*_Pooling", "*_Dense", "*_LayerNorm", "additional_chat_templates"):
        files += source.glob(f"{subfolder}/*")
    for file in files:
        if not file.is_dir():
            check_regular_file(file)  # A link to nothing is not left out.
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
