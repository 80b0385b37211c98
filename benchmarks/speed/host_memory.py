"""Peak of host memory of commands on a checkpoint, as a multiple of its largest tensor.

Writes a random Llama in bfloat16 and adapters for it to a temporary folder, and runs each operation
in a process of its own. Memory is the resident set of the process; the baseline is that after the
same operation on a tiny checkpoint, so that libraries and compiled programs do not count. The
returned arrays are subtracted. Quickly: `python -m benchmarks.speed.host_memory --tiny`; the
committed figures (4.3 GB on disk, several minutes):
`python -m benchmarks.speed.host_memory --output benchmarks/results/host_memory.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

import jlora
from benchmarks.speed._common import format_command, versions
from jlora import cli, models

TINY = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 2}
MEDIUM = {"hidden_size": 1024, "intermediate_size": 2752, "vocab_size": 20_000}
LARGE = {"hidden_size": 4096, "intermediate_size": 11_008, "vocab_size": 64_000}
SHAPES = {
    "tiny": TINY,
    "medium": {**MEDIUM, "num_hidden_layers": 8},
    "large": {**LARGE, "num_hidden_layers": 8},
}
TARGETS = r"(attention/\w+|mlp/\w+)/kernel$"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        operation: Name of the operation.
        peak_mb: Peak of the resident set above the baseline, in 10^6 bytes.
        returned_mb: Size of the returned arrays, which the peak includes.
        largest_tensors: Peak without the returned arrays, in sizes of the largest tensor.
    """

    operation: str
    peak_mb: float
    returned_mb: float
    largest_tensors: float


def write_checkpoint(folder: pathlib.Path, shape: dict[str, int]) -> None:
    """Writes a random checkpoint, one tensor at a time."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "num_attention_heads": shape["hidden_size"] // 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = models.checkpoint_mapping(models.model_from_config(folder))[0].values()
    shapes = {part.key: part.tensor_shape for weight in weights for part in weight.slices}
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, (key, tensor_shape) in enumerate(shapes.items()):
        # Random mantissas and signs of numbers between 1/64 and 1/32.
        bits = rng.integers(0, 2**16, tensor_shape, np.uint16)
        tensor = (bits & 0x807F | 0x3C80).view(ml_dtypes.bfloat16)
        weight_map[key] = f"model-{number}.safetensors"
        safetensors.numpy.save_file({key: tensor}, folder / weight_map[key], {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter_files(folder: pathlib.Path) -> None:
    """Writes two adapters of rank 8 on all projections of a checkpoint."""
    model, params = models.load(folder / "base")
    lora = jlora.lora_transform(model.apply, {TARGETS: jlora.LoRA(rank=8, alpha=16)})
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    for seed, name in enumerate(("one", "two")):
        rng = np.random.default_rng(seed)
        adapter = jax.tree.map(
            lambda leaf, rng=rng: rng.normal(size=leaf.shape).astype(np.float32) / 64, shapes
        )
        jlora.save_adapter(folder / f"{name}.safetensors", jax.device_put(adapter), params)


def _load(folder: pathlib.Path, out: pathlib.Path) -> Any:
    return models.load(folder / "base").params


def _load_quantized(folder: pathlib.Path, out: pathlib.Path) -> Any:
    return models.load(folder / "base", quantize={TARGETS: jlora.NF4()}).params


def _merge_to_dtype(folder: pathlib.Path, out: pathlib.Path) -> Any:
    params = models.load(folder / "base").params
    adapter = jlora.load_adapter(folder / "one.safetensors", params)
    return params, jlora.merge_to_dtype(params, adapter).params


def _run_command(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(arguments)
    assert status == 0


def _export(file_format: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    base, adapter = str(folder / "base"), str(folder / "one.safetensors")
    _run_command("export", base, adapter, str(out), "--format", file_format)


def _merge(folder: pathlib.Path, out: pathlib.Path) -> None:
    files = [str(folder / name) for name in ("one.safetensors", "two.safetensors")]
    _run_command("merge", str(folder / "base"), str(out), *files, "--rank", "8")


OPERATIONS: dict[str, Callable[[pathlib.Path, pathlib.Path], Any]] = {
    "load": _load,
    "load quantized": _load_quantized,
    "merge_to_dtype": _merge_to_dtype,
    "export merged": lambda folder, out: _export("hf", folder, out),
    "export peft": lambda folder, out: _export("peft", folder, out),
    "merge": _merge,
}


def read_memory(name: str) -> float:
    """Returns a line of the process's status in 10^6 bytes: VmRSS now, or VmHWM at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e6


def measure_here(operation: str, folder: pathlib.Path, tiny: pathlib.Path) -> None:
    """Prints the peak and the size of the result of an operation, in this process."""
    run = OPERATIONS[operation]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(tiny, pathlib.Path(out) / "tiny")
        baseline = read_memory("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
        result = run(folder, pathlib.Path(out) / "out")
        peak = read_memory("VmHWM") - baseline
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(result)}
    returned = sum(arrays.values()) / 1e6
    print(json.dumps([peak, returned]))


def run_child(operation: str, folder: pathlib.Path, tiny: pathlib.Path) -> str:
    """Runs an operation in a process of its own, and returns what it prints."""
    command = [sys.executable, "-m", "benchmarks.speed.host_memory", "--child", operation]
    done = subprocess.run(
        [*command, str(folder), str(tiny)], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def measure(shape: dict[str, int], operations: Iterable[str]) -> list[Row]:
    """Returns the measurements on a checkpoint of a shape."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: pathlib.Path(temporary) / name for name in ("tiny", "main")}
        for folder, size in ((folders["tiny"], TINY), (folders["main"], shape)):
            folder.mkdir()
            write_checkpoint(folder / "base", size)
            run_child("adapters", folder, folder)
        largest = 2 * shape["vocab_size"] * shape["hidden_size"] / 1e6
        for operation in operations:
            child = run_child(operation, folders["main"], folders["tiny"])
            peak, returned = json.loads(child.splitlines()[-1])
            extra = (peak - returned) / largest
            rows.append(Row(operation, round(peak, 1), round(returned, 1), round(extra, 2)))
            print(f"{operation:15} {peak:9.1f} MB  {returned:9.1f} MB  {extra:6.2f}", flush=True)
    return rows


def main() -> None:
    """Measures all operations, or one of them in a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a checkpoint of 270 MB")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        operation, folder, tiny = options.child
        if operation == "adapters":
            write_adapter_files(pathlib.Path(folder))
        else:
            measure_here(operation, pathlib.Path(folder), pathlib.Path(tiny))
        return
    shape = SHAPES["medium" if options.tiny else "large"]
    print(f"{'operation':15} {'peak':>12}  {'returned':>12}  largest tensors")
    rows = measure(shape, OPERATIONS)
    if options.output is not None:
        result = {
            "command": format_command("benchmarks.speed.host_memory"),
            "device": f"cpu, {platform.machine()}",
            "versions": versions("jax", "numpy", "safetensors"),
            "shape": shape,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
