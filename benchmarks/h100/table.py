"""The tables of what was measured on one H100, from the committed rows.

`python -m benchmarks.h100.table` prints them as the README has them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from benchmarks.h100 import common

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "h100"
HEAD = ("method", "ms / step", "/ floor", "tokens/s", "peak GiB")


def rows() -> list[dict[str, Any]]:
    """All committed rows, of a shape the fastest first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    shapes = list(common.SHAPES)
    return sorted(found, key=lambda row: (shapes.index(row["shape"]), row["step_ms"]))


def table(found: list[dict[str, Any]]) -> list[str]:
    """Rows of one shape and batch as lines of Markdown."""
    floor = next((row["step_ms"] for row in found if row["method"] == "floor"), None)
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for row in found:
        share = "" if floor is None else f"{row['step_ms'] / floor:.2f}"
        peak = row["planned_gib"] if row["peak_gib"] is None else row["peak_gib"]
        lines.append(
            f"| {row['method']} | {row['step_ms']:.1f} | {share} | {row['tokens_per_s']:,} | "
            f"{peak:.1f} |"
        )
    return lines


def tables() -> dict[tuple[str, int, int], list[str]]:
    """The table of every shape, batch and length."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows():
        groups.setdefault((row["shape"], row["batch"], row["length"]), []).append(row)
    return {key: table(found) for key, found in groups.items()}


def main() -> None:
    """Prints the tables."""
    for (shape, batch, length), lines in tables().items():
        print(f"\n{shape}, {batch} x {length} tokens:\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
