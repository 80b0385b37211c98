"""Least recently used (LRU) cache of adapters in host memory, which evicts to files."""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from jlora.checkpoints.lineage import content_hash
from jlora.checkpoints.output_lock import (
    OutputInUseError,
    acquire_output_lock,
    release_output_lock,
)
from jlora.checkpoints.safetensors_io import (
    FLOAT_DTYPES,
    PARTIAL_SUFFIX,
    replace_file_atomically,
    serialize_safetensors,
)
from jlora.multi_lora.slots import PaddedFactors

_SAFETENSORS_DTYPES = {**FLOAT_DTYPES, "F64": np.dtype(np.float64)}

_FILE_NAME = re.compile(
    rf"(\.?).+-([0-9a-f]{{16}})\.safetensors({re.escape(PARTIAL_SUFFIX)})?", re.DOTALL
)


class CachedAdapter(NamedTuple):
    """An adapter on the host.

    Attributes:
        content_hash: `jlora.content_hash` of the adapter before padding.
        factors: Factors of every weight, padded to the shape of a slot.
    """

    content_hash: str
    factors: Mapping[str, PaddedFactors]

    @classmethod
    def from_adapter(
        cls, adapter: Mapping[str, Any], factors: Mapping[str, PaddedFactors]
    ) -> CachedAdapter:
        """Returns the factors with the hash of the adapter."""
        return cls(content_hash(adapter), factors)


class _AdapterFile(NamedTuple):
    """File of an evicted adapter.

    Attributes:
        path: Path of the file.
        content_hash: Hash of the adapter.
        digest: SHA-256 of the file's bytes.
    """

    path: Path
    content_hash: str
    digest: bytes


