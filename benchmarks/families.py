"""What one training step costs with each adapter family, on one transformer.

Prints a table and writes JSON. On a CPU: `python benchmarks/families.py --shape tiny`; on one GPU:
`python benchmarks/families.py --shape 1b --output benchmarks/results/families.json`. With
`--append` the rows of several runs on one kind of device come to one file; LoRA is run in each.
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
from step_cost import SHAPES, Methods, Row, measure

import jlora

RANK = 16
# Every family at one rank where it has one, so that what differs is the family.
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
    """One measurement, with LoRA's of the same call: from call to call the clock differs.

    Attributes:
        lora_ms: Median of LoRA's step.
    """

    lora_ms: float


def table(rows: list[FamilyRow]) -> str:
    """The rows as text, with each step over LoRA's."""
    lines = [f"{'family':24} {'step ms':>9} {'/ LoRA':>7} {'TFLOP':>9} {'MiB':>9} {'trained':>13}"]
    for row in rows:
        ratio = f"{row.step_ms / row.lora_ms:.2f}"
        lines.append(
            f"{row.method:24} {row.step_ms:9.2f} {ratio:>7} {row.tflop:9.4f} "
            f"{row.peak_mib:9,.1f} {row.trained:13,}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures the families asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--scanned", action="store_true", help="one stack of layers, in a scan")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the rows that it has")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    found = {
        "command": " ".join(
            ["python benchmarks/families.py", "--shape", options.shape]
            + ["--scanned"] * options.scanned
        ),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
        "shape": dataclasses.asdict(shape),
        "scanned": options.scanned,
        "repeats": options.repeats,
        "configs": {name: repr(config) for name, config in FAMILIES.items()},
    }
    params, rows, ordered, lora_ms = None, {}, [], None
    if options.append and options.output and options.output.exists():
        known = json.loads(options.output.read_text())
        if any(
            known[key] != found[key]
            for key in ("device", "versions", "shape", "scanned", "repeats")
        ):
            parser.error(f"{options.output} was measured otherwise; write another file.")
        rows = {row["method"]: FamilyRow(**row) for row in known["rows"]}
    for name in dict.fromkeys(["LoRA", *options.families]):
        methods = Methods(shape, FAMILIES[name], params=params, scanned=options.scanned)
        params = methods.params
        # A compiler counts what a scan repeats once, so operations are counted without one.
        abstract = Methods(shape, FAMILIES[name], abstract=True)
        row = measure("apply", methods, abstract, options.repeats)
        lora_ms = lora_ms or row.step_ms
        found_row = {**dataclasses.asdict(row), "method": name, "lora_ms": lora_ms}
        rows[name] = FamilyRow(**found_row)
        print(table([rows[name]]).splitlines()[-1], flush=True)
        del methods
        gc.collect()
        ordered = [rows[name] for name in FAMILIES if name in rows]
        if options.output:  # After each, so that what was measured is not lost.
            content = {**found, "rows": [dataclasses.asdict(row) for row in ordered]}
            options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{options.shape}: {shape}")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(table(ordered))


if __name__ == "__main__":
    main()
