"""Callbacks: the order of their calls, their requests, errors, and runs of Weights & Biases."""

from __future__ import annotations

import importlib
import json
import pathlib
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from _support.training_fixtures import Make, make_recipe
from _support.training_loops import looped
from _support.training_runs import After, measured, output, run, stop

from jlora.training import Callback, ProgramCache, Request, WandbLogger, recipe, report, train
from jlora.training.callbacks import Evaluation
from jlora.training.checkpointing import CheckpointManager
from jlora.training.loop import TrainLoop, TrainProgress
from jlora.training.runtime import ProcessMaximum
from jlora.training.sharding import make_mesh
from jlora.training.signals import SignalHandler, TrainingInterrupted

# --- the loop, with a step that computes nothing ------------------------------------------------


class Recorder(Callback):
    """Records its calls in a list that it shares with others."""

    def __init__(self, calls: list[Any], name: str = "") -> None:
        self.calls, self.name = calls, name

    def record(self, call: str, *values: Any) -> None:
        self.calls.append((f"{self.name}{call}", *values))

    def on_train_start(self, loop: TrainLoop) -> None:
        self.record("start", loop.progress.step)

    def on_step_end(self, loop: TrainLoop, step: int, metrics: Any) -> None:
        self.record("step", step, metrics["train/loss"])

    def on_evaluate_end(self, loop: TrainLoop, step: int, metrics: Any, is_best: bool) -> None:
        self.record("evaluated", step, metrics["eval/loss"], is_best)

    def on_save(self, loop: TrainLoop) -> None:
        self.record("save", loop.progress.step)

    def on_train_end(self, loop: TrainLoop) -> None:
        self.record("end", loop.stop_reason)

    def close(self) -> None:
        self.record("close")


class Asking(Callback):
    """Requests something at given steps, as often as it is asked."""

    stop_reason = "asked"

    def __init__(self, requests: dict[int, Request]) -> None:
        self.requests = requests

    def request(self, loop: TrainLoop, ends_epoch: bool) -> Request | None:
        return self.requests.get(loop.progress.step)

    def evaluate(self, loop: TrainLoop) -> Evaluation | None:
        return Evaluation({"eval/loss": 0.5}, True)


def test_loop_calls_in_order() -> None:
    calls: list[Any] = []
    loop = looped(Recorder(calls, "1 "), Recorder(calls, "2 "), steps=2)
    assert loop.stop_reason == "max_steps"
    expected = [("start", 0), ("step", 1, 1.0), ("step", 2, 2.0), ("save", 2)]
    expected += [("end", "max_steps"), ("close",)]
    assert calls == [(f"{n} {call}", *rest) for call, *rest in expected for n in (1, 2)]


def test_loop_evaluates_before_it_saves() -> None:
    calls: list[Any] = []
    both = (Asking({2: Request.SAVE}), Asking({2: Request.EVALUATE}))
    looped(Recorder(calls), both[0], both[1])
    middle = calls[calls.index(("step", 2, 2.0)) :]
    # Each callback of this test evaluates. The metrics of step 2 come first.
    assert middle[1:4] == [("evaluated", 2, 0.5, True)] * 2 + [("save", 2)]
    assert middle[4] == ("step", 3, 3.0)


def test_loop_stop_request_ends_the_run() -> None:
    calls: list[Any] = []
    asking = Asking({2: Request.STOP})
    loop = looped(Recorder(calls), asking, steps=9)
    assert (loop.stop_reason, loop.progress.step) == ("asked", 2)
    assert calls[-4:] == [("step", 2, 2.0), ("save", 2), ("end", "asked"), ("close",)]


def test_loop_interrupt_skips_an_evaluation() -> None:
    calls: list[Any] = []
    both = (Asking({2: Request.EVALUATE}), Asking({2: Request.INTERRUPT}))
    looped(Recorder(calls), *both, steps=9)
    assert "evaluated" not in {call for call, *_ in calls}
    assert calls[-3:] == [("save", 2), ("end", "asked"), ("close",)]


def test_loop_resume_does_what_was_due() -> None:
    calls: list[Any] = []
    asking = Asking({2: Request.EVALUATE})
    looped(Recorder(calls), asking, progress=TrainProgress(step=2))
    assert calls[:3] == [("start", 2), ("evaluated", 2, 0.5, True), ("save", 2)]
    assert calls[3] == ("step", 3, 3.0)


