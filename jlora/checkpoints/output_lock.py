"""Locks of output folders and files, so that two processes never write the same one."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".jlora.lock"

# File systems without locks of the operating system, such as some network file systems.
_UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


_FULL_ERRNOS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))

_HOLDER_READS = 10

_HOLDER_READ_SECONDS = 0.01


class OutputInUseError(OSError):
    """Raised when another process, or another thread, is writing an output.

    Example:
        >>> from jlora.checkpoints import OutputInUseError
        >>> issubclass(OutputInUseError, OSError)
        True
    """


class _HeldLock:
    """Lock that this process holds.

    Attributes:
        file: Locked file.
        owner: Thread or object that holds the lock.
        count: Number of blocks that hold it.
    """

    def __init__(self, file: IO[bytes], owner: Any) -> None:
        self.file, self.owner, self.count = file, owner, 1


_held: dict[Path, _HeldLock] = {}

# A thread may release a lock while it takes another one, since the garbage collector may end a
# `HostCache` at any time.
_held_guard = threading.RLock()


@contextlib.contextmanager
def lock_output(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of an output while the block runs.

    The lock is one of the operating system, which ends with the process, on `.jlora.lock` in an
    existing folder, or on a hidden file next to a new folder or file, which also counts once the
    folder exists. The file has the process, host, command and time, for the error of a second
    process. Blocks of one thread may hold the lock of the same output in each other. A forked
    process does not hold the locks of the process that it was forked from.

    Args:
        path: Folder or file that is written. A missing parent folder is created.

    Raises:
        OutputInUseError: Another process or thread holds the lock.
        OSError: The lock file cannot be written.
    """
    with name_output_in_errors(path):
        lock_path = acquire_output_lock(path)
        try:
            yield
        finally:
            release_output_lock(lock_path)


@contextlib.contextmanager
def name_output_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names an output, and what to do, in errors of a full disk, which name no file.

    Raises:
        OSError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in _FULL_ERRNOS:
            raise
        raise OSError(
            error.errno,
            f"{path} could not be written ({os.strerror(error.errno)}). Free disk space, or use "
            f"an output on another disk",
        ) from error


def acquire_output_lock(path: str | os.PathLike[str], owner: object = None) -> Path:
    """Takes the lock of an output, as `lock_output` does, and returns the path of its lock file.

    Args:
        path: Folder or file that is written.
        owner: Object that may take the lock again. None: the thread.

    Raises:
        OutputInUseError: Another process or thread holds the lock.
        OSError: The lock file cannot be written.
    """
    path, owner = Path(path).absolute(), threading.get_ident() if owner is None else owner
    while True:
        is_folder = path.is_dir()
        inside, beside = _lock_paths(path)
        beside.parent.mkdir(parents=True, exist_ok=True)
        lock_path = inside if is_folder else beside
        _acquire(path, lock_path, owner)
        try:
            if path.is_dir() and os.path.lexists(beside):
                # Who began before there was a folder holds the lock beside it.
                _acquire(path, beside, owner)
                release_output_lock(beside)
        except BaseException:
            release_output_lock(lock_path)
            raise
        if path.is_dir() == is_folder:
            return lock_path
        release_output_lock(lock_path)  # The folder has just been made.


def _lock_paths(path: Path) -> tuple[Path, Path]:
    """Returns the lock file in a folder, and the one beside a path that is no folder yet."""
    # A link to a folder has the locks of the folder.
    real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return real / LOCK_NAME, real.parent / f".{real.name}{LOCK_NAME}"


def _acquire(path: Path, lock_path: Path, owner: object) -> None:
    """Takes a lock, or raises an error that names its holder."""
    for _ in range(_HOLDER_READS):
        if _try_acquire(path, lock_path, owner):
            return
        if holder := _read_holder(lock_path):
            raise _make_in_use_error(path, holder)
        time.sleep(_HOLDER_READ_SECONDS)  # It has just begun, and writes who it is.
    raise _make_in_use_error(path, {})


