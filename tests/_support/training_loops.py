"""A training loop whose step computes nothing."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.training.callbacks import Callback
from jlora.training.loop import DeviceBatch, TrainLoop, TrainProgress
from jlora.training.train_step import StepMetrics


def looped(
    *callbacks: Callback,
    steps: int = 3,
    losses: Sequence[float] = range(1, 99),
    recipe: Any = None,
    progress: TrainProgress | None = None,
) -> TrainLoop:
    """A loop that has run; by default the loss of a step is its number."""

    def train_step(state: int, *_: Any) -> tuple[int, StepMetrics]:
        one = np.float32(1)
        values = dict.fromkeys(StepMetrics._fields, one)
        values |= {
            "loss": np.float32(losses[state]),
            "extra_metrics": {},
            "is_finite": np.bool_(True),
        }
        return state + 1, StepMetrics(**values)

    loop = TrainLoop(
        recipe or types.SimpleNamespace(seed=0),
        types.SimpleNamespace(state=0, frozen=None, train_step=train_step),  # type: ignore[arg-type]
        callbacks=callbacks,
        total_steps=steps,
        progress=progress,
    )
    batches = (DeviceBatch(None, [], (0, n), False, 7) for n in range(1, 99))
    loop.run(loop.progress.step, batches)  # type: ignore[arg-type]
    return loop
