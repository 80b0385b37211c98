"""Cost of a checkpoint: the wait of the run, and the time to write it in the background.

    python -m benchmarks.speed.checkpoint --output benchmarks/results/resume.json
    python -m benchmarks.speed.checkpoint --tiny

The state is LoRA of rank 16 on all seven projections of an 8 B Llama 3, with Adam: 126 million
float32 elements. A run that saves once a minute loses the wait out of 60 seconds. No training runs
at the same time, so that writing has the full machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.training import CheckpointManager

# Rank 16 beside q, k, v, o, gate, up, down of 32 layers, 4096 and 14,336 wide, 1024 for k and v.
LAYERS, RANK = 32, 16
WIDTHS = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)] + [(4096, 14336)] * 2
SHAPES = [*WIDTHS, (14336, 4096)]
EVERY_S = 60.0


def random_state(tiny: bool) -> dict[str, Any]:
    """Returns an adapter and its two Adam moments."""
    layers, shapes = (2, [(16, 24)]) if tiny else (LAYERS, SHAPES)
    key = jax.random.key(0)
    arrays = {}
    for number, (inputs, outputs) in enumerate(shapes):
        for name, shape in (("a", (layers, inputs, RANK)), ("b", (layers, RANK, outputs))):
            for part in ("factor", "mean", "square"):
                key, subkey = jax.random.split(key)
                arrays[f"{number}/{name}/{part}"] = jax.random.normal(subkey, shape, jnp.float32)
    return jax.block_until_ready(arrays)


def measure(tiny: bool, repeats: int) -> dict[str, Any]:
    """Returns medians over several checkpoints."""
    state = random_state(tiny)
    folder = Path(tempfile.mkdtemp())
    waited, written = [], []
    try:
        manager = CheckpointManager(folder / "run", save_total_limit=2)
        for step in range(1, repeats + 1):
            start = time.perf_counter()
            manager.save(step, state, {})
            waited.append(time.perf_counter() - start)
            manager.wait_until_finished()
            written.append(time.perf_counter() - start)
        start = time.perf_counter()
        manager.restore(state)
        restored = time.perf_counter() - start
        manager.close()
    finally:
        shutil.rmtree(folder)
    num_elements = sum(array.size for array in state.values())
    return {
        "numbers": num_elements,
        "gb": 4 * num_elements / 1e9,
        "waited_s": statistics.median(waited),
        "written_s": statistics.median(written),
        "restored_s": restored,
        "lost_share_at_one_a_minute": statistics.median(waited) / EVERY_S,
        "checkpoints": repeats,
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small state, as a check")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args()
    result = {
        "command": " ".join(["python -m benchmarks.speed.checkpoint", *sys.argv[1:]]),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")},
        },
        **measure(options.tiny, options.repeats),
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
