"""The persistent compilation cache: whose folder is used, and what a later process finds in it."""

from __future__ import annotations

import pathlib
import stat
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jlora.training.runtime import persistent_compilation_cache, user_compilation_cache


class KilledError(Exception):
    """Ends what runs inside the cache."""


@pytest.fixture
def home(no_cache: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A user's cache folder, on a machine that seems to have a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def settings() -> dict[str, object]:
    names = ("cache_dir", "cache_max_size")
    found = {name: getattr(jax.config, f"jax_compilation_{name}") for name in names}
    return {**found, "seconds": jax.config.jax_persistent_cache_min_compile_time_secs}


def test_cache_restores_config(no_cache: None, tmp_path: pathlib.Path) -> None:
    before = settings()

    def die_inside() -> None:
        given = {"jax_persistent_cache_min_compile_time_secs": 7.0}
        with persistent_compilation_cache(tmp_path / "cache", **given):
            assert settings() == {**before, "cache_dir": str(tmp_path / "cache"), "seconds": 7.0}
            raise KilledError

    with pytest.raises(KilledError):
        die_inside()
    assert settings() == before


def test_cache_keeps_the_users_folder(home: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(home / "own"))
    try:
        with persistent_compilation_cache(home / "cache"):
            assert jax.config.jax_compilation_cache_dir == str(home / "own")
        with user_compilation_cache() as folder:
            assert folder is None
            assert jax.config.jax_compilation_cache_dir == str(home / "own")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not (home / "jlora").exists()


@pytest.fixture
def hits() -> Iterator[list[str]]:
    """Programs that were found in a cache."""
    found = []

    def listen(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)


def test_later_run_finds_its_program(home: pathlib.Path, hits: list[str]) -> None:
    before = settings()
    # JAX would stay with the first folder.
    jax.config.update("jax_compilation_cache_dir", str(home / "earlier"))
    jax.jit(lambda x: x @ x - 54321)(jnp.ones((3, 3)))
    jax.config.update("jax_compilation_cache_dir", None)
    for found in (0, 1):
        with user_compilation_cache() as folder:
            assert folder == home / "jlora" / "programs"
            assert settings() == {**before, "cache_dir": str(folder), "cache_max_size": 10 * 2**30}
            # A function of its own, as in another process.
            jax.jit(lambda x: x @ x + 12345)(jnp.ones((3, 3)))
        assert bool(hits) == bool(found)
        hits.clear()
    assert any(folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert settings() == before


def test_cpu_and_unwritable_home_keep_none(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "jlora").write_text("a file where the folder should be")
    for backend in ("gpu", "cpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        with user_compilation_cache() as folder:
            assert folder is None
            assert jax.config.jax_compilation_cache_dir is None
        (home / "jlora").unlink(missing_ok=True)
    assert not (home / "jlora").exists()


def test_cache_can_be_turned_off(home: pathlib.Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with user_compilation_cache() as folder:
            assert folder is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
    assert not (home / "jlora").exists()


def test_relative_cache_home_is_ignored(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(home))
    with user_compilation_cache() as folder:
        assert folder == home / ".cache" / "jlora" / "programs"
