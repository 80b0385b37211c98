"""Loading of models from Hugging Face checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jlora._quantized_array import abstract_with_sharding, maybe_dequantize
from jlora._tree import PyTree
from jlora.checkpoints import hub
from jlora.checkpoints.safetensors_io import CheckpointReader, open_checkpoint
from jlora.checkpoints.stored_weight import StoredWeight
from jlora.checkpoints.text_files import name_file_in_errors, read_json, read_optional_json
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder
from jlora.models.hf import weight_mapping
from jlora.models.hf.decoder_configs import DECODER_PARSERS, decoder_config
from jlora.models.hf.encoder_configs import ENCODER_PARSERS, encoder_config, vit_config
from jlora.models.hf.weight_mapping import CheckpointWeight, Sharding
from jlora.models.hf.weight_names import (
    CHECKPOINT_NAMINGS,
    map_decoder_weights,
    map_encoder_weights,
    map_vit_weights,
)
from jlora.models.vit import ViT
from jlora.quantization.quantize import check_finite_qarrays, match_schemes
from jlora.quantization.schemes import QuantizationScheme


class LoadedModel(NamedTuple):
    """A model and its parameters.

    Attributes:
        model: Flax module; `model.apply(params, ...)` computes its outputs.
        params: Parameters, `{"params": ...}`.

    Example:
        >>> from jlora import models
        >>> loaded = models.LoadedModel(model=None, params={"params": {}})
        >>> model, params = loaded
    """

    model: Any
    params: dict[str, Any]


class CheckpointFormat(NamedTuple):
    """Model of a checkpoint, and the names of its tensors.

    Attributes:
        model: Model that config.json describes.
        weights: Tensors of each weight of the model, by path.
        passthrough_pattern: Names of tensors that the model does not use.
        key_renamers: Functions from the tensor names in `weights` to alternative names; a
            checkpoint uses the names of one of them throughout.
        tied_keys: Names of tensors that repeat a weight, with the name of the weight's tensor.
        is_untied: Whether the head has a weight of its own, though config.json ties it.
    """

    model: Any
    weights: dict[str, CheckpointWeight]
    passthrough_pattern: re.Pattern[str]
    key_renamers: Sequence[Callable[[str], str]]
    tied_keys: Mapping[str, str] = types.MappingProxyType({})
    is_untied: bool = False


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], Sharding | None] | None = None,
    quantize: Mapping[str, QuantizationScheme | None] | None = None,
    revision: str | None = None,
    **options: Any,
) -> LoadedModel:
    """Loads the model and the parameters of a Hugging Face checkpoint.

    Args:
        folder: Folder with config.json and safetensors files. `owner/name` is downloaded from the
            Hub, unless a local folder has that name.
        dtype: dtype of the parameters. None: that of the files.
        sharding: Function from the path and abstract value of a parameter to its sharding, or to
            None for the default device. Each parameter is read directly to its devices, so that no
            device or host ever stores more than its shards. None: all on the default device.
        quantize: Quantization schemes by pattern of paths, as for `jlora.quantize`. Such a
            parameter is quantized layer by layer while it is read, and never exists unquantized as
            one array. None: no quantization.
        revision: Branch, tag or commit on the Hub. None: the default branch.
        **options: Fields of `Decoder`: `scan_layers`, `remat_policy`, `attention_implementation`.
            For a computation in another dtype than that of the parameters, use
            `model.clone(dtype=...)`. With `tie_word_embeddings=False`, a head that shares the
            embedding's weight gets a copy of its own.

    Returns:
        The model and its parameters. Where config.json ties the head to the embedding and the files
        have a head of other values, the head has its own weight, as in transformers, and a
        `UserWarning` says so.

    Raises:
        FileNotFoundError: A file or the folder is missing.
        OSError: The Hub cannot be reached.
        ValueError: config.json has values that are not implemented, a file is damaged, the tensors
            are not those that config.json describes, or `quantize` does not fit them.
        TypeError: The model has no such option.

    Example:
        `models.load("Qwen/Qwen3-0.6B")` downloads a checkpoint. Here is one of zeros:

        >>> import json, pathlib, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> from jlora import models
        >>> config = dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...               num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> weights = models.checkpoint_mapping(models.model_from_config(folder))[0].values()
        >>> shapes = {part.key: part.tensor_shape for w in weights for part in w.slices}
        >>> tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        >>> save_file(tensors, folder / "model.safetensors")
        >>> model, params = models.load(folder, dtype="bfloat16", scan_layers=True)
        >>> params["params"]["layers"]["attention"]["q"]["kernel"].shape
        (2, 8, 8)
    """
    folder = hub.resolve_checkpoint_folder(folder, revision)
    with open_checkpoint(folder) as reader:
        checkpoint_format, weights = _read_checked_format(folder, reader, options)
        schemes = _match_quantization_schemes(quantize, weights)
        sharding = sharding or (lambda path, abstract_array: None)
        arrays = weight_mapping.load_weights(reader, weights, dtype, sharding, schemes)
        if schemes:
            check_finite_qarrays({path: arrays[path] for path in schemes})
    return LoadedModel(checkpoint_format.model, traverse_util.unflatten_dict(arrays, sep="/"))


_COLLECTED_BYTES = 1 << 26


@contextlib.contextmanager
def open_model(
    folder: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    quantize: Mapping[str, QuantizationScheme | None] | None = None,
    device: Any = None,
    **options: Any,
) -> Iterator[LoadedModel]:
    """Opens a checkpoint whose weights are read one by one, whenever one is needed.

    Args:
        folder: As for `load`.
        dtype: As for `load`.
        quantize: As for `load`; a weight that is read is quantized and dequantized.
        device: Device of the arrays that are read. None: JAX's default device.
        **options: As for `load`.

    Yields:
        The model and its parameters as `StoredWeight`s, which can be read in the block.

    Raises:
        FileNotFoundError: As from `load`.
        ValueError: As from `load`.
        TypeError: As from `load`.
    """
    folder = hub.resolve_checkpoint_folder(folder)
    with open_checkpoint(folder) as reader:
        checkpoint_format, weights = _read_checked_format(folder, reader, options)
        schemes = _match_quantization_schemes(quantize, weights)
        sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

        def read(path: str) -> jax.Array:
            one, chosen = {path: weights[path]}, {path: schemes[path]} if path in schemes else {}
            arrays = weight_mapping.load_weights(reader, one, dtype, lambda *_: sharding, chosen)
            jax.block_until_ready(arrays)
            if arrays[path].nbytes > _COLLECTED_BYTES:
                gc.collect()  # A cycle in JAX's callback keeps the tensor as it was read.
            return maybe_dequantize(arrays[path])

        stored = {
            path: StoredWeight(
                weight.shape,
                weight_mapping.stored_dtype(reader, weight, dtype),
                functools.partial(read, path),
            )
            for path, weight in weights.items()
        }
        yield LoadedModel(checkpoint_format.model, traverse_util.unflatten_dict(stored, sep="/"))


def model_from_config(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Returns the model of a checkpoint without its parameters.

    For a decoder, the folder needs no file except config.json. If that ties the head to the
    embedding, and the folder has weights, they decide as in `load`.

    Args:
        folder: Local folder, as for `load`.
        **options: Options of the model, as for `load`.

    Raises:
        FileNotFoundError: A file or the folder is missing.
        ValueError: As from `load`.
        TypeError: The model has no such option.

    Example:
        >>> import json, pathlib, tempfile
        >>> from jlora import models
        >>> config = dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...               num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> models.model_from_config(folder, remat_policy="full").config.num_heads
        2
    """
    folder = Path(folder)
    config_dict = read_json(folder / "config.json")
    is_decoder = config_dict.get("model_type") in DECODER_PARSERS
    if is_decoder and not any(folder.glob("*.safetensors")):
        path = folder / "config.json"
        with name_file_in_errors(path):
            _check_declared_sizes(path, config_dict, 10_000, 1 << 20)
        return _build_decoder_format(config_dict, str(path), None, options).model
    with open_checkpoint(folder) as reader:
        return read_checkpoint_format(folder, reader, options).model


