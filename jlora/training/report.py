"""report.html: what a run did, in one file that needs nothing else."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora.adapters.base import AdapterLeaf
from jlora.convert import delta
from jlora.quantization.quantize import quantization_summary
from jlora.training.datasets import Datasets
from jlora.training.progress import _count_params, describe_quantized_base, trainable_params_line
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup

_MERGE_DESCRIPTIONS = {
    "dequantized": "into the dequantized weights: the model that was trained and measured",
    "original": "into the original weights, which are not the quantised ones that the adapter was "
    "trained on: nothing here was measured on the merged model",
}


class RunSummary(NamedTuple):
    """How a run went.

    Attributes:
        stop_reason: It ended: "max_steps", or "early_stopping" when evaluations got no better.
        best_step: The step whose adapter is written.
        total_steps: How many were to be made.
        data_wait_s: In which the devices had no batch, since the run was last resumed.
        test_metrics: The means on the test data before and after, if there is any.
        metrics: Of metrics.jsonl.
    """

    stop_reason: str
    best_step: int
    total_steps: int
    data_wait_s: float
    test_metrics: Sequence[dict[str, float]]
    metrics: Sequence[dict[str, Any]]

    @property
    def step_metrics(self) -> list[dict[str, Any]]:
        """The lines of steps."""
        return [line for line in self.metrics if "loss" in line]

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing."""
        return sum(not _is_finite_step_line(line) for line in self.step_metrics)

    @property
    def step_seconds(self) -> float:
        """That the steps took."""
        return sum(line["seconds"] for line in self.step_metrics)


def _is_finite_step_line(line: dict[str, Any]) -> bool:
    return math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])


def make_result_json(setup: Setup, run_summary: RunSummary) -> dict[str, Any]:
    """What came of a run, for programs: the means of the tests and of the kept evaluation."""
    trained, base = _count_params(setup)
    found = quantization_summary(setup.frozen["base"])
    kept = [line for line in run_summary.metrics if line["step"] == run_summary.best_step]
    means = {
        name.removeprefix("validation_"): value
        for line in kept
        for name, value in line.items()
        if name.startswith("validation_")
    }
    return {
        "stop_reason": run_summary.stop_reason,
        "steps": len(run_summary.step_metrics),
        "skipped_steps": run_summary.skipped_steps,
        "best_step": run_summary.best_step,
        "validation": means or None,
        "test": dict(zip(("before", "after"), run_summary.test_metrics, strict=False)) or None,
        "trainable_params": trained,
        "base": base,
        "quantized": None if found is None else found._asdict(),
        "seconds": round(run_summary.step_seconds, 1),
        "data_wait_s": round(run_summary.data_wait_s, 3),
        "device": setup.mesh.devices.flat[0].device_kind,
        "devices": setup.mesh.size,
    }


def make_run_overview(
    recipe: Recipe, setup: Setup, datasets: Datasets, run_summary: RunSummary
) -> dict[str, str]:
    """What the report begins with."""
    stepped = run_summary.step_metrics
    evaluated = {line["step"]: line for line in run_summary.metrics if "validation_loss" in line}
    seconds, waited = round(run_summary.step_seconds), round(run_summary.data_wait_s)
    told = {
        "base": recipe.model.path,
        **describe_quantized_base(setup),
        "adapter": ", ".join(rule.family for rule in (*recipe.adapters, recipe.adapter)),
        "trained": trainable_params_line(setup),
        "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
        "steps": f"{len(stepped)} of {run_summary.total_steps}",
        "time": f"{seconds} s, of which the devices waited {waited} s for data",
        "loss": f"{_format_mean_loss(stepped[:10])} at first, {_format_mean_loss(stepped[-10:])} at last",
    }
    if recipe.quantize is not None and recipe.export.merged:
        told["merged"] = _MERGE_DESCRIPTIONS[recipe.export.merge_into]
    if run_summary.skipped_steps:
        told["steps"] += (
            f", {run_summary.skipped_steps} of them skipped: loss or gradient was not finite"
        )
    if run_summary.stop_reason == "early_stopping":
        told["steps"] += f"; no better evaluation in {recipe.training.early_stopping_patience}"
    told |= datasets.source_reports
    for name in run_summary.test_metrics[0] if run_summary.test_metrics else ():
        both = " before, ".join(f"{one[name]:.4f}" for one in run_summary.test_metrics)
        told[f"test {name}"] = f"{both} after"
    if run_summary.best_step in evaluated:
        means = {
            name: value
            for name, value in evaluated[run_summary.best_step].items()
            if name != "step"
        }
        values = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        told["validation"] = f"{values} at step {run_summary.best_step}, whose adapter was kept"
    return told


