"""JAX's persistent compilation cache, in a folder of the user or of a search."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_MAX_BYTES = 10 * 2**30


@contextlib.contextmanager
def persistent_compilation_cache(folder: Path, **settings: Any) -> Iterator[None]:
    """Enables JAX's persistent compilation cache in a folder, for later processes to reuse.

    A cache folder that the user has set stays in use.

    Args:
        folder: Folder of the compiled programs, which JAX creates.
        **settings: Further settings of `jax.config`, by name.
    """
    settings = {"jax_compilation_cache_dir": str(folder), **settings}
    previous = {name: getattr(jax.config, name) for name in settings}
    if previous["jax_compilation_cache_dir"] is not None:
        yield
        return
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        # JAX fixes the folder, or the absence of one, when it first compiles.
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in previous.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def user_compilation_cache() -> Iterator[Path | None]:
    """Keeps the programs that are compiled for GPUs and TPUs in a folder of the user.

    The folder is $XDG_CACHE_HOME/jlora/programs, by default ~/.cache/jlora/programs. The programs
    that were not used for longest are removed where they would exceed 10 GiB. Where the user has
    set a folder (JAX_COMPILATION_CACHE_DIR) or turned the cache off
    (JAX_ENABLE_COMPILATION_CACHE=false), that stays so. Programs for CPUs are not kept: they are
    compiled quickly, and for the instructions of one machine, where a home may be on several.

    Yields:
        The folder; None where programs are not kept in it.
    """
    config = jax.config.values
    is_set = config["jax_compilation_cache_dir"] is not None
    is_off = jax.default_backend() == "cpu" or not config["jax_enable_compilation_cache"]
    folder = None if is_set or is_off else _make_user_folder()
    if folder is None:
        yield None
        return
    with persistent_compilation_cache(folder, jax_compilation_cache_max_size=_MAX_BYTES):
        yield folder


def _make_user_folder() -> Path | None:
    """Returns the folder, created if it is missing; None where the user cannot write one."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification of these folders ignores relative paths.
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        folder = root / "jlora" / "programs"
        # Programs are executed: nobody else may write them.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # A file in its place, or no home.
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