def test_loop_finishes_without_an_exception_only() -> None:
    class Failing(Callback):
        loop: Any = None

        def on_train_start(self, loop: TrainLoop) -> None:
            self.loop = loop

        def on_train_end(self, loop: TrainLoop) -> None:
            raise OSError("full")

    failing = Failing()
    assert looped(Callback()).is_finished
    with pytest.raises(OSError, match="full"):
        looped(failing)
    assert not failing.loop.is_finished


def test_loop_too_few_batches_raises() -> None:
    with pytest.raises(ValueError, match=r"ended after step 98, and the run has 200 steps"):
        looped(Callback(), steps=200, losses=range(200))


def test_signal_in_last_checkpoint_interrupts() -> None:
    class Arriving(Callback):
        signals = (signal.SIGTERM, signal.SIGINT)

        def on_save(self, loop: TrainLoop) -> None:
            for number in self.signals:
                signal.raise_signal(number)
            self.signals = ()

    checkpoints: Any = types.SimpleNamespace(wait_until_finished=lambda: None, folder="run")
    handler = SignalHandler(make_mesh({}, jax.devices()[:1]), checkpoints)
    with pytest.raises(TrainingInterrupted, match="SIGTERM: step 3 of 3 is saved") as caught:
        looped(handler, Arriving())
    assert caught.value.exit_status == 143


def test_signal_that_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        handler = SignalHandler(make_mesh({}, jax.devices()[:1]), None)  # type: ignore[arg-type]
        looped(handler, After(2, lambda: signal.raise_signal(signal.SIGINT)))
        assert handler.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_loop_other_request_raises() -> None:
    message = r"Asking\.request must return a Request.*, got 'stop'"
    with pytest.raises(TypeError, match=message):
        looped(Asking({2: "stop"}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Callback(), r"must be a list of callbacks, got Callback"),
        ([Callback], r"must be instances of jlora\.training\.Callback, got <class"),
    ],
)
def test_train_wrong_argument_raises(callbacks: Any, message: str) -> None:
    least = {
        "model": {"path": "base"},
        "data": {"train": [{"path": "a", "format": "chat"}]},
        "output": "run",
    }
    with pytest.raises(TypeError, match=message):
        train(recipe.validate(least), callbacks=callbacks)
    with pytest.raises(TypeError, match=r"must be a Recipe, got str. Use recipe\.load"):
        train("recipe.yaml")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["on_train_start", "on_step_end", "on_train_end", "close"])
def test_loop_error_closes_all_callbacks(method: str) -> None:
    calls: list[Any] = []
    failing = Callback()

    def fail(*_: Any) -> None:
        raise OSError("full")

    setattr(failing, method, fail)
    with pytest.raises(OSError, match="full"):
        looped(Recorder(calls, "1 "), failing, Recorder(calls, "2 "))
    assert [call for call, *_ in calls if "close" in call] == ["1 close", "2 close"]


