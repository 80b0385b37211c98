"""Fails a test of the default group that takes more CPU time than the budget of one test."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

_STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "max_cpu_seconds", "CPU seconds that a test without a marker may take", default="0"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, None]:
    # CPU time of all threads, so that other work on the machine does not count. Fixtures that
    # several tests share are made outside of the call.
    started = time.process_time()
    yield
    item.stash[_STARTED] = time.process_time() - started


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    budget = float(item.config.getini("max_cpu_seconds"))
    spent = item.stash.get(_STARTED, 0.0)
    if call.when != "call" or not report.passed or not budget or spent <= budget:
        return
    if any(mark.name in ("slow", "foreign", "live", "gpu") for mark in item.iter_markers()):
        return
    report.outcome = "failed"
    report.longrepr = (
        f"{item.nodeid} took {spent:.1f} CPU seconds, more than max_cpu_seconds={budget:g} of the "
        f"default group. Make its set-up cheaper, or mark it slow."
    )
