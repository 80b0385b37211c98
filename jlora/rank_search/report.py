"""quality.png: what the settings of a search scored, against what they cost."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

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
    "targets": "Which weights",
    "rates": "Learning rate and alpha",
    "confirmation": "Confirmation against the recipe as it was",
}


def write_search_report(
    recipe: Recipe,
    study: Study,
    stages: Sequence[SearchStage],
    rung_scores: RungScores,
    *,
    finished: bool,
) -> list[Path]:
    """Writes what the stages came to; nothing but the table where none is over.

    Returns:
        The files.
    """
    folder = study.folder
    written = [folder / TABLE_FILE]
    written[0].write_text(
        format_search_table(recipe, study, stages, rung_scores, finished), encoding="utf-8"
    )
    if stages:
        written += [folder / PLOT_FILE, folder / BEST_RECIPE_FILE]
        plot_search(written[1], recipe, study, stages, rung_scores)
        written[2].write_text(format_best_recipe(recipe, study, stages, finished), encoding="utf-8")
    return written


def format_search_table(
    recipe: Recipe,
    study: Study,
    stages: Sequence[SearchStage],
    rung_scores: RungScores,
    finished: bool,
) -> str:
    """The search as Markdown: what was chosen, every stage, how to read it, and every trial."""
    metric = recipe.training.metric
    parts = [
        f"# Rank search of {recipe.model.path}",
        format_search_summary(recipe, study, stages, finished),
    ]
    for stage in stages:
        parts += [f"## {_STAGE_TITLES[stage.name]}", stage.reason]
        if stage.name == "rates":
            options = study.metadata["options"]
            looks = rung_steps(options["steps"], options["num_rungs"])
            parts.append(_format_rates_table(rung_scores, stage, metric, looks))
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
    """What was chosen and how it stands to the recipe as it was."""
    metric = recipe.training.metric
    begun = sum(bool(trial.stop_reason) for trial in study.trials.values())
    lines = []
    if not finished:
        lines.append("The search is not finished: go on with `--resume`.")
    if stages:
        last = stages[-1]
        lines.append(f"Chosen: **{last.setting}**, {_format_score_summary(last.summary, metric)}.")
        if last.name == "confirmation":
            own = next(
                each for each in last.candidates if each.setting == setting_from_recipe(recipe)
            )
            lines.append(compare_to_recipe(last.candidates[last.chosen], own))
    lines.append(
        f"{begun} trials took {study.metadata['seconds']:.0f} s on {study.metadata['device']}."
    )
    return " ".join(lines)


def format_reading_notes(study: Study) -> str:
    """What the figures are, and what they are not."""
    options = study.metadata["options"]
    seeds = options["seeds"]
    return "\n".join(
        [
            f"- A mean is over {seeds} seeds, which differ in the draws of factors and dropout and "
            f"in the order of the examples. ± is its standard error: the deviation over the root "
            f"of the count. From {seeds} seeds it is itself uncertain by about "
            f"{stderr_of_stderr(seeds):.0%} of it.",
            "- Errors of differences are taken as if scores were independent. Seeds order the "
            "examples alike for every setting, so the real ones are smaller, as a rule.",
            "- All trials are measured on the same validation examples, at their last step. How "
            "much another set of examples would change the scores is not in the errors.",
            "- The choice was made on these scores, so that the score of what was chosen is "
            "optimistic. Measure it on test data, which the search did not look at.",
            f"- A trial has {options['steps']} steps and learning rates for as many. A longer run "
            f"may want a higher rank and another learning rate.",
            "- Settings of learning rate and alpha were compared with one seed, which is none of "
            "those that confirm the best of them. Those that ended early were measured in the "
            "middle of their schedule, where high learning rates look worse than at its end.",
            "- `more` and `frozen` of the recipe were in force in all trials.",
        ]
    )


def _format_stage_table(stage: SearchStage, metric: str, recipe_setting: TrialSetting) -> str:
    head = ("rank", "weights", "learning rate", "alpha", metric, "seeds", "trained", "ms / step")
    rows = []
    for number, each in enumerate(stage.candidates):
        s = each.setting
        mark = "chosen" if number == stage.chosen else ""
        mark = f"{mark}, recipe as it was".lstrip(", ") if s == recipe_setting else mark
        rows.append(
            (
                f"{s.rank}",
                s.targets,
                f"{s.learning_rate:g}",
                f"{s.alpha:g}",
                _format_score_summary(each.summary, metric),
                f"{each.summary.seeds}",
                "" if each.trainable_params is None else f"{each.trainable_params:,}",
                "" if each.step_ms is None else f"{each.step_ms:.0f}",
                mark,
            )
        )
    return _join_markdown_rows((*head, ""), rows)


def _format_rates_table(
    rung_scores: RungScores, stage: SearchStage, metric: str, steps: Sequence[int]
) -> str:
    """A row for each setting, the score after each rung that it came to."""
    head = ("learning rate", "alpha", *(f"{metric} after {look} steps" for look in steps), "")
    rows = []
    for setting, scores in rung_scores.items():
        told = [_format_score_summary(summarize_scores([score]), metric) for score in scores]
        mark = "chosen" if setting == stage.setting else ""
        cells = [*told, *[""] * (len(steps) - len(scores)), mark]
        rows.append((f"{setting.learning_rate:g}", f"{setting.alpha:g}", *cells))
    return _join_markdown_rows(head, rows)


def _format_trials_table(study: Study, metric: str) -> str:
    head = ("first asked for by", "rank", "weights", "learning rate", "alpha", "seed", "steps")
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
                {"paused": "ended early", "max_steps": "all steps"}.get(
                    trial.stop_reason, trial.stop_reason
                ),
            )
        )
    return _join_markdown_rows((*head, metric, "trained", "seconds", "ended"), rows)


def _format_score_summary(summary: ScoreSummary, metric: str) -> str:
    """A mean with its standard error, in the metric's own sign."""
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
    """The recipe with what was chosen, and how it was, as comments."""
    chosen = apply_setting(recipe, stages[-1].setting)
    raw = chosen.model_dump(mode="json", exclude_unset=True)
    raw["output"] = str(Path(recipe.output) / "best")
    told = [
        "Chosen by `jlora rank-search` from trials on the validation data.",
        format_search_summary(recipe, study, stages, finished).replace("**", ""),
        *(f"{_STAGE_TITLES[stage.name]}: {stage.setting}. {stage.reason}" for stage in stages),
        *(line.removeprefix("- ") for line in format_reading_notes(study).splitlines()[2:4]),
    ]
    comments = [f"# {line}" for text in told for line in textwrap.wrap(text, 96)]
    return "\n".join(comments) + "\n" + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


