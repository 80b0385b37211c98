"""Adapter files: one safetensors file with the adapter, its base's fingerprints and its lineage."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora import _tree
from jlora._mesh import fetch_global
from jlora._tree import PyTree
from jlora.adapters.base import (
    FAMILIES,
    AdapterLeaf,
    check_adapter,
    get_adapter_leaves,
    get_array_fields,
    weight_indices,
)
from jlora.adapters.layer_layout import (
    locate_layers,
    match_layer_layout,
    name_layers,
    unstack_layers,
)
from jlora.checkpoints.base_digest import BASE_DIGEST_FILE, OTHER_BASE, BaseDigest
from jlora.checkpoints.lineage import (
    Lineage,
    adapter_arrays,
    content_hash,
    describe_adapter,
)
from jlora.checkpoints.safetensors_io import (
    open_safetensors,
    replace_file_atomically,
    serialize_safetensors,
)
from jlora.checkpoints.stored_weight import read_weight
from jlora.checkpoints.text_files import name_file_in_errors, parse_json, read_optional_json
from jlora.interpreter.terms import WeightAxes
from jlora.quantization.qarray import QArray, quantize_like

FORMAT_VERSION = 1  # Incremented when an older reader would misread a newer file.

ADAPTER_FILE = "adapter.safetensors"  # In the output folder of a run.

_FINGERPRINT_SAMPLES = 64  # Entries of a weight that its fingerprint covers.


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    params: PyTree,
    lineage: Lineage | None = None,
) -> None:
    """Saves an adapter to one safetensors file, atomically replacing a file of that name.

    The file names layers one by one, `layers_0/...`, also where the model stacks them, so that it
    fits both; a stack in a base that also has a weight `layers_0/...` is kept as it is. Its
    metadata contains the families, axes, ranks and scales; a fingerprint of every adapted weight of
    the base, so that `load_adapter` detects another base; the content hash; and the lineage.

    Args:
        path: File to write; its folder must exist.
        adapter: Adapter, as `init` returns it or trained.
        params: Base parameters that it was trained on.
        lineage: Origin of the adapter. None: unknown.

    Raises:
        TypeError: `adapter` is not an adapter, or `lineage` is not a `Lineage`.
        ValueError: `adapter` does not fit `params`, or contains an array that is not finite.

    Example:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> jlora.save_adapter(path, adapter, params)
        >>> jlora.load_adapter(path, params)["w"].rank
        1
    """
    write_adapter(path, adapter, fingerprint_base(params, adapter), lineage)


def write_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    lineage: Lineage | None = None,
    base_digest: BaseDigest | None = None,
    prompt_fields: Mapping[str, Any] | None = None,
) -> None:
    """Saves an adapter like `save_adapter`, given fingerprints instead of the base.

    Args:
        path: File to write; its folder must exist.
        adapter: Adapter, with all its arrays on this host.
        fingerprints: Result of `fingerprint_base` or `fingerprint_weights`.
        lineage: Origin of the adapter. None: unknown.
        base_digest: Digest of the base checkpoint, for `check_base_checkpoint`. None: unknown.
        prompt_fields: Format of the prompts that it was trained on, of JSON values. None: unknown.

    Raises:
        TypeError: `adapter` is not an adapter, or `lineage` is not a `Lineage`.
        ValueError: `adapter` contains an array that is not finite.
    """
    check_adapter(adapter)
    content = content_hash(adapter)
    adapter = unstack_layers(adapter, fingerprints)
    lineage = Lineage() if lineage is None else lineage
    if not isinstance(lineage, Lineage):
        raise TypeError(
            f"lineage={lineage!r} must be a jlora.checkpoints.Lineage, got "
            f"{type(lineage).__name__}."
        )
    tensors = adapter_arrays(adapter)
    for name, value in tensors.items():
        _check_adapter_tensor_finite(name, value)
    metadata = {
        "format": "jlora",
        "version": str(FORMAT_VERSION),
        "adapter": json.dumps(describe_adapter(adapter), sort_keys=True),
        "base": json.dumps(dict(fingerprints), sort_keys=True),
        "content": content,
        "lineage": lineage.to_json(),
    }
    if base_digest is not None:
        metadata["checkpoint"] = json.dumps(base_digest.summarize(), sort_keys=True)
    if prompt_fields is not None:
        metadata["prompts"] = json.dumps(dict(prompt_fields), sort_keys=True)
    replace_file_atomically(pathlib.Path(path), serialize_safetensors(tensors, metadata))


def load_adapter(
    path: str | os.PathLike[str], params: PyTree, *, allow_other_base: bool = False
) -> dict[str, Any]:
    """Loads an adapter that `save_adapter` wrote, for layers as `params` has them.

    Args:
        path: Adapter file.
        params: Base parameters that it will be used with.
        allow_other_base: Accepts a base with the same paths and shapes but other values.

    Returns:
        The adapter, as `init` returns it.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError: The file is missing.
        ValueError: The file is not an adapter file, is damaged, has a newer format, or belongs to
            another base.

    Example:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> jlora.save_adapter(path, adapter, params)
        >>> jlora.load_adapter(path, {"w": 2 * params["w"]}, allow_other_base=True)["w"].a.shape
        (3, 1)
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be the path of an adapter file, got {type(path).__name__}. Call "
            f"load_adapter(path, params)."
        )
    path = pathlib.Path(path)
    metadata, tensors = _read_adapter_file(path)
    with name_file_in_errors(path):
        description = _read_json_metadata(path, metadata, "adapter")
        stored = {
            weight_path: _build_leaf_from_description(path, weight_path, leaf_description, tensors)
            for weight_path, leaf_description in description.items()
        }
    if tensors:
        raise ValueError(
            f"{path} contains tensors that its description does not name: {sorted(tensors)[:3]}. "
            f"It was changed after jlora wrote it; save the adapter again."
        )
    with name_file_in_errors(path):
        adapter = match_layer_layout(stored, params)
        weights = find_adapted_weights(params, adapter)
        content = content_hash(stored)
    if metadata.get("content", content) != content:  # Files of an older jlora have no hash.
        raise ValueError(
            f"{path} does not have the content that jlora wrote to it. Copy it again; if it was "
            f"changed on purpose, save the adapter again."
        )
    if not allow_other_base:
        with name_file_in_errors(path):
            fingerprints = _read_json_metadata(path, metadata, "base")
            _check_base_fingerprints(path, fingerprints, weights, get_adapter_leaves(stored))
    return adapter


