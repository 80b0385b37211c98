"""Metrics of a run: the loggers that write them, and the speed and memory of devices."""

from __future__ import annotations

import abc
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax

from jlora import _tree, models
from jlora.checkpoints.safetensors_io import PARTIAL_SUFFIX
from jlora.checkpoints.text_files import check_regular_file, name_file_in_errors, parse_json
from jlora.optim.multi_transform import FULL, param_labels
from jlora.training.callbacks import Callback, MetricValues

if TYPE_CHECKING:
    from jlora.training.loop import TrainLoop

METRICS_FILE = "metrics.jsonl"

TRAIN_PREFIX, EVAL_PREFIX = "train/", "eval/"


class MetricsLogger(Callback, abc.ABC):
    """Base class of loggers: callbacks that write the metrics of steps and evaluations.

    A subclass defines `log`, and opens its destination in `on_train_start` and closes it in `close`
    if it has to. With several processes only the first one logs.

    Example:
        >>> from jlora.training import MetricsLogger
        >>> class LossHistory(MetricsLogger):
        ...     def __init__(self):
        ...         self.losses = []
        ...     def log(self, step, metrics):
        ...         if "train/loss" in metrics:
        ...             self.losses.append(metrics["train/loss"])
        >>> history = LossHistory()
        >>> history.on_step_end(None, 1, {"train/loss": 2.5, "seconds": 0.1})
        >>> history.losses
        [2.5]
    """

    @abc.abstractmethod
    def log(self, step: int, metrics: MetricValues) -> None:
        """Records the metrics of a step or evaluation.

        Args:
            step: Number of the training step, from 1.
            metrics: Values by name, as in metrics.jsonl.
        """

    def on_step_end(self, loop: TrainLoop, step: int, metrics: MetricValues) -> None:
        """Logs the metrics of a step."""
        if jax.process_index() == 0:
            self.log(step, metrics)

    def on_evaluate_end(
        self, loop: TrainLoop, step: int, metrics: MetricValues, is_best: bool
    ) -> None:
        """Logs the metrics of an evaluation."""
        if jax.process_index() == 0:
            self.log(step, metrics)


class JsonlMetricsLogger(MetricsLogger):
    """Logger of metrics.jsonl: one line `{"step": ..., ...}` for each step and evaluation."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Sets the file.

        Args:
            path: File to write.
        """
        self._path = Path(path)
        self._file: TextIO | None = None

    def on_train_start(self, loop: TrainLoop) -> None:
        """Opens the file and removes the lines after the loop's step.

        An interrupted run may have written lines of later steps, which the resumed run writes
        again.
        """
        if jax.process_index() > 0:
            return
        lines = [line for line in read_metrics(self._path) if line["step"] <= loop.progress.step]
        # Written to another file and moved into place, so that a kill loses nothing.
        temporary = self._path.with_name(f".{self._path.name}{PARTIAL_SUFFIX}")
        self._file = temporary.open("w", encoding="utf-8")
        for line in lines:
            self._write_line(self._file, line)
        temporary.replace(self._path)

    def log(self, step: int, metrics: MetricValues) -> None:
        """Writes a line."""
        assert self._file is not None
        self._write_line(self._file, {"step": step, **metrics})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write_line(self, file: TextIO, line: Mapping[str, Any]) -> None:
        file.write(json.dumps(to_strict_json(line)) + "\n")
        file.flush()


