"""Adapters that wait on the host, and beyond a number of them in files."""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from jlora.checkpoints.lineage import content_hash
from jlora.checkpoints.safetensors_io import FLOAT_DTYPES, serialize_safetensors
from jlora.multi_lora.slots import PaddedFactors

_SAFETENSORS_DTYPES = {**FLOAT_DTYPES, "F64": np.dtype(np.float64)}


class CachedAdapter(NamedTuple):
    """An adapter on the host.

    Attributes:
        content_hash: The hash of the adapter that it was made of.
        factors: For every weight, as they lie in a slot.
    """

    content_hash: str
    factors: Mapping[str, PaddedFactors]

    @classmethod
    def from_adapter(
        cls, adapter: Mapping[str, Any], factors: Mapping[str, PaddedFactors]
    ) -> CachedAdapter:
        """An adapter and its factors."""
        return cls(content_hash(adapter), factors)


class _AdapterFile(NamedTuple):
    """Where an adapter was written to, of what it was made, and what the file holds."""

    path: Path
    content_hash: str
    digest: bytes


class HostCache:
    """Adapters by name: as many as fit in the host's memory, the least recently used in files."""

    def __init__(self, max_adapters: int | None, folder: str | Path | None) -> None:
        if max_adapters is not None and max_adapters < 1:
            raise ValueError(
                f"max_host_adapters={max_adapters} leaves no room for an adapter. Use 1 or more, or None."
            )
        if (max_adapters is None) != (folder is None):
            raise ValueError(
                f"max_host_adapters={max_adapters} and folder={folder!r} belong together: what the host has no room for "
                f"is written to the folder. Give both, or neither."
            )
        self._max_adapters = max_adapters
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._in_memory: collections.OrderedDict[str, CachedAdapter] = collections.OrderedDict()
        self._files: dict[str, _AdapterFile] = {}
        self.disk_writes = 0
        self.disk_reads = 0

    @property
    def names(self) -> set[str]:
        """Of all adapters."""
        return {*self._in_memory, *self._files}

    def content_hash(self, name: str) -> str:
        """The hash of one."""
        return (
            self._in_memory[name].content_hash
            if name in self._in_memory
            else self._files[name].content_hash
        )

    def add(self, name: str, adapter: CachedAdapter) -> None:
        """Takes one in, in the place of any of that name.

        Raises:
            OSError: Another could not be written; everything is as it was.
        """
        previous, old = self._in_memory.pop(name, None), self._files.get(name)
        self._in_memory[name] = adapter
        try:
            self._evict_to_disk()
        except OSError:
            del self._in_memory[name]
            if previous is not None:
                self._in_memory[name] = previous
            raise
        if old is not None and old.content_hash != adapter.content_hash:
            self._delete_file(name, old)

    def remove(self, name: str) -> None:
        """Forgets one, and its file."""
        self._in_memory.pop(name, None)
        if name in self._files:
            self._delete_file(name, self._files[name])

    def load_factors(self, name: str) -> Mapping[str, PaddedFactors]:
        """Those of one, read from its file where it is in one.

        Raises:
            FileNotFoundError: Its file is gone.
            ValueError: Its file is not as it was written.
            OSError: Another had to make room, and could not be written.
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
            name, held = next(iter(self._in_memory.items()))
            if name not in self._files:  # A file of what it was before is gone already.
                self._files[name] = self._write_file(name, held)
                self.disk_writes += 1
            del self._in_memory[name]

    def _write_file(self, name: str, adapter: CachedAdapter) -> _AdapterFile:
        assert self._folder is not None
        tensors = {
            f"{path}/{side}": np.ascontiguousarray(getattr(pair, side))
            for path, pair in adapter.factors.items()
            for side in PaddedFactors._fields
        }
        written = serialize_safetensors(tensors, {"content": adapter.content_hash})
        path = self._folder / f"{name}-{adapter.content_hash[:16]}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(written)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)  # A full disk needs the room.
            raise
        return _AdapterFile(path, adapter.content_hash, hashlib.sha256(written).digest())

    def _read_file(self, name: str) -> CachedAdapter:
        file = self._files[name]
        if not file.path.is_file():
            raise FileNotFoundError(
                f"{file.path}, to which the bank wrote the adapter {name!r}, is gone. Remove the "
                f"adapter from the bank, and add it anew."
            )
        found = file.path.read_bytes()
        if hashlib.sha256(found).digest() != file.digest:
            raise ValueError(
                f"{file.path} is not as the bank wrote it for the adapter {name!r}. Remove the "
                f"adapter from the bank, and add it anew."
            )
        # The library's own reader for NumPy knows no bfloat16.
        tensors = {
            key: np.frombuffer(facts["data"], _SAFETENSORS_DTYPES[facts["dtype"]]).reshape(
                facts["shape"]
            )
            for key, facts in safetensors.deserialize(found)
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
