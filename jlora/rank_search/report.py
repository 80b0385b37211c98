"""Report of a search: table.md, quality.png with scores against costs, and best.yaml."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from jlora.checkpoints.safetensors_io import replace_file_atomically
from jlora.rank_search.selection import (
    DIVERGED,
    ScoreSummary,
    rung_steps,
    stderr_of_stderr,
    summarize_scores,
)
from jlora.rank_search.stages import Candidate, RungScores, SearchStage, compare_to_recipe
from jlora.rank_search.study import Study, TrialSetting
from jlora.rank_search.trials import apply_setting, setting_from_recipe
from jlora.training.recipe.sections import Recipe

TABLE_FILE, PLOT_FILE, BEST_RECIPE_FILE = "table.md", "quality.png", "best.yaml"

_STAGE_TITLES = {
    "rank": "Rank",
    "targets": "Target modules",
    "rates": "Learning rate and alpha",
    "confirmation": "Confirmation against the original recipe",
}

_STAGE_COLORS = {"rank": "C0", "targets": "C1", "confirmation": "C2"}

_STAGE_MARKERS = {"rank": "o", "targets": "s", "confirmation": "D"}

_STAGE_LABELS = {"rank": "ranks", "targets": "target modules", "confirmation": "finalists"}


def write_search_report(
    recipe: Recipe,
    study: Study,
    stages: Sequence[SearchStage],
    rung_scores: RungScores,
    *,
    finished: bool,
) -> list[Path]:
    """Writes the table and, once a stage has ended, the plot and the best recipe.

    Args:
        recipe: Original recipe.
        study: Study with all trials.
        stages: Stages that have ended.
        rung_scores: Scores of learning rates and alphas at their rungs.
        finished: Whether all stages have ended.

    Returns:
        Paths of the files.
    """
    table, plot, best = (study.folder / name for name in (TABLE_FILE, PLOT_FILE, BEST_RECIPE_FILE))
    text = format_search_table(recipe, study, stages, rung_scores, finished)
    replace_file_atomically(table, text.encode())
    if not stages:
        return [table]
    plot_search(plot, recipe, study, stages, rung_scores)
    text = format_best_recipe(recipe, study, stages, finished)
    replace_file_atomically(best, text.encode())
    return [table, plot, best]


def format_search_table(
    recipe: Recipe,
    study: Study,
    stages: Sequence[SearchStage],
    rung_scores: RungScores,
    finished: bool,
) -> str:
    """Returns Markdown with the choice, every stage, notes on reading it, and every trial."""
    metric = recipe.training.metric
    parts = [
        f"# Rank search of {recipe.model.path}",
        format_search_summary(recipe, study, stages, finished),
    ]
    for stage in stages:
        parts += [f"## {_STAGE_TITLES[stage.name]}", stage.reason]
        if stage.name == "rates":
            options = study.metadata["options"]
            rungs = rung_steps(options["steps"], options["num_rungs"])
            parts.append(_format_rates_table(rung_scores, stage, metric, rungs))
        else:
            parts.append(_format_stage_table(stage, metric, setting_from_recipe(recipe)))
    parts += [
        "## How to read this",
        format_reading_notes(study),
        "## All trials",
        _format_trials_table(study, metric),
    ]
    return "\n\n".join(parts) + "\n"


def format_search_summary(
    recipe: Recipe, study: Study, stages: Sequence[SearchStage], finished: bool
) -> str:
    """Returns sentences with the choice, its gain over the original recipe, and the cost."""
    metric = recipe.training.metric
    num_trials = sum(bool(trial.stop_reason) for trial in study.trials.values())
    lines = []
    if not finished:
        lines.append("The search is not finished: continue it with `--resume`.")
    if stages:
        last = stages[-1]
        score = _format_score_summary(last.summary, metric)
        lines.append(f"Selected: **{last.setting}**, {score}.")
        if last.name == "confirmation":
            recipe_setting = setting_from_recipe(recipe)
            baseline = next(each for each in last.candidates if each.setting == recipe_setting)
            lines.append(compare_to_recipe(last.candidates[last.chosen], baseline))
    lines.append(
        f"{num_trials} trials took {study.metadata['seconds']:.0f} s on {study.metadata['device']}."
    )
    return " ".join(lines)


def format_reading_notes(study: Study) -> str:
    """Returns a Markdown list of the meaning and the limits of the figures."""
    options = study.metadata["options"]
    seeds = options["seeds"]
    return "\n".join(
        [
            f"- A mean is over {seeds} seeds, which differ in the initialization of the adapter, "
            f"in dropout and in the order of the examples. ± is its standard error: the standard "
            f"deviation over the square root of the number of seeds. With {seeds} seeds it is "
            f"itself uncertain by about {stderr_of_stderr(seeds):.0%}.",
            "- Standard errors of differences assume independent scores. Seeds order the examples "
            "alike for every setting, so the actual errors are usually smaller.",
            "- All trials are measured on the same validation examples, at their last step. The "
            "errors do not include the variation between sets of examples.",
            "- The choice was based on these scores, so the score of the selected setting is "
            "optimistic. Measure it on test data, which the search did not use.",
            f"- A trial has {options['steps']} steps and a learning rate schedule of that length. "
            f"A longer run may need a higher rank and another learning rate.",
            "- Settings of learning rate and alpha were compared with one seed, which is not among "
            "those that confirm the best of them. Settings that were stopped early were measured "
            "in the middle of their schedule, where high learning rates look worse than at its "
            "end.",
            "- `adapters` and `frozen_modules` of the recipe applied to all trials.",
        ]
    )


def _format_stage_table(stage: SearchStage, metric: str, recipe_setting: TrialSetting) -> str:
    header = ("rank", "target modules", "learning rate", "alpha", metric, "seeds")
    header = (*header, "trainable params", "ms / step", "")
    rows = []
    for index, candidate in enumerate(stage.candidates):
        s, params, step_ms = candidate.setting, candidate.trainable_params, candidate.step_ms
        notes = ["selected"] if index == stage.chosen else []
        notes += ["original recipe"] if s == recipe_setting else []
        rows.append(
            (
                f"{s.rank}",
                s.targets,
                f"{s.learning_rate:g}",
                f"{s.alpha:g}",
                _format_score_summary(candidate.summary, metric),
                f"{candidate.summary.seeds}",
                "" if params is None else f"{params:,}",
                "" if step_ms is None else f"{step_ms:.0f}",
                ", ".join(notes),
            )
        )
    return _join_markdown_rows(header, rows)


def _format_rates_table(
    rung_scores: RungScores, stage: SearchStage, metric: str, steps: Sequence[int]
) -> str:
    """Returns a table with one row for each setting: its scores at the rungs that it reached."""
    header = ("learning rate", "alpha", *(f"{metric} after {step} steps" for step in steps), "")
    rows = []
    for setting, scores in rung_scores.items():
        cells = [_format_score_summary(summarize_scores([score]), metric) for score in scores]
        cells += [""] * (len(steps) - len(scores))
        cells.append("selected" if setting == stage.setting else "")
        rows.append((f"{setting.learning_rate:g}", f"{setting.alpha:g}", *cells))
    return _join_markdown_rows(header, rows)


def _format_trials_table(study: Study, metric: str) -> str:
    header = (
        "first stage",
        "rank",
        "target modules",
        "learning rate",
        "alpha",
        "seed",
        "steps",
        metric,
    )
    header = (*header, "trainable params", "seconds", "result")
    results = {"paused": "stopped early", "max_steps": "all steps"}
    rows = []
    for trial in study.trials.values():
        s = trial.setting
        score = trial.values.get(trial.last_step)
        rows.append(
            (
                trial.stage,
                f"{s.rank}",
                s.targets,
                f"{s.learning_rate:g}",
                f"{s.alpha:g}",
                f"{trial.seed}",
                f"{trial.last_step} of {trial.total_steps}",
                "" if score is None else f"{score:.4f}",
                "" if trial.trainable_params is None else f"{trial.trainable_params:,}",
                f"{trial.seconds:.0f}",
                results.get(trial.stop_reason, trial.stop_reason),
            )
        )
    return _join_markdown_rows(header, rows)


def _format_score_summary(summary: ScoreSummary, metric: str) -> str:
    """Returns a mean with its standard error, in the sign of the metric."""
    if summary.mean == DIVERGED:
        return "diverged"
    mean = summary.mean if metric == "accuracy" else -summary.mean
    return f"{mean:.4f}" + ("" if summary.seeds == 1 else f" ± {summary.stderr:.4f}")


def _join_markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_best_recipe(
    recipe: Recipe, study: Study, stages: Sequence[SearchStage], finished: bool
) -> str:
    """Returns the YAML of the recipe with the selected setting, and the reasons as comments."""
    chosen = apply_setting(recipe, stages[-1].setting)
    raw = chosen.model_dump(mode="json", exclude_unset=True)
    raw["output"] = str(Path(recipe.output) / "best")
    paragraphs = [
        "Selected by `jlora rank-search` from trials on the validation data.",
        format_search_summary(recipe, study, stages, finished).replace("**", ""),
        *(f"{_STAGE_TITLES[stage.name]}: {stage.setting}. {stage.reason}" for stage in stages),
        *(line.removeprefix("- ") for line in format_reading_notes(study).splitlines()[2:4]),
    ]
    comments = [f"# {line}" for text in paragraphs for line in textwrap.wrap(text, 96)]
    return "\n".join(comments) + "\n" + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def plot_search(
    path: Path, recipe: Recipe, study: Study, stages: Sequence[SearchStage], rung_scores: RungScores
) -> None:
    """Plots scores against trainable parameters and against training time.

    Args:
        path: PNG file to write.
        recipe: Original recipe.
        study: Study with all trials.
        stages: Stages that have ended; one or more.
        rung_scores: Scores of learning rates and alphas at their rungs.
    """
    from matplotlib.figure import Figure

    metric, steps = recipe.training.metric, study.metadata["options"]["steps"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    size_axes, time_axes = figure.subplots(1, 2, sharey=True)
    _plot_learning_curves(time_axes, study, rung_scores)
    plotted: set[TrialSetting] = set()
    for stage in stages:
        if stage.name == "rates":
            continue
        new = [c for c in stage.candidates if c.setting not in plotted and _is_plottable(c)]
        plotted |= {candidate.setting for candidate in new}
        sizes = [_candidate_trainable_params(candidate) for candidate in new]
        times = [_candidate_train_seconds(candidate, steps) for candidate in new]
        _plot_stage_points(size_axes, sizes, new, stage.name, metric, connect=True)
        _plot_stage_points(time_axes, times, new, stage.name, metric)
    selected = stages[-1].candidates[stages[-1].chosen]
    recipe_setting = setting_from_recipe(recipe)
    all_candidates = (candidate for stage in stages for candidate in stage.candidates)
    baseline = next((c for c in all_candidates if c.setting == recipe_setting), None)
    for axes, get_x in (
        (size_axes, _candidate_trainable_params),
        (time_axes, lambda candidate: _candidate_train_seconds(candidate, steps)),
    ):
        if baseline is not None:
            _plot_candidate_highlight(
                axes, get_x(baseline), baseline, metric, "o", "original recipe", "black", 190
            )
        _plot_candidate_highlight(
            axes, get_x(selected), selected, metric, "*", "selected", "C3", 420
        )
        axes.grid(alpha=0.25)
        axes.margins(x=0.12, y=0.1)
    _set_search_plot_labels(
        figure, size_axes, time_axes, metric, study.metadata["options"]["seeds"]
    )
    ticks = sorted({c.trainable_params for c in stages[0].candidates if c.trainable_params})
    size_axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=9)
    size_axes.minorticks_off()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    replace_file_atomically(path, image.getvalue())


def _set_search_plot_labels(
    figure: Any, size_axes: Any, time_axes: Any, metric: str, seeds: int
) -> None:
    size_axes.set(xscale="log", xlabel="trainable parameters", ylabel=f"validation {metric}")
    size_axes.set_title(f"mean of {seeds} seeds ± one standard error", fontsize=10)
    time_axes.set(xlabel="seconds of training, without compilation and evaluation")
    time_axes.set_title(
        "gray: learning rates and alphas, one seed each; x: stopped early", fontsize=10
    )
    entries = dict(zip(*reversed(size_axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )


def _is_plottable(candidate: Candidate) -> bool:
    """Whether the candidate has a score and both costs."""
    return (
        candidate.summary.mean != DIVERGED
        and candidate.trainable_params is not None
        and candidate.step_ms is not None
    )


def _candidate_trainable_params(candidate: Candidate) -> float:
    return float(candidate.trainable_params or 0)


def _candidate_train_seconds(candidate: Candidate, steps: int) -> float:
    return (candidate.step_ms or 0.0) * steps / 1e3


def _plot_stage_points(
    axes: Any,
    x_values: Sequence[float],
    candidates: Sequence[Candidate],
    stage_name: str,
    metric: str,
    *,
    connect: bool = False,
) -> None:
    """Plots the candidates of a stage with error bars; ranks may be connected by a line."""
    if not candidates:
        return
    sign = 1 if metric == "accuracy" else -1
    means = [sign * candidate.summary.mean for candidate in candidates]
    line = "-" if connect and stage_name == "rank" else ""
    axes.errorbar(
        x_values,
        means,
        yerr=[candidate.summary.stderr for candidate in candidates],
        fmt=_STAGE_MARKERS[stage_name] + line,
        color=_STAGE_COLORS[stage_name],
        linewidth=1.2,
        markersize=5,
        capsize=3,
        label=_STAGE_LABELS[stage_name],
    )
    for x, mean, candidate in zip(x_values, means, candidates, strict=True):
        s = candidate.setting
        text = {"rank": f"r = {s.rank}", "targets": s.targets}.get(stage_name, "")
        axes.annotate(text, (x, mean), (7, 6), textcoords="offset points", fontsize=9)


def _plot_candidate_highlight(
    axes: Any,
    x: float,
    candidate: Candidate,
    metric: str,
    marker: str,
    label: str,
    color: str,
    size: int,
) -> None:
    """Draws a larger marker around the point of a candidate."""
    if not _is_plottable(candidate):
        return
    mean = candidate.summary.mean if metric == "accuracy" else -candidate.summary.mean
    axes.scatter(
        [x],
        [mean],
        s=size,
        marker=marker,
        facecolors="none",
        edgecolors=color,
        linewidths=1.5,
        zorder=5,
        label=label,
    )


def _plot_learning_curves(axes: Any, study: Study, rung_scores: RungScores) -> None:
    """Plots the score of each setting of learning rate and alpha over its training time."""
    for trial in study.trials.values():
        if trial.setting not in rung_scores or trial.step_ms is None or not trial.values:
            continue
        if trial.stage != "rates":
            continue
        steps = sorted(trial.values)
        times = [trial.step_ms * step / 1e3 for step in steps]
        values = [trial.values[step] for step in steps]
        axes.plot(times, values, "-", color="0.75", linewidth=0.9, zorder=1)
        marker = "." if trial.stop_reason == "max_steps" else "x"
        axes.plot(times[-1:], values[-1:], marker, color="0.55", markersize=5, zorder=1)
