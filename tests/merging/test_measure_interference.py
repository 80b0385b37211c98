"""Interference against NumPy, on the materialized updates in float64."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from _support.cases import case, moved
from _support.deltas import LAYOUTS, bias, change, lora

from jlora import merging

# From singular vectors in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def adapters(layout: str) -> dict[str, dict[str, Any]]:
    return {
        "one": {"w": lora(layout, 1)},
        "two": {"w": lora(layout, 2, rank=1, alpha=4.0)},
        "three": {"w": lora(layout, 3, rank=3, use_rslora=True)},
    }


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    """`||Q1^T Q2||^2 / min(r1, r2)` of two orthonormal bases."""
    return float(((one.T @ two) ** 2).sum() / min(one.shape[1], two.shape[1]))


def spaces(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())  # The factors are of float32.
    return u[:, :rank], vt[:rank].T


def effective_rank(matrix: np.ndarray) -> float:
    s = np.linalg.svd(matrix, compute_uv=False)
    share = s[s > 0] / s.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize(
    "layout",
    [
        layout
        if layout in ("plain", "experts_in_the_middle")
        else pytest.param(layout, marks=pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_law_interference_agrees_with_numpy(layout: str) -> None:
    given = adapters(layout)
    found = merging.measure_interference(given).per_weight["w"]
    dense = [change(adapter["w"]) for adapter in given.values()]
    for i, j in itertools.product(range(3), range(3)):
        one, two = dense[i], dense[j]
        cosine = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
        pairs = [(spaces(a), spaces(b)) for a, b in zip(one, two, strict=True)]
        want = (
            cosine,
            np.mean([overlap(a[0], b[0]) for a, b in pairs]),
            np.mean([overlap(a[1], b[1]) for a, b in pairs]),
            (np.sign(one) * np.sign(two) < 0).mean(),
        )
        got = (found.cosine, found.input_overlap, found.output_overlap, found.sign_conflicts)
        np.testing.assert_allclose([values[i, j] for values in got], want, **CLOSE)
    want_ranks = [np.mean([effective_rank(matrix) for matrix in one]) for one in dense]
    np.testing.assert_allclose(found.effective_rank, want_ranks, **CLOSE)


def test_interference_of_known_relations() -> None:
    one = lora("plain", 1)
    # The same inputs with outputs of its own, and the opposite change.
    turned = dataclasses.replace(lora("plain", 2), a=one.a)
    opposite = dataclasses.replace(one, b=-2 * one.b)
    found = merging.measure_interference(
        {"a": {"w": one}, "b": {"w": turned}, "c": {"w": opposite}}
    )
    meeting = found.per_weight["w"]
    assert meeting.input_overlap[0, 1] == pytest.approx(1, abs=1e-5)
    assert meeting.output_overlap[0, 1] < 0.9
    assert meeting.cosine[0, 2] == pytest.approx(-1, abs=1e-6)
    assert meeting.sign_conflicts[0, 2] == 1
    assert meeting.input_overlap[0, 2] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.diagonal(meeting.cosine), 1, atol=1e-6)


def test_interference_cosine_of_a_stack() -> None:
    given = {"a": {"w": lora("stacked", 1)}, "b": {"w": lora("stacked", 2)}}
    one, two = (change(adapter["w"]).ravel() for adapter in given.values())
    want = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert merging.measure_interference(given).per_weight["w"].cosine[0, 1] == pytest.approx(
        want, abs=1e-5
    )


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e19, 1e37])
@pytest.mark.thin(4)
def test_interference_any_update_size_is_same(size: float) -> None:
    root = np.float32(np.sqrt(size))
    given = {name: adapter["w"] for name, adapter in adapters("plain").items()}
    scaled = {
        name: {"w": dataclasses.replace(leaf, a=leaf.a * root, b=leaf.b * root)}
        for name, leaf in given.items()
    }
    found = merging.measure_interference(scaled).per_weight["w"]
    expected = merging.measure_interference(adapters("plain")).per_weight["w"]
    for name in ("cosine", "input_overlap", "output_overlap", "sign_conflicts", "effective_rank"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **CLOSE)


def test_interference_ignores_rounding_directions() -> None:
    wide, other = lora("plain", 1, rank=4), lora("plain", 2)
    b = np.array(wide.b)
    b[1:] = np.outer([0.7, -1.3, 2.1], b[0])  # Of four ranks one is left, up to rounding.
    single = dataclasses.replace(wide, b=b)
    found = merging.measure_interference({"a": {"w": single}, "b": {"w": other}}).per_weight["w"]
    near, against = (spaces(change(leaf)[0])[0] for leaf in (single, other))
    assert (near.shape, against.shape) == ((6, 1), (6, 2))
    assert found.input_overlap[0, 1] == pytest.approx(overlap(near, against), abs=1e-4)
    assert found.effective_rank[0] == pytest.approx(1, abs=1e-3)


def test_interference_without_update_is_nan() -> None:
    idle = dataclasses.replace(lora("plain", 3), b=0 * lora("plain", 3).b)
    given = {
        "a": {"w": lora("plain", 1), "only": lora("stacked", 1)},
        "b": {"w": lora("plain", 2)},
        "idle": {"w": idle},
    }
    found = merging.measure_interference(given)
    only, shared = found.per_weight["only"], found.per_weight["w"]
    assert np.isfinite(only.cosine).tolist() == [[True, False, False], *[[False] * 3] * 2]
    assert np.isnan(only.effective_rank[1:]).all()
    assert np.isnan(shared.cosine[2]).all()
    assert np.isnan(shared.sign_conflicts[2]).all()
    assert shared.effective_rank[2] == 0
    assert np.isfinite(found.mean("cosine")[0, 1])
    assert np.isnan(found.mean("cosine")[2]).all()


def test_interference_bias_has_no_subspaces() -> None:
    found = merging.measure_interference({"a": {"b": bias(1)}, "b": {"b": bias(2)}}).per_weight["b"]
    one, two = (np.asarray(bias(seed).delta, np.float64) for seed in (1, 2))
    want = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert found.cosine[0, 1] == pytest.approx(want, abs=1e-6)
    assert found.sign_conflicts[0, 1] == (one * two < 0).mean()
    assert np.isnan(found.input_overlap).all()
    assert np.isnan(found.output_overlap).all()


def test_interference_hira_requires_params() -> None:
    one = case("experts", "float32", "hira")
    other = moved(one.fresh, 5)
    found = merging.measure_interference({"a": one.adapter, "b": other}, one.params).per_weight["w"]
    base = np.asarray(one.params["w"], np.float64)
    flat = [
        (base * (np.asarray(a["w"].a, np.float64) @ np.asarray(a["w"].b, np.float64))).ravel()
        for a in (one.adapter, other)
    ]
    want = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert found.cosine[0, 1] == pytest.approx(want, abs=1e-5)
    with pytest.raises(ValueError, match="Pass params"):
        merging.measure_interference({"a": one.adapter, "b": other})


def test_interference_table_has_pairs_and_weights() -> None:
    given = {name: {**a, "bias": bias(n)} for n, (name, a) in enumerate(adapters("plain").items())}
    found = merging.measure_interference(given)
    means, ranks, weights = str(found).split("\n\n")
    assert [line.split()[:3] for line in means.splitlines()[2:]] == [
        ["one", "/", "two"],
        ["one", "/", "three"],
        ["two", "/", "three"],
    ]
    assert f"{found.mean('cosine')[1, 2]:.3f}" in means.splitlines()[-1]
    assert [line.split()[0] for line in ranks.splitlines()[1:]] == ["one", "two", "three"]
    cosine = np.abs(np.triu(found.per_weight["w"].cosine, 1))
    i, j = np.unravel_index(cosine.argmax(), cosine.shape)
    line = weights.splitlines()[2].split()
    assert line[:4] == ["w", found.names[i], "/", found.names[j]]
    assert weights.splitlines()[3].split()[-3:-1] == ["-", "-"]


def test_save_heatmap_png_grows_with_pairs(tmp_path: Path) -> None:
    sizes = []
    for count in (2, 8):
        figures = np.random.default_rng(0).uniform(-1, 1, (4, count, count))
        figures[1, 0] = np.nan
        meeting = merging.PairStats(*figures, np.ones(count))
        names = tuple(f"task {number}" for number in range(count))
        path = tmp_path / f"{count}.png"
        merging.save_heatmap(merging.Interference(names, {"a": meeting, "b": meeting}), path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[16:20], "big"))
    assert sizes[0] < sizes[1]


def test_save_heatmap_without_matplotlib_raises(monkeypatch: Any, tmp_path: Path) -> None:
    import sys

    found = merging.measure_interference({"a": {"b": bias(1)}, "b": {"b": bias(2)}})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "jlora\[train\]"'):
        merging.save_heatmap(found, tmp_path / "map.png")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([{"w": lora("plain", 1)}], TypeError, "must be a mapping from names"),
        ({}, ValueError, "at least two"),
        ({"a": {"w": lora("plain", 1)}}, ValueError, r"adapters=\['a'\] must have at least two"),
        ({"a": {"w": lora("plain", 1)}, "b": 3}, TypeError, "not what init returns"),
        (
            {"a": {"w": lora("plain", 1)}, "b": {"w": lora("transposed", 1)}},
            ValueError,
            "different weights",
        ),
        (
            {
                "a": {"w": lora("plain", 1)},
                "b": {"w": dataclasses.replace(lora("plain", 1), a=jnp.full((6, 2), jnp.nan))},
            },
            ValueError,
            "has NaN",
        ),
    ],
)
def test_interference_bad_adapters_raise(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merging.measure_interference(given)