def abstract_params(
    model: Any,
    dtype: jax.typing.DTypeLike,
    *,
    sharding: Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    quantize: Mapping[str, QuantizationScheme | None] | None = None,
) -> PyTree:
    """Returns the abstract values of the parameters that `load` returns, without any file.

    Args:
        model: A model of `jlora.models`.
        dtype: dtype of the parameters.
        sharding: Function from the path and abstract value of a parameter to its sharding, which
            the result then carries. None: no shardings.
        quantize: Quantization schemes by pattern of paths, as for `load`.

    Raises:
        ValueError: `quantize` does not fit the parameters.
        TypeError: The model is not one of `jlora.models`.

    Example:
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> params = models.abstract_params(models.Decoder(config), "bfloat16")
        >>> params["params"]["embed"]["embedding"]
        ShapeDtypeStruct(shape=(32, 8), dtype=bfloat16)
    """
    weights = checkpoint_mapping(model)[0]
    schemes = _match_quantization_schemes(quantize, weights)

    def abstract(path: str, weight: CheckpointWeight) -> Any:
        value: Any = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype))
        value_sharding = None if sharding is None else sharding(path, value)
        if path in schemes:
            value = weight_mapping.abstract_quantized_weight(weight, dtype, schemes[path])
        return value if value_sharding is None else abstract_with_sharding(value, value_sharding)

    flat = {path: abstract(path, weight) for path, weight in weights.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def checkpoint_mapping(model: Any) -> tuple[dict[str, CheckpointWeight], ...]:
    """Returns which tensors of a transformers checkpoint each parameter consists of, by path.

    The first mapping has the names of transformers 5 in memory. The others have the names of other
    releases, and of models with or without a head.

    Args:
        model: A model of `jlora.models`.

    Raises:
        TypeError: The model is not one of `jlora.models`.

    Example:
        >>> from jlora import models
        >>> from jlora.models import decoder_config
        >>> config = decoder_config(
        ...     dict(model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=16,
        ...          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
        ... )
        >>> mapping, _ = models.checkpoint_mapping(models.Decoder(config, scan_layers=True))
        >>> [part.key for part in mapping["params/layers/mlp/up/kernel"].slices]
        ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    list_mappings = _MAPPING_BUILDERS.get(type(model))
    if list_mappings is None:
        raise TypeError(
            f"model must be a Decoder, an Encoder or a ViT of jlora.models, got "
            f"{type(model).__name__}."
        )
    return list_mappings(model)


def eos_token_ids(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns the tokens that end a text, from generation_config.json or else config.json.

    Args:
        folder: Local folder of a checkpoint.

    Returns:
        Token ids; empty if neither file has any.

    Raises:
        FileNotFoundError: A file is a folder, or a link to nothing.
        ValueError: A file is damaged.

    Example:
        >>> import pathlib, tempfile
        >>> from jlora import models
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
        >>> models.eos_token_ids(folder)
        (2, 7)
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        value = (read_optional_json(path) or {}).get("eos_token_id")
        if value is None:
            continue
        token_ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in token_ids):
            raise ValueError(
                f"{path}: eos_token_id={value!r:.200} must be a token id or a list of "
                f"them. Copy it from the checkpoint's original files."
            )
        return tuple(token_ids)
    return ()


def check_loadable(folder: str | os.PathLike[str], **options: Any) -> None:
    """Checks that `load` can read a checkpoint, from the headers of its files.

    Args:
        folder: Local folder, as for `load`.
        **options: Options of the model, as for `load`.

    Raises:
        FileNotFoundError: A file or the folder is missing.
        ValueError: As from `load`.
    """
    folder = Path(folder)
    with open_checkpoint(folder) as reader:
        _read_checked_format(folder, reader, options)


def example_inputs(model: Any) -> tuple[Any, ...]:
    """Returns the abstract values of the smallest inputs that a model of `jlora.models` takes."""
    if isinstance(model, ViT):
        c = model.config
        return (jax.ShapeDtypeStruct((1, *c.image_size, c.num_channels), jnp.float32),)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return (tokens, tokens) if isinstance(model, Encoder) else (tokens,)


def _read_checked_format(
    folder: Path, reader: CheckpointReader, options: Mapping[str, Any]
) -> tuple[CheckpointFormat, dict[str, CheckpointWeight]]:
    """Returns the format and the weights with their tensors, checked against the files' headers."""
    checkpoint_format = read_checkpoint_format(folder, reader, options)
    weights = match_stored_tensors(checkpoint_format, reader)
    pattern = checkpoint_format.passthrough_pattern
    weight_mapping.check_checkpoint_tensors(reader, weights, pattern)
    return checkpoint_format, weights


def read_checkpoint_format(
    folder: Path, reader: CheckpointReader, options: Mapping[str, Any]
) -> CheckpointFormat:
    """Returns the format of a checkpoint, by its config.json.

    Args:
        folder: Folder of the checkpoint.
        reader: Reader of the checkpoint.
        options: Options of the model, as for `load`.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: config.json is damaged or has values that are not implemented.
        TypeError: The model has no such option.
    """
    path = folder / "config.json"
    config_dict = read_json(path)
    model_type = config_dict.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FORMAT_BUILDERS:
        raise ValueError(
            f"{path}: model_type={model_type!r} is not implemented, must be one of "
            f"{sorted(_FORMAT_BUILDERS)}."
        )
    _check_numbers_of_layers(config_dict, path, reader)
    axis_sizes = [size for header in reader.headers.values() for size in header.shape]
    _check_declared_sizes(path, config_dict, len(reader.headers), max(axis_sizes, default=0))
    return _FORMAT_BUILDERS[model_type](config_dict, str(path), reader, options)


# Of one layer; published models have up to 512.
_MAX_EXPERTS = 4096


def _check_declared_sizes(
    path: Path, config_dict: Mapping[str, Any], num_tensors: int, max_axis_size: int
) -> None:
    """Checks the sizes in a config.json before anything of these sizes is built.

    Raises:
        ValueError: There are more layers than tensors, or a size exceeds that of every axis.
    """
    limits = (
        ("^n(um)?(_hidden)?_layers$", num_tensors, "tensors of the files"),
        ("experts$", _MAX_EXPERTS, "experts that a layer may have"),
        ("^(qk_\\w+_|v_)?head_dim$", max_axis_size, "entries of the longest axis in the files"),
    )
    for name, value in config_dict.items():
        for pattern, limit, meaning in limits:
            if type(value) is int and value > limit and re.search(pattern, name):
                raise ValueError(
                    f"{path}: {name}={value} is more than the {limit} {meaning}. Use files that "
                    f"one `save_pretrained` wrote."
                )


# Fields of a config.json that count layers or experts, with the names of their tensors.
_COUNTED_TENSORS = (
    (("num_hidden_layers", "n_layers"), re.compile(r"(?:^|\.)layers?\.(\d+)\.")),
    (("num_experts", "num_local_experts"), re.compile(r"\.experts\.(\d+)\.")),
)


def _check_numbers_of_layers(
    config_dict: Mapping[str, Any], path: Path, reader: CheckpointReader
) -> None:
    """Raises an error for more layers or experts than the files hold, before a model of them."""
    for names, pattern in _COUNTED_TENSORS:
        indices = {int(match[1]) for key in reader.headers if (match := pattern.search(key))}
        for name in names:
            count = config_dict.get(name)
            if type(count) is int and indices and count > max(indices) + 1:
                raise ValueError(
                    f"{path}: {name}={count}, but the files of the checkpoint hold only "
                    f"{max(indices) + 1}. Use a config.json and files that one `save_pretrained` "
                    f"wrote."
                )


def match_checkpoint_names(
    checkpoint_format: CheckpointFormat, reader: CheckpointReader
) -> dict[str, CheckpointWeight]:
    """Returns the weights with the tensor names that a checkpoint uses."""
    keys = [part.key for weight in checkpoint_format.weights.values() for part in weight.slices]

    def count_matches(rename: Callable[[str], str]) -> int:
        return sum(rename(key) in reader.headers for key in keys)

    rename = max(checkpoint_format.key_renamers, key=count_matches)  # The first of the best ones.
    return _rename_tensors(checkpoint_format.weights, rename)


def match_stored_tensors(
    checkpoint_format: CheckpointFormat, reader: CheckpointReader
) -> dict[str, CheckpointWeight]:
    """Returns the weights with the names of the tensors to read them from.

    They are those of `match_checkpoint_names`, unless the embedding or the head is not stored: one
    is then read from the tensor of the other.
    """
    weights = match_checkpoint_names(checkpoint_format, reader)
    is_tied = bool(checkpoint_format.tied_keys)
    if not is_tied and not checkpoint_format.is_untied:
        return weights
    embedding_key = weights[_EMBEDDING_PATH].slices[0].key
    missing = {_EMBEDDING_PATH: (embedding_key, _HEAD_KEY), _HEAD_PATH: (_HEAD_KEY, embedding_key)}
    for path, (key, other) in missing.items():
        if path in weights and key not in reader.headers and other in reader.headers:
            part = weights[path].slices[0]._replace(key=other)
            weights[path] = weights[path]._replace(slices=(part,))
    return weights


def tied_modules(model: Any) -> dict[str, str]:
    """Returns the path of the weight that each tied module of a checkpoint shares, by module.

    Args:
        model: A model of `jlora.models`.
    """
    if isinstance(model, Decoder) and model.config.tie_word_embeddings:
        return {_HEAD_KEY.removesuffix(".weight"): _EMBEDDING_PATH}
    return {}


def is_head_tied_by_config(model: Any) -> bool | None:
    """Returns whether config.json ties a model's head to its embedding; None for a function.

    The head may have a weight of its own nevertheless.
    """
    if isinstance(model, Decoder):
        return model.config.tie_word_embeddings or model.config.has_separated_head
    return False if hasattr(model, "apply") else None


def _match_quantization_schemes(
    quantize: Mapping[str, QuantizationScheme | None] | None,
    weights: Mapping[str, CheckpointWeight],
) -> dict[str, QuantizationScheme]:
    """Returns the quantization schemes of the weights that are quantized, by path."""
    if quantize is None:
        return {}
    abstract = {path: jax.ShapeDtypeStruct(w.shape, jnp.float32) for path, w in weights.items()}
    return match_schemes(quantize, abstract)


def _instantiate_model(model_class: Any, config: Any, options: Mapping[str, Any]) -> Any:
    """Returns a model with the caller's options."""
    fields = [field.name for field in dataclasses.fields(model_class)]
    known = sorted(set(fields) - {"config", "dtype", "parent", "name"})
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"Unknown options {unknown} of {model_class.__name__}, which has {known}. Leave them "
            f"out."
        )
    return model_class(config, **options)


