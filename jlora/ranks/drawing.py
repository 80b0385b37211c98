"""quality.png: what the settings of a search scored, against what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.ranks.judging import DIVERGED
from jlora.ranks.ledger import Ledger, Setting
from jlora.ranks.stages import Candidate, Played, Stage
from jlora.ranks.trials import setting_of
from jlora.training.recipe.sections import Recipe

_COLORS = {"rank": "C0", "targets": "C1", "confirmation": "C2"}
_MARKERS = {"rank": "o", "targets": "s", "confirmation": "D"}
_LABELS = {"rank": "ranks", "targets": "which weights", "confirmation": "finalists"}


def draw(
    path: Path, recipe: Recipe, ledger: Ledger, stages: Sequence[Stage], played: Played
) -> None:
    """Draws quality against trained numbers and against the time of training."""
    from matplotlib.figure import Figure

    metric, of = recipe.training.metric, ledger.facts["options"]["steps"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    sizes, times = figure.subplots(1, 2, sharey=True)
    _paths(times, ledger, played)
    shown: set[Setting] = set()
    for stage in stages:
        if stage.name == "rates":
            continue
        new = [each for each in stage.candidates if each.setting not in shown and _drawn(each)]
        shown |= {each.setting for each in new}
        _points(sizes, list(map(_trained, new)), new, stage.name, metric, joined=True)
        _points(times, [_seconds(each, of) for each in new], new, stage.name, metric)
    last = stages[-1].candidates[stages[-1].chosen]
    own = next((e for s in stages for e in s.candidates if e.setting == setting_of(recipe)), None)
    for axes, place in ((sizes, _trained), (times, lambda each: _seconds(each, of))):
        if own is not None:
            _mark(axes, place(own), own, metric, "o", "recipe as it was", "black", 190)
        _mark(axes, place(last), last, metric, "*", "chosen", "C3", 420)
        axes.grid(alpha=0.25)
        axes.margins(x=0.12, y=0.1)
    _label(figure, sizes, times, metric, ledger.facts["options"]["seeds"])
    ticks = sorted({each.trained for each in stages[0].candidates if each.trained})
    sizes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=9)
    sizes.minorticks_off()
    figure.savefig(path, dpi=130)


def _label(figure: Any, sizes: Any, times: Any, metric: str, seeds: int) -> None:
    sizes.set(xscale="log", xlabel="trained numbers", ylabel=f"validation {metric}")
    sizes.set_title(f"mean of {seeds} seeds ± one standard error", fontsize=10)
    times.set(xlabel="seconds of training, compiling and evaluating left out")
    times.set_title("gray: learning rates and alphas, one seed each; x ended early", fontsize=10)
    entries = dict(zip(*reversed(sizes.get_legend_handles_labels()), strict=True))
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )


def _drawn(each: Candidate) -> bool:
    """Whether there is a place for it."""
    return each.summary.mean != DIVERGED and each.trained is not None and each.step_ms is not None


def _trained(each: Candidate) -> float:
    return float(each.trained or 0)


def _seconds(each: Candidate, steps: int) -> float:
    return (each.step_ms or 0.0) * steps / 1e3


def _points(
    axes: Any,
    places: Sequence[float],
    new: Sequence[Candidate],
    name: str,
    metric: str,
    *,
    joined: bool = False,
) -> None:
    """A stage's settings with their errors; ranks may be joined by a line."""
    if not new:
        return
    sign = 1 if metric == "accuracy" else -1
    means = [sign * each.summary.mean for each in new]
    line = "-" if joined and name == "rank" else ""
    axes.errorbar(
        places,
        means,
        yerr=[each.summary.error for each in new],
        fmt=_MARKERS[name] + line,
        color=_COLORS[name],
        linewidth=1.2,
        markersize=5,
        capsize=3,
        label=_LABELS[name],
    )
    for place, mean, each in zip(places, means, new, strict=True):
        s = each.setting
        text = {"rank": f"r = {s.rank}", "targets": s.targets}.get(name, "")
        axes.annotate(text, (place, mean), (7, 6), textcoords="offset points", fontsize=9)


def _mark(
    axes: Any,
    place: float,
    each: Candidate,
    metric: str,
    marker: str,
    label: str,
    color: str,
    size: int,
) -> None:
    """A larger mark around a point."""
    if not _drawn(each):
        return
    mean = each.summary.mean if metric == "accuracy" else -each.summary.mean
    axes.scatter(
        [place],
        [mean],
        s=size,
        marker=marker,
        facecolors="none",
        edgecolors=color,
        linewidths=1.5,
        zorder=5,
        label=label,
    )


def _paths(axes: Any, ledger: Ledger, played: Played) -> None:
    """What each setting of learning rate and alpha scored as it went on, until it ended."""
    for trial in ledger.trials.values():
        if trial.setting not in played or trial.step_ms is None or not trial.values:
            continue
        if trial.stage != "rates":
            continue
        steps = sorted(trial.values)
        places = [trial.step_ms * step / 1e3 for step in steps]
        values = [trial.values[step] for step in steps]
        axes.plot(places, values, "-", color="0.75", linewidth=0.9, zorder=1)
        ended = "x" if trial.why != "steps" else "."
        axes.plot(places[-1:], values[-1:], ended, color="0.55", markersize=5, zorder=1)
