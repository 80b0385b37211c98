"""Loggers of metrics, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
import pathlib
import types
from typing import Any

import pytest

from jlora.training.metrics import (
    JsonlMetricsLogger,
    TensorBoardLogger,
    eval_values,
    is_eval_line,
    is_train_line,
    peak_tflops,
    read_metrics,
)

STEP = {"train/loss": 2.5, "num_targets": 9.0, "seconds": 0.5}


def opened(logger: Any, step: int = 0) -> Any:
    """The logger at the start of a run that was restored after a step."""
    logger.on_train_start(types.SimpleNamespace(progress=types.SimpleNamespace(step=step)))
    return logger


def test_jsonl_logger_resume_drops_later_steps(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = opened(JsonlMetricsLogger(path))
    for step in (1, 2, 3):
        first.log(step, STEP)
    first.close()
    second = opened(JsonlMetricsLogger(path), step=2)
    second.log(3, {**STEP, "train/loss": 1.5})
    second.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["train/loss"] for line in lines] == [2.5, 2.5, 1.5]


def test_read_metrics_drops_an_incomplete_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "tra')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.5}]


def test_nan_is_written_as_text_and_read_as_nan(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = opened(JsonlMetricsLogger(path))
    logger.log(1, {"train/loss": math.nan})
    logger.close()
    assert json.loads(path.read_text()) == {"step": 1, "train/loss": "nan"}
    assert math.isnan(read_metrics(path)[0]["train/loss"])


def test_lines_are_classified_by_prefix() -> None:
    evaluation = {"step": 2, "eval/loss": 0.5, "eval/accuracy": 0.75}
    assert (is_train_line(STEP), is_eval_line(STEP)) == (True, False)
    assert (is_train_line(evaluation), is_eval_line(evaluation)) == (False, True)
    assert eval_values(evaluation) == {"loss": 0.5, "accuracy": 0.75}
    assert eval_values(STEP) == {}


def test_tensorboard_has_the_same_names(tmp_path: pathlib.Path) -> None:
    loggers = (
        JsonlMetricsLogger(tmp_path / "metrics.jsonl"),
        TensorBoardLogger(tmp_path / "tensorboard"),
    )
    for logger in map(opened, loggers):
        logger.log(1, STEP)
        logger.log(1, {"eval/loss": 0.5})
        logger.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    for name in (*STEP, "eval/loss"):
        assert name.encode() in written
    names = {name for line in read_metrics(tmp_path / "metrics.jsonl") for name in line}
    assert names == {"step", *STEP, "eval/loss"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NVIDIA H100 PCIe", 756.0), ("NVIDIA H100 80GB HBM3", 989.0), ("cpu", None)],
)
def test_peak_tflops_takes_the_longest_known_name(kind: str, expected: float | None) -> None:
    assert peak_tflops(types.SimpleNamespace(device_kind=kind)) == expected