def _format_mean_loss(metrics: Sequence[dict[str, Any]]) -> str:
    values = [line["loss"] for line in metrics if math.isfinite(line["loss"])]
    return f"{np.mean(values):.4f}" if values else "none"


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; margin: 0 } .figures svg { max-width: 100%; height: auto }
"""


class PromptSample(NamedTuple):
    """What a decoder wrote after a prompt.

    Attributes:
        prompt: As the recipe has it.
        base_text: By the base.
        adapted_text: By the adapted model.
    """

    prompt: str
    base_text: str
    adapted_text: str


def relative_update_norms(
    params: Any, adapter: Mapping[str, Any], initial_adapter: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """The norm of every weight's change over that of the weight: one number per layer of a stack.

    Weights whose adapter is no change of the weight (a mixture) are left out.

    Args:
        params: That the run computed with.
        adapter: For the checkpoint's own weights.
        initial_adapter: What was taken out of those to make `params`.
    """
    flat = _tree.flatten_with_paths(params)
    arrays = dict(zip(flat.paths, flat.leaves, strict=True))
    found: dict[str, np.ndarray] = {}
    for path, leaf in adapter.items():
        if not isinstance(leaf, AdapterLeaf) or leaf.family == "lora_moe":
            continue
        own = {path: leaf} if leaf.share is None else {path: leaf, leaf.share: adapter[leaf.share]}
        weight = maybe_dequantize(arrays[path])
        if initial_adapter is not None and getattr(initial_adapter[path], "residual", False):
            weight = weight + delta(params, {path: initial_adapter[path]})[path]
        found[path] = np.asarray(
            _norm_ratios_per_layer(weight, delta(params, own)[path], leaf.axes.batch)
        )
    return found


@jax.jit
def _l2_norm(x: jax.Array) -> jax.Array:
    return jax.numpy.linalg.norm(x.astype(jax.numpy.float32))


def _norm_ratios_per_layer(weight: Any, update: Any, batch_axes: tuple[int, ...]) -> list[float]:
    """Of each layer of a stack, or of the weight."""
    if batch_axes[:1] != (0,):
        return [float(_l2_norm(update) / _l2_norm(weight))]
    return [float(_l2_norm(update[n]) / _l2_norm(weight[n])) for n in range(weight.shape[0])]


def write_report(
    path: Path,
    *,
    title: str,
    run_overview: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    update_norms: Mapping[str, np.ndarray],
    samples: Sequence[PromptSample],
) -> None:
    """Writes the report.

    Args:
        path: Of the file, which is replaced.
        title: Its heading.
        run_overview: What is told first, by name.
        metrics: Of metrics.jsonl.
        update_norms: What `relative_update_norms` returned.
        samples: What was written before and after.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _render_overview_table(run_overview)]
    figures = _plot_training_curves(metrics)
    if figures:
        parts += ["<h2>Training</h2>", '<div class="figures">', figures, "</div>"]
    if update_norms:
        parts += [
            "<h2>How far each weight moved</h2>",
            "<p>The norm of the change over the norm of the weight.</p>",
            '<div class="figures">',
            _plot_update_norms(update_norms),
            "</div>",
        ]
    if samples:
        parts += ["<h2>Before and after</h2>", _render_samples_table(samples)]
    body = "\n".join(parts)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _render_overview_table(run_overview: Mapping[str, str]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in run_overview.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _render_samples_table(samples: Sequence[PromptSample]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td><pre>{html.escape(text)}</pre></td>" for text in sample) + "</tr>"
        for sample in samples
    )
    return f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{rows}</table>"


def _plot_training_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss, learning rate, gradient norm and speed over the steps."""
    from matplotlib.figure import Figure

    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return ""
    at = [line["step"] for line in steps]
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    (loss, rate), (gradient, speed) = figure.subplots(2, 2)
    values = np.array([line["loss"] for line in steps])
    loss.plot(at, values, color="0.75", linewidth=0.8, label="step")
    window = max(1, len(values) // 50)
    if window > 1:
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        loss.plot(at[window - 1 :], smooth, color="C0", label=f"mean of {window}")
    held = [line for line in metrics if "validation_loss" in line]
    if held:
        loss.plot(
            [line["step"] for line in held],
            [line["validation_loss"] for line in held],
            "o-",
            color="C3",
            label="validation",
        )
    loss.legend()
    loss.set(title="loss (nats)")
    rate.plot(at, [line["learning_rate"] for line in steps], color="C0")
    rate.set(title="learning rate")
    gradient.plot(at, [line["gradient_norm"] for line in steps], color="C0", linewidth=0.8)
    gradient.set(title="gradient norm, before clipping", xlabel="step", yscale="log")
    # The first step of a process compiles.
    timed = [line for line in steps if line["seconds"] > 0]
    ratio = [line["weight"] / line["seconds"] for line in timed]
    speed.plot([line["step"] for line in timed], ratio, color="C0", linewidth=0.8)
    speed.set(title="learned tokens, pairs or texts per second", xlabel="step", ylim=(0, None))
    return _figure_to_svg(figure)


def _plot_update_norms(update_norms: Mapping[str, np.ndarray]) -> str:
    """A line per kind of weight over the layers, or a bar for each weight."""
    from matplotlib.figure import Figure

    by_kind: dict[str, list[float]] = {}
    for path, values in update_norms.items():
        kind = "/".join(part for part in path.split("/")[1:] if not _is_layer_name(part))
        by_kind.setdefault(kind, []).extend(values.tolist())
    figure = Figure(figsize=(9.5, 0.5 + 0.32 * max(len(by_kind), 6)), layout="constrained")
    axes = figure.subplots()
    for place, (kind, values) in enumerate(sorted(by_kind.items(), reverse=True)):
        axes.scatter(values, [place] * len(values), c=np.arange(len(values)), cmap="viridis", s=28)
        axes.text(1.01, place, kind, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set(yticks=[], xlabel="dark: the first layer; light: the last")
    axes.margins(y=0.5 / max(len(by_kind), 1))
    return _figure_to_svg(figure)


def _is_layer_name(segment: str) -> bool:
    """Whether it is of one layer: `layer_3`, or `layers` of a stack."""
    return segment == "layers" or segment.rpartition("_")[2].isdigit()


def _figure_to_svg(figure: Any) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    text = held.getvalue()
    return text[text.index("<svg") :]
