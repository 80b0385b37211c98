"""The tables of what was measured on several GPUs, from the committed rows.

`python -m benchmarks.multi_gpu_table` prints them as benchmarks/README.md has them.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.h100 import common

RESULTS = pathlib.Path(__file__).parent / "results" / "multi_gpu"
HEAD = ("method", "cards", "tokens/s", "efficiency", "of peak", "peak GiB a card", "sent GB a card")

Row = dict[str, Any]


def rows(folder: pathlib.Path = RESULTS) -> list[Row]:
    """All rows of a folder, those of one card first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    shapes = list(common.SHAPES)
    return sorted(found, key=lambda row: (shapes.index(row["shape"]), row["details"]["cards"]))


def _alike(row: Row) -> tuple[Any, ...]:
    """What two rows must share for one to be the other's on more cards, each with as much to do."""
    details = row["details"]
    kind = details["quantize"], details["compute_dtype"], details["stacked"], details["remat"]
    return (row["shape"], row["batch"] / details["cards"], row["length"], *kind)


def efficiency(row: Row, others: Iterable[Row]) -> float | None:
    """Tokens a second of each card, as a share of what one card makes alone.

    None where no row has one card with as many tokens, as for a model that does not fit on it.
    """
    alone = [one for one in others if one["details"]["cards"] == 1 and _alike(one) == _alike(row)]
    if not alone:
        return None
    best = max(one["tokens_per_s"] for one in alone)
    return row["tokens_per_s"] / row["details"]["cards"] / best


def sent(row: Row) -> str:
    """What a card sends in a step, in GB, and by which collectives."""
    found = row["details"]["collectives"]
    kinds = " ".join(f"{one['kind']} {one['times']}x" for one in found)
    return f"{sum(one['bytes'] for one in found) / 1e9:.2f} ({kinds})" if found else "none"


def table(found: Sequence[Row]) -> list[str]:
    """Rows as lines of Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for row in found:
        share, part = efficiency(row, found), row["details"]["share_of_peak"]
        cells = [
            row["method"],
            str(row["details"]["cards"]),
            f"{row['tokens_per_s']:,}",
            "-" if share is None else f"{share:.3f}",
            "-" if part is None else f"{part:.3f}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            sent(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tables(found: Sequence[Row]) -> dict[tuple[str, float, int], list[str]]:
    """The table of every shape, sequences a card, and length."""
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in found:
        rows_a_card = row["batch"] / row["details"]["cards"]
        groups.setdefault((row["shape"], rows_a_card, row["length"]), []).append(row)
    return {key: table(group) for key, group in groups.items()}


def apart(row: Row, alone: Row) -> float:
    """How far the first losses of a row are from those of one card on the same batch, relatively.

    Raises:
        ValueError: They are of other batches, or of other numbers of steps.
    """
    told = [[one[name] for name in ("shape", "batch", "length")] for one in (row, alone)]
    pair = row["details"]["losses"], alone["details"]["losses"]
    if told[0] != told[1] or len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{row['command']!r} and {alone['command']!r} are of other batches or steps, and their "
            f"losses cannot be compared. Give both the same --shape, --rows, --length and --losses."
        )
    return max(abs(one / two - 1) for one, two in zip(*pair, strict=True))


def main() -> None:
    """Prints the tables."""
    for (shape, batch, length), lines in tables(rows()).items():
        print(f"\n{shape}, {batch:g} x {length} tokens a card:\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
