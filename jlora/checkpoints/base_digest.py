"""Digests of a base checkpoint: every tensor and every field of config.json.

The fingerprints of an adapter file sample the adapted weights. A run depends on all weights and on
config.json. It reads the folder again at its end and when it resumes, and so does an export.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from jlora.checkpoints.safetensors_io import (
    CheckpointReader,
    open_checkpoint,
    read_json,
    replace_file_atomically,
)

BASE_DIGEST_FILE = "base_digest.json"  # In PEFT folders, where PEFT ignores it.

# Names of the parts of a base that differ, in errors.
OTHER_BASE = {"tensors": "other weights", "config": "another config.json"}

# Fields of config.json that describe the file and not the model.
_DESCRIPTIVE_FIELDS = frozenset({"_name_or_path", "transformers_version"})

_NUM_THREADS = 4  # Hashing releases Python's lock.


class BaseDigest(NamedTuple):
    """Digest of a base checkpoint.

    Attributes:
        config: Fields of config.json by name, without those that describe the file.
        tensors: SHA-256 of the dtype, shape and values of every tensor, by its name in the files.
            It does not depend on the number of files.
    """

    config: dict[str, Any]
    tensors: dict[str, str]

    @classmethod
    def from_folder(cls, folder: Path) -> BaseDigest:
        """Reads all files of a checkpoint folder, one tensor at a time.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged.
        """
        with (
            open_checkpoint(folder) as reader,
            concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as executor,
        ):
            config = read_json(folder / "config.json")
            names = sorted(reader.headers)
            hashes = executor.map(lambda name: _hash_tensor(reader, name), names)
            tensors = dict(zip(names, hashes, strict=True))
        kept = {name: value for name, value in config.items() if name not in _DESCRIPTIVE_FIELDS}
        return cls(kept, tensors)

    def summarize(self) -> dict[str, str]:
        """Returns one SHA-256 of all tensors, and one of config.json."""
        return {
            name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
            for name, part in (("tensors", self.tensors), ("config", self.config))
        }

    def write_beside_peft(self, folder: Path) -> None:
        """Writes the summary to a PEFT folder, for `check_base_checkpoint`."""
        text = json.dumps(self.summarize(), indent=2, sort_keys=True) + "\n"
        replace_file_atomically(folder / BASE_DIGEST_FILE, text.encode())

    def check_unchanged(self, folder: Path) -> None:
        """Checks that a folder still has this checkpoint.

        Raises:
            ValueError: A weight or a field of config.json is another one.
        """
        now = BaseDigest.from_folder(folder)
        changed = [
            *(f"config.json: {name}" for name in _changed_keys(self.config, now.config)),
            *(f"the weight {name}" for name in _changed_keys(self.tensors, now.tensors)),
        ]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"The base in {folder} changed during the run ({changed[0]}{more}), so nothing is "
                f"exported with it; the adapter is written. Restore the files, then continue with "
                f"resume=True (--resume)."
            )


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the keys whose values differ, or that only one of two mappings has."""
    missing = object()
    keys = dict.fromkeys([*old, *new])
    return [key for key in keys if old.get(key, missing) != new.get(key, missing)]


def _hash_tensor(reader: CheckpointReader, name: str) -> str:
    header = reader.headers[name]
    digest = hashlib.sha256(f"{header.dtype} {header.shape} ".encode())
    digest.update(reader.read_bytes(name).data)
    return digest.hexdigest()
