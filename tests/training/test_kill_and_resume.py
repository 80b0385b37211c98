"""Runs and checkpoints when processes are killed, disks are full, or there are two processes."""

from __future__ import annotations

import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from _support.training_fixtures import Make

from jlora.training.checkpointing import CheckpointManager
from jlora.training.metrics import read_metrics
from jlora.training.recipe.sections import DistributedSection
from jlora.training.runtime import get_distributed_init_args

ROOT = pathlib.Path(__file__).parents[2]


def started(arguments: list[str], devices: int = 1, **options: Any) -> subprocess.Popen[str]:
    """A process of its own, with quick compilation."""
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        f"--xla_cpu_parallel_codegen_split_count=1"
    )
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def jlora(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    # Children of a job in the background ignore SIGINT, and with it the test of it would wait.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from jlora.cli import main; sys.exit(main())"
    )
    return started(["-c", script, *arguments], devices)


def written(raw: dict[str, Any], folder: pathlib.Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


# --- signals --------------------------------------------------------------------------------------

SAVER = """
import sys, jax.numpy as jnp
from jlora.training.checkpointing import CheckpointManager
saver = CheckpointManager(sys.argv[1], save_total_limit=3)
first = max(saver.all_steps(), default=0) + 1
print("ready", flush=True)
for step in range(first, first + 10_000):
    saver.save(step, {"a": jnp.arange(3000.0) + step, "b": jnp.float32(step)}, {})
"""


def kill_while_saving(folder: pathlib.Path, times: int) -> None:
    rng = random.Random(0)
    like = {"a": jnp.zeros(3000), "b": jnp.float32(0)}
    last = 0
    for _ in range(times):
        child = started(["-c", SAVER, str(folder)])
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 0.9))
        child.kill()
        child.communicate()
        saver = CheckpointManager(folder, save_total_limit=3)
        steps = saver.all_steps()
        if steps:
            found = saver.restore(like)
            assert found.step == steps[-1] >= last
            np.testing.assert_array_equal(found.state["a"], np.arange(3000.0) + found.step)
            assert found.state["b"] == found.step
            last = found.step
        saver.close()
        assert not list(folder.glob("*tmp*"))
    assert last


@pytest.mark.slow
def test_kill_during_save_keeps_the_last(tmp_path: pathlib.Path) -> None:
    kill_while_saving(tmp_path / "run", 4)


@pytest.mark.slow
def test_repeated_kills_keep_the_last(tmp_path: pathlib.Path) -> None:
    kill_while_saving(tmp_path / "run", 20)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_train_signal_saves_and_exits(
    recipe_of: Make, tmp_path: pathlib.Path, number: signal.Signals, status: int
) -> None:
    raw = recipe_of(training={"steps": 100_000, "save_interval_minutes": None})
    child = jlora("train", written(raw, tmp_path))
    lines = pathlib.Path(raw["output"]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == status, error
    assert f"{number.name}: step" in error
    saver = CheckpointManager(pathlib.Path(raw["output"]) / "checkpoints", save_total_limit=2)
    (step,) = saver.all_steps()
    assert step == read_metrics(lines)[-1]["step"]
    facts = saver.load_metadata(step)
    assert facts["progress"]["step"] == step


# --- disks ----------------------------------------------------------------------------------------


def test_save_full_disk_raises_and_keeps_earlier(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    states = [{"a": jnp.asarray(rng.normal(size=30_000))} for _ in range(2)]  # Nothing to compress.
    saver = CheckpointManager(tmp_path / "run", save_total_limit=2)
    saver.save(1, states[0], {})
    saver.wait_until_finished()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        saver.save(2, states[1], {})  # It returns before anything is written.
        with pytest.raises(OSError, match="could not be written to .*Earlier ones are intact"):
            saver.wait_until_finished()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = CheckpointManager(tmp_path / "run", save_total_limit=2)
    assert again.all_steps() == [1]
    np.testing.assert_array_equal(again.restore(states[1]).state["a"], states[0]["a"])


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "environment", "want"),
    [
        ({}, {}, None),
        ({"auto": True}, {}, {}),
        (
            {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2},
            {"JAX_COORDINATOR_ADDRESS": "b:2"},
            {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2},
        ),
        (
            {},
            {
                "JAX_COORDINATOR_ADDRESS": "b:2",
                "JAX_NUM_PROCESSES": "4",
                "JAX_PROCESS_ID": "0",
            },
            {"coordinator_address": "b:2", "num_processes": 4, "process_id": 0},
        ),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "b:2"},
            {"coordinator_address": "b:2", "num_processes": None, "process_id": None},
        ),
    ],
)
def test_get_distributed_init_args_by_source(
    options: dict[str, Any], environment: dict[str, str], want: Any
) -> None:
    assert get_distributed_init_args(DistributedSection(**options), environment) == want


def test_get_distributed_init_args_text_raises() -> None:
    environment = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "two"}
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two' must be a number"):
        get_distributed_init_args(DistributedSection(), environment)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_train_two_processes_equals_one(
    recipe_of: Make, tmp_path: pathlib.Path, offload: bool
) -> None:
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        raw = recipe_of(
            output=str(tmp_path / name),
            batch={"size": 4},
            mesh={"data": 2, "fsdp": 2},
            optimizer={"offload": offload},
        )
        (tmp_path / name).mkdir()
        recipe = written(raw, tmp_path)
        port = f"127.0.0.1:{free_port()}"
        common = ["--distributed.coordinator_address", port, "--distributed.num_processes", "2"]
        if processes == 1:
            children = [jlora("train", recipe, devices=4)]
        else:
            children = [
                jlora("train", recipe, *common, "--distributed.process_id", str(number), devices=2)
                for number in range(2)
            ]
        for child in children:
            _, error = child.communicate(timeout=300)
            assert child.returncode == 0, error
        found.append(
            (
                [line["train/loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")],
                safetensors.numpy.load_file(tmp_path / name / "adapter.safetensors"),
                json.loads((tmp_path / name / "checkpoints/6/run_metadata/metadata").read_text()),
            )
        )
    (losses, arrays, facts), (others, other_arrays, other_facts) = found
    # Sums in another order, in float32.
    np.testing.assert_allclose(losses, others, rtol=2e-5)
    for name in arrays:
        np.testing.assert_allclose(arrays[name], other_arrays[name], atol=2e-4)
    assert facts["data"] == other_facts["data"]
    assert facts["base"] == other_facts["base"]