def test_process_maximum_acts_one_update_later(monkeypatch: pytest.MonkeyPatch) -> None:
    maximum = ProcessMaximum(make_mesh({}, jax.devices()[:1]))
    assert [maximum.update(number) for number in (0, 15, 0)] == [0, 15, 0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [maximum.update(number) for number in (0, 15, 2, 0)] == [0, 0, 15, 2]
    maximum.update(1)
    maximum.reset()
    assert maximum.update(0) == 0


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(
    base: pathlib.Path, chats: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> ProgramCache:
    """A cache that has the step of the plain recipe."""
    cache = ProgramCache()
    folder = tmp_path_factory.mktemp("shared")
    run(make_recipe(folder, base, chats), pause_after_step=1, program_cache=cache)
    return cache


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_report", lambda *_, **__: None)  # Pictures, a second each.


def test_train_callback_stops_the_run(recipe_of: Make, shared: ProgramCache) -> None:
    raw = recipe_of()
    outcome = run(raw, callbacks=[Asking({3: Request.STOP})], program_cache=shared)
    assert (outcome.stop_reason, outcome.step, outcome.best_step) == ("asked", 3, 3)
    assert (output(raw) / "adapter.safetensors").exists()
    assert [line["step"] for line in measured(raw)] == [1, 2, 3]


def test_train_callback_saves_before_an_error(recipe_of: Make, shared: ProgramCache) -> None:
    class Failing(Asking):
        def on_step_end(self, loop: TrainLoop, step: int, metrics: Any) -> None:
            if step == 4:
                raise RuntimeError("callback")

    raw = recipe_of()
    calls: list[Any] = []
    callbacks = [Failing({2: Request.SAVE}), Recorder(calls)]
    with pytest.raises(RuntimeError, match="callback"):
        run(raw, callbacks=callbacks, program_cache=shared)
    assert calls[-1] == ("close",)
    # The metrics of the step are written, and the checkpoint is complete.
    assert [line["step"] for line in measured(raw)] == [1, 2, 3, 4]
    assert (output(raw) / "checkpoints" / "2" / "run_metadata" / "metadata").exists()
    assert run(raw, resume=True, program_cache=shared).step == 6
    assert [line["step"] for line in measured(raw)] == [1, 2, 3, 4, 5, 6]


def test_train_interrupted_save_error_raises(
    recipe_of: Make, shared: ProgramCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointManager, "_write_checkpoint", failing)
    raw = recipe_of(training={"on_save_error": "warn"})
    # The run would continue after other saves, but it must not report this one as saved.
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(OSError, match="could not be written .*No space left"),
    ):
        run(raw, callbacks=[After(2, stop)], program_cache=shared)


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[Any]:
    module = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(tmp_path / "wandb-config"),
        "WANDB_CACHE_DIR": str(tmp_path / "wandb-cache"),
        "WANDB_DATA_DIR": str(tmp_path / "wandb-data"),
    }.items():
        monkeypatch.setenv(name, value)
    yield module
    module.teardown()


def wandb_records(folder: pathlib.Path) -> dict[str, list[Any]]:
    """Contents of the offline files by kind: histories, configs, run ids and exit codes."""
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found: dict[str, list[Any]] = {"history": [], "config": [], "id": [], "exit": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = pb.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
                found["history"].append({key: json.loads(text) for key, text in row.items()})
            elif record.HasField("run"):
                found["id"].append(record.run.run_id)
                updates = record.run.config.update
                found["config"].append({u.key: json.loads(u.value_json) for u in updates})
            elif record.HasField("exit"):
                found["exit"].append(record.exit.exit_code)
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, with a header of W&B's own at the start."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # A full record, or the last part of one.
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_offline_run_has_the_metrics(
    wandb: Any, recipe_of: Make, shared: ProgramCache
) -> None:
    raw = recipe_of(report={"wandb": {"project": "animals", "name": "first", "mode": "offline"}})
    run(raw, pause_after_step=2, program_cache=shared)
    run(raw, resume=True, program_cache=shared)
    found = wandb_records(output(raw))
    # Both offline files are parts of one W&B run.
    assert len(found["id"]) == 2
    assert {*found["id"]} == {(output(raw) / "wandb_run_id.txt").read_text()}
    assert found["config"][0]["adapter"]["rank"] == 2
    assert found["exit"] == [0, 0]
    names = ("train/loss", "num_targets")
    rows = [{n: row[n] for n in names} for row in found["history"] if "train/loss" in row]
    assert rows == [{n: pytest.approx(line[n]) for n in names} for line in measured(raw)]
    assert [row["_step"] for row in found["history"]] == [1, 2, 3, 4, 5, 6]


class FakeWandb:
    """The functions of wandb that the logger calls."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []

    def init(self, **options: Any) -> Any:
        self.runs.append(options)
        return types.SimpleNamespace(
            log=lambda *_, **__: None,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


def test_wandb_keeps_the_id_of_a_resumed_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = types.SimpleNamespace(output=str(tmp_path), model_dump=lambda mode: {"seed": 0})
    for step in (0, 4, 0):
        logger = WandbLogger("animals", mode="offline")
        loop: Any = types.SimpleNamespace(
            recipe=recipe, progress=TrainProgress(step=step), is_finished=bool(step)
        )
        logger.on_train_start(loop)
        logger.close()
    # The third one is a new run.
    first, resumed, new = (options["id"] for options in fake.runs)
    assert first == resumed != new
    assert all(options["resume"] == "allow" for options in fake.runs)
    assert fake.exit_codes == [1, 0, 1]


def test_wandb_not_installed_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "jlora\[wandb\]"'):
        WandbLogger("animals")
