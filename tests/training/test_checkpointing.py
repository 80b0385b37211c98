"""Checkpoints: atomic, verified by hash, and refused if they do not fit."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.safetensors_io import PARTIAL_SUFFIX
from jlora.training import checkpointing
from jlora.training.checkpointing import CHECKPOINT_FORMAT, CheckpointManager, check_writable


def state(number: float) -> dict[str, Any]:
    return {
        "adapter": {"w/a": jnp.arange(6.0).reshape(2, 3) + number, "w/b": jnp.ones(3) * number},
        "count": jnp.int32(number),
        "narrow": jnp.full(5, number, jnp.bfloat16),
    }


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    saver = CheckpointManager(tmp_path / "run", save_total_limit=5)
    for step in (3, 7):
        saver.save(step, state(step), {"progress": {"step": step}})
    saver.close()
    return tmp_path / "run"


def assert_equal(one: Any, two: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_restore_latest_is_bit_exact(folder: pathlib.Path) -> None:
    saver = CheckpointManager(folder, save_total_limit=5)
    found = saver.restore(state(0))
    assert (found.step, found.metadata["progress"]) == (7, {"step": 7})
    assert_equal(found.state, state(7))
    assert_equal(saver.restore(state(0), 3).state, state(3))
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of step 4; existing steps are \[3, 7\]"
    ):
        saver.restore(state(0), 4)


def test_save_older_step_raises(folder: pathlib.Path) -> None:
    saver = CheckpointManager(folder, save_total_limit=5)
    with pytest.raises(ValueError, match="has a checkpoint of step 7, and one of step 5 would be"):
        saver.save(5, state(5), {})
    assert saver.all_steps() == [3, 7]


@pytest.mark.parametrize("name", ["adapter", "narrow"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_save_nonfinite_state_is_refused(
    folder: pathlib.Path, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointManager(folder, save_total_limit=5)
    good = state(9)
    bad = {**good, name: jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), good[name])}
    saver.save(9, bad, {})
    with pytest.raises(ValueError, match=f"state of step 9 is not saved: .*{name}.* is NaN or inf"):
        saver.wait_until_finished()
    assert saver.all_steps() == [3, 7]
    # One that another program wrote is not good either.
    monkeypatch.setattr(checkpointing, "_find_nonfinite", lambda arrays: None)
    saver.save(9, bad, {})
    saver.wait_until_finished()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"Step 9 in .* is damaged .* resume from step 7"):
        saver.restore(state(0))


def test_save_failed_copy_can_be_retried(folder: pathlib.Path) -> None:
    saver = CheckpointManager(folder, save_total_limit=5)
    deleted = state(9)
    deleted["count"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        saver.save(9, deleted, {})
    saver.save(9, state(9), {})
    saver.wait_until_finished()
    assert_equal(saver.restore(state(0)).state, state(9))


@pytest.mark.parametrize("error", [MemoryError, PermissionError])
def test_restore_machine_error_is_not_damage(
    folder: pathlib.Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointManager(folder, save_total_limit=5)

    def fail(*_: Any, **__: Any) -> None:
        raise error("injected")

    monkeypatch.setattr(saver._orbax_manager, "restore", fail)
    with pytest.raises(error, match="injected"):
        saver.restore(state(0))


def test_save_copies_the_state_at_the_call(tmp_path: pathlib.Path) -> None:
    saver = CheckpointManager(tmp_path, save_total_limit=1)
    changing = np.zeros(1_000_000, np.float32)
    saver.save(1, {"a": changing}, {})
    changing[:] = 1  # While it is being hashed.
    saver.wait_until_finished()
    assert not saver.restore({"a": jnp.asarray(changing)}).state["a"].any()


def test_restore_empty_folder_raises(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        CheckpointManager(tmp_path, save_total_limit=1).restore(state(0))


def test_save_keeps_the_last_and_the_best(tmp_path: pathlib.Path) -> None:
    saver = CheckpointManager(tmp_path, save_total_limit=2)
    for step, best in [(1, None), (2, 2), (3, 3), (4, 3)]:
        saver.save(step, state(step), {}, best)
    saver.close()
    saver = CheckpointManager(tmp_path, save_total_limit=2)  # As a process that goes on does.
    for step in (5, 6):
        saver.save(step, state(step), {}, 3)
    saver.wait_until_finished()
    assert saver.all_steps() == [3, 5, 6]
    with pytest.raises(
        ValueError, match="has a checkpoint of step 5 already, which was not changed"
    ):
        saver.save(5, state(0), {})
    assert_equal(saver.restore(state(0), 5).state, state(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("narrow"), r"has \['narrow'\] in addition"),
        (lambda s: s.update(new=jnp.ones(2)), r"lacks \['new'\]"),
        (
            lambda s: s["adapter"].update({"w/a": jnp.ones((3, 3))}),
            r"\['adapter'\]\['w/a'\] is float32\(2, 3\), expected float32\(3, 3\)",
        ),
        (lambda s: s.update(count=jnp.float32(1)), r"\['count'\] is int32\(\), expected float32"),
    ],
)
def test_restore_other_structure_raises(folder: pathlib.Path, change: Any, message: str) -> None:
    like = state(0)
    change(like)
    with pytest.raises(ValueError, match=message):
        CheckpointManager(folder, save_total_limit=5).restore(like)


def files_of(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
    """Those that hold arrays' numbers."""
    return [f for f in (folder / str(step) / "state").rglob("d/*") if f.is_file()]


