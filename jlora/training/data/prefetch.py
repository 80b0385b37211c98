"""Batches made ahead, in a thread, while a device works on those before."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

MappedItem = TypeVar("MappedItem")


class _QueueItem(NamedTuple):
    """What the thread hands over: something made, what went wrong, or neither at the end."""

    value: Any = None
    error: BaseException | None = None
    is_last: bool = False


class PrefetchIterator(Generic[MappedItem]):
    """An iterator over what a thread makes ahead; close it, or use it in a `with`.

    Attributes:
        data_wait_s: How long the caller waited for what was not there yet, in all.
    """

    def __init__(
        self, iterator: Iterable[Any], map_fn: Callable[[Any], MappedItem], buffer_size: int
    ) -> None:
        """Starts the thread. Arguments as of `prefetch`."""
        if buffer_size < 1:
            raise ValueError(f"depth={buffer_size} makes nothing ahead. Give 1 or more.")
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
        except BaseException as error:  # It is raised where the caller asks for the next.
            self._put(_QueueItem(error=error))

    def _put(self, item: _QueueItem) -> bool:
        """Whether it was taken: not after the closing."""
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
        """The next one made.

        Raises:
            StopIteration: There are no more, or this was closed.
            BaseException: What was raised in making it.
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
        """Ends the thread, and lets go of what it made. A second time does nothing."""
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
    """What `map_fn` makes of every item, made ahead in a thread.

    Args:
        iterator: Of batches; only the thread takes from it.
        map_fn: From an item to what the caller wants, such as one with its arrays on devices.
        buffer_size: How many wait ready at most. One more is in the making.
    """
    return PrefetchIterator(iterator, map_fn, buffer_size)
