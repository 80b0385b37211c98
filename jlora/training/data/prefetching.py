"""Batches made ahead, in a thread, while a device works on those before."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

Made = TypeVar("Made")


class _Item(NamedTuple):
    """What the thread hands over: something made, what went wrong, or neither at the end."""

    made: Any = None
    error: BaseException | None = None
    last: bool = False


class Prefetch(Generic[Made]):
    """An iterator over what a thread makes ahead; close it, or use it in a `with`.

    Attributes:
        waited_s: How long the caller waited for what was not there yet, in all.
    """

    def __init__(self, iterator: Iterable[Any], place: Callable[[Any], Made], depth: int) -> None:
        """Starts the thread. Arguments as of `prefetch`."""
        if depth < 1:
            raise ValueError(f"depth={depth} makes nothing ahead. Give 1 or more.")
        self.waited_s = 0.0
        self._ready: queue.Queue[_Item] = queue.Queue(depth)
        self._closed = threading.Event()
        self._done = False
        self._thread = threading.Thread(
            target=self._work, args=(iterator, place), name="jlora-prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, iterator: Iterable[Any], place: Callable[[Any], Made]) -> None:
        try:
            for item in iterator:
                if not self._put(_Item(place(item))):
                    return
            self._put(_Item(last=True))
        except BaseException as error:  # It is raised where the caller asks for the next.
            self._put(_Item(error=error))

    def _put(self, item: _Item) -> bool:
        """Whether it was taken: not after the closing."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        """The next one made.

        Raises:
            StopIteration: There are no more, or this was closed.
            BaseException: What was raised in making it.
        """
        if self._done:
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - start
        if item.last or item.error is not None:
            self.close()
        if item.error is not None:
            raise item.error
        if item.last:
            raise StopIteration
        return item.made

    def close(self) -> None:
        """Ends the thread, and lets go of what it made. A second time does nothing."""
        self._done = True
        self._closed.set()
        self._thread.join()
        while not self._ready.empty():
            self._ready.get_nowait()

    def __enter__(self) -> Prefetch[Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    iterator: Iterable[Any], place: Callable[[Any], Made], depth: int = 2
) -> Prefetch[Made]:
    """What `place` makes of every item, made ahead in a thread.

    Args:
        iterator: Of batches; only the thread takes from it.
        place: From an item to what the caller wants, such as one with its arrays on devices.
        depth: How many wait ready at most. One more is in the making.
    """
    return Prefetch(iterator, place, depth)
