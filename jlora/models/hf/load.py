"""Models from Hugging Face folders, and folders from models."""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jlora import _tree
from jlora._quantized_array import abstract_with_sharding
from jlora._tree import PyTree
from jlora.checkpoints import hub
from jlora.checkpoints.safetensors_io import (
    FLOAT_DTYPES,
    CheckpointReader,
    open_checkpoint,
    read_json,
)
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder
from jlora.models.hf import weight_mapping
from jlora.models.hf.decoder_configs import DECODER_PARSERS, decoder_config
from jlora.models.hf.encoder_configs import ENCODER_PARSERS, encoder_config, vit_config
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
    """A model and its weights.

    Attributes:
        model: `model.apply(params, ...)` computes.
        params: `{"params": ...}`.
    """

    model: Any
    params: dict[str, Any]


class _CheckpointFormat(NamedTuple):
    """What a folder of one model type holds.

    Attributes:
        model: Made from config.json.
        weights: Which tensors each of its weights is.
        passthrough_pattern: The names of tensors that are none of the model's, but belong to its files.
        key_renamers: From the names in `weights` to those that a checkpoint may have instead; each
            keeps to one of them.
        tied_keys: Of carried tensors that repeat a weight, the name of the weight's own.
    """

    model: Any
    weights: dict[str, weight_mapping.CheckpointWeight]
    passthrough_pattern: re.Pattern[str]
    key_renamers: Sequence[Callable[[str], str]]
    tied_keys: Mapping[str, str] = types.MappingProxyType({})


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], weight_mapping.Sharding | None] | None = None,
    quantize: Mapping[str, QuantizationScheme | None] | None = None,
    revision: str | None = None,
    **options: Any,
) -> LoadedModel:
    """The model and the weights of a Hugging Face folder.

    Args:
        folder: Holds config.json and safetensors files. `owner/name` is fetched from the Hub,
            unless there is a folder of that name here.
        dtype: Of the weights; that of the files when left out.
        sharding: `(path, shape)` of a weight to where it belongs. Each weight is read right to
            there, so that no device or host ever holds more than its part.
        quantize: From patterns of paths to schemes, as `jlora.quantize` takes them. Such a weight
            is quantised layer by layer while it is read, and is nowhere whole as it was.
        revision: A branch, tag or commit on the Hub.
        **options: Of `Decoder`'s own: `scanned`, `remat`, `implementation`. For a computation in
            another dtype than the weights', use `model.clone(dtype=...)`.

    Raises:
        FileNotFoundError: Something is missing.
        OSError: The Hub cannot be reached.
        ValueError: config.json asks for something that is not implemented, a file is damaged, the
            tensors are not those that config.json describes, or `quantize` does not fit them.
        TypeError: The model has no such option.
    """
    folder = hub.resolve_checkpoint_folder(folder, revision)
    with open_checkpoint(folder) as tensors:
        form = _read_checkpoint_format(folder, tensors, options)
        weights = _match_checkpoint_names(form, tensors)
        weight_mapping.check_checkpoint_tensors(tensors, weights, form.passthrough_pattern)
        schemes = _match_quantization_schemes(quantize, weights)
        where = sharding or (lambda path, shape: None)
        arrays = weight_mapping.load_weights(tensors, weights, dtype, where, schemes)
        check_finite_qarrays({path: arrays[path] for path in schemes})
    return LoadedModel(form.model, traverse_util.unflatten_dict(arrays, sep="/"))


