"""What a run measures, written down as it goes: a line of JSON each, and TensorBoard's files."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from jlora import _tree, models
from jlora.optim.multi_transform import FULL, param_labels

METRICS_FILE = "metrics.jsonl"

MetricValues = Mapping[str, float]


class MetricsLogger(Protocol):
    """Where measurements go. Anything with these two methods can be given to `train`."""

    def log(self, step: int, metrics: MetricValues) -> None:
        """Takes what was measured at a step."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class JsonlMetricsLogger:
    """metrics.jsonl: a line `{"step": ..., ...}` for every step and evaluation."""

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        """Opens the file.

        Args:
            path: Of the file.
            resume_step: The last step that counts: lines of later ones, which an interrupted run wrote
                and a resumed one writes again, are taken out.
        """
        path = Path(path)
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        # Written beside the old file and moved into its place, so that being killed loses nothing.
        temporary = path.with_suffix(".tmp")
        self._file = temporary.open("w", encoding="utf-8")
        for line in kept:
            self._write_line(line)
        temporary.replace(path)

    def log(self, step: int, metrics: MetricValues) -> None:
        """Writes a line."""
        self._write_line({"step": step, **metrics})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write_line(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(to_strict_json(line)) + "\n")
        self._file.flush()


def to_strict_json(value: Any) -> Any:
    """The value as JSON has it, which has no NaN: a reader should not need Python's."""
    if isinstance(value, Mapping):
        return {name: to_strict_json(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardLogger:
    """Event files that TensorBoard draws."""

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        """Opens a file in the folder; a resumed run's hides what an earlier one wrote `resume_step`."""
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(os.fspath(folder), purge_step=resume_step + 1)

    def log(self, step: int, metrics: MetricValues) -> None:
        """Adds a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def make_metrics_loggers(
    output: Path, *, tensorboard: bool, resume_step: int
) -> list[JsonlMetricsLogger | TensorBoardLogger]:
    """Those that write into a run's folder, from the first process alone.

    Args:
        output: The folder.
        tensorboard: Whether TensorBoard's files are wanted too.
        resume_step: The last step that counts of what is there.
    """
    if jax.process_index() > 0:
        return []
    found: list[JsonlMetricsLogger | TensorBoardLogger] = [
        JsonlMetricsLogger(output / METRICS_FILE, resume_step=resume_step)
    ]
    if tensorboard:
        found.append(TensorBoardLogger(output / "tensorboard", resume_step=resume_step))
    return found


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if it is not there. A last one cut short is left out."""
    if not Path(path).is_file():
        return []
    found = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # A run was killed while it wrote.
        found.append({key: float(v) if key != "step" else int(v) for key, v in line.items()})
    return found


def log_metrics(loggers: Iterable[MetricsLogger], step: int, metrics: MetricValues) -> None:
    """Tells every recorder."""
    for recorder in loggers:
        recorder.log(step, metrics)


# Dense bfloat16 products in TFLOP/s as vendors give them, by what JAX calls the device.
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
    """What one device can do at most; None where it is not known."""
    kind = getattr(device, "device_kind", "")
    known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def flops_per_token(model: Any, params: Any, trainable: Any, seq_length: int) -> float:
    """The arithmetic that one token needs in a step of training an adapter.

    A weight's product counts twice: forward, and for the gradient of what goes in; an adapter's
    also for its own. What is computed again to save memory does not count. Attention counts half
    of a full row.

    Args:
        model: Of `jlora.models`.
        params: Its weights, or shapes.
        trainable: The arrays that are trained.
        seq_length: Of a row.
    """
    decoder, c = isinstance(model, models.Decoder), model.config
    flat = _tree.flatten_with_paths(params)
    weights = 0.0
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if leaf.ndim < 2 or (
            path.endswith("embedding") and not (decoder and c.tie_word_embeddings)
        ):
            continue
        sparse = decoder and path.endswith(
            ("moe/gate_up", "moe/down")
        )  # A token goes through a few of these.
        weights += leaf.size * (c.moe.num_experts_per_tok / c.moe.num_experts if sparse else 1)
    each = zip(jax.tree.leaves(param_labels(trainable)), jax.tree.leaves(trainable), strict=True)
    own = sum(array.size for label, array in each if array.ndim > 1 and label != FULL)
    layers = len(c.layer_kind_ids) if decoder else c.num_layers
    width = c.num_heads * c.head_dim if decoder else c.hidden_size
    seen = seq_length / 2 if decoder else seq_length
    return 4.0 * weights + 6.0 * own + 12.0 * layers * width * seen


def peak_memory_gib() -> float:
    """The most that a device of this process held, or the process itself on a CPU, in GiB."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
    if not peak:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = held if sys.platform == "darwin" else 1024 * held
    return peak / 2**30
