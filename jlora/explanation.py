"""The table that `explain` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from jlora.factored.probe import Axes


class Row(NamedTuple):
    """One weight.

    Attributes:
        axes: What its axes do; None when it takes part in no product or look-up.
        adapter: The family and rank that a rule gives it, or "frozen".
        parameters: How many numbers the adapter trains for it.
        base_parameters: How many the weight has.
        factored: The primitives that use it without its dense sum.
        dense: Why, elsewhere, the dense sum is formed.
        stored: How the weight is quantised; empty where it is an array.
        bits: That a number of it then takes, scales and padding counted.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: Axes | None
    adapter: str
    parameters: int
    base_parameters: int
    factored: tuple[str, ...]
    dense: tuple[str, ...]
    stored: str = ""
    bits: float = 0.0


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every weight of a model and how it is computed; `print` shows it as a table.

    Attributes:
        rows: One for each weight, in the order of the tree.
        problems: Why `init` would refuse the rules, or `apply` the adapter; often empty.
        shared: For what several weights share, by name, how many numbers of it are trained.
    """

    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    shared: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers of the adapter are trained in all."""
        return sum(row.parameters for row in self.rows) + sum(self.shared.values())

    @property
    def trainable_share(self) -> float:
        """The adapter's numbers over the base's."""
        return self.parameters / max(1, sum(row.base_parameters for row in self.rows))

    def __str__(self) -> str:
        header = ("weight", "shape", "axes", "adapter", "parameters", "computed")
        cells = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header) - 1)]
        lines = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=True)), row[-1]]
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in (*widths, len(header[-1]))))
        lines.extend(f"shared as {name!r}: {n:,} parameters" for name, n in self.shared.items())
        adapted = sum(row.adapter != "frozen" for row in self.rows)
        lines.append(
            f"{adapted} of {len(self.rows)} weights adapted, {self.parameters:,} parameters, "
            f"{self.trainable_share:.2%} of the base's."
        )
        packed = [row for row in self.rows if row.stored]
        if packed:
            numbers = sum(row.base_parameters for row in packed)
            bits = sum(row.bits * row.base_parameters for row in packed) / numbers
            lines.append(
                f"{len(packed)} of {len(self.rows)} weights quantised, in {bits:.2f} bits a number."
            )
        lines.extend(f"refused: {problem}" for problem in self.problems)
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    roles = ""
    if row.axes is not None:
        names = zip(("batch", "in", "out"), row.axes, strict=True)
        roles = " ".join(f"{name} {','.join(map(str, axes))}" for name, axes in names if axes)
    used = ", ".join((*row.factored, *row.dense)) or "unused"
    if row.adapter != "frozen":
        ways = (("factored: ", row.factored), ("dense: ", row.dense))
        used = "; ".join(way + ", ".join(by) for way, by in ways if by)
    return (
        row.path,
        f"{'x'.join(map(str, row.shape)) or 'scalar'} {row.stored}".rstrip(),
        roles or "-",
        row.adapter,
        f"{row.parameters:,}" if row.parameters else "-",
        used,
    )
