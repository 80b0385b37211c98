"""Prefetching: a thread builds the next batches while the devices compute."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

MappedItem = TypeVar("MappedItem")


class _QueueItem(NamedTuple):
    """Message of the thread: a value, an error, or the end."""

    value: Any = None
    error: BaseException | None = None
    is_last: bool = False


class PrefetchIterator(Generic[MappedItem]):
    """Iterator over values that a thread computes ahead; close it, or use it in a `with`.

    Attributes:
        data_wait_s: Total seconds that the caller waited for values.

    Example:
        >>> from jlora.training import data
        >>> letters = data.PrefetchIterator("ab", str.upper, buffer_size=1)
        >>> next(letters), letters.data_wait_s > 0
        ('A', True)
        >>> letters.close()
    """

    def __init__(
        self, iterator: Iterable[Any], map_fn: Callable[[Any], MappedItem], buffer_size: int
    ) -> None:
        """Starts the thread. Arguments as of `prefetch`."""
        if buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size} must be at least 1.")
        self.data_wait_s = 0.0
        self._queue: queue.Queue[_QueueItem] = queue.Queue(buffer_size)
        self._closed = threading.Event()
        self._done = False
        self._thread = threading.Thread(
            target=self._produce, args=(iterator, map_fn), name="jlora-prefetch", daemon=True
        )
        self._thread.start()

    def _produce(self, iterator: Iterable[Any], map_fn: Callable[[Any], MappedItem]) -> None:
        try:
            for item in iterator:
                if not self._put(_QueueItem(map_fn(item))):
                    return
            self._put(_QueueItem(is_last=True))
        except BaseException as error:  # `__next__` raises it in the caller's thread.
            self._put(_QueueItem(error=error))

    def _put(self, item: _QueueItem) -> bool:
        """Puts an item into the queue; returns False if the iterator was closed instead."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[MappedItem]:
        return self

    def __next__(self) -> MappedItem:
        """Returns the next value.

        Raises:
            StopIteration: If there are no more values, or the iterator was closed.
            BaseException: The error that `map_fn` or the iterator raised.
        """
        if self._done:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.data_wait_s += time.perf_counter() - start
        if item.is_last or item.error is not None:
            self.close()
        if item.error is not None:
            raise item.error
        if item.is_last:
            raise StopIteration
        return item.value

    def close(self) -> None:
        """Ends the thread and drops its values. A second call does nothing."""
        self._done = True
        self._closed.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> PrefetchIterator[MappedItem]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    iterator: Iterable[Any], map_fn: Callable[[Any], MappedItem], buffer_size: int = 2
) -> PrefetchIterator[MappedItem]:
    """Returns an iterator over `map_fn(item)`, computed ahead in a thread.

    Args:
        iterator: Items, such as batches; only the thread iterates over it.
        map_fn: Function of an item, for example one that puts its arrays on devices.
        buffer_size: Maximum number of values that wait; the thread works on one more.

    Raises:
        ValueError: If `buffer_size` is below 1.

    Example:
        >>> from jlora.training import data
        >>> with data.prefetch(range(3), lambda x: x * x) as squares:
        ...     list(squares)
        [0, 1, 4]
    """
    return PrefetchIterator(iterator, map_fn, buffer_size)