# --- formats by model type ------------------------------------------------------------------------


# The embedding and the head of a decoder, which may be one weight.
_EMBEDDING_PATH, _HEAD_PATH = "params/embed/embedding", "params/head"
_EMBEDDING_KEY, _HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"


def _build_decoder_format(
    config_dict: Mapping[str, Any],
    location: str,
    reader: CheckpointReader | None,
    options: Mapping[str, Any],
) -> CheckpointFormat:
    with name_file_in_errors(location):
        config = decoder_config(config_dict, location)
    options = dict(options)
    keeps_tie = options.pop("tie_word_embeddings", config.tie_word_embeddings)
    if keeps_tie not in (False, config.tie_word_embeddings):
        raise ValueError(
            f"tie_word_embeddings={keeps_tie!r} must be False, which gives the head of {location} "
            f"its own weight. Leave it out to follow config.json."
        )
    is_untied = config.tie_word_embeddings and (not keeps_tie or _has_other_head(reader))
    if is_untied:
        config = dataclasses.replace(config, tie_word_embeddings=False, has_separated_head=True)
    model = _instantiate_model(Decoder, config, options)
    # Early releases stored the frequencies of rotary positions, and some a head that repeats the
    # embedding.
    passthrough, tied_keys = r".*inv_freq", {}
    if config.tie_word_embeddings:
        passthrough = r".*rotary_emb\.inv_freq|lm_head\.weight"
        tied_keys = {_HEAD_KEY: _EMBEDDING_KEY}
    # Checkpoints of base models have names without the prefix.
    renamers = (str, _strip_model_prefix)
    with name_file_in_errors(location):
        weights = map_decoder_weights(model)
    pattern = re.compile(passthrough)
    return CheckpointFormat(model, weights, pattern, renamers, tied_keys, is_untied)


