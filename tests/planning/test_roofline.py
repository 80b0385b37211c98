"""Estimates and advice, computed from the numbers of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from jlora.planning import hlo_cost, roofline
from jlora.planning.compiled_cost import DoesNotFitError, StepCost, StepMemory
from jlora.planning.tpu_topology import TPU_CHIPS

GIB = 2**30
MEMORY = StepMemory(
    {"weights": 8 * GIB, "adapter": GIB // 4, "optimizer": GIB // 2, "batch": 0}, 0, 0, 20 * GIB, 0
)
MESH = {"data": 2, "fsdp": 4, "tensor": 1}
PLAN: dict[str, Any] = {
    "mesh_shape": MESH,
    "batch_size": 64,
    "seq_length": 1024,
    "num_layers": 32,
    "hidden_size": 4096,
}


def measured(flops: float, hbm: float, ici: float) -> StepCost:
    sent = (hlo_cost.CollectiveStats("all-gather", 1, int(ici)),)
    return StepCost(MEMORY, int(flops), int(hbm), sent, 0)


@pytest.mark.parametrize(
    ("work", "bound"),
    [
        ((394e12, 819e9, 50e9), "compute"),
        ((197e12, 1638e9, 50e9), "hbm"),
        ((197e12, 819e9, 200e9), "ici"),
    ],
)
def test_estimate_is_between_max_and_sum(work: Any, bound: str) -> None:
    found = roofline.estimate_step_time(measured(*work), TPU_CHIPS["v5e"], tokens=12000, chips=4)
    assert found.bound == bound
    assert found.fastest_s == pytest.approx(2)
    assert found.slowest_s == pytest.approx(sum(found[:3]))
    assert found.tokens_per_s == pytest.approx((12000 / found.slowest_s, 6000))


def test_estimate_ring_uses_two_links() -> None:
    for chip, each in (("v5e", 50e9), ("v5p", 100e9)):
        found = roofline.estimate_step_time(
            measured(0, 0, 4e11), TPU_CHIPS[chip], tokens=1, chips=4
        )
        assert found.ici_s == pytest.approx(4e11 / (2 * each))


def test_estimate_spread_uses_all_links() -> None:
    sent = (
        hlo_cost.CollectiveStats("all-gather", 1, 10**11, 6),
        hlo_cost.CollectiveStats("all-reduce", 1, 10**11, 2),
    )
    work = StepCost(MEMORY, 0, 0, sent, 0)
    for chip, links, each in (("v5e", 4, 50), ("v5p", 6, 100)):
        found = roofline.estimate_step_time(work, TPU_CHIPS[chip], tokens=1, chips=4)
        assert found.ici_s == pytest.approx(100 / (links * each) + 100 / (2 * each))


def test_suggest_plan_changes_fitting_is_empty() -> None:
    assert roofline.suggest_plan_changes(MEMORY, MEMORY.peak, **PLAN) == []


def test_suggest_plan_changes_sufficient_first() -> None:
    found = roofline.suggest_plan_changes(MEMORY, 16 * GIB, **{**PLAN, "remat_policy": "none"})
    over = MEMORY.peak - 16 * GIB
    fits = [change.is_sufficient for change in found]
    assert fits == sorted(fits, reverse=True)
    assert True in fits
    assert False in fits
    assert all(change.is_sufficient == (change.saved_bytes >= over) for change in found)


def test_suggest_plan_changes_batch_size_fits() -> None:
    for available in range(9, 29, 3):
        found = roofline.suggest_plan_changes(MEMORY, available * GIB, **PLAN)
        (rows,) = (change for change in found if "a batch size of" in change.description)
        assert (MEMORY.peak - rows.saved_bytes <= available * GIB) == rows.is_sufficient
        assert int(rows.description.split()[4]) % 8 == 0  # They can be shared out.
    (rows,) = (
        c
        for c in roofline.suggest_plan_changes(MEMORY, 16 * GIB, **PLAN)
        if "a batch size of" in c.description
    )
    # 7.25 of 20 GiB are left for temporaries: 23 of 64 rows, and 16 is a multiple of 8.
    assert rows.description.startswith(
        "a batch size of 16 instead of 64, with 4 accumulation steps"
    )


def test_suggest_plan_changes_fsdp_savings() -> None:
    found = roofline.suggest_plan_changes(MEMORY, 0, **PLAN)

    def frees(part: str) -> int:
        (change,) = (change for change in found if part in change.description)
        return change.saved_bytes

    assert frees("fsdp=8 and data=1 instead of fsdp=4") == (8 * GIB + GIB // 4 + GIB // 2) // 2


def test_suggest_plan_changes_skips_done_ones() -> None:
    done = {**PLAN, "mesh_shape": {"data": 1, "fsdp": 8, "tensor": 1}, "batch_size": 8}
    whats = [c.description for c in roofline.suggest_plan_changes(MEMORY, 16 * GIB, **done)]
    assert not any("data=1" in what or "remat" in what for what in whats)
    assert not any("batch size of" in what for what in whats)
    assert any("chips" in what for what in whats)


def test_does_not_fit_error_lists_sizes() -> None:
    error = DoesNotFitError(MEMORY, 16 * GIB)
    assert "needs 28.75 GiB per chip, but 16.00 GiB are available: weights 8.00 GiB" in str(error)
    assert error.memory is MEMORY
