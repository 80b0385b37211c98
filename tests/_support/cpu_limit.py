"""Fails a test of the default group that takes more CPU time than one test may."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

_CPU_SECONDS = pytest.StashKey[float]()
# CPU seconds of `_measure_speed` on the machine that the limit is meant for.
_REFERENCE_SECONDS = 0.04


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "max_cpu_seconds", "CPU seconds that a test without a marker may take", default="0"
    )


def _measure_speed() -> float:
    """Returns the CPU seconds of a fixed amount of work, the least of three times."""
    times = []
    for _ in range(3):
        start = time.process_time()
        sum(number * number for number in range(1_000_000))
        times.append(time.process_time() - start)
    return min(times)


class CpuLimit:
    """The limit of one session, longer on a machine that is slower than the reference."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds * max(1.0, _measure_speed() / _REFERENCE_SECONDS)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, None]:
        # CPU time of all threads of the process, so that other work on the machine does not count.
        # Fixtures that several tests share are made outside of the call.
        start = time.process_time()
        yield
        item.stash[_CPU_SECONDS] = time.process_time() - start

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, None]:
        outcome = yield
        report = outcome.get_result()
        spent = item.stash.get(_CPU_SECONDS, 0.0)
        if call.when != "call" or not report.passed or spent <= self.seconds:
            return
        if any(mark.name in ("slow", "foreign", "live", "gpu") for mark in item.iter_markers()):
            return
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {spent:.1f} CPU seconds, and a test of the default group may take "
            f"{self.seconds:.1f} (max_cpu_seconds). Make its set-up cheaper, or mark it slow."
        )


def pytest_configure(config: pytest.Config) -> None:
    seconds = float(config.getini("max_cpu_seconds"))
    if seconds:
        config.pluginmanager.register(CpuLimit(seconds))
