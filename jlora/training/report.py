"""report.html: what a run did, in one file that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import tree
from jlora.adapters.protocol import AdapterLeaf
from jlora.conversion import delta
from jlora.packed import dense

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; margin: 0 } .figures svg { max-width: 100%; height: auto }
"""


class Sample(NamedTuple):
    """What a decoder wrote after a prompt.

    Attributes:
        prompt: As the recipe has it.
        before: By the base.
        after: By the adapted model.
    """

    prompt: str
    before: str
    after: str


def norms(
    params: Any, adapter: Mapping[str, Any], fresh: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """The norm of every weight's change over that of the weight: one number per layer of a stack.

    Weights whose adapter is no change of the weight (a mixture) are left out.

    Args:
        params: That the run computed with.
        adapter: For the checkpoint's own weights.
        fresh: What was taken out of those to make `params`.
    """
    flat = tree.flatten(params)
    arrays = dict(zip(flat.paths, flat.leaves, strict=True))
    found: dict[str, np.ndarray] = {}
    for path, leaf in adapter.items():
        if not isinstance(leaf, AdapterLeaf) or leaf.family == "lora_mixture":
            continue
        own = {path: leaf} if leaf.share is None else {path: leaf, leaf.share: adapter[leaf.share]}
        weight = dense(arrays[path])
        if fresh is not None and getattr(fresh[path], "residual", False):
            weight = weight + delta(params, {path: fresh[path]})[path]
        found[path] = np.asarray(_shares(weight, delta(params, own)[path], leaf.axes.batch))
    return found


@jax.jit
def _norm(x: jax.Array) -> jax.Array:
    return jax.numpy.linalg.norm(x.astype(jax.numpy.float32))


def _shares(weight: Any, change: Any, batch: tuple[int, ...]) -> list[float]:
    """Of each layer of a stack, or of the weight."""
    if batch[:1] != (0,):
        return [float(_norm(change) / _norm(weight))]
    return [float(_norm(change[n]) / _norm(weight[n])) for n in range(weight.shape[0])]


def write(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    changes: Mapping[str, np.ndarray],
    samples: Sequence[Sample],
) -> None:
    """Writes the report.

    Args:
        path: Of the file, which is replaced.
        title: Its heading.
        facts: What is told first, by name.
        lines: Of metrics.jsonl.
        changes: What `norms` returned.
        samples: What was written before and after.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _table(facts)]
    figures = _figures(lines)
    if figures:
        parts += ["<h2>Training</h2>", '<div class="figures">', figures, "</div>"]
    if changes:
        parts += [
            "<h2>How far each weight moved</h2>",
            "<p>The norm of the change over the norm of the weight.</p>",
            '<div class="figures">',
            _changes(changes),
            "</div>",
        ]
    if samples:
        parts += ["<h2>Before and after</h2>", _samples(samples)]
    body = "\n".join(parts)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(facts: Mapping[str, str]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _samples(samples: Sequence[Sample]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td><pre>{html.escape(text)}</pre></td>" for text in sample) + "</tr>"
        for sample in samples
    )
    return f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{rows}</table>"


def _figures(lines: Sequence[Mapping[str, Any]]) -> str:
    """Loss, learning rate, gradient norm and speed over the steps."""
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    if not steps:
        return ""
    at = [line["step"] for line in steps]
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    (loss, rate), (gradient, speed) = figure.subplots(2, 2)
    values = np.array([line["loss"] for line in steps])
    loss.plot(at, values, color="0.75", linewidth=0.8, label="step")
    window = max(1, len(values) // 50)
    if window > 1:
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        loss.plot(at[window - 1 :], smooth, color="C0", label=f"mean of {window}")
    held = [line for line in lines if "validation_loss" in line]
    if held:
        loss.plot(
            [line["step"] for line in held],
            [line["validation_loss"] for line in held],
            "o-",
            color="C3",
            label="validation",
        )
    loss.legend()
    loss.set(title="loss (nats)")
    rate.plot(at, [line["learning_rate"] for line in steps], color="C0")
    rate.set(title="learning rate")
    gradient.plot(at, [line["gradient_norm"] for line in steps], color="C0", linewidth=0.8)
    gradient.set(title="gradient norm, before clipping", xlabel="step", yscale="log")
    # The first step of a process compiles.
    timed = [line for line in steps if line["seconds"] > 0]
    ratio = [line["weight"] / line["seconds"] for line in timed]
    speed.plot([line["step"] for line in timed], ratio, color="C0", linewidth=0.8)
    speed.set(title="learned tokens, pairs or texts per second", xlabel="step", ylim=(0, None))
    return _svg(figure)


def _changes(changes: Mapping[str, np.ndarray]) -> str:
    """A line per kind of weight over the layers, or a bar for each weight."""
    from matplotlib.figure import Figure

    by_kind: dict[str, list[float]] = {}
    for path, values in changes.items():
        kind = "/".join(part for part in path.split("/")[1:] if not _numbered(part))
        by_kind.setdefault(kind, []).extend(values.tolist())
    figure = Figure(figsize=(9.5, 0.5 + 0.32 * max(len(by_kind), 6)), layout="constrained")
    axes = figure.subplots()
    for place, (kind, values) in enumerate(sorted(by_kind.items(), reverse=True)):
        axes.scatter(values, [place] * len(values), c=np.arange(len(values)), cmap="viridis", s=28)
        axes.text(1.01, place, kind, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set(yticks=[], xlabel="dark: the first layer; light: the last")
    axes.margins(y=0.5 / max(len(by_kind), 1))
    return _svg(figure)


def _numbered(part: str) -> bool:
    """Whether it is of one layer: `layer_3`, or `layers` of a stack."""
    return part == "layers" or part.rpartition("_")[2].isdigit()


def _svg(figure: Any) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    text = held.getvalue()
    return text[text.index("<svg") :]