def check_base_checkpoint(
    path: str | os.PathLike[str], folder: pathlib.Path, digest: BaseDigest | None = None
) -> None:
    """Checks that a checkpoint folder is the one that a run trained an adapter on.

    Files of `save_adapter`, and PEFT folders of `peft.save` and of other programs, which have no
    digest of a base, are not checked.

    Args:
        path: Adapter file, or PEFT folder.
        folder: Folder of the base.
        digest: Digest of the base. None: all files of the folder are read for it.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the folder has other weights or another config.json.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        expected = read_optional_json(path / BASE_DIGEST_FILE)
    else:
        metadata, _ = _read_adapter_file(path)
        is_known = "checkpoint" in metadata
        expected = _read_json_metadata(path, metadata, "checkpoint") if is_known else None
    if expected is None:
        return
    actual = (BaseDigest.from_folder(folder) if digest is None else digest).summarize()
    if not all(isinstance(expected.get(name), str) for name in actual):
        place = path / BASE_DIGEST_FILE if path.is_dir() else f"{path}: 'checkpoint'"
        raise ValueError(
            f"{place} is damaged: expected the digests {', '.join(actual)}. Copy the adapter again."
        )
    changed = [name for name in actual if expected[name] != actual[name]]
    if changed:
        raise ValueError(
            f"{path} was trained on another base: {folder} has {OTHER_BASE[changed[0]]} than the "
            f"base of its run, even where the adapter changes nothing. Use the base of the run."
        )


def adapted_weight_paths(path: str | os.PathLike[str]) -> list[str]:
    """Returns the paths of the weights that an adapter file adapts, sorted.

    Args:
        path: Adapter file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an adapter file, is damaged, or has a newer format.

    Example:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora.checkpoints import adapted_weight_paths
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> jlora.save_adapter(path, adapter, params)
        >>> adapted_weight_paths(path)
        ['w']
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    return sorted(_read_json_metadata(path, metadata, "base"))


