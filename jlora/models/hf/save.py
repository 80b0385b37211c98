"""jlora.models.hf.save."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.checkpoints import hub
from jlora.checkpoints.safetensors_io import (
    ITEM_BYTES,
    create_folder_atomically,
    format_names,
    open_checkpoint,
    read_json,
    write_shards,
)
from jlora.models.hf import weight_mapping
from jlora.models.hf.load import (
    PyTree,
    _flatten_model_params,
    _match_checkpoint_names,
    _read_checkpoint_format,
    _resolve_save_dtype,
)

MAX_SHARD_SIZE = 5_000_000_000

# What stands beside the weights and does not depend on them.
_COMPANION_FILE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE*",
)


def save(
    folder: str | os.PathLike[str],
    params: PyTree,
    source: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    **options: Any,
) -> None:
    """Writes a Hugging Face folder with `params`, and with the files of `source` beside them.

    The folder appears whole or not at all.

    Args:
        folder: Must not exist yet.
        params: As `load` returns them, merged or trained.
        source: The folder that they were loaded from. Its config and tokenizer are copied, and
            tensors that the model does not compute with.
        dtype: Of the files; each tensor's own in the source when left out.
        max_shard_size: No file is larger, unless one tensor alone is.
        **options: Those that `params` were loaded with.

    Raises:
        FileExistsError: `folder` exists; it is left as it was.
        ValueError: `params` are not the source's weights by name and shape, or not finite.
    """
    source = hub.resolve_checkpoint_folder(source)
    arrays = _flatten_model_params(params)
    with open_checkpoint(source) as tensors, create_folder_atomically(folder) as partial:
        form = _read_checkpoint_format(source, tensors, options)
        weights = _match_checkpoint_names(form, tensors)
        weight_mapping.check_checkpoint_tensors(tensors, weights, form.passthrough_pattern)
        _check_params_match_source(arrays, weights)
        own = weight_mapping.output_tensor_specs(
            weights, lambda key: _resolve_save_dtype(tensors.headers[key].dtype, dtype)
        )
        copies = {copy: of for copy, of in form.tied_keys.items() if copy in tensors.headers}
        own |= {copy: own[of] for copy, of in copies.items()}
        rest = {key: header for key, header in tensors.headers.items() if key not in own}
        make = weight_mapping.make_tensor_getter(weights, arrays)

        def tensor(key: str) -> np.ndarray:
            if key in rest:
                return tensors.read(key)
            with np.errstate(over="ignore"):  # It is an error below.
                made = make(copies.get(key, key)).astype(own[key][0])
            if not np.isfinite(made).all():
                raise ValueError(
                    f"{key} holds NaN or Inf in {made.dtype}; nothing was written. Export an "
                    f"earlier checkpoint, or to a dtype of a wider range."
                )
            return made

        sizes = {key: math.prod(shape) * kind.itemsize for key, (kind, shape) in own.items()}
        sizes |= {key: math.prod(h.shape) * ITEM_BYTES[h.dtype] for key, h in rest.items()}
        metadata = tensors.metadata or {"format": "pt"}
        write_shards(partial, sizes, tensor, metadata=metadata, max_shard_size=max_shard_size)
        _copy_companion_files(source, partial)
        if dtype is not None:
            _write_config_dtype(partial / "config.json", np.dtype(dtype).name)


def _check_params_match_source(
    arrays: Mapping[str, Any], weights: Mapping[str, weight_mapping.CheckpointWeight]
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
            f"params are not the weights of the source: {format_names(problems)}. Give what `load` "
            f"returned, merged but not reshaped, and the options that it was loaded with."
        )


def _write_config_dtype(config_path: Path, dtype_name: str) -> None:
    """Writes into a config.json of which type the weights are: readers round to what it says."""
    raw = read_json(config_path)
    keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["dtype"]
    text = json.dumps({**raw, **dict.fromkeys(keys, dtype_name)}, indent=2)
    config_path.write_text(text + "\n", encoding="utf-8")


def _copy_companion_files(source: Path, folder: Path) -> None:
    """Copies the files that stand beside the weights."""
    for file in (file for pattern in _COMPANION_FILE_PATTERNS for file in source.glob(pattern)):
        if file.is_file():
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
