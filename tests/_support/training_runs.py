"""Runs of recipes in tests, and their outputs."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jlora.training import Callback, recipe
from jlora.training.metrics import read_metrics
from jlora.training.train import TrainResult, train


def run(
    raw: dict[str, Any], *, devices: int = 1, quiet: bool = True, **options: Any
) -> TrainResult:
    chosen = jax.devices()[:devices]
    return train(recipe.validate(raw), quiet=quiet, devices=chosen, **options)


def output(raw: dict[str, Any]) -> pathlib.Path:
    return pathlib.Path(raw["output"])


def measured(raw: dict[str, Any]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the times."""
    lines = read_metrics(output(raw) / "metrics.jsonl")
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


class After(Callback):
    """Calls something once a step was measured."""

    def __init__(self, step: int, call: Callable[[], Any]) -> None:
        self.step, self.call = step, call

    def on_step_end(self, loop: Any, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            self.call()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The same losses, and the same bytes."""
    assert measured(one) == measured(two)
    left, right = (output(raw) / "adapter.safetensors" for raw in (one, two))
    assert left.read_bytes() == right.read_bytes()
    last = measured(one)[-1]["step"]
    facts = [
        json.loads((output(raw) / f"checkpoints/{last}/run_metadata/metadata").read_text())
        for raw in (one, two)
    ]
    assert facts[0] == facts[1]  # The SHA-256 of every array, and the position of the data.
