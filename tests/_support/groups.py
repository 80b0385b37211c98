"""Groups of tests: the limit of the default group, and cases that are split between groups."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

_CPU_SECONDS = pytest.StashKey[float]()
# CPU seconds of the compilation in `_measure_slowdown` on the machine that the limit is meant for.
_REFERENCE_SECONDS = 0.1
# The same test takes up to twice as long where other processes share the core and its caches.
_NOISE = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "max_cpu_seconds", "CPU seconds that a test without a marker may take", default="0"
    )
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="run every N-th case of each test"
    )


@contextlib.contextmanager
def _without_program_cache() -> Iterator[None]:
    """Compiles everything inside anew, and not from the folder of compiled programs."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def _measure_slowdown() -> float:
    """Returns how much longer a compilation takes than on the reference, where nothing else runs.

    Most of a test's time is compilation, which other work on the core and its caches slows down
    more than a loop of Python.
    """
    import jax
    import jax.numpy as jnp

    def compile_chain(shift: float) -> float:
        def chain(x: jax.Array) -> jax.Array:
            for number in range(16):
                x = jnp.tanh(x @ x) + (number + shift)
            return x

        start = time.process_time()
        jax.jit(chain).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
        return time.process_time() - start

    with _without_program_cache():  # The first compilation of a process also loads libraries.
        shortest = min(compile_chain(shift) for shift in (0.25, 0.5, 0.75))
    return max(1.0, shortest / _REFERENCE_SECONDS)


def _has_own_group(item: pytest.Item) -> bool:
    return any(mark.name in ("slow", "foreign", "live", "gpu") for mark in item.iter_markers())


def _run_again(item: pytest.Item) -> float:
    """Returns the CPU seconds of a second run, in which everything is traced and compiled again.

    Infinite where the test does not pass twice with the same fixtures: a file exists already.
    """
    import jax

    jax.clear_caches()
    with _without_program_cache(), contextlib.suppress(Exception):
        start = time.process_time()
        item.runtest()
        return time.process_time() - start
    return math.inf


class CpuLimit:
    """The limit of one session, in seconds of the reference."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, None]:
        # CPU time of all threads of the process, so that waiting for other work does not count.
        # Fixtures that several tests share are made outside of the call.
        start = time.process_time()
        outcome = yield
        spent = time.process_time() - start
        if spent > self._seconds * _NOISE and outcome.excinfo is None and not _has_own_group(item):
            # Other work on the machine comes in bursts, so the faster of two runs counts.
            spent /= _measure_slowdown()
            if spent > self._seconds * _NOISE:
                spent = min(spent, _run_again(item) / _measure_slowdown())
        item.stash[_CPU_SECONDS] = spent

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, None]:
        outcome = yield
        report = outcome.get_result()
        spent = item.stash.get(_CPU_SECONDS, 0.0)
        if call.when != "call" or not report.passed or spent <= self._seconds * _NOISE:
            return
        if _has_own_group(item):
            return
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {spent:.1f} CPU seconds, and a test of the default group may take "
            f"{self._seconds:.1f} (max_cpu_seconds), and twice as much for noise. Make its set-up "
            f"cheaper, or mark it slow."
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases of a test as slow, but for every n-th of those under `thin(n, first)`.

    `--every N` then leaves out all but every N-th case of each test that is not slow.
    """
    counts: collections.Counter[str] = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is None:
            continue
        every, first = (*mark.args, 0)[:2]
        name = item.nodeid.partition("[")[0]
        if counts[name] % every != first:
            item.add_marker(pytest.mark.slow)
        counts[name] += 1
    every = config.getoption("--every")
    if every > 1:
        counts.clear()
        kept, left_out = [], []
        for item in items:
            name = item.nodeid.partition("[")[0]
            if item.get_closest_marker("slow"):
                kept.append(item)  # Its own group: `-m` decides.
                continue
            (left_out if counts[name] % every else kept).append(item)
            counts[name] += 1
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    seconds = float(config.getini("max_cpu_seconds"))
    if seconds:
        config.pluginmanager.register(CpuLimit(seconds))