class HostCache:
    """Adapters by name: the most recently used in host memory, all others in files.

    The files are for this cache alone. It removes them when it is garbage or the process ends, and
    those of a killed process are removed by the next cache on the folder. Other files stay.

    Attributes:
        disk_writes: Number of adapters written to files so far.
        disk_reads: Number of adapters read from files so far.
    """

    def __init__(self, max_adapters: int | None, folder: str | Path | None) -> None:
        """Builds an empty cache.

        Args:
            max_adapters: Number of adapters in host memory. None: no limit.
            folder: Folder of the files, created if missing; None if there is no limit.

        Raises:
            ValueError: `max_adapters` is less than 1, or only one of the two is given.
            OutputInUseError: Another cache uses the folder.
        """
        if max_adapters is not None and max_adapters < 1:
            raise ValueError(
                f"max_host_adapters={max_adapters} must be 1 or more, or None for no limit."
            )
        if (max_adapters is None) != (folder is None):
            raise ValueError(
                f"max_host_adapters={max_adapters} and folder={folder!r} must be given together: "
                f"adapters beyond the limit are written to the folder. Set both or neither."
            )
        self._max_adapters = max_adapters
        self._folder = None if folder is None else Path(folder)
        self._files: dict[str, _AdapterFile] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Until the cache is garbage: another one would delete and replace its files.
            try:
                lock_path = acquire_output_lock(self._folder, owner=object())
            except OutputInUseError:
                gc.collect()  # A bank that is no longer used, but refers to itself.
                lock_path = acquire_output_lock(self._folder, owner=object())
            weakref.finalize(self, _close_folder, self._files, lock_path, os.getpid())
            _remove_files_of_killed_caches(self._folder)
        self._in_memory: collections.OrderedDict[str, CachedAdapter] = collections.OrderedDict()
        self.disk_writes = 0
        self.disk_reads = 0

    def __contains__(self, name: object) -> bool:
        """Whether there is an adapter of a name, in memory or in a file."""
        return name in self._in_memory or name in self._files

    def __iter__(self) -> Iterator[str]:
        """Names of all adapters."""
        yield from self._in_memory
        yield from (name for name in self._files if name not in self._in_memory)

    def content_hash(self, name: str) -> str:
        """Returns the hash of an adapter."""
        return (
            self._in_memory[name].content_hash
            if name in self._in_memory
            else self._files[name].content_hash
        )

    def add(self, name: str, adapter: CachedAdapter) -> None:
        """Adds an adapter, in place of any of that name.

        Raises:
            OSError: Another adapter could not be evicted to a file; the cache is unchanged.
        """
        previous, old_file = self._in_memory.pop(name, None), self._files.get(name)
        self._in_memory[name] = adapter
        try:
            self._evict_to_disk()
        except OSError:
            del self._in_memory[name]
            if previous is not None:
                self._in_memory[name] = previous
            raise
        if old_file is not None and old_file.content_hash != adapter.content_hash:
            self._delete_file(name, old_file)

    def remove(self, name: str) -> None:
        """Removes an adapter and its file."""
        self._in_memory.pop(name, None)
        if name in self._files:
            self._delete_file(name, self._files[name])

    def load_factors(self, name: str) -> Mapping[str, PaddedFactors]:
        """Returns the factors of an adapter, read from its file if it is not in memory.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The file has changed since it was written.
            OSError: Another adapter had to be evicted and could not be written.
        """
        if name not in self._in_memory:
            self._in_memory[name] = self._read_file(name)
            self.disk_reads += 1
            try:
                self._evict_to_disk()
            except OSError:
                del self._in_memory[name]
                raise
        self._in_memory.move_to_end(name)
        return self._in_memory[name].factors

    def _evict_to_disk(self) -> None:
        while self._max_adapters is not None and len(self._in_memory) > self._max_adapters:
            name, adapter = next(iter(self._in_memory.items()))
            if name not in self._files:  # The file of a replaced adapter is deleted already.
                self._files[name] = self._write_file(name, adapter)
                self.disk_writes += 1
            del self._in_memory[name]

    def _write_file(self, name: str, adapter: CachedAdapter) -> _AdapterFile:
        assert self._folder is not None
        tensors = {
            f"{path}/{side}": np.ascontiguousarray(getattr(pair, side))
            for path, pair in adapter.factors.items()
            for side in PaddedFactors._fields
        }
        data = serialize_safetensors(tensors, {"content": adapter.content_hash})
        path = self._folder / f"{name}-{adapter.content_hash[:16]}.safetensors"
        replace_file_atomically(path, data)
        return _AdapterFile(path, adapter.content_hash, hashlib.sha256(data).digest())

    def _read_file(self, name: str) -> CachedAdapter:
        file = self._files[name]
        if not file.path.is_file():
            raise FileNotFoundError(
                f"{file.path}, the file of the adapter {name!r}, is missing. Remove the adapter "
                f"from the bank and add it again."
            )
        data = file.path.read_bytes()
        if hashlib.sha256(data).digest() != file.digest:
            raise ValueError(
                f"{file.path}, the file of the adapter {name!r}, has changed since the bank wrote "
                f"it. Remove the adapter from the bank and add it again."
            )
        # The NumPy reader of safetensors does not support bfloat16.
        tensors = {
            key: np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(
                tensor["shape"]
            )
            for key, tensor in safetensors.deserialize(data)
        }
        weights = sorted({key.rpartition("/")[0] for key in tensors})
        pairs = {
            weight: PaddedFactors(*(tensors[f"{weight}/{side}"] for side in PaddedFactors._fields))
            for weight in weights
        }
        return CachedAdapter(file.content_hash, pairs)

    def _delete_file(self, name: str, file: _AdapterFile) -> None:
        if self._files.get(name) == file:
            del self._files[name]
        file.path.unlink(missing_ok=True)


def _close_folder(files: Mapping[str, _AdapterFile], lock_path: Path, process: int) -> None:
    """Removes the files of a cache and releases its folder, but not in a forked process."""
    if os.getpid() != process:
        return
    try:
        for file in files.values():
            with contextlib.suppress(OSError):
                file.path.unlink(missing_ok=True)
    finally:
        release_output_lock(lock_path)


def _remove_files_of_killed_caches(folder: Path) -> None:
    """Removes the files that caches wrote to a folder, whose lock this cache holds."""
    for path in folder.iterdir():
        name = _FILE_NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_file():
            continue
        is_partial = bool(name[1] and name[3])
        if is_partial or (not name[3] and _read_content_hash(path).startswith(name[2])):
            path.unlink(missing_ok=True)


def _read_content_hash(path: Path) -> str:
    """Returns the hash in a file of a cache; a blank in another file."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata, keys = file.metadata() or {}, list(file.keys())
    except (OSError, safetensors.SafetensorError):
        return " "
    is_own = set(metadata) == {"content"} and all(
        key.rpartition("/")[2] in PaddedFactors._fields for key in keys
    )
    return metadata["content"] if is_own else " "
