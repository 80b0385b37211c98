"""Batches made ahead: the same ones, and their errors where they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jlora.training.data.prefetch import prefetch


def test_what_is_made_ahead_is_the_same_in_its_order() -> None:
    with prefetch(range(20), lambda item: item * 2) as made:
        assert list(made) == [item * 2 for item in range(20)]
        assert made.data_wait_s > 0
        assert list(made) == []


def test_no_more_is_made_ahead_than_asked_for() -> None:
    taken: list[int] = []
    enough = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            if number == 3:
                enough.set()
            yield number

    with prefetch(items(), lambda item: item, buffer_size=3) as made:
        assert enough.wait(10)
        # Three are ready, and one was made that finds no place.
        made._closed.wait(0.3)
        assert len(taken) == 4
        assert next(made) == 0


def test_errors_are_raised_after_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("row 7")

    made = prefetch(items(), lambda item: item)
    assert next(made) == 1
    with pytest.raises(KeyError, match="row 7"):
        next(made)
    with pytest.raises(StopIteration):
        next(made)
    made = prefetch(range(3), lambda item: 1 // item)
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_closing_ends_the_thread() -> None:
    made = prefetch(iter(int, 1), lambda item: item)
    assert next(made) == 0
    made.close()
    made.close()
    assert not made._thread.is_alive()
    assert list(made) == []


def test_nothing_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=0 makes nothing ahead"):
        prefetch([], lambda item: item, buffer_size=0)
