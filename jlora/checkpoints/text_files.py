"""JSON and text of untrusted files: bounded in size and depth, with errors that name the file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# The files of a checkpoint nest about ten levels. Python's own limit depends on the caller's depth.
_MAX_JSON_DEPTH = 100

# The longest published index and vocabulary files are below 40 MB.
_MAX_TEXT_BYTES = 256_000_000

_COPY_AGAIN = "Copy it again from its source."


def parse_json(text: str | bytes, source: str) -> Any:
    """Parses JSON of an untrusted origin.

    Args:
        text: JSON.
        source: Name of the file, with which errors begin.

    Raises:
        ValueError: The text is not JSON, or has more than 100 levels.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON ({error}). {_COPY_AGAIN}") from error
    if _exceeds_depth(value, _MAX_JSON_DEPTH):
        raise ValueError(
            f"{source} is not valid: it has more than {_MAX_JSON_DEPTH} levels of lists and "
            f"objects. {_COPY_AGAIN}"
        )
    return value


def _exceeds_depth(value: Any, limit: int) -> bool:
    """Returns whether lists and objects contain each other deeper than a limit."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def check_regular_file(path: Path) -> None:
    """Checks that a path is a file, or a link to one, before it is opened.

    Raises:
        FileNotFoundError: It is missing, a folder, a pipe, or a link to nothing.
    """
    if path.is_file():
        return
    reason = "is not a regular file" if os.path.lexists(path) else "is missing"
    if path.is_symlink() and not path.exists():
        reason = f"is a link to {os.readlink(path)}, which does not exist"
    raise FileNotFoundError(f"{path} {reason}. {_COPY_AGAIN}")


def read_text(path: Path, max_bytes: int = _MAX_TEXT_BYTES) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: Path of the file.
        max_bytes: Largest size of the file, by default 256 MB.

    Raises:
        FileNotFoundError: The file is missing or not a regular file.
        ValueError: The file is not UTF-8, or too large.
    """
    check_regular_file(path)
    if path.stat().st_size > max_bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {max_bytes:,} that a "
            f"text file may have. {_COPY_AGAIN}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). {_COPY_AGAIN}") from error


def read_json(path: Path, max_bytes: int = _MAX_TEXT_BYTES) -> dict[str, Any]:
    """Reads a JSON file that contains an object.

    Args:
        path: Path of the file.
        max_bytes: Largest size of the file, by default 256 MB.

    Raises:
        FileNotFoundError: The file is missing or not a regular file.
        ValueError: The file is too large, is not JSON, has more than 100 levels, or is not an
            object.
    """
    content = parse_json(read_text(path, max_bytes), str(path))
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} must contain a JSON object, got {type(content).__name__}. {_COPY_AGAIN}"
        )
    return dict(content)


def read_optional_text(path: Path) -> str | None:
    """Reads a text file in UTF-8; None if nothing has its name.

    A folder, or a link to a file that does not exist, is not a missing file.

    Raises:
        FileNotFoundError: The file is not a regular file.
        ValueError: The file is not UTF-8, or has more than 256 MB.
    """
    return read_text(path) if os.path.lexists(path) else None


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file that contains an object; None if nothing has its name.

    Raises:
        FileNotFoundError: The file is not a regular file.
        ValueError: The file is not JSON, has more than 100 levels, or is not an object.
    """
    return read_json(path) if os.path.lexists(path) else None


@contextlib.contextmanager
def name_file_in_errors(*paths: str | os.PathLike[str]) -> Iterator[None]:
    """Makes errors of the block, in which content of files is interpreted, name these files.

    Any value of a damaged or hostile file ends as a `ValueError`, whichever operation it fails in.
    `OSError` and `MemoryError` stay as they are, and so do errors that name a file already.

    Args:
        *paths: Files of the content.

    Raises:
        ValueError: The block failed; the message contains the names of the files.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        # A panic of the tokenizers library, which is written in Rust, is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        names = " and ".join(str(path) for path in paths)
        if isinstance(error, ValueError) and any(_mentions(str(error), path) for path in paths):
            raise
        if not isinstance(error, ValueError):
            raise ValueError(
                f"{names}: a value has the wrong type or range ({type(error).__name__}: "
                f"{str(error)[:500]}). {_COPY_AGAIN}"
            ) from error
        raise ValueError(f"{names}: {error}") from error


def _mentions(message: str, path: str | os.PathLike[str]) -> bool:
    """Returns whether a message names a file, or another one of its folder."""
    folder = str(Path(path).parent)
    is_folder_named = any(f"{folder}{end}" in message for end in (os.sep, ": "))
    return Path(path).name in message or (folder != "." and is_folder_named)
