"""Console output: counts of parameters, lines of steps and evaluations, and the progress bar."""

from __future__ import annotations

import contextlib
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jlora.training import progress
from jlora.training.progress import Console, ProgressBar, ThroughputMeter
from jlora.training.sharding import make_mesh

METRICS = {"train/loss": 0.9061, "tokens": 1340.0, "seconds": 1.0}


class Throughput:
    """Text of a step that does not depend on the machine."""

    def format_step(self, metrics: Any) -> str:
        return f"loss {metrics['train/loss']:.3f}  1,340 tok/s  1.2 GiB"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that the test moves, by its attribute `now`."""
    state = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: state.now))
    return state


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines that were printed since the last call."""
    return lambda: capsys.readouterr().out.splitlines()


def fake_setup(trainable: int, *base: tuple[int, ...]) -> Any:
    shapes = {str(n): jax.ShapeDtypeStruct(shape, np.float32) for n, shape in enumerate(base)}
    state = types.SimpleNamespace(trainable={"a": jax.ShapeDtypeStruct((trainable,), np.float32)})
    mesh = make_mesh({}, jax.devices()[:1])
    return types.SimpleNamespace(frozen={"base": shapes}, state=state, mesh=mesh, model=None)


def test_trainable_params_line_is_that_of_peft() -> None:
    setup = fake_setup(336_396, (1000, 22_713), (216,))
    assert progress.trainable_params_line(setup) == (
        "trainable params: 336,396 || all params: 23,049,612 || trainable%: 1.46"
    )


def test_compilation_line_without_metrics() -> None:
    assert progress.compilation_line([]) == "compiling the training step (once)"


def test_compilation_line_has_first_step_time() -> None:
    steps = [{"step": n, **METRICS, "seconds": 41.8 if n == 1 else 0.5} for n in (1, 2, 3)]
    found = progress.compilation_line([{"step": 0, "eval/loss": 2.0}, *steps])
    assert found == "compiling the training step (once; 42 s last time)"
    found = progress.compilation_line([], pathlib.Path("/home/a/programs"))
    assert found == (
        "compiling the training step (once; compiled programs are kept in /home/a/programs)"
    )


def loop_of(total_steps: int, step: int = 0) -> Any:
    return types.SimpleNamespace(total_steps=total_steps, progress=types.SimpleNamespace(step=step))


@contextlib.contextmanager
def opened(loop: Any, console: Console | None = None) -> Iterator[ProgressBar]:
    bar = ProgressBar(console or Console(False), Throughput())  # type: ignore[arg-type]
    bar.on_train_start(loop)
    yield bar
    bar.close()


def test_bar_prints_every_30_s_and_the_last(clock: Any, lines: Any) -> None:
    loop = loop_of(498, 118)
    with opened(loop) as bar:
        clock.now += 2
        bar.on_step_end(loop, 119, METRICS)
        assert lines() == ["the first step took 1.0 s with its compilation"]
        clock.now += 29
        bar.on_step_end(loop, 120, METRICS)
        # 378 steps are left, of 29 s each; the first step of the process does not count.
        assert lines() == ["step 120/498  loss 0.906  1,340 tok/s  1.2 GiB  ETA 3:02:42"]
        bar.on_step_end(loop, 121, METRICS)
        assert lines() == []
        bar.on_step_end(loop, 498, METRICS)
        assert lines() == ["step 498/498  loss 0.906  1,340 tok/s  1.2 GiB  ETA 0:00:00"]


def test_bar_marks_the_best_evaluation(lines: Any) -> None:
    loop = loop_of(498)
    with opened(loop) as bar:
        metrics = {"eval/loss": 0.8814, "eval/accuracy": 0.7712}
        bar.on_evaluate_end(loop, 120, metrics, True)
        bar.on_evaluate_end(loop, 240, {"eval/loss": 0.9, "eval/accuracy": 0.75}, False)
    assert lines() == [
        "eval 120      loss 0.881  accuracy 0.771  (best)",
        "eval 240      loss 0.900  accuracy 0.750",
    ]


def test_quiet_console_prints_nothing(lines: Any) -> None:
    console, loop = Console(True), loop_of(1)
    console("text")
    with opened(loop, console) as bar:
        bar.on_step_end(loop, 1, METRICS)
        bar.on_evaluate_end(loop, 1, {"eval/loss": 0.5}, True)
    assert lines() == []


def test_progress_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Any
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    loop = loop_of(4)
    with opened(loop) as bar:
        assert bar._bar is not None
        clock.now += 60
        bar.on_step_end(loop, 1, METRICS)
        bar._bar.refresh()
        clock.now += 1
        bar.on_step_end(loop, 2, METRICS)
        bar._bar.refresh()
    out, error = capsys.readouterr()
    assert out == "the first step took 1.0 s with its compilation\n"
    assert "step 1/4  loss 0.906  1,340 tok/s  1.2 GiB" in error
    assert "step 2/4  loss 0.906  1,340 tok/s  1.2 GiB  ETA 0:00:02" in error


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (None, "loss 0.906  1,340 tok/s  1.2 GiB"),
        # 1,340 tokens of 1e9 FLOPs in a second, of 2.68e12.
        (2.68, "loss 0.906  1,340 tok/s  MFU 50%  1.2 GiB"),
    ],
)
def test_format_step_has_mfu_for_a_known_peak(
    monkeypatch: pytest.MonkeyPatch, peak: float | None, expected: str
) -> None:
    monkeypatch.setattr(progress, "flops_per_token", lambda *_: 1e9)
    monkeypatch.setattr(progress, "peak_memory_gib", lambda: 1.23)
    recipe: Any = types.SimpleNamespace(
        report=types.SimpleNamespace(peak_tflops=peak),
        data=types.SimpleNamespace(max_seq_length=64),
    )
    assert ThroughputMeter(recipe, fake_setup(2, (3, 4))).format_step(METRICS) == expected


def test_format_step_averages_over_20_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "flops_per_token", lambda *_: 1e9)
    monkeypatch.setattr(progress, "peak_memory_gib", lambda: 1.23)
    recipe: Any = types.SimpleNamespace(
        report=types.SimpleNamespace(peak_tflops=None),
        data=types.SimpleNamespace(max_seq_length=64),
    )
    meter = ThroughputMeter(recipe, fake_setup(2, (3, 4)))
    meter.format_step({**METRICS, "seconds": 1000.0})
    # The first step includes the compilation and does not count.
    assert "1,340 tok/s" in meter.format_step(METRICS)
    meter.format_step({**METRICS, "seconds": 1000.0})
    for _ in range(19):
        assert "1,340 tok/s" not in meter.format_step(METRICS)
    assert "1,340 tok/s" in meter.format_step(METRICS)