class TensorBoardLogger(MetricsLogger):
    """Logger of TensorBoard event files."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Sets the folder.

        Args:
            folder: Folder of event files.
        """
        self._folder = folder
        self._writer: Any = None

    def on_train_start(self, loop: TrainLoop) -> None:
        """Opens an event file, which hides later points of earlier files."""
        if jax.process_index() > 0:
            return
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            os.fspath(self._folder), purge_step=loop.progress.step + 1
        )

    def log(self, step: int, metrics: MetricValues) -> None:
        """Adds a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    r"""Returns the lines of a metrics.jsonl, one mapping per step or evaluation.

    Args:
        path: File to read.

    Returns:
        Values by name; "step" is an int and the others are floats, NaN and infinities included.
        The list is empty if there is no file. An incomplete last line is left out.

    Raises:
        ValueError: Another line is damaged.

    Example:
        >>> import pathlib, tempfile
        >>> from jlora.training import read_metrics
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "tra')
        >>> read_metrics(path)
        [{'step': 1, 'train/loss': 2.5}]
    """
    if not os.path.lexists(path):
        return []
    check_regular_file(Path(path))
    lines = []
    *complete, _ = Path(path).read_bytes().split(b"\n")  # A kill leaves a part of the last line.
    for number, text in enumerate(complete, start=1):
        source = f"{path}, line {number},"
        line = parse_json(text, source)
        with name_file_in_errors(path):
            lines.append({key: float(v) if key != "step" else int(v) for key, v in line.items()})
            if "step" not in line:
                raise ValueError(f"{source} has no step. Copy the file again from its source.")
    return lines


def is_train_line(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl belongs to a training step."""
    return f"{TRAIN_PREFIX}loss" in line


def is_eval_line(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl belongs to an evaluation."""
    return f"{EVAL_PREFIX}loss" in line


def eval_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the evaluation metrics of a line by their names without the prefix."""
    return {
        name.removeprefix(EVAL_PREFIX): value
        for name, value in line.items()
        if name.startswith(EVAL_PREFIX)
    }


def to_strict_json(value: Any) -> Any:
    """Returns the value with NaN and infinities as text, because standard JSON has neither."""
    if isinstance(value, Mapping):
        return {name: to_strict_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_strict_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- speed and memory -----------------------------------------------------------------------------

# Dense bfloat16 peak in TFLOP/s from the vendors' data sheets, by JAX's name of the device.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_tflops(device: Any) -> float | None:
    """Returns the peak of one device in TFLOP/s; None for an unknown device."""
    kind = getattr(device, "device_kind", "")
    known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def flops_per_token(model: Any, params: Any, trainable: Any, seq_length: int) -> float:
    """Returns the FLOPs of one token in a training step of an adapter.

    The product with a frozen weight counts twice: in the forward pass and for the gradient of its
    input. The products with adapter arrays also count for their own gradients. Recomputation to
    save memory is not counted. Causal attention counts half of all token pairs.

    Args:
        model: Model of `jlora.models`.
        params: Base weights, as arrays or shapes.
        trainable: Trainable arrays.
        seq_length: Tokens of a row.
    """
    decoder, c = isinstance(model, models.Decoder), model.config
    flat = _tree.flatten_with_paths(params)
    weights = 0.0
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if leaf.ndim < 2 or (
            path.endswith("embedding") and not (decoder and c.tie_word_embeddings)
        ):
            continue
        # A token passes through a few of the experts only.
        sparse = decoder and path.endswith(("moe/gate_up", "moe/down"))
        weights += leaf.size * (c.moe.num_experts_per_tok / c.moe.num_experts if sparse else 1)
    pairs = zip(jax.tree.leaves(param_labels(trainable)), jax.tree.leaves(trainable), strict=True)
    adapter = sum(array.size for label, array in pairs if array.ndim > 1 and label != FULL)
    layers = len(c.layer_kind_ids) if decoder else c.num_layers
    width = c.num_heads * c.head_dim if decoder else c.hidden_size
    attended = seq_length / 2 if decoder else seq_length
    return 4.0 * weights + 6.0 * adapter + 12.0 * layers * width * attended


def peak_memory_gib() -> float:
    """Returns the peak memory in GiB of a device of this process; of the process on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
    if not peak:
        try:
            import resource
        except ImportError:  # On Windows.
            return 0.0
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = usage if sys.platform == "darwin" else 1024 * usage
    return peak / 2**30
