"""Cost of one training step with each adapter method, on one transformer.

Prints a table and writes JSON. On a CPU:
`python -m benchmarks.speed.methods --shape tiny`; on one GPU:
`python -m benchmarks.speed.methods --shape 1b --output benchmarks/results/families.json`. With
`--append`, the rows of several runs on one kind of device go to one file; LoRA is run in each.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import sys
from typing import Any

import flax
import jax
import optax

import jlora
from benchmarks.speed.step_cost import SHAPES, Methods, Row, measure

RANK = 16
# Every family has the same rank, if it has one, so that only the method differs.
FAMILIES: dict[str, Any] = {
    "LoRA": jlora.LoRA(rank=RANK, alpha=RANK),
    "LoRA-FA": jlora.LoRAFA(rank=RANK, alpha=RANK),
    "DoRA": jlora.DoRA(rank=RANK, alpha=RANK),
    "DoRA, through the norm": jlora.DoRA(rank=RANK, alpha=RANK, through_norm=True),
    "VeRA": jlora.VeRA(rank=RANK),
    "VeRA, rank 256": jlora.VeRA(rank=256),
    "AdaLoRA": jlora.AdaLoRA(rank=RANK, alpha=RANK),
    "DyLoRA": jlora.DyLoRA(rank=RANK, alpha=RANK),
    "SoRA": jlora.SoRA(rank=RANK, alpha=RANK),
    "LoHa, rank 4": jlora.LoHa(rank=4, alpha=4),
    "LoKr": jlora.LoKr(rank=RANK, alpha=RANK),
    "HiRA": jlora.HiRA(rank=RANK),
    "FourierFT, 64 waves": jlora.FourierFT(num_frequencies=64),
    "FourierFT, 1000": jlora.FourierFT(num_frequencies=1000),
    "IA3": jlora.IA3(),
    "VB-LoRA": jlora.VBLoRA(rank=4, num_vectors=64, vector_length=64),
    "Full": jlora.FullDelta(),
    "Mixture of 4 LoRAs": jlora.LoRAMoE(num_experts=4, rank=RANK, alpha=RANK),
}


@dataclasses.dataclass(frozen=True)
class FamilyRow(Row):
    """One measurement, with LoRA's of the same run, because the clock differs between runs.

    Attributes:
        lora_ms: Median of LoRA's step.
    """

    lora_ms: float


def table(rows: list[FamilyRow]) -> str:
    """Returns the rows as text, with the ratio of each step to LoRA's."""
    lines = [f"{'family':24} {'step ms':>9} {'/ LoRA':>7} {'TFLOP':>9} {'MiB':>9} {'trained':>13}"]
    for row in rows:
        ratio = f"{row.step_ms / row.lora_ms:.2f}"
        lines.append(
            f"{row.method:24} {row.step_ms:9.2f} {ratio:>7} {row.tflop:9.4f} "
            f"{row.peak_mib:9,.1f} {row.trained:13,}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures the requested families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--scan-layers", action="store_true", help="stacked layers in a scan")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the other rows of that file")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    found = {
        "command": " ".join(
            ["python -m benchmarks.speed.methods", "--shape", options.shape]
            + ["--scan-layers"] * options.scan_layers
        ),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
        "shape": dataclasses.asdict(shape),
        "scan_layers": options.scan_layers,
        "repeats": options.repeats,
        "configs": {name: repr(config) for name, config in FAMILIES.items()},
    }
    params, rows, ordered, lora_ms = None, {}, [], None
    if options.append and options.output and options.output.exists():
        known = json.loads(options.output.read_text())
        if any(
            known.get(key) != found[key]
            for key in ("device", "versions", "shape", "scan_layers", "repeats")
        ):
            parser.error(f"{options.output} was measured with other settings. Use another file.")
        rows = {row["method"]: FamilyRow(**row) for row in known["rows"]}
    for name in dict.fromkeys(["LoRA", *options.families]):
        methods = Methods(shape, FAMILIES[name], params=params, scan_layers=options.scan_layers)
        params = methods.params
        # A compiler counts the body of a scan once, so operations are counted without a scan.
        abstract = Methods(shape, FAMILIES[name], abstract=True)
        row = measure("apply", methods, abstract, options.repeats)
        lora_ms = lora_ms or row.step_ms
        found_row = {**dataclasses.asdict(row), "method": name, "lora_ms": lora_ms}
        rows[name] = FamilyRow(**found_row)
        print(table([rows[name]]).splitlines()[-1], flush=True)
        del methods
        gc.collect()
        ordered = [rows[name] for name in FAMILIES if name in rows]
        if options.output:  # After each family, so that an interruption loses little.
            content = {**found, "rows": [dataclasses.asdict(row) for row in ordered]}
            options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{options.shape}: {shape}")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(table(ordered))


if __name__ == "__main__":
    main()
