"""Signals during training: a saved state and a clean end on SIGTERM and SIGINT."""

from __future__ import annotations

import signal
import threading
import types
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from jlora.training.callbacks import Callback, Request
from jlora.training.runtime import ProcessMaximum

if TYPE_CHECKING:
    from jlora.training.checkpointing import CheckpointManager
    from jlora.training.loop import TrainLoop

# A shell reports 128 plus the number of the signal that ended a process.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class TrainingInterrupted(Exception):
    """A run ended early after a signal; its last step is saved.

    Attributes:
        exit_status: Exit status for the process: 143 after SIGTERM, 130 after SIGINT.

    Example:
        >>> from jlora.training import TrainingInterrupted
        >>> TrainingInterrupted("SIGTERM: step 3 of 9 is saved", 143).exit_status
        143
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class SignalHandler(Callback):
    """Callback that interrupts the run on SIGTERM or SIGINT; a second one of the same kind kills.

    Python accepts handlers in the main thread only. In other threads the callback does nothing.

    Attributes:
        received: First signal; None before one.
    """

    stop_reason = "interrupted"

    def __init__(self, mesh: Mesh, checkpoints: CheckpointManager) -> None:
        """Prepares the handler.

        Args:
            mesh: Mesh of the run, whose processes stop together.
            checkpoints: Checkpoints, which are complete when the run is interrupted.
        """
        self._checkpoints = checkpoints
        self._agreement = ProcessMaximum(mesh)
        self._agreed: signal.Signals | None = None
        self.received: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, object] = {}

    def is_pending(self) -> bool:
        """Whether a signal arrived, which cancels an evaluation; False with several processes."""
        return jax.process_count() == 1 and self.received is not None

    def on_train_start(self, loop: TrainLoop) -> None:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_STATUS:
                # A process in the background of a script ignores SIGINT.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._handle_signal)

    def request(self, loop: TrainLoop, ends_epoch: bool) -> Request | None:
        """Returns `INTERRUPT` once the processes agree that a signal arrived."""
        number = self._agreement.update(0 if self.received is None else int(self.received))
        if not number:
            return None
        self._agreed = signal.Signals(number)
        return Request.INTERRUPT

    def on_train_end(self, loop: TrainLoop) -> None:
        """Raises if a signal ended the run, or arrived during its last step and checkpoint.

        Raises:
            TrainingInterrupted: A signal arrived; the state is saved.
            OSError: The state could not be saved.
        """
        if self.is_pending():
            self._agreed = self.received
        if self._agreed is None:
            return
        # The message reports the checkpoint as saved: it is retried, and its errors are raised.
        loop.save()
        self._checkpoints.wait_until_finished()
        raise TrainingInterrupted(
            f"{self._agreed.name}: step {loop.progress.step} of {loop.total_steps} is saved in "
            f"{self._checkpoints.folder}. Continue with --resume.",
            EXIT_STATUS[self._agreed],
        )

    def close(self) -> None:
        """Restores the earlier handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous_handlers.clear()

    def _handle_signal(self, number: int, _: types.FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        # Saving may hang, so the next signal must have its usual effect.
        signal.signal(number, self._previous_handlers[signal.Signals(number)])  # type: ignore[arg-type]