def _has_other_head(reader: CheckpointReader | None) -> bool:
    """Returns True if a checkpoint has a head that differs from its embedding.

    Raises:
        ValueError: The head has another shape.
    """
    if reader is None or _HEAD_KEY not in reader.headers:
        return False
    embedding_key = next(
        (
            key
            for key in (_EMBEDDING_KEY, _strip_model_prefix(_EMBEDDING_KEY))
            if key in reader.headers
        ),
        None,
    )
    if embedding_key is None:
        return False
    shape, expected = reader.headers[_HEAD_KEY].shape, reader.headers[embedding_key].shape
    if shape != expected:
        raise ValueError(
            f"{reader.folder}: config.json has tie_word_embeddings=true, and {_HEAD_KEY} has shape "
            f"{shape} instead of the {expected} of {embedding_key}. Set tie_word_embeddings=false "
            f"if the head has a weight of its own, or use files that one `save_pretrained` wrote."
        )
    for start in range(0, shape[0], _ROWS_PER_READ):  # Not both tables at once.
        rows = (slice(start, min(start + _ROWS_PER_READ, shape[0])), slice(None))
        if not np.array_equal(reader.read(_HEAD_KEY, rows), reader.read(embedding_key, rows)):
            warnings.warn(
                f"{reader.folder}: config.json has tie_word_embeddings=true, and {_HEAD_KEY} "
                f"differs from {embedding_key}. The head is loaded as a weight of its own. Set "
                f"tie_word_embeddings=false in config.json.",
                stacklevel=2,
            )
            return True
    return False