_STAGE_COLORS = {"rank": "C0", "targets": "C1", "confirmation": "C2"}

_STAGE_MARKERS = {"rank": "o", "targets": "s", "confirmation": "D"}

_STAGE_LABELS = {"rank": "ranks", "targets": "which weights", "confirmation": "finalists"}


def plot_search(
    path: Path, recipe: Recipe, study: Study, stages: Sequence[SearchStage], rung_scores: RungScores
) -> None:
    """Draws quality against trained numbers and against the time of training."""
    from matplotlib.figure import Figure

    metric, of = recipe.training.metric, study.metadata["options"]["steps"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    sizes, times = figure.subplots(1, 2, sharey=True)
    _plot_learning_curves(times, study, rung_scores)
    shown: set[TrialSetting] = set()
    for stage in stages:
        if stage.name == "rates":
            continue
        new = [
            each for each in stage.candidates if each.setting not in shown and _is_plottable(each)
        ]
        shown |= {each.setting for each in new}
        _plot_stage_points(
            sizes,
            list(map(_candidate_trainable_params, new)),
            new,
            stage.name,
            metric,
            connect=True,
        )
        _plot_stage_points(
            times, [_candidate_train_seconds(each, of) for each in new], new, stage.name, metric
        )
    last = stages[-1].candidates[stages[-1].chosen]
    own = next(
        (e for s in stages for e in s.candidates if e.setting == setting_from_recipe(recipe)), None
    )
    for axes, place in (
        (sizes, _candidate_trainable_params),
        (times, lambda each: _candidate_train_seconds(each, of)),
    ):
        if own is not None:
            _plot_candidate_highlight(
                axes, place(own), own, metric, "o", "recipe as it was", "black", 190
            )
        _plot_candidate_highlight(axes, place(last), last, metric, "*", "chosen", "C3", 420)
        axes.grid(alpha=0.25)
        axes.margins(x=0.12, y=0.1)
    _set_search_plot_labels(figure, sizes, times, metric, study.metadata["options"]["seeds"])
    ticks = sorted(
        {each.trainable_params for each in stages[0].candidates if each.trainable_params}
    )
    sizes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=9)
    sizes.minorticks_off()
    figure.savefig(path, dpi=130)


def _set_search_plot_labels(
    figure: Any, size_axes: Any, time_axes: Any, metric: str, seeds: int
) -> None:
    size_axes.set(xscale="log", xlabel="trained numbers", ylabel=f"validation {metric}")
    size_axes.set_title(f"mean of {seeds} seeds ± one standard error", fontsize=10)
    time_axes.set(xlabel="seconds of training, compiling and evaluating left out")
    time_axes.set_title(
        "gray: learning rates and alphas, one seed each; x ended early", fontsize=10
    )
    entries = dict(zip(*reversed(size_axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )


def _is_plottable(candidate: Candidate) -> bool:
    """Whether there is a place for it."""
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
    """A stage's settings with their errors; ranks may be joined by a line."""
    if not candidates:
        return
    sign = 1 if metric == "accuracy" else -1
    means = [sign * each.summary.mean for each in candidates]
    line = "-" if connect and stage_name == "rank" else ""
    axes.errorbar(
        x_values,
        means,
        yerr=[each.summary.stderr for each in candidates],
        fmt=_STAGE_MARKERS[stage_name] + line,
        color=_STAGE_COLORS[stage_name],
        linewidth=1.2,
        markersize=5,
        capsize=3,
        label=_STAGE_LABELS[stage_name],
    )
    for place, mean, each in zip(x_values, means, candidates, strict=True):
        s = each.setting
        text = {"rank": f"r = {s.rank}", "targets": s.targets}.get(stage_name, "")
        axes.annotate(text, (place, mean), (7, 6), textcoords="offset points", fontsize=9)


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
    """A larger mark around a point."""
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
    """What each setting of learning rate and alpha scored as it went on, until it ended."""
    for trial in study.trials.values():
        if trial.setting not in rung_scores or trial.step_ms is None or not trial.values:
            continue
        if trial.stage != "rates":
            continue
        steps = sorted(trial.values)
        places = [trial.step_ms * step / 1e3 for step in steps]
        values = [trial.values[step] for step in steps]
        axes.plot(places, values, "-", color="0.75", linewidth=0.9, zorder=1)
        ended = "x" if trial.stop_reason != "max_steps" else "."
        axes.plot(places[-1:], values[-1:], ended, color="0.55", markersize=5, zorder=1)
