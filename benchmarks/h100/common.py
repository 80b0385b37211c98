"""What every script in this folder shares: shapes, the way of timing, and the row that is written.

Of the libraries that are measured it imports none, so that a script loads only its own.
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
    """A Llama-like decoder, in bfloat16, and the batch it is trained on.

    Attributes:
        layers: How many blocks.
        width: Of the residual stream.
        hidden: Width of the MLP.
        heads: Of queries.
        kv_heads: Of keys and values; divides `heads`.
        head_dim: Width of one head.
        vocabulary: How many tokens there are.
        batch: Sequences a step.
        length: Tokens a sequence.
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
        """How many numbers LoRA trains on the seven projections of every layer."""
        return self.layers * sum(rank * sum(sides) for sides in self.projections.values())


SHAPES = {
    "tiny": Shape(2, 64, 160, 4, 2, 16, 512, 2, 32),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 32_000, 8, 1024),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, 2, 4096),
    "70b": Shape(80, 8192, 28_672, 64, 8, 128, 128_256, 1, 1024),
}


class Timing(NamedTuple):
    """What `timed` saw; all but the losses in milliseconds per step."""

    step_ms: float
    repeats_ms: list[float]
    loss_before: float
    loss_after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method's training step.

    Attributes:
        method: The library, and the way it was used.
        shape: A name in `SHAPES`.
        batch: Sequences a step.
        length: Tokens a sequence.
        step_ms: Median of `repeats_ms`.
        repeats_ms: Per step, of steps that were not waited for one by one.
        tokens_per_s: At the median.
        peak_gib: The most that was allocated on the device, in torch while training, in JAX also
            while compiling; None where nobody counts, as on a CPU.
        planned_gib: Arguments, results and temporaries as XLA's compiler planned them.
        trained: How many numbers are trained.
        loss_before: Of the first step.
        loss_after: Of the last step, on the same batch.
        device: The accelerator's name.
        versions: Of Python and the libraries.
        command: How the script was called.
        details: What else this method has to say.
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


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every script takes, described by the first line of its `__doc__`."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--shape", choices=SHAPES, default="tiny")
    made.add_argument("--tiny", action="store_const", dest="shape", const="tiny")
    made.add_argument("--steps", type=int, default=10, help="in a row between two waits")
    made.add_argument("--repeats", type=int, default=3, help="of that many steps")
    made.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    return made


def timed(step: Callable[[], Any], wait: Callable[[], Any], *, steps: int, repeats: int) -> Timing:
    """The time of a step among steps that follow each other without a wait, after a warm-up.

    Waiting for each step would add what the host takes to launch it, which training never sees.

    Args:
        step: Trains once and returns the loss before it, which need not be there yet.
        wait: Returns when every step so far has ended.
        steps: How many steps go between two waits.
        repeats: How often those are timed.
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


def check_trained(count: int, shape: Shape) -> None:
    """Refuses a model in which LoRA is not on all seven projections and nowhere else.

    Raises:
        RuntimeError: When `count` is not `shape.lora_size()`.
    """
    if count != shape.lora_size():
        raise RuntimeError(
            f"trained={count:,} numbers, but LoRA of rank {RANK} on the seven projections of "
            f"{shape} has {shape.lora_size():,}. Some projection has no adapter, or something "
            f"else is trained: look at the names of the trained parameters."
        )


def row(
    method: str,
    options: argparse.Namespace,
    timing: Timing,
    *,
    script: str,
    libraries: tuple[str, ...],
    **more: Any,
) -> Row:
    """The row of a measurement.

    Args:
        method: The library, and the way it was used.
        options: From `parser`.
        timing: From `timed`.
        script: The module that was run.
        libraries: Whose versions matter, as they are called on PyPI.
        **more: The fields of `Row` that only the method knows; also batch and length, where they
            are not the shape's.
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
        command=command(script),
        **fields,
    )


def finish(row: Row, output: pathlib.Path | None) -> None:
    """Prints the row on one line and writes it, then checks that the steps trained.

    Raises:
        RuntimeError: When the loss did not fall; the row is there all the same, for a look.
    """
    print(line(row))
    if output:
        write(row, output)
    if not row.loss_after < row.loss_before:
        raise RuntimeError(
            f"loss_after={row.loss_after} is not below loss_before={row.loss_before}, on one batch "
            f"again and again: {row.method} did not train. See that gradients reach the adapter."
        )


def line(row: Row) -> str:
    """The row as one line of text."""
    gib = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
    return (
        f"{row.method}, {row.shape}: {row.step_ms:.2f} ms a step, {row.tokens_per_s:,} tokens/s, "
        f"peak {gib} GiB, {row.trained:,} trained, loss {row.loss_before:.4f} -> "
        f"{row.loss_after:.4f}, {row.device}"
    )


def write(row: Row, path: pathlib.Path) -> None:
    """Writes the row as JSON, over what was there, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(row), indent=2) + "\n")


def versions(*names: str) -> dict[str, str]:
    """The versions of Python and of these packages, as they are called on PyPI."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def device_name() -> str:
    """The name of the device that torch, or else JAX, computes on; of what is loaded already."""
    # torch first: asking JAX would make it take most of a GPU's memory.
    if torch := sys.modules.get("torch"):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if jax := sys.modules.get("jax"):
        return jax.devices()[0].device_kind
    return platform.machine()


def command(script: str) -> str:
    """How a module was run, with what was set for XLA; of files, the names only."""
    words = [pathlib.Path(word).name if "/" in word else word for word in sys.argv[1:]]
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS")
    given = [f"{name}={shlex.quote(os.environ[name])}" for name in names if os.environ.get(name)]
    return " ".join([*given, "python -m", script, *words])


def planned_gib(compiled: Any) -> float:
    """What a step that JAX compiled holds at once, by its compiler's plan."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    ) / 2**30


def peak_gib(device: Any) -> float | None:
    """The most that JAX has allocated on one of its devices, or None where it does not count."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30
