"""Plans of epochs: every example once, in full rows, in a reproducible order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from corpora import realistic

from jlora.training.data import packing
from jlora.training.data.packing import BatchConfig, EpochPlan, plan_epoch

SIZES = np.array([7, 3, 9, 2, 12, 5, 5, 11, 4, 6, 8, 2, 3], np.int64)


def seen(plan: EpochPlan) -> list[tuple[int, int]]:
    return [pair for batch in plan for row in batch.example_ids for pair in row]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "batching",
    [
        BatchConfig(batch_size=2, seq_length=12),
        BatchConfig(batch_size=3, seq_length=17, gradient_accumulation_steps=2),
        BatchConfig(batch_size=3, seq_length=12, packing=False),
        BatchConfig(
            batch_size=2,
            seq_length=12,
            gradient_accumulation_steps=2,
            packing=False,
            buckets=(4, 8, 12),
        ),
    ],
    ids=["packed", "accumulated", "alone", "buckets"],
)
def test_plan_epoch_has_every_example_once(batching: BatchConfig, shuffle: bool) -> None:
    lengths = [SIZES, SIZES[:5]]
    want = [(source, i) for source, of in enumerate(lengths) for i in range(len(of))]
    for epoch in range(3):
        plan = plan_epoch(lengths, batching, seed=1, epoch=epoch, shuffle=shuffle)
        assert sorted(seen(plan)) == want
        for batch in plan:
            assert (
                len(batch.example_ids) == batching.batch_size * batching.gradient_accumulation_steps
            )
            assert any(batch.example_ids)
            for row in batch.example_ids:
                assert sum(lengths[source][i] for source, i in row) <= batch.seq_length
                assert batching.packing or len(row) <= 1


def test_plan_epoch_buckets_smallest_that_fits() -> None:
    batching = BatchConfig(batch_size=2, seq_length=12, packing=False, buckets=(4, 8, 12))
    for shuffle in (True, False):
        plan = plan_epoch([SIZES], batching, seed=0, epoch=0, shuffle=shuffle)
        for batch in plan:
            for ((_, example),) in filter(None, batch.example_ids):
                assert batch.seq_length == min(b for b in (4, 8, 12) if b >= SIZES[example])
    lengths = [batch.seq_length for batch in plan]
    assert lengths == sorted(lengths)
    drawn = [
        [batch.seq_length for batch in plan_epoch([SIZES], batching, seed=seed, epoch=0)]
        for seed in range(5)
    ]
    assert any(lengths != sorted(lengths) for lengths in drawn)


@pytest.mark.parametrize(("length", "least"), [(1024, 0.99), (4096, 0.99), (512, 0.95)])
def test_plan_epoch_packed_rows_are_full(length: int, least: float) -> None:
    sizes = realistic(20_000, length)
    plan = plan_epoch([sizes], BatchConfig(batch_size=1, seq_length=length), seed=0, epoch=0)
    assert sizes.sum() / (len(plan) * length) > least
    assert len(sizes) > 2 * packing.PACKING_WINDOW
    assert sorted(plan.examples) == list(range(len(sizes)))


def test_best_fit_decreasing_matches_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 40, 60)
        rooms: list[int] = []
        for size in sorted(sizes, reverse=True):
            fitting = [number for number, room in enumerate(rooms) if room >= size]
            best = min(fitting, key=lambda number: rooms[number], default=None)
            if best is None:
                rooms.append(40 - size)
            else:
                rooms[best] -= size
        rows = packing._best_fit_decreasing(sizes, 40)
        assert sorted(40 - sizes[row].sum() for row in rows) == sorted(rooms)


def test_plan_epoch_is_deterministic() -> None:
    batching = BatchConfig(batch_size=2, seq_length=12)
    plans = [
        seen(plan_epoch([SIZES, SIZES], batching, seed=seed, epoch=epoch))
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert plans[0] == plans[1]
    assert len({tuple(plan) for plan in plans}) == 4
    # The same for every release of NumPy: otherwise, runs could not resume after an update.
    assert packing.seeded_permutation(6, 3, 1, 2, 5).tolist() == [1, 2, 5, 4, 3, 0]
    assert sorted(packing.seeded_permutation(1000, 0, 0, 0)) == list(range(1000))


def test_plan_epoch_sources_shuffle_differently() -> None:
    drawn = [
        packing._sample_source_examples(50, packing.Fraction(1), 0, source, 0, True).tolist()
        for source in (0, 1)
    ]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_plan_epoch_weights_exact_over_epochs(shuffle: bool) -> None:
    lengths = [SIZES, SIZES[:7], SIZES[:10], SIZES[:3]]
    weights = [1.0, 2.0, 0.1, 1 / 3]
    batching = BatchConfig(batch_size=2, seq_length=12)
    plans = [
        seen(plan_epoch(lengths, batching, seed=0, epoch=e, weights=weights, shuffle=shuffle))
        for e in range(30)
    ]
    for first in range(0, 30, 10):  # A tenth ten times is once.
        ten = Counter(pair for plan in plans[first : first + 10] for pair in plan)
        assert [ten[2, i] for i in range(10)] == [1] * 10
    for first in range(0, 30, 3):
        three = Counter(pair for plan in plans[first : first + 3] for pair in plan)
        assert [three[3, i] for i in range(3)] == [1] * 3
    for plan in plans:
        counts = Counter(plan)
        assert [counts[0, i] for i in range(13)] == [1] * 13
        assert [counts[1, i] for i in range(7)] == [2] * 7
        assert sum(source == 2 for source, _ in plan) == 1
    tenths = [next(i for source, i in plan if source == 2) for plan in plans]
    assert (tenths[:10] == tenths[10:20]) == (not shuffle)


def test_plan_epoch_each_pass_reshuffles() -> None:
    batching = BatchConfig(batch_size=2, seq_length=12)
    plans = [
        Counter(seen(plan_epoch([SIZES], batching, seed=0, epoch=e, weights=[1.5])))
        for e in range(2)
    ]
    assert sum(plans[0].values()) + sum(plans[1].values()) == 3 * len(SIZES)
    assert set(plans[0].values()) == {1, 2}
    assert set((plans[0] + plans[1]).values()) == {3}


def test_plan_epoch_mixes_sources() -> None:
    sizes = np.full(400, 5)
    plan = plan_epoch([sizes, sizes], BatchConfig(batch_size=4, seq_length=20), seed=0, epoch=0)
    shares = [np.mean([source for row in batch.example_ids for source, _ in row]) for batch in plan]
    assert 0.3 < np.mean(shares[: len(shares) // 2]) < 0.7
    assert max(abs(np.array(shares) - 0.5)) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "BatchConfig.batch_size=0 must be an int of at least 1"),
        ({"batch_size": 2.0}, r"BatchConfig.batch_size=2\.0 must be an int"),
        ({"seq_length": -1}, "BatchConfig.seq_length=-1 must be an int"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps=True must be an int"),
        ({"buckets": (4, 12)}, "packing=True fills rows with several. Leave one of them out"),
        (
            {"packing": False, "buckets": (4, 8)},
            r"buckets=\(4, 8\) must increase and end in seq_length=12",
        ),
        ({"packing": False, "buckets": (8, 4, 12)}, "must increase and end in"),
        ({"packing": False, "buckets": (0, 12)}, "must increase and end in"),
        ({"packing": False, "buckets": ()}, "must increase and end in"),
    ],
)
def test_batch_config_invalid_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchConfig(**{"batch_size": 2, "seq_length": 12, **options})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed=-1 must be an int from 0"),
        ({"weights": [1.0]}, "got 1 for 2 sources"),
        ({"weights": [1.0, 0.0]}, r"weights\[1\]=0.0 must be from 0.0001 to 10000 passes"),
        ({"weights": [float("nan"), 1.0]}, r"weights\[0\]=nan must be from"),
        (
            {"config": BatchConfig(batch_size=2, seq_length=11)},
            "Example 4 of source 0 has 12 tokens, more",
        ),
    ],
)
def test_plan_epoch_invalid_arguments_raise(given: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "config": BatchConfig(batch_size=2, seq_length=12),
        "seed": 0,
        "epoch": 0,
    }
    with pytest.raises(ValueError, match=message):
        plan_epoch([SIZES, SIZES[:2]], **options | given)
