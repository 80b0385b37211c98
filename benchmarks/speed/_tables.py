"""Markdown tables of the committed rows: training steps on one H100, and on several GPUs.

`python -m benchmarks.speed._tables` prints them as in README.md and benchmarks/README.md.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.speed import _common

RESULTS = pathlib.Path(__file__).parents[1] / "results"
H100_RESULTS = RESULTS / "h100"
MULTI_GPU_RESULTS = RESULTS / "multi_gpu"

H100_HEADER = ("method", "ms / step", "/ floor", "tokens/s", "peak GiB")
MULTI_GPU_HEADER = (
    "method",
    "cards",
    "tokens/s",
    "efficiency",
    "of peak",
    "peak GiB a card",
    "sent GB a card",
)

Row = dict[str, Any]


def load_rows(folder: pathlib.Path) -> list[Row]:
    """Returns all rows of a folder, sorted by shape."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    shapes = list(_common.SHAPES)
    return sorted(rows, key=lambda row: shapes.index(row["shape"]))


def _format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


# --- one H100 ------------------------------------------------------------------------------------


def h100_table(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the table of rows with one shape and batch."""
    floor = next((row["step_ms"] for row in rows if row["method"] == "floor"), None)
    cells = []
    for row in rows:
        ratio = "" if floor is None else f"{row['step_ms'] / floor:.2f}"
        peak = row["planned_gib"] if row["peak_gib"] is None else row["peak_gib"]
        tokens = f"{row['tokens_per_s']:,}"
        cells.append([row["method"], f"{row['step_ms']:.1f}", ratio, tokens, f"{peak:.1f}"])
    return _format_table(H100_HEADER, cells)


def h100_tables(folder: pathlib.Path = H100_RESULTS) -> dict[tuple[str, int, int], list[str]]:
    """Returns the tables by shape, batch and length, each with the fastest method first."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in sorted(load_rows(folder), key=lambda row: row["step_ms"]):
        groups.setdefault((row["shape"], row["batch"], row["length"]), []).append(row)
    return {key: h100_table(rows) for key, rows in groups.items()}


# --- several GPUs --------------------------------------------------------------------------------


def _workload_per_card(row: Row) -> tuple[Any, ...]:
    """Returns all properties that rows must share for their efficiency to be comparable."""
    details = row["details"]
    names = ("quantize", "compute_dtype", "stacked", "remat_policy")
    options = (details[name] for name in names)
    return (row["shape"], row["batch"] / details["cards"], row["length"], *options)


def efficiency(row: Row, rows: Iterable[Row]) -> float | None:
    """Returns tokens per second and card, as a fraction of the rate of one card.

    None if no row has one card with the same tokens, as for a model that does not fit on it.
    """
    workload = _workload_per_card(row)
    single = [
        other["tokens_per_s"]
        for other in rows
        if other["details"]["cards"] == 1 and _workload_per_card(other) == workload
    ]
    if not single:
        return None
    return row["tokens_per_s"] / row["details"]["cards"] / max(single)


def format_collectives(row: Row) -> str:
    """Returns the GB that a card sends in a step, and the collectives."""
    collectives = row["details"]["collectives"]
    kinds = " ".join(f"{one['kind']} {one['times']}x" for one in collectives)
    total = sum(one["bytes"] for one in collectives)
    return f"{total / 1e9:.2f} ({kinds})" if collectives else "none"


def multi_gpu_table(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the table of rows with the same work per card."""
    cells = []
    for row in rows:
        ratio, share = efficiency(row, rows), row["details"]["share_of_peak"]
        cells.append(
            [
                row["method"],
                str(row["details"]["cards"]),
                f"{row['tokens_per_s']:,}",
                "-" if ratio is None else f"{ratio:.3f}",
                "-" if share is None else f"{share:.3f}",
                "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
                format_collectives(row),
            ]
        )
    return _format_table(MULTI_GPU_HEADER, cells)


def multi_gpu_tables(rows: Sequence[Row]) -> dict[tuple[str, float, int], list[str]]:
    """Returns the tables by shape, sequences per card, and length; one card comes first."""
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["details"]["cards"]):
        per_card = row["batch"] / row["details"]["cards"]
        groups.setdefault((row["shape"], per_card, row["length"]), []).append(row)
    return {key: multi_gpu_table(group) for key, group in groups.items()}


def max_loss_difference(row: Row, single: Row) -> float:
    """Returns the largest relative difference of the first losses from those of one card.

    Raises:
        ValueError: If the batches, or the numbers of steps, differ.
    """
    batches = [[one[name] for name in ("shape", "batch", "length")] for one in (row, single)]
    losses = row["details"]["losses"], single["details"]["losses"]
    if batches[0] != batches[1] or len(losses[0]) != len(losses[1]):
        raise ValueError(
            f"{row['command']!r} and {single['command']!r} have different batches or steps, so "
            f"their losses cannot be compared. Give both the same --shape, --rows, --length and "
            f"--losses."
        )
    return max(abs(one / two - 1) for one, two in zip(*losses, strict=True))


def main() -> None:
    """Prints the tables."""
    for (shape, batch, length), lines in h100_tables().items():
        print(f"\n{shape}, {batch} x {length} tokens:\n", *lines, sep="\n")
    for (shape, per_card, length), lines in multi_gpu_tables(load_rows(MULTI_GPU_RESULTS)).items():
        print(f"\n{shape}, {per_card:g} x {length} tokens per card:\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
