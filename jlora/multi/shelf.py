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
from jlora.checkpoints.tensors import DTYPES, file_bytes
from jlora.multi.slots import Padded

_DTYPES = {**DTYPES, "F64": np.dtype(np.float64)}


class Held(NamedTuple):
    """An adapter on the host.

    Attributes:
        content: The hash of the adapter that it was made of.
        factors: For every weight, as they lie in a slot.
    """

    content: str
    factors: Mapping[str, Padded]

    @classmethod
    def of(cls, adapter: Mapping[str, Any], factors: Mapping[str, Padded]) -> Held:
        """An adapter and its factors."""
        return cls(content_hash(adapter), factors)


class _File(NamedTuple):
    """Where an adapter was written to, of what it was made, and what the file holds."""

    path: Path
    content: str
    digest: bytes


class Shelf:
    """Adapters by name: as many as fit in the host's memory, the least recently used in files."""

    def __init__(self, most: int | None, folder: str | Path | None) -> None:
        if most is not None and most < 1:
            raise ValueError(f"host={most} leaves no room for an adapter. Use 1 or more, or None.")
        if (most is None) != (folder is None):
            raise ValueError(
                f"host={most} and folder={folder!r} belong together: what the host has no room for "
                f"is written to the folder. Give both, or neither."
            )
        self._most = most
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._held: collections.OrderedDict[str, Held] = collections.OrderedDict()
        self._files: dict[str, _File] = {}
        self.written = 0
        self.read = 0

    @property
    def names(self) -> set[str]:
        """Of all adapters."""
        return {*self._held, *self._files}

    def content(self, name: str) -> str:
        """The hash of one."""
        return self._held[name].content if name in self._held else self._files[name].content

    def add(self, name: str, held: Held) -> None:
        """Takes one in, in the place of any of that name.

        Raises:
            OSError: Another could not be written; everything is as it was.
        """
        previous, old = self._held.pop(name, None), self._files.get(name)
        self._held[name] = held
        try:
            self._make_room()
        except OSError:
            del self._held[name]
            if previous is not None:
                self._held[name] = previous
            raise
        if old is not None and old.content != held.content:
            self._forget(name, old)

    def remove(self, name: str) -> None:
        """Forgets one, and its file."""
        self._held.pop(name, None)
        if name in self._files:
            self._forget(name, self._files[name])

    def factors(self, name: str) -> Mapping[str, Padded]:
        """Those of one, read from its file where it is in one.

        Raises:
            FileNotFoundError: Its file is gone.
            ValueError: Its file is not as it was written.
            OSError: Another had to make room, and could not be written.
        """
        if name not in self._held:
            self._held[name] = self._read(name)
            self.read += 1
            try:
                self._make_room()
            except OSError:
                del self._held[name]
                raise
        self._held.move_to_end(name)
        return self._held[name].factors

    def _make_room(self) -> None:
        while self._most is not None and len(self._held) > self._most:
            name, held = next(iter(self._held.items()))
            if name not in self._files:  # A file of what it was before is gone already.
                self._files[name] = self._write(name, held)
                self.written += 1
            del self._held[name]

    def _write(self, name: str, held: Held) -> _File:
        assert self._folder is not None
        tensors = {
            f"{path}/{side}": np.ascontiguousarray(getattr(pair, side))
            for path, pair in held.factors.items()
            for side in Padded._fields
        }
        written = file_bytes(tensors, {"content": held.content})
        path = self._folder / f"{name}-{held.content[:16]}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(written)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)  # A full disk needs the room.
            raise
        return _File(path, held.content, hashlib.sha256(written).digest())

    def _read(self, name: str) -> Held:
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
            key: np.frombuffer(facts["data"], _DTYPES[facts["dtype"]]).reshape(facts["shape"])
            for key, facts in safetensors.deserialize(found)
        }
        weights = sorted({key.rpartition("/")[0] for key in tensors})
        pairs = {
            weight: Padded(*(tensors[f"{weight}/{side}"] for side in Padded._fields))
            for weight in weights
        }
        return Held(file.content, pairs)

    def _forget(self, name: str, file: _File) -> None:
        if self._files.get(name) == file:
            del self._files[name]
        file.path.unlink(missing_ok=True)
