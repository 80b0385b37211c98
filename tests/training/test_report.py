"""Report of a run: tables, figures, and a page that needs no other file."""

from __future__ import annotations

import itertools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest
from _support.training_fixtures import Make
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jlora.training import recipe, report
from jlora.training.setup import build_setup
from jlora.training.sharding import make_mesh

NORMS = {
    f"params/layers/{kind}/kernel": np.linspace(0.01, 0.02, 3)
    for kind in ("attention/q", "attention/o", "mlp/down")
}


def run_lines(steps: int, interval: int, *eval_names: str) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    lines = []
    for step in range(1, steps + 1):
        metrics = {"train/loss": 2 / step, "train/gradient_norm": 1.0, "train/learning_rate": 1e-4}
        lines.append({"step": step, **metrics, "num_targets": 9.0, "seconds": 0.5})
        if step % interval == 0:
            lines.append({"step": step, **{f"eval/{name}": 1 / step for name in eval_names}})
    return lines


def page_of(path: pathlib.Path, **options: Any) -> str:
    defaults: dict[str, Any] = {
        "title": "jlora: run",
        "run_overview": {"steps": "9 of 9"},
        "settings": {"rank": "16"},
        "metrics": [],
        "update_norms": {},
        "samples": [],
    }
    report.write_report(path, **{**defaults, **options})
    return path.read_text(encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------


def test_settings_table_has_all_settings(recipe_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jlora", "train", "my recipe.yaml"])
    parsed = recipe.validate(
        recipe_of(
            model={"compute_dtype": "bfloat16"},
            batch={"size": 2, "gradient_accumulation_steps": 3},
            optimizer={"lr_multipliers": {"b": 16.0}},
            adapters=[{"family": "IA3", "target_pattern": "mlp/down"}],
        )
    )
    mesh = make_mesh({}, jax.devices()[:1])
    setup = build_setup(parsed, mesh, total_steps=3, abstract=True)
    settings = report.make_settings_table(parsed, setup, {"jax": "1.2.3", "flax": "4.5"})
    date = settings.pop("date")
    assert settings == {
        "adapter": "IA3, LoRA",
        "rank": "-, 2",
        "alpha": "-, 4",
        "learning rate": "0.01, schedule cosine, warmup ratio 0.03, multipliers b 16",
        "batch size": "2 x 3 accumulation steps",
        "sequence length": "64",
        "dtype": "float32, computation in bfloat16",
        "seed": "0",
        "device": "1 x cpu",
        "versions": "jax 1.2.3, flax 4.5",
        "command line": "jlora train 'my recipe.yaml'",
    }
    assert date[:2] == "20"


def test_page_has_settings_and_escapes_text(tmp_path: pathlib.Path) -> None:
    sample = report.PromptSample("who sees the <cat>?", "a & b", "c")
    page = page_of(
        tmp_path / "report.html",
        settings={"rank": "16", "command line": "jlora <train>"},
        samples=[sample],
    )
    assert "<tr><th>steps</th><td>9 of 9</td></tr>" in page
    assert "<tr><th>rank</th><td>16</td></tr>" in page
    assert "<tr><th>command line</th><td>jlora &lt;train&gt;</td></tr>" in page
    assert "<pre>who sees the &lt;cat&gt;?</pre>" in page
    assert "<pre>a &amp; b</pre>" in page


def test_page_breaks_long_words_in_cells(tmp_path: pathlib.Path) -> None:
    assert "td, th { overflow-wrap: anywhere }" in page_of(tmp_path / "report.html")


def test_page_without_data_has_no_empty_section(tmp_path: pathlib.Path) -> None:
    page = page_of(tmp_path / "report.html", settings={})
    assert "<h2>" not in page
    assert "<svg" not in page


def test_page_needs_no_other_file(tmp_path: pathlib.Path) -> None:
    metrics = run_lines(6, 2, "loss")
    page = page_of(tmp_path / "report.html", metrics=metrics, update_norms=NORMS)
    assert page.count("<svg") == 2
    assert "src=" not in page
    assert "<link" not in page
    assert "evaluation loss" in page
    assert "mlp/down/kernel" in page


# --- figures --------------------------------------------------------------------------------------


def draw(figure: Any) -> Any:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def test_training_curves_evaluation_beside_loss() -> None:
    metrics = run_lines(9, 3, "loss", "accuracy")
    figure = report._plot_training_curves(metrics, best_step=6)
    assert figure is not None
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[:3] == ["training loss (nats)", "evaluation loss (nats)", "evaluation accuracy"]
    draw(figure)
    first, second = (axes.get_position() for axes in figure.axes[:2])
    assert first.y0 == pytest.approx(second.y0)
    assert first.x1 < second.x0
    curve, best = figure.axes[1].get_lines()
    np.testing.assert_allclose(curve.get_xydata(), [[3, 1 / 3], [6, 1 / 6], [9, 1 / 9]])
    np.testing.assert_allclose(best.get_xydata(), [[6, 1 / 6]])


def test_training_curves_without_evaluations() -> None:
    figure = report._plot_training_curves(run_lines(9, 99))
    assert figure is not None
    assert len(figure.axes) == 4
    assert report._plot_training_curves([]) is None


@pytest.mark.parametrize("names", [(), ("loss", "accuracy")])
def test_training_curves_do_not_overlap(names: tuple[str, ...]) -> None:
    figure = report._plot_training_curves(run_lines(120, 7, *names), best_step=14)
    assert figure is not None
    renderer = draw(figure)
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert len(boxes) == 4 + len(names)
    for one, two in itertools.combinations(boxes, 2):
        assert not one.overlaps(two)
    for box in boxes:  # Within the figure.
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def test_update_norms_labels_are_in_the_figure() -> None:
    figure = report._plot_update_norms(NORMS)
    renderer = draw(figure)
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [
        "mlp/down/kernel",
        "attention/q/kernel",
        "attention/o/kernel",
    ]
    for label in labels:
        assert label.get_window_extent(renderer).x0 >= 0


# --- summary --------------------------------------------------------------------------------------


def test_run_summary_counts_and_best_evaluation() -> None:
    metrics = run_lines(4, 2, "loss", "accuracy")
    metrics[0]["train/gradient_norm"] = float("inf")
    summary = report.RunSummary("max_steps", 2, 4, 0.0, [], metrics)
    assert summary.best_eval_metrics == {"loss": 0.5, "accuracy": 0.5}
    assert summary.skipped_steps == 1
    assert summary.step_seconds == 2.0
    assert [line["step"] for line in summary.step_metrics] == [1, 2, 3, 4]