def abstract_params(
    model: Any,
    dtype: jax.typing.DTypeLike,
    *,
    sharding: Callable[[str, jax.ShapeDtypeStruct], weight_mapping.Sharding] | None = None,
    quantize: Mapping[str, QuantizationScheme | None] | None = None,
) -> PyTree:
    """The shapes of what `load` returns as the params of a model, without its files.

    Args:
        model: Of `jlora.models`.
        dtype: Of the weights.
        sharding: As `load` takes it; the shapes then have it.
        quantize: As `load` takes it.

    Raises:
        ValueError: `quantize` does not fit the weights.
        TypeError: It is no model of `jlora.models`.
    """
    weights = checkpoint_mapping(model)[0]
    schemes = _match_quantization_schemes(quantize, weights)

    def shape(path: str, weight: weight_mapping.CheckpointWeight) -> Any:
        like: Any = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype))
        place = None if sharding is None else sharding(path, like)
        if path in schemes:
            like = weight_mapping.abstract_quantized_weight(weight, dtype, schemes[path])
        return like if place is None else abstract_with_sharding(like, place)

    flat = {path: shape(path, weight) for path, weight in weights.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _match_quantization_schemes(
    quantize: Mapping[str, QuantizationScheme | None] | None,
    weights: Mapping[str, weight_mapping.CheckpointWeight],
) -> dict[str, QuantizationScheme]:
    """Which weights are quantised, and how."""
    if quantize is None:
        return {}
    kinds = {path: jax.ShapeDtypeStruct(w.shape, jnp.float32) for path, w in weights.items()}
    return match_schemes(quantize, kinds)


def model_from_config(folder: str | os.PathLike[str], **options: Any) -> Any:
    """The model of a folder without its weights; for a decoder, config.json is enough.

    Args:
        folder: As `load` takes it, on this machine.
        **options: As `load` takes them.

    Raises:
        FileNotFoundError: Something is missing.
        ValueError: As from `load`.
        TypeError: The model has no such option.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") in DECODER_PARSERS:
        config = decoder_config(raw, str(folder / "config.json"))
        return _instantiate_model(Decoder, config, options)
    with open_checkpoint(folder) as tensors:
        return _read_checkpoint_format(folder, tensors, options).model


def check_loadable(folder: str | os.PathLike[str], **options: Any) -> None:
    """Checks that `load` can read a folder, by its headers.

    Raises:
        FileNotFoundError: Something is missing.
        ValueError: As from `load`.
    """
    folder = Path(folder)
    with open_checkpoint(folder) as tensors:
        form = _read_checkpoint_format(folder, tensors, options)
        weight_mapping.check_checkpoint_tensors(
            tensors, _match_checkpoint_names(form, tensors), form.passthrough_pattern
        )


def eos_token_ids(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json says, or else config.json."""
    found: Any = None
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            found = read_json(path).get("eos_token_id", found)
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def _read_checkpoint_format(
    folder: Path, reader: CheckpointReader, options: Mapping[str, Any]
) -> _CheckpointFormat:
    """What a folder holds, by its config.json."""
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _FORMAT_BUILDERS:
        raise ValueError(
            f"{path}: model_type={kind!r} is not implemented; {sorted(_FORMAT_BUILDERS)} are."
        )
    return _FORMAT_BUILDERS[kind](raw, str(path), reader, options)


def _build_decoder_format(
    config_dict: Mapping[str, Any],
    location: str,
    reader: CheckpointReader,
    options: Mapping[str, Any],
) -> _CheckpointFormat:
    model = _instantiate_model(Decoder, decoder_config(config_dict, location), options)
    # Old releases stored frequencies, and others the head that is the embedding.
    names = (
        r".*rotary_emb\.inv_freq|lm_head\.weight"
        if model.config.tie_word_embeddings
        else r".*inv_freq"
    )
    copies = (
        {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    )
    # Base models leave out the first part.
    spellings = (str, _strip_model_prefix)
    return _CheckpointFormat(
        model, map_decoder_weights(model), re.compile(names), spellings, copies
    )


def _build_encoder_format(
    config_dict: Mapping[str, Any],
    location: str,
    reader: CheckpointReader,
    options: Mapping[str, Any],
) -> _CheckpointFormat:
    naming = CHECKPOINT_NAMINGS[config_dict["model_type"]]
    config = encoder_config(config_dict, location, has_pooler=naming.has_pooler(reader.headers))
    model = _instantiate_model(Encoder, config, options)
    return _CheckpointFormat(
        model, map_encoder_weights(model, naming), naming.passthrough_pattern, naming.key_renamers
    )


def _build_vit_format(
    config_dict: Mapping[str, Any],
    location: str,
    reader: CheckpointReader,
    options: Mapping[str, Any],
) -> _CheckpointFormat:
    naming = CHECKPOINT_NAMINGS["vit"]
    config = vit_config(config_dict, location, has_pooler=naming.has_pooler(reader.headers))
    model = _instantiate_model(ViT, config, options)
    return _CheckpointFormat(
        model, map_vit_weights(model, naming), naming.passthrough_pattern, naming.key_renamers
    )


_FORMAT_BUILDERS: dict[
    str, Callable[[Mapping[str, Any], str, CheckpointReader, Mapping[str, Any]], _CheckpointFormat]
] = {
    **dict.fromkeys(DECODER_PARSERS, _build_decoder_format),
    **dict.fromkeys(ENCODER_PARSERS, _build_encoder_format),
    "vit": _build_vit_format,
}


def _instantiate_model(model_class: Any, config: Any, options: Mapping[str, Any]) -> Any:
    """A model with the caller's options."""
    fields = [field.name for field in dataclasses.fields(model_class)]
    known = sorted(set(fields) - {"config", "dtype", "parent", "name"})
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{unknown} are no options of {model_class.__name__}, which has {known}. Leave them out."
        )
    return model_class(config, **options)


def checkpoint_mapping(model: Any) -> tuple[dict[str, weight_mapping.CheckpointWeight], ...]:
    """Which tensors of transformers the weights of a model of `jlora.models` are, by path.

    The first ones have the names of transformers 5 in memory, the others those of other releases,
    and of base models or models with a head.
    """
    described = _MAPPING_BUILDERS.get(type(model))
    if described is None:
        raise TypeError(f"{type(model).__name__} is no model of jlora.models.")
    return described(model)


def _list_decoder_mappings(
    model: Decoder,
) -> tuple[dict[str, weight_mapping.CheckpointWeight], ...]:
    weights = map_decoder_weights(model)
    return weights, _rename_tensors(weights, _strip_model_prefix)


def _list_encoder_mappings(
    model: Encoder,
) -> tuple[dict[str, weight_mapping.CheckpointWeight], ...]:
    naming = CHECKPOINT_NAMINGS[model.config.model_type]
    weights = map_encoder_weights(model, naming)
    named, bare, *_ = (_rename_tensors(weights, spelling) for spelling in naming.key_renamers)
    return (bare, named) if model.config.num_labels is None else (named, bare)


def _list_vit_mappings(model: ViT) -> tuple[dict[str, weight_mapping.CheckpointWeight], ...]:
    naming = CHECKPOINT_NAMINGS["vit"]
    weights = map_vit_weights(model, naming)
    on_disk, bare_on_disk, named, bare = (_rename_tensors(weights, s) for s in naming.key_renamers)
    if model.config.num_labels is None:
        return bare, named, bare_on_disk, on_disk
    return named, bare, on_disk, bare_on_disk


_MAPPING_BUILDERS: dict[
    type, Callable[[Any], tuple[dict[str, weight_mapping.CheckpointWeight], ...]]
] = {
    Decoder: _list_decoder_mappings,
    Encoder: _list_encoder_mappings,
    ViT: _list_vit_mappings,
}


def example_inputs(model: Any) -> tuple[Any, ...]:
    """Inputs of the least size that a model of `jlora.models` takes, as shapes."""
    if isinstance(model, ViT):
        c = model.config
        return (jax.ShapeDtypeStruct((1, *c.image_size, c.num_channels), jnp.float32),)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return (tokens, tokens) if isinstance(model, Encoder) else (tokens,)


def _strip_model_prefix(key: str) -> str:
    return key.removeprefix("model.")


def _rename_tensors(
    weights: Mapping[str, weight_mapping.CheckpointWeight], rename: Callable[[str], str]
) -> dict[str, weight_mapping.CheckpointWeight]:
    """The same weights with other names for their tensors."""
    return {
        path: weight._replace(slices=tuple(p._replace(key=rename(p.key)) for p in weight.slices))
        for path, weight in weights.items()
    }


def _match_checkpoint_names(
    checkpoint_format: _CheckpointFormat, reader: CheckpointReader
) -> dict[str, weight_mapping.CheckpointWeight]:
    """The weights under the names of this checkpoint."""
    keys = [piece.key for weight in checkpoint_format.weights.values() for piece in weight.slices]

    def found(spelling: Callable[[str], str]) -> int:
        return sum(spelling(key) in reader.headers for key in keys)

    spelled = max(checkpoint_format.key_renamers, key=found)  # The first of the best ones.
    return _rename_tensors(checkpoint_format.weights, spelled)


def _flatten_model_params(params: PyTree) -> dict[str, Any]:
    flat = _tree.flatten_with_paths(params)
    return dict(zip(flat.paths, flat.leaves, strict=True))


def _resolve_save_dtype(stored_dtype: str, requested_dtype: jax.typing.DTypeLike | None) -> Any:
    dtype = FLOAT_DTYPES[stored_dtype] if requested_dtype is None else np.dtype(requested_dtype)
    if dtype not in FLOAT_DTYPES.values():
        raise ValueError(
            f"dtype={dtype} is none that these files are written in: {', '.join(FLOAT_DTYPES)}."
        )
    return dtype