def refused_or_right(folder: pathlib.Path) -> bool:
    """Whether the last checkpoint is refused. Orbax does not read every byte that it writes, and
    what it does read then has to be right.
    """
    try:
        found = CheckpointManager(folder, save_total_limit=5).restore(state(0)).state
    except ValueError as error:
        told = str(error)
    else:
        assert_equal(found, state(7))
        return False
    pattern = r"Step 7 .* is damaged at .* to resume from step 3"
    assert re.search(pattern, told), told
    return True


# After reading damaged files Orbax leaves tasks, which complain when they are collected.
damage = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@damage
def test_restore_missing_file_raises(folder: pathlib.Path) -> None:
    noticed = 0
    for file in files_of(folder, 7):
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        (copy / file.relative_to(folder)).unlink()
        noticed += refused_or_right(copy)
        assert_equal(
            CheckpointManager(copy, save_total_limit=5).restore(state(0), 3).state, state(3)
        )
        shutil.rmtree(copy)
    assert noticed


@damage
def test_restore_flipped_bit_raises(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    noticed = 0
    for file in files_of(folder, 7):
        content = bytearray(file.read_bytes())
        for place in rng.integers(0, len(content), 6):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(spoilt)
            noticed += refused_or_right(folder)
        file.write_bytes(content)
    assert noticed > 5


def test_restore_wrong_hash_raises(folder: pathlib.Path) -> None:
    path = next((folder / "7" / "run_metadata").rglob("metadata"))
    facts = json.loads(path.read_text())
    key = "['adapter']['w/b']"
    facts["sha256"][key] = "0" * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="damaged at run_metadata: the values differ"):
        CheckpointManager(folder, save_total_limit=5).restore(state(0))
    facts["checksum"] = checkpointing._compute_checksum(
        {name: value for name, value in facts.items() if name != "checksum"}
    )
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"damaged at \['adapter'\]\['w/b'\]: the values differ"):
        CheckpointManager(folder, save_total_limit=5).restore(state(0))


def test_restore_changed_metadata_raises(folder: pathlib.Path) -> None:
    path = next((folder / "7" / "run_metadata").rglob("metadata"))
    facts = json.loads(path.read_text())
    for changed in ({**facts, "more": 1}, {k: v for k, v in facts.items() if k != "checksum"}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="Step 7 in .* is damaged at run_metadata"):
            CheckpointManager(folder, save_total_limit=5).restore(state(0))


def test_restore_later_format_raises(folder: pathlib.Path) -> None:
    path = next((folder / "7" / "run_metadata").rglob("metadata"))
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "format": CHECKPOINT_FORMAT + 1}))
    message = (
        f"has format {CHECKPOINT_FORMAT + 1}; this release reads formats up to {CHECKPOINT_FORMAT}"
    )
    with pytest.raises(ValueError, match=message):
        CheckpointManager(folder, save_total_limit=5).restore(state(0))


def test_init_removes_partial_checkpoints(folder: pathlib.Path) -> None:
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    for part in range(3000):  # More than a thread would have removed by the time of the look.
        (folder / "9.orbax-checkpoint-tmp" / f"part{part}").write_text("half")
    saver = CheckpointManager(folder, save_total_limit=5)
    assert not list(folder.glob("*tmp*"))
    assert saver.all_steps() == [3, 7]
    saver.save(9, state(9), {})
    saver.wait_until_finished()
    assert_equal(saver.restore(state(0)).state, state(9))
    assert not list(folder.glob("*tmp*"))


def test_restore_uses_the_target_shardings(folder: pathlib.Path) -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = state(0)
    like["adapter"]["w/a"] = jax.device_put(like["adapter"]["w/a"], split)
    found = CheckpointManager(folder, save_total_limit=5).restore(like).state
    assert found["adapter"]["w/a"].sharding == split
    assert_equal(found, state(7))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_read_only_raises(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="is not writable"):
        check_writable(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_check_on_a_full_disk_leaves_no_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        # A killed process would leave a file that the next one removes.
        assert list(tmp_path.glob(f".*{PARTIAL_SUFFIX}"))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="free disk space"):
        check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_init_on_a_file_raises(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(OSError, match="is not writable .*Use another output"):
        CheckpointManager(tmp_path / "run", save_total_limit=1)