_ROWS_PER_READ = 4096


def _build_encoder_format(
    config_dict: Mapping[str, Any],
    location: str,
    reader: CheckpointReader,
    options: Mapping[str, Any],
) -> CheckpointFormat:
    naming = CHECKPOINT_NAMINGS[config_dict["model_type"]]
    with name_file_in_errors(location):
        config = encoder_config(config_dict, location, has_pooler=naming.has_pooler(reader.headers))
    model = _instantiate_model(Encoder, config, options)
    with name_file_in_errors(location):
        weights = map_encoder_weights(model, naming)
    return CheckpointFormat(model, weights, naming.passthrough_pattern, naming.key_renamers)


def _build_vit_format(
    config_dict: Mapping[str, Any],
    location: str,
    reader: CheckpointReader,
    options: Mapping[str, Any],
) -> CheckpointFormat:
    naming = CHECKPOINT_NAMINGS["vit"]
    with name_file_in_errors(location):
        config = vit_config(config_dict, location, has_pooler=naming.has_pooler(reader.headers))
    model = _instantiate_model(ViT, config, options)
    with name_file_in_errors(location):
        weights = map_vit_weights(model, naming)
    return CheckpointFormat(model, weights, naming.passthrough_pattern, naming.key_renamers)


_FORMAT_BUILDERS: dict[
    str, Callable[[Mapping[str, Any], str, CheckpointReader, Mapping[str, Any]], CheckpointFormat]
] = {
    **dict.fromkeys(DECODER_PARSERS, _build_decoder_format),
    **dict.fromkeys(ENCODER_PARSERS, _build_encoder_format),
    "vit": _build_vit_format,
}


