"""Models from Hugging Face folders, and folders from models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jlora import tree
from jlora.checkpoints import hub, pieces
from jlora.checkpoints.tensors import (
    DTYPES,
    ITEM_BYTES,
    Tensors,
    listed,
    new_folder,
    opened,
    read_json,
    write_shards,
)
from jlora.models.architectures import ARCHITECTURES, decoder_config
from jlora.models.decoder import Decoder
from jlora.models.encoder import Encoder
from jlora.models.encoder_architectures import ENCODERS, encoder_config, vit_config
from jlora.models.encoder_names import NAMINGS, encoder_weights, vit_weights
from jlora.models.names import decoder_weights
from jlora.models.vit import ViT
from jlora.packed import placed
from jlora.quantization.rules import check_finite, schemes_of
from jlora.quantization.schemes import Scheme

PyTree = Any
SHARD_BYTES = 5_000_000_000
# What stands beside the weights and does not depend on them.
_COMPANIONS = (
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


class Loaded(NamedTuple):
    """A model and its weights.

    Attributes:
        model: `model.apply(params, ...)` computes.
        params: `{"params": ...}`.
    """

    model: Any
    params: dict[str, Any]


class _Format(NamedTuple):
    """What a folder of one model type holds.

    Attributes:
        model: Made from config.json.
        weights: Which tensors each of its weights is.
        carried: The names of tensors that are none of the model's, but belong to its files.
        spellings: From the names in `weights` to those that a checkpoint may have instead; each
            keeps to one of them.
        copies: Of carried tensors that repeat a weight, the name of the weight's own.
    """

    model: Any
    weights: dict[str, pieces.Weight]
    carried: re.Pattern[str]
    spellings: Sequence[Callable[[str], str]]
    copies: Mapping[str, str] = types.MappingProxyType({})


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], pieces.Sharding | None] | None = None,
    quantize: Mapping[str, Scheme | None] | None = None,
    revision: str | None = None,
    **options: Any,
) -> Loaded:
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
    folder = hub.folder_of(folder, revision)
    with opened(folder) as tensors:
        form = _format(folder, tensors, options)
        weights = _as_stored(form, tensors)
        pieces.check(tensors, weights, form.carried)
        schemes = _schemes(quantize, weights)
        where = sharding or (lambda path, shape: None)
        arrays = pieces.load(tensors, weights, dtype, where, schemes)
        check_finite({path: arrays[path] for path in schemes})
    return Loaded(form.model, traverse_util.unflatten_dict(arrays, sep="/"))


def shapes(
    model: Any,
    dtype: jax.typing.DTypeLike,
    *,
    sharding: Callable[[str, jax.ShapeDtypeStruct], pieces.Sharding] | None = None,
    quantize: Mapping[str, Scheme | None] | None = None,
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
    weights = stored_weights(model)[0]
    schemes = _schemes(quantize, weights)

    def shape(path: str, weight: pieces.Weight) -> Any:
        like: Any = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype))
        place = None if sharding is None else sharding(path, like)
        if path in schemes:
            like = pieces.quantized_like(weight, dtype, schemes[path])
        return like if place is None else placed(like, place)

    flat = {path: shape(path, weight) for path, weight in weights.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _schemes(
    quantize: Mapping[str, Scheme | None] | None, weights: Mapping[str, pieces.Weight]
) -> dict[str, Scheme]:
    """Which weights are quantised, and how."""
    if quantize is None:
        return {}
    kinds = {path: jax.ShapeDtypeStruct(w.shape, jnp.float32) for path, w in weights.items()}
    return schemes_of(quantize, kinds)


def model_of(folder: str | os.PathLike[str], **options: Any) -> Any:
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
    if raw.get("model_type") in ARCHITECTURES:
        config = decoder_config(raw, str(folder / "config.json"))
        return _made(Decoder, config, options)
    with opened(folder) as tensors:
        return _format(folder, tensors, options).model


def check(folder: str | os.PathLike[str], **options: Any) -> None:
    """Checks that `load` can read a folder, by its headers.

    Raises:
        FileNotFoundError: Something is missing.
        ValueError: As from `load`.
    """
    folder = Path(folder)
    with opened(folder) as tensors:
        form = _format(folder, tensors, options)
        pieces.check(tensors, _as_stored(form, tensors), form.carried)


def stop_tokens(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json says, or else config.json."""
    found: Any = None
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            found = read_json(path).get("eos_token_id", found)
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def save(
    folder: str | os.PathLike[str],
    params: PyTree,
    source: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
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
        shard_bytes: No file is larger, unless one tensor alone is.
        **options: Those that `params` were loaded with.

    Raises:
        FileExistsError: `folder` exists; it is left as it was.
        ValueError: `params` are not the source's weights by name and shape, or not finite.
    """
    source = hub.folder_of(source)
    arrays = _flat(params)
    with opened(source) as tensors, new_folder(folder) as partial:
        form = _format(source, tensors, options)
        weights = _as_stored(form, tensors)
        pieces.check(tensors, weights, form.carried)
        _check_params(arrays, weights)
        own = pieces.headers(weights, lambda key: _dtype(tensors.headers[key].dtype, dtype))
        copies = {copy: of for copy, of in form.copies.items() if copy in tensors.headers}
        own |= {copy: own[of] for copy, of in copies.items()}
        rest = {key: header for key, header in tensors.headers.items() if key not in own}
        make = pieces.maker(weights, arrays)

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
        write_shards(partial, sizes, tensor, metadata=metadata, shard_bytes=shard_bytes)
        _copy_companions(source, partial)
        if dtype is not None:
            _say_dtype(partial / "config.json", np.dtype(dtype).name)


def _format(folder: Path, tensors: Tensors, options: Mapping[str, Any]) -> _Format:
    """What a folder holds, by its config.json."""
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise ValueError(f"{path}: model_type={kind!r} is not implemented; {sorted(_FORMATS)} are.")
    return _FORMATS[kind](raw, str(path), tensors, options)


def _decoder(
    raw: Mapping[str, Any], where: str, tensors: Tensors, options: Mapping[str, Any]
) -> _Format:
    model = _made(Decoder, decoder_config(raw, where), options)
    # Old releases stored frequencies, and others the head that is the embedding.
    names = r".*rotary_emb\.inv_freq|lm_head\.weight" if model.config.tied else r".*inv_freq"
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied else {}
    # Base models leave out the first part.
    spellings = (str, _without_prefix)
    return _Format(model, decoder_weights(model), re.compile(names), spellings, copies)


def _encoder(
    raw: Mapping[str, Any], where: str, tensors: Tensors, options: Mapping[str, Any]
) -> _Format:
    naming = NAMINGS[raw["model_type"]]
    config = encoder_config(raw, where, pooler=naming.has_pooler(tensors.headers))
    model = _made(Encoder, config, options)
    return _Format(model, encoder_weights(model, naming), naming.carried, naming.spellings)


def _vit(
    raw: Mapping[str, Any], where: str, tensors: Tensors, options: Mapping[str, Any]
) -> _Format:
    naming = NAMINGS["vit"]
    config = vit_config(raw, where, pooler=naming.has_pooler(tensors.headers))
    model = _made(ViT, config, options)
    return _Format(model, vit_weights(model, naming), naming.carried, naming.spellings)


_FORMATS: dict[str, Callable[[Mapping[str, Any], str, Tensors, Mapping[str, Any]], _Format]] = {
    **dict.fromkeys(ARCHITECTURES, _decoder),
    **dict.fromkeys(ENCODERS, _encoder),
    "vit": _vit,
}


def _made(kind: Any, config: Any, options: Mapping[str, Any]) -> Any:
    """A model with the caller's options."""
    fields = [field.name for field in dataclasses.fields(kind)]
    known = sorted(set(fields) - {"config", "dtype", "parent", "name"})
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"{unknown} are no options of {kind.__name__}, which has {known}. Leave them out."
        )
    return kind(config, **options)


