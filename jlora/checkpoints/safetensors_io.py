"""The tensors of a folder of safetensors files, read one at a time and written a file at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

FLOAT_DTYPES: dict[str, Any] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}

# Of the types of all safetensors files, in bytes; weights are of those above.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}

SAFE_WEIGHTS_NAME = "model.safetensors"

SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"

_UNSUPPORTED_FILE_PATTERNS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.npy",
    "*.npz",
    "*.h5",
    "*.msgpack",
)


class TensorHeader(NamedTuple):
    """What a file's header says of one tensor.

    Attributes:
        file: The file's name.
        dtype: As safetensors names it.
        shape: Of the tensor as stored.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


class CheckpointReader:
    """The tensors of one folder, of which the headers alone were read.

    Attributes:
        headers: What is known of each, by name.
        metadata: Of the first file.
        folder: The folder, for errors.
    """

    def __init__(self, files: Mapping[str, Any], folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        self._files = files
        self.metadata: dict[str, str] = {}
        for name, file in files.items():
            self.metadata = self.metadata or dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 -- it is no mapping
                if key in self.headers:
                    raise ValueError(
                        f"{folder}: {key} is in {self.headers[key].file} and in {name}. Keep the "
                        f"files that one program wrote."
                    )
                part = file.get_slice(key)
                self.headers[key] = TensorHeader(name, part.get_dtype(), tuple(part.get_shape()))

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a region of it, as stored. Nothing else is read."""
        file = self._files[self.headers[key].file]
        if index is None or not index:
            return file.get_tensor(key)
        return file.get_slice(key)[index]


@contextlib.contextmanager
def open_checkpoint(folder: str | os.PathLike[str]) -> Iterator[CheckpointReader]:
    """The tensors of a folder's model.safetensors, or of the shards that its index names.

    Raises:
        FileNotFoundError: There are no such files.
        ValueError: One is damaged, or the index and the files disagree.
    """
    folder = Path(folder)
    names, expected = _checkpoint_file_names(folder)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for name in names:
            files[name] = stack.enter_context(open_safetensors(folder / name))
        tensors = CheckpointReader(files, folder)
        if expected is not None:
            found = {key: header.file for key, header in tensors.headers.items()}
            wrong = sorted(set(found.items()) ^ set(expected.items()))
            if wrong:
                raise ValueError(
                    f"{folder / SAFE_WEIGHTS_INDEX_NAME} and the files that it names disagree about "
                    f"{format_names([key for key, _ in wrong])}. Copy the folder anew from its source."
                )
        yield tensors


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """One safetensors file behind its lazy reader.

    Raises:
        FileNotFoundError: There is no regular file of that name.
        ValueError: The file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no regular file.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it anew from its source.") from error


def read_finite_tensor(
    file: Any, key: str, path: Path, dtypes: Collection[str] = tuple(FLOAT_DTYPES)
) -> np.ndarray:
    """One tensor of an adapter, out of a file that `open_safetensors` opened.

    Raises:
        ValueError: It has a dtype that is none of those, or holds what is not finite.
    """
    dtype = file.get_slice(key).get_dtype()
    if dtype not in dtypes:
        raise ValueError(
            f"{path}: {key} has dtype {dtype}, none of {', '.join(dtypes)}. Save the adapter in "
            f"one of these."
        )
    tensor = file.get_tensor(key)
    if not np.isfinite(tensor.astype(np.float32)).all():
        raise ValueError(
            f"{path}: {key} holds NaN or Inf. Take an earlier checkpoint of the adapter."
        )
    return tensor


def _checkpoint_file_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The weight files of a folder, and which key is where if an index says so."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME], None
    if not index.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder. Give that of a checkpoint, or its owner/name on the Hub."
            )
        others = sorted(
            p.name for pattern in _UNSUPPORTED_FILE_PATTERNS for p in folder.glob(pattern)
        )
        raise FileNotFoundError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. "
            + (
                f"{format_names(others)} are not opened, since such files can run code: write "
                f"safetensors with `save_pretrained`."
                if others
                else "Give the folder that holds them."
            )
        )
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in places.values()
    ):
        raise ValueError(
            f"{index}: weight_map must say for every tensor which .safetensors file beside the "
            f"index holds it. Copy it anew from its source."
        )
    return sorted(set(places.values())), places


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no regular file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it anew from its source.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. Copy it anew from its source.")
    return content


def write_shards(
    folder: Path,
    tensor_bytes: Mapping[str, int],
    get_tensor: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int,
) -> None:
    """Writes tensors to as many files as it takes, with an index if they are several.

    Args:
        folder: An existing one.
        tensor_bytes: Of each tensor, in bytes.
        get_tensor: A tensor's name to the tensor. It is asked for once per name; no more than a file's
            tensors are held at a time.
        metadata: Of every file.
        max_shard_size: No file is larger, unless one tensor alone is.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in tensor_bytes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    places: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else SAFE_WEIGHTS_NAME
        )
        tensors = {key: np.ascontiguousarray(get_tensor(key)) for key in keys}
        safetensors.numpy.save_file(tensors, folder / name, metadata=dict(metadata))
        places.update(dict.fromkeys(keys, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor_bytes.values())}, "weight_map": places}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def serialize_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; equal tensors and metadata make equal bytes.

    The library writes metadata in an order that differs from run to run.
    """
    made = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in tensors.items()})
    size = int.from_bytes(made[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(made[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at multiples of 8.
    return len(text).to_bytes(8, "little") + text + made[8 + size :]


@contextlib.contextmanager
def create_folder_atomically(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears whole, under its name, when the block ends, and not at all if it fails.

    Raises:
        FileExistsError: There is something of that name; it is left as it was.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(
            f"folder={str(folder)!r} exists and is left as it was. Choose another name."
        )
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (file for file in partial.rglob("*") if file.is_file()):
            # safetensors makes its files readable by their owner alone.
            file.chmod(0o666 & ~_get_umask())
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_new_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """One safetensors file, which appears whole or not at all.

    Raises:
        FileExistsError: There is something of that name; it is left as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.numpy.save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.chmod(0o666 & ~_get_umask())
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        # A link, unlike a renaming, replaces nothing that came in between.
        os.link(partial, path)
    except FileExistsError as error:
        raise FileExistsError(
            f"path={str(path)!r} exists and is left as it was. Choose another name."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _get_umask() -> int:
    # There is no way to read it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def format_names(names: list[str], max_names: int = 6) -> str:
    """The first names, and how many are left."""
    more = [f"and {len(names) - max_names} more"] if len(names) > max_names else []
    return ", ".join([*names[:max_names], *more])
