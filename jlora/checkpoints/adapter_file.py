"""An adapter as one safetensors file that says what it is and whose."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from jlora import _tree
from jlora._sharding import fetch_global
from jlora._tree import PyTree
from jlora.adapters.base import (
    FAMILIES,
    AdapterLeaf,
    check_adapter,
    get_array_fields,
    weight_indices,
)
from jlora.checkpoints.lineage import (
    Lineage,
    adapter_arrays,
    compute_content_hash,
    describe_adapter,
)
from jlora.checkpoints.safetensors_io import serialize_safetensors
from jlora.interpreter.usage import WeightAxes
from jlora.quantization.qarray import QArray, quantize_like

FORMAT_VERSION = 1  # Raised when a reader of the old number would misread a file of the new.

_FINGERPRINT_SAMPLES = 64  # Entries of a weight that its fingerprint reads.


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    params: PyTree,
    lineage: Lineage | None = None,
) -> None:
    """Writes an adapter to one safetensors file, which replaces a file of that name at once.

    The file's metadata has the families, axes, ranks and scales, a fingerprint of every weight of
    the base that is adapted, so that loading it onto another base can be refused, the content hash,
    and where the adapter comes from.

    Args:
        path: Where to; its folder must exist.
        adapter: What `init` returned, trained.
        params: The base it was trained on.
        lineage: How it was made, if that is known.

    Raises:
        TypeError: When `adapter` is not an adapter, or `lineage` no lineage.
        ValueError: When it does not fit `params`, or holds an array that is not finite.
    """
    weights = _adapted_weights(params, adapter)
    write_adapter(path, adapter, {p: fingerprint(weights[p]) for p in weights}, lineage)


def write_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    lineage: Lineage | None = None,
) -> None:
    """As `save_adapter`, where the base is not at hand but its weights' fingerprints are.

    Args:
        path: Where to; its folder must exist.
        adapter: Its arrays are all here.
        fingerprints: Of the weights that it adapts, by path.
        lineage: How it was made, if that is known.

    Raises:
        TypeError: When `adapter` is not an adapter, or `lineage` no lineage.
        ValueError: When it holds an array that is not finite.
    """
    check_adapter(adapter)
    lineage = Lineage() if lineage is None else lineage
    if not isinstance(lineage, Lineage):
        raise TypeError(f"lineage={lineage!r} is no Lineage, of jlora.checkpoints.lineage.")
    tensors = adapter_arrays(adapter)
    for name, value in tensors.items():
        _check_adapter_tensor_finite(name, value)
    metadata = {
        "format": "jlora",
        "version": str(FORMAT_VERSION),
        "adapter": json.dumps(describe_adapter(adapter), sort_keys=True),
        "base": json.dumps(dict(fingerprints), sort_keys=True),
        "content": compute_content_hash(describe_adapter(adapter), tensors),
        "lineage": lineage.to_json(),
    }
    _replace_file_atomically(pathlib.Path(path), serialize_safetensors(tensors, metadata))


def load_adapter(
    path: str | os.PathLike[str], params: PyTree, *, allow_other_base: bool = False
) -> dict[str, Any]:
    """The adapter that `save_adapter` wrote.

    Args:
        path: The file.
        params: The base that it will be used with.
        allow_other_base: Accept a base with the same paths and shapes but other numbers.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no such file, damaged, of a newer format, or of another base.
    """
    path = pathlib.Path(path)
    metadata, tensors = _read_adapter_file(path)
    description = _read_json_metadata(path, metadata, "adapter")
    content = compute_content_hash(description, tensors)
    leaves = {
        weight_path: _build_leaf_from_description(path, weight_path, facts, tensors)
        for weight_path, facts in description.items()
    }
    if tensors:
        raise ValueError(
            f"{path} holds tensors that its description does not name: {sorted(tensors)[:3]}. It "
            f"was changed after jlora wrote it; save the adapter again."
        )
    weights = _adapted_weights(params, leaves)
    if metadata.get("content", content) != content:  # Files of an older jlora have none.
        raise ValueError(
            f"{path} holds other numbers or facts than jlora wrote to it. Copy it again; if it was "
            f"changed on purpose, save the adapter anew."
        )
    if not allow_other_base:
        _check_base_fingerprints(path, _read_json_metadata(path, metadata, "base"), weights, leaves)
    return leaves


def adapted_weight_paths(path: str | os.PathLike[str]) -> list[str]:
    """The paths of the weights that an adapter file is for.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no such file, damaged, or of a newer format.
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    return sorted(_read_json_metadata(path, metadata, "base"))