def stored_weights(model: Any) -> tuple[dict[str, pieces.Weight], ...]:
    """Which tensors of transformers the weights of a model of `jlora.models` are, by path.

    The first ones have the names of transformers 5 in memory, the others those of other releases,
    and of base models or models with a head.
    """
    described = _DESCRIBED.get(type(model))
    if described is None:
        raise TypeError(f"{type(model).__name__} is no model of jlora.models.")
    return described(model)


def _decoder_names(model: Decoder) -> tuple[dict[str, pieces.Weight], ...]:
    weights = decoder_weights(model)
    return weights, _renamed(weights, _without_prefix)


def _encoder_names(model: Encoder) -> tuple[dict[str, pieces.Weight], ...]:
    naming = NAMINGS[model.config.model_type]
    weights = encoder_weights(model, naming)
    named, bare, *_ = (_renamed(weights, spelling) for spelling in naming.spellings)
    return (bare, named) if model.config.labels is None else (named, bare)


def _vit_names(model: ViT) -> tuple[dict[str, pieces.Weight], ...]:
    naming = NAMINGS["vit"]
    weights = vit_weights(model, naming)
    on_disk, bare_on_disk, named, bare = (_renamed(weights, s) for s in naming.spellings)
    if model.config.labels is None:
        return bare, named, bare_on_disk, on_disk
    return named, bare, on_disk, bare_on_disk


