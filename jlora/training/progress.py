"""jlora.training.progress."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

import jax
from tqdm import tqdm

from jlora import _tree
from jlora.quantization.quantize import quantization_summary
from jlora.training.metrics import flops_per_token, peak_memory_gib, peak_tflops
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup

_THROUGHPUT_WINDOW = 20  # Steps.

_LOG_INTERVAL_S = 30.0


class Console:
    """Lines and a progress bar, or silence."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def progress_bar(
        self, total_steps: int, initial_step: int, throughput: ThroughputMeter
    ) -> ProgressBar:
        return ProgressBar(total_steps, initial_step, throughput, self)


class ThroughputMeter:
    """The few numbers beside the bar."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        peak = recipe.report.peak_tflops or peak_tflops(setup.mesh.devices.flat[0])
        self._flops_per_token = flops_per_token(
            setup.model, setup.frozen["base"], setup.state.trainable, recipe.data.max_seq_length
        )
        self._peak_flops_per_s = None if peak is None else peak * 1e12 * setup.mesh.size
        # Steps differ in length, so speed is that of several.
        self._recent: deque[tuple[float, float]] = deque(maxlen=_THROUGHPUT_WINDOW)

    def format_step(self, metrics: dict[str, float]) -> str:
        """What is shown after a step that measured these."""
        self._recent.append((metrics["tokens"], metrics["seconds"]))
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        speed = tokens / seconds if seconds else 0.0
        parts = [f"loss {metrics['loss']:.3f}", f"{speed:,.0f} tokens/s"]
        if self._peak_flops_per_s is not None:
            parts.append(f"{speed * self._flops_per_token / self._peak_flops_per_s:.0%} of peak")
        return ", ".join([*parts, f"{peak_memory_gib():.1f} GiB"])


class ProgressBar:
    """Shows every step's numbers: a bar on a terminal, and a line now and then elsewhere."""

    def __init__(
        self, total_steps: int, initial_step: int, throughput: ThroughputMeter, console: Console
    ) -> None:
        self._is_terminal = sys.stderr.isatty()
        disable = console.quiet or not self._is_terminal
        self._bar = tqdm(
            total=total_steps, initial=initial_step, unit="step", disable=disable, file=sys.stderr
        )
        self._total_steps, self._initial_step, self._throughput, self._console = (
            total_steps,
            initial_step,
            throughput,
            console,
        )
        self._start_time = self._last_log_time = time.monotonic()

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        def show(step: int, values: dict[str, float]) -> None:
            text = self._throughput.format_step(values)
            if self._is_terminal:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(step - self._bar.n)
                return
            now = time.monotonic()
            if step == self._total_steps or now - self._last_log_time >= _LOG_INTERVAL_S:
                self._last_log_time = now
                rest = (
                    (now - self._start_time)
                    / (step - self._initial_step)
                    * (self._total_steps - step)
                )
                self._console(
                    f"step {step} of {self._total_steps}: {text}, {rest / 60:.0f} min left"
                )

        return show

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def trainable_params_line(setup: Setup) -> str:
    """How much is trained, in a sentence."""
    trained, base = _count_params(setup)
    return f"{trained:,} numbers are trained, {trained / base:.2%} of the base's {base:,}."


def describe_quantized_base(setup: Setup) -> dict[str, str]:
    """What of the base is quantised, by the name that a report has for it; nothing if none is."""
    found = quantization_summary(setup.frozen["base"])
    return {} if found is None else {"quantised": str(found)}


def _count_params(setup: Setup) -> tuple[int, int]:
    """How many numbers are trained, and how many the base has."""
    trained = sum(array.size for array in jax.tree.leaves(setup.state.trainable))
    return trained, sum(leaf.size for leaf in _tree.flatten_with_paths(setup.frozen["base"]).leaves)
