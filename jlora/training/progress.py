"""Console output of a run: progress bar, lines for steps and evaluations, and throughput."""

from __future__ import annotations

import datetime
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from tqdm import tqdm

from jlora import _tree, models
from jlora.models.attention import choose_kernel
from jlora.quantization.quantize import quantization_summary
from jlora.training.callbacks import Callback, MetricValues
from jlora.training.metrics import (
    eval_values,
    flops_per_token,
    is_train_line,
    peak_memory_gib,
    peak_tflops,
)
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup
from jlora.training.sharding import use_mesh

if TYPE_CHECKING:
    from jlora.training.loop import TrainLoop

_THROUGHPUT_WINDOW = 20  # Steps.

_LOG_INTERVAL_S = 30.0


class Console:
    """Printer of lines and of a progress bar.

    Attributes:
        quiet: Whether nothing is printed.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self.quiet:
            tqdm.write(text)


class ThroughputMeter:
    """Formatter of loss, tokens per second, utilization and memory."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        peak = recipe.report.peak_tflops or peak_tflops(setup.mesh.devices.flat[0])
        self._flops_per_token = flops_per_token(
            setup.model, setup.frozen["base"], setup.state.trainable, recipe.data.max_seq_length
        )
        self._peak_flops_per_s = None if peak is None else peak * 1e12 * setup.mesh.size
        # Steps differ in length, so the speed is averaged over several.
        self._num_steps = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_THROUGHPUT_WINDOW)

    def format_step(self, metrics: Mapping[str, float]) -> str:
        """Returns the metrics of a step as text, such as `loss 0.906  1,340 tok/s  1.2 GiB`.

        MFU is the model FLOPs utilization; it is left out on devices of unknown peak.
        """
        if self._num_steps == 1:  # The first step includes the compilation.
            self._recent.clear()
        self._num_steps += 1
        self._recent.append((metrics["tokens"], metrics["seconds"]))
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        speed = tokens / seconds if seconds else 0.0
        parts = [f"loss {metrics['train/loss']:.3f}", f"{speed:,.0f} tok/s"]
        if self._peak_flops_per_s is not None:
            parts.append(f"MFU {speed * self._flops_per_token / self._peak_flops_per_s:.0%}")
        return "  ".join([*parts, f"{peak_memory_gib():.1f} GiB"])


class ProgressBar(Callback):
    """Display of steps and evaluations.

    On a terminal a bar shows the last step. Elsewhere a line is printed every 30 seconds and for
    the last step. Evaluations are lines in both cases.
    """

    def __init__(self, console: Console, throughput: ThroughputMeter) -> None:
        """Prepares the display.

        Args:
            console: Printer of the lines.
            throughput: Formatter of the metrics of a step.
        """
        self._console, self._throughput = console, throughput
        self._is_terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._last_log_time = time.monotonic()
        self._first: tuple[int, float] | None = None  # Number and end time of the first step.

    def on_train_start(self, loop: TrainLoop) -> None:
        """Opens the bar."""
        self._bar = tqdm(
            total=loop.total_steps,
            initial=loop.progress.step,
            disable=self._console.quiet or not self._is_terminal,
            file=sys.stderr,
            bar_format="{bar:20} {desc}",
            desc=f"step {loop.progress.step}/{loop.total_steps}",
        )
        self._last_log_time = time.monotonic()

    def on_step_end(self, loop: TrainLoop, step: int, metrics: MetricValues) -> None:
        """Shows the metrics of a training step."""
        assert self._bar is not None
        text = self._throughput.format_step(metrics)  # Each step counts for the speed.
        now, total = time.monotonic(), loop.total_steps
        if self._first is None:
            self._first = step, now
            self._console(f"the first step took {metrics['seconds']:.1f} s with its compilation")
        if not self._is_terminal and step < total and now - self._last_log_time < _LOG_INTERVAL_S:
            return
        line = f"{_label(f'step {step}/{total}', total)}{text}{self._eta(step, total, now)}"
        if self._is_terminal:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._last_log_time = now
            self._console(line)

    def on_evaluate_end(
        self, loop: TrainLoop, step: int, metrics: MetricValues, is_best: bool
    ) -> None:
        """Shows the metrics of an evaluation."""
        self._console(evaluation_line(step, loop.total_steps, eval_values(metrics), is_best))

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self, step: int, total_steps: int, now: float) -> str:
        """Returns the remaining time; the first step, which includes compilation, is left out."""
        assert self._first is not None
        first, end_time = self._first
        left = total_steps - step
        if left and step == first:
            return ""
        seconds = left * (now - end_time) / max(step - first, 1)
        return f"  ETA {datetime.timedelta(seconds=round(seconds))}"