def read_lineage(path: str | os.PathLike[str]) -> Lineage:
    """Returns the lineage of the adapter in a file; an empty one if the file has none.

    Args:
        path: Adapter file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an adapter file, is damaged, or has a newer format.

    Example:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora.checkpoints import Lineage, read_lineage
        >>> params = {"w": np.ones((3, 2), np.float32)}
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 3), np.float32))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> jlora.save_adapter(path, adapter, params, Lineage(method="trained"))
        >>> read_lineage(path).method
        'trained'
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    return lineage_from_metadata(path, metadata)


def read_prompt_fields(path: str | os.PathLike[str]) -> Any:
    """Returns the `prompt_fields` of an adapter file; None if it has none.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an adapter file, is damaged, or has a newer format.
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    if "prompts" not in metadata:
        return None
    return parse_json(metadata["prompts"], f"{path}: 'prompts' in its metadata")


def lineage_from_metadata(path: pathlib.Path, metadata: Mapping[str, str]) -> Lineage:
    """Returns the lineage in the metadata of a file; an empty one if there is none.

    Raises:
        ValueError: The lineage is damaged.
    """
    if "lineage" not in metadata:
        return Lineage()
    try:
        return Lineage.from_json(metadata["lineage"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Copy the file again.") from error


def read_quantization_schemes(path: str | os.PathLike[str]) -> list[str]:
    """Returns the quantization schemes of the base that an adapter was trained on, sorted.

    Args:
        path: Adapter file.

    Returns:
        Names of the schemes of adapted weights that were quantized; empty if none was.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an adapter file, is damaged, or has a newer format.

    Example:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora.checkpoints import read_quantization_schemes
        >>> params = jlora.quantize({"w": np.ones((32, 2), np.float32)}, {"w": jlora.Int8()})
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=1, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, np.ones((1, 32), np.float32))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
        >>> jlora.save_adapter(path, adapter, params)
        >>> read_quantization_schemes(path)
        ['int8']
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    with name_file_in_errors(path):
        fingerprints = _read_json_metadata(path, metadata, "base").values()
        specs = map(_quantization_spec, fingerprints)
        return sorted({str(spec["scheme"]) for spec in specs if spec is not None})


def fingerprint_base(params: PyTree, adapter: Mapping[str, Any]) -> dict[str, str]:
    """Returns the fingerprints of the weights that an adapter adapts, after checking its fit.

    Raises:
        TypeError: `adapter` is not an adapter.
        ValueError: `adapter` does not fit `params`.
    """
    find_adapted_weights(params, adapter)
    flat = _tree.flatten_with_paths(params)
    return fingerprint_weights(dict(zip(flat.paths, flat.leaves, strict=True)), adapter)


def fingerprint_weights(weights: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, str]:
    """Returns the fingerprints of the adapted weights by their paths in a file.

    They are of each layer for stacked layers, and of a whole stack where another weight has the
    name of a layer of it.

    Args:
        weights: Weights of the base by path, also those that are not adapted.
        adapter: Adapter of these weights.
    """
    return {
        name: fingerprint(weights[place.path], place.indices)
        for places in name_layers(get_adapter_leaves(adapter), weights).values()
        for name, place in places.items()
    }


def fingerprint(weight: Any, layer: Sequence[int] = ()) -> str:
    """Returns a hash of a weight's shape and of entries spread over it.

    Entries are rounded to bfloat16 first, so that a checkpoint loaded in float32 and in bfloat16
    has the same fingerprint. The fingerprint of a quantized weight hashes its codes, and begins
    with a description of its quantization.

    Args:
        weight: Array or quantized weight.
        layer: Indices of a layer along the first axes of a stack, whose fingerprint is that of the
            layer alone. Empty: the whole weight.
    """
    weight = read_weight(weight)
    shape = weight.shape[len(layer) :]
    if not isinstance(weight, QArray):
        entries = _sample_weight_entries(weight, layer).astype(ml_dtypes.bfloat16)
        return _hash_arrays([entries], shape)
    samples = [_sample_weight_entries(array, layer) for array in jax.tree.leaves(weight)]
    return f"{json.dumps(weight.spec, sort_keys=True)} {_hash_arrays(samples, shape)}"


def _sample_weight_entries(array: Any, layer: Sequence[int]) -> np.ndarray:
    shape = array.shape[len(layer) :]
    if not shape:
        array, shape = array.reshape(*array.shape, 1), (1,)
    indices = np.unravel_index(_choose_sample_indices(math.prod(shape)), shape)
    indices = (*map(np.array, layer), *indices)
    if isinstance(array, jax.Array):
        is_on_host = array.is_fully_addressable and len(array.devices()) == 1
        if not is_on_host or next(iter(array.devices())).platform != "cpu":
            return fetch_global(_take_entries(array, indices)).reshape(-1)
    return np.asarray(array)[indices].reshape(-1)  # Without a copy of the array.


@jax.jit
def _take_entries(array: jax.Array, indices: tuple[np.ndarray, ...]) -> jax.Array:
    return array[indices]


def _hash_arrays(arrays: Sequence[np.ndarray], shape: Sequence[int]) -> str:
    content = repr(tuple(shape)).encode() + b"".join(array.tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()[:32]


@functools.lru_cache(maxsize=1024)
def _choose_sample_indices(size: int) -> np.ndarray:
    """Returns pseudorandom indices below `size`, the same in every release and process."""
    if size <= _FINGERPRINT_SAMPLES:
        return np.arange(size)
    state, indices = size, []
    for _ in range(_FINGERPRINT_SAMPLES):
        # Knuth's MMIX generator, exact in Python's integers.
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        indices.append((state >> 11) % size)
    return np.array(sorted(indices))


def _check_adapter_tensor_finite(name: str, value: np.ndarray) -> None:
    if not np.isfinite(value.astype(np.float32)).all():
        raise ValueError(
            f"{name!r} holds NaN or Inf, and so would every output. Use a checkpoint from "
            f"before the training diverged."
        )


def find_adapted_weights(params: PyTree, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the adapted weights by path, after checking that the adapter fits them."""
    flat = _tree.flatten_with_paths(params)
    return {path: flat.leaves[index] for path, index in weight_indices(flat, adapter).items()}


def _read_adapter_file(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give the file that save_adapter wrote.")
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        with name_file_in_errors(path):  # The library has dtypes that NumPy has not.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("format") != "jlora":
        raise ValueError(
            f"{path} was not written by jlora.save_adapter (its format is "
            f"{metadata.get('format', 'unnamed')!r})."
        )
    version = metadata.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, but this jlora reads versions up to "
            f"{FORMAT_VERSION}. Use a newer jlora."
        )
    return metadata, tensors


def _read_json_metadata(
    path: pathlib.Path, metadata: Mapping[str, str], key: str
) -> dict[str, Any]:
    if key not in metadata:
        raise ValueError(f"{path} has no {key!r} in its metadata. Copy it again.")
    value = parse_json(metadata[key], f"{path}: {key!r} in its metadata")
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: {key!r} in its metadata must be a JSON object, got {type(value).__name__}. "
            f"Save the adapter again."
        )
    return value


def _build_leaf_from_description(
    path: pathlib.Path, weight_path: str, description: Any, tensors: dict[str, np.ndarray]
) -> Any:
    """Builds one leaf of an adapter from its description, and removes its arrays from `tensors`."""
    description = dict(description) if isinstance(description, dict) else {}
    family = description.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(
            f"{path} adapts {weight_path!r} with the family {family!r}, which this jlora does not "
            f"have (it has {sorted(FAMILIES)}). Use the jlora that wrote it."
        )
    leaf_class = FAMILIES[family]
    arrays = {}
    for field in get_array_fields(leaf_class):
        key = f"{weight_path}/{field.name}"
        if key not in tensors and field.default is None:
            continue
        if key not in tensors:
            raise ValueError(f"{path} lacks the tensor {key!r}. Save the adapter again.")
        value = tensors.pop(key)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{path}: {key!r} must be floating point, got {value.dtype}. Save the adapter "
                f"again."
            )
        _check_adapter_tensor_finite(key, value)
        arrays[field.name] = jnp.asarray(value)
    try:
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in description.items()
        }
        if issubclass(leaf_class, AdapterLeaf):
            fields["axes"] = WeightAxes(*(tuple(axes) for axes in fields["axes"]))
        leaf = leaf_class(**arrays, **fields)
        leaf.validate()
        return leaf
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} has an invalid description of {weight_path!r}: {error}. Save the "
            f"adapter again."
        ) from error