_DESCRIBED: dict[type, Callable[[Any], tuple[dict[str, pieces.Weight], ...]]] = {
    Decoder: _decoder_names,
    Encoder: _encoder_names,
    ViT: _vit_names,
}


def example_inputs(model: Any) -> tuple[Any, ...]:
    """Inputs of the least size that a model of `jlora.models` takes, as shapes."""
    if isinstance(model, ViT):
        c = model.config
        return (jax.ShapeDtypeStruct((1, *c.image_size, c.num_channels), jnp.float32),)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return (tokens, tokens) if isinstance(model, Encoder) else (tokens,)


def _without_prefix(key: str) -> str:
    return key.removeprefix("model.")


def _renamed(
    weights: Mapping[str, pieces.Weight], spelling: Callable[[str], str]
) -> dict[str, pieces.Weight]:
    """The same weights with other names for their tensors."""
    return {
        path: weight._replace(pieces=tuple(p._replace(key=spelling(p.key)) for p in weight.pieces))
        for path, weight in weights.items()
    }


def _as_stored(form: _Format, tensors: Tensors) -> dict[str, pieces.Weight]:
    """The weights under the names of this checkpoint."""
    keys = [piece.key for weight in form.weights.values() for piece in weight.pieces]

    def found(spelling: Callable[[str], str]) -> int:
        return sum(spelling(key) in tensors.headers for key in keys)

    spelled = max(form.spellings, key=found)  # The first of the best ones.
    return _renamed(form.weights, spelled)


def _flat(params: PyTree) -> dict[str, Any]:
    flat = tree.flatten(params)
    return dict(zip(flat.paths, flat.leaves, strict=True))


def _check_params(arrays: Mapping[str, Any], weights: Mapping[str, pieces.Weight]) -> None:
    problems = [f"{path} is unknown" for path in arrays if path not in weights]
    problems += [f"{path} is missing" for path in weights if path not in arrays]
    problems += [
        f"{path} has shape {arrays[path].shape} instead of {weight.shape}"
        for path, weight in weights.items()
        if path in arrays and tuple(arrays[path].shape) != weight.shape
    ]
    if problems:
        raise ValueError(
            f"params are not the weights of the source: {listed(problems)}. Give what `load` "
            f"returned, merged but not reshaped, and the options that it was loaded with."
        )


def _dtype(stored: str, wanted: jax.typing.DTypeLike | None) -> Any:
    dtype = DTYPES[stored] if wanted is None else np.dtype(wanted)
    if dtype not in DTYPES.values():
        raise ValueError(
            f"dtype={dtype} is none that these files are written in: {', '.join(DTYPES)}."
        )
    return dtype


def _say_dtype(config: Path, name: str) -> None:
    """Writes into a config.json of which type the weights are: readers round to what it says."""
    raw = read_json(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["dtype"]
    text = json.dumps({**raw, **dict.fromkeys(keys, name)}, indent=2)
    config.write_text(text + "\n", encoding="utf-8")


def _copy_companions(source: Path, folder: Path) -> None:
    """Copies the files that stand beside the weights."""
    for file in (file for pattern in _COMPANIONS for file in source.glob(pattern)):
        if file.is_file():
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