# --- tensor names by class of models --------------------------------------------------------------


def _list_decoder_mappings(model: Decoder) -> tuple[dict[str, CheckpointWeight], ...]:
    weights = map_decoder_weights(model)
    return weights, _rename_tensors(weights, _strip_model_prefix)


def _list_encoder_mappings(model: Encoder) -> tuple[dict[str, CheckpointWeight], ...]:
    naming = CHECKPOINT_NAMINGS[model.config.model_type]
    weights = map_encoder_weights(model, naming)
    prefixed, bare, *_ = (_rename_tensors(weights, rename) for rename in naming.key_renamers)
    return (bare, prefixed) if model.config.num_labels is None else (prefixed, bare)


def _list_vit_mappings(model: ViT) -> tuple[dict[str, CheckpointWeight], ...]:
    naming = CHECKPOINT_NAMINGS["vit"]
    weights = map_vit_weights(model, naming)
    file_prefixed, file_bare, prefixed, bare = (
        _rename_tensors(weights, rename) for rename in naming.key_renamers
    )
    if model.config.num_labels is None:
        return bare, prefixed, file_bare, file_prefixed
    return prefixed, bare, file_prefixed, file_bare


_MAPPING_BUILDERS: dict[type, Callable[[Any], tuple[dict[str, CheckpointWeight], ...]]] = {
    Decoder: _list_decoder_mappings,
    Encoder: _list_encoder_mappings,
    ViT: _list_vit_mappings,
}


def _strip_model_prefix(key: str) -> str:
    return key.removeprefix("model.")


def _rename_tensors(
    weights: Mapping[str, CheckpointWeight], rename: Callable[[str], str]
) -> dict[str, CheckpointWeight]:
    """Returns the same weights with other names for their tensors."""
    return {
        path: weight._replace(
            slices=tuple(part._replace(key=rename(part.key)) for part in weight.slices)
        )
        for path, weight in weights.items()
    }