def read_lineage(path: str | os.PathLike[str]) -> Lineage:
    """How the adapter in a file was made; an empty lineage where the file does not say.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no such file, damaged, or of a newer format.
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    return lineage_from_metadata(path, metadata)


def lineage_from_metadata(path: pathlib.Path, metadata: Mapping[str, str]) -> Lineage:
    """The lineage in a file's metadata.

    Raises:
        ValueError: It is damaged.
    """
    if "lineage" not in metadata:
        return Lineage()
    try:
        return Lineage.from_json(metadata["lineage"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Copy the file again.") from error


def read_quantization_schemes(path: str | os.PathLike[str]) -> list[str]:
    """The schemes of the quantised weights that an adapter was trained on; none of arrays.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no such file, damaged, or of a newer format.
    """
    path = pathlib.Path(path)
    metadata, _ = _read_adapter_file(path)
    texts = (
        str(held).rpartition(" ")[0]
        for held in _read_json_metadata(path, metadata, "base").values()
    )
    found = {json.loads(text).get("scheme") for text in texts if text}
    return sorted(map(str, found))


def fingerprint(weight: Any) -> str:
    """A hash of a weight's shape and of entries spread over it.

    Entries are rounded to bfloat16 first, so the same checkpoint loaded in float32 and in bfloat16
    has one fingerprint. That of a quantised weight says how it was quantised, and is of its codes.
    """
    if not isinstance(weight, QArray):
        return _hash_arrays(
            [_sample_weight_entries(weight).astype(ml_dtypes.bfloat16)], weight.shape
        )
    samples = [_sample_weight_entries(array) for array in jax.tree.leaves(weight)]
    return f"{json.dumps(weight.spec, sort_keys=True)} {_hash_arrays(samples, weight.shape)}"


def _sample_weight_entries(array: Any) -> np.ndarray:
    if not array.ndim:
        return fetch_global(array.reshape(1))
    chosen = (
        np.arange(array.size)
        if array.size <= _FINGERPRINT_SAMPLES
        else _draw_sample_indices(array.size)
    )
    return fetch_global(array[np.unravel_index(chosen, array.shape)])


def _hash_arrays(arrays: Sequence[np.ndarray], shape: Sequence[int]) -> str:
    content = repr(tuple(shape)).encode() + b"".join(array.tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()[:32]


def _draw_sample_indices(size: int) -> np.ndarray:
    """Places drawn once and for all for a size: the same in every release and process."""
    state, places = size, []
    for _ in range(_FINGERPRINT_SAMPLES):
        # Knuth's MMIX generator; Python's integers keep it exact.
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        places.append((state >> 11) % size)
    return np.array(sorted(places))


def _check_adapter_tensor_finite(name: str, value: np.ndarray) -> None:
    if not np.isfinite(value.astype(np.float32)).all():
        raise ValueError(
            f"{name!r} holds NaN or infinity, so every output would. Go back to a checkpoint from "
            f"before the training diverged."
        )


def _adapted_weights(params: PyTree, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The adapted weights by path, after checking that the adapter fits them."""
    flat = _tree.flatten_with_paths(params)
    return {path: flat.leaves[place] for path, place in weight_indices(flat, adapter).items()}


def _replace_file_atomically(path: pathlib.Path, content: bytes) -> None:
    # A reader sees the old file or the new one, also after a crash in the middle.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        pathlib.Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _read_adapter_file(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give the file that save_adapter wrote.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no readable safetensors file: {error}. It may be cut short; copy it again."
        ) from error
    if metadata.get("format") != "jlora":
        raise ValueError(
            f"{path} was not written by jlora.save_adapter (its format is "
            f"{metadata.get('format', 'unnamed')!r})."
        )
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} was made by format {version!r}, this jlora reads up to {FORMAT_VERSION}. Use a newer "
            f"jlora."
        )
    return metadata, tensors


def _read_json_metadata(
    path: pathlib.Path, metadata: Mapping[str, str], key: str
) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no readable {key!r} in its metadata: {error!r}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} has {type(value).__name__} as {key!r} in its metadata.")
    return value


