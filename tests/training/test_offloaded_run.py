"""Runs with the optimizer state in host memory."""

from __future__ import annotations

import importlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from _support.training_fixtures import Make
from _support.training_runs import After, assert_same, measured, output, run, stop

from jlora.optim.offload import to_device
from jlora.training import recipe
from jlora.training.checkpointing import CheckpointManager
from jlora.training.data.batch_stream import LMBatch
from jlora.training.data_loader import make_microbatch_sharding
from jlora.training.recipe.sections import OptimizerSection
from jlora.training.setup import Setup, build_setup
from jlora.training.sharding import make_mesh
from jlora.training.signals import TrainingInterrupted

# The package has a function of this name.
offload = importlib.import_module("jlora.optim.offload")

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def made(raw: dict[str, Any], mesh: dict[str, int], **options: Any) -> Setup:
    devices = jax.devices()[: math.prod(mesh.values())]
    return build_setup(recipe.validate(raw), make_mesh(mesh, devices), total_steps=6, **options)


def with_offload(raw: dict[str, Any], offload: bool) -> dict[str, Any]:
    return {**raw, "optimizer": {**raw["optimizer"], "offload": offload}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folder of the one run without offload, which several tests share."""
    return {"folder": tmp_path_factory.mktemp("plain")}


def raw_of(recipe_of: Make, folder: pathlib.Path, **optimizer: Any) -> dict[str, Any]:
    return recipe_of(
        output=str(folder / "run"),
        batch={"size": 2, "gradient_accumulation_steps": 2},
        optimizer=optimizer,
        training={"steps": 5},
    )


@pytest.fixture
def whole(plain: dict[str, Any], recipe_of: Make) -> dict[str, Any]:
    """A run without offload."""
    if "raw" not in plain:
        plain["raw"] = raw_of(recipe_of, plain["folder"])
        run(plain["raw"])
    return plain["raw"]


def test_offload_default_is_off() -> None:
    assert not OptimizerSection().offload


@pytest.mark.slow
def test_train_offload_is_bit_exact(
    whole: dict[str, Any], recipe_of: Make, tmp_path: pathlib.Path
) -> None:
    raw = raw_of(recipe_of, tmp_path, offload=True)
    run(raw)
    assert_same(raw, whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(False, True, id="from the devices to the host"),
        pytest.param(True, False, id="from the host to the devices"),
        pytest.param(True, True, marks=pytest.mark.slow, id="from the host to the host"),
    ],
)
@pytest.mark.slow
def test_resume_with_other_offload_is_bit_exact(
    whole: dict[str, Any], recipe_of: Make, tmp_path: pathlib.Path, before: bool, after: bool
) -> None:
    raw = raw_of(recipe_of, tmp_path, offload=before)
    with pytest.raises(TrainingInterrupted):
        run(raw, callbacks=[After(3, stop)])
    assert measured(raw)[-1]["step"] < 5
    run(with_offload(raw, after), resume=True)
    assert_same(raw, whole)


@pytest.mark.slow
def test_restore_keeps_offloaded_shardings(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    raw = recipe_of(batch={"size": 4})
    there = made(with_offload(raw, True), MESH)
    here = made(raw, MESH)
    for one, two in zip(jax.tree.leaves(there.state), jax.tree.leaves(here.state), strict=True):
        assert one.sharding.with_memory_kind("device") == two.sharding.with_memory_kind("device")
    assert kinds(there.state.opt_state) == {"pinned_host"}
    assert kinds(there.state._replace(opt_state=None)) == {"device"}
    saver = CheckpointManager(tmp_path / "saved", save_total_limit=1)
    saver.save(1, here.state, {})
    saver.wait_until_finished()
    restored = saver.restore(there.state).state
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, there.state
    )
    saver.close()


@pytest.mark.slow
def test_train_step_offload_compiles_once(recipe_of: Make) -> None:
    setup = made(with_offload(recipe_of(batch={"size": 4}), True), MESH)
    described = made(with_offload(recipe_of(batch={"size": 4}), True), MESH, abstract=True)
    assert kinds(described.state.opt_state) == {"pinned_host"}
    state = setup.state
    for number in range(2):
        before = state
        state, measured = setup.train_step(
            state, setup.frozen, batch_of(setup), jax.random.key(number)
        )
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state))
        assert bool(measured.is_finite)
    assert kinds(state.opt_state) == {"pinned_host"}
    assert setup.train_step._fn._cache_size() == 1


def batch_of(setup: Setup) -> Any:
    ids = jnp.arange(4 * 16).reshape(1, 4, 16) % 7
    ones = jnp.ones((1, 4, 16), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(16), ids.shape)
    arrays = LMBatch(ids, ids, ones.astype(jnp.float32), ones, places)
    return jax.device_put(arrays, make_microbatch_sharding(setup.mesh))


@pytest.mark.parametrize(
    ("lora", "optimizer"),
    [
        ({"family": "AdaLoRA"}, {"budget": {"target_rank": 1, "warmup_ratio": 0.1}}),
        ({"family": "SoRA"}, {}),
        ({"rank": 2, "alpha": 4.0}, {"lr_multipliers": {"b": 16.0}}),
    ],
    ids=["AdaLoRA", "SoRA", "LoRA+"],
)
@pytest.mark.slow
def test_build_setup_offloads_every_optimizer(
    recipe_of: Make, lora: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    raw = recipe_of(
        batch={"size": 4, "gradient_accumulation_steps": 2},
        optimizer={**optimizer, "offload": True},
    )
    raw["adapter"] = {"rank": 2, **lora}
    assert kinds(made(raw, MESH).state.opt_state) == {"pinned_host"}


def test_train_wrong_transfers_raise(recipe_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    right = to_device
    monkeypatch.setattr(
        offload, "to_device", lambda state: jax.tree.map(lambda x: x + 1, right(state))
    )
    raw = recipe_of(optimizer={"offload": True})
    with pytest.raises(RuntimeError, match=r"wrong values .*optimizer\.offload=false"):
        run(raw)
    assert not (output(raw) / "metrics.jsonl").exists()


@pytest.mark.slow
def test_train_without_host_memory_raises(recipe_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "HOST_MEMORY_KIND", "punched_cards")
    with pytest.raises(
        ValueError, match=r"'punched_cards' is not among .*optimizer\.offload=false"
    ):
        run(recipe_of(optimizer={"offload": True}))
    run(recipe_of(training={"steps": 1}))
