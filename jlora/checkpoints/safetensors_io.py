"""Safetensors checkpoints: reading one tensor at a time, writing one file at a time, atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
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

# Bytes per element of all safetensors dtypes; weights have the dtypes above.
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
    """Header of one tensor.

    Attributes:
        file: Name of the file.
        dtype: dtype in the notation of safetensors, such as "F32".
        shape: Shape of the stored tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


class CheckpointReader:
    """Lazy reader of the tensors in one folder; at first it reads only the headers.

    Attributes:
        headers: Header of each tensor, by name.
        metadata: Metadata of the first file that has any.
        folder: Folder of the files, for error messages.
    """

    def __init__(self, files: Mapping[str, Any], folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        self._files = files
        self.metadata: dict[str, str] = {}
        for name, file in files.items():
            self.metadata = self.metadata or dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 -- it is not a mapping
                if key in self.headers:
                    raise ValueError(
                        f"{folder}: {key} is in {self.headers[key].file} and in {name}. Keep only "
                        f"the files of one save."
                    )
                tensor = file.get_slice(key)
                self.headers[key] = TensorHeader(
                    name, tensor.get_dtype(), tuple(tensor.get_shape())
                )

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or only a slice of it.

        Args:
            key: Name of the tensor.
            index: Slice along each axis. None: the complete tensor.
        """
        file = self._files[self.headers[key].file]
        if index is None or not index:
            return file.get_tensor(key)
        return file.get_slice(key)[index]


@contextlib.contextmanager
def open_checkpoint(folder: str | os.PathLike[str]) -> Iterator[CheckpointReader]:
    """Opens a folder's model.safetensors, or the shards in its index.

    Yields:
        A reader of the tensors.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A file is damaged, or the index and the files disagree.
    """
    folder = Path(folder)
    file_names, weight_map = _checkpoint_file_names(folder)
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open_safetensors(folder / n)) for n in file_names}
        reader = CheckpointReader(files, folder)
        if weight_map is not None:
            actual = {key: header.file for key, header in reader.headers.items()}
            different = sorted(set(actual.items()) ^ set(weight_map.items()))
            if different:
                raise ValueError(
                    f"{folder / SAFE_WEIGHTS_INDEX_NAME} and its files disagree about "
                    f"{format_names([key for key, _ in different])}. Copy the folder again from "
                    f"its source."
                )
        yield reader


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Opens one safetensors file for lazy reading.

    Yields:
        The file as `safetensors.safe_open` returns it.

    Raises:
        FileNotFoundError: The file is missing or not a regular file.
        ValueError: The file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a regular file.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again from its source.") from error


def read_finite_tensor(
    file: Any, key: str, path: Path, dtypes: Collection[str] = tuple(FLOAT_DTYPES)
) -> np.ndarray:
    """Reads one tensor of an adapter.

    Args:
        file: File that `open_safetensors` opened.
        key: Name of the tensor.
        path: Path of the file, for error messages.
        dtypes: Accepted dtypes, in the notation of safetensors.

    Raises:
        ValueError: The tensor has another dtype, or contains NaN or Inf.
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
            f"{path}: {key} holds NaN or Inf. Use an earlier checkpoint of the adapter."
        )
    return tensor


def _checkpoint_file_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Returns the weight files of a folder, and the file of each tensor if there is an index."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME], None
    if not index.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder. Pass the folder of a checkpoint, or its owner/name on "
                f"the Hub."
            )
        unsupported = sorted(
            p.name for pattern in _UNSUPPORTED_FILE_PATTERNS for p in folder.glob(pattern)
        )
        advice = (
            f"{format_names(unsupported)} are not opened, because such files can run code: write "
            f"safetensors with `save_pretrained`."
            if unsupported
            else "Pass the folder that contains one of them."
        )
        raise FileNotFoundError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. {advice}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in weight_map.values()
    ):
        raise ValueError(
            f"{index}: weight_map must map every tensor to a .safetensors file next to the index. "
            f"Copy it again from its source."
        )
    return sorted(set(weight_map.values())), weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that contains an object.

    Raises:
        FileNotFoundError: The file is missing or not a regular file.
        ValueError: The file is not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a regular file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it again from its source.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must contain a JSON object, got {type(content).__name__}. Copy it again from "
            f"its source."
        )
    return content


def write_shards(
    folder: Path,
    tensor_bytes: Mapping[str, int],
    get_tensor: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int,
) -> None:
    """Writes tensors to one file, or to several with an index.

    Args:
        folder: Existing folder.
        tensor_bytes: Size of each tensor in bytes, by name.
        get_tensor: Function from the name of a tensor to the tensor, called once per name. Only
            the tensors of one file are in memory at a time.
        metadata: Metadata of every file.
        max_shard_size: Maximum size of a file, in bytes. A single larger tensor has a larger file.
    """
    shards: list[list[str]] = [[]]
    shard_size = 0
    for key, size in tensor_bytes.items():
        if shards[-1] and shard_size + size > max_shard_size:
            shards.append([])
            shard_size = 0
        shards[-1].append(key)
        shard_size += size
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else SAFE_WEIGHTS_NAME
        )
        tensors = {key: np.ascontiguousarray(get_tensor(key)) for key in keys}
        safetensors.numpy.save_file(tensors, folder / name, metadata=dict(metadata))
        weight_map.update(dict.fromkeys(keys, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor_bytes.values())}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def replace_file_atomically(path: Path, content: bytes) -> None:
    """Writes a file of which readers see the old or the new content, even after a crash."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def serialize_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a safetensors file; equal tensors and metadata give equal bytes.

    The safetensors library does not guarantee this: its order of the metadata differs between runs.
    """
    content = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in tensors.items()})
    size = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at multiples of 8.
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@contextlib.contextmanager
def create_folder_atomically(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a folder atomically: it appears when the block ends, and not at all if it fails.

    Yields:
        A temporary folder, which is renamed when the block ends.

    Raises:
        FileExistsError: A file or folder of that name exists; it remains unchanged.
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
        for path in (path for path in partial.rglob("*") if path.is_file()):
            # The safetensors library creates files that only their owner can read.
            path.chmod(0o666 & ~_get_umask())
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_new_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one safetensors file atomically: it appears complete or not at all.

    Raises:
        FileExistsError: A file or folder of that name exists; it remains unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.numpy.save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.chmod(0o666 & ~_get_umask())
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # A link, unlike a rename, does not replace a file that was created in the meantime.
        os.link(partial, path)
    except FileExistsError as error:
        raise FileExistsError(
            f"path={str(path)!r} exists and is left as it was. Choose another name."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _get_umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def format_names(names: list[str], max_names: int = 6) -> str:
    """Returns the first names, and the number of the others."""
    others = [f"and {len(names) - max_names} more"] if len(names) > max_names else []
    return ", ".join([*names[:max_names], *others])
