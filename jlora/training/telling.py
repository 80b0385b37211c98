"""What a run says while it goes on, and what its report begins with."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jlora import tree
from jlora.quantization.rules import held
from jlora.training.reading import Datasets
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup
from jlora.training.speed import flops_per_token, peak_memory_gib, peak_tflops

_RECENT = 20  # Steps.
_EVERY_S = 30.0
_MERGED = {
    "dequantized": "into the dequantized weights: the model that was trained and measured",
    "original": "into the original weights, which are not the quantised ones that the adapter was "
    "trained on: nothing here was measured on the merged model",
}


class Talk:
    """Lines and a progress bar, or silence."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def bar(self, steps: int, done: int, shown: Shown) -> Bar:
        return Bar(steps, done, shown, self)


class Shown:
    """The few numbers beside the bar."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        peak = recipe.report.peak_tflops or peak_tflops(setup.mesh.devices.flat[0])
        self._flops = flops_per_token(
            setup.model, setup.frozen["base"], setup.state.trained, recipe.data.length
        )
        self._peak = None if peak is None else peak * 1e12 * setup.mesh.size
        # Steps differ in length, so speed is that of several.
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def text(self, values: dict[str, float]) -> str:
        """What is shown after a step that measured these."""
        self._recent.append((values["tokens"], values["seconds"]))
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        speed = tokens / seconds if seconds else 0.0
        parts = [f"loss {values['loss']:.3f}", f"{speed:,.0f} tokens/s"]
        if self._peak is not None:
            parts.append(f"{speed * self._flops / self._peak:.0%} of peak")
        return ", ".join([*parts, f"{peak_memory_gib():.1f} GiB"])


class Bar:
    """Shows every step's numbers: a bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, steps: int, done: int, shown: Shown, say: Talk) -> None:
        self._terminal = sys.stderr.isatty()
        disable = say.quiet or not self._terminal
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=disable, file=sys.stderr)
        self._steps, self._first, self._shown, self._say = steps, done, shown, say
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        def show(step: int, values: dict[str, float]) -> None:
            text = self._shown.text(values)
            if self._terminal:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(step - self._bar.n)
                return
            now = time.monotonic()
            if step == self._steps or now - self._told >= _EVERY_S:
                self._told = now
                rest = (now - self._began) / (step - self._first) * (self._steps - step)
                self._say(f"step {step} of {self._steps}: {text}, {rest / 60:.0f} min left")

        return show

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def counted(setup: Setup) -> str:
    """How much is trained, in a sentence."""
    trained, base = _sizes(setup)
    return f"{trained:,} numbers are trained, {trained / base:.2%} of the base's {base:,}."


def quantized(setup: Setup) -> dict[str, str]:
    """What of the base is quantised, by the name that a report has for it; nothing if none is."""
    found = held(setup.frozen["base"])
    return {} if found is None else {"quantised": str(found)}


def _sizes(setup: Setup) -> tuple[int, int]:
    """How many numbers are trained, and how many the base has."""
    trained = sum(array.size for array in jax.tree.leaves(setup.state.trained))
    return trained, sum(leaf.size for leaf in tree.flatten(setup.frozen["base"]).leaves)


class Course(NamedTuple):
    """How a run went.

    Attributes:
        why: It ended: "steps", or "patience" when evaluations got no better.
        kept: The step whose adapter is written.
        steps: How many were to be made.
        waited_s: In which the devices had no batch, since the run was last resumed.
        tested: The means on the test data before and after, if there is any.
        lines: Of metrics.jsonl.
    """

    why: str
    kept: int
    steps: int
    waited_s: float
    tested: Sequence[dict[str, float]]
    lines: Sequence[dict[str, Any]]

    @property
    def stepped(self) -> list[dict[str, Any]]:
        """The lines of steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def skipped(self) -> int:
        """How many steps changed nothing."""
        return sum(not _is_finite(line) for line in self.stepped)

    @property
    def seconds(self) -> float:
        """That the steps took."""
        return sum(line["seconds"] for line in self.stepped)


def _is_finite(line: dict[str, Any]) -> bool:
    return math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])


def figures(setup: Setup, course: Course) -> dict[str, Any]:
    """What came of a run, for programs: the means of the tests and of the kept evaluation."""
    trained, base = _sizes(setup)
    found = held(setup.frozen["base"])
    kept = [line for line in course.lines if line["step"] == course.kept]
    means = {
        name.removeprefix("validation_"): value
        for line in kept
        for name, value in line.items()
        if name.startswith("validation_")
    }
    return {
        "why": course.why,
        "steps": len(course.stepped),
        "skipped": course.skipped,
        "kept": course.kept,
        "validation": means or None,
        "test": dict(zip(("before", "after"), course.tested, strict=False)) or None,
        "trained": trained,
        "base": base,
        "quantized": None if found is None else found._asdict(),
        "seconds": round(course.seconds, 1),
        "waited_s": round(course.waited_s, 3),
        "device": setup.mesh.devices.flat[0].device_kind,
        "devices": setup.mesh.size,
    }


def summary(recipe: Recipe, setup: Setup, data: Datasets, course: Course) -> dict[str, str]:
    """What the report begins with."""
    stepped = course.stepped
    evaluated = {line["step"]: line for line in course.lines if "validation_loss" in line}
    seconds, waited = round(course.seconds), round(course.waited_s)
    told = {
        "base": recipe.model.path,
        **quantized(setup),
        "adapter": ", ".join(rule.family for rule in (*recipe.more, recipe.lora)),
        "trained": counted(setup),
        "devices": f"{setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind}",
        "steps": f"{len(stepped)} of {course.steps}",
        "time": f"{seconds} s, of which the devices waited {waited} s for data",
        "loss": f"{_mean(stepped[:10])} at first, {_mean(stepped[-10:])} at last",
    }
    if recipe.quantize is not None and recipe.export.merged:
        told["merged"] = _MERGED[recipe.export.merged_base]
    if course.skipped:
        told["steps"] += f", {course.skipped} of them skipped: loss or gradient was not finite"
    if course.why == "patience":
        told["steps"] += f"; no better evaluation in {recipe.training.patience}"
    told |= data.reports
    for name in course.tested[0] if course.tested else ():
        both = " before, ".join(f"{one[name]:.4f}" for one in course.tested)
        told[f"test {name}"] = f"{both} after"
    if course.kept in evaluated:
        means = {name: value for name, value in evaluated[course.kept].items() if name != "step"}
        values = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        told["validation"] = f"{values} at step {course.kept}, whose adapter was kept"
    return told


def _mean(lines: Sequence[dict[str, Any]]) -> str:
    values = [line["loss"] for line in lines if math.isfinite(line["loss"])]
    return f"{np.mean(values):.4f}" if values else "none"
