"""Shapes, timing and result rows of the speed benchmarks.

Imports none of the measured libraries, so that each script loads only its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

RANK = 16
ALPHA = 16
LEARNING_RATE = 1e-4
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a Llama-like decoder in bfloat16, and of its training batch.

    Attributes:
        layers: Number of blocks.
        width: Width of the residual stream.
        hidden: Width of the MLP.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; divides `heads`.
        head_dim: Width of one head.
        vocabulary: Number of tokens in the vocabulary.
        batch: Sequences per step.
        length: Tokens per sequence.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    batch: int
    length: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each adapted weight of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.width, queries),
            "k": (self.width, keys),
            "v": (self.width, keys),
            "o": (queries, self.width),
            "gate": (self.width, self.hidden),
            "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
        }

    def lora_size(self, rank: int = RANK) -> int:
        """Returns the parameters of LoRA on the seven projections of every layer."""
        return self.layers * sum(rank * sum(sides) for sides in self.projections.values())


SHAPES = {
    "tiny": Shape(2, 64, 160, 4, 2, 16, 512, 2, 32),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 32_000, 8, 1024),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, 2, 4096),
    "70b": Shape(80, 8192, 28_672, 64, 8, 128, 128_256, 1, 1024),
}


def llama_config(shape: Shape) -> dict[str, Any]:
    """Returns the config.json of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


class Timing(NamedTuple):
    """Result of `time_steps`; times in milliseconds per step."""

    step_ms: float
    repeats_ms: list[float]
    loss_before: float
    loss_after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Measurement of one method's training step.

    Attributes:
        method: Library and options.
        shape: Name in `SHAPES`.
        batch: Sequences per step.
        length: Tokens per sequence.
        step_ms: Median of `repeats_ms`.
        repeats_ms: Milliseconds per step of each repeat, with one wait at its end.
        tokens_per_s: Tokens per second at the median.
        peak_gib: Peak of allocated device memory, in torch during training, in JAX also during
            compilation; None without a counter, as on a CPU.
        planned_gib: Arguments, results and temporaries in the plan of XLA's compiler.
        trained: Number of trainable parameters.
        loss_before: Loss of the first step.
        loss_after: Loss of the last step, on the same batch.
        device: Name of the accelerator.
        versions: Versions of Python and the libraries.
        command: Command of the script.
        details: Further properties of the method.
    """

    method: str
    shape: str
    batch: int
    length: int
    step_ms: float
    repeats_ms: list[float]
    tokens_per_s: int
    peak_gib: float | None
    planned_gib: float | None = None
    trained: int
    loss_before: float
    loss_after: float
    device: str
    versions: dict[str, str]
    command: str
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def build_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the shared options, described by the first line of `doc`."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tiny", action="store_const", dest="shape", const="tiny")
    parser.add_argument("--steps", type=int, default=10, help="steps between two waits")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of these steps")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    return parser


def time_steps(
    step: Callable[[], Any], wait: Callable[[], Any], *, steps: int, repeats: int
) -> Timing:
    """Measures consecutive steps without a wait between them, after a warm-up.

    A wait after each step would add the host's launch time, which training overlaps.

    Args:
        step: Runs one training step and returns the loss before it, possibly still in computation.
        wait: Blocks until all steps so far are complete.
        steps: Steps between two waits.
        repeats: Number of measurements of that many steps.
    """
    first = loss = step()
    for _ in range(WARM_UP - 1):
        step()
    repeats_ms = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        wait()
        repeats_ms.append(round(1e3 * (time.perf_counter() - start) / steps, 3))
    return Timing(statistics.median(repeats_ms), repeats_ms, float(first), float(loss))


def check_trainable_size(count: int, shape: Shape) -> None:
    """Checks that LoRA is on all seven projections and nothing else is trained.

    Raises:
        RuntimeError: If `count` is not `shape.lora_size()`.
    """
    if count != shape.lora_size():
        raise RuntimeError(
            f"trained={count:,} parameters, but LoRA of rank {RANK} on the seven projections of "
            f"{shape} has {shape.lora_size():,}. Some projection has no adapter, or other "
            f"parameters are trained: check the names of the trained parameters."
        )


def make_row(
    method: str,
    options: argparse.Namespace,
    timing: Timing,
    *,
    script: str,
    libraries: tuple[str, ...],
    **more: Any,
) -> Row:
    """Returns the row of a measurement.

    Args:
        method: Library and options.
        options: Options of `build_parser`.
        timing: Result of `time_steps`.
        script: Module that was run.
        libraries: PyPI names of the libraries whose versions are recorded.
        **more: Further fields of `Row`; also batch and length, if they are not the shape's.
    """
    shape = SHAPES[options.shape]
    fields = {"batch": shape.batch, "length": shape.length, **more}
    return Row(
        method=method,
        shape=options.shape,
        **timing._asdict(),
        tokens_per_s=round(1e3 * fields["batch"] * fields["length"] / timing.step_ms),
        device=device_name(),
        versions=versions(*libraries),
        command=format_command(script),
        **fields,
    )


def finish(row: Row, output: pathlib.Path | None) -> None:
    """Prints the row on one line and writes it, then checks that the loss decreased.

    Raises:
        RuntimeError: If the loss did not decrease; the row is written nevertheless.
    """
    print(format_row(row))
    if output:
        write_row(row, output)
    if not row.loss_after < row.loss_before:
        raise RuntimeError(
            f"loss_after={row.loss_after} is not below loss_before={row.loss_before} after steps "
            f"on one batch: {row.method} did not train. Check that gradients reach the adapter."
        )


def format_row(row: Row) -> str:
    """Returns the row as one line of text."""
    gib = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
    return (
        f"{row.method}, {row.shape}: {row.step_ms:.2f} ms a step, {row.tokens_per_s:,} tokens/s, "
        f"peak {gib} GiB, {row.trained:,} trained, loss {row.loss_before:.4f} -> "
        f"{row.loss_after:.4f}, {row.device}"
    )


def write_row(row: Row, path: pathlib.Path) -> None:
    """Writes the row as JSON; overwrites the file and creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(row), indent=2) + "\n")


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of Python and of these PyPI packages."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def device_name() -> str:
    """Returns the device name of torch, or else of JAX, if already imported."""
    # torch first: a query of JAX would allocate most of a GPU's memory.
    if torch := sys.modules.get("torch"):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if jax := sys.modules.get("jax"):
        return jax.devices()[0].device_kind
    return platform.machine()


def format_command(script: str) -> str:
    """Returns the command of the module with XLA's variables; files without their folders."""
    words = [pathlib.Path(word).name if "/" in word else word for word in sys.argv[1:]]
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS")
    variables = [f"{n}={shlex.quote(os.environ[n])}" for n in names if os.environ.get(n)]
    return " ".join([*variables, "python -m", script, *words])


def planned_gib(compiled: Any) -> float:
    """Returns the memory of a step compiled by JAX, in its compiler's plan."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    ) / 2**30


def peak_gib(device: Any) -> float | None:
    """Returns JAX's peak of allocated memory on a device, or None without a counter."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30
