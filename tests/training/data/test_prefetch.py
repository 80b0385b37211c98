"""Prefetching: values in order, and errors raised in the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jlora.training.data.prefetch import prefetch


def test_prefetch_keeps_values_and_order() -> None:
    with prefetch(range(20), lambda item: item * 2) as made:
        assert list(made) == [item * 2 for item in range(20)]
        assert made.data_wait_s > 0
        assert list(made) == []


def test_prefetch_buffer_size_is_the_limit() -> None:
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
        # Three values wait in the buffer, and one more finds no place.
        made._closed.wait(0.3)
        assert len(taken) == 4
        assert next(made) == 0


def test_prefetch_error_raised_in_order() -> None:
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


def test_prefetch_close_ends_thread() -> None:
    made = prefetch(iter(int, 1), lambda item: item)
    assert next(made) == 0
    made.close()
    made.close()
    assert not made._thread.is_alive()
    assert list(made) == []


def test_prefetch_buffer_size_zero_raises() -> None:
    with pytest.raises(ValueError, match="buffer_size=0 must be at least 1"):
        prefetch([], lambda item: item, buffer_size=0)