def _check_base_fingerprints(
    path: pathlib.Path,
    expected: Mapping[str, Any],
    weights: Mapping[str, Any],
    leaves: Mapping[str, Any],
) -> None:
    if set(expected) != set(leaves):
        raise ValueError(
            f"{path} has fingerprints of other weights than it adapts: "
            f"{sorted(set(expected) ^ set(leaves))[:3]}. It was changed after jlora wrote it; "
            f"save the adapter again."
        )
    shapes = {weight_path: tuple(weight.shape) for weight_path, weight in weights.items()}
    located = locate_layers(expected, shapes)
    members: dict[str, list[tuple[str, tuple[int, ...]]]] = {}  # By the path of the weight.
    for name, place in located.items():
        members.setdefault(place.path, []).append((name, place.indices))
    residual: list[str] = []
    # Of a stack that is separate layers here.
    other = [name for name in expected if name not in located]
    quantized_as: str | None = None
    for weight_path, places in members.items():
        weight = read_weight(weights[weight_path])  # Once for all comparisons.
        for name, layer in places:
            if fingerprint(weight, layer) == expected[name]:
                continue
            # A residual weight was quantized together with the leaf, so that the original weight
            # cannot be recognized by its fingerprint.
            if getattr(leaves[name], "residual", False) and _quantization_spec(expected[name]):
                residual.append(name)
            if not _matches_if_quantized(weight, layer, expected[name]):
                quantized_as = quantized_as or (str(weight) if isinstance(weight, QArray) else None)
                other.append(name)
    if residual:
        raise ValueError(
            f"{path} needs {residual[0]!r} ({len(residual)} of {len(expected)} adapted weights) in "
            f"the form that was quantized together with this adapter, because its factors started "
            f"as a part of the weight. Load it with the parameters that jlora.loftq (or "
            f"jlora.quantize of jlora.residual_base) returned. For the original weights, save the "
            f"result of jlora.rebase_to_original."
        )
    if quantized_as is not None:
        raise ValueError(
            f"{path} was not trained on {other[0]!r} ({len(other)} of {len(expected)} adapted "
            f"weights) as it is quantized in params: {quantized_as}. If these are the same "
            f"weights before quantization, pass allow_other_base=True: the outputs then differ by "
            f"the quantization error."
        )
    if other:
        raise ValueError(
            f"{path} was trained on another base: {other[0]!r} ({len(other)} of {len(expected)} "
            f"adapted weights) has other values in params. Load the base it was trained on, or "
            f"pass allow_other_base=True."
        )


def _quantization_spec(expected_fingerprint: Any) -> dict[str, Any] | None:
    """Returns the quantization of the weight of a fingerprint; None if it has none.

    Raises:
        ValueError: The fingerprint is not one that jlora writes.
    """
    text = str(expected_fingerprint).rpartition(" ")[0]
    if not text:
        return None
    spec = parse_json(text, "The fingerprint of a weight")
    if not isinstance(spec, dict) or "scheme" not in spec:
        raise ValueError(
            f"The fingerprint {expected_fingerprint!r:.200} of a weight does not describe a "
            f"quantization. Save the adapter again."
        )
    return spec


def _matches_if_quantized(weight: Any, layer: tuple[int, ...], expected_fingerprint: Any) -> bool:
    """Whether a fingerprint is that of a weight, or of one layer of it, after quantization."""
    spec = _quantization_spec(expected_fingerprint)
    if isinstance(weight, QArray) or spec is None:
        return False
    quantized = quantize_like(weight[layer] if layer else weight, spec)
    return quantized is not None and fingerprint(quantized) == expected_fingerprint