def _try_acquire(path: Path, lock_path: Path, owner: object) -> bool:
    """Returns whether this process has taken the lock, or had it for this owner."""
    with _held_guard:
        held = _held.get(lock_path)
        if held is not None:
            if held.owner != owner:
                raise _make_in_use_error(path, _read_holder(lock_path))
            held.count += 1
            return True
        file = _try_open_locked(lock_path)
        if file is None:
            return False
        with contextlib.suppress(OSError):  # A full disk: the lock holds without a text.
            file.truncate(0)
            file.write(json.dumps(_describe_process()).encode())
        _held[lock_path] = _HeldLock(file, owner)
        return True


def release_output_lock(lock_path: Path) -> None:
    """Releases a lock that `acquire_output_lock` took, once for each time that it was taken.

    A process that was forked meanwhile has no lock to release.
    """
    with _held_guard:
        held = _held.get(lock_path)
        if held is None:
            return
        held.count -= 1
        if held.count:
            return
        del _held[lock_path]
        # While it is still locked: a later process creates another file.
        with contextlib.suppress(OSError):
            lock_path.unlink()
        held.file.close()


def _forget_locks() -> None:
    """Leaves the locks of a process to it alone, in a process that was forked from it."""
    global _held_guard
    _held_guard = threading.RLock()  # Another thread may have held it.
    for held in _held.values():
        held.file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def is_output_locked(path: str | os.PathLike[str]) -> bool:
    """Returns whether a process, this one included, holds the lock of an existing folder."""
    with _held_guard:
        return any(map(_is_lock_held, _lock_paths(Path(path).absolute())))


def _is_lock_held(lock_path: Path) -> bool:
    if lock_path in _held:
        return True
    if not lock_path.is_file():
        return False
    file = _try_open_locked(lock_path)
    if file is None:
        return True
    lock_path.unlink(missing_ok=True)  # Of a process that was killed.
    file.close()
    return False


@contextlib.contextmanager
def open_locked(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, empty, after waiting for other writers of this file.

    Yields:
        The file.

    Raises:
        OSError: The file cannot be opened.
    """
    while True:
        file = _open_regular(path)
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _UNSUPPORTED_ERRNOS:
                    file.close()
                    raise
        if _is_same_file(file, path):
            if not os.fstat(file.fileno()).st_size:
                break
            path.unlink()  # The remains of a killed process, with its rights.
        file.close()  # Otherwise, the writer before has renamed it.
    with file:
        yield file


def _open_regular(path: Path) -> IO[bytes]:
    """Opens or creates a file without following a link, with the rights of the umask."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try_open_locked(lock_path: Path) -> IO[bytes] | None:
    """Returns the locked file; None if another process holds the lock."""
    while True:
        file = _open_regular(lock_path)
        try:
            if not _try_lock(file, lock_path):
                file.close()
                return None
        except BaseException:
            file.close()
            raise
        if _is_same_file(file, lock_path):
            return file
        file.close()  # The process before has removed it.


def _try_lock(file: IO[bytes], lock_path: Path) -> bool:
    if fcntl is None:
        # Windows locks bytes for others to read as well, so it is one behind the text.
        import msvcrt

        file.seek(1 << 20)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        file.seek(0)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRNOS:
            raise
        return not _is_holder_alive(_read_holder(lock_path))


def _is_holder_alive(holder: dict[str, Any]) -> bool:
    """Returns whether the process of a lock file may exist, where the system has no locks."""
    if not holder or holder["pid"] == os.getpid():
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _describe_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _read_holder(lock_path: Path) -> dict[str, Any]:
    """Returns the process of a lock file; empty if it is not written yet."""
    try:
        holder = json.loads(lock_path.read_bytes()[:65536])
        return {
            "pid": int(holder["pid"]),
            **{name: str(holder[name])[:1000] for name in ("host", "command", "since")},
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _make_in_use_error(path: Path, holder: dict[str, Any]) -> OutputInUseError:
    who = "another process"
    if holder:
        who = (
            f"process {holder['pid']} on {holder['host']} (command {holder['command']!r}, since "
            f"{holder['since']})"
        )
    return OutputInUseError(
        f"{path} is in use: {who} is writing it. Wait until it ends, or use another output."
    )
