"""SIGTERM and SIGINT: a run finishes its step, saves and ends, with an exit status that says so."""

from __future__ import annotations

import signal
import threading
import types
from typing import Self

# As a shell reports a process that the signal ended: 128 and its number.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Interrupted(Exception):
    """A run ended early, at a step that is saved.

    Attributes:
        status: What the process should exit with: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Watch:
    """Notes the first signal instead of dying of it; a second one of the same kind kills.

    Where Python cannot take signals, in threads other than the first, it does nothing.
    """

    def __init__(self) -> None:
        self.seen: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_STATUS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.seen = signal.Signals(number)
        # Saving may hang, and then the next one has to get through.
        signal.signal(number, self._before[self.seen])  # type: ignore[arg-type]