def _build_leaf_from_description(
    path: pathlib.Path, weight_path: str, description: Any, tensors: dict[str, np.ndarray]
) -> Any:
    """One adapter from its description; the tensors it takes are removed from `tensors`."""
    description = dict(description) if isinstance(description, dict) else {}
    name = description.pop("family", None)
    if name not in FAMILIES:
        raise ValueError(
            f"{path} adapts {weight_path!r} by the family {name!r}, which this jlora does not have "
            f"(it has {sorted(FAMILIES)}). Use the jlora that wrote it."
        )
    cls = FAMILIES[name]
    arrays = {}
    for field in get_array_fields(cls):
        key = f"{weight_path}/{field.name}"
        if key not in tensors and field.default is None:
            continue
        if key not in tensors:
            raise ValueError(f"{path} lacks the tensor {key!r}. Save the adapter again.")
        value = tensors.pop(key)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{path} holds {key!r} as {value.dtype}, not as floats.")
        _check_adapter_tensor_finite(key, value)
        arrays[field.name] = jnp.asarray(value)
    try:
        description = {
            key: tuple(f) if isinstance(f, list) else f for key, f in description.items()
        }
        if issubclass(cls, AdapterLeaf):
            description["axes"] = WeightAxes(*(tuple(group) for group in description["axes"]))
        leaf = cls(**arrays, **description)
        leaf.validate()
        return leaf
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} describes {weight_path!r} wrongly: {error}.") from error


def _check_base_fingerprints(
    path: pathlib.Path,
    expected: Mapping[str, Any],
    weights: Mapping[str, Any],
    leaves: Mapping[str, Any],
) -> None:
    if set(expected) != set(weights):
        raise ValueError(
            f"{path} has fingerprints of other weights than it adapts: "
            f"{sorted(set(expected) ^ set(weights))[:3]}. It was changed after jlora wrote it; "
            f"save the adapter again."
        )
    other = [name for name in expected if not _matches_fingerprint(weights[name], expected[name])]
    bound = [
        name
        for name in expected
        if _requires_quantized_base(leaves[name], weights[name], expected[name])
    ]
    if bound:
        raise ValueError(
            f"{path} belongs on {bound[0]!r} ({len(bound)} of {len(expected)} adapted weights) as "
            f"it was quantised with this adapter and on nothing else: its factors started as a "
            f"part of the weight. Load it with the parameters that jlora.loftq (or jlora.quantize "
            f"of jlora.residual_base) made. For the weights as they were, save what "
            f"jlora.rebase_to_original makes of it."
        )
    if other and isinstance(weights[other[0]], QArray):
        raise ValueError(
            f"{path} was not trained on {other[0]!r} ({len(other)} of {len(expected)} adapted "
            f"weights) as it is quantised in params: {weights[other[0]]}. If the weights were "
            f"those before, pass allow_other_base=True: what the adapter computes then differs by "
            f"what the quantisation took."
        )
    if other:
        raise ValueError(
            f"{path} was trained on another base: {other[0]!r} ({len(other)} of {len(expected)} "
            f"adapted weights) has other numbers in params. Load the base it was trained on, or "
            f"pass allow_other_base=True."
        )


def _quantization_description(expected_fingerprint: Any) -> str:
    """How the weight of a fingerprint was quantised, as JSON; empty where it was not."""
    return str(expected_fingerprint).rpartition(" ")[0]


def _requires_quantized_base(leaf: Any, weight: Any, expected_fingerprint: Any) -> bool:
    """Whether a leaf belongs on a quantised weight that this is not: one that was made with it, so
    that it cannot be told from the weight as it was before.
    """
    residual = getattr(leaf, "residual", False)
    return (
        residual
        and bool(_quantization_description(expected_fingerprint))
        and fingerprint(weight) != expected_fingerprint
    )


def _matches_fingerprint(weight: Any, expected_fingerprint: Any) -> bool:
    """Whether a fingerprint is that of a weight, or of what the weight is once it is quantised."""
    if fingerprint(weight) == expected_fingerprint:
        return True
    description = _quantization_description(expected_fingerprint)
    if isinstance(weight, QArray) or not description:
        return False
    quantised = quantize_like(weight, json.loads(description))
    return quantised is not None and fingerprint(quantised) == expected_fingerprint
