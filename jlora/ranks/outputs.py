"""What a search leaves beside its state: table.md, quality.png and best.yaml."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from jlora.ranks.drawing import draw
from jlora.ranks.judging import DIVERGED, Summary, rungs, summarized, uncertainty_of_error
from jlora.ranks.ledger import Ledger, Setting
from jlora.ranks.stages import Played, Stage, verdict
from jlora.ranks.trials import setting_of, with_setting
from jlora.training.recipe.sections import Recipe

TABLE, PLOT, BEST = "table.md", "quality.png", "best.yaml"
_TITLES = {
    "rank": "Rank",
    "targets": "Which weights",
    "rates": "Learning rate and alpha",
    "confirmation": "Confirmation against the recipe as it was",
}


def write(
    recipe: Recipe,
    ledger: Ledger,
    stages: Sequence[Stage],
    played: Played,
    *,
    finished: bool,
) -> list[Path]:
    """Writes what the stages came to; nothing but the table where none is over.

    Returns:
        The files.
    """
    folder = ledger.folder
    written = [folder / TABLE]
    written[0].write_text(table(recipe, ledger, stages, played, finished), encoding="utf-8")
    if stages:
        written += [folder / PLOT, folder / BEST]
        draw(written[1], recipe, ledger, stages, played)
        written[2].write_text(best(recipe, ledger, stages, finished), encoding="utf-8")
    return written


# --- table.md -------------------------------------------------------------------------------------


def table(
    recipe: Recipe, ledger: Ledger, stages: Sequence[Stage], played: Played, finished: bool
) -> str:
    """The search as Markdown: what was chosen, every stage, how to read it, and every trial."""
    metric = recipe.training.metric
    parts = [f"# Rank search of {recipe.model.path}", summary(recipe, ledger, stages, finished)]
    for stage in stages:
        parts += [f"## {_TITLES[stage.name]}", stage.why]
        if stage.name == "rates":
            options = ledger.facts["options"]
            looks = rungs(options["steps"], options["rungs"])
            parts.append(_rates_table(played, stage, metric, looks))
        else:
            parts.append(_stage_table(stage, metric, setting_of(recipe)))
    parts += ["## How to read this", notes(ledger), "## All trials", _trials_table(ledger, metric)]
    return "\n\n".join(parts) + "\n"


def summary(recipe: Recipe, ledger: Ledger, stages: Sequence[Stage], finished: bool) -> str:
    """What was chosen and how it stands to the recipe as it was."""
    metric = recipe.training.metric
    begun = sum(bool(trial.why) for trial in ledger.trials.values())
    lines = []
    if not finished:
        lines.append("The search is not finished: go on with `--resume`.")
    if stages:
        last = stages[-1]
        lines.append(f"Chosen: **{last.setting}**, {_value(last.summary, metric)}.")
        if last.name == "confirmation":
            own = next(each for each in last.candidates if each.setting == setting_of(recipe))
            lines.append(verdict(last.candidates[last.chosen], own))
    lines.append(
        f"{begun} trials took {ledger.facts['seconds']:.0f} s on {ledger.facts['device']}."
    )
    return " ".join(lines)


def notes(ledger: Ledger) -> str:
    """What the figures are, and what they are not."""
    options = ledger.facts["options"]
    seeds = options["seeds"]
    return "\n".join(
        [
            f"- A mean is over {seeds} seeds, which differ in the draws of factors and dropout and "
            f"in the order of the examples. ± is its standard error: the deviation over the root "
            f"of the count. From {seeds} seeds it is itself uncertain by about "
            f"{uncertainty_of_error(seeds):.0%} of it.",
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


def _stage_table(stage: Stage, metric: str, own: Setting) -> str:
    head = ("rank", "weights", "learning rate", "alpha", metric, "seeds", "trained", "ms / step")
    rows = []
    for number, each in enumerate(stage.candidates):
        s = each.setting
        mark = "chosen" if number == stage.chosen else ""
        mark = f"{mark}, recipe as it was".lstrip(", ") if s == own else mark
        rows.append(
            (
                f"{s.rank}",
                s.targets,
                f"{s.learning_rate:g}",
                f"{s.alpha:g}",
                _value(each.summary, metric),
                f"{each.summary.seeds}",
                "" if each.trained is None else f"{each.trained:,}",
                "" if each.step_ms is None else f"{each.step_ms:.0f}",
                mark,
            )
        )
    return _markdown((*head, ""), rows)


def _rates_table(played: Played, stage: Stage, metric: str, looks: Sequence[int]) -> str:
    """A row for each setting, the score after each rung that it came to."""
    head = ("learning rate", "alpha", *(f"{metric} after {look} steps" for look in looks), "")
    rows = []
    for setting, scores in played.items():
        told = [_value(summarized([score]), metric) for score in scores]
        mark = "chosen" if setting == stage.setting else ""
        cells = [*told, *[""] * (len(looks) - len(scores)), mark]
        rows.append((f"{setting.learning_rate:g}", f"{setting.alpha:g}", *cells))
    return _markdown(head, rows)


def _trials_table(ledger: Ledger, metric: str) -> str:
    head = ("first asked for by", "rank", "weights", "learning rate", "alpha", "seed", "steps")
    rows = []
    for trial in ledger.trials.values():
        s = trial.setting
        score = trial.values.get(trial.steps)
        rows.append(
            (
                trial.stage,
                f"{s.rank}",
                s.targets,
                f"{s.learning_rate:g}",
                f"{s.alpha:g}",
                f"{trial.seed}",
                f"{trial.steps} of {trial.of}",
                "" if score is None else f"{score:.4f}",
                "" if trial.trained is None else f"{trial.trained:,}",
                f"{trial.seconds:.0f}",
                {"until": "ended early", "steps": "all steps"}.get(trial.why, trial.why),
            )
        )
    return _markdown((*head, metric, "trained", "seconds", "ended"), rows)


def _value(given: Summary, metric: str) -> str:
    """A mean with its standard error, in the metric's own sign."""
    if given.mean == DIVERGED:
        return "diverged"
    mean = given.mean if metric == "accuracy" else -given.mean
    return f"{mean:.4f}" + ("" if given.seeds == 1 else f" ± {given.error:.4f}")


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- best.yaml ------------------------------------------------------------------------------------


def best(recipe: Recipe, ledger: Ledger, stages: Sequence[Stage], finished: bool) -> str:
    """The recipe with what was chosen, and how it was, as comments."""
    chosen = with_setting(recipe, stages[-1].setting)
    raw = chosen.model_dump(mode="json", exclude_unset=True)
    raw["output"] = str(Path(recipe.output) / "best")
    told = [
        "Chosen by `jlora rank-search` from trials on the validation data.",
        summary(recipe, ledger, stages, finished).replace("**", ""),
        *(f"{_TITLES[stage.name]}: {stage.setting}. {stage.why}" for stage in stages),
        *(line.removeprefix("- ") for line in notes(ledger).splitlines()[2:4]),
    ]
    comments = [f"# {line}" for text in told for line in textwrap.wrap(text, 96)]
    return "\n".join(comments) + "\n" + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
