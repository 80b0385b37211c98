"""Two writers of one output: the second is refused and learns about the first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _support.training_fixtures import Make

import jlora
from jlora import cli, models, multi_lora, peft
from jlora.checkpoints import OutputInUseError, output_lock
from jlora.checkpoints.output_lock import lock_output
from jlora.checkpoints.safetensors_io import (
    create_folder_atomically,
    replace_file_atomically,
    write_new_safetensors,
)
from jlora.models.hf.weight_mapping import single_tensor_weight
from jlora.rank_search import SearchOptions, search
from jlora.training import recipe as recipes
from jlora.training import train
from jlora.training.checkpointing import CheckpointManager

ROOT = pathlib.Path(__file__).parents[2]
PARAMS = {"w": np.arange(30, dtype=np.float32).reshape(6, 5)}
X = np.ones((2, 6), np.float32)
MAPPING = {"w": single_tensor_weight("net.w.weight", (6, 5), (1, 0))}

HOLDER = """
import sys
from jlora.checkpoints.output_lock import acquire_output_lock
acquire_output_lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_process(path: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock of the output."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def held_by_thread(path: pathlib.Path) -> Iterator[None]:
    """Another thread holds the lock of the output."""
    is_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_output(path):
            is_held.set()
            may_end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    try:
        yield
    finally:
        may_end.set()
        thread.join()


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


def make_adapter() -> tuple[jlora.LoraTransform, Any]:
    lora = jlora.lora_transform(product, jlora.LoRA(rank=2, alpha=3))
    return lora, lora.init(jax.random.key(0), PARAMS, X)


@pytest.mark.slow
def test_second_process_learns_about_the_first(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "new", tmp_path):
        with held_by_process(path) as child:
            with pytest.raises(OutputInUseError) as caught, lock_output(path):
                pass
            message = str(caught.value)
            assert f"process {child.pid} on " in message
            assert "command " in message
            assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", message)
        # The process was killed, and its lock file is still there.
        assert list(tmp_path.iterdir())
        with lock_output(path):
            pass
        assert not list(tmp_path.iterdir())


def test_lock_is_shared_within_a_thread_alone(tmp_path: pathlib.Path) -> None:
    with lock_output(tmp_path), lock_output(tmp_path):
        assert output_lock.is_output_locked(tmp_path)
        (lock_file,) = tmp_path.iterdir()
        assert json.loads(lock_file.read_bytes())["pid"] == os.getpid()
    assert not output_lock.is_output_locked(tmp_path)
    assert not list(tmp_path.iterdir())
    with (
        held_by_thread(tmp_path),
        pytest.raises(OutputInUseError, match=f"process {os.getpid()}"),
        lock_output(tmp_path),
    ):
        pass


def test_folder_and_its_link_have_one_lock(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        held_by_thread(tmp_path / "run"),
        pytest.raises(OutputInUseError),
        lock_output(tmp_path / "link"),
    ):
        pass
    with lock_output(tmp_path / "link"):
        assert output_lock.is_output_locked(tmp_path / "run")


def test_lock_holds_once_the_folder_exists(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new"
    with held_by_thread(path):
        path.mkdir()
        assert output_lock.is_output_locked(path)
        with pytest.raises(OutputInUseError), lock_output(path):
            pass
        assert not list(path.iterdir())
    with lock_output(path), lock_output(tmp_path / "other"):
        (tmp_path / "other").mkdir()
        with lock_output(tmp_path / "other"):  # The same thread.
            pass
        assert output_lock.is_output_locked(tmp_path / "other")
    assert not output_lock.is_output_locked(tmp_path / "other")
    assert {file.name for file in tmp_path.rglob("*")} == {"new", "other"}


@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_process_holds_no_lock(tmp_path: pathlib.Path) -> None:
    def run_child() -> int:
        try:
            with lock_output(tmp_path):
                return 1
        except OutputInUseError:
            output_lock.release_output_lock(lock_path)  # As at the end of a block.
            return 2 if output_lock._held else 0

    with held_by_thread(tmp_path / "other"):  # Whose lock the parent alone holds, too.
        lock_path = output_lock.acquire_output_lock(tmp_path)
        child = os.fork()
        if not child:
            os._exit(run_child())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert lock_path.exists()
        reader, writer = os.pipe()
        sleeping = os.fork()  # A child that outlives its parent does not keep the lock.
        if not sleeping:
            os.write(writer, b"forked")
            while True:
                signal.pause()
        try:
            assert os.read(reader, 6) == b"forked"
            with lock_path.open("rb") as file:
                output_lock.release_output_lock(lock_path)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.kill(sleeping, signal.SIGKILL)
            os.waitpid(sleeping, 0)


def test_collector_may_release_a_lock_meanwhile(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = output_lock.acquire_output_lock(tmp_path / "other", owner=object())
    describe = output_lock._describe_process

    def describe_and_collect() -> dict[str, Any]:
        output_lock.release_output_lock(other)  # As the finalizer of a cache does.
        return describe()

    monkeypatch.setattr(output_lock, "_describe_process", describe_and_collect)
    thread = threading.Thread(target=lock_and_release, args=(tmp_path / "one",), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert not list(tmp_path.iterdir())


def lock_and_release(path: pathlib.Path) -> None:
    """Takes a lock for a moment."""
    with lock_output(path):
        pass


def test_holder_is_named_once_it_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / output_lock.LOCK_NAME
    path.touch()
    holder = {"host": "here", "command": "x", "since": "2026", "pid": 12}
    # The other process writes who it is while this one waits.
    monkeypatch.setattr(output_lock.time, "sleep", lambda _: path.write_text(json.dumps(holder)))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputInUseError, match="process 12 on here"), lock_output(tmp_path):
            pass


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"pid": "x"}', b"[" * 60_000])
def test_damaged_lock_file_is_taken_over(text: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / output_lock.LOCK_NAME).write_bytes(text)
    with lock_output(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_lock_file_is_no_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / output_lock.LOCK_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), lock_output(tmp_path / "run"):  # noqa: PT011
        pass
    assert (tmp_path / "victim").read_text() == "kept"


def test_lock_without_locks_of_the_system(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    holder = {"host": output_lock.socket.gethostname(), "command": "x", "since": "2026"}
    path = tmp_path / output_lock.LOCK_NAME
    path.write_text(json.dumps({**holder, "pid": os.getppid()}))
    with pytest.raises(OutputInUseError, match=f"process {os.getppid()}"), lock_output(tmp_path):
        pass
    path.write_text(json.dumps({**holder, "pid": 2**22 + 1}))  # No such process.
    with lock_output(tmp_path):
        pass
    path.write_text(json.dumps({**holder, "pid": 1, "host": "another"}))
    with pytest.raises(OutputInUseError, match="on another"), lock_output(tmp_path):
        pass


def run_train(folder: pathlib.Path, recipe_of: Make) -> Any:
    return train(recipes.validate(recipe_of(output=str(folder))), quiet=True)


def run_search(folder: pathlib.Path, recipe_of: Make) -> Any:
    raw = recipe_of(output=str(folder))
    raw["data"]["validation"] = raw["data"]["train"]
    search(recipes.validate(raw), SearchOptions(ranks=(1, 2), seeds=2, num_rungs=1), quiet=True)


def save_model(folder: pathlib.Path, recipe_of: Make) -> Any:
    base = recipe_of()["model"]["path"]
    models.save(folder, models.load(base).params, base)


def save_peft(folder: pathlib.Path, recipe_of: Make) -> Any:
    peft.save(folder, make_adapter()[1], product, PARAMS, X, checkpoint_mapping=MAPPING)


def export(path: pathlib.Path, recipe_of: Make) -> Any:
    base = recipe_of()["model"]["path"]
    status = cli.main(["export", str(base), "missing.safetensors", str(path), "--format", "peft"])
    assert status == 1


def merge(path: pathlib.Path, recipe_of: Make) -> Any:
    base = recipe_of()["model"]["path"]
    assert cli.main(["merge", str(base), str(path), "missing.safetensors"]) == 1


def save_checkpoint(folder: pathlib.Path, recipe_of: Make) -> Any:
    manager = CheckpointManager(folder, save_total_limit=1)
    try:
        manager.save(1, {"a": jnp.zeros(3)}, {})
    finally:
        manager.close()


def build_bank(folder: pathlib.Path, recipe_of: Make) -> Any:
    lora, adapter = make_adapter()
    multi_lora.AdapterBank(lora, PARAMS, adapter, slots=2, max_host_adapters=1, folder=folder)


# Writers, and whether the folder exists before.
WRITERS: dict[str, tuple[Callable[[pathlib.Path, Make], Any], bool]] = {
    "train": (run_train, True),
    "rank-search": (run_search, True),
    "checkpoints": (save_checkpoint, True),
    "bank": (build_bank, True),
    "models.save": (save_model, False),
    "peft.save": (save_peft, False),
    "export": (export, False),
    "merge": (merge, False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_second_writer_is_refused(
    name: str, tmp_path: pathlib.Path, recipe_of: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    write, exists = WRITERS[name]
    path = tmp_path / "output"
    if exists:
        path.mkdir()
    with held_by_thread(path):
        before = sorted(tmp_path.rglob("*"))
        if name in ("export", "merge"):
            write(path, recipe_of)
            assert f"is in use: process {os.getpid()} on" in capsys.readouterr().err
        else:
            with pytest.raises(OutputInUseError, match=f"in use: process {os.getpid()} on"):
                write(path, recipe_of)
        assert sorted(tmp_path.rglob("*")) == before


def test_two_managers_of_one_folder(tmp_path: pathlib.Path) -> None:
    first = CheckpointManager(tmp_path, save_total_limit=2)
    first.save(1, {"a": jnp.zeros(3)}, {})
    first.wait_until_finished()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # A save that is under way.
    second = CheckpointManager(tmp_path, save_total_limit=2)
    assert second.restore({"a": jnp.ones(3)}).step == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    with pytest.raises(OutputInUseError):
        second.save(2, {"a": jnp.zeros(3)}, {})
    second.close()
    first.close()
    third = CheckpointManager(tmp_path, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    third.save(2, {"a": jnp.zeros(3)}, {})
    third.close()


def test_bank_releases_its_folder(tmp_path: pathlib.Path) -> None:
    lora, adapter = make_adapter()
    (tmp_path / f".a-{16 * '0'}.safetensors.partial").write_text("half")

    def build() -> multi_lora.AdapterBank:
        return multi_lora.AdapterBank(
            lora, PARAMS, adapter, slots=2, max_host_adapters=1, folder=tmp_path
        )

    bank = build()
    assert [path.name for path in tmp_path.iterdir()] == [output_lock.LOCK_NAME]
    with pytest.raises(OutputInUseError):
        build()
    del bank
    build()


def test_replaced_file_follows_the_umask(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    partial = tmp_path / ".file.partial"
    partial.write_text("the remains of a killed process, which are longer")
    partial.chmod(0o600)
    for mask, rights in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        previous = os.umask(mask)
        try:
            replace_file_atomically(path, b"new")
        finally:
            os.umask(previous)
        assert path.read_bytes() == b"new"
        assert path.stat().st_mode & 0o777 == rights
        assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_concurrent_replacements_are_complete(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(10):
            replace_file_atomically(path, content)
            assert path.read_bytes() in contents

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["models.save", "peft.save"])
def test_save_removes_remains_of_a_killed_one(
    name: str, tmp_path: pathlib.Path, recipe_of: Make
) -> None:
    (tmp_path / ".output.partial").mkdir()
    (tmp_path / ".output.partial" / "half.safetensors").write_bytes(b"half")
    (tmp_path / ".output.jlora.lock").write_text("{}")
    WRITERS[name][0](tmp_path / "output", recipe_of)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert "half.safetensors" not in [path.name for path in (tmp_path / "output").iterdir()]


def test_saved_folders_have_equal_bytes(tmp_path: pathlib.Path, recipe_of: Make) -> None:
    for name in ("models.save", "peft.save"):
        contents = []
        for number in range(2):
            folder = tmp_path / f"{name}-{number}"
            WRITERS[name][0](folder, recipe_of)
            contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
        assert contents[0] == contents[1]


def fail_with_full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_names_the_output(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    for write in (
        lambda path: replace_file_atomically(path, b"text"),
        lambda path: write_new_safetensors(path, {"a": np.zeros(2)}, {}),
        create_and_fill,
    ):
        message = rf"{re.escape(str(tmp_path))}/new could not be written \(No space.*Free disk"
        with pytest.raises(OSError, match=message) as caught:
            write(tmp_path / "new")
        assert caught.value.errno == errno.ENOSPC
        assert not list(tmp_path.iterdir())


def create_and_fill(folder: pathlib.Path) -> None:
    with create_folder_atomically(folder) as partial:
        replace_file_atomically(partial / "file", b"text")


def test_existing_output_is_named_before_its_lock(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(output_lock, "_open_regular", fail)
    with pytest.raises(FileExistsError, match="exists and is left"):
        create_and_fill(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="exists and is left"):
        write_new_safetensors(tmp_path / "file", {}, {})
