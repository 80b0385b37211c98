"""What a checkpoint costs a run: how long it waits for one, and how long one takes to write.

    python benchmarks/resume.py --output benchmarks/results/resume.json
    python benchmarks/resume.py --tiny

The state is that of LoRA of rank 16 on all seven projections of a Llama 3 of 8 billion weights,
with Adam: 126 million numbers in float32. A run that saves once a minute loses the time that it
waits in 60 seconds; no training goes on beside it here, so writing has the machine to itself.
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

from jlora.training.checkpointing import CheckpointManager

# Rank 16 beside q, k, v, o, gate, up, down of 32 layers, 4096 and 14,336 wide, 1024 for k and v.
LAYERS, RANK = 32, 16
WIDTHS = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)] + [(4096, 14336)] * 2
SHAPES = [*WIDTHS, (14336, 4096)]
EVERY_S = 60.0


def state(tiny: bool) -> dict[str, Any]:
    """An adapter and Adam's two moments of it."""
    layers, shapes = (2, [(16, 24)]) if tiny else (LAYERS, SHAPES)
    key = jax.random.key(0)
    arrays = {}
    for number, (inputs, outputs) in enumerate(shapes):
        for name, shape in (("a", (layers, inputs, RANK)), ("b", (layers, RANK, outputs))):
            for part in ("factor", "mean", "square"):
                key, own = jax.random.split(key)
                arrays[f"{number}/{name}/{part}"] = jax.random.normal(own, shape, jnp.float32)
    return jax.block_until_ready(arrays)


def measured(tiny: bool, repeats: int) -> dict[str, Any]:
    """Medians over some checkpoints."""
    held = state(tiny)
    folder = Path(tempfile.mkdtemp())
    waited, written = [], []
    try:
        saver = CheckpointManager(folder / "run", save_total_limit=2)
        for step in range(1, repeats + 1):
            start = time.perf_counter()
            saver.save(step, held, {})
            waited.append(time.perf_counter() - start)
            saver.wait_until_finished()
            written.append(time.perf_counter() - start)
        start = time.perf_counter()
        saver.restore(held)
        restored = time.perf_counter() - start
        saver.close()
    finally:
        shutil.rmtree(folder)
    numbers = sum(array.size for array in held.values())
    return {
        "numbers": numbers,
        "gb": 4 * numbers / 1e9,
        "waited_s": statistics.median(waited),
        "written_s": statistics.median(written),
        "restored_s": restored,
        "lost_share_at_one_a_minute": statistics.median(waited) / EVERY_S,
        "checkpoints": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small state, to see it work")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE")
    given = parser.parse_args()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")},
        },
        **measured(given.tiny, given.repeats),
    }
    print(json.dumps(result, indent=2))
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
