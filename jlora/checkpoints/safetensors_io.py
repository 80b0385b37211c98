"""Safetensors checkpoints: reading one tensor at a time, writing one file at a time, atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from jlora.checkpoints.output_lock import lock_output, name_output_in_errors, open_locked
from jlora.checkpoints.text_files import check_regular_file, parse_json, read_json

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

_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
}

# Ending of files and folders that are not complete; a killed process leaves them.
PARTIAL_SUFFIX = ".partial"

# Ending of a folder that is being replaced.
REPLACED_SUFFIX = ".replaced"

# Bytes that are read at a time from a tensor that is transposed, or of which columns are left out.
_READ_BYTES = 1 << 23

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
        num_bytes: Size of the stored tensor in bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class _TensorFile:
    """One safetensors file, of which tensors are read to memory of their own.

    The safetensors library maps files into memory, where pages that were read once count as memory
    of the process until the file is closed.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        self._file = stack.enter_context(path.open("rb", buffering=0))
        self._lock = threading.Lock()
        with open_safetensors(path) as library_file:  # Validates the header.
            self.metadata = dict(library_file.metadata() or {})
        if not os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
            raise ValueError(f"{path} was replaced while it was opened. Load it again.")
        length = int.from_bytes(self._file.read(8), "little")
        header = parse_json(self._file.read(length), str(path))
        header.pop("__metadata__", None)
        self._starts = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}
        self.headers = {
            key: TensorHeader(
                path.name,
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for key, entry in header.items()
        }

    def read_bytes(self, key: str, start: int, stop: int) -> np.ndarray:
        """Returns a range of a tensor's bytes, (stop - start,) uint8."""
        with self._lock:
            self._file.seek(self._starts[key] + start)
            data = np.fromfile(self._file, np.uint8, stop - start)
        if data.size != stop - start:
            raise ValueError(f"{self.path} became shorter while it was read. Load it again.")
        return data


class CheckpointReader:
    """Lazy reader of the tensors in one folder; at first it reads only the headers.

    Attributes:
        headers: Header of each tensor, by name.
        metadata: Metadata of the first file that has any.
        folder: Folder of the files, for error messages.
    """

    def __init__(self, files: Mapping[str, _TensorFile], folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        self._files = files
        self.metadata: dict[str, str] = {}
        for name, file in files.items():
            self.metadata = self.metadata or file.metadata
            repeated = file.headers.keys() & self.headers.keys()
            if repeated:
                key = min(repeated)
                raise ValueError(
                    f"{folder}: {key} is in {self.headers[key].file} and in {name}. Keep only "
                    f"the files of one save."
                )
            self.headers.update(file.headers)

    def read(
        self,
        key: str,
        index: tuple[slice, ...] | None = None,
        axis_order: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """Reads a tensor, or only a slice of it, to one contiguous array.

        Args:
            key: Name of the tensor, whose dtype is one of `FLOAT_DTYPES`.
            index: Slice along each axis of the tensor. None: the complete tensor.
            axis_order: Axis of the tensor for each axis of the result. None: the same axes.
        """
        header = self.headers[key]
        dtype, shape = FLOAT_DTYPES[header.dtype], header.shape
        if not shape:
            return self.read_bytes(key).view(dtype).reshape(shape)
        rows, *others = [
            slice(*one.indices(size)[:2])
            for one, size in zip(index or (slice(None),) * len(shape), shape, strict=True)
        ]
        row_bytes = header.num_bytes // max(shape[0], 1)
        file = self._files[header.file]

        def read_rows(start: int, stop: int) -> np.ndarray:
            data = file.read_bytes(key, start * row_bytes, stop * row_bytes)
            return data.view(dtype).reshape(stop - start, *shape[1:])

        order = tuple(range(len(shape))) if axis_order is None else axis_order
        has_full_rows = all(
            one == slice(0, size) for one, size in zip(others, shape[1:], strict=True)
        )
        if has_full_rows and order == tuple(range(len(shape))):
            return read_rows(rows.start, rows.stop)
        sizes = [one.stop - one.start for one in (rows, *others)]
        result = np.empty([sizes[axis] for axis in order], dtype)
        target = result.transpose(np.argsort(order))  # A view in the order of the tensor.
        block_bytes = min(_READ_BYTES, header.num_bytes // 8)
        step = max(1, block_bytes // max(row_bytes, 1))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            block = read_rows(start, stop)[(slice(None), *others)]
            target[start - rows.start : stop - rows.start] = block
        return result

    def read_bytes(self, key: str) -> np.ndarray:
        """Reads the bytes of a tensor of any dtype, (bytes,) uint8."""
        header = self.headers[key]
        return self._files[header.file].read_bytes(key, 0, header.num_bytes)


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
        for name in file_names:
            try:
                check_regular_file(folder / name)
            except FileNotFoundError as error:
                if weight_map is None:
                    raise
                index = folder / SAFE_WEIGHTS_INDEX_NAME
                raise FileNotFoundError(f"{index} names {name}. {error}") from error
        files = {name: _TensorFile(folder / name, stack) for name in file_names}
        reader = CheckpointReader(files, folder)
        if not reader.headers:
            names = [SAFE_WEIGHTS_INDEX_NAME] if weight_map is not None else file_names
            raise ValueError(
                f"{folder / names[0]} has no tensors. Copy the folder again from its source."
            )
        if weight_map is not None:
            actual = {key: header.file for key, header in reader.headers.items()}
            different = sorted(set(actual.items()) ^ set(weight_map.items()))
            if different:
                names = format_names(sorted({name for _, name in different}))
                raise ValueError(
                    f"{folder / SAFE_WEIGHTS_INDEX_NAME} and {names} disagree about "
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
    check_regular_file(path)
    with contextlib.ExitStack() as stack:
        try:  # Without the block, which may fail for another reason.
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Copy it again from its source."
            ) from error
        yield file


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
    if os.path.lexists(folder / SAFE_WEIGHTS_NAME):
        return [SAFE_WEIGHTS_NAME], None
    if not os.path.lexists(index):
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
        isinstance(name, str) and re.fullmatch(r"[^/\\\0]{1,240}\.safetensors", name)
        for name in weight_map.values()
    ):
        raise ValueError(
            f"{index}: weight_map must map every tensor to a .safetensors file next to the index. "
            f"Copy it again from its source."
        )
    return sorted(set(weight_map.values())), weight_map


def write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    get_tensor: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int,
) -> None:
    """Writes tensors to one file, or to several with an index.

    Args:
        folder: Existing folder.
        specs: dtype, shape and size of each tensor, by name.
        get_tensor: Function from the name of a tensor to the tensor, or to its bytes as uint8,
            called once per name. Only one tensor is in memory at a time.
        metadata: Metadata of every file.
        max_shard_size: Maximum size of a file, in bytes. A single larger tensor has a larger file.
    """
    shards: list[list[str]] = [[]]
    shard_size = 0
    for key, spec in specs.items():
        if shards[-1] and shard_size + spec.num_bytes > max_shard_size:
            shards.append([])
            shard_size = 0
        shards[-1].append(key)
        shard_size += spec.num_bytes
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else SAFE_WEIGHTS_NAME
        )
        write_safetensors(folder / name, {key: specs[key] for key in keys}, get_tensor, metadata)
        weight_map.update(dict.fromkeys(keys, name))
    if len(shards) > 1:
        total_size = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


class TensorSpec(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        dtype: dtype in the notation of safetensors, such as "F32".
        shape: Shape.
        num_bytes: Size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @classmethod
    def from_array(cls, array: Any) -> TensorSpec:
        """Returns the spec of an array or of its abstract value."""
        dtype = np.dtype(array.dtype)
        size = math.prod(array.shape) * dtype.itemsize
        return cls(_SAFETENSORS_DTYPES[dtype.name], tuple(array.shape), size)


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get_tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes one safetensors file, one tensor after another.

    Equal tensors and metadata give equal bytes. The safetensors library does not guarantee this:
    its order of the metadata differs between runs.

    Args:
        path: File to write.
        specs: dtype, shape and size of each tensor, by name.
        get_tensor: Function from the name of a tensor to the tensor, or to its bytes as uint8,
            called once per name in the order of `specs`, wider dtypes first.
        metadata: Metadata of the file.

    Raises:
        OSError: The file cannot be written.
    """
    order, header = _safetensors_header(specs, metadata)
    with path.open("wb") as file:
        file.write(header)
        for key in order:
            data = _tensor_bytes(get_tensor(key))
            if data.nbytes != specs[key].num_bytes:
                raise ValueError(f"{key} has {data.nbytes} bytes, expected {specs[key]}.")
            file.write(data)
            del data  # Before the next tensor is made.
        file.flush()
        os.fsync(file.fileno())


def serialize_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a safetensors file; equal tensors and metadata give equal bytes."""
    specs = {key: TensorSpec.from_array(tensors[key]) for key in sorted(tensors)}
    order, header = _safetensors_header(specs, metadata)
    return b"".join([header, *(_tensor_bytes(tensors[key]) for key in order)])


def _safetensors_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[list[str], bytes]:
    """Returns the order of the tensors in a file, and the bytes before them."""

    def item_bytes(key: str) -> int:
        return specs[key].num_bytes // max(math.prod(specs[key].shape), 1)

    # Wider dtypes first, so that every tensor begins at a multiple of its items' size.
    order = sorted(specs, key=item_bytes, reverse=True)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for key in order:
        dtype, shape, num_bytes = specs[key]
        offsets = [start, start + num_bytes]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        start += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at multiples of 8.
    return order, len(text).to_bytes(8, "little") + text


def _tensor_bytes(array: np.ndarray) -> memoryview:
    # bfloat16 has no buffer of its own.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def replace_file_atomically(path: Path, content: bytes) -> None:
    """Writes a file of which readers see the old or the new content, even after a crash.

    The rights of a new file follow the umask. The content is first written to a file of a fixed
    name next to it, so that the next write cleans up after a killed one; writers of one file wait
    for each other.

    Raises:
        FileNotFoundError: The folder is missing.
        OSError: The file cannot be written; the old one is unchanged.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder. Create it to write {path.name}.")
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    with name_output_in_errors(path), open_locked(partial) as file:
        try:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def create_folder_atomically(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a folder atomically: it appears when the block ends, and not at all if it fails.

    The remains of a killed process that wrote the same folder are removed first.

    Yields:
        A temporary folder, which is renamed when the block ends.

    Raises:
        FileExistsError: A file or folder of that name exists; it remains unchanged.
        OutputInUseError: Another process is writing it.
    """
    folder = Path(folder)
    _check_not_exists(folder)
    with lock_output(folder):
        _check_not_exists(folder)  # Another process may just have written it.
        partial = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
        remove_path(partial)
        partial.mkdir()
        try:
            yield partial
            sync_folder(partial)
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def replace_folder_atomically(folder: Path) -> Iterator[Path]:
    """Replaces a folder, which its writer creates, when the block ends.

    The caller holds the lock of the folder, or of the one around it. Whenever the process is
    killed, `folder` is the old one, the new one, or missing, and complete.

    Yields:
        Path of a temporary folder, to be created by the block.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
    replaced = folder.with_name(f".{folder.name}{REPLACED_SUFFIX}")
    remove_path(partial)
    remove_path(replaced)
    try:
        yield partial
        sync_folder(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except BaseException:
        remove_path(partial)
        raise
    remove_path(replaced)


def sync_folder(folder: Path) -> None:
    """Writes the files of a folder to the disk, before the folder is renamed."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove_path(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partial_outputs(folder: Path) -> None:
    """Removes what a killed process has left in a folder, whose lock this process holds."""
    for suffix in (PARTIAL_SUFFIX, REPLACED_SUFFIX):
        for path in folder.glob(f".*{suffix}"):
            remove_path(path)


def _check_not_exists(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(
            f"path={str(path)!r} exists and is left as it was. Choose another name."
        )


def write_new_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one safetensors file atomically: it appears complete or not at all.

    Raises:
        FileExistsError: A file or folder of that name exists; it remains unchanged.
        OutputInUseError: Another process is writing it.
    """
    path = Path(path)
    _check_not_exists(path)
    with lock_output(path):
        _check_not_exists(path)  # Another process may just have written it.
        replace_file_atomically(path, serialize_safetensors(tensors, metadata))


def format_names(names: list[str], max_names: int = 6) -> str:
    """Returns the first names, cut off after 200 letters, and the number of the others."""
    others = [f"and {len(names) - max_names} more"] if len(names) > max_names else []
    shown = [name if len(name) <= 200 else f"{name[:197]}..." for name in names[:max_names]]
    return ", ".join([*shown, *others])
