"""Results of a run: result.json, the summary on the console, and the self-contained report.html."""

from __future__ import annotations

import datetime
import io
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2
import markupsafe
import numpy as np

import jlora
from jlora import _tree
from jlora._quantized_array import maybe_dequantize
from jlora.adapters.base import AdapterLeaf
from jlora.checkpoints.safetensors_io import replace_file_atomically
from jlora.convert import delta
from jlora.quantization.quantize import quantization_summary
from jlora.training.datasets import Datasets
from jlora.training.metrics import eval_values, is_eval_line, is_train_line
from jlora.training.progress import (
    count_params,
    describe_attention,
    describe_quantized_base,
    trainable_params_line,
)
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup

_TEMPLATE_FILE = Path(__file__).with_name("report.html.jinja")

_MERGE_DESCRIPTIONS = {
    "dequantized": "into the dequantized weights: the model that was trained and evaluated",
    "original": "into the original weights, which are not the quantized ones that the adapter was "
    "trained on: the merged model was not evaluated",
}


class RunSummary(NamedTuple):
    """Outcome of a run.

    Attributes:
        stop_reason: "max_steps", "early_stopping" when evaluations no longer improved, or the
            `stop_reason` of the callback that requested the end.
        best_step: Step of the written adapter.
        total_steps: Steps of the recipe.
        data_wait_s: Seconds in which the devices waited for data since the last resume.
        test_metrics: Means on the test data before and after training; empty without test data.
        metrics: Lines of metrics.jsonl.
    """

    stop_reason: str
    best_step: int
    total_steps: int
    data_wait_s: float
    test_metrics: Sequence[dict[str, float]]
    metrics: Sequence[dict[str, Any]]

    @property
    def step_metrics(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [line for line in self.metrics if is_train_line(line)]

    @property
    def best_eval_metrics(self) -> dict[str, float]:
        """The means of the evaluation at `best_step`; empty without one."""
        return {
            name: value
            for line in self.metrics
            if line["step"] == self.best_step
            for name, value in eval_values(line).items()
        }

    @property
    def skipped_steps(self) -> int:
        """The number of steps that changed nothing."""
        return sum(not _is_finite_step_line(line) for line in self.step_metrics)

    @property
    def step_seconds(self) -> float:
        """The seconds of all steps."""
        return sum(line["seconds"] for line in self.step_metrics)


class PromptSample(NamedTuple):
    """Texts that a decoder generated for a prompt.

    Attributes:
        prompt: Prompt of the recipe.
        base_text: Text of the base.
        adapted_text: Text of the adapted model.
    """

    prompt: str
    base_text: str
    adapted_text: str


# --- result.json and tables -----------------------------------------------------------------------


def make_result_json(recipe: Recipe, setup: Setup, run_summary: RunSummary) -> dict[str, Any]:
    """Returns the contents of result.json, for programs.

    "validation" has the means of the evaluation at the best step, "test" those before and after
    training; each is None without such data.
    """
    trainable, base = count_params(setup)
    quantized = quantization_summary(setup.frozen["base"])
    return {
        "stop_reason": run_summary.stop_reason,
        "steps": len(run_summary.step_metrics),
        "skipped_steps": run_summary.skipped_steps,
        "best_step": run_summary.best_step,
        "validation": run_summary.best_eval_metrics or None,
        "test": dict(zip(("before", "after"), run_summary.test_metrics, strict=False)) or None,
        "trainable_params": trainable,
        "base": base,
        "quantized": None if quantized is None else quantized._asdict(),
        "attention": describe_attention(recipe, setup),
        "seconds": round(run_summary.step_seconds, 1),
        "data_wait_s": round(run_summary.data_wait_s, 3),
        "device": setup.mesh.devices.flat[0].device_kind,
        "devices": setup.mesh.size,
    }


def make_run_overview(
    recipe: Recipe, setup: Setup, datasets: Datasets, run_summary: RunSummary
) -> dict[str, str]:
    """Returns the summary of a run, as text by name."""
    steps = run_summary.step_metrics
    seconds, waited = round(run_summary.step_seconds), round(run_summary.data_wait_s)
    overview = {
        "base": recipe.model.path,
        **describe_quantized_base(setup),
        "parameters": trainable_params_line(setup),
        "attention": describe_attention(recipe, setup),
        "steps": f"{len(steps)} of {run_summary.total_steps}",
        "time": f"{seconds} s, including {waited} s of waiting for data",
        "loss": f"{_format_mean_loss(steps[:10])} (first 10 steps), "
        f"{_format_mean_loss(steps[-10:])} (last 10 steps)",
    }
    if recipe.quantize is not None and recipe.export.merged:
        overview["merged"] = _MERGE_DESCRIPTIONS[recipe.export.merge_into]
    if run_summary.skipped_steps:
        overview["steps"] += (
            f", {run_summary.skipped_steps} of them skipped because they were not finite"
        )
    if run_summary.stop_reason == "early_stopping":
        patience = recipe.training.early_stopping_patience
        overview["steps"] += f"; stopped early after {patience} evaluations without improvement"
    overview |= datasets.source_reports
    for name in run_summary.test_metrics[0] if run_summary.test_metrics else ():
        values = " before, ".join(f"{means[name]:.4f}" for means in run_summary.test_metrics)
        overview[f"test {name}"] = f"{values} after"
    if run_summary.best_eval_metrics:
        pairs = run_summary.best_eval_metrics.items()
        values = ", ".join(f"{name} {value:.4f}" for name, value in pairs)
        overview["validation"] = f"{values} at step {run_summary.best_step}, the written adapter"
    return overview


def make_settings_table(
    recipe: Recipe, setup: Setup, versions: Mapping[str, str]
) -> dict[str, str]:
    """Returns the settings that reproduce a run, as text by name.

    Args:
        recipe: Recipe of the run.
        setup: Arrays of the run.
        versions: Versions of packages by name.
    """
    rules = [*recipe.adapters, recipe.adapter]
    optimizer, batch, model = recipe.optimizer, recipe.batch, recipe.model
    base = max(_tree.flatten_with_paths(setup.frozen["base"]).leaves, key=lambda leaf: leaf.size)
    settings = {"adapter": ", ".join(rule.family for rule in rules)}
    for name in ("rank", "alpha"):
        values = [getattr(rule, name, None) for rule in rules]
        if any(value is not None for value in values):
            settings[name] = ", ".join("-" if value is None else f"{value:g}" for value in values)
    settings |= {
        "learning rate": f"{optimizer.learning_rate:g}, schedule {optimizer.schedule}, "
        f"warmup ratio {optimizer.warmup_ratio:g}",
        "batch size": f"{batch.size}",
        "sequence length": f"{recipe.data.max_seq_length}",
        "dtype": f"{base.dtype}",
        "seed": f"{recipe.seed}",
        "device": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "command line": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if optimizer.lr_multipliers:
        multipliers = (f"{label} {value:g}" for label, value in optimizer.lr_multipliers.items())
        settings["learning rate"] += f", multipliers {', '.join(multipliers)}"
    if batch.gradient_accumulation_steps > 1:
        settings["batch size"] += f" x {batch.gradient_accumulation_steps} accumulation steps"
    if model.compute_dtype not in (None, settings["dtype"]):
        settings["dtype"] += f", computation in {model.compute_dtype}"
    return settings


def collect_versions(versions: Mapping[str, str]) -> dict[str, str]:
    """Returns the versions of jlora and Python, followed by the given ones."""
    return {"jlora": jlora.__version__, "Python": platform.python_version(), **versions}


def _is_finite_step_line(line: Mapping[str, Any]) -> bool:
    values = (line["train/loss"], line["train/gradient_norm"])
    return "train/skipped" not in line and all(map(math.isfinite, values))


def _format_mean_loss(metrics: Sequence[Mapping[str, Any]]) -> str:
    values = [line["train/loss"] for line in metrics if math.isfinite(line["train/loss"])]
    return f"{np.mean(values):.4f}" if values else "none"


# --- update norms ---------------------------------------------------------------------------------


def relative_update_norms(
    params: Any, adapter: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the relative update norm of each weight, ‖ΔW‖ / ‖W‖, one value per stacked layer.

    Weights with a mixture of experts are left out, because their update depends on the input.

    Args:
        params: Base weights of the run.
        adapter: Adapter for the weights of the checkpoint.
        reference: Adapter that was subtracted from those to give `params`; empty: none was.
    """
    flat = _tree.flatten_with_paths(params)
    arrays = dict(zip(flat.paths, flat.leaves, strict=True))
    norms: dict[str, np.ndarray] = {}
    for path, leaf in adapter.items():
        if not isinstance(leaf, AdapterLeaf) or leaf.family == "lora_moe":
            continue
        part = {path: leaf} if leaf.share is None else {path: leaf, leaf.share: adapter[leaf.share]}
        weight = maybe_dequantize(arrays[path])
        if path in reference:
            weight = weight + delta(params, {path: reference[path]})[path]
        norms[path] = np.asarray(
            _norm_ratios_per_layer(weight, delta(params, part)[path], leaf.axes.batch)
        )
    return norms


@jax.jit
def _l2_norm(x: jax.Array) -> jax.Array:
    return jax.numpy.linalg.norm(x.astype(jax.numpy.float32))


def _norm_ratios_per_layer(weight: Any, update: Any, batch_axes: tuple[int, ...]) -> list[float]:
    """Returns a ratio for each layer of a stack, or one for a weight without a stack."""
    if batch_axes[:1] != (0,):
        return [float(_l2_norm(update) / _l2_norm(weight))]
    return [float(_l2_norm(update[n]) / _l2_norm(weight[n])) for n in range(weight.shape[0])]


# --- report.html ----------------------------------------------------------------------------------


def write_report(
    path: Path,
    *,
    title: str,
    run_overview: Mapping[str, str],
    settings: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    best_step: int | None = None,
    update_norms: Mapping[str, np.ndarray],
    samples: Sequence[PromptSample],
) -> None:
    """Writes report.html, one file without references to others.

    Args:
        path: File to write; an existing one is replaced.
        title: Heading of the page.
        run_overview: Summary of the run, as text by name.
        settings: Settings of the run, as text by name.
        metrics: Lines of metrics.jsonl.
        best_step: Step to mark in the curves of evaluations; None: no mark.
        update_norms: Result of `relative_update_norms`; empty: no figure.
        samples: Texts before and after training; empty: no table.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE_FILE.read_text(encoding="utf-8"))
    training = _plot_training_curves(metrics, best_step)
    page = template.render(
        title=title,
        run_overview=run_overview,
        settings=settings,
        training_svg=None if training is None else _figure_to_svg(training),
        update_norms_svg=_figure_to_svg(_plot_update_norms(update_norms)) if update_norms else None,
        samples=samples,
    )
    replace_file_atomically(path, page.encode())


def _plot_training_curves(
    metrics: Sequence[Mapping[str, Any]], best_step: int | None = None
) -> Any | None:
    """Returns a figure of all curves over the steps; None without training steps.

    Beside the training loss are the evaluation metrics, one panel each.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in metrics if is_train_line(line)]
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    evaluations = [(line["step"], eval_values(line)) for line in metrics if is_eval_line(line)]
    eval_names = list(evaluations[0][1]) if evaluations else []
    num_rows = (5 + len(eval_names)) // 2
    figure = Figure(figsize=(9.5, 2.7 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, 2).flat)
    for unused in panels[4 + len(eval_names) :]:
        unused.remove()

    loss = panels.pop(0)
    values = np.array([line["train/loss"] for line in lines])
    loss.plot(steps, values, color="0.75", linewidth=0.8, label="step")
    window = max(1, len(values) // 50)
    if window > 1:
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        loss.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
        loss.legend(fontsize=8)
    loss.set(ylabel="training loss (nats)")
    for name in eval_names:
        panel = panels.pop(0)
        points = [(step, means[name]) for step, means in evaluations if name in means]
        panel.plot(*zip(*points, strict=True), "o-", color="C3", markersize=4)
        best = [point for point in points if point[0] == best_step]
        if best:
            panel.plot(*best[0], "o", color="C3", markersize=10, fillstyle="none", label="best")
            panel.legend(fontsize=8)
        panel.set(ylabel=f"evaluation {name}" + (" (nats)" if name == "loss" else ""))

    rate, gradient, speed = panels[:3]
    rate.plot(steps, [line["train/learning_rate"] for line in lines], color="C0")
    rate.set(ylabel="learning rate")
    norms = [line["train/gradient_norm"] for line in lines]
    gradient.plot(steps, norms, color="C0", linewidth=0.8)
    gradient.set(ylabel="gradient norm\nbefore clipping", yscale="log")
    # The first step of a process includes the compilation.
    timed = [line for line in lines if line["seconds"] > 0]
    per_second = [line["num_targets"] / line["seconds"] for line in timed]
    speed.plot([line["step"] for line in timed], per_second, color="C0", linewidth=0.8)
    speed.set(ylabel="targets per second", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for panel in figure.axes:
        panel.set(xlabel="step", xlim=(0, 1.02 * steps[-1]))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _plot_update_norms(update_norms: Mapping[str, np.ndarray]) -> Any:
    """Returns a figure with a row of points for each kind of weight, one point per layer."""
    from matplotlib.figure import Figure

    by_kind: dict[str, list[float]] = {}
    for path, values in update_norms.items():
        kind = "/".join(part for part in path.split("/")[1:] if not _is_layer_name(part))
        by_kind.setdefault(kind, []).extend(values.tolist())
    kinds = sorted(by_kind, reverse=True)
    figure = Figure(figsize=(9.5, 0.7 + 0.32 * max(len(kinds), 4)), layout="constrained")
    axes = figure.subplots()
    for row, kind in enumerate(kinds):
        values = by_kind[kind]
        axes.scatter(values, [row] * len(values), c=np.arange(len(values)), cmap="viridis", s=28)
    axes.set_yticks(range(len(kinds)), labels=kinds, fontsize=9)
    axes.set(xlabel="relative update norm (dark: first layer, light: last layer)")
    axes.set_xlim(left=0)
    axes.margins(y=0.5 / max(len(kinds), 1))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return figure


def _is_layer_name(segment: str) -> bool:
    """Whether a segment of a path names a layer, as `layer_3`, or a stack, as `layers`."""
    return segment == "layers" or segment.rpartition("_")[2].isdigit()


def _figure_to_svg(figure: Any) -> markupsafe.Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :])