def evaluation_line(step: int, total_steps: int, means: Mapping[str, float], is_best: bool) -> str:
    """Returns the line of an evaluation, such as `eval 120  loss 0.881  (best)`.

    Args:
        step: Step after which the model was evaluated.
        total_steps: Steps of the complete run.
        means: Means over the validation data, by name.
        is_best: Whether it is the best evaluation so far.
    """
    parts = [f"{name} {value:.3f}" for name, value in means.items()]
    return _label(f"eval {step}", total_steps) + "  ".join([*parts, "(best)"] if is_best else parts)


def _label(text: str, total_steps: int) -> str:
    """Returns the start of a line, padded so that the metrics of all lines are aligned."""
    return text.ljust(len(f"step {total_steps}/{total_steps}  "))


def trainable_params_line(setup: Setup) -> str:
    """Returns the counts of parameters in one line, as PEFT's `print_trainable_parameters`.

    All parameters are those of the base and the trainable ones.
    """
    trainable, base = count_params(setup)
    total = trainable + base
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.2f}"
    )


def count_params(setup: Setup) -> tuple[int, int]:
    """Returns the number of trainable parameters and that of the base's parameters."""
    trainable = sum(array.size for array in jax.tree.leaves(setup.state.trainable))
    base = _tree.flatten_with_paths(setup.frozen["base"]).leaves
    return trainable, sum(leaf.size for leaf in base)


def describe_quantized_base(setup: Setup) -> dict[str, str]:
    """Returns a row "quantized" about the quantized weights of the base; empty without any."""
    summary = quantization_summary(setup.frozen["base"])
    return {} if summary is None else {"quantized": str(summary)}


def describe_attention(recipe: Recipe, setup: Setup) -> str:
    """Returns the kernels of a run's attention, for rows of the largest length.

    Args:
        recipe: Recipe of the run.
        setup: Setup of the run.

    Example:
        >>> from jlora.training import build_setup, describe_attention, make_mesh, recipe
        >>> run = recipe.load("recipe.yaml")  # doctest: +SKIP
        >>> setup = build_setup(run, make_mesh({}), total_steps=1)  # doctest: +SKIP
        >>> describe_attention(run, setup)  # doctest: +SKIP
        'tokamax (mosaic)'
    """
    implementation = getattr(setup.model, "attention_implementation", None)
    if implementation in ("xla", "cudnn", "splash") or isinstance(setup.model, models.ViT):
        return implementation or "xla"
    weights = _tree.flatten_with_paths(setup.frozen["base"]).leaves
    dtype = setup.model.dtype or max(weights, key=lambda leaf: leaf.size).dtype
    with use_mesh(setup.mesh):
        cases = setup.model.attention_cases(recipe.data.max_seq_length, dtype)
        kernels = list(dict.fromkeys(choose_kernel(case) for case in cases))
    return ", ".join(
        f"tokamax ({kernel})" if kernel in ("mosaic", "triton") else kernel for kernel in kernels
    )


def compilation_line(metrics: Sequence[Mapping[str, Any]], cache_folder: Path | None = None) -> str:
    """Returns the line that announces the compilation of the training step.

    Args:
        metrics: Lines of an earlier metrics.jsonl in the output folder. The first step of a run
            includes the compilation, so its seconds are the estimate; empty if there are none.
        cache_folder: Folder in which compiled programs are kept; None: they are not.
    """
    first = next((line for line in metrics if is_train_line(line)), None)
    parts = ["once"]
    parts += [] if first is None else [f"{first['seconds']:.0f} s last time"]
    parts += [] if cache_folder is None else [f"compiled programs are kept in {cache_folder}"]
    return f"compiling the training step ({'; '.join(parts)})"
